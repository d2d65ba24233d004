"The essential-sparsity explorer in JupyterLab: every control is used, and both the page and the kernel are asked."
import re

import pytest

SETUP = '''import json
import sparse_workbench as sw
from sparse_workbench import runs
from sparse_workbench.widgets.essential import essential_explorer
lm = sw.zoo.load('embedded')
evaluate, calibration = sw.evaluation(lm, count=6, window=64, samples=4)
before = {k: v.clone() for k, v in lm.model.state_dict().items()}
def whole(): return all(v.equal(before[k]) for k, v in lm.model.state_dict().items())'''
OPEN = '''board = essential_explorer(lm, evaluate, calibration, 'runs', curves=['magnitude', ('wanda', 'per_row')], sparsities=[0, .2, .3, .4, .5, .6, .7, .8],
                           prompt='def read_text(path):', tokens=24)
board'''
IDLE = 'not board.explorer.jobs.busy and not board.explorer.jobs.waiting'
AT = 'board.explorer.sparsity.value'
A_RUN = '''from pathlib import Path
made = Path('runs') / 'essential_sparsity-0123456789ab'
runs.save(made, result=dict(knees={'wanda': dict(value=.5, low=.4, high=.6, ratio=8.)}),
          records=[dict(curve='wanda', sparsity=s, loss=y, low=y - .1, high=y + .1) for s, y in ((0., 1.8), (.5, 2.), (.9, 7.))])
runs.write_whole(made / 'params.json', runs.to_json(dict(model='embedded', scores=['wanda']), 'params'))
runs.write_whole(made / 'environment.json', runs.to_json(dict(name='essential_sparsity', id='0123456789ab', started='2026-01-02T03:04:05', seconds=1.), 'environment'))'''


@pytest.fixture(scope='module')
def nb(lab):
    "One page for the tests of this file; each leaves the dashboard as usable as it found it."
    page = lab.open(SETUP, OPEN, run=True, width=1500, height=2300)
    page.page.locator('.es-chart svg text').first.wait_for()
    yield page
    page.close()


def card(nb, heading):
    return nb.page.locator('.es-card').filter(has=nb.page.locator('h4', has_text=heading)).first


def has(locator, text):
    "Wait until an element holds a text."
    locator.filter(has_text=text).first.wait_for()


def count(nb, selector, n):
    "Wait until so many elements are there."
    nb.page.wait_for_function('([s, n]) => document.querySelectorAll(s).length === n', arg=[selector, n])


def test_points_come_while_the_kernel_answers(nb):
    nb.do('''from time import sleep
answered = 0
while board.explorer.jobs.busy and answered < 20: answered += 1''')      # the thread measures while this one runs
    nb.until(IDLE)
    count(nb, '.es-point', 16)
    count(nb, '.es-missing', 0)
    assert nb.kernel('[len(v.got) for v in board.study.lines]') == [8, 8]
    assert nb.kernel('[bool(v.knee) for v in board.study.lines]') == [True, True]
    count(nb, '.es-knee', 2)
    has(nb.page.locator('.es-side'), '16 of 16 points; all points measured')
    assert nb.kernel('whole()')


def test_light_and_dark(nb):
    nb.page.locator('.es-tokens span').first.wait_for()
    nb.shot('essential', '.es-root')
    color = "() => getComputedStyle(document.querySelector('.es-focus .es-line')).stroke"
    light = nb.page.evaluate(color)
    nb.theme(dark=True)
    nb.page.wait_for_function(f"c => ({color})() !== c", arg=light)
    nb.shot('essential-dark', '.es-root')
    nb.theme(dark=False)
    nb.page.wait_for_function(f"c => ({color})() === c", arg=light)


def test_slider(nb):
    marker = "() => Number(document.querySelector('.es-at').getAttribute('x1'))"
    x, text = nb.page.evaluate(marker), nb.page.locator('pre.es-text').nth(1).inner_text()
    nb.slide('sparsity', 'PageUp')
    nb.until(AT, lambda v: v > .5)
    nb.page.wait_for_function(f'x => ({marker})() > x', arg=x)
    at = nb.kernel(AT)
    has(nb.page.locator('.es-big'), 'perplexity')
    has(card(nb, 'zeros'), f'{at:.1%} zeros')
    nb.page.wait_for_function("t => document.querySelectorAll('pre.es-text')[1].innerText !== t", arg=text)
    has(card(nb, 'What it writes'), f'{at:.1%} zeros')


def test_a_place_between_points_is_measured(nb):
    before = nb.kernel(AT)
    nb.slide('sparsity', 'ArrowRight', 'ArrowRight', 'ArrowRight')
    nb.until(f'round({AT} - {before}, 4)', .03)
    nb.until(f'round({AT}, 4) in board.explorer.line.got')
    nb.until(IDLE)
    count(nb, '.es-focus .es-point', nb.kernel('len(board.explorer.line.got)'))
    assert nb.kernel('len(board.explorer.line.got) > len(board.explorer.line.wanted)')
    has(card(nb, 'zeros'), 'measured')
    assert nb.kernel('whole()')


