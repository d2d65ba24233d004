"The lab board in a real page: find, choose, overlay, read, ask again, sweep, cancel."
import base64
import json
import re
import shutil
import zlib
from pathlib import Path

import pytest

from sparse_workbench import execute

CELLS = '''from sparse_workbench.widgets.board import lab_board
board = lab_board()''', 'board'


def code(text, *tags): return dict(cell_type='code', metadata=dict(tags=list(tags)), source=text, outputs=[], execution_count=None)


def notebook(path: Path, *cells, title: str = '# Tent\n\n> How high does a tent stand?') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell_type='markdown', metadata={}, source=title), *cells]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=4)))
    return path


PARAMETERS = ("height: float = 2.  # of the tent (m)\npower: int = 2  # how pointed it is\n"
              "kind: Literal['cloth', 'net'] = 'cloth'  # what it is made of\nwait: str = ''  # a file to wait for\nout = ''")
WORK = '''import csv, json, math, os, sys, time
from pathlib import Path
if height < 0: raise ValueError(f'a tent of {height} m does not stand')
print('waiting', file=sys.stderr, flush=True)
while wait and not os.path.exists(wait): time.sleep(.05)
rows = [dict(step=i, site=s, name=n, value=height * f * (1 - abs(i / 10 - 1) ** power), unit=u) for i in range(21) for s in ('left', 'right')
        for n, f, u in (('height', 1, 'm'), ('load', 9.81 * (1 + (s == 'right')), 'N'))]
with open(Path(out, 'records.csv'), 'w', newline='') as f:
    w = csv.DictWriter(f, list(rows[0])); w.writeheader(); w.writerows(rows)
Path(out, 'result.json').write_text(json.dumps(dict(area=height * power / (power + 1) * 2, summary=[f'It stands {height} m high.'])))'''


@pytest.fixture(scope='module')
def place(lab) -> Path:
    "A project with a fast experiment and a store of real runs, one of them failed."
    root = lab.nbs / 'tents'
    path = notebook(root / 'nbs/experiments/tent.ipynb', code('from typing import Literal'), code(PARAMETERS, 'parameters'), code(WORK))
    execute.sweep(path, dict(height=[1., 2., -1.], power=[2]), store=root / 'runs').wait(300)
    return root


@pytest.fixture(scope='module')
def nb(lab, place):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    kernel = dict(display_name='python3', language='python', name='python3')
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in CELLS], metadata=dict(kernelspec=kernel)), place / 'board.ipynb')
    notebook_ = lab.open('tents/board.ipynb', run=True, height=1300)
    yield notebook_
    notebook_.close()


def rows(nb): return nb.page.locator('.sw-runs tbody tr[data-key]')
def row(nb, text): return rows(nb).filter(has_text=text).first
def keys(nb): return rows(nb).evaluate_all('all => all.map(r => r.dataset.key)')
def tab(nb, name): nb.page.get_by_role('tab', name=name).click()
def field(nb, name): return nb.page.locator('.sw-form:visible .jupyter-widgets').filter(has=nb.page.locator('.widget-label', has_text=re.compile(f'^{name}$'))).locator('input').first
LONG = 300      # seconds that a notebook may take on a busy machine


def find(nb, text, description='find'):
    nb.labelled(description).locator('input').fill(text)


def drawn(nb, expression, value, other=None, like=None):
    "Wait for a state of the kernel, and until its chart is on the page: another one than `other`, or `like` that. Callbacks of widgets have their own thread."
    nb.until(expression, value)
    nb.until('[len(board.parts["chart"].value), __import__("zlib").crc32(board.parts["chart"].value)]', lambda now: now != other and like in (None, now) and now == seen(nb))
    return seen(nb)


def seen(nb):
    data = base64.b64decode(nb.pixels('img.sw-curves').partition(',')[2])
    return [len(data), zlib.crc32(data)]


def test_all_runs_are_there(nb):
    rows(nb).nth(2).wait_for()
    nb.counts(rows(nb), 3)
    nb.counts('.sw-runs tr[data-status="failed"]', 1, 'failed: ValueError')
    nb.counts('.sw-runs tbody svg polyline', 4)            # two quantities of two finished runs
    assert nb.kernel('[board.error, len(board.shown)]') == [None, 3]
    nb.shot('board-first', '.sw-dashboard')


