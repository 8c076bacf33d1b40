// What the Hopper kernels share beside cuda/ptx.cuh: barriers, copies into a ring of stages, and
// integer dot products.

struct __align__(64) TensorMap { u64 opaque[16]; };

// Registers that a warpgroup does not need, and those that it gets in turn.
template <int COUNT> __device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barriers_are_there() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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
// 4 bytes to shared memory while the thread goes on, and an arrival once all such bytes of it are there.
__device__ __forceinline__ void copy4(u32 dst, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(from) : "memory");
}
__device__ __forceinline__ void arrive_when_copied(u32 bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void wait_for_copied() {
    asm volatile("cp.async.wait_all;" ::: "memory");
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
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Bytes (16 at a time) that lie one behind the other.
__device__ __forceinline__ void copy_bytes(u32 dst, const void* from, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(dst), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
// Weights are read once: they leave L2 first.
#define FIRST_OUT "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
__device__ __forceinline__ void copy_weights(u32 dst, const void* from, u32 bytes, u32 bar) {
    asm volatile(FIRST_OUT
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], policy;\n}" ::"r"(dst), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void copy_weights_box(u32 dst, const TensorMap* map, int c1, int c2, u32 bar) {
    asm volatile(FIRST_OUT
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], policy;\n}" ::"r"(dst), "l"(map), "r"(0), "r"(c1), "r"(c2),
        "r"(bar) : "memory");
}
__device__ __forceinline__ float reciprocal(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
// sum + four products of unsigned and signed bytes.
__device__ __forceinline__ int dot4(u32 a, u32 b, int sum) {
    int r;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sum));
    return r;
}
// 16 numbers of 16 bits.
__device__ __forceinline__ void load_pairs(const u16* from, u32 (&pairs)[8]) {
    uint4 low = *(const uint4*)from, high = *((const uint4*)from + 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = word(low, i), pairs[4 + i] = word(high, i);
}
__device__ __forceinline__ u32 load_byte(u32 address) {
    u32 v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ u16 load_half(u32 address) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ void store_float(u32 address, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
// Two matrices of 8 x 8 numbers of 16 bits, a column of each to the address of a lane.
__device__ __forceinline__ void store_turned(u32 address, u32 first, u32 second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
                 "r"(first), "r"(second) : "memory");
}
// Two stored bytes and their scale, twice in `pair` -> q * code, rounded once.
__device__ __forceinline__ u32 scaled(u32 bytes, u32 selector, u32 pair) {
    u32 r;
#if BF16
    // 0x43uu is 128 + (u & 127) with bit 7 in the exponent's last place: without it, it lacks 256
    // or, where the bit was set, 128. Codes are whole numbers, so 256 times one is no less than
    // 256, and half of that is one less in the exponent: the bit's own place.
    u32 v, low;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(bytes), "r"(OFFSETS), "r"(selector));
    low = v & 0xff7fff7f;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r)
        : "r"(low), "r"(pair), "r"(pair + 0x84008400 + low - v));
#else
    r = multiply_pairs(to_16bit(bytes, selector), pair);
#endif
    return r;
}
// Until at most N of the warpgroup's groups of products are under way.
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
