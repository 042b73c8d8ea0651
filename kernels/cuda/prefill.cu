// Paged prefill attention, causal, over cached prefixes, for any GPU with mma and asynchronous copies; the twin that a
// version for sm_90a has to agree with.
//
// The rows of a block's tile are pairs of a query row and one of the heads that share a KV head, so that short chunks fill the
// tile too. Four warps have 16 or 32 of the rows each; all of them read the same tiles of K and V, of which the next is copied
// while one is used. 32 rows per warp, where registers allow, halve the reads of K and V from shared memory per product. A row visits
// positions in tiles counted from 0, and what it does not see adds exact zeros: its bits do not depend on the tile it is in.
#include "attention.h"

constexpr int WARPS = 4;

template <int HEAD_DIM> struct PrefillShape {
    static constexpr int ROW_TILES = HEAD_DIM > 128 ? 1 : 2;
    static constexpr int POSITIONS = HEAD_DIM > 64 ? 32 : 64;
    static constexpr int WARP_ROWS = 16 * ROW_TILES, ROWS = WARPS * WARP_ROWS;
    static constexpr int KV_BYTES = POSITIONS * Tile<HEAD_DIM>::PITCH_BYTES;
};

template <class T, int HEAD_DIM> struct PrefillBlock {
    using Shape = PrefillShape<HEAD_DIM>;
    static constexpr int UNITS = Tile<HEAD_DIM>::UNITS;
    const PrefillParams &p;
    PrefillTile tile;
    Pages pages;
    uint32_t group, last;
    unsigned char *queries, *ring;

    __device__ __forceinline__ unsigned char *k_tile(uint32_t index) const {
        return ring + index % 2 * (2 * Shape::KV_BYTES);
    }

    __device__ __forceinline__ size_t head_at(uint32_t packed) const {
        return static_cast<size_t>(pages.kv_head) * group + packed % group;
    }

    __device__ __forceinline__ void fetch_queries() const {
        for (uint32_t i = threadIdx.x; i < Shape::ROWS * UNITS; i += WARPS * 32) {
            const uint32_t packed = i / UNITS, unit = i % UNITS;
            const bool valid = packed < tile.rows * group;
            const size_t row = tile.row + packed / group;
            const size_t at = valid ? row * p.qkv_stride + head_at(packed) * HEAD_DIM + unit * 8 : 0;
            copy_async_128(Tile<HEAD_DIM>::at(queries, packed, unit), static_cast<const T *>(p.qkv) + at, valid);
        }
    }

    // Begins to copy tile `index` of K and V; past the last position seen, zeros.
    __device__ __forceinline__ void fetch(uint32_t index) const {
        unsigned char *k = k_tile(index), *v = k + Shape::KV_BYTES;
#pragma unroll
        for (int i = 0; i < Shape::POSITIONS * UNITS / (WARPS * 32); ++i) {
            const int at = i * WARPS * 32 + static_cast<int>(threadIdx.x), row = at / UNITS, unit = at % UNITS;
            const uint32_t position = index * Shape::POSITIONS + row;
            const bool valid = position <= last;
            const size_t from = valid ? static_cast<size_t>(pages.row(position)) * HEAD_DIM + unit * 8 : 0;
            copy_async_128(Tile<HEAD_DIM>::at(k, row, unit), static_cast<const T *>(p.k_cache) + from, valid);
            copy_async_128(Tile<HEAD_DIM>::at(v, row, unit), static_cast<const T *>(p.v_cache) + from, valid);
        }
    }
};

// Scores of what a row does not see become -infinity. Rows past the tile's are computed as its last one, and not stored.
template <int N, class Block>
__device__ __forceinline__ void mask(float (&scores)[N][4], const Block &block, uint32_t packed, uint32_t first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t own = min(block.tile.position + (packed + half * 8) / block.group, block.last);
        const uint32_t seen = block.p.window != 0 && own >= block.p.window ? own - block.p.window + 1 : 0;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t position = first + n * 8 + i;
                if (position > own || position < seen) {
                    scores[n][2 * half + i] = -INFINITY;
                }
            }
        }
    }
}

