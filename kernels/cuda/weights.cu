// Weights that are made on the device: dequantized from GGUF blocks, or random.
#include "quant.h"

template <class Format, class T> __device__ __forceinline__ void dequantize(const DequantizeParams &p) {
    const uint8_t *blocks = static_cast<const uint8_t *>(p.blocks);
    T *out = static_cast<T *>(p.out);
    const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = thread * 8; i < p.elements; i += threads * 8) {
        float values[8];
        Format::values(values, blocks + i / Format::ELEMENTS * Format::BYTES, i % Format::ELEMENTS);
#pragma unroll
        for (int part = 0; part < 8 / Pack<T>::LEN; ++part) {
            Pack<T> pack;
#pragma unroll
            for (int j = 0; j < Pack<T>::LEN; ++j) {
                pack.values[j] = from_float<T>(values[part * Pack<T>::LEN + j]);
            }
            store_pack(out + i + part * Pack<T>::LEN, pack);
        }
    }
}

#define DEQUANTIZE(format, Format, suffix, T)                                                                          \
    KVERN_KERNEL(kvern_dequantize_##format##_##suffix, DequantizeParams, 256) { dequantize<Format, T>(p); }
#define DEQUANTIZES(suffix, T) KVERN_FOR_FORMATS(DEQUANTIZE, suffix, T)
KVERN_FOR_ELEMENTS(DEQUANTIZES)

// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014) over seed and index; 24 bits make a uniform number.
template <class T> __device__ __forceinline__ void fill(const FillParams &p) {
    const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = thread; i < p.elements; i += threads) {
        uint64_t z = p.seed + (i + 1) * 0x9e3779b97f4a7c15ull;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        const float unit = static_cast<float>(static_cast<uint32_t>(z >> 40)) * 0x1p-23f - 1.0f;
        static_cast<T *>(p.out)[i] = from_float<T>(unit * p.limit);
    }
}

#define FILL(suffix, T)                                                                                                \
    KVERN_KERNEL(kvern_fill_##suffix, FillParams, 256) { fill<T>(p); }
KVERN_FOR_ELEMENTS(FILL)
