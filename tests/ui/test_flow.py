"The gradient-flow dashboard in JupyterLab: a live run under the hand, two recorded runs with one cursor, and what becomes of both."
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

RECORDED = '''
from sparse_workbench.widgets.flow import flow_dashboard, record_run
runs = {k: record_run('digits, MLP', k, 80, pattern='1:8', every=1) for k in ('sr_ste', 'mask_decay')}
board = flow_dashboard(runs); board
'''
LIVE = '''
import gc, threading, time, torch
from sparse_workbench.widgets.flow import flow_dashboard, Offer, digits_task, language_task
board = flow_dashboard(store='kept', tasks={'digits, MLP': Offer(digits_task, 1e-3, 8000), 'language': Offer(language_task, 3e-4, 120)}); board
'''
MODELS = "[gc.collect(), sum(isinstance(x, torch.nn.Module) and (hasattr(x, 'layer1') or hasattr(x, 'lm_head')) for x in gc.get_objects())][1]"
PANEL = dict(left='.swf-panel >> nth=0', right='.swf-panel >> nth=1')


def say(nb: Any, side: str, field: str) -> str:
    "What a panel says of the step and the layer under the cursor."
    return nb.page.locator(f'{PANEL[side]} >> .swf-{field}').inner_text()


def drawn(nb: Any) -> None:
    "Wait until the charts are there."
    nb.page.wait_for_function("() => [...document.querySelectorAll('.swf-under')].some(c => c.width > 300 && c.clientHeight > 200)")


def point(nb: Any, side: str, x: float, y: float) -> None:
    "Move the mouse to a place in a panel's canvas, given in pixels from its left or (below 1) as a fraction of its width."
    box = nb.page.locator(f'{PANEL[side]} >> .swf-over').bounding_box()
    nb.page.mouse.move(box['x'] + (x if x > 1 else x * box['width']), box['y'] + y)


def pixel(nb: Any, side: str, x: float, y: float) -> list[int]:
    "The colour of a place in a panel's chart."
    return nb.page.locator(f'{PANEL[side]} >> .swf-under').evaluate(
        '(c, [x, y]) => { const k = c.width / c.clientWidth; return [...c.getContext("2d").getImageData((x > 1 ? x : x * c.clientWidth) * k, y * k, 1, 1).data] }', [x, y])


def until(nb: Any, test: Callable[[], Any], what: str, most: int = 4000) -> Any:
    "Wait, frame by frame, for something on the page."
    for _ in range(most):
        if found := test(): return found
        nb.page.evaluate('() => new Promise(done => requestAnimationFrame(() => done()))')
    pytest.fail(what, pytrace=False)


def last(nb: Any) -> int:
    "Steps of the newest live run that the kernel has recorded."
    return nb.kernel('board.runs[board.fresh[-1]].last if board.fresh else 0')


def a_point(nb: Any, more: int = 20) -> float:
    "Seconds of processor time that the kernel spends on a record: training, recording, drawing."
    before = nb.kernel('[board.job.done, time.process_time()]')
    nb.page.wait_for_function('([n]) => [...document.querySelectorAll(".sw-job .widget-label")].some(e => Number(e.textContent.match(/: (\\d+) of/)?.[1]) >= n)', arg=[before[0] + more])
    after = nb.kernel('[board.job.done, time.process_time()]')
    return (after[1] - before[1]) / (after[0] - before[0])


@pytest.fixture(scope='module')
def recorded(lab) -> Iterator[Any]:
    nb = lab.open(RECORDED, width=1500, height=1300, run=True)
    drawn(nb)
    yield nb
    nb.close()


@pytest.fixture(scope='module')
def live(lab) -> Iterator[Any]:
    nb = lab.open(LIVE, width=1500, height=1300, run=True)
    yield nb
    nb.close()


# Two recorded runs

def test_one_cursor_over_both(recorded):
    nb = recorded
    nb.page.locator('.swf').scroll_into_view_if_needed()
    point(nb, 'left', .6, 20)
    until(nb, lambda: 'layer1' in say(nb, 'left', 'layer'), 'the cursor marks nothing')
    step, value = (nb.page.locator(PANEL['left']).get_attribute('data-step'), say(nb, 'left', 'value'))
    assert nb.page.locator(PANEL['right']).get_attribute('data-step') == step and say(nb, 'right', 'layer') == 'layer1'
    assert say(nb, 'right', 'value') != value and 'L2 norm' in value and 'nats/image' in say(nb, 'left', 'loss')
    for side, run in (('left', 'sr_ste'), ('right', 'mask_decay')):
        t, v = nb.kernel(f"[x.tolist() for x in runs['{run}'].series('through_pruned', 'layer1.weight')]")
        assert abs(float(say(nb, side, 'value').split()[0]) / v[t.index(int(step))] - 1) < 1e-3
    point(nb, 'right', .8, 20)
    until(nb, lambda: nb.page.locator(PANEL['left']).get_attribute('data-step') not in (None, step), 'the left chart does not follow the right one')
    assert nb.kernel('board.cursor') == {}                              # pointing asks nothing of the kernel
    nb.shot('flow-compare', '.sw-dashboard')


