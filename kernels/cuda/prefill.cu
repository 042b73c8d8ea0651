// Paged prefill attention, causal, over cached prefixes, for any GPU with mma and asynchronous copies; the twin that a
// version for sm_90a has to agree with.
//
// A row visits positions in tiles counted from 0, and what it does not see adds exact zeros: its bits do not depend on the tile of
// queries that it is in.
#include "causal.h"
#include "packed.h"

template <class T, int HEAD_DIM> __device__ __forceinline__ void prefill(const PrefillParams &p) {
    using Shape = PackedShape<HEAD_DIM, (HEAD_DIM > 128 ? 1 : 2)>;
    KVERN_DYNAMIC_SHARED(dynamic);
    const PrefillTile own = p.tiles[blockIdx.x];
    const uint32_t group = p.heads / p.kv_heads, last = own.position + own.rows - 1;
    auto row_of = [own](uint32_t row) { return own.row + row; };
    const PackedTile<T, Shape, decltype(row_of)> tile = {
        static_cast<const T *>(p.qkv),
        static_cast<const T *>(p.k_cache),
        static_cast<const T *>(p.v_cache),
        {p.block_tables + static_cast<size_t>(own.table) * p.table_stride, p.block_size, p.kv_heads, blockIdx.y},
        p.qkv_stride,
        group,
        own.rows,
        last,
        dynamic,
        row_of,
    };
    // Pairs past the tile's are computed as its last row, and not stored.
    const CausalMask<Shape::POSITIONS> mask = {own.position, last, group, p.window};
    PackedState<Shape> state;
    const float scale_log2 = KVERN_PLANTED(PLANTED_WRONG_SCALE) ? p.scale_log2 * 1.01f : p.scale_log2;
    const uint32_t begin = mask.seen_from(own.position) / Shape::POSITIONS;
    attend(tile, state, begin, last / Shape::POSITIONS + 1, scale_log2, mask);

#pragma unroll
    for (int m = 0; m < Shape::ROW_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float inverse = 1.0f / row_sum(state.sum[m][half]);
            const uint32_t packed = tile.pair(m) + half * 8;
            if (packed >= own.rows * group) {
                continue;
            }
            const size_t row = row_of(packed / group);
            T *out = static_cast<T *>(p.out) + (row * p.heads + tile.head_of(packed)) * HEAD_DIM + threadIdx.x % 4 * 2;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                const float *values = &state.acc[m][n][2 * half];
                store_32(out + n * 8, pack_pair<T>(values[0] * inverse, values[1] * inverse));
            }
        }
    }
}

#define ENTRY(suffix, T, dim)                                                                                          \
    KVERN_KERNEL(kvern_prefill_##suffix##_d##dim, PrefillParams, PACKED_THREADS) { prefill<T, dim>(p); }
#define ENTRIES(suffix, T) ENTRY(suffix, T, 64) ENTRY(suffix, T, 96) ENTRY(suffix, T, 128) ENTRY(suffix, T, 256)
ENTRIES(bf16, bf16)
ENTRIES(f16, f16)
