"Every experiment with its default parameters, as `sparse-workbench run NAME` runs it: a few steps, to see that nothing in it is broken."
import os
from pathlib import Path

import pytest

from sparse_workbench.execute import experiments, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('name', sorted(p.stem for p in (ROOT / 'nbs/experiments').glob('*.ipynb')))
def test_an_experiment_runs_with_its_defaults(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('OMP_NUM_THREADS', os.environ.get('OMP_NUM_THREADS', '1'))
    assert name in experiments()
    done = run(name, store=tmp_path, progress=False)
    assert done.error is None and (done.path / 'executed.ipynb').exists() and (done.path / 'report.html').exists(), done
