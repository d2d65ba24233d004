"""The block-sparse Hopper kernels against their PyTorch twin, on a real H100 or H200.

Runs under pytest, and as a script where there is no pytest: python tests/test_hopper_cuda.py
"""
import sys
import warnings

import torch

try: import pytest
except ImportError: pytest = None
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if pytest: pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HOPPER, reason='needs a GPU of compute capability 9.0')]

ALLOWED = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


def problem(rows, columns, r, c, tokens, dtype, sparsity=.6, seed=0):
    "A packed weight with an empty block row and column, inputs, output gradients and a bias."
    from sparse_workbench.kernels.linear import pack
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) >= sparsity
    kept[rows // 2], kept[:, 0] = False, False
    w = torch.randn(rows * r, columns * c, generator=g).to(dtype)
    p = pack(w, 'block', (r, c), kept.repeat_interleave(r, 0).repeat_interleave(c, 1)).to('cuda')
    x, dy = (torch.randn(tokens, n, generator=g).to('cuda', dtype) for n in (columns * c, rows * r))
    return p, x, dy, torch.randn(rows * r, generator=g).to('cuda', dtype)


def check(got, right, dtype, what, looser=1):
    scale = right.abs().max().clip(1).item() if right.numel() else 1
    assert got.isfinite().all(), (*what, 'not written')
    off = (got.double() - right).abs().max().item() / scale if right.numel() else 0
    assert off <= ALLOWED[dtype] * looser, (*what, off)


def right(p, x, dy, bias):
    "The three products by the twin, in float64."
    from sparse_workbench.kernels.linear import KERNELS
    twin, exact = next(k for k in KERNELS if k.name == 'block twin'), (p.values.double(), p.index, p.shape)
    return twin.forward(x.double(), *exact, bias.double()), twin.grad_x(dy.double(), *exact), twin.grad_values(dy.double(), x.double(), *exact)


def test_every_block_and_type():
    from sparse_workbench.kernels.hopper import BLOCKS, hopper_forward, hopper_grad_values, hopper_grad_x
    for dtype in ALLOWED:
        for r, c in BLOCKS:
            for rows, columns in ((5, 6), (40, 3), (2, 33)):                       # few tiles, many tiles, long lists
                for tokens in (1, 128, 333, 1500):
                    p, x, dy, bias = problem(rows, columns, r, c, tokens, dtype)
                    exact = p.values, p.index, p.shape
                    got = hopper_forward(x, *exact, bias), hopper_grad_x(dy, *exact), hopper_grad_values(dy, x, *exact)
                    for name, a, b in zip(('y', 'x', 'values'), got, right(p, x, dy, bias)): check(a, b, dtype, (name, dtype, r, c, rows, columns, tokens))


def test_nothing_else_is_written():
    from sparse_workbench.kernels.hopper import BLOCKS, launch, ranked
    for r, c in BLOCKS:
        for tokens in (128, 301):
            p, x, dy, bias = problem(4, 3, r, c, tokens, torch.bfloat16)
            whole = torch.full((tokens + 300, p.shape[0]), float('nan'), dtype=torch.bfloat16, device='cuda')
            launch(x, p.values, (p.index[1], None, ranked(p.index[0])), whole[:tokens], 'forward', bias)
            check(whole[:tokens], right(p, x, dy, bias)[0], torch.bfloat16, (r, c, tokens))
            assert whole[tokens:].isnan().all(), (r, c, tokens)


def test_a_wide_input_goes_in_bands():
    from sparse_workbench.kernels.hopper import bands, hopper_forward, hopper_grad_x
    for r, c in ((128, 128), (256, 64), (64, 64)):
        p, x, dy, bias = problem(8192 // r, 8192 // c, r, c, 3000, torch.bfloat16, .95)
        assert bands(3000, 128, 8192)[1] > 1
        y, dx, _ = right(p, x, dy, bias)
        check(hopper_forward(x, p.values, p.index, p.shape, bias), y, torch.bfloat16, (r, c))
        check(hopper_grad_x(dy, p.values, p.index, p.shape), dx, torch.bfloat16, (r, c))


def test_empty():
    from sparse_workbench.kernels.hopper import hopper_forward, hopper_grad_values, hopper_grad_x
    p, x, dy, bias = problem(4, 3, 64, 64, 0, torch.float16)
    assert hopper_forward(x, p.values, p.index, p.shape, bias).shape == (0, 256) and hopper_grad_x(dy, p.values, p.index, p.shape).shape == (0, 192)
    assert not hopper_grad_values(dy, x, p.values, p.index, p.shape).any()
    p, x, dy, bias = problem(4, 3, 64, 64, 200, torch.float16, 2.)
    assert torch.equal(hopper_forward(x, p.values, p.index, p.shape, bias), bias.expand(200, 256)) and not hopper_grad_x(dy, p.values, p.index, p.shape).any()


def test_the_operator_chooses_them_and_trains():
    from sparse_workbench.kernels.linear import Packed, choose, sparse_linear
    for dtype in ALLOWED:
        p, x, dy, bias = problem(6, 4, 128, 64, 777, dtype)
        assert choose('block', p.values, 777).name == 'block hopper' and choose('block', p.values, 77).name == 'block triton'
        x_, b_, v = x.t().contiguous().t().requires_grad_(), bias.clone().requires_grad_(), p.values.clone().requires_grad_()
        def gradients(): return torch.autograd.grad(sparse_linear(x_, Packed('block', p.shape, {**p.tensors, 'values': v}), b_), (x_, v, b_), dy)
        _, gx, gv = right(p, x, dy, bias)
        for name, a, b in zip(('x', 'values', 'bias'), gradients(), (gx, gv, dy.double().sum(0))): check(a, b, dtype, (name, dtype))
        for a, b in zip(gradients(), gradients()): assert torch.equal(a, b), 'not the same bits twice'


def test_compiled_and_captured():
    from sparse_workbench.kernels.linear import SparseLinear
    p, x, dy, bias = problem(6, 4, 128, 128, 500, torch.bfloat16)
    layer = SparseLinear(p, bias)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    x_ = x.clone().requires_grad_()
    def step(): return torch.autograd.grad(layer(x_), (x_, layer.values, layer.bias), dy)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): eager = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, eager): assert torch.equal(a, b)


