"""The gradient-flow recorder: definitions against float64, an unbiased noise, and not a bit of the training changed."""
import copy
import io
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_waiting import Asked
from torch import Tensor, nn

from sparse_workbench import gradient_flow, recipes
from sparse_workbench.core import sites
from sparse_workbench.flows import cut, dense_momentum, explore, l1, sr_ste, ste
from sparse_workbench.gradient_flow import MEASURES, GradientFlow, compare
from sparse_workbench.patterns import nm
from sparse_workbench.rules import drop_grow, keep_best
from sparse_workbench.schedules import cubic, every
from sparse_workbench.scores import random
from sparse_workbench.sparsifier import Bucket, Sparsifier, record
from sparse_workbench.testing import convnet, mlp, seeded, tiny_gpt2

SGD, ADAMW = partial(torch.optim.SGD, lr=.2, momentum=.9), partial(torch.optim.AdamW, lr=1e-2)


def data(t: int, n: int = 32, width: int = 16) -> Tensor:
    with seeded(t): return torch.randn(n, width)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with seeded(0): return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).to(dtype)


def loss(model: nn.Module, t: int) -> Tensor:
    x = data(t).to(next(model.parameters()).dtype)
    return (model(x) - x[:, :8].sin()).square().mean()


def made(flow=ste, optimizer: Callable = ADAMW, dtype=torch.float32, **how):
    model = net(dtype)
    opt = optimizer(model.parameters())
    return model, opt, Sparsifier(sites(model), flow=flow, **({'pattern': nm(1, 4)} | how)).attach(opt)


def train(model: nn.Module, opt: torch.optim.Optimizer, sp: Sparsifier, n: int, r: GradientFlow | None = None, parts: int = 2) -> None:
    for _ in range(n):
        for k in range(parts):
            (loss(model, 10 * sp.t + k) / parts).backward()
            if r: r.micro()
        opt.step()
        opt.zero_grad()


