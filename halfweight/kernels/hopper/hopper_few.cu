// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N], M <= 16
//
// For very few tokens reading the weights must be the whole cost, so there may be few instructions
// for a weight. A 16-bit product of the tensor core wants each byte converted; an integer one takes
// the bytes as they are. So x is written as two bytes a number, x = s (h + l / 254), with one step s
// for 128 columns, which keeps 16 bits of x beside the largest of them; a token is two columns of
// the product, 254 h.q + l.q is exact in 32 bits, and meets the step and the group's code in float32.
//
// A tile is 16 rows of W, a stage 1,024 columns of it, of which eight warps take 128 each. As in
// hopper_small.cu these lie together, in the 128-byte swizzle, and rows are taken as 0 4 1 5 2 6 3 7.
// The tensor core's fragment wants, of 32 columns, 4 q..4 q + 3 and 16 more of lane quad q; the lane
// reads 16 bytes in a row instead, of W as of x, which a sum does not mind.
//
//   last warp      producer: a copy a stage; weights are nobody's output, so it does not wait for
//                  the kernel ahead
//   eight warps    consumers; their sums of a tile meet in shared memory
//
// Compile-time: NT (4 tokens a tile of the tensor core's), BF16.

struct Operands {
    const u8* packed;
    const u16* x;
    const u8* codes;
    const signed char* exponents;
    const u16* bias;
    u16* y;
    int num_tokens, out_features, in_features, num_groups, group_shift, num_workers, stages, code_slots;
};

constexpr int ROWS = 16, WARPS = 8, CONSUMERS = 32 * WARPS;
constexpr int UNIT = 128;                // columns that share a step
constexpr int COLUMNS = WARPS * UNIT;    // of a stage
constexpr int BOX = ROWS * UNIT;         // bytes, in the 128-byte swizzle
constexpr int STAGE_BYTES = WARPS * BOX;
constexpr int TOKENS = 4 * NT;
constexpr int SUMS = ROWS * TOKENS;      // of a tile
constexpr int AT_ONCE = 8;
constexpr u32 FLIP = 0x80808080;         // stored q + 128 -> q
constexpr float INTEGERS = 12582912.0f;  // 1.5 2^23: adding it leaves an integer in the low bits

// Where things lie in shared memory.
struct Places {
    u32 full, empty, zeros, sums, steps, codes, x, ring;
    int units, x_pitch;

    __device__ Places(const Operands& p, u8* base) {
        units = (p.in_features + COLUMNS - 1) / COLUMNS * WARPS;
        ring = shared_address(base);
        full = ring + p.stages * STAGE_BYTES, empty = full + 8 * p.stages;
        zeros = empty + 8 * p.stages;
        sums = zeros + 64;
        steps = sums + 2 * WARPS * SUMS * 4;
        codes = steps + units * TOKENS * 4;
        x = codes + p.code_slots * ROWS * p.num_groups;
        x_pitch = units * UNIT + 64;
    }
};

// A tile's codes come with its first stage. Their slot is free: as many tiles as there are slots
// before, every warp was done with a stage that has been filled again since.
__device__ __forceinline__ void produce(const TensorMap* w_map, const Operands& p, const Places& s) {
    int stage = 0, phase = 0, slot = 0, code_bytes = ROWS * p.num_groups;
    for (int row = blockIdx.x * ROWS; row < p.out_features; row += p.num_workers * ROWS) {
        for (int k = 0; k < p.in_features; k += COLUMNS) {
            u32 full = s.full + 8 * stage;
            barrier_wait(s.empty + 8 * stage, phase ^ 1);
            barrier_expect(full, STAGE_BYTES + (k == 0 ? code_bytes : 0));
            copy_weights_box(s.ring + stage * STAGE_BYTES, w_map, row, k / UNIT, full);
            if (k == 0)
                copy_bytes(s.codes + slot * code_bytes, p.codes + (long long)row * p.num_groups,
                           code_bytes, full);
            if (++stage == p.stages) { stage = 0; phase ^= 1; }
        }
        if (++slot == p.code_slots) slot = 0;
    }
}

