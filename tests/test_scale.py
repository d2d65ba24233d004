"""Memory of one-shot pruning: it must depend on a slab, not on the model. Each model lives in a process of its own; tensors are counted."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
SMALL = 32 * MIB    # a few slabs and a histogram

PROBE = '''
import json, resource, sys, time
import torch
from torch import nn
from sparse_workbench.allocation import global_, uniform
from sparse_workbench.oneshot import prune
from sparse_workbench.patterns import nm

def peak(): # bytes that this process ever had in memory
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)

def most(prof): # bytes of tensors that were made meanwhile and alive at the same time
    now = top = 0
    for _, n in sorted((e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == '[memory]'):
        now += n
        top = max(top, now)
    return top

def model(shapes, dtype): # made in place, so that making it has no peak of its own
    torch.manual_seed(0)
    with torch.device('meta'): net = nn.ModuleList(nn.Linear(s[1], s[0], bias=False) if len(s) == 2 else nn.Conv2d(s[1], s[0], s[2:], bias=False) for s in shapes)
    for m in net: m.weight = nn.Parameter(torch.empty(m.weight.shape, dtype=dtype).uniform_(-1, 1))
    return net

def sorting(net, sparsity): # what others do: one tensor of all scores
    every = torch.cat([p.detach().abs().flatten() for p in net.parameters()])
    cut = every.kthvalue(round(sparsity * len(every))).values
    for p in net.parameters(): p.data[p.abs() <= cut] = 0

HOW = {'uniform': lambda m: prune(m, .5), 'global': lambda m: prune(m, .7, allocate=global_), '2:4': lambda m: prune(m, pattern='2:4'),
       'per_row': lambda m: prune(m, .9, pattern='per_row'), 'sorting': lambda m: sorting(m, .7)}
shapes, dtype, names = json.loads(sys.argv[1])
for name in names: HOW[name](model([(64, 64), (16, 16, 3, 3)], getattr(torch, dtype)))     # load everything
net = model(shapes, getattr(torch, dtype))
size, out = sum(p.numel() * p.element_size() for p in net.parameters()), {}
for name in names:
    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: report = HOW[name](net)
    out[name] = dict(extra=most(prof), seconds=time.perf_counter() - start, size=size, peak=peak(), achieved=getattr(report, 'total', {}).get('achieved'))
print(json.dumps(out))
'''


def measure(shapes: list[tuple[int, ...]], dtype: str, *names: str) -> dict[str, dict]:
    "Bytes beyond the model at the peak of each way of pruning, one after the other."
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(x for x in (os.environ.get('PYTHONPATH'), str(ROOT)) if x))
    done = subprocess.run([sys.executable, '-P', '-c', PROBE, json.dumps([shapes, dtype, names])], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


def told(name: str, r: dict) -> str:
    return f"{name}: {r['extra'] / MIB:.0f} MiB beyond a model of {r['size'] / MIB:.0f} MiB (process {r['peak'] / MIB:.0f} MiB), {r['seconds']:.1f} s"


SHAPES = [(4096, 4096), (4096, 4096), (1024, 11008), (512, 1024, 3, 3), (8192, 1024)]      # 60 million weights


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_memory_depends_on_a_slab(dtype):
    for name, r in measure(SHAPES, dtype, 'uniform', '2:4', 'global').items():
        assert r['extra'] <= .05 * r['size'] + SMALL, told(name, r)
        assert abs(r['achieved'] - dict(zip(('uniform', '2:4', 'global'), (.5, .5, .7)))[name]) < 1e-6 or name == '2:4'


def test_memory_does_not_grow_with_the_number_of_layers():
    "Mixtures of experts have thousands of weights: what is kept for each must be small."
    for name, r in measure([(32, 64)] * 400, 'bfloat16', 'uniform', 'global').items(): assert r['extra'] <= .05 * r['size'] + SMALL, told(name, r)


def test_the_measurement_sees_a_copy_of_the_model():
    r = measure(SHAPES[:2], 'bfloat16', 'sorting')['sorting']
    assert r['extra'] > r['size'], told('sorting', r)


@pytest.mark.slow
def test_a_billion_weights(request, capsys):
    "2 GiB in bfloat16, pruned three ways."
    if 'slow' not in request.config.option.markexpr: pytest.skip('takes minutes and 3 GiB: pytest -m slow')
    found = measure([(8192, 8192)] * 16, 'bfloat16', 'uniform', '2:4', 'global', 'per_row')
    with capsys.disabled(): print('', *(told(n, r) for n, r in found.items()), sep='\n')
    for name, r in found.items(): assert r['extra'] <= .05 * r['size'] + SMALL, told(name, r)
