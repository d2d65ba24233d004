"""Sparse training: schedules, allocations and updates against independent computations, and what every recipe promises at every step."""
import copy
import inspect
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_workbench import flows, recipes, rules, schedules, scores
from sparse_workbench.allocation import borrow, er, erk, erk_plus, global_, redistribute, uniform, uniform_plus
from sparse_workbench.core import Site, sites
from sparse_workbench.optimizers import MaskedAdam, StepAdam
from sparse_workbench.patterns import Pattern, block, nm, per_row, row, unstructured
from sparse_workbench.recipes import REGISTER
from sparse_workbench.rules import drop_grow, exploration, explored, keep_best
from sparse_workbench.schedules import every
from sparse_workbench.sparsifier import Sparsifier
from sparse_workbench.stats import Calibration, class_loss
from sparse_workbench.testing import assert_same, check_mask, check_promises, convnet, mlp, same_after_load, same_through_closure, seeded, snapshot, tiny_gpt2, train

TRAINING = {n: r['recipe'] for n, r in REGISTER.items() if r['family'] == 'training'}
SOFT = ('iss_p', 'mask_sparsity', 'mask_decay', 'cast')      # use what they will remove until they cut it: the stated exception
ROWS = ('mask_sparsity', 'group_lasso')     # take whole rows unless told otherwise
OWN: dict[str, dict] = dict(blast=dict(pattern=block(4)))
FREE = {n: dict(pattern=unstructured()) for n in ('ste', 'sr_ste', 'mask_decay', 'asp', 'masked_decay', 's_ste', 'ast', 'cast', 'step', 'bdwp')}     # 2:4 unless told otherwise
FREE['structure_decay'] = dict(pattern=nm(1, 4))
SGD, PLAIN, ADAM = (partial(torch.optim.SGD, lr=.1, momentum=.9), partial(torch.optim.SGD, lr=.1), partial(torch.optim.AdamW, lr=1e-2))


def given(name: str, **how) -> dict:
    "The arguments that a recipe takes."
    takes = inspect.signature(TRAINING[name]).parameters
    return {k: v for k, v in {**how, **OWN.get(name, {})}.items() if k in takes or k in ('include', 'ignore', 'frequency') and name == 'blast'}


def data(t: int, n: int = 32, width: int = 16) -> Tensor:
    with seeded(t): return torch.randn(n, width)


def made(name: str, optimizer=SGD, build=mlp, total: int = 6, **how):
    "A fresh (model, optimizer, sparsifier, loss) of a recipe."
    model = build()
    opt = optimizer(model.parameters())
    sp = TRAINING[name](model, opt, **given(name, **dict(sparsity=.75, total_steps=total, frequency=1) | FREE.get(name, {}) | how))
    return model, opt, sp, lambda t: (model(data(t)) - data(t)[:, :8].sin()).square().mean()


# The promises

@pytest.mark.parametrize('optimizer', [SGD, ADAM], ids=['sgd', 'adamw'])
@pytest.mark.parametrize('name', TRAINING)
def test_promises(name, optimizer):
    check_promises(partial(made, name, optimizer), but=['zeros_outside'] * (name in SOFT))


@pytest.mark.parametrize('pattern', [per_row(), nm(1, 4), nm(2, 8, axis='out'), block(4)], ids=str)
@pytest.mark.parametrize('name', [n for n in TRAINING if n not in ('blast', 'mask_sparsity')])
def test_promises_of_patterns(name, pattern):
    if name in ('structure_decay', 's_ste') and not (pattern.sparsity or name == 's_ste' and pattern == per_row()): pytest.skip('for N:M')
    check_promises(partial(made, name, pattern=pattern, sparsity=.75), but=['zeros_outside'] * (name in SOFT))


@pytest.mark.parametrize('name', ['rigl', 'granet', 'acdc', 'snfs', 'deepr'])
def test_promises_of_convolutions(name):
    def make():
        model = convnet(2)
        opt = SGD(model.parameters())
        sp = TRAINING[name](model, opt, **given(name, sparsity=.8, total_steps=6, frequency=1))
        return model, opt, sp, lambda t: nn.functional.cross_entropy(model(data(t, 4, 256).reshape(4, 4, 8, 8)), torch.arange(4))
    check_promises(make)


@pytest.mark.parametrize('name', ['rigl', 'set', 'top_kast'])
def test_promises_of_a_language_model(name):
    def make():
        model = tiny_gpt2()
        opt = ADAM(model.parameters())
        sp = TRAINING[name](model, opt, **given(name, sparsity=.8, total_steps=6, frequency=1))
        return model, opt, sp, lambda t: model(ids := (torch.arange(24).reshape(2, 12) * (t + 1)) % 32, labels=ids).loss
    check_promises(make)