def test_click_and_keys_on_the_chart(nb):
    spot = nb.page.locator('.es-curve[data-line="wanda, per_row"] .es-point').nth(2)
    where = float(spot.get_attribute('data-x'))
    spot.hover(force=True)
    has(nb.page.locator('.es-look'), '95 %:')
    spot.click(force=True)
    nb.until('board.explorer.follow.value', 'wanda, per_row')
    nb.until(AT, lambda v: abs(v - where) < 1e-3)
    assert nb.labelled('along').locator('select').input_value() == 'wanda, per_row'
    nb.page.locator('.es-chart svg').focus()
    nb.page.keyboard.press('ArrowRight')
    nb.until(AT, lambda v: abs(v - where - .01) < 1e-3)
    nb.page.keyboard.press('ArrowUp')
    nb.until('board.explorer.follow.value', 'magnitude')
    assert 'magnitude at' in nb.page.locator('.es-chart svg').get_attribute('aria-valuetext')
    box = nb.page.locator('.es-chart svg').bounding_box()
    nb.page.mouse.click(box['x'] + 62 + .25 * (box['width'] - 78), box['y'] + 40)    # nothing is there: the sparsity alone
    nb.until(AT, lambda v: abs(v - .25) < .011)


def test_along_and_axis(nb):
    nb.choose('along', 'wanda, per_row')
    nb.until('board.explorer.chart.line', 'wanda, per_row')
    nb.page.wait_for_function("() => document.querySelector('.es-focus').dataset.line === 'wanda, per_row'")
    nb.choose('axis', 'loss, nats/token')
    has(nb.page.locator('.es-label'), 'loss (nats/token)')
    has(nb.page.locator('.es-big'), 'nats/token')
    nb.choose('axis', 'perplexity')
    has(nb.page.locator('.es-label'), 'perplexity')
    nb.choose('along', 'magnitude')
    nb.until('board.explorer.follow.value', 'magnitude')


def test_prompt_tokens_temperature_seed(nb):
    text = lambda: nb.page.locator('pre.es-text').nth(1).inner_text()
    def changes(act):
        old = nb.page.locator('.es-pair').inner_text()
        act()
        nb.page.wait_for_function("t => document.querySelector('.es-pair').innerText !== t", arg=old)
    area = nb.labelled('prompt').locator('textarea')
    changes(lambda: (area.fill('class Stack:'), area.press('Tab')))
    assert nb.kernel('board.explorer.prompt.value') == 'class Stack:' and text().startswith('class Stack:')
    changes(lambda: nb.slide('tokens', 'ArrowRight'))
    nb.until('board.explorer.length.value', 32)
    changes(lambda: nb.slide('temperature', 'PageUp'))
    nb.until('board.explorer.heat.value', lambda v: v > 0)
    seed = nb.labelled('seed').locator('input')
    changes(lambda: (seed.fill('7'), seed.press('Enter')))
    nb.until('board.explorer.draw.value', 7)


def test_tokens(nb):
    nb.slide('sparsity', 'End', *['PageDown'] * 2)
    nb.until(IDLE)
    rows = card(nb, 'Tokens that lost most').locator('tbody tr')
    nb.counts(rows, 10)
    rises = [float(rows.nth(i).locator('td').first.inner_text()) for i in range(10)]
    assert rises == sorted(rises, reverse=True) and rises[0] > 1
    spans = nb.page.locator('.es-tokens span')
    nb.counts(spans, 64)
    titles = spans.evaluate_all("s => s.map(e => [e.title, e.style.background])")
    deep = max(titles[1:], key=lambda t: float(re.search(r'\(([+-][\d.]+)\)', t[0])[1]))
    assert 'nats' in deep[0] and 'the pruned model expects' in deep[0] and 'rgba(209, 113, 28' in deep[1]
    before = nb.page.locator('.es-tokens').inner_text()
    nb.labelled('window').locator('select').select_option(index=4)
    nb.page.wait_for_function("t => document.querySelector('.es-tokens').innerText !== t", arg=before)
    shown = nb.kernel('board.explorer.window.value')
    assert shown >= 0 and nb.kernel(f'lm.decode(evaluate.batches[0][{shown}, :12])')[:20].strip()[:8] in nb.page.locator('.es-tokens').inner_text()


def test_layers(nb):
    card(nb, 'Which layers').locator('button').click()
    nb.page.locator('.es-heat td[title*="alone at"]').first.wait_for()
    nb.shot('essential-layers', '.es-root')
    nb.click('Stop')
    nb.until(IDLE)
    found = nb.kernel('int(list(board.study.rise.values())[0][1].isfinite().all(1).sum())')
    assert 0 < found < 49
    count(nb, '.es-heat td[title*="alone at"]', 3 * found)
    has(card(nb, 'Which layers'), f'Measure {49 - found} layers')
    assert nb.kernel('whole()')


