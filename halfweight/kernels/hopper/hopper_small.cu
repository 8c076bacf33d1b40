// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N], M <= 64
//
// Reading the weights is the whole cost here, so one persistent block a multiprocessor keeps a ring
// of bulk copies full, and everything else hides behind it. The product is y^T = W x^T by mma.sync
// with 16 rows of W a fragment: bytes become exact 16-bit integers in registers, a group of 128 (or
// half a box, for groups of 64) is summed in float32 by the tensor core, and the group's code
// multiplies that sum: nothing is rounded but the result.
//
// Weights lie in shared memory as the file has them, 128 bytes of a row together, in the 128-byte
// swizzle. A lane reads 16 consecutive bytes of a row at once. The tensor core's fragment wants, in
// step i of four, positions 16 i + 2 quad + {0, 1, 8, 9} of 64; so position 16 i + 8 h + 2 quad + b
// is given weight 16 quad + 4 i + 2 h + b, and the activations, read 16 at a time by the same lane,
// take the same order. A sum does not mind. Rows are taken as 0 4 1 5 2 6 3 7, so that eight lanes
// meet all 32 banks.
//
//   last warpgroup  producers: a lane brings boxes of W [BN, 128] bytes and of x [MT, 64] 16-bit numbers,
//                   all of a stage in two copies (the matrices seen as [rows, K / 128, 128 bytes]), and
//                   a warp the rows' codes
//   WN x WK warps   consumers: 16 RT rows each, UNITS times 64 columns of a stage each
//
// Compile-time: NT (8 tokens a tile), RT, WN, WK (WN WK = 8), UNITS (1 or even), STAGES, GROUPS (in
// 128 columns: 1 or 2), BF16.

constexpr int BN = 16 * RT * WN;
constexpr int MT = 8 * NT;
constexpr int KB = 64 * WK * UNITS;
constexpr int BOXES = KB / 128;
constexpr int W_BOX = BN * 128;
constexpr int X_BOX = MT * 128;
constexpr int STAGE_BYTES = BOXES * (W_BOX + 2 * X_BOX);
constexpr int CONSUMERS = 32 * WN * WK;
constexpr int OWNERS = 32 * WN;
constexpr int ACC = RT * NT * 4;
constexpr int CODES = UNITS == 1 ? 1 : UNITS / 2 * GROUPS;  // scales a row, for one warp and stage
constexpr int CODE_PITCH = (KB * GROUPS / 128 + 7) / 4 * 4;   // the words of a row that hold a stage's

// Row of a fragment's row 0..7 inside its eight rows of a tile.
__device__ __forceinline__ int row_in_eight(int fragment_row) {
    return (fragment_row & 1) * 4 + (fragment_row >> 1);
}

