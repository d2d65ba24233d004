"What every benchmark shares: its arguments, which machine this is, a clock, a table, a file."
import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

if torch.cuda.is_available(): import sparse_workbench.kernels.nm  # noqa: F401  registers the kernels

RESULTS = Path(__file__).resolve().parent / 'results'


def parser(doc: str | None, scale: int = 0) -> argparse.ArgumentParser: # scale: how much smaller everything is on a CPU, where that can be chosen
    "What can be asked of every benchmark."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--out', help='folder of the JSON file (default: benchmarks/results)')
    p.add_argument('--name', help='of the JSON file (default: that of the benchmark)')
    if scale: p.add_argument('--scale', type=int, default=1 if torch.cuda.is_available() else scale, help=f'divide every size by about this (default: 1 on CUDA, {scale} elsewhere)')
    return p


def device_name(device: str) -> str:
    "The GPU's name, or the processor's and how many threads torch uses of it."
    if device == 'cuda': return torch.cuda.get_device_name()
    model = [x.split(':', 1)[1].strip() for x in Path('/proc/cpuinfo').read_text().splitlines() if x.startswith('model name')]
    return f'{model[0] if model else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads'


def header(device: str, **more) -> dict:
    "What a result must say besides its numbers."
    versions = dict(torch=torch.__version__, python=platform.python_version())
    if device == 'cuda':
        import triton
        versions['triton'] = triton.__version__
    return dict(device=device_name(device), **versions, **more)


def sync(device: str) -> None:
    if device == 'cuda': torch.cuda.synchronize()


def seconds(f: Callable[[], object], device: str) -> float:
    "Wall time of one call, with all its device work."
    sync(device)
    start = time.perf_counter()
    f()
    sync(device)
    return time.perf_counter() - start


def median_seconds(calls: list[Callable[[], object]], device: str, repeats: int = 15, graph: bool = True) -> float:
    """Median time of one call. `calls` do the same on different data; together they should outgrow every cache.

    On CUDA their device time, by events; `graph` replays them from one CUDA graph, so that no launch gap is counted.
    """
    for f in calls: f()
    sync(device)
    if device != 'cuda': return statistics.median(seconds(f, device) for _ in range(max(1, repeats // len(calls))) for f in calls)
    def run() -> None:
        for f in calls: f()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured): run()
        run = captured.replay  # type: ignore[assignment]
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def show(rows: list[dict], head: dict) -> None:
    "One table, with everything about the machine above it."
    print(' | '.join(f'{k} {v}' for k, v in head.items()))
    columns = list(dict.fromkeys(k for r in rows for k in r))
    text = [columns] + [[f'{v:.4g}' if isinstance(v := r.get(c, ''), float) else str(v) for c in columns] for r in rows]
    width = [max(len(line[i]) for line in text) for i in range(len(columns))]
    for line in text: print('  '.join(x.ljust(w) for x, w in zip(line, width)).rstrip())


def line(row: dict) -> str:
    "One row by itself."
    return '  '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items())


def write(name: str, rows: list[dict], head: dict, out: str | None, device: str, **more) -> Path:
    "Write name_cpu.json or name_<gpu>.json, whole or not at all."
    folder = Path(out) if out else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{'cpu' if device == 'cpu' else device_name(device).split()[-1].lower()}.json"
    part = path.with_suffix('.part')
    part.write_text(json.dumps(head | more | dict(rows=rows), indent=1) + '\n')
    os.replace(part, path)
    return path


def save(name: str, rows: list[dict], head: dict, out: str | None, device: str, **more) -> Path:
    "Write the file, and say so."
    path = write(name, rows, head, out, device, **more)
    print(f'wrote {path.name}')
    return path


def collect(name: str, cases: Iterable[list[dict]], head: dict, a: argparse.Namespace, **more) -> list[dict]: # all rows
    "Run case after case. Rows are printed and the file is written as they come, so that a run which is stopped leaves what it has; an error at the end if one is wrong."
    rows, start, name = [], time.perf_counter(), a.name or name
    for some in cases:
        for r in some: print(line(r), flush=True)
        rows += some
        write(name, rows, head, a.out, a.device, **more, wall=round(time.perf_counter() - start, 1))
    for part in dict.fromkeys(r.get('part') for r in rows): show([{k: v for k, v in r.items() if k != 'part'} for r in rows if r.get('part') == part], head)
    print(f'wrote {name}, {time.perf_counter() - start:.0f} s')
    if not all(r.get('right', True) for r in rows): raise SystemExit('a result is wrong')
    return rows
