"Settings that must stand before torch is imported, and what several test files share."
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Workers run side by side: one thread each. Nothing may ask a network; figures need no screen; Triton interprets without a GPU.
FIXED = dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', MPLBACKEND='Agg', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')
for name, value in FIXED.items(): os.environ.setdefault(name, value)
if not shutil.which('nvidia-smi'): os.environ.setdefault('TRITON_INTERPRET', '1')

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def root() -> Path:
    "The project's folder."
    return ROOT


@pytest.fixture(scope='session')
def data() -> Path:
    "The folder of real data and weights, or a skip that says how to get them."
    named = os.environ.get('SPARSE_WORKBENCH_DATA')
    folder = Path(named) if named else ROOT.parent / 'shared' / 'data'
    if named and not folder.is_dir(): pytest.fail(f'SPARSE_WORKBENCH_DATA={named} is not a folder', pytrace=False)
    if not folder.is_dir(): pytest.skip('no real data: set SPARSE_WORKBENCH_DATA to its folder, or put it in ../shared/data')
    return folder


@pytest.fixture(scope='session')
def alone() -> Callable[..., object]:
    "alone(f, *args): f's result, or its error, from a fresh process, whose memory nobody else uses."
    def run(f: Callable, *args: object) -> object:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool: return pool.submit(f, *args).result()
    return run


@pytest.fixture(scope='session')
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    "once(name, make): a folder that `make` fills, once for all workers of a run."
    def folder(name: str, make: Callable[[Path], None]) -> Path:
        import fcntl
        base = tmp_path_factory.getbasetemp().parent if 'PYTEST_XDIST_WORKER' in os.environ else tmp_path_factory.getbasetemp()
        (out := base / name).mkdir(exist_ok=True)
        with open(base / f'{name}.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / 'made').exists():
                make(out)
                (out / 'made').touch()
        return out
    return folder


def pytest_collection_modifyitems(items):
    "Notebooks first, the longest files early, so that no worker ends alone."
    items.sort(key=lambda i: not i.nodeid.startswith('tests/test_nbs.py'))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "tests/ui share one server and one browser, so one worker takes them all; any other test goes to whoever is free."
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str: return 'tests/ui' if nodeid.startswith('tests/ui/') else nodeid
    return Scheduler(config, log)


def pytest_terminal_summary(terminalreporter):
    "Browser tests that did not run are named, even when nothing else is."
    why = {str(r.longrepr[2]) for r in terminalreporter.stats.get('skipped', []) if r.nodeid.startswith('tests/ui/') and isinstance(r.longrepr, tuple)}
    for reason in sorted(why): terminalreporter.write_line(f'NOT TESTED, tests/ui: {reason}', yellow=True)
