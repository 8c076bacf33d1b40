// The sum of x over the GPUs of one machine, in place: each writes its numbers into the memory of
// the others, waits in its own until all of theirs are there, and adds. One kernel, no barrier.
//
// The numbers are their own flags. A buffer that is not in use holds NOTHING in each 32-bit word: a
// NaN whose bits are all ones. What is sent is never that (`sendable` makes it another NaN), so a
// word that is not NOTHING has arrived: only that words arrive whole is relied on, in no order. The
// reader puts NOTHING back as it reads. Refused: a counter beside each four bytes (NCCL's LL): it is
// twice the bytes, and runs over.
//
// Two turns of buffers, used alternately, are enough. A rank sends in call n + 2 when it has ended
// call n + 1, so when numbers of every other rank's call n + 1 have come to it; those were sent
// after that rank's call n had ended (`wait_for_previous_kernel`), which read and erased what n and
// n + 2 share. So each rank must send something to each other rank in every call.
//
// Each block keeps the turn in a word of its own: all calls have the same blocks, if some have
// nothing to do, so that no block waits for another and CUDA graphs need no argument changed.
//
// Whatever the way, ranks are added in order, in float32, and rounded once: the same bits on all.
//
// A rank that is lost sends nothing. Who waits looks at `is_over` from time to time, a word in the
// host's memory; once it is set nothing is waited for, and what is missing counts as zeros. Whoever
// sets it must see that no one uses these sums.

struct Operands {
    uint4* x;           // this rank's numbers, and then the sum
    uint4* buffers[8];  // of each rank: two turns of turn_vectors
    u32* turns;         // a word a block, 0 or 1
    const u32* is_over;
    u32 num_vectors;  // of x: 16 bytes each
    u32 turn_vectors;
    u32 rank;
};

#if F32
constexpr u32 NUMBERS = 4;
#else
constexpr u32 NUMBERS = 8;
#endif
constexpr u32 NOTHING = ~0u;
constexpr u32 STRIDE = BLOCKS * THREADS;

// The first vector of a thread. Neighbouring warps are on different multiprocessors.
__device__ __forceinline__ u32 first_vector() {
    return (threadIdx.x / 32 * BLOCKS + blockIdx.x) * 32 + threadIdx.x % 32;
}
// The others, each rank beginning with another one.
__device__ __forceinline__ u32 other(const Operands& o, u32 i) { return (o.rank + i) % RANKS; }
// Which of a rank's places the numbers of another lie in.
__device__ __forceinline__ u32 slot(u32 of, u32 at) { return of - (of > at); }

__device__ __forceinline__ uint4 sendable(const uint4& v) {
    return {min(v.x, NOTHING - 1), min(v.y, NOTHING - 1), min(v.z, NOTHING - 1),
            min(v.w, NOTHING - 1)};
}
__device__ __forceinline__ bool is_missing(const uint4& v) {
    return v.x == NOTHING || v.y == NOTHING || v.z == NOTHING || v.w == NOTHING;
}
// What another rank sends to a place, where `v` has been read.
__device__ __forceinline__ uint4 received(const Operands& o, uint4* place, uint4 v, bool& is_over) {
    constexpr u32 WARPS = STRIDE / 32;
    u32 look = POLLS + first_vector() / 32 * POLLS / WARPS;  // warps in turns
    for (u32 polls = 1; is_missing(v) && !is_over; ++polls) {
        if (polls == look) is_over = load_fresh(o.is_over) != 0, look += POLLS;
        v = load_fresh(place);
    }
    erase(place);
    return is_missing(v) ? uint4{0, 0, 0, 0} : v;
}

__device__ __forceinline__ void add(float (&sums)[NUMBERS], const uint4& v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if F32
        sums[i] += __uint_as_float(words[i]);
#else
        sums[2 * i] += to_float((u16)words[i]);
        sums[2 * i + 1] += to_float((u16)(words[i] >> 16));
#endif
    }
}
__device__ __forceinline__ uint4 rounded(const float (&sums)[NUMBERS]) {
#if F32
    return {__float_as_uint(sums[0]), __float_as_uint(sums[1]), __float_as_uint(sums[2]),
            __float_as_uint(sums[3])};
#else
    return {pack(sums[0], sums[1]), pack(sums[2], sums[3]), pack(sums[4], sums[5]),
            pack(sums[6], sums[7])};
#endif
}
// Of this rank's `own` and what the others send to `place` and each `stride` after it.
__device__ __forceinline__ uint4 total(const Operands& o, const uint4& own, uint4* place,
                                       u32 stride, bool& is_over) {
    uint4 parts[RANKS];
#pragma unroll
    for (u32 r = 0; r < RANKS; ++r)
        parts[r] = r == o.rank ? own : load_fresh(place + slot(r, o.rank) * stride);
    float sums[NUMBERS] = {};
#pragma unroll
    for (u32 r = 0; r < RANKS; ++r) {
        if (r != o.rank)
            parts[r] = received(o, place + slot(r, o.rank) * stride, parts[r], is_over);
        add(sums, parts[r]);
    }
    return rounded(sums);
}

