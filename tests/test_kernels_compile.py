"Triton kernels that were never run where they were written are at least compiled for that chip, which needs no GPU."
import os
import subprocess
import sys

import pytest

pytest.importorskip('triton.backends.nvidia')

SCRIPT = '''
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_workbench.kernels import block, nm, sweep


def ptx(f, types, constants, **options):
    "The code for compute capability 9.0; constants are the last arguments."
    signature = dict(zip(f.arg_names, types)) | dict.fromkeys(constants, 'constexpr')
    assert list(signature) == f.arg_names, (list(signature), f.arg_names)
    code = triton.compile(ASTSource(f, signature, {(f.arg_names.index(n),): v for n, v in constants.items()}), target=GPUTarget('cuda', 90, 32), options=options)
    assert len(code.asm['cubin']) > 1000 and code.metadata.shared <= 227 * 1024
    return code.asm['ptx']


for r, c, tokens, kind in ((128, 128, 16, 'bf16'), (64, 64, 16, 'fp16'), (16, 32, 64, 'bf16'), (256, 64, 32, 'bf16'), (32, 256, 16, 'bf16')):
    n, step = min(r, 32), min(c, 128)
    boxes = [f'tensordesc<{kind}[{a},{b}]>' for a, b in ((tokens, step), (n, step), (tokens, n))]
    for bias in (False, True):
        text = ptx(block._few_kernel, [*boxes, '*i32', '*i32', f'*{kind}'], dict(R=r, C=c, TOKENS=tokens, N=n, STEP=step, BIAS=bias, WIDE=False), num_stages=8, num_warps=1)
        assert text.count('cp.async.bulk.tensor') >= 3 and 'mma.sync' in text            # boxes are loaded and stored by the copy engine, and multiplied by tensor cores
for size, kind, bits in ((32, 'i16', 16), (33, 'i32', 32), (1000, 'i64', 64)):
    width = triton.next_power_of_2(size)
    ptx(nm._mask_long, [f'*{kind}', '*u8', 'i32', 'i32'], dict(SIZE=size, WIDTH=width, GROUPS=4096 // width, BITS=bits, MAGNITUDE=True), num_warps=4)
for kind in ('fp32', 'fp64'):
    for of in (0, 4, 16):                                               # a mask that is given; groups
        ptx(sweep._sweep_kernel, [f'*{kind}', f'*{kind}', '*u8', f'*{kind}', *['i32'] * 5], dict(OF=of, ROWS=4, BLOCK=128), num_warps=1)
print('compiled')
'''


def test_for_hopper(root, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'} | dict(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(root))
    (tmp_path / 'script.py').write_text(SCRIPT)                         # Triton reads the source of what it compiles from a file
    done = subprocess.run([sys.executable, tmp_path / 'script.py'], env=env, capture_output=True, text=True)
    assert done.stdout == 'compiled\n', done.stderr[-3000:]
