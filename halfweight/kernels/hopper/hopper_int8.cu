// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N] for int8 x =
// steps[K/(128 CHAIN), M] rounded[M, K]: opt-in, for prefill, where arithmetic is the limit
//
// As in hopper_large.cu, W is the first operand and comes from registers: stored bytes with a bit
// flipped, so that they are signed. What costs is to make floats of the int32 sums of every group
// and to add them up. Nothing is left of that but multiply-adds:
//
//   no conversion   sums begin at BASE, so that they are never negative, and stay below 2^24: such
//                   an integer, read as a float, is exactly 2^-149 of itself (a denormal number
//                   below 2^23, which a multiply-add takes in its stride)
//   no resetting    CHAIN groups share a token's step, and the sums run on over them. With R_j the
//                   sum to the end of group j, sum_j c_j P_j = sum_j (c_j - c_j+1) R_j - c_1 BASE
//   no step         the total is in units of the step; from one to the next it is multiplied by the
//                   ratio of the two, in the multiply-add that takes c_1 BASE off
//
// CHAIN + 1 multiply-adds and a move for CHAIN groups; the one with the ratio while the tensor
// cores are busy.
//
//   warpgroup 0      producer: one thread asks for W [ROWS, 128] bytes, x [TOKENS, 128] bytes and
//                    the ratios of TOKENS tokens a stage
//   warpgroups 1...  consumers: 64 rows of W each; while one adds, the other multiplies
//
// Compile-time: TOKENS and ROWS of a tile, WGS = ROWS / 64, KB = 128 columns of a stage, STAGES,
// CLUSTER, CHAIN, BF16. The launcher also generates `queue_products(sums, a, x)`.

constexpr int W_BYTES = ROWS * KB;
constexpr int X_BYTES = TOKENS * KB;
constexpr int RATIOS_AT = W_BYTES + X_BYTES;
constexpr int COPIED_BYTES = RATIOS_AT + TOKENS * 4;
constexpr int STAGE_BYTES = (COPIED_BYTES + 16 + 1023) / 1024 * 1024;
typedef Place<STAGE_BYTES> Here;
constexpr int STEPS = KB / 32;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

// A sum of 128 products of signed bytes is less than 2^21.
constexpr int BASE = CHAIN << 21;
static_assert(CHAIN <= 4, "sums must stay below 2^24");
// A code enters times 2^119, and an integer read as a float is 2^-149 of itself.
constexpr float CODE_UNIT = 0x1p119f, TOTAL_UNIT = 0x1p-30f;

// The scales of a lane's two rows for the groups of a chain, as the total takes them, and the codes
// of the chain that comes next.
struct Scales {
    const u8* codes[2];
    u32 next[CHAIN][2];
    float differences[CHAIN][2], offset[2];
    int shift, last;

    __device__ __forceinline__ Scales(const Problem& p, int row, int block) {
        shift = p.num_groups > 1 ? 31 - __clz(p.group_size) : 31;
        last = p.num_groups - 1;
        for (int h = 0; h < 2; ++h)
            codes[h] = p.codes + (long long)min(row + 8 * h, p.out_features - 1) * p.num_groups;
        ask(block);
    }
    __device__ __forceinline__ void ask(int block) {
#pragma unroll
        for (int j = 0; j < CHAIN; ++j) {
            int group = min((block * CHAIN + j) * KB >> shift, last);
            for (int h = 0; h < 2; ++h) next[j][h] = __ldg(codes[h] + group);
        }
    }
    // Block `block` begins.
    __device__ __forceinline__ void take(int block) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float code[CHAIN + 1];
            code[CHAIN] = 0.0f;
#pragma unroll
            for (int j = CHAIN - 1; j >= 0; --j) {
                code[j] = (float)next[j][h];
                differences[j][h] = (code[j] - code[j + 1]) * CODE_UNIT;
            }
            offset[h] = code[0] * (-BASE * TOTAL_UNIT);
        }
        ask(block + 1);
    }
};

// What a consumer carries from stage to stage; `line` is where its lane's rows of W begin.
struct Consumer {
    Here here;
    u32 line;
    int lane;

    // Signed bytes of the warp's 16 rows.
    __device__ __forceinline__ void read(u32 (&a)[STEPS][4]) const {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(a[step][0]), "=r"(a[step][1]), "=r"(a[step][2]), "=r"(a[step][3])
                         : "r"(here.stage + line ^ step << 5));
#pragma unroll
            for (int i = 0; i < 4; ++i) a[step][i] ^= 0x80808080u;
        }
    }
    // Where the descriptor of the stage's x begins.
    __device__ __forceinline__ u32 x() const {
        return (here.stage >> 4) + (W_BYTES / 16 + DESCRIPTOR_LOW);
    }
};

