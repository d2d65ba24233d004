"A step of N:M training asks no tensor for its value, which on a GPU would mean waiting. What a real GPU says to it: test_kernels_cuda.py."
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_workbench import recipes

ASKING = {'_local_scalar_dense', 'item', 'is_nonzero', 'equal', 'nonzero', 'masked_select', 'unique_consecutive', '_unique2', 'unique_dim'}
METHODS = {'STE': (recipes.ste, {}), 'SR-STE': (recipes.sr_ste, {}), 'MdGf linear': (recipes.mask_decay, dict(kind='linear')), 'MdGf exponential': (recipes.mask_decay, {}),
           'SdGf stepwise': (recipes.structure_decay, {}), 'SdGf geometric': (recipes.structure_decay, dict(kind='geometric'))}


class Asked(TorchDispatchMode):
    "Names of the operators that need a tensor's value; indices of bools among them."
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix('aten::').split('.')[0]
        flags = name in ('index', 'index_put', 'index_put_') and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in ASKING or flags: self.names.append(name)
        return func(*args, **kwargs or {})


def test_the_counter_counts():
    x = torch.arange(4.)
    with Asked() as asked:
        assert x.any() and x[x > 1].tolist() == [2, 3] and x.max().item() == 3
        x[x > 2] = 0
    assert asked.names == ['_local_scalar_dense', 'index', '_local_scalar_dense', 'index_put_'], asked.names


@pytest.mark.parametrize('pattern', ['2:4', '1:16', '1:32'])
@pytest.mark.parametrize('method', METHODS)
def test_a_step_asks_nothing(method, pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 512))
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    recipe, how = METHODS[method]
    sp, x = recipe(model, opt, pattern=pattern, total_steps=20, **how), torch.randn(8, 256)
    for step in range(20):
        model(x).square().mean().backward()
        with Asked() as asked: opt.step()
        opt.zero_grad()
        # Only whether all weights are finite, twice for each bucket: on a GPU that answer travels by itself and is read a step later.
        assert asked.names == ['_local_scalar_dense'] * 2 * len(sp.buckets), (step, asked.names)
