"Kernels that must be compiled: no compiler means one clear warning and the right result; what was compiled is kept, whole or not at all."
import os
import subprocess
import sys

import pytest

from sparse_workbench.kernels import native

FIRST_USE = '''
import contextlib, dataclasses, sys, tempfile, warnings
from unittest.mock import patch

import torch
from sparse_workbench.kernels import hopper, native
from sparse_workbench.kernels.block import trusted
from sparse_workbench.kernels.linear import FORMATS, Kernel, SparseLinear, pack, register, unpack

def with_triton(*_):
    from triton.runtime.build import _build                     # what launches a Triton kernel is C, too
    _build('launcher', 'int main() { return 0; }', tempfile.mkdtemp(), [], [], [], [])

if sys.argv[1] == 'nvrtc': register(dataclasses.replace(hopper.hopper_kernel, device='cpu', least=0))     # as it is, but for the device
else: register(dataclasses.replace(hopper.hopper_kernel, device='cpu', least=0, takes=lambda values: trusted('triton', values, with_triton)))

torch.manual_seed(0)
w = torch.randn(256, 128).where(torch.rand(4, 2).repeat_interleave(64, 0).repeat_interleave(64, 1) < .5, 0).bfloat16()
x = torch.randn(300, 128).bfloat16().requires_grad_()
with warnings.catch_warnings(record=True) as told, patch.object(torch.cuda, 'get_device_capability', lambda *_: (9, 0)), patch.object(torch.cuda, 'device', lambda _: contextlib.nullcontext()), patch.object(native, 'candidates', lambda: []):
    warnings.simplefilter('always')
    for layer in [SparseLinear(pack(w, 'block', 64)) for _ in range(2)]:
        for _ in range(3):
            y = layer(x)
            y.float().sum().backward()
            assert torch.allclose(y.float(), x.detach().float() @ w.float().T, rtol=2**-7, atol=1e-2)
            assert layer.values.grad.isfinite().all() and x.grad.isfinite().all()
print(*(str(w.message) for w in told), sep='\\n')
'''


@pytest.mark.parametrize('which, missing, remedy', [('nvrtc', 'libnvrtc was not found', 'install a CUDA build of PyTorch'), ('triton', 'Failed to find C compiler', 'specify via CC environment variable')])
def test_without_a_compiler_there_is_one_warning_and_the_right_result(which, missing, remedy, root):
    if which == 'triton': pytest.importorskip('triton.runtime.build')
    env = {k: v for k, v in os.environ.items() if k not in ('CC', 'CXX', 'TRITON_INTERPRET')} | dict(PATH='', PYTHONPATH=str(root))
    done = subprocess.run([sys.executable, '-P', '-c', FIRST_USE, which], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, lines
    assert missing in lines[0] and remedy in lines[0] and '64x64 blocks' in lines[0] and 'another takes its place' in lines[0], lines[0]


def test_no_compiler_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(native, 'compiler', lambda: None)
    with pytest.raises(OSError, match='libnvrtc was not found: install a CUDA build of PyTorch'): native.compiled('void f() {}', 'sm_90a')


# What was compiled

COMPILE = '''
import sys, time
from sparse_workbench.kernels import native
def make(text, arch, **defines):
    with open(sys.argv[1], 'a') as f: f.write('made\\n')
    time.sleep(.2)
    return (text + arch).encode() * 10_000
for i in range(3):
    code = native.cached(f'source {i % 2}', 'sm_90a', dict(SIZE=1), make)
    assert code == f'source {i % 2}sm_90a'.encode() * 10_000
'''


def in_processes(n, folder, *args, **env):
    "Run COMPILE at the same time; all must succeed."
    env = os.environ | dict(SPARSE_WORKBENCH_CACHE=str(folder)) | env
    running = [subprocess.Popen([sys.executable, '-P', '-c', COMPILE, *args], env=env, stderr=subprocess.PIPE, text=True) for _ in range(n)]
    for p in running: assert not p.wait(), p.stderr.read()[-2000:]


def test_processes_share_what_was_compiled(root, tmp_path):
    notes, folder = tmp_path/'notes', tmp_path/'cache'
    in_processes(3, folder, str(notes), PYTHONPATH=str(root))
    made = len(notes.read_text().splitlines())
    assert 2 <= made <= 6, 'two sources; processes that start at once may each compile them'
    assert sorted(f.suffix for f in folder.iterdir()) == ['.cubin'] * 2, 'whole files, and no parts'
    in_processes(1, folder, str(notes), PYTHONPATH=str(root))
    assert len(notes.read_text().splitlines()) == made, 'a later process compiles nothing'


def test_damage_leads_to_a_second_compilation_never_to_a_wrong_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv('SPARSE_WORKBENCH_CACHE', str(tmp_path))
    made = []
    def make(text, arch, **defines): return made.append(text) or text.encode() * 50
    def ask(): return native.cached('code', 'sm_90a', {}, make)
    ask()
    file, = tmp_path.iterdir()
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1:])
        assert ask() == b'code' * 50 and file.read_bytes() == whole
        file.write_bytes(whole[:at])
        assert ask() == b'code' * 50 and file.read_bytes() == whole
    assert len(made) == 1 + 2 * len(range(0, len(whole), 7))


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root writes wherever it wants')
def test_a_folder_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    monkeypatch.setenv('SPARSE_WORKBENCH_CACHE', str(tmp_path/'no'))
    assert [native.cached('code', 'sm_90a', {}, lambda text, arch: b'made') for _ in range(2)] == [b'made'] * 2
    tmp_path.chmod(0o700)


