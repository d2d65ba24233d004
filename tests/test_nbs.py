"""Every notebook of nbs/, executed cell by cell in nbdev's own executor; one test each.

Cells that carry a flag of `tst_flags` in settings.ini are left out: NB_FLAGS='cuda slow' forces them.
Experiments are run as such, by test_experiments.py.
"""
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).resolve().parents[1]
CFG = get_config(path=ROOT)
NBS = [p.relative_to(ROOT) for p in sorted(map(Path, nbglob(ROOT / 'nbs'))) if 'experiments' not in p.parts]


@pytest.fixture
def restored():
    "What a notebook may leave behind in this process is put back: folder, environment, import path, main module, filters of warnings, torch's defaults, figures."
    import torch
    folder, env, path, main = Path.cwd(), dict(os.environ), sys.path[:], sys.modules['__main__']
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with warnings.catch_warnings(): yield
    sys.modules['__main__'] = main                                 # what a spawned process would run first
    os.chdir(folder)
    for name in os.environ.keys() - env.keys(): del os.environ[name]
    os.environ.update(env)
    sys.path[:] = path
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)
    if torch.are_deterministic_algorithms_enabled(): torch.use_deterministic_algorithms(False)
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')


def told(nb: Path, err: str) -> str:
    "Notebook, cell and error in the first line, then the frames inside the notebook and the package."
    cell = re.search(r'Executing Cell #(\d+)', err)
    frames = err.strip().partition('File "<ipython')
    last = err.strip().splitlines()[-1] if err.strip() else 'no message'
    return f"{nb}, cell {cell[1] if cell else '?'}: {last}\n{(frames[1] + frames[2] or err)[-4000:]}"


@pytest.mark.parametrize('nb', NBS, ids=[p.relative_to('nbs').as_posix() for p in NBS])
def test_notebook(nb, restored, capfd):
    forced = os.environ.get('NB_FLAGS', '').split()
    done, _ = run_notebook(ROOT / nb, skip_flags=CFG.tst_flags.split(), force_flags=forced, basepath=ROOT)
    if not done: pytest.fail(told(nb, capfd.readouterr().err), pytrace=False)
