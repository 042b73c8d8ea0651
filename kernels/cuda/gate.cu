// SiLU and GELU (the tanh form) with product, from rows of gate and up.
#include "element.h"

struct Silu {
    static __device__ __forceinline__ float apply(float x) { return x / (1.0f + expf(-x)); }
};

// 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2u)).
struct GeluTanh {
    static __device__ __forceinline__ float apply(float x) {
        const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        return x / (1.0f + expf(-2.0f * u));
    }
};

template <class Act, class T> __device__ __forceinline__ void gate(const GateParams &p) {
    constexpr uint32_t LEN = Pack<T>::LEN;
    const T *x = static_cast<const T *>(p.x);
    T *out = static_cast<T *>(p.out);
    const size_t columns = p.columns, all = p.rows * columns;
    const size_t thread = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t threads = static_cast<size_t>(gridDim.x) * blockDim.x;
    if (columns % LEN == 0) {
        const size_t end = KVERN_PLANTED(PLANTED_UNWRITTEN_TAIL) ? all - LEN : all;
        for (size_t i = thread * LEN; i < end; i += threads * LEN) {
            const T *row = x + i / columns * 2 * columns + i % columns;
            Pack<T> gates = load_pack(row), ups = load_pack(row + columns);
#pragma unroll
            for (uint32_t j = 0; j < LEN; ++j) {
                gates.values[j] = from_float<T>(Act::apply(to_float(gates.values[j])) * to_float(ups.values[j]));
            }
            store_pack(out + i, gates);
        }
    } else {
        for (size_t i = thread; i < all; i += threads) {
            const T *row = x + i / columns * 2 * columns + i % columns;
            out[i] = from_float<T>(Act::apply(to_float(row[0])) * to_float(row[columns]));
        }
    }
}

#define ENTRY(suffix, T)                                                                                               \
    KVERN_KERNEL(kvern_silu_mul_##suffix, GateParams, 256) { gate<Silu, T>(p); }                                       \
    KVERN_KERNEL(kvern_gelu_mul_##suffix, GateParams, 256) { gate<GeluTanh, T>(p); }
KVERN_FOR_ELEMENTS(ENTRY)
