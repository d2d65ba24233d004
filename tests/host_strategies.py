"""What test_host_strategies.py does in two processes: Trainer, Lightning and accelerate spread a model in their own ways, save, and resume.

accelerate (and so the Trainer) shards on GPUs only: on CPUs it sets a plugin for FSDP aside and trains by DDP without a word. `obey` makes it shard there too,
and changes nothing of what comes after. On two GPUs nothing has to be made to obey, also where there is no pytest: python tests/host_strategies.py
"""
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_workbench.allocation import uniform
from sparse_workbench.hosts import bare_optimizer, check_ranks, checkpointed, fingerprint, hf_callback, lightning_callback
from sparse_workbench.loop import ranks, whole, whole_state
from sparse_workbench.recipes import REGISTER
from sparse_workbench.sparsifier import Sparsifier
from sparse_workbench.testing import assert_same, mlp, seeded, tiny_gpt2

METHODS: dict[str, dict] = dict(sr_ste=dict(sparsity=.5), gmp=dict(pattern='per_row', sparsity=.75), rigl=dict(pattern='per_row', allocate=uniform, sparsity=.5)) # inside rows, as shards need
ADAM = dict(lr=1e-2, eps=1e-4) # tiny gradients, which are mostly rounding, move nothing
TOKENS = torch.randint(32, (64, 12), generator=torch.Generator().manual_seed(0))


def samples(n: int) -> Tensor:
    with seeded(0): return torch.randn(n, 16)


def sparse(method: str, model: nn.Module, steps: int) -> Callable[[torch.optim.Optimizer], Sparsifier]:
    "A function optimizer -> sparsifier, as callbacks take it."
    return lambda opt: REGISTER[method]['recipe'](model, opt, total_steps=steps, **METHODS[method])


def outcome(model: nn.Module, sp: Sparsifier, way: str, method: str) -> dict[str, Tensor]:
    "Whole weights, masks and dense weights of a finished training, which is spread as it should be and as sparse as was asked."
    check_ranks(sp)
    assert all(hasattr(s.parameter, 'placements') == ('fsdp2' in way) and not s.weight.cpu()[~s.mask.cpu()].any() for s in sp.sites) # Lightning has moved weights to the CPU by now
    state = whole_state(sp)['sites']
    for n, s in state.items(): assert abs(1 - s['mask'].float().mean() - METHODS[method]['sparsity']) < .01, f"{n} keeps {s['mask'].float().mean():.3f}"
    kept = {f'{n} ({k})': s[k].cpu() for n, s in state.items() for k in ('mask', 'latent') if k in s}
    return {k: v.cpu() for k, v in whole(dict(model.state_dict())).items()} | kept | dict(t=torch.tensor(sp.t))


# The hosts

def obey(state: Any, plugin: Any) -> None:
    "Let accelerate shard on CPUs as it does on GPUs."
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    PartialState._shared_state['distributed_type'] = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin


def forget() -> None:
    "accelerate keeps its state, and part of it in the environment, from one Accelerator to the next."
    from accelerate.state import AcceleratorState, GradientState
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in [n for n in os.environ if n.startswith(('ACCELERATE_', 'FSDP_'))]: del os.environ[name]


def tiny_llama() -> nn.Module:
    "Layers that store (out, in): their shards are rows."
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32)
    with seeded(0): return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))


def gpt2_by_hand() -> nn.Module:
    "Layers that store (in, out): whoever shards them says that their outputs are columns, and the Trainer leaves them so."
    model, world = tiny_gpt2(), ranks_to_be()
    if world == 1: return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    turned = {id(m.weight) for m in model.modules() if type(m).__name__ == 'Conv1D'}
    mesh = init_device_mesh('cpu' if torch.accelerator.current_accelerator() is None else 'cuda', (world,))
    for part in (*model.transformer.h, model): fully_shard(part, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if id(p) in turned else Shard(0))
    return model


