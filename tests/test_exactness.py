"""Achieved = asked, to the weight: random shapes, dtypes and ties against a definition that sorts."""
import os
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_workbench import core, patterns
from sparse_workbench.allocation import er, erk, global_, lamp, lamp_score, owl, owl_ratios, standing, uniform
from sparse_workbench.core import Site
from sparse_workbench.oneshot import prune
from sparse_workbench.patterns import (
    Pattern, asked, block, channel, col, drops, head, keep_top, nm, ordered, per_row, row, threshold, unordered, unstructured,
)
from sparse_workbench.rules import keep_best
from sparse_workbench.scores import criterion, magnitude, random, ria, wanda
from sparse_workbench.testing import check_mask, planted

settings.register_profile('modest', max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.register_profile('deep', max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
modest = settings(settings.get_profile(os.environ.get('HYPOTHESIS_PROFILE', 'modest')))

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SPARSITIES = st.sampled_from([0, 1, 0., 1., .5, .9, .99, 1/3, 2/3, .1, .55, .123456789, 1e-9, 1 - 1e-9]) | st.floats(0, 1)


def by_definition(scores: Tensor, p: Pattern, sparsity: float) -> Tensor:
    "The mask as the definition says it, weight by weight: add up tiles, sort groups, keep the best; ties to the first."
    out, inp, *kernel = scores.shape
    places = list(product(*map(range, kernel)))
    split = p.layout == 'channels_last' and p.tile[1] != -1        # every kernel position has columns of its own
    width = inp if split or p.layout == 'kernel' else inp * len(places)
    (r, c), (a, b) = ((n if t == -1 else t for n, t in zip((out, width), p.tile)), p.group)
    def cells(o, i, q): # the column of a weight, and at which position
        if p.layout == 'kernel': return o, 0, i
        if p.layout == 'flat': return o, 0, i * len(places) + q
        return (o, q, i) if split else (o, 0, q * inp + i)
    def used(n, tile, group): return n // (tile * max(1, group)) * tile * max(1, group) if p.tail == 'dense' else n
    high, wide = used(out, r, a), used(width, c, b)
    members: dict[tuple, list] = {}
    for o, i, q in product(range(out), range(inp), range(len(places))):
        y, pos, x = cells(o, i, q)
        if y < high and x < wide: members.setdefault((y // r, pos, x // c), []).append((o, i, *places[q]))
    groups: dict[tuple, list] = {}
    for t in sorted(members): groups.setdefault((0 if a == -1 else t[0] // a, (0, 0) if b == -1 else (t[1], t[2] // b)), []).append(t)
    mask = torch.ones(scores.shape, dtype=torch.bool)
    tall, long = -(-high // r), -(-wide // c) * (len(places) if split else 1)
    size = (tall if a == -1 else a) * (long if b == -1 else b)
    for j, name in enumerate(sorted(groups)):
        tiles = groups[name]
        lose = round((j + 1) * size * sparsity) - round(j * size * sparsity) - (size - len(tiles))   # padding goes first
        total = {t: sum(float(scores[m]) for m in members[t]) for t in tiles}
        best = sorted(tiles, key=lambda t: -total[t])               # stable: ties stay in order
        for t in best[min(len(tiles), len(tiles) - lose):] if lose > 0 else []:
            for m in members[t]: mask[m] = False
    return mask


@st.composite
def shapes(draw, most: int = 9) -> tuple[int, ...]:
    return tuple([draw(st.integers(1, most)), draw(st.integers(1, most + 4)), *draw(st.lists(st.integers(1, 3), max_size=3))])


@st.composite
def weights(draw, shape: tuple[int, ...], exact: bool = False) -> Tensor:
    "Values full of ties; `exact` leaves out those whose sums round."
    dtype, gen = draw(st.sampled_from(DTYPES)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    info = torch.finfo(dtype)
    kinds = dict(constant=[-.5], zeros=[0.], signs=[1., -1.], signed_zeros=[0., -0.], few=[0., -0., 1., -1., .5, 2.], range=[float(x) for x in range(-9, 9)])
    if not exact: kinds |= dict(subnormal=[info.tiny * f for f in (0, .5, -.5, .25, 1)], huge=[info.max, -info.max, info.max / 2, 1.], normal=[])
    values = kinds[draw(st.sampled_from(sorted(kinds)))]
    if not values: return torch.randn(shape, generator=gen).to(dtype)
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape, generator=gen)]


TAILS = st.sampled_from(['raise', 'pad', 'dense'])
NM = st.integers(2, 20).flatmap(lambda of: st.builds(nm, st.integers(1, of), st.just(of), axis=st.sampled_from(['in', 'out']),
                                                    layout=st.sampled_from(['channels_last', 'flat']), tail=TAILS))
SMALL = st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 4), (4, 8)]).flatmap(lambda k: st.builds(nm, *map(st.just, k), axis=st.sampled_from(['in', 'out']), tail=TAILS))
BLOCKS = st.builds(block, st.integers(1, 4), st.integers(1, 5), balanced=st.booleans(), tail=TAILS)
WHOLE = st.sampled_from([row(), col(), channel()]) | st.builds(head, st.integers(1, 4), axis=st.sampled_from(['out', 'in']))
OWN = st.builds(Pattern, st.tuples(*[st.sampled_from([1, 2, -1])] * 2), st.tuples(*[st.sampled_from([1, 2, -1])] * 2),
                layout=st.sampled_from(['channels_last', 'flat', 'kernel']), tail=TAILS)
SINGLE = st.sampled_from([unstructured(), per_row()]) | NM | SMALL


def fits(p: Pattern, shape: tuple[int, ...], sparsity: float | None) -> bool:
    "Does the pattern fit? If not, select must say so; a fixed group also wants a whole number of weights."
    try: g = patterns.geometry(p, shape)
    except ValueError as e:
        assert p.tail == 'raise' and "tail='pad'" in str(e) and "tail='dense'" in str(e) and str(shape) in str(e)
        return False
    try: drops(p, 1, g.gr * g.gc, asked(p if sparsity is None else Pattern(), sparsity))
    except ValueError as e:
        assert p.fixed and 'groups of' in str(e)
        return False
    return True


def agrees(w: Tensor, p: Pattern, sparsity: float | None) -> None:
    if not fits(p, tuple(w.shape), sparsity):
        with pytest.raises(ValueError): p.select(w.abs(), sparsity)
        return
    asked = p.sparsity if sparsity is None else sparsity
    mask = p.select(w.abs(), sparsity)
    assert mask.shape == w.shape and mask.dtype == torch.bool
    check_mask(mask, p, asked)
    assert torch.equal(mask, by_definition(w.abs(), p, asked))
    site = planted(w)
    site.sparsity = asked
    for size in (1, 7, 10**6): # slabs of a few weights, and the whole
        with patch.object(patterns, 'slabs', partial(core.slabs, weights=size)): keep_best(magnitude)(site, p)
        assert torch.equal(site.mask, mask), f'slabs of {size}'


@modest
@given(st.data())
def test_weights_one_by_one(data):
    p, w = data.draw(SINGLE), data.draw(shapes().flatmap(weights))
    agrees(w, p, None if p.sparsity is not None else data.draw(SPARSITIES))


@modest
@given(st.data())
def test_tiles(data):
    agrees(data.draw(shapes().flatmap(partial(weights, exact=True))), data.draw(BLOCKS | WHOLE), data.draw(SPARSITIES))


@modest
@given(st.data())
def test_any_tile_and_group(data):
    agrees(data.draw(shapes(6).flatmap(partial(weights, exact=True))), data.draw(OWN), data.draw(SPARSITIES | st.sampled_from([.5, .25, .75])))


@modest
@given(st.data())
def test_structure_decay(data):
    "A pattern of N:M under another share of its group, as a schedule asks for it."
    of = data.draw(st.sampled_from([2, 4, 8]))
    agrees(data.draw(weights((4, 16))), nm(1, of), data.draw(st.integers(0, of)) / of)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('p', [unstructured(), per_row(), nm(2, 4), nm(2, 4, axis='out'), nm(9, 32), block(8), row(), col()], ids=repr)
def test_larger_weights(p, dtype):
    "Sizes at which the ways of selecting part: pairs, k-th values, histograms."
    torch.manual_seed(0)
    w = (torch.randn(96, 1280) * 4).round().to(dtype)
    for sparsity in (p.sparsity,) if p.sparsity is not None else (.1, .5, .617, .95):
        mask = p.select(w.abs(), sparsity)
        check_mask(mask, p, sparsity)
        f = p.fold(w.abs())
        edges = (torch.arange(len(f) + 1, dtype=torch.double) * f.size(1) * sparsity).round().long().diff()
        place = f.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        assert torch.equal(mask, p.unfold(place < (f.size(1) - edges)[:, None], w.shape))


def test_ties_go_to_the_first():
    ones = torch.ones(4, 8)
    assert torch.equal(unstructured().select(ones, .5), torch.arange(32).reshape(4, 8) < 16)
    assert torch.equal(nm(2, 4).select(ones)[0], torch.tensor([1, 1, 0, 0] * 2).bool())
    assert torch.equal(nm(2, 4, axis='out').select(ones)[:, 0], torch.tensor([1, 1, 0, 0]).bool())
    assert torch.equal(per_row().select(ones, .75).int().sum(0), torch.tensor([4, 4] + [0] * 6))
    assert torch.equal(nm(1, 2).select(torch.tensor([[-0., 0., 0., -0.]])), torch.tensor([[True, False, True, False]]))


@pytest.mark.parametrize('shape', [(0, 4), (4, 0), (0, 0), (1, 1), (1, 8), (8, 1), (4, 0, 3), (0, 4, 3, 3), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize('p', [unstructured(), per_row(), nm(2, 4, tail='pad'), nm(2, 4, 'out', tail='dense'), block(2, tail='pad'),
                               block(2, balanced=True, tail='dense'), row(), col(), channel(), head(1), head(1, 'in')], ids=lambda p: p.name.partition(':')[0])
def test_axes_of_size_zero_and_one(p, shape):
    site = planted(torch.zeros(shape))
    for sparsity in (None,) if p.sparsity else (0, .5, 1):
        asked = p.sparsity if sparsity is None else sparsity
        mask = p.select(site.weight.abs(), sparsity)
        assert mask.shape == shape
        check_mask(mask, p, asked)
        site.sparsity = asked
        keep_best(magnitude)(site, p)
        assert torch.equal(site.mask, mask)


@pytest.mark.parametrize('p, allocate', [*product([unstructured()], [uniform, global_, er, erk, lamp]), *product([row(), col(), block(2), head(4)], [uniform, global_])])
def test_an_empty_layer_beside_others(p, allocate):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 0), nn.Linear(0, 4))
    r = prune(model, .5, pattern=p, allocate=allocate)
    assert [x['zeros'] for x in r.rows] == [16, 0, 0]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_sums_inside_a_tile_do_not_overflow_or_round(dtype):
    "Two channels whose sums are beyond 16-bit floats: the larger one stays."
    w = torch.full((4, 2, 3, 3), 200., dtype=dtype)
    w[0, 1, 0, 0] = 201
    assert channel().select(w, .5)[0, :, 0, 0].tolist() == [False, True]
    w *= 300
    if w.isfinite().all(): assert channel().select(w, .5)[0, :, 0, 0].tolist() == [False, True]


# Golden masks: a weight and inputs from sines and cosines, masks computed independently of any library

i, j, t = torch.arange(4.).double()[:, None], torch.arange(8.).double()[None], torch.arange(32.).double()[:, None]
W = torch.sin(1 + 8*i + j) * (1 + .1*j)
X = torch.cos(.7*t + 1.3*j**2) * (1 + .5*(j % 3)) + .3*torch.sin(.31*t*(j + 1))
GOLDEN = [
    (magnitude, nm(2, 4), None, '01011001 00110110 10010011 01100101'), (wanda, per_row(), .5, '01001011 00101110 00011011 00101101'),
    (wanda, nm(2, 4), None, '01011001 01100110 01011001 01100101'), (ria, nm(2, 4), None, '11001001 00110110 10011001 01101100'),
]


def bits(rows: str) -> Tensor: return torch.tensor([[c == '1' for c in r] for r in rows.split()])


@pytest.mark.parametrize('score, p, sparsity, rows', GOLDEN, ids=lambda x: getattr(x, '__name__', None))
def test_golden_masks(score, p, sparsity, rows):
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).double()
    model[0].weight.data = W.clone()
    prune(model, sparsity, score=score, pattern=p, calibration=[X.reshape(2, 16, 8)])
    assert torch.equal(model[0].weight != 0, bits(rows))
    assert torch.equal(model[0].weight[bits(rows)], W[bits(rows)])


@pytest.mark.parametrize('score, rows', [(magnitude, '01011011 00100110 10011011 00100100'), (wanda, '01001001 00100100 01011011 01101101'),
                                        (ria, '11001001 00100100 10011011 01101100')], ids=['magnitude', 'wanda', 'ria'])
def test_golden_masks_of_the_whole_matrix(score, rows):
    "The published code drops one weight too many; exact selection keeps it, the best of those that went."
    site = planted(W, in_norm=(X.square().sum(0) / 2).sqrt())
    site.sparsity = .5
    keep_best(score)(site, unstructured())
    published, s = bits(rows), score(site)
    assert (site.mask & published).sum() == 15 and site.mask.sum() == 16
    assert s[site.mask & ~published] == s[~published].max()


# Cuts

@modest
@given(st.data())
def test_threshold_against_sorting(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    special = torch.tensor([0., -0., 1., -1., float('inf'), -float('inf'), torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max, 1.5, -3e-5], dtype=dtype)
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    chunks = []
    for _ in range(data.draw(st.integers(1, 6))):
        n, cost, wild = data.draw(st.integers(0, 40)), data.draw(st.sampled_from([1, 4, 9])), data.draw(st.booleans())
        x = torch.randn(n, generator=gen).to(dtype) if wild else special[torch.randint(len(special), (n,), generator=gen)]
        chunks.append((x, cost))
    flat = sorted((float(v), cost) for x, cost in chunks for v in x)
    total = sum(cost for _, cost in flat)
    if total < 2: return
    drop = data.draw(st.integers(1, total - 1))
    cut, gone = threshold(lambda: chunks, drop), 0
    for v, _ in flat:
        gone = sum(c for u, c in flat if u <= v)
        if gone > drop: break
    assert cut == (v, gone - drop)
    assert standing((x for x, _ in chunks), v) == (sum(u < v for u, _ in flat), sum(u == v for u, _ in flat))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_bits_in_order(dtype):
    if dtype.itemsize == 2: x = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)   # every 16-bit float there is
    else: x = torch.cat([torch.randn(10**4, dtype=dtype) * 10.**torch.randint(-37, 38, (10**4,)), torch.tensor([0., -0., 1e-42, -1e-42, float('inf')], dtype=dtype)])
    x = x[~x.isnan()].sort().values
    k = ordered(x)
    assert torch.equal(k.diff().sign(), (x[1:] > x[:-1]).to(k.dtype))
    picks = torch.linspace(0, len(x) - 1, 300).long()
    assert all(unordered(int(k[n]), dtype) == x[n] for n in picks)


@modest
@given(st.integers(1, 40), st.integers(1, 40), SPARSITIES)
def test_shares_add_up(groups, size, sparsity):
    d = drops(per_row(), groups, size, sparsity)
    each = d if isinstance(d, Tensor) else torch.full((groups,), d)
    assert abs(int(each.sum()) - sparsity * groups * size) <= .5 + 1e-6 and int(each.max() - each.min()) <= 1
    for cut in range(groups + 1): # the same shares when counted in two parts
        parts = [drops(per_row(), n, size, sparsity, first) for n, first in ((cut, 0), (groups - cut, cut)) if n]
        assert torch.equal(torch.cat([p if isinstance(p, Tensor) else torch.full((n,), p) for p, n in zip(parts, [m for m in (cut, groups - cut) if m])]), each)


def test_keep_top_with_a_share_for_each_group():
    f = torch.randint(0, 4, (50, 21), generator=torch.Generator().manual_seed(0)).float()
    lose = torch.arange(50) % 22
    assert torch.equal((~keep_top(f, lose)).sum(1), lose)


# Allocations

@st.composite
def models(draw, exact: bool = False) -> list[Site]:
    n = draw(st.integers(1, 4))
    return [planted(draw(shapes(6).flatmap(partial(weights, exact=exact))), f'layer{k}') for k in range(n)]


def gone_from(ss: list[Site], ratios: dict[str, float]) -> list[int]: return [round(ratios[s.name] * s.numel) for s in ss]


@modest
@given(models(), SPARSITIES, st.sampled_from([unstructured(), per_row()]))
def test_global_ranking_against_sorting(ss, sparsity, p):
    total = sum(s.numel for s in ss)
    lose = round(sparsity * total)
    rank = sorted(((float(v), k, n) for k, s in enumerate(ss) for n, v in enumerate(p.fold(s.weight.abs()).flatten())), key=lambda x: -x[0])
    for size in (5, 10**6):
        with patch.object(patterns, 'slabs', partial(core.slabs, weights=size)): ratios = global_(ss, p, magnitude, sparsity)
        assert gone_from(ss, ratios) == [sum(k == m for _, k, _ in rank[total - lose:]) for m in range(len(ss))]
    for k, s in enumerate(ss):
        s.sparsity = ratios[s.name]
        keep_best(magnitude)(s, p)
        check_mask(s.mask, p, ratios[s.name])
        if p == unstructured():
            want = torch.zeros(s.numel, dtype=torch.bool)
            want[[n for _, m, n in rank[:total - lose] if m == k]] = True
            assert torch.equal(p.fold(s.mask).flatten(), want)


@modest
@given(models(exact=True), SPARSITIES, st.sampled_from([block(2, tail='pad'), block(2, 3, tail='dense'), row(), col(), channel(), block(1, 2, balanced=True, tail='pad')]))
def test_global_ranking_of_tiles(ss, sparsity, p):
    "Tiles compete by their mean; the total is met to the tile, and nothing that went was better than what stayed."
    tiles = [(patterns.geometry(p, tuple(s.shape)), s) for s in ss]
    sizes = [g.r * g.c * (s.numel // (s.shape[0] * s.shape[1]) if p.layout == 'kernel' else 1) for g, s in tiles]
    room = sum(g.nr * g.k * g.nc * n for (g, _), n in zip(tiles, sizes))
    lose = round(sparsity * sum(s.numel for s in ss))
    if lose > room:
        with pytest.raises(ValueError, match='lower the sparsity'): global_(ss, p, magnitude, sparsity)
        return
    ratios, gone, stayed, lost = global_(ss, p, magnitude, sparsity), 0, [], []
    for s, size in zip(ss, sizes):
        s.sparsity = ratios[s.name]
        keep_best(magnitude)(s, p)
        check_mask(s.mask, p, s.sparsity)
        f, kept = p.fold(s.weight.abs()).double().flatten() / size, p.fold(s.mask.float()).flatten() > 0
        gone += int((~kept).sum()) * size
        if p.group == (-1, -1): stayed, lost = [*stayed, *f[kept].tolist()], [*lost, *f[~kept].tolist()]
    assert 0 <= gone - lose < max(sizes)
    assert not stayed or not lost or min(stayed) >= max(lost) * (1 - 1e-6)


@modest
@given(st.data())
def test_prune_leaves_exactly_the_best(data):
    ss, sparsity, allocate = data.draw(models()), data.draw(SPARSITIES), data.draw(st.sampled_from([uniform, global_]))
    model = nn.ModuleDict({s.name: s.module for s in ss})
    before, total = [s.weight.clone() for s in ss], sum(s.numel for s in ss)
    with patch.object(patterns, 'slabs', partial(core.slabs, weights=11)): r = prune(model, sparsity, allocate=allocate)
    groups = [range(len(ss))] if allocate is global_ else [[k] for k in range(len(ss))]
    for g in groups:
        rank = sorted(((float(v), k, n) for k in g for n, v in enumerate(unstructured().fold(before[k].abs()).flatten())), key=lambda x: -x[0])
        stay = {(k, n) for _, k, n in rank[:len(rank) - round(sparsity * len(rank))]}
        for k in g:
            want = torch.tensor([(k, n) in stay for n in range(ss[k].numel)])
            w, old = (unstructured().fold(x).flatten() for x in (ss[k].weight, before[k]))
            assert torch.equal(w[want], old[want]) and not w[~want].any() and not w[~want].signbit().any()
    assert r.total['params'] == total and r.total['zeros'] == sum(int((s.weight == 0).sum()) for s in ss)


@modest
@given(models(exact=True), SPARSITIES, st.sampled_from([er, erk, global_, lamp]))
def test_allocations_meet_the_total(ss, sparsity, allocate):
    ratios = allocate(ss, unstructured(), magnitude, sparsity)
    assert all(0 <= r <= 1 for r in ratios.values())
    assert sum(gone_from(ss, ratios)) == round(sparsity * sum(s.numel for s in ss))


@modest
@given(models(exact=True), SPARSITIES)
def test_erk_is_in_proportion(ss, sparsity):
    "Layers that are not dense keep in proportion to Σ sides / Π sides, to one weight; a dense one would keep more."
    ratios = erk(ss, unstructured(), magnitude, sparsity)
    raw = {s.name: sum(s.shape) / s.numel for s in ss}
    rest = [s for s in ss if ratios[s.name] > 0]
    if not rest: return
    keep = sum(s.numel for s in rest) - sum(gone_from(rest, ratios))
    eps = keep / sum(raw[s.name] * s.numel for s in rest)
    for s in rest: assert abs((1 - ratios[s.name]) * s.numel - eps * raw[s.name] * s.numel) <= len(ss)
    for s in ss:
        if s not in rest: assert eps * raw[s.name] * s.numel >= s.numel - len(ss) or sparsity < 1 / s.numel


def test_erk_of_resnet50():
    "Published densities of 54 tensors, 25,502,912 weights."
    shapes = {'conv1': (64, 3, 7, 7), 'fc': (1000, 2048)}
    inp = 64
    for k, (n, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], 1):
        for b in range(n):
            shapes |= {f'layer{k}.{b}.conv1': (width, inp, 1, 1), f'layer{k}.{b}.conv2': (width, width, 3, 3), f'layer{k}.{b}.conv3': (4 * width, width, 1, 1)}
            if not b: shapes[f'layer{k}.{b}.downsample'] = (4 * width, inp, 1, 1)
            inp = 4 * width
    ss = [Site(n, (nn.Conv2d(s[1], s[0], s[2], bias=False, device='meta') if len(s) > 2 else nn.Linear(s[1], s[0], bias=False, device='meta'))) for n, s in shapes.items()]
    assert len(ss) == 54 and sum(s.numel for s in ss) == 25_502_912
    d = {n: 1 - s for n, s in erk(ss, unstructured(), magnitude, .8).items()}
    assert {n for n, x in d.items() if x == 1} == {'layer1.0.conv1', 'layer1.0.conv3', 'layer1.0.downsample', 'layer1.1.conv1', 'layer1.1.conv3',
                                                  'layer1.2.conv1', 'layer1.2.conv3', 'layer2.0.conv1'}
    for n, x in {'conv1': .8572, 'layer1.0.conv2': .3619, 'layer4.0.conv2': .0435, 'fc': .1482}.items(): assert abs(d[n] - x) < 1e-4, n
    d = {n: 1 - s for n, s in erk(ss, unstructured(), magnitude, .9).items()}
    assert {n for n, x in d.items() if x == 1} == {'layer1.0.conv1'} and abs(d['conv1'] - .42) < 1e-4 and abs(d['fc'] - .0726) < 1e-4


@modest
@given(models(exact=True), SPARSITIES)
def test_lamp_against_its_definition(ss, sparsity):
    scores = [lamp_score(magnitude)(s).flatten().sort().values for s in ss]
    for s, x in zip(ss, scores):
        values = sorted(float(v) ** 2 for v in s.weight.flatten())
        assert torch.allclose(x, torch.tensor([v / max(sum(values[n:]), 1e-300) for n, v in enumerate(values)], dtype=torch.double), rtol=1e-9)
    rank = sorted(((float(v), k) for k, x in enumerate(scores) for v in x), key=lambda v: -v[0])
    lose = round(sparsity * len(rank))
    assert gone_from(ss, lamp(ss, unstructured(), magnitude, sparsity)) == [sum(m == k for _, m in rank[len(rank) - lose:]) for k in range(len(ss))]


@modest
@given(st.data())
def test_owl_meets_the_total(data):
    ss = [planted(data.draw(weights((4, 2 * n))), f'h.{k}.{part}', in_norm=torch.rand(2 * n) + .1)
          for k in range(data.draw(st.integers(1, 4))) for part, n in (('up', 3), ('down', 5))]
    sparsity, spread = data.draw(SPARSITIES), data.draw(st.sampled_from([0., .08, .3]))
    ratios = owl(ss, per_row(), magnitude, sparsity, spread=spread)
    assert sum(gone_from(ss, ratios)) == round(sparsity * sum(s.numel for s in ss))
    assert max(ratios.values()) - min(ratios.values()) <= 2 * spread + 2 / min(s.numel for s in ss)


def test_owl_of_the_paper():
    "Blocks with 9.4, 18.8 and 18.8 percent of outliers at 70 %."
    got = owl_ratios(dict(a=9.375, b=18.75, c=18.75), .7)
    assert [round(v, 6) for v in got.values()] == [.806667, .646667, .646667]


# Criteria of any shape of trouble

@criterion(rowwise=True)
def signed(site: Site) -> Tensor: return site.weight


@modest
@given(st.data())
def test_signed_scores(data):
    "Movement and GraSP rank by sign: −0 equals 0, the most negative goes first, and padding goes before it."
    w, p = data.draw(shapes().flatmap(weights)), data.draw(SINGLE)
    site, sparsity = planted(w), data.draw(SPARSITIES) if p.sparsity is None else p.sparsity
    if not fits(p, tuple(w.shape), sparsity): return
    site.sparsity = sparsity
    with patch.object(patterns, 'slabs', partial(core.slabs, weights=9)): keep_best(signed)(site, p)
    assert torch.equal(site.mask, by_definition(w, p, sparsity))


def test_padding_goes_first():
    "Also before the most negative score: a group that is half padding keeps all that it has."
    w = -torch.arange(1., 13).reshape(2, 6)
    assert nm(2, 4, tail='pad').select(w).int().tolist() == [[1, 1, 0, 0, 1, 1]] * 2
    assert nm(2, 4, tail='dense').select(w).int().tolist() == [[1, 1, 0, 0, 1, 1]] * 2
    assert nm(1, 4, tail='pad').select(w).int().tolist() == [[1, 0, 0, 0, 1, 0]] * 2
    assert nm(1, 4, axis='out', tail='pad').select(w).int().tolist() == [[1] * 6, [0] * 6]


def test_random_is_exact_too():
    model = nn.Sequential(nn.Linear(37, 41), nn.Linear(41, 13))
    assert prune(model, .777, score=random).total['zeros'] == sum(round(.777 * n) for n in (37 * 41, 41 * 13))
