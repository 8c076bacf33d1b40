// Bytes at any address, by copies of four bytes.

// The words that hold `bytes` bytes from `from` on, to `to`, shared out between `lanes`: the first byte
// will lie at `to + first_byte(from)`. So comes what belongs to the rows of a stage, and its barrier waits
// for every lane; a thread's own read of memory would wait behind all that the ring has asked for.
__device__ __forceinline__ u32 first_byte(const void* from) { return (u32)(u64)from & 3; }
__device__ __forceinline__ void copy_words(u32 to, const void* from, int bytes, int lane,
                                           int lanes) {
    const u8* first = (const u8*)from - first_byte(from);
    for (int at = 4 * lane; at < (int)first_byte(from) + bytes; at += 4 * lanes) copy4(to + at, first + at);
}
