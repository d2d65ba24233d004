"Export and advice: the right kernels or an honest no, nothing half-changed, times that were really measured."
import copy
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparse_workbench import deploy
from sparse_workbench.core import sites
from sparse_workbench.deploy import Advice, Candidate, advise, best, candidates, difference, export, race, watch
from sparse_workbench.formats import load_sparse, masks_from_zeros, save_sparse
from sparse_workbench.kernels.linear import KERNELS, Kernel, SparseLinear, choose, pack, register, unpack
from sparse_workbench.oneshot import prune
from sparse_workbench.patterns import pattern
from sparse_workbench.zoo import Llama, LlamaConfig

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason='no kernel for a CPU without MKL')


@pytest.fixture
def table():
    "The table of kernels, as it was before the test."
    before = KERNELS[:]
    yield KERNELS
    KERNELS[:] = before


def instant(name='instant', **how):
    "A kernel that is right and costs next to nothing to call: what the race must prefer. It remembers what it was given."
    twin, known = next(k for k in KERNELS if k.name == 'block twin'), {}
    def forward(x, values, index, shape, bias):
        key = x.data_ptr(), values.data_ptr()
        if key not in known: known[key] = x, values, twin.forward(x, values, index, shape, bias)
        return known[key][2].clone()
    return Kernel(name, 'block', forward, twin.grad_x, twin.grad_values, 'cpu', **how)


def network(pattern_='block16', sparsity=.9, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256, bias=False), nn.ReLU(), nn.Linear(256, 16)).to(dtype).eval()
    if pattern_: prune(model, None if pattern(pattern_).sparsity is not None else sparsity, pattern=pattern_)
    return model, torch.randn(64, 256, dtype=dtype)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


# What is chosen

def test_the_fastest_right_kernel_is_put_in(table):
    register(instant())
    model, x = network()
    plain, right = copy.deepcopy(model), model(x)
    model, told = export(model, x, budget=60, gain=1e-9)
    kinds = {r['name']: r['kernel'] for r in told.rows}
    assert kinds['0.weight'].startswith('instant') and kinds['2.weight'].startswith('instant')
    for n, m in model.named_children():
        if not isinstance(m, SparseLinear): continue
        assert torch.equal(unpack(m.packed), plain[int(n)].weight) and (m.bias is None) == (plain[int(n)].bias is None)
        kept = int((plain[int(n)].weight != 0).sum())
        assert kept <= m.values.numel() <= 2 * kept, 'equal times decide by chance, but never for a block that stores more than twice as much'
    assert torch.allclose(model(x), right, atol=1e-5)
    t = told.total
    assert t['sparse'] == 3 and t['bytes'] < .2 * t['dense_bytes'] and t['ms'] > 0 and told.whole['error'] < 1e-5
    frame = told.to_frame()
    assert list(frame.index) == [s.name for s in sites(plain)] and frame.loc['0.weight', 'tokens'] == 64
    assert 'samples/s' in told.note and all(r['name'] in repr(told) and r['name'] in told._repr_html_() for r in told.rows)


@needs_mkl
@pytest.mark.parametrize('how', ['unstructured', 'block32'])
def test_sparse_wins_on_a_cpu_at_98_percent(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 1024)).eval()
    prune(model, .98, pattern=how)
    x = torch.randn(64, 1024)
    right = model(x)
    model, told = export(model, x, budget=20)
    assert told.total['sparse'] == 2, told
    assert all(r['faster'] > 1.05 and 'mkl' in r['kernel'] and r['bytes'] < .1 * r['dense_bytes'] for r in told.rows), told
    assert torch.allclose(model(x), right, atol=1e-4)


def test_a_wrong_kernel_does_not_get_in(table):
    for wrong in (lambda x, v, i, s, b: x.new_full((len(x), s[0]), 3.), lambda x, v, i, s, b: x.new_full((len(x), s[0]), float('nan'))):
        register(replace(instant(), forward=wrong))
        model, x = network()
        plain = copy.deepcopy(model)
        model, told = export(model, x, budget=30, gain=1e-9)
        assert told.total['sparse'] == 0 and any('is wrong by' in r['reason'] for r in told.rows) and same(model, plain)


