"""Defects seen in other pruning tools, one test each, so that they are not repeated here."""
import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from sparse_workbench import patterns, scores
from sparse_workbench.allocation import explicit, global_, owl
from sparse_workbench.core import Site, sites, slabs
from sparse_workbench.flows import cut, sr_ste, ste
from sparse_workbench.oneshot import prune
from sparse_workbench.patterns import Pattern, block, head, nm, pattern, per_row, unstructured
from sparse_workbench.rules import keep_best
from sparse_workbench.schedules import cubic
from sparse_workbench.scores import gradient, magnitude, random, saliency, taylor, wanda
from sparse_workbench.sparsifier import Sparsifier
from sparse_workbench.stats import Calibration, class_loss, collect, next_token_loss
from sparse_workbench.testing import check_mask, convnet, mlp, planted, seeded, tied, tiny_gpt2


def state(model: nn.Module) -> dict: return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    with seeded(seed): return torch.randn(shape)


def images(dims: int = 2, n: int = 2) -> Calibration:
    return Calibration([(noise(4, 4, *[8] * dims, seed=k), torch.arange(4)) for k in range(n)], 'noise', class_loss)


# Exactness

@pytest.mark.parametrize('dims', [0, 1, 2, 3])
def test_nm_fails_on_linear_and_prunes_nothing_when_scores_tie(dims):
    model = nn.Sequential(nn.Linear(8, 6) if not dims else [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](8, 6, 3))
    nn.init.constant_(model[0].weight, .1)
    r = prune(model, pattern='2:4')
    assert r.total['achieved'] == .5
    check_mask(model[0].weight != 0, nm(2, 4))


@pytest.mark.parametrize('sparsity, zeros', [(.5, 50), (.9, 90), (.01, 1), (.99, 99)])
def test_a_hundred_weights_lose_one_too_few(sparsity, zeros):
    for w in (noise(10, 10), torch.ones(10, 10)):
        model = nn.Sequential(nn.Linear(10, 10))
        model[0].weight.data = w
        assert prune(model, sparsity).rows[0]['zeros'] == zeros == int((model[0].weight == 0).sum())


def test_report_says_what_was_asked_and_not_what_happened():
    model = nn.Sequential(nn.Linear(10, 10))
    nn.init.zeros_(model[0].weight)
    r = prune(model, .3)
    assert (r.rows[0]['asked'], r.rows[0]['achieved']) == (.3, 1.)


def test_wanda_compares_the_whole_layer():
    "Per output row, as in the paper: no row is emptied although one has tiny weights."
    model = nn.Sequential(nn.Linear(16, 4))
    model[0].weight.data[0] *= 1e-3
    prune(model, .5, score=wanda, pattern=per_row(), calibration=[noise(32, 16)])
    assert ((model[0].weight != 0).sum(1) == 8).all()


