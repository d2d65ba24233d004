"""The six promises over flows and optimizers, mixed precision, compilation, and two processes that equal one."""
import copy
import io
import os
import socket
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_workbench.allocation import erk, global_
from sparse_workbench.core import Site, sites
from sparse_workbench.flows import cut, s_ste, sr_ste, ste
from sparse_workbench.oneshot import prune
from sparse_workbench.patterns import Pattern, block, nm, transposable, unstructured
from sparse_workbench.rules import keep_best
from sparse_workbench.schedules import cubic, cyclic, every, once, steps
from sparse_workbench.scores import gradient, magnitude, random
from sparse_workbench.sparsifier import Bucket, Sparsifier
from sparse_workbench.stats import next_token_loss
from sparse_workbench.testing import (
    PROMISES, assert_same, check_mask, check_promises, convnet, exact_sparsity, legal_mask, mlp, same_after_load, same_keys, seeded, snapshot, tied,
    tiny_gpt2, train, zeros_outside,
)

def drop_and_grow(site: Site, p: Pattern) -> None:
    "A fifth of the kept weights goes, the smallest; as many come back, where the gradient is largest. The start is random."
    if site.grad is None: return keep_best(random)(site, p)
    keep = site.mask.flatten()
    n = max(1, int(keep.sum()) // 5)
    w, g = site.weight.abs().flatten(), gradient(site).flatten()
    lose = w.masked_fill(~keep, float('inf')).topk(n, largest=False).indices
    gain = g.masked_fill(keep, -1.).topk(n).indices
    site.mask = keep.index_fill(0, lose, False).index_fill(0, gain, True).reshape(site.shape)


METHODS: dict[str, Callable[[list], Sparsifier]] = dict(
    static=lambda ss: Sparsifier(ss, keep_best(random), allocate=erk, sparsity=.8),
    gmp=lambda ss: Sparsifier(ss, sparsity=cubic(0, .9, 5)),
    gmp_global=lambda ss: Sparsifier(ss, sparsity=cubic(.1, .9, 5), allocate=global_, when=every(2)),
    grow=lambda ss: Sparsifier(ss, drop_and_grow, sparsity=.8, when=every(1)),
    acdc=lambda ss: Sparsifier(ss, pattern='per_row', sparsity=cyclic(.75, 2)),
    blocks=lambda ss: Sparsifier(ss, pattern=block(4), sparsity=cubic(0, .5, 4)),
    ste=lambda ss: Sparsifier(ss, sparsity=.7, flow=ste),
    sr_ste=lambda ss: Sparsifier(ss, pattern='2:4', flow=sr_ste(1e-2)),
    s_ste=lambda ss: Sparsifier(ss, pattern='2:4', flow=s_ste),
    squares=lambda ss: Sparsifier(ss, pattern=transposable(2, 4), flow=ste),
    nm=lambda ss: Sparsifier(ss, pattern=nm(1, 4, axis='out')),
    decay=lambda ss: Sparsifier(ss, pattern=nm(1, 8), sparsity=steps({0: 1/8, 2: 4/8, 4: 7/8}), flow=ste),
)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = dict(
    sgd=partial(torch.optim.SGD, lr=.1, momentum=.9, weight_decay=1e-2, foreach=False), sgd_foreach=partial(torch.optim.SGD, lr=.1, momentum=.9, nesterov=True, foreach=True),
    adamw=partial(torch.optim.AdamW, lr=1e-2, foreach=False), adamw_foreach=partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    adamw_fused=partial(torch.optim.AdamW, lr=1e-2, fused=True), amsgrad=partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
    rmsprop=partial(torch.optim.RMSprop, lr=1e-3, momentum=.9, centered=True),
)


def data(t: int, n: int = 32, width: int = 16) -> Tensor:
    with seeded(t): return torch.randn(n, width)


def made(method: str | Callable, optimizer: str | Callable = 'adamw', build: Callable[[], nn.Module] = mlp):
    "A fresh (model, optimizer, sparsifier, loss)."
    model = build()
    opt = (OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer)(model.parameters())
    sp = (METHODS[method] if isinstance(method, str) else method)(sites(model)).attach(opt)
    return model, opt, sp, lambda t: (model(data(t)) - data(t)[:, :8].sin()).square().mean()


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('method', METHODS)
def test_promises(method, optimizer):
    check_promises(partial(made, method, optimizer))


@pytest.mark.parametrize('method', ['gmp', 'ste', 'nm'])
def test_lbfgs_sees_only_sparse_weights(method):
    "It calls the closure many times a step, each time with another weight."
    seen: list[bool] = []
    model, opt, sp, loss = made(method, partial(torch.optim.LBFGS, lr=.5, max_iter=4))
    def watched(t: int) -> Tensor:
        seen.append(all(not s.weight[~s.mask].any() for s in sp.sites))
        return loss(t)
    first = loss(0).item()
    train((model, opt, sp, watched), [0, 0, 0, 0], closure=True)
    assert all(seen) and len(seen) > 8 and sp.t == 4 and loss(0).item() < first
    for s in sp.sites: check_mask(s.mask, sp.pattern, s.sparsity)


@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('method', ['gmp', 'sr_ste', 'acdc'])
def test_promises_of_convolutions(method, dims):
    def make():
        model = convnet(dims)
        opt = torch.optim.SGD(model.parameters(), .05, momentum=.9)
        sp = METHODS[method](sites(model)).attach(opt)
        return model, opt, sp, lambda t: nn.functional.cross_entropy(model(data(t, 4, 4 * 8**dims).reshape(4, 4, *[8] * dims)), torch.arange(4))
    check_promises(make)


@pytest.mark.parametrize('method', ['gmp', 'sr_ste', 'blocks'])
def test_promises_of_a_language_model(method):
    def make():
        gpt = tiny_gpt2()
        opt = torch.optim.AdamW(gpt.parameters(), 1e-2)
        return gpt, opt, METHODS[method](sites(gpt)).attach(opt), lambda t: next_token_loss(gpt, (torch.arange(24).reshape(2, 12) * (t + 1)) % 32)
    check_promises(make)


def test_promises_of_experts():
    "Many sites in one parameter."
    from transformers import MixtralConfig, MixtralForCausalLM
    config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                           num_local_experts=4, num_experts_per_tok=2, head_dim=8, bos_token_id=0, eos_token_id=0)
    def make():
        with seeded(): model = MixtralForCausalLM(config)
        opt = torch.optim.AdamW(model.parameters(), 1e-2)
        return model, opt, METHODS['acdc'](sites(model, include='*experts*')).attach(opt), lambda t: next_token_loss(model, (torch.arange(24).reshape(2, 12) * (t + 1)) % 32)
    assert len(make()[2].sites) == 8
    check_promises(make)


