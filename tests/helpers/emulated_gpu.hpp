// Runs a kernel of halfweight/kernels/cuda or kernels/hopper on the CPU: in place of ptx.cuh and
// hopper.cuh, before schedule.cuh and the kernel itself. Slow and simple; it is there to be right.
//
// Every thread of every block is a fiber. They run one at a time, in an order drawn anew for each
// round, from one wait to the next: a barrier, a product of a warp, a flag that another block sets.
// Copies to shared memory happen as late as the hardware may make them, when their thread waits for
// them, and shared memory begins as noise: what is read too soon is wrong. What goes to another GPU
// arrives word by word, in any order. Where all fibers wait for ever, the run ends with -1.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __CUDA_ARCH__ 800

typedef uint32_t u32;
typedef uint64_t u64;
typedef uint16_t u16;
typedef uint8_t u8;
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { unsigned x; };
using std::max;
using std::min;

constexpr size_t STACK_BYTES = 96 << 10;

// Threads that wait for each other: they go on once all `size` have arrived.
struct Meeting { int arrived = 0, size = 0; u64 round = 0; };

struct Copy { u32 to; const void* from; };

// mbarrier: a phase ends when all have arrived and all bytes that were announced are there.
struct Barrier { int size = 0, missing = 0, bytes = 0, phase = 0; };

