"Models inside torch.compile, data parallelism and activation checkpoints have the sites, masks, files and checkpoints of the bare model; packed layers are seen."
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sparse_workbench.accounting import account
from sparse_workbench.core import sites
from sparse_workbench.deploy import export
from sparse_workbench.formats import dense_sites, exchange, load_sparse, manifest, masks_from_zeros, packed_linear, save_sparse, sizes
from sparse_workbench.kernels.linear import SparseLinear
from sparse_workbench import recipes
from sparse_workbench.loop import fit, shuffled
from sparse_workbench.oneshot import prune
from sparse_workbench.rules import given
from sparse_workbench.scores import wanda


class Block(nn.Module):
    "A child called `module` of its own, which is no wrapper's."
    def __init__(self):
        super().__init__()
        self.module, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
    def forward(self, x): return self.out(self.module(x).relu())


def bare():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(32, 32), Block(), nn.Linear(32, 32), nn.Linear(32, 8)).eval()


@pytest.fixture
def group():
    "A process group of one."
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model): return torch.compile(model, backend='eager')

def pieces(model):
    model[0], model[1], model[2] = compiled(model[0]), checkpoint_wrapper(model[1]), checkpoint_wrapper(compiled(model[2]))
    return model

WRAPS = {'compiled': compiled, 'data parallel': nn.DataParallel, 'distributed': nn.parallel.DistributedDataParallel, 'pieces': pieces,
         'checkpointed': checkpoint_wrapper, 'all': lambda m: nn.parallel.DistributedDataParallel(compiled(pieces(m)))}


@pytest.mark.parametrize('wrap', WRAPS.values(), ids=WRAPS)
def test_wrapped_models_have_the_names_of_the_bare_one(wrap, group, tmp_path):
    plain, model, x = bare(), wrap(bare()), torch.randn(8, 32)
    assert [s.name for s in sites(model)] == [s.name for s in sites(plain)] and '0.module.weight' in {s.name for s in sites(model)}
    for include in ('0.module', '2.out.weight', nn.Linear, '1'): assert [s.name for s in sites(model, include)] == [s.name for s in sites(plain, include)]
    report = prune(model, .5, calibration=[x], score=wanda)
    want = prune(plain, .5, calibration=[x], score=wanda)
    assert [r['name'] for r in report.rows] == [r['name'] for r in want.rows]
    masks = masks_from_zeros(model)
    assert masks.keys() == masks_from_zeros(plain).keys() and all(torch.equal(m, masks[n]) for n, m in masks_from_zeros(plain).items())
    assert sizes(model) == sizes(plain) and account(model, x).total == account(plain, x).total
    save_sparse(model, tmp_path/'wrapped', report=report, sites=sites(model))
    save_sparse(plain, tmp_path/'bare', report=want)
    assert list(manifest(tmp_path/'wrapped')['tensors']) == list(manifest(tmp_path/'bare')['tensors']) == list(plain.state_dict())
    for folder in ('wrapped', 'bare'):
        for make in (bare, lambda: wrap(bare())):
            fresh = make()
            for p in fresh.parameters(): nn.init.zeros_(p)
            assert load_sparse(tmp_path/folder, fresh) is fresh
            assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), plain.parameters(), strict=True))
    again = wrap(bare())
    prune(again, .5, rule=given(masks))
    assert all(torch.equal(m, masks[n]) for n, m in masks_from_zeros(again).items())
    torch.compiler.reset()


STEPS = 12

def trained(model, folder, steps, fits=STEPS):
    "Gradual pruning, up to a step."
    torch.manual_seed(1)
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    sp, x = recipes.gmp(model, opt, sparsity=.75, total_steps=STEPS), torch.randn(64, 32)
    stop = None if steps == STEPS else lambda rows: max(r['step'] for r in rows) >= steps
    fit(model, opt, lambda m, b: m(b[0]).square().mean(), shuffled(x, batch=16), STEPS, sparsifier=sp, every=4, checkpoint=folder, stop=stop)
    return {s.name: s.mask for s in sp.sites}


