// y[M, N] = x[M, K] dequantize(packed[N, K], scales[N, K/G])^T + bias[N], any M, for every GPU from
// compute capability 8.0 on.
//
// Only what all of these have is used: cp.async, mma.sync, shared memory from 99 KB. The product is
// y^T = W x^T with 16 rows of W a fragment: bytes become exact 16-bit integers in registers, a group
// (or 128 columns of it) is summed in float32 by the tensor core, and the group's scale multiplies
// that sum: nothing is rounded but the result. With SCALED, for many tokens and one-byte scales, a
// weight enters as q * code instead, an integer of at most 15 bits rounded once to the 16-bit type:
// one sum for each product, so that a warp has registers for twice as many and reads less for each.
// Blocks are persistent and keep a ring of copies full, past the end of a tile; see schedule.cuh for
// the order of tiles.
//
//   WN x WM x WK warps   16 RT rows and 8 NT tokens each, UNITS times 64 columns of a stage
//
// Compile-time: RT, NT, WN, WM, WK, UNITS (WK UNITS even), STAGES, BLOCKS (a multiprocessor), GROUP
// (32, 64 or 128: the largest that divides a group), SCALES (0 grid8, 1 float16, 2 bfloat16,
// 3 float32), SCALED, BF16.

__device__ __forceinline__ u32 stored_scale(const Problem& p, u32 i) {
#if SCALES == 0
    return __ldg(p.codes + i);
#elif SCALES == 3
    return __ldg((const u32*)p.codes + i);
#else
    return __ldg((const u16*)p.codes + i);
#endif
}
__device__ __forceinline__ float scale_of(u32 stored) {
    if (SCALES == 0) return (float)stored;
    if (SCALES == 1) return half_to_float((u16)stored);
    return __uint_as_float(SCALES == 2 ? stored << 16 : stored);
}

#if SCALED
typedef u32 Scale;  // twice, to multiply pairs of weights
__device__ __forceinline__ Scale as_factor(float scale) { return pack(scale, scale); }
#else
typedef float Scale;
__device__ __forceinline__ Scale as_factor(float scale) { return scale; }
#endif

// Scales of a lane's rows, and where in K they are. They are loaded a stage ahead, as they are stored:
// what is made of them waits for them.
struct Scales {
    const Problem& p;
    int row;
    float groups;  // a column
    u32 stored[RUNS][RT][2];

    __device__ Scales(const Problem& problem, int first)
        : p(problem), row(first), groups(1.0f / problem.group_size) {}
    // For the columns from `column` on, or the last of a row.
    __device__ __forceinline__ void load(int column) {
#pragma unroll
        for (int c = 0; c < RUNS; ++c) {
            int last = p.out_features - 1;
            int group = group_of(p, column + c * RUN, groups);
#pragma unroll
            for (int i = 0; i < RT * 2; ++i)
                stored[c][i / 2][i % 2] =
                    stored_scale(p, (u32)min(row + 8 * i, last) * p.num_groups + group);
        }
    }
    __device__ __forceinline__ void take(Scale (&scales)[RUNS][RT][2]) const {
#pragma unroll
        for (int i = 0; i < RUNS * RT * 2; ++i)
            (&scales[0][0][0])[i] = as_factor(scale_of((&stored[0][0][0])[i]));
    }
};

// A warp's products of a stage, in items: 32 columns (two steps) with NB times 8 tokens. Operands of
// an item are loaded while the one before is multiplied.
constexpr int NB = NT % 2 == 0 ? 2 : 1;
constexpr int PAIRS = NT / NB;
constexpr int ITEMS = 2 * UNITS * PAIRS;
constexpr int STEPS = SPAN / 16;
// Copies go between every so many items: in bursts where that was measured to be faster (H200).
constexpr int COPY_EVERY = NT > 4 && SCALED != (BLOCKS == 1) ? 1 : 4;

struct Fragments {
    u32 w, x;  // this lane's first row and first token in the stage
    u32 row, token, quad, column;
    u32 offsets;  // OFFSETS in a register, so that what takes them has room for other constants
    u32 upper[RT][STEPS], lower[RT][STEPS], a[RT][2][4], b[2][NB][4];

