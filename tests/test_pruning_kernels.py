"The kernels that prune, interpreted, against their PyTorch twins; the hooks through which `prune` reaches them. On a GPU: test_pruning_cuda.py."
import pytest
import torch
from torch import nn

from sparse_workbench import allocation, oneshot, patterns
from sparse_workbench.allocation import global_
from sparse_workbench.oneshot import check_all, cut_at_once, prune
from sparse_workbench.patterns import Pattern, best_squares, block, cut_magnitudes, exchange, nm, per_row, repair, search_squares, stand_magnitudes, transposable, unstructured, zero_magnitudes_
from sparse_workbench.reconstruct import Root, inverse_root, sweep, sweep_columns
from sparse_workbench.testing import seeded

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='with a GPU the kernels are compiled, and tested there')
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture
def small(monkeypatch):
    "The threshold kernels with a small sample, so that small tensors are not simply sorted."
    from sparse_workbench.kernels import threshold
    monkeypatch.setattr(threshold, 'SAMPLE', 2**12)
    monkeypatch.setattr(threshold, 'LEAST', 2**9)
    return threshold


def weights(dtype):
    "Tensors of odd sizes: plain, tiny, full of zeros of both signs, full of ties."
    xs = [torch.randn(n).mul(1 + i).to(dtype) for i, n in enumerate((40_001, 5, 32_768, 3_001))]
    xs[2][::2], xs[0][1::5] = 0, -0.
    xs[3].copy_((xs[3] * 4).round())
    return xs


def same(K, xs, groups, drops):
    a, b = K.magnitude_cut_kernel(xs, groups, drops), cut_magnitudes(xs, groups, drops)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]), (xs[0].dtype, drops, a, b)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_cuts(small, dtype):
    xs = weights(dtype)
    n = sum(map(len, xs))
    for drop in (1, n // 3, int(.9 * n), n - 1): same(small, xs, [0] * 4, [drop])
    same(small, xs, [0, 1, 1, 2], [20_000, 20_000, 1_000])


@pytest.mark.parametrize('name, x', dict(zeros=torch.zeros(20_000), ones=torch.ones(20_000), ramp=torch.arange(20_000.) / 20_000, steps=torch.arange(20_000.) % 64,
                                         halves=(torch.arange(20_000) > 10_000).float(), one=torch.where(torch.arange(20_000) == 77, 3., 1.)).items())
def test_cuts_through_heavy_values(small, name, x):
    for dtype in DTYPES[1:3]: same(small, [x.to(dtype), x.to(dtype)], [0, 0], [20_005])


@pytest.mark.parametrize('wrong', [1, 2**14, 0])
def test_a_bracket_beside_the_answer_is_widened(small, monkeypatch, wrong):
    calls, real = [], small._brackets
    monkeypatch.setattr(small, '_brackets', lambda *a: calls.append(a[4]) or (real(*a) if len(calls) > 1 else ([wrong], [wrong], [set()])))
    same(small, [torch.randn(20_000).bfloat16()], [0], [10_000])
    assert calls == [5., 50.]


def test_the_last_bracket_is_everything(small, monkeypatch):
    monkeypatch.setattr(small, '_brackets', lambda *a: ([1], [1], [set()]))
    same(small, [torch.randn(20_000).half()], [0], [10_000])
    same(small, [torch.randn(20_000)], [0], [10_000])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_standing_and_zeros(small, dtype):
    xs = weights(dtype)
    for values in ([.5, 0, .25, 2], [-torch.inf, torch.inf, 0, xs[3][0].abs().item()]):
        v = torch.tensor(values, dtype=torch.double)
        assert torch.equal(small.magnitude_standing_kernel(xs, v), stand_magnitudes(xs, v))
        for ties in ([0] * 4, [1, 2, 9_000, 100], [10**7] * 4):
            a, b = [x.clone() for x in xs], [x.clone() for x in xs]
            assert torch.equal(small.magnitude_zero_kernel_(a, v, torch.tensor(ties)), zero_magnitudes_(b, v, torch.tensor(ties)))
            for x, y in zip(a, b): assert torch.equal(x, y) and torch.equal(x.signbit(), y.signbit())


def test_digits(small):
    for dtype in DTYPES:
        x = weights(dtype)[0]
        for known in range(0, 8 * x.element_size(), 16):
            prefix = int(patterns.ordered(x)[5] >> (8 * x.element_size() - known)) if known else 0
            got = small.key_counts_kernel(x, prefix, known)
            assert torch.equal(got, patterns.digit_counts(x, prefix, known)) and got.sum() > 0


def test_what_the_threshold_kernels_refuse(small):
    x = torch.randn(64)
    with pytest.raises(TypeError, match='one float type on one device'): small.magnitude_cut_kernel([x, x.half()], [0, 0], [3])
    with pytest.raises(TypeError, match='not torch.int32'): small.magnitude_cut_kernel([x.int()], [0], [3])
    with pytest.raises(ValueError, match='begin at a multiple of 16 bytes, not strides .1,. at 4'): small.magnitude_cut_kernel([x[1:]], [0], [3])
    with pytest.raises(ValueError, match='contiguous'): small.magnitude_cut_kernel([x.view(8, 8).t()], [0], [3])
    for drop in (0, 64):
        with pytest.raises(ValueError, match=f'group 0 of 64 weights is to lose {drop}'): small.magnitude_cut_kernel([x], [0], [drop])


# The hooks, with the PyTorch operators of lists in place of the kernels

@pytest.fixture
def together(monkeypatch):
    "Lets the CPU go the way of a GPU."
    def stored(site): return next((w for w in (site.weight, site.weight.mT) if site.numel and w.is_contiguous()), None)
    for m in (patterns, oneshot, allocation): monkeypatch.setattr(m, 'stored', stored)
    calls = []
    monkeypatch.setattr(oneshot, 'cut_at_once', lambda *a: calls.append(1) or cut_at_once(*a))
    return calls


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(42, 60), nn.Linear(31, 9), nn.Linear(1, 1), nn.Linear(5, 0)]).to(dtype)
    model[0].weight.data[::2] = model[0].weight.data[::2].mul(9).round()
    return model