def test_owl_swaps_block_and_layer():
    "The authors' code gives one ratio to all layers of a block."
    gpt, ids = tiny_gpt2(3), torch.arange(24).reshape(2, 12)
    ss = sites(gpt)
    collect(gpt, ss, [ids], ['in_norm'])
    for k, s in enumerate(ss): s.stats['in_norm'][0, :1 + k // 4] *= 30
    ratios = owl(ss, per_row(), magnitude, .6)
    blocks = [{round(ratios[s.name], 2) for s in ss if f'.h.{k}.' in s.name} for k in range(3)]
    assert all(len(b) == 1 for b in blocks) and len(set.union(*blocks)) > 1


def test_two_to_four_means_zeros_here_and_kept_there():
    w = torch.tensor([[4., 3, 2, 1] * 2])
    for p, rows in (('1:4', '10001000'), ('3:4', '11101110')):
        assert ''.join(str(int(k)) for k in pattern(p).select(w)[0]) == rows
        assert f'keeps {p[0]} of 4 along in' in repr(pattern(p))
    assert nm(2, 4, axis='out').select(noise(8, 3)).reshape(2, 4, 3).sum(1).eq(2).all()


# Silent failures

def test_unknown_layer_in_a_table_is_only_warned_about():
    model = mlp()
    before = state(model)
    with pytest.raises(ValueError, match="'body' means no site; there are 0.weight, 2.weight"): prune(model, allocate={'*': .5, 'body': .9})
    with pytest.raises(ValueError, match="no entry for 4.weight: add it"): prune(model, allocate={'0': .5, '2': .5})
    with pytest.raises(ValueError, match='did you mean 0.9'): prune(model, allocate={'*': 90})
    assert same(before, state(model))


@pytest.mark.parametrize('how', [dict(include='transformer.h.0.attn.c_atn'), dict(ignore='c_atn'), dict(include=['c_fc', 'c_atn'])], ids=str)
def test_a_typing_error_leaves_a_layer_dense(how):
    gpt = tiny_gpt2()
    with pytest.raises(ValueError, match=r"c_atn' matches no prunable weight; did you mean '.*c_attn'"): prune(gpt, .5, **how)


def test_nothing_matched_and_nobody_said():
    with pytest.raises(ValueError, match='Conv2d.*matches no prunable weight.*The model has 0, 2, 4'): prune(mlp(), .5, include=nn.Conv2d)
    with pytest.raises(ValueError, match='no Linear, Conv or expert weights at all'): prune(nn.Sequential(nn.Embedding(4, 4)), .5)
    with pytest.raises(ValueError, match=r'head.weight \(output head\)'): prune(nn.ModuleDict(dict(head=nn.Linear(4, 4))), .5)
    with pytest.raises(ValueError, match='0.weight .ignored.'): prune(nn.Sequential(nn.Linear(4, 4)), .5, ignore='0')


def test_lists_of_what_there_is_are_kept_by_hand():
    "Every name in an error message works."
    with pytest.raises(ValueError) as e: pattern('?')
    offer = str(e.value).partition('use ')[2]
    names = re.findall(r"'([^']+)'", offer) + offer.partition(", '")[0].split(', ')
    assert len(names) >= 10
    for n in names: assert isinstance(pattern(n), Pattern)
    net, cal = convnet(), images()
    with pytest.raises(ValueError) as e: collect(net, sites(net), cal, ['?'])
    for n in str(e.value).partition('use ')[2].split(', '):
        collect(net, sites(net), cal, [n])
    every = [f for f in vars(scores).values() if hasattr(f, 'needs') and f is not scores.momentum]
    assert len(every) >= 9
    for f in every: assert prune(convnet(), .5, score=f, calibration=cal).total['zeros'] == sum(round(.5 * s.numel) for s in sites(net)), f.__name__
    with pytest.raises(KeyError, match='has no momentum: train with'): prune(net, .5, score=scores.momentum)


@pytest.mark.parametrize('make', [lambda m, o: prune(m, pattern='2:4', allocate=global_),
                                 lambda m, o: Sparsifier(sites(m), pattern='2:4', allocate=global_).attach(o)], ids=['prune', 'Sparsifier'])
def test_an_option_is_accepted_and_fails_half_way(make):
    model = mlp()
    opt, before = torch.optim.SGD(model.parameters(), .1), state(model)
    with pytest.raises(ValueError, match='use allocate=uniform'): make(model, opt)
    assert same(before, state(model)) and not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks


def test_patterns_that_differ_print_alike():
    "The checkpoint and the report know a pattern by what it prints."
    several = [unstructured(), per_row(), nm(2, 4), nm(2, 4, 'out'), nm(2, 4, tail='pad'), nm(2, 4, layout='flat'), block(4), block(4, balanced=True),
               block(4, tail='pad'), block(4, tail='dense'), head(4), head(4, 'in'), Pattern((2, 2)), Pattern((4, 4), (1, -1))]
    assert len({repr(p) for p in several}) == len(several)


@pytest.mark.parametrize('sparsity', [90, 50, 1.5, -.1, float('nan'), '0.5', None, True])
def test_ninety_is_not_a_fraction(sparsity):
    model = mlp()
    before = state(model)
    hint = f'did you mean {sparsity / 100:g}' if sparsity in (90, 50) else 'between 0 and 1|for example sparsity=0.5'
    for f in (lambda: prune(model, sparsity), lambda: Sparsifier(sites(model), sparsity=sparsity)):
        with pytest.raises((ValueError, TypeError), match=hint): f()
    assert same(before, state(model))


def test_the_loss_never_reaches_the_weights():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.used, self.idle, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x): return self.out(self.used(x))
    net = Net()
    before, cal = state(net), Calibration([(noise(3, 4), torch.arange(3))], loss=class_loss)
    for score in (wanda, saliency, taylor):
        with pytest.raises(ValueError, match=r"for idle.weight: .*ignore=\['idle.weight'\]"): prune(net, .5, score=score, calibration=cal)
    assert same(before, state(net))
    assert prune(net, .5, score=wanda, calibration=cal, ignore='idle').left == {'idle.weight': 'ignored'}


