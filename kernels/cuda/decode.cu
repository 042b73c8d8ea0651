// Paged decode attention: one query row per sequence, a KV head read once for all of its query heads.
//
// The up to 16 query heads of a KV head are the rows of one mma, so that the products cost little beside the reads. Each
// warp has a ring of its own in shared memory, 16 positions of K and V per stage, filled by asynchronous copies: warps meet
// only at the end of an item, when their softmaxes are merged in order. With three stages two are always under way: 4 warps x
// 2 stages x 8 KiB per block at 128 values per head, which is more than a multiprocessor's share of the memory's latency.
#include "attention.h"

constexpr int WARPS = 4, POSITIONS = 16, HEADS_MAX = 16;

template <int HEAD_DIM> struct DecodeShared {
    static constexpr int STAGES = HEAD_DIM > 128 ? 2 : 3;
    static constexpr int TILE_BYTES = POSITIONS * Tile<HEAD_DIM>::PITCH_BYTES;
    static constexpr int RING_BYTES = STAGES * 2 * TILE_BYTES;
    // After the ring has been read it holds the warp's result, in f32.
    static_assert(RING_BYTES >= HEADS_MAX * HEAD_DIM * 4, "a result fits a ring");
};

// One warp's way over an item: its ring, and where it is.
template <class T, int HEAD_DIM> struct DecodeRing {
    using Shared = DecodeShared<HEAD_DIM>;
    unsigned char *memory;
    const T *k_cache, *v_cache;
    Pages pages;
    uint32_t base, end, warp, lane;

    __device__ __forceinline__ uint32_t position(uint32_t step) const {
        return base + (step * WARPS + warp) * POSITIONS;
    }

    __device__ __forceinline__ unsigned char *k_tile(uint32_t step) const {
        return memory + step % Shared::STAGES * (2 * Shared::TILE_BYTES);
    }

    // Begins to copy the tile of a step; past the end, zeros, of which masked weights make zeros.
    __device__ __forceinline__ void fetch(uint32_t step) const {
        const uint32_t first = position(step), own = first + lane % POSITIONS;
        if (first >= end) {
            return;
        }
        const uint32_t own_row = own < end ? pages.row(own) : KVERN_NONE;
        unsigned char *k = k_tile(step), *v = k + Shared::TILE_BYTES;
        constexpr int UNITS = Tile<HEAD_DIM>::UNITS;
#pragma unroll
        for (int i = 0; i < POSITIONS * UNITS / 32; ++i) {
            const int index = i * 32 + static_cast<int>(lane), row = index / UNITS, unit = index % UNITS;
            const uint32_t cache_row = __shfl_sync(WHOLE_WARP, own_row, row);
            const bool valid = cache_row != KVERN_NONE;
            const size_t at = valid ? static_cast<size_t>(cache_row) * HEAD_DIM + unit * 8 : 0;
            copy_async_128(Tile<HEAD_DIM>::at(k, row, unit), k_cache + at, valid);
            copy_async_128(Tile<HEAD_DIM>::at(v, row, unit), v_cache + at, valid);
        }
    }
};

// Softmax and weighted values of one warp's share of an item.
template <int HEAD_DIM> struct DecodeState {
    float acc[HEAD_DIM / 8][4], maximum[2], sum[2];
};

template <class T, int HEAD_DIM>
__device__ __forceinline__ void decode_item(const DecodeRing<T, HEAD_DIM> &ring, unsigned char *queries,
                                            uint32_t first, float scale_log2, DecodeState<HEAD_DIM> &state) {
    using Shared = DecodeShared<HEAD_DIM>;
    const int lane = static_cast<int>(ring.lane);
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
        state.acc[n][0] = state.acc[n][1] = state.acc[n][2] = state.acc[n][3] = 0;
    }
    state.maximum[0] = state.maximum[1] = -INFINITY;
    state.sum[0] = state.sum[1] = 0;