template <class T, int HEAD_DIM> __device__ __forceinline__ void prefill(const PrefillParams &p) {
    using Shape = PrefillShape<HEAD_DIM>;
    constexpr int M = Shape::ROW_TILES, N = Shape::POSITIONS / 8;
    KVERN_DYNAMIC_SHARED(dynamic);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const PrefillTile tile = p.tiles[blockIdx.x];
    const uint32_t group = p.heads / p.kv_heads, last = tile.position + tile.rows - 1;
    const Pages pages = {p.block_tables + static_cast<size_t>(tile.table) * p.table_stride, p.block_size, p.kv_heads,
                         blockIdx.y};
    const PrefillBlock<T, HEAD_DIM> block = {
        p, tile, pages, group, last, dynamic, dynamic + Shape::ROWS * Tile<HEAD_DIM>::PITCH_BYTES};
    const float scale_log2 = KVERN_PLANTED(PLANTED_WRONG_SCALE) ? p.scale_log2 * 1.01f : p.scale_log2;

    float acc[M][HEAD_DIM / 8][4], maximum[M][2], sum[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            maximum[m][half] = -INFINITY;
            sum[m][half] = 0;
        }
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) {
            acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0;
        }
    }

    const uint32_t seen = p.window != 0 && tile.position >= p.window ? tile.position - p.window + 1 : 0;
    const uint32_t begin = seen / Shape::POSITIONS, end = last / Shape::POSITIONS + 1;
    block.fetch_queries();
    block.fetch(begin);
    copy_async_commit();
    for (uint32_t index = begin; index < end; ++index) {
        if (index + 1 < end) {
            block.fetch(index + 1);
        }
        copy_async_commit();
        if (!KVERN_PLANTED(PLANTED_MISSING_WAIT)) {
            copy_async_wait<1>();
        }
        __syncthreads();
        unsigned char *k = block.k_tile(index), *v = k + Shape::KV_BYTES;

        float scores[M][N][4] = {};
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; ++i) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                load_a<HEAD_DIM>(a[m], block.queries, warp * Shape::WARP_ROWS + m * 16, i, lane);
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

        // Only tiles at an edge of what some row sees need the mask.
        const uint32_t first = index * Shape::POSITIONS;
        const bool inside = first + Shape::POSITIONS - 1 <= tile.position && (p.window == 0 || first + p.window > last);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            if (!inside) {
                mask<N>(scores[m], block, warp * Shape::WARP_ROWS + m * 16 + lane / 4, first + lane % 4 * 2);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    scores[m][n][i] *= scale_log2;
                }
            }
            float shrink[2];
            soften(scores[m], maximum[m], sum[m], shrink);
            shrink_rows(acc[m], shrink);
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
                    mma<T>(acc[m][2 * i], a[m], b[0], b[1]);
                    mma<T>(acc[m][2 * i + 1], a[m], b[2], b[3]);
                }
            }
        }
        // Nobody reads this tile's half of the ring any more when it is filled again.
        __syncthreads();
    }
    copy_async_wait<0>();

#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float inverse = 1.0f / row_sum(sum[m][half]);
            const uint32_t packed = warp * Shape::WARP_ROWS + m * 16 + half * 8 + lane / 4;
            if (packed >= tile.rows * group) {
                continue;
            }
            const size_t row = tile.row + packed / group;
            T *out = static_cast<T *>(p.out) + (row * p.heads + block.head_at(packed)) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                store_32(out + n * 8,
                         pack_pair<T>(acc[m][n][2 * half] * inverse, acc[m][n][2 * half + 1] * inverse));
            }
        }
    }
}

#define ENTRY(suffix, T, dim)                                                                                          \
    KVERN_KERNEL(kvern_prefill_##suffix##_d##dim, PrefillParams, WARPS * 32) { prefill<T, dim>(p); }
#define ENTRIES(suffix, T) ENTRY(suffix, T, 64) ENTRY(suffix, T, 96) ENTRY(suffix, T, 128) ENTRY(suffix, T, 256)
ENTRIES(bf16, bf16)
ENTRIES(f16, f16)
