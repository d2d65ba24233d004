"""The N:M mask of a score matrix: the project's way, the way of torch.topk, and the copy that bounds both.

    python benchmarks/nm_mask.py                 on a CUDA machine: the Triton kernels; elsewhere: the PyTorch implementation
    python benchmarks/nm_mask.py --tune          also other launch sizes of the kernel
"""
import torch
from common import collect, header, median_seconds, parser

from sparse_workbench.patterns import keep_top

SHAPES = [(4096, 4096), (11008, 4096), (28672, 8192)]
CASES = [(s, torch.bfloat16, 2, 4) for s in SHAPES] + [(SHAPES[1], torch.float32, 2, 4)] + \
        [(SHAPES[2], torch.bfloat16, k, n) for k, n in ((1, 2), (4, 8), (8, 16), (3, 7), (1, 32), (8, 256))]


def by_topk(x: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    "What one writes without a kernel."
    g = x.view(-1, of)
    return torch.zeros_like(g, dtype=torch.bool).scatter_(1, g.topk(keep, dim=1).indices, True)


def ways(device: str, keep: int, of: int) -> dict:
    "Name -> function of a weight, which gives its mask."
    if device == 'cpu': return {'in PyTorch': lambda w: keep_top(w.abs().view(-1, of), of - keep), 'topk and scatter': lambda w: by_topk(w.abs(), keep, of)}
    from sparse_workbench.kernels.nm import nm_keep_kernel, nm_mask_magnitude
    own = {'kernel': lambda s: nm_keep_kernel(s.view(-1, of), keep)}
    if 4096 % of == 0: own['kernel, from the weight'] = lambda w: nm_mask_magnitude(w, keep, of)
    return own | {'topk and scatter': lambda s: by_topk(s, keep, of)}


def right(name: str, mask: torch.Tensor, x: torch.Tensor, keep: int, of: int) -> bool:
    "Is it, weight for weight, the mask of the PyTorch implementation on the CPU? topk leaves ties open, so there the counts must agree."
    mask = mask.view(-1, of)
    if name.startswith('topk'): return bool((mask.sum(1) == keep).all())
    scores = x.abs() if name != 'kernel' else x
    step = 2**22
    return all(torch.equal(mask[i:i + step].cpu(), keep_top(scores.view(-1, of)[i:i + step].cpu(), of - keep)) for i in range(0, len(mask), step))


def measure(shape, dtype, keep, of, device, budget) -> list[dict]:
    "Rows of one case: correctness first, and no time without it."
    n = shape[0] * shape[1]
    count = max(2, min(16, int(budget // (n * dtype.itemsize))))
    xs = [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
    out = torch.empty_like(xs[0])
    copy = median_seconds([lambda x=x: out.copy_(x) for x in xs], device)
    row = dict(shape=f'{shape[0]}x{shape[1]}', dtype=str(dtype).removeprefix('torch.'), pattern=f'{keep}:{of}')
    rows = [row | dict(way='copy', ms=copy * 1e3, **{'of a copy': 1., 'GB/s': 2 * n * dtype.itemsize / copy / 1e9}, right=True)]
    for name, f in ways(device, keep, of).items():
        if not right(name, f(xs[0]), xs[0], keep, of):
            rows.append(row | dict(way=name, right=False))
            continue
        few = xs if not name.startswith('topk') else xs[:2]
        t = median_seconds([lambda x=x: f(x) for x in few], device, 15 if few is xs else 4, graph=few is xs)
        rows.append(row | dict(way=name, ms=t * 1e3, **{'of a copy': t / copy, 'GB/s': n * (dtype.itemsize + 1) / t / 1e9}, right=True))
    return rows


def tune(device: str) -> list[dict]:
    "Launch sizes of the kernel on the largest matrix."
    from sparse_workbench.kernels import nm as kernels
    xs, rows = [torch.randn(SHAPES[2], device=device, dtype=torch.bfloat16) for _ in range(2)], []
    for of, elements, warps in [(4, e, w) for e in (2048, 4096, 8192) for w in (2, 4, 8) if 16 <= e // (32 * w) <= 64]:
        t = median_seconds([lambda x=x: kernels._launch(x, of // 2, of, True, elements, warps) for x in xs], device, 5)
        rows.append(dict(pattern=f'{of // 2}:{of}', elements=elements, warps=warps, ms=t * 1e3))
    return rows


def main() -> None:
    p = parser(__doc__, 16)
    p.add_argument('--tune', action='store_true')
    a = p.parse_args()
    torch.manual_seed(0)
    cases = (measure((r // a.scale, c), dtype, keep, of, a.device, 2**30 if a.device == 'cuda' else 2**28) for (r, c), dtype, keep, of in CASES)
    collect('nm_mask', cases, header(a.device), a, **(dict(tune=tune(a.device)) if a.tune and a.device == 'cuda' else {}))


if __name__ == '__main__': main()