def test_add_stop_go_on_hide_remove(nb):
    nb.choose('criterion', 'random')
    nb.choose('pattern', 'N:8')
    nb.choose('allocation', 'uniform')
    nb.click('Add curve')
    nb.page.locator('.es-curve[data-line="random, N:8"]').wait_for(state='attached')
    nb.until('board.explorer.follow.value', 'random, N:8')
    nb.click('Stop')
    nb.until(IDLE)
    left = nb.kernel('len(board.study.lines[-1].missing)')
    if left:
        count(nb, '.es-curve[data-line="random, N:8"] .es-missing', left)
        nb.click('Go on')
    nb.until('len(board.study.lines[-1].missing)', 0)
    count(nb, '.es-curve[data-line="random, N:8"] .es-point', 8)
    nb.click('Add curve')                                               # the same once more: said in the dashboard
    has(nb.page.locator('.sw-error'), 'random, N:8 is on the chart already')
    row = nb.page.locator('.es-lines > *').filter(has_text='random, N:8')
    row.locator('input[type=checkbox]').uncheck()
    count(nb, '.es-curve[data-line="random, N:8"]', 0)
    assert nb.page.locator('.sw-error').count() == 0
    row.locator('button').click()
    nb.until('len(board.study.lines)', 2)
    count(nb, '.es-lines > *', 2)


def test_a_pattern_that_does_not_fit(nb):
    nb.choose('allocation', 'global')
    nb.click('Add curve')
    has(nb.page.locator('.sw-error'), 'nothing to rank globally')
    has(nb.page.locator('.es-lines'), 'nothing to rank globally')
    nb.page.locator('.es-lines > *').nth(2).locator('button').click()
    nb.until('len(board.study.lines)', 2)
    nb.choose('allocation', 'uniform')


def test_a_run_of_the_store(nb):
    nb.do(A_RUN)
    nb.click('↻')
    nb.labelled('run').locator('option', has_text='embedded: wanda').wait_for(state='attached')
    nb.click('Add run')
    name = nb.until('board.study.lines[-1].name', 'wanda · embedded 012345')
    count(nb, f'.es-curve[data-line="{name}"] .es-point', 3)
    count(nb, f'.es-curve[data-line="{name}"] .es-knee', 1)
    nb.choose('along', name)
    has(card(nb, 'Tokens that lost most'), 'A run keeps numbers')
    nb.page.locator('.es-lines > *').nth(2).locator('button').click()
    nb.until('board.explorer.follow.value', 'magnitude')


def test_weights_that_change(nb):
    nb.do('w = lm.model.model.layers[0].mlp.up_proj.weight.detach()\nw.mul_(.5)')
    nb.slide('sparsity', 'Home', 'PageUp', 'PageUp', 'ArrowRight', 'ArrowRight')
    has(nb.page.locator('.sw-error'), 'the weights of the model have changed')
    nb.do('w.mul_(2)')
    nb.click('Measure again')
    nb.until(IDLE)
    nb.until('[len(v.missing) for v in board.study.lines]', [0, 0])
    count(nb, '.es-missing', 0)
    assert nb.kernel('whole()')


def test_saved_reloaded_seen_twice_and_closed(nb):
    nb.command('docmanager:save')
    nb.page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
    saved = (nb.lab.nbs / nb.name).read_text()
    assert 'data:image/png;base64' in saved and 'Loading widget' not in saved
    nb.load(reset=False)                                                # the kernel and the dashboard live on
    nb.page.locator('.es-chart svg text').first.wait_for()
    count(nb, '.es-knee', 2)
    nb.page.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 1 }")
    nb.command('notebook:insert-cell-below')
    nb.page.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.setSource('board') }")
    nb.command('notebook:run-cell')
    count(nb, '.es-chart svg', 2)
    nb.do('board.explorer.sparsity.value = .21')
    nb.page.wait_for_function("() => [...document.querySelectorAll('.es-chart svg')].every(s => Math.abs(s.getAttribute('aria-valuenow') - .21) < 1e-3)")
    nb.do('board.close()')
    count(nb, '.es-chart svg', 0)
    assert nb.kernel("[t.name for t in __import__('threading').enumerate()].count('essential-sparsity')") == 0


def test_images(lab, data):
    page = lab.open('import sparse_workbench as sw\nfrom sparse_workbench.widgets.essential import essential_explorer\nlm = sw.zoo.load("resnet20")\nevaluate, calibration = sw.evaluation(lm, count=100, samples=16)',
                    'board = essential_explorer(lm, evaluate, calibration, sparsities=[0, .2, .4, .5, .6, .7, .8, .9], at=.7)\nboard', run=True, width=1500, height=1900)
    page.until(IDLE)
    page.page.locator('.es-images figure img').first.wait_for()
    changed = page.kernel('int((board.study.looks[(None, 0.)].view.top != list(board.study.looks.values())[-1].view.top).sum())')
    page.counts('.es-images figure', min(24, changed))
    has(page.page.locator('.es-label'), 'accuracy (share of inputs)')
    page.shot('essential-images', '.es-root')
    page.close()