def test_a_failed_compilation_keeps_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv('SPARSE_WORKBENCH_CACHE', str(tmp_path))
    def make(text, arch): raise RuntimeError('the kernel does not compile')
    for _ in range(2):
        with pytest.raises(RuntimeError, match='does not compile'): native.cached('code', 'sm_90a', {}, make)
    assert not list(tmp_path.iterdir())


# Inductor

INDUCTOR = '''
import copy, torch
from torch import nn
from sparse_workbench.formats import packed_linear
from sparse_workbench.oneshot import prune

torch.manual_seed(0)
for pattern, format, block in (('block16', 'block', (16, 16)), ('unstructured', 'block', (1, 1))):
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 32, bias=False), nn.LayerNorm(32), nn.Linear(32, 16))
    prune(model, .75, pattern=pattern, ignore='4')
    prune(model, pattern='2:4', include='4')
    model[0], model[2], model[4] = packed_linear(model[0], format, block, exact=False), packed_linear(model[2], format, block, exact=False), packed_linear(model[4], '2:4', None, exact=False)
    twin, x = copy.deepcopy(model), torch.randn(3, 7, 48)
    compiled, a, b = torch.compile(model, fullgraph=True), x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        y, right = compiled(a), twin(b)
        assert torch.allclose(y, right, atol=1e-5), (format, block)
        y.square().mean().backward(), right.square().mean().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6), (format, block)
    for (n, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True): assert torch.allclose(p.grad, q.grad, atol=1e-5), (format, block, n)
    with torch.no_grad(): assert torch.allclose(compiled(x[0]), twin(x[0]), atol=1e-5), (format, block)
print('equal')
'''


def cpp_compiler():
    "Why inductor cannot compile for this CPU; '' when it can."
    from torch._inductor.cpp_builder import get_cpp_compiler
    try: get_cpp_compiler()
    except Exception as e: return f'inductor needs a C++ compiler, such as g++, and finds none ({type(e).__name__}); name one in CXX'
    return ''


def test_inductor_compiles_models_with_packed_layers(root, tmp_path):
    if why := cpp_compiler(): pytest.skip(why)
    env = os.environ | dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path), PYTHONPATH=str(root), TORCHINDUCTOR_COMPILE_THREADS='1')
    done = subprocess.run([sys.executable, '-P', '-c', INDUCTOR], env=env, capture_output=True, text=True)
    assert not done.returncode and done.stdout.strip() == 'equal', done.stderr[-3000:]