def test_a_learning_rate_schedule_wraps_the_step():
    def make():
        out = made('sr_ste')
        torch.optim.lr_scheduler.LambdaLR(out[1], lambda t: .5)
        return out
    for promise in (exact_sparsity, legal_mask, zeros_outside, same_keys, same_after_load): promise(make)
    plain, halved = made('sr_ste', partial(torch.optim.AdamW, lr=5e-3)), make()
    train(plain), train(halved)
    assert_same(snapshot(plain), snapshot(halved))


def test_promises_of_tied_weights():
    def make():
        model = tied()
        opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
        return model, opt, METHODS['sr_ste'](sites(model)).attach(opt), lambda t: model(data(t, 16, 8)).square().mean()
    check_promises(make)


def test_a_promise_for_every_method_is_no_formality():
    "Six promises, and a sparsifier that is switched off breaks one."
    def make():
        out = made('sr_ste')
        for h in out[2].hooks: h.remove()
        return out
    assert len(PROMISES) == 6
    with pytest.raises(AssertionError, match='zeros_outside'): check_promises(make)


# What the optimizer remembers, and what comes back

@pytest.mark.parametrize('optimizer', ['sgd', 'sgd_foreach', 'adamw', 'adamw_fused', 'amsgrad', 'rmsprop'])
def test_newborn_weights_start_from_nothing(optimizer):
    "Weights that come back have the value zero and no momentum of a former life."
    model, opt, sp, loss = made(lambda ss: Sparsifier(ss, sparsity=cyclic(.8, 3)), optimizer)
    for t in range(12):
        old = [s.mask.clone() for s in sp.sites]
        train((model, opt, sp, loss), [t])
        for s, m in zip(sp.sites, old):
            born = s.mask & ~m
            if sp.t in (3, 9): assert born.any()
            for k, v in opt.state[s.parameter].items():
                if v is not None and v.shape == s.parameter.shape: assert not v[born].any() and v[s.mask & m].any(), (t, k)
            assert not s.weight[born].any(), f'step {t}: newborn weights are {s.weight[born].abs().max():g}'


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw', 'amsgrad'])
def test_what_is_gone_does_not_come_back_by_momentum(optimizer):
    "Gradual pruning by magnitude only ever removes: a pruned weight is zero, whatever the optimizer remembers of it."
    model, opt, sp, loss = made(lambda ss: Sparsifier(ss, sparsity=cubic(.2, .9, 8)), optimizer)
    for t in range(10):
        old = [s.mask.clone() for s in sp.sites]
        train((model, opt, sp, loss), [t])
        for s, m in zip(sp.sites, old): assert not (s.mask & ~m).any(), f'{s.name}: {int((s.mask & ~m).sum())} weights came back at step {t}'