@pytest.mark.parametrize('first, then', [('compiled', None), (None, 'compiled'), ('compiled', 'distributed'), ('distributed', None), ('pieces', None), (None, 'pieces'), ('pieces', 'compiled')])
def test_a_checkpoint_of_one_resumes_on_the_other(first, then, group, tmp_path):
    wrapped = lambda name: WRAPS[name](bare()) if name else bare()
    whole, half, rest = bare(), wrapped(first), wrapped(then)
    want = trained(whole, tmp_path/'whole', STEPS)
    trained(half, tmp_path/'parts', 4)
    got = trained(rest, tmp_path/'parts', STEPS)
    assert got.keys() == want.keys() and all(torch.equal(got[n], m) for n, m in want.items())
    assert all(torch.allclose(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True)) and not torch.equal(next(rest.parameters()), next(half.parameters()))
    torch.compiler.reset()


# Packed layers

def partly(model, *names):
    "With some layers packed, as `export` puts them in."
    for n in names: exchange(model, model.get_submodule(n), packed_linear(model.get_submodule(n), 'block', (8, 8)))
    return model


def test_packed_layers_are_seen(tmp_path):
    plain, x = bare(), torch.randn(8, 32)
    prune(plain, .75, pattern='block8')
    want, masks = account(plain, x), masks_from_zeros(plain)
    every = list(masks)
    for names in (['1'], ['0.out', '2.module'], [n.removesuffix('.weight') for n in every]):
        for model in (partly(copy.deepcopy(plain), *names), compiled(partly(copy.deepcopy(plain), *names))):
            found = masks_from_zeros(model)
            assert found.keys() == masks.keys() and all(torch.equal(m, masks[n]) for n, m in found.items())
            have = account(model, x)
            for k in ('weights', 'kept', 'dense', 'smallest', 'operations', 'effective'): assert have.total[k] == want.total[k], k
            assert have.total['held'] < want.total['held'] == want.total['dense'] and 'as it is packed' in repr(have)
            assert {s.name for s in dense_sites(model)} == {n for n in every if n.removesuffix('.weight') not in names}
            back = load_sparse(save_sparse(model, tmp_path/'m'), bare())
            assert all(torch.equal(a, b) for a, b in zip(back.parameters(), plain.parameters(), strict=True))
    torch.compiler.reset()


def test_packed_layers_are_named_where_they_cannot_be_pruned(tmp_path):
    model = bare()
    prune(model, .75, pattern='block8')
    partly(model, '1')
    report = prune(model, .9, ignore='0.*')
    assert '1.weight' not in {r['name'] for r in report.rows} and report.left['1.weight'] == 'packed by export' and '1.weight stays as it is (packed by export)' in str(report)
    with pytest.raises(ValueError, match=r"no weight to prune is left. Found: 1.weight \(packed by export\). Zeros of packed layers stay"): prune(model, .5, include='1')
    with pytest.raises(ValueError, match='1.weight .*packed already: load into a dense model'): load_sparse(save_sparse(bare(), tmp_path/'m'), model)


def test_a_partly_exported_model_is_exported_further():
    model, x = bare(), torch.randn(8, 32)
    prune(model, .75, pattern='block8')
    right = model(x)
    partly(model, '1')
    packed = model[1]
    model, told = export(model, x, budget=2)
    rows = {r['name']: r for r in told.rows}
    assert model[1] is packed and rows['1.weight']['reason'] == 'packed already' and rows['1.weight']['bytes'] == packed.packed.nbytes
    assert str(rows['1.weight']['kernel']) == 'block 8×8' and rows['1.weight']['sparsity'] == .75 and len(rows) == 7
    assert torch.allclose(model(x), right, atol=1e-5) and 'packed already' in repr(told)
    with pytest.raises(ValueError, match='every layer of Sequential .*is packed already'): export(partly(bare(), '0.module', '0.out', '1', '2.module', '2.out', '3', '4'), x)


def test_a_layer_that_is_compiled_by_itself_is_not_exchanged():
    "Its wrapper would go on calling the dense layer."
    model, x = bare(), torch.randn(8, 32)
    prune(model, .75, pattern='block8')
    model[1] = compiled(model[1])
    model, told = export(model, x, budget=2)
    assert 'OptimizedModule holds this layer alone' in {r['name']: r['reason'] for r in told.rows}['1.weight']
    with pytest.raises(ValueError, match='OptimizedModule holds this layer alone'): export(compiled(nn.Linear(8, 8)), torch.randn(2, 8))
    assert not any(isinstance(m, SparseLinear) for m in model[1].modules())
    torch.compiler.reset()
