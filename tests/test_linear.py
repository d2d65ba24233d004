"The op seam: every format packs and unpacks bit for bit and multiplies as the dense layer does, forward and backward, eager and compiled."
import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_workbench.core import bits
from sparse_workbench.kernels import linear
from sparse_workbench.kernels.linear import FORMATS, KERNELS, Kernel, Packed, SparseLinear, choose, pack, register, sparse_linear, unpack, verify
from sparse_workbench.patterns import nm

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def sparse(format, rows, columns, dtype=torch.float64, block=(3, 5), density=.3):
    "A weight that fits the format, its packed twin, and where values are stored; sizes count units of the format."
    r, c = dict(block=block).get(format, (1, 4) if format == '2:4' else (1, 1))
    w = torch.randn(rows * r, columns * c, dtype=torch.float64).to(dtype)
    if format == '2:4': kept = nm(2, 4).select(torch.rand(w.shape))
    else: kept = (torch.rand(rows, columns) < density).repeat_interleave(r, 0).repeat_interleave(c, 1) | (format == 'dense')
    return w.where(kept, 0), pack(w, format, block if format == 'block' else None, kept), kept


def with_values(p, values):
    return Packed(p.format, p.shape, {**p.tensors, 'values': values})


@pytest.mark.parametrize('format', FORMATS)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 9), columns=st.integers(1, 9), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999))
def test_round_trip(format, rows, columns, dtype, seed):
    torch.manual_seed(seed)
    w, p, kept = sparse(format, rows, columns, dtype)
    odd = torch.tensor([float('nan'), float('inf'), torch.finfo(dtype).tiny / 2], dtype=dtype)
    w = torch.where((torch.rand(w.shape) < .2) & kept, odd[torch.randint(3, w.shape)], w)
    block = tuple(p.values.shape[1:]) if format == 'block' else None
    for q in (pack(w, format, block, kept), pack(w, format, block)):
        assert torch.equal(bits(unpack(q)), bits(w)) and q.dtype == dtype and q.shape == tuple(w.shape)
        verify(q)


def test_minus_zero():
    w = torch.tensor([[-0., 1, -0., 2, -0., -0., -0., 0]])
    for format, block in (('dense', None), ('bitmask', None), ('block', (1, 2))):
        assert torch.equal(bits(unpack(pack(w, format, block))), bits(w)), format
    assert torch.equal(unpack(pack(w, '2:4')), w) and unpack(pack(w, '2:4')).signbit().tolist()[0] == [False] * 4 + [True, True, False, False]


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('dtype', DTYPES)
def test_forward_and_backward(format, dtype):
    torch.manual_seed(1)
    for rows, columns, density in ((3, 7, .4), (5, 2, 0.), (1, 1, 1.)):
        w, p, kept = sparse(format, rows, columns, dtype, density=density)
        inp, out = w.size(1), w.size(0)
        for x in (torch.randn(17, inp), torch.randn(inp, 6).T, torch.randn(2, 0, inp), torch.randn(inp), torch.randn(3, 1, 2, 2 * inp)[..., ::2]):
            x, bias, dy = x.to(dtype).requires_grad_(), torch.randn(out, dtype=dtype, requires_grad=True), torch.randn(*x.shape[:-1], out).to(dtype)
            v = p.values.clone().requires_grad_()
            y = sparse_linear(x, with_values(p, v), bias)
            got = (y, *torch.autograd.grad(y, (x, bias, v), dy))
            x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, bias))
            z = F.linear(x64, w64, b64)
            gx, gw, gb = torch.autograd.grad(z, (x64, w64, b64), dy.double())
            tensors = pack(gw, format, (3, 5) if format == 'block' else None, kept)
            values = FORMATS['2:4'].take(gw, p.index, p.shape) if format == '2:4' else tensors.values
            for name, a, b in zip(('y', 'x', 'bias', 'values'), got, (z, gx, gb, values)):
                assert a.dtype == dtype and a.shape == b.shape
                scale = b.abs().max().clip(1).item() if b.numel() else 1
                assert torch.allclose(a.double(), b, rtol=0, atol=TOLERANCE[dtype] * scale), (format, dtype, name)


def test_gradcheck():
    for format in FORMATS:
        w, p, _ = sparse(format, 2, 3, block=(2, 2))
        x, bias = torch.randn(3, w.size(1), dtype=torch.float64, requires_grad=True), torch.randn(w.size(0), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, v, b, p=p: sparse_linear(x, with_values(p, v), b), (x, p.values.clone().requires_grad_(), bias))


