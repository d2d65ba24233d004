"""Sparse training on several GPUs with NCCL beside the same training on one: are the masks the same, and what does a step cost?

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/several_gpus.py

Every process must end with the same masks; against one GPU they may differ where a mean of gradients is rounded differently.
"""
import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import header, save, show
from torch import nn

from sparse_workbench import recipes
from sparse_workbench.core import sites
from sparse_workbench.hosts import check_ranks
from sparse_workbench.loop import whole, whole_state
from sparse_workbench.zoo import Llama, LlamaConfig

METHODS = {'dense': None, 'sr_ste': dict(pattern='2:4'), 'gmp': dict(pattern='per_row', sparsity=.75), 'rigl': dict(pattern='per_row', sparsity=.75, allocate='uniform'),
           's_ste': {}, 'top_kast': dict(pattern='per_row', sparsity=.75)}


def build(device: str, layers: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(4096, width, width * 8 // 3 // 64 * 64, layers, width // 64, width // 64, 64, 256))
    for p in model.parameters():
        if p.ndim == 2: nn.init.normal_(p, std=.02)
    return model.to(device)


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    "The model as one process calls it."
    if kind == 'ddp': return nn.parallel.DistributedDataParallel(model)
    if kind == 'fsdp2':
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh('cuda' if torch.cuda.is_available() else 'cpu', (dist.get_world_size(),))
        for layer in model.model.layers: fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(kind: str, method: str, device: str, steps: int, batch: int, layers: int, width: int) -> dict:
    "Whole masks and weights, milliseconds a step, and the last loss."
    from sparse_workbench.allocation import uniform
    rank, world = (dist.get_rank(), dist.get_world_size()) if kind != 'one' else (0, 1)
    model = build(device, layers, width)
    net = wrapped(kind, model)
    opt = torch.optim.AdamW(model.parameters(), 3e-4, fused=device == 'cuda')
    how = {k: uniform if v == 'uniform' else v for k, v in (METHODS[method] or {}).items()}
    sp = getattr(recipes, method)(model, opt, total_steps=steps, **how) if METHODS[method] is not None else None
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 4096, (8 * batch, 257), generator=g).to(device)     # a few batches, learnt by heart
    times = []
    for t in range(steps):
        x = tokens[t % 8 * batch:][:batch].chunk(world)[rank]
        if device == 'cuda': torch.cuda.synchronize()
        start = time.perf_counter()
        loss = F.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
        if device == 'cuda': torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    mean = loss.detach() / world
    if world > 1: dist.all_reduce(mean)
    out = dict(ms=statistics.median(times[3:]) * 1e3, loss=float(mean), weights=whole({n: p.detach() for n, p in model.named_parameters()}))
    if sp:
        if kind != 'one': check_ranks(sp)
        out['masks'] = {n: s['mask'] for n, s in whole_state(sp)['sites'].items()}
        sp.detach()
    return out


def compare(a: dict, b: dict, model: nn.Module) -> dict:
    "How far a training is from the one on one GPU."
    row = {'largest weight difference': max(float((a['weights'][n].cpu() - b['weights'][n].cpu()).abs().max()) for n in b['weights'])}
    if 'masks' in b:
        off = sum(int((a['masks'][n].cpu() != b['masks'][n].cpu()).sum()) for n in b['masks'])
        row |= {'mask entries that differ': off, 'of': sum(m.numel() for m in b['masks'].values())}
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=40)
    p.add_argument('--batch', type=int, default=32, help='sequences of 256 tokens in a step, over all processes')
    p.add_argument('--layers', type=int, default=4)
    p.add_argument('--width', type=int, default=512)
    p.add_argument('--out', help='folder of the JSON file (default: benchmarks/results)')
    a = p.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cuda': torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo')
    torch.backends.cuda.matmul.allow_tf32 = False
    size, rows = (a.steps, a.batch, a.layers, a.width), []
    like = build(device, a.layers, a.width)
    for method in METHODS:
        one = train('one', method, device, *size)
        for kind in ('ddp', 'fsdp2'):
            many = train(kind, method, device, *size)
            rows.append(dict(method=method, way=kind, processes=dist.get_world_size(), **{'ms a step': many['ms'], 'ms on one': one['ms'], 'loss': many['loss'], 'loss on one': one['loss']}, **compare(many, one, like)))
            if dist.get_rank() == 0: print(rows[-1], flush=True)
    if dist.get_rank() == 0:
        head = header(device, backend=dist.get_backend(), dtype='float32', weights=sum(s.numel for s in sites(like)), tokens=a.batch * 256)
        show(rows, head)
        save('several_gpus', rows, head, a.out, device)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__': main()
