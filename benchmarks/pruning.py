"""Kernels that prune: the exact threshold of many weights, transposable N:M masks, the SparseGPT sweep; beside what torch has, in the same run.

    python benchmarks/pruning.py                   on a CUDA machine: the Triton kernels; elsewhere, smaller: the PyTorch implementations
    python benchmarks/pruning.py --only sweep --name pruning_sweep      threshold, prune, transposable or sweep alone, in a file of its own
    python benchmarks/pruning.py --tune            launch sizes of the kernels; nothing is saved
"""
import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from common import collect, header, median_seconds, parser, seconds, show, sync
from oneshot import WAYS, Peak, build, fill, linears, read_pass, right

from sparse_workbench import patterns as P
from sparse_workbench.patterns import nm, unstructured
from sparse_workbench.reconstruct import Root, inverse_root, sweep

SHAPE = {'cuda': (28672, 8192), 'cpu': (512, 1024)}


def best(f: Callable[[], object], device: str, repeats: int = 5) -> float:
    "The least wall time of a few calls, with all that the host does."
    f()
    return min(seconds(f, device) for _ in range(repeats))


def peak(f: Callable[[], object], device: str) -> float:
    "GiB that a call needs beyond what lies there."
    with Peak(device) as p: f()
    return p.extra / 2**30


# The threshold

