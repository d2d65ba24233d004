"""A training step with 2:4 weights: dense, SR-STE with dense products, and SR-STE whose forward products run on sparse tensor cores where that pays.

    python benchmarks/sparse_step.py           on CUDA with cuSPARSELt: a 125-million-parameter and a wide decoder, bfloat16 autocast, compiled
    python benchmarks/sparse_step.py --tiny    seconds on a CPU, to see that it runs; the numbers mean nothing

SR-STE chooses new masks at every step, so every forward product packs its weight anew; that is part of its time. Layers for which packing and
product together take longer than the dense product stay dense, and the row names the others. Gradients are dense products everywhere:
a mask that is 2:4 along the inputs is not 2:4 along the outputs, and the dense weight gets a dense gradient.
"""
import statistics
from dataclasses import replace

import torch
import torch.nn.functional as F
from common import collect, header, median_seconds, parser
from sparsifier import MODELS, TINY, Trainer, block, dense, sr_ste_2_4
from torch import Tensor, nn

from sparse_workbench.core import Site, sites
from sparse_workbench.kernels.cusparselt import multiply, works
from sparse_workbench.patterns import nm
from sparse_workbench.zoo import Llama, LlamaConfig

WIDE = LlamaConfig(8192, 4096, 11008, 3, 32, 32, 128, max_position_embeddings=1024)
CASES = {'125M': MODELS['125M'], 'wide, 3 layers': (WIDE, 8, 1024), 'wide, 3 layers, 32 sequences': (WIDE, 32, 1024)}


@torch.library.custom_op('sparse_workbench_benchmarks::linear_2_4', mutates_args=())
def linear_2_4(x: Tensor, w: Tensor) -> Tensor: # (tokens, in), (out, in) with 2:4 zeros -> (tokens, out)
    "Pack the weight and multiply."
    if not x.is_cuda: return F.linear(x, w)
    return multiply(torch._cslt_compress(w), x.contiguous(), (w.size(0), w.size(1)))


@linear_2_4.register_fake
def _(x: Tensor, w: Tensor) -> Tensor: return x.new_empty(x.size(0), w.size(0))


def gradients(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, w = ctx.saved_tensors
    return dy @ w, dy.t() @ x


linear_2_4.register_autograd(gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def forward(module: nn.Linear, x: Tensor) -> Tensor:
    "What a linear layer computes under autocast, with its weight as 2:4."
    low = torch.bfloat16 if x.is_cuda else x.dtype
    y = linear_2_4(x.to(low).flatten(0, -2), module.weight.to(low))
    return y.view(*x.shape[:-1], -1) if module.bias is None else y.view(*x.shape[:-1], -1) + module.bias.to(low)


def pays(shape: tuple[int, int], tokens: int, device: str) -> bool: # on a CPU always, so that the path is walked
    "Are packing and product together faster than the dense product? Both on rotating copies; the result must be right."
    if device != 'cuda': return True
    ws = [torch.randn(shape, device=device).bfloat16() for _ in range(3)]
    for w in ws: w *= nm(2, 4).select(w.abs())
    x = torch.randn(tokens, shape[1], device=device).bfloat16()
    right = F.linear(x, ws[0]).float()
    if (linear_2_4(x, ws[0]).float() - right).abs().max() > 2**-6 * right.abs().max(): raise SystemExit(f'the 2:4 product of {shape} is wrong')
    ours, theirs = (median_seconds([lambda w=w: f(x, w) for w in ws], device, 9, graph=False) for f in (linear_2_4, F.linear))
    return ours < theirs


def rerouted(model: nn.Module, tokens: int, device: str) -> str: # which shapes go through the sparse tensor cores
    "Send layers through `linear_2_4` where that pays."
    ss: list[Site] = list(sites(model))
    good = {s for s in {tuple(s.shape) for s in ss} if pays(s, tokens, device)}  # type: ignore[arg-type]
    for s in ss:
        if tuple(s.shape) in good: s.module.forward = forward.__get__(s.module)  # type: ignore[method-assign]
    left = sorted({tuple(s.shape) for s in ss} - good)
    return f"{sum(tuple(s.shape) in good for s in ss)} of {len(ss)} layers" + (f", dense: {', '.join(f'{r}x{c}' for r, c in left)}" if left else '')


def compare(name: str, config: LlamaConfig, size: int, length: int, a) -> list[dict]:
    "Rows of one model: blocks of steps of all kinds take turns."
    torch.manual_seed(0)
    torch.compiler.reset()
    batches = [torch.randint(config.vocab_size, (size, length + 1), device=a.device) for _ in range(4)]
    plain, other = (Llama(config).to(a.device) for _ in range(2))
    told = rerouted(other, size * length, a.device)
    ours, sparse = Trainer(plain, a.compile), Trainer(other, a.compile)
    kinds = {'dense': (ours, dense, ''), 'SR-STE, dense products': (ours, sr_ste_2_4, ''), 'SR-STE, 2:4 forward products': (sparse, sr_ste_2_4, told)}
    for t, kind, _ in kinds.values(): block(t, kind, batches, 1, a.device)          # compiles, and makes weights 2:4 before they are multiplied as such
    times: dict[str, list[float]] = {k: [] for k in kinds}
    for _ in range(a.blocks):
        for k, (t, kind, _) in kinds.items(): times[k].append(block(t, kind, batches, a.steps, a.device))
    best = {k: statistics.median(ts) for k, ts in times.items()}
    return [dict(model=name, tokens=size * length, kind=k, sparse=told, **{'ms a step': best[k] * 1e3, 'of dense': best[k] / best['dense']}, blocks=[round(x * 1e3, 2) for x in times[k]])
            for k, (_, _, told) in kinds.items()]


def main() -> None:
    p = parser(__doc__)
    p.add_argument('--steps', type=int, default=20, help='in a block')
    p.add_argument('--blocks', type=int, default=3)
    p.add_argument('--no-compile', dest='compile', action='store_false')
    p.add_argument('--tiny', action='store_true')
    a = p.parse_args()
    if a.device == 'cuda' and not works(torch.device('cuda', 0)): raise SystemExit('needs a PyTorch that was built with cuSPARSELt, 0.8 or later')
    torch.set_float32_matmul_precision('high')
    tiny, *more = TINY
    chosen = {'tiny': (replace(tiny, hidden_size=64), *more)} if a.tiny or a.device != 'cuda' else CASES
    collect('sparse_step', (compare(n, *how, a) for n, how in chosen.items()), header(a.device, compiled=a.compile, steps=a.steps), a)


if __name__ == '__main__': main()
