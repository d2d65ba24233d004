"""2:4 layers through cuSPARSELt: our operator beside the raw call, PyTorch's tensor subclass and dense; and pruning with packing.

The library gives its output column by column, and the next 2:4 layer needs it row by row. Two ways there are timed beside each other: the raw call and
a copy ("copied"), and the call that writes it so itself ("turned": transpose_result=True, with a search of its own).

    python benchmarks/two_of_four.py           on a CUDA machine with cuSPARSELt
"""
import time

import torch
import torch.nn.functional as F
from common import collect, header, median_seconds, parser

from sparse_workbench.kernels.block import aligned
from sparse_workbench.kernels.linear import choose, sparse_linear, unpack
from sparse_workbench.kernels.semi_structured import algorithm, converted, prune_pack

SHAPES, TOKENS = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192)), (16, 256, 512, 1024, 2048, 4096, 16384)


def eager(f, repeats: int = 30) -> float:
    "Seconds of a call as a program sees it: calls one after the other, launches and all."
    for _ in range(3): f()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats): f()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def row_by_row(weight: torch.Tensor, xt: torch.Tensor, found: int, right: torch.Tensor) -> dict: # right: (tokens, out)
    "Times of both ways to an output (tokens, out) that lies row by row; a way that fails is a note and loses nothing."
    def turned() -> torch.Tensor: # PyTorch returns it as (tokens, out) that lies row by row; a version that does not pays for a copy
        y = torch._cslt_sparse_mm(weight, xt, transpose_result=True, alg_id=own)
        return aligned(y if y.shape == right.shape and y.is_contiguous() else y.t())
    row = {'copied us': median_seconds([lambda: aligned(torch._cslt_sparse_mm(weight, xt, alg_id=found).t())], 'cuda') * 1e6}
    try:
        own = int(torch._cslt_sparse_mm_search(weight, xt, transpose_result=True))
        same = bool((turned().float() - right).abs().max() <= 2**-6 * right.abs().max())
        row |= {'turned right': same, 'turned lies': str(torch._cslt_sparse_mm(weight, xt, transpose_result=True, alg_id=own).stride())}
        time = median_seconds([turned], 'cuda')
        return row | {'turned us': time * 1e6, 'turned / copied': time * 1e6 / row['copied us']}
    except Exception as e: # whatever the library says: the other rows are worth more
        return row | {'turned note': (str(e).splitlines() or [type(e).__name__])[0][:120]}


def product(shape: tuple[int, int], tokens: int) -> dict:
    "One layer: device time of the raw call and of dense, program time of the operator, the subclass and dense."
    from torch.sparse import to_sparse_semi_structured
    p, x = prune_pack(torch.randn(shape, device='cuda').bfloat16()), torch.randn(tokens, shape[1], device='cuda').bfloat16()
    if choose('2:4', p.values, tokens).name != '2:4 cuSPARSELt': raise SystemExit(f"{choose('2:4', p.values, tokens).name!r} would be timed in place of cuSPARSELt")
    w = unpack(p)
    right, got = F.linear(x, w).float(), sparse_linear(x, p).float()
    ok = bool((right - got).abs().max() <= 2**-6 * right.abs().max())
    weight, xt = converted(p.values, p.index, p.shape)['weight'], x.t()
    found = algorithm(weight, xt, p.shape)
    subclass = to_sparse_semi_structured(w)
    times = dict(raw=median_seconds([lambda: torch._cslt_sparse_mm(weight, xt, alg_id=found)], 'cuda'), dense=median_seconds([lambda: F.linear(x, w)], 'cuda'),
                 ours=median_seconds([lambda: sparse_linear(x, p)], 'cuda'))
    ways = row_by_row(weight, xt, found, right)
    calls = dict(ours=eager(lambda: sparse_linear(x, p)), subclass=eager(lambda: F.linear(x, subclass)), dense=eager(lambda: F.linear(x, w)))
    return dict(what='product', shape='x'.join(map(str, shape)), tokens=tokens, right=ok, **{f'{k} us': v * 1e6 for k, v in times.items()}, **{f'{k} us, eager': v * 1e6 for k, v in calls.items()},
                **{'ours / raw': times['ours'] / times['raw'], 'faster than dense': times['dense'] / times['ours'], 'faster, eager': calls['dense'] / calls['ours']}, **ways)


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
