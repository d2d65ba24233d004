"The essential-sparsity explorer without a browser: what it costs, what it holds, what it says when something is wrong."
import gc
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import sparse_workbench as sw

W = pytest.importorskip('ipywidgets')
pytest.importorskip('anywidget')

from sparse_workbench.evaluate import Evaluate, hits  # noqa: E402
from sparse_workbench.widgets import essential  # noqa: E402
from sparse_workbench.widgets.essential import Method, essential_explorer  # noqa: E402


def classifier(seed: int = 0) -> tuple[nn.Module, Evaluate]:
    "A small classifier that answers its own labels."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)).eval()
    x = torch.randn(200, 1, 8, 8)
    with torch.no_grad(): y = model(x).argmax(1)
    return model, Evaluate([(a, b) for a, b in zip(x.split(50), y.split(50))], hits, 'accuracy', 'share of inputs', higher=True)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == 'essential-sparsity']


def resident() -> int: # bytes
    import psutil
    return psutil.Process().memory_info().rss


def test_same_numbers_as_the_library():
    model, evaluate = classifier()
    curve = sw.essential_sparsity(model, evaluate, allocate=sw.global_)
    board = essential_explorer(model, evaluate, curves=[Method(allocation='global_')])
    board.widget()
    assert board.explorer.wait(60) and board.error is None
    line = board.study.lines[0]
    assert [r[0] for r in line.rows] == curve.sparsities
    assert torch.tensor([r[1] for r in line.rows], dtype=torch.double).equal(curve.values)
    assert line.knee == curve.knee
    layers = sw.sensitivity(model, evaluate)
    essential.measure_layers(board.explorer)
    assert board.explorer.wait(60)
    assert next(iter(board.study.rise.values()))[1].equal(layers.rise)
    board.close()


def test_the_model_is_never_touched():
    model, evaluate = classifier()
    versions = [p._version for p in model.parameters()]
    board = essential_explorer(model, evaluate)
    board.widget()
    for s in (.37, .81): board.explorer.sparsity.value = s
    assert board.explorer.wait(60)
    assert [p._version for p in model.parameters()] == versions
    board.close()


def cycles() -> None:
    "Fifty times open and closed: no widget, no thread, no copy and little memory stay behind."
    model, evaluate = classifier()
    def once() -> weakref.ref:
        board = essential_explorer(model, evaluate, sparsities=[0, .5, .9])
        board.widget()
        assert board.explorer.wait(60)
        board.static()
        copy = weakref.ref(board.study.bench.copy)
        board.close()
        return copy
    for _ in range(50): once()                        # caches fill and the allocator settles
    gc.collect()
    widgets, memory = len(W.widgets.widget._instances), resident()
    copies = [once() for _ in range(50)]
    gc.collect()
    assert len(W.widgets.widget._instances) == widgets
    assert not threads() and not [c for c in copies if c() is not None]
    assert resident() - memory < 30e6, f'{(resident() - memory) / 1e6:.0f} MB more after 50 cycles'


def test_fifty_times_open_and_closed(alone): alone(cycles)


def test_closed_while_it_measures():
    model, evaluate = classifier()
    entered, go = threading.Event(), threading.Event()
    def slow(m, batch):
        entered.set()
        go.wait(30)
        return hits(m, batch)
    board = essential_explorer(model, Evaluate(evaluate.batches, slow, 'accuracy', 'share of inputs', higher=True))
    board.widget()
    assert entered.wait(30)
    threading.Timer(.1, go.set).start()
    board.close()
    assert not threads() and board.study.bench.copy is None


def test_a_billion_weights_open_without_being_read():
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.big = nn.Linear(4, 4, bias=False)
            self.big.weight = nn.Parameter(torch.zeros(1).expand(32768, 32768), requires_grad=False)
    model, memory = Huge(), resident()
    begun = time.monotonic()
    board = essential_explorer(model, classifier()[1], curves=[])
    board.widget()
    assert time.monotonic() - begun < 2 and resident() - memory < 100e6
    assert f'{2**30:,} prunable weights' in board.static()
    board.close()


def test_a_deleted_model_is_named():
    model, evaluate = classifier()
    board = essential_explorer(model, evaluate, sparsities=[0, .5, .9])
    board.widget()
    assert board.explorer.wait(60)
    board.close()
    del model
    gc.collect()
    with pytest.raises(ReferenceError, match="'model' was deleted"): board.widget()
    assert 'deleted' in board._repr_mimebundle_()['text/html']


def test_changed_weights_are_noticed():
    model, evaluate = classifier()
    board = essential_explorer(model, evaluate, sparsities=[0, .5, .9])
    board.widget()
    assert board.explorer.wait(60)
    with torch.no_grad(): model[1].weight.mul_(.5)
    board.explorer.sparsity.value = .3
    assert board.explorer.wait(60) and 'the weights of the model have changed' in board.error
    board.explorer.anew.click()
    assert board.explorer.wait(60) and board.error is None and not board.study.lines[0].missing
    board.close()


def test_what_needs_calibration_says_so_and_the_rest_goes_on():
    model, evaluate = classifier()
    board = essential_explorer(model, evaluate, curves=['wanda', 'magnitude'], sparsities=[0, .5, .9])
    board.widget()
    assert board.explorer.wait(60)
    wanda, magnitude = board.study.lines
    assert 'wanda needs in_norm: pass calibration' in wanda.error and 'calibration' in board.error
    assert not magnitude.missing and magnitude.error == ''
    assert 'wanda needs in_norm' in board.explorer.rows.children[0].children[1].value
    board.close()


def test_examples_that_cannot_be_shown():
    model, evaluate = classifier()
    own = Evaluate(evaluate.batches, lambda m, b: hits(m, b), 'accuracy', 'share of inputs', higher=True)
    board = essential_explorer(model, own, sparsities=[0, .5, .9])
    board.widget()
    assert board.explorer.wait(60) and board.error is None and 'no examples to show' in board.explorer.words.value
    board.close()
    with pytest.raises(TypeError, match='needs an Evaluate'): essential_explorer(model, lambda m: 1.)


def test_kept_results_are_there_at_once(tmp_path):
    model, evaluate = classifier()
    def opened():
        board = essential_explorer(model, evaluate, cache=tmp_path)
        board.widget()
        return board
    first = opened()
    essential.measure_layers(first.explorer)
    assert first.explorer.wait(60)
    rows, seen = first.study.lines[0].rows, first.explorer.words.value
    first.close()
    second = opened()
    second.study.bench.prune = None                            # whatever would have to be measured fails
    assert second.study.lines[0].rows == rows and not second.study.lines[0].missing
    assert next(iter(second.study.rise.values()))[1].isfinite().all()
    assert second.explorer.wait(60) and second.error is None and second.explorer.words.value == seen
    assert 'answers changed' in second.static() and 'sensitivity of' in second.static()
    second.close()
    with torch.no_grad(): model[1].weight.mul_(.5)
    third = opened()
    assert third.study.lines[0].missing or third.study.lines[0].rows != rows    # other weights, other results
    third.close()