def tensors(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [v for s in opt.state_dict()['state'].values() for v in s.values() if isinstance(v, Tensor)]


def alike(a, b) -> bool:
    "Weights, optimizer states, masks and dense weights, bit for bit."
    state = lambda x: [*x[0].state_dict().values(), *tensors(x[1]), *[t for s in x[2].sites for t in (s.mask, s.latent) if t is not None]]
    return all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


def value(r: GradientFlow, name: str, site: str, step: int) -> float:
    found = [x['value'] for x in r.rows() if (x['name'], x['site'], x['step']) == (name, site, step)]
    assert len(found) == 1, (name, site, step)
    return found[0]


def names(r: GradientFlow) -> set[str]: return {x['name'] for x in r.rows()}


FLOWS = dict(cut=lambda: dict(flow=cut, sparsity=cubic(.3, .9, 6), pattern='unstructured'), static=lambda: dict(flow=cut), ste=lambda: dict(flow=ste),
             sr_ste=lambda: dict(flow=sr_ste(1e-2)), l1=lambda: dict(flow=l1(1e-3)), explore=lambda: dict(flow=explore()),
             momentum=lambda: dict(flow=dense_momentum, pattern='per_row', sparsity=.7, when=every(3)))


# --- definitions -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flow', [cut, ste, sr_ste(.05), explore(.01, .1)], ids=repr)
def test_definitions_against_float64(flow):
    "Eight steps computed again by hand, from clones taken around every call."
    model, opt, sp = made(flow, SGD, torch.float64, when=every(1))
    r = GradientFlow(sp, every=2, window=3)
    start = [s.mask.clone() for s in sp.sites]
    union, last, record_before = [m.clone() for m in start], [torch.full(m.shape, -10**6) for m in start], [m.clone() for m in start]
    for t in range(1, 9):
        mask = [s.mask.clone() for s in sp.sites]
        theta = [(s.weight if s.latent is None else s.latent).clone() for s in sp.sites]
        gs, total = [], [torch.zeros_like(s.weight) for s in sp.sites]
        for k in range(3):
            (loss(model, 10 * t + k) / 3).backward()
            r.micro()
            now = [s.weight.new_tensor(s.parameter.grad) for s in sp.sites]
            gs.append([n - o for n, o in zip(now, total)])
            total = now
        through = [flow.grad(g.clone(), w.clone(), m.clone(), sp.t) for g, w, m in zip(total, theta, mask)]
        buffers = [opt.state[s.parameter].get('momentum_buffer') for s in sp.sites]
        step = [.2 * (f if b is None else .9 * b + f) for f, b in zip(through, buffers)]
        opt.step()
        opt.zero_grad()
        for i, s in enumerate(sp.sites):
            flip = s.mask ^ mask[i]
            back, union[i] = flip & (t - last[i] <= 3), union[i] | s.mask
            last[i][flip] = t
            if t % 2: continue
            got = lambda name, s=s: value(r, name, s.name, t)
            g, m = total[i], mask[i]
            samples = torch.stack([x[i] for x in gs])
            var = 3 * samples.var(0, unbiased=True)             # of the sum of three
            want = dict(
                grad_kept=g[m].norm(), grad_pruned=g[~m].norm(), through_kept=through[i][m].norm(), through_pruned=through[i][~m].norm(),
                cosine=nn.functional.cosine_similarity((g * m).flatten(), g.flatten(), 0),
                effective=g[m].norm() / sum(x[y].norm() for x, y in zip(total, mask)), noise_kept=var[m].sum(), noise_pruned=var[~m].sum(),
                variance_kept=var[m].mean(), variance_pruned=var[~m].mean(), snr_kept=g[m].square().sum() / var[m].sum() - 1,
                snr_pruned=g[~m].square().sum() / var[~m].sum() - 1, update_ratio=step[i].norm() / theta[i].norm(),
                flips=flip.sum(), flip_rate=flip.double().mean(), sad=(s.mask ^ record_before[i]).sum(), sad_normalised=(s.mask ^ record_before[i]).double().mean(),
                initial_flip_rate=(s.mask ^ start[i]).double().mean(), oscillating=back.sum(), explored=union[i].double().mean(), sparsity=(~s.mask).double().mean(),
                dead_rows=(s.mask.sum(1) == 0).sum(), unread_inputs=(s.mask.sum(0) == 0).sum())
            assert set(want) == set(MEASURES)
            for name, v in want.items(): assert got(name) == pytest.approx(float(v), rel=1e-9, abs=1e-13), (t, s.name, name)
            record_before[i] = s.mask.clone()
    assert r.steps == [2, 4, 6, 8]


def test_totals_follow_the_same_formulas():
    model, opt, sp = made(sr_ste(.05), SGD, torch.float64)
    r = GradientFlow(sp, every=1)
    train(model, opt, sp, 2, r)
    sites_, all_ = r.frame().query('step == 2').pivot(index='name', columns='site', values='value'), {x['name']: x['value'] for x in r.totals() if x['step'] == 2}
    for n in ('grad_kept', 'through_pruned'): assert all_[n] == pytest.approx(sites_.loc[n].pow(2).sum() ** .5, rel=1e-12)
    for n in ('noise_kept', 'flips', 'dead_rows'): assert all_[n] == pytest.approx(sites_.loc[n].sum(), rel=1e-12)
    assert all_['flip_rate'] == pytest.approx(sites_.loc['flips'].sum() / sum(s.numel for s in sp.sites), rel=1e-12)
    assert all_['effective'] == 1 and sites_.loc['effective'].sum() == pytest.approx(1)


def test_oscillations_are_changes_taken_back_within_the_window():
    "Two masks take turns every second step: each change takes back the one two steps ago."
    for window, share in ((2, 1.), (1, 0.)):
        model = net()
        opt = SGD(model.parameters(), lr=0.)
        masks: dict[str, list[Tensor]] = {}
        def turns(site, p, masks=masks):
            halves = masks.setdefault(site.name, [torch.arange(site.numel).view(site.shape) % 2 == 0, torch.arange(site.numel).view(site.shape) % 2 == 1])
            site.mask = halves[site.step // 2 % 2].clone()
        sp = Sparsifier(sites(model), turns, sparsity=.5, when=every(2)).attach(opt)
        r = GradientFlow(sp, every=1, window=window)
        train(model, opt, sp, 8)
        flips = [value(r, 'flips', '0.weight', t) for t in r.steps]
        back = [value(r, 'oscillating', '0.weight', t) for t in r.steps]
        assert flips == [0, 384] * 4 and back == [0, 0] + [0, 384 * share] * 3
        assert value(r, 'explored', '0.weight', 8) == 1 and value(r, 'initial_flip_rate', '0.weight', 8) == 0


def test_dead_filters_and_unread_channels():
    model = convnet()
    opt = SGD(model.parameters())
    sp = Sparsifier(sites(model), pattern='row', sparsity=.5).attach(opt)
    r = GradientFlow(sp, every=1)
    x = next(p for p in model.parameters() if p.ndim == 4)
    model(torch.randn(2, x.shape[1], 16, 16)).square().mean().backward()
    opt.step()
    for s in sp.sites:
        assert value(r, 'dead_rows', s.name, 1) == (~s.mask.flatten(1).any(1)).sum() == s.shape[0] // 2
        assert value(r, 'unread_inputs', s.name, 1) == (~s.mask.transpose(0, 1).flatten(1).any(1)).sum()


def test_small_pruned_side_is_not_lost():
    "A millionth of the gradient beside the kept side, in float32."
    b = gradient_flow.Bucket(sites(nn.Sequential(nn.Linear(64, 64))), [4096])
    x, m = torch.randn(4096), torch.rand(4096) < .5
    x[~m] *= 1e-6
    kept, pruned = gradient_flow.sides(b, x, m)
    assert float(pruned) == pytest.approx(float(x[~m].double().square().sum()), rel=1e-5)
    assert float(gradient_flow.sides(b, x, torch.ones(4096, dtype=torch.bool))[1]) == 0


@pytest.mark.parametrize('sizes', [(1,), (17, 5000), (24, 0, 96), (4096, 8192), (0,)], ids=str)
def test_counting_by_norm_as_on_a_gpu(sizes):
    "The branch for GPUs computes the same, also where sites have no common length but one, or lie on another process."
    class Gpu(torch.Tensor):
        is_cuda = True
    b, flat = Bucket([], list(sizes)), torch.rand(sum(sizes)) < .5
    want = torch.stack([x.sum() for x in flat.split(sizes)]).double()
    assert torch.equal(gradient_flow.counted(b, flat), want)
    assert torch.equal(gradient_flow.counted(b, flat.as_subclass(Gpu)).as_subclass(Tensor), want)


@pytest.mark.parametrize('noisy', [False, True])
@pytest.mark.parametrize('flow', FLOWS)
def test_a_recorded_step_asks_for_no_value(flow, noisy):
    "On a GPU that would mean waiting; what is asked is what the sparsifier asks by itself."
    def asked(watch: bool) -> list[str]:
        model, opt, sp = made(**FLOWS[flow]())
        r = GradientFlow(sp, every=1) if watch else None
        with Asked() as mode: train(model, opt, sp, 4, r if noisy else None)
        assert r is None or r.steps == [1, 2, 3, 4]
        return mode.names
    assert asked(True) == asked(False)


# --- noise -----------------------------------------------------------------------------------------------------------

class Draw(nn.Module):
    "A layer whose gradient is whatever it is called with."
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 8, bias=False)
    def forward(self, g: Tensor) -> Tensor: return (self.layer.weight * g).sum()


def standard_errors(k: int, seed: int, steps: int = 500) -> list[float]:
    "How many standard errors the mean of the estimates is off the truth: noise and squared signal, kept and pruned."
    with seeded(seed):
        draw = Draw()
        opt = torch.optim.SGD(draw.parameters(), lr=0.)
        r = GradientFlow(Sparsifier(sites(draw), sparsity=.75).attach(opt), every=1)
        std, mean = torch.rand(8, 16) + .1, .3 * torch.randn(8, 16)
        for _ in range(steps):
            for _ in range(k):
                (draw(mean + std * torch.randn(8, 16)) / k).backward()
                r.micro()
            opt.step()
            opt.zero_grad()
    m, f, out = r.sp.sites[0].mask, r.frame().pivot(index='step', columns='name', values='value'), []
    for side, keep in (('kept', m), ('pruned', ~m)):
        noise, signal = f[f'noise_{side}'], f[f'grad_{side}'] ** 2 - f[f'noise_{side}']
        out += [(noise.mean() - float(std[keep].square().sum()) / k) / noise.sem(), (signal.mean() - float(mean[keep].square().sum())) / signal.sem()]
    return out


@pytest.mark.parametrize('k', [2, 3, 8])
def test_noise_is_unbiased(k):
    "Gradients of known mean and variance, in four independent runs: deviations from the truth are standard normal, with mean 0."
    z = torch.tensor([standard_errors(k, 100 * k + i) for i in range(4)])
    assert (z.mean(0) * 2).abs().max() < 4 and .3 < z.square().mean() < 2.5


def test_noise_does_not_depend_on_how_the_loss_is_divided():
    "Noise is on the scale of the step's gradient: dividing the loss by 4 divides noise by 16, and leaves the ratio alone."
    out = []
    for scale in (1, 4):
        model, opt, sp = made(optimizer=SGD, dtype=torch.float64)
        r = GradientFlow(sp, every=1)
        for k in range(4):
            (loss(model, k) / scale).backward()
            r.micro()
        opt.step()
        out.append({x['name']: x['value'] for x in r.totals()})
    assert out[0]['noise_pruned'] == pytest.approx(16 * out[1]['noise_pruned'], rel=1e-9)
    assert out[0]['snr_pruned'] == pytest.approx(out[1]['snr_pruned'], rel=1e-9)


def test_clipping_scales_noise_with_the_gradient():
    out = []
    for clip in (math.inf, 1e-3):
        model, opt, sp = made(optimizer=SGD, dtype=torch.float64)
        r = GradientFlow(sp, every=1)
        for k in range(3):
            loss(model, k).backward()
            r.micro()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        out.append({x['name']: x['value'] for x in r.totals()})
    c = 1e-3 / (float(norm) + 1e-6)                 # what clip_grad_norm_ multiplies by
    assert out[1]['noise_kept'] == pytest.approx(c**2 * out[0]['noise_kept'], rel=1e-6)
    assert out[1]['snr_kept'] == pytest.approx(out[0]['snr_kept'], rel=1e-6)


@pytest.mark.parametrize('parts', [0, 1])
def test_too_few_micro_batches(parts):
    "Training goes on, everything else is recorded; asking for the noise says what is missing."
    model, opt, sp = made()
    r = GradientFlow(sp, every=1)
    train(model, opt, sp, 2, r if parts else None, parts=1)
    assert 'flips' in names(r) and not any(n.startswith(('noise', 'variance', 'snr')) for n in names(r))
    for ask in (lambda: r.frame('noise_kept'), lambda: r.plot('variance_pruned'), lambda: compare({'a': r}, ['snr_kept'])):
        with pytest.raises(ValueError, match=r'a variance needs 2: .* micro\(\)'): ask()


def test_micro_costs_nothing_on_steps_that_are_not_recorded():
    model, opt, sp = made()
    r = GradientFlow(sp, every=5)
    loss(model, 0).backward()
    r.micro()
    assert r.micros.k == 0 and not r.micros.sums


class Experts(nn.Module):
    "A layer that all micro-batches reach, and two of which each reaches one."
    def __init__(self):
        super().__init__()
        with seeded(0): self.shared, self.experts = nn.Linear(16, 24), nn.ModuleList([nn.Linear(24, 8) for _ in range(2)])
    def forward(self, x: Tensor, which: int): return self.experts[which](self.shared(x).tanh())


@pytest.mark.parametrize('route', [(0, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 1), (1, 0, 0, 0), (0, 1, 1, 1)], ids=str)
@pytest.mark.parametrize('skipped', [None, (0, 0, 0), (1,), (0, 1)], ids=str)
def test_experts_that_few_micro_batches_reach(route, skipped):
    "What a micro-batch does not reach gets zero from it; the micro-batches of a step that was given up do not count, whichever expert they reached."
    model = Experts().double()
    opt = SGD(model.parameters())
    sp = Sparsifier(sites(model), pattern=nm(1, 4), flow=ste).attach(opt)
    r = GradientFlow(sp, every=1)
    for k, which in enumerate(skipped or ()):
        model(data(20 + k).double(), which).square().mean().backward()
        r.micro()
    opt.zero_grad()
    now = lambda: [torch.zeros_like(s.weight) if s.parameter.grad is None else s.parameter.grad.clone() for s in sp.sites]
    written = [now()]
    for k, which in enumerate(route):
        model(data(k).double(), which).square().mean().backward()
        r.micro()
        written.append(now())
    masks = [s.mask.clone() for s in sp.sites]
    assert r.micros.k == 4
    opt.step()
    for i, s in enumerate(sp.sites):
        if s.name.startswith('experts') and int(s.name.split('.')[1]) not in route: continue     # no gradient at all
        var = 4 * torch.stack([b[i] - a[i] for a, b in zip(written, written[1:])]).var(0)
        assert value(r, 'noise_kept', s.name, 1) == pytest.approx(float(var[masks[i]].sum()), rel=1e-9)
        assert value(r, 'noise_pruned', s.name, 1) == pytest.approx(float(var[~masks[i]].sum()), rel=1e-9)


# --- not a bit changed -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('optimizer', [SGD, ADAMW, partial(ADAMW, fused=True), partial(SGD, nesterov=True, foreach=True)], ids=['sgd', 'adamw', 'fused', 'nesterov'])
@pytest.mark.parametrize('flow', FLOWS)
def test_training_is_the_same_with_and_without(flow, optimizer):
    runs = []
    for n in (0, 1, 3):
        with seeded(0):
            run = made(optimizer=optimizer, **FLOWS[flow]())
            r = GradientFlow(run[2], every=n) if n else None
            train(*run, 9, r)
            runs.append(run)
        if r: assert len(r.steps) == 9 // n
    assert alike(runs[0], runs[1]) and alike(runs[0], runs[2])


def test_random_rules_draw_the_same_numbers():
    runs = []
    for on in (False, True):
        with seeded(5):
            run = made(flow=cut, rule=keep_best(random), sparsity=.5, pattern='unstructured', when=every(2))
            train(*run, 6, GradientFlow(run[2], every=1) if on else None)
            runs.append((run, torch.rand(3)))
    assert alike(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_beside_other_records_and_twice():
    run = made()
    events, a, b = record(run[2]), GradientFlow(run[2], every=1), GradientFlow(run[2], every=1)
    train(*run, 3)
    assert a.rows() == b.rows()
    for s in run[2].sites:
        for e in (x for x in events.rows() if x['site'] == s.name and x['name'] in ('grad_kept', 'grad_pruned')):
            assert value(a, e['name'], s.name, e['step']) == pytest.approx(e['value'], rel=1e-5)


@pytest.mark.parametrize('how', [dict(flow=ste, pattern='2:4'), dict(rule=drop_grow(), sparsity=.8, when=every(2)), dict(sparsity=cubic(.3, .9, 4))],
                         ids=['2:4', 'drop_grow', 'gradual'])
def test_all_counts_of_flips_are_one(how):
    "The table of events, the flip rate and the recorder, of layers in one bucket and in two, against masks compared by hand."
    with seeded(0): model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 3000), nn.Linear(3000, 8))
    opt = SGD(model.parameters())
    sp = Sparsifier(sites(model), **how).attach(opt)
    events, rates, r = record(sp), recipes.flips(sp), GradientFlow(sp, every=1)
    assert [len(b.sites) for b in sp.buckets] == [2, 1, 1]
    for t in range(1, 6):
        before = [s.mask.clone() for s in sp.sites]
        train(model, opt, sp, 1)
        turned = [m ^ s.mask for m, s in zip(before, sp.sites)]
        assert [value(r, 'flips', s.name, t) for s in sp.sites] == [int(x.sum()) for x in turned]
        if not sp.when(t): continue
        said = {(x['site'], x['name']): x['value'] for x in events.rows() if x['step'] == t}
        assert [said[s.name, 'dropped'] for s in sp.sites] == [int((x & m).sum()) for x, m in zip(turned, before)]
        assert [said[s.name, 'grown'] for s in sp.sites] == [int((x & ~m).sum()) for x, m in zip(turned, before)]
        assert rates[-1] == (t, sum(int(x.sum()) for x in turned) / sum(x.numel() for x in turned))


