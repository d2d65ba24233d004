"""Loading a sparse model beside the disk and safetensors: seconds, and MB/s of the stored file and of the dense weights that come out of it.

    python benchmarks/load.py               1 GB of dense weights in every format, bf16 and fp32; --gigabytes .1 for a quick look
    python benchmarks/load.py --folder DIR  on the disk to be measured (default: the temporary folder)

Cold: the file is dropped from the page cache before every load, as far as the system allows without privileges; warm: it was read just before.
`disk` reads the bytes of the stored file and does nothing else. `load` is load_sparse into a model that is there: it checks the SHA-256 and every
number in the file and writes the weights; its three stages are timed by themselves in the fastest warm load. `built` has the model made from the
folder too. `safetensors` is load_file of the dense weights, copied into the model. `beside` is the largest memory of the process during a load
into a model that is no mapped file, less what it had before (Linux).
"""
import argparse
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from common import header, save, seconds, show
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparse_workbench as sw
from sparse_workbench import formats
from sparse_workbench.zoo import Llama, LlamaConfig

CASES = {'bitmask': ('unstructured', .5), 'csr': ('unstructured', .9), '2:4': ('2:4', .5), '2:4 down': ('2:4:out', .5), 'block64': ('block64', .9), 'block4': ('block4', .8), 'dense': ('unstructured', .5)}
DTYPES = {'bf16': torch.bfloat16, 'fp32': torch.float32}
SIDE = 4096


def empty(layers: int, dtype: torch.dtype) -> nn.Module:
    "Square layers, not filled."
    return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False, device='meta', dtype=dtype) for _ in range(layers))).to_empty(device='cpu')


def fill(model: nn.Module, pattern: str, sparsity: float) -> nn.Module:
    "Random zeros of a pattern in every square weight; two are drawn and used in turns."
    p, g, made = sw.pattern(pattern), torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for i, w in enumerate(w for w in model.parameters()):
            if tuple(w.shape) != (SIDE, SIDE): w.copy_(torch.randn(w.shape, generator=g))
            else:
                if len(made) < 2: made.append(torch.randn(SIDE, SIDE, generator=g).where(p.select(torch.rand(SIDE, SIDE, generator=g), None if p.sparsity else sparsity), 0).to(w.dtype))
                w.copy_(made[i % len(made)])
    return model


@contextmanager
def stored_once() -> Iterator[None]:
    "Weights that are the same are packed once while a folder is written."
    real, made = formats.store, {}
    def store(t: Tensor, how: str, name: str = '') -> tuple[dict, dict]:
        key = t.shape, how, bytes(t.detach().view(-1)[:4096].view(torch.uint8).numpy())
        if key not in made: made[key] = real(t, how, name)
        return dict(made[key][0]), made[key][1]
    formats.store = store
    try: yield
    finally: formats.store = real


def drop(path: Path) -> None:
    "Ask the system to forget the pages of a file."
    with path.open('rb') as f:
        os.fsync(f.fileno())
        if hasattr(os, 'posix_fadvise'): os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    "Read a file and forget it."
    buffer = bytearray(2**20)
    with path.open('rb', buffering=0) as f:
        while f.readinto(buffer): pass


def timed(f: Callable[[], object], path: Path, cold: bool, repeats: int) -> float:
    "The fastest of several loads."
    best = float('inf')
    for _ in range(repeats):
        if cold: drop(path)
        else: read(path)
        best = min(best, seconds(f, 'cpu'))
    return best


STAGES = {'checksum': 'check_files', 'checks': 'payloads', 'placing': 'fill'}


def staged(f: Callable[[], object], path: Path, repeats: int) -> dict[str, float]:
    "The fastest warm load: its seconds, those of the processor, and of three stages."
    times, real = {}, {n: getattr(formats, n) for n in STAGES.values()}
    def clocked(stage: str, call: Callable) -> Callable:
        def run(*args, **kw):
            start = time.perf_counter()
            try: return call(*args, **kw)
            finally: times[stage] = time.perf_counter() - start
        return run
    for stage, name in STAGES.items(): setattr(formats, name, clocked(stage, real[name]))
    try:
        found = []
        for _ in range(repeats):
            read(path)
            busy = time.process_time()
            whole = seconds(f, 'cpu')
            found.append({'load warm s': whole, 'processor s': time.process_time() - busy, **{f'{s} s': times.get(s, 0.) for s in STAGES}})
        return min(found, key=lambda x: x['load warm s'])
    finally:
        for name, call in real.items(): setattr(formats, name, call)


def anonymous() -> int:
    "Bytes of this process that are no mapped file; 0 where the system does not say."
    try: return next(int(x.split()[1]) * 1024 for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('RssAnon'))
    except (OSError, StopIteration): return 0


