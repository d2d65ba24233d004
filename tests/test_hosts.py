"""Sparse training inside the real Hugging Face Trainer, Lightning, accelerate, DDP and FSDP2: masks follow, resume is exact, two processes equal one."""
import io
import os
import shutil
import socket
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_workbench import recipes
from sparse_workbench.core import sites
from sparse_workbench.hosts import attached, attached_again, bare_optimizer, check_ranks, checkpointed, hf_callback, lightning_callback
from sparse_workbench.loop import fit, load_whole_state, order, ranks, read_checkpoint, shuffled, whole, whole_state
from sparse_workbench.sparsifier import Sparsifier
from sparse_workbench.testing import assert_same, mlp, seeded, snapshot, tiny_gpt2

METHODS = ('static', 'gmp', 'rigl', 'sr_ste')     # a mask that stays, that shrinks, that grows by the gradient; and a dense weight beside
WIDE = (16, 32, 24, 8)


def sparse(name: str, model: nn.Module, steps: int, **how) -> Callable[[torch.optim.Optimizer], Sparsifier]:
    "A function optimizer -> sparsifier, as callbacks take it."
    return lambda opt: recipes.REGISTER[name]['recipe'](model, opt, total_steps=steps, **dict(sparsity=.5) | how)


def everything(model: nn.Module, sp: Sparsifier) -> dict[str, Tensor]:
    assert all(not s.weight[~s.mask].any() for s in sp.sites)
    return snapshot((model, None, sp, None)) | dict(t=torch.tensor(sp.t))


# Attaching

def test_attaching_again_changes_neither_weights_nor_moments():
    "The first masks of RigL are random; a trained model does not survive them."
    def make():
        model = mlp()
        opt = torch.optim.Adam(model.parameters(), 1e-2)
        return model, opt, sparse('rigl', model, 20)
    def train(model, opt, n):
        for t in range(n):
            with seeded(t): model(torch.randn(8, 16)).square().mean().backward()
            opt.step()
            opt.zero_grad()
    model, opt, how = make()
    sp = attached(how, opt)
    train(model, opt, 9)
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict(), whole_state(sp)], file)
    file.seek(0)
    weights, moments, state = torch.load(file, weights_only=True)
    other, opt2, how2 = make()
    other.load_state_dict(weights)
    opt2.load_state_dict(moments)
    again = attached_again(how2, opt2, other, state)
    assert_same(everything(model, sp), everything(other, again))
    train(model, opt, 9), train(other, opt2, 9)
    assert_same(everything(model, sp), everything(other, again))


@pytest.mark.parametrize('sizes, message', [((16, 24, 8), r'0.weight is \(24, 16\), in the checkpoint \(32, 16\)|of other sites'), ((16, 32, 24, 24, 8), 'of other sites; only one side has 6.weight')])
def test_the_state_of_another_model_is_refused(sizes, message):
    model, opt = (m := mlp(WIDE)), torch.optim.SGD(m.parameters(), .1)
    state = whole_state(attached(sparse('gmp', model, 20), opt))
    other = mlp(sizes)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=message): attached_again(sparse('gmp', other, 20), torch.optim.SGD(other.parameters(), .1), other, state)
    assert_same(before, other.state_dict())


def test_wrapped_optimizers_are_unwrapped():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer): self.optimizer = optimizer
    opt = torch.optim.SGD(mlp().parameters(), .1)
    assert bare_optimizer(Wrapper(Wrapper(opt))) is opt and bare_optimizer(opt) is opt
    with pytest.raises(ValueError, match='attached to another optimizer than the host'): attached(Sparsifier(sites(m := mlp()), sparsity=.5).attach(torch.optim.SGD(m.parameters(), .1)), opt)


# Hugging Face Trainer

hf = pytest.mark.xdist_group('transformers')
TOKENS = torch.randint(32, (64, 12), generator=torch.Generator().manual_seed(0))


def trained(folder: Path, callback, model: nn.Module, steps: int = 12, more: tuple = (), **how):
    "Train in the Trainer, with accumulation, clipping and a schedule of the learning rate."
    from transformers import Trainer, TrainingArguments
    args = TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=5, learning_rate=1e-2,
                             use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy='no', seed=0)
    trainer = Trainer(model, args, train_dataset=[dict(input_ids=x, labels=x) for x in TOKENS], callbacks=[callback, *more], optimizers=how.pop('optimizers', (None, None)))
    trainer.train(**how)
    return trainer