def test_latent_weights_keep_learning():
    model, opt, sp, loss = made('ste', 'sgd')
    train((model, opt, sp, loss))
    first = [s.mask.clone() for s in sp.sites]
    train((model, opt, sp, loss), range(6, 30))
    assert any((s.mask & ~m).any() for s, m in zip(sp.sites, first))
    for s in sp.sites: assert torch.equal(s.weight[s.mask], s.latent[s.mask]) and s.latent[~s.mask].all()


def test_two_groups_with_their_own_rates():
    "A weight without a learning rate stays as it was where it is kept, and is sparse all the same."
    model = mlp()
    before = model[0].weight.clone()
    opt = torch.optim.SGD([dict(params=model[0].parameters(), lr=0.), dict(params=[*model[2].parameters(), *model[4].parameters()], lr=.1)], momentum=.9)
    sp = Sparsifier(sites(model), sparsity=.5).attach(opt)
    train((model, opt, sp, lambda t: model(data(t)).square().mean()))
    assert torch.equal(model[0].weight, before.where(sp.sites[0].mask, 0.)) and sp.report().total['achieved'] == .5


def test_two_sparsifiers_share_an_optimizer():
    def make():
        model = mlp()
        opt = torch.optim.AdamW(model.parameters(), 1e-2)
        a = Sparsifier(sites(model, include='0'), sparsity=.5).attach(opt)
        b = Sparsifier(sites(model, include='2'), pattern='2:4', flow=sr_ste(1e-3)).attach(opt)
        return model, opt, a, b
    model, opt, a, b = make()
    train((model, opt, a, lambda t: model(data(t)).square().mean()))
    other, opt, c, d = make()
    train((other, opt, c, lambda t: other(data(t)).square().mean()), closure=True)
    for x, y in ((a, c), (b, d)): assert_same(snapshot((model, None, x, None)), snapshot((other, None, y, None)))
    assert a.report().total['achieved'] == .5 == b.report().total['achieved']


# Loops as people write them

@pytest.mark.parametrize('method', ['gmp', 'sr_ste'])
def test_accumulation_and_clipping(method):
    "The sparsifier counts optimizer steps, and adds its decay once per step, after clipping."
    def run(parts: int, clip: float | None):
        model, opt, sp, loss = made(method, 'sgd')
        for t in range(4):
            for _ in range(parts): (loss(t) / parts).backward()
            if clip: torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()
        assert sp.t == 4
        return snapshot((model, opt, sp, loss))
    one, four = run(1, None), run(4, None)
    for k in one: assert torch.equal(one[k], four[k]) if one[k].dtype == torch.bool else torch.allclose(one[k], four[k], atol=1e-6)
    assert_same(run(1, None), run(1, 1e6))
    small = run(1, 1e-3)
    assert not torch.equal(small['0.weight'], one['0.weight'])


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw', 'adamw_fused'])
@pytest.mark.parametrize('method', ['gmp', 'ste', 'sr_ste'])
@pytest.mark.parametrize('unscale', [True, False], ids=['unscaled by hand', 'unscaled by the scaler'])
def test_gradient_scaling(method, optimizer, unscale):
    "Scaled and not, the same bits (the scale is a power of two); a step with infinite gradients changes nothing and is not counted."
    plain = made(method, optimizer)
    train(plain, [0, 1, 3])
    model, opt, sp, loss = scaled = made(method, optimizer)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10, growth_interval=10**6)
    for t in range(4):
        before = snapshot(scaled)
        opt.zero_grad()
        scaler.scale(loss(t)).backward()
        if t == 2: model[0].weight.grad[0, 0] = float('inf')
        if unscale: scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if t == 2: assert_same(before, snapshot(scaled))
    assert sp.t == 3
    assert_same(snapshot(plain), snapshot(scaled))


