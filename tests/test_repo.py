"The repository keeps its promises: notebooks in step, import order, small cells, documented names, pins, nothing of one machine."
import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))

import sync  # noqa: E402
from nb2md import code_of, definitions, directives  # noqa: E402

NBS = {f: nbformat.read(ROOT / f, 4) for f in sync.notebooks(ROOT)}
CODE = [(f, i, c.source) for f, nb in NBS.items() for i, c in enumerate(nb.cells) if c.cell_type == 'code']
EXPORTED = [(f, i, s) for f, i, s in CODE if {'export', 'exports', 'exporti'} & directives(s).keys()]
LIB = sync.package(ROOT)


def none(found: list[str], rule: str) -> None:
    if found: pytest.fail('\n  '.join([f'{rule}:', *found]), pytrace=False)


def tree(source: str) -> ast.Module:
    "The cell's syntax tree; lines that only IPython reads are left out."
    return ast.parse(re.sub(r'^(\s*)[!%].*$', r'\1pass', code_of(source), flags=re.M))


def imported(module: ast.AST) -> set[str]:
    "Dotted names of what a tree imports absolutely: `from a import b` gives a and a.b."
    names = set()
    for n in ast.walk(module):
        if isinstance(n, ast.Import): names |= {a.name for a in n.names}
        if isinstance(n, ast.ImportFrom) and n.module and not n.level:
            names |= {n.module, *(f'{n.module}.{a.name}' for a in n.names)}
    return names


def tracked() -> list[Path]:
    "Files that git tracks or would add."
    done = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split('\0')
    return [ROOT / n for n in names if n and (ROOT / n).is_file()] or pytest.skip('not a git checkout')


# Notebooks and what follows from them

def test_in_step():
    none(sync.check(ROOT), 'make export would change these files')


def test_readme_comes_from_the_index():
    assert (ROOT / 'nbs/index.ipynb').exists(), 'nbs/index.ipynb, from which README.md is made, is missing'
    assert (ROOT / 'README.md').exists(), 'README.md is missing: make export'


def test_no_kept_widget_state_or_error():
    none([f for f, nb in NBS.items() if 'widgets' in nb.metadata], 'widget state in the metadata: save from make lab, which drops it')
    outputs = [(f, i, o) for f, nb in NBS.items() for i, c in enumerate(nb.cells) for o in c.get('outputs', [])]
    none([f'{f}, cell {i}' for f, i, o in outputs if o.output_type == 'error'], 'a stored output is an error')


def test_every_cell_runs():
    front = [(f, c.source) for f, nb in NBS.items() for c in nb.cells if c.cell_type in ('raw', 'markdown')]
    skipped = [f for f, s in front if re.search(r'^-? *skip_(exec|showdoc):', s, re.M)]
    skipped += [f'{f}, cell {i}' for f, i, s in CODE if directives(s).get('eval') == 'false' and 'cuda' not in directives(s)]
    none(skipped, 'a cell that never runs proves nothing; only the cuda flag may leave one out')


def test_no_latex():
    cells = [(f, i, c.source) for f, nb in NBS.items() for i, c in enumerate(nb.cells) if c.cell_type == 'markdown']
    none([f'{f}, cell {i}' for f, i, s in cells if re.search(r'\$\$|\\(frac|sum|mathbb|mathcal|odot|cdot|left)\b|\\[(\[]', s)],
         'the site shows no LaTeX: write the formula as code')


# Exported code

def test_exported_cells_are_short():
    long = [(f, i, n) for f, i, s in EXPORTED if (n := sum(bool(x.strip()) for x in code_of(s).splitlines())) > 30]
    none([f'{f}, cell {i}: {n} lines' for f, i, n in long], 'an exported cell has at most 30 lines')


def test_public_names_have_docstrings():
    public = [(f, i, n) for f, i, s in EXPORTED if 'exporti' not in directives(s) for n in definitions(s)]
    bare = [f'{f}, cell {i}: {n.name}' for f, i, n in public if not ast.get_docstring(n)]
    none(bare, 'a public function or class says in a docstring what it computes (or is private: _name)')


def test_imports_run_downhill():
    modules = {f'{LIB}.{directives(s)["default_exp"]}': f for f, _, s in CODE if 'default_exp' in directives(s)}
    order = {m: int(Path(f).name[:2]) for m, f in modules.items() if re.match(r'\d\d', Path(f).name)}
    uphill = []
    for f, i, s in CODE:
        if not re.match(r'nbs/api/\d\d', f): continue
        names, here = imported(tree(s)), int(Path(f).name[:2])
        uphill += [f'{f}, cell {i}: {m}' for m in names if order.get(m, -1) >= here and modules[m] != f]
        if re.search(rf'^import {LIB}( as |\s*$)', s, re.M): uphill.append(f'{f}, cell {i}: the whole package')
    none(uphill, 'a notebook imports only modules of smaller numbers')


