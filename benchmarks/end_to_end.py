"""Whole language models, block-sparse and 2:4, beside the same model dense: prefill, training step, memory, eager and compiled.

    python benchmarks/end_to_end.py                                  on CUDA: the shipped model and a 7B-shape one with random weights
    python benchmarks/end_to_end.py --models 7b --patterns 2:4       a part of it
    python benchmarks/end_to_end.py --models 7b --layers 32          all layers in place of 8

`sw.export` chooses the kernel of every layer, so a layer that would be slower stays dense; each row says how many are sparse. The 7B shape is timed
with `--layers` layers and with none: whole = none + 32 / layers x (layers - none), for seconds and bytes of weights alike. Compiled: each layer by torch.compile.
"""
import argparse
import gc
import statistics
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from common import header, median_seconds, save, seconds, show, sync
from torch import nn

import sparse_workbench as sw
from sparse_workbench.zoo import Llama, LlamaConfig

SHAPES = {'7b': LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, max_position_embeddings=4096, tie_word_embeddings=False),
          'tiny': LlamaConfig(256, 128, 256, 4, 4, 4, 32, tie_word_embeddings=False)}
SPARSITIES = (.5, .7, .8, .9, .95)


def build(name: str, layers: int, device: str, dtype: torch.dtype) -> nn.Module:
    "The shipped model, or a Llama of a known shape with random weights that keep activations finite; the same at every call."
    if name == 'embedded': return sw.zoo.load(name, device, dtype).model.requires_grad_(True)
    with torch.device('meta'): model = Llama(replace(SHAPES[name], num_hidden_layers=layers)).to(dtype)
    model.to_empty(device=device)
    g = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .02, generator=g) if p.ndim > 1 else p.fill_(1)
    return model.eval()


def compiled(model: nn.Module) -> nn.Module:
    "Every decoder layer compiled; they share the code."
    torch.compiler.reset()
    for layer in model.model.layers: layer.compile(dynamic=False)
    return model


