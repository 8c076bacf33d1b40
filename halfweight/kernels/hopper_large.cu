// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N], M > 64
//
// The transposed product y^T = W x^T makes the weights the first operand of wgmma, which may come
// from registers: INT8 bytes travel from the file's layout in global memory through shared memory
// to registers, become 16-bit there (three instructions for two weights), and never exist as 16-bit
// in memory. The activations come from `permute_x` in the order of columns that hopper.cuh explains.
//
//   warpgroup 0     producer: bulk tensor copies of W [BN, KB] bytes and x [MT, KB] into a ring
//   warpgroups 1-2  consumers: 64 TILES rows of W each; a part (64 rows by 64 columns) is converted
//                   while the tensor cores work on the part before it
//
// A weight enters as q * code, an integer of at most 15 bits rounded once to the 16-bit type; the
// row's power of two is applied to the float32 sum. Nothing overflows whatever the scales are.
//
// Compile-time: MT tokens a tile, TILES, STAGES, CLUSTER (blocks that share one tile of x), BF16. The
// launcher also generates `wgmma(acc, a0..a3, descriptor, accumulate)`.

constexpr int BN = 128 * TILES;
constexpr int ACC = MT / 2;
constexpr int KB = 128;
constexpr int UNITS = KB / 64;
constexpr int PARTS = TILES * UNITS;
constexpr int W_BYTES = BN * KB;
constexpr int X_BYTES = MT * KB * 2;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int CONSUMERS = 256;
constexpr int STORE_TOKENS = MT < 32 ? MT : 32;

__device__ __forceinline__ void release_stage(u32 bar, u32 cta) {
#if CLUSTER > 1
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(bar), "r"(cta)
        : "memory");
#else
    barrier_arrive(bar);
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
#if CLUSTER > 1
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}
__device__ __forceinline__ void copy_tile_to_cluster(u32 dst, const TensorMap* map, int c0, int c1,
                                                     u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst), "l"(map), "r"(c0),
        "r"(c1), "r"(bar), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
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
    while (schedule.pop(s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int row = (n * CLUSTER + rank) * BN;
        for (int k = s.k_begin; k < s.k_end; ++k) {
            barrier_wait(empty + 8 * stage, phase ^ 1);
            u32 bar = full + 8 * stage;
            u32 w = ring + stage * STAGE_BYTES, x = w + W_BYTES;
            barrier_expect(bar, STAGE_BYTES);
            copy_tile(w, w_map, k * KB, row, bar);
            for (int unit = 0; unit < UNITS; ++unit) {
                u32 target = x + unit * MT * 128;
#if CLUSTER > 1
                int part = MT / CLUSTER * rank;
                copy_tile_to_cluster(target + part * 128, x_map, k * KB + unit * 64, m * MT + part,
                                     bar);
#else
                copy_tile(target, x_map, k * KB + unit * 64, m * MT, bar);
#endif
            }
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
    }
}

// Codes [part][row, row + 8] of one K block, for the 16 columns this lane takes of each 64.
__device__ __forceinline__ void load_codes(const Problem& p, int row, int quad, int k,
                                           u32 (&codes)[PARTS][2]) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        int column = k * KB + part / TILES * 64 + 16 * quad;
        int group = min(column / p.group_size, p.num_groups - 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int n = min(row + part % TILES * 64 + 8 * h, p.out_features - 1);
            codes[part][h] = __ldg(p.codes + (long long)n * p.num_groups + group);
        }
    }
}

// 64 rows by 64 columns of W, as the four fragments of four steps.
__device__ __forceinline__ void convert(u32 w, int part, int row_in_tile, int quad,
                                        const u32 (&codes)[2], u32 (&a)[4][4]) {
    int chunk = (part / TILES * 4 + quad) ^ (row_in_tile & 7);
    u32 line = w + (row_in_tile + part % TILES * 64) * KB + (chunk << 4);
    uint4 upper = load16(line), lower = load16(line + 8 * KB);
    u32 upper_code = pack((float)codes[0], (float)codes[0]);
    u32 lower_code = pack((float)codes[1], (float)codes[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i][0] = multiply(to_16bit<true>(word(upper, i)), upper_code);
        a[i][1] = multiply(to_16bit<true>(word(lower, i)), lower_code);
        a[i][2] = multiply(to_16bit<false>(word(upper, i)), upper_code);
        a[i][3] = multiply(to_16bit<false>(word(lower, i)), lower_code);
    }
}

__device__ __forceinline__ void issue(u32 x, int part, const u32 (&a)[4][4],
                                      float (&acc)[TILES * ACC], bool fresh) {
    float(&mine)[ACC] = *reinterpret_cast<float(*)[ACC]>(acc + part % TILES * ACC);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 address = x + part / TILES * MT * 128 + i * 32;
        // K-major operand in 128-byte swizzled rows: eight rows make an atom of 1,024 bytes.
        u64 descriptor = (u64)((address >> 4) & 0x3fff) | (1ull << 16) | (64ull << 32) | (1ull << 62);
        wgmma(mine, a[i][0], a[i][1], a[i][2], a[i][3], descriptor,
              !(fresh && part < TILES && i == 0));
    }
    wgmma_commit();
}

// Rows `row` to row + 15 of all the tile's tokens. `acc` holds them in fragment order.
__device__ __forceinline__ void store_rows(const Problem& p, int m, int row, int lane, u32 buffer,
                                           u16* buffer_pointer, const float* acc) {
    float scale[2], offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int n = min(row + row_in_eight(lane / 4) + 8 * r, p.out_features - 1);
        scale[r] = ldexpf(1.0f, p.exponents[n]);
        offset[r] = p.bias ? to_float(p.bias[n]) : 0.0f;
    }
