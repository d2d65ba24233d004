"""A training that SIGKILL ends at any moment goes on from its last checkpoint and ends with the same bits, for every training recipe.

One process trains all recipes, each in a child of its own: once without interruption, once killed. A second process, started afresh,
resumes what was killed. Both run this file as a script, since they must not have trained before they fork.
"""
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparse_workbench import recipes
from sparse_workbench.data import digits
from sparse_workbench.loop import fit, patience, read_checkpoint, series, shuffled, write_checkpoint
from sparse_workbench.sparsifier import Sparsifier
from sparse_workbench.testing import seeded

STEPS, EVERY = 20, 3
NAMES = [n for n, r in recipes.REGISTER.items() if r['family'] == 'training']
OWN: dict[str, dict] = dict(blast=dict(pattern='block4'))
MOMENTS = ('forward', 'backward', 'before the rename', 'after the rename')

pytestmark = [pytest.mark.xdist_group('resume'), pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork, which Windows lacks')]


def network(*sizes: int) -> nn.Module:
    "With dropout, so that the random generator is a part of the result."
    with seeded(): return nn.Sequential(*(m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.Dropout(.1), nn.ReLU())), nn.Linear(sizes[-1], 8))


def plan(name: str) -> tuple[int, str]: # when and how a recipe's training dies
    draw = random.Random(name)
    return draw.randrange(4, STEPS), draw.choice(MOMENTS)


def die() -> None: os.kill(os.getpid(), signal.SIGKILL)


def doom(at: int, moment: str) -> Callable[[int], None]: # called with the step before forward
    "Arrange that this process is killed at a step."
    whole, now = os.replace, [0]
    def rename(a, b):
        doomed = now[0] >= at
        if doomed and moment == 'before the rename': die()
        whole(a, b)
        if doomed and moment == 'after the rename': die()
    os.replace = rename
    def look(step: int) -> None:
        now[0] = step
        if step == at and moment == 'forward': die()
    return look


def tiny(name: str, folder: Path | None, fate: tuple[int, str] | None) -> dict[str, Tensor]:
    "Train one recipe, with checkpoints when there is a folder; everything that must come out equal."
    model = network(16, 32, 24)
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    sp = recipes.REGISTER[name]['recipe'](model, opt, total_steps=STEPS, **dict(sparsity=.5) | OWN.get(name, {}))
    look = doom(*fate) if fate else lambda step: None
    with seeded(1): x = torch.randn(96, 16)
    batches = shuffled(x, batch=32)
    def watched(step: int) -> tuple:
        look(step)
        if fate == (step, 'backward'): model[0].weight.register_hook(lambda g: die())
        return batches(step)
    watched.key = batches.key
    rows = fit(model, opt, lambda m, b: (m(b[0]) - b[0][:, :8].sin()).square().mean(), watched, STEPS, sparsifier=sp, every=EVERY,
               scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS), checkpoint=folder)
    return result(model, opt, sp, rows)


def result(model: nn.Module, opt: torch.optim.Optimizer, sp: Sparsifier, rows: list) -> dict[str, Tensor]:
    out = {f'{s.name} ({k})': v for s in sp.sites for k in ('mask', 'latent') if (v := getattr(s, k)) is not None}
    moments = {f'{i} {k}': torch.as_tensor(v) for i, d in opt.state_dict()['state'].items() for k, v in d.items()}
    return dict(model.state_dict()) | out | moments | dict(t=torch.tensor(sp.t), loss=torch.tensor(series(rows, 'loss')[1]))


LONG = 400

def long(folder: Path | None) -> dict[str, Tensor]:
    "A longer training on real data: gradual pruning of a digit classifier to 95 %."
    x, y, tx, ty = digits()
    model = network(64, 128, 64)
    model[-1] = nn.Linear(64, 10)
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    sp = recipes.gmp(model, opt, sparsity=.95, total_steps=LONG)
    def accuracy(m: nn.Module) -> Tensor: return (m(tx).argmax(1) == ty).float().mean()
    rows = fit(model, opt, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), shuffled(x, y), LONG, sparsifier=sp, evaluate=accuracy, every=20, checkpoint=folder)
    return result(model, opt, sp, rows) | dict(accuracy=torch.tensor(series(rows, 'accuracy')[1]))