def test_a_criterion_without_its_data():
    with pytest.raises(ValueError, match='wanda needs in_norm: pass calibration=batches'): prune(mlp(), .5, score=wanda)
    with pytest.raises(ValueError, match='owl needs in_norm'): prune(mlp(), .5, allocate=owl)
    with pytest.raises(ValueError, match='at least one batch'): prune(mlp(), .5, score=wanda, calibration=[])
    with pytest.raises(ValueError, match=r'Calibration\(batches, loss=f\)'): prune(mlp(), .5, score=saliency, calibration=[noise(2, 16)])


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('score', [magnitude, random, wanda])
def test_nan_compares_with_nothing(bad, score):
    model = mlp()
    model[2].weight.data[3, 5] = bad
    before = state(model)
    with pytest.raises(ValueError, match=r'2.weight \(24, 32\) holds 1 NaN or infinite weights.*ignore='):
        prune(model, .5, score=score, calibration=[noise(4, 16)])
    assert all(a.equal(b) or a.isfinite().logical_not().any() for a, b in zip(before.values(), state(model).values()))
    if score is not wanda: assert prune(model, .5, score=score, ignore='2').total['sites'] == 2


def test_nan_appears_while_training():
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), 1.)
    Sparsifier(sites(model), sparsity=cubic(0, .9, 10)).attach(opt)
    model[0].weight.grad = torch.full_like(model[0].weight, float('nan'))
    with pytest.raises(ValueError, match='0.weight .* NaN'): opt.step()


# Models as they are

@pytest.mark.parametrize('lead', [(), (5,), (2, 5), (2, 3, 5)], ids=['one sample', '2-D', '3-D', '4-D'])
def test_wanda_takes_only_two_axes(lead):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    x = noise(*lead, 8)
    with torch.no_grad(): want = (model[0].weight.abs() * x.reshape(-1, 8).norm(dim=0)).topk(4).indices
    prune(model, .5, score=wanda, pattern=per_row(), calibration=[x])
    assert torch.equal((model[0].weight != 0).nonzero()[:, 1].reshape(6, 4), want.sort().values)


@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('batched', [True, False], ids=['batch', 'one sample'])
def test_wanda_takes_no_convolution(dims, groups, batched):
    "By definition: what every weight sees, found by asking the convolution itself, one tap at a time."
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](2, 4, 2, stride=2, padding=1, groups=groups, bias=False)
    x, ss = noise(*[3] * batched, 2, *[5] * dims), sites(conv)
    collect(conv, ss, [x], ['in_norm'])
    got = ss[0].stats['in_norm'].expand(conv.weight.shape)
    for tap in torch.eye(got[0].numel()).reshape(-1, *got[0].shape):
        conv.weight.data[:] = tap
        seen = conv(x if batched else x[None]).square().sum((0, *range(2, dims + 2))) / (3 if batched else 1)
        assert torch.allclose(got[:, tap.bool()].flatten(), seen.sqrt(), rtol=1e-5)


def test_tied_weights_are_pruned_twice():
    model = tied()
    r = prune(model, .5, score=wanda, calibration=[noise(4, 8)])
    assert [(x['name'], x['params'], x['zeros']) for x in r.rows] == [('first.weight', 64, 32), ('last.weight', 32, 16)]
    assert model.second.weight is model.first.weight and (model.first.weight == 0).sum() == 32


@pytest.mark.parametrize('name', ['first', 'second'])
def test_a_tied_weight_ignored_under_one_name_is_pruned_under_the_other(name):
    model = tied()
    before = model.first.weight.clone()
    r = prune(model, .5, ignore=name)
    assert torch.equal(model.first.weight, before) and [x['name'] for x in r.rows] == ['last.weight'] and f'{name}.weight' in r.left


def test_a_head_tied_to_the_embedding_is_pruned():
    gpt = tiny_gpt2()
    r = prune(gpt, .5)
    assert gpt.lm_head.weight is gpt.transformer.wte.weight and gpt.lm_head.weight.all()
    assert r.left == {'lm_head.weight': 'output head'}


def test_masks_of_torch_prune_are_overwritten_in_vain():
    model = mlp()
    torch.nn.utils.prune.l1_unstructured(model[0], 'weight', .3)
    before = state(model)
    with pytest.raises(ValueError, match='0.weight is computed from other tensors: end the parametrization first, with torch.nn.utils.prune.remove'): prune(model, .5)
    assert same(before, state(model))
    torch.nn.utils.prune.remove(model[0], 'weight')
    assert prune(model, .5).rows[0]['achieved'] == .5


