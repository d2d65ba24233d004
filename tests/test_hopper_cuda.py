"""The block-sparse Hopper kernels against their PyTorch twin, on a real H100 or H200.

Runs under pytest, and as a script where there is no pytest: python tests/test_hopper_cuda.py
"""
import sys
import warnings

import torch
from blocks import captured, check, more_than_two_billion_inputs, problem, right
from launched import ran

try: import pytest
except ImportError: pytest = None
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if pytest: pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HOPPER, reason='needs a GPU of compute capability 9.0')]

TYPES = torch.float16, torch.bfloat16


def test_every_block_and_type():
    from sparse_workbench.kernels.hopper import BLOCKS, hopper_forward, hopper_grad_values, hopper_grad_x
    for dtype in TYPES:
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
    for dtype in TYPES:
        p, x, dy, bias = problem(6, 4, 128, 64, 777, dtype)
        assert choose('block', p.values, 777).name == 'block hopper' and choose('block', p.values, 77).name == 'block triton' and choose('block', p.values, 7).name == 'block few tokens'
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
    captured(lambda: torch.autograd.grad(layer(x_), (x_, layer.values, layer.bias), dy))


def test_a_topology_that_changes_is_seen():
    from sparse_workbench.kernels.hopper import hopper_forward, hopper_grad_x
    p, x, dy, bias = problem(6, 5, 64, 64, 300, torch.bfloat16)
    for _ in range(2):
        y, dx, _ = right(p, x, dy, bias)
        check(hopper_forward(x, p.values, p.index, p.shape, bias), y, torch.bfloat16, ('forward',))
        check(hopper_grad_x(dy, p.values, p.index, p.shape), dx, torch.bfloat16, ('grad x',))
        p.index[1].copy_(4 - p.index[1])


def test_a_wrong_build_is_left_out():
    from sparse_workbench.kernels import block, hopper
    from sparse_workbench.kernels.linear import choose
    v, kept, was = torch.ones(3, 64, 128, device='cuda').half(), dict(block._TRUSTED), hopper.hopper_forward
    block._TRUSTED.clear()
    try:
        hopper.hopper_forward = lambda *a: was(*a) * 1.1
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            assert choose('block', v, 4096).name == 'block triton' and choose('block', v, 4096).name == 'block triton'
        assert len(told) == 1 and 'gives wrong numbers' in str(told[0].message)
    finally:
        hopper.hopper_forward = was
        block._TRUSTED.clear()
        block._TRUSTED.update(kept)


def test_builds_agree_with_the_twin_on_the_small_problem():
    from sparse_workbench.kernels.hopper import ACTIVATE, agrees_wide
    from sparse_workbench.kernels.mlp import agrees_up
    here = torch.device('cuda:0')
    for act in ACTIVATE: assert agrees_wide(here, torch.bfloat16, 256, 128, act), act
    assert agrees_wide(here, torch.float16, 256, 64)
    for gated in (False, True): assert agrees_up(here, torch.float16, 64, 64, 'gelu', gated) and agrees_up(here, torch.float16, 256, 128, 'relu2', gated), gated


def test_a_build_that_fails_gives_way():
    from unittest.mock import patch

    from sparse_workbench.kernels import block, hopper, mlp
    (p, x, dy, bias), (gate, _, _, _) = (problem(16, 64, 256, 64, 6000, torch.bfloat16, .9, seed) for seed in (1, 2))
    assert x.nbytes > hopper.CACHED
    real, tiles = hopper.built, []
    def built(device, items):
        d = dict(items)
        tiles.append((d['TO'], d['GATED']))
        if d['GATED'] or d['TO'] == 256: raise RuntimeError('no such instruction')
        return real(device, items)
    with patch.dict(block._TRUSTED, clear=True), patch.object(hopper, 'built', built), torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for _ in range(2):
            check(hopper.hopper_forward(x, p.values, p.index, p.shape, bias), right(p, x, dy, bias)[0], torch.bfloat16, ('wide tile',))
            assert torch.equal(mlp.sparse_up(x, p, gate), mlp.up_twin(x, p, gate))
    assert sorted(str(w.message).split(' is left out')[0] for w in told if 'is left out' in str(w.message)) == [
        f"the kernel 'block hopper, {what}' for 256x64 blocks" for what in ('silu, gated', 'wide tile, none')], [str(w.message) for w in told]
    assert tiles[-1] == (128, 0)


def test_float32_fuses_under_autocast():
    from sparse_workbench.kernels import hopper
    from sparse_workbench.kernels.mlp import sparse_up, up_twin
    (p, x, _, bias), (gate, _, _, gate_bias) = (problem(5, 3, 128, 64, 333, torch.float32, .6, seed) for seed in (1, 2))
    with torch.autocast('cuda', torch.bfloat16), torch.no_grad():
        right_ = up_twin(x / 10, p, gate, 'silu', bias, gate_bias)
        with ran(hopper, 'launch') as called: got = [sparse_up(x / 10, p, gate, 'silu', bias, gate_bias) for _ in range(3)]
    assert [a[4] for a in called][-3:] == ['gated'] * 3 and got[0].dtype == torch.bfloat16 and torch.equal(got[0], got[2])
    check(got[0], right_.double(), torch.bfloat16, ('autocast',), 4)


def test_the_fused_feed_forward_layer():
    from sparse_workbench.kernels.mlp import ACTIVATE, fuses, sparse_up, up_twin
    for r, c in ((128, 128), (256, 64), (64, 64), (128, 64), (256, 128)):
        for columns in (3, 128):
            (p, x, _, bias), (gate, _, _, gate_bias) = (problem(5, columns, r, c, 444, torch.bfloat16, .7, seed) for seed in (1, 2))
            x = x / (columns * c * .3)**.5
            for name in ACTIVATE:
                for g, gb in ((gate, gate_bias), (None, None)):
                    assert fuses(x, p, g, name), (r, c, name, g is not None)
                    with torch.no_grad(): got = sparse_up(x.view(4, 111, -1), p, g, name, bias, gb).view(444, -1)
                    def wide(q): return None if q is None else type(q)(q.format, q.shape, {n: t.double() if n == 'values' else t for n, t in q.tensors.items()})
                    exact = up_twin(x.double(), wide(p), wide(g), name, bias.double(), None if gb is None else gb.double())
                    check(got, exact, torch.bfloat16, (r, c, columns, name, g is not None), 2)
    compiled = torch.compile(lambda x: sparse_up(x, p, gate), fullgraph=False)
    with torch.no_grad(): assert torch.equal(compiled(x), sparse_up(x, p, gate))


def test_more_than_two_billion_inputs():
    from sparse_workbench.kernels.hopper import hopper_forward, hopper_grad_values, hopper_grad_x
    more_than_two_billion_inputs(hopper_forward, hopper_grad_x, hopper_grad_values)


if __name__ == '__main__':
    from as_script import run
    sys.exit(run(globals()))
