"""The block-sparse Triton kernels against their PyTorch twin, on a real GPU. Without one they are tested, interpreted, in their notebook.

Runs under pytest, and as a script where there is no pytest: python tests/test_block_cuda.py
"""
import sys

import torch
import torch.nn.functional as F

try: import pytest
except ImportError: pytest = None
if pytest:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

ALLOWED = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-5}


def problem(rows, columns, r, c, tokens, dtype, sparsity=.7):
    "A packed weight with an empty block row, inputs and output gradients, on the GPU."
    from sparse_workbench.kernels.linear import pack
    kept = torch.rand(rows, columns) >= sparsity
    kept[rows // 2] = False
    p = pack(torch.randn(rows * r, columns * c).to(dtype), 'block', (r, c), kept.repeat_interleave(r, 0).repeat_interleave(c, 1)).to('cuda')
    x, dy = (torch.randn(tokens, n, device='cuda').to(dtype) for n in (columns * c, rows * r))
    return p, x, dy, torch.randn(rows * r, device='cuda').to(dtype)


def check(got, right, dtype, what):
    scale = right.abs().max().clip(1).item() if right.numel() else 1
    assert got.isfinite().all(), (*what, 'not written')
    assert torch.allclose(got.double(), right, rtol=0, atol=ALLOWED[dtype] * scale), (*what, (got - right).abs().max().item() / scale)


def right(p, x, dy, bias):
    "The three products by the twin, in float64."
    from sparse_workbench.kernels.linear import KERNELS
    twin, exact = next(k for k in KERNELS if k.name == 'block twin'), (p.values.double(), p.index, p.shape)
    return twin.forward(x.double(), *exact, bias.double()), twin.grad_x(dy.double(), *exact), twin.grad_values(dy.double(), x.double(), *exact)


def test_every_block_type_and_tile():
    from sparse_workbench.kernels.block import SIZES, block_forward, block_grad_values, block_grad_x
    for dtype in ALLOWED:
        for r in SIZES:
            for c in SIZES if dtype == torch.bfloat16 else (r,):
                for tokens in (1, 16, 33, 257, 1000):
                    p, x, dy, bias = problem(5, 6, r, c, tokens, dtype)
                    exact = p.values, p.index, p.shape
                    got = block_forward(x, *exact, bias), block_grad_x(dy, *exact), block_grad_values(dy, x, *exact)
                    for name, a, b in zip(('y', 'x', 'values'), got, right(p, x, dy, bias)): check(a, b, dtype, (name, dtype, r, c, tokens))


def test_every_output_is_written_and_nothing_else():
    from sparse_workbench.kernels.block import _outer, _sum, by_column
    from sparse_workbench.kernels.linear import block_rows
    for r, c, tokens in ((16, 16, 5), (32, 64, 129), (128, 128, 300), (64, 16, 64)):
        for sparsity in (0., .8, 1.):
            p, x, dy, bias = problem(4, 3, r, c, tokens, torch.bfloat16, sparsity)
            whole = [torch.full((len(z) + 5, *z.shape[1:]), float('nan'), dtype=torch.bfloat16, device='cuda') for z in (dy, x, p.values)]
            y, dx, dv = (z[:-5] for z in whole)
            _sum(x, p.values, *p.index, None, bias, y, True)
            _sum(dy, p.values, *by_column(*p.index, 3), None, dx, False)
            _outer(dy, x, block_rows(*p.index).int(), p.index[1], dv)
            for a, b in zip((y, dx, dv), right(p, x, dy, bias)): check(a, b, torch.bfloat16, (r, c, tokens, sparsity))
            assert all(z[-5:].isnan().all() for z in whole)


def test_empty():
    from sparse_workbench.kernels.block import block_forward, block_grad_values, block_grad_x
    p, x, dy, bias = problem(4, 3, 32, 32, 0, torch.float16)
    assert block_forward(x, p.values, p.index, p.shape, bias).shape == (0, 128) and block_grad_x(dy, p.values, p.index, p.shape).shape == (0, 96)
    assert not block_grad_values(dy, x, p.values, p.index, p.shape).any()
    p, x, dy, bias = problem(4, 3, 32, 32, 9, torch.float16, 1.)
    assert torch.equal(block_forward(x, p.values, p.index, p.shape, bias), bias.expand(9, 128)) and not block_grad_x(dy, p.values, p.index, p.shape).any()


def test_the_operator_chooses_them():
    from sparse_workbench.kernels.linear import Packed, choose, sparse_linear, unpack
    for dtype in ALLOWED:
        p, x, dy, bias = problem(6, 4, 64, 32, 77, dtype)
        assert choose('block', p.values, 77).name == 'block triton' and choose('block', p.values.double(), 77).name == 'block twin'
        assert choose('block', p.values[:, :24].contiguous(), 77).name == 'block twin'
        x_, b_, v = x.t().contiguous().t().requires_grad_(), bias.clone().requires_grad_(), p.values.clone().requires_grad_()
        grads = torch.autograd.grad(sparse_linear(x_, Packed('block', p.shape, {**p.tensors, 'values': v}), b_), (x_, v, b_), dy)
        _, gx, gv = right(p, x, dy, bias)
        for name, a, b in zip(('x', 'values', 'bias'), grads, (gx, gv, dy.double().sum(0))): check(a, b, dtype, (name, dtype))
        assert torch.equal(grads[0], torch.autograd.grad(sparse_linear(x_, p, bias), x_, dy)[0]), 'not the same bits twice'
        check(sparse_linear(x.view(7, 11, -1), p), F.linear(x.view(7, 11, -1).double(), unpack(p).double()), dtype, ('leading axes', dtype))


def test_compiled_autocast_and_captured():
    from sparse_workbench.kernels.linear import SparseLinear
    p, x, dy, bias = problem(6, 4, 32, 32, 50, torch.float32)
    layer = SparseLinear(p, bias)
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (50, 17):
        assert torch.equal(compiled(x[:tokens]), layer(x[:tokens]))
    with torch.autocast('cuda', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and torch.equal(compiled(x), layer(x))
    x_ = x.clone().requires_grad_()
    params = (x_, layer.values, layer.bias)
    def step(): return torch.autograd.grad(layer(x_), params, dy)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): eager = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, eager): assert torch.equal(a, b)


def test_more_than_two_billion_inputs():
    from sparse_workbench.kernels.block import block_forward, block_grad_values, block_grad_x
    if torch.cuda.mem_get_info()[0] < 24 * 2**30: return print('  left out: less than 24 GB free')
    tokens = 2**31 // 4096 + 77                                                # the last rows begin beyond 2³¹ elements
    p, _, _, bias = problem(2, 64, 64, 64, 1, torch.float16)
    x, dy = torch.zeros(tokens, 4096, device='cuda', dtype=torch.float16), torch.zeros(tokens, 128, device='cuda', dtype=torch.float16)
    x[-9:], dy[-9:] = torch.randn(9, 4096).half(), torch.randn(9, 128).half()
    exact = p.values, p.index, p.shape
    y, gx, gv = right(p, x[-9:], dy[-9:], bias)
    check(block_forward(x, *exact, bias)[-9:], y, torch.float16, ('y',))
    check(block_grad_x(dy, *exact)[-9:], gx, torch.float16, ('x',))
    check(block_grad_values(dy, x, *exact), gv, torch.float16, ('values',))


if __name__ == '__main__':
    from as_script import run
    sys.exit(run(globals()))
