// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N], many tokens
//
// The transposed product y^T = W x^T makes the weights the first operand of wgmma, which may come
// from registers: INT8 bytes travel from the file's layout in global memory through shared memory
// to registers, become 16-bit there (three instructions for two weights, four in bfloat16), and never
// exist as 16-bit in memory. A lane reads just the two bytes that each register of a fragment wants:
// more loads than hopper_small.cu makes, but x needs no other order.
//
//   warpgroup 0      producer: bulk tensor copies of W [ROWS, KB] and x [TOKENS, KB] to a ring, by
//                    a thread; the rows' codes, by a warp
//   warpgroups 1...  consumers: 64 rows of W each; half of the next 64 columns is converted while
//                    the tensor cores multiply the half before
//
// A weight enters as q * code, an integer of at most 15 bits rounded once to the 16-bit type; the
// row's power of two is applied to the float32 sum. Nothing overflows whatever the scales are.
//
// Bulk copies move rows of 64 bytes no faster than rows of 128: where reading is the limit a stage
// has KB = 128 columns, SUBS = 2 blocks of 64; where the ring would have too few stages, KB = 64.
//
// Compile-time: TOKENS and ROWS of a tile, WGS = ROWS / 64, KB, STAGES, CLUSTER, SPLIT, GROUPS
// (scales in 64 columns: 1 or 2), BF16. The launcher also generates `queue_products(acc, a, x)`.

constexpr int SUBS = KB / 64;
constexpr int W_BYTES = ROWS * KB;
constexpr int X_BYTES = TOKENS * KB * 2;
constexpr int COPIED_BYTES = W_BYTES + X_BYTES;
constexpr int CODE_PITCH = 8;  // words that hold a row's codes of a stage: at most four, at any address
constexpr int STAGE_BYTES = COPIED_BYTES + (ROWS * CODE_PITCH + 16 + 1023) / 1024 * 1024;
typedef Place<STAGE_BYTES> Here;
constexpr int STEPS = 2;
constexpr int X_BLOCK_BYTES = TOKENS * 128;
constexpr int OWN = ACC / SPLIT;
// Four warpgroups hide each other's conversions, and have no registers for another half.
constexpr int AHEAD = WGS == 4 ? 0 : 1;
constexpr int PRODUCER_REGISTERS = WGS == 2 ? 40 : 32;
constexpr int CONSUMER_REGISTERS = WGS == 2 ? 232 : 112;

// Two stored bytes and their scale, twice in `pair` -> q * code, rounded once.
__device__ __forceinline__ u32 scaled(u32 bytes, u32 selector, u32 pair) {
    u32 r;
#if BF16
    // 0x43uu is 128 + (u & 127) with bit 7 in the exponent's last place: without it, it lacks 256
    // or, where the bit was set, 128. Codes are whole numbers, so 256 times one is no less than
    // 256, and half of that is one less in the exponent: the bit's own place.
    u32 v, low;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(bytes), "r"(OFFSETS), "r"(selector));
    low = v & 0xff7fff7f;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r)
        : "r"(low), "r"(pair), "r"(pair + 0x84008400 + low - v));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(to_16bit(bytes, selector)), "r"(pair));
#endif
    return r;
}

// K blocks of 64 columns a group, as a power of two; never reached where a row has one scale.
__device__ __forceinline__ int blocks_a_group(const Problem& p) {
    return p.num_groups == 1 ? 30 : GROUPS == 2 ? 0 : 31 - __clz(p.group_size / 64);
}

// A warp brings each stage its rows' codes.
__device__ __forceinline__ void produce_codes(const Problem& p, const Block& b) {
    int shift = blocks_a_group(p);
    Here here(b);
    Segment s;
    for (Schedule schedule(p, b.worker); next_run(schedule, b, s);) {
        int m, n;
        tile_position(p, s.tile, m, n);
        CodeCopies<ROWS, CODE_PITCH> codes(p, first_row(p, b, n), threadIdx.x % 32);
        for (int k = s.k_begin * SUBS; k < s.k_end * SUBS; k += SUBS, here.advance()) {
            int end = ((k + SUBS - 1 >> shift) + 1) * GROUPS;
            barrier_wait(here.empty(), here.phase ^ 1);
            codes.copy(here.stage + COPIED_BYTES, (k >> shift) * GROUPS, min(end, p.num_groups));
            arrive_when_copied(here.full());
        }
    }
}

// The scales of a lane's two rows for the columns being converted, ready to multiply.
struct Scales {
    u32 begin[2], line, pairs[GROUPS][2];
    int shift;