struct Home {
    std::map<u32, Barrier> barriers;
    std::vector<u8> shared;
    Meeting all, named[16];
    std::vector<Meeting> warps;
    std::vector<u32> exchange;  // 10 words a lane: operands of a warp's product
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<u8[]> stack{new u8[STACK_BYTES]};
    Index thread, block;
    Home* home;
    bool ended = false;
    u64 group = 0, call = 0;  // of tests
    u64 steps = 0;
    std::deque<std::vector<Copy>> groups{1};
    std::vector<Copy> words;  // of copy4
    std::deque<std::function<void()>> products;  // that are queued, as late as wgmma may be
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline u64 progress;  // of all fibers: rounds without any are a deadlock
inline void (*entry)();

#define threadIdx (current->thread)
#define blockIdx (current->block)

inline void pause() { swapcontext(&current->context, &scheduler); }

inline void meet(Meeting& m, int size) {
    u64 round = m.round;
    ++progress;
    if (++m.arrived == size) {
        m.arrived = 0;
        ++m.round;
        return;
    }
    while (m.round == round) pause();
}

inline void __syncthreads() { meet(current->home->all, current->home->all.size); }
inline void __syncwarp() { meet(current->home->warps[threadIdx.x / 32], 32); }
template <int ID, int THREADS> void named_sync() { meet(current->home->named[ID], THREADS); }
inline void __threadfence() {}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcg(T* p, T v) { *p = v; }
inline void set_flag(int* flag) { *flag = 1, ++progress; }
inline int read_flag(const int* flag) {
    if (!*flag) pause();
    return *flag;
}

// A test of kernels that start early says when the kernel ahead has ended.
inline bool (*has_previous_ended)() = [] { return true; };
inline void wait_for_previous_kernel() {
    while (!has_previous_ended()) pause();
}
inline void let_next_kernel_start() {}

// Words that have been sent to other GPUs.
struct Letter { u32* to; u32 word; };
inline std::vector<Letter> letters;
inline void deliver(std::mt19937& random) {
    std::shuffle(letters.begin(), letters.end(), random);
    for (size_t left = random() % (letters.size() + 1); letters.size() > left; letters.pop_back())
        *letters.back().to = letters.back().word, ++progress;
}
inline void send(uint4* place, const uint4& v) {
    u32* to = (u32*)place;
    letters.insert(letters.end(), {{to, v.x}, {to + 1, v.y}, {to + 2, v.z}, {to + 3, v.w}});
    ++progress;
}
// What happens by itself later, in any order: bulk copies, then what their barrier hears of them.
inline std::vector<std::function<void()>> events;
inline void let_events_happen(std::mt19937& random) {
    std::shuffle(events.begin(), events.end(), random);
    for (size_t left = random() % (events.size() + 1); events.size() > left; events.pop_back())
        events.back()();
}
inline void look_at(Barrier& b) {
    ++progress;
    if (b.missing == 0 && b.bytes == 0) b.missing = b.size, b.phase ^= 1;
}
inline void barrier_init(u32 bar, u32 size) {
    current->home->barriers[bar] = {(int)size, (int)size, 0, 0};
}
inline void barriers_are_there() {}
inline void arrive(Barrier& b) {
    --b.missing;
    look_at(b);
}
inline void barrier_arrive(u32 bar) { arrive(current->home->barriers[bar]); }
inline void barrier_expect(u32 bar, u32 bytes) {
    current->home->barriers[bar].bytes += bytes;
    barrier_arrive(bar);
}
inline void barrier_wait(u32 bar, u32 parity) {
    while (current->home->barriers[bar].phase == (int)parity) pause();
}
inline void copy_bytes(u32 to, const void* from, u32 size, u32 bar) {
    events.push_back([home = current->home, to, from, size, bar] {
        std::memcpy(home->shared.data() + to, from, size);
        home->barriers[bar].bytes -= size;
        look_at(home->barriers[bar]);
    });
    ++progress;
}
inline void copy4(u32 to, const void* from) { current->words.push_back({to, from}); }
inline void arrive_when_copied(u32 bar) {
    events.push_back([home = current->home, words = std::move(current->words), bar] {
        for (const Copy& c : words) std::memcpy(home->shared.data() + c.to, c.from, 4);
        arrive(home->barriers[bar]);
    });
    current->words.clear();
    ++progress;
}
inline void copy_weights(u32 to, const void* from, u32 size, u32 bar) { copy_bytes(to, from, size, bar); }
// A matrix as boxes of it are copied: numbers of `element` bytes, 64 or 128 bytes of them side by side.
struct TensorMap {
    const u8* at;
    u64 sizes[3], strides[3];  // of the three dimensions: numbers, and bytes from one to the next
    u32 box[3], element;
};
inline void prefetch_map(const TensorMap*) {}
// Lines of 128 bytes, their 16-byte pieces in the 128-byte swizzle; zeros where the matrix ends.
inline void copy_box(u32 to, const TensorMap* map, int c1, int c2, u32 bar) {
    events.push_back([home = current->home, to, m = *map, c1, c2, bar] {
        for (u32 i = 0; i < m.box[2] * m.box[1]; ++i) {
            u64 second = c1 + i % m.box[1], third = c2 + i / m.box[1];
            bool is_there = second < m.sizes[1] && third < m.sizes[2];
            const u8* from = m.at + second * m.strides[1] + third * m.strides[2];
            for (u32 piece = 0; piece < 8; ++piece) {
                u32 place = to + i * 128 + piece * 16;
                u8* target = home->shared.data() + (place ^ (place >> 7 & 7) << 4);
                is_there ? (void)std::memcpy(target, from + piece * 16, 16) : (void)std::memset(target, 0, 16);
            }
        }
        home->barriers[bar].bytes -= m.box[0] * m.box[1] * m.box[2] * m.element;
        look_at(home->barriers[bar]);
    });
    ++progress;
}
// Rows of 64 or 128 bytes of a matrix in two dimensions, in the swizzle of that width.
inline void copy_tile(u32 to, const TensorMap* map, int c0, int c1, u32 bar) {
    events.push_back([home = current->home, to, m = *map, c0, c1, bar] {
        u32 width = m.box[0] * m.element;
        for (u32 row = 0; row < m.box[1]; ++row)
            for (u32 piece = 0; piece < width / 16; ++piece) {
                u64 column = c0 + piece * 16 / m.element, line = c1 + row;
                bool is_there = column < m.sizes[0] && line < m.sizes[1];
                const u8* from = m.at + column * m.element + line * m.strides[1];
                u32 place = to + row * width + piece * 16;
                u8* target = home->shared.data() + (place ^ (place >> 7 & (width / 16 - 1)) << 4);
                is_there ? (void)std::memcpy(target, from, 16) : (void)std::memset(target, 0, 16);
            }
        home->barriers[bar].bytes -= m.box[1] * width;
        look_at(home->barriers[bar]);
    });
    ++progress;
}
inline void copy_weights_box(u32 to, const TensorMap* map, int c1, int c2, u32 bar) {
    copy_box(to, map, c1, c2, bar);
}
template <int> void leave_registers() {}
template <int> void take_registers() {}
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
template <class T> T load_fresh(const T* place) {
    pause();
    return *place;
}
inline void erase(uint4* place) { *place = {~0u, ~0u, ~0u, ~0u}, ++progress; }

inline u8* shared_memory() { return current->home->shared.data(); }
inline u32 shared_address(const void* p) { return (u32)((const u8*)p - shared_memory()); }
inline int thread_index() { return threadIdx.x; }
inline void copy16(u32 to, const void* from, bool is_there) {
    current->groups.back().push_back({to, is_there ? from : nullptr});
}
inline void end_copy_group() { current->groups.emplace_back(); }
template <int PENDING> void wait_for_copies() {
    auto& groups = current->groups;  // the last is open
    for (; groups.size() > PENDING + 1; groups.pop_front())
        for (const Copy& c : groups.front()) {
            u8* to = shared_memory() + c.to;
            c.from ? (void)std::memcpy(to, c.from, 16) : (void)std::memset(to, 0, 16);
        }
}
template <int COUNT> void load_words(u32 address, u32 (&words)[COUNT]) {
    std::memcpy(words, shared_memory() + address, 4 * COUNT);
}
inline uint4 load16(u32 address) {
    uint4 v;
    std::memcpy(&v, shared_memory() + address, 16);
    return v;
}

inline u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
inline float __uint_as_float(u32 v) {
    float f;
    std::memcpy(&f, &v, 4);
    return f;
}
inline u32 __float_as_uint(float f) {
    u32 v;
    std::memcpy(&v, &f, 4);
    return v;
}
inline float half_to_float(u16 v) {
    _Float16 h;
    std::memcpy(&h, &v, 2);
    return (float)h;
}
#if BF16
inline float to_float(u16 v) { return __uint_as_float((u32)v << 16); }
inline u16 from_float(float f) {
    u32 v;
    std::memcpy(&v, &f, 4);
    return std::isnan(f) ? 0x7fff : (u16)((v + 0x7fff + (v >> 16 & 1)) >> 16);
}
#else
inline float to_float(u16 v) { return half_to_float(v); }
inline u16 from_float(float f) {
    _Float16 h = (_Float16)f;
    u16 v;
    std::memcpy(&v, &h, 2);
    return v;
}
#endif
inline u32 pack(float low, float high) { return from_float(low) | (u32)from_float(high) << 16; }
inline u32 multiply_pairs(u32 a, u32 b) {
    return pack(to_float(a & 0xffff) * to_float(b & 0xffff), to_float(a >> 16) * to_float(b >> 16));
}
enum : u32 { LOW_BYTES = 0, HIGH_BYTES = 16 };
constexpr u32 OFFSETS = 0;
inline u32 to_16bit(u32 word, u32 shift, u32 = 0) {
    return pack((float)(word >> shift & 255) - 128, (float)(word >> (shift + 8) & 255) - 128);
}

// mma.m16n8k16: operands of all lanes are laid out, then each lane sums its four results.
inline void mma(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
    Meeting& warp = current->home->warps[threadIdx.x / 32];
    u32* lanes = current->home->exchange.data() + threadIdx.x / 32 * 32 * 10;
    int lane = threadIdx.x % 32;
    u32* mine = lanes + lane * 10;
    for (int i = 0; i < 4; ++i) mine[i] = a[i];
    mine[4] = b0, mine[5] = b1;
    meet(warp, 32);
    auto half = [](u32 word, int place) { return to_float((u16)(word >> 16 * place)); };
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4, column = lane % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {
            int quad = k % 8 / 2, high = k / 8;
            u32 w = lanes[(row * 4 + quad) * 10 + i / 2 + 2 * high];
            u32 x = lanes[(column * 4 + quad) * 10 + 4 + high];
            sum += (double)half(w, k % 2) * half(x, k % 2);
        }
        c[i] = (float)sum;
    }
    meet(warp, 32);
}
// wgmma.m64nNk16 with W from registers, x [N, 16] in rows of 128 bytes: queued, and made when it is
// waited for, from what registers and shared memory hold then.
template <int SUMS, class Word> void queue_products(float (&sums)[SUMS], const Word (&a)[1][4], u32 x) {
    current->products.push_back([&sums, &a, at = (x & 0x3fff) << 4] {
        for (int n = 0; n < SUMS / 4; ++n) {
            u32 b[2];
            int token = 8 * n + threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
            for (int high = 0; high < 2; ++high) {
                u32 place = at + token * 128 + high * 16 + quad * 4;
                std::memcpy(b + high, shared_memory() + (place ^ (place >> 7 & 7) << 4), 4);
            }
            mma(sums + 4 * n, a[0], b[0], b[1]);
        }
    });
}
template <int LEFT> void wgmma_wait() {
    for (auto& queue = current->products; queue.size() > LEFT; queue.pop_front()) queue.front()();
}
inline u32 scaled(u32 bytes, u32 selector, u32 pair) {
    return multiply_pairs(to_16bit(bytes, selector), pair);
}
inline void wait_for_copied() {}
// stmatrix.x2.trans: lanes 0 to 7 have the addresses of the columns of the first, 8 to 15 of the second.
inline void store_turned(u32 address, u32 first, u32 second) {
    Meeting& warp = current->home->warps[threadIdx.x / 32];
    u32* lanes = current->home->exchange.data() + threadIdx.x / 32 * 32 * 10;
    int lane = threadIdx.x % 32;
    lanes[lane * 10] = address;
    meet(warp, 32);
    for (int i = 0; i < 4; ++i) {
        u16 value = (u16)((i / 2 ? second : first) >> i % 2 * 16);
        u32 to = lanes[(i / 2 * 8 + lane % 4 * 2 + i % 2) * 10] + lane / 4 * 2;
        std::memcpy(shared_memory() + to, &value, 2);
    }
    meet(warp, 32);
}
inline float __shfl_xor_sync(u32, float v, int mask) {
    Meeting& warp = current->home->warps[threadIdx.x / 32];
    u32* lanes = current->home->exchange.data() + threadIdx.x / 32 * 32 * 10;
    lanes[threadIdx.x % 32 * 10] = __float_as_uint(v);
    meet(warp, 32);
    float other = __uint_as_float(lanes[(threadIdx.x % 32 ^ mask) * 10]);
    meet(warp, 32);
    return other;
}
inline float power_of_two(int e) { return std::ldexp(1.0f, e); }
inline float reciprocal(float v) {  // no denormals
    float r = 1.0f / v;
    return std::fabs(r) < 0x1p-126f ? 0.0f : r;
}
inline int dot4(u32 a, u32 b, int sum) {
    for (int i = 0; i < 4; ++i) sum += (int)(a >> 8 * i & 255) * (int)(int8_t)(b >> 8 * i);
    return sum;
}
inline void load_pairs(const u16* from, u32 (&pairs)[8]) { std::memcpy(pairs, from, 32); }
inline u32 load_byte(u32 address) { return shared_memory()[address]; }
inline u16 load_half(u32 address) {
    u16 v;
    std::memcpy(&v, shared_memory() + address, 2);
    return v;
}
inline void store_float(u32 address, float v) { std::memcpy(shared_memory() + address, &v, 4); }
inline void first_mma(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
    c[0] = c[1] = c[2] = c[3] = 0.0f;
    mma(c, a, b0, b1);
}