#pragma unroll
    for (int step = 0; step < Shared::STAGES - 1; ++step) {
        ring.fetch(step);
        copy_async_commit();
    }
    for (uint32_t step = 0; ring.position(step) < ring.end; ++step) {
        if (!KVERN_PLANTED(PLANTED_MISSING_WAIT)) {
            copy_async_wait<Shared::STAGES - 2>();
        }
        // The other lanes' copies are there, and nobody reads the stage that is filled next.
        __syncwarp();
        ring.fetch(step + Shared::STAGES - 1);
        copy_async_commit();

        unsigned char *k = ring.k_tile(step), *v = k + Shared::TILE_BYTES;
        float scores[2][4] = {};
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; ++i) {
            uint32_t a[4], b[4];
            load_a<HEAD_DIM>(a, queries, 0, i, lane);
            load_keys<HEAD_DIM>(b, k, 0, i, lane);
            mma<T>(scores[0], a, b[0], b[1]);
            mma<T>(scores[1], a, b[2], b[3]);
        }
        const uint32_t at = ring.position(step) + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t position = at + n * 8 + i % 2;
                const bool seen = position >= first && position < ring.end;
                scores[n][i] = seen ? scores[n][i] * scale_log2 : -INFINITY;
            }
        }
        float shrink[2];
        soften(scores, state.maximum, state.sum, shrink);
        shrink_rows(state.acc, shrink);
        uint32_t a[4];
        pack_weights<T>(a, scores, 0);
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 16; ++n) {
            uint32_t b[4];
            load_values<HEAD_DIM>(b, v, 0, n, lane);
            mma<T>(state.acc[2 * n], a, b[0], b[1]);
            mma<T>(state.acc[2 * n + 1], a, b[2], b[3]);
        }
    }
    copy_async_wait<0>();
    __syncwarp();
}

template <class T, int HEAD_DIM> __device__ __forceinline__ void decode(const DecodeParams &p) {
    using Shared = DecodeShared<HEAD_DIM>;
    KVERN_DYNAMIC_SHARED(dynamic);
    KVERN_SHARED(float, maxima, WARPS * HEADS_MAX);
    KVERN_SHARED(float, sums, WARPS * HEADS_MAX);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t group = p.heads / p.kv_heads, head_tiles = (group + HEADS_MAX - 1) / HEADS_MAX;
    const uint32_t kv_head = blockIdx.y / head_tiles, in_group = blockIdx.y % head_tiles * HEADS_MAX;
    const uint32_t heads = min(group - in_group, static_cast<uint32_t>(HEADS_MAX));
    const uint32_t first_head = kv_head * group + in_group;
    unsigned char *queries = dynamic, *rings = dynamic + Shared::TILE_BYTES;
    const float scale_log2 = KVERN_PLANTED(PLANTED_WRONG_SCALE) ? p.scale_log2 * 1.01f : p.scale_log2;

    for (uint32_t index = p.starts[blockIdx.x]; index < p.starts[blockIdx.x + 1]; ++index) {
        const DecodeItem item = p.items[index];
        const T *q = static_cast<const T *>(p.qkv) + static_cast<size_t>(item.row) * p.qkv_stride + first_head * HEAD_DIM;
        constexpr uint32_t UNITS = Tile<HEAD_DIM>::UNITS;
        for (uint32_t i = threadIdx.x; i < HEADS_MAX * UNITS; i += WARPS * 32) {
            const uint32_t head = i / UNITS, unit = i % UNITS;
            const uint4 zeros = {0, 0, 0, 0};
            store_128(Tile<HEAD_DIM>::at(queries, head, unit),
                      head < heads ? load_128(q + head * HEAD_DIM + unit * 8) : zeros);
        }
        __syncthreads();

        const DecodeRing<T, HEAD_DIM> ring = {
            rings + warp * Shared::RING_BYTES,
            static_cast<const T *>(p.k_cache),
            static_cast<const T *>(p.v_cache),
            {p.block_tables + static_cast<size_t>(item.table) * p.table_stride, p.block_size, p.kv_heads, kv_head},
            item.first / POSITIONS * POSITIONS,
            item.end,
            warp,
            lane,
        };
        DecodeState<HEAD_DIM> state;
        decode_item(ring, queries, item.first, scale_log2, state);

        // Each warp leaves its result in its own ring: [16][head_dim].
        float *values = reinterpret_cast<float *>(ring.memory);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t head = lane / 4 + half * 8;
            const float sum = row_sum(state.sum[half]);
            if (lane % 4 == 0) {
                maxima[warp * HEADS_MAX + head] = state.maximum[half];
                sums[warp * HEADS_MAX + head] = sum;
            }
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                float *to = values + head * HEAD_DIM + n * 8 + lane % 4 * 2;
                to[0] = state.acc[n][2 * half];
                to[1] = state.acc[n][2 * half + 1];
            }
        }
        __syncthreads();

        const float *results = reinterpret_cast<const float *>(rings);
        for (uint32_t i = threadIdx.x; i < heads * HEAD_DIM; i += WARPS * 32) {
            const uint32_t head = i / HEAD_DIM, value = i % HEAD_DIM;
            float top = -INFINITY, sum = 0, total = 0;
#pragma unroll
            for (uint32_t from = 0; from < WARPS; ++from) {
                top = fmaxf(top, maxima[from * HEADS_MAX + head]);
            }
#pragma unroll
            for (uint32_t from = 0; from < WARPS; ++from) {
                const float weight = exp2_fast(maxima[from * HEADS_MAX + head] - top);
                sum += weight * sums[from * HEADS_MAX + head];
                total += weight * results[from * (Shared::RING_BYTES / 4) + i];
            }
            if (item.partial == KVERN_NONE) {
                T *out = static_cast<T *>(p.out) + (static_cast<size_t>(item.row) * p.heads + first_head) * HEAD_DIM;
                out[i] = from_float<T>(total / sum);
            } else {
                const size_t partial = static_cast<size_t>(item.partial) * p.heads + first_head + head;
                p.values[partial * HEAD_DIM + value] = total;
                if (value == 0) {
                    p.sums[2 * partial] = top;
                    p.sums[2 * partial + 1] = sum;
                }
            }
        }
        __syncthreads();
    }
}