def test_a_topology_that_changes_is_seen():
    from sparse_workbench.kernels.hopper import hopper_forward, hopper_grad_x
    p, x, dy, bias = problem(6, 5, 64, 64, 300, torch.bfloat16)
    for _ in range(2):
        y, dx, _ = right(p, x, dy, bias)
        check(hopper_forward(x, p.values, p.index, p.shape, bias), y, torch.bfloat16, ('forward',))
        check(hopper_grad_x(dy, p.values, p.index, p.shape), dx, torch.bfloat16, ('grad x',))
        p.index[1].copy_(4 - p.index[1])


def test_a_wrong_build_is_left_out():
    from sparse_workbench.kernels import hopper
    from sparse_workbench.kernels.linear import choose
    v, kept, was = torch.ones(3, 64, 128, device='cuda').half(), dict(hopper._TRUSTED), hopper.hopper_forward
    hopper._TRUSTED.clear()
    try:
        hopper.hopper_forward = lambda *a: was(*a) * 1.1
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            assert choose('block', v, 4096).name == 'block triton' and choose('block', v, 4096).name == 'block triton'
        assert len(told) == 1 and 'gives wrong numbers' in str(told[0].message)
    finally:
        hopper.hopper_forward = was
        hopper._TRUSTED.clear()
        hopper._TRUSTED.update(kept)


def test_the_fused_feed_forward_layer():
    from sparse_workbench.kernels.mlp import ACTIVATE, fuses, sparse_up, up_twin
    for r, c in ((128, 128), (256, 64), (64, 64), (128, 64), (256, 128)):
        for columns in (3, 128):
            (p, x, _, bias), (gate, _, _, gate_bias) = (problem(5, columns, r, c, 444, torch.bfloat16, .7, seed) for seed in (1, 2))
            x = x / (columns * c * .3)**.5
            assert fuses(x, p, gate)
            for name in ACTIVATE:
                for g, gb in ((gate, gate_bias), (None, None)):
                    with torch.no_grad(): got = sparse_up(x.view(4, 111, -1), p, g, name, bias, gb).view(444, -1)
                    def wide(q): return None if q is None else type(q)(q.format, q.shape, {n: t.double() if n == 'values' else t for n, t in q.tensors.items()})
                    exact = up_twin(x.double(), wide(p), wide(g), name, bias.double(), None if gb is None else gb.double())
                    check(got, exact, torch.bfloat16, (r, c, columns, name, g is not None), 2)
    compiled = torch.compile(lambda x: sparse_up(x, p, gate), fullgraph=False)
    with torch.no_grad(): assert torch.equal(compiled(x), sparse_up(x, p, gate))


def test_more_than_two_billion_inputs():
    from sparse_workbench.kernels.hopper import hopper_forward, hopper_grad_values, hopper_grad_x
    if torch.cuda.mem_get_info()[0] < 40 * 2**30: return print('  left out: less than 40 GB free')
    tokens = 2**31 // 4096 + 77                                                # the last rows begin beyond 2³¹ elements
    p, _, _, bias = problem(2, 64, 64, 64, 1, torch.float16)
    x, dy = torch.zeros(tokens, 4096, device='cuda', dtype=torch.float16), torch.zeros(tokens, 128, device='cuda', dtype=torch.float16)
    x[-9:], dy[-9:] = torch.randn(9, 4096).half(), torch.randn(9, 128).half()
    exact = p.values, p.index, p.shape
    y, gx, gv = right(p, x[-9:], dy[-9:], bias)
    check(hopper_forward(x, *exact, bias)[-9:], y, torch.float16, ('y',))
    check(hopper_grad_x(dy, *exact)[-9:], gx, torch.float16, ('x',))
    check(hopper_grad_values(dy, x, *exact), gv, torch.float16, ('values',))


if __name__ == '__main__':
    from as_script import run
    sys.exit(run(globals()))
