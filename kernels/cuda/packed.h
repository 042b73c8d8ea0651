// Tiles whose rows are pairs of a query row and one of the heads that share a KV head, so that few rows fill a tile too. Four warps
// have 16 or 32 of the rows each; all of them read the same tiles of K and V, of which the next is copied while one is used. 32 rows
// per warp, where registers allow, halve the reads of K and V from shared memory per product.
#pragma once

#include "attention.h"

constexpr int PACKED_WARPS = 4, PACKED_THREADS = PACKED_WARPS * 32;

template <int DIM, int TILES> struct PackedShape {
    static constexpr int HEAD_DIM = DIM, ROW_TILES = TILES;
    static constexpr int POSITIONS = HEAD_DIM > 64 ? 32 : 64;
    static constexpr int WARP_ROWS = 16 * ROW_TILES, ROWS = PACKED_WARPS * WARP_ROWS;
    static constexpr int KV_BYTES = POSITIONS * Tile<HEAD_DIM>::PITCH_BYTES;
};

// A block's tile. `row_of` gives the row in the batch of each of the `rows` query rows; positions up to `last` are read.
template <class T, class PackedShape, class RowOf> struct PackedTile {
    using Shape = PackedShape;
    static constexpr int HEAD_DIM = Shape::HEAD_DIM, UNITS = Tile<HEAD_DIM>::UNITS;
    const T *qkv, *k_cache, *v_cache;
    Pages pages;
    uint32_t qkv_stride, group, rows, last;
    unsigned char *memory;
    RowOf row_of;

    __device__ __forceinline__ unsigned char *k_tile(uint32_t index) const {
        return memory + Shape::ROWS * Tile<HEAD_DIM>::PITCH_BYTES + index % 2 * (2 * Shape::KV_BYTES);
    }

    // The first pair of this lane in the tile m of its warp; the other one is 8 on.
    static __device__ __forceinline__ uint32_t pair(int m) {
        return threadIdx.x / 32 * Shape::WARP_ROWS + m * 16 + threadIdx.x % 32 / 4;
    }

    __device__ __forceinline__ uint32_t head_of(uint32_t packed) const { return pages.kv_head * group + packed % group; }

    // Begins to copy the queries; of pairs past the last, zeros.
    __device__ __forceinline__ void fetch_queries() const {
        for (uint32_t i = threadIdx.x; i < Shape::ROWS * UNITS; i += PACKED_THREADS) {
            const uint32_t packed = i / UNITS, unit = i % UNITS;
            const bool valid = packed < rows * group;
            const size_t row = valid ? row_of(packed / group) : 0;
            const size_t at = valid ? row * qkv_stride + head_of(packed) * HEAD_DIM + unit * 8 : 0;
            copy_async_128(Tile<HEAD_DIM>::at(memory, packed, unit), qkv + at, valid);
        }
    }

    // Begins to copy tile `index` of K and V; past the last position, zeros.
    __device__ __forceinline__ void fetch(uint32_t index) const {
        unsigned char *k = k_tile(index), *v = k + Shape::KV_BYTES;
#pragma unroll
        for (int i = 0; i < Shape::POSITIONS * UNITS / PACKED_THREADS; ++i) {
            const int at = i * PACKED_THREADS + static_cast<int>(threadIdx.x), row = at / UNITS, unit = at % UNITS;
            const uint32_t position = index * Shape::POSITIONS + row;
            const bool valid = position <= last;
            const size_t from = valid ? static_cast<size_t>(pages.row(position)) * HEAD_DIM + unit * 8 : 0;
            copy_async_128(Tile<HEAD_DIM>::at(k, row, unit), k_cache + from, valid);
            copy_async_128(Tile<HEAD_DIM>::at(v, row, unit), v_cache + from, valid);
        }
    }
};

// Softmax and weighted values of a warp's rows.
template <class Shape> struct PackedState {
    static constexpr int M = Shape::ROW_TILES, HEAD_DIM = Shape::HEAD_DIM;
    float acc[M][HEAD_DIM / 8][4], maximum[M][2], sum[M][2];

    __device__ __forceinline__ PackedState() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            maximum[m][0] = maximum[m][1] = -INFINITY;
            sum[m][0] = sum[m][1] = 0;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0;
            }
        }
    }
};

// One tile of K and V, which is in shared memory. `mask(scores, pair, position)` makes scores of what a row does not see -infinity;
// its score [0][0] is of that pair and position.
template <class T, class Shape, class RowOf, class Mask>
__device__ __forceinline__ void attend_tile(const PackedTile<T, Shape, RowOf> &tile, PackedState<Shape> &state,
                                            uint32_t index, float scale_log2, Mask mask) {
    constexpr int HEAD_DIM = Shape::HEAD_DIM, M = Shape::ROW_TILES, N = Shape::POSITIONS / 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned char *k = tile.k_tile(index), *v = k + Shape::KV_BYTES;
    float scores[M][N][4] = {};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; ++i) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            load_a<HEAD_DIM>(a[m], tile.memory, warp * Shape::WARP_ROWS + m * 16, i, lane);
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            load_keys<HEAD_DIM>(b, k, n * 8, i, lane);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma<T>(scores[m][n], a[m], b[0], b[1]);
                mma<T>(scores[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
        mask(scores[m], tile.pair(m), index * Shape::POSITIONS + lane % 4 * 2);
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[m][n][i] *= scale_log2;
            }
        }
        float shrink[2];
        soften(scores[m], state.maximum[m], state.sum[m], shrink);
        shrink_rows(state.acc[m], shrink);
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            pack_weights<T>(a[m], scores[m], n);
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; ++i) {
            uint32_t b[4];
            load_values<HEAD_DIM>(b, v, n * 8, i, lane);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma<T>(state.acc[m][2 * i], a[m], b[0], b[1]);
                mma<T>(state.acc[m][2 * i + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// The tiles begin..end of K and V, one after the other.
template <class T, class Shape, class RowOf, class Mask>
__device__ __forceinline__ void attend(const PackedTile<T, Shape, RowOf> &tile, PackedState<Shape> &state,
                                       uint32_t begin, uint32_t end, float scale_log2, Mask mask) {
    tile.fetch_queries();
    tile.fetch(begin);
    copy_async_commit();
    for (uint32_t index = begin; index < end; ++index) {
        if (index + 1 < end) {
            tile.fetch(index + 1);
        }
        copy_async_commit();
        if (!KVERN_PLANTED(PLANTED_MISSING_WAIT)) {
            copy_async_wait<1>();
        }
        __syncthreads();
        attend_tile(tile, state, index, scale_log2, mask);
        // Nobody reads this tile's half of the ring any more when it is filled again.
        __syncthreads();
    }
    copy_async_wait<0>();
}