@pytest.mark.parametrize('format', FORMATS)
def test_a_second_derivative_is_refused(format):
    _, p, _ = sparse(format, 2, 3)
    layer, x = SparseLinear(p), torch.randn(4, p.shape[1], dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert torch.allclose(slope, 2 * layer(x) @ layer.weight)                      # the first is there
    with pytest.raises(NotImplementedError, match='differentiable once'): slope.square().sum().backward()
    g, = torch.autograd.grad(layer(x).square().sum(), layer.values, create_graph=True)
    with pytest.raises(NotImplementedError, match='differentiable once'): torch.autograd.grad(g.sum(), x)
    dense = F.linear(x, layer.weight).square().sum()                               # what the message says to do
    slope, = torch.autograd.grad(dense, x, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), x)[0].any()


def test_frozen_values_are_converted_once_under_autocast(monkeypatch):
    _, p, _ = sparse('block', 3, 3, torch.float32)
    layer, x, seen = SparseLinear(p), torch.randn(4, p.shape[1]), []
    k = choose('block', p.values, 4)
    before = KERNELS[:]
    register(Kernel('spy', 'block', lambda x, values, *rest: seen.append(values) or k.forward(x, values, *rest), k.grad_x, k.grad_values, dtypes=(torch.bfloat16,)))
    try:
        with torch.autocast('cpu', torch.bfloat16):
            with torch.inference_mode(): layer(x)
            with torch.no_grad(): y = layer(x)
            assert seen[0] is seen[1]
            frozen = copy.deepcopy(layer).requires_grad_(False)
            x_ = x.clone().requires_grad_()
            frozen(x_).sum().backward()                                            # a copy that inference made serves here too
            frozen(x_).sum().backward()
            assert seen[2] is seen[3] and x_.grad.any()
            torch.optim.SGD(layer.parameters(), lr=1.).step()
            layer(x).sum().backward()                                              # trained: converted with its gradient
            assert seen[4] is not seen[0] and layer.values.grad.dtype == torch.float32
            torch.optim.SGD(layer.parameters(), lr=1.).step()
            with torch.no_grad(): assert not torch.equal(layer(x), y) and torch.equal(seen[-1], layer.values.bfloat16())
    finally: KERNELS[:] = before


def test_a_gpu_that_gets_a_twin_says_so_once(monkeypatch):
    monkeypatch.setattr(linear, '_TOLD', set())
    before = KERNELS[:]
    register(Kernel('gpu only', 'block', None, None, None, 'cuda', (torch.float16,), takes=lambda v: v.shape[1] == 32, asks='blocks of 32'))
    try:
        for dtype, side, format, said in ((torch.float16, 32, 'block', 0), (torch.float16, 24, 'block', 1), (torch.float16, 24, 'block', 0), (torch.float64, 32, 'block', 1), (torch.float64, 32, 'bitmask', 0)):
            values = SimpleNamespace(device=torch.device('cuda'), dtype=dtype, shape=torch.Size((3, side, side)))
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter('always')
                choose(format, values, 5), linear.multiplier(format, values, 5)
            assert len(told) == said, (dtype, side, format)
            if said: assert f"'block twin' multiplies a 'block' weight, {str(dtype)[6:]} in blocks of {side}×{side}, on cuda" in str(told[0].message)
            if said: assert "'gpu only' takes float16, blocks of 32" in str(told[0].message)
    finally: KERNELS[:] = before


def test_only_what_is_asked_for_is_computed(monkeypatch):
    called = []
    k = next(k for k in KERNELS if k.name == 'block twin')
    own = Kernel('spy', 'block', k.forward, lambda *a: called.append('x') or k.grad_x(*a), lambda *a: called.append('values') or k.grad_values(*a))
    _, p, _ = sparse('block', 2, 2)
    before = KERNELS[:]
    try:
        register(own)
        x = torch.randn(4, 10, dtype=torch.float64)
        sparse_linear(x, p).sum()
        sparse_linear(x.requires_grad_(), p).sum().backward()
        sparse_linear(x.detach(), with_values(p, p.values.clone().requires_grad_())).sum().backward()
    finally: KERNELS[:] = before
    assert called == ['x', 'values']