def test_no_gain_stays_dense_and_says_so(table):
    def slow(x, values, index, shape, bias):
        time.sleep(.02)
        return x.new_zeros(len(x), shape[0])
    twin = next(k for k in KERNELS if k.name == 'block twin')
    register(Kernel('slow', 'block', slow, twin.grad_x, twin.grad_values, 'cpu'))
    model, x = network()
    plain = copy.deepcopy(model)
    model, told = export(model, x, budget=30)
    for r in told.rows: assert r['kernel'] == 'dense' and r['dense_ms'] > 0 and (r['reason'].startswith('slow') and ' at 64 tokens' in r['reason'] and r['faster'] < 1), r
    assert same(model, plain) and '0 of 3 layers sparse' in told.note
    slower = replace(told)
    slower.whole = told.whole | dict(before=1., after=1.1)
    assert 'the whole model is not faster' in slower.note


def test_the_kernel_of_the_token_count(table):
    register(instant('few', most=8))
    for tokens, expected in ((8, True), (9, False)):
        model, _ = network()
        found, _ = candidates(model[0].weight, [tokens])
        assert any(x.kernel == 'few' for x in found) == expected


def test_reference_kernels_do_not_run(table):
    KERNELS[:] = [k for k in KERNELS if k.device is None]
    model, x = network()
    found, why = candidates(model[0].weight, [64])
    assert found == [] and "no kernel multiplies blocks of float32 on cpu" in why and "no kernel multiplies 'bitmask' on cpu" in why
    _, told = export(model, x, budget=2)
    assert all(r['kernel'] == 'dense' and r['dense_ms'] for r in told.rows)


def test_a_new_format_is_a_candidate(table):
    register(replace(instant('own bitmask'), format='bitmask', forward=next(k for k in KERNELS if k.name == 'bitmask twin').forward))
    found, _ = candidates(network('unstructured', .5)[0][0].weight, [64])
    assert 'own bitmask' in {str(x) for x in found}


def test_ties_are_settled_by_size_then_name():
    small, large, other = (Candidate('block', b, k, s) for b, k, s in (((16, 16), 'k', .1), ((32, 32), 'k', .2), ((64, 64), 'k', .1)))
    assert best([large, small], [1., 1.01]) == 1 and best([large, small], [1., 1.2]) == 0
    assert best([other, small], [1., 1.]) == best([small, other], [1., 1.]) ^ 1


def test_minus_zero_is_no_weight(table):
    register(instant())
    model, x = network()
    with torch.no_grad(): model[0].weight.masked_fill_(model[0].weight == 0, -0.)
    model, told = export(model, x, budget=30, gain=1e-9)
    assert told.rows[0]['sparsity'] == pytest.approx(.9, abs=.01) and model[0].values.numel() < .2 * 256 * 512


# What stays as it is