@hf
@pytest.mark.parametrize('method', METHODS)
def test_trainer_masks_follow_and_resume_is_exact(method, tmp_path):
    from transformers import AutoModelForCausalLM, TrainerCallback
    class Watch(TrainerCallback):
        steps = 0
        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1
            assert callback.sparsifier.t == state.global_step == self.steps
            for s in callback.sparsifier.sites: assert not s.weight[~s.mask].any()
    model, again = tiny_gpt2(), tiny_gpt2()
    callback, resumed = (hf_callback(sparse(method, m, 12)) for m in (model, again))
    trainer = trained(tmp_path, callback, model, more=(watch := Watch(),))
    assert watch.steps == 12
    trained(tmp_path, resumed, again, resume_from_checkpoint=str(tmp_path / 'checkpoint-5'))
    assert_same(everything(model, callback.sparsifier), everything(again, resumed.sparsifier))
    trainer.save_model(str(tmp_path / 'model'))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / 'model')
    assert_same(dict(model.state_dict()), dict(loaded.state_dict()))
    assert abs(sum(int((s.weight == 0).sum()) for s in sites(loaded)) / sum(s.numel for s in sites(loaded)) - .5) < .01


@hf
def test_trainer_finds_the_sparsifier_or_says_where_it_looked(tmp_path):
    models = [tiny_gpt2() for _ in range(6)]
    straight, *others = (hf_callback(sparse('sr_ste', m, 12)) for m in models)
    trained(tmp_path / 'a', straight, models[0])
    shutil.copytree(tmp_path / 'a' / 'checkpoint-5', tmp_path / 'moved')
    with pytest.raises(ValueError, match='from step 5, but there is no .*b/checkpoint-5/sparsifier.pt.*resume='):
        trained(tmp_path / 'b', others[0], models[1], resume_from_checkpoint=str(tmp_path / 'moved'))
    named = hf_callback(sparse('sr_ste', models[2], 12), resume=tmp_path / 'moved')
    trained(tmp_path / 'b', named, models[2], resume_from_checkpoint=str(tmp_path / 'moved'))
    assert_same(everything(models[0], straight.sparsifier), everything(models[2], named.sparsifier))
    with torch.no_grad(): models[3].transformer.h[0].mlp.c_fc.weight.mul_(2)
    trained(tmp_path / 'c', others[2], models[3])              # another training, with a checkpoint of the same step
    with pytest.raises(ValueError, match='saved with other weights of transformer.h.0.*resume='):
        trained(tmp_path / 'c', others[3], models[4], resume_from_checkpoint=str(tmp_path / 'moved'))


