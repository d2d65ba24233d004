"""The kernels that prune against their PyTorch twins, on a real GPU. Without one they are tested, interpreted, in their notebooks.

Runs under pytest, and as a script where there is no pytest: python tests/test_pruning_cuda.py
"""
import sys

import torch
from launched import ran

try: import pytest
except ImportError: pytest = None
if pytest:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def weights(dtype, *sizes):
    "Tensors on the GPU: some scaled, some full of ties and zeros of both signs."
    xs = [torch.randn(n, device='cuda').mul(1 + i).to(dtype) for i, n in enumerate(sizes)]
    for x in xs[1::2]: x[::3], x[1::5] = 0, -0.
    for x in xs[2::3]: x.copy_((x * 4).round())
    return xs


def exact(xs, drop):
    "By sorting: (value of this rank, how many equal to it stay)."
    v = torch.cat([x.abs() for x in xs]).sort().values
    return v[drop].item(), int((v == v[drop]).sum()) - (drop - int((v < v[drop]).sum()))


def same_cuts(xs, groups, drops):
    from sparse_workbench.kernels import threshold as K
    from sparse_workbench.patterns import magnitude_cut
    with ran(K, '_cuts'): values, ties = magnitude_cut(xs, groups, drops)
    for g, (d, v, t) in enumerate(zip(drops, values.tolist(), ties.tolist())):
        assert (v, t) == exact([x for x, i in zip(xs, groups) if i == g], d), (xs[0].dtype, g, d, v, t)