def test_the_table():
    p, before = sparse('block', 2, 2)[1], KERNELS[:]
    twin = choose('block', p.values, 5)
    assert twin.name == 'block twin'
    try:
        for name, how in dict(few=dict(most=4), half=dict(dtypes=(torch.float16,)), gpu=dict(device='cuda'), square=dict(takes=lambda v: v.size(1) == v.size(2))).items():
            register(Kernel(name, 'block', twin.forward, twin.grad_x, twin.grad_values, **how))
        assert [choose('block', p.values, n).name for n in (0, 4, 5)] == ['few', 'few', 'block twin']
        assert choose('block', p.values.half(), 9).name == 'half'
        assert choose('block', torch.ones(1, 4, 4), 9).name == 'square'
        register(twin)                                                           # again: stays where it was
        assert choose('block', torch.ones(1, 4, 4), 9).name == 'square'
        register(Kernel('few', 'block', twin.forward, twin.grad_x, twin.grad_values, most=2))
        assert choose('block', p.values, 4).name == 'block twin' and sum(k.name == 'few' for k in KERNELS) == 1
    finally: KERNELS[:] = before
    with pytest.raises(LookupError, match="no kernel multiplies 'ell' in torch.float64 on cpu"): choose('ell', p.values, 1)


def test_what_is_dropped_does_not_leak():
    nan = float('nan')
    for format in ('bitmask', '2:4', 'block'):
        w, p, kept = sparse(format, 4, 4)
        q = pack(torch.where(kept, w, nan), format, (3, 5) if format == 'block' else None, kept)
        x = torch.randn(3, w.size(1), dtype=torch.float64)
        assert torch.equal(sparse_linear(x, q), sparse_linear(x, p)) and torch.equal(bits(unpack(q)), bits(w))
    few = torch.zeros(2, 8, dtype=torch.bool)
    few[0, 1] = True                                                           # groups of 2:4 with less than two kept
    assert torch.equal(unpack(pack(torch.full((2, 8), nan).masked_fill(few, 1.), '2:4', None, few)), few.float())


@pytest.mark.parametrize('error, words, call', [
    (ValueError, "no format 'coo': use one of 'dense'", lambda: pack(torch.ones(4, 4), 'coo')),
    (ValueError, r'not the shape \(2, 2, 2\)', lambda: pack(torch.ones(2, 2, 2), 'bitmask')),
    (ValueError, 'meta device', lambda: pack(torch.ones(4, 4, device='meta'), 'dense')),
    (TypeError, 'not torch.int64', lambda: pack(torch.ones(4, 4).long(), 'dense')),
    (TypeError, 'not torch.float8_e4m3fn', lambda: pack(torch.ones(4, 4).to(torch.float8_e4m3fn), 'dense')),
    (ValueError, 'torch.sparse_csr is packed already', lambda: pack(torch.eye(4).to_sparse_csr(), 'dense')),
    (ValueError, r'divides into 3 × 2, not \(4, 4\)', lambda: pack(torch.ones(4, 4), 'block', (3, 2))),
    (ValueError, r'divides into 0 × 0', lambda: pack(torch.ones(4, 4), 'block', 0)),
    (TypeError, r'block=4.0: give the side of a square as a whole number', lambda: pack(torch.ones(4, 4), 'block', 4.)),
    (TypeError, r'block=\(2, 2, 2\): give', lambda: pack(torch.ones(4, 4), 'block', (2, 2, 2))),
    (NotImplementedError, 'no forward-mode derivative .*: use backward', lambda: torch.func.jacfwd(SparseLinear(pack(torch.eye(4), 'dense')))(torch.ones(4))),
    (ValueError, 'keeps 3', lambda: pack(torch.tensor([[1., 1, 1, 0]]), '2:4')),
    (ValueError, r"'block' with block=None", lambda: pack(torch.ones(4, 4), 'block')),
    (ValueError, r"'2:4' with block=\(4, 4\)", lambda: pack(torch.ones(4, 4), '2:4', 4)),
    (ValueError, r'a mask is bool \(4, 4\)', lambda: pack(torch.ones(4, 4), 'bitmask', mask=torch.ones(4, 4))),
    (ValueError, 'its last axis must be 4', lambda: sparse_linear(torch.ones(2, 3), pack(torch.ones(4, 4), 'dense'))),
    (ValueError, 'its last axis must be 4', lambda: sparse_linear(torch.ones(()), pack(torch.ones(4, 4), 'dense'))),
    (TypeError, 'x is torch.float16 and the weight torch.float32', lambda: sparse_linear(torch.ones(2, 4).half(), pack(torch.ones(4, 4), 'dense'))),
    (TypeError, 'the bias is torch.float64', lambda: sparse_linear(torch.ones(2, 4), pack(torch.ones(4, 4), 'dense'), torch.ones(4).double())),
    (ValueError, r'has the shape \(4,\), not \(1, 4\)', lambda: SparseLinear(pack(torch.ones(4, 4), 'dense'), torch.ones(1, 4))),
    (ValueError, 'x is on meta', lambda: sparse_linear(torch.ones(2, 4, device='meta'), pack(torch.ones(4, 4), 'dense')))])
