// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N] for int8 x =
// steps[K/128, M] rounded[M, K]: opt-in, for prefill, where arithmetic is the limit
//
// Stored bytes u = q + 128 are the tensor core's unsigned operand as they are, x the signed one:
// nothing is converted. Every 128 columns the int32 sums of a tile become float32:
//
//     total[m, n] += code[n] (step[m] sum(u x) - 128 step[m] sum(x))
//
// |sum(u x)| < 2^22, so adding it to the bit pattern of 12582912.0 gives 12582912.0 + sum(u x): an
// integer addition where a conversion takes four times as long. With each step comes what takes
// both constants off again, step (12582912 + 128 sum(x)).
//
//   warpgroup 0      producer: one thread asks for W [ROWS, 128] bytes, x [TOKENS, 128] bytes and
//                    TOKENS pairs of floats a stage; three warps, each for every third stage, so
//                    that they have time to wait for memory, put the rows' codes beside them
//   warpgroups 1...  consumers: 64 tokens each, so that a thread has two tokens and their steps in
//                    registers. The rows of a tile are multiplied in two halves with sums of their
//                    own: while the tensor cores multiply one half, the other's sums are added
//
// Compile-time: TOKENS and ROWS of a tile, WGS = TOKENS / 64, STAGES, CLUSTER, BF16. The launcher
// also generates `wgmma_half(sums, x, w)`.

constexpr int KB = 128;
constexpr int W_BYTES = ROWS * KB;
constexpr int X_BYTES = TOKENS * KB;
constexpr int STEPS_AT = W_BYTES + X_BYTES;
constexpr int CODES_AT = STEPS_AT + TOKENS * 8;
constexpr int STAGE_BYTES = (CODES_AT + ROWS * 4 + 16 + 1023) / 1024 * 1024;
typedef Place<STAGE_BYTES> Here;
constexpr int COPIED_BYTES = CODES_AT;
constexpr int CODE_WARPS = 3;
constexpr int HALF = ACC / 2;

__device__ __forceinline__ void copy_bytes(u32 dst, const void* source, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(dst), "l"(source), "r"(bytes), "r"(bar) : "memory");
}

// The group of scales of K block k.
struct Groups {
    int shift, last;
    __device__ explicit Groups(const Problem& p)
        : shift(p.num_groups > 1 ? 31 - __clz(p.group_size) : 31), last(p.num_groups - 1) {}
    __device__ __forceinline__ int operator()(int k) const { return min(k * KB >> shift, last); }
};

// Codes as floats, in the order in which lanes want them: rows 8j + 2i and 8j + 2i + 1 of a tile
// are for lanes of i = lane % 4, whose pairs for two j are 16 bytes.
__device__ __forceinline__ void write_codes(const Problem& p, const Block& b) {
    constexpr int PAIRS = ROWS / 64;
    Groups group(p);
    int warp = threadIdx.x / 32 - 1, lane = threadIdx.x % 32, turn = 0;
    Segment s;
    Here place(b);
    for (Schedule schedule(p, b.worker); next_run(schedule, b, s);) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int row = first_row(p, b, n) + 2 * lane, last = p.out_features - 1;
        for (int k = s.k_begin; k < s.k_end; ++k, place.advance()) {
            if (turn == warp) {
                const u8* codes = p.codes + group(k);
                u32 low[PAIRS], high[PAIRS];
#pragma unroll
                for (int i = 0; i < PAIRS; ++i) {
                    low[i] = __ldg(codes + (long long)min(row + i * 64, last) * p.num_groups);
                    high[i] = __ldg(codes + (long long)min(row + i * 64 + 1, last) * p.num_groups);
                }
                barrier_wait(place.empty(), place.phase ^ 1);
                u32 address = place.stage + CODES_AT;
                address += lane / 8 * 64 + lane % 4 * 16 + lane / 4 % 2 * 8;
#pragma unroll
                for (int i = 0; i < PAIRS; ++i)
                    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address + i * 256),
                                 "f"((float)low[i]), "f"((float)high[i]) : "memory");
                __syncwarp();
                if (lane == 0) barrier_arrive(place.full());
            }
            if (++turn == CODE_WARPS) turn = 0;
        }
    }
}

// The step of a token and what takes the constants off.
struct Step { float step, offset; };

__device__ __forceinline__ Step load_step(u32 address) {
    Step s;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(s.step), "=f"(s.offset) : "r"(address));
    return s;
}

// Add the sums of a half and 128 columns; `codes` is where the lane's pairs begin.
__device__ __forceinline__ void promote(u32 codes, const Step (&steps)[2], const int (&sums)[HALF],
                                        float* total) {
#pragma unroll
    for (int j = 0; j < HALF / 4; j += 2) {
        uint4 pairs = load16(codes + j * 32);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float sum = __int_as_float(sums[4 * j + i] + 0x4b400000);
            float product = fmaf(sum, steps[i / 2 % 2].step, -steps[i / 2 % 2].offset);
            float code = __uint_as_float(word(pairs, i / 4 * 2 + i % 2));
            total[4 * j + i] = fmaf(product, code, total[4 * j + i]);
        }
    }
}