// total += sum * factor, of a sum read as a float. Never put off: the sums go on in their registers.
__device__ __forceinline__ void add_product(float& total, int sum, float factor) {
    asm volatile("fma.rn.f32 %0, %1, %2, %0;"
                 : "+f"(total) : "f"(__int_as_float(sum)), "f"(factor));
}

// From the unit of the step before to that of this step; `ratios` is where the lane's begin.
__device__ __forceinline__ void rescale(u32 ratios, const Scales& scales, float (&total)[ACC]) {
#pragma unroll
    for (int j = 0; j < ACC / 8; ++j) {
        uint4 ratio = load16(ratios + j * 64);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            total[8 * j + i] = fmaf(total[8 * j + i], __uint_as_float(word(ratio, i / 4 * 2 + i % 2)),
                                    scales.offset[i / 2 % 2]);
    }
}

__device__ __forceinline__ void add_chain(Consumer& c, Scales& scales, int block,
                                          float (&total)[ACC]) {
    int sums[ACC];
#pragma unroll
    for (int j = 0; j < CHAIN; ++j) {
        u32 a[STEPS][4];
        barrier_wait(c.here.full(), c.here.phase);
        c.read(a);
        if (j == 0)
#pragma unroll
            for (int i = 0; i < ACC; ++i) sums[i] = BASE;
        queue_products(sums, a, c.x());
        if (j == 0) {
            scales.take(block);
            rescale(c.here.stage + RATIOS_AT + c.lane % 4 * 16, scales, total);
        }
        wgmma_wait<0>();
        __syncwarp();
        release_stage(c.here.empty(), c.lane);
        c.here.advance();
#pragma unroll
        for (int i = 0; i < ACC; ++i)
            add_product(total[i], sums[i], scales.differences[j][i / 2 % 2]);
    }
}

// From units of the last step to numbers.
__device__ __forceinline__ void apply_steps(const Problem& p, const Segment& s, int token, int lane,
                                            float (&total)[ACC]) {
    long long block = p.k_blocks + s.k_end - 1;
    const float* steps = p.steps + block * p.steps_stride + token + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < ACC / 4; ++j) {
        float2 step = __ldg((const float2*)(steps + j * 8));
#pragma unroll
        for (int i = 0; i < 4; ++i)
            total[4 * j + i] *= (i % 2 ? step.y : step.x) * (1 / TOTAL_UNIT);
    }
}

__device__ __forceinline__ void consume(const Problem& p, const Block& b) {
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    int row_in_tile = warp * 16 + lane / 4;
    u32 line = (warp * 16 + lane % 16) * KB + ((lane / 16 ^ lane % 8) << 4);
    Consumer c = {Here(b), line, lane};
    Schedule schedule(p, b.worker);
    Segment s;
    while (next_run(schedule, b, s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int tile_row = first_row(p, b, n);
        float total[ACC];
        Scales scales(p, tile_row + row_in_tile, s.k_begin);
#pragma unroll
        for (int i = 0; i < ACC; ++i) total[i] = 0.0f;
        for (int block = s.k_begin; block < s.k_end; ++block) add_chain(c, scales, block, total);
        apply_steps(p, s, m * TOKENS, lane, total);
        bool whole = finish_shared(p, b, schedule, s, thread, total);
        if (!whole || warp * 16 >= p.tile_rows) continue;
        RowEnds<2> ends(p, tile_row + row_in_tile);
        u16* buffer = b.buffers + warp * (STORE_BYTES / 2);
        store_rows(p, m * TOKENS, tile_row + warp * 16, lane, ends, buffer, total);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
w8a8_large(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
           const __grid_constant__ Problem p) {
    extern __shared__ u8 raw[];
    Block block = begin_block<STAGE_BYTES, 1>(p, raw);
    if (threadIdx.x < 128) {
        leave_registers<PRODUCER_REGISTERS>();
        auto copy = [&](u32 stage, int m, int k, u32 bar) {
            copy_x(stage + W_BYTES, &x_map, k * KB, m * TOKENS, block.rank, bar);
            const float* ratios = p.steps + (long long)(k / CHAIN) * p.steps_stride + m * TOKENS;
            copy_bytes(stage + RATIOS_AT, ratios, TOKENS * 4, bar);
        };
        if (threadIdx.x == 0)
            produce<KB, CHAIN, STAGE_BYTES, COPIED_BYTES>(&w_map, p, block, copy);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(p, block);
    }
    __syncwarp();
    cluster_sync();
}
