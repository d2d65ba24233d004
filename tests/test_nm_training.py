"""N:M training against its published equations: golden values, ten optimizer steps written out in float64, both readings where paper and code disagree."""
import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparse_workbench import flows, recipes, schedules
from sparse_workbench.core import Site, sites
from sparse_workbench.flows import least_variance, mvue, s_ste, soft_threshold, two_draws
from sparse_workbench.optimizers import MaskedAdam, StepAdam, l1_after, pull_after, pull_as_scripted
from sparse_workbench.patterns import Pattern, block, masks, nm, pattern, per_row, transposable, unstructured
from sparse_workbench.recipes import REGISTER
from sparse_workbench.rules import apply_mask, drop_grow, keep_best, two_sets
from sparse_workbench.scores import magnitude
from sparse_workbench.sparsifier import Sparsifier
from sparse_workbench.testing import assert_same, check_mask, check_promises, mlp, planted, same_after_load, seeded, train

SIZES = (16, 32, 24, 8)


def data(t: int) -> Tensor:
    with seeded(t): return torch.randn(32, 16, dtype=torch.float64)


def error(out: Tensor, x: Tensor) -> Tensor: return (out - x[:, :8].sin()).square().mean()


def made(name: str, optimizer: Callable = torch.optim.Adam, lr: float = 1e-2, total: int = 10, **how):
    "A recipe in float64."
    model = mlp(SIZES).double()
    opt = optimizer(model.parameters(), lr)
    sp = REGISTER[name]['recipe'](model, opt, total_steps=total, **how)
    return model, opt, sp, lambda t: error(model(data(t)), data(t))


# The same by hand: lists are sorted, masks are products, optimizers are written out

def best(w: Tensor, keep: int, of: int) -> Tensor:
    "N:M along the rows, by sorting every group; ties go to the first."
    out = torch.zeros(w.numel(), dtype=torch.float64)
    for i, group in enumerate(w.abs().reshape(-1, of).tolist()):
        for j in sorted(range(of), key=lambda j: (-group[j], j))[:keep]: out[i * of + j] = 1
    return out.view_as(w)


def squared(w: Tensor) -> Tensor:
    "Transposable 2:4 by trying all masks of a square."
    rows = list(itertools.combinations(range(4), 2))
    legal = [c for c in itertools.product(rows, repeat=4) if all(sum(j in r for r in c) == 2 for j in range(4))]
    assert len(legal) == 90
    out = torch.zeros_like(w)
    for i in range(0, w.size(0), 4):
        for j in range(0, w.size(1), 4):
            x = w[i:i + 4, j:j + 4].abs().tolist()
            for k, row in enumerate(max(legal, key=lambda c: sum(x[k][j] for k, r in enumerate(c) for j in r))):
                for c in row: out[i + k, j + c] = 1
    return out


