// Block-sparse products on Hopper. A program stays on its multiprocessor and takes tile after tile; one warp group loads by TMA,
// two multiply with wgmma, each a tile of its own, so that one writes while the other multiplies.
// Whoever compiles defines (nbs/api/37_hopper.ipynb):
//   KERNEL_SUM  1: y = x · blocksᵀ or dx = dy · blocks;  0: the gradient of the blocks
//   R, C      the block; STEP entries of the summed axis are loaded at a time
//   TM, TO    the tile: tokens × outputs, multiples of 64
//   STAGES    loads under way;  BUFFERS: 64 × 64 outputs of a warp group that wait to be written
//   TURNED    1: y = x · blockᵀ (forward), 0: dx = dy · block
//   TOGETHER  1: both warp groups work on one tile (rows split, or columns where there are just 64 rows)
//   ACT       0 none, 1 GELU (tanh), 2 SiLU, 3 ReLU, 4 ReLU²;  GATED 1: act(x · gateᵀ) * (x · upᵀ), two weights
//   HALF      1: fp16, 0: bf16
// and `wgmma<turn a, turn b>(acc, a, b)` with N = WN, which is generated in front of this file.
struct __align__(64) Map { char bytes[128]; };
struct List { const int *pieces, *blocks; const int4* tiles; };        // of every block: where it reads, which it is; of every rank: piece, begin, end

constexpr bool SWAP = KERNEL_SUM && TO == 64 && !GATED;            // few outputs: they are the rows of wgmma, tokens its columns
constexpr int BM = SWAP ? TO : TM, BN = SWAP ? TM : TO;                // rows and columns as wgmma sees them
constexpr int LINE = STEP * 2, SLAB = 64 * LINE;                       // bytes of a row, swizzled, and of 64 rows
constexpr int OUT = 64 * 128;                                          // bytes of 64 × 64 outputs
constexpr int A_BYTES = BM / 64 * SLAB, B_BYTES = BN / 64 * SLAB, STAGE = A_BYTES + B_BYTES;
constexpr bool BESIDE = TOGETHER && BM == 64;                          // warp groups split the columns
constexpr int MW = TOGETHER && !BESIDE ? BM / 128 : BM / 64;           // slabs of 64 rows that a warp group multiplies
constexpr int WAITING = GATED ? MW * WN / 64 : BUFFERS;              // 64 × 64 outputs in shared memory, for each warp group