// Weights are nobody's output: those of the first stages are asked for before the kernel ahead of
// this one has ended, activations after.
__device__ __forceinline__ void produce(const TensorMap* w_map, const TensorMap* x_map,
                                        const Problem& p, u32 ring, u32 full, u32 empty,
                                        int worker) {
    auto copy_weights = [&](int stage, int tile, int k) {
        barrier_expect(full + 8 * stage, STAGE_BYTES);
        copy_weights_box(ring + stage * STAGE_BYTES, w_map, tile * BN, k * BOXES, full + 8 * stage);
    };
    Segment s;
    int early = 0;
    for (Schedule first(p, worker); early < STAGES && first.pop(s);)
        for (int k = s.k_begin; k < s.k_end && early < STAGES; ++k)
            copy_weights(early++, s.tile, k);
    wait_for_previous_kernel();
    int stage = 0, phase = 0;
    for (Schedule schedule(p, worker); schedule.pop(s);) {
        for (int k = s.k_begin; k < s.k_end; ++k) {
            if (early > 0) {
                --early;
            } else {
                barrier_wait(empty + 8 * stage, phase ^ 1);
                copy_weights(stage, s.tile, k);
            }
            u32 x = ring + stage * STAGE_BYTES + BOXES * W_BOX;
            copy_box(x, x_map, 0, k * 2 * BOXES, full + 8 * stage);
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
    }
}

// Codes of row n from those of K block k on, in memory; `shift` takes a column to its group.
__device__ __forceinline__ const u8* row_codes(const Problem& p, int n, int k, int shift) {
    return p.codes + (long long)min(n, p.out_features - 1) * p.num_groups + (k * KB >> shift);
}

// A warp brings each stage its rows' codes.
__device__ __forceinline__ void produce_codes(const Problem& p, u32 area, u32 full, u32 empty, int worker,
                                              int shift) {
    int stage = 0, phase = 0;
    Segment s;
    for (Schedule schedule(p, worker); schedule.pop(s);) {
        CodeCopies<BN, CODE_PITCH> codes(p, s.tile * BN, threadIdx.x % 32);
        for (int k = s.k_begin; k < s.k_end; ++k) {
            int end = min(((k + 1) * KB - 1 >> shift) + 1, p.num_groups);
            barrier_wait(empty + 8 * stage, phase ^ 1);
            codes.copy(area + stage * BN * CODE_PITCH, k * KB >> shift, end);
            arrive_when_copied(full + 8 * stage);
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
    }
}

// Codes of this lane's rows for the columns of K block k that its warp takes.
__device__ __forceinline__ void load_codes(const Problem& p, u32 area, int tile_row, int row, int k,
                                           int shift, int wk, u32 (&codes)[CODES][RT][2]) {
    int first = k * KB >> shift;
#pragma unroll
    for (int i = 0; i < RT * 2; ++i) {
        u32 from = area + (row + 8 * i) * CODE_PITCH +
                   first_byte(row_codes(p, tile_row + row + 8 * i, k, shift)) - first;
#pragma unroll
        for (int c = 0; c < CODES; ++c) {
            int column = k * KB + wk * UNITS * 64 + c * (128 / GROUPS);
            codes[c][i / 2][i % 2] = load_byte(from + min(column >> shift, p.num_groups - 1));
        }
    }
}

// Add the product of 64 columns: W rows from `w` (this lane's first row), tokens from `x`.
__device__ __forceinline__ void multiply(u32 w, u32 x, int fragment_row, int quad, int unit,
                                         float (&sums)[ACC]) {
    u32 a[RT][4][4];
#pragma unroll
    for (int t = 0; t < RT; ++t) {
        u32 chunk = ((4 * unit + quad) ^ row_in_eight(fragment_row)) << 4;
        uint4 upper = load16(w + t * 2048 + chunk), lower = load16(w + t * 2048 + 1024 + chunk);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[t][i][0] = to_16bit(word(upper, i), LOW_BYTES);
            a[t][i][1] = to_16bit(word(lower, i), LOW_BYTES);
            a[t][i][2] = to_16bit(word(upper, i), HIGH_BYTES);
            a[t][i][3] = to_16bit(word(lower, i), HIGH_BYTES);
        }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        u32 line = x + n * 1024 + fragment_row * 128;
        uint4 low = load16(line + (((2 * quad) ^ fragment_row) << 4));
        uint4 high = load16(line + (((2 * quad + 1) ^ fragment_row) << 4));
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int t = 0; t < RT; ++t)
                mma(sums + (t * NT + n) * 4, a[t][i], word(i < 2 ? low : high, 2 * i % 4),
                    word(i < 2 ? low : high, 2 * i % 4 + 1));
    }
}

__device__ __forceinline__ void promote(const u32 (&codes)[RT][2], float (&sums)[ACC],
                                        float (&total)[ACC]) {
#pragma unroll
    for (int i = 0; i < ACC; ++i) {
        total[i] += (float)codes[i / (NT * 4)][i % 4 / 2] * sums[i];
        sums[i] = 0.0f;
    }
}

// Sum over the WK warps of the same rows, into the first of them.
__device__ __forceinline__ void reduce_warps(float* buffer, int wn, int wk, int lane,
                                             float (&total)[ACC]) {
    if (WK == 1) return;
    float* mine = buffer + wn * 32 + lane;
    if (wk > 0)
#pragma unroll
        for (int i = 0; i < ACC; ++i) mine[((wk - 1) * ACC + i) * OWNERS] = total[i];
    named_sync<1, CONSUMERS>();
    if (wk == 0)
#pragma unroll
        for (int other = 0; other < WK - 1; ++other)
#pragma unroll
            for (int i = 0; i < ACC; ++i) total[i] += mine[(other * ACC + i) * OWNERS];
    named_sync<1, CONSUMERS>();
}

