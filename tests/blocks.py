"What the GPU tests of block-sparse products share: problems, the exact answer, and the two questions that every kernel is asked."
import torch

ALLOWED = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-5}


def problem(rows, columns, r, c, tokens, dtype, sparsity=.6, seed=0):
    "A packed weight with an empty block row and column, inputs, output gradients and a bias, on the GPU."
    from sparse_workbench.kernels.linear import pack
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) >= sparsity
    kept[rows // 2], kept[:, 0] = False, False
    w = torch.randn(rows * r, columns * c, generator=g).to(dtype)
    p = pack(w, 'block', (r, c), kept.repeat_interleave(r, 0).repeat_interleave(c, 1)).to('cuda')
    x, dy = (torch.randn(tokens, n, generator=g).to('cuda', dtype) for n in (columns * c, rows * r))
    return p, x, dy, torch.randn(rows * r, generator=g).to('cuda', dtype)


def check(got, right, dtype, what, looser=1):
    "Everything is written, and within the rounding of the type."
    scale = right.abs().max().clip(1).item() if right.numel() else 1
    assert got.isfinite().all(), (*what, 'not written')
    off = (got.double() - right).abs().max().item() / scale if right.numel() else 0
    assert off <= ALLOWED[dtype] * looser, (*what, off)


def right(p, x, dy, bias):
    "The three products by the twin, in float64."
    from sparse_workbench.kernels.linear import KERNELS
    twin, exact = next(k for k in KERNELS if k.name == 'block twin'), (p.values.double(), p.index, p.shape)
    return twin.forward(x.double(), *exact, bias.double()), twin.grad_x(dy.double(), *exact), twin.grad_values(dy.double(), x.double(), *exact)


def more_than_two_billion_inputs(forward, grad_x, grad_values):
    "The last rows begin beyond 2³¹ elements, and are right."
    if torch.cuda.mem_get_info()[0] < 40 * 2**30: return print('  left out: less than 40 GB free')
    tokens = 2**31 // 4096 + 77
    p, _, _, bias = problem(2, 64, 64, 64, 1, torch.float16)
    x, dy = (torch.zeros(tokens, n, device='cuda', dtype=torch.float16) for n in (4096, 128))
    x[-9:], dy[-9:] = torch.randn(9, 4096).half(), torch.randn(9, 128).half()
    exact = p.values, p.index, p.shape
    y, gx, gv = right(p, x[-9:], dy[-9:], bias)
    check(forward(x, *exact, bias)[-9:], y, torch.float16, ('y',))
    check(grad_x(dy, *exact)[-9:], gx, torch.float16, ('x',))
    check(grad_values(dy, x, *exact), gv, torch.float16, ('values',))


def captured(step):
    "A CUDA graph of a step gives the same bits as the step."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): eager = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): replayed = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(replayed, eager): assert torch.equal(a, b)
