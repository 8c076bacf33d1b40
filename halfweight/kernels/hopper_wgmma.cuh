// What the kernels for many tokens share: tiles of BN rows of W by MT tokens whose products wgmma
// sums, one warpgroup for each 64 rows; the two blocks of a cluster take neighbouring rows of W and
// each fetches half of the x that both multiply.
//
// Compile-time: MT tokens a tile, WGS consumer warpgroups, STAGES of the ring, CLUSTER (1 or 2).

constexpr int BN = 64 * WGS;
constexpr int ACC = MT / 2;
constexpr int CONSUMERS = 128 * WGS;
constexpr int STORE_TOKENS = MT < 32 ? MT : 32;
constexpr int PRODUCER_REGISTERS = WGS == 2 ? 40 : WGS == 3 ? 32 : 24;
constexpr int CONSUMER_REGISTERS = WGS == 2 ? 232 : WGS == 3 ? 160 : 112;

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

// A K-major operand in 128-byte swizzled rows: eight rows make an atom of 1,024 bytes.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address >> 4) & 0x3fff) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// Tiles in columns of 8 token tiles, so that the workers of one wave share x and W in L2.
__device__ __forceinline__ void tile_position(const Problem& p, int tile, int& m, int& n) {
    int column = tile / (8 * p.tiles_n);
    int height = min(8, p.tiles_m - column * 8);
    int inside = tile - column * 8 * p.tiles_n;
    m = column * 8 + inside % height;
    n = inside / height;
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

// The ring of stages of a block and its place in the grid.
struct Block {
    u32 ring, full, empty;
    u16* buffers;
    int worker, rank;
};

template <int STAGE_BYTES> __device__ __forceinline__ Block begin_block(const Problem& p, u8* raw) {
    u8* base = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
    u8* after = base + STAGES * STAGE_BYTES;
    u32 full = shared_address(after) + 4 * WGS * STORE_TOKENS * 64;
    int worker = p.num_workers - 1 - (int)(blockIdx.x / CLUSTER);
    Block b = {shared_address(base), full, full + 8 * STAGES, (u16*)after, worker, (int)cluster_rank()};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(b.full + 8 * i, 1);
            barrier_init(b.empty + 8 * i, 4 * WGS * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    let_next_kernel_start();
    __syncthreads();
    cluster_sync();
    return b;
}

// What becomes of a run's sums: left for the block that starts the tile, or made whole and stored.
__device__ __forceinline__ void finish_run(const Problem& p, const Block& b,
                                           const Schedule& schedule, const Segment& s, int m,
                                           int warp_row, int thread, int lane, const RowEnds& ends,
                                           float (&sums)[ACC]) {
    if (s.k_begin > 0) {
        leave_partial<1, CONSUMERS>(p, b.worker * CLUSTER + b.rank, thread, sums);
        return;
    }
    if (s.k_end < p.k_blocks)
        add_partials<1, CONSUMERS>(p, b.worker + 1, schedule.last_sharer(s), CLUSTER, b.rank, thread,
                                   sums);
    store_rows(p, m, warp_row, lane, ends, b.buffers + thread / 32 * STORE_TOKENS * 32, sums);
}

// One thread feeds the ring: rows of W by bulk copies, activations by `copy_activations(stage's
// address, m, k, barrier)`. Weights are nobody's output: those of the first stages are asked for
// before the kernel ahead of this one has ended.
template <int KB, int STAGE_BYTES, typename Copy>
__device__ __forceinline__ void produce(const TensorMap* w_map, const Problem& p, const Block& b,
                                        Copy copy_activations) {
    auto copy_weights = [&](int stage, int n, int k) {
        barrier_expect(b.full + 8 * stage, STAGE_BYTES);
        copy_tile(b.ring + stage * STAGE_BYTES, w_map, k * KB, (n * CLUSTER + b.rank) * BN,
                  b.full + 8 * stage);
    };
    Segment s;
    int m, n, early = 0;
    for (Schedule first(p, b.worker); early < STAGES && first.pop(s);) {
        tile_position(p, s.tile, m, n);
        for (int k = s.k_begin; k < s.k_end && early < STAGES; ++k) copy_weights(early++, n, k);
    }
    wait_for_previous_kernel();
    int stage = 0, phase = 0;
    for (Schedule schedule(p, b.worker); schedule.pop(s);) {
        tile_position(p, s.tile, m, n);
        for (int k = s.k_begin; k < s.k_end; ++k) {
            if (early > 0) {
                --early;
            } else {
                barrier_wait(b.empty + 8 * stage, phase ^ 1);
                copy_weights(stage, n, k);
            }
            copy_activations(b.ring + stage * STAGE_BYTES, m, k, b.full + 8 * stage);
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
    }
}