def test_named_errors(error, words, call):
    with pytest.raises(error, match=words): call()


def test_damaged_weights():
    for format in FORMATS:
        _, p, _ = sparse(format, 4, 4)
        for name, t in p.tensors.items():
            for bad in ([t[:-1]] if t.numel() else []) + ([t + 77] if name in ('offsets', 'columns') and len(t) else []):
                with pytest.raises(ValueError, match='a damaged weight'): verify(Packed(format, p.shape, {**p.tensors, name: bad}))
    twice = Packed('2:4', (1, 4), dict(values=torch.ones(1, 2), positions=torch.tensor([[0b0101]], dtype=torch.uint8)))
    with pytest.raises(ValueError, match='a damaged weight'): verify(twice)


@pytest.mark.parametrize('format', FORMATS)
def test_layer(format):
    _, p, _ = sparse(format, 4, 4, torch.float32)
    layer = SparseLinear(p, torch.randn(p.shape[0]))
    assert {n: t.shape for n, t in layer.state_dict().items()} == {n: t.shape for n, t in p.tensors.items()} | {'bias': (p.shape[0],)}
    x = torch.randn(6, p.shape[1])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), nn.Sequential(layer)[0]): assert torch.equal(other(x), layer(x))
    low = copy.deepcopy(layer).to(torch.bfloat16)
    assert low(x.bfloat16()).dtype == torch.bfloat16 and [t.dtype for t in low.packed.index] == [t.dtype for t in p.index]
    assert layer.to('meta')(x.to('meta')).shape == (6, p.shape[0])


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('dtype', DTYPES)
def test_weight_is_there_to_look_at(format, dtype):
    torch.manual_seed(3)
    w, p, kept = sparse(format, 4, 4, dtype)
    some = kept.nonzero()
    w[tuple(some[0])], w[tuple(some[1])] = float('nan'), float('inf')
    layer = SparseLinear(pack(w, format, (3, 5) if format == 'block' else None, kept))
    seen, exact = layer.weight.detach(), unpack(layer.packed)
    assert torch.equal(bits(exact), bits(w)) and torch.equal(seen.isnan(), w.isnan()) and torch.equal(bits(seen)[~w.isnan()], bits(w)[~w.isnan()])
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (w.shape, dtype, w.device) and layer.weight is not layer.weight
    layer = SparseLinear(p)
    g = torch.randn(w.shape).to(dtype)
    (layer.weight * g).sum().backward()
    right = FORMATS['2:4'].take(g, p.index, p.shape) if format == '2:4' else pack(g, format, (3, 5) if format == 'block' else None, kept).values
    assert torch.equal(layer.values.grad, right)
    assert not layer.requires_grad_(False).weight.requires_grad
    meta = layer.to('meta').weight
    assert meta.is_meta and meta.shape == w.shape and meta.dtype == dtype


@pytest.mark.parametrize('format', FORMATS)
def test_weight_is_no_state(format):
    _, p, _ = sparse(format, 4, 4, torch.float32)
    layer = SparseLinear(p, torch.randn(p.shape[0]))
    layer.weight.sum()
    assert layer.state_dict().keys() == {*p.tensors, 'bias'} and [n for n, _ in layer.named_parameters()] == ['values', 'bias']
    assert [n for n, _ in layer.named_buffers()] == [n for n in p.tensors if n != 'values']
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.weight, layer.weight) and other.values.data_ptr() != layer.values.data_ptr()
        with torch.no_grad(): other.values.add_(1)
        assert not torch.equal(other.weight, layer.weight) and torch.equal(layer.weight, unpack(p))
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.weight, layer.weight)