@pytest.mark.parametrize('method', ['gmp', 'sr_ste'])
def test_compiled_with_changing_masks(method):
    "One graph, no breaks, no recompilation when the mask changes, and the same bits as without."
    import torch._dynamo as dynamo
    dynamo.reset()
    eager = made(method)
    train(eager)
    model, opt, sp, _ = compiled = made(method)
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return dynamo.lookup_backend('aot_eager')(graph, inputs)
    net, masks = torch.compile(model, backend=backend, fullgraph=True), []
    train((model, opt, sp, lambda t: (net(data(t)) - data(t)[:, :8].sin()).square().mean()), look=lambda sp: masks.append(sp.sites[0].mask.clone()))
    assert len(graphs) == 1 and not all(torch.equal(masks[0], m) for m in masks)
    assert_same(snapshot(eager), snapshot(compiled))
    assert dynamo.explain(model)(data(0)).graph_break_count == 0


@pytest.mark.parametrize('flow', [ste, cut], ids=repr)
def test_an_error_in_a_rule_leaves_a_sparse_model(flow):
    "The module holds what is used and saved, also after a step that failed."
    calls = []
    def brittle(site: Site, p: Pattern) -> None:
        calls.append(site.name)
        if calls.count('4.weight') > 3: raise RuntimeError('no mask today')
        keep_best(magnitude)(site, p)
    out = made(lambda ss: Sparsifier(ss, brittle, sparsity=.6, when=every(1), flow=flow), 'sgd')
    with pytest.raises(RuntimeError, match='no mask today'): train(out)
    for s in out[2].sites:
        check_mask(s.mask, unstructured(), .6)
        assert not s.weight[~s.mask].any()


@pytest.mark.parametrize('method', ['gmp', 'ste', 'sr_ste'])
def test_a_step_that_failed_is_tried_again_with_the_same_gradients(method):
    smooth, rough = made(method), made(method)
    def fail(*_): raise RuntimeError('out of memory')
    hook = rough[1].register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match='out of memory'): train(rough, [0])
    hook.remove()
    rough[1].step()              # the gradients are still there, and have passed the flow once
    train(smooth, [0])
    assert_same(snapshot(smooth), snapshot(rough))


class Own(torch.optim.AdamW):
    "Torch wraps the step of every class once, so that hooks run twice where one calls the other."
    def step(self, closure=None): return super().step(closure)


@pytest.mark.parametrize('method', ['gmp', 'sr_ste', 'acdc'])
@pytest.mark.parametrize('closure', [False, True])
def test_an_optimizer_that_calls_its_parent_counts_once(method, closure):
    plain, own = made(method), made(method, partial(Own, lr=1e-2, foreach=False))
    train(plain, closure=closure)
    train(own, closure=closure)
    assert own[2].t == 6
    assert_same(snapshot(plain), snapshot(own))


def test_an_error_in_a_closure_leaves_a_sparse_model():
    model, opt, sp, loss = out = made('ste', 'sgd')
    train(out, range(2))
    before = snapshot(out)
    def bad(t: int) -> Tensor: raise RuntimeError('bad batch')
    with pytest.raises(RuntimeError, match='bad batch'): train((model, opt, sp, bad), [2], closure=True)
    assert_same(before, snapshot(out))


# Stopping and going on

@pytest.mark.parametrize('method', ['static', 'gmp', 'ste', 'sr_ste', 'acdc', 'grow'])
@pytest.mark.parametrize('order', ['attach, load', 'load, attach'])
def test_resume_in_either_order(method, order):
    straight, first = made(method), made(method)
    train(straight)
    train(first, range(3))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in first[:3]], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = mlp()
    opt = OPTIMIZERS['adamw'](model.parameters())
    sp = METHODS[method](sites(model))
    if order == 'attach, load': sp.attach(opt)
    for x, state in zip((model, opt, sp), saved): x.load_state_dict(state)
    if order == 'load, attach': sp.attach(opt)
    second = (model, opt, sp, lambda t: (model(data(t)) - data(t)[:, :8].sin()).square().mean())
    train(second, range(3, 6))
    assert_same(snapshot(straight), snapshot(second))


