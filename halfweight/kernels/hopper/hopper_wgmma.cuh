// What the kernels for many tokens share: tiles of at most ROWS rows of W by TOKENS tokens whose
// products wgmma sums, a warpgroup for each 64 rows. The warpgroups always multiply the whole tile:
// where it has only `tile_rows` rows, so that tiles fill whole waves, the sums of the rest go
// nowhere.
//
// The blocks of a cluster either take neighbouring rows of W and fetch each a part of the x that
// all multiply (CLUSTER), or take one tile together, each a part of K (SPLIT).
//
// Compile-time: TOKENS, ROWS, WGS consumer warpgroups (2 to 4), STAGES of the ring, CLUSTER and
// SPLIT (1 or 2; one of them is 1).

constexpr int ACC = TOKENS * ROWS / (128 * WGS);
constexpr int CONSUMERS = 128 * WGS;
constexpr int STORE_BYTES = 1024;

// All lanes of the warp have read the stage.
__device__ __forceinline__ void release_stage(u32 bar, int lane) {
    __syncwarp();
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
#if CLUSTER * SPLIT > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
                 ::: "memory");
#else
    __syncthreads();
#endif
}
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank = 0;
#if CLUSTER * SPLIT > 1
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}
__device__ __forceinline__ void copy_x(u32 dst, const TensorMap* map, int column, int token,
                                       int rank, u32 bar) {
#if CLUSTER > 1
    constexpr int SHARE = TOKENS / CLUSTER;
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst + rank * SHARE * 128),
        "l"(map), "r"(column), "r"(token + rank * SHARE), "r"(bar), "h"((u16)((1 << CLUSTER) - 1))
        : "memory");
#else
    copy_tile(dst, map, column, token, bar);
#endif
}

// A K-major operand in 128-byte swizzled rows: eight rows make an atom of 1,024 bytes. The low word
// of its descriptor also has the address / 16, the high word is always the same.
constexpr u32 DESCRIPTOR_LOW = 1 << 16;

// Tiles in columns of 8 token tiles, so that the workers of one wave share x and W in L2.
constexpr int COLUMN = 8;
__device__ __forceinline__ void tile_position(const Problem& p, int tile, int& m, int& n) {
    int column = tile / (COLUMN * p.tiles_n);
    int height = min(COLUMN, p.tiles_m - column * COLUMN);
    int inside = tile - column * COLUMN * p.tiles_n;
    m = column * COLUMN + inside % height;
    n = inside / height;
}

// The ring of stages of a block and its place in the grid. A stage ends with its two barriers: full
// when what was asked for has been copied, empty when all consuming warps have read it.
struct Block {
    u32 ring;
    u16* buffers;
    int worker, rank;
};

// A place in the ring.
template <int STAGE_BYTES> struct Place {
    u32 stage;
    int left, phase;

    __device__ explicit Place(const Block& b) : stage(b.ring), left(STAGES), phase(0) {}
    __device__ __forceinline__ u32 full() const { return stage + STAGE_BYTES - 16; }
    __device__ __forceinline__ u32 empty() const { return stage + STAGE_BYTES - 8; }
    __device__ __forceinline__ void advance() {
        stage += STAGE_BYTES;
        if (--left == 0) {
            stage -= STAGES * STAGE_BYTES;
            left = STAGES;
            phase ^= 1;
        }
    }
};

// A stage is full when so many have arrived: who asks for its tiles, and the lanes that bring words.
template <int STAGE_BYTES, int ARRIVALS>
__device__ __forceinline__ Block begin_block(const Problem& p, u8* raw) {
    u8* base = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
    int worker = p.num_workers - 1 - (int)(blockIdx.x / (CLUSTER * SPLIT));
    u16* buffers = (u16*)(base + STAGES * STAGE_BYTES);
    Block b = {shared_address(base), buffers, worker, (int)cluster_rank()};
    if (threadIdx.x == 0) {
        Place<STAGE_BYTES> place(b);
        for (int i = 0; i < STAGES; ++i, place.advance()) {
            barrier_init(place.full(), ARRIVALS);
            barrier_init(place.empty(), 4 * WGS * CLUSTER);
        }
        barriers_are_there();
    }
    let_next_kernel_start();
    __syncthreads();
    cluster_sync();
    return b;
}