def test_weight_cannot_be_assigned():
    layer = SparseLinear(pack(torch.eye(4), 'bitmask'))
    dense = torch.ones(4, 4)
    for change in (lambda: setattr(layer, 'weight', dense), lambda: setattr(layer, 'weight', nn.Parameter(dense)), lambda: setattr(layer, 'weight', None),
                   lambda: layer.register_parameter('weight', nn.Parameter(dense))):
        with pytest.raises(AttributeError, match=r"a SparseLinear is packed and cannot be assigned: make a new layer, SparseLinear\(pack\(weight, 'bitmask', …\), bias\), or a dense nn.Linear from unpack\(layer.packed\)"): change()
    with pytest.raises(AttributeError): del layer.weight
    with torch.no_grad(): layer.weight.zero_()                                  # a copy
    assert torch.equal(layer.weight, torch.eye(4)) and [n for n, _ in layer.named_parameters()] == ['values']
    layer.register_parameter('scale', nn.Parameter(torch.ones(1)))
    layer.bias = nn.Parameter(torch.ones(4))
    assert {n for n, _ in layer.named_parameters()} == {'values', 'bias', 'scale'}


@pytest.mark.parametrize('format', FORMATS)
def test_forward_makes_no_dense_weight_to_look_at(format, monkeypatch):
    _, p, _ = sparse(format, 4, 4, torch.float32)
    layer, x = SparseLinear(p, torch.randn(p.shape[0])), torch.randn(3, p.shape[1])
    right, looks = layer(x), []
    monkeypatch.setattr(SparseLinear, 'weight', property(lambda self: looks.append(1)))
    compiled = torch.compile(layer, fullgraph=True, backend='eager')
    assert torch.equal(layer(x), right) and torch.equal(compiled(x), right) and not looks
    torch.compiler.reset()


@pytest.mark.parametrize('format', ['bitmask', '2:4', 'block'])
def test_a_look_at_the_dtype_is_compiled_away(format):
    from torch._dynamo.backends.common import aot_autograd
    class Looks(nn.Module):
        def __init__(self, layer, far):
            super().__init__()
            self.layer, self.far = layer, far
        def forward(self, x): return self.layer(x.to(self.layer.weight.dtype)) * (self.layer.weight.sum() if self.far else 1)
    _, p, _ = sparse(format, 4, 4, torch.float32)
    x, nodes = torch.randn(3, p.shape[1], dtype=torch.float64), []
    def count(graph, inputs):
        nodes.append([str(n.target) for n in graph.graph.nodes if n.op == 'call_function'])
        return graph.forward
    for far in (False, True):
        torch.compiler.reset()
        model = Looks(SparseLinear(p), far)
        with torch.no_grad(): assert torch.allclose(torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count))(x), model(x))
    torch.compiler.reset()
    assert len(nodes[0]) < 6 < len(nodes[1]) and sum('sparse_linear' in n for n in nodes[0]) == 1, nodes


def test_sharded_by_fsdp():
    "The values and the bias are sharded, gathered for the product and trained; here by one process."
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    if dist.is_initialized(): pytest.skip('another test left its processes')
    torch.manual_seed(0)
    _, p, _ = sparse('block', 4, 4, torch.float32)
    plain = nn.Sequential(SparseLinear(p, torch.randn(p.shape[0])), nn.ReLU())
    x = torch.randn(5, p.shape[1])
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, low = copy.deepcopy(plain), []
        fully_shard(model, mesh=dist.init_device_mesh('cpu', (1,)))
        assert linear.sharded_here()                                               # so that nothing is remembered of values
        for m in (plain, model):
            opt = torch.optim.SGD(m.parameters(), lr=.1)
            for _ in range(2):
                opt.zero_grad()
                m(x).square().sum().backward()
                opt.step()
                with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): low.append(m(x))      # FSDP gathers new values into the same tensor
                if m is model: model.reshard()
        assert all(torch.allclose(a, b, atol=.1, rtol=.1) for a, b in zip(low[:2], low[2:])) and not torch.equal(low[0], low[1])
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()] == ['0.values', '0.bias']
        for a, b in zip(model.parameters(), plain.parameters()): assert torch.allclose(a.full_tensor(), b)
        assert torch.allclose(model(x), plain(x))
    finally: dist.destroy_process_group()


