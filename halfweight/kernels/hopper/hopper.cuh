// What both Hopper kernels share: barriers, bulk tensor copies, conversion of bytes to 16-bit
// numbers, and the schedule. See hopper_small.cu and hopper_large.cu.
//
// Work: whole tiles first, then what is left is cut into equal runs of K blocks (stream-K), so that
// every multiprocessor ends at the same time. A run that does not start its tile leaves its float32
// sums in `partials`; the run that starts the tile adds them in a fixed order, so results do not
// change from call to call. It waits only for blocks of a lower index, which the hardware starts
// first, and for each of them: none may be without a run (dot_tiles.py sees to it).

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

struct __align__(64) TensorMap { u64 opaque[16]; };

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
};

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nwait_loop:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\nbra wait_loop;\ndone:\n}" ::"r"(bar), "r"(parity) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
template <int ID, int THREADS> __device__ __forceinline__ void named_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}
__device__ __forceinline__ void copy_tile(u32 dst, const TensorMap* map, int c0, int c1, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(dst), "l"(map), "r"(c0), "r"(c1), "r"(bar) : "memory");
}
__device__ __forceinline__ void copy_box(u32 dst, const TensorMap* map, int c1, int c2, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(dst), "l"(map), "r"(0), "r"(c1), "r"(c2), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
// The next kernel's blocks may start wherever this one's leave room.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ uint4 load16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

// Two stored bytes q + 128 of a word -> two 16-bit q, exactly. `selector` says which bytes.
__device__ __forceinline__ u32 to_16bit(u32 word, u32 selector) {
    u32 r, v;
#if BF16
    // 0x43uu is 128 + (u & 127) with bit 7 in the exponent's last place: take it out of one
    // operand and put its complement in the other, and the difference is u - 128.
    asm("prmt.b32 %0, %1, 0x43434343, %2;" : "=r"(v) : "r"(word), "r"(selector));
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r)
        : "r"(v & 0xff7fff7fu), "r"((v ^ 0x00800080u) & 0xff80ff80u));
#else
    // 0x64uu is 1024 + u
    asm("prmt.b32 %0, %1, 0x64646464, %2;" : "=r"(v) : "r"(word), "r"(selector));
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(0x64806480u));
#endif
    return r;
}
enum : u32 { LOW_BYTES = 0x4140, HIGH_BYTES = 0x4342 };
__device__ __forceinline__ u32 word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
}
__device__ __forceinline__ float to_float(u16 v) {
#if BF16
    return __uint_as_float((u32)v << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
#endif
}
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
    __device__ int share(int w) const {
        int tiles = max(0, p.tiles_m * p.tiles_n - p.whole_waves * p.num_workers);
        return (int)((long long)tiles * p.k_blocks * w / p.num_workers);
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
    // The workers after this one that hold the rest of tile `s`: [worker + 1, last).
    __device__ int last_sharer(const Segment& s) const {
        int tile_end = (s.tile - p.whole_waves * p.num_workers + 1) * p.k_blocks;
        int other = worker + 1;
        while (other < p.num_workers && share(other) < tile_end) ++other;
        return other;
    }
};

// Leave this run's sums for the block that starts the tile. THREADS threads of barrier ID call it.
template <int ID, int THREADS, int COUNT>
__device__ __forceinline__ void leave_partial(const Problem& p, int slot, int thread,
                                              const float (&sums)[COUNT]) {
    float* mine = p.partials + (long long)slot * COUNT * THREADS + thread;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) __stcg(mine + i * THREADS, sums[i]);
    __threadfence();
    named_sync<ID, THREADS>();
    if (thread == 0)
        asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p.flags + slot), "r"(1) : "memory");
}

// Add what the workers [first, last) left for this tile, in their order.
template <int ID, int THREADS, int COUNT>
__device__ __forceinline__ void add_partials(const Problem& p, int first, int last, int stride,
                                             int rank, int thread, float (&sums)[COUNT]) {
    for (int other = first + thread; other < last; other += THREADS) {
        int* flag = p.flags + other * stride + rank;
        int ready = 0;
        while (!ready)
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(ready) : "l"(flag) : "memory");
        *flag = 0;
    }
    named_sync<ID, THREADS>();
    for (int other = first; other < last; ++other) {
        const float* theirs =
            p.partials + (long long)(other * stride + rank) * COUNT * THREADS + thread;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] += __ldcg(theirs + i * THREADS);
    }
}
