// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N], many tokens
//
// The transposed product y^T = W x^T makes the weights the first operand of wgmma, which may come
// from registers: INT8 bytes travel from the file's layout in global memory through shared memory
// to registers, become 16-bit there (three instructions for two weights, four in bfloat16), and never
// exist as 16-bit in memory. A lane reads just the two bytes that each register of a fragment wants:
// more loads than hopper_small.cu makes, but x needs no other order.
//
//   warpgroup 0      producer: bulk tensor copies of W [ROWS, KB] and x [TOKENS, KB] to a ring, by
//                    a thread; the rows' codes, by a warp
//   warpgroups 1...  consumers: 64 rows of W each
//
// A step is 16 columns, an instruction of the tensor cores. It takes its W from registers, and a warp
// that has queued it goes on when it begins. So each step's bytes are converted while the step before
// is multiplied, and were read from shared memory a step before that.
//
// A weight enters as q * code, an integer of at most 15 bits rounded once to the 16-bit type; the
// row's power of two is applied to the float32 sum. Nothing overflows whatever the scales are.
//
// Bulk copies move rows of 64 bytes no faster than rows of 128: where reading is the limit a stage
// has KB = 128 columns; where the ring would have too few stages, KB = 64.
//
// Compile-time: TOKENS and ROWS of a tile, WGS = ROWS / 64, KB, STAGES, CLUSTER, SPLIT, GROUPS
// (scales in 128 columns: 1, 2 or 4), BF16. The launcher also generates `queue_products(acc, a, x)`.

constexpr int STEPS = KB / 16;
constexpr int W_BYTES = ROWS * KB;
constexpr int X_BYTES = TOKENS * KB * 2;
constexpr int COPIED_BYTES = W_BYTES + X_BYTES;
constexpr int CODES = KB * GROUPS < 128 ? 1 : KB * GROUPS / 128;  // scales a row and stage
constexpr int CODE_STEPS = STEPS / CODES;
constexpr int CODE_PITCH = 8;  // words that hold a row's codes of a stage, at any address
constexpr int STAGE_BYTES = COPIED_BYTES + (ROWS * CODE_PITCH + 16 + 1023) / 1024 * 1024;
typedef Place<STAGE_BYTES> Here;
constexpr int X_BLOCK_BYTES = TOKENS * 128;
constexpr int OWN = ACC / SPLIT;
constexpr int PRODUCER_REGISTERS = WGS == 2 ? 40 : 32;
constexpr int CONSUMER_REGISTERS = WGS == 2 ? 232 : WGS == 3 ? 160 : 112;

// Columns a group, as a power of two; never reached where a row has one scale.
__device__ __forceinline__ int columns_a_group(const Problem& p) {
    return p.num_groups == 1 ? 30 : 31 - __clz(p.group_size);
}

// Whether the codes of K block k are not those of the block before it.
__device__ __forceinline__ bool codes_change(int k, int shift) {
    return KB * GROUPS >= 128 || (k * KB >> shift) << shift == k * KB;
}

// A warp brings each stage its rows' codes, where they are not those of the stage before.
__device__ __forceinline__ void produce_codes(const Problem& p, const Block& b) {
    int shift = columns_a_group(p);
    Here here(b);
    Segment s;
    for (Schedule schedule(p, b.worker); next_run(schedule, b, s);) {
        int m, n;
        tile_position(p, s.tile, m, n);
        CodeCopies<ROWS, CODE_PITCH> codes(p, first_row(p, b, n), threadIdx.x % 32);
        for (int k = s.k_begin; k < s.k_end; ++k, here.advance()) {
            int group = k * KB >> shift;
            barrier_wait(here.empty(), here.phase ^ 1);
            if (k == s.k_begin || codes_change(k, shift))
                codes.copy(here.stage + COPIED_BYTES, group, min(group + CODES, p.num_groups));
            arrive_when_copied(here.full());
        }
    }
#if SPLIT > 1
    wait_for_copied();  // the cluster's sums take their place
#endif
}

// A consumer's work on a run. `here` is the stage that is read, `taken` the one that is multiplied, two
// steps behind it, `held` the one before, not yet released.
struct Consumer {
    Here here;
    u32 taken, held;
    u32 line, code_line, selector;  // where in a stage the lane's bytes and codes lie
    int lane, shift;
    u32 begin[2];  // of the codes of its two rows in memory, from a whole word on
    u32 codes[2], pairs[2];  // as they are stored, of the steps being read; ready to multiply
    u32 raw[2][4], a[2][1][4];  // of steps, in turns: bytes, and fragments

