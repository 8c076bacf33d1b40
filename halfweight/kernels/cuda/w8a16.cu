// y[M, N] = x[M, K] dequantize(packed[N, K], scales[N, K/G])^T + bias[N], any M, for every GPU from
// compute capability 8.0 on.
//
// Only what all of these have is used: cp.async, mma.sync, shared memory from 99 KB. The product is
// y^T = W x^T with 16 rows of W a fragment: bytes become exact 16-bit integers in registers, a group
// (or 128 columns of it) is summed in float32 by the tensor core, and the group's scale multiplies
// that sum: nothing is rounded but the result. Blocks are persistent and keep a ring of copies full,
// past the end of a tile; see schedule.cuh for the order of tiles.
//
// W lies in shared memory as the file has it, 128 bytes of a row together (a box), and so does x, 64
// numbers together; the 16-byte chunks of a line are permuted by its number, chunk ^ (line & 7). A lane
// reads SPAN / 4 consecutive columns of a row at once. The fragment of step i wants positions
// 16 i + 2 quad + {0, 1, 8, 9}, which are given columns (SPAN / 4) quad + 4 i + {0, 1, 2, 3}; the
// activations take the same order. A sum does not mind. Rows of a fragment are taken as
// 0 4 2 6 1 5 3 7, so that the lanes of a load meet all 32 banks.
//
//   WN x WM x WK warps   16 RT rows and 8 NT tokens each, UNITS times 64 columns of a stage
//
// Compile-time: RT, NT, WN, WM, WK, UNITS (WK UNITS even), STAGES, BLOCKS (a multiprocessor), GROUP
// (32, 64 or 128: the largest that divides a group), SCALES (0 grid8, 1 float16, 2 bfloat16,
// 3 float32), BF16.

constexpr int BN = 16 * RT * WN;
constexpr int MT = 8 * NT * WM;
constexpr int KB = 64 * WK * UNITS;
constexpr int BOXES = KB / 128;
constexpr int W_BOX = BN * 128;
constexpr int X_BOX = MT * 128;
constexpr int STAGE_BYTES = BOXES * (W_BOX + 2 * X_BOX);
constexpr int THREADS = 32 * WN * WM * WK;
constexpr int OWNERS = 32 * WN * WM;
constexpr int ACC = RT * NT * 4;
constexpr int SPAN = GROUP == 32 ? 32 : 64;
constexpr int RUN = GROUP < 64 * UNITS ? GROUP : 64 * UNITS;  // columns between two scales
constexpr int RUNS = 64 * UNITS / RUN;

static_assert(STAGES >= 2 && KB % 128 == 0, "a ring, of whole boxes");

struct Operands {
    const u8* packed;
    const u16* x;
    Problem p;
};

// Row of a fragment's row 0..7 inside its eight rows of a tile.
__device__ __forceinline__ int row_in_eight(int fragment_row) {
    return (fragment_row & 1) * 4 + (fragment_row & 2) + (fragment_row >> 2);
}
// Token of a fragment's column 0..7; lines of x are read in chunks that need no other order in
// spans of 64.
__device__ __forceinline__ int token_in_eight(int column) {
    return SPAN == 64 ? column : row_in_eight(column);
}
__device__ __forceinline__ u32 chunk_address(int line, int chunk) {
    return line * 128 + ((chunk ^ (line & 7)) << 4);
}

// The copies of one block of K, everybody's part of them. Beyond the matrices there are zeros.
__device__ __forceinline__ void copy_block(const Operands& o, u32 stage, int tile, int k) {
    const Problem& p = o.p;
    int row = tile / p.tiles_m * BN, token = tile % p.tiles_m * MT;
    constexpr int W_CHUNKS = KB / 16, X_CHUNKS = KB / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < BN * W_CHUNKS; i += THREADS) {
        int line = i / W_CHUNKS, chunk = i % W_CHUNKS, column = k * KB + chunk * 16;
        bool inside = row + line < p.out_features && column < p.in_features;
        const u8* from = o.packed + (inside ? (long long)(row + line) * p.in_features + column : 0);
        copy16(stage + chunk / 8 * W_BOX + chunk_address(line, chunk % 8), from, inside);
    }
    u32 x = stage + BOXES * W_BOX;