@hf
def test_trainer_that_broke_off_can_train_again(tmp_path):
    from transformers import TrainerCallback
    class Stumble(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3: raise KeyboardInterrupt
    model = tiny_gpt2()
    callback = hf_callback(sparse('gmp', model, 12))
    with pytest.raises(KeyboardInterrupt): trained(tmp_path, callback, model, more=(Stumble(),))
    old = callback.sparsifier
    trained(tmp_path, callback, model)
    assert callback.sparsifier is not old and not old.hooks and callback.sparsifier.t == 12
    assert abs(callback.sparsifier.report().total['achieved'] - .5) < .01


@hf
def test_trainer_with_an_optimizer_that_has_a_sparsifier(tmp_path):
    model, same = tiny_gpt2(), tiny_gpt2()
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    sp = sparse('gmp', model, 12)(opt)
    trained(tmp_path / 'a', hf_callback(sp), model, optimizers=(opt, None))
    own = torch.optim.AdamW(same.parameters(), 1e-2)
    callback = hf_callback(sparse('gmp', same, 12))
    trained(tmp_path / 'b', callback, same, optimizers=(own, None))
    assert_same(everything(model, sp), everything(same, callback.sparsifier))


# Lightning

lit = pytest.mark.xdist_group('lightning')


def module(package, method: str, steps: int, where: str = 'callback', manual: bool = False):
    "A module of one of Lightning's two packages, and the callback."
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = mlp(), not manual
        def training_step(self, batch, i):
            loss = (self.net(batch) - batch[:, :8].sin()).square().mean()
            if not manual: return loss
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
        def configure_optimizers(self):
            opt = torch.optim.AdamW(self.net.parameters(), 1e-2)
            if where == 'module': self.sp = sparse(method, self.net, steps)(opt)
            return opt
        def train_dataloader(self):
            with seeded(0): return torch.utils.data.DataLoader(torch.randn(40, 16), batch_size=4)
    m = Module()
    return m, lightning_callback((lambda opt: m.sp) if where == 'module' else sparse(method, m.net, steps))


def lightning(package, folder: Path, m, callback, **how):
    trainer = package.Trainer(max_epochs=3, accelerator='cpu', callbacks=[callback, package.callbacks.ModelCheckpoint(folder, '{epoch}', save_top_k=-1)], logger=False,
                              enable_progress_bar=False, enable_model_summary=False, **{k: how.pop(k) for k in ('accumulate_grad_batches', 'gradient_clip_val', 'devices', 'strategy') if k in how})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(m, **how)
    return trainer


@lit
@pytest.mark.parametrize('method, where', [*((m, 'callback') for m in METHODS), ('rigl', 'module')])
def test_lightning_resume_is_exact(method, where, tmp_path):
    import lightning.pytorch as L
    often = dict(accumulate_grad_batches=2, gradient_clip_val=1.)
    (m, callback), (again, resumed) = (module(L, method, 15, where) for _ in range(2))
    lightning(L, tmp_path, m, callback, **often)
    lightning(L, tmp_path, again, resumed, ckpt_path=tmp_path / 'epoch=0.ckpt', **often)
    assert callback.sparsifier.t == 15
    assert_same(everything(m.net, callback.sparsifier), everything(again.net, resumed.sparsifier))
    assert set(torch.load(tmp_path / 'epoch=0.ckpt', weights_only=True)['callbacks']) >= {'Sparsifier of optimizer 0'}


@lit
@pytest.mark.parametrize('method', ['gmp', 'sr_ste'])
def test_lightning_equals_a_plain_loop(method, tmp_path):
    "Closure, manual optimization and the other package: the same bits."
    import lightning.pytorch as L
    P = pytest.importorskip('pytorch_lightning')
    model = mlp()
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    sp = sparse(method, model, 30)(opt)
    with seeded(0): x = torch.randn(40, 16)
    for t in range(30):
        b = x[t % 10 * 4:][:4]
        (model(b) - b[:, :8].sin()).square().mean().backward()
        opt.step()
        opt.zero_grad()
    for i, (package, manual) in enumerate([(L, False), (L, True), (P, False)]):
        m, callback = module(package, method, 30, manual=manual)
        lightning(package, tmp_path / str(i), m, callback)
        assert_same(everything(model, sp), everything(m.net, callback.sparsifier))


@lit
def test_lightning_refuses_two_for_one_optimizer_and_a_schedule_that_is_too_long(tmp_path):
    import lightning.pytorch as L
    m, callback = module(L, 'gmp', 60)
    with pytest.raises(RuntimeError, match='more than one stateful callback of type `SparsifierCallback`'): L.Trainer(callbacks=[callback, lightning_callback(callback)], logger=False)
    with pytest.raises(ValueError, match=r'training ends at step 30 with sparsity .* the schedule reaches 0.5 at step 45: give the recipe total_steps=30'): lightning(L, tmp_path, m, callback)


# accelerate

def accelerated(method: str, when: str, folder: Path | None = None, begin: int = 0, end: int = 8, closed: bool = True):
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = mlp()
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    if when == 'before': sp = sparse(method, net, 8)(opt)
    with seeded(0): data = torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=4)
    model, opt, data = accelerator.prepare(net, opt, data)
    if when == 'after': sp = sparse(method, net, 8)(bare_optimizer(opt))
    accelerator.register_for_checkpointing(checkpointed(sp) if closed else sp)
    if begin: accelerator.load_state(str(folder))
    for i, x in enumerate(data):
        if not 2 * begin <= i < 2 * end: continue
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - x[:, :8].sin()).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.)
            opt.step()
            opt.zero_grad()
    if folder and not begin: accelerator.save_state(str(folder))
    return everything(net, sp)


@hf
@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('method', METHODS)
def test_accelerate_resume_is_exact(method, when, tmp_path):
    straight = accelerated(method, when)
    assert straight['t'] == 8
    accelerated(method, when, tmp_path, 0, 3)
    assert_same(straight, accelerated(method, when, tmp_path, 3, 8, closed=False))


# Two processes

