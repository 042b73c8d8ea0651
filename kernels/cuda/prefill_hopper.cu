// Paged prefill attention for sm_90a: as prefill.cu, which any GPU can run, with products of warpgroups and copies by TMA.
//
// A block is two warpgroups of 64 pairs each, of a query row and one of the heads that share a KV head, and a warp that copies. K and
// V come in tiles through a ring each. While the values of one tile are summed up, the scores of the next one are multiplied and
// become weights (FlashAttention-3, arXiv:2407.08608). A row visits positions in tiles counted from 0, and what it does not see adds
// exact zeros, so that its bits do not depend on the tile of queries that it is in.
#include "hopper_tile.h"

// What a warpgroup keeps of its rows.
template <class Shape> struct HopperState {
    float scores[Shape::POSITIONS / 8][4], acc[Shape::HEAD_DIM / 8][4], maximum[2], sum[2];
    // Of the tile before: 16 positions each.
    uint32_t weights[Shape::POSITIONS / 16][4];

    // Scores that are done become weights; what was summed so far is to shrink by `shrink`.
    __device__ __forceinline__ void soften_tile(const CausalMask<Shape::POSITIONS> &mask, uint32_t pair, uint32_t index,
                                                float scale_log2, float (&shrink)[2]) {
        mask(scores, pair, index * Shape::POSITIONS + threadIdx.x % 4 * 2);
#pragma unroll
        for (int n = 0; n < Shape::POSITIONS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[n][i] *= scale_log2;
            }
        }
        soften(scores, maximum, sum, shrink);
    }

    template <class T> __device__ __forceinline__ void pack() {
#pragma unroll
        for (int n = 0; n < Shape::POSITIONS / 16; ++n) {
            pack_weights<T>(weights[n], scores, 2 * n);
        }
    }

    // Nothing was seen.
    __device__ __forceinline__ void clear() {
        maximum[0] = maximum[1] = -INFINITY;
        sum[0] = sum[1] = 0;
#pragma unroll
        for (int n = 0; n < Shape::HEAD_DIM / 8; ++n) {
            acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
        }
#pragma unroll
        for (int n = 0; n < Shape::POSITIONS / 8; ++n) {
            scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0;
        }
    }
};

// Begins the scores of a warpgroup's rows with a tile of K.
template <class T, class Shape>
__device__ __forceinline__ void begin_scores(HopperState<Shape> &state, const unsigned char *queries,
                                             const unsigned char *keys) {
    const uint64_t a = Shape::along_sum(queries), b = Shape::along_sum(keys);
    if (!KVERN_PLANTED(PLANTED_UNFENCED_PRODUCTS)) {
        products_fence();
    }
#pragma unroll
    for (int k = 0; k < Shape::HEAD_DIM / 16; ++k) {
        const int panel = k * 16 / Shape::PANEL, within = k * 16 % Shape::PANEL * 2;
        const uint64_t a_offset = panel * Shape::ROWS * Shape::SWIZZLE + within;
        const uint64_t b_offset = panel * Shape::POSITIONS * Shape::SWIZZLE + within;
        Products<T, Shape::POSITIONS>::scores(state.scores, a + a_offset / 16, b + b_offset / 16, k > 0);
    }
    products_commit();
}

// Begins to add the values of a tile of V by the weights.
template <class T, class Shape>
__device__ __forceinline__ void begin_values(HopperState<Shape> &state, const unsigned char *values) {
    const uint64_t b = Shape::across_sum(values);
    products_fence();
#pragma unroll
    for (int n = 0; n < Shape::POSITIONS / 16; ++n) {
        Products<T, Shape::HEAD_DIM>::weighted(state.acc, state.weights[n], b + n * 16 * Shape::SWIZZLE / 16);
    }
    products_commit();
}

template <class T, class Shape>
__device__ __forceinline__ void store_rows(const HopperTile<T, Shape> &tile, const HopperState<Shape> &state, T *out,
                                           uint32_t heads) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float inverse = 1.0f / row_sum(state.sum[half]);
        const uint32_t packed = tile.pair() + half * 8;
        if (packed >= tile.own.rows * tile.group) {
            continue;
        }
        const size_t row = tile.own.row + packed / tile.group;
        T *to = out + (row * heads + tile.head_of(packed)) * Shape::HEAD_DIM + threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < Shape::HEAD_DIM / 8; ++n) {
            const float *values = &state.acc[n][2 * half];
            store_32(to + n * 8, pack_pair<T>(values[0] * inverse, values[1] * inverse));
        }
    }
}

