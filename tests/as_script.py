"GPU tests as a script, for machines with a GPU and without pytest."
import time

import torch


def run(names: dict) -> int: # how many tests failed
    "Call every test_… of a module."
    if not torch.cuda.is_available():
        print('no CUDA device: nothing was tested')
        return 1
    failed = 0
    for name, test in [(n, f) for n, f in names.items() if n.startswith('test_')]:
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            test()
            said = 'ok'
        except Exception as e:                     # the next test may still tell something
            failed, said = failed + 1, f'FAILED {type(e).__name__}: {str(e)[:600]}'
        print(f'{name}: {said} ({time.perf_counter() - start:.1f} s)', flush=True)
    return failed
