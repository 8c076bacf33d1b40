// A product as every kernel of these families gets it, and the schedule of its tiles.
//
// Work: whole tiles first, then what is left is cut into equal runs of K blocks (stream-K), so that
// every multiprocessor ends at the same time. A run that does not start its tile leaves its float32
// sums in `partials`; the run that starts the tile adds them in a fixed order, so results do not
// change from call to call. It waits only for blocks of a lower index, which the hardware starts
// first, and for each of them: none may be without a run (schedule.py sees to it).

struct Problem {
    const u8* codes;
    const signed char* exponents;
    const u16* bias;
    u16* y;
    float* partials;
    int* flags;
    const float* steps;
    int num_tokens, out_features, in_features, group_size, num_groups;
    int tiles_m, tiles_n, tile_rows, k_blocks, whole_waves, num_workers, steps_stride;
    int share, spare;  // blocks of K that each worker has of shared tiles, and what is left over
};

// What the sums of a lane's rows are multiplied with and added to at a tile's end: of `row`, of
// `row` + 8, and so on; first as they are in memory. Scales of grid8 have exponents, others do not.
template <int COUNT, bool HAS_EXPONENTS = true> struct StoredRowEnds {
    int exponent[COUNT];
    u16 bias[COUNT];

    __device__ StoredRowEnds(const Problem& p, int row) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            int n = min(row + 8 * i, p.out_features - 1);
            exponent[i] = HAS_EXPONENTS ? p.exponents[n] : 0;
            bias[i] = p.bias ? p.bias[n] : (u16)0;
        }
    }
};
template <int COUNT, bool HAS_EXPONENTS = true> struct RowEnds {
    float scale[COUNT], offset[COUNT];

    __device__ RowEnds(const StoredRowEnds<COUNT, HAS_EXPONENTS>& stored) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            scale[i] = HAS_EXPONENTS ? power_of_two(stored.exponent[i]) : 1.0f;
            offset[i] = to_float(stored.bias[i]);
        }
    }
    __device__ RowEnds(const Problem& p, int row) : RowEnds(StoredRowEnds<COUNT, HAS_EXPONENTS>(p, row)) {}
};

// One run of K blocks [k_begin, k_end) of a tile.
struct Segment { int tile, k_begin, k_end; };

// The runs of one worker (a cluster): whole tiles, then its share of the stream-K remainder.
struct Schedule {
    const Problem& p;
    int worker, wave;
    int next, end;

    __device__ Schedule(const Problem& problem, int worker_) : p(problem), worker(worker_), wave(0) {
        next = share(worker);
        end = share(worker + 1);
    }
    // Where a worker's share begins; a spare block goes to those at which this rounds up.
    __device__ int share(int w) const {
        return p.share * w + (p.spare ? (int)((u32)(p.spare * w) / (u32)p.num_workers) : 0);
    }
    __device__ bool pop(Segment& s) {
        if (wave < p.whole_waves) {
            s = {wave * p.num_workers + worker, 0, p.k_blocks};
            ++wave;
            return s.tile < p.tiles_m * p.tiles_n;
        }
        if (next >= end) return false;
        int tile = next / p.k_blocks;
        s.tile = p.whole_waves * p.num_workers + tile;
        s.k_begin = next - tile * p.k_blocks;
        s.k_end = min(p.k_blocks, s.k_begin + end - next);
        next += s.k_end - s.k_begin;
        return true;
    }
    // Which rows of W and which tokens a tile has. Most products have one tile of tokens.
    __device__ int row_tile(const Segment& s) const {
        return p.tiles_m == 1 ? s.tile : s.tile / p.tiles_m;
    }
    __device__ int token_tile(const Segment& s) const {
        return p.tiles_m == 1 ? 0 : s.tile % p.tiles_m;
    }
    // The workers after this one that hold the rest of tile `s`: [worker + 1, last).
    __device__ int last_sharer(const Segment& s) const {
        int tile_end = (s.tile - p.whole_waves * p.num_workers + 1) * p.k_blocks;
        int other = worker + 1;
        while (other < p.num_workers && share(other) < tile_end) ++other;
        return other;
    }
};

// Leave this run's sums for the block that starts the tile. THREADS threads of barrier ID call it;
// what they wrote before the barrier is seen by who sees the flag, so one thread's release is enough.
template <int ID, int THREADS, int COUNT>
__device__ __forceinline__ void leave_partial(const Problem& p, int slot, int thread,
                                              const float (&sums)[COUNT]) {
    static_assert(COUNT % 4 == 0, "16 bytes at once");
    float4* mine = (float4*)p.partials + (long long)slot * (COUNT / 4 * THREADS) + thread;
#pragma unroll
    for (int i = 0; i < COUNT; i += 4)
        __stcg(mine + i / 4 * THREADS, float4{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]});
    named_sync<ID, THREADS>();
    if (thread == 0) set_flag(p.flags + slot);
}

// Until the workers [first, last) have left what they have of this tile.
template <int ID, int THREADS>
__device__ __forceinline__ void wait_for_partials(const Problem& p, int first, int last, int stride,
                                                  int rank, int thread) {
    for (int other = first + thread; other < last; other += THREADS) {
        int* flag = p.flags + other * stride + rank;
        while (!read_flag(flag)) {}
        *flag = 0;
    }
    named_sync<ID, THREADS>();
}

// Add what lies in every STEP-th slot of [first, last), in their order; AT_ONCE are read together.
template <int THREADS, int AT_ONCE, int COUNT>
__device__ __forceinline__ void add_slots(const Problem& p, int first, int last, int step, int thread,
                                          float (&sums)[COUNT]) {
    constexpr int WORDS = COUNT / 4;
    float4 theirs[AT_ONCE][WORDS];
    for (int slot = first; slot < last; slot += AT_ONCE * step) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int at = slot + j * step;
            const float4* from = (const float4*)p.partials + (long long)at * (WORDS * THREADS) + thread;
#pragma unroll
            for (int i = 0; i < WORDS; ++i)
                theirs[j][i] = at < last ? __ldcg(from + i * THREADS) : float4{};
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
            for (int i = 0; i < WORDS; ++i) {
                const float4& v = theirs[j][i];
                sums[4 * i] += v.x, sums[4 * i + 1] += v.y;
                sums[4 * i + 2] += v.z, sums[4 * i + 3] += v.w;
            }
    }
}

// Add what the workers [first, last) left for this tile, in their order. Several are read at once
// where there are registers for it.
template <int ID, int THREADS, int COUNT>
__device__ __forceinline__ void add_partials(const Problem& p, int first, int last, int stride,
                                             int rank, int thread, float (&sums)[COUNT]) {
    constexpr int AT_ONCE = COUNT > 32 ? 1 : COUNT == 32 ? 2 : 32 / COUNT;
    wait_for_partials<ID, THREADS>(p, first, last, stride, rank, thread);
    add_slots<THREADS, AT_ONCE>(p, first * stride + rank, (last - 1) * stride + rank + 1, stride, thread,
                                sums);
}
