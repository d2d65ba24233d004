"""Block-sparse linear layers: the project's kernels beside dense cuBLAS and torch BSR, forward and backward, against the machine's limit.

    python benchmarks/block.py                 on a CUDA machine: the Triton kernels; elsewhere, much smaller: the PyTorch twin
    python benchmarks/block.py --backward      also the gradients of x and of the stored values
    python benchmarks/block.py --tokens 16 --name block_few       a part of it, in a file of its own
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import collect, header, median_seconds, parser

from sparse_workbench.kernels.block import block_kernel, few_kernel
from sparse_workbench.kernels.linear import Kernel, Packed, choose, pack, unpack

if torch.cuda.is_available(): import sparse_workbench.kernels.hopper  # noqa: F401  registers the kernels, and those of Triton

SHAPE = (11008, 4096)
TOKENS, BLOCKS, SPARSITIES = (4096, 512, 16), ((32, 32), (64, 64), (128, 128), (128, 64), (256, 64), (256, 128)), (.7, .8, .9, .95)
ALLOWED = {torch.bfloat16: 2**-7, torch.float32: 1e-5}


def machine(device: str, dtype: torch.dtype) -> tuple[float, float]:
    "What this machine reaches in this run: operations per second of a large dense product, bytes per second of a copy."
    n = 8192 if device == 'cuda' else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out, copies = torch.empty_like(a), [torch.randn(n, n, device=device, dtype=dtype) for _ in range(4)]
    rate = 2 * n**3 / median_seconds([lambda: torch.mm(a, b, out=out)], device)
    return rate, 2 * a.nbytes / median_seconds([lambda c=c: out.copy_(c) for c in copies], device)


def limit(p: Packed, tokens: int, rate: float, speed: float) -> float:
    "Seconds that the kept work and the bytes that must move take, whichever is more; the same for each of the three products."
    size = p.dtype.itemsize
    return max(2 * tokens * p.values.numel() / rate, (p.nbytes + tokens * sum(p.shape) * size) / speed)


def packed(sparsity: float, block: tuple[int, int], shape: tuple[int, int], device: str, dtype: torch.dtype) -> Packed:
    "A random weight with this fraction of its blocks left out, to the block, but at least one kept."
    (r, c), (rows, columns) = block, (shape[0] // block[0], shape[1] // block[1])
    kept = torch.zeros(rows * columns, dtype=torch.bool, device=device)
    kept[torch.randperm(rows * columns, device=device)[:max(1, round((1 - sparsity) * rows * columns))]] = True
    mask = kept.view(rows, columns).repeat_interleave(r, 0).repeat_interleave(c, 1)
    return pack(torch.randn(shape, device=device, dtype=dtype), 'block', block, mask)


def ours(values: torch.Tensor, tokens: int) -> list[Kernel]:
    "The kernel of the table for this weight, and the general one where the table has one for few tokens."
    chosen = choose('block', values, tokens)
    return [chosen, *[block_kernel] * (chosen is few_kernel)]


def products(p: Packed, x: torch.Tensor, dy: torch.Tensor, backward: bool) -> dict[str, dict[str, Callable]]:
    "Product -> way -> call; 'dense' first, then ours, then the peer."
    ks, w, exact = ours(p.values, len(x)), unpack(p), (p.values, p.index, p.shape)
    bsr = torch.sparse_bsr_tensor(p.index[0], p.index[1], p.values, p.shape, check_invariants=False)
    out = {'forward': {'dense': lambda: F.linear(x, w)} | {k.name: lambda k=k: k.forward(x, *exact, None) for k in ks} | {'torch BSR': lambda: F.linear(x, bsr)}}
    if backward:
        out |= {'grad x': {'dense': lambda: dy @ w, ks[0].name: lambda: ks[0].grad_x(dy, *exact)},
                'grad values': {'dense': lambda: dy.t() @ x, ks[0].name: lambda: ks[0].grad_values(dy, x, *exact)}}
    return out


def reference(name: str, p: Packed, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    "The product in float32, by dense multiplication."
    w = unpack(p).float()
    if name == 'forward': return x.float() @ w.t()
    if name == 'grad x': return dy.float() @ w
    r, c = p.values.shape[1:]
    tiles = (dy.float().t() @ x.float()).view(p.shape[0] // r, r, p.shape[1] // c, c).transpose(1, 2)
    rows = torch.repeat_interleave(torch.arange(len(tiles), device=x.device), p.index[0].diff())
    return tiles[rows, p.index[1].long()]


def right(got: torch.Tensor, exact: torch.Tensor) -> bool:
    "Is it the reference, within the rounding of its type?"
    return bool(((got - exact).abs().max() <= ALLOWED[got.dtype] * exact.abs().max()).item())


def measure(tokens: int, block: tuple[int, int], sparsity: float, shape, device: str, dtype: torch.dtype, peak: tuple[float, float], backward: bool) -> list[dict]:
    "Rows of one case: correctness first, and no time without it. Several copies of the weight, so that none stays in the cache."
    count = max(2, min(12, int(2**28 // (shape[0] * shape[1] * dtype.itemsize * (1 - sparsity))))) if device == 'cuda' else 2
    ps = [packed(sparsity, block, shape, device, dtype) for _ in range(count)]
    x, dy = (torch.randn(tokens, n, device=device, dtype=dtype) for n in (shape[1], shape[0]))
    cases, rows = [products(p, x, dy, backward) for p in ps], []
    case = dict(shape=f'{shape[0]}x{shape[1]}', tokens=tokens, block='{}x{}'.format(*block), sparsity=sparsity)
    best = limit(ps[0], tokens, *peak)
    for name in cases[0]:
        exact, dense = reference(name, ps[0], x, dy), median_seconds([c[name]['dense'] for c in cases], device)
        rows.append(case | dict(product=name, way='dense', ms=dense * 1e3, right=True))
        for way in [w for w in cases[0][name] if w != 'dense']:
            calls, row = [c[name][way] for c in cases], case | dict(product=name, way=way)
            try: ok = right(calls[0](), exact)
            except (RuntimeError, NotImplementedError) as e:               # a peer may not know this type, size or device
                if way != 'torch BSR': raise
                rows.append(row | dict(right=True, note=f'{type(e).__name__}: {e}'.splitlines()[0][:80]))
                continue
            if not ok:
                rows.append(row | dict(right=False))
                continue
            t = median_seconds(calls, device)
            rows.append(row | dict(ms=t * 1e3, **{'faster than dense': dense / t, 'of the limit': best / t,
                                                  'TFLOP/s': 2 * tokens * ps[0].values.numel() / t / 1e12}, right=True))
    return rows


def main() -> None:
    p = parser(__doc__, 16)
    p.add_argument('--backward', action='store_true')
    p.add_argument('--tokens', nargs='+', type=int, default=TOKENS)
    a = p.parse_args()
    dtype = torch.bfloat16 if a.device == 'cuda' else torch.float32
    shape = tuple(max(256, n // a.scale // 256 * 256) for n in SHAPE)
    torch.manual_seed(0)
    peak = machine(a.device, dtype)
    cases = (measure(max(16, n // a.scale), block, s, shape, a.device, dtype, peak, a.backward) for n in a.tokens for block in BLOCKS for s in SPARSITIES)
    head = header(a.device, dtype=str(dtype).removeprefix('torch.'), **{'matmul TFLOP/s': round(peak[0] / 1e12, 3), 'copy GB/s': round(peak[1] / 1e9, 1)})
    collect('block', cases, head, a)


if __name__ == '__main__': main()
