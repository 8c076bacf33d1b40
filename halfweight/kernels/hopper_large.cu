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

constexpr int KB = 64;
constexpr int W_BYTES = BN * KB;
constexpr int X_BYTES = MT * KB * 2;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES;

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

template <int STEP>
__device__ __forceinline__ void convert(const Raw& raw, const u32 (&codes)[GROUPS][2],
                                        u32 (&a)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        a[STEP][i] = multiply(to_16bit<true>(raw[STEP][i]), codes[STEP * GROUPS / 4][i % 2]);
}

// Queue the products of steps [BEGIN, END) of a K block; a step is 16 columns.
template <int BEGIN, int END>
__device__ __forceinline__ void issue(u32 x, const u32 (&a)[4][4], float (&acc)[ACC], bool fresh) {
    wgmma_fence();
#pragma unroll
    for (int i = BEGIN; i < END; ++i)
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

// Multiply one K block from `a`; while the tensor cores do, fill `next` for the block after it. With
// small tiles all steps are queued at once; with large ones a step lasts as long as a conversion.
__device__ __forceinline__ void step_block(Cursor& c, const Segment& s, int k, u32 line,
                                           u32 swizzle, int lane, u32 (&codes)[GROUPS][2],
                                           const u32 (&a)[4][4], u32 (&next)[4][4],
                                           float (&acc)[ACC]) {
    constexpr int FIRST = MT < 256 ? 4 : 1;
    u32 x = c.ring + c.stage * STAGE_BYTES + W_BYTES;
    int previous = c.stage == 0 ? STAGES - 1 : c.stage - 1;
    issue<0, FIRST>(x, a, acc, k == s.k_begin);
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
    convert<0>(raw, pairs, next);
    if (FIRST < 2) issue<1, 2>(x, a, acc, false);
    convert<1>(raw, pairs, next);
    if (FIRST < 2) issue<2, 3>(x, a, acc, false);
    convert<2>(raw, pairs, next);
    if (FIRST < 2) issue<3, 4>(x, a, acc, false);
    convert<3>(raw, pairs, next);
}

__device__ __forceinline__ void consume(const Problem& p, const Block& b) {
    int group_shift = p.num_groups == 1 ? 31 : 31 - __clz(p.group_size);
    Cursor c = {b.ring, b.full, b.empty, {}, group_shift, p.num_groups - 1, 0, 0};
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    int row_in_tile = warp * 16 + lane / 4;
    u32 line = row_in_tile * KB + lane % 4 * 2, swizzle = (row_in_tile >> 1 & 3) << 4;
    Schedule schedule(p, b.worker);
    Segment s;
    while (schedule.pop(s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int tile_row = (n * CLUSTER + b.rank) * BN;
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
        convert<0>(raw, pairs, even);
        convert<1>(raw, pairs, even);
        convert<2>(raw, pairs, even);
        convert<3>(raw, pairs, even);
        c.load_codes(s.k_begin + 1, codes);
        for (int k = s.k_begin; k < s.k_end; k += 2) {
            step_block(c, s, k, line, swizzle, lane, codes, even, odd, acc);
            if (k + 1 == s.k_end) break;
            step_block(c, s, k + 1, line, swizzle, lane, codes, odd, even, acc);
        }
        RowEnds ends = load_row_ends(p, tile_row + row_in_tile);
        wgmma_wait<0>();
        __syncwarp();
        release_stage(c.empty + 8 * (c.stage == 0 ? STAGES - 1 : c.stage - 1), lane);
        finish_run(p, b, schedule, s, m, tile_row + warp * 16, thread, lane, ends, acc);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
w8a16_large(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
            const __grid_constant__ Problem p) {
    extern __shared__ u8 raw[];
    Block block = begin_block<STAGE_BYTES>(p, raw);
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        auto copy = [&](u32 stage, int m, int k, u32 bar) {
            copy_x(stage + W_BYTES, &x_map, k * KB, m * MT, block.rank, bar);
        };
        if (threadIdx.x == 0) produce<KB, STAGE_BYTES>(&w_map, p, block, copy);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(p, block);
    }
    __syncwarp();
    cluster_sync();
}
