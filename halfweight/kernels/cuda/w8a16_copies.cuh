// How W and x get into shared memory for w8a16.cu, and where they lie there; its sizes.
//
// W lies in shared memory as the file has it, 128 bytes of a row together (a box), and so does x, 64
// numbers together; the 16-byte chunks of a line are permuted by its number, chunk ^ (line & 7). A lane
// reads SPAN / 4 consecutive columns of a row at once. The fragment of step i wants positions
// 16 i + 2 quad + {0, 1, 8, 9}, which are given columns (SPAN / 4) quad + 4 i + {0, 1, 2, 3}; the
// activations take the same order. A sum does not mind. Rows of a fragment are taken as
// 0 4 2 6 1 5 3 7, so that the lanes of a load meet all 32 banks.

constexpr int BN = 16 * RT * WN;
constexpr int MT = 8 * NT * WM;
constexpr int KB = 64 * WK * UNITS;
constexpr int BOXES = KB / 128;
constexpr int W_BOX = BN * 128;
constexpr int X_BOX = MT * 128;
constexpr int STAGE_BYTES = BOXES * (W_BOX + 2 * X_BOX);
constexpr int THREADS = 32 * WN * WM * WK;
constexpr int OWNERS = 32 * WN * WM;
constexpr int ACC = RT * NT * 4;
constexpr int SPAN = GROUP == 32 || RT > 2 ? 32 : 64;
constexpr int RUN = GROUP < 64 * UNITS ? GROUP : 64 * UNITS;  // columns between two scales
constexpr int RUNS = 64 * UNITS / RUN;

static_assert(STAGES >= 2 && KB % 128 == 0, "a ring, of whole boxes");
static_assert(STAGE_BYTES >= BN * MT * 2, "a tile's results fit a stage of the ring");
static_assert(!SCALED || SCALES == 0, "codes are the scales that 16 bits hold whatever they are");

struct Operands {
    const u8* packed;
    const u16* x;
    Problem p;
};

// Row of a fragment's row 0..7 inside its eight rows of a tile.
__device__ __forceinline__ int row_in_eight(int fragment_row) {
    return (fragment_row & 1) * 4 + (fragment_row & 2) + (fragment_row >> 2);
}
// Token of a fragment's column 0..7; lines of x are read in chunks that need no other order in
// spans of 64.
__device__ __forceinline__ int token_in_eight(int column) {
    return SPAN == 64 ? column : row_in_eight(column);
}
__device__ __forceinline__ u32 chunk_address(int line, int chunk) {
    return line * 128 + ((chunk ^ (line & 7)) << 4);
}

// A thread's part of the copies of one matrix of SIZE bytes a number: the same 16 bytes of every
// STEP-th line of a block. Lines beyond the matrix are left as they are: they end in sums that nobody
// stores. Beyond its columns x is zero, and W, which is finite whatever its bytes, is left too.
template <int SIZE, int LINES> struct Share {
    static constexpr int CHUNKS = KB * SIZE / 16, STEP = THREADS / CHUNKS, COPIES = LINES / STEP;
    static_assert(THREADS % CHUNKS == 0 && LINES % STEP == 0, "equal shares");
    const u8* from;
    u32 to, stride;
    int lines, columns;  // to copy; to the end of a line

    __device__ __forceinline__ void aim(const void* matrix, int height, int width, int first,
                                        int column) {
        int line = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        column += chunk * (16 / SIZE);
        from = (const u8*)matrix + ((long long)(first + line) * width + column) * SIZE;
        stride = width * SIZE * STEP;
        to = chunk / 8 * LINES * 128 + chunk_address(line, chunk % 8);
        lines = (height - first - line + STEP - 1) / STEP;
        columns = width - column;
    }
    // Part `part` of `parts`.
    __device__ __forceinline__ void copy(u32 box, int part, int parts) const {
        bool inside = columns > 0;
        int wanted = SIZE == 2 || inside ? lines : 0;
#pragma unroll
        for (int j = COPIES * part / parts; j < COPIES * (part + 1) / parts; ++j)
            if (j < wanted)
                copy16(box + (to ^ ((j * STEP & 7) << 4)) + j * STEP * 128,
                       from + (u64)stride * j, SIZE == 1 || inside);
    }
    __device__ __forceinline__ void end() { lines = 0; }
    __device__ __forceinline__ void advance() {
        from += KB * SIZE;
        columns -= KB;
    }
};

// The group of a column, or the last. With half a column more no rounding crosses a border of groups,
// to two million columns at least.
__device__ __forceinline__ int group_of(const Problem& p, int column, float groups_a_column) {
    return min((int)((column + 0.5f) * groups_a_column), p.num_groups - 1);
}

// Walks a worker's blocks of K ahead of the products to the end of its work: `next`, the parts of a
// stage in between products, `done`. The first weights are asked for before the kernel ahead has
// ended: that may write anything else.
struct Copier {
    const Operands& o;
    Schedule schedule;
    int left;  // blocks of a segment
    Share<1, BN> w;
    Share<2, MT> x;

    __device__ Copier(const Operands& operands, int worker)
        : o(operands), schedule(operands.p, worker), left(0) {}
    // The first stage.
    __device__ __forceinline__ void copy_first(u32 stage) {
        begin();
        w.copy(stage, 0, 1);
        wait_for_previous_kernel();
        x.copy(stage + BOXES * W_BOX, 0, 1);
        done();
    }
    __device__ __forceinline__ void copy_whole(u32 stage) {
        next();
        copy(stage, 0, 1);
        done();
    }
    __device__ __forceinline__ void next() {
        if (left <= 0) begin();
    }
    __device__ __forceinline__ void copy(u32 stage, int part, int parts) const {
        w.copy(stage, part, parts);
        x.copy(stage + BOXES * W_BOX, part, parts);
    }
    __device__ __forceinline__ void done() {
        w.advance(), x.advance();
        --left;
        end_copy_group();
    }
    __device__ __forceinline__ void begin() {
        const Problem& p = o.p;
        Segment s;
        if (!schedule.pop(s)) {
            w.end(), x.end();
            return;
        }
        int row = schedule.row_tile(s) * BN, token = schedule.token_tile(s) * MT;
        w.aim(o.packed, p.out_features, p.in_features, row, s.k_begin * KB);
        x.aim(o.x, p.num_tokens, p.in_features, token, s.k_begin * KB);
        left = s.k_end - s.k_begin;
    }
};
