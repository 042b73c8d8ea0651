// Decode attention over a prefix that several sequences share (cascade): its K and V are read once for all of them. A piece of
// the prefix leaves partial results as pieces of decode do, and decode's merge takes them together.
#include "packed.h"

template <class T, int HEAD_DIM> __device__ __forceinline__ void cascade(const CascadeParams &p) {
    using Shape = PackedShape<HEAD_DIM, (HEAD_DIM > 96 ? 1 : 2)>;
    KVERN_DYNAMIC_SHARED(dynamic);
    const CascadeTile own = p.tiles[blockIdx.x];
    const CascadeRow *rows = p.rows + own.first_row;
    const uint32_t group = p.heads / p.kv_heads;
    auto row_of = [rows](uint32_t row) { return rows[row].row; };
    const PackedTile<T, Shape, decltype(row_of)> tile = {
        static_cast<const T *>(p.qkv),
        static_cast<const T *>(p.k_cache),
        static_cast<const T *>(p.v_cache),
        {p.block_tables + static_cast<size_t>(own.table) * p.table_stride, p.block_size, p.kv_heads, blockIdx.y},
        p.qkv_stride,
        group,
        own.rows,
        own.end - 1,
        dynamic,
        row_of,
    };
    // Every row sees all of the piece, and nothing past it.
    auto mask = [&](auto &scores, uint32_t, uint32_t first) {
        if (first / Shape::POSITIONS * Shape::POSITIONS + Shape::POSITIONS - 1 <= tile.last) {
            return;
        }
#pragma unroll
        for (int n = 0; n < Shape::POSITIONS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (first + n * 8 + i % 2 > tile.last) {
                    scores[n][i] = -INFINITY;
                }
            }
        }
    };
    PackedState<Shape> state;
    attend(tile, state, own.first / Shape::POSITIONS, (own.end - 1) / Shape::POSITIONS + 1, p.scale_log2, mask);

#pragma unroll
    for (int m = 0; m < Shape::ROW_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = row_sum(state.sum[m][half]);
            const uint32_t packed = tile.pair(m) + half * 8;
            if (packed >= own.rows * group) {
                continue;
            }
            const size_t at = static_cast<size_t>(rows[packed / group].partial + own.piece) * p.heads + tile.head_of(packed);
            if (threadIdx.x % 4 == 0) {
                p.sums[2 * at] = state.maximum[m][half];
                p.sums[2 * at + 1] = sum;
            }
            float *values = p.values + at * HEAD_DIM + threadIdx.x % 4 * 2;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                values[n * 8] = state.acc[m][n][2 * half];
                values[n * 8 + 1] = state.acc[m][n][2 * half + 1];
            }
        }
    }
}

#define ENTRY(suffix, T, dim)                                                                                          \
    KVERN_KERNEL(kvern_cascade_##suffix##_d##dim, CascadeParams, PACKED_THREADS) { cascade<T, dim>(p); }
#define ENTRIES(suffix, T) ENTRY(suffix, T, 64) ENTRY(suffix, T, 96) ENTRY(suffix, T, 128) ENTRY(suffix, T, 256)
ENTRIES(bf16, bf16)
ENTRIES(f16, f16)
