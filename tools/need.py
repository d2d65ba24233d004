"""Say which imports are missing from this Python, and what to type: `python tools/need.py run`, `lab`, `test`, `docs`.

Used by `make ... VENV=none`, which installs nothing. Reads the lists of settings.ini and the pins of requirements.txt.
"""
import configparser
import re
import sys
from importlib.util import find_spec
from pathlib import Path

GROUPS = dict(run=['requirements', 'run_requirements'], docs=['docs_requirements'], export=['dev_requirements'])
GROUPS['lab'] = GROUPS['run'] + ['lab_requirements']
GROUPS['test'] = [*GROUPS['run'], 'test_requirements', 'dev_requirements']
IMPORTS = {'scikit-learn': 'sklearn', 'pillow': 'PIL', 'pytest-xdist': 'xdist', 'pyyaml': 'yaml',
           'jupyter-client': 'jupyter_client'}


def missing(root: Path, target: str) -> list[str]:
    "Distributions that `target` needs and that this Python cannot import, with their pins."
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(root / 'settings.ini')
    names = [re.split('[=<>]', x)[0] for group in GROUPS[target] for x in cfg['DEFAULT'][group].split()]
    pins = dict(re.findall(r'^([\w-]+)==([\w.]+)', (root / 'requirements.txt').read_text(), re.M))
    lacking = [n for n in dict.fromkeys(names) if not find_spec(IMPORTS.get(n, n))]
    return [f'{n}=={pins[n]}' if n in pins else n for n in lacking]


def main(target: str) -> int:
    if target not in GROUPS: raise SystemExit(f"{target!r}: choose {', '.join(GROUPS)}")
    if not (lacking := missing(Path(__file__).resolve().parents[1], target)): return 0
    print(f"{sys.executable} lacks what `make {target}` imports. Nothing was installed. Type:\n"
          f"    {sys.executable} -m pip install {' '.join(lacking)}", file=sys.stderr)
    if any(x.startswith('torch==') for x in lacking):
        print('Install the build of torch that fits your device first.', file=sys.stderr)
    return 1


if __name__ == '__main__': raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else 'run'))