class Odd(nn.Module):
    "Layers that cannot be exchanged, each for a reason of its own."
    def __init__(self):
        super().__init__()
        self.plain, self.tied, self.other = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.other.weight = self.tied.weight
        self.hooked, self.patched, self.unused = (nn.Linear(64, 64) for _ in range(3))
        self.hooked.register_forward_hook(lambda m, a, y: y)
        self.patched.forward = self.patched.forward
        self.conv, self.attn = nn.Conv1d(64, 64, 1), nn.MultiheadAttention(64, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(64, 2, 64, dropout=0., batch_first=True)

    def forward(self, x, again=None):
        x = self.patched(self.hooked(self.other(self.tied(self.plain(x)))))
        x = self.attn(x, x, x)[0]
        return self.block(self.conv(x.transpose(1, 2)).transpose(1, 2))


def test_what_cannot_be_exchanged(table):
    register(instant())
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(2, 8, 64)
    prune(model, .9, pattern='block16', ignore=['conv'])
    right = model(x)
    model, told = export(model, dict(x=x), budget=30, gain=1e-9)
    why = {r['name']: r['reason'] for r in told.rows}
    assert not why['plain.weight'] and isinstance(model.plain, SparseLinear)
    for name, reason in {'tied.weight': 'its weight is also other.weight', 'hooked.weight': 'it has hooks', 'patched.weight': 'it has hooks', 'unused.weight': 'not reached by the example input',
                         'conv.weight': 'Conv1d has no sparse kernel', 'attn.in_proj_weight': 'MultiheadAttention has no sparse kernel',
                         'attn.out_proj.weight': 'NonDynamicallyQuantizableLinear has no', 'block.linear1.weight': 'TransformerEncoderLayer reads its weight itself'}.items():
        assert why[name].startswith(reason), (name, why[name])
    assert torch.allclose(model(x), right, atol=1e-4) and sum(isinstance(m, SparseLinear) for m in model.modules()) == 1


def test_flags_modes_and_shared_modules(table):
    register(instant())
    model, x = network()
    shared = nn.Linear(256, 256)
    prune(shared, .9, pattern='block16')
    model = nn.ModuleDict(dict(a=nn.Sequential(shared, nn.ReLU()), b=shared, c=model[0])).train()
    model['c'].weight.requires_grad_(False)
    model.forward = lambda x: model['c'](model['b'](model['a'](x)))
    model, told = export(model, x, budget=30, gain=1e-9)
    assert model['a'][0] is model['b'] and isinstance(model['b'], SparseLinear) and model.training and model['b'].training
    assert not model['c'].values.requires_grad and model['c'].bias.requires_grad and model['b'].values.requires_grad


def test_a_model_that_is_one_layer(table):
    register(instant())
    layer = network()[0][0]
    x = torch.randn(64, 256)
    model, told = export(layer, (x,), budget=30, gain=1e-9)
    assert isinstance(model, SparseLinear) and torch.allclose(model(x), layer(x), atol=1e-5)


# Errors change nothing

@pytest.mark.parametrize('error, words, how', [
    (ValueError, 'no weight of Sequential is zero: prune it first; sw.advise', dict(prune=None)),
    (ValueError, 'Sequential: no weight to prune is left', dict(model=nn.Sequential(nn.ReLU()))),
    (ValueError, 'no linear layer to exchange: 0.weight: Conv1d has no sparse kernel', dict(model=nn.Sequential(nn.Conv1d(256, 4, 1)))),
    (ValueError, 'the example input is on meta and the model on cpu', dict(x=torch.randn(4, 256, device='meta'))),
    (ValueError, 'weights on the meta device: load their values first', dict(model=nn.Sequential(nn.Linear(4, 4, device='meta')))),
    (ValueError, 'the example input holds no tensor, but a str', dict(x='text')),
    (RuntimeError, 'shapes cannot be multiplied', dict(x=torch.randn(4, 255))),
    (TypeError, 'not a dict: pass the module itself', dict(model={})),
    (ValueError, 'graph=True replays CUDA graphs, and the model is not on a CUDA device', dict(graph=True)),
    (ValueError, 'sites=.. names no layer', dict(sites=[])),
    (ValueError, 'gain=nan is how many times faster', dict(gain=float('nan'))),
    (ValueError, 'gain=0 is how many times faster', dict(gain=0)),
    (ValueError, 'the outputs differ by .* and 0 is allowed: pass a larger tolerance=', dict(tolerance=0., noise=1e-6))])
def test_errors(table, error, words, how):
    k = instant()
    noise = how.pop('noise', 0)
    register(replace(k, forward=lambda *a: k.forward(*a) + noise))
    model, x = network(how.pop('prune', 'block16'))
    model, x = how.pop('model', model), how.pop('x', x)
    before = copy.deepcopy(model)
    with pytest.raises(error, match=words): export(model, x, **dict(budget=1, gain=1e-9) | how)
    if isinstance(model, nn.Module) and not any(p.is_meta for p in model.parameters()): assert same(model, before)
    if isinstance(model, nn.Module): assert not any(m._forward_pre_hooks or isinstance(m, SparseLinear) for m in model.modules())


def test_a_failure_puts_everything_back(table):
    k, count = instant(), []
    register(replace(k, forward=lambda *a: k.forward(*a)))
    class Fails(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
        def forward(self, x):
            y = self.inner(x)
            if any(isinstance(m, SparseLinear) for m in self.inner.modules()): raise OSError('the cable was pulled')
            return y
    class Looks(Fails):
        def forward(self, x): return self.inner(x) if self.inner[0].reset_parameters else x
    for kind, error, words in ((Fails, OSError, 'the cable was pulled'), (Looks, ValueError, r"Looks looks into its layers .*reset_parameters.*nothing was changed")):
        model, x = network()
        model = kind(model)
        before, modules = copy.deepcopy(model), list(model.modules())
        with pytest.raises(error, match=words): export(model, x, budget=30, gain=1e-9)
        assert same(model, before) and list(model.modules()) == modules and not count


def test_a_budget_that_ends(table):
    register(instant())
    model, x = network()
    start = time.perf_counter()
    model, told = export(model, x, budget=0.)
    assert time.perf_counter() - start < 20
    assert told.rows[0]['dense_ms'] and [r['reason'] for r in told.rows[1:]] == ['not measured: the budget was spent'] * 2


# How it is measured

def test_the_race():
    def nap(ms): return lambda: time.sleep(ms / 1e3)
    found = race({'dense': [nap(4)] * 2, 'fast': [nap(1)] * 2, 'slow': [nap(30)] * 2}, torch.device('cpu'), .1)
    assert .0008 < found['fast'] < found['dense'] < found['slow'] and .003 < found['dense'] < .03
    calls = []
    race({'dense': [lambda: None], 'hopeless': [lambda: (calls.append(1), time.sleep(.003))]}, torch.device('cpu'), .05)
    assert len(calls) == 3, 'a warm-up and two rounds'


def test_before_and_after_are_timed_in_turns(table):
    "A call to warm up and one on the clock, dense and sparse as often; the new layers are in at the end."
    register(instant())
    model, x = network()
    seen = []
    class Counts(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
        def forward(self, x):
            seen.append(isinstance(self.inner[0], SparseLinear))
            return self.inner(x)
    model = Counts(model)
    layers = [(s, deploy.packed_layer(l, candidates(s.weight, [64])[0][0])) for s, l in ((l.site, l) for l in watch(model, sites(model), x))]
    del seen[:]
    out, told = deploy.swapped(model, x, layers, 0., None)
    turns = seen[2:]
    assert out is model and turns == [False, False, True, True] * (len(turns) // 4) and len(turns) >= 16
    assert told['before'] > 0 and told['after'] > 0 and model.inner[0] is layers[0][1]


def test_copies_outgrow_the_cache_but_not_the_model():
    model, x = network()
    layer = watch(model, sites(model), x)[0]
    made = deploy.copies(layer, lambda: copy.deepcopy(layer.module), 3 * layer.site.weight.nbytes)
    assert len(made) == 3 and len({m.weight.data_ptr() for m in made}) == 3
    assert len(deploy.copies(layer, lambda: copy.deepcopy(layer.module), 10**12)) == 8


def test_what_the_layers_see():
    model, ids = Llama(LlamaConfig(97, 32, 48, 2, 4, 2, 8)), torch.randint(97, (2, 7))
    layers = watch(model, sites(model), ids)
    assert layers and all(l.calls == {14: 1} and l.inputs[14].shape == (14, l.site.weight.size(1)) for l in layers)


def test_difference():
    nan, inf = float('nan'), float('inf')
    t = torch.tensor
    assert difference(t([1., 2.]), t([1., 4.])) == .5 and difference(t([nan, 2.]), t([nan, 2.])) == 0
    assert difference(t([nan]), t([1.])) == difference(t([1.]), t([inf])) == difference(t([1.]), t([1., 1.])) == inf
    assert difference(torch.zeros(0), torch.zeros(0)) == 0 and difference(t([0.]), t([0.])) == 0


# The way of a model

def test_exported_models_are_saved_and_trained(table, tmp_path):
    register(instant())
    model, x = network()
    plain, masks = copy.deepcopy(model), masks_from_zeros(model)
    model, told = export(model, x, budget=30, gain=1e-9, sites=sites(model, include=['0', '2']))
    save_sparse(model, tmp_path/'m')
    back = load_sparse(tmp_path/'m', copy.deepcopy(plain))
    assert same(back, plain) and masks_from_zeros(back).keys() == masks.keys()
    again = load_sparse(tmp_path/'m', copy.deepcopy(plain), kernels=True)
    assert [type(m) for m in again] == [type(m) for m in model] and torch.equal(again(x), model(x))
    opt = torch.optim.SGD(model.parameters(), .1)
    x = torch.randn(32, 256)                                                  # the kernel of this test knows its inputs by their place
    for m in (model, plain): m(x).square().mean().backward()
    assert torch.allclose(model[0].values.grad, pack(plain[0].weight.grad, 'block', 16, masks['0.weight']).values, atol=1e-6)
    opt.step()


def test_compiled_models(table):
    register(replace(choose('block', torch.ones(1, 16, 16), 64), name='own', device='cpu'))
    model, x = network(sparsity=.97)
    compiled = torch.compile(model, backend='eager')
    right = compiled(x)
    out, told = export(compiled, x, budget=30, gain=1e-9)
    assert out is compiled and told.total['sparse'] == 3 and any(isinstance(m, SparseLinear) for m in model)
    torch.compiler.reset()
    assert torch.allclose(compiled(x), right, atol=1e-5)


# Feed-forward layers in one pass

def decoder(): # of two layers, pruned, and a batch
    torch.manual_seed(0)
    model = Llama(LlamaConfig(97, 64, 128, 2, 4, 2, 16)).eval()
    prune(model, .75, pattern='block16')
    return model, torch.randint(97, (2, 12))


def fused_modules(model): return [n for n, m in model.named_modules() if isinstance(vars(m).get('forward'), deploy.Fused)]


def test_feed_forward_layers_are_fused_where_a_kernel_takes_both_weights(table, monkeypatch, tmp_path):
    register(instant())
    model, ids = decoder()
    plain, right = copy.deepcopy(model), model(ids)
    _, told = export(copy.deepcopy(model), ids, budget=20, gain=1e-9)
    assert told.fused == [], 'no kernel of a CPU takes gate and up at once'
    monkeypatch.setattr(deploy.mlp, 'fuses', lambda x, up, gate, activation: gate is not None)
    names = [n.replace('weight', 'values') for n in model.state_dict() if 'proj' in n]
    model, told = export(model.train(), ids, budget=20, gain=1e-9)
    mlps = [f'model.layers.{i}.mlp' for i in (0, 1)]
    assert model.training and fused_modules(model) == [r['name'] for r in told.fused] == mlps, told
    assert all(r['activation'] == 'silu' and r['error'] < 1e-4 and r['faster'] > 0 and not r['reason'] for r in told.fused) and 'silu in one pass' in repr(told) and 'silu in one pass' in told._repr_html_()
    assert {n for n in model.state_dict() if n.endswith('values')} == set(names), 'names of the state dict stay'
    model.eval()
    calls = []
    for m in (model, copy.deepcopy(model)):
        assert torch.allclose(m(ids), right, atol=1e-4)
        for n in mlps: m.get_submodule(n).forward.mlp.register_forward_hook(lambda *_: calls.append(1))
        m(ids)
        m.train()(ids)
        m.eval()
    assert len(calls) == 2 * 2, 'in evaluation, and only there'
    twin = copy.deepcopy(model)
    with torch.no_grad(): twin.model.layers[0].mlp.gate_proj.values.zero_()
    assert torch.allclose(model(ids), right, atol=1e-4) and not torch.allclose(twin(ids), right, atol=1e-4), 'a copy has layers of its own'
    back = load_sparse(save_sparse(model, tmp_path/'m'))
    assert same(back, plain) and fused_modules(back) == []
    model.train()(ids).square().mean().backward()
    plain.train()(ids).square().mean().backward()
    up, dense = model.model.layers[0].mlp.up_proj, plain.model.layers[0].mlp.up_proj.weight
    grad = unpack(replace(up.packed, tensors=up.packed.tensors | dict(values=up.values.grad)))
    assert torch.allclose(grad[dense != 0], dense.grad[dense != 0], atol=1e-5) and grad.any()


def test_fused_layers_compile(table, monkeypatch):
    register(replace(choose('block', torch.ones(1, 16, 16), 64), name='own', device='cpu'))
    monkeypatch.setattr(deploy.mlp, 'fuses', lambda x, up, gate, activation: gate is not None)
    model, ids = decoder()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    right = compiled(ids)
    out, told = export(compiled, ids, budget=10, gain=1e-9)
    assert out is compiled and [r['name'] for r in told.fused] == ['model.layers.0.mlp', 'model.layers.1.mlp'] == fused_modules(model)
    assert torch.allclose(compiled(ids), right, atol=1e-4)
    torch.compiler.reset()
    with torch.no_grad(): assert torch.allclose(compiled(ids), right, atol=1e-4)
    torch.compiler.reset()


def test_slower_in_one_pass_stays_apart(table, monkeypatch):
    register(instant())
    monkeypatch.setattr(deploy.mlp, 'fuses', lambda x, up, gate, activation: gate is not None)
    monkeypatch.setattr(deploy, 'one_pass', lambda *a: (1e-12, 1.))
    model, ids = decoder()
    model, told = export(model, ids, budget=10, gain=1e-9)
    assert told.total['sparse'] and fused_modules(model) == [] and len(told.fused) == 2 and all(r['reason'] == 'less than 1e-09x' for r in told.fused)
    assert 'are 0.00x, so they stay apart (less than 1e-09x)' in repr(told)


def test_a_failure_leaves_nothing_fused(table, monkeypatch):
    k, ids = instant(), decoder()[1]
    register(k)
    monkeypatch.setattr(deploy.mlp, 'fuses', lambda x, up, gate, activation: gate is not None)
    model, _ = decoder()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match='and 0 is allowed'): export(model, ids, budget=10, gain=1e-9, tolerance=0.)
    assert same(model, before) and fused_modules(model) == [] and not any('forward' in vars(m) for m in model.modules())


class Parts(nn.Module):
    "Three linear layers, of which only some make a feed-forward layer."
    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.c = how, nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
    def forward(self, x, more=None): return self.how(self, x)


@pytest.mark.parametrize('how, activation', [
    (lambda m, x: m.c(m.a(x).relu() * m.b(x)), 'relu'), (lambda m, x: m.c(nn.functional.gelu(m.b(x), approximate='tanh') * m.a(x)), 'gelu'), (lambda m, x: m.c(m.a(x) * m.b(x)), 'none'),
    (lambda m, x: m.c(m.a(x).tanh() * m.b(x)), None), (lambda m, x: m.c(m.a(x).relu() + m.b(x)), None), (lambda m, x: (m.c(m.a(x).relu() * m.b(x)),), None),
    (lambda m, x: x + m.c(m.a(x).relu() * m.b(x)), None), (lambda m, x: m.c(m.a(x.view(4, 2, 32)).relu() * m.b(x.view(4, 2, 32))).view(8, 32), 'relu')])
def test_feed_forward_layers_are_known_by_what_they_compute(table, monkeypatch, how, activation):
    register(instant())
    monkeypatch.setattr(deploy.mlp, 'fuses', lambda x, up, gate, activation: True)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), Parts(how)).eval(), torch.randn(8, 32)
    prune(model, .75, pattern='block16')
    plain = copy.deepcopy(model)
    model, told = export(model, x, budget=10, gain=1e-9)
    assert [r['activation'] for r in told.fused] == [activation] * (activation is not None) and fused_modules(model) == ['1'] * (activation is not None)
    for a, b in zip(deploy.tensors(model(x)), deploy.tensors(plain(x))): assert torch.allclose(a, b, atol=1e-5)


# Advice

def test_advice(table):
    model, x = network(None)
    before = copy.deepcopy(model)
    told = advise(model, x, ['2:4', 'block32', pattern('unstructured'), 'block24'], (.5, .9), budget=10)
    assert isinstance(told, Advice) and same(model, before) and len(told.rows) == 3 * (1 + 3 * 2)
    for r in told.rows:
        assert (r['faster'] is None) == bool(r['reason'])
        if r['pattern'] == 'block24': assert 'multiple of 24' in r['reason']
        if r['faster']: assert r['sparse_ms'] > 0 and r['at_most'] > 0 and r['of_limit'] == pytest.approx(r['faster'] / r['at_most'])
    assert {m['pattern'] for m in told.model} == {'2:4', 'block32', 'unstructured()', 'block24'} and all(m['faster'] >= 1 for m in told.model)
    axes = told.plot()
    assert len(axes) == 3 and axes[0].get_ylabel() == 'times faster than dense'
    assert '512×256, 64 tokens: block24 cannot run' in repr(told) and 'of_limit' in told._repr_html_() and len(told.to_frame()) == len(told.rows)
    with pytest.raises(ValueError, match="unknown pattern 'blok'"): advise(model, x, ['blok'])
    with pytest.raises(ValueError, match='sparsities are fractions of zeros between 0 and 1'): advise(model, x, sparsities=[.5, 90])
    with pytest.raises(ValueError, match='the example input is on meta'): advise(model, x.to('meta'))
    with pytest.raises(ValueError, match='patterns=.. asks nothing'): advise(model, x, [])
    alone = advise(model, x, '2:4', .9, budget=1)
    assert {(r['pattern'], r['sparsity']) for r in alone.rows} == {('2:4', .5)}
    for shape in {r['shape'] for r in told.rows}: assert len({r['dense_ms'] for r in told.rows if r['shape'] == shape} - {None}) == 1


def test_advice_is_what_export_finds(table):
    "Random zeros of a pattern lead to the same candidates as zeros that pruning made."
    model, x = network('block16', .75)
    layer = watch(model, sites(model), x)[0]
    guessed = deploy.would(layer, pattern('block16'), .75).site.weight
    real, other = (candidates(w, [64])[0] for w in (model[0].weight, guessed))
    assert [(x.format, x.block, x.kernel) for x in real] == [(x.format, x.block, x.kernel) for x in other]
