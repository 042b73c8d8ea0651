// Products of 1 to 8 rows, bound by the reading of weights. A block computes four outputs, so that what it loads of x serves four
// weights; its four warps take turns over the inner dimension, so that few outputs still make many reads. The order of a row's sum
// depends on the inner dimension alone, not on how many rows there are.
#pragma once

#include "element.h"
#include "reduce.h"

constexpr uint32_t GEMV_WARPS = 4, GEMV_OUTPUTS = 4, GEMV_VALUES = 8;
constexpr uint32_t LINE_BYTES = 128; // Of L2.
static_assert(GEMV_WARPS == GEMV_OUTPUTS, "a warp fetches an output's first weights");

template <class T> __device__ __forceinline__ void load_values_8(float (&out)[8], const T *from) {
    constexpr int LEN = Pack<T>::LEN;
#pragma unroll
    for (int part = 0; part < 8 / LEN; ++part) {
        const Pack<T> pack = load_pack(from + part * LEN);
#pragma unroll
        for (int i = 0; i < LEN; ++i) {
            out[part * LEN + i] = to_float(pack.values[i]);
        }
    }
}

// Weights of T, row after row.
template <class T> struct DenseWeights {
    const T *w;
    uint32_t inner;

    __device__ __forceinline__ void values(float (&out)[8], uint32_t output, uint32_t k) const {
        constexpr int LEN = Pack<T>::LEN;
        const T *from = w + static_cast<size_t>(output) * inner + k;
#pragma unroll
        for (int part = 0; part < 8 / LEN; ++part) {
            Pack<T> pack;
            const uint4 words = load_128_streaming(from + part * LEN);
            __builtin_memcpy(&pack, &words, 16);
#pragma unroll
            for (int i = 0; i < LEN; ++i) {
                out[part * LEN + i] = to_float(pack.values[i]);
            }
        }
    }

    __device__ __forceinline__ uint32_t row_bytes() const { return inner * static_cast<uint32_t>(sizeof(T)); }
};

// GGUF blocks, row after row.
template <class Format> struct BlockWeights {
    const uint8_t *w;
    uint32_t inner;

    __device__ __forceinline__ void values(float (&out)[8], uint32_t output, uint32_t k) const {
        const size_t block = static_cast<size_t>(output) * (inner / Format::ELEMENTS) + k / Format::ELEMENTS;
        Format::values(out, w + block * Format::BYTES, k % Format::ELEMENTS);
    }

    __device__ __forceinline__ uint32_t row_bytes() const { return inner / Format::ELEMENTS * Format::BYTES; }
};

// Begins to fetch the first lines of a block's weights, an output's by each warp: no kernel writes them, so they may come while
// the launch before still runs. The indices are read anew so that nothing of this stays in registers for the product.
__device__ __forceinline__ void prefetch_weights(const GemvParams &p, size_t row_bytes) {
    if (p.prefetch != 0) {
        const uint32_t thread = fresh_thread_index(), output = fresh_block_index() * GEMV_OUTPUTS + thread / 32;
        const size_t at = output * row_bytes + thread % 32 * LINE_BYTES;
        if (at < p.outputs * row_bytes) {
            prefetch_l2(static_cast<const unsigned char *>(p.w) + at);
        }
    }
}

template <class T, int ROWS, class Weights> __device__ __forceinline__ void gemv(const GemvParams &p, const Weights &weights) {
    KVERN_SHARED(float, sums, GEMV_WARPS * GEMV_OUTPUTS * ROWS);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * GEMV_OUTPUTS;
    const T *x = static_cast<const T *>(p.x);
    prefetch_weights(p, weights.row_bytes());
    wait_for_launches_before();
    float acc[GEMV_OUTPUTS][ROWS] = {};
    for (uint32_t k = threadIdx.x * GEMV_VALUES; k < p.inner; k += GEMV_WARPS * 32 * GEMV_VALUES) {
        float w[GEMV_OUTPUTS][8];
#pragma unroll
        for (uint32_t i = 0; i < GEMV_OUTPUTS; ++i) {
            // Past the last output its weights are read again, and the sum is dropped.
            weights.values(w[i], min(first + i, p.outputs - 1), k);
        }
#pragma unroll
        for (uint32_t row = 0; row < ROWS; ++row) {
            float values[8];
            load_values_8(values, x + static_cast<size_t>(min(row, p.rows - 1)) * p.inner + k);
#pragma unroll
            for (uint32_t i = 0; i < GEMV_OUTPUTS; ++i) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    acc[i][row] += w[i][j] * values[j];
                }
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < GEMV_OUTPUTS; ++i) {
#pragma unroll
        for (uint32_t row = 0; row < ROWS; ++row) {
            const float sum = warp_sum(acc[i][row]);
            if (lane == 0) {
                sums[(warp * GEMV_OUTPUTS + i) * ROWS + row] = sum;
            }
        }
    }
    if (!KVERN_PLANTED(PLANTED_MISSING_BARRIER)) {
        __syncthreads();
    }
    if (threadIdx.x < GEMV_OUTPUTS * ROWS) {
        const uint32_t output = first + threadIdx.x / ROWS, row = threadIdx.x % ROWS;
        if (output < p.outputs && row < p.rows) {
            float sum = p.bias ? to_float(static_cast<const T *>(p.bias)[output]) : 0.0f;
#pragma unroll
            for (uint32_t from = 0; from < GEMV_WARPS; ++from) {
                sum += sums[from * GEMV_OUTPUTS * ROWS + threadIdx.x];
            }
            const size_t at = static_cast<size_t>(row) * p.out_stride + output;
            if (p.out_f32 != 0) {
                static_cast<float *>(p.out)[at] = sum;
            } else {
                static_cast<T *>(p.out)[at] = from_float<T>(sum);
            }
        }
    }
}