__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void bar_init(u32 bar, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count)); }
__device__ __forceinline__ void bar_expect(u32 bar, u32 bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory"); }
__device__ __forceinline__ void bar_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
__device__ __forceinline__ void bar_wait(u32 bar, u32 parity) {
    u32 done;
    do asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    while (!done);
}
__device__ __forceinline__ void load(u32 to, const Map* map, u32 bar, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store(const Map* map, u32 from, int x, int y) { // and let the cache forget it first
    asm volatile("{ .reg .b64 p; createpolicy.fractional.L2::evict_first.b64 p, 1.0;\n"
                 "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], p; }" ::"l"(map), "r"(from), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
__device__ __forceinline__ u64 descriptor(u32 at, u32 leading) {       // eight swizzled rows make an atom
    return (u64)((at & 0x3FFFF) >> 4) | (u64)(leading >> 4) << 16 | (u64)(8 * LINE >> 4) << 32 | (STEP == 64 ? 1ull : 2ull) << 62;
}
__device__ __forceinline__ float act(float x) {
    if (ACT == 1) { float t; asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(.7978845608f * (x + .044715f * x * x * x))); return .5f * x * (1.f + t); }
    if (ACT == 2) return __fdividef(x, 1.f + __expf(-x));
    if (ACT == 3) return fmaxf(x, 0.f);
    if (ACT == 4) { x = fmaxf(x, 0.f); return x * x; }
    return x;
}
__device__ __forceinline__ u32 two(float low, float high) {
    u32 out;
    if (HALF) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
__device__ __forceinline__ float low(u32 x) { float f; if (HALF) asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(f) : "r"(x)); else f = __uint_as_float(x << 16); return f; }
__device__ __forceinline__ float high(u32 x) { return HALF ? low(x >> 16) : __uint_as_float(x & 0xffff0000u); }

struct Ring {                                                          // where a reader or writer of the stages stands
    u32 stage = 0, parity = 0;
    __device__ __forceinline__ void next() { if (++stage == STAGES) { stage = 0; parity ^= 1; } }
    __device__ __forceinline__ void skip(u32 n) { stage += n; parity ^= stage / STAGES & 1; stage %= STAGES; }
};

extern __shared__ __align__(1024) char memory[];

struct Shared {
    u32 stages, out, full, empty;
    __device__ __forceinline__ Shared() {
        stages = (shared(memory) + 1023) & ~1023u;
        out = stages + STAGES * STAGE; full = out + 2 * WAITING * OUT; empty = full + 8 * STAGES;
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) { bar_init(full + 8 * i, 1); bar_init(empty + 8 * i, 1 + TOGETHER); }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
    }
};

// warp groups multiply in turn, in the order of the stages
__device__ __forceinline__ void wait_turn(int group) { if (!TOGETHER) asm volatile("bar.sync %0, 256;" ::"r"(group + 3) : "memory"); }
__device__ __forceinline__ void end_turn(int group) { if (!TOGETHER) asm volatile("bar.arrive %0, 256;" ::"r"(4 - group) : "memory"); }

// acc += A · B over `steps` stages
template <int TURN_A, int TURN_B>
__device__ __forceinline__ void multiply(float (&acc)[MW][WN / 2], int steps, int group, const Shared& s, Ring& ring) {
    u32 last = 0;
    wait_turn(group);
    for (int i = 0; i < steps; i++) {
        bar_wait(s.full + 8 * ring.stage, ring.parity);
        u32 a = s.stages + ring.stage * STAGE, b = a + A_BYTES;
        if (TOGETHER) { if (BESIDE) b += group * (WN / 64) * SLAB; else a += group * MW * SLAB; }
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < STEP / 16; k++)
#pragma unroll
            for (int m = 0; m < MW; m++)
                wgmma<TURN_A, TURN_B>(acc[m], descriptor(a + m * SLAB + k * (TURN_A ? 2048 : 32), SLAB), descriptor(b + k * (TURN_B ? 2048 : 32), SLAB));
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (i && threadIdx.x % 128 == 0) bar_arrive(last);
        last = s.empty + 8 * ring.stage;
        ring.next();
    }
    end_turn(group);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (steps && threadIdx.x % 128 == 0) bar_arrive(last);
}

__device__ __forceinline__ void clear(float (&acc)[MW][WN / 2]) {
#pragma unroll
    for (int m = 0; m < MW; m++)
#pragma unroll
        for (int j = 0; j < WN / 2; j++) acc[m][j] = 0.f;
}

enum { WRITE, KEEP, TIMES };                                           // act(tile); the same, to come back to; what was kept · the tile

template <int HOW> __device__ __forceinline__ void put(u32 at, float v0, float v1) {
    u32 kept;
    if (HOW == TIMES) { asm volatile("ld.shared.b32 %0, [%1];" : "=r"(kept) : "r"(at)); v0 *= low(kept); v1 *= high(kept); }
    else { v0 = act(v0); v1 = act(v1); }
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(two(v0, v1)) : "memory");
}

// `write(from, row, column)` stores 64 × 64 entries that lie in shared memory, 128 swizzled bytes a row
template <int HOW, class Write>
__device__ __forceinline__ void finish(float (&acc)[MW][WN / 2], const unsigned short* bias, int group, const Shared& s, Write write) {
    int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
#pragma unroll
    for (int m = 0; m < MW; m++)
#pragma unroll
        for (int part = 0; part < WN / 64; part++) {                   // 64 columns
            u32 here = s.out + (group * WAITING + (m * (WN / 64) + part) % WAITING) * OUT;
            if (HOW != TIMES) {                                        // what was written from here before has been read
                if (thread == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(GATED ? 0 : WAITING - 1) : "memory");
                group_sync(group);
            }
            const float* x = acc[m] + part * 32;
            if constexpr (SWAP) {                                      // rows are outputs: 8 × 8 entries are turned on their way
                float b0 = bias ? low(bias[row]) : 0.f, b1 = bias ? low(bias[row + 8]) : 0.f;
                int turn = thread % 32, from = turn / 16 * 8 + turn % 8, to = thread / 32 * 16 + turn / 8 % 2 * 8;
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    u32 at = here + (j * 8 + from) * 128 + ((to * 2) ^ (from % 8 << 4)), v[4];
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        const float* y = x + 4 * (j + q / 2) + q % 2 * 2;
                        float b = q % 2 ? b1 : b0;
                        v[q] = two(act(y[0] + b), act(y[1] + b));
                    }
                    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
                }
            } else {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float b0 = 0.f, b1 = 0.f;
                    if (bias) { u32 both = *(const u32*)(bias + part * 64 + j * 8 + column); b0 = low(both); b1 = high(both); }
                    u32 at = here + row * 128 + ((j * 16 + column * 2) ^ (row % 8 << 4));
                    put<HOW>(at, x[4 * j] + b0, x[4 * j + 1] + b1);
                    put<HOW>(at + 1024, x[4 * j + 2] + b0, x[4 * j + 3] + b1);
                }
            }
            if (HOW != KEEP) {
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                group_sync(group);
                if (thread == 0) {
                    if (SWAP) write(here, part * 64, m * 64);
                    else write(here, (m + (TOGETHER && !BESIDE ? group * MW : 0)) * 64, (BESIDE ? group * WN : 0) + part * 64);
                    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
                }
            }
        }
}