#pragma unroll 4
    for (int i = threadIdx.x; i < MT * X_CHUNKS; i += THREADS) {
        int line = i / X_CHUNKS, chunk = i % X_CHUNKS, column = k * KB + chunk * 8;
        bool inside = token + line < p.num_tokens && column < p.in_features;
        const u16* from = o.x + (inside ? (long long)(token + line) * p.in_features + column : 0);
        copy16(x + chunk / 8 * X_BOX + chunk_address(line, chunk % 8), from, inside);
    }
}

// Walks a worker's blocks of K ahead of the products, one a call, to the end of its work.
struct Copier {
    const Operands& o;
    Schedule schedule;
    Segment s;

    __device__ Copier(const Operands& operands, int worker)
        : o(operands), schedule(operands.p, worker), s{0, 0, 0} {}
    __device__ __forceinline__ void next(u32 stage) {
        if (s.k_begin < s.k_end || schedule.pop(s)) copy_block(o, stage, s.tile, s.k_begin++);
        end_copy_group();
    }
};

__device__ __forceinline__ float scale_at(const Problem& p, long long i) {
#if SCALES == 0
    return (float)__ldg(p.codes + i);
#elif SCALES == 1
    return half_to_float(__ldg((const u16*)p.codes + i));
#elif SCALES == 2
    return __uint_as_float((u32)__ldg((const u16*)p.codes + i) << 16);
#else
    return __ldg((const float*)p.codes + i);
#endif
}

// Scales of this lane's rows for the columns of K block k that its warp takes.
__device__ __forceinline__ void load_scales(const Problem& p, int row, int k, int wk,
                                            float (&scales)[RUNS][RT][2]) {
#pragma unroll
    for (int c = 0; c < RUNS; ++c) {
        int column = k * KB + wk * UNITS * 64 + c * RUN;
        int group = min(column / p.group_size, p.num_groups - 1);
#pragma unroll
        for (int i = 0; i < RT * 2; ++i) {
            int n = min(row + 8 * i, p.out_features - 1);
            scales[c][i / 2][i % 2] = scale_at(p, (long long)n * p.num_groups + group);
        }
    }
}

// Add the product of SPAN columns: W rows from `w` (this lane's first row), tokens from `x` (its
// first); `first` counts 16 columns of the box, and 16-bit chunks of x begin at 2 (first % 4).
__device__ __forceinline__ void multiply(u32 w, u32 x, int row, int token, int quad, int first,
                                         float (&sums)[ACC]) {
    constexpr int STEPS = SPAN / 16;
    u32 a[RT][STEPS][4];
#pragma unroll
    for (int t = 0; t < RT; ++t) {
        u32 upper[STEPS], lower[STEPS];
        int chunk = first + quad * STEPS / 4;
        u32 at = w + t * 2048 + (((chunk ^ row) << 4) | (STEPS == 2 ? (quad & 1) * 8 : 0));
        load_words(at, upper);
        load_words(at + 1024, lower);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            a[t][i][0] = to_16bit(upper[i], LOW_BYTES);
            a[t][i][1] = to_16bit(lower[i], LOW_BYTES);
            a[t][i][2] = to_16bit(upper[i], HIGH_BYTES);
            a[t][i][3] = to_16bit(lower[i], HIGH_BYTES);
        }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        u32 b[STEPS][2];
#pragma unroll
        for (int c = 0; c < STEPS / 2; ++c) {
            int chunk = 2 * (first % 4) + quad * STEPS / 2 + c;
            uint4 v = load16(x + n * 1024 + ((chunk ^ token) << 4));
            b[2 * c][0] = v.x, b[2 * c][1] = v.y, b[2 * c + 1][0] = v.z, b[2 * c + 1][1] = v.w;
        }
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
#pragma unroll
            for (int t = 0; t < RT; ++t) mma(sums + (t * NT + n) * 4, a[t][i], b[i][0], b[i][1]);
    }
}

__device__ __forceinline__ void promote(const float (&scales)[RT][2], float (&sums)[ACC],
                                        float (&total)[ACC]) {
#pragma unroll
    for (int i = 0; i < ACC; ++i) {
        total[i] += scales[i / (NT * 4)][i % 4 / 2] * sums[i];
        sums[i] = 0.0f;
    }
}

