"The run store and the command line, with toy notebooks: caching, failures, kills, races, bad input."
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest

from sparse_workbench import cli, execute, runs
from sparse_workbench.execute import RunFailed, UsageError, run

ROOT = Path(runs.__file__).resolve().parent.parent
ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'}
CLI = [sys.executable, '-c', 'import sys; from sparse_workbench.cli import main; sys.exit(main())']
FINISHED = re.compile(r'\w+-[0-9a-f]{12}')


def code(text, *tags):
    return dict(cell_type='code', metadata=dict(tags=list(tags)), source=text, outputs=[], execution_count=None)


def notebook(path, *cells, title='# Toy\n\n> Where does a polynomial break?'):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell_type='markdown', metadata={}, source=title), *cells]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=4)))
    return path


PARAMETERS = code("sparsities: list[float] = [0., .5, .9]  # fractions of zeros\npower = 8  # how late it breaks\n"
                  "rate: float | None = None\ndata: str = ''  # file or folder\nfast = True\nout = ''", 'parameters')
WORK = code("import json, sys, time\nfrom pathlib import Path\nfrom tqdm import tqdm\n"
            "for s in tqdm(sparsities, desc='sweep'): time.sleep(.15)\n"
            "rows = [dict(sparsity=s, loss=2 + s**power) for s in sparsities]\nprint('here', out)\n"
            "result = dict(rise=rows[-1]['loss'] - 2, table=rows, summary=['It breaks late.'])\n"
            "Path(out, 'result.json').write_text(json.dumps(result))")
WAIT = code("import os, time\nfrom pathlib import Path\nPath(out, 'result.json').write_text('{}')\n"
            "Path(mark + '~').write_text(str(os.getpid()))\nos.rename(mark + '~', mark)\ntime.sleep(120)")


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A folder with three experiments; tests run inside it."
    root = tmp_path_factory.mktemp('project')
    notebook(root/'nbs/experiments/toy.ipynb', PARAMETERS, WORK)
    notebook(root/'nbs/experiments/broken.ipynb', code("x: int = 0\nout = ''", 'parameters'), code("print('before', out)\n1/x"))
    notebook(root/'nbs/experiments/slow.ipynb', code("mark: str = ''\nout = ''", 'parameters'), WAIT)
    with contextlib.chdir(root): yield root


