"""The block-sparse Triton kernels against their PyTorch twin, on a real GPU. Without one they are tested, interpreted, in their notebook.

Runs under pytest, and as a script where there is no pytest: python tests/test_block_cuda.py
"""
import sys

import torch
import torch.nn.functional as F
from blocks import ALLOWED, captured, check, more_than_two_billion_inputs, problem, right

try: import pytest
except ImportError: pytest = None
if pytest:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

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
        for sparsity in (0., .8, 2.):
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
    p, x, dy, bias = problem(4, 3, 32, 32, 9, torch.float16, 2.)
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


def test_what_only_the_twin_takes_is_said_once():
    import warnings
    from unittest.mock import patch

    from sparse_workbench.kernels import linear
    for dtype, side, said in ((torch.bfloat16, 32, 0), (torch.bfloat16, 24, 1), (torch.float64, 32, 1)):
        p, x, *_ = problem(3, 2, side, side, 9, dtype)
        with patch.object(linear, '_TOLD', set()), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            for _ in range(3): linear.sparse_linear(x, p)
        told = [str(w.message) for w in told if 'multiplies' in str(w.message)]
        assert len(told) == said and all("'block triton' takes float16, bfloat16, float32, blocks with sides of 16" in t for t in told), told


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
    captured(lambda: torch.autograd.grad(layer(x_), params, dy))


def test_few_tokens_on_hopper():
    from sparse_workbench.kernels.block import _few, few_agrees, few_forward, ranked
    from sparse_workbench.kernels.linear import choose, sparse_linear
    if torch.cuda.get_device_capability() != (9, 0): return print('  left out: needs compute capability 9.0')
    for dtype in (torch.bfloat16, torch.float16):
        for r, c in ((16, 16), (32, 32), (64, 64), (128, 128)) if dtype == torch.float16 else ((128, 128), (64, 64), (256, 64), (64, 256), (128, 16), (16, 128)):
            assert few_agrees(torch.device('cuda:0'), dtype, r, c), (dtype, r, c)
            for rows, columns in ((5, 6), (40, 3), (2, 33)):
                for tokens in (1, 16, 31, 64, 130):
                    p, x, dy, bias = problem(rows, columns, r, c, tokens, dtype)
                    exact = right(p, x, dy, bias)[0]
                    if len(p.values):
                        whole = torch.full((tokens + 70, p.shape[0]), float('nan'), dtype=dtype, device='cuda')
                        _few(x, p.values, p.index[1], ranked(p.index[0]), bias, whole[:tokens])
                        check(whole[:tokens], exact, dtype, (dtype, r, c, rows, columns, tokens))
                        assert whole[tokens:].isnan().all(), (dtype, r, c, tokens)
                    check(few_forward(x, p.values, p.index, p.shape, bias), exact, dtype, (dtype, r, c, rows, columns, tokens))
                    check(few_forward(x, p.values, p.index, p.shape, None), exact - bias.double(), dtype, ('no bias', dtype, r, c, rows, columns, tokens))
    p, x, dy, bias = problem(6, 4, 64, 64, 33, torch.bfloat16)
    assert [choose('block', p.values, n).name for n in (1, 64, 65)] == ['block few tokens', 'block few tokens', 'block triton']
    assert choose('block', p.values.view(-1, 16, 64), 1).name == 'block triton', 'blocks below 32 stay with the general kernel'
    odd = torch.empty(x.numel() + 1, device='cuda', dtype=x.dtype)[1:].view_as(x).copy_(x)
    assert torch.equal(sparse_linear(odd, p, bias), sparse_linear(x, p, bias))
    captured(lambda: [sparse_linear(x, p, bias)])


def test_more_than_two_billion_inputs():
    from sparse_workbench.kernels.block import block_forward, block_grad_values, block_grad_x
    more_than_two_billion_inputs(block_forward, block_grad_x, block_grad_values)


if __name__ == '__main__':
    from as_script import run
    sys.exit(run(globals()))