def test_detach_removes_every_hook():
    model, opt, sp = made()
    before = [list(h) for h in (opt._optimizer_step_pre_hooks, opt._optimizer_step_post_hooks)]
    r = GradientFlow(sp, every=1)
    train(model, opt, sp, 2, r)
    rows = r.rows()
    assert r.detach() is r and [list(h) for h in (opt._optimizer_step_pre_hooks, opt._optimizer_step_post_hooks)] == before and not sp.listeners
    train(model, opt, sp, 2, r)
    r.detach()
    assert r.rows() == rows and r.steps == [1, 2]


def test_a_detached_sparsifier_is_not_recorded():
    model, opt, sp = made()
    r = GradientFlow(sp, every=1)
    train(model, opt, sp, 2, r)
    sp.detach()
    for _ in range(2):
        loss(model, 0).backward()
        opt.step()
    assert r.steps == [1, 2] and r.rows() and r.plot()
    sp.attach(opt)
    train(model, opt, sp, 1, r)
    assert r.steps == [1, 2]


# --- hosts and odd steps ---------------------------------------------------------------------------------------------

def test_param_groups_and_frozen_weights():
    model = net(torch.float64)
    opt = torch.optim.SGD([dict(params=model[0].parameters(), lr=.1), dict(params=model[2].parameters(), lr=.3)])
    model[0].weight.requires_grad_(False)
    sp = Sparsifier(sites(model), pattern=nm(1, 4), flow=ste).attach(opt)
    r = GradientFlow(sp, every=1)
    train(model, opt, sp, 1, r)
    model[0].weight.requires_grad_(True)
    train(model, opt, sp, 1, r)
    rows = r.frame().pivot_table(index='name', columns=['step', 'site'], values='value')
    assert math.isnan(rows.loc['grad_kept'].get((1, '0.weight'), math.nan)) and rows.loc['update_ratio'][1, '0.weight'] == 0
    assert rows.loc['effective'][1, '2.weight'] == 1 and rows.loc['grad_kept'][2, '0.weight'] > 0
    total = {x['name']: x['value'] for x in r.totals() if x['step'] == 1}
    assert total['grad_kept'] == rows.loc['grad_kept'][1, '2.weight'] and total['variance_kept'] == pytest.approx(rows.loc['variance_kept'][1, '2.weight'])