def test_words_and_conditions_narrow_the_table(nb):
    find(nb, 'does not stand')
    nb.page.wait_for_function("() => document.querySelectorAll('.sw-runs tbody tr[data-key]').length === 1")
    assert nb.kernel('[e.status for e in board.shown]') == ['failed']
    find(nb, '')
    find(nb, 'hight > 1', 'where')
    nb.shows('did you mean height?')
    find(nb, 'height > 1', 'where')
    nb.page.wait_for_function("() => document.querySelectorAll('.sw-runs tbody tr[data-key]').length === 1")
    nb.page.locator('.sw-dashboard .sw-error').first.wait_for(state='detached')
    nb.until('[e.facts["params.height"] for e in board.shown]', [2.])
    find(nb, '', 'where')
    rows(nb).nth(2).wait_for()


def test_a_heading_sorts(nb):
    nb.page.locator('.sw-runs th button', has_text='height').click()
    nb.page.locator('.sw-runs th[data-column="params.height"][aria-sort="descending"]').wait_for()
    nb.until('[e.facts["params.height"] for e in board.shown]', [2., 1., -1.])
    assert keys(nb) == nb.kernel('[e.key for e in board.shown]')


def test_keys_choose_runs_and_their_curves_lie_over_each_other(nb):
    none = seen(nb)
    rows(nb).first.focus()
    nb.page.keyboard.press('Space')
    nb.page.locator('tr[aria-selected="true"]').first.wait_for()
    one = drawn(nb, '[e.facts["params.height"] for e in board.drawn]', [2.], none)
    nb.page.keyboard.press('ArrowDown')
    nb.page.keyboard.press('Space')
    nb.page.locator('tr[aria-selected="true"]').nth(1).wait_for()
    both = drawn(nb, '[[e.facts["params.height"] for e in board.drawn], board.state.picked == [e.key for e in board.shown][:2]]', [[2., 1.], True], one)
    assert rows(nb).nth(1).evaluate('r => r === document.activeElement')           # the keyboard stays where it was
    assert nb.page.evaluate('() => window.jupyterapp.shell.currentWidget.content.mode') is not None
    nb.choose('record', 'load')
    load = drawn(nb, 'board.settings["record"]', 'load', both)
    nb.shot('board-curves', '.sw-dashboard')
    nb.choose('of', 'mean of all')
    drawn(nb, 'board.settings["site"]', 'mean of all', load)
    nb.shot('board-mean', '.sw-dashboard')
    nb.choose('of', 'each')
    drawn(nb, 'board.settings["site"]', '', like=load)


def test_enter_opens_the_notebook_without_a_kernel(nb, place):
    rows(nb).first.focus()
    nb.page.keyboard.press('Enter')
    nb.page.frame_locator('.sw-page iframe').get_by_text('How high does a tent stand?').wait_for()
    nb.until('board.parts["tabs"].selected_index', 1)
    nb.shows('It stands 2.0 m high.')
    nb.shot('board-run', '.sw-dashboard')
    link = nb.page.locator('.sw-page a')
    key = nb.kernel('board.state.current')
    assert link.get_attribute('href').endswith(f'/lab/tree/tents/runs/{key}/executed.ipynb')
    link.click()
    nb.page.locator('.lm-TabBar-tabLabel', has_text='executed.ipynb').first.wait_for()
    nb.page.wait_for_function("() => window.jupyterapp.shell.currentWidget.context?.path.endsWith('executed.ipynb') && window.jupyterapp.shell.currentWidget.context.isReady")
    nb.command('application:close')
    nb.page.wait_for_function("() => window.jupyterapp.shell.currentWidget?.context?.path.endsWith('board.ipynb')")


def test_ask_again_with_another_value(nb, place):
    tab(nb, 'Ask again')
    field(nb, 'height').fill('high')
    nb.shows('is not float; an example is 2.0')
    nb.shot('board-wrong', '.sw-dashboard')
    field(nb, 'height').fill('3.5')
    field(nb, 'wait').fill('go')
    nb.click('▶ Run')
    nb.page.locator('.sw-log', has_text='waiting').wait_for(timeout=LONG * 1000)     # what the run says, while it works
    nb.page.locator('.sw-runs tr[data-status="working"]').wait_for(timeout=LONG * 1000)
    assert nb.kernel('board.asked.running') and nb.kernel('len(board.shelf.entries)') == 4
    nb.shot('board-working', '.sw-dashboard')
    (place / 'go').touch()
    nb.page.locator('.sw-good', has_text='done in').wait_for(timeout=LONG * 1000)
    nb.page.locator('.sw-runs tr[aria-current="true"]', has_text='3.5').wait_for()
    assert nb.kernel('[board.shelf.entries[board.state.current].facts["params.height"], board.asked.reply["status"], board.error]') == [3.5, 'done', None]
    nb.counts(rows(nb), 4)


