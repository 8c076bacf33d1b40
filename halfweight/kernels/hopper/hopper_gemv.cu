// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N], M = 1 or 2
//
// Reading the weights must be the whole cost, and memory gives most when a copy is many whole rows of
// W, one behind the other: a stage of the ring is ROWS rows, one copy. No tensor core wants bytes in
// that order, but integer dot products of four bytes do. So a thread keeps its columns of x for the
// life of the block, 16 at a time as two bytes a number, x = s (h + l / 254) with s for these 16, which
// keeps 16 bits of x beside the largest of them: 254 h.q + l.q is exact in 32 bits, and meets the step
// and the group's code in float32. Warps turn their lanes' sums of ROWS rows into one a lane, and meet
// once a stage in shared memory.
//
//   last warp      producer; weights are nobody's output, so it does not wait for the kernel ahead
//   eight warps    consumers: thread i has the columns 16 (i + 256 s), s < SEGMENTS
//
// Compile-time: TOKENS (M), SEGMENTS, ROWS, BF16.

struct Operands {
    const u8* packed;
    const u16* x;
    const u8* codes;
    const signed char* exponents;
    const u16* bias;
    u16* y;
    int out_features, in_features, num_groups, group_shift, num_workers, stages;
};

constexpr int WARPS = 8, CONSUMERS = 32 * WARPS;
constexpr int SUMS = ROWS * TOKENS;      // of a stage
constexpr float INTEGERS = 12582912.0f;  // 1.5 2^23: adding it leaves an integer in the low bits

// Where things lie in shared memory; of a stage, where its rows' codes and ends begin.
struct Places {
    u32 ring, full, empty, sums;
    int codes_at, exponents_at, biases_at, stage_bytes;

    __device__ Places(const Operands& p, u32 base) {
        codes_at = ROWS * p.in_features;
        exponents_at = codes_at + (ROWS * p.num_groups + 7) / 4 * 4;
        biases_at = exponents_at + (ROWS + 7) / 4 * 4;
        stage_bytes = (biases_at + (2 * ROWS + 7) / 4 * 4 + 127) / 128 * 128;
        ring = base, full = ring + p.stages * stage_bytes, empty = full + 8 * p.stages;
        sums = empty + 8 * p.stages;
    }
};

// Of the rows of a tile, in memory.
struct Rows {
    int first, count;
    const u8* codes;
    const signed char* exponents;
    const u16* biases;

    __device__ Rows(const Operands& p, int tile) {
        first = tile * ROWS, count = min(ROWS, p.out_features - first);
        codes = p.codes + (long long)first * p.num_groups;
        exponents = p.exponents + first, biases = p.bias + (p.bias ? first : 0);
    }
};

__device__ __forceinline__ void produce(const Operands& p, const Places& s, int lane) {
    int stage = 0, phase = 0;
    for (int tile = blockIdx.x; tile * ROWS < p.out_features; tile += p.num_workers) {
        Rows rows(p, tile);
        u32 full = s.full + 8 * stage, to = s.ring + stage * s.stage_bytes;
        barrier_wait(s.empty + 8 * stage, phase ^ 1);
        if (lane == 0) {
            int bytes = rows.count * p.in_features;
            barrier_expect(full, bytes);
            copy_weights(to, p.packed + (long long)rows.first * p.in_features, bytes, full);
        }
        __syncwarp();
        copy_words(to + s.codes_at, rows.codes, rows.count * p.num_groups, lane, 32);
        copy_words(to + s.exponents_at, rows.exponents, rows.count, lane, 32);
        if (p.bias) copy_words(to + s.biases_at, rows.biases, 2 * rows.count, lane, 32);
        arrive_when_copied(full);
        if (++stage == p.stages) { stage = 0; phase ^= 1; }
    }
}

// 16 numbers of x, in four words of high and four of low bytes. `offset` is what stored bytes, q + 128,
// add to the product of q.
struct Segment {
    u32 high[4], low[4];
    int offset;
    float step;

    __device__ __forceinline__ void split(const u32 (&pairs)[8]) {
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < 16; ++i) most = max(most, __float_as_uint(number(pairs, i)) & 0x7fffffff);
        // Infinite: not a number, as no byte is. Tiny: the step that is the least. Huge: `reciprocal`
        // makes 0 of what is no normal number.
        float largest = fmaxf(__uint_as_float(most), 1e-30f);
        float inverse = 127.0f / 256.0f * reciprocal(largest * (1.0f / 256.0f));
        float undefined = __uint_as_float(most) - __uint_as_float(most);  // 0, or not a number
        step = largest * (1.0f / (127.0f * 254.0f)) + undefined;
        offset = 0;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            high[word] = low[word] = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float v = number(pairs, 4 * word + i), h = fmaf(v, inverse, INTEGERS);
                float l = fmaf(fmaf(v, inverse, INTEGERS - h), 254.0f, INTEGERS);
                high[word] |= (__float_as_uint(h) & 255) << 8 * i;
                low[word] |= (__float_as_uint(l) & 255) << 8 * i;
            }
            offset = dot4(0x01010101, low[word], dot4(0xfefefefe, high[word], offset));
        }
        offset *= -128;
    }
    __device__ __forceinline__ static float number(const u32 (&pairs)[8], int i) {
        return to_float((u16)(pairs[i / 2] >> i % 2 * 16));
    }
    // 254 h.q + l.q
    __device__ __forceinline__ int product(const uint4& w) const {
        int a = 0, b = offset;
#pragma unroll
        for (int i = 0; i < 4; ++i) a = dot4(word(w, i), high[i], a), b = dot4(word(w, i), low[i], b);
        return 254 * a + b;
    }
};

