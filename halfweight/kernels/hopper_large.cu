// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N], M > 64
//
// The transposed product y^T = W x^T makes the weights the first operand of wgmma, which may come
// from registers: INT8 bytes travel from the file's layout in global memory through shared memory
// to registers, become 16-bit there (three instructions for two weights), and never exist as 16-bit
// in memory. A lane reads just the two bytes that each register of a fragment wants: more loads than
// hopper_small.cu makes, but they hide behind the tensor cores, and x needs no other order.
//
//   warpgroup 0      producer: bulk tensor copies of W [BN, KB] bytes and x [MT, KB] into a ring
//   warpgroups 1...  consumers: 64 rows of W each; the next 64 columns are converted between the
//                    issue of one step of 16 columns and the next, so that the tensor cores never
//                    wait for a conversion
//
// A weight enters as q * code, an integer of at most 15 bits rounded once to the 16-bit type; the
// row's power of two is applied to the float32 sum. Nothing overflows whatever the scales are.
//
// Where L2 is the limit, the two blocks of a cluster take neighbouring rows of W and each fetches
// half of the x that both multiply.
//
// Compile-time: MT tokens a tile, WGS consumer warpgroups, STAGES, CLUSTER (1 or 2), GROUPS (scales
// in 64 columns: 1 or 2), BF16. The launcher also generates `wgmma(acc, a0..a3, descriptor,
// accumulate)`.

constexpr int BN = 64 * WGS;
constexpr int ACC = MT / 2;
constexpr int KB = 64;
constexpr int W_BYTES = BN * KB;
constexpr int X_BYTES = MT * KB * 2;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int CONSUMERS = 128 * WGS;
constexpr int STORE_TOKENS = MT < 32 ? MT : 32;

__device__ __forceinline__ void release_stage(u32 bar, int lane) {
#if CLUSTER > 1
    if (lane < CLUSTER)
        asm volatile(
            "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar),
            "r"(lane) : "memory");
#else
    if (lane == 0) barrier_arrive(bar);
#endif
}
__device__ __forceinline__ void cluster_sync() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
                 ::: "memory");
#else
    __syncthreads();
#endif
}
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank = 0;
#if CLUSTER > 1
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}
__device__ __forceinline__ void copy_x(u32 dst, const TensorMap* map, int column, int token,
                                       int rank, u32 bar) {
#if CLUSTER > 1
    constexpr int SHARE = MT / CLUSTER;
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst + rank * SHARE * 128),
        "l"(map), "r"(column), "r"(token + rank * SHARE), "r"(bar), "h"((u16)((1 << CLUSTER) - 1))
        : "memory");
#else
    copy_tile(dst, map, column, token, bar);
#endif
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ u32 multiply(u32 a, u32 b) {
    u32 r;
#if BF16
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#endif
    return r;
}

// Tiles in columns of 8 token tiles, so that the workers of one wave share x and W in L2.
__device__ __forceinline__ void tile_position(const Problem& p, int tile, int& m, int& n) {
    int column = tile / (8 * p.tiles_n);
    int height = min(8, p.tiles_m - column * 8);
    int inside = tile - column * 8 * p.tiles_n;
    m = column * 8 + inside % height;
    n = inside / height;
}

__device__ __forceinline__ void produce(const TensorMap* w_map, const TensorMap* x_map,
                                        const Problem& p, u32 ring, u32 full, u32 empty,
                                        int worker, int rank) {
    Schedule schedule(p, worker);
    Segment s;
    int stage = 0, phase = 0;
    bool waited = false;
    while (schedule.pop(s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        for (int k = s.k_begin; k < s.k_end; ++k) {
            barrier_wait(empty + 8 * stage, phase ^ 1);
            u32 bar = full + 8 * stage, w = ring + stage * STAGE_BYTES;
            barrier_expect(bar, STAGE_BYTES);
            copy_tile(w, w_map, k * KB, (n * CLUSTER + rank) * BN, bar);
            if (!waited) wait_for_previous_kernel();
            waited = true;
            copy_x(w + W_BYTES, x_map, k * KB, m * MT, rank, bar);
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
    }
}

// The position of a consumer in the ring and in its rows' codes.
struct Cursor {
    u32 ring, full, empty;
    const u8* codes[2];
    int group_shift, last_group;
    int stage, phase;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
    }
    __device__ __forceinline__ void load_codes(int k, u32 (&loaded)[GROUPS][2]) const {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            int group = min((k * KB + g * (KB / GROUPS)) >> group_shift, last_group);
            loaded[g][0] = __ldg(codes[0] + group);
            loaded[g][1] = __ldg(codes[1] + group);
        }
    }
};

