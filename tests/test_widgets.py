"What a dashboard costs: memory over many openings, a model larger than any copy of it, a model that is deleted. No browser."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAD = '''
import gc, os, resource, sys, threading, weakref
import torch
from ipywidgets.widgets.widget import _instances
from sparse_workbench.widgets.masks import mask_explorer
def now(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 2**20      # MiB
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
'''


def measured(code: str) -> None:
    "Run in a process of its own, whose memory nothing else touches."
    env = dict(os.environ, PYTHONPATH=str(ROOT), MALLOC_ARENA_MAX='1')                   # what is held, not what threads reserve
    done = subprocess.run([sys.executable, '-c', HEAD + code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_returns_after_sixty_openings():
    measured('''
model = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 512))
explorer = mask_explorer(model)
def once(figure):
    explorer.widget()
    assert explorer.error is None, explorer.error
    explorer.controls['sparsity'].value = .7
    if figure: explorer.static()
    explorer.close()
    gc.collect()
def rest():                                             # MiB, once no ranking of a closed view goes on
    for t in threading.enumerate()[1:]: t.join(30)
    gc.collect()
    return now()
def ten():
    for i in range(10): once(i == 0)
    return rest()
early, widgets = [ten() for _ in range(3)], len(_instances)
late = [ten() for _ in range(3)]                        # the allocator keeps some tens of MiB at one time and not at another
assert len(_instances) == widgets == 0, len(_instances)
assert min(late) < max(early) + 8, f'after 10, 20, … 60 openings: {[round(m) for m in early + late]} MiB'
''')


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_model_of_a_billion_weights_is_not_copied():
    measured('''
class Many(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4096, 11008, bias=False, device='meta') for _ in range(24))
        for b in self.blocks: b.weight = torch.nn.Parameter(torch.zeros(11008, 4096, dtype=torch.bfloat16), requires_grad=False)
model = Many()
total = sum(p.numel() for p in model.parameters())
assert total > 1e9
before = peak()
explorer = mask_explorer(model, settings=dict(allocation='global_'))
explorer.widget()
assert explorer.error is None, explorer.error
explorer.controls['sparsity'].value = .75
for job in explorer.parts['desk'].jobs.values(): job.cancel()
grown = peak() - before
assert grown < total * 2 / 2**20 * .75, f'{grown:.0f} MiB on a model of {total * 2 / 2**20:.0f} MiB'        # a layer at a time
explorer.close()
os._exit(0)                                             # a ranking of all layers goes on in its thread
''')


def test_a_deleted_model():
    measured('''
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
gone, explorer = weakref.ref(model), mask_explorer(model)
explorer.widget()
del model
gc.collect()
assert gone() is not None                               # an open dashboard holds its model
explorer.close()
gc.collect()
assert gone() is None                                   # a closed one does not
said = explorer._repr_mimebundle_()
assert set(said) == {'text/html', 'text/plain'} and 'was deleted while the dashboard was closed' in said['text/plain'], said
''')