@pytest.mark.parametrize('keyword', [False, True])
def test_closures(keyword):
    "Forward and backward inside the step, as Lightning does: the same records."
    rows = []
    for inside in (False, True):
        model, opt, sp = made(sr_ste(1e-2))
        r = GradientFlow(sp, every=2)
        for t in range(6):
            def closure(model=model, opt=opt, r=r, t=t):
                opt.zero_grad()
                out = []
                for k in range(2):
                    out.append(loss(model, 10 * t + k))
                    out[-1].backward()
                    r.micro()
                return sum(out)
            if inside: assert isinstance(opt.step(closure=closure) if keyword else opt.step(closure), Tensor)
            else:
                closure()
                opt.step()
        rows.append(r.rows())
    assert rows[0] == rows[1] and rows[0]


def test_lbfgs_is_measured_at_its_first_evaluation():
    results = []
    for on in (False, True):
        model, opt, sp = made(ste, partial(torch.optim.LBFGS, lr=.5, max_iter=4))
        r = GradientFlow(sp, every=1) if on else None
        first: list[Tensor] = []
        for _ in range(3):
            calls = [0]
            def closure(model=model, opt=opt, calls=calls, first=first):
                opt.zero_grad()
                out = loss(model, 0)
                out.backward()
                if not calls[0]: first.append(model[0].weight.grad.norm())
                calls[0] += 1
                return out
            opt.step(closure)
            assert calls[0] > 1
        results.append((model, opt, sp))
        if r:
            for t, g in enumerate(first, 1): assert math.hypot(value(r, 'grad_kept', '0.weight', t), value(r, 'grad_pruned', '0.weight', t)) == pytest.approx(float(g), rel=1e-5)
    assert torch.equal(results[0][0][0].weight, results[1][0][0].weight)