STEPS = 12
SHARDED = dict(sr_ste={}, gmp=dict(pattern='per_row', sparsity=.75), static=dict(pattern='2:4'), rigl=dict(pattern='per_row', allocate='uniform'), top_kast=dict(pattern='per_row'), deepr=dict(pattern='per_row'))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def network(kind: str, sizes: tuple[int, ...] = WIDE) -> tuple[nn.Module, nn.Module]: # the bare model, and what is called
    model = mlp(sizes)
    if dist.is_initialized() and kind == 'ddp': return model, nn.parallel.DistributedDataParallel(model)
    if dist.is_initialized() and kind.startswith('fsdp'):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh('cpu', (dist.get_world_size(),))
        if kind == 'fsdp':
            for layer in model[::2]: fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, model


def job(kind: str, method: str, folder: Path | None = None, until: int = STEPS, sizes: tuple[int, ...] = WIDE) -> dict[str, Tensor]:
    "Train in all processes together; whole weights, masks and dense weights."
    from sparse_workbench.allocation import uniform
    model, net = network(kind, sizes)
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    own = {k: uniform if v == 'uniform' else v for k, v in (SHARDED[method] if kind != 'ddp' else {}).items()}
    sp = sparse(method, model, STEPS, **own)(opt)
    rank, world = ranks()
    with seeded(0): x = torch.randn(96, 16)
    def energy(m: nn.Module) -> Tensor: return m(x).square().mean()
    fit(net, opt, lambda m, b: (m(b[0]) - b[0][:, :sizes[-1]].sin()).square().mean(), shuffled(x, batch=32, part=rank, parts=world), STEPS, sparsifier=sp,
        evaluate=energy, every=4, checkpoint=folder, stop=lambda rows: rows[-1]['step'] >= until)
    check_ranks(sp)
    state = whole_state(sp)['sites']
    return whole(dict(model.state_dict())) | {f'{n} ({k})': state[n][k] for n in state for k in ('mask', 'latent') if k in state[n]}


def language_model() -> dict[str, Tensor]:
    "GPT-2, whose weights are stored as (in, out): what FSDP2 shards of them must be the outputs too."
    from sparse_workbench.stats import next_token_loss
    model, (rank, world) = tiny_gpt2(), ranks()
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard
        turned = {id(m.weight) for m in model.modules() if type(m).__name__ == 'Conv1D'}
        how = dict(mesh=init_device_mesh('cpu', (world,)), shard_placement_fn=lambda p: Shard(1) if id(p) in turned else Shard(0))
        for block in model.transformer.h: fully_shard(block, **how)
        fully_shard(model, **how)
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    sp = sparse('sr_ste', model, 6)(opt)
    fit(model, opt, next_token_loss, lambda t: TOKENS[t * 4:][:4].chunk(world)[rank], 6, sparsifier=sp)
    state = whole_state(sp)['sites']
    return whole({n: p for n, p in model.named_parameters() if n != 'lm_head.weight'}) | {f'{n} (mask)': state[n]['mask'] for n in state}


def refused(rank: int, f: Callable) -> dict[str, str]:
    try: f()
    except ValueError as e: return dict(error=str(e))
    return dict(error='nothing was refused')


