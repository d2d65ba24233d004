"""2:4 layers through cuSPARSELt: our operator beside the raw call, PyTorch's tensor subclass and dense; and pruning with packing.

The raw call is PyTorch's, which plans anew every time; its output lies row by row, as the next layer wants it ("raw"), or column by column ("raw, columns"),
after which a layer that needs rows copies it. Each has an algorithm searched for it.

    python benchmarks/two_of_four.py           on a CUDA machine with cuSPARSELt
"""
import time

import torch
import torch.nn.functional as F
from common import collect, header, median_seconds, parser

from sparse_workbench.kernels.cusparselt import works
from sparse_workbench.kernels.linear import choose, sparse_linear, unpack
from sparse_workbench.kernels.semi_structured import converted, prune_pack

SHAPES, TOKENS = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192)), (16, 256, 512, 1024, 2048, 4096, 16384)


def eager(f, repeats: int = 30) -> float:
    "Seconds of a call as a program sees it: calls one after the other, launches and all."
    for _ in range(3): f()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats): f()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def product(shape: tuple[int, int], tokens: int) -> dict:
    "One layer: device time of the raw calls, of dense and of the operator, and what each takes of a program."
    from torch.sparse import to_sparse_semi_structured
    p, x = prune_pack(torch.randn(shape, device='cuda').bfloat16()), torch.randn(tokens, shape[1], device='cuda').bfloat16()
    if choose('2:4', p.values, tokens).name != '2:4 cuSPARSELt' or not works(x.device): raise SystemExit('something else would be timed in place of cuSPARSELt and its plans')
    w, weight, xt = unpack(p), converted(p.values, p.index, p.shape)['weight'], x.t()
    by_rows, by_columns = (int(torch._cslt_sparse_mm_search(weight, xt, transpose_result=t)) for t in (True, False))
    subclass = to_sparse_semi_structured(w)
    ways = {'dense': lambda: F.linear(x, w), 'ours': lambda: sparse_linear(x, p), 'raw': lambda: torch._cslt_sparse_mm(weight, xt, transpose_result=True, alg_id=by_rows),
            'raw, columns': lambda: torch._cslt_sparse_mm(weight, xt, alg_id=by_columns).t(), 'raw, columns, copied': lambda: torch._cslt_sparse_mm(weight, xt, alg_id=by_columns).t().contiguous()}
    right = F.linear(x, w).float()
    ok = all(bool((right - f().float()).abs().max() <= 2**-6 * right.abs().max()) for f in ways.values())
    with torch.no_grad():
        times = {k: median_seconds([f], 'cuda') for k, f in ways.items()}
        calls = {k: eager(f) for k, f in (ways | {'subclass': lambda: F.linear(x, subclass)}).items() if k in ('dense', 'ours', 'raw', 'subclass')}
    return dict(what='product', shape='x'.join(map(str, shape)), tokens=tokens, right=ok, **{f'{k} us': v * 1e6 for k, v in times.items()}, **{f'{k} us, eager': v * 1e6 for k, v in calls.items()},
                **{'ours / raw': times['ours'] / times['raw'], 'rows / columns': times['raw'] / times['raw, columns'], 'faster than dense': times['dense'] / times['ours'], 'faster, eager': calls['dense'] / calls['ours']})


def packing(shape: tuple[int, int]) -> list[dict]:
    "Milliseconds of pruning and packing, several copies so that none stays in the cache."
    ws = [torch.randn(shape, device='cuda').bfloat16() for _ in range(3)]
    def topk(w):
        groups = w.view(-1, 4)
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, 1)[1], True)
    ways = {'prune and pack, one pass': prune_pack, "torch's mask by topk alone": topk, "torch's 4x4 tile, into cuSPARSELt's form": lambda w: torch._sparse_semi_structured_tile(w, '', False),
            "torch._cslt_compress alone": torch._cslt_compress, 'a copy': torch.clone}
    rows = []
    for name, f in ways.items():
        try: rows.append(dict(what=name, shape='x'.join(map(str, shape)), ms=median_seconds([lambda w=w: f(w) for w in ws], 'cuda', 5, graph=False) * 1e3, right=True))
        except (RuntimeError, TypeError) as e: rows.append(dict(what=name, shape='x'.join(map(str, shape)), note=str(e).splitlines()[0][:80], right=True))
    return rows


def main() -> None:
    a = parser(__doc__).parse_args()
    if not (torch.cuda.is_available() and torch.backends.cusparselt.is_available()): raise SystemExit('needs a GPU and a PyTorch that was built with cuSPARSELt')
    torch.manual_seed(0)
    cases = [lambda s=s: packing(s) for s in ((11008, 4096), (28672, 8192))] + [lambda s=s, n=n: [product(s, n)] for s in SHAPES for n in TOKENS]
    collect('two_of_four', (case() for case in cases), header('cuda', dtype='bfloat16', cuSPARSELt=torch.backends.cusparselt.version()), a)


if __name__ == '__main__': main()
