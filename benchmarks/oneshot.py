"""One-shot magnitude pruning of a decoder of a billion weights: the project's way beside torch.nn.utils.prune and plain topk or sort.

    python benchmarks/oneshot.py --dtype bfloat16              everything at 16 layers (973 million weights), on CUDA when there is one
    python benchmarks/oneshot.py --dtype float32 --limit 15    with 15 GiB of address space for each way (CPU)

A way that runs out of memory is measured again on half of the layers, and so on; its row says how many it could take.
One pass = the time of reading all weights once. Extra memory is the peak above the weights themselves.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from common import header, save, seconds, show, sync
from torch import nn
from torch.nn.utils import prune as torch_prune

from sparse_workbench import core
from sparse_workbench.allocation import global_
from sparse_workbench.oneshot import prune

HIDDEN, INNER, KV = 2048, 8192, 512                # Llama-3.2-1B
BLOCK = dict(q_proj=(HIDDEN, HIDDEN), k_proj=(KV, HIDDEN), v_proj=(KV, HIDDEN), o_proj=(HIDDEN, HIDDEN),
             gate_proj=(INNER, HIDDEN), up_proj=(INNER, HIDDEN), down_proj=(HIDDEN, INNER))
SPARSITY = .5


def build(layers: int, scale: int, dtype: torch.dtype, device: str) -> nn.Module:
    "The prunable weights of a decoder, without values."
    def block(): return nn.ModuleDict({n: nn.Linear(c // scale, r // scale, bias=False, dtype=dtype, device='meta') for n, (r, c) in BLOCK.items()})
    return nn.ModuleDict(dict(layers=nn.ModuleList(block() for _ in range(layers)))).to_empty(device=device).requires_grad_(False)


def fill(model: nn.Module) -> None:
    "Fresh weights, the same for every way; layers differ in scale as real ones do."
    for i, p in enumerate(model.parameters()):
        g = torch.Generator(p.device).manual_seed(i)
        p.normal_(0, .02 * (1 + i % 7 / 10), generator=g)


def linears(model: nn.Module) -> list[nn.Linear]: return [m for m in model.modules() if isinstance(m, nn.Linear)]


@contextmanager
def slab(weights: int | None):
    "Let the project's ways look at so many weights at a time."
    old = core.slabs.__defaults__
    core.slabs.__defaults__ = (1, weights) if weights else old
    try: yield
    finally: core.slabs.__defaults__ = old


def torch_global(model: nn.Module) -> None:
    "torch.nn.utils.prune.global_unstructured, made permanent."
    own = [(m, 'weight') for m in linears(model)]
    torch_prune.global_unstructured(own, pruning_method=torch_prune.L1Unstructured, amount=SPARSITY)
    for m, n in own: torch_prune.remove(m, n)


def torch_layers(model: nn.Module) -> None:
    "torch.nn.utils.prune.l1_unstructured on every layer, made permanent."
    for m in linears(model):
        torch_prune.l1_unstructured(m, 'weight', SPARSITY)
        torch_prune.remove(m, 'weight')


def plain_topk(model: nn.Module) -> None:
    "The smallest half of every layer by topk."
    for m in linears(model):
        w = m.weight.view(-1)
        w[w.abs().topk(int(SPARSITY * len(w)), largest=False).indices] = 0


def plain_sort(model: nn.Module) -> None:
    "One threshold for the model: concatenate, sort, compare; ties are not looked at."
    ws = [m.weight for m in linears(model)]
    every = torch.cat([w.abs().flatten() for w in ws])
    cut = every.sort().values[int(SPARSITY * len(every)) - 1].clone()
    del every
    for w in ws: w.masked_fill_(w.abs() <= cut, 0)


def topk_2_4(model: nn.Module) -> None:
    "2:4 by topk and scatter."
    for m in linears(model):
        g = m.weight.view(-1, 4)
        g.masked_fill_(torch.ones_like(g, dtype=torch.bool).scatter_(1, g.abs().topk(2, dim=1).indices, False), 0)


WAYS: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    'ours, uniform': ('layer', lambda m: prune(m, SPARSITY)),
    'torch l1_unstructured': ('layer', torch_layers),
    'topk': ('layer', plain_topk),
    'ours, global': ('global', lambda m: prune(m, SPARSITY, allocate=global_)),
    'torch global_unstructured': ('global', torch_global),
    'sort': ('global', plain_sort),
    'ours, 2:4': ('2:4', lambda m: prune(m, pattern='2:4')),
    'topk, 2:4': ('2:4', topk_2_4),
}


class Peak:
    "Extra memory while the block runs, in bytes: of CUDA's allocator, or of the process, looked at a thousand times a second."
    def __init__(self, device: str): self.device, self.done = device, threading.Event()
    def resident(self) -> int: return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    def watch(self) -> None:
        while not self.done.wait(.001): self.top = max(self.top, self.resident())
    def __enter__(self):
        if self.device == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.start = self.top = self.resident()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self
    def __exit__(self, *error):
        if self.device == 'cuda': self.top = torch.cuda.max_memory_allocated()
        else:
            self.done.set()
            self.thread.join()
        self.extra = self.top - self.start


def read_pass(model: nn.Module, device: str) -> float:
    "Seconds to read every weight once: the least any way must spend."
    views = [m.weight.view(torch.float32) for m in linears(model)]
    def once():
        for v in views: v.sum()
    return min(seconds(once, device) for _ in range(5))


def right(model: nn.Module, kind: str) -> tuple[float, bool]:
    "(zeros achieved, whether the largest magnitude that went is no larger than the smallest that stayed: in a layer, the model or a group)."
    lost, kept, zeros, total, good = 0., float('inf'), 0, 0, True
    for i, m in enumerate(linears(model)):
        w, old = m.weight, torch.empty_like(m.weight)
        g = torch.Generator(w.device).manual_seed(i)
        old.normal_(0, .02 * (1 + i % 7 / 10), generator=g).abs_()
        gone = w == 0
        zeros, total = zeros + int(gone.sum()), total + w.numel()
        if kind == '2:4':
            groups, out = old.view(-1, 4), gone.view(-1, 4)
            good &= bool((out.sum(1) == 2).all()) and bool(((groups * out).amax(1) <= groups.masked_fill_(out, torch.inf).amin(1)).all())
            continue
        if kind == 'layer': lost, kept = 0., float('inf')
        lost, kept = max(lost, float((old * gone).amax())), min(kept, float(old.masked_fill_(gone, torch.inf).amin()))
        good &= lost <= kept
    return zeros / total, good


def one(name: str, layers: int, a: argparse.Namespace) -> dict:
    "The row of one way at so many layers, with the seconds of a pass under `passes`; an out-of-memory error is passed on."
    kind, f = WAYS[name]
    model = build(layers, a.scale, getattr(torch, a.dtype), a.device)
    weights = sum(p.numel() for p in model.parameters())
    with torch.no_grad(), slab(a.slab and 2**a.slab):
        fill(model)
        small = build(1, 16 * a.scale, getattr(torch, a.dtype), a.device)      # what is loaded at the first call is not counted
        fill(small)
        f(small)
        base = read_pass(model, a.device)
        sync(a.device)
        with Peak(a.device) as peak: t = seconds(lambda: f(model), a.device)
        zeros, good = right(model, kind)
    return dict(way=name, **{'million weights': weights / 1e6}, s=t, passes=base, **{'extra GiB': peak.extra / 2**30}, zeros=zeros, right=good)


def run(name: str, a: argparse.Namespace) -> dict:
    "The row of one way at the most layers that it can take."
    layers, failed = a.layers, []
    while layers:
        try:
            if a.device == 'cuda': row = one(name, layers, a)
            else: row = apart(name, layers, a)
            return row | dict(note=f"out of memory at {', '.join(map(str, failed))} layers; this is {layers}") if failed else row
        except (MemoryError, torch.OutOfMemoryError):
            failed.append(layers)
            layers //= 2
    return dict(way=name, note='out of memory even with one layer')


def apart(name: str, layers: int, a: argparse.Namespace) -> dict:
    "The same in a process of its own with limited memory. MemoryError when the limit is hit."
    own = ['--way', name, '--layers', str(layers), '--dtype', a.dtype, '--scale', str(a.scale), '--device', a.device]
    if a.slab: own += ['--slab', str(a.slab)]
    cap = int(a.limit * 2**30)
    done = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (cap, cap)))
    if done.returncode == 0: return json.loads(done.stdout.splitlines()[-1])
    if any(x in done.stderr for x in ("can't allocate memory", 'MemoryError', 'bad_alloc', 'OutOfMemory')): raise MemoryError
    raise RuntimeError(f'{name}: exit code {done.returncode}\n{done.stderr[-2000:]}')


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--dtype', default='bfloat16', choices=['bfloat16', 'float32'])
    p.add_argument('--layers', type=int, default=16, help='16 layers are 973 million weights')
    p.add_argument('--scale', type=int, default=1, help='divide both sides of every weight by this')
    p.add_argument('--slab', type=int, help='the project looks at 2**SLAB weights at a time (default: as the package has it)')
    p.add_argument('--limit', type=float, default=15., help='GiB of address space for each way, on a CPU')
    p.add_argument('--ways', help='only those whose name contains this')
    p.add_argument('--way', help='print the row of one way as JSON and nothing else')
    p.add_argument('--out', help='folder of the JSON file (default: benchmarks/results)')
    p.add_argument('--name', default='oneshot', help='of the JSON file')
    a = p.parse_args()
    if a.way:
        print(json.dumps(one(a.way, a.layers, a)))
        return
    rows = [run(n, a) for n in WAYS if not a.ways or a.ways in n]
    done = [r for r in rows if 's' in r]
    speed = min((r['passes'] / r['million weights'] for r in done), default=1.)      # of the least disturbed pass
    for r in done: r['passes'] = r['s'] / (speed * r['million weights'])
    head = header(a.device, dtype=a.dtype, sparsity=SPARSITY, **(dict(slab=f'2^{a.slab}') if a.slab else {}))
    show(rows, head)
    save(f'{a.name}_{a.dtype}', rows, head, a.out, a.device)
    if not all(r.get('right', True) for r in rows): raise SystemExit('a way pruned the wrong weights')


if __name__ == '__main__': main()