#pragma unroll
    for (int base = 0; base < MT; base += STORE_TOKENS) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < STORE_TOKENS / 8; ++j) {
            const float* c = acc + (base / 8 + j) * 4;
            u32 low = pack(c[0] * scale[0] + offset[0], c[1] * scale[0] + offset[0]);
            u32 high = pack(c[2] * scale[1] + offset[1], c[3] * scale[1] + offset[1]);
            u32 address = buffer + (j * 8 + lane % 8) * 32 + (lane / 8 % 2) * 16;
            asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::
                         "r"(address), "r"(low), "r"(high) : "memory");
        }
        __syncwarp();
        for (int i = lane; i < STORE_TOKENS * 2; i += 32) {
            int token = m * MT + base + i / 2, n = row + i % 2 * 8;
            if (token >= p.num_tokens) continue;
            uint4 v = *(const uint4*)(buffer_pointer + i * 8);
            uint4 ordered = {__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.z, v.w, 0x5410),
                             __byte_perm(v.x, v.y, 0x7632), __byte_perm(v.z, v.w, 0x7632)};
            u16* target = p.y + (long long)token * p.out_features + n;
            if (p.out_features % 8 == 0 && n + 8 <= p.out_features) {
                *(uint4*)target = ordered;
            } else {
                for (int e = 0; e < 8; ++e)
                    if (n + e < p.out_features) target[e] = (u16)(word(ordered, e / 2) >> e % 2 * 16);
            }
        }
    }
}

__device__ __forceinline__ void consume(const Problem& p, u32 ring, u32 full, u32 empty, u32 store,
                                        u16* store_pointer, int worker, int rank) {
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32, quad = lane % 4;
    int first_row = warp / 4 * 64 * TILES + warp % 4 * 16;
    int row_in_tile = first_row + row_in_eight(lane / 4);
    Schedule schedule(p, worker);
    Segment s;
    int stage = 0, phase = 0;
    while (schedule.pop(s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int tile_row = (n * CLUSTER + rank) * BN, row = tile_row + row_in_tile;
        float acc[TILES * ACC];
        u32 a[2][4][4], codes[PARTS][2], next_codes[PARTS][2];
        load_codes(p, row, quad, s.k_begin, codes);
        barrier_wait(full + 8 * stage, phase);
        convert(ring + stage * STAGE_BYTES, 0, row_in_tile, quad, codes[0], a[0]);
        int previous = -1;
        for (int k = s.k_begin; k < s.k_end; ++k) {
            u32 w = ring + stage * STAGE_BYTES, x = w + W_BYTES;
            issue(x, 0, a[0], acc, k == s.k_begin);
            if (k + 1 < s.k_end) load_codes(p, row, quad, k + 1, next_codes);
            wgmma_wait<1>();
            if (previous >= 0) {
                __syncwarp();
                if (lane < CLUSTER) release_stage(empty + 8 * previous, lane);
            }
#pragma unroll
            for (int part = 1; part < PARTS; ++part) {
                convert(w, part, row_in_tile, quad, codes[part], a[part % 2]);
                issue(x, part, a[part % 2], acc, k == s.k_begin);
                wgmma_wait<1>();
            }
            previous = stage;
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
            if (k + 1 < s.k_end) {
                barrier_wait(full + 8 * stage, phase);
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
                    codes[part][0] = next_codes[part][0], codes[part][1] = next_codes[part][1];
                convert(ring + stage * STAGE_BYTES, 0, row_in_tile, quad, codes[0], a[0]);
            }
        }
        wgmma_wait<0>();
        __syncwarp();
        if (lane < CLUSTER) release_stage(empty + 8 * previous, lane);
        if (s.k_begin > 0) {
            leave_partial<1, CONSUMERS>(p, worker * CLUSTER + rank, thread, acc);
            continue;
        }
        if (s.k_end < p.k_blocks)
            add_partials<1, CONSUMERS>(p, worker + 1, schedule.last_sharer(s), CLUSTER, rank, thread,
                                       acc);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            store_rows(p, m, tile_row + first_row + tile * 64, lane,
                       store + warp * STORE_TOKENS * 32, store_pointer + warp * STORE_TOKENS * 16,
                       acc + tile * ACC);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
w8a16_large(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
            const __grid_constant__ Problem p) {
    extern __shared__ u8 raw[];
    u8* base = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
    u32 ring = shared_address(base);
    u8* after = base + STAGES * STAGE_BYTES;
    u32 store = shared_address(after), full = store + 8 * STORE_TOKENS * 32, empty = full + 8 * STAGES;
    int rank = cluster_rank();
    int worker = p.num_workers - 1 - (int)(blockIdx.x / CLUSTER);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 8 * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_sync();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) produce(&w_map, &x_map, p, ring, full, empty, worker, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(p, ring, full, empty, store, (u16*)after, worker, rank);
    }
    __syncwarp();
    cluster_sync();
}

// Activations in the order of columns of hopper.cuh, their row padded with zeros to whole 64s.
extern "C" __global__ void permute_x(const u32* x, uint4* permuted, int num_tokens,
                                     int in_features) {
    int pieces = (in_features + 63) / 64 * 8;
    long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (long long)num_tokens * pieces) return;
    int token = index / pieces, piece = index % pieces;
    int half_step = piece % 8, word_index = piece / 8 * 32 + half_step;
    const u32* line = x + (long long)token * (in_features / 2);
    u32 v[4];
#pragma unroll
    for (int quad = 0; quad < 4; ++quad)
        v[quad] = word_index + 8 * quad < in_features / 2 ? line[word_index + 8 * quad] : 0;
    permuted[index] = {v[0], v[1], v[2], v[3]};
}
