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
// 3 float32), SCALED, BF16.

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
#ifndef SPAN_COLUMNS
#define SPAN_COLUMNS (GROUP == 32 || RT > 2 ? 32 : 64)
#endif
constexpr int SPAN = SPAN_COLUMNS;
constexpr int RUN = GROUP < 64 * UNITS ? GROUP : 64 * UNITS;  // columns between two scales
constexpr int RUNS = 64 * UNITS / RUN;

#ifndef DOUBLE_A
#define DOUBLE_A 0
#endif
#ifndef MID
#define MID 3
#endif

static_assert(STAGES >= 2 && KB % 128 == 0, "a ring, of whole boxes");
static_assert(!SCALED || SCALES == 0, "codes are the scales that 16 bits hold whatever they are");

constexpr int SCALE_BYTES = SCALES == 0 ? 1 : SCALES == 3 ? 4 : 2;

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

// A thread's part of the copies of one matrix of SIZE bytes a number: the same 16 bytes of every
// STEP-th line of a block. Lines beyond the matrix are left as they are: they end in sums that nobody
// stores. Beyond its columns x is zero, and W, which is finite whatever its bytes, is left too.
template <int SIZE, int LINES> struct Share {
    static constexpr int CHUNKS = KB * SIZE / 16, STEP = THREADS / CHUNKS, COPIES = LINES / STEP;
    static_assert(THREADS % CHUNKS == 0 && LINES % STEP == 0, "equal shares");
    const u8* from;
    u32 to;
    int lines;  // to copy

    __device__ __forceinline__ static int first_column() { return threadIdx.x % CHUNKS * (16 / SIZE); }
    __device__ __forceinline__ void init() {
        int line = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        to = chunk / 8 * LINES * 128 + chunk_address(line, chunk % 8);
    }
    __device__ __forceinline__ void aim(const void* matrix, int height, int width, int first,
                                        int column) {
        int line = threadIdx.x / CHUNKS;
        from = (const u8*)matrix + ((long long)(first + line) * width + column + first_column()) * SIZE;
        lines = (height - first - line + STEP - 1) / STEP;
    }
    // Part `part` of `parts`.
    __device__ __forceinline__ void copy(u32 box, int columns, u32 width, int part, int parts) const {
        bool inside = first_column() < columns;
        int wanted = SIZE == 2 || inside ? lines : 0;
        u32 stride = width * (SIZE * STEP);
#pragma unroll
        for (int j = COPIES * part / parts; j < COPIES * (part + 1) / parts; ++j)
            if (j < wanted)
                copy16(box + (to ^ ((j * STEP & 7) << 4)) + j * STEP * 128,
                       from + (u64)stride * j, SIZE == 1 || inside);
    }
};

// Walks a worker's blocks of K ahead of the products to the end of its work: `next`, the parts of a
// stage in between products, `done`. Where it is in the schedule is needed rarely and kept in memory.
struct Copier {
    const Operands& o;
    volatile int wave, next_block, end;
    Share<1, BN> w;
    Share<2, MT> x;
    int left, columns;  // blocks of this run; columns to the end of a line

    __device__ Copier(const Operands& operands, int worker) : o(operands), left(0), columns(0) {
        Schedule schedule(o.p, worker);
        wave = 0, next_block = schedule.next, end = schedule.end;
        w.init(), x.init();
        w.lines = x.lines = 0;
    }
    __device__ __forceinline__ void next(int worker) {
        if (left == 0) begin(worker);
    }
    __device__ __forceinline__ void copy(u32 stage, int part, int parts) const {
        w.copy(stage, columns, o.p.in_features, part, parts);
        x.copy(stage + BOXES * W_BOX, columns, o.p.in_features, part, parts);
    }
    __device__ __forceinline__ void done() {
        w.from += KB, x.from += 2 * KB;
        columns -= KB;
        --left;
        end_copy_group();
    }
    __device__ __forceinline__ void begin(int worker) {
        const Problem& p = o.p;
        Schedule schedule(p, worker, wave, next_block, end);
        Segment s;
        left = -1;  // never again, if there is no more
        w.lines = x.lines = 0;
        if (!schedule.pop(s)) return;
        wave = schedule.wave, next_block = schedule.next;
        int row = schedule.row_tile(s) * BN, token = schedule.token_tile(s) * MT;
        left = s.k_end - s.k_begin;
        columns = p.in_features - s.k_begin * KB;
        w.aim(o.packed, p.out_features, p.in_features, row, s.k_begin * KB);
        x.aim(o.x, p.num_tokens, p.in_features, token, s.k_begin * KB);
        for (int i = row + threadIdx.x; i < min(row + BN, p.out_features); i += THREADS) {
            prefetch(p.codes + ((long long)i * p.num_groups + s.k_begin * KB / p.group_size) * SCALE_BYTES);
            if (p.exponents && i % 32 == 0) prefetch(p.exponents + i);
            if (p.bias && i % 16 == 0) prefetch(p.bias + i);
        }
    }
};