def thresholds(a: argparse.Namespace) -> Iterator[dict]:
    "The k-th smallest magnitude of one matrix, and of all matrices of a decoder."
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        one = [torch.empty(SHAPE[a.device], dtype=dtype, device=a.device).normal_(0, .02)]
        model = build(a.layers if dtype != torch.float32 else max(1, a.layers // 2), a.scale, dtype, a.device)
        with torch.no_grad(): fill(model)
        for what, xs in ((f'{one[0].size(0)}x{one[0].size(1)}', one), ('a decoder', [m.weight.detach() for m in linears(model)])):
            for s in (.5, .9) if dtype == torch.bfloat16 else (.5,): yield from threshold_rows(what, xs, s, a.device)
        del one, model


def threshold_rows(what: str, xs: list[torch.Tensor], sparsity: float, device: str) -> Iterator[dict]:
    n, size = sum(x.numel() for x in xs), xs[0].element_size()
    row = dict(weights=what, tensors=len(xs), million=n / 1e6, dtype=str(xs[0].dtype).removeprefix('torch.'), sparsity=sparsity)
    def read() -> None:
        for x in xs: x.view(torch.float32).sum()
    drop, each = round(sparsity * n), [round(sparsity * x.numel()) for x in xs]
    ways = {'one ranking': lambda: P.magnitude_cut(xs, [0] * len(xs), [drop]), 'a ranking for each': lambda: P.magnitude_cut(xs, range(len(xs)), each),
            'digit by digit': lambda: P.cut_magnitudes(xs, [0] * len(xs), [drop]),
            'sort': lambda: torch.cat([x.flatten().abs() for x in xs]).sort().values[drop].item()}
    base = median_seconds([read], device, 7)
    yield row | dict(way='read', ms=base * 1e3, **{'of a read': 1., 'TB/s': n * size / base / 1e12}, right=True)
    if device == 'cuda':
        t = median_seconds([count_pass(xs, drop)], device, 7, graph=False)
        yield row | dict(way='the counting pass alone', ms=t * 1e3, **{'of a read': t / base, 'TB/s': n * size / t / 1e12}, right=True)
    value, ties = exact(xs, drop)
    for name, f in ways.items():
        if name == 'a ranking for each' and len(xs) == 1: continue
        got = f()
        good = got == value if name == 'sort' else (got[0][0].item(), int(got[1][0])) == (value, ties) if 'each' not in name else all(
            (v, t) == exact([x], d) for x, d, v, t in list(zip(xs, each, got[0].tolist(), got[1].tolist()))[:3])
        t = best(f, device, 3)
        yield row | dict(way=name, ms=t * 1e3, **{'of a read': t / base, 'TB/s': n * size / t / 1e12, 'extra GiB': peak(f, device)}, right=bool(good))


def exact(xs: list[torch.Tensor], drop: int) -> tuple[float, int]:
    "(the value of this rank, how many equal to it stay), by sorting."
    v = torch.cat([x.flatten().abs() for x in xs]).sort().values
    return v[drop].item(), int(torch.searchsorted(v, v[drop:drop + 1], right=True)) - drop


def count_pass(xs: list[torch.Tensor], drop: int) -> Callable[[], object]:
    "The one look at all weights, with a bracket known and the table made beforehand."
    from sparse_workbench.kernels import threshold as K
    n, top, bits = sum(x.numel() for x in xs), 2**(8 * xs[0].element_size() - 1) - 1, 8 * xs[0].element_size()
    sample, m, _ = K._sample([xs])
    low, high, _ = K._brackets(sample, m, [n], [drop], 5., top)
    size = 2**min(20, max(3, (high[0] - low[0]).bit_length()))
    table, kind, shift = K._table(xs), K.TYPES[xs[0].element_size()], max(0, (high[0] - low[0]).bit_length() - (size - 1).bit_length())
    edges = torch.tensor([low, high, [shift]], dtype=kind[1], device=xs[0].device)
    copies = max(4, min(4096, 2**20 // size))
    below, bins = torch.zeros(1, dtype=torch.int64, device=xs[0].device), torch.zeros(1, copies, size, dtype=torch.int32, device=xs[0].device)
    group = torch.zeros(len(xs), dtype=torch.int32, device=xs[0].device)
    return lambda words=K.WORDS, warps=4: K._between_kernel[(len(table[2]),)](*table, group, *edges, below, bins, kind[0], bits, False, shift > 0, size, copies, K.CHUNK, words, num_warps=warps)


# Pruning whole

def prunings(a: argparse.Namespace) -> Iterator[dict]:
    "`prune` on a decoder, beside torch.nn.utils.prune."
    for name in ('ours, global', 'torch global_unstructured', 'sort', 'ours, uniform', 'torch l1_unstructured', 'topk', 'ours, 2:4'):
        kind, f = WAYS[name]
        model = build(a.layers, a.scale, torch.bfloat16, a.device)
        with torch.no_grad():
            fill(model)
            f(model)
            times = []
            for _ in range(3):
                fill(model)
                times.append(seconds(lambda: f(model), a.device))
            fill(model)
            extra, base = peak(lambda: f(model), a.device), read_pass(model, a.device)
            zeros, good = right(model, kind)
        yield dict(weights='a decoder', million=sum(p.numel() for p in model.parameters()) / 1e6, dtype='bfloat16', way=name, ms=min(times) * 1e3,
                   **{'of a read': min(times) / base, 'extra GiB': extra}, zeros=zeros, right=good)


# Transposable masks

def transposables(a: argparse.Namespace) -> Iterator[dict]:
    "Masks of squares, with what they keep against the exact optimum of some of them."
    cases = [((11008, 4096), 2, 4), ((28672, 8192), 2, 4), ((11008, 4096), 4, 8), ((11008, 4096), 2, 8), ((11008, 4096), 8, 16), ((11008, 4096), 16, 32), ((11040, 4128), 6, 12)]
    for (r, c), keep, of in cases:
        if a.device == 'cpu': r, c = of * 16, of * 16
        xs = [torch.randn(r, c, dtype=torch.bfloat16, device=a.device) for _ in range(4)]
        row, out = dict(shape=f'{r}x{c}', pattern=f'{keep}:{of} both'), torch.empty_like(xs[0])
        copy = median_seconds([lambda x=x: out.copy_(x) for x in xs], a.device)
        yield row | dict(way='copy', ms=copy * 1e3, **{'of a copy': 1.}, right=True)
        scores = xs[0].abs().view(r // of, of, c // of, of).transpose(1, 2).reshape(-1, of, of)
        few = [xs[0]] if of > 4 else xs
        ways: dict[str, list[Callable]] = {'in PyTorch': [lambda: P.best_squares(scores, keep)]}
        if a.device == 'cuda':
            from sparse_workbench.kernels.transposable import square_keep_kernel, transposable_mask_magnitude
            ways = {'kernel, from the weight': [lambda x=x: transposable_mask_magnitude(x, keep, of) for x in few], 'kernel': [lambda: square_keep_kernel(scores, keep)]} | ways
            if (keep, of) == (2, 4): ways['torch tile (packs too; not the best mask)'] = [lambda x=x: torch._sparse_semi_structured_tile(x) for x in xs]
        most = optimum(scores, keep)
        for name, calls in ways.items():
            got = calls[0]()
            mask = tiled(got, of) if name.startswith('kernel, ') else got if not name.startswith('torch') else None
            t = median_seconds(calls, a.device, 1 if name == 'in PyTorch' else 5, graph=name.startswith('kernel'))
            more = quality(scores, mask, keep, most) if mask is not None else dict(right=True)
            yield row | dict(way=name, ms=t * 1e3, **{'of a copy': t / copy}, **more)


def tiled(mask: torch.Tensor, of: int) -> torch.Tensor:
    "(out, in) -> (squares, of, of)"
    return mask.view(mask.size(0) // of, of, -1, of).transpose(1, 2).reshape(-1, of, of)


def optimum(scores: torch.Tensor, keep: int, count: int = 24) -> torch.Tensor | None:
    "What the best masks of the first squares keep, as linear programs; None without scipy."
    try:
        import numpy as np
        import scipy.sparse as sp
        from scipy.optimize import linprog
    except ImportError: return None
    of = scores.size(1)
    eye, one = sp.eye(of), np.ones((1, of))
    sums, full = sp.vstack([sp.kron(eye, one), sp.kron(one, eye)]).tocsr(), np.full(2 * of, keep)
    return torch.tensor([-linprog(-x.flatten(), A_eq=sums, b_eq=full, bounds=(0, 1), method='highs').fun for x in scores[:count].double().cpu().numpy()])


def quality(scores: torch.Tensor, mask: torch.Tensor, keep: int, most: torch.Tensor | None) -> dict:
    "Is it legal, what share of all scores does it keep, and how far below the optimum is it on average and at worst?"
    good = bool((mask.sum(1) == keep).all() and (mask.sum(2) == keep).all())
    kept = float((scores.float() * mask).sum(dtype=torch.double) / scores.sum(dtype=torch.double))
    if most is None: return dict(kept=kept, right=good)
    short = 1 - (scores[:len(most)].double() * mask[:len(most)]).sum((1, 2)).cpu() / most
    return dict(kept=kept, **{'below optimum, %': 100 * short.mean().item(), 'worst, %': 100 * short.max().item()}, right=good and (scores.size(1) > 4 or short.max().item() < 1e-6))


# The sweep

def published(weight: torch.Tensor, root: Root, sparsity: float, keep: int = 0, of: int = 0, block: int = 128) -> torch.Tensor:
    "The algorithm of SparseGPT, column by column in plain torch, with the threshold of the paper's rule."
    w = weight.clone()
    w[:, root.dead] = 0
    for i in range(0, w.size(1), block):
        part, u = w[:, i:i + block].clone(), root.u[i:i + block, i:i + block]
        q, errors, d = torch.zeros_like(part), torch.zeros_like(part), u.diagonal()
        if not of:
            scores = part**2 / d**2
            gone = scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]
        else: gone = torch.zeros_like(part, dtype=torch.bool)
        for j in range(part.size(1)):
            if of and j % of == 0:
                scores = part[:, j:j + of]**2 / d[j:j + of]**2
                gone.scatter_(1, j + scores.topk(of - keep, dim=1, largest=False).indices, True)
            q[:, j] = part[:, j].masked_fill(gone[:, j], 0)
            errors[:, j] = (part[:, j] - q[:, j]) / u[j, j]
            part[:, j:] -= errors[:, j:j + 1] @ u[j:j + 1, j:]
        w[:, i:i + block] = q
        w[:, i + block:] -= errors @ root.u[i:i + block, i + block:]
    return w


@contextmanager
def launches() -> Iterator[list]:
    "Shapes that the kernel of the sweep is launched for."
    from sparse_workbench.kernels import sweep as S
    seen: list = []
    real = S._launch
    with patch.object(S, '_launch', lambda w, *rest, **kw: seen.append(tuple(w.shape)) or real(w, *rest, **kw)): yield seen


def sweeps(a: argparse.Namespace) -> Iterator[dict]:
    "One layer, three patterns."
    for out, inp in ((4096, 4096), (11008, 4096), (4096, 11008)) if a.device == 'cuda' else ((256, 512),):
        torch.manual_seed(0)
        x = torch.randn(2 * inp, inp, device=a.device) * torch.rand(inp, device=a.device).add(.1)
        x[:, 1:] += .3 * x[:, :-1]
        x[:, 7] = 0
        hessian = x.T @ x
        root, w = inverse_root(hessian), torch.randn(out, inp, device=a.device)
        factor = best(lambda: inverse_root(hessian), a.device, 2)
        e = torch.randn(out, 128, device=a.device)
        products = median_seconds([lambda: [w[:, i + 128:].addmm_(e, root.u[i:i + 128, i + 128:], alpha=-0.) for i in range(0, inp - 128, 128)]], a.device, 3, graph=False)
        for name, p, s, keep, of in (('unstructured', unstructured(), .5, 0, 0), ('2:4', nm(2, 4), None, 2, 4), ('4:8', nm(4, 8), None, 4, 8)):
            row = dict(shape=f'{out}x{inp}', pattern=name)
            kept: list[torch.Tensor] = []
            t = best(lambda: kept.append(published(w, root, .5, keep, of)), a.device, 1)
            theirs, reference = kept[-1], loss(kept[-1], w, x)
            yield row | dict(way='column by column', ms=t * 1e3, loss=reference, right=True)
            with launches() as launched: ours, mask = sweep(w, root, p, s)
            if a.device == 'cuda' and len(launched) != -(-inp // 128): raise SystemExit(f'the kernel of the sweep was launched {len(launched)} times for {inp} columns: its twin would be timed')
            good = bool(((ours == 0) | mask).all()) and int((~mask).sum()) == w.numel() // 2 and loss(ours, w, x) < 1.002 * reference
            mine = best(lambda: sweep(w, root, p, s), a.device, 3)
            yield row | dict(way='sweep', ms=mine * 1e3, speedup=t / mine, loss=loss(ours, w, x), **{'same zeros, %': 100 * float(((ours == 0) == (theirs == 0)).float().mean())}, right=good)
            yield row | dict(way='its matrix products alone', ms=products * 1e3, right=True)
        yield dict(shape=f'{inp}x{inp}', pattern='', way='inverse root of the Hessian', ms=factor * 1e3, right=True)


def loss(v: torch.Tensor, w: torch.Tensor, x: torch.Tensor) -> float:
    "Change of the outputs, as a share of them."
    return float(((x @ (v - w).T)**2).sum(dtype=torch.double) / ((x @ w.T)**2).sum(dtype=torch.double))


# Launch sizes

def tune(a: argparse.Namespace) -> list[dict]:
    "Other launch sizes of the kernels."
    from sparse_workbench.kernels import sweep as S
    from sparse_workbench.kernels import threshold as K
    from sparse_workbench.kernels import transposable as T
    rows: list[dict] = []
    def add(name: str, f: Callable[[], object], **how) -> None: rows.append(dict(kernel=name, **how, ms=1e3 * median_seconds([f], 'cuda', 5, graph=False)))
    for dtype in (torch.bfloat16, torch.float32):
        xs = [torch.empty(SHAPE['cuda'], dtype=dtype, device='cuda').normal_() for _ in range(4)]
        f = count_pass(xs, sum(x.numel() for x in xs) // 2)
        for words, warps in ((512, 4), (1024, 4), (2048, 4), (1024, 8), (2048, 8)): add(f'count {dtype}', lambda: f(words, warps), size=words, warps=warps)
        add(f'standing {dtype}', lambda: K._standing(xs, [K._key(.5, dtype)] * 4))
        add(f'zero {dtype}', lambda: K.magnitude_zero_kernel_(xs, torch.full((4,), .5), torch.zeros(4, dtype=torch.long)))
    x = torch.randn(11008, 4096, device='cuda', dtype=torch.bfloat16)
    for of, own, warps in ((4, 128, 4), (4, 64, 2), (4, 256, 4), (4, 256, 8), (8, 4, 1), (8, 8, 2), (8, 2, 1), (8, 16, 4), (16, 1, 1), (16, 2, 2), (16, 1, 2), (16, 2, 4), (32, 1, 4), (32, 1, 2), (32, 1, 8)):
        add(f'transposable {of // 2}:{of}', lambda: T._launch(x, of // 2, of, True, own, warps), size=own, warps=warps)
    w, u, mask = torch.randn(11008, 128, device='cuda'), torch.eye(128, device='cuda') + .01 * torch.randn(128, 128, device='cuda').triu(1), torch.rand(11008, 128, device='cuda') < .5
    for of in (0, 4, 8):
        for r, warps in ((2, 1), (4, 1), (8, 1), (4, 2), (8, 2), (16, 2), (8, 4), (16, 4)):
            add(f'sweep of a block, of={of}', lambda: S._launch(w, u, mask, of // 2, of, r, warps), size=r, warps=warps)
    add('choice of a block', lambda: P.keep_top(w.square().view(1, -1), w.numel() // 2))
    return rows


PARTS = dict(threshold=thresholds, prune=prunings, transposable=transposables, sweep=sweeps)


def part(name: str, a: argparse.Namespace) -> Iterator[list[dict]]:
    "The rows of one part, one at a time."
    sync(a.device)
    if a.device == 'cuda': torch.cuda.empty_cache()
    for row in PARTS[name](a): yield [dict(part=name) | row]


def main() -> None:
    p = parser(__doc__)
    p.add_argument('--layers', type=int, help='of the decoder (default: 16 on CUDA, which is 973 million weights; 1 elsewhere)')
    p.add_argument('--scale', type=int, help='divide both sides of its weights by this (default: 1 on CUDA, 8 elsewhere)')
    p.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS), help='some parts; give their file a --name')
    p.add_argument('--tune', action='store_true')
    a = p.parse_args()
    if a.only != list(PARTS) and not a.name and not a.out: raise SystemExit('a part alone would take the place of the whole: give --name, such as --name pruning_sweep, or --out')
    a.layers, a.scale = a.layers or (16 if a.device == 'cuda' else 1), a.scale or (1 if a.device == 'cuda' else 8)
    torch.manual_seed(0)
    if a.tune: show(tune(a), header(a.device))
    else: collect('pruning', (rows for name in a.only for rows in part(name, a)), header(a.device), a)


if __name__ == '__main__': main()
