"The gradient-flow dashboard without a browser: every recipe of its menu, recordings from disk, threads, memory."
import contextlib
import gc
import json
import threading
import weakref

import numpy as np
import pytest
import torch

from sparse_workbench import recipes
from sparse_workbench.core import sites
from sparse_workbench.flows import ste
from sparse_workbench.gradient_flow import MEASURES, GradientFlow
from sparse_workbench.loop import row
from sparse_workbench.patterns import nm
from sparse_workbench.sparsifier import Sparsifier
from sparse_workbench.testing import seeded
from sparse_workbench.widgets import flow
from sparse_workbench.widgets.flow import Offer, Recording, Task, flow_dashboard, flow_figure, read_recordings, recordings, save_recording, training, training_recipes


def task(width: int = 64) -> Task:
    "Two layers and a head on noise, whose start and batches never change."
    with seeded(1): x, y = torch.randn(256, width), torch.randint(10, (256,))
    made = flow.image_task(x, y, x[:32], y[:32], batch=32)
    return made._replace(model=flow.classifier(width, 64))


def recorded(steps: int = 12, recipe: str = 'sr_ste', rate=lambda: 1e-3, **how) -> Recording:
    r = Recording(recipe, total=steps)
    for rows in training(task(), training_recipes()[recipe], steps, rate, every=1, **how): r.add(rows)
    return r


@pytest.mark.parametrize('name', sorted(training_recipes()))
def test_every_recipe_of_the_menu_runs(name):
    fixed = flow.fixed_sparsity(name, flow.OWN)[1]
    with seeded(0): r = recorded(40, name, **({} if fixed is not None else dict(sparsity=.5)))
    assert r.last == 40 and set(r.measures) <= set(MEASURES) and {'loss', 'held-out loss', 'learning rate'} == set(r.curves)
    assert np.isfinite(r.matrix('grad_kept')[1][:, -1]).all() and r.series('through_kept', 'all')[1].max() > 0
    assert recipes.REGISTER[name.rstrip('_')]['url'] in flow.recipe_note(name, '')


def test_records_are_those_of_the_recorder():
    t, kept = task(), []
    opt = torch.optim.AdamW(t.model.parameters(), 1e-3)
    sp = recipes.sr_ste(t.model, opt, pattern='1:8', total_steps=12)
    r = GradientFlow(sp, 1)
    t.model.train()
    for i in range(12): kept.append(flow.train_step(t, opt, r, i))
    live = recorded(pattern='1:8')
    for name in MEASURES:
        for site in (*r.sites, 'all'):
            ours = [x['value'] for x in r.rows() + r.totals() if (x['name'], x['site']) == (name, site)]
            assert live.series(name, site)[1].tolist() == ours, (name, site)
    assert live.series('loss')[1].tolist() == kept


def test_a_pause_changes_nothing_and_a_rate_is_used():
    steady = recorded(pattern='2:4')
    assert recorded(pattern='2:4').rows() == steady.rows()
    rates = iter([1e-3] * 7 + [1e-5] * 6)                               # one for making the optimizer, one for each step
    other = recorded(pattern='2:4', rate=lambda: next(rates))
    assert other.series('learning rate')[1].tolist() == [1e-3] * 6 + [1e-5] * 6
    first, second = (x.series('update_ratio', 'all')[1] for x in (steady, other))
    assert (first[:6] == second[:6]).all() and (second[6:] < .1 * first[6:]).all()


def test_divergence_is_an_error_with_a_way_out():
    with pytest.raises((FloatingPointError, ValueError), match='lower the learning rate|not finite|NaN|infinite'):
        recorded(60, 'ste', lambda: 1e30, pattern='2:4', optimizer='SGD')


def test_sources(tmp_path):
    pd = pytest.importorskip('pandas')
    model = task().model
    opt = torch.optim.SGD(model.parameters(), .1)
    r = GradientFlow(Sparsifier(sites(model), pattern=nm(2, 4), flow=ste).attach(opt), 1)
    for _ in range(3): model(torch.randn(8, 64)).square().mean().backward(); opt.step(); opt.zero_grad()
    gone = weakref.ref(model)
    (one,) = recordings(r, 'mine').values()
    frame = pd.DataFrame(one.rows())
    assert recordings(frame)['run'].rows() == one.rows() == recordings(one.rows())['run'].rows()
    assert [k for k in recordings(dict(a=frame, b=one))] == ['a', 'b']
    r.detach()
    del model, opt, r
    gc.collect()
    assert gone() is None                                               # a recording holds nothing of the model
    stored = tmp_path / 'digits-0123456789ab'
    stored.mkdir()
    save_recording(one, stored / 'records.csv')
    assert read_recordings(tmp_path)[stored.name].rows() == one.rows()


