"Trainer, Lightning and accelerate with their own ways to spread a model over two processes: the same masks on both, those of one process, and exact resume."
from functools import partial

import pytest
import torch
import torch.distributed as dist
from host_strategies import HOSTS, WAYS, alone, both, near, on_accelerators_only, on_two_gpus, refusals, result, weighed

from sparse_workbench.testing import assert_same


@pytest.fixture(scope='module')
def folder(once):
    "What two processes on CPUs have left: results and checkpoints."
    if not dist.is_available() or not dist.is_gloo_available(): pytest.skip('this build of torch has no gloo, by which processes on CPUs talk')
    return once('strategies', both)


def leave_to_gpus(*way: str) -> None:
    if on_accelerators_only(way, 'cpu'): pytest.skip('accelerate would shard over the GPUs of this machine: the test on two GPUs is for them')


@pytest.mark.parametrize('host, way, method', WAYS)
def test_two_processes_equal_each_other_and_one_and_resume(folder, tmp_path, host, way, method):
    "Both processes have compared the resumed run with the straight one, bit for bit, before they wrote what is compared here."
    leave_to_gpus(host, way, method)
    near(result(folder, f'{host} {way} {method}'), alone(host, way, method, tmp_path))


@pytest.mark.parametrize('host, way, method', [w for w in WAYS if w[1] == 'ddp' or w[:2] == ('lightning', 'fsdp2')])
def test_saved_by_two_and_resumed_by_one(folder, tmp_path, host, way, method):
    "Where the host reads such a checkpoint: the Trainer and accelerate refuse one of FSDP without FSDP."
    near(result(folder, f'{host} {way} {method}'), alone(host, way, method, tmp_path, resume=folder / '-'.join((host, way, method)) / HOSTS[host][1]))


def test_refused_by_name(folder):
    leave_to_gpus(*WAYS[-1])
    refusals(partial(result, folder))


def test_weights_are_known_again_however_they_are_sharded(folder):
    leave_to_gpus(*WAYS[-1])
    assert_same(result(folder, 'bytes'), weighed())


def test_lightning_itself_refuses_fsdp1_without_a_gpu():
    import lightning.pytorch as L
    with pytest.raises(ValueError, match='strategy `fsdp` requires a GPU accelerator'): L.Trainer(accelerator='cpu', devices=2, strategy='fsdp', logger=False)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_hosts_on_two_gpus():
    on_two_gpus()