@pytest.mark.parametrize('change, message', [
    (lambda s: s.update(flow='ste'), 'made with flow ste'), (lambda s: s.update(pattern='per_row()'), r'made with pattern per_row\(\)'),
    (lambda s: s['sites'].pop('0.weight'), 'only one side has 0.weight'), (lambda s: s['sites']['2.weight'].update(mask=torch.ones(2, 2).bool()), r'2.weight is \(24, 32\)')])
def test_a_foreign_checkpoint_changes_nothing(change, message):
    out = made('gmp')
    train(out, range(2))
    before, state = snapshot(out), out[2].state_dict()
    state['t'] = 99
    change(state)
    with pytest.raises(ValueError, match=message): out[2].load_state_dict(state)
    assert out[2].t == 2
    assert_same(before, snapshot(out))


@pytest.mark.parametrize('when', ['attached', 'loaded before it is attached'])
@pytest.mark.parametrize('method', ['gmp', 'grow', 'ste', 'sr_ste', 's_ste'])
@pytest.mark.parametrize('alone', [False, True])
def test_a_state_in_memory_stays_as_it_was(method, when, alone, monkeypatch):
    "Training after `state_dict()` reaches none of its tensors, in buckets of one site and of many; what is loaded from it goes on as from a file."
    if alone: monkeypatch.setattr('sparse_workbench.sparsifier.buckets', lambda ss: [Bucket([s], [s.numel]) for s in ss])
    straight, model = made(method), made(method)
    train(straight, range(5))
    train(model, range(3))
    if when != 'attached':
        state, model = [copy.deepcopy(x.state_dict()) for x in model[:3]], made(method)
        model[2].detach()
        for x, s in zip(model[:3], state): x.load_state_dict(s)
    state = model[2].state_dict()
    others = [copy.deepcopy(x.state_dict()) for x in model[:2]]
    before = copy.deepcopy(state)
    if when != 'attached': model[2].attach(model[1])
    train(model, range(3, 6))
    for n, there in before['sites'].items():
        assert_same({k: v for k, v in there.items() if isinstance(v, Tensor)}, {k: v for k, v in state['sites'][n].items() if isinstance(v, Tensor)})
        assert_same(there['stats'], state['sites'][n]['stats'])
    for x, s in zip(model[:3], (*others, state)): x.load_state_dict(s)
    train(model, range(3, 5))
    assert_same(snapshot(straight), snapshot(model))


@pytest.mark.parametrize('p', [nm(2, 4, axis='out'), transposable(2, 4)])
def test_a_group_does_not_reach_from_one_group_of_a_convolution_into_the_next(p):
    for flow in (cut, ste, sr_ste(1e-2)):
        model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2))
        opt = torch.optim.SGD(model.parameters(), .1)
        with pytest.raises(ValueError, match=r"0.weight is a convolution in 2 groups of 6 outputs, .*6 is no multiple of 4: .*ignore=\['0.weight'\]"): Sparsifier(sites(model), pattern=p, flow=flow).attach(opt)
        assert not opt._optimizer_step_pre_hooks and model[0].weight.all()
    for fits in (nn.Conv2d(8, 12, 3), nn.Conv2d(8, 16, 3, groups=2)):
        model = nn.Sequential(fits)
        sp = Sparsifier(sites(model), pattern=p).attach(torch.optim.SGD(model.parameters(), .1))
        assert sp.report().total['achieved'] == .5


def test_the_layer_that_does_not_fit_is_named():
    "At attach, though its first mask would come later; and by a rule of its own."
    model = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 8))
    opt = torch.optim.SGD(model.parameters(), .1)
    for when in (every(1), once(100)):
        with pytest.raises(ValueError, match=r'1.weight: .* needs a multiple of 4 along in, but the weight \(8, 10\) has 10'): Sparsifier(sites(model), pattern='2:4', when=when).attach(opt)
    with pytest.raises(ValueError, match='1.weight: .* needs a multiple of 4 along in'): keep_best(magnitude)(sites(model)[1], nm(2, 4))
    assert not opt._optimizer_step_pre_hooks and all(s.weight.all() for s in sites(model))