def test_nothing_imports_experiments():
    sources = {f: [tree(s) for g, _, s in CODE if g == f] for f in NBS if '/experiments/' not in f}
    sources |= {p.relative_to(ROOT).as_posix(): [ast.parse(p.read_text())] for p in (ROOT / LIB).rglob('*.py')}
    none([f for f, trees in sources.items() for t in trees if any(re.match(rf'({LIB}\.)?(nbs\.)?experiments\b', m) for m in imported(t))],
         'nothing imports experiments')


HEAVY = ['pandas', 'matplotlib', 'transformers', 'ipywidgets', 'anywidget', 'papermill', 'nbdev', 'nbformat', 'fastcore', 'IPython',
         'sklearn', 'accelerate', 'lightning']
PROBE = f"""
import json, sys, time, torch
start = time.process_time()
import {LIB}
print(json.dumps([time.process_time() - start, [m for m in {HEAVY} if m in sys.modules]]))
"""


def test_import_is_light():
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    def probe() -> list:
        done = subprocess.run([sys.executable, '-c', PROBE], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)
    seconds, heavy = probe()
    assert heavy == [], f'import {LIB} must load none of these: put the import inside the function that needs it'
    if seconds >= 1: seconds = min(seconds, probe()[0])         # the first import of all also reads the disk
    assert seconds < 1, f'import {LIB} takes {seconds:.2f} s of processor time after torch'


# Files and versions

MACHINE = re.compile(r'(?<![\w.~>-])/(?:work|tmp|home|root|Users|mnt)/\w[^\s"\']*')
HOSTS = re.compile(r'\b(?:[\w-]+\.)*(?:pypi\.org|pythonhosted\.org|npmjs\.org|download\.pytorch\.org|debian\.org)\b')
ADDRESS = re.compile(r'(?<![\d.])(?!127\.|0\.0\.0\.0)(?:\d{1,3}\.){3}\d{1,3}(?![\d.])')


def test_nothing_of_one_machine():
    found = []
    for p in tracked():
        try: text = p.read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        found += [f'{p.relative_to(ROOT)}: {m[0][:80]}' for r in (MACHINE, HOSTS, ADDRESS) for m in r.finditer(text)]
    none(found, 'paths, registries and addresses of a machine')


def test_no_large_file():
    sizes = {p.relative_to(ROOT): p.stat().st_size / 2**20 for p in tracked()}
    limit = {p: 16 if 'embedded' in p.parts else 3 for p in sizes}      # the embedded model is the one large file
    none([f'{p}: {size:.1f} MiB' for p, size in sizes.items() if size > limit[p]], 'large files')


def pins(file: str) -> dict[str, str]:
    found = re.findall(r'^([\w.-]+)==([\w.]+)', (ROOT / file).read_text(), re.M)
    return {name.lower().replace('_', '-'): version for name, version in found}


def requirements() -> dict[str, list[str]]:
    "The lists of settings.ini; what is optional is used where it is installed, and never installed by make."
    found = re.findall(r'^(\w*requirements) = (.*)$', (ROOT / 'settings.ini').read_text(), re.M)
    return {group: [re.split('[=<>]', x)[0] for x in names.split()] for group, names in found}


def test_every_requirement_is_pinned():
    lines = [x.split('#')[0].split(';')[0].strip() for x in (ROOT / 'requirements.txt').read_text().splitlines()]
    none([x for x in lines if x and '==' not in x], 'requirements.txt gives exact versions')
    asked = {name for group, names in requirements().items() if group != 'optional_requirements' for name in names}
    none(sorted(asked - pins('requirements.txt').keys()), 'settings.ini asks for what requirements.txt does not pin')
    differ = [f'{n}: {v} and {w}' for n, v in pins('requirements.txt').items() if (w := pins('constraints.txt').get(n, v)) != v]
    none(differ, 'requirements.txt and constraints.txt disagree')


def test_every_import_is_pinned():
    files = [p for d in (LIB, 'tests', 'tools', 'benchmarks') for p in (ROOT / d).rglob('*.py')]
    trees = [ast.parse(p.read_text()) for p in files] + [tree(s) for _, _, s in CODE]
    own = {LIB, *(p.stem for p in files)} | sys.stdlib_module_names
    names = {m.split('.')[0] for t in trees for m in imported(t)} - own
    owners = importlib.metadata.packages_distributions()
    pinned = pins('requirements.txt').keys() | set(requirements()['optional_requirements'])
    none(sorted(m for m in names if m in owners and not {d.lower().replace('_', '-') for d in owners[m]} & pinned),
         'imported, installed, and not in requirements.txt')