WAYS = [dict(sparsity=.5), dict(sparsity=.77, allocate=global_), dict(sparsity=0.), dict(sparsity=1.), dict(sparsity=1., allocate=global_), dict(allocate={'0': 0., '1': 1., '*': .5})]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('how', WAYS, ids=lambda how: ', '.join(f'{k} {getattr(v, "__name__", v)}' for k, v in how.items()))
def test_prune_goes_at_once_to_the_same_end(together, monkeypatch, how, dtype):
    new, old = net(dtype), net(dtype)
    a = prune(new, **how)
    assert together
    monkeypatch.undo()
    b = prune(old, **how)
    assert a.rows == b.rows and a.note == b.note
    for x, y in zip(new.parameters(), old.parameters()): assert torch.equal(x, y)


def test_what_does_not_fit_goes_the_other_way(together):
    for how in (dict(pattern='per_row'), dict(score=lambda s: s.weight.abs()), dict(pattern=block(3), include='0')): prune(net(), .5, **how)
    assert not together
    conv = nn.ModuleList([nn.Conv2d(4, 4, 3)])
    prune(conv, .5)
    assert not together
    prune(conv, .5, pattern=Pattern(layout='flat'))
    assert together


def test_one_odd_weight_does_not_send_the_others_the_long_way(together, monkeypatch):
    from transformers.pytorch_utils import Conv1D
    def odd():
        with seeded(0): return nn.ModuleList([nn.Linear(42, 60), Conv1D(31, 9), nn.Linear(20, 12).double(), nn.Conv2d(3, 5, 3)])
    for how in (dict(sparsity=.5), dict(sparsity=.7, allocate=global_, ignore='2')):
        new, old = odd(), odd()
        a = prune(new, **how)
        assert len(together) == (2 if 'ignore' not in how else 1)          # one launch for each type; turned weights and kernels are cut singly
        together.clear()
        with monkeypatch.context() as m:
            for x in (patterns, oneshot, allocation): m.setattr(x, 'stored', lambda s: None)
            b = prune(old, **how)
        assert a.rows == b.rows and not together
        for x, y in zip(new.parameters(), old.parameters()): assert torch.equal(x, y)


def test_what_is_not_finite_is_named(together):
    for bad in (float('nan'), float('inf'), -float('inf')):
        model = net()
        model[1].weight.data[2, 3] = bad
        with pytest.raises(ValueError, match=r'1.weight \(9, 31\) holds 1 NaN or infinite'): prune(model, .5)
    assert check_all([]) is None


# Transposable masks