// Tokens `token` to token + 15 of all the tile's rows, gathered to 64 bytes in the warp's buffer.
__device__ __forceinline__ void store_tokens(const Problem& p, int token, int first_row, int lane,
                                             u16* buffer, const float (&total)[ACC]) {
    int end = min(p.out_features, first_row + p.tile_rows);
    bool whole = p.out_features % 8 == 0;
    u32 base = shared_address(buffer);
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) {
        u32 packed[2];
        float scale[2], offset[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            int n = min(first_row + 8 * j + 2 * (lane % 4) + e, p.out_features - 1);
            scale[e] = ldexpf(1.0f, p.exponents[n]);
            offset[e] = p.bias ? to_float(p.bias[n]) : 0.0f;
        }
        for (int h = 0; h < 2; ++h)
            packed[h] = pack(total[4 * j + 2 * h] * scale[0] + offset[0],
                             total[4 * j + 2 * h + 1] * scale[1] + offset[1]);
        int row = lane % 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(
                         base + row * 64 + ((j % 4 ^ row / 2 % 4) << 4)),
                     "r"(packed[0]), "r"(packed[1]) : "memory");
        if (j % 4 < 3) continue;
        __syncwarp();
#pragma unroll
        for (int i = lane; i < 64; i += 32) {
            int at = token + i / 4, n = first_row + (j - 3 + i % 4) * 8;
            if (at >= p.num_tokens) continue;
            u16* target = p.y + (long long)at * p.out_features + n;
            const u16* source = buffer + i / 4 * 32 + (i % 4 ^ i / 8 % 4) * 8;
            if (whole && n + 8 <= end) {
                *(uint4*)target = *(const uint4*)source;
            } else {
                for (int e = 0; e < 8; ++e)
                    if (n + e < end) target[e] = source[e];
            }
        }
        __syncwarp();
    }
}

// What a consumer carries from block to block.
struct Consumer {
    Here here;
    int warpgroup, lane, token_in_tile;

    template <int SECOND> __device__ __forceinline__ void multiply(int (&sums)[HALF]) const {
        wgmma_half(sums, (here.stage + W_BYTES >> 4) + DESCRIPTOR_LOW + warpgroup * 4 * KB,
                   (here.stage >> 4) + DESCRIPTOR_LOW + SECOND * ROWS / 2 * KB / 16);
    }
    __device__ __forceinline__ void load_steps(Step (&steps)[2]) const {
        u32 address = here.stage + STEPS_AT + token_in_tile * 8;
        steps[0] = load_step(address);
        steps[1] = load_step(address + 64);
    }
    __device__ __forceinline__ u32 codes() const { return here.stage + CODES_AT + lane % 4 * 16; }
};

// Multiply and add a block of K: while the tensor cores multiply the second half, the first's sums
// are added. Nothing is in flight at the end, or ptxas would serialize all products.
__device__ __forceinline__ void add_block(Consumer& c, float (&total)[ACC]) {
    int first[HALF], second[HALF];
    Step steps[2];
    barrier_wait(c.here.full(), c.here.phase);
    c.multiply<0>(first);
    c.multiply<1>(second);
    c.load_steps(steps);
    wgmma_wait<1>();
    promote(c.codes(), steps, first, total);
    wgmma_wait<0>();
    promote(c.codes() + HALF * 8, steps, second, total + HALF);
    __syncwarp();
    release_stage(c.here.empty(), c.lane);
    c.here.advance();
}

__device__ __forceinline__ void consume(const Problem& p, const Block& b) {
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    Consumer c = {Here(b), warp / 4, lane, warp * 16 + lane / 4};
    Schedule schedule(p, b.worker);
    Segment s;
    while (next_run(schedule, b, s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        float total[ACC];
#pragma unroll
        for (int i = 0; i < ACC; ++i) total[i] = 0.0f;
        for (int k = s.k_begin; k < s.k_end; ++k) add_block(c, total);
        if (!finish_shared(p, b, schedule, s, thread, total)) continue;
        u16* buffer = b.buffers + warp * (STORE_BYTES / 2);
        store_tokens(p, m * TOKENS + warp * 16, first_row(p, b, n), lane, buffer, total);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
w8a8_large(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
           const __grid_constant__ Problem p) {
    extern __shared__ u8 raw[];
    Block block = begin_block<STAGE_BYTES, 2>(p, raw);
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        auto copy = [&](u32 stage, int m, int k, u32 bar) {
            copy_x(stage + W_BYTES, &x_map, k * KB, m * TOKENS, block.rank, bar);
            const float* steps = p.steps + 2 * ((long long)k * p.steps_stride + m * TOKENS);
            copy_bytes(stage + STEPS_AT, steps, TOKENS * 8, bar);
        };
        if (threadIdx.x == 0) produce<KB, STAGE_BYTES, COPIED_BYTES>(&w_map, p, block, copy);
        if (threadIdx.x >= 32) write_codes(p, block);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(p, block);
    }
    __syncwarp();
    cluster_sync();
}