def beside(f: Callable[[], object]) -> float:
    "MB by which memory grows at most during a call."
    gc.collect()
    before, most, done = anonymous(), [0], threading.Event()
    def watch() -> None:
        while not done.wait(.002): most[0] = max(most[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    result = f()                                                               # alive while it is weighed
    most[0] = max(most[0], anonymous())
    done.set()
    thread.join()
    del result
    return (most[0] - before) / 1e6


def row_of(name: str, kind: str, folder: Path, layers: int, repeats: int) -> dict:
    "One format: the disk, safetensors with the dense weights, and load_sparse into a model."
    (pattern, sparsity), dtype = CASES[name], DTYPES[kind]
    model = fill(empty(layers, dtype), pattern, sparsity)
    with stored_once(): sw.save_sparse(model, folder/'sparse', name.removesuffix(' down'))
    dense = sum(p.nbytes for p in model.parameters())
    save_file({n: p.detach() for n, p in model.named_parameters()}, folder/'dense.safetensors')
    path, plain, expected = folder/'sparse/model.safetensors', folder/'dense.safetensors', [p.detach().clone() for p in list(model.parameters())[-2:]]
    def theirs() -> None: # a mapped file is read when it is copied
        with torch.no_grad():
            for n, t in load_file(plain).items(): model.get_parameter(n).copy_(t)
    with torch.no_grad():
        for p in model.parameters(): p.fill_(1)
    load = lambda: sw.load_sparse(folder/'sparse', model)
    row = {'format': name, 'dtype': kind, 'layers': layers, 'file MB': path.stat().st_size / 1e6, 'weights MB': dense / 1e6}
    row |= {f'disk {how} s': timed(lambda: read(path), path, how == 'cold', repeats) for how in ('cold', 'warm')} | {'fromfile warm s': timed(lambda: np.fromfile(path, np.uint8), path, False, repeats)}
    row |= {'load cold s': timed(load, path, True, repeats)} | staged(load, path, repeats) | {'beside MB': beside(load)}
    for p, e in zip(list(model.parameters())[-2:], expected): assert torch.equal(formats.integers(p), formats.integers(e)), name
    row |= {f'dense disk {how} s': timed(lambda: read(plain), plain, how == 'cold', repeats) for how in ('cold', 'warm')}
    return row | {f'safetensors {how} s': timed(theirs, plain, how == 'cold', repeats) for how in ('cold', 'warm')}


def row_of_built(folder: Path, gigabytes: float, repeats: int) -> dict:
    "A Llama that is made from its folder."
    config = LlamaConfig(1000, SIDE, SIDE, max(1, round(gigabytes * 1e9 / (2 * 7 * SIDE * SIDE))), 32, 32, SIDE // 32)
    with formats.Blank(Tensor): model = Llama(config)
    for p in model.parameters(): p.data = torch.empty(p.shape, dtype=torch.bfloat16)
    with stored_once(): sw.save_sparse(fill(model, *CASES['bitmask']), folder/'sparse', 'bitmask')
    path, dense, last, held = folder/'sparse/model.safetensors', sum(p.nbytes for p in model.parameters()), model.model.layers[-1].mlp.down_proj.weight.detach().clone(), []
    del model
    load = lambda: held.append(sw.load_sparse(folder/'sparse')) or held.clear()
    row = {'format': 'bitmask, built', 'dtype': 'bf16', 'layers': config.num_hidden_layers, 'file MB': path.stat().st_size / 1e6, 'weights MB': dense / 1e6}
    row |= {f'disk {how} s': timed(lambda: read(path), path, how == 'cold', repeats) for how in ('cold', 'warm')} | {'load cold s': timed(load, path, True, repeats)}
    row |= staged(load, path, repeats)
    assert torch.equal(formats.integers(sw.load_sparse(folder/'sparse').model.layers[-1].mlp.down_proj.weight), formats.integers(last))
    return row


def rates(r: dict) -> dict:
    "A line of the table: MB/s of the stored file and of the dense weights."
    rate = lambda size, t: round(r[size] / r[t]) if t in r else ''
    return {'format': r['format'], 'dtype': r['dtype'], 'file MB': round(r['file MB']), 'weights MB': round(r['weights MB']), 'disk cold': rate('file MB', 'disk cold s'), 'warm': rate('file MB', 'disk warm s'),
            'load cold: file': rate('file MB', 'load cold s'), 'weights': rate('weights MB', 'load cold s'), 'load warm: file ': rate('file MB', 'load warm s'), 'weights ': rate('weights MB', 'load warm s'),
            'safetensors cold': rate('weights MB', 'safetensors cold s'), 'warm ': rate('weights MB', 'safetensors warm s'),
            'load s': r['load warm s'], **{s: r[f'{s} s'] for s in STAGES}, 'processor s': r['processor s'], 'beside MB': round(r['beside MB']) if 'beside MB' in r else ''}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--gigabytes', type=float, default=1., help='of dense weights')
    p.add_argument('--folder', help='where the files are written and read')
    p.add_argument('--formats', nargs='+', default=[*CASES, 'built'], choices=[*CASES, 'built'])
    p.add_argument('--dtypes', nargs='+', default=[*DTYPES], choices=[*DTYPES])
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--out', help='folder of the JSON file (default: benchmarks/results)')
    a = p.parse_args()
    rows, head = [], header('cpu', gigabytes=a.gigabytes, cores=os.cpu_count(), load=round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None)
    for name in a.formats:
        for kind in a.dtypes if name != 'built' else a.dtypes[:1]:
            with tempfile.TemporaryDirectory(dir=a.folder) as tmp:
                layers = max(2, round(a.gigabytes * 1e9 / (DTYPES[kind].itemsize * SIDE * SIDE)))
                rows.append(row_of_built(Path(tmp), a.gigabytes, a.repeats) if name == 'built' else row_of(name, kind, Path(tmp), layers, a.repeats))
                print('.', end='', flush=True)
    print()
    show([rates(r) for r in rows], head)
    save('load', rows, head, a.out, 'cpu')


if __name__ == '__main__': main()