def test_detach_and_attach_again():
    model, opt, sp, loss = out = made('sr_ste')
    train(out, range(2))
    seen = [s.weight.clone() for s in sp.sites]
    sp.detach()
    assert all(torch.equal(s.weight, w) for s, w in zip(sp.sites, seen)) and all(s.latent is None for s in sp.sites)
    train(out, range(2, 4))
    assert sp.t == 2
    sp.attach(opt)
    train(out, range(4, 6))
    assert sp.t == 4 and sp.report().total['achieved'] == .5


def test_attaching_again_and_again_moves_no_weight():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 8))
    opt = torch.optim.SGD(model.parameters(), .1)
    sp = Sparsifier(sites(model, ignore=None), pattern='2:4', flow=s_ste).attach(opt)
    for _ in range(3): model(torch.randn(4, 16)).square().sum().backward(); opt.step(); opt.zero_grad()
    assert all('scale' in s.stats for s in sp.sites)
    sp.detach()
    weights = [s.weight.clone() for s in sp.sites]
    for _ in range(3): sp.attach(opt).detach()
    for s, w in zip(sp.sites, weights): torch.testing.assert_close(s.weight, w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('broken, words', [
    (lambda state, model: model.state_dict(), "no state of a sparsifier, it has no 'flow', 'pattern'"), (lambda state, model: {}, 'no state of a sparsifier'),
    (lambda state, model: state['sites']['0.weight'].update(latent=torch.zeros(3, 3)) or state, r'its latent in the checkpoint \(3, 3\)'),
    (lambda state, model: state['sites']['0.weight'].update(mask=torch.zeros(8, 16)) or state, 'the mask of 0.weight in the checkpoint is torch.float32: it is damaged')])
def test_a_state_that_is_none_is_refused(broken, words):
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    sp = Sparsifier(sites(model, ignore=None), pattern='2:4', flow=sr_ste()).attach(torch.optim.SGD(model.parameters(), .1))
    before = sp.sites[0].mask.clone()
    with pytest.raises(ValueError, match=words): sp.load_state_dict(broken(sp.state_dict(), model))
    assert sp.t == 0 and torch.equal(sp.sites[0].mask, before)


def test_once_later_than_the_start():
    model, opt, sp, loss = out = made(lambda ss: Sparsifier(ss, sparsity=.5, when=once(2)))
    achieved = []
    train(out, look=lambda sp: achieved.append(sp.report().total['achieved']))
    assert achieved == [0, .5, .5, .5, .5, .5]


# Two processes

def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def worker(rank: int, world: int, port: int, jobs: list[str], folder: str) -> None:
    "One of the processes: every job in turn, its result or its error in a file of its own."
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=world)
    try:
        for j in jobs:
            kind, _, method = j.partition(' ')
            torch.save(JOBS[kind](method, rank, world), f'{folder}/{j} {rank}.pt')
        dist.barrier()
    finally: dist.destroy_process_group()


SHARDED = dict(
    static=lambda ss: Sparsifier(ss, keep_best(random), pattern='per_row', sparsity=.75), sr_ste=METHODS['sr_ste'],
    per_row=lambda ss: Sparsifier(ss, pattern='per_row', sparsity=cubic(0, .75, 4), when=every(4)), decay=METHODS['decay'],
    awkward=lambda ss: Sparsifier(ss, pattern='per_row', sparsity=.55), half=METHODS['nm'], odd=lambda ss: Sparsifier(ss, pattern='per_row', sparsity=cubic(0, .7, 4)),
    s_ste=METHODS['s_ste'], squares=METHODS['squares'],
)
WIDE, ODD = (16, 32, 24, 8), (16, 5, 1)     # of ODD, the second process has two rows of the first layer and none of the last


def loop(model: nn.Module, opt: torch.optim.Optimizer, parts: int = 1, part: int = 0) -> None:
    for t in range(6):
        x = data(t).chunk(parts)[part]
        out = model(x)
        (out - x[:, :out.size(1)].sin()).square().mean().backward()
        opt.step()
        opt.zero_grad()


def full(t: Tensor) -> Tensor: return (t.full_tensor() if hasattr(t, 'full_tensor') else t).detach().clone()


def rows_of(s: Site, t: Tensor) -> Tensor: # a local tensor of a sharded site, whole
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, t)
    return torch.cat(parts) if hasattr(s.parameter, 'full_tensor') else t