def drifting(rank: int) -> None:
    "A model that nobody wrapped, with different data on every rank."
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), .1)
    sp = sparse('rigl', model, STEPS)(opt)
    check_ranks(sp)
    for t in range(STEPS):
        with seeded(2 * t + rank): model(torch.randn(8, 16)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    check_ranks(sp)


def jobs(rank: int, folder: Path) -> dict[str, dict]:
    "What both processes do, in order; names say what a result is compared with."
    todo: dict[str, Callable[[], dict]] = {f'ddp {m}': partial(job, 'ddp', m) for m in METHODS}
    todo |= {f'fsdp {m}': partial(job, 'fsdp', m) for m in SHARDED}
    todo |= {'root sr_ste': partial(job, 'fsdp root', 'sr_ste'), 'odd gmp': partial(job, 'fsdp', 'gmp', sizes=(16, 5, 1))}
    for kind in ('fsdp', 'ddp'):
        todo[f'{kind} saves'] = partial(job, kind, 'sr_ste', folder / f'{kind} two', 4)
        todo[f'{kind} goes on'] = partial(job, kind, 'sr_ste', folder / f'{kind} two')
        todo[f'{kind} goes on from one'] = partial(job, kind, 'sr_ste', folder / f'{kind} one')
    todo['language model'] = language_model
    todo['unstructured'] = lambda: refused(rank, lambda: sparse('static', (m := network('fsdp')[0]), STEPS)(torch.optim.SGD(m.parameters(), .1)))
    todo['unwrapped'] = lambda: refused(rank, partial(drifting, rank))
    todo['accelerate'] = lambda: accelerated('sr_ste', 'after')
    def resumed():
        accelerated('sr_ste', 'after', folder / 'accelerate', 0, 2)
        return accelerated('sr_ste', 'after', folder / 'accelerate', 2)
    todo['accelerate resumed'] = resumed
    return todo


def worker(rank: int, port: int, folder: str) -> None:
    "One of two processes, as torchrun starts them."
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    try:
        for name, f in jobs(rank, Path(folder)).items(): torch.save(f(), f'{folder}/{name} {rank}.pt')
        dist.barrier()
    finally: dist.destroy_process_group()


@pytest.fixture(scope='module')
def two(once) -> Callable[[str], dict]:
    "The results of two processes, checked to be the same on both."
    if not dist.is_available() or not dist.is_gloo_available(): pytest.skip('this build of torch has no gloo, by which processes on CPUs talk')
    def make(folder: Path) -> None:
        for kind in ('fsdp', 'ddp'): job(kind, 'sr_ste', folder / f'{kind} one', 4)
        torch.multiprocessing.spawn(worker, (free_port(), str(folder)), nprocs=2)
    folder = once('two', make)
    def get(name: str) -> dict:
        first, second = (torch.load(folder / f'{name} {rank}.pt', weights_only=True) for rank in range(2))
        if 'error' not in first: assert_same(first, second)
        return first
    get.folder = folder
    return get


def near(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    "Masks equal in every bit; weights to the rounding of a mean over ranks."
    assert a.keys() == b.keys()
    for k in a:
        if a[k].dtype == torch.bool: assert torch.equal(a[k], b[k]), f'{k} differs at {int((a[k] != b[k]).sum())} of {a[k].numel()} places'
        else: assert torch.allclose(a[k], b[k], atol=1e-6), f'{k} differs by {(a[k] - b[k]).abs().max():g}'


together = pytest.mark.xdist_group('two')


@together
@pytest.mark.parametrize('name', [*(f'ddp {m}' for m in METHODS), *(f'fsdp {m}' for m in SHARDED), 'root sr_ste', 'odd gmp'])
def test_two_processes_equal_one(two, name):
    "Gradients are averaged before anybody chooses by them."
    kind, method = name.split()
    near(two(name), job('ddp' if kind == 'ddp' else 'fsdp', method, sizes=(16, 5, 1) if kind == 'odd' else WIDE))


@together
@pytest.mark.parametrize('kind', ['fsdp', 'ddp'])
def test_saved_by_some_and_resumed_by_others(two, kind, tmp_path):
    "From two to two exactly; from one to two and from two to one to the rounding of a mean."
    straight = job(kind, 'sr_ste')
    assert_same(two(f'{kind} sr_ste'), two(f'{kind} goes on'))
    near(straight, two(f'{kind} goes on from one'))
    shutil.copytree(two.folder / f'{kind} two', alone := tmp_path / 'alone')
    for f in sorted(alone.glob('step-*'))[1:]: f.unlink()
    (first,) = alone.glob('step-*')
    assert read_checkpoint(alone)['step'] < STEPS
    near(straight, job(kind, 'sr_ste', alone))


@together
def test_refused_by_name(two):
    assert '0.weight is sharded as' in two('unstructured')['error'] and 'use a pattern inside rows, such as nm(2, 4) or per_row()' in two('unstructured')['error']
    assert 'have different masks of 0.weight: their gradients were not averaged' in two('unwrapped')['error']


@together
def test_a_language_model_with_transposed_weights(two):
    near(two('language model'), language_model())


@together
def test_accelerate_in_two_processes(two):
    "The same on both ranks (which `two` compares), also when resumed."
    assert_same(two('accelerate'), two('accelerate resumed'))


@pytest.mark.parametrize('parts', [1, 2, 3])
def test_every_sample_of_a_batch_goes_to_one_process(parts):
    at = order(50, batch=16)
    for step in range(5): assert torch.cat([order(50, 16, part=i, parts=parts)(step) for i in range(parts)]).equal(at(step))


def test_a_whole_state_loads_without_a_process_group():
    model, opt = (m := mlp()), torch.optim.SGD(m.parameters(), .1)
    sp = attached(sparse('sr_ste', model, 20), opt)
    state, other = whole_state(sp), attached(sparse('sr_ste', n := mlp(), 20), torch.optim.SGD(n.parameters(), .1))
    load_whole_state(other, state)
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(sp.sites, other.sites))