    // W of SPAN columns, and x of an item.
    __device__ __forceinline__ void load(int item) {
        u32 at = column + item / PAIRS * 32, span = at / SPAN * SPAN;
        if (item % (PAIRS * STEPS / 2) == 0)
#pragma unroll
            for (int t = 0; t < RT; ++t) {
                u32 chunk = span % 128 / 16 + quad * STEPS / 4;
                u32 words = w + span / 128 * W_BOX + t * 2048 + ((chunk ^ row) << 4) +
                            (STEPS == 2 ? (quad & 1) * 8 : 0);
                load_words(words, upper[t]);
                load_words(words + 1024, lower[t]);
            }
        u32 chunk = 2 * (span % 64 / 16) + quad * STEPS / 2 + at % SPAN / 32;
#pragma unroll
        for (int n = 0; n < NB; ++n) {
            uint4 v = load16(x + span / 64 * X_BOX + (item % PAIRS * NB + n) * 1024 +
                             ((chunk ^ token) << 4));
            u32(&to)[4] = b[item % 2][n];
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
    }
    __device__ __forceinline__ void convert(int item, const Scale (&scales)[RT][2]) {
#pragma unroll
        for (int t = 0; t < RT; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int step = item / PAIRS % (STEPS / 2) * 2 + i;
                a[t][i][0] = to_16bit(upper[t][step], LOW_BYTES, offsets);
                a[t][i][1] = to_16bit(lower[t][step], LOW_BYTES, offsets);
                a[t][i][2] = to_16bit(upper[t][step], HIGH_BYTES, offsets);
                a[t][i][3] = to_16bit(lower[t][step], HIGH_BYTES, offsets);
#if SCALED
#pragma unroll
                for (int j = 0; j < 4; ++j) a[t][i][j] = multiply_pairs(a[t][i][j], scales[t][j % 2]);
#endif
            }
    }
    __device__ __forceinline__ void multiply(int item, float (&sums)[ACC]) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int n = 0; n < NB; ++n)
#pragma unroll
                for (int t = 0; t < RT; ++t) {
                    float* c = sums + (t * NT + item % PAIRS * NB + n) * 4;
                    const u32(&x16)[4] = b[item % 2][n];
                    if (!SCALED && item / PAIRS * 32 % RUN == 0 && i == 0)
                        first_mma(c, a[t][i], x16[0], x16[1]);
                    else
                        mma(c, a[t][i], x16[2 * i], x16[2 * i + 1]);
                }
    }
};

