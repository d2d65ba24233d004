"""The N:M mask of a score matrix: the project's way, the way of torch.topk, and the copy that bounds both.

    python benchmarks/nm_mask.py                 on a CUDA machine: the Triton kernels; elsewhere: the PyTorch implementation
    python benchmarks/nm_mask.py --tune          also other launch sizes of the kernel
"""
import argparse

import torch
from common import header, median_seconds, save, show

from sparse_workbench.patterns import nm_keep

SHAPES = [(4096, 4096), (11008, 4096), (28672, 8192)]
CASES = [(s, torch.bfloat16, 2, 4) for s in SHAPES] + [(SHAPES[1], torch.float32, 2, 4)] + \
        [(SHAPES[2], torch.bfloat16, k, n) for k, n in ((1, 2), (4, 8), (8, 16), (3, 7))]


def by_topk(x: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    "What one writes without a kernel."
    g = x.view(-1, of)
    return torch.zeros_like(g, dtype=torch.bool).scatter_(1, g.topk(keep, dim=1).indices, True)


def ways(device: str, keep: int, of: int) -> dict:
    "Name -> function of a weight, which gives its mask."
    if device == 'cpu': return {'in PyTorch': lambda w: nm_keep(w.abs().view(-1, of), keep), 'topk and scatter': lambda w: by_topk(w.abs(), keep, of)}
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
    return all(torch.equal(mask[i:i + step].cpu(), nm_keep(scores.view(-1, of)[i:i + step].cpu(), keep)) for i in range(0, len(mask), step))


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
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--scale', type=int, help='divide the rows of every matrix by this (default: 1 on CUDA, 16 elsewhere)')
    p.add_argument('--tune', action='store_true')
    p.add_argument('--out', help='folder of the JSON file (default: benchmarks/results)')
    a = p.parse_args()
    scale = a.scale or (1 if a.device == 'cuda' else 16)
    torch.manual_seed(0)
    rows = []
    for (r, c), dtype, keep, of in CASES:
        rows += measure((r // scale, c), dtype, keep, of, a.device, 2**30 if a.device == 'cuda' else 2**28)
    head = header(a.device)
    show(rows, head)
    more = dict(tune=tune(a.device)) if a.tune and a.device == 'cuda' else {}
    if more: show(more['tune'], dict(tune='kernel, from the weight, 28672x8192 bfloat16'))
    save('nm_mask', rows, head, a.out, a.device, **more)
    if not all(r['right'] for r in rows): raise SystemExit('a mask is wrong')


if __name__ == '__main__': main()