def test_a_run_is_cancelled(nb, place):
    field(nb, 'height').fill('4')
    field(nb, 'wait').fill('never')
    nb.click('▶ Run')
    nb.page.locator('.sw-log', has_text='waiting').wait_for(timeout=LONG * 1000)
    nb.page.locator('button:visible', has_text='■ Cancel').click()
    nb.page.locator('.sw-good', has_text='stopped; nothing was kept').wait_for(timeout=LONG * 1000)
    nb.until('[board.asked.reply["status"], [e.status for e in board.shown].count("working")]', ['stopped', 0], LONG)


def test_a_sweep_says_its_size_and_is_cancelled(nb, place):
    tab(nb, 'Sweep')
    field(nb, 'height').fill('2.5, 3')
    field(nb, 'power').fill('1,3')
    field(nb, 'wait').fill('later')
    nb.shows('2 height × 2 power = 4 runs')
    assert nb.kernel('board.sweep') is None
    nb.click('▶ Sweep')
    nb.page.locator('.sw-points tr[data-status="running"]').nth(1).wait_for(timeout=LONG * 1000)
    nb.shot('board-sweep', '.sw-dashboard')
    nb.page.locator('button:visible', has_text='■ Cancel').click()
    nb.page.locator('.sw-points tr[data-status="stopped"]').nth(3).wait_for(timeout=LONG * 1000)
    nb.until('[board.sweep.counts, len(board.shelf.entries)]', [{'stopped': 4}, 4], LONG)


def test_the_same_sweep_finishes(nb, place):
    before = seen(nb)
    (place / 'later').touch()
    nb.page.locator('button:visible:enabled', has_text='▶ Sweep').click(timeout=LONG * 1000)
    nb.page.locator('.sw-points tr[data-status="done"]').nth(3).wait_for(timeout=LONG * 1000)
    nb.until('[board.sweep.counts, len(board.state.picked)]', [{'done': 4}, 4], LONG)
    rows(nb).nth(7).wait_for()
    tab(nb, 'Curves')
    nb.page.locator('tr[aria-selected="true"]').nth(3).wait_for()
    load = drawn(nb, 'len(board.drawn)', 4, before)
    nb.choose('record', 'height')
    light = drawn(nb, 'board.settings["record"]', 'height', load)
    nb.shot('board-light', '.sw-dashboard')
    nb.theme(dark=True)
    drawn(nb, 'board.dark', True, light)
    nb.shot('board-dark', '.sw-dashboard')
    nb.theme(dark=False)
    nb.until('board.dark', False)


def test_a_run_of_somebody_else_appears_by_itself(nb, place):
    (one, *_) = [p for p in (place / 'runs').glob('tent-*')]
    other = place / 'runs/.copy'
    shutil.copytree(one, other)
    env = json.loads((other / 'environment.json').read_text())
    (other / 'environment.json').write_text(json.dumps({**env, 'id': '0123456789ab'}))
    other.rename(place / 'runs/tent-0123456789ab')
    row(nb, 'tent-012345').wait_for()
    nb.until('"tent-0123456789ab" in board.shelf.entries')


def test_after_a_restart_the_notebook_keeps_the_table(nb, lab, place):
    nb.command('docmanager:save')
    nb.page.wait_for_function('() => !window.jupyterapp.shell.currentWidget.context.model.dirty')
    saved = json.loads((place / 'board.ipynb').read_text())
    (twin,) = [''.join(o['data']['text/html']) for c in saved['cells'] for o in c['outputs'] if 'text/html' in o.get('data', {})]
    assert '<table' in twin and 'failed: ValueError' in twin and 'data:image/png' in twin and 'Loading widget' not in twin
    nb.restart()
    nb.run_all()
    rows(nb).nth(8).wait_for()
    assert nb.kernel('[board.error, len(board.shelf.entries)]') == [None, 9]