@pytest.mark.parametrize('fused', [False, True])
def test_grad_scaler_and_skipped_steps(fused):
    "Records hold true gradients, a skipped step leaves none, and its micro-batches do not leak into the next."
    def run(on: bool, infinite: bool):
        model, opt, sp = made(sr_ste(1e-2), partial(ADAMW, fused=fused))
        scaler = torch.amp.GradScaler('cpu', init_scale=2.**8, growth_interval=1000)
        r = GradientFlow(sp, every=1) if on else None
        for t in range(4):
            for k in range(2):
                scaler.scale(loss(model, 10 * sp.t + k) / 2).backward()
                if infinite and t == 1: model[2].bias.grad.fill_(math.inf)
                if r: r.micro()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        return (model, opt, sp), r
    bare, recorded = run(False, True), run(True, True)
    assert alike(bare[0], recorded[0]) and recorded[1].steps == [1, 2, 3]
    model, opt, sp = made(sr_ste(1e-2), partial(ADAMW, fused=fused))
    plain = GradientFlow(sp, every=1)
    train(model, opt, sp, 3, plain)
    for a, b in zip(plain.rows(), recorded[1].rows(), strict=True): assert a | {'value': 0} == b | {'value': 0} and b['value'] == pytest.approx(a['value'], rel=1e-4, abs=1e-9), a