inline void begin() {
    entry();
    current->ended = true;
    ++progress;
    pause();
}

// Run `kernel` by `threads` threads of each of `blocks` blocks. 0, or -1 where none can go on.
inline int launch(void (*kernel)(), int blocks, int threads, int shared_bytes, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<Home> homes(blocks);
    entry = kernel;
    fibers.clear();
    letters.clear();
    events.clear();
    for (int b = 0; b < blocks; ++b) {
        homes[b].shared.resize(shared_bytes);
        for (u8& byte : homes[b].shared) byte = (u8)random();
        homes[b].all.size = threads;
        homes[b].warps.resize(threads / 32);
        homes[b].exchange.resize(threads * 10);
        for (int t = 0; t < threads; ++t) {
            fibers.push_back(std::make_unique<Fiber>());
            Fiber& f = *fibers.back();
            f.thread.x = t, f.block.x = b, f.home = &homes[b];
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = STACK_BYTES;
            f.context.uc_link = nullptr;
            makecontext(&f.context, begin, 0);
        }
    }
    std::vector<int> order(fibers.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = (int)i;
    std::shuffle(order.begin(), order.end(), random);
    int idle = 0;  // rounds: a fiber may stop for looks at memory, one after the other
    for (size_t running = fibers.size(); running > 0;) {
        u64 before = progress;
        deliver(random);
        let_events_happen(random);
        size_t shift = random() % order.size();
        for (size_t i = 0; i < order.size(); ++i) {
            current = fibers[order[(i + shift) % order.size()]].get();
            if (current->ended) continue;
            swapcontext(&scheduler, &current->context);
            running -= current->ended;
        }
        idle = progress == before && letters.empty() && events.empty() ? idle + 1 : 0;
        if (idle > 16 && running > 0) return -1;
    }
    return 0;
}
