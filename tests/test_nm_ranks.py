"N:M training over two processes, by DDP and by FSDP2, equals one: also with an optimizer that knows the mask, with scales, with low-rank helpers and with a second mask."
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_workbench import recipes
from sparse_workbench.hosts import check_ranks
from sparse_workbench.loop import fit, ranks, shuffled, whole, whole_state
from sparse_workbench.optimizers import MaskedAdam, StepAdam
from sparse_workbench.surgery import add_low_rank, add_scales
from sparse_workbench.testing import assert_same, mlp, seeded

STEPS = 12
METHODS: dict[str, dict] = dict( # recipe, arguments, optimizer, surgery
    ste={}, sr_ste=dict(decay=.05), mask_decay={}, exact=dict(recipe='mask_decay', kind='linear', backward='exact'), structure_decay=dict(pattern='1:4'),
    geometric=dict(recipe='structure_decay', kind='geometric', pattern='1:2'), s_ste={}, masked_decay=dict(frequency=3), step=dict(make=partial(StepAdam, latest=6)), asp=dict(multiples=(1, 1)),
    ast=dict(make=MaskedAdam, frequency=2), cast=dict(make=MaskedAdam, frequency=2, decay=.05), boosted=dict(recipe='ast', frequency=2, surgery=partial(add_low_rank, k=4)),
    scaled=dict(recipe='cast', make=MaskedAdam, frequency=2, decay=.05, surgery=add_scales), bdwp={}, sampled=dict(recipe='s_ste', gradients='mvue'))


def network(kind: str, surgery: Callable, sizes: tuple[int, ...] = (16, 32, 24, 8)) -> tuple[nn.Module, nn.Module]: # the bare model, and what is called
    model = mlp(sizes)
    surgery(model)
    if dist.is_initialized() and kind == 'ddp': return model, nn.parallel.DistributedDataParallel(model)
    if dist.is_initialized() and kind == 'fsdp':
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh('cpu', (dist.get_world_size(),))
        for layer in model[::2]: fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, model


def job(kind: str, name: str) -> dict[str, Tensor]:
    "Train in all processes together; whole weights, masks and dense weights."
    how = dict(recipe=name, make=torch.optim.AdamW, surgery=lambda m: None) | METHODS[name]
    model, net = network(kind, how.pop('surgery'))
    opt = how.pop('make')(model.parameters(), 1e-2, eps=1e-4)
    sp = recipes.REGISTER[how.pop('recipe')]['recipe'](model, opt, total_steps=STEPS, **how)
    rank, world = ranks()
    with seeded(0): x = torch.randn(96, 16)
    fit(net, opt, lambda m, b: (m(b[0]) - b[0][:, :8].sin()).square().mean(), shuffled(x, batch=32, part=rank, parts=world), STEPS, sparsifier=sp)
    check_ranks(sp)
    state = whole_state(sp)['sites']
    return whole(dict(model.state_dict())) | {f'{n} ({k})': state[n][k] for n in state for k in ('mask', 'latent') if k in state[n]}


REFUSED: dict[str, tuple[tuple[int, ...], str]] = dict( # recipe -> sizes of the layers, what it says under FSDP2
    bdwp=((16, 32, 8), '0.weight is sharded, and a second mask needs the whole dense weight on every rank: train with DistributedDataParallel'),
    masked_decay=((16, 12, 8), '0.weight is sharded as (Shard(dim=0),) and transposable(2, 4): keeps 2 of 4 along in and out compares across shards')) # six rows on a rank are a square and a half


def refused(name: str) -> dict[str, str]:
    model, _ = network('fsdp', lambda m: None, REFUSED[name][0])
    before = whole(dict(model.state_dict()))
    try: recipes.REGISTER[name]['recipe'](model, torch.optim.SGD(model.parameters(), .1), total_steps=STEPS)
    except ValueError as e:
        assert_same(before, whole(dict(model.state_dict())))
        return dict(error=str(e))
    return dict(error='nothing was refused')


SAMPLED = ['ddp sampled', 'fsdp sampled'] # draws of their own on every rank
NAMES = [*(f'ddp {m}' for m in METHODS), *(f'fsdp {m}' for m in METHODS if m != 'bdwp')]
NAMES = [n for n in NAMES if n not in SAMPLED]


def worker(rank: int, port: int, folder: str) -> None:
    "One of two processes, as torchrun starts them."
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    try:
        for n in NAMES + SAMPLED:
            torch.manual_seed(rank)
            torch.save(job(*n.split()), f'{folder}/{n} {rank}.pt')
        for n in REFUSED: torch.save(refused(n), f'{folder}/refused {n} {rank}.pt')
        dist.barrier()
    finally: dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def two(once) -> Path:
    "Where the two processes have left their results."
    if not dist.is_available() or not dist.is_gloo_available(): pytest.skip('this build of torch has no gloo, by which processes on CPUs talk')
    return once('two-nm', lambda folder: torch.multiprocessing.spawn(worker, (free_port(), str(folder)), nprocs=2))


pytestmark = pytest.mark.xdist_group('two-nm')


@pytest.mark.parametrize('name', NAMES)
def test_two_processes_equal_one(two, name):
    "Masks to the bit; weights to the rounding of a mean over ranks."
    first, second = (torch.load(two / f'{name} {r}.pt', weights_only=True) for r in range(2))
    assert_same(first, second)
    alone = job(*name.split())
    assert first.keys() == alone.keys()
    for k, v in alone.items():
        if v.dtype == torch.bool: assert torch.equal(first[k], v), f'{k} differs at {int((first[k] != v).sum())} of {v.numel()} places'
        else: torch.testing.assert_close(first[k], v, rtol=0, atol=2e-5)


def test_sampled_gradients_of_shards(two):
    "A weight that lies in shards is sampled for as one that does not."
    sharded, whole_, other = (torch.load(two / f'{n}.pt', weights_only=True) for n in ('fsdp sampled 0', 'ddp sampled 0', 'fsdp sampled 1'))
    assert_same(sharded, other)
    for k, v in whole_.items(): torch.testing.assert_close(sharded[k], v, rtol=0, atol=2e-5)
    assert any(not torch.equal(v, w) for v, w in zip(whole_.values(), job('ddp', 'sampled').values()))


@pytest.mark.parametrize('name', REFUSED)
def test_what_needs_more_than_the_rows_of_a_rank_says_so(two, name):
    for r in range(2): assert REFUSED[name][1] in torch.load(two / f'refused {name} {r}.pt', weights_only=True)['error']