def step(model: nn.Module, ids: torch.Tensor, opt: torch.optim.Optimizer) -> None:
    "Forward, backward and update."
    logits = model(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    opt.step()
    opt.zero_grad(set_to_none=True)


def seconds_and_peak(f: Callable[[], object], device: str, repeats: int) -> tuple[float, float]: # median seconds; GB at the most, 0 on a CPU
    if device == 'cuda': torch.cuda.reset_peak_memory_stats()
    t = median_seconds([f], device, repeats, graph=False)
    return t, torch.cuda.max_memory_allocated() / 1e9 if device == 'cuda' else 0.


def times(model: nn.Module, ids: torch.Tensor, train: bool, device: str, repeats: int) -> dict[str, float]:
    "Seconds and peak memory of a prefill and of a training step."
    with torch.no_grad(): prefill, peak = seconds_and_peak(lambda: model(ids), device, repeats)
    row = {'prefill s': prefill, 'prefill GB': peak}
    if train: row['train s'], row['train GB'] = seconds_and_peak(training(model, ids, device), device, repeats)
    return row


def training(model: nn.Module, ids: torch.Tensor, device: str) -> Callable[[], None]:
    "A training step of a model."
    opt = torch.optim.AdamW(model.parameters(), 1e-5, fused=device == 'cuda')
    return lambda: step(model, ids, opt)


def in_turns(model: nn.Module, dense: nn.Module, ids: torch.Tensor, train: bool, repeats: int) -> dict[str, float]:
    "Seconds on a CPU, whose speed changes with what else runs there: the dense model takes turns with the sparse one."
    row = {}
    for what, make in (('prefill', lambda m: lambda: m(ids)), ('train', lambda m: training(m, ids, 'cpu'))):
        if what == 'train' and not train: continue
        with torch.set_grad_enabled(what == 'train'):
            calls = [make(m) for m in (model, dense)]
            for f in calls: f()
            row[f'{what} s'], row[f'dense {what} s'] = (statistics.median(t) for t in zip(*([seconds(f, 'cpu') for f in calls] for _ in range(repeats))))
    return row


def prepare(name: str, layers: int, how: tuple[str, float] | None, ids: torch.Tensor, device: str, dtype: torch.dtype, budget: float,
            ) -> tuple[nn.Module, dict]: # the model, pruned and exported; what export says
    "A model ready to be timed, and what is known of it."
    model = build(name, layers, device, dtype)
    if not how: return model, dict(sparse='0', error=0.)
    found = sw.sites(model, ignore=('lm_head',))
    p = sw.pattern(how[0])
    fits = [s for s in found if all(n % max(1, t) == 0 for n, t in zip(s.shape, p.tile))]
    sw.prune(model, None if p.sparsity is not None else how[1], pattern=p, include=[s.name for s in fits])
    _, told = sw.export(model, ids, budget=budget)
    kernels = ', '.join(sorted({r['kernel'] for r in told.rows} - {'dense'}))
    if not kernels: kernels = '; '.join(sorted({r['reason'] for r in told.rows}))[:120]
    return model, dict(sparse=f"{told.total['sparse']} of {told.total['layers']}", kernels=kernels, error=told.whole['error'])


def weights(model: nn.Module) -> float:
    "GB of parameters and buffers."
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e9


def stretched(some: dict, none: dict, times_: float) -> dict:
    "What grows with the layers, taken from some layers and from none to all; peaks of memory are not stretched."
    bare = {k: none[k.removeprefix('dense ')] for k in some if k.endswith(' s') or k == 'weights GB'}
    return {k: bare[k] + times_ * (v - bare[k]) if k in bare else v for k, v in some.items()}


def case(name: str, how: tuple[str, float] | None, a: argparse.Namespace, device: str, dtype: torch.dtype, none: dict[str, dict]) -> list[dict]:
    "Rows of one model and pattern, eager and compiled."
    model, known = prepare(name, a.layers, how, batch(name, a, device), device, dtype, a.budget)
    ids, rows, beside = batch(name, a, device), [], build(name, a.layers, device, dtype) if device == 'cpu' and how else None
    every = SHAPES[name].num_hidden_layers if name in SHAPES else None
    for way in a.ways:
        if way == 'compiled': model, beside = compiled(model), beside and compiled(beside)
        row = dict(model=name, pattern=how[0] if how else 'dense', sparsity=how[1] if how else 0., way=way, **known)
        timed = in_turns(model, beside, ids, a.train, a.repeats) if beside else times(model, ids, a.train, device, a.repeats)
        t = {'weights GB': weights(model), **timed}
        if every: t = stretched(t, none[name], every / a.layers)
        rows.append(row | {'prefill tokens/s': ids.numel() / t['prefill s']} | t)
    del model
    torch.compiler.reset()
    gc.collect()
    if device == 'cuda': torch.cuda.empty_cache()
    return rows


def batch(name: str, a: argparse.Namespace, device: str) -> torch.Tensor:
    "Random tokens: one long text for the 7B shape, many short ones for the shipped model."
    length = min(a.tokens, 512 if name == 'embedded' else a.tokens)
    return torch.randint(256, (max(1, a.tokens // length), length), device=device, generator=torch.Generator(device).manual_seed(1))


def compared(rows: list[dict]) -> list[dict]:
    "Times faster than the dense model of the same way, and than the faster of both dense ways."
    for r in rows:
        for key, name in (('prefill s', 'prefill x'), ('train s', 'train x')):
            dense = {x['way']: x[key] for x in rows if x['model'] == r['model'] and x['pattern'] == 'dense' and key in x}
            if key in r and dense:
                dense[r['way']] = r.get(f'dense {key}', dense[r['way']])      # the one that took turns with it
                r |= {name: dense[r['way']] / r[key], f'{name} best dense': min(dense.values()) / r[key]}
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    p.add_argument('--device', default='cuda' if cuda else 'cpu')
    p.add_argument('--models', nargs='+', default=['embedded', '7b'] if cuda else ['embedded', 'tiny'], choices=['embedded', *SHAPES])
    p.add_argument('--patterns', nargs='+', default=['block128', 'block64', '2:4'])
    p.add_argument('--sparsities', nargs='+', type=float, default=list(SPARSITIES))
    p.add_argument('--layers', type=int, default=8 if cuda else 2, help='layers of a random model that are timed')
    p.add_argument('--tokens', type=int, default=4096 if cuda else 128, help='in a batch')
    p.add_argument('--ways', nargs='+', default=['eager', 'compiled'] if cuda else ['eager'], choices=['eager', 'compiled'])
    p.add_argument('--no-train', dest='train', action='store_false')
    p.add_argument('--budget', type=float, default=20., help='seconds of measuring for each export')
    p.add_argument('--repeats', type=int, default=15 if cuda else 3)
    p.add_argument('--name', default='end_to_end', help='of the JSON file')
    p.add_argument('--out', help='folder of the JSON file (default: benchmarks/results)')
    a = p.parse_args()
    dtype = torch.bfloat16 if a.device == 'cuda' else torch.float32
    plan = [(q, s) for q in a.patterns for s in ([sw.pattern(q).sparsity] if sw.pattern(q).sparsity is not None else a.sparsities)]
    rows, failed, none = [], [], {}
    head = header(a.device, dtype=str(dtype).removeprefix('torch.'), tokens=a.tokens, **{'layers timed': a.layers})
    for name in a.models:
        if name in SHAPES:
            bare = build(name, 0, a.device, dtype)
            none[name] = {'weights GB': weights(bare), **times(bare, batch(name, a, a.device), a.train, a.device, a.repeats)}
            del bare
        for how in [None, *plan]:
            try: rows += case(name, how, a, a.device, dtype, none)
            except Exception:                                # a case that fails must not cost the others
                failed.append(f'{name} {how}')
                traceback.print_exc()
            sync(a.device)
            if rows: print(f"{name} {how or 'dense'}: {rows[-1]['prefill tokens/s']:,.0f} tokens/s {rows[-1]['way']}, {rows[-1]['sparse']} sparse", flush=True)
            save(a.name, compared(rows), head, a.out, a.device)
    show(compared(rows), head)
    if failed: raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == '__main__': main()
