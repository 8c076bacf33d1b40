// The codes of LINES rows of a tile: a warp brings those of each stage, a lane those of every 32nd row, to
// PITCH bytes a row.
template <int LINES, int PITCH> struct CodeCopies {
    static constexpr int COUNT = (LINES + 31) / 32;
    const u8* words;
    u32 begin[COUNT];
    int lane;

    __device__ __forceinline__ CodeCopies(const Problem& p, int first_row, int lane_) : lane(lane_) {
        words = p.codes - first_byte(p.codes);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            int row = min(first_row + lane + 32 * i, p.out_features - 1);
            begin[i] = row * p.num_groups + first_byte(p.codes);
        }
    }
    // Groups [group, end), one or more.
    __device__ __forceinline__ void copy(u32 to, int group, int end) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (LINES % 32 && lane + 32 * i >= LINES) continue;
            u32 first = begin[i] + group & ~3;
#pragma unroll
            for (int at = 0; at < PITCH; at += 4)
                if (at == 0 || first + at < begin[i] + end)
                    copy4(to + (lane + 32 * i) * PITCH + at, words + first + at);
        }
    }
};
