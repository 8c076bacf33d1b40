// Instructions that the kernels of all families use, from compute capability 8.0 on, and the numbers
// they work on. Whatever is written in PTX stands here or in hopper/, so that a test can run the rest
// without a GPU (tests/helpers/emulated_gpu.hpp).

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ u8* shared_memory() {
    extern __shared__ __align__(1024) u8 bytes[];
    return bytes;
}
// threadIdx.x, read where it stands: what follows from it takes no registers from a loop before.
__device__ __forceinline__ int thread_index() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
// 16 bytes to shared memory, while the thread goes on; zeros where there is nothing to read.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(is_there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void end_copy_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most PENDING groups of this thread's copies are on their way.
template <int PENDING> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
template <int ID, int THREADS> __device__ __forceinline__ void named_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}
__device__ __forceinline__ void set_flag(int* flag) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}
__device__ __forceinline__ int read_flag(const int* flag) {
    int ready;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(ready) : "l"(flag) : "memory");
    return ready;
}

// From compute capability 9.0 on a kernel may start before the one ahead of it on its stream has
// ended: it waits here for what that one writes. Before 9.0 none does.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel's blocks may start wherever this one's leave room.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint4 load16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

__device__ __forceinline__ void load_words(u32 address, u32 (&words)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address));
}
__device__ __forceinline__ void load_words(u32 address, u32 (&words)[2]) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1]) : "r"(address));
}

#if BF16
constexpr u32 OFFSETS = 0x43434343;
#else
constexpr u32 OFFSETS = 0x64646464;
#endif
// Two stored bytes q + 128 of a word -> two 16-bit q, exactly. `selector` says which bytes.
__device__ __forceinline__ u32 to_16bit(u32 word, u32 selector, u32 offsets = OFFSETS) {
    u32 r, v;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(word), "r"(offsets), "r"(selector));
#if BF16
    // 0x43uu is f = 128 + u, or 2 u from 128 on: it has seven bits where u has eight. So f - 256 is
    // q where q is negative, else 2 q; and q too much is max(f / 2 - 128, 0). All are exact. Masks
    // and an exponent moved by hand are as few instructions, but of the integer unit, which is
    // busy with permutes and has half the rate.
    u32 twice, excess;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(twice) : "r"(v), "r"(0x3f803f80u), "r"(0xc380c380u));
    asm("fma.rn.relu.bf16x2 %0, %1, %2, %3;" : "=r"(excess)
        : "r"(v), "r"(0x3f003f00u), "r"(0xc300c300u));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(excess), "r"(0xbf80bf80u), "r"(twice));
#else
    // 0x64uu is 1024 + u
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(0x64806480u));
#endif
    return r;
}
// Two products of 16-bit numbers, each rounded.
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
    u32 r;
#if !BF16
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#elif __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
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
// 2^e, of any e that a byte holds: below -126 it is no normal number.
__device__ __forceinline__ float power_of_two(int e) {
    return __uint_as_float(e > -127 ? (u32)(e + 127) << 23 : 0x00400000u >> (-127 - e));
}
__device__ __forceinline__ float half_to_float(u16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
__device__ __forceinline__ float to_float(u16 v) {
#if BF16
    return __uint_as_float((u32)v << 16);
#else
    return half_to_float(v);
#endif
}

__device__ __forceinline__ void mma(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with zeros for c.
__device__ __forceinline__ void first_mma(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}
