// What a GPU does to memory that others write into while it reads, 16 bytes at a time. Only that
// each four of them arrive whole is relied on.

// To another GPU's memory.
__device__ __forceinline__ void send(uint4* place, const uint4& v) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w));
}
// As the memory has it now, past what this multiprocessor keeps.
__device__ __forceinline__ uint4 load_fresh(const uint4* place) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(place));
    return v;
}
__device__ __forceinline__ u32 load_fresh(const u32* place) {
    u32 v;
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(v) : "l"(place));
    return v;
}
// To this GPU's memory.
__device__ __forceinline__ void erase(uint4* place) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(place), "r"(~0u));
}
