"""2:4 through cuSPARSELt and its one-pass packing against their twins, on a real GPU. Without one they run with a stand-in, in their notebook.

Runs under pytest, and as a script where there is no pytest: python tests/test_semi_structured_cuda.py
"""
import itertools
import sys
from unittest.mock import patch

import torch
import torch.nn.functional as F
from launched import ran

try: import pytest
except ImportError: pytest = None
if pytest:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not (torch.cuda.is_available() and torch.backends.cusparselt.is_available()), reason='needs a CUDA device and cuSPARSELt')]

DTYPES = (torch.bfloat16, torch.float16)


def close(got, right):
    return (got - right).abs().max() <= 2**-6 * right.abs().max()


def test_packing_is_its_twin():
    from sparse_workbench.kernels.linear import unpack
    from sparse_workbench.kernels.semi_structured import prune_pack, prune_pack_twin
    for dtype in DTYPES:
        for shape in ((32, 64), (33, 264), (4096, 1024), (0, 8)):
            w = torch.randn(shape, device='cuda').round(decimals=1).to(dtype)
            a, b = prune_pack(w), prune_pack_twin(w)
            assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors), (dtype, shape)
            assert torch.equal(unpack(a), unpack(b)), (dtype, shape)


def test_product_and_gradients():
    from sparse_workbench.kernels.linear import FORMATS, Packed, choose, sparse_linear, unpack
    from sparse_workbench.kernels.semi_structured import prune_pack
    for dtype in DTYPES:
        for tokens in (1, 5, 16, 100, 1024):
            p = prune_pack(torch.randn(256, 512, device='cuda').to(dtype))
            assert choose('2:4', p.values, tokens).name == '2:4 cuSPARSELt'
            x, v, b = (t.requires_grad_() for t in (torch.randn(tokens, 512, device='cuda').to(dtype), p.values.clone(), torch.randn(256, device='cuda').to(dtype)))
            y, dy = sparse_linear(x, Packed('2:4', p.shape, dict(p.tensors, values=v)), b), torch.randn(tokens, 256, device='cuda').to(dtype)
            got = torch.autograd.grad(y, (x, v, b), dy)
            ex, ew, eb = (t.detach().float().requires_grad_() for t in (x, unpack(p), b))
            right = F.linear(ex, ew, eb)
            rx, rw, rb = torch.autograd.grad(right, (ex, ew, eb), dy.float())
            for a, e in zip((y, *got), (right, rx, FORMATS['2:4'].take(rw, p.index, p.shape), rb)):
                assert a.dtype == dtype and close(a.float(), e), (dtype, tokens)


def test_one_conversion_one_search_one_plan():
    from sparse_workbench.kernels import cusparselt as C, semi_structured as S
    from sparse_workbench.kernels.linear import sparse_linear, unpack
    ps, x = [S.prune_pack(torch.randn(128, 256, device='cuda').bfloat16()) for _ in range(2)], torch.randn(48, 256, device='cuda').bfloat16()
    assert C.works(x.device)
    C._FOUND.clear()
    C.planned.cache_clear()
    with ran(torch, '_cslt_compress') as packed, ran(C, 'call') as asked, torch.no_grad():
        ys = [sparse_linear(x, p) for p in ps * 3]
    names = [a[0] for a in asked]
    assert [len(packed), names.count('MatmulSearch'), names.count('MatmulPlanInit'), names.count('Matmul')] == [2, 1, 2, 6], names
    for y, p in zip(ys, ps * 3): assert y.is_contiguous() and close(y.float(), F.linear(x.float(), unpack(p).float()))


def test_without_plans():
    from sparse_workbench.kernels import cusparselt as C, semi_structured as S
    from sparse_workbench.kernels.linear import sparse_linear, unpack
    S._ALGORITHMS.clear()
    ps, x = [S.prune_pack(torch.randn(128, 256, device='cuda').bfloat16()) for _ in range(2)], torch.randn(45, 256, device='cuda').bfloat16()
    with patch.object(C, 'works', lambda device: False), ran(torch, '_cslt_compress', '_cslt_sparse_mm_search', '_cslt_sparse_mm') as calls, torch.no_grad():
        ys = [sparse_linear(x, p) for p in ps * 3]
    assert [len(v) for v in calls.values()] == [2, 1, 6], calls.keys()
    for y, p in zip(ys, ps * 3): assert y.is_contiguous() and close(y.float(), F.linear(x.float(), unpack(p).float()))


def test_plans_of_every_size_bias_and_stream():
    from blocks import captured

    from sparse_workbench.kernels import semi_structured as S
    from sparse_workbench.kernels.linear import sparse_linear, unpack
    for (out, inp), tokens in itertools.product(((128, 128), (4096, 512), (384, 4096)), (1, 16, 333, 4096)):
        p, x = S.prune_pack(torch.randn(out, inp, device='cuda').half()), torch.randn(tokens, inp, device='cuda').half() / inp**.5
        for bias in (None, torch.randn(out, device='cuda').half(), torch.randn(out, 2, device='cuda').half()[:, 1]):
            right = F.linear(x.float(), unpack(p).float(), None if bias is None else bias.float())
            assert close(sparse_linear(x, p, bias).float(), right), (out, inp, tokens)
            with torch.cuda.stream(side := torch.cuda.Stream()):
                side.wait_stream(torch.cuda.default_stream())
                y = sparse_linear(x, p, bias)
            side.synchronize()
            assert close(y.float(), right), (out, inp, tokens, 'stream')
    captured(lambda: [sparse_linear(x, p, bias)])


def test_one_conversion_of_float32_under_autocast():
    from sparse_workbench.kernels.linear import Packed, sparse_linear, unpack
    from sparse_workbench.kernels.semi_structured import prune_pack
    p, x = prune_pack(torch.randn(128, 256, device='cuda').bfloat16()), torch.randn(48, 256, device='cuda')
    wide = Packed('2:4', p.shape, dict(p.tensors, values=p.values.float().requires_grad_()))
    with torch.autocast('cuda', torch.bfloat16):
        with torch.no_grad(), ran(torch, '_cslt_compress') as calls: ys = [sparse_linear(x, wide) for _ in range(3)]
        assert len(calls) == 1
        assert all(torch.equal(y, ys[0]) for y in ys) and close(ys[0].float(), F.linear(x.bfloat16().float(), unpack(p).float()))
        with ran(torch, '_cslt_compress') as calls, torch.no_grad():
            wide.values.mul_(2)
            assert close(sparse_linear(x, wide).float(), 2 * ys[0].float())
        sparse_linear(x, wide).sum().backward()
    assert len(calls) == 1 and wide.values.grad.dtype == torch.float32


def test_what_only_the_twin_takes_is_said_once():
    import warnings

    from sparse_workbench.kernels import linear
    p = linear.pack(torch.eye(128, device='cuda'), '2:4')
    with patch.object(linear, '_TOLD', set()), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for _ in range(3): linear.sparse_linear(torch.randn(5, 128, device='cuda'), p)
    assert len(told) == 1 and "'2:4 twin' multiplies a '2:4' weight, float32, on cuda, which is slow: '2:4 cuSPARSELt' takes float16, bfloat16" in str(told[0].message), told


if __name__ == '__main__':
    from as_script import run
    sys.exit(run(globals()))