class Adam:
    "Kingma & Ba, with what the methods change in it."
    def __init__(self, lr: float = 1e-2, freeze: int | None = None, eps: float = 1e-8): self.lr, self.freeze, self.eps, self.m, self.v = lr, freeze, eps, {}, {}
    def __call__(self, n: str, w: Tensor, g: Tensor, t: int, shape: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        self.m[n] = .9 * self.m.get(n, torch.zeros_like(w)) + .1 * g
        u = shape(self.m[n]) if shape else self.m[n]
        x = u if shape else g
        frozen = self.freeze is not None and t >= self.freeze
        if not frozen: self.v[n] = .999 * self.v.get(n, torch.zeros_like(w)) + .001 * x * x
        below = (self.v[n] if frozen else self.v[n] / (1 - .999**(t + 1))).sqrt() + self.eps
        return w - self.lr * (u / (1 - .9**(t + 1))) / below


class Momentum:
    "SGD with momentum 0.9, as PyTorch has it."
    def __init__(self, lr: float = 1e-2): self.lr, self.buf = lr, {}
    def __call__(self, n: str, w: Tensor, g: Tensor, t: int, shape=None) -> Tensor:
        self.buf[n] = .9 * self.buf[n] + g if n in self.buf else g
        return w - self.lr * self.buf[n]


sgd = partial(torch.optim.SGD, momentum=.9)
OPTIMIZERS = dict(sgd=(sgd, Momentum), adam=(torch.optim.Adam, Adam))


def compare(out, update, mask, see, grad=lambda g, w, m, t: g, shape=None, T: int = 10, cut: bool = False) -> None:
    "T steps of both, everything compared before each: dense weight, mask and seen weight of every site, and all other parameters."
    model, _, sp, _ = out
    net = mlp(SIZES).double()
    w, names, m = {n: p.detach().clone() for n, p in net.named_parameters()}, [s.name for s in sp.sites], {}
    for t in range(T + 1):
        for n in names:
            m[n] = mask(w[n], t, m.get(n))
            if cut: w[n] = w[n] * m[n]
        seen = {n: (see(w[n], m[n], t, n) if n in names else w[n]).detach().requires_grad_() for n in w}
        for s in sp.sites:
            assert torch.equal(s.mask.double(), m[s.name]), f'{s.name} at step {t}'
            if s.latent is not None: torch.testing.assert_close(s.latent, w[s.name], rtol=0, atol=1e-11)
        for n, p in model.named_parameters(): torch.testing.assert_close(p.detach(), seen[n].detach(), rtol=0, atol=1e-11)
        if t == T: return
        g = dict(zip(seen, torch.autograd.grad(error(functional_call(net, seen, data(t)), data(t)), list(seen.values()))))
        for n in w: w[n] = update(n, w[n], grad(g[n], w[n], m[n], t), t, partial(shape, w=w[n], m=m[n], t=t) if shape else None) if n in names else update(n, w[n], g[n], t)
        train(out, [t])


every = lambda keep, of: lambda w, t, old: best(w, keep, of)
hard = lambda w, m, t, n: w * m


@pytest.mark.parametrize('kind', OPTIMIZERS)
@pytest.mark.parametrize('keep, of', [(2, 4), (1, 8)])
def test_ste_and_sr_ste(kind, keep, of):
    make, update = OPTIMIZERS[kind]
    compare(made('ste', make, pattern=nm(keep, of)), update(), every(keep, of), hard)
    compare(made('sr_ste', make, pattern=nm(keep, of), decay=.1), update(), every(keep, of), hard, lambda g, w, m, t: g + .1 * (1 - m) * w)


@pytest.mark.parametrize('backward', ['ste', 'exact'])
@pytest.mark.parametrize('kind', ['linear', 'exponential'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_mask_decay(optimizer, kind, backward):
    "Dense for two steps, D over six, hard for the last two; the gradient as in the authors' code, or by the chain rule."
    make, update = OPTIMIZERS[optimizer]
    def D(t: int) -> float:
        if t < 2: return 1.
        if t >= 8: return 0.
        return 1 - (t - 2) / 6 if kind == 'linear' else math.exp(-math.log(100) / 6 * (t - 2))
    out = made('mask_decay', make, pattern=nm(1, 4), kind=kind, begin=.2, end=.8, backward=backward)
    compare(out, update(), lambda w, t, old: torch.ones_like(w) if t < 2 else best(w, 1, 4), lambda w, m, t, n: w * (m + D(t) * (1 - m)),
            lambda g, w, m, t: g * (m + D(t) * (1 - m)) if backward == 'exact' else g)


def test_exact_backward_is_what_autograd_says():
    w = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    m, g = nm(2, 4).select(w.detach().abs()), torch.randn(8, 8, dtype=torch.float64)
    f = flows.mask_decay(.1, 'linear', backward='exact')
    seen = w * (m.double() + .7 * (~m).double())
    want, = torch.autograd.grad(seen, w, g)
    torch.testing.assert_close(f.grad(g.clone(), w.detach(), m, 3), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(f.see(w.detach().clone(), m, 3), seen.detach(), rtol=0, atol=1e-12)


def test_published_rates_of_mask_decay():
    f = schedules.fade('exponential', 1e-4)
    assert [f(t) for t in (0, 6931, 46_052)] == pytest.approx([1, .5, .01], abs=3e-5)
    assert [schedules.fade('exponential', b)(t) for b, t in ((2e-4, 3466), (8e-4, 866))] == pytest.approx([.5, .5], abs=2e-4)
    assert schedules.fade('linear', 1e-4)(10_000) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize('keep, of, want', [(1, 16, [15, 8, 4, 2, 1]), (2, 8, [7, 4, 2]), (2, 4, [3, 2]), (1, 4, [3, 2, 1]), (1, 32, [31, 16, 8, 4, 2, 1])])
def test_published_frames_of_structure_decay(keep, of, want):
    n = len(want)
    f = schedules.halving(keep, of, 100)
    assert schedules.frames(keep, of) == want
    assert [round((1 - f(int(i * 100 / n))) * of) for i in range(n)] == want == [round((1 - f(int((i + 1) * 100 / n) - 1)) * of) for i in range(n)]


def test_published_frames_of_geometric_structure_decay():
    f = schedules.shrinking_groups(1, 8, 40)
    assert [f(t) for t in (0, 9, 10, 20, 30, 99)] == [(8, 64), (8, 64), (4, 32), (2, 16), (1, 8), (1, 8)]


def test_structure_decay_by_hand():
    "3:4, 2:4, 1:4, three steps each (of nine), then one more; a binary mask and a straight-through gradient."
    frames = lambda t: (3, 2, 1)[min(2, t // 3)]
    compare(made('structure_decay', pattern=nm(1, 4), total=10, end=.9), Adam(), lambda w, t, old: best(w, frames(t), 4), hard)


def test_geometric_structure_decay_by_hand():
    "8:16, 4:8 and 2:4 where a row has 16 or 32 weights; 24 is no multiple of 16, so 4:8 twice."
    def mask(w, t, old):
        f = (8, 4, 2, 1)[min(3, t // 2)]
        while w.size(1) % (4 * f): f //= 2
        return best(w, 2 * f, 4 * f)
    compare(made('structure_decay', pattern=nm(2, 4), kind='geometric', total=10), Adam(), mask, hard)


@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_asp_by_hand(kind):
    make, update = OPTIMIZERS[kind]
    out = made('asp', make, multiples=(1, 1))
    compare(out, update(), lambda w, t, old: best(w, 2, 4) if old is None else old, hard, lambda g, w, m, t: g * m, cut=True)


def soft_by_hand(w: Tensor, keep: int, of: int) -> Tensor:
    "sign(w) (|w| − t)+ with t the (M−N)-th smallest magnitude of each group, as a list."
    out = []
    for group in w.reshape(-1, of).tolist():
        t = sorted(abs(x) for x in group)[of - keep - 1]
        out += [math.copysign(max(abs(x) - t, 0.), x) for x in group]
    return torch.tensor(out, dtype=torch.float64).view_as(w)


@pytest.mark.parametrize('keep, of', [(2, 4), (1, 4), (3, 8)])
@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_s_ste_by_hand(kind, keep, of):
    make, update = OPTIMIZERS[kind]
    w0 = {n: p.detach() for n, p in mlp(SIZES).double().named_parameters()}
    beta = {n: float((w * (s := soft_by_hand(w, keep, of))).sum() / (s * s).sum()) for n, w in w0.items() if w.ndim > 1}
    compare(made('s_ste', make, pattern=nm(keep, of)), update(), every(keep, of), lambda w, m, t, n: beta[n] * soft_by_hand(w, keep, of))


def test_masked_decay_by_hand():
    "Transposable masks every four steps, λ on what is pruned, dense from step 8 on; the dense weights are then seen as they are."
    def mask(w, t, old): return torch.ones_like(w) if t >= 8 else squared(w) if t % 4 == 0 else old
    compare(made('masked_decay', frequency=4, dense=.2, decay=.05), Adam(), mask, hard, lambda g, w, m, t: g + .05 * (1 - m) * w)


def test_ast_by_hand():
    "LLaMA: in the gradient. GPT-2: after the momentum, with a second moment of the sum; and as the script has it, with the sign of an inverted integer."
    mask = lambda w, t, old: best(w, 2, 4) if t % 2 == 0 else old
    lam = lambda t: .3 * min(1, t / 5)
    compare(made('ast', frequency=2, rise=.5, decay=.3), Adam(), mask, hard, lambda g, w, m, t: g + lam(t) * (1 - m) * w)
    compare(made('ast', MaskedAdam, frequency=2, rise=.5, decay=.3), Adam(), mask, hard, shape=lambda mu, w, m, t: mu + lam(t) * (1 - m) * w)
    out = made('ast', partial(MaskedAdam, shape=pull_as_scripted(.3, 5)), frequency=2)
    compare(out, Adam(), mask, hard, shape=lambda mu, w, m, t: mu + lam(t) * torch.bitwise_not(m.int()).double() * w)


def test_cast_by_hand():
    "Dense in the forward pass until the cut; the mixture in the momentum (the paper) and in the gradient (any optimizer)."
    mask = lambda w, t, old: best(w, 2, 4) if t % 2 == 0 and t < 10 else old
    see = lambda w, m, t, n: w if t < 10 else w * m
    mix = lambda x, w, m, t: torch.where(m > 0, x, (1 - t / 10) * x + t / 10 * .2 * w.sign())
    compare(made('cast', MaskedAdam, frequency=2, decay=.2), Adam(), mask, see, shape=lambda mu, w, m, t: mix(mu, w, m, t))
    compare(made('cast', frequency=2, decay=.2), Adam(), mask, see, mix)


def test_cast_drives_only_the_pruned_to_zero():
    torch.manual_seed(0)
    site, = sites(nn.Sequential(nn.Linear(16, 16, bias=False)))
    site.mask = nm(2, 4).select(site.weight.abs())
    opt = MaskedAdam([site.parameter], 1e-3, shape=l1_after(1e-4, 300))
    opt.sites, first, seen = [site], site.weight.clone(), []
    for _ in range(300):
        site.parameter.grad = torch.zeros_like(site.parameter)
        opt.step()
        seen.append(float(site.weight[~site.mask].abs().mean()))
    assert torch.equal(site.weight[site.mask], first[site.mask]) and seen[-1] < 2e-3
    assert all(b <= a + 1e-3 for a, b in zip(seen, seen[1:]))


def test_step_by_hand():
    "Adam on dense weights for five steps; then 2:4 and a second moment that stays."
    mask = lambda w, t, old: torch.ones_like(w) if t < 5 else best(w, 2, 4)
    out = made('step', partial(StepAdam, latest=5, eps=1e-3))
    compare(out, Adam(freeze=5, eps=1e-3), mask, hard)
    assert out[1].switch == 5
    compare(made('step', dense=.5), Adam(), mask, hard)                          # another optimizer goes on adapting


def test_step_switches_when_the_variances_have_settled():
    "Mean change of v over the window, by hand."
    model = mlp(SIZES).double()
    opt = StepAdam(model.parameters(), 1e-2, betas=(.9, .5), earliest=3, latest=50, threshold=2e-4)
    v, changes, at = {}, [], None
    for t in range(30):
        error(model(data(0)), data(0)).backward()
        z = n = 0
        for k, p in model.named_parameters():
            new = .5 * v.get(k, torch.zeros_like(p)) + .5 * p.grad**2
            z, n, v[k] = z + float((new - v.get(k, 0)).abs().sum()), n + p.numel(), new
        changes.append(z / n)
        opt.step()
        opt.zero_grad()
        if at is None and t + 1 > 3 and sum(changes[-2:]) / 2 < 2e-4: at = t + 1
        assert opt.switch == at
        if at: break
    assert at and at < 30


@pytest.mark.parametrize('name, make', [('cast', MaskedAdam), ('ast', MaskedAdam), ('step', partial(StepAdam, latest=2)), ('step', partial(StepAdam, latest=50, threshold=1e9, earliest=2)), ('s_ste', torch.optim.AdamW)])
def test_a_run_goes_on_after_loading(name, make):
    "Also from a state with a frozen second moment or a frozen scale."
    same_after_load(partial(made, name, make, total=6, **dict(decay=.1) if name in ('ast', 'cast') else {}))


# S-STE

def test_golden_s_ste():
    w = torch.tensor([[.1, -.5, .3, -.2]], dtype=torch.float64)
    site = planted(w)
    site.mask, site.sparsity = nm(2, 4).select(w.abs()), .5
    assert soft_threshold(w, site.mask, nm(2, 4)).tolist() == [pytest.approx([0, -.3, .1, 0])]
    assert s_ste.see_site(site, nm(2, 4), 0).tolist() == [pytest.approx([0, -.54, .18, 0])] and float(site.stats['scale']) == pytest.approx(1.8)


def test_soft_threshold_is_continuous_and_legal_at_ties():
    "Where the second and third magnitudes are equal three weights are zero, whichever of them the mask names."
    w = torch.tensor([[.1, .3, -.3, .5]])
    assert soft_threshold(w, nm(2, 4).select(w.abs()), nm(2, 4)).count_nonzero() == 1
    w = torch.randn(64, 64, dtype=torch.float64)
    for p in (nm(2, 4), nm(1, 8), nm(2, 4, axis='out'), per_row(), unstructured()):
        f = lambda x: soft_threshold(x, p.select(x.abs(), p.sparsity or .5), p)
        d = 1e-6 * torch.randn_like(w)
        assert (f(w + d) - f(w)).abs().max() <= 2 * d.abs().max() + 1e-12, p


@pytest.mark.parametrize('p, shape', [(nm(2, 4), (6, 8, 3, 3)), (nm(2, 4, layout='flat'), (6, 8, 3, 3)), (nm(1, 4, axis='out'), (8, 6)), (nm(2, 4, tail='pad'), (5, 7)), (nm(2, 4, tail='dense'), (5, 7)), (per_row(), (6, 10)), (unstructured(), (6, 10))], ids=str)
def test_soft_threshold_of_every_layout(p, shape):
    "In each group the seen magnitudes are the dense ones less the largest that is lost."
    from sparse_workbench.testing import membership
    w = torch.randn(shape, dtype=torch.float64)
    m = p.select(w.abs(), p.sparsity or .5)
    group = membership(p, shape)[1].reshape(shape)
    out = soft_threshold(w, m, p)
    for g in group.unique().tolist():
        here = group == g
        lost = w[here][~m[here]].abs()
        t = float(lost.max()) if g >= 0 and len(lost) else 0.
        want = w[here].sign() * (w[here].abs() - t).clamp_min(0)
        torch.testing.assert_close(out[here], want, rtol=0, atol=1e-12)


def test_the_scale_is_frozen_and_each_tensor_has_its_own():
    out = made('s_ste')
    first = {s.name: s.stats['scale'].clone() for s in out[2].sites}
    assert len({float(x) for x in first.values()}) == 3 and all(x > 1 for x in first.values())
    train(out, range(5))
    for s in out[2].sites: assert torch.equal(s.stats['scale'], first[s.name])


def test_the_scale_is_taken_at_the_first_sparse_step():
    model = mlp(SIZES).double()
    opt = torch.optim.SGD(model.parameters(), .1)
    sp = Sparsifier(sites(model), pattern=nm(2, 4), sparsity=schedules.steps({0: 0, 2: .5}), flow=s_ste).attach(opt)
    assert not any('scale' in s.stats for s in sp.sites) and all((s.weight != 0).all() for s in sp.sites)
    train((model, opt, sp, lambda t: error(model(data(t)), data(t))), range(2))
    for s in sp.sites: assert float(s.stats['scale']) == pytest.approx(float((s.latent * (x := soft_by_hand(s.latent, 2, 4))).sum() / (x * x).sum()))


# Transposable masks

@pytest.mark.parametrize('keep', [1, 2, 3])
def test_squares_of_four_are_exact(keep):
    "Against all masks, each built from permutations, for random scores and scores full of ties."
    legal = {c for c in itertools.product(itertools.combinations(range(4), keep), repeat=4) if all(sum(j in r for r in c) == keep for j in range(4))}
    for w in (torch.rand(4, 40, dtype=torch.float64), torch.randint(0, 3, (4, 40)).double()):
        m = transposable(keep, 4).select(w)
        for x, got in zip(w.split(4, 1), m.split(4, 1)):
            assert float((x * got).sum()) == pytest.approx(max(float(sum(x[i, j] for i, r in enumerate(c) for j in r)) for c in legal), abs=1e-9)


@pytest.mark.parametrize('p, shape', [(transposable(2, 4), (8, 12)), (transposable(4, 8), (16, 24)), (transposable(1, 8), (16, 24)), (transposable(2, 16), (32, 16)), (transposable(1, 2), (6, 8)),
                                      (transposable(2, 4), (8, 4, 3, 3)), (transposable(2, 4, layout='flat'), (8, 4, 3, 3)), (transposable(2, 4, tail='dense'), (9, 14))], ids=str)
def test_both_axes_hold(p, shape):
    from sparse_workbench.patterns import cells
    w = torch.randn(shape)
    m = p.select(w.abs())
    check_mask(m, p)
    of, keep = p.group[0], round(p.group[0] * (1 - p.sparsity))
    for x in cells(m, p.layout).transpose(0, 1):
        x = x[:x.size(0) // of * of, :x.size(1) // of * of].long()
        assert (x.unflatten(1, (-1, of)).sum(2) == keep).all() and (x.unflatten(0, (-1, of)).sum(1) == keep).all()


def test_slabs_give_the_same_squares():
    site = Site('w', nn.Linear(64, 48))
    got = torch.cat([m for _, m in masks(site, magnitude, transposable(2, 4), .5)])
    assert torch.equal(got, transposable(2, 4).select(site.weight.abs()))
    assert torch.equal(got.double(), squared(site.weight.double()))


def test_transposable_masks_keep_the_promises():
    def make():
        model = mlp(SIZES)
        opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
        sp = recipes.masked_decay(model, opt, total_steps=6, frequency=1, dense=0)
        return model, opt, sp, lambda t: error(model(data(t).float()), data(t).float())
    check_promises(make)
    assert (made('masked_decay', dense=0)[2].pattern, pattern('2:4:both')) == (transposable(2, 4),) * 2


# MVUE

def test_golden_inclusion_probabilities():
    a = torch.tensor([[1., 2, 3, 4], [1, 1, 1, 1], [10, 1, 1, 1], [0, 0, 1, 3]], dtype=torch.float64)
    p = two_draws(a)
    want = [[.234524, .441270, .608333, .715873], [.5] * 4, [.961538, *[.346154] * 3], [0, 0, 1, 1]]
    for row, w in zip(p.tolist(), want): assert row == pytest.approx(w, abs=1e-6)
    assert (a / p)[0].tolist() == pytest.approx([4.26396, 4.53237, 4.93151, 5.58758], abs=1e-5)
    for row in a.tolist(): # the definition: draw one, then another of the rest
        total = sum(row)
        for i in range(4): assert two_draws(torch.tensor([row], dtype=torch.float64))[0, i] == pytest.approx(
            row[i] / total + sum(row[j] / total * row[i] / (total - row[j]) for j in range(4) if j != i and total > row[j]), abs=1e-12)


@pytest.mark.parametrize('keep, of, axis', [(2, 4, 0), (2, 4, 1), (1, 4, 0), (3, 8, 0), (2, 8, 1)])
def test_mvue_has_no_bias(keep, of, axis):
    with seeded(): x = torch.randn(16, 8, dtype=torch.float64) * torch.logspace(-1, 0, 8, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    n = 3000
    draws = torch.stack([mvue(x, keep, of, axis, generator=g) for _ in range(n)])
    kept = draws.movedim(axis + 1, -1).reshape(-1, of).count_nonzero(1)
    assert (kept == keep).all()
    off = (draws.mean(0) - x).abs() / (draws.std(0) / n**.5 + 1e-12)
    assert float(off.max()) < 5 and float(off.square().mean().sqrt()) < 1.3


def test_least_variance_is_least():
    "Against random legal probabilities, and against two draws."
    a = torch.rand(50, 8, dtype=torch.float64) ** 3
    p, variance = least_variance(a, 3), lambda p: (a**2 * (1 / p - 1)).sum(1)
    assert torch.allclose(p.sum(1), torch.full((50,), 3., dtype=torch.float64)) and (p <= 1).all()
    for s in range(20):
        with seeded(s): q = p * (1 + .1 * torch.randn_like(p))
        q = (q / q.sum(1, keepdim=True) * 3)
        ok = (q <= 1).all(1)
        assert (variance(p)[ok] <= variance(q)[ok] + 1e-9).all()
    assert (variance(least_variance(a, 2)) <= variance(two_draws(a)) + 1e-9).all()


def test_a_sampled_weight_gradient_has_no_bias():
    "The product with the input: dW = MVUE(dY)ᵀ X, groups along the tokens."
    with seeded(): x, dy = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 5, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([mvue(dy, 2, 4, generator=g).T @ x for _ in range(3000)])
    assert float(((draws.mean(0) - dy.T @ x).abs() / (draws.std(0) / 3000**.5)).max()) < 5


# Channel permutation

def test_channel_order_gains_what_a_search_over_all_orders_finds():
    "Two groups of four of eight inputs: 35 partitions."
    with seeded(): w = torch.rand(6, 8)
    kept = lambda o: float((w[:, o] * nm(2, 4).select(w[:, o])).sum())
    most = max(kept([0, *c, *(i for i in range(1, 8) if i not in c)]) for c in itertools.combinations(range(1, 8), 3))
    got = kept(recipes.channel_order([w]).tolist())
    assert kept(list(range(8))) <= got <= most + 1e-5 and got > most - .02 * most


def test_reordered_channels_compute_the_same():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
    with torch.no_grad(): model[1].running_mean.normal_()
    x = torch.randn(2, 3, 8, 8)
    y, order = model(x), recipes.channel_order([model[3].weight])
    recipes.reorder(order, model[:2], [model[3]])
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert sorted(order.tolist()) == list(range(16))


# Flip rate

def test_flip_rates_and_virtual_masks():
    "A watched dense run is a dense run, and its flips are those of masks chosen by hand."
    model, plain = mlp(SIZES).double(), mlp(SIZES).double()
    opt, opt2 = (torch.optim.Adam(m.parameters(), 1e-2) for m in (model, plain))
    sp = recipes.virtual(model, opt)
    rates, old = recipes.flips(sp), {s.name: best(s.weight, 2, 4) for s in sp.sites}
    for t in range(5):
        train((model, opt, sp, lambda t: error(model(data(t)), data(t))), [t])
        opt2.zero_grad()
        error(plain(data(t)), data(t)).backward()
        opt2.step()
        assert_same(dict(model.state_dict()), dict(plain.state_dict()))
        new = {s.name: best(s.weight, 2, 4) for s in sp.sites}
        want = sum(float((new[n] != old[n]).sum()) for n in new) / sum(x.numel() for x in new.values())
        assert rates[t] == (t + 1, pytest.approx(want)) and want > 0
        old = new


def test_decay_is_tuned_by_the_flip_rate():
    rate = {None: .1, 1e-5: .12, 1e-4: .09, 1e-3: .075, 1e-2: .01}
    assert recipes.tune_decay(rate.get, (1e-5, 1e-4, 1e-3, 1e-2))[0] == 1e-3
    with pytest.raises(ValueError, match='no λ has a ratio between 0.6 and 0.95: 0.01: 0.10; try larger'): recipes.tune_decay(rate.get, (1e-2,))


def test_hard_masks_for_evaluation_only():
    out = made('mask_decay', pattern=nm(1, 4))
    train(out, range(3))
    before = [s.weight.clone() for s in out[2].sites]
    with pytest.raises(RuntimeError), recipes.hard(out[2]):
        for s in out[2].sites: assert int((s.weight != 0).sum()) == s.numel // 4
        raise RuntimeError
    for s, w in zip(out[2].sites, before): assert torch.equal(s.weight, w) and (s.weight != 0).all()


# Mistakes

@pytest.mark.parametrize('keep, of', [(5, 4), (0, 4), (-1, 4), (2.5, 4)])
def test_n_and_m(keep, of):
    for make in (nm, transposable):
        with pytest.raises(ValueError, match='keeps 1 to `of` weights of every `of`'): make(keep, of)
    with pytest.raises(ValueError, match='keeps 1 to `of` entries'): mvue(torch.ones(8, 4), keep, of)
    with pytest.raises(ValueError, match='N is at least 1 and at most M'): schedules.halving(keep, of, 100)


@pytest.mark.parametrize('name', ['ste', 'sr_ste', 'mask_decay', 'structure_decay', 's_ste', 'ast', 'cast', 'step', 'masked_decay'])
def test_an_axis_that_m_does_not_divide(name):
    "Refused at attach with the three ways out, and nothing has changed; each way works."
    model = mlp((10, 12, 8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = torch.optim.SGD(model.parameters(), .1)
    with pytest.raises(ValueError, match=r"needs a multiple of 4 along in, but the weight \(12, 10\) has 10. Choose tail='pad' .*tail='dense' .*another size, or ignore"):
        REGISTER[name]['recipe'](model, opt, total_steps=100, pattern=transposable(2, 4) if name == 'masked_decay' else nm(2, 4))
    assert_same(before, dict(model.state_dict()))
    assert not opt._optimizer_step_pre_hooks
    for how in ('dense',) if name == 'masked_decay' else ('dense', 'pad'):
        model = mlp((10, 12, 8))
        opt = torch.optim.SGD(model.parameters(), .1)
        sp = REGISTER[name]['recipe'](model, opt, total_steps=10, pattern=(transposable if name == 'masked_decay' else nm)(2, 4, tail=how))
        train((model, opt, sp, lambda t: model(data(t).float()[:, :10]).square().mean()), range(3))
        for s in sp.sites: check_mask(s.mask, sp.pattern, s.sparsity)


def test_what_needs_a_dense_weight_beside_the_seen_one():
    for flow in (flows.cut, flows.l1(), flows.dense):
        model = mlp(SIZES)
        opt = torch.optim.SGD(model.parameters(), .1)
        with pytest.raises(ValueError, match=r'works on the dense weight that a flow keeps, and .* keeps none: use flow=ste'): Sparsifier(sites(model), two_sets(), sparsity=.5, flow=flow).attach(opt)
        assert not opt._optimizer_step_pre_hooks and all((s.weight != 0).all() for s in sites(model))


def test_s_ste_knows_no_blocks():
    for p in (block(4), transposable(2, 4)):
        model = mlp(SIZES)
        opt = torch.optim.SGD(model.parameters(), .1)
        with pytest.raises(ValueError, match='has no threshold for single weights: use nm'): recipes.s_ste(model, opt, pattern=p, sparsity=.5)
        assert not opt._optimizer_step_pre_hooks and all((s.weight != 0).all() for s in sites(model))


def test_other_mistakes():
    model = mlp(SIZES)
    opt = torch.optim.SGD(model.parameters(), .1)
    for how, said in (dict(kind='cosine'), "kind='cosine': a mask decays"), (dict(rate=-1), 'rate=-1'), (dict(backward='x'), "backward='x': use 'ste'"), (dict(begin=.9, end=.5), 'begin=0.9 is not before end=0.5'):
        with pytest.raises(ValueError, match=said): recipes.mask_decay(model, opt, total_steps=100, **how)
    for how, said in (dict(pattern='block4', sparsity=.5), "leads to N:M, and block"), (dict(pattern=transposable(2, 4)), 'leads to N:M'), (dict(kind='x'), "kind='x'"), (dict(total_steps=2, pattern='1:32'), 'reached in 6 frames'):
        with pytest.raises(ValueError, match=said): recipes.structure_decay(model, opt, **dict(total_steps=100) | how)
    with pytest.raises(ValueError, match=r'asp leaves every layer dense: 0.weight \(32, 16\) is no multiple of \(64, 64\)'): recipes.asp(model, opt, multiples=(64, 64))
    with pytest.raises(ValueError, match='dense is a number between 0 and 1'): recipes.masked_decay(model, opt, total_steps=100, dense=2)
    with pytest.raises(ValueError, match='earliest=5 comes after latest=2'): StepAdam(model.parameters(), earliest=5, latest=2)
    with pytest.raises(ValueError, match='single weights cannot be exchanged'): exchange(transposable(2, 4))
    with pytest.raises(ValueError, match="use tail='dense' or 'raise'"): transposable(2, 4, tail='pad')
    assert not opt._optimizer_step_pre_hooks
    assert repr(flows.mask_decay(1e-3)) != repr(flows.mask_decay(1e-3, backward='exact')) and repr(flows.sr_ste(1e-3)) != repr(flows.sr_ste(1e-3, rise=5))


def exchange(p: Pattern) -> None:
    s = Site('w', nn.Linear(8, 8), sparsity=.5)
    keep_best()(s, p)
    apply_mask(s)
    s.step, s.grad = 1, torch.randn(8, 8)
    drop_grow()(s, p)


def test_pulls_rise():
    mu, w, m = torch.zeros(4), torch.ones(4), torch.tensor([True, False, True, False])
    assert [float(pull_after(.4, 10)(mu, w, m, t)[1]) for t in (0, 5, 10, 99)] == pytest.approx([0, .2, .4, .4])
    assert [float(flows.sr_ste(.4, 10).grad(torch.zeros(4), w, m, t)[1]) for t in (0, 5, 10, 99)] == pytest.approx([0, .2, .4, .4])