@pytest.mark.parametrize('name, text, said', [
    ('a.csv', 'step,name,value\n1,loss,x\n', r"a.csv, row 1: step '1' and value 'x' are to be numbers"),
    ('a.csv', 'step,name,value\n1,,2\n', 'a.csv, row 1: a record has step, name and value'),
    ('a.json', '{"step": 1}', 'a.json holds a dict: a recording is a list of rows'),
    ('a.json', '[1]', 'a.json, row 1: a record has'),
    ('a.csv', b'\xff\xfe\x00', 'a.csv is not a text in UTF-8'),
    ('a.pkl', b'\x80\x04.', r'recordings are .csv or .json files'),
])
def test_files_that_are_none(tmp_path, name, text, said):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said): read_recordings(tmp_path / name)
    seen = contextlib.nullcontext() if name.endswith('pkl') else pytest.warns(UserWarning, match='skipped a')     # a folder is not searched for other files
    with seen, pytest.raises(ValueError, match='holds no recording'): read_recordings(tmp_path)


def test_missing_values_and_uneven_runs():
    long = Recording('long', [row(t, 'flips', t, 'weights', s) for t in (10, 20, 40) for s in ('a', 'b')] + [row(15, 'accuracy', .5)])
    short = Recording('short', [row(5, 'flips', 1, 'weights', 'b'), row(10, 'flips', 2, 'weights', 'c')])
    assert np.isnan(short.matrix('flips')[1]).tolist() == [[False, True], [True, False]]
    figure = flow_figure([long, short], 'flips', cursor=dict(step=15, layer='b'))
    titles = [ax.get_title(loc='left') for ax in figure.axes[:2]]
    assert titles == ['long\nstep 15: b 20, accuracy 0.5', 'short\nstep 15: no record']
    assert all(ax.get_xlim() == (0, 40) for ax in figure.axes[:2])
    data = flow.canvas_data(short, 'flips')
    json.dumps({k: v for k, v in data.items() if k != 'values'})
    assert np.isnan(np.frombuffer(data['values'], np.float32)).sum() == 2
    with pytest.raises(ValueError, match='no run to draw'): flow_figure([])


def test_written_by_one_thread_and_read_by_another():
    r, errors, done = Recording('busy'), [], threading.Event()
    def read() -> None:
        while not done.is_set():
            try: flow.canvas_data(r, 'flips'), flow.scale_of([r], 'flips'), r.rows(), r.measures
            except Exception as e: errors.append(e)
    reader = threading.Thread(target=read)
    reader.start()
    for t in range(400): r.add(row(t + 1, f'measure {t % 40}', t, '', f'layer {k}') for k in range(10))
    done.set()
    reader.join()
    assert not errors


def test_close_frees_and_stops():
    alive = []
    def made() -> Task:
        t = task()
        alive.append(weakref.ref(t.model))
        return t
    board = flow_dashboard(tasks=dict(noise=Offer(made, 1e-3, 10**6)))
    board.widget()
    board.job = flow.begin(board).start()
    while not board.fresh: board.job.wait(.05)
    board.job.pause()
    thread = board.job._thread
    board.close()
    thread.join(60)
    gc.collect()
    assert not thread.is_alive() and alive[0]() is None
    assert board.widget() is not None and list(board.runs) == board.fresh     # what was recorded is kept
    board.close()


def cycles() -> None:
    "Fifty times open and closed: no widget and little memory stay behind."
    import ipywidgets as W
    import psutil
    board = flow_dashboard(dict(a=recorded(pattern='2:4'), b=recorded(recipe='mask_decay')))
    def cycle(i: int) -> None:
        board.widget()
        board.controls['measure'].value = 'flips' if board.settings['measure'] != 'flips' else 'explored'
        if i % 5 == 0: board.static()
        board.close()
    for i in range(50): cycle(i)                      # caches fill and the allocator settles
    gc.collect()
    before, widgets = psutil.Process().memory_info().rss, len(W.widget._instances)
    for i in range(50): cycle(i)
    gc.collect()
    assert len(W.widget._instances) == widgets
    more = psutil.Process().memory_info().rss - before
    assert more < 30e6, f'{more / 1e6:.0f} MB more after 50 cycles'


def test_fifty_times_open_and_closed(alone): alone(cycles)