@pytest.mark.parametrize('keep, of', [(4, 8), (1, 8), (7, 8), (3, 6), (5, 12), (2, 5), (8, 16)])
def test_searched_squares_are_legal_and_nearly_the_best(keep, of):
    from scipy.optimize import linear_sum_assignment, linprog
    w = torch.randn(12, of, of, dtype=torch.double).abs()
    m, eye, one = search_squares(w, keep), torch.eye(of), torch.ones(1, of)
    assert (m.sum(1) == keep).all() and (m.sum(2) == keep).all()
    sums = torch.cat([torch.kron(eye, one), torch.kron(one, eye)]).numpy()
    most = torch.tensor([-linprog(-x.flatten().numpy(), A_eq=sums, b_eq=[keep] * 2 * of, bounds=(0, 1)).fun for x in w], dtype=torch.double)
    if keep == 1: assert torch.allclose(most, torch.tensor([x[linear_sum_assignment(x, maximize=True)].sum() for x in w.numpy()]))
    share = (w * m).sum((1, 2)) / most
    assert (share < 1 + 1e-6).all() and share.mean() > .995 and share.min() > .95, share


def test_repair_and_exchange_keep_what_is_legal():
    w = torch.rand(20, 8, 8)
    rows = torch.zeros_like(w, dtype=torch.bool)
    rows[:, :, :3] = True                                                        # every row chooses the same columns
    m = repair(w, rows, 3)
    better = exchange(w, m)
    for x in (m, better): assert (x.sum(1) == 3).all() and (x.sum(2) == 3).all()
    assert ((w * better).sum((1, 2)) >= (w * m).sum((1, 2))).all() and (w * better).sum() > (w * m).sum()


def test_the_operator_of_squares_serves_the_pattern():
    x = torch.randn(24, 16)
    for keep, of in ((2, 4), (4, 8)):
        m = transposable(keep, of).select(x.abs())
        assert torch.equal(m, best_squares(x.abs().view(24 // of, of, 16 // of, of).transpose(1, 2).reshape(-1, of, of), keep).view(24 // of, 16 // of, of, of).transpose(1, 2).reshape(24, 16))


# The sweep

def root_of(inp, dead=()):
    x = torch.randn(3 * inp, inp, dtype=torch.double)
    x[:, 1:] += .5 * x[:, :-1]
    x[:, list(dead)] = 0
    return inverse_root(x.T @ x)


def test_lazy_is_eager():
    root, w = root_of(60), torch.randn(7, 60, dtype=torch.double)
    for p in (nm(2, 4), nm(1, 5)):
        a, b = sweep(w, root, p, block=20), sweep(w, root, p, block=60)          # N:M is chosen column by column, so the block is only speed
        assert torch.allclose(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_sweep_is_exact_and_keeps_its_type():
    root, w = root_of(50, (0, 49)), torch.randn(9, 50)
    for p, s in ((unstructured(), .123), (per_row(), .77), (unstructured(), 0.), (unstructured(), 1.)):
        for dtype in (torch.bfloat16, torch.float32):
            v, m = sweep(w.to(dtype), Root(root.u.float(), root.dead), p, s, block=16)
            assert v.dtype == dtype and int((~m).sum()) == round(s * w.numel()) and not v[~m].any() and not v[:, root.dead].any()


def test_without_correlation_nothing_is_corrected():
    w = torch.randn(16, 32, dtype=torch.double)
    v, m = sweep(w, inverse_root(torch.eye(32, dtype=torch.double)), unstructured(), .5, block=32)
    assert torch.equal(m, unstructured().select(w.abs(), .5)) and torch.allclose(v, w * m)


@pytest.mark.parametrize('out, inp, keep, of', [(3, 130, 0, 0), (5, 130, 2, 5), (2, 64, 16, 32), (2, 33, 1, 33)])
def test_the_interpreted_sweep_is_its_twin(out, inp, keep, of):
    from sparse_workbench.kernels.sweep import _fits, sweep_block_kernel
    root, w, mask = root_of(inp, (1,)), torch.randn(out, inp, dtype=torch.double), torch.rand(out, inp) < .5
    right, got = w.clone(), w.float()
    assert _fits(got, root.u.float(), of) == (of <= 32)                       # or the twin would be compared with itself
    e0, m0 = sweep_columns(right, root.u, mask, keep, of)
    e1, m1 = sweep_block_kernel(got, root.u.float(), mask, keep, of)
    assert torch.equal(m0, m1)
    for a, b in ((got, right), (e1, e0)): assert (a - b).abs().max() <= 1e-5 * b.abs().max()