#if SCALES == 0
typedef u8 RawScale;
__device__ __forceinline__ RawScale raw_scale_at(const Problem& p, u32 i) { return __ldg(p.codes + i); }
__device__ __forceinline__ float scale_of(RawScale v) { return (float)v; }
#else
typedef float RawScale;
__device__ __forceinline__ float scale_at(const Problem& p, u32 i);
__device__ __forceinline__ RawScale raw_scale_at(const Problem& p, u32 i) { return scale_at(p, i); }
__device__ __forceinline__ float scale_of(RawScale v) { return v; }
#endif
__device__ __forceinline__ float scale_at(const Problem& p, u32 i) {
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

#if SCALED
typedef u32 Scale;  // twice, to multiply pairs of weights
__device__ __forceinline__ Scale as_factor(float scale) { return pack(scale, scale); }
#else
typedef float Scale;
__device__ __forceinline__ Scale as_factor(float scale) { return scale; }
#endif

// Scales of a lane's rows, and where in K they are.
struct Scales {
    const Problem& p;
    int row;
    float groups;  // a column

    __device__ Scales(const Problem& problem, int first)
        : p(problem), row(first), groups(1.0f / problem.group_size) {}
    // For the columns from `column` on, or the last of a row. With half a column more no rounding
    // crosses a border of groups, to two million columns at least.
    __device__ __forceinline__ void load(int column, Scale (&scales)[RUNS][RT][2]) const {
#pragma unroll
        for (int c = 0; c < RUNS; ++c) {
            int last = p.out_features - 1;
            int group = min((int)((column + c * RUN + 0.5f) * groups), p.num_groups - 1);
#pragma unroll
            for (int i = 0; i < RT * 2; ++i)
                scales[c][i / 2][i % 2] = as_factor(scale_at(p, (u32)min(row + 8 * i, last) * p.num_groups + group));
        }
    }
    __device__ __forceinline__ void load_raw(int column, RawScale (&scales)[RUNS][RT][2]) const {
#pragma unroll
        for (int c = 0; c < RUNS; ++c) {
            int last = p.out_features - 1;
            int group = min((int)((column + c * RUN + 0.5f) * groups), p.num_groups - 1);
#pragma unroll
            for (int i = 0; i < RT * 2; ++i)
                scales[c][i / 2][i % 2] = raw_scale_at(p, (u32)min(row + 8 * i, last) * p.num_groups + group);
        }
    }
};

// A warp's products of a stage, in items: 32 columns (two steps) with NB times 8 tokens. Operands of
// an item are loaded while the one before is multiplied.
#ifndef TOKENS_AT_ONCE
#define TOKENS_AT_ONCE (NT % 2 == 0 ? 2 : 1)
#endif
constexpr int NB = TOKENS_AT_ONCE;
constexpr int PAIRS = NT / NB;
constexpr int ITEMS = 2 * UNITS * PAIRS;
constexpr int STEPS = SPAN / 16;

struct Fragments {
    u32 w, x;  // this lane's first chunk of each in the stage
    u32 offsets;  // OFFSETS in a register, so that what takes them has room for other constants
    u32 upper[RT][STEPS], lower[RT][STEPS], a_of[1 + DOUBLE_A][RT][2][4], b[2][NB][4];

    // Where a lane's chunks begin in a stage; those of other columns differ in single bits.
    __device__ __forceinline__ static u32 w_at(int line, int row, int quad, int column) {
        int chunk = column % 128 / 16 + quad * STEPS / 4;
        return column / 128 * W_BOX + line * 128 + ((chunk ^ row) << 4) + (STEPS == 2 ? (quad & 1) * 8 : 0);
    }
    __device__ __forceinline__ static u32 x_at(int line, int token, int quad, int column) {
        int chunk = column % 64 / 16 * 2 + quad * STEPS / 2;
        return BOXES * W_BOX + column / 64 * X_BOX + line * 128 + ((chunk ^ token) << 4);
    }
    // W of SPAN columns, and x of an item.
    __device__ __forceinline__ void load_w(int item) {
        int span = item / PAIRS * 32 / SPAN * SPAN;
        u32 from = w ^ (span % 128 / 16 << 4);
#pragma unroll
        for (int t = 0; t < RT; ++t) {
            load_words(from + span / 128 * W_BOX + t * 2048, upper[t]);
            load_words(from + span / 128 * W_BOX + t * 2048 + 1024, lower[t]);
        }
    }
    __device__ __forceinline__ void load_x(int item) {
        int at = item / PAIRS * 32, span = at / SPAN * SPAN;
        u32 from = x ^ ((2 * (span % 64 / 16) + at % SPAN / 32) << 4);
#pragma unroll
        for (int n = 0; n < NB; ++n) {
            uint4 v = load16(from + span / 64 * X_BOX + (item % PAIRS * NB + n) * 1024);
            u32(&to)[4] = b[item % 2][n];
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
    }
    __device__ __forceinline__ void convert(int item, const Scale (&scales)[RT][2]) {
        u32(&a)[RT][2][4] = a_of[item / PAIRS % (1 + DOUBLE_A)];
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
        u32(&a)[RT][2][4] = a_of[item / PAIRS % (1 + DOUBLE_A)];
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

// What a row's sums are multiplied with, and what is added.
struct Ends {
    float scale[RT * 2], offset[RT * 2];

    __device__ __forceinline__ Ends(const Problem& p, int row) {
#pragma unroll
        for (int i = 0; i < RT * 2; ++i) {
            int n = min(row + 8 * i, p.out_features - 1);
            scale[i] = p.exponents ? ldexpf(1.0f, __ldg(p.exponents + n)) : 1.0f;
            offset[i] = p.bias ? to_float(__ldg(p.bias + n)) : 0.0f;
        }
    }
};

__device__ __forceinline__ void store(const Problem& p, const Ends& ends, int row, int token, int quad,
                                      const float (&total)[ACC]) {
#pragma unroll
    for (int i = 0; i < RT * 2; ++i) {
        int n = row + 8 * i;
        if (n >= p.out_features) continue;
        float scale = ends.scale[i], offset = ends.offset[i];
#pragma unroll
        for (int j = 0; j < NT * 2; ++j) {
            int m = token + j / 2 * 8 + token_in_eight(2 * quad + j % 2);
            float value = total[(i / 2 * NT + j / 2) * 4 + 2 * (i % 2) + j % 2];
            if (m < p.num_tokens)
                p.y[(long long)m * p.out_features + n] = (u16)pack(value * scale + offset, 0.0f);
        }
    }
}

#ifndef MEASURE_BEGIN
#define MEASURE_ENTRY
#define MEASURE_BEGIN
#define MEASURE_SEGMENT
#define MEASURE_SEGMENT_END
#define MEASURE_WAIT
#define MEASURE_BARRIER
#define MEASURE_GO
#define MEASURE_STAGE
#define MEASURE_END
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
w8a16(const __grid_constant__ Operands o) {
    MEASURE_ENTRY
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
    for (int i = 0; i < STAGES - 1; ++i) {
        copier.next(worker);
        copier.copy(ring + i * STAGE_BYTES, 0, 1);
        copier.done();
    }
    Fragments fragments;
    fragments.offsets = OFFSETS + (p.num_tokens < 0);
    int column = wk * UNITS * 64;
    u32 w = ring + Fragments::w_at(first_row, row, quad, column);
    u32 x = ring + Fragments::x_at(first_token + token, token, quad, column);
    static_assert(STAGES >= 3, "a stage is there half a stage before it is read");
    static_assert((SPAN == 64 || !DOUBLE_A) && PAIRS > 1, "what is late or early has registers of its own");
    constexpr int LAST = ITEMS - 1, W_ITEMS = PAIRS * STEPS / 2;
    int stage = 0;
    fragments.w = w, fragments.x = x;
    Segment s;
    bool is_first = true;
    MEASURE_BEGIN
    for (Schedule schedule(p, worker); schedule.pop(s);) {
        int n = schedule.row_tile(s) * BN + first_row, m = schedule.token_tile(s) * MT + first_token;
        float total[ACC], sums[SCALED ? 1 : ACC];
        RawScale raw[RUNS][RT][2];
        Scale scales[RUNS][RT][2], before[RT][2];
#pragma unroll
        for (int i = 0; i < ACC; ++i) total[i] = 0.0f;
        if (!SCALED)
#pragma unroll
            for (int i = 0; i < ACC; ++i) sums[SCALED ? 0 : i] = 0.0f;
        Scales of_rows(p, n);
        auto convert_raw = [&]() {
#pragma unroll
            for (int i = 0; i < RUNS * RT * 2; ++i)
                (&scales[0][0][0])[i] = as_factor(scale_of((&raw[0][0][0])[i]));
        };
        of_rows.load_raw(s.k_begin * KB + column, raw);
        if (is_first) {
            wait_for_copies<STAGES - 2>();
            __syncthreads();
            fragments.load_w(0), fragments.load_x(0);
            is_first = false;
        }
        convert_raw();
#pragma unroll
        for (int i = 0; i < RT * 2; ++i) (&before[0][0])[i] = (&scales[0][0][0])[i];
        if (DOUBLE_A) fragments.convert(0, scales[0]);
        MEASURE_SEGMENT
#pragma unroll 1
        for (int k = s.k_begin; k < s.k_end; ++k) {
            u32 free = ring + (stage + STAGES - 1) % STAGES * STAGE_BYTES;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            u32 next_w = w + stage * STAGE_BYTES, next_x = x + stage * STAGE_BYTES;
#pragma unroll
            for (int item = 0; item < ITEMS; ++item) {
                int group = item / PAIRS, columns = group * 32;
                bool is_group_end = item % PAIRS == PAIRS - 1;
                if (!DOUBLE_A && item % PAIRS == 0) fragments.convert(item, scales[columns / RUN]);
                if (item == MID) {  // the next stage is there, and nobody reads the one before any more
                    MEASURE_WAIT
                    wait_for_copies<STAGES - 3>();
                    MEASURE_BARRIER
                    __syncthreads();
                    MEASURE_GO
                    copier.next(worker);
                    of_rows.load_raw((k + 1) * KB + column, raw);
                }
                if (item > MID) copier.copy(free, item - MID - 1, LAST - MID);
                if (item == LAST) {
                    copier.done();
                    fragments.x = next_x;
                    fragments.load_x(0);
#pragma unroll
                    for (int i = 0; i < RT * 2; ++i)
                        (&before[0][0])[i] = (&scales[RUNS - 1][0][0])[i];
                    convert_raw();
                } else {
                    fragments.load_x(item + 1);
                }
                // Weights of the next items, or of the next stage.
                if (DOUBLE_A && is_group_end)
                    fragments.convert((item + 1) % ITEMS, scales[(item + 1) % ITEMS / PAIRS * 32 / RUN]);
                int w_item = DOUBLE_A ? item + PAIRS + 1 : item + 1;
                if (is_group_end && w_item % W_ITEMS == 0) {
                    if (w_item == ITEMS) fragments.w = next_w;
                    fragments.load_w(w_item % ITEMS);
                }
#if SCALED
                fragments.multiply(item, total);
#else
                fragments.multiply(item, sums);
                if (item == 0)
                    promote(LAST, before, sums, total);
                else if (((item - 1) / PAIRS * 32 + 32) % RUN == 0)
                    promote(item - 1, item == LAST ? before : scales[(item - 1) / PAIRS * 32 / RUN], sums, total);
#endif
            }
            MEASURE_STAGE
        }
#if !SCALED
        promote(LAST, before, sums, total);
#endif
        MEASURE_SEGMENT_END
        reduce_warps(buffer, total);
        if (wk > 0) continue;
        if (s.k_begin > 0) {
            leave_partial<1, OWNERS>(p, worker, threadIdx.x, total);
            continue;
        }
        Ends ends(p, n);
        if (s.k_end < p.k_blocks)
            add_partials<1, OWNERS>(p, worker + 1, schedule.last_sharer(s), 1, 0, threadIdx.x, total);
        store(p, ends, n, m, quad, total);
    }
    MEASURE_END
}
