// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N], M > 64
//
// The transposed product y^T = W x^T makes the weights the first operand of wgmma, which may come
// from registers: INT8 bytes travel from the file's layout in global memory through shared memory
// to registers, become 16-bit there (three instructions for two weights), and never exist as 16-bit
// in memory. A lane reads just the two bytes that each register of a fragment wants: more loads than
// hopper_small.cu makes, but they hide behind the tensor cores, and x needs no other order.
//
//   warpgroup 0      producer: bulk tensor copies of W [ROWS, KB] bytes and x [TOKENS, KB] into a ring
//   warpgroups 1...  consumers: 64 rows of W each; the next STEPS steps of 16 columns are converted
//                    while the tensor cores multiply these
//
// A weight enters as q * code, an integer of at most 15 bits rounded once to the 16-bit type; the
// row's power of two is applied to the float32 sum. Nothing overflows whatever the scales are.
//
// Compile-time: TOKENS and ROWS of a tile, WGS = ROWS / 64, STAGES, CLUSTER, SPLIT, STEPS (2 or 4, of
// the 4 in a K block), GROUPS (scales in 64 columns: 1 or 2), BF16. The launcher also generates `wgmma(acc, a0..a3, descriptor,
// accumulate)`.

constexpr int KB = 64;
constexpr int W_BYTES = ROWS * KB;
constexpr int X_BYTES = TOKENS * KB * 2;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int PIECES = 4 / STEPS;

__device__ __forceinline__ u32 multiply(u32 a, u32 b) {
    u32 r;
#if BF16
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#endif
    return r;
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

// The pairs of bytes that a lane's fragments of a piece want: [step][register]; and the fragments.
typedef u32 Raw[STEPS][4];
typedef u32 Fragments[STEPS][4];

__device__ __forceinline__ u32 byte_pair(u32 address) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

// Read piece PIECE of the stage. `line` is the lane's row and pair, `swizzle` its row's.
template <int PIECE>
__device__ __forceinline__ void read_piece(const Cursor& c, u32 line, u32 swizzle, Raw& raw) {
    u32 address = c.ring + c.stage * STAGE_BYTES + line;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            raw[step][i] = byte_pair(address + (((PIECE * STEPS + step) << 4) ^ swizzle) +
                                     i % 2 * 8 * KB + i / 2 * 8);
}

template <int PIECE>
__device__ __forceinline__ void convert(const Raw& raw, const u32 (&codes)[GROUPS][2], Fragments& a) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[step][i] = multiply(to_16bit<true>(raw[step][i]),
                                  codes[(PIECE * STEPS + step) * GROUPS / 4][i % 2]);
}

// Queue the products of a piece with its columns of x.
__device__ __forceinline__ void issue(u32 x, const Fragments& a, float (&acc)[ACC], bool fresh) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
        wgmma(acc, a[i][0], a[i][1], a[i][2], a[i][3], descriptor(x + i * 32), i > 0 || !fresh);
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

// Multiply piece PIECE of K block k from `a`; while the tensor cores do, fill `next` for the piece
// after it, if this run has one.
template <int PIECE>
__device__ __forceinline__ void multiply_piece(Cursor& c, const Segment& s, int k, u32 line,
                                               u32 swizzle, int lane, u32 (&codes)[GROUPS][2],
                                               u32 (&pairs)[GROUPS][2], const Fragments& a,
                                               Fragments& next, float (&acc)[ACC]) {
    constexpr int NEXT = (PIECE + 1) % PIECES;
    int previous = c.stage == 0 ? STAGES - 1 : c.stage - 1;
    issue(c.ring + c.stage * STAGE_BYTES + W_BYTES + PIECE * STEPS * 32, a, acc,
          PIECE == 0 && k == s.k_begin);
    Raw raw = {};
    if (NEXT == 0) {
        c.advance();
        to_pairs(codes, pairs);
        if (k + 1 < s.k_end) {
            barrier_wait(c.full + 8 * c.stage, c.phase);
            read_piece<NEXT>(c, line, swizzle, raw);
        }
        c.load_codes(k + 2, codes);
    } else {
        read_piece<NEXT>(c, line, swizzle, raw);
    }
    wgmma_wait<1>();
    if (PIECE == 0 && k > s.k_begin) {
        __syncwarp();
        release_stage(c.empty + 8 * previous, lane);
    }
    convert<NEXT>(raw, pairs, next);
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

// Rows `row` to row + 15 of COUNT * 2 tokens, turned to rows of y in two buffers of the warp.
template <int COUNT>
__device__ __forceinline__ void store_rows(const Problem& p, int first_token, int row, int lane,
                                           const RowEnds& ends, u16* buffers,
                                           const float (&sums)[COUNT]) {
    constexpr int CHUNK = COUNT < 16 ? COUNT * 2 : 32;
    bool whole = p.out_features % 8 == 0;
#pragma unroll
    for (int base = 0; base < COUNT * 2; base += CHUNK) {
        u16* buffer = buffers + base / CHUNK % 2 * CHUNK * 16;
        u32 address = shared_address(buffer) + lane % 8 * 32 + lane / 8 % 2 * 16;
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j) {
            const float* c = sums + (base / 8 + j) * 4;
            u32 low = pack(c[0] * ends.scale[0] + ends.offset[0], c[1] * ends.scale[0] + ends.offset[0]);
            u32 high = pack(c[2] * ends.scale[1] + ends.offset[1], c[3] * ends.scale[1] + ends.offset[1]);
            asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::
                         "r"(address + j * 256), "r"(low), "r"(high) : "memory");
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
    }
}