def endless(folder: Path) -> None:
    "Nothing but writing."
    step = read_checkpoint(folder)['step'] if list(folder.glob('step-*')) else 0
    while True:
        step += 1
        write_checkpoint(folder, dict(step=step, x=torch.full((2**18,), float(step))))


# The processes

def child(job: Callable, out: Path | None, seed: int) -> int: # its process id
    "Run a job in a fork; its result, or its error, in a file."
    if pid := os.fork(): return pid
    try:
        torch.manual_seed(seed)
        got = job()
        if out: torch.save(got, out)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def ended(pid: int) -> int: # its return code, negative for a signal
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_after(pid: int, seconds: float) -> int:
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return ended(pid)


def newest(folder: Path) -> str: return max((f.name for f in folder.glob('step-*.pt')), default='')


def first(folder: Path) -> None:
    "Train everything twice, once to the end, once until it is killed."
    for n in NAMES:
        codes = ended(child(lambda n=n: tiny(n, None, None), folder / f'{n}.pt', 0)), ended(child(lambda n=n: tiny(n, folder / n, plan(n)), None, 0))
        (folder / f'{n}.codes').write_text(f'{codes}')
    draw, writes = random.Random(0), folder / 'writes'
    writes.mkdir()
    steps = []
    for _ in range(6):
        killed_after(child(lambda: endless(writes), None, 0), draw.uniform(.02, .12))
        state = read_checkpoint(writes)
        if state is None: continue
        assert state['x'].eq(state['step']).all()
        steps.append(state['step'])
    (folder / 'steps').write_text(f'{steps}')
    assert ended(child(lambda: long(None), folder / 'long.pt', 0)) == 0


def second(folder: Path) -> None:
    "Go on with what was killed; the long training is killed again and again."
    for n in NAMES: ended(child(lambda n=n: tiny(n, folder / n, None), folder / f'{n} resumed.pt', os.getpid()))
    draw, kills = random.Random(1), 0
    for _ in range(3):
        before, until = newest(folder / 'long'), time.time() + 20
        pid = child(lambda: long(folder / 'long'), folder / 'long resumed.pt', kills)
        while time.time() < until and newest(folder / 'long') == before: time.sleep(.002)
        kills += killed_after(pid, draw.uniform(0, .03)) == -signal.SIGKILL
    (folder / 'kills').write_text(f'{kills}')
    assert ended(child(lambda: long(folder / 'long'), folder / 'long resumed.pt', kills)) == 0


@pytest.fixture(scope='module')
def folder(once) -> Path:
    "Where both processes have left their results."
    def make(out: Path) -> None:
        for part in ('first', 'second'):
            env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONHASHSEED=str(len(part)))
            with open(out / f'{part}.err', 'w') as err: subprocess.run([sys.executable, __file__, part, str(out)], stderr=err, env=env, timeout=300)
    return once('resume', make)


def told(folder: Path) -> str:
    "The last lines of what the processes have said."
    return '\n'.join('\n'.join((folder / f'{p}.err').read_text().splitlines()[-12:]) for p in ('first', 'second'))


def same(folder: Path, name: str) -> dict[str, Tensor]:
    for f in (folder / f'{name}.pt', folder / f'{name} resumed.pt'): assert f.exists(), f'{f.name} was not written:\n{told(folder)}'
    straight, resumed = (torch.load(folder / f'{name}{end}.pt', weights_only=True) for end in ('', ' resumed'))
    assert straight.keys() == resumed.keys()
    for k in straight: assert torch.equal(straight[k], resumed[k]), f'{k} differs at {int((straight[k] != resumed[k]).sum())} of {straight[k].numel()} places'
    return straight