    // `row` of W is `row_in_tile` of the tile; K block k comes first, at the beginning of its stage.
    __device__ __forceinline__ Scales(const Problem& p, u32 stage, int row, int row_in_tile, int k) {
        shift = blocks_a_group(p);
        line = COPIED_BYTES + row_in_tile * CODE_PITCH;
        for (int h = 0; h < 2; ++h)  // where the row's codes begin in memory, from a whole word on
            begin[h] = first_byte(p.codes + (long long)min(row + 8 * h, p.out_features - 1) * p.num_groups);
        take(p, stage, k, k);
    }
    // Those of K block k, of a stage that begins with K block `first`.
    __device__ __forceinline__ void take(const Problem& p, u32 stage, int k, int first) {
        int group = (k >> shift) * GROUPS, from = (first >> shift) * GROUPS;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                int at = min(group + g, p.num_groups - 1) - from + (begin[h] + from & 3);
                float code = (float)load_byte(stage + line + h * 8 * CODE_PITCH + at);
                pairs[g][h] = pack(code, code);
            }
    }
    // K block k comes next, the SUB-th of its stage.
    template <int SUB> __device__ __forceinline__ void reach(const Problem& p, u32 stage, int k) {
        if (k >> shift << shift == k) take(p, stage, k, k - SUB);
    }
};

// The pairs of bytes that a lane's fragments of 32 columns want: [step][register]; the fragments.
typedef u32 Raw[STEPS][4];
typedef u32 Fragments[STEPS][4];

__device__ __forceinline__ u32 byte_pair(u32 address) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

// What a consumer carries from block to block: its place in the ring, its lane's place in a stage,
// and the stage that is read but not yet released.
struct Consumer {
    Here here;
    u32 line, held, selector;
    int lane;

    // Read half HALF of block SUB of the stage.
    template <int SUB, int HALF> __device__ __forceinline__ void read(Raw& raw) const {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            u32 address = here.stage + line ^ (SUB * 4 + HALF * STEPS + step) << 4;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                raw[step][i] = byte_pair(address + i % 2 * 8 * KB + i / 2 * 8);
        }
    }
    template <int HALF>
    __device__ __forceinline__ void convert(const Raw& raw, const Scales& scales,
                                            Fragments& a) const {
        const u32* pair = scales.pairs[HALF * (GROUPS - 1)];
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                a[step][i] = scaled(raw[step][i], selector, pair[i % 2]);
    }
    // Where the descriptor of half HALF of block SUB of the stage's x begins.
    template <int SUB, int HALF> __device__ __forceinline__ u32 x() const {
        constexpr int AT = W_BYTES + SUB * X_BLOCK_BYTES;
        return (here.stage >> 4) + (AT / 16 + DESCRIPTOR_LOW + HALF * STEPS * 2);
    }
    __device__ __forceinline__ void leave_stage() {
        held = here.stage;
        here.advance();
    }
    __device__ __forceinline__ void release() {
        if (held) release_stage(held + STAGE_BYTES - 8, lane);
        held = 0;
    }
};

// Multiply the first half of block SUB of a stage from `a`; meanwhile fill `next` for the second.
template <int SUB>
__device__ __forceinline__ void multiply_first(Consumer& c, const Scales& scales,
                                               const Fragments& a, Fragments& next,
                                               float (&acc)[ACC]) {
    queue_products(acc, a, c.x<SUB, 0>());
    Raw raw;
    c.read<SUB, 1>(raw);
    wgmma_wait<AHEAD>();
    c.release();
    c.convert<1>(raw, scales, next);
}

// Multiply the second half of block SUB, the k-th of K, from `a`; meanwhile fill `next` for the
// block after it.
template <int SUB>
__device__ __forceinline__ void multiply_second(const Problem& p, Consumer& c, Scales& scales,
                                                int k, const Fragments& a, Fragments& next,
                                                float (&acc)[ACC]) {
    constexpr bool LAST = SUB == SUBS - 1;
    queue_products(acc, a, c.x<SUB, 1>());
    if (LAST) c.leave_stage();
    Raw raw;
    if (LAST) barrier_wait(c.here.full(), c.here.phase);
    scales.reach<LAST ? 0 : SUB + 1>(p, c.here.stage, k + 1);
    c.read<LAST ? 0 : SUB + 1, 0>(raw);
    wgmma_wait<AHEAD>();
    c.convert<0>(raw, scales, next);
}

// Each block of a cluster collects, in the order of the blocks, the sums of its own part of the
// tokens. The ring has done its work by then and takes what the others send. All threads of the
// cluster meet twice in here; those that do not multiply call `meet_collectors`.
__device__ __forceinline__ void collect(const Block& b, int thread, const float (&sums)[ACC],
                                        float (&own)[OWN]) {
    cluster_sync();
#pragma unroll
    for (int i = 0; i < ACC; i += 4) {
        u32 remote, local = b.ring + ((b.rank * OWN + i % OWN) / 4 * CONSUMERS + thread) * 16;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(i / OWN));
        asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote),
                     "f"(sums[i]), "f"(sums[i + 1]), "f"(sums[i + 2]), "f"(sums[i + 3])
                     : "memory");
    }
    cluster_sync();
