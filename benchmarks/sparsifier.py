"""What sparse training costs beside dense training: whole training steps of a small and of a 125-million-parameter decoder.

    python benchmarks/sparsifier.py                 on CUDA both models: bfloat16 autocast, compiled, fused AdamW
    python benchmarks/sparsifier.py --device cpu --no-compile --steps 10    on a CPU the embedded model with 2,048 tokens
    python benchmarks/sparsifier.py --tiny          seconds on a CPU, to see that it runs; the numbers mean nothing

Blocks of 100 steps of all kinds take turns on the same model; a kind's speed is its median block. `gmp` is gradual magnitude
pruning with a new mask every 100 steps, `sr_ste` a new 2:4 mask and a dense weight beside it at every step. The peer keeps a
mask and a dense weight in the module and multiplies in every forward pass (torch.nn.utils.prune); its mask never changes.
With `gradient flow`, every tenth step is recorded: kept and pruned gradients, flips, updates, of every layer. To measure noise as well
a step goes through its batch in parts, which is a kind of its own, so that only `micro()` and the record are compared with it.
`record %` is the median, over the turns, of what a block costs more than the block of the same turn that is not recorded.
"""
import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from common import header, save, show, sync
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparse_workbench.core import sites
from sparse_workbench.flows import sr_ste
from sparse_workbench.gradient_flow import GradientFlow
from sparse_workbench.schedules import cubic, every
from sparse_workbench.sparsifier import Sparsifier
from sparse_workbench.zoo import Llama, LlamaConfig

EMBEDDED = LlamaConfig(4096, 256, 640, 7, 4, 2, 64)
MODELS = {
    'embedded': (EMBEDDED, 128, 512),
    '125M': (LlamaConfig(50304, 768, 2048, 12, 12, 12, 64, max_position_embeddings=1024), 32, 1024),
    'embedded, 2048 tokens': (EMBEDDED, 8, 256),
}
TINY = replace(EMBEDDED, vocab_size=128, num_hidden_layers=2, hidden_size=64, intermediate_size=128), 2, 32


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    "Mean next-token loss; on CUDA in bfloat16 autocast."
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


class Trainer:
    "A model with its optimizer and its (compiled) loss; a step takes its batch in parts."
    def __init__(self, model: nn.Module, compiled: bool):
        self.model, self.device = model, next(model.parameters()).device
        self.opt = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        self.loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
        self.parts, self.after = 1, lambda: None

    def step(self, ids: Tensor) -> None:
        parts = ids.chunk(self.parts)
        for x in parts:
            loss = self.loss(self.model, x)
            (loss / len(parts) if len(parts) > 1 else loss).backward()
            self.after()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)


def dense(t: Trainer) -> Callable[[], object]: return lambda: None

def gmp(t: Trainer) -> Callable[[], object]:
    "Unstructured, 0 to 90 %, a new mask every 100 steps."
    sp = Sparsifier(sites(t.model), sparsity=cubic(0, .9, 300), when=every(100)).attach(t.opt)
    return sp.detach

def sr_ste_2_4(t: Trainer, parts: int = 1) -> Callable[[], object]:
    "2:4 with SR-STE: a new mask every step."
    t.parts = parts
    return Sparsifier(sites(t.model), pattern='2:4', flow=sr_ste(2e-4)).attach(t.opt).detach

def recorded(t: Trainer, parts: int = 1) -> Callable[[], object]:
    "The same, with a record of gradient flow at every tenth step, of its noise too when there are parts."
    sp = Sparsifier(sites(t.model), pattern='2:4', flow=sr_ste(2e-4)).attach(t.opt)
    flow = GradientFlow(sp, every=EVERY)
    t.parts, t.after = parts, flow.micro if parts > 1 else t.after
    return lambda: (flow.detach(), sp.detach())

def masked(model: nn.Module) -> nn.Module:
    "torch.nn.utils.prune on every weight that the project prunes."
    for s in sites(model): torch_prune.l1_unstructured(s.module, s.param, .5)
    return model