def trainer_class() -> type:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers import Trainer

    class Obeying(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if self.args.fsdp and not self.is_fsdp_enabled:
                obey(self.accelerator.state, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
                self.is_fsdp_enabled = True
    return Obeying


def in_trainer(way: str, method: str, folder: Path, device: str = 'cpu', resume: Path | None = None, make: Callable | None = None) -> dict[str, Tensor]:
    "9 steps of 16 sequences, however many processes there are."
    from transformers import TrainingArguments
    forget()
    config = dict(version=2, state_dict_type='SHARDED_STATE_DICT' if 'parts' in way else 'FULL_STATE_DICT') | (dict(auto_wrap_policy='NO_WRAP') if 'hand' in way else {})
    how: dict = dict(fsdp=True, fsdp_config=config) if 'fsdp2' in way else {}
    args = TrainingArguments(str(folder), max_steps=9, per_device_train_batch_size=8 // ranks_to_be(), gradient_accumulation_steps=2, save_steps=5, use_cpu=device == 'cpu',
                             report_to=[], disable_tqdm=True, logging_strategy='no', seed=0, **how)
    assert args.device.type == device          # by now there is a process group
    model = (make or (gpt2_by_hand if 'hand' in way else tiny_llama))()
    callback = hf_callback(sparse(method, model, 9), resume=resume if resume and resume.parent != folder else None)
    trainer = trainer_class()(model, args, train_dataset=[dict(input_ids=x, labels=x) for x in TOKENS], callbacks=[callback],
                              optimizer_cls_and_kwargs=(torch.optim.AdamW, ADAM))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel) == (way == 'ddp')
    return outcome(model, callback.sparsifier, way, method)


def strategy(way: str) -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint='parts' in way) if 'fsdp2' in way else dict(one='auto').get(way, way)