@pytest.mark.parametrize('name', NAMES)
def test_killed_and_resumed(folder, name):
    at, moment = plan(name)
    codes = (folder / f'{name}.codes').read_text() if (folder / f'{name}.codes').exists() else 'nothing'
    assert codes == '(0, -9)', f'to the end and to the kill in {moment} of step {at}: exit codes {codes}\n{told(folder)}'
    out = same(folder, name)
    assert out['t'] == STEPS and len(out['loss']) == -(-STEPS // EVERY)


def test_killed_at_every_moment(): assert {plan(n)[1] for n in NAMES} == set(MOMENTS)


def test_a_long_training_killed_again_and_again(folder):
    out = same(folder, 'long')
    assert int((folder / 'kills').read_text()) == 3 and out['t'] == LONG and out['accuracy'][-1] > .8


def test_killed_while_writing(folder):
    "The newest checkpoint can be read after every kill, and it is never older than before."
    steps = json.loads((folder / 'steps').read_text())
    assert len(steps) > 2 and steps == sorted(steps) and steps[-1] > steps[0]


# What another run would make of a checkpoint

def grouped(*order: int) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    "Three layers in three groups, of which two have the same shapes."
    with seeded(): model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    opt = torch.optim.SGD([dict(params=list(model[i].parameters()), lr=.1 / (i + 1)) for i in order], momentum=.9)
    return model, opt, recipes.rigl(model, opt, sparsity=.5, total_steps=12)


def fitted(made: tuple, folder: Path | None, steps: int = 12, **how) -> list:
    model, opt, sp = made
    with seeded(1): x = torch.randn(96, 16)
    return fit(model, opt, lambda m, b: (m(b[0]) - b[0][:, :8].sin()).square().mean(), shuffled(x, batch=32), steps, sparsifier=sp, checkpoint=folder, **dict(every=4) | how)


def test_groups_in_another_order_are_refused(tmp_path):
    "The layers have the same shapes, so that torch would load the moments of one into the other without a word."
    fitted(grouped(0, 2, 4), tmp_path, stop=lambda rows: True)
    turned = grouped(2, 0, 4)
    before = {k: v.clone() for k, v in turned[0].state_dict().items()}
    with pytest.raises(ValueError, match="the checkpoint's optimizer has 0.weight where this one has 2.weight: give it the parameters in the same groups and order"): fitted(turned, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in turned[0].state_dict().items())
    straight, again = grouped(0, 2, 4), grouped(0, 2, 4)
    fitted(straight, None), fitted(again, tmp_path)
    for a, b in zip(straight[0].parameters(), again[0].parameters()): assert torch.equal(a, b)


def test_a_checkpoint_without_names_still_loads(tmp_path):
    "Those of earlier versions."
    fitted(grouped(0, 2, 4), tmp_path, stop=lambda rows: True)
    state = read_checkpoint(tmp_path)
    del state['groups']
    write_checkpoint(tmp_path, state)
    assert fitted(grouped(0, 2, 4), tmp_path)[-1]['step'] == 12


@pytest.mark.parametrize('how, said', [(dict(every=0), 'every=0: measure every so many steps'), (dict(scheduler='plateau'), 'ReduceLROnPlateau waits for measurements'), (dict(stop=patience('acuracy', 2)), "no record named 'acuracy': there are ")])
def test_what_the_loop_cannot_do_is_said(how, said):
    made = grouped(0, 2, 4)
    if 'scheduler' in how: how = dict(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(made[1]))
    with pytest.raises(ValueError, match=said): fitted(made, None, **how)


def test_an_optimizer_that_calls_the_loss_is_refused():
    model = network(16, 32)
    with pytest.raises(ValueError, match=r'LBFGS calls the loss itself: write the loop with optimizer.step\(closure\)'):
        fit(model, torch.optim.LBFGS(model.parameters()), lambda m, b: m(b[0]).sum(), shuffled(torch.randn(32, 16), batch=8), 4)


if __name__ == '__main__':
    torch.set_num_threads(1)
    for module in ('sklearn.datasets', 'torch._dynamo'): importlib.import_module(module)  # what every child would import otherwise
    dict(first=first, second=second)[sys.argv[1]](Path(sys.argv[2]))
