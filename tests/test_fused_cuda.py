"""Feed-forward layers that `export` runs in one pass on a real GPU: the right numbers, in evaluation only, and by measurement.

Runs under pytest, and as a script where there is no pytest: python tests/test_fused_cuda.py
"""
import copy
import sys
import tempfile
from pathlib import Path

import torch
from test_deploy_cuda import model_and_ids

try: import pytest
except ImportError: pytest = None
if pytest:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason='needs a Hopper GPU')]


def fused_modules(model):
    from sparse_workbench.deploy import Fused
    return [n for n, m in model.named_modules() if isinstance(vars(m).get('forward'), Fused)]


def exported(gain=1.05, sparsity=.9, **how):
    from sparse_workbench.deploy import export
    model, ids = model_and_ids('block128', sparsity, **how)
    plain, right = copy.deepcopy(model), model(ids)
    model, told = export(model, ids, budget=20, gain=gain)
    print(told)
    return plain, model, ids, right, told


def test_gate_and_up_are_raced_and_fused():
    for dtype in (torch.bfloat16, torch.float16):
        plain, model, ids, right, told = exported(dtype=dtype, tokens=4096, hidden=4096)
        assert len(told.fused) == 2 and all(r['activation'] == 'silu' and r['parts_ms'] > 0 and r['ms'] > 0 for r in told.fused), told
        assert fused_modules(model) == [r['name'] for r in told.fused if not r['reason']]
        assert (model(ids).float() - right.float()).norm() <= .05 * right.float().norm()


def test_fused_by_any_means_is_right_saved_and_compiled():
    from sparse_workbench.formats import load_sparse, save_sparse
    plain, model, ids, right, told = exported(gain=1e-9, tokens=4096, hidden=4096)
    assert len(fused_modules(model)) == 2, told
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, torch.no_grad(): fast = model(ids)
    assert sum('block_up' in e.key for e in seen.key_averages()), 'the operator of both weights ran'
    with torch.no_grad(): again = torch.compile(model)(ids)
    for y in (fast, again): assert (y.float() - right.float()).norm() <= .05 * right.float().norm()
    with tempfile.TemporaryDirectory() as tmp:
        back = load_sparse(save_sparse(model, Path(tmp)/'m'), device='cuda')
    for (n, a), (_, b) in zip(plain.named_parameters(), back.named_parameters()): assert torch.equal(a, b), n


def test_a_fused_model_trains():
    plain, model, ids, right, told = exported(gain=1e-9, tokens=4096, hidden=4096, dtype=torch.bfloat16)
    model.train()(ids).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if 'mlp' in n)


if __name__ == '__main__':
    from as_script import run
    sys.exit(run(globals()))
