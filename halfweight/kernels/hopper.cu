// y[M, N] = x[M, K] dequantize(packed[N, K], codes[N, K/G], exponents[N])^T + bias[N]
//
// One kernel for every batch size, for compute capability 9.0. The transposed product
// y^T = W x^T makes the weights the first operand of wgmma, which may come from registers: INT8
// bytes travel from the file's layout in global memory through shared memory to registers, become
// 16-bit there (two or three instructions for two weights), and never exist as 16-bit in memory.
//
//   warpgroup 0     producer: bulk tensor copies of W [BN, KB] bytes and x [MT, KB] into a ring
//   warpgroups 1-2  consumers: 64 rows of W each; convert half a block while the tensor cores
//                   work on the other half
//
// A weight enters as q * code, an integer of at most 15 bits rounded once to the 16-bit type; the
// row's power of two is applied to the float32 sum. Nothing overflows whatever the scales are.
//
// Work: whole tiles first (one cluster a tile, in blocks that share L2), then what is left is cut
// into equal runs of K blocks (stream-K), so that every multiprocessor ends at the same time. A
// run that does not start its tile leaves its float32 sums in `partials`; the run that starts the
// tile adds them in a fixed order, so results do not change from call to call. It waits only for
// blocks of a lower index, which the hardware starts first.
//
// Compile-time: MT tokens a tile, KB bytes of K a stage, STAGES, CLUSTER, GROUPS (scale groups a
// stage), BF16. The launcher also generates `wgmma(acc, a0..a3, descriptor, accumulate)`.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int BN = 128;
constexpr int ACC = MT / 2;
constexpr int STEPS = KB / 16;
constexpr int HALF = STEPS / 2;
constexpr int W_BYTES = BN * KB;
constexpr int X_BYTES = MT * KB * 2;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int CONSUMERS = 256;
constexpr int STORE_TOKENS = MT < 32 ? MT : 32;

struct __align__(64) TensorMap { u64 opaque[16]; };

struct Problem {
    const u8* codes;
    const signed char* exponents;
    const u16* bias;
    u16* y;
    float* partials;
    int* flags;
    int num_tokens, out_features, in_features, group_size, num_groups;
    int tiles_m, tiles_n, k_blocks, whole_waves, num_workers;
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
__device__ __forceinline__ void barrier_arrive(u32 bar, u32 cta) {
#if CLUSTER > 1
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(bar), "r"(cta)
        : "memory");
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
#endif
}
__device__ __forceinline__ void cluster_sync() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
                 ::: "memory");
#else
    __syncthreads();
#endif
}
__device__ __forceinline__ u32 cluster_rank() {
#if CLUSTER > 1
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}
__device__ __forceinline__ void copy_tile(u32 dst, const TensorMap* map, int c0, int c1, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(dst), "l"(map), "r"(c0), "r"(c1), "r"(bar) : "memory");
}
__device__ __forceinline__ void copy_tile_to_cluster(u32 dst, const TensorMap* map, int c0, int c1,
                                                     u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst), "l"(map), "r"(c0),
        "r"(c1), "r"(bar), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void consumers_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}

__device__ __forceinline__ u32 byte_pair(u32 address) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

// Two stored bytes q + 128 -> two 16-bit q, exactly.
__device__ __forceinline__ u32 to_16bit(u32 pair) {
    u32 r;
#if BF16
    // 0x43uu is 128 + (u & 127) with bit 7 in the exponent's last place: take it out of one
    // operand and put its complement in the other, and the difference is u - 128.
    u32 v = __byte_perm(pair, 0x43434343u, 0x4140);
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r)
        : "r"(v & 0xff7fff7fu), "r"((v ^ 0x00800080u) & 0xff80ff80u));
#else
    u32 v = __byte_perm(pair, 0x64646464u, 0x4140);  // 0x64uu is 1024 + u
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(0x64806480u));
#endif
    return r;
}
__device__ __forceinline__ u32 multiply(u32 a, u32 b) {
    u32 r;
#if BF16
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#endif
    return r;
}
__device__ __forceinline__ u32 code_pair(u32 code) {
    float f = (float)code;
    u32 r;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(r) : "f"(f));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(r) : "f"(f));
#endif
    return r;
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
        long long blocks = (long long)(p.tiles_m * p.tiles_n - p.whole_waves * p.num_workers)
                           * p.k_blocks;
        return (int)(blocks * w / p.num_workers);
    }
    __device__ bool pop(Segment& s) {
        if (wave < p.whole_waves) {
            s = {wave * p.num_workers + worker, 0, p.k_blocks};
            ++wave;
            return true;
        }
        if (next >= end) return false;
        int tile = next / p.k_blocks;
        s.tile = p.whole_waves * p.num_workers + tile;
        s.k_begin = next - tile * p.k_blocks;
        s.k_end = min(p.k_blocks, s.k_begin + end - next);
        next += s.k_end - s.k_begin;
        return true;
    }
};

