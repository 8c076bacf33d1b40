// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N] for x in int8,
// x = step[K/128, M] rounded[M, K]: opt-in, for prefill, where arithmetic is the limit
//
// Stored bytes u = q + 128 are the tensor core's unsigned operand as they are, x the signed one:
// nothing is converted. Every 128 columns the int32 sums of a tile become float32:
//
//     total[n, m] += code[n] step[m] (sum(u x) - 128 sum(x))
//
// |sum(u x)| < 2^22, so adding it to the bits of 12582912.0 gives 12582912.0 + sum(u x): an integer
// addition where a conversion takes four times as long. Two sets of sums take turns: the tensor
// cores fill one while the other is added. What both compete for is shared memory, so step and
// sum(x) of a token come as one word: a bfloat16 and sum(x) + 2^15 in 16 bits.
//
//   warpgroup 0      producer: W [BN, 128] bytes, x [MT, 128] bytes and MT words a stage
//   warpgroups 1...  consumers: 64 rows of W each
//
// Compile-time: MT, WGS, STAGES, CLUSTER, BF16. The launcher also generates `wgmma_int8(sums,
// w descriptor, x descriptor, accumulate)`.

constexpr int KB = 128;
constexpr int W_BYTES = BN * KB;
constexpr int X_BYTES = MT * KB;
constexpr int FILL_BYTES = W_BYTES + X_BYTES + MT * 4;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES + 1024;

__device__ __forceinline__ void copy_bytes(u32 dst, const void* source, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(dst), "l"(source), "r"(bytes), "r"(bar) : "memory");
}

// A consumer's place in the ring.
struct Cursor {
    int stage, phase;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
    }
};

// Queue the products of the cursor's stage, when it is there, for 64 rows of W.
__device__ __forceinline__ void multiply_stage(const Block& b, const Cursor& c, int warpgroup,
                                               int (&sums)[ACC]) {
    u32 w = b.ring + c.stage * STAGE_BYTES, x = w + W_BYTES;
    w += warpgroup * 64 * KB;
    barrier_wait(b.full + 8 * c.stage, c.phase);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < KB / 32; ++step)
        wgmma_int8(sums, descriptor(w + step * 32), descriptor(x + step * 32), step > 0);
    wgmma_commit();
}

// Add the sums of 128 columns; `words` are the tile's in shared memory from this lane's tokens.
__device__ __forceinline__ void promote(u32 words, const float (&codes)[2], const int (&sums)[ACC],
                                        float (&total)[ACC]) {
#pragma unroll
    for (int j = 0; j < MT / 8; ++j) {
        u32 word[2];
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1])
                     : "r"(words + j * 32));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float step = __uint_as_float(word[i] & 0xffff0000);
            // 12582912 + 128 sum(x), whose bits are 0x4b000000 and the word's low half at bit 7
            float offset = __uint_as_float((word[i] << 7 & 0x7fff80) | 0x4b000000) * -step;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float sum = __int_as_float(sums[4 * j + 2 * h + i] + 0x4b400000);
                float product = fmaf(sum, step, offset);
                total[4 * j + 2 * h + i] = fmaf(product, codes[h], total[4 * j + 2 * h + i]);
            }
        }
    }
}

// The scales of two rows, loaded a stage ahead of their use.
struct Codes {
    const u8* rows[2];
    int group_shift, last_group;
    float now[2];
    u8 next[2];

    __device__ __forceinline__ Codes(const Problem& p, int row) {
        for (int h = 0; h < 2; ++h)
            rows[h] = p.codes + (long long)min(row + 8 * h, p.out_features - 1) * p.num_groups;
        group_shift = p.num_groups == 1 ? 31 : 31 - __clz(p.group_size);
        last_group = p.num_groups - 1;
    }
    __device__ __forceinline__ void advance_to(int k) {
        int group = min(k * KB >> group_shift, last_group);
        for (int h = 0; h < 2; ++h) {
            now[h] = (float)next[h];
            next[h] = __ldg(rows[h] + group);
        }
    }
};

// Add a stage that has been multiplied and let the producer have it.
__device__ __forceinline__ void finish_stage(const Block& b, int stage, int lane,
                                             const Codes& codes, const int (&sums)[ACC],
                                             float (&total)[ACC]) {
    u32 words = b.ring + stage * STAGE_BYTES + W_BYTES + X_BYTES;
    promote(words + lane % 4 * 8, codes.now, sums, total);
    __syncwarp();
    release_stage(b.empty + 8 * stage, lane);
}

// Queue stage k of a run, then finish the stage before it.
__device__ __forceinline__ void step_stage(const Block& b, Cursor& c, Codes& codes, bool is_first,
                                           int k, int warp, int lane, int (&sums)[ACC],
                                           const int (&previous)[ACC], float (&total)[ACC]) {
    multiply_stage(b, c, warp / 4, sums);
    wgmma_wait<1>();
    if (!is_first)
        finish_stage(b, c.stage == 0 ? STAGES - 1 : c.stage - 1, lane, codes, previous, total);
    codes.advance_to(k + 1);
    c.advance();
}

__device__ __forceinline__ void consume(const Problem& p, const Block& b) {
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    Schedule schedule(p, b.worker);
    Segment s;
    Cursor c = {0, 0};
    while (schedule.pop(s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int warp_row = (n * CLUSTER + b.rank) * BN + warp * 16;
        Codes codes(p, warp_row + lane / 4);
        codes.advance_to(s.k_begin);
        float total[ACC];
#pragma unroll
        for (int i = 0; i < ACC; ++i) total[i] = 0.0f;
        int even[ACC], odd[ACC];
        for (int k = s.k_begin;; k += 2) {
            step_stage(b, c, codes, k == s.k_begin, k, warp, lane, even, odd, total);
            if (k + 1 == s.k_end) {
                wgmma_wait<0>();
                finish_stage(b, c.stage == 0 ? STAGES - 1 : c.stage - 1, lane, codes, even, total);
                break;
            }
            step_stage(b, c, codes, false, k + 1, warp, lane, odd, even, total);
            if (k + 2 == s.k_end) {
                wgmma_wait<0>();
                finish_stage(b, c.stage == 0 ? STAGES - 1 : c.stage - 1, lane, codes, odd, total);
                break;
            }
        }
        RowEnds ends = load_row_ends(p, warp_row + lane / 4);
        if (s.k_begin > 0) {
            leave_partial<1, CONSUMERS>(p, b.worker * CLUSTER + b.rank, thread, total);
            continue;
        }
        if (s.k_end < p.k_blocks)
            add_partials<1, CONSUMERS>(p, b.worker + 1, schedule.last_sharer(s), CLUSTER, b.rank,
                                       thread, total);
        store_rows(p, m, warp_row, lane, ends, b.buffers + warp * STORE_TOKENS * 32, total);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
w8a8_large(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
           const __grid_constant__ Problem p) {
    extern __shared__ u8 raw[];
    Block block = begin_block<STAGE_BYTES>(p, raw);
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        auto copy = [&](u32 stage, int m, int k, u32 bar) {
            copy_x(stage + W_BYTES, &x_map, k * KB, m * MT, block.rank, bar);
            const u32* steps = p.steps + (long long)k * p.steps_stride + m * MT;
            copy_bytes(stage + W_BYTES + X_BYTES, steps, MT * 4, bar);
        };
        if (threadIdx.x == 0) produce<KB, STAGE_BYTES, FILL_BYTES>(&w_map, p, block, copy);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(p, block);
    }
    __syncwarp();
    cluster_sync();
}