// Sum over the WK warps of the same rows and tokens, into the first of them.
__device__ __forceinline__ void reduce_warps(float* buffer, float (&total)[ACC]) {
    if (WK == 1) return;
    int wk = threadIdx.x / OWNERS;
    float* mine = buffer + threadIdx.x % OWNERS;
    if (wk > 0)
#pragma unroll
        for (int i = 0; i < ACC; ++i) mine[((wk - 1) * ACC + i) * OWNERS] = total[i];
    __syncthreads();
    if (wk == 0)
#pragma unroll
        for (int other = 0; other < WK - 1; ++other)
#pragma unroll
            for (int i = 0; i < ACC; ++i) total[i] += mine[(other * ACC + i) * OWNERS];
    __syncthreads();
}

__device__ __forceinline__ void store(const Problem& p, int row, int token, int quad,
                                      const float (&total)[ACC]) {
#pragma unroll
    for (int i = 0; i < RT * 2; ++i) {
        int n = row + 8 * i;
        if (n >= p.out_features) continue;
        float scale = p.exponents ? ldexpf(1.0f, p.exponents[n]) : 1.0f;
        float offset = p.bias ? to_float(p.bias[n]) : 0.0f;
#pragma unroll
        for (int j = 0; j < NT * 2; ++j) {
            int m = token + j / 2 * 8 + token_in_eight(2 * quad + j % 2);
            float value = total[(i / 2 * NT + j / 2) * 4 + 2 * (i % 2) + j % 2];
            if (m < p.num_tokens)
                p.y[(long long)m * p.out_features + n] = (u16)pack(value * scale + offset, 0.0f);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
w8a16(const __grid_constant__ Operands o) {
    const Problem& p = o.p;
    u8* memory = shared_memory();
    u32 ring = shared_address(memory);
    float* buffer = (float*)(memory + STAGES * STAGE_BYTES);
    int worker = p.num_workers - 1 - (int)blockIdx.x;
    int warp = threadIdx.x / 32, fragment_row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    int wn = warp % WN, wm = warp / WN % WM, wk = warp / (WN * WM);
    int row = row_in_eight(fragment_row), token = token_in_eight(fragment_row);
    int first_row = wn * 16 * RT + row, first_token = wm * 8 * NT;

    Copier copier(o, worker);
    for (int i = 0; i < STAGES - 1; ++i) copier.next(ring + i * STAGE_BYTES);
    int stage = 0;
    Segment s;
    for (Schedule schedule(p, worker); schedule.pop(s);) {
        int n = s.tile / p.tiles_m * BN + first_row, m = s.tile % p.tiles_m * MT + first_token;
        float total[ACC], sums[ACC], scales[RUNS][RT][2], next_scales[RUNS][RT][2];
#pragma unroll
        for (int i = 0; i < ACC; ++i) total[i] = sums[i] = 0.0f;
        load_scales(p, n, s.k_begin, wk, next_scales);
        for (int k = s.k_begin; k < s.k_end; ++k) {
#pragma unroll
            for (int i = 0; i < RUNS * RT * 2; ++i) (&scales[0][0][0])[i] = (&next_scales[0][0][0])[i];
            if (k + 1 < s.k_end) load_scales(p, n, k + 1, wk, next_scales);
            wait_for_copies<STAGES - 2>();
            __syncthreads();  // the block's copies are here, and the stage before is free
            copier.next(ring + (stage + STAGES - 1) % STAGES * STAGE_BYTES);
            u32 w = ring + stage * STAGE_BYTES, x = w + BOXES * W_BOX;
#pragma unroll
            for (int c = 0; c < 64 * UNITS; c += SPAN) {
                int column = wk * UNITS * 64 + c;
                multiply(w + column / 128 * W_BOX + first_row * 128,
                         x + column / 64 * X_BOX + (first_token + token) * 128, row, token, quad,
                         column % 128 / 16, sums);
                if ((c + SPAN) % RUN == 0) promote(scales[c / RUN], sums, total);
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        reduce_warps(buffer, total);
        if (wk > 0) continue;
        if (s.k_begin > 0) {
            leave_partial<1, OWNERS>(p, worker, threadIdx.x, total);
            continue;
        }
        if (s.k_end < p.k_blocks)
            add_partials<1, OWNERS>(p, worker + 1, schedule.last_sharer(s), 1, 0, threadIdx.x, total);
        store(p, n, m, quad, total);
    }
}
