"""Loading a sparse model beside safetensors: MB/s of the file and of the dense weights that come out of it.

    python benchmarks/load.py               1 GB of bf16 weights in every format; --gigabytes .1 for a quick look
    python benchmarks/load.py --folder DIR  on the disk to be measured (default: the temporary folder)

Cold: the file is dropped from the page cache before every load, as far as the system allows without privileges; warm: it was read just before.
`disk` reads the file and does nothing else. `load_sparse` reads it, checks its SHA-256 and every number in it, and writes the weights into a model.
"""
import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import header, save, seconds, show
from safetensors.torch import load_file, save_file
from torch import nn

import sparse_workbench as sw
from sparse_workbench import formats

CASES = {'bitmask': ('unstructured', .5), 'csr': ('unstructured', .9), '2:4': ('2:4', .5), 'block64': ('block64', .9), 'dense': ('unstructured', .5)}
SIDE = 4096


def build(layers: int, pattern: str, sparsity: float) -> nn.Module:
    "Square bf16 layers with random zeros of a pattern; half of them, made once, are used again under other names."
    model, p = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False, device='meta', dtype=torch.bfloat16) for _ in range(layers))).to_empty(device='cpu'), sw.pattern(pattern)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, m in enumerate(model):
            if i < 2: m.weight.copy_(torch.randn(SIDE, SIDE, generator=g).where(p.select(torch.rand(SIDE, SIDE, generator=g), None if p.sparsity else sparsity), 0))
            else: m.weight.copy_(model[i % 2].weight)
    return model


def drop(path: Path) -> None:
    "Ask the system to forget the pages of a file."
    with path.open('rb') as f:
        os.fsync(f.fileno())
        if hasattr(os, 'posix_fadvise'): os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    "Read a file and forget it."
    buffer = bytearray(2**24)
    with path.open('rb', buffering=0) as f:
        while f.readinto(buffer): pass


def timed(f: Callable[[], object], path: Path, cold: bool, repeats: int) -> float:
    "The fastest of several loads."
    best = float('inf')
    for _ in range(repeats):
        if cold: drop(path)
        else: read(path)
        best = min(best, seconds(f, 'cpu'))
    return best


def rows_of(name: str, folder: Path, layers: int, repeats: int) -> list[dict]:
    "One format: the disk, safetensors with the dense weights, and load_sparse."
    pattern, sparsity = CASES[name]
    model = build(layers, pattern, sparsity)
    took = seconds(lambda: sw.save_sparse(model, folder/'sparse', name), 'cpu')
    dense = sum(p.nbytes for p in model.parameters())
    save_file({n: p.detach() for n, p in model.named_parameters()}, folder/'dense.safetensors')
    state = {n: torch.empty_like(p) for n, p in model.named_parameters()}
    expected = {n: p.detach().clone() for n, p in list(model.named_parameters())[:2]}
    path, plain, out = folder/'sparse/model.safetensors', folder/'dense.safetensors', []
    def theirs() -> None: # a mapped file is read when it is copied
        for n, t in load_file(plain).items(): state[n].copy_(t)
    with torch.no_grad():
        for p in model.parameters(): p.fill_(1)
    for cold in (True, False):
        for way, f, file in (('disk', lambda: read(path), path), ('load_sparse', lambda: sw.load_sparse(folder/'sparse', model), path), ('safetensors, dense', theirs, plain)):
            t = timed(f, file, cold, repeats)
            out.append(dict(format=name, pages='cold' if cold else 'warm', way=way, **{'file MB': file.stat().st_size / 1e6, 's': t, 'file MB/s': file.stat().st_size / t / 1e6,
                            'weights MB/s': dense / t / 1e6 if way != 'disk' else ''}))
    for n, p in list(model.named_parameters())[:2]: assert torch.equal(formats.integers(p), formats.integers(expected[n])), n
    out.append(dict(format=name, pages='', way='save_sparse', **{'file MB': path.stat().st_size / 1e6, 's': took, 'file MB/s': path.stat().st_size / took / 1e6, 'weights MB/s': dense / took / 1e6}))
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--gigabytes', type=float, default=1., help='of dense weights')
    p.add_argument('--folder', help='where the files are written and read')
    p.add_argument('--formats', nargs='+', default=[*CASES], choices=[*CASES])
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--out', help='folder of the JSON file (default: benchmarks/results)')
    a = p.parse_args()
    layers, rows = max(2, round(a.gigabytes * 1e9 / (2 * SIDE * SIDE))), []
    head = header('cpu', layers=layers, cores=os.cpu_count())
    for name in a.formats:
        with tempfile.TemporaryDirectory(dir=a.folder) as tmp: rows += rows_of(name, Path(tmp), layers, a.repeats)
    show(rows, head)
    save('load', rows, head, a.out, 'cpu')


if __name__ == '__main__': main()