@pytest.mark.parametrize('how', [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm,
                                 lambda m: torch.nn.utils.prune.l1_unstructured(m, 'weight', .3)], ids=['weight_norm', 'spectral_norm', 'torch.prune'])
def test_a_parametrized_layer_bars_the_whole_model(how):
    "It is refused, and whoever leaves it out can prune the rest."
    model = mlp()
    how(model[0])
    with pytest.raises(ValueError, match='0.weight is computed from other tensors'): sites(model)
    assert [s.name for s in sites(model, ignore='0')] == ['2.weight', '4.weight']
    assert [s.name for s in sites(model, include=['2', '4'])] == ['2.weight', '4.weight']


def test_conv1d_of_transformers_is_pruned_along_the_wrong_axis():
    "GPT-2 stores (in, out); a group of 2:4 runs along what one output sums over, and Wanda's rows are outputs."
    gpt, ids = tiny_gpt2(), torch.arange(24).reshape(2, 12)
    prune(gpt, pattern='2:4')
    for s in sites(gpt):
        check_mask(s.weight != 0, nm(2, 4))
        assert (s.parameter.t().reshape(-1, 4) != 0).sum(1).max() == 2
    gpt = tiny_gpt2()
    prune(gpt, .5, score=wanda, pattern=per_row(), calibration=[ids])
    fc = gpt.transformer.h[0].mlp.c_fc.weight
    assert fc.shape == (16, 64) and ((fc != 0).sum(0) == 8).all()


def experts_of(kind: str) -> tuple[nn.Module, nn.Module]: # model, and one of its expert layers
    import transformers as hf
    small = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
                 num_experts_per_tok=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    if kind == 'llama4': config = hf.Llama4TextConfig(**small, intermediate_size_mlp=24, head_dim=8, interleave_moe_layer_step=1)
    else: config = dict(mixtral=hf.MixtralConfig, gpt_oss=hf.GptOssConfig)[kind](**small, head_dim=8)
    with seeded(): model = hf.AutoModelForCausalLM.from_config(config)
    for p in model.parameters(): # some expert weights start uninitialised or at zero
        if p.ndim == 3: p.data = noise(*p.shape) / 4
    return model, next(m for m in model.modules() if type(m).__name__.endswith('Experts'))


@pytest.mark.parametrize('kind', ['mixtral', 'gpt_oss', 'llama4'])
def test_experts_stay_dense_or_lose_inputs_for_outputs(kind):
    "Every expert is a weight of its own, (out, in) whichever way it is stored; routers stay."
    model, experts = experts_of(kind)
    ss = sites(model)
    shapes = {s.name.rpartition('.')[2]: tuple(s.shape) for s in ss if '[' in s.name}
    assert shapes == {f'gate_up_proj[{i}]': (48, 16) for i in range(4)} | {f'down_proj[{i}]': (16, 24) for i in range(4)}
    assert not any('router' in s.name or s.name.endswith('gate.weight') for s in ss if '[' not in s.name) or kind == 'llama4'
    r = prune(model, pattern='2:4', include='*experts*')
    assert r.total['sites'] == 8 and r.total['achieved'] == .5
    for s in sites(model, include='*experts*'): check_mask(s.weight != 0, nm(2, 4))
    assert model(torch.arange(6)[None]).logits.isfinite().all()
    pick = sites(model, include='*experts*')[0]
    pick.weight[:] = 0
    assert not experts.gate_up_proj[0].any() and experts.gate_up_proj[1].any()


def test_wanda_of_experts_says_that_it_cannot():
    model, _ = experts_of('mixtral')
    with pytest.raises(ValueError, match=r'saw no input for .*experts.*gate_up_proj\[0\]'): prune(model, .5, score=wanda, calibration=[torch.arange(6)[None]])