// The pairs of bytes that a lane's fragments of 64 columns want: [step][register].
typedef u32 Raw[4][4];

__device__ __forceinline__ u32 byte_pair(u32 address) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

// Wait for a stage and read from it. `line` is the lane's row and pair, `swizzle` its row's.
__device__ __forceinline__ void read_stage(const Cursor& c, u32 line, u32 swizzle, Raw& raw) {
    barrier_wait(c.full + 8 * c.stage, c.phase);
    u32 address = c.ring + c.stage * STAGE_BYTES + line;
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            raw[step][i] = byte_pair(address + ((step << 4) ^ swizzle) + i % 2 * 8 * KB + i / 2 * 8);
}

__device__ __forceinline__ void convert(const Raw& raw, int step, const u32 (&codes)[GROUPS][2],
                                        u32 (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        a[i] = multiply(to_16bit<true>(raw[step][i]), codes[step * GROUPS / 4][i % 2]);
}

__device__ __forceinline__ void issue(u32 x, int step, const u32 (&a)[4], float (&acc)[ACC],
                                      bool fresh) {
    u32 address = x + step * 32;
    // K-major operand in 128-byte swizzled rows: eight rows make an atom of 1,024 bytes.
    u64 descriptor = (u64)((address >> 4) & 0x3fff) | (1ull << 16) | (64ull << 32) | (1ull << 62);
    wgmma_fence();
    wgmma(acc, a[0], a[1], a[2], a[3], descriptor, !fresh);
    wgmma_commit();
}

// Codes as pairs of 16-bit numbers, ready to multiply.
__device__ __forceinline__ void to_pairs(const u32 (&codes)[GROUPS][2], u32 (&pairs)[GROUPS][2]) {
#pragma unroll
    for (int i = 0; i < GROUPS * 2; ++i) {
        float code = (float)codes[i / 2][i % 2];
        pairs[i / 2][i % 2] = pack(code, code);
    }
}

// Multiply one K block from `a` while `next` is filled for the block after it, if there is one.
__device__ __forceinline__ void step_block(const Problem& p, Cursor& c, const Segment& s, int k,
                                           u32 line, u32 swizzle, int lane,
                                           u32 (&codes)[GROUPS][2], const u32 (&a)[4][4],
                                           u32 (&next)[4][4], float (&acc)[ACC]) {
    u32 x = c.ring + c.stage * STAGE_BYTES + W_BYTES;
    int previous = c.stage == 0 ? STAGES - 1 : c.stage - 1;
    issue(x, 0, a[0], acc, k == s.k_begin);
    c.advance();
    Raw raw = {};
    u32 pairs[GROUPS][2];
    to_pairs(codes, pairs);
    if (k + 1 < s.k_end) read_stage(c, line, swizzle, raw);
    c.load_codes(k + 2, codes);
    wgmma_wait<1>();
    if (k > s.k_begin) {
        __syncwarp();
        release_stage(c.empty + 8 * previous, lane);
    }
    convert(raw, 0, pairs, next[0]);
#pragma unroll
    for (int step = 1; step < 4; ++step) {
        issue(x, step, a[step], acc, false);
        convert(raw, step, pairs, next[step]);
    }
}

// What two rows' sums are multiplied with and added to at the end.
struct RowEnds { float scale[2], offset[2]; };

__device__ __forceinline__ RowEnds load_row_ends(const Problem& p, int row) {
    RowEnds ends;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int n = min(row + 8 * r, p.out_features - 1);
        ends.scale[r] = ldexpf(1.0f, p.exponents[n]);
        ends.offset[r] = p.bias ? to_float(p.bias[n]) : 0.0f;
    }
    return ends;
}