// Add what an item's tokens have summed over a run.
__device__ __forceinline__ void promote(int item, const Scale (&scales)[RT][2],
                                        const float (&sums)[ACC], float (&total)[ACC]) {
#pragma unroll
    for (int t = 0; t < RT; ++t)
#pragma unroll
        for (int i = 0; i < NB * 4; ++i) {
            int at = (t * NT + item % PAIRS * NB) * 4 + i;
            total[at] += scales[t][i % 4 / 2] * sums[at];
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

typedef RowEnds<RT * 2, SCALES == 0> Ends;

// A tile's results in shared memory, a line of BN for each token. Chunks of 16 bytes are permuted so
// that the tokens that lanes write together lie in different banks.
constexpr int LINE_CHUNKS = BN / 8;
__device__ __forceinline__ int result_chunk(int token, int chunk) {
    return token * LINE_CHUNKS + (chunk ^ ((token ^ token >> 1) & 3));
}
__device__ __forceinline__ void lay_out(u16* results, int row, int token, int quad,
                                        const Ends& ends, const float (&total)[ACC]) {
#pragma unroll
    for (int i = 0; i < RT * 2; ++i)
#pragma unroll
        for (int j = 0; j < NT * 2; ++j) {
            int m = token + j / 2 * 8 + token_in_eight(2 * quad + j % 2), n = row + 8 * i;
            float value = total[(i / 2 * NT + j / 2) * 4 + 2 * (i % 2) + j % 2];
            results[result_chunk(m, n / 8) * 8 + n % 8] =
                (u16)pack(value * ends.scale[i] + ends.offset[i], 0.0f);
        }
}
// From there to y, 16 bytes at once where its lines allow that. All threads of the block call it.
__device__ __forceinline__ void store(const Problem& p, int row, int token, const u16* results) {
    int thread = thread_index();
    int tokens = min(MT, p.num_tokens - token), rows = min(BN, p.out_features - row);
    u16* y = p.y + (long long)token * p.out_features + row;
    if (p.out_features % 8 == 0)
        for (int i = thread; i < tokens * LINE_CHUNKS; i += THREADS) {
            int m = i / LINE_CHUNKS, n = i % LINE_CHUNKS * 8;
            if (n < rows)
                *(uint4*)(y + (long long)m * p.out_features + n) =
                    ((const uint4*)results)[result_chunk(m, n / 8)];
        }
    else
        for (int i = thread; i < tokens * BN; i += THREADS) {
            int m = i / BN, n = i % BN;
            if (n < rows)
                y[(long long)m * p.out_features + n] = results[result_chunk(m, n / 8) * 8 + n % 8];
        }
}

// Sums of other blocks that are read together: as many as there are registers for.
constexpr int AT_ONCE = ACC > 32 ? 1 : (ACC == 32 || THREADS * BLOCKS <= 384 ? 64 : 32) / ACC;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
w8a16(const __grid_constant__ Operands o) {
    const Problem& p = o.p;
    u8* memory = shared_memory();
    u32 ring = shared_address(memory);
    float* buffer = (float*)(memory + STAGES * STAGE_BYTES);
    int worker = p.num_workers - 1 - (int)blockIdx.x;
    int warp = threadIdx.x / 32, fragment_row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    int wn = warp % WN, wm = warp / WN % WM, wk = WK == 1 ? 0 : warp / (WN * WM);
    int row = row_in_eight(fragment_row), token = token_in_eight(fragment_row);
    int first_row = wn * 16 * RT + row, first_token = wm * 8 * NT;

    let_next_kernel_start();
    Copier copier(o, worker);
    copier.copy_first(ring);
    for (int i = 1; i < STAGES - 1; ++i) copier.copy_whole(ring + i * STAGE_BYTES);
    Fragments fragments;
    fragments.row = row, fragments.token = token, fragments.quad = quad;
    fragments.column = wk * UNITS * 64;
    fragments.offsets = OFFSETS + (p.num_tokens < 0);
    u32 w = first_row * 128, x = BOXES * W_BOX + (first_token + token) * 128;
    // The first item of a stage, when the copies of the whole block are there.
    auto begin_stage = [&](u32 stage) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        fragments.w = stage + w, fragments.x = stage + x;
        fragments.load(0);
    };
    // Addresses of the stage that is multiplied and of the one that copies go to. They are carried
    // along: what the compiler can work out from a stage's number it works out again for each copy.
    u32 last = ring + (STAGES - 1) * STAGE_BYTES, stage = ring, free = last;
    Segment s;
    Schedule schedule(p, worker);
    for (bool is_first = true; schedule.pop(s); is_first = false) {
        int n = schedule.row_tile(s) * BN, m = schedule.token_tile(s) * MT;
        float total[ACC], sums[SCALED ? 1 : ACC];
        Scale scales[RUNS][RT][2];
#pragma unroll
        for (int i = 0; i < ACC; ++i) total[i] = 0.0f;
        Scales of_rows(p, n + first_row);
        of_rows.load(s.k_begin * KB + fragments.column);
        if (is_first) begin_stage(stage);
        for (int k = s.k_begin; k < s.k_end; ++k) {
            of_rows.take(scales);
            of_rows.load((k + 1) * KB + fragments.column);
            copier.next();
            u32 next = stage == last ? ring : stage + STAGE_BYTES;
#pragma unroll
            for (int item = 0; item < ITEMS; ++item) {
                int columns = item / PAIRS * 32;
                if (item % PAIRS == 0) fragments.convert(item, scales[columns / RUN]);
                if (item + 1 < ITEMS) {
                    fragments.load(item + 1);
                    if (item % COPY_EVERY == 0)
                        copier.copy(free, item / COPY_EVERY, (ITEMS - 2) / COPY_EVERY + 1);
                } else {  // all that this stage holds is read: the next stage's copies may replace it
                    copier.done();
                    begin_stage(next);
                }
#if SCALED
                fragments.multiply(item, total);
#else
                fragments.multiply(item, sums);
                if ((columns + 32) % RUN == 0) promote(item, scales[columns / RUN], sums, total);
#endif
            }
            free = stage, stage = next;
        }
        Ends ends(p, n + first_row);
        if (s.k_begin == 0 && s.k_end < p.k_blocks) {
            int end = schedule.last_sharer(s);
            wait_for_partials<1, THREADS>(p, worker + 1, end, 1, 0, threadIdx.x);
            add_slots<OWNERS, AT_ONCE>(p, worker + 1 + wk, end, WK, threadIdx.x % OWNERS, total);
        }
        reduce_warps(buffer, total);
        if (s.k_begin > 0) {
            if (wk == 0) leave_partial<1, OWNERS>(p, worker, threadIdx.x, total);
            continue;
        }
        u16* results = (u16*)(memory + (free - ring));  // the stage just read
        if (wk == 0) lay_out(results, first_row, first_token, quad, ends, total);
        __syncthreads();
        store(p, n, m, results);
        __syncthreads();  // the copies of a stage come there next
    }
}
