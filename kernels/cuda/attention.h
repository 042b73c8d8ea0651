// What decode and prefill attention share: tiles in shared memory, pages, fragments, the online softmax (Milakov and
// Gimelshein, arXiv:1805.02867) as in FlashAttention-2 (arXiv:2307.08691).
//
// A row of a tile is head_dim 16-bit elements and 16 bytes of padding: an odd number of 16-byte units, so that the eight rows
// which one phase of ldmatrix reads lie in different banks, whatever the head size.
#pragma once

#include "element.h"
#include "reduce.h"

template <int HEAD_DIM> struct Tile {
    static constexpr int UNITS = HEAD_DIM / 8;
    static constexpr int PITCH_BYTES = HEAD_DIM * 2 + 16;
    static_assert(HEAD_DIM % 16 == 0, "products take 16 values at a time");

    static __device__ __forceinline__ unsigned char *at(unsigned char *tile, int row, int unit) {
        return tile + row * PITCH_BYTES + unit * 16;
    }
};

// The pages of one sequence under one KV head.
struct Pages {
    const uint32_t *table;
    uint32_t block_size, kv_heads, kv_head;

    // Row of `position` in a cache that is seen as [rows][head_dim].
    __device__ __forceinline__ uint32_t row(uint32_t position) const {
        const uint32_t in_table = position / block_size + (KVERN_PLANTED(PLANTED_TABLE_OFF_BY_ONE) ? 1 : 0);
        return (table[in_table] * kv_heads + kv_head) * block_size + position % block_size;
    }
};

// The operand a of mma: rows first..first + 16 of a tile, values 16 k..16 k + 16.
template <int HEAD_DIM>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], unsigned char *tile, int first, int k, int lane) {
    load_matrices(a, Tile<HEAD_DIM>::at(tile, first + lane % 16, 2 * k + lane / 16));
}

// The operand b of q * k^T, for 16 keys from `first` on: b[0..2] those of the first 8, b[2..4] the others'.
template <int HEAD_DIM>
__device__ __forceinline__ void load_keys(uint32_t (&b)[4], unsigned char *tile, int first, int k, int lane) {
    load_matrices(b, Tile<HEAD_DIM>::at(tile, first + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}

// The operand b of p * v, for 16 positions from `first` on and the values 16 n..16 n + 16, eight by eight.
template <int HEAD_DIM>
__device__ __forceinline__ void load_values(uint32_t (&b)[4], unsigned char *tile, int first, int n, int lane) {
    load_matrices_transposed(b, Tile<HEAD_DIM>::at(tile, first + lane % 16, 2 * n + lane / 16));
}

// Scores, in base 2, of one 16-row tile of queries become weights. Of a lane, scores [n][0..2] are of row lane / 4 and [n][2..4] of
// the row 8 below. Updates each row's maximum and this lane's part of its sum; what was summed so far shrinks by `shrink`. A row that
// has seen nothing has the maximum -infinity, and its weights are zero.
template <int N>
__device__ __forceinline__ void soften(float (&scores)[N][4], float (&maximum)[2], float (&sum)[2], float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float top = maximum[half];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(WHOLE_WARP, top, 1));
        top = fmaxf(top, __shfl_xor_sync(WHOLE_WARP, top, 2));
        const float from = top == -INFINITY ? 0.0f : top;
        shrink[half] = exp2_fast(maximum[half] - from);
        maximum[half] = top;
        float total = 0;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float &score = scores[n][2 * half + i];
                score = exp2_fast(score - from);
                total += score;
            }
        }
        sum[half] = sum[half] * shrink[half] + total;
    }
}

template <int N> __device__ __forceinline__ void shrink_rows(float (&acc)[N][4], const float (&shrink)[2]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        acc[n][0] *= shrink[0];
        acc[n][1] *= shrink[0];
        acc[n][2] *= shrink[1];
        acc[n][3] *= shrink[1];
    }
}

// Adds up over the four lanes that hold a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(WHOLE_WARP, x, 1);
    return x + __shfl_xor_sync(WHOLE_WARP, x, 2);
}

// Weights of 16 positions, two score tiles from `n` on, as the operand a.
template <class T, int N>
__device__ __forceinline__ void pack_weights(uint32_t (&a)[4], const float (&weights)[N][4], int n) {
    a[0] = pack_pair<T>(weights[n][0], weights[n][1]);
    a[1] = pack_pair<T>(weights[n][2], weights[n][3]);
    a[2] = pack_pair<T>(weights[n + 1][0], weights[n + 1][1]);
    a[3] = pack_pair<T>(weights[n + 1][2], weights[n + 1][3]);
}
