"""Notebooks -> Markdown pages and navigation for the documentation site.

    python tools/nb2md.py    nbs/**/*.ipynb -> _docs_src/**/*.md and _site.yml, for `zensical build -f _site.yml`

Nothing is executed: code, prose and outputs are those stored in the notebooks, signatures come from the source.
"""
import ast
import base64
import configparser
import html
import io
import json
import os
import re
import shutil
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

Function = ast.FunctionDef | ast.AsyncFunctionDef
GROUPS = ('Core', 'Scores and patterns', 'Rules and training', 'Kernels', 'Formats and recipes', 'Data and models',
          'Evaluation', 'Runs', 'Widgets')
DIRECTIVE = re.compile(r'^#\|\s*(\w+)(?:[: ]\s*(.*?))?\s*$', re.M)
NOT_CODE = re.compile(r'^#\||^\s*%%?[a-z]|#\|\s*hide_line\s*$')
ANSI = re.compile(r'\x1b\[[0-9;?]*[@-~]')
FENCE = re.compile(r'^\s*(```|~~~)')
CODE_SPAN = re.compile(r'(?<![`\[\\])`([^`\n]+)`(?!`)(?!\]\()')
ITEM = re.compile(r'( *)([-*+]|\d+[.)]) ')
PROJECT = re.compile(r'\]\((?:\.\./)+(CONTRIBUTING|CHANGELOG)\.md\)')
NOTEBOOK = re.compile(r'\]\(([\w./-]+\.ipynb)(#[\w.-]+)?\)')
IMAGES = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg', 'image/gif': 'gif'}
REMOTE = re.compile(r'''<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)\s*=\s*["']?(?:https?:)?//'''
                    r'''|@import|url\(\s*["']?https?:''', re.I)


@dataclass
class Page:
    "One notebook as a page."
    path: Path                      # inside nbs
    out: Path                       # inside _docs_src
    cells: list
    title: str = ''
    subtitle: str = ''
    module: str = ''                # dotted name inside the package; '' when the notebook exports nothing
    names: dict[str, str] = field(default_factory=dict)  # public name -> first line of its docstring
    strings: set[str] = field(default_factory=set)       # words that its code uses as string values

    @property
    def order(self) -> int: return int(m[1]) if (m := re.match(r'(\d+)', self.path.name)) else -1


def text(x: str | list[str]) -> str:
    return ''.join(x) if isinstance(x, list) else x or ''


def directives(source: str) -> dict[str, str]:
    "The `#| name value` lines of a cell."
    return {m[1]: m[2] or '' for m in DIRECTIVE.finditer(source)}


def code_of(source: str) -> str:
    "The code of a cell without directives, magics and hidden lines."
    return '\n'.join(x for x in source.splitlines() if not NOT_CODE.search(x)).strip('\n')


def parsed(source: str) -> list[ast.stmt]:
    try: return ast.parse(code_of(source)).body
    except SyntaxError: return []


def load(path: Path, nbs: Path) -> Page:
    "Read a notebook; its first `# title` and `> subtitle` become the page's, and leave the cells."
    rel, cells = path.relative_to(nbs), nbformat.read(path, 4).cells
    page = Page(rel, rel.with_name(re.sub(r'^\d+\w?_', '', rel.stem) + '.md'), cells, title=rel.stem)
    for c in cells:
        if c.cell_type == 'markdown' and (m := re.match(r'# +(.+)\n*(?:> *(.+)\n*)?', c.source)):
            page.title, page.subtitle, c.source = m[1].strip(), (m[2] or '').strip(), c.source[m.end():]
            break
    for c in cells:
        d = directives(c.source) if c.cell_type == 'code' else {}
        page.module = page.module or d.get('default_exp', '')
        if c.cell_type == 'code': page.strings |= set(re.findall(r"""['"]([a-z]\w*)['"]""", c.source))
        if {'export', 'exports'} & d.keys(): page.names |= {n.name: summary(n) for n in definitions(c.source)}
    return page


def definitions(source: str) -> list[Function | ast.ClassDef]:
    "Public functions and classes defined at the top of a cell."
    return [n for n in parsed(source) if isinstance(n, Function | ast.ClassDef) and not n.name.startswith('_')]


def summary(node: Function | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or '').partition('\n')[0]


# Signatures and parameters, from the source alone

@dataclass
class Param:
    name: str
    type: str = ''
    default: str = ''
    what: str = ''

    def __str__(self) -> str:
        eq = (' = ' if self.type else '=') + self.default if self.default else ''
        return self.name + (f': {self.type}' if self.type else '') + eq