def test_a_step_that_failed_is_recorded_once():
    class Fails(torch.optim.SGD):
        fail = False
        @torch.no_grad()
        def step(self, closure=None):
            if self.fail: raise RuntimeError('lost')
            return super().step(closure)
    whole, broken = made(optimizer=partial(torch.optim.SGD, lr=.2)), made(optimizer=partial(Fails, lr=.2))
    a, b = GradientFlow(whole[2], every=1), GradientFlow(broken[2], every=1)
    train(*whole, 3, a)
    for t in range(3):
        for k in range(2):
            (loss(broken[0], 10 * t + k) / 2).backward()
            b.micro()
        broken[1].fail = t == 1
        if broken[1].fail:
            with pytest.raises(RuntimeError, match='lost'): broken[1].step()
            broken[1].fail = False
        broken[1].step()
        broken[1].zero_grad()
    assert alike(whole, broken) and a.rows() == b.rows()


def test_half_precision_sums_in_float32():
    model, opt, sp = made(dtype=torch.bfloat16, optimizer=SGD)
    r = GradientFlow(sp, every=1)
    loss(model, 0).backward()
    g, m = [s.parameter.grad.clone() for s in sp.sites], [s.mask.clone() for s in sp.sites]
    r.micro()
    opt.step()
    for s, x, k in zip(sp.sites, g, m): assert value(r, 'grad_pruned', s.name, 1) == pytest.approx(float(x.double()[~k].norm()), rel=1e-5)