EVERY = 10 # GradientFlow's default
SR_STE, IN_PARTS = 'ours, sr_ste 2:4 every step', 'ours, sr_ste, batch in 4 parts'
KINDS: dict[str, Callable[[Trainer], Callable[[], object]]] = {
    'dense': dense, 'ours, gmp every 100': gmp, SR_STE: sr_ste_2_4, f'ours, sr_ste, gradient flow every {EVERY}': recorded,
    IN_PARTS: partial(sr_ste_2_4, parts=4), f'{IN_PARTS}, gradient flow and noise every {EVERY}': partial(recorded, parts=4)}
BESIDE = {f'ours, sr_ste, gradient flow every {EVERY}': SR_STE, f'{IN_PARTS}, gradient flow and noise every {EVERY}': IN_PARTS} # recorded -> the same, not recorded


def block(t: Trainer, kind: Callable, batches: list[Tensor], steps: int, device: str) -> float:
    "Seconds for a step, over one block; making the kind and its first masks is not counted."
    end = kind(t)
    for ids in batches[:2]: t.step(ids)
    sync(device)
    start = time.perf_counter()
    for i in range(steps): t.step(batches[i % len(batches)])
    sync(device)
    seconds = (time.perf_counter() - start) / steps
    end()
    t.parts, t.after = 1, lambda: None
    return seconds


def compare(name: str, config: LlamaConfig, size: int, length: int, a: argparse.Namespace) -> list[dict]:
    "Rows of one model."
    torch.manual_seed(0)
    torch.compiler.reset()
    batches = [torch.randint(config.vocab_size, (size, length + 1), device=a.device) for _ in range(8)]
    make = lambda: Llama(config).to(a.device)
    ours = Trainer(make(), a.compile)
    kinds = {k: (ours, kind) for k, kind in KINDS.items()}
    if not a.no_peer: kinds['torch.nn.utils.prune, fixed mask'] = Trainer(masked(make()), a.compile), dense
    start = time.perf_counter()
    for t in {id(t): t for t, _ in kinds.values()}.values(): t.step(batches[0])
    sync(a.device)
    print(f'{name}: ready after {time.perf_counter() - start:.0f} s', flush=True)
    if a.device == 'cuda':
        for t, kind in kinds.values(): block(t, kind, batches, EVERY, a.device) # compiles, loads every kernel
    times: dict[str, list[float]] = {k: [] for k in kinds}
    for _ in range(a.blocks):
        for k, (t, kind) in kinds.items(): times[k].append(block(t, kind, batches, a.steps, a.device))
    base = statistics.median(times['dense'])
    shape = dict(model=name, **{'million parameters': sum(p.numel() for p in ours.model.parameters()) / 1e6}, tokens=size * length)
    def row(k: str, ts: list[float]) -> dict:
        m = statistics.median(ts)
        more = {} if k.startswith(IN_PARTS) else {'over dense %': 100 * (m / base - 1)}
        if k in BESIDE: more['record %'] = 100 * (statistics.median(x / y for x, y in zip(ts, times[BESIDE[k]])) - 1)
        return shape | dict(kind=k, **{'steps/s': 1 / m, 'ms a step': m * 1e3}, **more, **{'blocks ms': [round(x * 1e3, 2) for x in ts]})
    return [row(k, ts) for k, ts in times.items()]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--models', nargs='+', choices=MODELS, help='default: the first two on CUDA, the small batch on a CPU')
    p.add_argument('--steps', type=int, default=100, help='in a block')
    p.add_argument('--blocks', type=int, default=3)
    p.add_argument('--no-peer', action='store_true')
    p.add_argument('--no-compile', dest='compile', action='store_false')
    p.add_argument('--tiny', action='store_true')
    p.add_argument('--out', help='folder of the JSON file (default: benchmarks/results)')
    a = p.parse_args()
    if a.steps % EVERY: p.error(f'--steps {a.steps}: a block needs a multiple of {EVERY} steps, so that a tenth of them is recorded')
    torch.set_float32_matmul_precision('high')
    chosen = dict(tiny=TINY) if a.tiny else {n: MODELS[n] for n in a.models or (list(MODELS)[:2] if a.device == 'cuda' else list(MODELS)[2:])}
    rows, head = [], header(a.device, compiled=a.compile, steps=a.steps)
    for n, m in chosen.items():
        rows += compare(n, *m, a)
        save('sparsifier', rows, head, a.out, a.device)
    show(rows, head)


if __name__ == '__main__': main()
