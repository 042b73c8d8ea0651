// RMSNorm, alone and fused with the residual's addition. One block per row; the second pass finds the row in L1 or L2.
#include "element.h"
#include "reduce.h"

template <class T, bool RESIDUAL> __device__ __forceinline__ void rms_norm(const RmsNormParams &p) {
    constexpr uint32_t LEN = Pack<T>::LEN;
    const size_t row = static_cast<size_t>(blockIdx.x) * p.columns;
    const T *x = static_cast<const T *>(p.x) + row;
    T *residual = RESIDUAL ? static_cast<T *>(p.residual) + row : nullptr;
    const T *weight = static_cast<const T *>(p.weight);
    T *out = static_cast<T *>(p.out) + row;
    const bool wide = p.columns % LEN == 0;

    float squares = 0;
    if (wide) {
        for (uint32_t i = threadIdx.x * LEN; i < p.columns; i += blockDim.x * LEN) {
            Pack<T> pack = load_pack(x + i);
            if constexpr (RESIDUAL) {
                const Pack<T> before = load_pack(residual + i);
#pragma unroll
                for (uint32_t j = 0; j < LEN; ++j) {
                    pack.values[j] = from_float<T>(to_float(pack.values[j]) + to_float(before.values[j]));
                }
                store_pack(residual + i, pack);
            }
#pragma unroll
            for (uint32_t j = 0; j < LEN; ++j) {
                squares += to_float(pack.values[j]) * to_float(pack.values[j]);
            }
        }
    } else {
        for (uint32_t i = threadIdx.x; i < p.columns; i += blockDim.x) {
            T value = x[i];
            if constexpr (RESIDUAL) {
                value = from_float<T>(to_float(value) + to_float(residual[i]));
                residual[i] = value;
            }
            squares += to_float(value) * to_float(value);
        }
    }
    const float scale = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(p.columns) + p.eps);

    // Each thread reads back what it wrote itself.
    const T *normed = RESIDUAL ? residual : x;
    if (wide) {
        for (uint32_t i = threadIdx.x * LEN; i < p.columns; i += blockDim.x * LEN) {
            Pack<T> pack = load_pack(normed + i), weights = load_pack(weight + i);
#pragma unroll
            for (uint32_t j = 0; j < LEN; ++j) {
                pack.values[j] = from_float<T>(to_float(pack.values[j]) * scale * to_float(weights.values[j]));
            }
            store_pack(out + i, pack);
        }
    } else {
        for (uint32_t i = threadIdx.x; i < p.columns; i += blockDim.x) {
            out[i] = from_float<T>(to_float(normed[i]) * scale * to_float(weight[i]));
        }
    }
}

#define ENTRY(suffix, T)                                                                                               \
    KVERN_KERNEL(kvern_rms_norm_##suffix, RmsNormParams, 1024) { rms_norm<T, false>(p); }                              \
    KVERN_KERNEL(kvern_add_rms_norm_##suffix, RmsNormParams, 1024) { rms_norm<T, true>(p); }
KVERN_FOR_ELEMENTS(ENTRY)
