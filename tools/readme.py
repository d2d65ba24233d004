"""nbs/index.ipynb -> README.md and its figures (docs_static/readme/): a code host shows what the notebook shows.

Called by tools/sync.py (`make export`); nothing is executed.
"""
import re
from pathlib import Path

import nbformat
from nb2md import IMAGES, code_of, directives, plain, raw_image, text

LOCAL = re.compile(r'(\]\(|src=")(?![a-z]+:|#|/)([^)"]+)')
FIGURES = 'docs_static/readme'


def output(o: dict, figure) -> str:
    "One output for a code host: picture, table or text."
    if o['output_type'] == 'stream': return fenced(plain(text(o['text']))) if o['name'] == 'stdout' else ''
    data = o.get('data', {})
    if 'text/markdown' in data: return text(data['text/markdown'])
    for mime, ext in IMAGES.items():
        if mime in data: return figure(raw_image(data[mime], ext), ext)
    if 'text/html' in data:
        page = re.sub(r'<style.*?</style>', '', text(data['text/html']), flags=re.S)
        return re.sub(r'\s*\n\s*', '\n', re.sub(r'</?div[^>]*>| (?:class|border|style)="[^"]*"', '', page)).strip()
    return '' if any('widget-view' in k for k in data) else fenced(plain(text(data.get('text/plain', ''))))


def fenced(out: str, language: str = '') -> str:
    return f'```{language}\n{out}\n```' if out.strip() else ''


def render(root: Path) -> dict[str, bytes]:
    "Path inside the project -> content: README.md and one file a figure. Empty without nbs/index.ipynb."
    notebook = root / 'nbs' / 'index.ipynb'
    if not notebook.exists(): return {}
    files: dict[str, bytes] = {}
    parts = ['<!-- Generated from nbs/index.ipynb by `make export`. -->']

    def figure(data: bytes, ext: str) -> str:
        name = f'{FIGURES}/{len(files) + 1}.{ext}'
        files[name] = data
        return f'![]({name})'
    for c in nbformat.read(notebook, 4).cells:
        if c.cell_type == 'markdown': parts.append(LOCAL.sub(r'\1nbs/\2', c.source).replace('](nbs/../', ']('))
        if c.cell_type != 'code': continue
        d = directives(c.source)
        if {'hide', 'default_exp'} & d.keys(): continue
        if d.get('echo') != 'false': parts.append(fenced(code_of(c.source), 'python'))
        if d.get('output') != 'false': parts += [output(o, figure) for o in c.outputs]
    return {'README.md': ('\n\n'.join(p for p in parts if p.strip()) + '\n').encode(), **files}
