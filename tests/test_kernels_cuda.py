"""The Triton kernels against their PyTorch twins, on a real GPU. Without one they are tested, interpreted, in their notebooks.

Runs under pytest, and as a script where there is no pytest: python tests/test_kernels_cuda.py
"""
import sys

import torch
from launched import ran

try: import pytest
except ImportError: pytest = None
if pytest:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def twin(scores: torch.Tensor, keep: int) -> torch.Tensor:
    "The PyTorch implementation, on the CPU."
    from sparse_workbench.patterns import nm_keep
    return nm_keep(scores.cpu(), keep)


def hard(groups: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    "Scores full of ties, zeros of both signs, infinities, NaN and denormal numbers, on the GPU."
    f = torch.finfo(dtype)
    odd = torch.tensor([0., -0., f.max, -f.max, float('inf'), -float('inf'), float('nan'), f.tiny, -f.tiny, 0, 0], dtype=torch.float64).to(dtype)
    odd[-2:] = torch.tensor([1, 3], dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).view(dtype)   # the smallest denormals
    x = torch.randint(-2, 3, (groups, size)).to(dtype)
    return torch.where(torch.rand(groups, size) < .3, odd[torch.randint(len(odd), (groups, size))], x).cuda()


def test_every_size_and_type():
    from sparse_workbench.kernels.nm import nm_keep_kernel
    for dtype in DTYPES:
        for size in range(1, 17) if dtype == torch.bfloat16 else (2, 4, 5, 16):
            for groups in (7, 1025, 40_000) if size in (1, 2, 4, 8, 16) else (7, 1025, 40_001):
                x = hard(groups, size, dtype) if groups != 1025 else torch.randn(groups, size, device='cuda').to(dtype)
                for keep in {0, 1, size // 2, size}:
                    assert torch.equal(nm_keep_kernel(x, keep).cpu(), twin(x, keep)), (dtype, size, groups, keep)


def test_long_groups():
    from sparse_workbench.kernels.nm import LONGEST, nm_keep_kernel, nm_mask_magnitude, row_keep_kernel
    from sparse_workbench.patterns import rows_by_value
    for dtype in DTYPES:
        for size in (17, 31, 32, 33, 64, 100, 256, 1000, 4096, 5000, LONGEST) if dtype == torch.bfloat16 else (17, 32, 300):
            x = hard(max(3, 100_000 // size), size, dtype)
            x = x.where(~x.isnan(), 1)
            for keep in {1, size // 32 + 1, size // 3, size - 1}: assert torch.equal(nm_keep_kernel(x, keep).cpu(), rows_by_value(x.cpu(), size - keep)), (dtype, size, keep)
            w = torch.randn(77, 3 * size, device='cuda').to(dtype)
            assert torch.equal(nm_mask_magnitude(w, 2, size).cpu(), rows_by_value(w.abs().cpu().view(-1, size), size - 2).view_as(w)), (dtype, size)
    x = torch.randn(9, LONGEST + 5, device='cuda')
    assert torch.equal(row_keep_kernel(x, 999).cpu(), rows_by_value(x.cpu(), 999))


def test_a_step_waits_for_nothing():
    from torch import nn

    from sparse_workbench import recipes
    methods = {'STE': (recipes.ste, {}), 'SR-STE': (recipes.sr_ste, {}), 'MdGf linear': (recipes.mask_decay, dict(kind='linear')), 'MdGf': (recipes.mask_decay, {}),
               'SdGf': (recipes.structure_decay, {}), 'SdGf geometric': (recipes.structure_decay, dict(kind='geometric'))}
    for name, (recipe, how) in methods.items():
        for pattern in ('2:4', '1:16', '1:32'):
            model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 512)).cuda()
            opt = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
            x = torch.randn(8, 256, device='cuda')
            sp = recipe(model, opt, pattern=pattern, total_steps=20, **how)
            for step in range(20):
                model(x).square().mean().backward()
                torch.cuda.set_sync_debug_mode('error' if step > 1 else 'default')       # the first step makes the optimizer's state
                try: opt.step()
                except RuntimeError as e: raise AssertionError((name, pattern, step)) from e
                finally: torch.cuda.set_sync_debug_mode('default')
                opt.zero_grad()
            sp.detach()


def test_magnitude_from_the_weight():
    from sparse_workbench.kernels.nm import nm_mask_magnitude
    for dtype in DTYPES:
        for keep, of in ((1, 2), (2, 4), (3, 6), (4, 8), (5, 12), (8, 16)):
            w = torch.randn(333, 24 * of, device='cuda').to(dtype)
            w[::7] = hard(len(w[::7]), w.size(1), dtype)
            for x in (w, w[5:44], w.t().contiguous().t(), w[:, :of]):
                assert torch.equal(nm_mask_magnitude(x, keep, of).cpu(), twin(x.abs().reshape(-1, of), keep).view_as(x)), (dtype, keep, of, x.stride())


def test_nothing_beyond_the_mask_is_written():
    from sparse_workbench.kernels import nm as kernels
    made = []
    real, kernels.torch.empty = torch.empty, lambda shape, **how: made.append(torch.full((shape[0] + 64, *shape[1:]), 7, dtype=torch.uint8, device=how['device'])) or made[-1][:shape[0]].view(torch.bool)
    try:
        for groups, size in ((1, 4), (1023, 4), (4097, 8), (999, 5), (33, 16), (12345, 3)):
            made.clear()
            kernels.nm_keep_kernel(real(groups, size, device='cuda').normal_(), 1)
            assert (made[0][:groups] < 2).all() and (made[0][groups:] == 7).all(), (groups, size)
    finally: kernels.torch.empty = real


def test_more_than_two_billion_scores():
    from sparse_workbench.kernels.nm import nm_keep_kernel
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30: return
    for groups, size in ((2**29 + 1001, 4), (2**31 // 7 + 1001, 7)):
        x = torch.empty(groups, size, dtype=torch.bfloat16, device='cuda').normal_()
        mask = nm_keep_kernel(x, 2)
        for part in (slice(0, 5000), slice(2**31 // size - 5000, 2**31 // size + 1000), slice(-5000, None)):
            assert torch.equal(mask[part].cpu(), twin(x[part], 2)), (size, part)
        del x, mask


def test_the_operator_is_taken_over():
    from sparse_workbench.kernels import nm as kernels
    from sparse_workbench.patterns import nm, nm_keep
    with ran(kernels, '_launch') as called:
        w = torch.randn(64, 128, device='cuda')
        assert torch.equal(nm(2, 4).select(w.abs()).cpu(), nm(2, 4).select(w.abs().cpu())) and called
        assert torch.equal(nm(2, 4, axis='out').select(w.abs()).cpu(), nm(2, 4, axis='out').select(w.abs().cpu()))
        conv = torch.randn(8, 16, 3, 3, device='cuda')
        assert torch.equal(nm(2, 4).select(conv.abs()).cpu(), nm(2, 4).select(conv.abs().cpu()))
        compiled = torch.compile(lambda x: nm_keep(x, 2) & (x > 0), fullgraph=True)
        assert torch.equal(compiled(w.view(-1, 4)).cpu(), twin(w.view(-1, 4), 2) & (w.view(-1, 4).cpu() > 0))
        assert len(called) == 4


def test_pruning_is_the_same_on_both():
    from torch import nn

    from sparse_workbench.allocation import global_
    from sparse_workbench.kernels import nm, threshold
    from sparse_workbench.oneshot import prune
    cases = (nm, '_launch', dict(pattern='2:4')), (threshold, '_zero_', dict(sparsity=.5)), (threshold, '_cuts', dict(sparsity=.7, allocate=global_)), (nm, '_launch_long', dict(sparsity=.6, pattern='per_row'))
    for module, launch, how in cases:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            here = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 128)).to(dtype)
            there = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 128)).to(dtype)
            there.load_state_dict(here.state_dict())
            there.cuda()
            prune(here, **how)
            with ran(module, launch): prune(there, **how)
            for a, b in zip(here.parameters(), there.parameters()): assert torch.equal(a, b.cpu()), (how, dtype)


if __name__ == '__main__':
    from as_script import run
    sys.exit(run(globals()))
