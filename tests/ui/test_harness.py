"The smallest dashboard in a real page: drawn, moved, wrong, right again, dark, shown twice, closed."
import pytest

CELLS = '''import ipywidgets as W
from matplotlib.figure import Figure
from sparse_workbench.widgets.base import View
def wave(size):
    if size > 8: raise ValueError(f'{size} is too large')
    ax = Figure(figsize=(4, 1.5)).subplots()
    ax.plot([0, 1, 2], [0, size, 0]); ax.set(xlabel='time (s)', ylabel='height (m)')
    return ax.figure
view = View(wave, 'a tent', size=W.IntSlider(value=2, min=1, max=10, description='size'))''', 'view', 'view'


@pytest.fixture(scope='module')
def nb(lab):
    notebook = lab.open(*CELLS, run=True)
    yield notebook
    notebook.close()


def test_a_slider_draws_anew(nb, lab):
    nb.counts('img.sw-picture', 2)      # two views of one widget
    nb.changes(lambda: nb.slide('size', 'ArrowRight'))
    nb.until('view.settings["size"]', 3)
    assert nb.pixels('img.sw-picture >> nth=0') == nb.pixels('img.sw-picture >> nth=1')


def test_an_error_is_shown_and_goes_again(nb, lab):
    nb.slide('size', 'End')
    nb.shows('ValueError: 10 is too large')
    nb.slide('size', 'Home')
    nb.page.locator('.sw-error').first.wait_for(state='detached')
    nb.until('[view.error, view.settings["size"]]', [None, 1])


def test_the_figure_follows_the_theme(nb, lab):
    nb.changes(lambda: nb.theme(dark=True))
    nb.until('view.dark')
    nb.shot('harness-dark')
    nb.changes(lambda: nb.theme(dark=False))


def test_closed_and_opened_again(nb, lab):
    nb.do('view.close()')
    nb.page.locator('img.sw-picture').first.wait_for(state='detached')
    assert nb.kernel('len(__import__("ipywidgets").widgets.widget._instances)') == 0
    nb.run_all()
    nb.page.locator('img.sw-picture').first.wait_for()