@pytest.mark.parametrize('format', FORMATS)
def test_compile_and_autocast(format):
    torch.manual_seed(2)
    torch.compiler.reset()
    _, p, _ = sparse(format, 4, 4, torch.float32)
    model = nn.Sequential(SparseLinear(p, torch.randn(p.shape[0])), nn.ReLU())
    compiled, x = torch.compile(model, fullgraph=True, backend='aot_eager', dynamic=True), torch.randn(5, 7, p.shape[1])
    for context in (lambda: torch.autocast('cpu', enabled=False), lambda: torch.autocast('cpu', torch.bfloat16)):
        got = []
        for m, n in ((model, 5), (compiled, 5), (compiled, 3), (model, 3)):
            model.zero_grad()
            with context(): y = m(x[:n])
            y.float().square().sum().backward()
            got.append((y, model[0].values.grad.clone(), model[0].bias.grad.clone()))
        for a, b in zip(got[0] + got[3], got[1] + got[2]): assert a.dtype == b.dtype and torch.equal(a, b)
    half = SparseLinear(p.to(torch.bfloat16), model[0].bias.bfloat16())
    assert torch.equal(y, half(x[:3].bfloat16()).relu()), 'autocast reached into the operator'
    assert y.dtype == torch.bfloat16 and model[0].values.grad.dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16): assert sparse_linear(x.double(), Packed(format, p.shape, {**p.tensors, 'values': p.values.double()})).dtype == torch.float64


def test_no_dense_weight_for_blocks():
    seen = []
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))
            return out
    mask = torch.zeros(640, 640, dtype=torch.bool)
    mask[:32, 32:64] = mask[320:352, :32] = True
    p = pack(torch.randn(640, 640), 'block', 32, mask)
    x, dy = torch.randn(3, 640), torch.randn(3, 640)
    with Watch():
        linear._blocks_forward(x, p.values, p.index, p.shape, None)
        linear._blocks_grad_x(dy, p.values, p.index, p.shape)
        linear._blocks_grad_values(dy, x, p.values, p.index, p.shape)
    assert seen and max(seen) <= p.values.numel()


@pytest.mark.parametrize('sides', [(1, 1), (1, 4), (4, 1), (2, 4)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compilers_are_told_how_results_lie(sides, dtype):
    p, x = pack(torch.randn(8, 16).to(dtype), 'block', sides), torch.randn(6, 16).to(dtype)
    args = (x.requires_grad_(), p.values.requires_grad_(), p.index, None, 'block', [8, 16])
    for op, call in ((torch.ops.sparse_workbench.sparse_linear, args),
                      (torch.ops.sparse_workbench.sparse_linear_grad_x, (torch.randn(6, 8).to(dtype), p.values.detach(), p.index, 'block', [8, 16]))):
        torch.library.opcheck(op, call, test_utils=('test_schema', 'test_faketensor'))


def test_a_refused_checkpoint_leaves_the_layer_as_it_was():
    layer, other = (SparseLinear(pack(torch.randn(64, 64).where(torch.rand(64, 64) < s, 0), 'block', 1)) for s in (.5, .3))
    x, state = torch.randn(4, 64), layer.state_dict()
    y = layer(x)
    for broken in (state | dict(columns=state['columns'] + 10**8), other.state_dict()):
        with pytest.raises(ValueError, match='a damaged weight|its zeros lie elsewhere'): layer.load_state_dict(broken)
        assert torch.equal(layer(x), y)
    q = layer.packed
    for name in ('values', 'columns', 'offsets'):
        with pytest.raises(ValueError, match='a damaged weight'): SparseLinear(Packed('block', q.shape, {**q.tensors, name: q.tensors[name][:-1]}))


@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('hooked', [False, True])
def test_feed_forward_layers(gated, hooked):
    from sparse_workbench.kernels.mlp import SparseMLP, up_twin
    torch.manual_seed(0)
    up, down, gate = (SparseLinear(pack(torch.randn(out, inp).where((torch.rand(out // 16, inp // 16) < .5).repeat_interleave(16, 0).repeat_interleave(16, 1), 0), 'block', 16), torch.randn(out))
                      for out, inp in ((64, 32), (32, 64), (64, 32)))
    mlp, x, heard = SparseMLP(up, down, gate if gated else None), torch.randn(7, 32), []
    h = up_twin(x, up.packed, gate.packed if gated else None, up_bias=up.bias, gate_bias=gate.bias if gated else None)
    if hooked:
        up.register_forward_pre_hook(lambda m, told: heard.append(told[0].shape))
        if gated: up.register_forward_hook(lambda m, told, y: 3 * y)
    right = down(3 * h if hooked and gated else h)
    assert torch.allclose(mlp(x), right, atol=1e-4) and heard == [x.shape] * hooked
    compiled = torch.compile(mlp, fullgraph=not hooked, backend='aot_eager')
    for context in (torch.autocast('cpu', enabled=False), torch.autocast('cpu', torch.bfloat16)):
        for grad in (True, False):
            with context, torch.set_grad_enabled(grad): assert torch.equal(compiled(x), mlp(x)), (gated, hooked, grad)
    torch.compiler.reset()