// A lane's sums over the warp: pairs of lanes share out what both have, until each has one at most.
// v[0] becomes the sum with the number `which_sum`, where `holds_sum`.
template <int LEFT, int MASK>
__device__ __forceinline__ void sum_over_warp(float (&v)[SUMS], int lane) {
    if constexpr (LEFT > 1) {
#pragma unroll
        for (int i = 0; i < LEFT / 2; ++i) {
            float first = v[i], second = v[i + LEFT / 2];
            float other = __shfl_xor_sync(~0u, lane & MASK ? first : second, MASK);
            v[i] = (lane & MASK ? second : first) + other;
        }
    } else {
        v[0] += __shfl_xor_sync(~0u, v[0], MASK);
    }
    if constexpr (MASK > 1) sum_over_warp<LEFT == 1 ? 1 : LEFT / 2, MASK / 2>(v, lane);
}
__device__ __forceinline__ int which_sum(int lane) { return lane / (32 / SUMS); }
__device__ __forceinline__ bool holds_sum(int lane) { return lane % (32 / SUMS) == 0; }

__device__ __forceinline__ void consume(const Operands& p, const Places& s) {
    int thread = threadIdx.x, lane = thread % 32;
    wait_for_previous_kernel();
    Segment x[SEGMENTS][TOKENS];
    int weight[SEGMENTS], code[SEGMENTS];
#pragma unroll
    for (int i = 0; i < SEGMENTS; ++i) {
        int column = 16 * (thread + i * CONSUMERS);
        bool is_there = column < p.in_features;
        weight[i] = is_there ? column : 0;
        code[i] = s.codes_at + min(weight[i] >> p.group_shift, p.num_groups - 1);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            u32 pairs[8] = {};
            if (is_there) load_pairs(p.x + (long long)t * p.in_features + column, pairs);
            x[i][t].split(pairs);
        }
    }
    int stage = 0, phase = 0, turn = 0;
    for (int tile = blockIdx.x; tile * ROWS < p.out_features; tile += p.num_workers, turn ^= 1) {
        Rows rows(p, tile);
        u32 codes_from = first_byte(rows.codes);
        float sums[SUMS] = {};
        u32 from = s.ring + stage * s.stage_bytes;
        barrier_wait(s.full + 8 * stage, phase);
#pragma unroll
        for (int i = 0; i < SEGMENTS; ++i)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                uint4 w = load16(from + weight[i] + r * p.in_features);
                float scale = (float)load_byte(from + code[i] + codes_from + r * p.num_groups);
#pragma unroll
                for (int t = 0; t < TOKENS; ++t)
                    sums[t * ROWS + r] += (float)x[i][t].product(w) * (scale * x[i][t].step);
            }
        int row = thread % ROWS;
        int exponent = (signed char)load_byte(from + s.exponents_at + first_byte(rows.exponents) + row);
        u32 bias_at = from + s.biases_at + first_byte(rows.biases) + 2 * row;
        float bias = p.bias ? to_float(load_half(bias_at)) : 0.0f;
        __syncwarp();
        if (lane == 0) barrier_arrive(s.empty + 8 * stage);
        if (++stage == p.stages) { stage = 0; phase ^= 1; }
        sum_over_warp<SUMS, 16>(sums, lane);
        u32 meeting = s.sums + turn * SUMS * WARPS * 4;
        if (holds_sum(lane)) store_float(meeting + (which_sum(lane) * WARPS + thread / 32) * 4, sums[0]);
        named_sync<1, CONSUMERS>();
        if (thread >= SUMS) continue;
        float whole = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i += 4) {
            uint4 v = load16(meeting + (thread * WARPS + i) * 4);
            whole += __uint_as_float(v.x) + __uint_as_float(v.y) + __uint_as_float(v.z) + __uint_as_float(v.w);
        }
        if (row < rows.count)
            p.y[(long long)(thread / ROWS) * p.out_features + rows.first + row] =
                (u16)pack(whole * power_of_two(exponent) + bias, 0.0f);
    }
}

// There is one block a multiprocessor; registers are left for the small kernels that come next.
constexpr int BLOCKS = TOKENS * SEGMENTS > 4 ? 1 : TOKENS * SEGMENTS > 2 ? 2 : 3;

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, BLOCKS)
w8a16_gemv(const __grid_constant__ Operands p) {
    Places s(p, shared_address(shared_memory()));
    if (threadIdx.x < p.stages) {
        barrier_init(s.full + 8 * threadIdx.x, 1 + 32);
        barrier_init(s.empty + 8 * threadIdx.x, WARPS);
        barriers_are_there();
    }
    let_next_kernel_start();
    __syncthreads();
    if (threadIdx.x < CONSUMERS)
        consume(p, s);
    else
        produce(p, s, threadIdx.x - CONSUMERS);
}