// Rows `row` to row + 15 of all the tile's tokens, turned to rows of y in two buffers of the warp.
__device__ __forceinline__ void store_rows(const Problem& p, int m, int row, int lane,
                                           const RowEnds& ends, u16* buffers,
                                           const float (&acc)[ACC]) {
    bool whole = p.out_features % 8 == 0;
#pragma unroll
    for (int base = 0; base < MT; base += STORE_TOKENS) {
        u16* buffer = buffers + base / STORE_TOKENS % 2 * STORE_TOKENS * 16;
        u32 address = shared_address(buffer) + lane % 8 * 32 + lane / 8 % 2 * 16;
#pragma unroll
        for (int j = 0; j < STORE_TOKENS / 8; ++j) {
            const float* c = acc + (base / 8 + j) * 4;
            u32 low = pack(c[0] * ends.scale[0] + ends.offset[0], c[1] * ends.scale[0] + ends.offset[0]);
            u32 high = pack(c[2] * ends.scale[1] + ends.offset[1], c[3] * ends.scale[1] + ends.offset[1]);
            asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::
                         "r"(address + j * 256), "r"(low), "r"(high) : "memory");
        }
        __syncwarp();
#pragma unroll
        for (int i = lane; i < STORE_TOKENS * 2; i += 32) {
            int token = m * MT + base + i / 2, n = row + i % 2 * 8;
            if (token >= p.num_tokens) continue;
            u16* target = p.y + (long long)token * p.out_features + n;
            const u16* source = buffer + i * 8;
            if (whole && n + 8 <= p.out_features) {
                *(uint4*)target = *(const uint4*)source;
            } else {
                for (int e = 0; e < 8; ++e)
                    if (n + e < p.out_features) target[e] = source[e];
            }
        }
    }
}

__device__ __forceinline__ void consume(const Problem& p, Cursor c, u16* buffers, int worker,
                                        int rank) {
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    int row_in_tile = warp * 16 + lane / 4;
    u32 line = row_in_tile * KB + lane % 4 * 2, swizzle = (row_in_tile >> 1 & 3) << 4;
    Schedule schedule(p, worker);
    Segment s;
    while (schedule.pop(s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int tile_row = (n * CLUSTER + rank) * BN;
        float acc[ACC];
        u32 even[4][4], odd[4][4], codes[GROUPS][2], pairs[GROUPS][2];
        for (int h = 0; h < 2; ++h) {
            int row = min(tile_row + row_in_tile + 8 * h, p.out_features - 1);
            c.codes[h] = p.codes + (long long)row * p.num_groups;
        }
        c.load_codes(s.k_begin, codes);
        Raw raw;
        read_stage(c, line, swizzle, raw);
        to_pairs(codes, pairs);
#pragma unroll
        for (int step = 0; step < 4; ++step) convert(raw, step, pairs, even[step]);
        c.load_codes(s.k_begin + 1, codes);
        for (int k = s.k_begin; k < s.k_end; k += 2) {
            step_block(p, c, s, k, line, swizzle, lane, codes, even, odd, acc);
            if (k + 1 == s.k_end) break;
            step_block(p, c, s, k + 1, line, swizzle, lane, codes, odd, even, acc);
        }
        RowEnds ends = load_row_ends(p, tile_row + row_in_tile);
        wgmma_wait<0>();
        __syncwarp();
        release_stage(c.empty + 8 * (c.stage == 0 ? STAGES - 1 : c.stage - 1), lane);
        if (s.k_begin > 0) {
            leave_partial<1, CONSUMERS>(p, worker * CLUSTER + rank, thread, acc);
            continue;
        }
        if (s.k_end < p.k_blocks)
            add_partials<1, CONSUMERS>(p, worker + 1, schedule.last_sharer(s), CLUSTER, rank, thread,
                                       acc);
        store_rows(p, m, tile_row + warp * 16, lane, ends, buffers + warp * STORE_TOKENS * 32, acc);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
w8a16_large(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
            const __grid_constant__ Problem p) {
    extern __shared__ u8 raw[];
    u8* base = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
    u32 ring = shared_address(base);
    u8* after = base + STAGES * STAGE_BYTES;
    u32 full = shared_address(after) + 4 * WGS * STORE_TOKENS * 64, empty = full + 8 * STAGES;
    int rank = cluster_rank();
    int worker = p.num_workers - 1 - (int)(blockIdx.x / CLUSTER);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 4 * WGS * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_sync();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WGS == 2 ? 40 : WGS == 3 ? 32 : 24));
        if (threadIdx.x == 0) produce(&w_map, &x_map, p, ring, full, empty, worker, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WGS == 2 ? 232 : WGS == 3 ? 160 : 112));
        int group_shift = 31 - __clz(p.group_size);
        if (p.num_groups == 1) group_shift = 31;
        Cursor cursor = {ring, full, empty, {}, group_shift, p.num_groups - 1, 0, 0};
        consume(p, cursor, (u16*)after, worker, rank);
    }
    __syncwarp();
    cluster_sync();
}
