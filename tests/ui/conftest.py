"""JupyterLab and a browser for the tests of this folder.

`lab.open(...)` starts a page on a notebook of nbs/ (a copy), or on cells given as strings, and gives a `Notebook`:

    nb = lab.open('import ipywidgets as W', 's = W.IntSlider(description="size"); s')     # or lab.open('workbench.ipynb')
    nb.run_all()                          # every cell, no error output
    nb.slide('size', 'ArrowRight')        # keys on the slider, by its description
    nb.until('s.value', 1)                # waits for the kernel's state
    nb.page.locator('img.sw-picture')     # Playwright's page, for what is seen
    nb.shot('size')                       # a picture in $UI_SHOTS, or in the test's own folder

All tests of the folder share one server and one browser. Nothing waits for a fixed time: `until`, `shows` and Playwright's own
waits end when a condition holds. A picture of the page is kept when a test fails.
"""
import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOW = 'install it (Debian: apt-get install chromium), or name it: CHROME=/path/to/chromium make test'
FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update '
         '--disable-sync --hide-scrollbars --force-color-profile=srgb').split()
SETTINGS = {'@jupyterlab/apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},
            '@jupyterlab/notebook-extension/tracker': {'windowingMode': 'none'}}
SECONDS = 90    # the longest that anything may take; nothing waits so long unless it is broken

READY = '''() => { const w = window.jupyterapp?.shell?.currentWidget, s = w?.context?.sessionContext, k = s?.session?.kernel;
  return !!(w?.context?.isReady && s?.isReady && k && k.connectionStatus === 'connected' && k.status === 'idle') }'''
ERRORS = '''() => { const found = []; for (const c of window.jupyterapp.shell.currentWidget.content.model.cells) if (c.outputs)
  for (let i = 0; i < c.outputs.length; i++) { const o = c.outputs.get(i).toJSON(); if (o.output_type === 'error') found.push(o.ename + ': ' + o.evalue) }
  return found }'''
DONE = '''() => { const w = window.jupyterapp.shell.currentWidget, code = [...w.content.model.cells].filter(c => c.type === 'code' && c.sharedModel.getSource().trim());
  return w.context.sessionContext.session.kernel.status === 'idle' && (code.every(c => c.executionCount !== null) || (''' + ERRORS + ''')().length > 0) }'''


def chromium() -> str | None:
    return os.environ.get('CHROME') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='session')
def browser() -> Iterator[Any]:
    "A headless Chromium."
    pw = pytest.importorskip('playwright.sync_api', reason='browser tests need Playwright: pip install playwright')
    if not chromium(): pytest.skip(f'browser tests need Chromium: {HOW}')
    with pw.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield b
        b.close()


@pytest.fixture(scope='session')
def slowness() -> Callable[[], float]:
    "How many times slower this machine is just now than two quiet cores, on which a fresh process imports torch in 1.5 s."
    def measured() -> float:
        began = time.monotonic()
        subprocess.run([sys.executable, '-c', 'import torch'], check=True)
        return max(1., (time.monotonic() - began) / 1.5)
    return measured


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def server(command: list[str], env: dict[str, str], cwd: Path, url: str, log: Path) -> subprocess.Popen:
    "Start a server and wait until it answers."
    with open(log, 'w') as out:
        p = subprocess.Popen(command, env=env, cwd=cwd, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if p.poll() is not None: break
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return p
        except urllib.error.HTTPError: return p         # it answers
        except OSError: time.sleep(.1)
    stop(p)
    pytest.fail(f'{command[2]} did not start:\n{log.read_text()[-2000:]}', pytrace=False)


def stop(p: subprocess.Popen) -> None:
    "End a server with everything that it started."
    if p.poll() is not None: return
    os.killpg(p.pid, signal.SIGTERM)
    try: p.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        p.wait(10)


def environment(folder: Path) -> dict[str, str]:
    "Jupyter's folders inside the test's own, so that nothing of the user's is read or written."
    for name, values in SETTINGS.items():
        f = folder / 'settings' / f'{name}.jupyterlab-settings'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(values))
    ipython = folder / 'ipython' / 'profile_default' / 'ipython_kernel_config.py'
    ipython.parent.mkdir(parents=True, exist_ok=True)
    ipython.write_text('c.IPKernelApp.log_level = 40\n')
    own = dict(JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces', IPYTHONDIR='ipython', JUPYTER_CONFIG_DIR='config',
               JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime')
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH', '')]))
    return {**os.environ, 'IN_TEST': '1', 'PYTHONPATH': path, **{k: str(folder / v) for k, v in own.items()}}


class Lab:
    "A running JupyterLab, set up as `make lab` does it, on a copy of the notebooks."
    def __init__(self, folder: Path, browser: Any):
        self.folder, self.browser, self.nbs = folder, browser, folder / 'nbs'
        self.notebooks: list[Notebook] = []
        shutil.copytree(ROOT / 'nbs', self.nbs, ignore=shutil.ignore_patterns('runs', '.*'))
        self.env, port = environment(folder), free_port()
        self.url = f'http://127.0.0.1:{port}'
        command = [sys.executable, '-m', 'jupyterlab', f'--config={ROOT / "tools/jupyter_lab_config.py"}', '--no-browser', '--ip=127.0.0.1', f'--port={port}',
                   '--ServerApp.port_retries=0', '--IdentityProvider.token=secret', f'--ServerApp.root_dir={self.nbs}', '--LabApp.expose_app_in_browser=True']
        self.process = server(command, self.env, folder, f'{self.url}/api/status?token=secret', folder / 'lab.log')

    def open(self, *what: str, width: int = 1400, height: int = 1000, run: bool = False) -> 'Notebook':
        "A page on a notebook: a path inside nbs/ that ends in .ipynb, or the source of its cells."
        name = what[0] if len(what) == 1 and what[0].endswith('.ipynb') else self.made(what)
        nb = Notebook(self, name, self.browser.new_page(viewport={'width': width, 'height': height}))
        self.notebooks.append(nb)
        nb.load()
        if run: nb.run_all()
        return nb

    def made(self, cells: tuple[str, ...]) -> str:
        import nbformat
        from nbformat.v4 import new_code_cell, new_notebook
        name = f'made{len(list(self.nbs.glob("made*.ipynb")))}.ipynb'
        kernel = dict(display_name='python3', language='python', name='python3')
        nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells], metadata=dict(kernelspec=kernel)), self.nbs / name)
        return name