// What becomes of a run's sums: collected by the cluster, or left for the block that starts the
// tile, or made whole; and stored.
__device__ __forceinline__ void finish_run(const Problem& p, const Block& b,
                                           const Schedule& schedule, const Segment& s, int m,
                                           int warp_row, int thread, int lane, const RowEnds& ends,
                                           float (&sums)[ACC]) {
    u16* buffers = b.buffers + thread / 32 * (STORE_BYTES / 2);
    bool has_rows = thread / 32 * 16 < p.tile_rows;
#if SPLIT > 1
    float own[OWN];
    collect(b, thread, sums, own);
    if (has_rows)
        store_rows(p, m * TOKENS + b.rank * (OWN * 2), warp_row, lane, ends, buffers, own);
#else
    if (finish_shared(p, b, schedule, s, thread, sums) && has_rows)
        store_rows(p, m * TOKENS, warp_row, lane, ends, buffers, sums);
#endif
}

__device__ __forceinline__ void consume(const Problem& p, const Block& b) {
    int group_shift = p.num_groups == 1 ? 31 : 31 - __clz(p.group_size);
    Cursor c = {b.ring, b.full, b.empty, {}, group_shift, p.num_groups - 1, 0, 0};
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    int row_in_tile = warp * 16 + lane / 4;
    u32 line = row_in_tile * KB + lane % 4 * 2, swizzle = (row_in_tile >> 1 & 3) << 4;
    Schedule schedule(p, b.worker);
    Segment s;
    while (next_run(schedule, b, s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int tile_row = first_row(p, b, n);
        float acc[ACC];
        Fragments even, odd;
        Raw raw;
        u32 codes[GROUPS][2], pairs[GROUPS][2];
        for (int h = 0; h < 2; ++h) {
            int row = min(tile_row + row_in_tile + 8 * h, p.out_features - 1);
            c.codes[h] = p.codes + (long long)row * p.num_groups;
        }
        c.load_codes(s.k_begin, codes);
        barrier_wait(c.full + 8 * c.stage, c.phase);
        read_piece<0>(c, line, swizzle, raw);
        to_pairs(codes, pairs);
        convert<0>(raw, pairs, even);
        c.load_codes(s.k_begin + 1, codes);
        for (int k = s.k_begin; k < s.k_end; k += 2 / PIECES) {
            multiply_piece<0>(c, s, k, line, swizzle, lane, codes, pairs, even, odd, acc);
            int second = k + (PIECES == 1);
            if (second == s.k_end) break;
            multiply_piece<PIECES - 1>(c, s, second, line, swizzle, lane, codes, pairs, odd, even, acc);
        }
        RowEnds ends = load_row_ends(p, tile_row + row_in_tile);
        wgmma_wait<0>();
        __syncwarp();
        release_stage(c.empty + 8 * (c.stage == 0 ? STAGES - 1 : c.stage - 1), lane);
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
    Block block = begin_block<STAGE_BYTES, 1>(p, raw);
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        auto copy = [&](u32 stage, int m, int k, u32 bar) {
            copy_x(stage + W_BYTES, &x_map, k * KB, m * TOKENS, block.rank, bar);
        };
        if (threadIdx.x == 0) produce<KB, STAGE_BYTES, STAGE_BYTES>(&w_map, p, block, copy);
        meet_collectors();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(p, block);
    }
    __syncwarp();
    cluster_sync();
}