// Once the kernel before has ended: whose turn it is.
__device__ __forceinline__ u32 begin_turn(const Operands& o) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    return load_fresh(o.turns + blockIdx.x);
}
__device__ __forceinline__ void end_turn(const Operands& o, u32 turn) {
    __syncthreads();  // all threads know it
    if (threadIdx.x == 0) o.turns[blockIdx.x] = turn ^ 1;
}
__device__ __forceinline__ uint4* buffer(const Operands& o, u32 of, u32 turn) {
    return o.buffers[of] + turn * o.turn_vectors;
}

// Four vectors of x that are a stride apart, as far as it has them.
__device__ __forceinline__ void load_four(uint4 (&own)[4], const uint4* x, u32 begin, u32 count) {
#pragma unroll
    for (u32 k = 0; k < 4; ++k)
        if (begin + k * STRIDE < count) own[k] = x[begin + k * STRIDE];
}
// Calls `use` with the places below `count` of this thread's vectors and what x has there. The
// first are asked for before what `use` needs, the turn, has come.
template <class Use>
__device__ __forceinline__ void for_own(const uint4* x, u32 count, const Use& use) {
    u32 begin = first_vector();
    if (begin >= count) return;
    uint4 own[4];
    load_four(own, x, begin, count);
    while (true) {
#pragma unroll
        for (u32 k = 0; k < 4; ++k)
            if (begin + k * STRIDE < count) use(begin + k * STRIDE, sendable(own[k]));
        begin += 4 * STRIDE;
        if (begin >= count) return;
        load_four(own, x, begin, count);
    }
}

// Each rank sends all of x to all others.
extern "C" __global__ void __launch_bounds__(THREADS)
    one_shot(const __grid_constant__ Operands o) {
    const u32 turn = begin_turn(o);
    for_own(o.x, o.num_vectors, [&](u32 i, const uint4& own) {
        for (u32 p = 1; p < RANKS; ++p) {
            const u32 to = other(o, p);
            send(buffer(o, to, turn) + slot(o.rank, to) * o.num_vectors + i, own);
        }
    });
    end_turn(o, turn);
    bool is_over = false;
    for (u32 i = first_vector(); i < o.num_vectors; i += STRIDE) {
        uint4* place = buffer(o, o.rank, turn) + i;
        o.x[i] = total(o, sendable(o.x[i]), place, o.num_vectors, is_over);
    }
}

// Each rank adds a part, which the others send to it, and sends the sum to all: of many ranks fewer
// bytes, in two hops. A thread has the same place in all parts. No part is empty: x is large.
extern "C" __global__ void __launch_bounds__(THREADS)
    two_shots(const __grid_constant__ Operands o) {
    const u32 turn = begin_turn(o);
    const u32 part = (o.num_vectors + RANKS - 1) / RANKS, sums_begin = (RANKS - 1) * part;
    for (u32 p = 1; p < RANKS; ++p) {
        const u32 to = other(o, p), begin = to * part;
        for_own(o.x + begin, min(part, o.num_vectors - begin), [&](u32 j, const uint4& own) {
            send(buffer(o, to, turn) + slot(o.rank, to) * part + j, own);
        });
    }
    end_turn(o, turn);
    bool is_over = false;
    for (u32 j = first_vector(); j < part; j += STRIDE) {
        const u32 i = o.rank * part + j;
        if (i >= o.num_vectors) continue;
        uint4* place = buffer(o, o.rank, turn) + j;
        const uint4 sum = sendable(total(o, sendable(o.x[i]), place, part, is_over));
        for (u32 p = 1; p < RANKS; ++p) send(buffer(o, other(o, p), turn) + sums_begin + i, sum);
        o.x[i] = sum;
    }
    for (u32 j = first_vector(); j < part; j += STRIDE)
        for (u32 p = 1; p < RANKS; ++p) {
            const u32 i = other(o, p) * part + j;
            if (i >= o.num_vectors) continue;
            uint4* place = buffer(o, o.rank, turn) + sums_begin + i;
            o.x[i] = received(o, place, load_fresh(place), is_over);
        }
}