// A warpgroup's part. In the loop, scores of a tile and values of the tile before are under way at once; registers that products use
// are touched only where these were waited for.
template <class T, class Shape>
__device__ __forceinline__ void attend(const HopperTile<T, Shape> &tile, const PrefillHopperParams &p) {
    const CausalMask<Shape::POSITIONS> mask = {tile.own.position, tile.last, tile.group, p.window};
    const float scale_log2 = KVERN_PLANTED(PLANTED_WRONG_SCALE) ? p.scale_log2 * 1.01f : p.scale_log2;
    const Ring<Shape> keys = tile.keys(), values = tile.values();
    const unsigned char *queries = tile.bring_queries();
    HopperState<Shape> state;
    float shrink[2];
    state.clear();

    keys.await(0);
    pin_registers(state.scores);
    begin_scores<T>(state, queries, keys.tile(0));
    products_wait<0>();
    pin_registers(state.scores);
    keys.release(0);
    state.soften_tile(mask, tile.pair(), tile.begin, scale_log2, shrink);
    state.template pack<T>();
    for (uint32_t n = 1; n < tile.count; ++n) {
        keys.await(n);
        pin_registers(state.scores);
        pin_registers(state.acc);
        pin_registers(state.weights);
        begin_scores<T>(state, queries, keys.tile(n));
        values.await(n - 1);
        begin_values<T>(state, values.tile(n - 1));
        if (KVERN_PLANTED(PLANTED_EARLY_RELEASE)) {
            values.release(n - 1);
        }
        if (!KVERN_PLANTED(PLANTED_MISSING_WAIT)) {
            products_wait<1>();
        }
        pin_registers(state.scores);
        keys.release(n);
        state.soften_tile(mask, tile.pair(), tile.begin + n, scale_log2, shrink);
        if (KVERN_PLANTED(PLANTED_EARLY_WEIGHTS)) {
            state.template pack<T>();
        }
        // Waits no more, and ends a stretch of instructions without branches, in which the compiler would put the next wait before the
        // exponentials: those are to run beside the values of the tile before.
        pin_registers(state.scores);
        values.await(n - 1);
        products_wait<0>();
        pin_registers(state.acc);
        pin_registers(state.weights);
        if (!KVERN_PLANTED(PLANTED_EARLY_RELEASE)) {
            values.release(n - 1);
        }
        shrink_rows(state.acc, shrink);
        state.template pack<T>();
    }
    values.await(tile.count - 1);
    tile.clear_tail(values.tile(tile.count - 1));
    pin_registers(state.acc);
    pin_registers(state.weights);
    begin_values<T>(state, values.tile(tile.count - 1));
    products_wait<0>();
    pin_registers(state.acc);
    pin_registers(state.weights);
    store_rows(tile, state, static_cast<T *>(p.out), p.heads);
}

template <class T, int HEAD_DIM> __device__ __forceinline__ void prefill(const PrefillHopperParams &p) {
    using Shape = HopperShape<HEAD_DIM>;
    KVERN_DYNAMIC_SHARED(dynamic);
    KVERN_SHARED(uint64_t, barriers, 4 * Shape::STAGES);
    const HopperTile<T, Shape> tile(p, dynamic, barriers);
    if (threadIdx.x == 0) {
        tile.keys().init();
        tile.values().init();
        fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x >= HOPPER_CONSUMERS) {
        give_up_registers<HOPPER_COPY_REGISTERS>();
        if (threadIdx.x < HOPPER_CONSUMERS + 32) {
            tile.copy_tiles(p);
        }
    } else {
        take_registers<HOPPER_CONSUMER_REGISTERS>();
        attend(tile, p);
    }
}

// Every other target has the kernels' names alone: there is no such instruction.
#if defined(KVERN_HOST_SHIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KVERN_HOPPER_BODY(T, dim) prefill<T, dim>(p)
#else
#define KVERN_HOPPER_BODY(T, dim) __trap()
#endif

#define ENTRY(suffix, T, dim)                                                                                          \
    KVERN_KERNEL(kvern_prefill_hopper_##suffix##_d##dim, PrefillHopperParams, HOPPER_THREADS) {                        \
        KVERN_HOPPER_BODY(T, dim);                                                                                     \
    }
#define ENTRIES(suffix, T) ENTRY(suffix, T, 64) ENTRY(suffix, T, 96) ENTRY(suffix, T, 128) ENTRY(suffix, T, 256)
ENTRIES(bf16, bf16)
ENTRIES(f16, f16)