    __device__ __forceinline__ Consumer(const Problem& p, const Block& b, int row_in_tile, u32 selector_,
                                        int lane_)
        : here(b), held(0), selector(selector_), lane(lane_), shift(columns_a_group(p)) {
        u32 swizzle = KB == 64 ? row_in_tile >> 1 & 3 : row_in_tile & 7;
        line = row_in_tile * KB + lane % 4 * 2 + swizzle * 16;
        code_line = COPIED_BYTES + row_in_tile * CODE_PITCH;
    }
    // The bytes of a step that the fragments want, and at a group's first step, or a run's, its code.
    // The stage that is read has K block k.
    template <int STEP>
    __device__ __forceinline__ void read(const Problem& p, int k, bool is_first = false) {
        u32 address = here.stage + line ^ STEP << 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) raw[STEP % 2][i] = load_half(address + i % 2 * 8 * KB + i / 2 * 8);
        if (STEP % CODE_STEPS || !is_first && STEP == 0 && !codes_change(k, shift)) return;
        int group = k * KB >> shift, behind = STEP / CODE_STEPS;
        if (behind) behind = min(behind, p.num_groups - 1 - group);
#pragma unroll
        for (int h = 0; h < 2; ++h)
            codes[h] = load_byte(here.stage + code_line + h * 8 * CODE_PITCH +
                                 (begin[h] + group & 3) + behind);
    }
    template <int STEP> __device__ __forceinline__ void convert() {
        if (STEP % CODE_STEPS == 0)
#pragma unroll
            for (int h = 0; h < 2; ++h) pairs[h] = pack((float)codes[h], (float)codes[h]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[STEP % 2][0][i] = scaled(raw[STEP % 2][i], selector, pairs[i % 2]);
    }
    // Where the descriptor of a step's x begins.
    template <int STEP> __device__ __forceinline__ u32 x() const {
        constexpr int AT = W_BYTES + STEP / 4 * X_BLOCK_BYTES;
        return (taken >> 4) + (AT / 16 + DESCRIPTOR_LOW + STEP % 4 * 2);
    }
    __device__ __forceinline__ void release() {
        if (held) release_stage(held + STAGE_BYTES - 8, lane);
    }
    // Multiply a step; meanwhile convert the next and read the one after it. LAST is a run's last stage.
    template <bool LAST, int STEP>
    __device__ __forceinline__ void multiply(const Problem& p, int k, float (&acc)[ACC]) {
        constexpr bool AHEAD = STEP + 2 >= STEPS;
        queue_products(acc, a[STEP % 2], x<STEP>());
        if (STEP + 2 == STEPS) here.advance();
        if (STEP + 2 == STEPS && !LAST) barrier_wait(here.full(), here.phase);
        if (!AHEAD || !LAST) read<(STEP + 2) % STEPS>(p, AHEAD ? k + 1 : k);
        wgmma_wait<1>();
        if (STEP == 0) release();
        if (STEP + 1 < STEPS || !LAST) convert<(STEP + 1) % STEPS>();
        if constexpr (STEP + 1 < STEPS) multiply<LAST, STEP + 1>(p, k, acc);
    }
    template <bool LAST>
    __device__ __forceinline__ void multiply_stage(const Problem& p, int k, float (&acc)[ACC]) {
        multiply<LAST, 0>(p, k, acc);
        held = taken;
        taken = here.stage;
    }
    // The sums of K blocks [k, k_end) of a tile whose lane's first row is `row` of W.
    __device__ __forceinline__ void run(const Problem& p, int row, int k, int k_end, float (&acc)[ACC]) {
        for (int h = 0; h < 2; ++h)
            begin[h] = first_byte(p.codes + (long long)min(row + 8 * h, p.out_features - 1) * p.num_groups);
        taken = here.stage;
        barrier_wait(here.full(), here.phase);
        read<0>(p, k, true);
        convert<0>();
        read<1>(p, k);
        for (; k + 1 < k_end; ++k) multiply_stage<false>(p, k, acc);
        multiply_stage<true>(p, k, acc);
    }
    // Wait for the products of a run.
    __device__ __forceinline__ void finish() {
        wgmma_wait<0>();
        release();
        held = 0;
    }
};