class Notebook:
    "One page of JupyterLab with one notebook and its kernel."
    def __init__(self, lab: Lab, name: str, page: Any):
        self.lab, self.name, self.page, self.errors = lab, name, page, []
        self.client: Any = None
        page.set_default_timeout(SECONDS * 1000)
        page.on('pageerror', lambda e: self.errors.append(str(e)))

    def load(self, reset: bool = True) -> None:
        "Go to the page, again if need be, and wait for its kernel."
        self.page.goto(f"{self.lab.url}/lab/workspaces/{Path(self.name).stem}/tree/{self.name}?token=secret{'&reset' * reset}")
        self.page.wait_for_selector('.jp-Notebook .jp-Cell')
        self.page.wait_for_function(READY)

    def command(self, name: str, **args: Any) -> None:
        "A command of JupyterLab; what it leads to is for the caller to wait for."
        self.page.evaluate('([name, args]) => { window.jupyterapp.commands.execute(name, args) }', [name, args])

    def run_all(self) -> 'Notebook':
        "Run every cell; an error output fails the test."
        self.command('notebook:run-all-cells')
        self.page.wait_for_function(DONE)
        if found := self.page.evaluate(ERRORS): pytest.fail(f'{self.name}: {found}', pytrace=False)
        return self

    def restart(self) -> None:
        "A fresh kernel, by way of JupyterLab."
        self.disconnect()
        self.page.evaluate("() => { window.restarted = false; window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.restart().then(() => { window.restarted = true }) }")
        self.page.wait_for_function('() => window.restarted')
        self.page.wait_for_function(READY)

    def kernel(self, expression: str, seconds: float = SECONDS) -> Any:
        "The value of an expression in the page's kernel: numbers, strings and lists and dicts of them."
        client = self.connected()
        sent = client.execute('', silent=True, store_history=False, user_expressions={'value': f"__import__('json').dumps({expression})"})
        end = time.monotonic() + seconds
        while (reply := client.get_shell_msg(timeout=max(.01, end - time.monotonic())))['parent_header'].get('msg_id') != sent: pass
        said = reply['content']['user_expressions']['value']
        if said['status'] != 'ok': pytest.fail(f"{expression}: {said.get('ename')}: {said.get('evalue')}", pytrace=False)
        return json.loads(ast.literal_eval(said['data']['text/plain']))

    def do(self, statements: str) -> None:
        "Run statements in the page's kernel, outside of any cell."
        self.kernel(f'exec({statements!r}, globals())')

    def connected(self) -> Any:
        if self.client is None:
            from jupyter_client.blocking import BlockingKernelClient
            key = self.page.evaluate('() => window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.id')
            self.client = BlockingKernelClient(connection_file=str(self.lab.folder / 'runtime' / f'kernel-{key}.json'))
            self.client.load_connection_file()
            self.client.start_channels(iopub=False, stdin=False, hb=False)
        return self.client

    def disconnect(self) -> None:
        if self.client is not None: self.client.stop_channels()
        self.client = None

    def until(self, expression: str, value: Any = True, seconds: float = SECONDS) -> Any:
        "Wait until an expression in the kernel has a value, or fulfils a function of it."
        end = time.monotonic() + seconds
        while True:
            now = self.kernel(expression)
            if value(now) if callable(value) else now == value: return now
            if time.monotonic() > end: pytest.fail(f'{expression} stays {now!r}, not {value!r}', pytrace=False)
            self.frame()

    def frame(self) -> None:
        "Let the page go on for a frame."
        self.page.evaluate('() => new Promise(done => requestAnimationFrame(() => done()))')

    def counts(self, what: Any, n: int, text: str | None = None) -> None:
        "Wait until the page holds so many elements: a selector (and a text in them), or a locator."
        from playwright.sync_api import expect
        expect(self.page.locator(what, has_text=text) if isinstance(what, str) else what).to_have_count(n, timeout=SECONDS * 1000)

    def shows(self, text: str, seconds: float = SECONDS) -> None:
        "Wait until a text is seen on the page."
        self.page.get_by_text(text).first.wait_for(timeout=seconds * 1000)

    def labelled(self, description: str) -> Any: # Playwright locator
        "A control of ipywidgets by its description."
        return self.page.locator('.jupyter-widgets').filter(has=self.page.locator('.widget-label', has_text=re.compile(f'^{re.escape(description)}$'))).last

    def slide(self, description: str, *keys: str) -> None:
        "Press keys on a slider: ArrowRight, PageUp, Home, …"
        handle = self.labelled(description).locator('.noUi-handle').first
        handle.scroll_into_view_if_needed()
        handle.focus()
        for k in keys: self.page.keyboard.press(k)

    def choose(self, description: str, option: str) -> None:
        "Choose from a dropdown."
        self.labelled(description).locator('select').select_option(option)

    def click(self, text: str) -> None:
        "Press a button of ipywidgets."
        self.page.locator('button.jupyter-button', has_text=text).first.click()

    def pixels(self, selector: str = 'img.sw-picture') -> str:
        "What a picture or canvas holds, as text to compare."
        return self.page.locator(selector).first.evaluate(
            "e => e.tagName === 'CANVAS' ? e.toDataURL() : fetch(e.src).then(r => r.blob()).then(b => new Promise(done => { const f = new FileReader(); f.onload = () => done(f.result); f.readAsDataURL(b) }))")

    def changes(self, act: Callable[[], Any], selector: str = 'img.sw-picture') -> None:
        "Do something, and wait until a picture is another one."
        before, end = self.pixels(selector), time.monotonic() + SECONDS
        act()
        while self.pixels(selector) == before:
            if time.monotonic() > end: pytest.fail(f'{selector} stays as it was', pytrace=False)
            self.frame()

    def theme(self, dark: bool) -> None:
        "Switch JupyterLab's theme, and wait until it is there."
        self.command('apputils:change-theme', theme='JupyterLab Dark' if dark else 'JupyterLab Light')
        self.page.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{str(not dark).lower()}'")

    def shot(self, name: str, selector: str | None = None) -> Path:
        "A picture of the page, or of the first element that a selector finds."
        folder = Path(os.environ.get('UI_SHOTS', self.lab.folder / 'shots'))
        folder.mkdir(parents=True, exist_ok=True)
        what = self.page.locator(selector).first if selector else self.page
        what.screenshot(path=folder / f'{name}.png')
        return folder / f'{name}.png'

    def close(self) -> None:
        "Leave the page and end its kernel."
        if self not in self.lab.notebooks: return
        self.lab.notebooks.remove(self)
        self.disconnect()
        try:
            key = self.page.evaluate('() => window.jupyterapp?.shell?.currentWidget?.context?.sessionContext?.session?.kernel?.id')
            request = urllib.request.Request(f'{self.lab.url}/api/kernels/{key}', method='DELETE', headers={'Authorization': 'token secret'})
            if key: urllib.request.urlopen(request, timeout=20).close()
        finally: self.page.close()


