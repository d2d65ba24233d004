"""Export and advice on a real GPU: the kernels chosen are right, the times are the device's, a model trains on after its layers were exchanged.

Runs under pytest, and as a script where there is no pytest: python tests/test_deploy_cuda.py
"""
import copy
import sys
import tempfile
from pathlib import Path

import torch
from launched import ran
from torch import nn

try: import pytest
except ImportError: pytest = None
if pytest:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]


def model_and_ids(pattern, sparsity=None, dtype=torch.bfloat16, tokens=4096, hidden=4096): # smaller products end before they are launched one by one
    "A decoder of two layers with random weights, pruned, on the GPU."
    from sparse_workbench.oneshot import prune
    from sparse_workbench.zoo import Llama, LlamaConfig
    with torch.device('cuda'): model = Llama(LlamaConfig(512, hidden, 2 * hidden, 2, 16, 16, hidden // 16)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.normal_(0, .02)
    if pattern: prune(model, sparsity, pattern=pattern)
    return model, torch.randint(512, (1, tokens), device='cuda')


def test_blocks_are_faster_and_right():
    from sparse_workbench.deploy import ALLOWED_WHOLE, export
    from sparse_workbench.kernels.linear import SparseLinear
    for dtype in (torch.bfloat16, torch.float16):
        model, ids = model_and_ids('block128', .9, dtype)
        right, dense = model(ids), {n: p.clone() for n, p in model.named_parameters()}
        model, told = export(model, ids, budget=20)
        print(told)
        assert told.total['sparse'] == told.total['layers'] == 14, told
        assert told.whole['error'] <= ALLOWED_WHOLE[dtype] and (model(ids) - right).norm() <= ALLOWED_WHOLE[dtype] * right.norm()
        assert told.total['bytes'] < .2 * told.total['dense_bytes'] and told.total['ms'] < told.total['dense_ms']
        from sparse_workbench.kernels.linear import unpack
        for n, m in model.named_modules():
            if isinstance(m, SparseLinear): assert torch.equal(unpack(m.packed), dense[n + '.weight'])


def test_two_of_four_runs_where_it_pays():
    from sparse_workbench.deploy import export
    from sparse_workbench.kernels import cusparselt
    for tokens in (16, 4096):
        model, ids = model_and_ids('2:4', tokens=tokens, hidden=4096)
        right = model(ids)
        with ran(cusparselt, 'multiply'): model, told = export(model, ids, budget=20)      # raced, whoever won
        print(told)
        for r in told.rows: assert (r['kernel'] == 'dense') == bool(r['reason']), r
        if own := [r for r in told.rows if 'cuSPARSELt' in r['kernel']]:
            with ran(cusparselt, 'multiply') as called: model(ids)
            assert len(called) == len(own)
        assert (model(ids) - right).norm() <= .05 * right.norm()


def test_few_tokens_in_a_graph():
    from sparse_workbench.deploy import export
    from sparse_workbench.kernels import block
    for graph in (False, True):
        model, ids = model_and_ids('block64', .9, tokens=16, hidden=4096)
        with ran(block, '_few'): model, told = export(model, ids, budget=15, graph=graph)
        print(told)
        if not graph: eager = told.total['dense_ms']
        else: assert told.total['dense_ms'] <= 1.2 * eager, 'a replayed graph has no launches to wait for'


def test_a_wrong_kernel_does_not_get_in():
    from dataclasses import replace

    from sparse_workbench.deploy import export
    from sparse_workbench.kernels.linear import KERNELS, choose, register
    model, ids = model_and_ids('block128', .9)
    real = choose('block', torch.ones(1, 128, 128, device='cuda', dtype=torch.bfloat16), 512)
    before = KERNELS[:]
    try:
        register(replace(real, name='wrong', forward=lambda x, values, index, shape, bias: x.new_full((len(x), shape[0]), 3.)))
        _, told = export(model, ids, budget=10)
    finally: KERNELS[:] = before
    print(told)
    assert told.total['sparse'] == 0 and any('wrong by' in r['reason'] for r in told.rows), told
    assert all(type(m) is nn.Linear for n, m in model.named_modules() if n.endswith('_proj'))


def test_it_trains_and_compiles_afterwards():
    from sparse_workbench.deploy import export
    from sparse_workbench.kernels.linear import SparseLinear, block_rows
    model, ids = model_and_ids('block128', .9, torch.float32, tokens=1024)
    twin = copy.deepcopy(model)
    model, told = export(model, ids, budget=10)
    assert told.total['sparse'], told
    grads = []
    for m in (model, twin, torch.compile(model)):
        m.zero_grad()
        m(ids).float().square().mean().backward()
        grads.append({n.replace('_orig_mod.', ''): p.grad.clone() for n, p in m.named_parameters()})
    for n, m in model.named_modules():
        if not isinstance(m, SparseLinear) or m.format != 'block': continue
        r, c = m.values.shape[1:]
        tiles = grads[1][n + '.weight'].view(m.shape[0] // r, r, m.shape[1] // c, c).transpose(1, 2)[block_rows(m.offsets, m.columns), m.columns.long()]
        for g in (grads[0], grads[2]): assert (g[n + '.values'] - tiles).norm() <= 1e-3 * tiles.norm(), n


def test_saved_and_loaded_with_its_kernels():
    from sparse_workbench.deploy import export
    from sparse_workbench.formats import load_sparse, save_sparse
    from sparse_workbench.kernels.linear import SparseLinear
    model, ids = model_and_ids('block128', .9)
    plain = copy.deepcopy(model)
    model, told = export(model, ids, budget=10)
    with tempfile.TemporaryDirectory() as tmp:
        save_sparse(model, Path(tmp)/'m')
        back, kernels = load_sparse(Path(tmp)/'m', device='cuda'), load_sparse(Path(tmp)/'m', device='cuda', kernels=True)
    for (n, a), (_, b) in zip(plain.named_parameters(), back.named_parameters()): assert torch.equal(a, b), n
    assert sum(isinstance(m, SparseLinear) for m in kernels.modules()) == told.total['sparse']
    assert torch.equal(kernels(ids), model(ids))


def test_advice():
    from sparse_workbench.deploy import advise
    model, ids = model_and_ids(None, tokens=4096, hidden=4096)
    told = advise(model, ids, ['2:4', 'block128', 'unstructured'], (.5, .8, .9), budget=40)
    print(told)
    for r in told.rows: print(r)
    blocks = {r['sparsity']: r for r in told.rows if r['pattern'] == 'block128' and r['shape'] == (8192, 4096)}
    assert blocks[.9]['faster'] > 2 and blocks[.9]['faster'] > blocks[.5]['faster']
    assert all(r['of_limit'] < 1.3 for r in told.rows if r['faster'])
    assert all(not r['faster'] and r['reason'] for r in told.rows if r['pattern'] == 'unstructured')
    assert all(type(m) is nn.Linear for n, m in model.named_modules() if n.endswith('_proj'))


def test_errors():
    from sparse_workbench.deploy import export
    model, ids = model_and_ids('block128', .9, tokens=64)
    try: export(model, ids.cpu())
    except ValueError as e: assert 'the example input is on cpu and the model on cuda:0' in str(e)
    else: raise AssertionError('an input on the wrong device went through')


if __name__ == '__main__':
    from as_script import run
    sys.exit(run(globals()))