// Four numbers of this lane, in a unit of the warp: two words of four bytes each, and the step.
__device__ __forceinline__ void two_bytes(uint2 four, u32& high, u32& low, float& step) {
    float v[4] = {to_float((u16)four.x), to_float((u16)(four.x >> 16)), to_float((u16)four.y),
                  to_float((u16)(four.y >> 16))};
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffff);
    float largest = __uint_as_float(largest_of_warp(most));  // or infinite, or not a number
    float inverse = 127.0f * reciprocal(fmaxf(largest, 1e-30f));
    step = largest * (1.0f / (127.0f * 254.0f));
    high = low = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float h = fmaf(v[i], inverse, INTEGERS);
        float l = fmaf(fmaf(v[i], inverse, INTEGERS - h), 254.0f, INTEGERS);
        high |= (__float_as_uint(h) & 255) << 8 * i;
        low |= (__float_as_uint(l) & 255) << 8 * i;
    }
}

// Which token and unit of this warp's comes next.
struct Place {
    int token = 0, unit;

    __device__ void advance(int warp, int units) {
        if ((unit += WARPS) >= units) unit = warp, ++token;
    }
};

// x of the columns that this warp multiplies, as bytes; several reads are on their way at once.
__device__ __forceinline__ void split_x(const Operands& p, const Places& s, int warp, int lane) {
    Place reading{0, warp}, writing = reading;
    while (writing.token < p.num_tokens) {
        uint2 four[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i, reading.advance(warp, s.units)) {
            int column = reading.unit * UNIT + 4 * lane;
            bool is_there = reading.token < p.num_tokens && column < p.in_features;
            const u16* from = p.x + (long long)reading.token * p.in_features + column;
            four[i] = is_there ? load8(from) : uint2{0, 0};
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i, writing.advance(warp, s.units)) {
            if (writing.token >= p.num_tokens) break;
            u32 high, low;
            float step;
            two_bytes(four[i], high, low, step);
            u32 to = s.x + 2 * writing.token * s.x_pitch + writing.unit * UNIT + 4 * lane;
            store_word(to, high);
            store_word(to + s.x_pitch, low);
            u32 place = s.steps + (writing.unit * TOKENS + writing.token) * 4;
            if (lane == 0) store_word(place, __float_as_uint(step));
        }
    }
    __syncwarp();
}

// What the sum of a row and token becomes at the end; it is read a tile before it is needed.
struct RowEnd {
    int exponent;
    u16 bias;

    __device__ float of(float sum) const { return sum * ldexpf(1.0f, exponent) + to_float(bias); }
};

__device__ __forceinline__ RowEnd load_row_end(const Operands& p, int first_row) {
    int row = min(first_row, p.out_features - ROWS) + threadIdx.x % ROWS;
    return {p.exponents[row], p.bias ? p.bias[row] : (u16)0};
}

// Add the product of a unit: this lane's row and the eighth after it, whose codes these are.
__device__ __forceinline__ void multiply(const Places& s, u32 w, u32 chunk, const u32 (&x)[NT],
                                         const u32 (&x_step)[NT], int unit, int quad, float upper_code,
                                         float lower_code, float (&total)[NT][2]) {
    int sums[NT][4] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        u32 upper[4], lower[4];
        load_words(w + (chunk ^ 64 * j), upper);
        load_words(w + 8 * UNIT + (chunk ^ 64 * j), lower);
#pragma unroll
        for (int i = 0; i < 4; ++i) upper[i] ^= FLIP, lower[i] ^= FLIP;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            u32 pair[4];
            load_words(x[n] + (2 * unit + j) * x_step[n], pair);
            mma_int8(sums[n], upper[0], lower[0], upper[1], lower[1], pair[0], pair[1]);
            mma_int8(sums[n], upper[2], lower[2], upper[3], lower[3], pair[2], pair[3]);
        }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        float step = load_float(s.steps + (unit * TOKENS + 4 * n + quad) * 4);
        total[n][0] += (float)(254 * sums[n][0] + sums[n][1]) * (upper_code * step);
        total[n][1] += (float)(254 * sums[n][2] + sums[n][3]) * (lower_code * step);
    }
}