@pytest.mark.parametrize('how', [dict(), dict(kdim=6, vdim=4)], ids=['one projection', 'three projections'])
def test_attention_of_torch_is_left_out(how):
    mha = nn.MultiheadAttention(8, 2, batch_first=True, **how)
    ss = sites(mha)
    assert [s.name for s in ss] == (['q_proj_weight', 'k_proj_weight', 'v_proj_weight'] if how else ['in_proj_weight']) + ['out_proj.weight']
    r = prune(mha, .5)
    assert r.total['achieved'] == .5
    q, k, v = noise(2, 5, 8), noise(2, 3, how.get('kdim', 8), seed=1), noise(2, 3, how.get('vdim', 8), seed=2)
    prune(mha, .75, score=wanda, pattern=per_row(), calibration=[(q, k, v)], ignore='out_proj')
    assert mha(q, k, v)[0].isfinite().all()
    with pytest.raises(ValueError, match='saw no input for out_proj.weight'): prune(mha, .75, score=wanda, calibration=[(q, k, v)])


def test_frozen_weights_are_thawed():
    model = convnet()
    for p in model[0].parameters(): p.requires_grad_(False)
    prune(model, .5, score=saliency, calibration=images())
    assert [p.requires_grad for p in model[0].parameters()] == [False, False] and (model[0].weight == 0).sum() == model[0].weight.numel() // 2
    with pytest.raises(ValueError): prune(model, .5, score=saliency, calibration=[images().batches[0][0]])
    assert not model[0].weight.requires_grad
    frozen = model[0].weight.clone()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .1)
    with pytest.raises(ValueError, match='0.weight is not among the optimizer'): Sparsifier(sites(model), sparsity=.5).attach(opt)
    opt = torch.optim.SGD(model.parameters(), .1)
    Sparsifier(sites(model), sparsity=.75).attach(opt)
    x, y = images().batches[0]
    class_loss(model, (x, y)).backward()
    opt.step()
    assert torch.equal(model[0].weight[model[0].weight != 0], frozen[model[0].weight != 0]) and (model[0].weight == 0).sum() == .75 * frozen.numel()


@pytest.mark.parametrize('score', [magnitude, wanda, saliency, taylor, scores.fisher, scores.grasp, scores.synflow, scores.ria], ids=lambda f: f.__name__)
@pytest.mark.parametrize('training', [True, False])
def test_looking_at_a_model_changes_it(score, training):
    "Mode, running statistics, gradients, hooks and random state are as before; only weights outside the masks are zero."
    model, cal = convnet(), images()
    model.insert(6, nn.Dropout(.5))
    model.train(training)
    model[1].eval()
    for p in model.parameters(): p.grad = torch.ones_like(p)
    modes, before, chance = [m.training for m in model.modules()], state(model), torch.random.get_rng_state()
    with torch.no_grad(): prune(model, .5, score=score, calibration=cal)
    assert [m.training for m in model.modules()] == modes and torch.equal(chance, torch.random.get_rng_state())
    assert all(p.grad is not None and p.grad.eq(1).all() and p.requires_grad and p.is_leaf for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    after, names = state(model), {s.name for s in sites(model)}
    for k in before: assert torch.equal(before[k][after[k] != 0], after[k][after[k] != 0]) if k in names else torch.equal(before[k], after[k]), k


@pytest.mark.parametrize('score', [magnitude, random])
def test_weights_without_data(score):
    with torch.device('meta'): model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match='0.weight is on the meta device: load its values before pruning'): prune(model, .5, score=score)
    with pytest.raises(ValueError, match='0.weight is on the meta device'):
        Sparsifier(sites(model), keep_best(score), sparsity=.5).attach(torch.optim.SGD(model.parameters(), .1))


def test_weights_without_a_shape():
    with pytest.raises(ValueError, match='0.weight has no shape yet: run the lazy model on one batch first'): prune(nn.Sequential(nn.LazyLinear(4)), .5)


@pytest.mark.parametrize('p', [unstructured(), per_row(), nm(2, 4), nm(2, 4, 'out'), block(2), patterns.row(), patterns.channel()], ids=repr)
def test_memory_order_decides_what_is_pruned(p):
    "Weights in channels_last order, transposed, or every second element of a larger tensor."
    plain, other = convnet(), convnet().to(memory_format=torch.channels_last)
    for m in (plain, other): prune(m, None if p.sparsity else .5, pattern=p, include=nn.Conv2d)
    assert other[3].weight.is_contiguous(memory_format=torch.channels_last) and same(state(plain), state(other))
    w, wide = noise(8, 12), torch.full((16, 12), 7.)
    for view in (w.t().contiguous().t(), wide[::2].copy_(w)):
        layer, flat = nn.Sequential(nn.Linear(12, 8)), nn.Sequential(nn.Linear(12, 8))
        layer[0].weight, flat[0].weight = nn.Parameter(view), nn.Parameter(w.clone())
        assert not layer[0].weight.is_contiguous()
        for m in (layer, flat): prune(m, None if p.sparsity else .5, pattern=p)
        assert torch.equal(layer[0].weight, flat[0].weight)
    assert (wide[1::2] == 7).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize('score', [magnitude, random, wanda, saliency, taylor, scores.synflow, scores.ria], ids=lambda f: f.__name__)
