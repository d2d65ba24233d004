"""Block-sparse feed-forward layers beside dense ones, eager and compiled: inference in one pass, and a training step.

    python benchmarks/mlp.py                   on a CUDA machine; elsewhere, much smaller
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from block import machine, packed
from common import collect, header, median_seconds, parser
from torch import nn

from sparse_workbench.kernels.linear import SparseLinear, unpack
from sparse_workbench.kernels.mlp import SparseMLP, fuses

SHAPES, TOKENS, BLOCKS, SPARSITIES = ((4096, 11008), (8192, 28672)), (4096, 16384), ((128, 128), (256, 64)), (.7, .8, .9, .95)


class Dense(nn.Module):
    "The same network with dense weights."
    def __init__(self, up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None):
        super().__init__()
        self.up, self.down, self.gate = nn.Parameter(up), nn.Parameter(down), None if gate is None else nn.Parameter(gate)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None: return F.linear(F.gelu(F.linear(x, self.up), approximate='tanh'), self.down)
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


def step(net: nn.Module, x: torch.Tensor, dy: torch.Tensor):
    "Forward and backward, gradients of the input and of every weight."
    wanted = [x, *net.parameters()]
    return lambda: torch.autograd.grad(net(x), wanted, dy)


def sparse(sparsity: float, block: tuple[int, int], width: int, inner: int, gated: bool, device: str, dtype: torch.dtype) -> SparseMLP:
    "Random blocks, all three weights masked on their own, scaled so that outputs stay of order one."
    def layer(out: int, inp: int) -> SparseLinear:
        p = packed(sparsity, block, (out, inp), device, dtype)
        p.values.mul_((inp * (1 - sparsity))**-.5)
        return SparseLinear(p)
    return SparseMLP(layer(inner, width), layer(width, inner), layer(inner, width) if gated else None, 'silu' if gated else 'gelu')


def case(width: int, inner: int, tokens: int, block: tuple[int, int], sparsity: float, gated: bool, device: str, dtype: torch.dtype, peak: float, train: bool, repeats: int) -> list[dict]:
    "Rows of one network: right first, then timed beside dense in turn."
    mlp = sparse(sparsity, block, width, inner, gated, device, dtype)
    dense = Dense(unpack(mlp.up.packed), unpack(mlp.down.packed), unpack(mlp.gate.packed) if gated else None)
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    row = dict(kind='SwiGLU' if gated else 'GELU', shape=f'{width}-{inner}', tokens=tokens, block='{}x{}'.format(*block), sparsity=sparsity)
    with torch.no_grad():
        right, got = dense(x).float(), mlp(x).float()
        ok = bool((right - got).abs().max() <= 2**-5 * right.abs().max())
        del right, got
        t, d = median_seconds([lambda: mlp(x)], device, repeats), median_seconds([lambda: dense(x)], device, repeats)
    work = 2 * tokens * sum(p.values.numel() for p in (mlp.up, mlp.down, *([mlp.gate] if gated else [])))
    one_pass = device == 'cuda' and fuses(x, mlp.up.packed, mlp.gate.packed if gated else None, mlp.activation)
    rows = [row | dict(what='forward', way='one pass' if one_pass else 'product by product', right=ok, **{'ms': t * 1e3, 'dense ms': d * 1e3, 'faster than dense': d / t, 'of the limit': work / peak / t})]
    if train:
        x.requires_grad_()
        dy = torch.randn(tokens, width, device=device, dtype=dtype)
        t, d = (median_seconds([step(torch.compile(net) if device == 'cuda' else net, x, dy)], device, max(3, repeats // 3), graph=False) for net in (mlp, dense))
        rows.append(row | dict(what='training step', way='compiled', right=ok, **{'ms': t * 1e3, 'dense ms': d * 1e3, 'faster than dense': d / t, 'of the limit': 3 * work / peak / t}))
    return rows


def cases(scale: int, *how) -> Iterator[list[dict]]: # how: device, dtype, peak
    "SwiGLU everywhere, GELU where it is very sparse; training steps at 90 %."
    for width, inner in SHAPES:
        for tokens in TOKENS:
            if tokens > 4096 and width < 8192: continue
            for block in BLOCKS:
                for sparsity in SPARSITIES:
                    for gated in (True, False) if sparsity >= .9 else (True,):
                        w, i, n = (max(256, m // scale // 256 * 256) for m in (width, inner, tokens))
                        yield case(w, i, n, block, sparsity, gated, *how, sparsity == .9 and tokens == 4096 and gated, 9)


def main() -> None:
    a = parser(__doc__, 32).parse_args()
    dtype = torch.bfloat16 if a.device == 'cuda' else torch.float32
    torch.manual_seed(0)
    peak = machine(a.device, dtype)[0]
    collect('mlp', cases(a.scale, a.device, dtype, peak), header(a.device, dtype=str(dtype).removeprefix('torch.'), **{'matmul TFLOP/s': round(peak / 1e12, 3)}), a)


if __name__ == '__main__': main()