// Tiles in columns of 8 token tiles, so that the workers of one wave share x and W in L2.
__device__ __forceinline__ void tile_position(const Problem& p, int tile, int& m, int& n) {
    int column = tile / (8 * p.tiles_n);
    int height = min(8, p.tiles_m - column * 8);
    int inside = tile - column * 8 * p.tiles_n;
    m = column * 8 + inside % height;
    n = inside / height;
}

__device__ __forceinline__ void produce(const TensorMap* w_map, const TensorMap* x_map,
                                        const Problem& p, u32 ring, u32 full, u32 empty,
                                        int worker, int rank) {
    Schedule schedule(p, worker);
    Segment s;
    int stage = 0, phase = 0;
    while (schedule.pop(s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int row = (n * CLUSTER + rank) * BN;
        for (int k = s.k_begin; k < s.k_end; ++k) {
            barrier_wait(empty + 8 * stage, phase ^ 1);
            u32 bar = full + 8 * stage;
            u32 w = ring + stage * STAGE_BYTES, x = w + W_BYTES;
            barrier_expect(bar, STAGE_BYTES);
            copy_tile(w, w_map, k * KB, row, bar);
            for (int half = 0; half < KB / 64; ++half) {
                u32 target = x + half * MT * 128;
#if CLUSTER > 1
                int part = MT / CLUSTER * rank;
                copy_tile_to_cluster(target + part * 128, x_map, k * KB + half * 64, m * MT + part,
                                     bar);
#else
                copy_tile(target, x_map, k * KB + half * 64, m * MT, bar);
#endif
            }
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
    }
}

// Codes of rows `row` and `row + 8` for the groups of one K block.
__device__ __forceinline__ void load_codes(const Problem& p, int row, int k, u32 (&codes)[2][GROUPS]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const u8* line = p.codes + (long long)min(row + 8 * r, p.out_features - 1) * p.num_groups;
        int group = k * KB / p.group_size;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) codes[r][g] = __ldg(line + min(group + g, p.num_groups - 1));
    }
}

// The codes of a K block as pairs of 16-bit numbers, ready to multiply.
__device__ __forceinline__ void use(u32 (&codes)[2][GROUPS], const u32 (&next)[2][GROUPS]) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        codes[0][g] = code_pair(next[0][g]);
        codes[1][g] = code_pair(next[1][g]);
    }
}

__device__ __forceinline__ void convert_half(u32 w, int half, int row_in_tile, int quad,
                                             const u32 (&codes)[2][GROUPS], u32 (&a)[HALF][4]) {
    u32 raw[HALF][4];
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = row_in_tile + 8 * r;
            int swizzle = KB == 128 ? (row & 7) : ((row >> 1) & 3);
            u32 address = w + row * KB + (((half * HALF + i) ^ swizzle) << 4) + 2 * quad;
            raw[i][r] = byte_pair(address);
            raw[i][r + 2] = byte_pair(address + 8);
        }
    }
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            u32 code = codes[r % 2][(half * HALF + i) * GROUPS / STEPS];
            a[i][r] = multiply(to_16bit(raw[i][r]), code);
        }
    }
}

__device__ __forceinline__ void issue_half(u32 x, int half, const u32 (&a)[HALF][4],
                                           float (&acc)[ACC], bool fresh) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        int step = half * HALF + i;
        u32 address = x + (step / 4) * MT * 128 + (step % 4) * 32;
        // K-major operand in 128-byte swizzled rows: eight rows make an atom of 1,024 bytes.
        u64 descriptor = (u64)((address >> 4) & 0x3fff) | (1ull << 16) | (64ull << 32) | (1ull << 62);
        wgmma(acc, a[i][0], a[i][1], a[i][2], a[i][3], descriptor, !(fresh && i == 0));
    }
    wgmma_commit();
}

__device__ __forceinline__ void leave_partial(const Problem& p, int slot, int thread,
                                              const float (&acc)[ACC]) {
    float* mine = p.partials + (long long)slot * ACC * CONSUMERS + thread;
#pragma unroll
    for (int i = 0; i < ACC; ++i) __stcg(mine + i * CONSUMERS, acc[i]);
    __threadfence();
    consumers_sync();
    if (thread == 0)
        asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p.flags + slot), "r"(1) : "memory");
}

__device__ __forceinline__ void add_partial(const Problem& p, int slot, int thread,
                                            float (&acc)[ACC]) {
    int* flag = p.flags + slot;
    if (thread == 0) {
        int ready = 0;
        while (!ready)
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(ready) : "l"(flag) : "memory");
    }
    consumers_sync();
    const float* theirs = p.partials + (long long)slot * ACC * CONSUMERS + thread;
#pragma unroll
    for (int i = 0; i < ACC; ++i) acc[i] += __ldcg(theirs + i * CONSUMERS);
    consumers_sync();
    if (thread == 0) *flag = 0;
}