// Sum what all warps have of a tile, a thread a row and token, and store it.
__device__ __forceinline__ void store(const Operands& p, u32 sums, int first_row, const RowEnd& end) {
    int token = threadIdx.x / ROWS, row = threadIdx.x % ROWS;
    if (token >= p.num_tokens) return;
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) value += load_float(sums + (w * SUMS + threadIdx.x) * 4);
    p.y[(long long)token * p.out_features + first_row + row] = (u16)pack(end.of(value), 0.0f);
}

__device__ __forceinline__ void consume(const Operands& p, const Places& s, int warp, int lane) {
    int quad = lane % 4, row_in_eight = lane / 4 % 2 * 4 + lane / 8;
    u32 chunk = (quad ^ row_in_eight) << 4;
    RowEnd next_end = load_row_end(p, blockIdx.x * ROWS);
    wait_for_previous_kernel();
    split_x(p, s, warp, lane);
    u32 x[NT], x_step[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        int part = 8 * n + lane / 4;
        bool is_there = part < 2 * p.num_tokens;
        x[n] = (is_there ? s.x + part * s.x_pitch : s.zeros) + 16 * quad;
        x_step[n] = is_there ? 64 : 0;
    }
    int stage = 0, phase = 0, turn = 0, slot = 0;
    for (int row = blockIdx.x * ROWS; row < p.out_features; row += p.num_workers * ROWS, turn ^= 1) {
        RowEnd end = next_end;
        next_end = load_row_end(p, row + p.num_workers * ROWS);
        u32 codes = s.codes + (slot * ROWS + row_in_eight) * p.num_groups;
        float total[NT][2] = {};
        for (int column = warp * UNIT, k = 0; k < p.in_features; column += COLUMNS, k += COLUMNS) {
            u32 code = codes + min(column >> p.group_shift, p.num_groups - 1);
            u32 w = s.ring + stage * STAGE_BYTES + warp * BOX + row_in_eight * UNIT;
            barrier_wait(s.full + 8 * stage, phase);
            multiply(s, w, chunk, x, x_step, column / UNIT, quad, (float)load_byte(code),
                     (float)load_byte(code + 8 * p.num_groups), total);
            __syncwarp();
            if (lane == 0) barrier_arrive(s.empty + 8 * stage);
            if (++stage == p.stages) { stage = 0; phase ^= 1; }
        }
        u32 sums = s.sums + turn * WARPS * SUMS * 4;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                store_word(sums + (warp * SUMS + (4 * n + quad) * ROWS + 8 * h + row_in_eight) * 4,
                           __float_as_uint(total[n][h]));
        named_sync<1, CONSUMERS>();
        if (threadIdx.x < SUMS) store(p, sums, row, end);
        if (++slot == p.code_slots) slot = 0;
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 2)
w8a16_few(const __grid_constant__ TensorMap w_map, const __grid_constant__ Operands p) {
    u8* base = shared_memory();
    Places s(p, base);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x < p.stages) {
        barrier_init(s.full + 8 * threadIdx.x, 1);
        barrier_init(s.empty + 8 * threadIdx.x, WARPS);
        barriers_are_there();
    }
    if (threadIdx.x < 16) store_word(s.zeros + 4 * threadIdx.x, 0);
    let_next_kernel_start();
    __syncthreads();
    if (warp < WARPS)
        consume(p, s, warp, lane);
    else if (lane == 0)
        produce(&w_map, p, s);
}
