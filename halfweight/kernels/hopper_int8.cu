// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N] for x in int8,
// x = steps[K/128, M] rounded[M, K]: opt-in, for prefill, where arithmetic is the limit
//
// Stored bytes u = q + 128 are the tensor core's unsigned operand as they are, x the signed one:
// nothing is converted. Every 128 columns the int32 sums of a tile become float32:
//
//     total[n, m] += code[n] (step[m] sum(u x) - 128 step[m] sum(x))
//
// |sum(u x)| < 2^22, so adding it to the bit pattern of 12582912.0 gives 12582912.0 + sum(u x): an
// integer addition where a conversion takes four times as long. With each step comes what takes
// both constants off again, step (12582912 + 128 sum(x)). While one warpgroup does this, the tensor
// cores multiply for the others.
//
//   warpgroup 0      producer: W [BN, 128] bytes, x [MT, 128] bytes and MT pairs of floats a stage
//   warpgroups 1...  consumers: 64 rows of W each
//
// Compile-time: MT, WGS, STAGES, CLUSTER, BF16. The launcher also generates `wgmma_int8(sums,
// w descriptor, x descriptor, accumulate)`.

constexpr int KB = 128;
constexpr int W_BYTES = BN * KB;
constexpr int X_BYTES = MT * KB;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES + MT * 8;

__device__ __forceinline__ void copy_bytes(u32 dst, const void* source, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(dst), "l"(source), "r"(bytes), "r"(bar) : "memory");
}

__device__ __forceinline__ void multiply_stage(u32 w, u32 x, int (&sums)[ACC]) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < KB / 32; ++step)
        wgmma_int8(sums, descriptor(w + step * 32), descriptor(x + step * 32), step > 0);
    wgmma_commit();
    wgmma_wait<0>();
}

// Add the sums of 128 columns; `steps` are the tile's pairs in shared memory from this lane's tokens.
__device__ __forceinline__ void promote(u32 steps, const float (&codes)[2], const int (&sums)[ACC],
                                        float (&total)[ACC]) {
#pragma unroll
    for (int j = 0; j < MT / 8; ++j) {
        uint4 pair = load16(steps + j * 64);
        float step[2] = {__uint_as_float(pair.x), __uint_as_float(pair.z)};
        float offset[2] = {__uint_as_float(pair.y), __uint_as_float(pair.w)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum = __int_as_float(sums[4 * j + i] + 0x4b400000);
            float product = fmaf(sum, step[i % 2], -offset[i % 2]);
            total[4 * j + i] = fmaf(product, codes[i / 2], total[4 * j + i]);
        }
    }
}

__device__ __forceinline__ void consume(const Problem& p, const Block& b) {
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    int row_in_tile = warp * 16 + lane / 4, group_shift = 31;
    if (p.num_groups > 1) group_shift = 31 - __clz(p.group_size);
    Schedule schedule(p, b.worker);
    Segment s;
    int stage = 0, phase = 0;
    while (schedule.pop(s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int tile_row = (n * CLUSTER + b.rank) * BN;
        const u8* codes[2];
        for (int h = 0; h < 2; ++h) {
            int row = min(tile_row + row_in_tile + 8 * h, p.out_features - 1);
            codes[h] = p.codes + (long long)row * p.num_groups;
        }
        auto group = [&](int k) { return min(k * KB >> group_shift, p.num_groups - 1); };
        u8 next[2] = {__ldg(codes[0] + group(s.k_begin)), __ldg(codes[1] + group(s.k_begin))};
        float total[ACC];
#pragma unroll
        for (int i = 0; i < ACC; ++i) total[i] = 0.0f;
        for (int k = s.k_begin; k < s.k_end; ++k) {
            float code[2] = {(float)next[0], (float)next[1]};
            for (int h = 0; h < 2; ++h) next[h] = __ldg(codes[h] + group(k + 1));
            u32 w = b.ring + stage * STAGE_BYTES, x = w + W_BYTES;
            barrier_wait(b.full + 8 * stage, phase);
            int sums[ACC];
            multiply_stage(w + warp / 4 * 64 * KB, x, sums);
            promote(x + X_BYTES + lane % 4 * 16, code, sums, total);
            __syncwarp();
            release_stage(b.empty + 8 * stage, lane);
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
        RowEnds ends = load_row_ends(p, tile_row + row_in_tile);
        finish_run(p, b, schedule, s, m, tile_row + warp * 16, thread, lane, ends, total);
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
            const float* steps = p.steps + 2 * ((long long)k * p.steps_stride + m * MT);
            copy_bytes(stage + W_BYTES + X_BYTES, steps, MT * 8, bar);
        };
        if (threadIdx.x == 0) produce<KB, STAGE_BYTES>(&w_map, p, block, copy);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(p, block);
    }
    __syncwarp();
    cluster_sync();
}