__device__ __forceinline__ void store_tile(const Problem& p, int m, int row, int lane, u32 buffer,
                                           u16* buffer_pointer, const float (&acc)[ACC]) {
    float scale[2], offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int n = min(row + lane / 4 + 8 * r, p.out_features - 1);
        scale[r] = ldexpf(1.0f, p.exponents[n]);
        offset[r] = p.bias ? to_float(p.bias[n]) : 0.0f;
    }
#pragma unroll
    for (int base = 0; base < MT; base += STORE_TOKENS) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < STORE_TOKENS / 8; ++j) {
            const float* c = acc + (base / 8 + j) * 4;
            u32 low = pack(c[0] * scale[0] + offset[0], c[1] * scale[0] + offset[0]);
            u32 high = pack(c[2] * scale[1] + offset[1], c[3] * scale[1] + offset[1]);
            u32 address = buffer + (j * 8 + lane % 8) * 32 + (lane / 8 % 2) * 16;
            asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::
                         "r"(address), "r"(low), "r"(high) : "memory");
        }
        __syncwarp();
        for (int i = lane; i < STORE_TOKENS * 2; i += 32) {
            int token = m * MT + base + i / 2, n = row + i % 2 * 8;
            if (token >= p.num_tokens) continue;
            u16* target = p.y + (long long)token * p.out_features + n;
            const u16* source = buffer_pointer + i * 8;
            if (p.out_features % 8 == 0 && n + 8 <= p.out_features) {
                *(uint4*)target = *(const uint4*)source;
            } else {
                for (int e = 0; e < 8; ++e)
                    if (n + e < p.out_features) target[e] = source[e];
            }
        }
    }
}

__device__ __forceinline__ void consume(const Problem& p, u32 ring, u32 full, u32 empty, u32 store,
                                        u16* store_pointer, int worker, int rank) {
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
    int row_in_tile = warp * 16 + lane / 4, quad = lane % 4;
    Schedule schedule(p, worker);
    Segment s;
    int stage = 0, phase = 0;
    while (schedule.pop(s)) {
        int m, n;
        tile_position(p, s.tile, m, n);
        int tile_row = (n * CLUSTER + rank) * BN;
        float acc[ACC];
        u32 first[HALF][4], second[HALF][4], codes[2][GROUPS], next_codes[2][GROUPS];
        load_codes(p, tile_row + row_in_tile, s.k_begin, next_codes);
        barrier_wait(full + 8 * stage, phase);
        use(codes, next_codes);
        convert_half(ring + stage * STAGE_BYTES, 0, row_in_tile, quad, codes, first);
        int previous = -1;
        for (int k = s.k_begin; k < s.k_end; ++k) {
            u32 w = ring + stage * STAGE_BYTES, x = w + W_BYTES;
            issue_half(x, 0, first, acc, k == s.k_begin);
            if (k + 1 < s.k_end) load_codes(p, tile_row + row_in_tile, k + 1, next_codes);
            wgmma_wait<1>();
            if (previous >= 0) {
                __syncwarp();
                if (lane < CLUSTER) barrier_arrive(empty + 8 * previous, lane);
            }
            convert_half(w, 1, row_in_tile, quad, codes, second);
            issue_half(x, 1, second, acc, false);
            wgmma_wait<1>();
            previous = stage;
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
            if (k + 1 < s.k_end) {
                barrier_wait(full + 8 * stage, phase);
                use(codes, next_codes);
                convert_half(ring + stage * STAGE_BYTES, 0, row_in_tile, quad, codes, first);
            }
        }
        wgmma_wait<0>();
        __syncwarp();
        if (lane < CLUSTER) barrier_arrive(empty + 8 * previous, lane);
        if (s.k_begin > 0) {
            leave_partial(p, worker * CLUSTER + rank, thread, acc);
            continue;
        }
        if (s.k_end < p.k_blocks) {
            int tile_end = (s.tile - p.whole_waves * p.num_workers + 1) * p.k_blocks;
            for (int other = worker + 1; other < p.num_workers && schedule.share(other) < tile_end;
                 ++other)
                add_partial(p, other * CLUSTER + rank, thread, acc);
        }
        store_tile(p, m, tile_row + warp * 16, lane, store + warp * STORE_TOKENS * 32,
                   store_pointer + warp * STORE_TOKENS * 16, acc);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
w8a16(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
      const __grid_constant__ Problem p) {
    extern __shared__ u8 raw[];
    u8* base = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
    u32 ring = shared_address(base);
    u8* after = base + STAGES * STAGE_BYTES;
    u32 store = shared_address(after), full = store + 8 * STORE_TOKENS * 32, empty = full + 8 * STAGES;
    int rank = cluster_rank();
    int worker = p.num_workers - 1 - (int)(blockIdx.x / CLUSTER);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 8 * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_sync();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) produce(&w_map, &x_map, p, ring, full, empty, worker, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(p, ring, full, empty, store, (u16*)after, worker, rank);
    }
    __syncwarp();
    cluster_sync();
}