// The next run of this block: of a tile that the cluster splits, its own part of K.
__device__ __forceinline__ bool next_run(Schedule& schedule, const Block& b, Segment& s) {
    if (!schedule.pop(s)) return false;
#if SPLIT > 1
    s.k_begin = schedule.p.k_blocks * b.rank / SPLIT;
    s.k_end = schedule.p.k_blocks * (b.rank + 1) / SPLIT;
#endif
    return true;
}

// The first row of W of a tile.
__device__ __forceinline__ int first_row(const Problem& p, const Block& b, int n) {
    return (CLUSTER > 1 ? n * CLUSTER + b.rank : n) * p.tile_rows;
}

// What becomes of the sums of a run that has only a part of its tile's K: left for the block that
// starts the tile, or made whole by that. False if there is nothing left to store.
__device__ __forceinline__ bool finish_shared(const Problem& p, const Block& b,
                                              const Schedule& schedule, const Segment& s,
                                              int thread, float (&sums)[ACC]) {
    if (s.k_begin > 0) {
        leave_partial<1, CONSUMERS>(p, b.worker * CLUSTER + b.rank, thread, sums);
        return false;
    }
    if (s.k_end < p.k_blocks)
        add_partials<1, CONSUMERS>(p, b.worker + 1, schedule.last_sharer(s), CLUSTER, b.rank,
                                   thread, sums);
    return true;
}

// Rows `row` to row + 15 of COUNT * 2 tokens, turned to rows of y in the warp's buffer.
template <int COUNT>
__device__ __forceinline__ void store_rows(const Problem& p, int first_token, int row, int lane,
                                           const RowEnds<2>& ends, u16* buffer,
                                           const float (&sums)[COUNT]) {
    constexpr int CHUNK = COUNT < 16 ? COUNT * 2 : COUNT % 16 ? 16 : 32;
    bool whole = p.out_features % 8 == 0;
    u32 address = shared_address(buffer) + lane % 8 * 32 + lane / 8 % 2 * 16;
#pragma unroll
    for (int base = 0; base < COUNT * 2; base += CHUNK) {
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j) {
            float v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                v[i] = sums[(base / 8 + j) * 4 + i] * ends.scale[i / 2] + ends.offset[i / 2];
            u32 low = pack(v[0], v[1]), high = pack(v[2], v[3]);
            store_turned(address + j * 256, low, high);
        }
        __syncwarp();
#pragma unroll
        for (int i = lane; i < CHUNK * 2; i += 32) {
            int token = first_token + base + i / 2, n = row + i % 2 * 8;
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
        __syncwarp();
    }
}

// One thread feeds the ring: rows of W by bulk copies, activations by `copy_activations(stage's
// address, m, k, barrier)`; COPIED_BYTES in all for a tile of ROWS. A K block of the schedule is
// PER_BLOCK stages. Weights are nobody's output: those of the first stages are asked for before the
// kernel ahead of this one has ended.
template <int COLUMNS, int PER_BLOCK, int STAGE_BYTES, int COPIED_BYTES, typename Copy>
__device__ __forceinline__ void produce(const TensorMap* w_map, const Problem& p, const Block& b,
                                        Copy copy_activations) {
    auto copy_weights = [&](const Place<STAGE_BYTES>& place, int n, int k) {
        barrier_expect(place.full(), COPIED_BYTES - (ROWS - p.tile_rows) * COLUMNS);
        copy_tile(place.stage, w_map, k * COLUMNS, first_row(p, b, n), place.full());
    };
    Segment s;
    int m, n, early = 0;
    Place<STAGE_BYTES> place(b);
    for (Schedule first(p, b.worker); early < STAGES && next_run(first, b, s);) {
        tile_position(p, s.tile, m, n);
        for (int k = s.k_begin * PER_BLOCK; k < s.k_end * PER_BLOCK && early < STAGES;
             ++k, ++early, place.advance())
            copy_weights(place, n, k);
    }
    wait_for_previous_kernel();
    place = Place<STAGE_BYTES>(b);
    for (Schedule schedule(p, b.worker); next_run(schedule, b, s);) {
        tile_position(p, s.tile, m, n);
        for (int k = s.k_begin * PER_BLOCK; k < s.k_end * PER_BLOCK; ++k, place.advance()) {
            if (early > 0) {
                --early;
            } else {
                barrier_wait(place.empty(), place.phase ^ 1);
                copy_weights(place, n, k);
            }
            copy_activations(place.stage, m, k, place.full());
        }
    }
}