def test_cuts_of_every_type_rank_and_size():
    for dtype in DTYPES:
        for sizes in ((5,), (70_001,), (3_000_000, 17, 999_999, 40_000, 1_234_567), (9_000_000,)):
            xs = weights(dtype, *sizes)
            n = sum(sizes)
            for drop in {1, n // 1000 + 1, n // 3, n // 2, int(.9 * n), n - 1}: same_cuts(xs, [0] * len(xs), [drop])
        xs = weights(dtype, *[250_000 + 1000 * i for i in range(40)])
        same_cuts(xs, list(range(40)), [len(x) // (2 + i % 5) for i, x in enumerate(xs)])
        same_cuts(xs, [i % 3 for i in range(40)], [100_000, 1_000_000, 3_333_333])


def test_cuts_where_the_sample_is_fooled():
    from sparse_workbench.kernels import threshold as K
    n = 4_000_000
    ramp = torch.arange(n, device='cuda', dtype=torch.float32)
    for dtype in DTYPES:
        for x in (torch.zeros(n, device='cuda'), torch.ones(n, device='cuda'), ramp / n, (ramp % 4096) / 64, (ramp > n // 2).float(), torch.where(ramp == 77, 3., 1.)):
            same_cuts([x.to(dtype)], [0], [n // 2])
            same_cuts([x.to(dtype), x.to(dtype)], [0, 0], [n + 5])
    said, real = [], K._brackets                                       # a bracket beside the answer: found in the next, wider one
    try:
        for wrong in ([1], [2**14], [0]):
            said.clear()
            K._brackets = lambda *a: (said.append(1), real(*a) if len(said) > 1 else (wrong, wrong, [set()]))[1]
            same_cuts(weights(torch.bfloat16, n), [0], [n // 2])
            assert len(said) == 2
    finally: K._brackets = real


def test_standing_and_zeros():
    from sparse_workbench.kernels import threshold as K
    from sparse_workbench.patterns import magnitude_standing, magnitude_zero_, stand_magnitudes, zero_magnitudes_
    for dtype in DTYPES:
        xs = weights(dtype, 100_000, 32_768, 7, 65_537, 1_000_001)
        for values in ([.5, 0, 1, 2, .25], [-torch.inf] * 5, [torch.inf] * 5, [xs[0][3].abs().item(), 0, 2, .5, 4]):
            v = torch.tensor(values, dtype=torch.double)
            with ran(K, '_standing'): got = magnitude_standing(xs, v)
            assert torch.equal(got, stand_magnitudes([x.cpu() for x in xs], v)), (dtype, values)
            for ties in ([0] * 5, [1, 5_000, 2, 20_000, 10_000], [10**7] * 5):
                here, there = [x.clone() for x in xs], [x.cpu() for x in xs]
                with ran(K, '_zero_'): got = magnitude_zero_(here, v, torch.tensor(ties))
                assert torch.equal(got, zero_magnitudes_(there, v, torch.tensor(ties))), (dtype, values, ties)
                for a, b in zip(here, there): assert torch.equal(a.cpu(), b) and torch.equal(a.cpu().signbit(), b.signbit()), (dtype, values, ties)


def test_nothing_beyond_the_weights_is_written():
    from sparse_workbench.kernels import threshold as K
    from sparse_workbench.patterns import magnitude_zero_
    for n in (5, 4_096, 32_769, 100_000):
        whole = torch.full((n + 128,), 1., device='cuda', dtype=torch.bfloat16)
        with ran(K, '_zero_'): magnitude_zero_([whole[64:64 + n]], torch.tensor([2.]), torch.tensor([0]))
        assert (whole == 0).sum() == n and whole[:64].eq(1).all() and whole[64 + n:].eq(1).all(), n


def test_digits():
    from sparse_workbench.kernels import threshold as K
    from sparse_workbench.patterns import digit_counts, key_counts, ordered
    for dtype in DTYPES:
        x, = weights(dtype, 300_001)
        for known in range(0, 8 * x.element_size(), 16):
            prefix = int(ordered(x)[5] >> (8 * x.element_size() - known)) if known else 0
            with ran(K, '_digits_kernel'): got = key_counts(x, prefix, known)
            assert torch.equal(got.cpu(), digit_counts(x.cpu(), prefix, known)) and got.sum() > 0, (dtype, known)


def test_more_than_two_billion_weights():
    from sparse_workbench.patterns import magnitude_cut, magnitude_standing, magnitude_zero_
    if torch.cuda.mem_get_info()[0] < 24 * 2**30: return print('  left out: less than 24 GB free')
    x = torch.empty(2**31 + 12_345, dtype=torch.bfloat16, device='cuda').normal_()
    value, ties = magnitude_cut([x], [0], [2**31])
    below, on = magnitude_standing([x], value)[0].tolist()
    assert below <= 2**31 < below + on and int(ties) == below + on - 2**31
    assert below == sum(int((p.abs() < value.item()).sum()) for p in x.split(2**28))
    before, tail = on - int(ties), x[-5:].clone()
    assert magnitude_zero_([x], value, ties).item() == below + before == 2**31
    assert torch.equal(x[-5:], tail * (tail.abs() > value.item())) or on


def test_pruning_is_the_same_on_both():
    from torch import nn

    from sparse_workbench.allocation import erk, global_
    from sparse_workbench.kernels import threshold as K
    from sparse_workbench.oneshot import prune
    from sparse_workbench.patterns import Pattern
    from sparse_workbench.scores import random
    flat = Pattern(layout='flat', name='flat')
    for how in (dict(sparsity=.5), dict(sparsity=.7, allocate=global_), dict(sparsity=.3, allocate=erk), dict(allocate={'0': 0., '1': 1., '*': .5}),
                dict(sparsity=.5, score=random, allocate=global_), dict(sparsity=.9, pattern=flat, allocate=global_)):
        for dtype, conv in ((torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)):
            torch.manual_seed(0)
            here, there = (nn.ModuleList([nn.Linear(1024, 2048), nn.Linear(2047, 129), nn.Linear(64, 3), *([nn.Conv2d(8, 8, 3)] if conv else [])]).to(dtype) for _ in range(2))
            here[0].weight.data[::2] = here[0].weight.data[::2].mul(64).round()
            there.load_state_dict(here.state_dict())
            there.cuda()
            for odd in (False, True):
                if odd: there[0].weight.data = there[0].weight.data.t().contiguous().t()      # the kernels cannot take it, the answer is the same
                a = prune(here, **how)
                if odd or 'score' in how or conv: b = prune(there, **how)
                else:
                    with ran(K, '_standing', '_zero_'): b = prune(there, **how)
                assert a.total == b.total, (how, dtype, odd)
                for x, y in zip(here.parameters(), there.parameters()): assert torch.equal(x, y.cpu()), (how, dtype, odd)


def test_what_is_not_finite_is_named():
    from torch import nn

    from sparse_workbench.kernels import threshold as K
    from sparse_workbench.oneshot import prune
    for bad in (float('nan'), float('inf'), -float('inf')):
        model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 77)).bfloat16().cuda()
        model[1].weight.data[5, 7] = bad
        before = model[0].weight.clone()
        with ran(K, '_standing'):
            try: prune(model, .5)
            except ValueError as e: assert '1.weight (77, 300) holds 1 NaN or infinite' in str(e), e
            else: raise AssertionError(bad)
        assert torch.equal(before, model[0].weight)


def test_small_squares_are_the_best():
    from sparse_workbench.kernels.transposable import square_keep_kernel, transposable_mask_magnitude
    from sparse_workbench.patterns import best_squares, transposable
    for dtype in DTYPES[:3]:
        for keep, of in ((1, 2), (2, 3), (2, 4), (3, 4)) if dtype == torch.float32 else ((2, 4),):
            for n in (1, 1000, 50_001):
                whole, real = torch.randint(-3, 4, (n, of, of)).to(dtype), torch.randn(n, of, of).to(dtype)
                assert torch.equal(square_keep_kernel(whole.cuda(), keep).cpu(), best_squares(whole, keep)), (dtype, keep, of, n)
                m, twin = square_keep_kernel(real.cuda(), keep).cpu(), best_squares(real, keep)
                assert (m.sum(1) == keep).all() and (m.sum(2) == keep).all()
                assert ((real.double() * m).sum((1, 2)) - (real.double() * twin).sum((1, 2))).abs().max() < 1e-5, (dtype, keep, of)
            flat = torch.randint(-3, 4, (33 * of, 27 * of)).to(dtype)
            for x in (flat, flat.t(), flat[of:, of:]):
                assert torch.equal(transposable_mask_magnitude(x.cuda(), keep, of).cpu(), transposable(keep, of).select(x.abs())), (dtype, keep, of)


def test_large_squares_are_legal_and_good():
    from sparse_workbench.kernels.transposable import square_keep_kernel, transposable_mask_magnitude
    from sparse_workbench.patterns import search_squares, transposable
    for dtype in DTYPES[:3]:
        every = (4, 8, 999), (1, 8, 50), (7, 8, 50), (5, 12, 64), (8, 16, 101), (16, 32, 33), (31, 32, 9), (3, 20, 17)
        for keep, of, n in every if dtype == torch.bfloat16 else every[:2]:
            w = torch.randn(n, of, of).to(dtype).abs()
            m, twin = square_keep_kernel(w.cuda(), keep).cpu(), search_squares(w, keep)
            assert (m.sum(1) == keep).all() and (m.sum(2) == keep).all(), (dtype, keep, of)
            assert abs(float((w.double() * m).sum() / (w.double() * twin).sum()) - 1) < 1e-3, (dtype, keep, of)
    for w in (torch.zeros(9, 8, 8), torch.ones(9, 8, 8), -torch.rand(9, 8, 8), torch.randint(0, 2, (9, 8, 8)).float()):
        m = square_keep_kernel(w.cuda(), 3)
        assert (m.sum(1) == 3).all() and (m.sum(2) == 3).all()
    x = torch.randn(96, 160, device='cuda')
    assert torch.equal(transposable_mask_magnitude(x, 4, 8), transposable(4, 8).select(x.abs()))


def root_of(inp, dead=()):
    "A root in float64, on the GPU."
    from sparse_workbench.reconstruct import inverse_root
    x = torch.randn(3 * inp, inp, dtype=torch.double, device='cuda')
    x[:, 1:] += .5 * x[:, :-1]
    x[:, list(dead)] = 0
    return inverse_root(x.T @ x)


def test_a_swept_block_is_the_twin():
    from sparse_workbench.kernels import sweep as S
    from sparse_workbench.kernels.sweep import sweep_block_kernel
    from sparse_workbench.reconstruct import sweep_columns
    for out, inp in ((1, 128), (1000, 128), (77, 40), (333, 300), (2048, 64)):
        root, w, mask = root_of(inp, (3,)), torch.randn(out, inp, dtype=torch.double, device='cuda'), torch.rand(out, inp, device='cuda') < .5
        right, got = w.clone(), w.float()
        e0, m0 = sweep_columns(right, root.u, mask, 0, 0)
        with ran(S, '_launch') as seen: e1, m1 = sweep_block_kernel(got, root.u.float(), mask, 0, 0)
        assert [part.shape for part, *_ in seen] == [(out, min(128, inp - i)) for i in range(0, inp, 128)]
        assert torch.equal(m0, m1) and torch.equal(got == 0, ~m1)
        for a, b in ((got, right), (e1, e0)): assert (a - b).abs().max() <= 1e-5 * b.abs().max(), (out, inp)


def near_ties(w, u, keep, of):
    "bool (out,): rows in which, in float64, some group's choice hangs on less than a ten-thousandth."
    from sparse_workbench.reconstruct import sweep_columns
    w, close, d = w.clone(), torch.zeros(len(w), dtype=torch.bool, device=w.device), u.diagonal()
    for g in range(0, w.size(1), of):
        v = (w[:, g:g + of] / d[g:g + of]).square().sort(dim=1).values
        close |= v[:, of - keep] - v[:, of - keep - 1] < 1e-4 * v[:, of - keep]
        part = w[:, g:g + of].clone()
        e, _ = sweep_columns(part, u[g:g + of, g:g + of], torch.ones_like(part, dtype=torch.bool), keep, of)
        w[:, g + of:] -= e @ u[g:g + of, g + of:]
    return close


def test_a_swept_block_chooses_the_same():
    from sparse_workbench.kernels import sweep as S
    from sparse_workbench.kernels.sweep import sweep_block_kernel
    from sparse_workbench.reconstruct import sweep_columns
    for keep, of in ((2, 4), (4, 8), (1, 2), (3, 5), (8, 16), (16, 32), (1, 4)):
        inp = 128 // of * of
        root, w = root_of(inp), torch.randn(4000, inp, dtype=torch.double, device='cuda')
        none, clear = torch.zeros_like(w, dtype=torch.bool), ~near_ties(w, root.u, keep, of)
        right, got = w.clone(), w.float()
        e0, m0 = sweep_columns(right, root.u, none, keep, of)
        with ran(S, '_launch') as seen: e1, m1 = sweep_block_kernel(got, root.u.float(), none, keep, of)
        assert [part.shape for part, *_ in seen] == [w.shape]
        assert (m1.view(len(w), -1, of).sum(2) == keep).all() and clear.float().mean() > .8, (keep, of, clear.float().mean())
        assert torch.equal(m0[clear], m1[clear]), (keep, of, int((m0 != m1)[clear].sum()))
        for a, b in ((got, right), (e1, e0)): assert (a - b)[clear].abs().max() <= 1e-5 * b.abs().max(), (keep, of)


def test_a_whole_sweep():
    from sparse_workbench.kernels import sweep as S
    from sparse_workbench.patterns import nm, per_row, unstructured
    from sparse_workbench.reconstruct import Root, sweep
    root, w = root_of(1000, (5, 500)), torch.randn(700, 1000, dtype=torch.double, device='cuda')
    for p, s in ((unstructured(), .5), (unstructured(), .83), (per_row(), .5), (nm(2, 4), None), (nm(4, 8), None)):
        right, m0 = sweep(w, root, p, s)
        with ran(S, '_launch') as seen: got, m1 = sweep(w.float().t().contiguous().t(), Root(root.u.float(), root.dead), p, s)      # stored column by column
        assert len(seen) == 8, (p, len(seen))
        same = (m0 == m1).float().mean().item()
        assert int(m1.sum()) == int(m0.sum()) and torch.equal(got == 0, ~m1 | (got == 0)) and not got[:, root.dead].any(), p
        assert same > .999, (p, same)
        a, b = (float(((v - w) @ torch.linalg.inv(root.u)).square().sum()) for v in (got.double(), right))
        assert abs(a / b - 1) < 1e-3, (p, a, b)


def test_compiled_and_captured():
    from sparse_workbench.patterns import square_keep
    w = torch.randn(1000, 4, 4, device='cuda')
    assert torch.equal(torch.compile(lambda x: square_keep(x, 2), fullgraph=True)(w), square_keep(w, 2))
    graph, out = torch.cuda.CUDAGraph(), square_keep(w, 2)
    with torch.cuda.graph(graph): out = square_keep(w, 2)
    w.normal_()
    graph.replay()
    assert torch.equal(out, square_keep(w, 2))


if __name__ == '__main__':
    from as_script import run
    sys.exit(run(globals()))