def test_half_precision_on_a_processor(dtype, score):
    model = convnet().to(dtype)
    cal = Calibration([(x.to(dtype), y) for x, y in images().batches], loss=class_loss)
    r = prune(model, .7, score=score, calibration=cal)
    assert {p.dtype for p in model.parameters()} == {dtype} and r.total['zeros'] == sum(round(.7 * s.numel) for s in sites(model))
    assert prune(model, .9, score=score, calibration=cal, allocate=global_).total['zeros'] == round(.9 * sum(s.numel for s in sites(model)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('flow', [cut, ste, sr_ste(1e-3)], ids=repr)
def test_half_precision_in_training(dtype, flow):
    gpt = tiny_gpt2().to(dtype)
    opt = torch.optim.AdamW(gpt.parameters(), 1e-2, eps=1e-3)
    sp = Sparsifier(sites(gpt), pattern='2:4', flow=flow).attach(opt)
    for _ in range(3):
        next_token_loss(gpt, torch.arange(24).reshape(2, 12)).backward()
        opt.step()
        opt.zero_grad()
    assert sp.report().total['achieved'] == .5 and all(s.weight.dtype == dtype and s.weight.isfinite().all() for s in sp.sites)
    for s in sp.sites: check_mask(s.mask, nm(2, 4))


# Growing and saving

def test_growth_reads_masked_gradients():
    "A rule that grows by gradient sees the dense gradient, also of weights that are gone, and the optimizer does not."
    model, seen = mlp(), {}
    opt = torch.optim.SGD(model.parameters(), 0.)
    def rule(site: Site, p: Pattern) -> None:
        if site.grad is not None: seen[site.name] = gradient(site).clone()
        keep_best(magnitude)(site, p)
    sp = Sparsifier(sites(model), rule, sparsity=.8, when=lambda t: True).attach(opt)
    model(noise(32, 16)).square().mean().backward()
    dense, gone = {s.name: s.parameter.grad.clone() for s in sp.sites}, {s.name: ~s.mask for s in sp.sites}
    opt.step()
    for s in sp.sites:
        assert torch.equal(seen[s.name], dense[s.name].abs()) and seen[s.name][gone[s.name]].any()
        assert not s.parameter.grad[gone[s.name]].any() and s.grad is None


@pytest.mark.parametrize('flow', [cut, sr_ste(1e-3)], ids=repr)
@pytest.mark.parametrize('attached', [True, False], ids=['attached', 'detached'])
def test_a_sparse_model_can_no_longer_be_copied_or_pickled(flow, attached):
    model = mlp()
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    sp = Sparsifier(sites(model), sparsity=.5, flow=flow).attach(opt)
    for _ in range(2):
        model(noise(8, 16)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    if not attached: sp.detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(state(model), state(twin)) and torch.equal(model(noise(3, 16)), twin(noise(3, 16)))
    copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict(), sp.state_dict()], file)
    file.seek(0)
    assert torch.load(file, weights_only=True)[2]['t'] == 2


def test_what_a_report_loads_from_elsewhere():
    text = prune(mlp(), .5)._repr_html_()
    assert 'http' not in text and '<script' not in text and 'src=' not in text


def test_slabs_of_nothing():
    "A slab never asks for more rows than there are, and covers each once."
    for shape in ((1, 1), (7, 3), (5, 2, 3, 3)):
        for rows, weights in ((1, 1), (2, 5), (4, 10**6)):
            parts = list(slabs(planted(noise(*shape)), rows, weights))
            assert [p.rows[0] for p in parts] == [0, *[p.rows[1] for p in parts[:-1]]] and parts[-1].rows[1] == shape[0]
            assert all((b - a) % rows == 0 for a, b in (p.rows for p in parts[:-1]))


def test_a_table_by_type_and_expression():
    net = convnet()
    how = explicit({nn.Linear: .25, 're:0.*': .5, '*': .75})
    assert list(how(sites(net), unstructured(), magnitude, 0.).values()) == [.5, .75, .25]