__device__ __forceinline__ void store(const Problem& p, int row, int quad, const RowEnds<RT * 2>& ends,
                                      const float (&total)[ACC]) {
#pragma unroll
    for (int t = 0; t < RT; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int n = row + 16 * t + 8 * h;
            if (n >= p.out_features) continue;
#pragma unroll
            for (int i = 0; i < NT * 2; ++i) {
                int token = i / 2 * 8 + 2 * quad + i % 2;
                float value = total[(t * NT + i / 2) * 4 + 2 * h + i % 2];
                value = value * ends.scale[2 * t + h] + ends.offset[2 * t + h];
                if (token < p.num_tokens)
                    p.y[(long long)token * p.out_features + n] = (u16)pack(value, 0.0f);
            }
        }
}

__device__ __forceinline__ void consume(const Problem& p, u32 ring, u32 area, u32 full, u32 empty,
                                        float* buffer, int worker, int shift) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int wn = warp % WN, wk = warp / WN, fragment_row = lane / 4, quad = lane % 4;
    int row_in_tile = wn * 16 * RT + row_in_eight(fragment_row);
    auto row_of = [&](const Segment& s) { return s.tile * BN + row_in_tile; };
    Schedule schedule(p, worker);
    Segment s, next;
    if (!schedule.pop(next)) return;
    StoredRowEnds<RT * 2> next_ends(p, row_of(next));
    int stage = 0, phase = 0;
    for (bool is_last = false; !is_last;) {
        s = next;
        is_last = !schedule.pop(next);
        int row = row_of(s);
        StoredRowEnds<RT * 2> ends = next_ends;
        next_ends = StoredRowEnds<RT * 2>(p, row_of(next));  // while this run is multiplied
        float total[ACC], sums[ACC];
#pragma unroll
        for (int i = 0; i < ACC; ++i) total[i] = sums[i] = 0.0f;
        for (int k = s.k_begin; k < s.k_end; ++k) {
            u32 codes[CODES][RT][2], w = ring + stage * STAGE_BYTES, x = w + BOXES * W_BOX;
            barrier_wait(full + 8 * stage, phase);
            load_codes(p, area + stage * BN * CODE_PITCH, s.tile * BN, row_in_tile, k, shift, wk, codes);
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                int unit = wk * UNITS + u;
                multiply(w + unit / 2 * W_BOX + row_in_tile * 128, x + unit * X_BOX, fragment_row,
                         quad, unit % 2, sums);
                if (UNITS == 1 || GROUPS == 2 || u % 2 == 1)
                    promote(codes[UNITS == 1 ? 0 : u * GROUPS / 2], sums, total);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * stage);
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
        reduce_warps(buffer, wn, wk, lane, total);
        if (wk > 0) continue;
        if (s.k_begin > 0) {
            leave_partial<2, OWNERS>(p, worker, wn * 32 + lane, total);
            continue;
        }
        if (s.k_end < p.k_blocks)
            add_partials<2, OWNERS>(p, worker + 1, schedule.last_sharer(s), 1, 0, wn * 32 + lane,
                                    total);
        store(p, row, quad, ends, total);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
w8a16_small(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
            const __grid_constant__ Problem p) {
    extern __shared__ u8 raw[];
    u8* base = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
    u32 ring = shared_address(base);
    u8* after = base + STAGES * STAGE_BYTES;
    u32 full = shared_address(after) + (WK - 1) * ACC * OWNERS * 4, empty = full + 8 * STAGES;
    u32 area = empty + 8 * STAGES;
    int worker = p.num_workers - 1 - (int)blockIdx.x;
    int shift = p.num_groups == 1 ? 30 : 31 - __clz(p.group_size);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, 1 + 32);
            barrier_init(empty + 8 * i, CONSUMERS / 32);
        }
        barriers_are_there();
    }
    if (threadIdx.x == CONSUMERS) {
        prefetch_map(&w_map);
        prefetch_map(&x_map);
    }
    let_next_kernel_start();
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        leave_registers<40>();
        if (threadIdx.x == CONSUMERS) produce(&w_map, &x_map, p, ring, full, empty, worker);
        if (threadIdx.x >= CONSUMERS + 96) produce_codes(p, area, full, empty, worker, shift);
    } else {
        take_registers<232>();
        consume(p, ring, area, full, empty, (float*)after, worker, shift);
    }
}