#pragma unroll
    for (int i = 0; i < OWN; ++i) own[i] = 0.0f;
    for (int rank = 0; rank < SPLIT; ++rank) {
#pragma unroll
        for (int i = 0; i < OWN; i += 4) {
            uint4 v = load16(b.ring + ((rank * OWN + i) / 4 * CONSUMERS + thread) * 16);
            own[i] += __uint_as_float(v.x);
            own[i + 1] += __uint_as_float(v.y);
            own[i + 2] += __uint_as_float(v.z);
            own[i + 3] += __uint_as_float(v.w);
        }
    }
}
__device__ __forceinline__ void meet_collectors() {
#if SPLIT > 1
    __syncwarp();
    cluster_sync();
    cluster_sync();
#endif
}

// What becomes of a run's sums: collected by the cluster, or left for the block that starts the
// tile, or made whole; and stored.
__device__ __forceinline__ void finish_run(const Problem& p, const Block& b,
                                           const Schedule& schedule, const Segment& s, int m,
                                           int warp_row, int thread, int lane,
                                           const RowEnds<2>& ends, float (&sums)[ACC]) {
    u16* buffer = b.buffers + thread / 32 * (STORE_BYTES / 2);
    bool has_rows = thread / 32 * 16 < p.tile_rows;
#if SPLIT > 1
    float own[OWN];
    collect(b, thread, sums, own);
    if (has_rows)
        store_rows(p, m * TOKENS + b.rank * (OWN * 2), warp_row, lane, ends, buffer, own);
#else
    if (finish_shared(p, b, schedule, s, thread, sums) && has_rows)
        store_rows(p, m * TOKENS, warp_row, lane, ends, buffer, sums);
#endif
}

// The selector as a number in a register: the compiler would load a constant each time.
__device__ __forceinline__ u32 kept_selector(u16* buffer, int lane) {
    volatile u32* mine = (u32*)buffer + lane;
    *mine = LOW_BYTES;
    return *mine;
}

__device__ __forceinline__ void consume(const Problem& p, const Block& b) {
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    int row_in_tile = warp * 16 + lane / 4;
    u32 swizzle = KB == 64 ? row_in_tile >> 1 & 3 : row_in_tile & 7;
    u32 line = row_in_tile * KB + lane % 4 * 2 + swizzle * 16;
    u32 selector = kept_selector(b.buffers + warp * (STORE_BYTES / 2), lane);
    Consumer c = {Here(b), line, 0, selector, lane};
    Schedule schedule(p, b.worker);
    Segment s;
    while (next_run(schedule, b, s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int tile_row = first_row(p, b, n);
        float acc[ACC];
#pragma unroll
        for (int i = 0; i < ACC; ++i) acc[i] = 0.0f;
        Fragments first, other;
        Fragments& second = AHEAD ? other : first;
        Raw raw;
#if SPLIT > 1  // by measurement: 4 to 7 % of such products, but nothing or a loss in other forms
        StoredRowEnds<2> ends(p, tile_row + row_in_tile);
#endif
        barrier_wait(c.here.full(), c.here.phase);
        Scales scales(p, c.here.stage, tile_row + row_in_tile, row_in_tile, s.k_begin * SUBS);
        c.read<0, 0>(raw);
        c.convert<0>(raw, scales, first);
        for (int k = s.k_begin; k + 1 < s.k_end; ++k) {
            multiply_first<0>(c, scales, first, second, acc);
            multiply_second<0>(p, c, scales, k * SUBS, second, first, acc);
            if (SUBS == 1) continue;
            multiply_first<1>(c, scales, first, second, acc);
            multiply_second<1>(p, c, scales, k * SUBS + 1, second, first, acc);
        }
        multiply_first<0>(c, scales, first, second, acc);
        if (SUBS == 2) {
            multiply_second<0>(p, c, scales, s.k_end * SUBS - 2, second, first, acc);
            multiply_first<1>(c, scales, first, second, acc);
        }
        queue_products(acc, second, c.x<SUBS - 1, 1>());
        c.leave_stage();
#if SPLIT == 1
        RowEnds<2> ends(p, tile_row + row_in_tile);
#endif
        wgmma_wait<0>();
        c.release();
        finish_run(p, b, schedule, s, m, tile_row + warp * 16, thread, lane, ends, acc);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
#if CLUSTER * SPLIT > 1
__cluster_dims__(CLUSTER * SPLIT, 1, 1)
#endif
w8a16_large(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
            const __grid_constant__ Problem p) {
    extern __shared__ u8 raw[];
    Block block = begin_block<STAGE_BYTES, 1 + 32>(p, raw);
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        auto copy = [&](u32 stage, int m, int k, u32 bar) {
#pragma unroll
            for (int sub = 0; sub < SUBS; ++sub)
                copy_x(stage + W_BYTES + sub * X_BLOCK_BYTES, &x_map, k * KB + sub * 64, m * TOKENS,
                       block.rank, bar);
        };
        if (threadIdx.x == 0) produce<KB, 1, STAGE_BYTES, COPIED_BYTES>(&w_map, p, block, copy);
        if (threadIdx.x >= 96) produce_codes(p, block);
        meet_collectors();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(p, block);
    }
    __syncwarp();
    cluster_sync();
}