@pytest.fixture(scope='session')
def lab(tmp_path_factory, browser) -> Iterator[Lab]:
    "JupyterLab, for all tests of this folder."
    running = Lab(tmp_path_factory.mktemp('lab'), browser)
    yield running
    for nb in list(running.notebooks): nb.close()
    stop(running.process)


@pytest.fixture(scope='session')
def app(lab, tmp_path_factory) -> Iterator[str]:
    "Address of the workbench as `make app` serves it, by Voilà."
    folder, port = tmp_path_factory.mktemp('app'), free_port()
    shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=shutil.ignore_patterns('runs', '.*'))
    url = f'http://127.0.0.1:{port}/'
    command = [sys.executable, '-m', 'voila', 'nbs/workbench.ipynb', '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1', '--strip_sources=True', '--show_tracebacks=True']
    p = server(command, lab.env, folder, url + 'voila/static/voila.js', folder / 'app.log')
    yield url
    stop(p)


@pytest.fixture(autouse=True)
def tidy(request, tmp_path) -> Iterator[None]:
    "After a failure, a picture of every open page; in any case no error that a page threw."
    yield
    running = request.node.funcargs.get('lab')
    if running is None: return
    if getattr(request.node, 'failed', False):
        for i, nb in enumerate(running.notebooks): nb.shot(f'failed-{request.node.name}-{i}')
    thrown = [e for nb in running.notebooks for e in nb.errors]
    for nb in running.notebooks: nb.errors.clear()
    assert not thrown, f'the page threw {thrown}'


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.when == 'call' and report.failed: item.failed = True