def ddp(method: str, rank: int, world: int) -> dict:
    model = mlp(WIDE)
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    sp = METHODS[method](sites(model)).attach(opt)
    loop(nn.parallel.DistributedDataParallel(model), opt, world, rank)
    return snapshot((model, opt, sp, None))


def sharded(sizes: tuple[int, ...] = WIDE) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model = mlp(sizes)
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    for layer in model[::2]: fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp(method: str, rank: int, world: int) -> dict:
    model = sharded(ODD if method == 'odd' else WIDE)
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    sp = SHARDED[method](sites(model)).attach(opt)
    loop(model, opt, world, rank)
    out = {k: full(v) for k, v in model.state_dict().items()}
    return out | {f'{s.name} ({k})': rows_of(s, getattr(s, k)) for s in sp.sites for k in ('mask', 'latent') if getattr(s, k) is not None}


def shards(method: str, rank: int, world: int) -> dict:
    "One-shot pruning of shards: the weights, or what was said."
    sizes = ODD if method.startswith('odd') else WIDE
    model = sharded(sizes)
    try: prune(model, **PRUNED[method])
    except ValueError as e: return dict(error=str(e), untouched=all(full(a).equal(b) for a, b in zip(model.parameters(), mlp(sizes).parameters())))
    return {k: full(v) for k, v in model.state_dict().items()}


JOBS = dict(ddp=ddp, fsdp=fsdp, shards=shards)
PRUNED: dict[str, dict] = dict(nm=dict(pattern='2:4'), per_row=dict(sparsity=.75, pattern='per_row'), awkward=dict(sparsity=.55, pattern='per_row'),
                               random=dict(sparsity=.75, pattern='per_row', score=random), odd=dict(sparsity=.5, pattern='per_row'), odd_random=dict(sparsity=.3, pattern='per_row', score=random),
                               out=dict(pattern=nm(2, 4, 'out')), balanced=dict(sparsity=.5, pattern=block(4, balanced=True)),
                               unstructured=dict(sparsity=.5), all=dict(sparsity=.5, pattern='per_row', allocate=global_), col=dict(sparsity=.5, pattern='col'))
REFUSED = ('unstructured', 'all', 'col')
DDP = ('gmp', 'sr_ste', 'static', 'gmp_global')


def near(a: dict, b: dict) -> None:
    "Masks equal in every bit; weights to the rounding of a mean over ranks."
    assert a.keys() == b.keys()
    for k in a:
        if a[k].dtype == torch.bool: assert torch.equal(a[k], b[k]), f'{k} differs at {int((a[k] != b[k]).sum())} places'
        else: assert torch.allclose(a[k], b[k], atol=1e-6), f'{k} differs by {(a[k] - b[k]).abs().max():g}'


def compare(job: str, got: dict) -> None:
    "What a rank made of a job against one process."
    kind, _, method = job.partition(' ')
    sgd = partial(torch.optim.SGD, lr=.1, momentum=.9)
    if kind == 'shards' and method in REFUSED:
        assert got['untouched'] and 'compares across shards: use a pattern inside rows, such as nm(2, 4) or per_row()' in got['error']
    elif kind == 'shards':
        model = mlp(ODD if method.startswith('odd') else WIDE)
        prune(model, **PRUNED[method])
        assert 'error' not in got, got
        assert_same(dict(model.state_dict()), got)
    else:
        one = made((METHODS if kind == 'ddp' else SHARDED)[method], sgd, partial(mlp, ODD if method == 'odd' else WIDE))
        loop(*one[:2])
        near(got, snapshot(one))


def test_two_processes_equal_one(tmp_path):
    "DDP and FSDP2 train, and shards are pruned, as one process would; one test, because starting the processes takes longer than all the rest."
    jobs = [f'{kind} {m}' for kind, methods in (('ddp', DDP), ('fsdp', SHARDED), ('shards', PRUNED)) for m in methods]
    torch.multiprocessing.spawn(worker, (2, free_port(), jobs, str(tmp_path)), nprocs=2)
    wrong = []
    for j in jobs:
        first, second = (torch.load(tmp_path / f'{j} {rank}.pt', weights_only=True) for rank in range(2))
        try:
            if 'error' not in first: assert_same(first, second)
            compare(j, first)
        except AssertionError as e: wrong.append(f'{j}: {str(e).splitlines()[0]}')
    assert not wrong, 'two processes differ from one:\n' + '\n'.join(wrong)