def test_pointing_needs_no_kernel_and_no_time(recorded):
    nb = recorded
    nb.command('notebook:insert-cell-below')
    nb.page.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.setSource('while not gone: __import__(\"time\").sleep(.01)') }")
    nb.do("exec('gone = []')")
    nb.command('notebook:run-cell')
    nb.page.wait_for_function("() => window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.status === 'busy'")
    seen = set()
    for x in (.3, .5, .7, .9):
        point(nb, 'left', x, 60)
        seen.add(until(nb, lambda: nb.page.locator(PANEL['right']).get_attribute('data-step'), 'no cursor'))
    assert len(seen) == 4                                               # the kernel was busy all the time
    spent = nb.page.evaluate('''() => { const c = document.querySelector('.swf-over'), r = c.getBoundingClientRect(), t = performance.now()
      for (let i = 0; i < 200; i++) c.dispatchEvent(new PointerEvent('pointermove', { clientX: r.left + r.width * (.2 + i / 300), clientY: r.top + 60, bubbles: true }))
      return (performance.now() - t) / 200 }''')
    assert spent < 100, f'{spent:.1f} ms for one move of the cursor'
    nb.command('kernelmenu:interrupt')
    nb.page.wait_for_function("() => window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.status === 'idle'")


def test_keys_move_the_cursor_and_keep_it(recorded):
    nb = recorded
    nb.page.locator(f"{PANEL['left']} >> .swf-over").focus()
    nb.page.keyboard.press('End')
    nb.until("board.cursor.get('step')", 80)
    for key in ('ArrowLeft', *['ArrowUp'] * 4, 'ArrowDown', 'ArrowDown'): nb.page.keyboard.press(key)
    nb.until('board.cursor', dict(step=79, layer='layer3.weight'))
    assert say(nb, 'right', 'step') == 'step 79' and say(nb, 'right', 'layer') == 'layer3'
    nb.page.keyboard.press('Home')
    nb.until("board.cursor.get('step')", 1)
    assert nb.page.locator(f"{PANEL['left']} >> .swf-over").get_attribute('aria-label').startswith('sr_ste: passes, pruned (L2 norm)')
    assert 'step 1: layer3' in nb.kernel("__import__('sparse_workbench.widgets.flow', fromlist=['x']).read_out(runs['sr_ste'], 'flips', board.cursor)")
    nb.page.keyboard.press('Escape')
    nb.until('board.cursor', {})


def test_measure_and_colours(recorded):
    nb, before = recorded, pixel(recorded, 'left', .3, 20)
    nb.changes(lambda: nb.choose('measure', 'explored  (fraction)'), '.swf-under')
    assert nb.kernel("board.canvas.scale['unit']") == 'fraction' and 'fraction' in nb.page.locator('.swf-unit').inner_text()
    assert pixel(nb, 'left', .3, 20) != before
    nb.changes(lambda: nb.choose('measure', 'passes, pruned  (L2 norm)'), '.swf-under')
    nb.changes(lambda: nb.choose('colours', 'linear'), '.swf-under')
    nb.counts('.swf-zero', 0)
    nb.changes(lambda: nb.choose('colours', 'automatic'), '.swf-under')


def test_dark_page(recorded):
    nb = recorded
    nb.changes(lambda: nb.theme(True), '.swf-under')
    nb.page.wait_for_function("() => document.querySelector('.swf').classList.contains('swf-dark')")
    nb.until('board.dark', True)
    point(nb, 'left', .5, 60)
    nb.shot('flow-dark', '.sw-dashboard')
    nb.changes(lambda: nb.theme(False), '.swf-under')


def test_two_views_and_a_reload(recorded):
    nb = recorded
    nb.command('notebook:insert-cell-below')
    nb.page.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.setSource('board') }")
    nb.command('notebook:run-cell')
    until(nb, lambda: nb.page.locator('.swf').count() == 2, 'there is no second view')
    drawn(nb)
    nb.kernel("setattr(board.canvas, 'cursor', dict(step=50, layer='layer2.weight'))")
    for i in range(4): until(nb, lambda: nb.page.locator('.swf-panel').nth(i).get_attribute('data-step') == '50', f'panel {i} does not show the step')
    nb.command('docmanager:save')
    nb.page.wait_for_function('() => !window.jupyterapp.shell.currentWidget.context.model.dirty')
    nb.load(reset=False)
    drawn(nb)
    until(nb, lambda: nb.page.locator(PANEL['right']).get_attribute('data-step') == '50', 'the reloaded page forgets the cursor')
    assert nb.kernel("board.live is not None and board.settings['measure']") == 'through_pruned'