def lightning_module(way: str) -> Any:
    import lightning.pytorch as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()
        def configure_model(self):
            if 'fsdp2' not in way or hasattr(self.net[0].weight, 'placements'): return
            from torch.distributed.fsdp import fully_shard
            for layer in (*self.net[::2], self.net): fully_shard(layer, mesh=self.device_mesh['data_parallel'])
        def training_step(self, batch, i): return (self.net(batch) - batch[:, :8].sin()).square().mean()
        def configure_optimizers(self): return torch.optim.AdamW(self.net.parameters(), **ADAM)
        def train_dataloader(self):
            rank, world = ranks()
            return torch.utils.data.DataLoader(samples(48)[rank::world], batch_size=8 // world)
    return Module()


def in_lightning(way: str, method: str, folder: Path, device: str = 'cpu', resume: Path | None = None) -> dict[str, Tensor]:
    "9 steps of 16 samples, three an epoch."
    import lightning.pytorch as L
    m = lightning_module(way)
    callback = lightning_callback(sparse(method, m.net, 9))
    trainer = L.Trainer(max_epochs=3, accumulate_grad_batches=2, accelerator='gpu' if device == 'cuda' else 'cpu', devices=ranks_to_be(), strategy=strategy(way), use_distributed_sampler=False, # Lightning's shuffles, in several processes only
                        callbacks=[callback, L.callbacks.ModelCheckpoint(folder, '{epoch}', save_top_k=-1)], logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(m, ckpt_path=resume)
    return outcome(m.net, callback.sparsifier, way, method)


def plugin(way: str, **how) -> Any:
    from accelerate.utils import FullyShardedDataParallelPlugin
    parts = dict(state_dict_type='SHARDED_STATE_DICT' if 'parts' in way else 'FULL_STATE_DICT')
    return FullyShardedDataParallelPlugin(**dict(fsdp_version=2, reshard_after_forward=True, auto_wrap_policy='transformer_based_wrap', transformer_cls_names_to_wrap=['Linear'], **parts) | how)


def accelerator(how: Any, device: str) -> Any:
    from accelerate import Accelerator
    forget()
    made = Accelerator(cpu=device == 'cpu', fsdp_plugin=how, gradient_accumulation_steps=2)
    if how is not None and 'FSDP' not in str(made.distributed_type): obey(made.state, how)
    return made


def in_accelerate(way: str, method: str, folder: Path, device: str = 'cpu', resume: Path | None = None, early: bool = False) -> dict[str, Tensor]:
    "8 steps of 16 samples, saved after the third."
    host, net = accelerator(plugin(way) if 'fsdp2' in way else None, device), mlp()
    opt = torch.optim.AdamW(net.parameters(), **ADAM)
    if early: sp = sparse(method, net, 8)(opt)
    data = torch.utils.data.DataLoader(samples(128), batch_size=8 // ranks_to_be())
    model, opt, data = host.prepare(net, opt, data)
    if not early: sp = sparse(method, net, 8)(bare_optimizer(opt))
    host.register_for_checkpointing(checkpointed(sp))
    if resume: host.load_state(str(resume))
    for i, x in enumerate(data):
        if i < 6 and resume: continue
        with host.accumulate(model):
            host.backward((model(x) - x[:, :8].sin()).square().mean())
            host.clip_grad_norm_(model.parameters(), 1.)
            opt.step()
            opt.zero_grad()
        if i == 5: host.save_state(str(folder / 'saved'))
    return outcome(net, sp, way, method)


# What both processes do

HOSTS: dict[str, tuple[Callable, str]] = dict(trainer=(in_trainer, 'checkpoint-5'), lightning=(in_lightning, 'epoch=0.ckpt'), accelerate=(in_accelerate, 'saved')) # and where a checkpoint is
WAYS = [('trainer', 'ddp', 'rigl'), ('trainer', 'fsdp2', 'sr_ste'), ('trainer', 'fsdp2 in parts', 'gmp'), ('trainer', 'fsdp2 by hand', 'sr_ste'),
        ('lightning', 'ddp', 'rigl'), ('lightning', 'fsdp2', 'sr_ste'), ('lightning', 'fsdp2 in parts', 'rigl'),
        ('accelerate', 'ddp', 'rigl'), ('accelerate', 'fsdp2', 'sr_ste'), ('accelerate', 'fsdp2 in parts', 'gmp')] # in parts: every process saves its shards; by hand: sharded before the host sees it


def ranks_to_be() -> int:
    "As torchrun says it, before a host has made the process group; Lightning forgets WORLD_SIZE afterwards."
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def on_accelerators_only(way: tuple[str, str, str], device: str) -> bool:
    "fully_shard without a mesh, as accelerate calls it, takes the GPUs of a machine that has them."
    return device == 'cpu' and way[0] != 'lightning' and 'fsdp2' in way[1] and torch.accelerator.current_accelerator() is not None


def trained_and_resumed(host: str, way: str, method: str, folder: Path, device: str) -> dict[str, Tensor]:
    "The straight run, which the run resumed from its checkpoint equals in every bit."
    run, saved = HOSTS[host]
    straight = run(way, method, folder, device)
    assert_same(straight, run(way, method, folder, device, resume=folder / saved))
    return straight


def alone(host: str, way: str, method: str, folder: Path, resume: Path | None = None) -> dict[str, Tensor]:
    "The same training in one process on a CPU."
    return HOSTS[host][0]('one by hand' if 'hand' in way else 'one', method, folder, resume=resume)


def refused(f: Callable) -> dict[str, str]:
    try: f()
    except ValueError as e: return dict(error=str(e))
    return dict(error='nothing was refused')


def weighed() -> dict[str, Tensor]:
    "What the Trainer's callback writes beside the masks, to know the weights again."
    model = gpt2_by_hand()
    return {n: torch.tensor(v) for n, v in fingerprint(sparse('sr_ste', model, 9)(torch.optim.SGD(model.parameters(), .1))).items()}


def flat(names: bool, device: str) -> None:
    "FSDP1 puts the weights of many layers into one vector; with or without their own names. accelerate's finds no CPU."
    net = mlp()
    if device == 'cpu':
        from torch.distributed.fsdp import FullyShardedDataParallel
        FullyShardedDataParallel(net, use_orig_params=names, device_id=torch.device('cpu'))
    else: accelerator(plugin('', fsdp_version=1, reshard_after_forward='full_shard', auto_wrap_policy='no_wrap', use_orig_params=names), device).prepare(net)
    sparse('sr_ste', net, 8)(torch.optim.SGD(net.parameters(), .1))


def jobs(folder: Path, device: str) -> dict[str, Callable[[], dict]]:
    todo: dict[str, Callable[[], dict]] = {' '.join(w): partial(trained_and_resumed, *w, folder / '-'.join(w), device) for w in WAYS if not on_accelerators_only(w, device)}
    if not on_accelerators_only(WAYS[-1], device):
        todo['inputs'] = lambda: refused(lambda: in_trainer('fsdp2', 'sr_ste', folder / 'inputs', device, make=tiny_gpt2))
        todo['bytes'] = weighed
        todo['early'] = lambda: refused(lambda: in_accelerate('fsdp2', 'sr_ste', folder / 'early', device, early=True))
        for names in (True, False): todo[f'flat {names}'] = partial(refused, partial(flat, names, device))
    if device == 'cuda': todo['lightning fsdp1'] = lambda: refused(lambda: in_lightning('fsdp', 'sr_ste', folder / 'lightning-fsdp1', device))
    return todo


def worker(rank: int, port: int, folder: str, device: str) -> None:
    "One of two processes, as torchrun starts them; the hosts make the process group."
    torch.set_num_threads(1)
    try:
        for name, f in jobs(Path(folder), device).items():
            os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
            torch.save(f(), f'{folder}/{name} {rank}.pt')
        dist.barrier()
    finally:
        if dist.is_initialized(): dist.destroy_process_group()


def both(folder: Path, device: str = 'cpu') -> None:
    "Run two processes to the end."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(folder), device), nprocs=2)


def result(folder: Path, name: str) -> dict:
    "What both processes say."
    first, second = (torch.load(folder / f'{name} {rank}.pt', weights_only=True) for rank in range(2))
    if 'error' in first: assert first == second
    else: assert_same(first, second)
    return first


def near(a: dict[str, Tensor], b: dict[str, Tensor], masks: float = 0., weights: float = 1e-6) -> None:
    "Equal to the rounding of a mean over ranks: no more than this part of a mask differs, and no weight that both have by more than this."
    assert a.keys() == b.keys(), f"only one side has {', '.join(sorted(a.keys() ^ b.keys()))}"
    for k in a:
        off = (a[k] != b[k]).float().mean() if a[k].dtype == torch.bool else ((a[k] - b[k]).abs() * (not masks or (a[k] != 0) & (b[k] != 0))).max()
        assert off <= (masks if a[k].dtype == torch.bool else weights), f'{k} differs by {off:g}'


def on_two_gpus() -> None:
    "Every way and every refusal with NCCL, beside one process on a CPU, whose sums are rounded otherwise."
    with tempfile.TemporaryDirectory() as tmp:
        both(Path(tmp), 'cuda')
        for host, way, method in WAYS: near(result(Path(tmp), f'{host} {way} {method}'), alone(host, way, method, Path(tmp) / 'one' / host / way), masks=.02, weights=.05)
        refusals(partial(result, Path(tmp)))
        assert_same(result(Path(tmp), 'bytes'), weighed())
        assert '0.weight' in (said := result(Path(tmp), 'lightning fsdp1')['error']) and 'ModelParallelStrategy' in said


def refusals(get: Callable[[str], dict]) -> None:
    "What cannot work is named, with what works instead."
    said = {name: get(name)['error'] for name in ('inputs', 'early', 'flat True', 'flat False')}
    assert 'transformer.h.0.attn.c_attn.weight is sharded as' in said['inputs'] and 'shard_placement_fn=lambda p: Shard(1)' in said['inputs']
    assert '0.weight is not the weight that was attached any more' in said['early']
    for names in (True, False): assert '0.weight lies in a flat parameter' in said[f'flat {names}'] and 'fully_shard' in said[f'flat {names}']


if __name__ == '__main__':
    from as_script import run
    if torch.cuda.device_count() < 2: sys.exit('fewer than two GPUs: nothing was tested')
    sys.exit(run(dict(test_hosts_on_two_gpus=on_two_gpus)))