def annotation(node: ast.expr | None) -> str:
    "Source of an annotation; a forward reference loses its quotes."
    if isinstance(node, ast.Constant) and isinstance(node.value, str): return node.value
    return ast.unparse(node) if node else ''


def comments(code: str) -> dict[int, str]:
    "Line number -> comment that ends the line."
    toks = tokenize.generate_tokens(io.StringIO(code).readline)
    ends = (t for t in toks if t.type == tokenize.COMMENT and t.line[:t.start[1]].strip())
    return {t.start[0]: t.string.lstrip('# ').strip() for t in ends}


def parameters(fn: Function, notes: dict[int, str]) -> tuple[list[Param], Param]:
    "Parameters and return value of a function; a comment belongs to the last of them on its line."
    a, body = fn.args, fn.body[0].lineno
    plain = [(x.arg, x) for x in a.posonlyargs + a.args]
    rows = list(zip(plain, [None] * (len(plain) - len(a.defaults)) + list(a.defaults), strict=True))
    if a.vararg: rows.append((('*' + a.vararg.arg, a.vararg), None))
    elif a.kwonlyargs: rows.append((('*', None), None))
    rows += [((x.arg, x), d) for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    if a.kwarg: rows.append((('**' + a.kwarg.arg, a.kwarg), None))
    head = fn.returns.end_lineno if fn.returns else max([(d or x).end_lineno for (_, x), d in rows if x] + [fn.lineno])
    params = []
    for i, ((name, x), d) in enumerate(rows):
        if i == 0 and name in ('self', 'cls'): continue
        line = (d or x).end_lineno if x else 0
        later = [(e or y).lineno for (_, y), e in rows[i + 1:] if y]
        what = notes.get(line, '') if line != head and line not in later else ''
        params.append(Param(name, annotation(x.annotation) if x else '', ast.unparse(d) if d else '', what))
    what = notes.get(head, '') if head < body else ''
    if not fn.returns and params and not params[-1].what: params[-1].what, what = what, ''
    return params, Param('returns', annotation(fn.returns), '', what)


def fields(cls: ast.ClassDef, notes: dict[int, str]) -> list[Param]:
    "Annotated fields of a dataclass or named tuple."
    rows = [(n.target.id, n) for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return [Param(name, annotation(n.annotation), ast.unparse(n.value) if n.value else '', notes.get(n.end_lineno, ''))
            for name, n in rows if not name.startswith('_')]


def signature(name: str, params: list[Param], returns: str, width: int = 96) -> str:
    end = f' -> {returns}' if returns else ''
    one = f"{name}({', '.join(map(str, params))}){end}"
    return one if len(one) <= width else f"{name}(\n" + ''.join(f'    {p},\n' for p in params) + f'){end}'


# Pages

@dataclass
class Site:
    "All pages, and what a name or a notebook path leads to."
    pages: list[Page]

    def __post_init__(self):
        self.of_path = {p.path.as_posix(): p for p in self.pages}
        self.of_name: dict[str, list[Page]] = {}
        for p in self.pages:
            for n in p.names: self.of_name.setdefault(n, []).append(p)

    def target(self, name: str, here: Page, ext: str) -> str:
        "Link from a page to a public name; '' when several pages define it, or none, or the page uses it as a string."
        name = re.sub(r'^(sw|sparse_workbench)\.', '', name).partition('(')[0].partition('.')[0]
        pages = [] if name in here.strings - here.names.keys() else self.of_name.get(name, [])
        page = here if here in pages else pages[0] if len(pages) == 1 else None
        return f'{relative(page.out, here.out, ext)}#{name}' if page else ''

    def linked(self, span: str, here: Page) -> str:
        "HTML of a type or a short text, with every public name linked and `code` marked."
        def word(m: re.Match) -> str:
            url = self.target(m[0], here, '.html')
            return f'<a href="{url}">{m[0]}</a>' if url else m[0]
        return re.sub(r'(?<![\w.])[A-Za-z_]\w*\b', word, html.escape(span, quote=False)) if span else ''

    def inline(self, note: str, here: Page) -> str:
        "HTML of one line of docstring or comment."
        parts = re.split(r'`([^`]+)`', note)
        parts[::2] = [html.escape(x, quote=False) for x in parts[::2]]
        parts[1::2] = [f'<code>{self.linked(x, here)}</code>' for x in parts[1::2]]
        return ''.join(parts)


def relative(to: Path, here: Path, ext: str) -> str:
    return os.path.relpath(to.with_suffix(ext), here.parent).replace(os.sep, '/')


def prose(source: str, page: Page, site: Site) -> str:
    "Markdown of a page: reads as in Jupyter, public names and other notebooks are links."
    out, fenced = [], False
    for line in relisted(source.splitlines()):
        if FENCE.match(line): fenced = not fenced
        elif not fenced:
            if not line.startswith('#'): line = CODE_SPAN.sub(lambda m: name_link(m, page, site), line)
            line = NOTEBOOK.sub(lambda m: notebook_link(m, page, site), line)
            line = PROJECT.sub(lambda m: f"]({'../' * (len(page.out.parts) - 1)}project/{m[1].lower()}.md)", line)
        out.append(line)
    return '\n'.join(out)


def relisted(lines: list[str]) -> Iterator[str]:
    "The site's Markdown wants a blank line before a list or table, and lists nested by four spaces; Jupyter's does not."
    before, fenced, indents, numbered = '', False, [], False    # `indents` of the open list items, outermost first
    for line in lines:
        item, indent, bare = ITEM.match(line), len(line) - len(line.lstrip()), line.lstrip()
        fenced ^= bool(FENCE.match(line))
        if item and not fenced:
            if before and not indent and (not indents or numbered != item[2][0].isdigit()): yield ''
            if not indent: numbered = item[2][0].isdigit()
            indents = [n for n in indents if n < indent] + [indent]
            line = '    ' * (len(indents) - 1) + bare
        elif indents and indent and bare: line = '    ' * len(indents) + bare if not fenced else line
        elif bare:
            if not before: indents = []
            if bare[0] == '|' and before and before[0] != '|' and not fenced: yield ''
        yield line
        before = line.strip()


def name_link(m: re.Match, page: Page, site: Site) -> str:
    return f'[{m[0]}]({url})' if (url := site.target(m[1], page, '.md')) else m[0]


def notebook_link(m: re.Match, page: Page, site: Site) -> str:
    to = site.of_path.get(os.path.normpath(page.path.parent / m[1]).replace(os.sep, '/'))
    if not to: return m[0]
    anchor = m[2] or ''
    return f"]({relative(to.out, page.out, '.md')}{anchor if anchor[1:] in to.names else anchor.lower()})"


def shown(output: dict, save: Callable[[bytes, str], str], where: str) -> str:
    "One output as Markdown: picture, HTML, Markdown or text; '' for what needs a kernel."
    if output['output_type'] == 'stream': return block(text(output['text'])) if output['name'] == 'stdout' else ''
    if output['output_type'] == 'error': return block('\n'.join(output['traceback']))
    data = output['data']
    if 'text/markdown' in data: return text(data['text/markdown'])
    for mime, ext in IMAGES.items():
        if mime in data: return f'![output]({save(raw_image(data[mime], ext), ext)}){{ .figure }}'
    if 'text/html' in data:
        page = re.sub(r'<style scoped>.*?</style>', '', text(data['text/html']), flags=re.S)
        if m := REMOTE.search(page):
            raise SystemExit(f'{where}: an output loads something from another host ({m[0][:80]}). Embed it instead.')
        page = re.sub(r'\s*\n\s*\n', '\n', page).replace(' border="1"', '')
        return f'<div class="out" markdown="0">\n{page.strip()}\n</div>'
    return '' if any('widget-view' in k for k in data) else block(text(data.get('text/plain', '')))


def raw_image(data: str | list[str], ext: str) -> bytes:
    return text(data).encode() if ext == 'svg' else base64.b64decode(text(data))


def plain(out: str) -> str:
    "Text without colours; a progress bar keeps its last state."
    return '\n'.join(x.rstrip('\r').rpartition('\r')[2].rstrip() for x in ANSI.sub('', out).split('\n')).strip('\n')


def block(out: str) -> str:
    out = plain(out)
    fence = '`' * max(3, 1 + max(map(len, re.findall(r'`+', out)), default=0))
    return f'{fence} {{ .text .out }}\n{out}\n{fence}' if out.strip() else ''


def listing(code: str, classes: str = '') -> str:
    return f'``` {{ .python{" ." + classes if classes else ""} }}\n{code}\n```'


def table(head: list[str], rows: list[list[str]], kind: str) -> str:
    "HTML table; columns that are empty in every row are left out."
    keep = [i for i in range(len(head)) if any(r[i] for r in rows)]
    ths = ''.join(f'<th>{head[i]}</th>' for i in keep)
    trs = ''.join(f"<tr>{''.join(f'<td>{r[i]}</td>' for i in keep)}</tr>" for r in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{ths}</tr></thead><tbody>{trs}</tbody></table></div>'


def code_tag(s: str) -> str:
    return f'<code>{s}</code>' if s else ''


def param_table(params: list[Param], returns: Param | None, page: Page, site: Site) -> str:
    rows = [p for p in params if p.name != '*'] + ([returns] if returns and returns.what else [])
    if not any(p.what for p in rows): return ''
    cells = [[f'<em>{p.name}</em>' if p is returns else code_tag(p.name), code_tag(site.linked(p.type, page)),
              code_tag(html.escape(p.default, quote=False)), site.inline(p.what, page)] for p in rows]
    return table(['Parameter', 'Type', 'Default', 'Meaning'], cells, 'params')


def documented(node: Function | ast.ClassDef, notes: dict[int, str], page: Page, site: Site) -> Iterator[str]:
    "Heading, signature, docstring and tables of one public name."
    yield f'### `{node.name}` {{ #{node.name} .api }}'
    doc = ast.get_docstring(node) or ''
    methods = []
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__']
        params, returns = (parameters(inits[0], notes)[0] if inits else fields(node, notes)), None
        methods = [n for n in node.body if isinstance(n, Function) and not n.name.startswith('_')]
    else: params, returns = parameters(node, notes)
    yield listing(signature(node.name, params, returns.type if returns else ''), 'signature')
    if doc: yield prose(doc, page, site)
    yield param_table(params, returns, page, site)
    rows = [method_row(m, notes, page, site) for m in methods]
    if rows: yield table(['Method', 'Meaning'], rows, 'params methods')


def method_row(fn: Function, notes: dict[int, str], page: Page, site: Site) -> list[str]:
    params, returns = parameters(fn, notes)
    decorators = {getattr(d, 'id', getattr(d, 'attr', '')) for d in fn.decorator_list}
    head = fn.name if decorators & {'property', 'cached_property'} else signature(fn.name, params, '', 10**6)
    head += f' → {returns.type}' if returns.type else ''
    return [code_tag(site.linked(head, page)), site.inline(summary(fn) or returns.what, page)]


def exported(source: str, page: Page, site: Site) -> Iterator[str]:
    "An exported cell: each public definition documented, then its source. A cell of imports folds away."
    code, nodes, names = code_of(source), parsed(source), [n.name for n in definitions(source)]
    if nodes and all(isinstance(n, ast.Import | ast.ImportFrom) for n in nodes):
        yield f'<details class="imports" markdown="1"><summary>imports</summary>\n\n{listing(code)}\n\n</details>'
        return
    notes, lines, start, done = comments(code) if nodes else {}, code.splitlines(), 0, 0
    for before, node in zip([None, *nodes], nodes, strict=False):
        if getattr(node, 'name', None) not in names: continue
        if done and before:
            yield listing('\n'.join(lines[start:before.end_lineno]).strip('\n'), 'source')
            start = before.end_lineno or 0
        done += 1
        yield from documented(node, notes, page, site)
    yield listing('\n'.join(lines[start:]).strip('\n'), 'source')


def cell_parts(cell: dict, page: Page, site: Site, save: Callable[[bytes, str], str]) -> Iterator[str]:
    "Markdown pieces of one cell."
    if cell.cell_type == 'markdown':
        if not re.match(r'#+ .* -\s*$', cell.source): yield prose(cell.source, page, site)
        return
    if cell.cell_type != 'code': return
    d, code = directives(cell.source), code_of(cell.source)
    if {'hide', 'default_exp'} & d.keys() or 'nbdev_export()' in code: return
    if {'export', 'exports', 'exporti'} & d.keys(): yield from exported(cell.source, page, site)
    elif code and d.get('echo') != 'false':
        label = 'cuda' if 'cuda' in d else 'parameters' if 'parameters' in cell.metadata.get('tags', []) else ''
        yield listing(code, label)
    if d.get('output') != 'false':
        for o in cell.outputs: yield shown(o, save, page.path.as_posix())


def write_page(page: Page, site: Site, out: Path, package: str) -> None:
    dst, n = out / page.out, 0

    def save(data: bytes, ext: str) -> str:
        nonlocal n
        n += 1
        file = dst.parent / f'{dst.stem}_files' / f'{n}.{ext}'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return f'{dst.stem}_files/{n}.{ext}'
    dst.parent.mkdir(parents=True, exist_ok=True)
    parts = [f'---\ntitle: {json.dumps(page.title, ensure_ascii=False)}\n---', f'# {page.title}']
    if page.subtitle: parts.append(f'<p class="subtitle" markdown="1">{prose(page.subtitle, page, site)}</p>')
    if page.module: parts.append(f'<p class="module"><code>{package}.{page.module}</code> from <code>nbs/{page.path}</code></p>')
    for c in page.cells: parts += [x for x in cell_parts(c, page, site, save) if x.strip()]
    dst.write_text('\n\n'.join(parts) + '\n', encoding='utf-8')


def reference(api: list[Page], site: Site, out: Path) -> None:
    "One page that lists every module and every public name with the first line of its docstring."
    here = Page(Path('api/index.ipynb'), Path('api/index.md'), [])
    parts = ['# All names', '<p class="subtitle">In import order: a module uses only modules above it.</p>']
    for group, pages in grouped(api):
        parts.append(f'## {group}')
        for p in pages:
            parts.append(f"### [{p.title}]({relative(p.out, here.out, '.md')})\n\n" + prose(p.subtitle, here, site))
            url = relative(p.out, here.out, '.html')
            rows = [[f'<a href="{url}#{n}"><code>{n}</code></a>', site.inline(what, here)] for n, what in p.names.items()]
            if rows: parts.append(table(['Name', 'Meaning'], rows, 'params names'))
    (out / here.out).parent.mkdir(parents=True, exist_ok=True)
    (out / here.out).write_text('\n\n'.join(parts) + '\n', encoding='utf-8')


def grouped(api: list[Page]) -> list[tuple[str, list[Page]]]:
    "API pages under the group of their number: 00-09 Core, 10-19 Scores and patterns, and so on."
    groups: dict[int, list[Page]] = {}
    for p in sorted(api, key=lambda p: (p.order, p.path)):
        groups.setdefault(min(p.order // 10, len(GROUPS) - 1), []).append(p)
    return [(GROUPS[k], v) for k, v in sorted(groups.items())]


def navigation(site: Site, extra: list[tuple[str, str]]) -> list:
    "Home, the notebooks beside it, tutorials, experiments, reference by groups, and the pages about the project."
    def entries(pages: list[Page]) -> list: return [{p.title: p.out.as_posix()} for p in pages]
    folders: dict[str, list[Page]] = {}
    for p in site.pages: folders.setdefault(p.path.parent.as_posix(), []).append(p)
    home = [p for p in folders['.'] if p.path.stem == 'index']
    nav: list = [{'Home': home[0].out.as_posix()}, *entries([p for p in folders['.'] if p not in home])]
    nav += [{name.title(): entries(folders[name])} for name in ('tutorials', 'experiments') if name in folders]
    groups = [{g: entries(pages)} for g, pages in grouped(folders.get('api', []))]
    if groups: nav.append({'Reference': [{'All names': 'api/index.md'}, *groups]})
    return nav + [{'Project': [{t: f} for t, f in extra]}] * bool(extra)


def build(root: Path) -> Path:
    "Write _docs_src/ and _site.yml; returns the folder."
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(root / 'settings.ini')
    nbs, out = root / 'nbs', root / '_docs_src'
    paths = sorted(p for p in nbs.rglob('*.ipynb') if not any(x[0] in '._' for x in p.relative_to(nbs).parts))
    if not (nbs / 'index.ipynb').exists(): raise SystemExit('nbs/index.ipynb, the home page, is missing')
    site = Site([load(p, nbs) for p in paths])
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(root / 'docs_static', out)
    for p in nbs.rglob('*'):
        if p.suffix in ('.png', '.svg', '.jpg', '.gif') and '.ipynb_checkpoints' not in p.parts:
            (out / p.relative_to(nbs)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, out / p.relative_to(nbs))
    for p in site.pages: write_page(p, site, out, cfg['DEFAULT']['lib_name'])
    if api := [p for p in site.pages if p.path.parts[0] == 'api']: reference(api, site, out)
    extra = []
    for title, name in (('Contributing', 'CONTRIBUTING.md'), ('Changes', 'CHANGELOG.md')):
        if not (root / name).exists(): continue
        (out / 'project').mkdir(exist_ok=True)
        shutil.copy(root / name, out / 'project' / name.lower())
        extra.append((title, f'project/{name.lower()}'))
    config = json.dumps({'INHERIT': 'mkdocs.yml', 'nav': navigation(site, extra)}, indent=1, ensure_ascii=False)
    (root / '_site.yml').write_text(config, encoding='utf-8')
    return out


if __name__ == '__main__':
    root = Path(__file__).resolve().parents[1]
    out = build(root)
    print(len(list(out.rglob('*.md'))), f'pages in {out.name}/')