WANTED = dict(group_lasso=lambda t, T: .9 if t >= T // 2 else 0, static=lambda t, T: .9, retrain=lambda t, T: .9, set=lambda t, T: .9, rigl=lambda t, T: .9, itop=lambda t, T: .9, snfs=lambda t, T: .9,
              deepr=lambda t, T: .9, top_kast=lambda t, T: .9, iss_p=lambda t, T: .9, mask_sparsity=lambda t, T: .9, ste=lambda t, T: .9, sr_ste=lambda t, T: .9,
              mask_decay=lambda t, T: .9, asp=lambda t, T: .9, s_ste=lambda t, T: .9, ast=lambda t, T: .9, cast=lambda t, T: .9, bdwp=lambda t, T: .9,
              masked_decay=lambda t, T: .9 if t < int(5/6 * T) else 0, step=lambda t, T: .9 if t >= T / 2 else 0,
              spdf=lambda t, T: .9 if t < int(.87 * T) else 0,
              acdc=lambda t, T: .9 if t >= .85 * T or t < .75 * T and t >= .1 * T and int((t - .1 * T) / (.05 * T) + 1e-9) % 2 == 0 else 0,
              gmp=lambda t, T: .9 - .9 * (1 - min(1, max(0, (int(t / 2) * 2 if t < .75 * T else t) - .1 * T) / (.65 * T)))**3,
              granet=lambda t, T: .9 - .4 * (1 - min(1, t // 2 * 2 / (.7 * T)))**3,
              blast=lambda t, T: .9 - .9 * (1 - min(1, t // 2 * 2 / (.7 * T)))**3)


@pytest.mark.parametrize('name', [n for n in TRAINING if n not in ('journey', 'structure_decay')])
def test_exactly_as_sparse_as_the_paper_says_at_every_step(name):
    T, seen = 40, []
    out = made(name, total=T, sparsity=.9, frequency=2, pattern=row() if name in ROWS else unstructured())
    def look(sp):
        pruned, n = sum(int((~s.mask).sum()) for s in sp.sites), sum(s.numel for s in sp.sites)
        tile = max(s.numel / p for s in sp.sites for p in [s.shape[0]]) if name in ROWS else 16 if name == 'blast' else 1
        want = WANTED[name](sp.t, T)
        assert abs(pruned - want * n) <= tile * len(sp.sites) / 2 + 1e-6, (sp.t, pruned / n, want)
        seen.append(pruned)
    look(out[2])
    train(out, range(T), look=look)
    assert len(seen) == T + 1


# Schedules: the published numbers

def test_golden_schedules():
    f = schedules.cubic(0, .9, 1000)
    assert [f(t) for t in (0, 100, 250, 500, 750, 1000)] == pytest.approx([0, .2439, .520312, .7875, .885938, .9], abs=1e-6)
    f = schedules.cosine_fraction(.3, 25_000)
    assert [f(t) for t in (0, 100, 6250, 12_500, 18_750, 24_900)] == pytest.approx([.3, .299988, .256066, .15, .043934, .000012], abs=1e-6)
    f = schedules.death_rate(1000)
    assert [f(t) for t in (0, 250, 500, 750, 1000)] == pytest.approx([.5, .427509, .2525, .077491, .005], abs=1e-6)
    f = schedules.cubic(.5, .95, 30)
    assert [f(t) for t in (0, 1, 10, 15, 29, 30)] == pytest.approx([.5, .54352, .81667, .89375, .94998, .95], abs=1e-5)


@pytest.mark.parametrize('s, start, end, mean', [(.2, .2231, .7211, .8926), (.4, .1915, .6808, .7662), (.5, .1732, .6535, .6929), (.6, .1526, .6186, .6103), (.8, .0998, .5012, .3991)])
def test_the_journey_spends_its_quarters_of_compute(s, start, end, mean):
    assert schedules.journey_window(s) == pytest.approx((start, end, mean), abs=5.1e-5)
    T = 20_000
    density, (a, b) = [1 - schedules.journey(s, T, 1)(t) for t in range(T)], schedules.journey_steps(s, T, 1)
    assert [sum(density[:t]) / sum(density) for t in (a, b)] == pytest.approx([.25, .75], abs=1e-3) and sum(density) / T == pytest.approx(mean, abs=1e-3)


def test_the_journey_keeps_the_same_share_at_every_event():
    a, b = schedules.journey_steps(.6, 26_800, 100)
    f, n = schedules.journey(.6, 26_800, 100), (b - a) // 100 + 1
    assert (b - a) % 100 == 0 and f(a - 1) == 0
    assert [1 - f(a + 100 * i) for i in range(n)] == pytest.approx([.4**((i + 1) / n) for i in range(n)], abs=1e-12)


def test_acdc_phases_of_the_paper():
    for epochs, end, up in ((100, 85, [*range(10, 71, 10), 85]), (200, 185, [*range(10, 171, 10), 185])):
        f = schedules.acdc_phases(.9, 5, 10, end)
        assert [t for t in range(1, epochs) if f(t) > f(t - 1)] == up
        assert [t for t in range(1, epochs) if f(t) < f(t - 1)] == [*range(15, end - 19, 10), end - 10]


def test_a_longer_training_stretches_the_schedule():
    def events(T: int) -> list[int]:
        model = mlp()
        sp = recipes.gmp(model, SGD(model.parameters()), sparsity=.9, total_steps=T, frequency=T // 20)
        return [t for t in range(T + 1) if sp.when(t)]
    assert [2 * t for t in events(200)] == events(400)


# Allocations

def resnet50() -> list[tuple[str, tuple[int, ...], int]]: # name, shape, output side at 224 pixels
    out, inp = [('conv1', (64, 3, 7, 7), 112)], 64
    for stage, (width, blocks, side) in enumerate(((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)), 1):
        for b in range(blocks):
            n, before = f'layer{stage}.{b}', side * (2 if b == 0 and stage > 1 else 1)
            out += [(f'{n}.conv1', (width, inp, 1, 1), before), (f'{n}.conv2', (width, width, 3, 3), side), (f'{n}.conv3', (4 * width, width, 1, 1), side)]
            if b == 0: out.append((f'{n}.downsample', (4 * width, inp, 1, 1), side))
            inp = 4 * width
    return [*out, ('fc', (1000, 2048), 1)]


def of_shapes(table) -> list[Site]:
    return [Site(n, nn.Conv2d(s[1], s[0], s[2], device='meta') if len(s) > 2 else nn.Linear(s[1], s[0], device='meta')) for n, s, *_ in table]


TOY = of_shapes([('conv1', (64, 3, 3, 3)), ('conv2', (64, 64, 3, 3)), ('conv3', (128, 64, 3, 3)), ('fc', (10, 128))])


def densities(allocate, ss, sparsity: float) -> dict[str, float]:
    return {n: 1 - s for n, s in allocate(ss, unstructured(), scores.magnitude, sparsity).items()}


def test_golden_erk():
    assert list(densities(erk, TOY, .9).values()) == pytest.approx([1, .09144, .06756, 1], abs=2e-5)
    assert list(densities(erk, TOY, .8).values()) == pytest.approx([1, .21582, .15945, 1], abs=2e-5)


def test_golden_erk_of_resnet50():
    table = resnet50()
    ss = of_shapes(table)
    assert len(ss) == 54 and sum(s.numel for s in ss) == 25_502_912
    d = densities(erk, ss, .8)
    assert {n for n, x in d.items() if x == 1} == {f'layer1.{i}.{c}' for i in range(3) for c in ('conv1', 'conv3')} | {'layer1.0.downsample', 'layer2.0.conv1'}
    assert [d[n] for n in ('conv1', 'layer1.0.conv2', 'layer4.0.conv2', 'fc')] == pytest.approx([.8572, .3619, .0435, .1482], abs=1e-4)
    d = densities(erk, ss, .9)
    assert [n for n, x in d.items() if x == 1] == ['layer1.0.conv1'] and [d['conv1'], d['fc']] == pytest.approx([.42, .0726], abs=1e-4)
    macs = {n: math.prod(s) * side**2 for n, s, side in table}
    share = lambda d: sum(macs[n] * d[n] for n in macs) / sum(macs.values())
    assert [share(densities(erk, ss, s)) for s in (.8, .9, .95, .99)] == pytest.approx([.4138, .2418, .1217, .0243], abs=1e-4)
    stem = lambda s: {n: 1. if n == 'conv1' else 1 - s for n in macs}
    assert [share(stem(s)) for s in (.8, .9, .95, .99)] == pytest.approx([.2231, .1260, .0774, .0386], abs=1e-4)


def test_golden_er():
    "Density ε (n + m) / (n m): 784 × 1000 keeps 4.55 % at ε = 20 and 2.958 % at ε = 13, as in SET and QuickSelection."
    ss = of_shapes([('a', (1000, 784)), ('b', (1000, 1000)), ('c', (10, 1000))])
    for eps, want in ((20, .0455), (13, .02958)):
        asked = sum(min(s.numel, eps * sum(s.shape)) for s in ss) / sum(s.numel for s in ss)
        d = densities(er, ss, 1 - asked)
        assert d['a'] == pytest.approx(want, abs=5e-5) and d['c'] == 1 and d['b'] == pytest.approx(eps * .002, abs=1e-5)


def exact(allocate, ss, sparsity: float) -> bool: # whole weights, and the total that was asked
    d = allocate(ss, unstructured(), scores.magnitude, sparsity)
    zeros = [d[s.name] * s.numel for s in ss]
    return all(abs(z - round(z)) < 1e-6 for z in zeros) and sum(map(round, zeros)) == round(sparsity * sum(s.numel for s in ss))


@pytest.mark.parametrize('s', [.3, .6, .77, .9])
@pytest.mark.parametrize('allocate', [er, erk, uniform_plus, erk_plus], ids=lambda f: f.__name__)
def test_allocations_lose_exactly_what_is_asked(allocate, s):
    assert exact(allocate, TOY, s) and exact(allocate, of_shapes(resnet50()), s)


def test_layers_that_are_spared():
    ss, n = of_shapes(resnet50()), 25_502_912
    stem, fc = 9408, 2_048_000
    d = densities(uniform_plus, ss, .9)
    assert d['conv1'] == 1 and d['fc'] == pytest.approx(.2) and d['layer3.0.conv2'] == pytest.approx((.1 * n - stem - .2 * fc) / (n - stem - fc), abs=1e-5)
    d = densities(erk_plus, ss, .8)
    assert d['fc'] == 1
    rest = densities(erk, [s for s in ss if s.name != 'fc'], 1 - (.2 * n - fc) / (n - fc))
    assert all(d[k] == pytest.approx(v, abs=1e-4) for k, v in rest.items())
    with pytest.raises(ValueError, match='fc alone would keep 2,048,000 weights, and sparsity 0.95 leaves 1,275,146 of all: lower the sparsity'): densities(erk_plus, ss, .95)


@pytest.mark.parametrize('score, need', [(scores.saliency, 'grad'), (scores.grasp, 'hess_grad')])
def test_ratios_are_borrowed_and_masks_drawn(score, need):
    "As many weights in every layer as the criterion itself would leave, but others."
    cal = Calibration([(data(0), torch.arange(32) % 8)], 'noise', class_loss)
    own, model = mlp(), mlp()
    REGISTER['snip' if need == 'grad' else 'grasp']['recipe'](own, sparsity=.8, calibration=cal)
    sp = recipes.static(model, SGD(model.parameters()), sparsity=.8, allocate=borrow(score), calibration=cal)
    theirs = [(own.get_parameter(s.name) != 0) for s in sp.sites]
    assert [int(s.mask.sum()) for s in sp.sites] == [int(m.sum()) for m in theirs]
    assert not any(torch.equal(s.mask, m) for s, m in zip(sp.sites, theirs))
    with pytest.raises(KeyError, match=f'has no {need!r}'): borrow(score)(sites(mlp()), unstructured(), scores.random, .8)


def test_snfs_moves_weights_to_the_layer_with_more_momentum():
    ss = sites(mlp((16, 32, 16)))
    for s, m in zip(ss, (1., 3.)):
        s.mask, s.step, s.state = torch.arange(512).reshape(s.shape) < 128, 10, dict(momentum_buffer=torch.full(s.shape, m))
    got = redistribute(lambda t: .5 if t == 10 else 0.)(ss, unstructured(), scores.magnitude, .75)
    assert [round((1 - got[s.name]) * 512) for s in ss] == [64 + 32, 64 + 96]
    ss[1].state['momentum_buffer'].mul_(1e9)                        # all to one layer: no more than 99 % of its free places
    for s in ss: s.mask = torch.arange(512).reshape(s.shape) < (384 if s is ss[0] else 500)
    got = redistribute(lambda t: .9)(ss, unstructured(), scores.magnitude, 1 - 884 / 1024)
    kept = [round((1 - got[s.name]) * 512) for s in ss]
    assert sum(kept) == 884 and kept[1] <= 512 and kept[0] < 512


# Updates: whole trainings, again by hand in float64

class ByHand:
    "SGD with momentum, written out: masks are products, and lists are sorted."
    def __init__(self, made, lr: float = .1, momentum: float = .9):
        self.model, self.lr, self.beta = copy.deepcopy(made[0]), lr, momentum
        self.p = dict(self.model.named_parameters())
        self.mask = {s.name: s.mask.clone() for s in made[2].sites}
        self.buf = {n: torch.zeros_like(p) for n, p in self.p.items()}
        self.loss = inspect.getclosurevars(made[3]).nonlocals and (lambda t: (self.model(data(t).double()) - data(t)[:, :8].double().sin()).square().mean())
    def step(self, t: int, dense: bool = False) -> dict[str, Tensor]: # dense gradients
        g = dict(zip(self.p, torch.autograd.grad(self.loss(t), list(self.p.values()))))
        with torch.no_grad():
            for n, p in self.p.items():
                m = self.mask.get(n, torch.ones_like(p))
                self.buf[n].mul_(self.beta).add_(g[n] if dense else g[n] * m)
                p.sub_(self.lr * self.buf[n]).mul_(m)
        return g
    def put(self, n: str, keep: set[int], forget: bool = True) -> None:
        new = torch.zeros(self.p[n].numel(), dtype=torch.bool).index_fill_(0, torch.tensor(sorted(keep), dtype=torch.long), True).view_as(self.p[n])
        if forget: self.buf[n][new & ~self.mask[n]] = 0
        self.mask[n] = new
        with torch.no_grad(): self.p[n].mul_(new)
    def on(self, n: str) -> list[int]: return self.mask[n].flatten().nonzero().flatten().tolist()
    def exchange(self, n: str, f: float, g: Tensor, forget: bool = True, w: Tensor | None = None) -> None:
        w, g = (self.p[n] if w is None else w).detach().flatten().abs().tolist(), g.flatten().abs().tolist()
        held = sorted(self.on(n), key=lambda i: (-w[i], i))
        keep = set(held[:len(held) - round(f * len(held))])
        rest = sorted(set(range(len(w))) - keep, key=lambda i: (-g[i], i))
        self.put(n, keep | set(rest[:len(held) - len(keep)]), forget)
    def prune(self, n: str, k: int) -> None: # the k smallest of the layer are gone
        w = self.p[n].detach().flatten().abs().tolist()
        self.put(n, set(sorted(range(len(w)), key=lambda i: (-w[i], i))[:len(w) - k]))
    def prune_globally(self, s: float) -> None:
        all_ = [(abs(v), n, i) for n in self.mask for i, v in enumerate(self.p[n].detach().flatten().tolist())]
        kept = sorted(all_, key=lambda x: -x[0])[:len(all_) - round(s * len(all_))]
        for n in self.mask: self.put(n, {i for _, m, i in kept if m == n})
    def same(self, made) -> None:
        for s in made[2].sites: assert torch.equal(s.mask, self.mask[s.name]), f'{s.name} at step {made[2].t}: {int((s.mask ^ self.mask[s.name]).sum())} places differ'
        for n, p in made[0].named_parameters(): torch.testing.assert_close(p, self.p[n], rtol=0, atol=1e-12)


def double(name: str, total: int = 24, momentum: float = .9, **how):
    "A recipe in float64."
    model = mlp().double()
    opt = torch.optim.SGD(model.parameters(), .1, momentum=momentum)
    sp = TRAINING[name](model, opt, **given(name, **dict(sparsity=.8, total_steps=total, frequency=4) | how))
    return model, opt, sp, lambda t: (model(data(t).double()) - data(t)[:, :8].double().sin()).square().mean()


def compare(out, hand: ByHand, change, total: int = 24) -> None:
    "Step both, let `change(hand, t, gradients)` change the masks by hand after step t, and compare everything every time."
    for t in range(total):
        train(out, [t])
        change(hand, t + 1, hand.step(t))
        hand.same(out)


def test_rigl_by_hand():
    out = double('rigl')
    def change(h, t, g):
        if t % 4 == 0 and t <= 18:
            for n in h.mask: h.exchange(n, .15 * (1 + math.cos(math.pi * t / 18)), g[n])
    compare(out, ByHand(out), change)


def test_granet_by_hand():
    out = double('granet')
    hand = ByHand(out)
    assert 1 - sum(int(m.sum()) for m in hand.mask.values()) / 1472 == pytest.approx(.5, abs=1e-3)
    def change(h, t, g):
        if t % 4: return
        if t <= 23: h.prune_globally(.8 - .3 * (1 - min(1., t / 16))**3)
        for n in h.mask: h.exchange(n, .005 + .2475 * (1 + math.cos(math.pi * t / 24)), g[n]) if t <= 23 else None
    compare(out, hand, change)


def test_gmp_by_hand():
    out = double('gmp', total=24)
    def change(h, t, g):
        if t in (2, 6, 10, 14, 18):
            for n in h.mask: h.prune(n, round((.8 - .8 * (1 - (t - 2) / 16)**3) * h.mask[n].numel()))
    compare(out, ByHand(out), change)


def test_journey_by_hand():
    out = double('journey', total=40, frequency=4)
    a, b = schedules.journey_steps(.8, 40, 4)
    n = (b - a) // 4 + 1
    def change(h, t, g):
        if a <= t <= b and (t - a) % 4 == 0: h.prune_globally(1 - .2**(((t - a) // 4 + 1) / n))
    compare(out, ByHand(out), change, 40)


def test_acdc_by_hand():
    "Compressed at 10, 20 … 70 and 85 of 100, dense between; momentum is gone when a dense phase begins."
    out = double('acdc', total=100)
    def change(h, t, g):
        if t in (*range(10, 71, 10), 85): h.prune_globally(.8)
        if t in (*range(15, 66, 10), 75):
            for n in h.mask:
                h.mask[n] = torch.ones_like(h.mask[n])
                h.buf[n].zero_()
    compare(out, ByHand(out), change, 100)


def test_snfs_by_hand():
    "The momentum is dense and is never wiped; it says where to grow."
    out = double('snfs', allocate=uniform)
    hand = ByHand(out)
    for t in range(24):
        train(out, [t])
        hand.step(t, dense=True)
        if (t + 1) % 4 == 0 and t + 1 <= 23:
            for n in hand.mask: hand.exchange(n, .005 + .2475 * (1 + math.cos(math.pi * (t + 1) / 24)), hand.buf[n], forget=False)
        hand.same(out)
        for s in out[2].sites: assert out[1].state[s.parameter]['momentum_buffer'][~s.mask].any()


def test_top_kast_by_hand():
    "A is seen, B learns, what lies outside B does not move; A is pulled by λ, B outside A by λ/D."
    lam, D = .01, .2
    out = double('top_kast', momentum=0., decay=lam, wider=2.)
    model = mlp().double()
    p = dict(model.named_parameters())
    theta = {s.name: p[s.name].detach().clone() for s in out[2].sites}
    def sets(n):
        order, size = theta[n].flatten().abs().argsort(descending=True, stable=True), theta[n].numel()
        gone, rest = round(.8 * size), round(.6 * size)
        member = lambda k: torch.zeros(size, dtype=torch.bool).index_fill_(0, order[:size - k], True).view_as(theta[n])
        return member(gone), member(rest)
    for t in range(24):
        with torch.no_grad():
            AB = {n: sets(n) for n in theta}
            for n, (a, _) in AB.items(): p[n].copy_(theta[n] * a)
        g = dict(zip(p, torch.autograd.grad((model(data(t).double()) - data(t)[:, :8].double().sin()).square().mean(), list(p.values()))))
        with torch.no_grad():
            for n in p:
                if n in theta:
                    a, b = AB[n]
                    theta[n] -= .1 * torch.where(b, g[n] + torch.where(a, lam * theta[n], lam / D * theta[n]), 0.)
                else: p[n].sub_(.1 * g[n])
        train(out, [t])
        for s in out[2].sites:
            a, b = sets(s.name)
            assert torch.equal(s.mask, a) and torch.equal(s.stats['learns'], b)
            torch.testing.assert_close(s.latent, theta[s.name], rtol=0, atol=1e-12)


def test_iss_p_by_hand():
    "After every step the smallest 80 % of each layer, chosen anew, times 0.95; from step 12 on they are cut."
    out = double('iss_p', until=.5)
    model = mlp().double()
    p, buf = dict(model.named_parameters()), {}
    mask = {s.name: None for s in out[2].sites}
    for t in range(24):
        g = dict(zip(p, torch.autograd.grad((model(data(t).double()) - data(t)[:, :8].double().sin()).square().mean(), list(p.values()))))
        with torch.no_grad():
            for n in p:
                if n in mask and t >= 12: g[n] = g[n] * mask[n]
                buf[n] = .9 * buf.get(n, 0) + g[n]
                p[n].sub_(.1 * buf[n])
                if n not in mask: continue
                if t < 12:
                    size = p[n].numel()
                    small = p[n].flatten().abs().argsort(stable=True)[:round(.8 * size)]
                    mask[n] = torch.ones(size, dtype=torch.bool).index_fill_(0, small, False).view_as(p[n])
                    p[n].copy_(torch.where(mask[n], p[n], .95 * p[n]))
                if t >= 11: p[n].mul_(mask[n])
        train(out, [t])
        for s in out[2].sites:
            assert torch.equal(s.mask, mask[s.name]), t
            torch.testing.assert_close(s.weight, p[s.name].detach(), rtol=0, atol=1e-12)
            assert bool(s.weight[~s.mask].any()) == (t < 11)


@pytest.mark.parametrize('p, r, c', [(row(), 1, None), (block(4), 4, 4), (unstructured(), 1, 1)], ids=str)
def test_group_lasso_by_hand(p, r, c):
    "SGD with momentum, then every unit w max(0, 1 − λ/‖w‖); after step 12 the shortest half is gone, and the rest trains on."
    lam, out = .02, double('group_lasso', strength=.02, pattern=p, sparsity=.5)
    hand, emptied = ByHand(out), 0
    def change(h, t, g):
        nonlocal emptied
        for n in h.mask if t <= 12 else ():
            w = h.p[n].detach()
            units = w.view(w.shape[0] // r, r, -1, c or w.shape[1])
            units.mul_((1 - lam / units.norm(dim=(1, 3), keepdim=True)).clamp_min(0))
            length = units.norm(dim=(1, 3))
            emptied += int((length == 0).sum())
            if t < 12: continue
            stay = length.flatten().argsort(descending=True, stable=True)[:length.numel() - round(.5 * length.numel())]
            keep = torch.zeros(length.numel(), dtype=torch.bool).index_fill_(0, stay, True).view(length.shape[0], 1, length.shape[1], 1)
            h.put(n, set(keep.expand(units.shape).reshape(-1).nonzero().flatten().tolist()), forget=False)
    compare(out, hand, change)
    assert emptied > 0 or p != unstructured()
    assert sum(int((~s.mask).sum()) for s in out[2].sites) == 736


def test_a_weight_that_stays_small_for_100_steps_is_gone():
    model = mlp().double()
    w = model[0].weight.detach().clone()
    sp = recipes.iss_p(model, torch.optim.SGD(model.parameters(), 0.), sparsity=.5, total_steps=1000, until=.2)
    train((model, sp.optimizer, sp, lambda t: model(data(t).double()).square().mean()), range(100))
    ratio = model[0].weight / w
    torch.testing.assert_close(ratio[~sp.sites[0].mask], torch.full((256,), .95**100, dtype=torch.double), rtol=0, atol=1e-12)
    assert (ratio[sp.sites[0].mask] == 1).all()


@pytest.mark.parametrize('lam, steps', [(2e-4, 34_657), (1.6e-3, 4_332)])
def test_half_life_of_a_pruned_weight_under_sr_ste(lam, steps):
    "Without a gradient the decay alone halves it in ln 2 / (η λ) steps."
    model = mlp().double()
    sp = recipes.sr_ste(model, torch.optim.SGD(model.parameters(), .1), decay=lam)
    s, before = sp.sites[0], sp.sites[0].latent.clone()
    train((model, sp.optimizer, sp, lambda t: 0. * sum(p.sum() for p in model.parameters())), range(20))
    rate = (s.latent / before)[~s.mask].mean().item()**(1 / 20)
    assert math.log(.5) / math.log(rate) == pytest.approx(steps, abs=1) and torch.equal(s.latent[s.mask], before[s.mask])


def test_set_drops_the_same_share_of_either_sign_and_grows_at_random():
    s = Site('w', nn.Linear(50, 40), sparsity=.5, step=3)
    keep_best(scores.random)(s, unstructured())
    rules.apply_mask(s)
    w, old = s.weight.clone(), s.mask.clone()
    drop_grow(scores.sign_rank, scores.chance(), .3)(s, unstructured())
    stay = old & s.mask
    for side in (w > 0, w < 0):
        n = int((side & old).sum())
        survivors = w[side & old].abs().sort(descending=True).values[:n - round(.3 * n)]
        assert (s.mask[side] & old[side])[w[side].abs() > survivors[-1]].all()
    drawn = s.mask & ~(old & stay)
    assert int(s.mask.sum()) == 1000 and 150 < int((s.mask & ~old).sum()) < 300 and drawn.any()


def test_deepr_walks_as_written():
    "θ ← θ − η (g s + α), noise on what is kept; below zero it sleeps; as many wake at 1e-12 on their side."
    out = double('deepr', momentum=0., l1=1e-3, noise=0.)
    sign = {s.name: torch.where(mlp().double().get_parameter(s.name) < 0, -1., 1.).double() for s in out[2].sites}
    hand = ByHand(out, momentum=0.)
    woken = 0
    for t in range(24):
        g = dict(zip(hand.p, torch.autograd.grad(hand.loss(t), list(hand.p.values()))))
        train(out, [t])
        with torch.no_grad():
            for n, p in hand.p.items():
                if n not in hand.mask:
                    p.sub_(.1 * g[n])
                    continue
                s = next(s for s in out[2].sites if s.name == n)
                theta = p * sign[n] - .1 * (g[n] * sign[n] + 1e-3 * (p * sign[n]).sign())
                awake = hand.mask[n] & (theta > 0)
                assert (s.mask | ~awake).all() and int(s.mask.sum()) == int(hand.mask[n].sum())
                born = s.mask & ~awake
                woken += int(born.sum())
                p.copy_(torch.where(awake, theta * sign[n], 1e-12 * sign[n] * born))
                hand.mask[n] = s.mask.clone()
        hand.same(out)
    assert woken > 0


def test_deepr_noise_is_a_random_walk():
    model = mlp()
    sp = recipes.deepr(model, torch.optim.SGD(model.parameters(), 0.), sparsity=.5, noise=1e-2, l1=0.)
    s = sp.sites[0]
    before = s.weight.clone()
    train((model, sp.optimizer, sp, lambda t: model(data(t)).square().mean()), range(1))
    moved = (s.weight - before)[s.mask & (s.weight.abs() > 1e-6) & (before != 0)]
    assert abs(moved.mean()) < 2e-3 and .7e-2 < moved.std() < 1.2e-2


# What comes back, and what is remembered of it

@pytest.mark.parametrize('optimizer', [SGD, ADAM], ids=['sgd', 'adamw'])
def test_newborn_weights_start_from_nothing(optimizer):
    out = made('rigl', optimizer, total=40, frequency=4)
    for t in range(20):
        old = [s.mask.clone() for s in out[2].sites]
        train(out, [t])
        if out[2].t % 4: continue
        for s, m in zip(out[2].sites, old):
            born, state = s.mask & ~m, [v for v in out[1].state[s.parameter].values() if v.shape == s.shape]
            assert born.any() and not s.weight[born].any() and state
            for v in state: assert not v[born].any() and v[s.mask & m].any()


def test_dropped_and_regrown_keeps_value_and_memory():
    "Where the gradient is largest at the smallest weights, RigL drops and regrows the same ones: nothing may change."
    model = mlp((8, 8, 8))
    opt = torch.optim.SGD(model.parameters(), 0., momentum=.9)
    sp = Sparsifier(sites(model, include='0'), drop_grow(scores.magnitude, lambda s: -s.weight.abs() + 10 * s.mask, .5), sparsity=.5, when=every(1)).attach(opt)
    train((model, opt, sp, lambda t: model(data(t, 4, 8)).square().mean()), range(2))
    s = sp.sites[0]
    w, m, v = s.weight.clone(), s.mask.clone(), opt.state[s.parameter]['momentum_buffer'].clone()
    sp.when = lambda t: True
    for t in range(2): train((model, opt, sp, lambda t: model(data(t, 4, 8)).square().mean()), [t])
    assert torch.equal(s.weight, w) and torch.equal(s.mask, m) and opt.state[s.parameter]['momentum_buffer'][m].any() and v[m].any()


def test_acdc_forgets_and_starts_from_zero():
    out = made('acdc', ADAM, total=20)
    dense = 0
    for t in range(20):
        old = [s.mask.clone() for s in out[2].sites]
        train(out, [t])
        for s, m in zip(out[2].sites, old):
            if s.mask.all() and not m.all():
                dense += 1
                assert not s.weight[~m].any() and s.weight[m].any()
                for k in ('exp_avg', 'exp_avg_sq'): assert not out[1].state[s.parameter][k].any()
            elif not s.mask.all(): assert out[1].state[s.parameter]['exp_avg'][s.mask].any()
    assert dense >= 3


def test_spdf_wakes_every_weight_from_zero():
    out = made('spdf', ADAM, total=20, sparse=.5)
    train(out, range(10))
    for s in out[2].sites: assert s.mask.all() and (s.weight == 0).float().mean() == .75 and not out[1].state[s.parameter]['exp_avg'].any()
    train(out, range(10, 20))
    assert out[2].report().total['achieved'] < .3


@pytest.mark.parametrize('name', ['spdf', 'acdc'])
@pytest.mark.parametrize('optimizer', ['adam', 'adamw_fused', 'adamw_foreach', 'nadam', 'radam', 'adamax', 'lion', 'masked_adam', 'adadelta', 'rmsprop', 'adagrad', 'adafactor', 'sgd'])
def test_a_dense_phase_begins_as_with_a_new_optimizer(name, optimizer):
    "Where every weight is pruned, what follows is what a fresh optimizer does, bit for bit."
    def build() -> nn.Module:
        with seeded(): return nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
    out = made(name, OPTIMIZERS[optimizer], build=build, total=80)
    while not (out[2].t and all(s.mask.all() and (s.weight == 0).any() for s in out[2].sites)): train(out, [out[2].t])
    T, model = out[2].t, build()
    model.load_state_dict(out[0].state_dict())
    fresh = OPTIMIZERS[optimizer](model.parameters())
    train(out, [T, T + 1])
    train((model, fresh, None, lambda t: (model(data(t)) - data(t)[:, :8].sin()).square().mean()), [T, T + 1])
    assert out[2].t == T + 2 and all(s.mask.all() for s in out[2].sites)
    assert_same(dict(model.state_dict()), dict(out[0].state_dict()))


def test_exploration_counts_every_mask():
    out = made('itop', total=30, frequency=3)
    union = [s.mask.clone() for s in out[2].sites]
    def look(sp):
        for u, s in zip(union, sp.sites): u |= s.mask
        assert exploration(sp.sites) == sum(int(u.sum()) for u in union) / sum(u.numel() for u in union)
    train(out, range(30), look=look)
    assert exploration(out[2].sites) > .25 + .1


def test_a_layer_without_gradient_keeps_its_mask():
    model = mlp()
    model[0].weight.requires_grad_(False)
    opt = SGD(model.parameters())
    sp = recipes.rigl(model, opt, sparsity=.8, total_steps=10, frequency=1)
    old = [s.mask.clone() for s in sp.sites]
    train((model, opt, sp, lambda t: model(data(t)).square().mean()), range(5))
    assert torch.equal(sp.sites[0].mask, old[0]) and not torch.equal(sp.sites[1].mask, old[1])


@pytest.mark.parametrize('p', [unstructured(), per_row(), nm(2, 4), nm(3, 8), nm(1, 4, axis='out'), nm(2, 5, tail='pad'), nm(2, 5, tail='dense'), block(4), block(3, tail='pad'), row()], ids=str)
@pytest.mark.parametrize('f', [0., .3, 1.])
def test_exchange_is_exact_for_every_pattern(p, f):
    "Up, down or level; numbers full of ties; and never more exchanged than the fraction."
    for before, after in ((p.sparsity, p.sparsity), ) if p.fixed else ((.5, .5), (.25, .75), (.75, .25)):
        s = Site('w', nn.Linear(24, 24), sparsity=before)
        s.weight.copy_(torch.randint(-3, 4, (24, 24)))
        s.weight[s.weight == 0] = 1.
        keep_best(scores.random)(s, p)
        rules.apply_mask(s)
        old, s.sparsity, s.step, s.grad = s.mask.clone(), after, 5, torch.randint(-2, 3, (24, 24)).float()
        explored(drop_grow(fraction=f))(s, p)
        check_mask(s.mask, p, after)
        n, gone = int(old.sum()), int((old & ~s.mask).sum())
        if before == after: assert gone <= f * n + 24 and (f > 0 or gone == 0)


def test_noise_is_new_at_every_step_and_the_same_everywhere():
    whole = Site('w', nn.Linear(64, 48), step=7)
    parts = [Site('w', whole.module, rows=(a, a + 16), step=7) for a in (0, 16, 32)]
    assert torch.equal(scores.chance(1)(whole), torch.cat([scores.chance(1)(p) for p in parts]))
    x = [scores.chance(1)(Site('w', whole.module, step=t)).flatten() for t in range(5)]
    assert (torch.corrcoef(torch.stack(x)) - torch.eye(5)).abs().max() < .08


# Every optimizer

class Lion(torch.optim.Optimizer):
    "Steps of one size along the sign of a mean of gradients; it keeps no second moment."
    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (.9, .99)): super().__init__(params, dict(lr=lr, betas=betas))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad(): loss = closure()
        for g in self.param_groups:
            for p in (p for p in g['params'] if p.grad is not None):
                st, (a, b) = self.state[p], g['betas']
                if not st: st['exp_avg'] = torch.zeros_like(p)
                p.sub_(st['exp_avg'].mul(a).add(p.grad, alpha=1 - a).sign(), alpha=g['lr'])
                st['exp_avg'].mul_(b).add_(p.grad, alpha=1 - b)
        return loss


O = torch.optim
OPTIMIZERS = dict(sgd=SGD, nesterov=partial(O.SGD, lr=.05, momentum=.9, nesterov=True), sgd_foreach=partial(O.SGD, lr=.05, momentum=.9, foreach=True), sgd_fused=partial(O.SGD, lr=.05, momentum=.9, fused=True),
                  dampened=partial(O.SGD, lr=.05, momentum=.9, dampening=.5, weight_decay=1e-2), adam=partial(O.Adam, lr=1e-2), adamw=ADAM, amsgrad=partial(O.AdamW, lr=1e-2, amsgrad=True),
                  adamw_foreach=partial(O.AdamW, lr=1e-2, foreach=True), adamw_fused=partial(O.AdamW, lr=1e-2, fused=True), adam_fused=partial(O.Adam, lr=1e-2, fused=True),
                  adagrad=partial(O.Adagrad, lr=1e-2), adagrad_fused=partial(O.Adagrad, lr=1e-2, fused=True), rmsprop=partial(O.RMSprop, lr=1e-3, momentum=.9, centered=True), nadam=partial(O.NAdam, lr=1e-2),
                  radam=partial(O.RAdam, lr=1e-2), adamax=partial(O.Adamax, lr=1e-2), adadelta=partial(O.Adadelta, lr=1.), adafactor=partial(O.Adafactor, lr=1e-2), asgd=partial(O.ASGD, lr=1e-2),
                  rprop=partial(O.Rprop, lr=1e-3), lion=Lion, masked_adam=partial(MaskedAdam, lr=1e-2), step_adam=partial(StepAdam, lr=1e-2, latest=10**6))


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_newborn_weights_start_from_nothing_in_every_optimizer(optimizer):
    out = made('rigl', OPTIMIZERS[optimizer], total=40, frequency=2)
    born = 0
    for t in range(16):
        old = [s.mask.clone() for s in out[2].sites]
        train(out, [t])
        for s, m in zip(out[2].sites, old):
            assert not s.weight[~s.mask].any() and s.weight.isfinite().all()
            if not (new := s.mask & ~m).any(): continue
            born += int(new.sum())
            assert not s.weight[new].any()
            for k, v in out[1].state[s.parameter].items():
                if torch.is_tensor(v) and v.shape == s.shape: assert not v[new].any() and (v[s.mask & m].any() or not v.any()), k
    assert born > 20


@pytest.mark.parametrize('name', ['rigl', 'acdc', 'top_kast'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_optimizer_resumes_with_the_same_bits(optimizer, name):
    same_after_load(partial(made, name, OPTIMIZERS[optimizer], total=20 if name == 'acdc' else 6))
    same_through_closure(partial(made, name, OPTIMIZERS[optimizer], total=20 if name == 'acdc' else 6))


def test_an_optimizer_that_cannot_work_here_says_so_and_leaves_the_model_sparse():
    "Capturable optimizers are for graphs of GPUs; on a CPU it is torch that refuses the step."
    out = made('rigl', partial(O.AdamW, lr=1e-2, capturable=True))
    try: train(out, range(3))
    except (AssertionError, RuntimeError, ValueError) as e: assert 'capturable' in str(e) and out[2].t == 0
    else: assert out[2].t == 3
    for s in out[2].sites: assert not s.weight[~s.mask].any()


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw', 'adamw_fused', 'adamax', 'nadam', 'lion', 'masked_adam'])
def test_sparse_momentum_grows_by_what_the_optimizer_remembers(optimizer):
    "Also where it keeps no second moment, and past a layer that has no gradient."
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare = mlp(), nn.Linear(8, 8)
        def forward(self, x): return self.net(x)
    def build() -> nn.Module:
        with seeded(): return Spare()
    out = made('snfs', OPTIMIZERS[optimizer], build=build, total=20, frequency=2)
    old = [s.mask.clone() for s in out[2].sites]
    train(out, range(12))
    names = [s.name for s in out[2].sites]
    moved = {n: bool((s.mask ^ m).any()) for n, s, m in zip(names, out[2].sites, old)}
    assert moved == {n: n != 'spare.weight' for n in names}
    assert sum(int(s.mask.sum()) for s in out[2].sites) == sum(round(.25 * s.numel) for s in out[2].sites)


def test_several_optimizers():
    "Each has its own sparsifier; together they do what each does alone with the other's layers frozen at the same values."
    def make():
        model = mlp()
        opts = [torch.optim.SGD(model[0].parameters(), .05, momentum=.9), torch.optim.AdamW([*model[2].parameters(), *model[4].parameters()], 1e-2)]
        sps = [recipes.rigl(model, opts[0], sparsity=.5, total_steps=20, frequency=2, include='0'), recipes.top_kast(model, opts[1], sparsity=.75, total_steps=20, ignore='0')]
        return model, opts, sps
    def go(out, steps):
        model, opts, _ = out
        for t in steps:
            (model(data(t)) - data(t)[:, :8].sin()).square().mean().backward()
            for o in opts:
                o.step()
                o.zero_grad()
    straight, first, second = make(), make(), make()
    go(straight, range(12)), go(first, range(7))
    for a, b in zip([first[0], *first[1], *first[2]], [second[0], *second[1], *second[2]]): b.load_state_dict(copy.deepcopy(a.state_dict()))
    go(second, range(7, 12))
    assert_same(dict(straight[0].state_dict()), dict(second[0].state_dict()))
    assert [sp.t for sp in second[2]] == [12, 12]
    assert [sum(int(s.mask.sum()) for s in sp.sites) for sp in straight[2]] == [256, (768 + 192) // 4]
    for sp in straight[2]:
        for s in sp.sites: assert not s.weight[~s.mask].any()
    straight[2][0].detach()
    go(straight, range(12, 14))
    assert straight[0][0].weight.all() and (straight[0][2].weight == 0).float().mean() == .75       # the other goes on


@pytest.mark.parametrize('name', TRAINING)
def test_detached_and_attached_again(name):
    "Nothing is left on the optimizer, weights that are kept stay as they are however often, and it trains on."
    out = made(name, ADAM, total=12, frequency=3)
    train(out, range(5))
    model, opt, sp, _ = out
    weights, masks = {k: v.clone() for k, v in model.state_dict().items()}, [s.mask.clone() for s in sp.sites]
    for _ in range(3):
        sp.detach()
        assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
        sp.attach(opt)
        assert name == 'deepr' or all(torch.equal(s.mask, m) for s, m in zip(sp.sites, masks))          # which draws at every step
        for s in sp.sites: weights[s.name] = torch.where(s.mask, weights[s.name], model.state_dict()[s.name])
        if name != 'deepr': assert_same(weights, dict(model.state_dict()))
    train(out, range(5, 12))
    assert sp.t == 12 and all(s.weight.isfinite().all() for s in sp.sites)


# Two processes

RANKS = ('rigl', 'set', 'granet', 'deepr', 'snfs', 'acdc')


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    for name in RANKS:
        model, opt, sp, _ = made(name, total=12, frequency=2)
        net = nn.parallel.DistributedDataParallel(model)
        for t in range(12):
            x = data(t).chunk(2)[rank]
            (net(x) - x[:, :8].sin()).square().mean().backward()
            opt.step()
            opt.zero_grad()
        torch.save(snapshot((model, opt, sp, None)), f'{folder}/{name} {rank}.pt')
    dist.destroy_process_group()


def test_ranks_agree(tmp_path):
    "Masks are functions of names, steps and averaged gradients: every rank chooses the same."
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for name in RANKS: assert_same(*(torch.load(tmp_path / f'{name} {r}.pt', weights_only=True) for r in range(2)))


# Mistakes

def refused(name: str, **how) -> str:
    "What a recipe says, and that it has changed nothing."
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = how.pop('optimizer', SGD)(model.parameters())
    with pytest.raises(ValueError) as e: TRAINING[name](model, opt, **{**dict(sparsity=.8, total_steps=100), **how})
    assert_same(before, dict(model.state_dict()))
    assert not opt._optimizer_step_pre_hooks
    return str(e.value)


@pytest.mark.parametrize('name', [n for n in TRAINING if n != 'blast'])
def test_what_no_recipe_accepts(name):
    assert 'did you mean 0.8' in refused(name, sparsity=80)
    assert 'sparsity 1 leaves no weight to train: ask for less' in refused(name, sparsity=1.0, pattern=unstructured())
    assert 'keeps 2 of 4 along in, which is sparsity 0.5, but 0.9 was asked: leave sparsity out' in refused(name, sparsity=.9, pattern='2:4')
    assert 'total_steps is the number of optimizer steps of the whole training, at least 1, not 0' in refused(name, total_steps=0)
    assert "unknown pattern 'diagonal'" in refused(name, pattern='diagonal')
    assert "'O' matches no prunable weight" in refused(name, sparsity=None, pattern='2:4', ignore='O')
    if name not in ('ste', 'sr_ste'): assert 'say how sparse' in refused(name, sparsity=None, pattern=unstructured())


@pytest.mark.parametrize('name', ['rigl', 'set', 'itop', 'snfs', 'granet', 'gmp'])
def test_schedules_longer_than_the_training(name):
    assert 'end=1.5 is outside the training of 100 steps: give a fraction of it' in refused(name, end=1.5)
    assert 'so use 1 to' in refused(name, frequency=1000) and 'so use 1 to' in refused(name, frequency=0)


def test_other_mistakes():
    for name in ('rigl', 'set', 'granet', 'itop', 'snfs'):
        assert 'is a number between 0 and 1, not 30; did you mean 0.3' in refused(name, fraction=30)
    assert 'begin=0.9 is not before end=0.5' in refused('gmp', begin=.9, end=.5)
    assert 'start=0.9 is sparser than the end, 0.8' in refused('granet', start=.9)
    assert 'which SGD does not keep here: use torch.optim.SGD(…, momentum=0.9) or an Adam' in refused('snfs', optimizer=PLAIN)
    assert 'shorten `period`' in refused('acdc', begin=.5, phase=.3)
    assert 'use 1 or more' in refused('top_kast', wider=.1)
    assert 'factor is a number between 0 and 1' in refused('iss_p', shrink=2)
    assert 'use allocate=uniform' in refused('journey', sparsity=None, pattern='2:4', allocate=global_)


def test_few_steps_still_change_the_mask():
    "The papers' rhythm of 100 or 1000 steps does not turn a short training into a static one."
    for name in ('rigl', 'set', 'granet', 'itop', 'snfs', 'gmp'):
        model = mlp()
        sp = TRAINING[name](model, SGD(model.parameters()), sparsity=.8, total_steps=60)
        assert sum(sp.when(t) for t in range(1, 60)) >= 9, name


# Outer loops

def job(model: nn.Module, hold, steps: int = 5) -> None:
    opt = SGD(model.parameters())
    hold(opt)
    for t in range(steps):
        model(data(t)).square().mean().backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize('rewind', ['weights', 'lr'])
def test_lottery_tickets(rewind):
    model = mlp()
    first, starts = copy.deepcopy(model.state_dict()), []
    def watched(model, hold):
        starts.append({k: v.clone() for k, v in model.state_dict().items()})
        job(model, hold)
    found = recipes.imp(model, watched, sparsity=.7, rewind=rewind)
    assert [r.total['achieved'] for r in found] == pytest.approx([1 - .8**(i + 1) for i in range(5)] + [.7], abs=1e-3)
    assert len(starts) == 7
    for i, s in enumerate(starts[1:], 1):
        for k in ('0.weight', '2.weight', '4.weight'):
            if rewind == 'weights': assert torch.equal(s[k][s[k] != 0], first[k][s[k] != 0])
            assert not (starts[i - 1][k] == 0)[s[k] != 0].any()
        assert torch.equal(s['0.bias'], first['0.bias']) == (rewind == 'weights')
    assert sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1) == round(.7 * 1472)


def test_mistakes_of_outer_loops():
    with pytest.raises(ValueError, match=r'must call hold\(optimizer\)'): recipes.imp(mlp(), lambda model, hold: None, sparsity=.5)
    with pytest.raises(ValueError, match="rewind='epoch': use 'weights'"): recipes.imp(mlp(), job, sparsity=.5, rewind='epoch')
    with pytest.raises(ValueError, match='rate=20 is the share'): recipes.imp(mlp(), job, sparsity=.5, rate=20)
    with pytest.raises(ValueError, match='zeros of model 0 and model 1 differ'): recipes.soup([mlp(), pruned()])
    with pytest.raises(ValueError, match='has batch norms'): recipes.soup([convnet(), convnet()])
    with pytest.raises(ValueError, match='and there is none: give copies'): recipes.soup([])
    with pytest.raises(ValueError, match='only one of them has 4.bias, 4.weight'): recipes.soup([mlp(), mlp()[:3]])
    with pytest.raises(ValueError, match=r'0.weight is \(32, 16\) and \(30, 16\)'): recipes.soup([mlp(), mlp((16, 30, 24, 8))])
    with pytest.raises(ValueError, match='there is no batch'): recipes.soup([convnet(), convnet()], batches=iter([]))
    with pytest.raises(ValueError, match='tries=0'): recipes.random_search(mlp(), lambda m: 0., sparsity=.5, tries=0)


def untouched(model: nn.Module, f, error, said: str) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=said): f(model)
    assert_same(before, dict(model.state_dict()))


def test_outer_loops_are_all_or_nothing():
    "What cannot be is found before the first training, nothing stays on an optimizer, and a search puts the weights back."
    opts = []
    def never(model, hold): raise AssertionError('trained')
    def breaks(model, hold):
        opts.append(SGD(model.parameters()))
        hold(opts[-1])
        raise RuntimeError('out of data')
    def diverges(model, hold):
        job(model, hold)
        with torch.no_grad(): model[2].weight[0, 0] = math.inf
    untouched(mlp(), lambda m: recipes.imp(m, never, pattern='2:4', allocate=global_), ValueError, 'use allocate=uniform')
    untouched(mlp((16, 30, 8)), lambda m: recipes.imp(m, never, sparsity=.5, pattern=block(4)), ValueError, 'needs a multiple of 4')
    with pytest.raises(RuntimeError, match='out of data'): recipes.imp(mlp(), breaks, sparsity=.5)
    assert opts and not opts[0]._optimizer_step_pre_hooks and not opts[0]._optimizer_step_post_hooks
    with pytest.raises(ValueError, match='2.weight .* holds 1 NaN or infinite'): recipes.imp(mlp(), diverges, sparsity=.5)
    found = recipes.imp(model := mlp(), job, pattern='2:4')
    assert [r.total['achieved'] for r in found] == [.25, .5] and ((model[2].weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    untouched(mlp(), lambda m: recipes.random_search(m, lambda m: 1 / 0, sparsity=.5), ZeroDivisionError, 'division')
    untouched(mlp(), lambda m: recipes.random_search(m, lambda m: math.nan, sparsity=.5), ValueError, 'evaluate gave nan for draw 0')


@pytest.mark.parametrize('how, said', [(dict(sparsity=1.5), 'between 0 and 1, not 1.5; did you mean'), (dict(), 'say how sparse'), (dict(sparsity=.5, rounds=0), 'rounds=0: SynFlow prunes in one round'),
                                       (dict(sparsity=.5, rounds=2.5), 'rounds=2.5'), (dict(sparsity=.9, pattern='2:4'), 'but 0.9 was asked'), (dict(pattern='2:4', allocate=global_), 'use allocate=uniform')])
def test_mistakes_with_synflow(how, said):
    cal = Calibration([data(0)])
    untouched(mlp(), lambda m: recipes.synflow(m, calibration=cal, **how), ValueError, said)


def test_synflow_of_patterns():
    for p in (nm(2, 4), block(4)):
        model = mlp()
        out = recipes.synflow(model, calibration=Calibration([data(0)]), sparsity=.5, pattern=p, rounds=10)
        assert out.total['achieved'] == .5
        for s in sites(model): check_mask(s.weight != 0, p, .5) if p.fixed else None


def test_soups_of_packed_layers():
    "Packed values may be averaged where their positions are the same."
    from sparse_workbench.kernels.linear import SparseLinear, pack
    with seeded(): keep = torch.rand(32, 32) > .5
    def make(seed: int, turned: bool = False) -> nn.Module:
        with seeded(0): rest = nn.Linear(32, 32), nn.Linear(32, 4)
        with seeded(seed): w = torch.randn(32, 32).masked_fill(~(keep.t() if turned else keep), 0.)
        return nn.Sequential(rest[0], SparseLinear(pack(w, 'bitmask')), rest[1])
    a, b = make(1), make(2)
    mixed = recipes.soup([a, b])
    with seeded(3): x = torch.randn(5, 32)
    torch.testing.assert_close(mixed[1](x), (a[1](x) + b[1](x)) / 2, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='of model 0 and model 1 differ, and .* has no average: packed weights need the same positions'): recipes.soup([a, make(2, turned=True)])


def test_borrowed_ratios_leave_no_statistics():
    cal = Calibration([(data(0), torch.arange(32) % 8)], 'noise', class_loss)
    model = mlp()
    opt = SGD(model.parameters())
    sp = recipes.static(model, opt, sparsity=.8, allocate=borrow(scores.saliency), calibration=cal)
    masks = [s.mask.clone() for s in sp.sites]
    assert not any(s.stats for s in sp.sites)
    sp.detach().attach(opt)                                     # before the first step the masks are chosen anew, and the data is gone
    assert all(torch.equal(s.mask, m) for s, m in zip(sp.sites, masks))
    with pytest.raises(KeyError, match="has no 'grad': pass calibration=batches"): recipes.static(m := mlp(), SGD(m.parameters()), sparsity=.8, allocate=borrow(scores.saliency))


def pruned() -> nn.Module:
    model = mlp()
    recipes.magnitude(model, sparsity=.5)
    return model


def test_random_search_leaves_the_best_mask():
    model, value = mlp(), lambda m: m(data(0)).square().mean().item()
    values = recipes.random_search(model, value, sparsity=.5, tries=5)
    assert value(model) == min(values) and len(set(values)) == 5 and not [s for s in sites(model) if int((s.weight == 0).sum()) != s.numel // 2]


def test_patterns_and_flows_are_named_in_checkpoints():
    "A run that resumes with another pull is refused."
    a, b = made('mask_sparsity', pull=1e-3), made('mask_sparsity', pull=1e-2)
    with pytest.raises(ValueError, match='made with flow'): b[2].load_state_dict(a[2].state_dict())
    assert repr(flows.soft(3, 1e-3)) != repr(flows.soft(3)) and repr(flows.l1(1e-4)) != repr(flows.l1())
    assert isinstance(a[2].pattern, Pattern)


@pytest.mark.parametrize('name', ['gmp', 'rigl', 'acdc', 'iss_p', 'mask_decay', 'structure_decay', 'masked_decay', 'cast', 'mask_sparsity'])
def test_a_recipe_for_a_longer_training_is_refused(name):
    from sparse_workbench.loop import fit
    model, opt, sp, _ = made(name, total=40)
    with pytest.raises(ValueError, match='training ends at step 20.*give .*total_steps=20'): fit(model, opt, lambda m, b: m(b).square().mean(), data, 20, sparsifier=sp)
    assert sp.t == 0