// Each block of a cluster collects, in the order of the blocks, the sums of its own part of the
// tokens. The ring has done its work by then and takes what the others send. All threads of the
// cluster meet twice in here; those that do not multiply call `meet_collectors`.
__device__ __forceinline__ void collect(const Block& b, int thread, const float (&sums)[ACC],
                                        float (&own)[OWN]) {
    cluster_sync();
#pragma unroll
    for (int i = 0; i < ACC; i += 4) {
        u32 remote, local = b.ring + ((b.rank * OWN + i % OWN) / 4 * CONSUMERS + thread) * 16;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(i / OWN));
        asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote),
                     "f"(sums[i]), "f"(sums[i + 1]), "f"(sums[i + 2]), "f"(sums[i + 3])
                     : "memory");
    }
    cluster_sync();
#pragma unroll
    for (int i = 0; i < OWN; ++i) own[i] = 0.0f;
    for (int rank = 0; rank < SPLIT; ++rank) {
#pragma unroll
        for (int i = 0; i < OWN; i += 4) {
            uint4 v = load16(b.ring + ((rank * OWN + i) / 4 * CONSUMERS + thread) * 16);
            own[i] += __uint_as_float(v.x);
            own[i + 1] += __uint_as_float(v.y);
            own[i + 2] += __uint_as_float(v.z);
            own[i + 3] += __uint_as_float(v.w);
        }
    }
}
__device__ __forceinline__ void meet_collectors() {
#if SPLIT > 1
    __syncwarp();
    cluster_sync();
    cluster_sync();
#endif
}

// What becomes of a run's sums: collected by the cluster, or left for the block that starts the
// tile, or made whole; and stored.
__device__ __forceinline__ void finish_run(const Problem& p, const Block& b,
                                           const Schedule& schedule, const Segment& s, int m,
                                           int warp_row, int thread, int lane,
                                           const RowEnds<2>& ends, float (&sums)[ACC]) {
    u16* buffer = b.buffers + thread / 32 * (STORE_BYTES / 2);
    bool has_rows = thread / 32 * 16 < p.tile_rows;
#if SPLIT > 1
    float own[OWN];
    collect(b, thread, sums, own);
    if (has_rows)
        store_rows(p, m * TOKENS + b.rank * (OWN * 2), warp_row, lane, ends, buffer, own);
#else
    if (finish_shared(p, b, schedule, s, thread, sums) && has_rows)
        store_rows(p, m * TOKENS, warp_row, lane, ends, buffer, sums);
#endif
}

// The selector as a number in a register: the compiler would load a constant each time.
__device__ __forceinline__ u32 kept_selector(u16* buffer, int lane) {
    volatile u32* mine = (u32*)buffer + lane;
    *mine = LOW_BYTES;
    return *mine;
}

__device__ __forceinline__ void consume(const Problem& p, const Block& b) {
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    int row_in_tile = warp * 16 + lane / 4;
    u32 selector = kept_selector(b.buffers + warp * (STORE_BYTES / 2), lane);
    Consumer c(p, b, row_in_tile, selector, lane);
    Schedule schedule(p, b.worker);
    Segment s;
    while (next_run(schedule, b, s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int tile_row = first_row(p, b, n);
        float acc[ACC];
#pragma unroll
        for (int i = 0; i < ACC; ++i) acc[i] = 0.0f;
        StoredRowEnds<2> ends(p, tile_row + row_in_tile);
        c.run(p, tile_row + row_in_tile, s.k_begin, s.k_end, acc);
        c.finish();
        finish_run(p, b, schedule, s, m, tile_row + warp * 16, thread, lane, ends, acc);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
#if CLUSTER * SPLIT > 1
__cluster_dims__(CLUSTER * SPLIT, 1, 1)
#endif
w8a16_large(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
            const __grid_constant__ Problem p) {
    extern __shared__ u8 raw[];
    Block block = begin_block<STAGE_BYTES, 1 + 32>(p, raw);
    if (threadIdx.x < 128) {
        leave_registers<PRODUCER_REGISTERS>();
        auto copy = [&](u32 stage, int m, int k, u32 bar) {
#pragma unroll
            for (int sub = 0; sub < KB / 64; ++sub)
                copy_x(stage + W_BYTES + sub * X_BLOCK_BYTES, &x_map, k * KB + sub * 64, m * TOKENS,
                       block.rank, bar);
        };
        if (threadIdx.x == 0) produce<KB, 1, STAGE_BYTES, COPIED_BYTES>(&w_map, p, block, copy);
        if (threadIdx.x >= 96) produce_codes(p, block);
        meet_collectors();
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(p, block);
    }
    __syncwarp();
    cluster_sync();
}