// Pieces of one row and head, merged in order of position. A thread per value. Launches of captured graphs have entries to spare.
template <class T, int HEAD_DIM> __device__ __forceinline__ void merge(const DecodeParams &p) {
    const DecodeMerge own = p.merges[blockIdx.x];
    if (own.count == 0) {
        return;
    }
    const size_t head = blockIdx.y;
    const float *sums = p.sums + (static_cast<size_t>(own.first) * p.heads + head) * 2;
    const float *values = p.values + (static_cast<size_t>(own.first) * p.heads + head) * HEAD_DIM;
    float top = -INFINITY, sum = 0, total = 0;
    for (uint32_t i = 0; i < own.count; ++i) {
        top = fmaxf(top, sums[static_cast<size_t>(i) * p.heads * 2]);
    }
    for (uint32_t i = 0; i < own.count; ++i) {
        const float weight = exp2_fast(sums[static_cast<size_t>(i) * p.heads * 2] - top);
        sum += weight * sums[static_cast<size_t>(i) * p.heads * 2 + 1];
        total += weight * values[static_cast<size_t>(i) * p.heads * HEAD_DIM + threadIdx.x];
    }
    T *out = static_cast<T *>(p.out) + (static_cast<size_t>(own.row) * p.heads + head) * HEAD_DIM;
    out[threadIdx.x] = from_float<T>(total / sum);
}

#define ENTRY(suffix, T, dim)                                                                                          \
    KVERN_KERNEL(kvern_decode_##suffix##_d##dim, DecodeParams, WARPS * 32) { decode<T, dim>(p); }                      \
    KVERN_KERNEL(kvern_decode_merge_##suffix##_d##dim, DecodeParams, dim) { merge<T, dim>(p); }
#define ENTRIES(suffix, T) ENTRY(suffix, T, 64) ENTRY(suffix, T, 96) ENTRY(suffix, T, 128) ENTRY(suffix, T, 256)
ENTRIES(bf16, bf16)
ENTRIES(f16, f16)