def command(*words):
    return subprocess.Popen([*CLI, *map(str, words)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope='module')
def first(project):
    "The toy, asked by two processes at the same time: what each wrote and its status."
    words = ['run', 'toy', '-p', 'sparsities=[0, 1e-1, 0.9]', '-p', 'power=4']
    asked = [command(*words), command(*words, '--quiet')]
    return [(*p.communicate(timeout=120), p.returncode) for p in asked]


@pytest.fixture(scope='module')
def slow(project):
    "Two runs in the middle of their work, by the signal that will stop them."
    both = signal.SIGKILL, signal.SIGINT
    asked = {how: command('run', 'slow', '-p', f'mark={how.name}', '--store', how.name.lower()) for how in both}
    for how, p in asked.items():
        for _ in range(900):
            if Path(how.name).exists() or p.poll() is not None: break
            time.sleep(.1)
        assert p.poll() is None, p.stderr.read()
    yield asked
    for p in asked.values(): p.kill()


@pytest.fixture
def fake(monkeypatch):
    "Counts executions, and makes each a write of `result.json`, without a kernel."
    calls = []
    def execute_(path, progress):
        calls.append(path.parent)
        (path.parent/'result.json').write_text(json.dumps(dict(n=len(calls))))
    monkeypatch.setattr(execute, 'execute', execute_)
    return calls


def names(store): return sorted(p.name for p in Path(store).iterdir())
def dead_pid():
    p = subprocess.Popen([sys.executable, '-c', ''])
    p.wait()
    return p.pid


# ---- one real run ----

def test_two_processes_ask_at_once(first):
    assert [status for *_, status in first] == [0, 0], first
    assert all('It breaks late.' in out for out, *_ in first)
    assert len(names('runs')) == 1 and len(runs.results()) == 1


def test_run_writes_everything(first):
    (name,) = [n for n in names('runs') if FINISHED.fullmatch(n)]
    assert names('runs') == [name]
    assert names(f'runs/{name}') == ['environment.json', 'executed.ipynb', 'params.json', 'report.html', 'result.json']
    r = runs.load(f'runs/{name}')
    assert r.params == dict(sparsities=[0., .1, .9], power=4, rate=None, data='', fast=True)
    assert r.result['rise'] == 2 + .9**4 - 2
    env = r.environment
    assert env['python'] == sys.version.split()[0] and env['seconds'] > .3 and env['name'] == 'toy' and f"toy-{env['id']}" == name
    assert set(env['packages']) == {'sparse_workbench', 'torch', 'triton', 'numpy', 'transformers'}
    assert str(Path.home()) not in json.dumps(env)


def test_progress_streams_and_settles(first):
    loud, quiet = (err for _, err, _ in first)
    assert loud.count('sweep') > 2 and '3/3' in loud and quiet == ''
    nb = execute.read_notebook(next(Path('runs').glob('toy-*/executed.ipynb')))
    outputs = [o for c in nb['cells'] for o in c.get('outputs', [])]
    bars, text = (''.join(''.join(o['text']) for o in outputs if o.get('name') == n) for n in ('stderr', 'stdout'))
    assert bars.count('sweep') == 1 and '3/3' in bars and '\r' not in bars
    assert text == 'here .\n'


def test_cli_prints_place_table_and_summary(first):
    lines = first[0][0].splitlines()
    assert re.fullmatch(r'toy-[0-9a-f]{12} \((\d+\.\d s|from the store)\)', lines[0]) and lines[2].endswith('/report.html')
    assert lines[4].split() == ['sparsity', 'loss'] and len(lines[5:8]) == 3
    assert lines[-1] == 'It breaks late.'


def test_report_is_complete_and_asks_no_server(first):
    page = next(Path('runs').glob('toy-*/report.html')).read_text()
    assert not re.search(r'https?:|<link|<script|@import|url\(', page)
    assert "default-src 'none'" in page and '<title>Toy</title>' in page
    assert re.search(r'\d{4}-\d\d-\d\d \d\d:\d\d UTC', page) and '<details class="code">' in page


def test_same_question_is_answered_from_the_store(first, capsys):
    t = time.time()
    r = run('toy', sparsities=(0, .1, .9), power=4)
    assert r.cached and time.time() - t < 2
    assert cli.main(['results', '--csv']) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith('name,id,started,seconds,params.sparsities') and f',{r.id},' in out


def test_results_table(first):
    t = runs.results()
    assert t[['name', 'params.power', 'result.rise']].values.tolist() == [['toy', 4, 2 + .9**4 - 2]]
    assert len(runs.results('no such store')) == 0 and list(runs.results('no such store'))[:2] == ['name', 'id']
    html = runs.load(next(Path('runs').glob('toy-*')))._repr_html_()
    assert 'power' in html and 'rise' in html and '<script' not in html


# ---- failures ----

def test_failed_run_is_kept_apart(project, tmp_path, capfd):
    assert cli.main(['run', 'broken', '--store', str(tmp_path)]) == 1
    err = capfd.readouterr().err
    assert 'ZeroDivisionError: division by zero' in err and 'executed.ipynb' in err and 'cell [3]' in err
    assert names(tmp_path) == ['failed'] and len(runs.results(tmp_path)) == 0
    (bad,) = runs.failed(tmp_path)
    assert bad.error['ename'] == 'ZeroDivisionError' and bad.error['traceback'] and '\x1b' not in json.dumps(bad.error)
    saved = (bad.path/'executed.ipynb').read_text()
    assert 'before' in saved and 'ZeroDivisionError' in saved and str(tmp_path) not in saved
    assert 'failed: ZeroDivisionError' in bad._repr_html_()


def test_kernel_that_dies(project, tmp_path):
    notebook(tmp_path/'dies.ipynb', code('import faulthandler\nfaulthandler._sigsegv()'))
    with pytest.raises(RunFailed, match='DeadKernelError'): run(tmp_path/'dies.ipynb', store=tmp_path/'s', progress=False)
    assert names(tmp_path/'s') == ['failed']
    assert 'perhaps for memory' in runs.failed(tmp_path/'s')[0].error['evalue']


@pytest.mark.parametrize('text', ['{"a": 1', '[1]', '{"a": NaN}', '\x00'])
def test_bad_result_is_a_failure(project, tmp_path, monkeypatch, text):
    monkeypatch.setattr(execute, 'execute', lambda path, progress: (path.parent/'result.json').write_text(text))
    with pytest.raises(RunFailed, match='result.json'): run('toy', store=tmp_path, progress=False)
    assert len(runs.results(tmp_path)) == 0


def test_no_result_is_an_empty_one(project, tmp_path, monkeypatch):
    monkeypatch.setattr(execute, 'execute', lambda path, progress: None)
    assert run('toy', store=tmp_path, progress=False).result == {}


def test_report_that_cannot_be_made_costs_no_result(project, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(execute, 'report', lambda *a: 1/0)
    with pytest.warns(UserWarning, match='no report: ZeroDivisionError'): r = run('toy', store=tmp_path, progress=False)
    assert r.result == {'n': 1} and len(runs.results(tmp_path)) == 1


def test_failed_again_and_again(project, tmp_path, monkeypatch):
    def boom(path, progress): raise MemoryError('no memory')
    monkeypatch.setattr(execute, 'execute', boom)
    for _ in range(3):
        with pytest.raises(RunFailed, match='MemoryError: no memory'): run('toy', store=tmp_path, progress=False)
    assert len(runs.failed(tmp_path)) == 3 and names(tmp_path) == ['failed']


# ---- kills ----

@pytest.mark.parametrize('how, status', [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_run_leaves_nothing_that_looks_finished(slow, fake, how, status):
    from psutil import pid_exists
    p, store, mark = slow[how], Path(how.name.lower()), Path(how.name)
    (work,) = names(store)
    assert work.startswith('.tmp-slow-')
    runs.clean_store(store)
    assert names(store) == [work], 'the folder of a living process was touched'
    p.send_signal(how)
    out, err = p.communicate(timeout=60)
    assert p.returncode == status, err
    assert out == '' and 'Traceback' not in err
    if how == signal.SIGINT: assert names(store) == [] and err.endswith('stopped; nothing was kept\n')
    assert len(runs.results(store)) == 0 and runs.failed(store) == []
    kernel = int(mark.read_text())
    for _ in range(100):
        if not pid_exists(kernel): break
        time.sleep(.1)
    assert not pid_exists(kernel), 'the kernel outlived its run'
    mark.unlink()  # else its content would be part of the question
    r = run('slow', store=store, progress=False, mark=how.name)
    assert not r.cached and names(store) == [r.path.name]


def test_leftovers(tmp_path):
    final, pid, host = 'toy-0123456789ab', dead_pid(), runs.this_host()
    made = [f'.tmp-{final}-{host}-{pid}-00000000', f'.old-{final}-{host}-{pid}-00000001',
            f'.tmp-{final}-elsewhere-{pid}-00000002', f'.tmp-{final}-{host}-{os.getpid()}-00000003', '.tmp-notes', '.git-x', 'notes']
    for m in made: (tmp_path/m).mkdir(); (tmp_path/m/'x').write_text(m)
    runs.clean_store(tmp_path)
    assert names(tmp_path) == sorted([*made[2:], final])  # the killed replacement is undone
    (tmp_path/made[1]).mkdir()
    runs.clean_store(tmp_path)
    assert names(tmp_path) == sorted([*made[2:], final]) and (tmp_path/final/'x').exists()


def test_interrupt_while_replacing_keeps_the_old_answer(project, tmp_path, fake, monkeypatch):
    old = run('toy', store=tmp_path, progress=False)
    def stop(path, progress): raise KeyboardInterrupt
    monkeypatch.setattr(execute, 'execute', stop)
    with pytest.raises(KeyboardInterrupt): run('toy', store=tmp_path, force=True, progress=False)
    assert names(tmp_path) == [old.path.name] and run('toy', store=tmp_path).result == old.result


# ---- races ----

def test_second_answer_is_thrown_away(project, tmp_path, fake, monkeypatch):
    quick = execute.execute
    def slow(path, progress):
        monkeypatch.setattr(execute, 'execute', quick)
        run('toy', store=tmp_path, progress=False)  # another process is faster
        quick(path, progress)
    monkeypatch.setattr(execute, 'execute', slow)
    r = run('toy', store=tmp_path, progress=False)
    assert r.cached and r.result == {'n': 1} and names(tmp_path) == [r.path.name]


def test_many_replace_the_same(tmp_path):
    final = tmp_path/'toy-0123456789ab'
    body = ("import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[2])\nimport runs\nfinal = Path(sys.argv[1])\n"
            "for i in range(200):\n"
            "    made = runs.hidden('tmp', final)\n    made.mkdir()\n"
            "    for name in 'ab': (made/name).write_text(str(i))\n"
            "    runs.publish(made, final, replace=True)\n")
    words = [sys.executable, '-c', body, str(final), str(Path(runs.__file__).parent)]  # the module alone: no torch
    ps = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate(timeout=60)[1] for p in ps] == ['']*3
    assert names(tmp_path) == [final.name] and (final/'a').read_text() == (final/'b').read_text() == '199'


# ---- what the question is ----

def test_data_code_and_values_change_the_question(project, tmp_path, fake):
    store, data = tmp_path/'runs', tmp_path/'data'
    data.mkdir()
    (data/'a.txt').write_text('1')
    ask = lambda **k: run('toy', store=store, progress=False, data=str(data), **k)
    one = ask()
    assert ask().cached and not one.cached and list(one.environment['data']) == ['data']
    (data/'a.txt').write_text('2')
    two = ask()
    assert not two.cached and two.id != one.id
    (data/'a.txt').write_text('1')
    assert ask().id == one.id and ask().cached
    (data/'sub').mkdir()
    (data/'sub'/'b').write_text('')
    assert ask().id not in (one.id, two.id)
    assert not ask(power=9).cached and ask(power=8).cached
    copy = notebook(tmp_path/'toy.ipynb', PARAMETERS, WORK, title='# Other prose')
    assert run(copy, store=store, progress=False, data=str(data)).cached, 'prose is not part of the question'
    other = notebook(tmp_path/'toy.ipynb', PARAMETERS, WORK, code('1'))
    assert not run(other, store=store, progress=False, data=str(data)).cached


def test_store_inside_the_data_folder(project, tmp_path, fake):
    ask = lambda: run('toy', store=tmp_path/'runs', progress=False, data=str(tmp_path))
    assert [ask().cached, ask().cached] == [False, True]


def test_digest(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'x').write_text('1')
    plain = runs.digest(tmp_path/'a')
    (tmp_path/'a'/'__pycache__').mkdir()
    (tmp_path/'a'/'__pycache__'/'x.pyc').write_text('1')
    (tmp_path/'a'/'loop').symlink_to(tmp_path/'a')
    (tmp_path/'a'/'gone').symlink_to(tmp_path/'nowhere')
    assert runs.digest(tmp_path/'a') == plain
    (tmp_path/'a'/'link').symlink_to(tmp_path/'a'/'x')
    assert runs.digest(tmp_path/'a') != plain
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'y').write_text('1')
    assert runs.digest(tmp_path/'b') != plain, 'names inside a folder count'
    (tmp_path/'e').symlink_to(tmp_path/'b')
    assert runs.digest(tmp_path/'e') == runs.digest(tmp_path/'b')


def test_force_replaces(project, tmp_path, fake):
    a = run('toy', store=tmp_path, progress=False)
    b = run('toy', store=tmp_path, force=True, progress=False)
    assert (a.id, a.result, b.cached, b.result) == (b.id, {'n': 1}, False, {'n': 2})
    assert names(tmp_path) == [a.path.name] and run('toy', store=tmp_path).result == {'n': 2}


@pytest.mark.parametrize('file, text', [('result.json', '{"n": '), ('result.json', None), ('environment.json', '{}'),
                                        ('params.json', '[]'), ('result.json', '{"n": NaN}')])
def test_broken_run_in_the_store(project, tmp_path, fake, file, text):
    a, other = run('toy', store=tmp_path, progress=False), run('toy', store=tmp_path, progress=False, power=2)
    (a.path/file).unlink() if text is None else (a.path/file).write_text(text)
    with pytest.warns(UserWarning, match=f'{a.path.name}/{file}'): assert runs.results(tmp_path).id.tolist() == [other.id]
    with pytest.warns(UserWarning, match='runs again'): again = run('toy', store=tmp_path, progress=False)
    assert not again.cached and len(runs.results(tmp_path)) == 2


def test_other_things_in_the_store(project, tmp_path, fake):
    run('toy', store=tmp_path, progress=False)
    (tmp_path/'notes').mkdir()
    (tmp_path/'toy-0123456789ab').write_text('a file')
    (tmp_path/'failed').mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(runs.results(tmp_path)) == 1 and runs.failed(tmp_path) == []


# ---- what a notebook saves ----

def test_save_is_exact_and_strict(tmp_path):
    np, torch = pytest.importorskip('numpy'), pytest.importorskip('torch')
    rows = [dict(step=i, loss=x, name='a, "b"\nc') for i, x in enumerate([.1 + .2, 1e-300, math.pi, 5e-324])]
    frame = pd.DataFrame(rows)
    runs.save(tmp_path, dict(x=.1 + .2, nan=np.nan, inf=-math.inf, t=torch.tensor(2), a=np.arange(2), f=frame), records=frame)
    result = json.loads((tmp_path/'result.json').read_text(), parse_constant=pytest.fail)
    assert result == dict(x=.1 + .2, nan=None, inf=None, t=2, a=[0, 1], f=rows)
    (tmp_path/'params.json').write_text('{}')
    (tmp_path/'environment.json').write_text(json.dumps(dict(name='t', id='0', started='', seconds=0)))
    assert runs.load(tmp_path).records().to_dict('records') == rows
    assert runs.Run('t', '0', tmp_path/'none', {}, {}, {}).records().empty


def test_save_all_or_nothing(tmp_path):
    import matplotlib.figure
    fig = matplotlib.figure.Figure()
    fig.subplots().plot([1, 2])
    bad = [dict(result=dict(f=lambda: 0)), dict(result=[1]), dict(result={}, records=[dict(a=[1])]),
           dict(result={}, figures={'../x': fig}), dict(result={}, figures={'ok': fig, 'no': 'text'})]
    for kwargs in bad:
        with pytest.raises((TypeError, ValueError, AttributeError)): runs.save(tmp_path/'out', **kwargs)
    assert not (tmp_path/'out').exists()
    runs.save('', dict(a=1), figures={'ok': fig})
    runs.save(tmp_path/'out', dict(a=1), figures={'ok': fig})
    assert names(tmp_path/'out') == ['ok.png', 'ok.svg', 'result.json']


# ---- bad questions ----

BAD = [(dict(powr=4), r'did you mean `power`\? It takes sparsities \(list'), (dict(zzz=1), 'no parameter `zzz`. It takes'),
       (dict(power='8'), "`power` = '8' is not int"), (dict(power=True), 'is not int'), (dict(power=None), 'is not int'),
       (dict(power=2.0), 'is not int'), (dict(sparsities=.5), r'is not list\[float\]'), (dict(sparsities=['a']), 'is not list'),
       (dict(rate='x'), r'is not float \| None'), (dict(rate=math.nan), 'is not float'), (dict(fast=1), 'is not bool'),
       (dict(data=3), 'is not str'), (dict(out='x'), 'store=')]


@pytest.mark.parametrize('asked, message', BAD)
def test_parameters_are_checked_first(project, tmp_path, fake, asked, message):
    with pytest.raises(UsageError, match=message): run('toy', store=tmp_path/'s', **asked)
    assert fake == [] and not (tmp_path/'s').exists()


def test_unknown_experiment(project):
    with pytest.raises(UsageError, match="did you mean 'broken'\\? There are: broken, slow, toy"): run('brokn')
    with pytest.raises(UsageError, match='not a notebook'): run(__file__)
    assert execute.experiments(project/'nbs')['toy'] == project/'nbs/experiments/toy.ipynb'


def test_notebook_without_parameters(project, tmp_path, fake):
    bare = notebook(tmp_path/'a b.ipynb', code('1'))
    assert run(bare, store=tmp_path/'s{x}', progress=False).name == 'a_b'
    with pytest.raises(UsageError, match='It takes no parameters'): run(bare, x=1)
    v = json.loads(next((tmp_path/'s{x}').glob('a_b-*/executed.ipynb')).read_text())
    assert [c['cell_type'] for c in v['cells']][:1] == ['code'] and "out = '.'" in v['cells'][0]['source']


WRONG = [('run toi', "did you mean 'toy'"), ('run toy -p power=high', "`power` = 'high' is not int"), ('run toy -p power', 'name=value'),
         ('run toy -p powr=1', 'did you mean'), ('run toy -p store=x', 'no parameter `store`'), ('run', 'required'), ('', 'required'),
         ('jump', 'invalid choice'), ('list nope', 'no experiment'), ('run toy --store /dev/null/x', 'Not a directory'),
         ('run toy --stor', 'expected one argument'), ('results --bad', '--bad')]


@pytest.mark.parametrize('line, message', WRONG)
def test_bad_command_is_one_line(project, fake, capsys, line, message):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    err = [text for text in err.splitlines() if not text.startswith('running ')]
    assert out == '' and len(err) == 1 and err[0].startswith('sparse-workbench: ') and message in err[0]


def test_list_and_version(project, capsys):
    assert cli.main(['list']) == 0
    out = capsys.readouterr().out
    assert 'toy: Where does a polynomial break?' in out and 'slow: ' in out and ' out ' not in out
    assert re.search('power +int +8 +how late it breaks', out)
    assert cli.main(['--version']) == 0
    assert re.fullmatch(r'sparse-workbench .+\n', capsys.readouterr().out)


def test_list_names_a_notebook_it_cannot_read(tmp_path, capsys):
    notebook(tmp_path/'nbs/experiments/good.ipynb', code('a = 1', 'parameters'))
    (tmp_path/'nbs/experiments/bad.ipynb').write_text('{')
    with contextlib.chdir(tmp_path): assert cli.main(['list']) == 0
    out, err = capsys.readouterr()
    assert 'good: ' in out and 'bad.ipynb is not a notebook' in err


def test_results_command(project, tmp_path, fake, capsys):
    a = run('toy', store=tmp_path, progress=False)
    broken = run('toy', store=tmp_path, progress=False, power=3)
    (broken.path/'result.json').write_text('{')
    with warnings.catch_warnings():
        warnings.simplefilter('always') # Python says the same warning once a process
        assert cli.main(['results', '--store', str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert a.id in out and broken.id not in out
    assert f'skipped {broken.path.name}/result.json' in err and '1 finished, 0 failed' in err


def test_values_from_text():
    cases = [('1e-3', 'float', 1e-3), ('5', 'float', 5.), ('-2', 'int', -2), ('no', 'bool', False), ('null', 'int | None', None),
             ('None', 'str | None', None), ('[0.5, 1e-2]', 'list[float]', [.5, .01]), ('{a: 1}', 'dict', {'a': 1}),
             *((text, 'str', text) for text in ('no', '[', '', 'null', 'a #b', '007', 'a: b')), ('3', 'int | str', 3),
             ('no', "Literal['no', 'yes']", 'no'), ('2026-01-02', 'Any', '2026-01-02'), ('x', 'int', 'x')]
    assert [cli.read_value(text, kind) for text, kind, _ in cases] == [v for *_, v in cases]


# ---- the experiments of this project ----

EXPERIMENTS = sorted((ROOT/'nbs/experiments').glob('*.ipynb'))


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_can_be_asked(path, tmp_path, fake):
    own = {p.name: p.default for p in execute.parameters(path).values()}
    assert own, 'an experiment has parameters'
    r = run(path, store=tmp_path/'runs', progress=False, **own)        # a name that `run` keeps for itself is a TypeError here
    assert r.params == own and fake == [tmp_path/'runs'/fake[0].name]
    assert run(path, store=tmp_path/'runs').cached, 'its own defaults are the same question'
    pairs = [f'{k}={json.dumps(v)}' for k, v in own.items() if not isinstance(v, str)] + [f'{k}={v}' for k, v in own.items() if isinstance(v, str)]
    assert cli.read_params(str(path), pairs) == own


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_takes_its_folder(path):
    cell = execute.tagged(execute.read_notebook(path), 'parameters')
    assert 'out' in [name for name, *_ in execute.assignments(path, cell['source'])], 'else its answer is empty'


# ---- jobs and sweeps ----

GATE = code("import os, time\nfrom pathlib import Path\nif x < 0: raise ValueError(f'{x} is below zero')\n"
            "Path(f'began-{x}~').write_text(str(os.getpid())); os.rename(f'began-{x}~', f'began-{x}')\n"
            "while x > 1 and not os.path.exists('open'): time.sleep(.05)\nPath(out, 'result.json').write_text('{\"x\": %d}' % x)")


@pytest.fixture
def gated(tmp_path):
    "An experiment that waits, when x > 1, until a file `open` exists; the test runs in its folder."
    notebook(tmp_path/'nbs/experiments/gate.ipynb', code("x: int = 1\ntext: str = ''\nout = ''", 'parameters'), GATE)
    with contextlib.chdir(tmp_path): yield tmp_path


def until(what, seconds=300):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.05)
    return found


def gone(pid):
    from psutil import pid_exists
    return until(lambda: not pid_exists(pid))


def test_stopped_job_leaves_nothing(gated):
    job = execute.Job('gate', dict(x=2))
    until(Path('began-2').exists)
    (w,) = execute.working('runs')
    assert (w['name'], w['pid'], w['id']) == ('gate', job.process.pid, execute.question('gate', dict(x=2)).id)
    assert until(lambda: job.progress == (2, 3)) and job.reply['status'] == 'running'
    job.stop()
    assert job.wait(300) == dict(status='stopped', path='', error='')
    assert names('runs') == [] and execute.working('runs') == []
    gone(int(Path('began-2').read_text()))
    job.stop()                                     # of a stopped one nothing happens


def deaf() -> None:
    "As a shell starts what it runs in the background."
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize('start', [None, deaf])
def test_job_ends_with_whoever_asked(gated, start):
    body = "import time\nfrom sparse_workbench.execute import Job\njob = Job('gate', dict(x=2))\nprint(job.process.pid, flush=True)\ntime.sleep(120)"
    asker = subprocess.Popen([sys.executable, '-c', body], env=ENV, stdout=subprocess.PIPE, text=True, preexec_fn=start)
    pid = int(asker.stdout.readline())
    until(Path('began-2').exists)
    asker.kill()
    asker.wait()
    gone(pid)
    gone(int(Path('began-2').read_text()))
    assert names('runs') == []


def test_job_whose_process_is_killed(gated):
    job = execute.Job('gate', dict(x=2))
    until(Path('began-2').exists)
    job.process.kill()
    end = job.wait(30)
    assert end['status'] == 'failed' and 'ended with status -9' in end['error']
    gone(int(Path('began-2').read_text()))
    assert execute.working('runs') == []           # the folder of a dead process is no run


def test_tail_keeps_the_last_state_of_a_bar(tmp_path):
    (tmp_path/'log').write_bytes(b'one\nbar 10%\rbar 50%\rbar 100%\r\n\n\x1b[31mred\x1b[0m \xff\n')
    assert execute.tail(tmp_path/'log', 2) == 'bar 100%\nred \ufffd' and execute.tail(tmp_path/'none', 3) == ''


def test_sweep_fails_apart_and_continues(gated):
    s = execute.sweep('gate', dict(x=[1, -1, 2, 3]), dict(text='a, b'), workers=2)
    until(Path('began-2').exists)
    assert not s.done
    s.cancel()
    s.wait(300)
    assert [p.status for p in s.points][:2] == ['done', 'failed'] and {p.status for p in s.points[2:]} == {'stopped'}
    assert 'ValueError: -1 is below zero' in s.points[1].error and Path(s.points[1].path).parent.name == 'failed'
    assert [r.result for r in s.runs()] == [dict(x=1)] and all(f.done() for f in s.futures)
    Path('open').touch()
    again = execute.sweep('gate', dict(x=[1, -1, 2, 3]), dict(text='a, b'), workers=3).wait(300)
    assert [p.status for p in again.points] == ['stored', 'failed', 'done', 'done']
    assert again.rows()[2] == dict(x=2, status='done') and len(runs.failed('runs')) == 2


def test_killed_sweep_command_continues(gated):
    words = ['sweep', 'gate', '-g', 'x=1,2', '--workers', '1']
    p = command(*words)
    until(Path('began-2').exists)
    p.kill()
    p.communicate(timeout=30)
    gone(int(Path('began-2').read_text()))
    assert [runs.load(f'runs/{n}').result for n in names('runs') if FINISHED.fullmatch(n)] == [dict(x=1)]
    Path('open').touch()
    p = command(*words)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    assert [line.split() for line in out.splitlines()] == [['x', 'status'], ['1', 'stored'], ['2', 'done']]
    assert '1 from the store' in err and err.splitlines()[-1].startswith('2 of 2 runs')


def test_interrupted_sweep_command(gated):
    p = command('sweep', 'gate', '-g', 'x=2,3', '--workers', '1')
    until(Path('began-2').exists)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 130 and out == '' and 'Traceback' not in err
    gone(int(Path('began-2').read_text()))
    assert execute.working('runs') == []


def test_sweep_on_dask(gated):
    pytest.importorskip('distributed', reason="pip install 'sparse_workbench[sweep]'")
    s = execute.sweep('gate', dict(x=[1, -1, 2, 3]), scheduler='dask', workers=2)
    assert re.match(r'http://127\.0\.0\.1:\d+', s.dashboard)
    until(lambda: Path('began-2').exists() and s.counts.get('running') == 2)
    s.cancel()
    s.wait(300)
    assert [p.status for p in s.points] == ['done', 'failed', 'stopped', 'stopped']
    assert 'ValueError: -1 is below zero' in s.points[1].error and s.runs()[0].result == dict(x=1)
    gone(int(Path('began-2').read_text()))
    until(lambda: not execute.working('runs'))


def test_dask_by_address_and_its_absence(gated):
    distributed = pytest.importorskip('distributed', reason="pip install 'sparse_workbench[sweep]'")
    with pytest.raises(OSError): execute.client_of('tcp://127.0.0.1:1', 1)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, host='tcp://127.0.0.1', dashboard_address=None) as cluster:
        s = execute.sweep('gate', dict(x=[0]), scheduler=cluster.scheduler_address).wait(300)
        assert s.counts == dict(done=1) and runs.results().shape[0] == 1


def test_sweep_without_dask(gated, monkeypatch):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    with pytest.raises(ImportError, match=r"pip install 'sparse_workbench\[sweep\]'"): execute.sweep('gate', dict(x=[1]), scheduler='dask')


BAD_GRIDS = [(dict(x=1), 'a list of values for `x`'), (dict(x='12'), 'a list of values'), (dict(x=[]), 'no value for `x`'),
             (dict(x=[1, 'a']), "`x` = 'a' is not int"), (dict(y=[1]), 'no parameter `y`'), (dict(text=['a']), 'fixed value too')]


@pytest.mark.parametrize('grid, message', BAD_GRIDS)
def test_grid_is_checked_before_anything_runs(gated, grid, message):
    with pytest.raises(UsageError, match=message): execute.sweep('gate', grid, dict(text='a'))
    with pytest.raises(UsageError, match='workers=0'): execute.sweep('gate', dict(x=[1]), workers=0)
    assert not Path('runs').exists()


def test_grid_values_from_text():
    cases = [('1, 2', 'int', [1, 2]), ('[1,2],[3]', 'list[int]', [[1, 2], [3]]), ('"a,b",c', 'str', ['a,b', 'c']), ('{a: 1, b: 2}', 'dict', [dict(a=1, b=2)]),
             ("don't,x", 'str', ["don't", 'x']), ('""', 'str', ['']), ('null,1', 'int | None', [None, 1]), ('["a,b"],[c]', 'list[str]', [['a,b'], ['c']])]
    assert [cli.read_values(text, kind) for text, kind, _ in cases] == [v for *_, v in cases]
    for bad in ('', ',', '1,', '[1', '"a', '1,,2'):
        with pytest.raises(UsageError): cli.read_values(bad, 'int')


@pytest.mark.parametrize('line, message', [('sweep gate', 'required: -g'), ('sweep gate -g x', 'name=value,value'), ('sweep gate -g x=1,b', "'b' is not int"),
                                           ('sweep gate -g x=1 -p x=2', 'fixed value too'), ('sweep gate -g x=1 --workers 0', 'workers=0')])
def test_bad_sweep_command_is_one_line(gated, capsys, line, message):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == '' and len(err.splitlines()) == 1 and message in err and not Path('runs').exists()