@pytest.mark.parametrize('build', [tiny_gpt2, mlp])
def test_views_and_transposed_weights(build):
    "GPT-2 stores weights the other way round; the records are of the logical view."
    model = build()
    opt = SGD(model.parameters())
    sp = Sparsifier(sites(model), pattern=nm(2, 4), flow=ste).attach(opt)
    r = GradientFlow(sp, every=1)
    out = model(torch.arange(16).view(2, 8)).logits.square().mean() if build is tiny_gpt2 else model(data(0)).square().mean()
    out.backward()
    want = {s.name: s.of(s.parameter.grad)[s.mask].double().norm().item() for s in sp.sites}
    opt.step()
    for n, v in want.items(): assert value(r, 'grad_kept', n, 1) == pytest.approx(v, rel=1e-5)


# --- resuming --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flow', FLOWS)
def test_resume_without_pickle(flow):
    make = lambda: (lambda run: (*run, GradientFlow(run[2], every=2)))(made(**FLOWS[flow]()))
    whole, first, again = make(), make(), make()
    train(*whole[:3], 9, whole[3])
    train(*first[:3], 5, first[3])
    f = io.BytesIO()
    torch.save([x.state_dict() for x in first], f)
    f.seek(0)
    for to, state in zip(again, torch.load(f, weights_only=True)): to.load_state_dict(state)
    train(*again[:3], 4, again[3])
    assert again[3].rows() == whole[3].rows() and alike(whole[:3], again[:3]) and again[3].steps == [2, 4, 6, 8]


def test_training_set_back_overwrites_its_records():
    model, opt, sp = made()
    r = GradientFlow(sp, every=1)
    train(model, opt, sp, 3, r)
    saved = copy.deepcopy([x.state_dict() for x in (model, opt, sp)])
    train(model, opt, sp, 4, r)
    rows = r.rows()
    for x, s in zip((model, opt, sp), saved): x.load_state_dict(s)
    train(model, opt, sp, 2, r)
    assert r.steps == [1, 2, 3, 4, 5]
    now = {(x['step'], x['site'], x['name']): x['value'] for x in r.rows()}
    assert all(now[x['step'], x['site'], x['name']] == x['value'] for x in rows if x['step'] < 6 and x['name'] in ('grad_kept', 'through_pruned', 'update_ratio'))