#if KERNEL_SUM
// y[m, piece] = Σ a[m, pieces[i]] · blocks[i], i from begin to end of the piece. Tiles: a band of tokens that stays in the cache,
// in it the ranks (parts of pieces, the longest first), in them the tokens. Tokens beyond the last are neither read nor written.
extern "C" __global__ __launch_bounds__(384, 1) void block_sum(const __grid_constant__ Map a, const __grid_constant__ Map w, const __grid_constant__ Map up,
        const __grid_constant__ Map y, List list, List up_list, const unsigned short* bias, const unsigned short* up_bias, int band, int ranks, int tiles) {
    constexpr int WIDE = TURNED ? R : C, IN = TURNED ? C : R, PARTS = WIDE / TO, STEPS = IN / STEP;
    Shared s;
    Ring ring;
    constexpr int TURNS = TOGETHER ? 1 : 2;                            // tiles under way, one for each warp group
    const int stride = gridDim.x;
    auto at = [&](const List& l, int t) { return t < tiles ? l.tiles[t % (band * ranks) / band / PARTS] : int4{0, 0, 0, 0}; };
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x < 32) {                                        // a warp; what it needs of the next two tiles is on its way
            struct Turn { int first, g, i; };
            Turn turn = {(int)blockIdx.x, 0, 0};
            auto pass = [&](Turn& n) { if (++n.i == TURNS) { n.i = 0; if (++n.g > GATED) { n.g = 0; n.first += TURNS * stride; } } };
            auto tile_of = [&](const Turn& n) { return at(n.g ? up_list : list, n.first + n.i * stride); };
            auto entry = [&](const int* of, const int4& tile, int i, int otherwise) { return of && i < tile.z ? of[i] : otherwise; };
            Turn ahead = turn;
            int4 tile = tile_of(ahead);
            pass(ahead);
            int4 next = tile_of(ahead);
            int lane = threadIdx.x, column = entry(list.pieces, tile, tile.y + lane, 0), block = entry(list.blocks, tile, tile.y + lane, tile.y + lane);
            while (turn.first < tiles) {
                const List &l = turn.g ? up_list : list, &l_next = ahead.g ? up_list : list;
                int column_ = entry(l_next.pieces, next, next.y + lane, 0), block_ = entry(l_next.blocks, next, next.y + lane, next.y + lane);
                pass(ahead);
                int4 after = tile_of(ahead);
                int t = turn.first + turn.i * stride, in_band = t % (band * ranks), m = (t / (band * ranks) * band + in_band % band) * TM, part = in_band / band % PARTS * TO;
                for (int i = tile.y; i < tile.z; i++) {
                    int j = (i - tile.y) % 32;
                    if (j == 0 && i > tile.y) { column = entry(l.pieces, tile, i + lane, 0); block = entry(l.blocks, tile, i + lane, i + lane); }
                    int c = __shfl_sync(~0u, column, j), b = __shfl_sync(~0u, block, j);
                    for (int step = 0; step < STEPS; step++, ring.next()) {
                        bar_wait(s.empty + 8 * ring.stage, ring.parity ^ 1);
                        if (lane == 0) {
                            u32 to = s.stages + ring.stage * STAGE, full = s.full + 8 * ring.stage, to_x = to + (SWAP ? A_BYTES : 0), to_w = to + (SWAP ? 0 : A_BYTES);
                            const Map* v = turn.g ? &up : &w;
                            bar_expect(full, STAGE);
                            load(to_x, &a, full, c * IN + step * STEP, m);
                            if (TURNED) load(to_w, v, full, step * STEP, b * R + part);
                            else for (int k = 0; k < TO / 64; k++) load(to_w + k * SLAB, v, full, part + k * 64, b * R + step * STEP);
                        }
                        __syncwarp();
                    }
                }
                pass(turn);
                tile = next; next = after; column = column_; block = block_;
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        int group = threadIdx.x / 128 - 1, mine = TOGETHER ? 0 : group;
        float acc[MW][WN / 2];
        struct Round { int4 tile[2], other[2]; };                      // two tiles under way, or one
        auto fetch = [&](int first) {
            Round r = {};
#pragma unroll
            for (int i = 0; i < TURNS; i++) {
                r.tile[i] = at(list, first + i * stride);
                if (GATED) r.other[i] = at(up_list, first + i * stride);
            }
            return r;
        };
        auto take = [&](const int4 (&of)[2], auto work) {              // mine of a round's stages, in their order
            int first = (of[0].z - of[0].y) * STEPS, second = (of[1].z - of[1].y) * STEPS;
            if (mine) ring.skip(first);
            work(mine ? second : first);
            if (!mine) ring.skip(second);
        };
        if (group == 1) end_turn(1);
        Round next = fetch(blockIdx.x);
        for (int first = blockIdx.x; first < tiles; first += TURNS * stride) {
            Round now = next;
            next = fetch(first + TURNS * stride);
            int t = first + mine * stride, in_band = t % (band * ranks), m = (t / (band * ranks) * band + in_band % band) * TM;
            int x0 = (mine ? now.tile[1].x : now.tile[0].x) * WIDE + in_band / band % PARTS * TO;
            auto write = [&](u32 from, int i, int j) { store(&y, from, x0 + j, m + i); };
            clear(acc);
            take(now.tile, [&](int steps) { multiply<SWAP && !TURNED, !SWAP && !TURNED>(acc, steps, group, s, ring); });
            if (GATED) {
                if (t < tiles) finish<KEEP>(acc, bias ? bias + x0 : bias, group, s, write);
                clear(acc);
                take(now.other, [&](int steps) { multiply<0, !TURNED>(acc, steps, group, s, ring); });
                if (t < tiles) finish<TIMES>(acc, up_bias ? up_bias + x0 : up_bias, group, s, write);
            } else if (t < tiles) finish<WRITE>(acc, bias ? bias + x0 : bias, group, s, write);
        }
        if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}
#else
// grad[block] = dyᵀ · x at every kept block: TO / C blocks of one block row at a time; `groups` counts these over the block rows
extern "C" __global__ __launch_bounds__(384, 1) void block_outer(const __grid_constant__ Map dy, const __grid_constant__ Map x, const __grid_constant__ Map grad,
        const int* offsets, const int* columns, const int* groups, int rows, int tokens) {
    constexpr int COUNT = TO / C;
    Shared s;
    Ring ring;
    int tiles = groups[rows], steps = (tokens + STEP - 1) / STEP;
    auto find = [&](int t, int& row, int& begin, int& end) {           // the blocks of tile t
        int below = 0, above = rows;
        while (below < above) { int middle = (below + above) / 2; if (groups[middle + 1] > t) above = middle; else below = middle + 1; }
        row = below; begin = offsets[below] + (t - groups[below]) * COUNT; end = min(begin + COUNT, offsets[below + 1]);
    };
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0)
            for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
                int row, begin, end, column[COUNT];
                find(t, row, begin, end);
#pragma unroll
                for (int i = 0; i < COUNT; i++) column[i] = begin + i < end ? columns[begin + i] * C : 0;
                for (int step = 0; step < steps; step++, ring.next()) {
                    u32 to = s.stages + ring.stage * STAGE, full = s.full + 8 * ring.stage;
                    bar_wait(s.empty + 8 * ring.stage, ring.parity ^ 1);
                    bar_expect(full, A_BYTES + (end - begin) * (C / 64) * SLAB);
                    for (int j = 0; j < R / 64; j++) load(to + j * SLAB, &dy, full, row * R + j * 64, step * STEP);
#pragma unroll
                    for (int i = 0; i < COUNT; i++)
                        if (begin + i < end)
                            for (int j = 0; j < C / 64; j++) load(to + A_BYTES + (i * (C / 64) + j) * SLAB, &x, full, column[i] + j * 64, step * STEP);
                }
            }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        int group = threadIdx.x / 128 - 1;
        float acc[MW][WN / 2];
        if (group == 1) end_turn(1);
        for (int t = blockIdx.x, turn = 0; t < tiles; t += gridDim.x, turn ^= 1) {
            if (!TOGETHER && turn != group) { ring.skip(steps); continue; }
            int row, begin, end;
            find(t, row, begin, end);
            clear(acc);
            multiply<1, 1>(acc, steps, group, s, ring);
            finish<WRITE>(acc, nullptr, group, s, [&](u32 from, int i, int j) { if (begin + j / C < end) store(&grad, from, j % C, (begin + j / C) * R + i); });
        }
        if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}
#endif
