"An executed notebook shows figures wherever there is no kernel: in the file, as HTML, on the documentation site."
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))
VIEW = 'application/vnd.jupyter.widget-view+json'
CELLS = '''import torch
from sparse_workbench.widgets.masks import mask_explorer
from sparse_workbench.testing import mlp
explorer = mask_explorer(mlp())''', 'explorer'


@pytest.fixture(scope='module')
def executed(tmp_path_factory) -> Path:
    "A notebook with a dashboard, executed as nbconvert and papermill do it, with the widgets' state in its metadata."
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook
    kernel = dict(display_name='python3', language='python', name='python3')
    nb = new_notebook(cells=[new_code_cell(c) for c in CELLS], metadata=dict(kernelspec=kernel))
    NotebookClient(nb, timeout=300).execute()
    path = tmp_path_factory.mktemp('static') / 'nbs' / 'index.ipynb'
    path.parent.mkdir()
    nbformat.write(nb, path)
    return path


def test_stored_notebooks_hold_figures_and_no_references():
    for path in (ROOT / 'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in path.parts: continue
        for c in nbformat.read(path, 4).cells:
            for o in c.get('outputs', []):
                assert VIEW not in o.get('data', {}), f'{path.relative_to(ROOT)}: a reference to a widget; make export drops it where there is a figure'
                assert 'Loading widget' not in str(o), path


def test_the_workbench_shows_four_dashboards_without_a_kernel():
    outputs = [o['data'] for c in nbformat.read(ROOT / 'nbs/workbench.ipynb', 4).cells if c.cell_type == 'code' for o in c.outputs if 'data' in o]
    html = [d['text/html'] for d in outputs if 'text/html' in d]
    assert len(html) >= 4 and sum('data:image/png;base64' in h for h in html) >= 3       # the board is a table, with pictures once there are runs


def seen(page) -> dict:
    "What the page shows: pictures that are drawn, and words that should not be there."
    page.wait_for_load_state('load')
    return page.evaluate('''() => ({ pictures: [...document.images].filter(i => i.complete && i.naturalWidth > 400).length, text: document.body.innerText })''')


def test_html_export(executed, browser, tmp_path):
    from nbconvert import HTMLExporter
    from traitlets.config import Config
    nb = nbformat.read(executed, 4)
    assert any(VIEW in o.get('data', {}) for c in nb.cells for o in c.get('outputs', []))     # as it left the kernel
    nb.metadata.pop('widgets', None)
    body, _ = HTMLExporter(config=Config()).from_notebook_node(nb)
    (tmp_path / 'page.html').write_text(body)
    page = browser.new_page()
    try:
        page.goto((tmp_path / 'page.html').as_uri(), wait_until='commit')
        found = seen(page)
        assert found['pictures'] >= 1 and 'Loading widget' not in found['text'] and 'Error displaying widget' not in found['text']
    finally: page.close()


def test_documentation_site(executed, browser):
    import shutil
    import subprocess

    import nb2md
    root = executed.parents[1]
    for f in ('settings.ini', 'mkdocs.yml'): shutil.copy(ROOT / f, root / f)
    (root / 'docs_static').mkdir()
    for f in ('extra.css', 'iframe-worker.js'): shutil.copy(ROOT / 'docs_static' / f, root / 'docs_static' / f)
    nb2md.build(root)
    subprocess.run([sys.executable, '-m', 'zensical', 'build', '-f', '_site.yml'], cwd=root, check=True, capture_output=True)
    page = browser.new_page()
    try:
        page.goto((root / '_docs' / 'index.html').as_uri())
        found = seen(page)
        assert found['pictures'] >= 1 and 'Loading widget' not in found['text']
    finally: page.close()