@pytest.mark.parametrize('before', [0, 2])
def test_a_recorder_without_a_state_begins_where_the_checkpoint_does(before):
    "Made before the masks are loaded, or after, with a few steps before that or none: the same records."
    first, early, late = made(), made(), made()
    train(*first, 7)
    saved = copy.deepcopy([x.state_dict() for x in first])
    a = GradientFlow(early[2], every=3)
    train(*early, before, a)
    for run in (early, late):
        for x, s in zip(run, copy.deepcopy(saved)): x.load_state_dict(s)
    b = GradientFlow(late[2], every=3)
    for run, r in ((early, a), (late, b)): train(*run, 5, r)
    assert a.rows() == b.rows() and a.steps == [9, 12]
    assert value(a, 'sad', '0.weight', 9) < value(a, 'sparsity', '0.weight', 9) * 24 * 16 / 4


def test_states_of_others_are_refused_whole():
    a = GradientFlow(made()[2], every=1)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8), nn.Linear(8, 8))
    b = GradientFlow(Sparsifier(sites(model), pattern=nm(1, 4)).attach(SGD(model.parameters())), every=1)
    with pytest.raises(ValueError, match='only one side has 1.weight'): b.load_state_dict(a.state_dict())
    wrong = a.state_dict() | {'sums': ['grad_kept']}
    with pytest.raises(ValueError, match='another version'): a.load_state_dict(wrong)
    assert not b.steps


# --- errors and figures ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bad', [0, -3, 1.5, None])
def test_every_must_be_a_number_of_steps(bad):
    model, opt, sp = made()
    with pytest.raises(ValueError, match='every='): GradientFlow(sp, every=bad)
    assert len(opt._optimizer_step_pre_hooks) == 1


def test_errors_by_name():
    with pytest.raises(ValueError, match='window=0'): GradientFlow(made()[2], window=0)
    with pytest.raises(ValueError, match=r'sp\.attach\(optimizer\) first'): GradientFlow(Sparsifier(sites(net()), sparsity=.5))
    model, opt, sp = made()
    r = GradientFlow(sp, every=7)
    with pytest.raises(ValueError, match='nothing is recorded yet: .* step 7'): r.plot()
    assert 'nothing is recorded' in r._repr_html_() and r.rows() == [] and r.frame().empty
    with pytest.raises(ValueError, match='did you mean flip_rate'): r.frame('fliprate')
    with pytest.raises(ValueError, match='no runs to compare'): compare({})


def overlaps(fig) -> list[tuple[str, str]]:
    "Pairs of texts of a figure that cover each other."
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    ticks = [(x, k) for a in fig.axes for x in (a.xaxis, a.yaxis) for k in (*x.get_major_ticks(), *x.get_minor_ticks())]
    unseen = {id(k.label1) for x, k in ticks if not min(x.get_view_interval()) <= k.get_loc() <= max(x.get_view_interval())}
    texts = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in unseen]
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts]
    def covers(a, b): return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    return [(s, t) for i, (s, a) in enumerate(boxes) for t, b in boxes[i + 1:] if covers(a, b)]


@pytest.mark.parametrize('parts', [1, 2])
def test_figures_have_units_and_no_overlap(parts):
    with seeded(0): model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(30)], nn.Linear(16, 8))
    opt = ADAMW(model.parameters())
    sp = Sparsifier(sites(model), pattern=nm(1, 8), flow=sr_ste(1e-3)).attach(opt)
    r = GradientFlow(sp, every=1)
    train(model, opt, sp, 40, r, parts)
    fig = r.plot()
    labels = [f(a) for a in fig.axes for f in (lambda a: a.get_xlabel(), lambda a: a.get_ylabel())]
    assert {'optimizer step'} < set(labels) and any('squared gradient' in x for x in labels) == (parts > 1)
    assert overlaps(fig) == []
    other = compare({'one': r, 'two': r}, ['through_pruned', 'flip_rate', 'update_ratio'])
    assert overlaps(other) == [] and len(other.axes) == 3
    assert 'data:image/png;base64' in r._repr_html_()