# A live run

def test_a_run_under_the_hand(live):
    nb = live
    assert nb.page.locator('.swf-empty').is_visible()
    nb.choose('pattern', '1:8')
    nb.click('Start')
    drawn(nb)
    nb.page.evaluate('''() => { window.seen = new Set(); const state = document.querySelector('.swf-state')
      new MutationObserver(() => window.seen.add(state.textContent)).observe(state, { childList: true, characterData: true, subtree: true }) }''')
    cost = a_point(nb)
    begun = last(nb)
    assert cost < .5, f'{cost:.2f} s of processor time for a point'      # on a machine that is free, the time that it takes
    assert nb.page.evaluate('() => window.seen.size') > 3
    assert nb.kernel('1 + 1', seconds=5) == 2                           # the kernel answers meanwhile
    nb.click('Pause')
    nb.until('board.job.state', 'paused')
    steady = until(nb, lambda: (a := last(nb)) == last(nb) == last(nb) and a, 'the run goes on')
    nb.slide('learning rate', *['ArrowLeft'] * 20)
    rate = nb.until('board.rate', lambda r: abs(r / 1e-4 - 1) < 1e-6)     # a decade in twenty keys
    assert last(nb) == steady >= begun
    nb.click('Go on')
    nb.until('board.runs[board.fresh[-1]].last', lambda n: n >= steady + 100)
    nb.click('Cancel')
    nb.until('board.job.state', 'cancelled')
    rates = nb.kernel("board.runs[board.fresh[-1]].series('learning rate')[1].tolist()")
    assert rates[0] == 1e-3 and abs(rates[-1] / rate - 1) < 1e-9
    nb.shows('stopped at step')
    nb.shot('flow-live', '.sw-dashboard')
    nb.until(MODELS, 0)                                                 # the model is gone with its thread


def test_the_rate_is_on_the_chart(live):
    nb = live
    nb.page.locator(f"{PANEL['left']} >> .swf-over").focus()
    nb.page.keyboard.press('Home')
    first = until(nb, lambda: say(nb, 'left', 'rate'), 'no learning rate is shown')
    nb.page.keyboard.press('End')
    until(nb, lambda: say(nb, 'left', 'rate') not in ('', first), 'the changed learning rate is not shown')
    assert first == 'learning rate 0.001' and float(say(nb, 'left', 'rate').split()[-1]) < 2e-4
    nb.page.keyboard.press('Escape')


def test_a_run_that_fails_says_why(live):
    nb = live
    nb.choose('recipe', 'structure_decay')
    nb.choose('pattern', 'row')
    nb.click('Start')
    nb.shows('structure_decay leads to N:M, and row() is none')
    assert nb.kernel('(board.job.state, len(board.runs), len(board.fresh))') == ['failed', 1, 1]
    nb.until(MODELS, 0)


def test_saved_and_read_again(live):
    nb = live
    nb.click('Save new runs')
    nb.shows('wrote sr_ste')
    nb.do("board.runs['again'] = board.runs.pop(board.settings['left']); board.controls['left'].value = '–'")
    nb.click('Load')
    nb.shows('loaded sr_ste')
    first, second = (nb.kernel(f"board.runs[{name!r}].rows()[:500]") for name in ('again', nb.kernel("board.settings['left']")))
    assert first == second and json.dumps(first)


def test_the_language_model_beside_it(live):
    nb = live
    nb.choose('train', 'language')
    nb.until("board.settings['steps']", 120)
    nb.choose('recipe', 'mask_decay')
    nb.choose('pattern', '2:4')
    nb.click('Start')
    nb.until('board.job.done', lambda n: n >= 4)
    cost = a_point(nb, 8)
    assert cost < .5, f'{cost:.2f} s of processor time for a point'
    until(nb, lambda: nb.page.locator(PANEL['right']).is_visible() and 'step' in say(nb, 'right', 'state'), 'the second run is not shown')
    point(nb, 'right', .1, 200)
    nb.shot('flow-language', '.sw-dashboard')
    nb.do('board.close()')
    nb.until("'work_through' in str([t._target for t in threading.enumerate()])", False)     # closing stops the thread
    until(nb, lambda: nb.page.locator('.swf').count() == 0, 'the closed view stays')
    nb.until(MODELS, 0)
