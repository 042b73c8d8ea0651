// Element types and 128-bit accesses. bf16 and f16 are bits in a struct of our own, so that the same code compiles with and
// without CUDA's headers; arithmetic is always in f32.
#pragma once

#include "kernel.h"
#include "ptx.h"

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

using f32 = float;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) { return f16_to_float(x.bits); }

// Rounds to nearest, ties to even.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return bf16{float_to_bf16(x)}; }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return f16{float_to_f16(x)}; }

// Two values as one register of a matrix fragment, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <> __device__ __forceinline__ uint32_t pack_pair<bf16>(float low, float high) { return pack_bf16(low, high); }
template <> __device__ __forceinline__ uint32_t pack_pair<f16>(float low, float high) { return pack_f16(low, high); }

// As many elements as one thread reads or writes at once: 16 bytes.
template <class T> struct alignas(16) Pack {
    static constexpr int LEN = 16 / sizeof(T);
    T values[LEN];
};

template <class T> __device__ __forceinline__ Pack<T> load_pack(const T *from) {
    Pack<T> pack;
    uint4 words = load_128(from);
    __builtin_memcpy(&pack, &words, 16);
    return pack;
}

template <class T> __device__ __forceinline__ void store_pack(T *to, const Pack<T> &pack) {
    uint4 words;
    __builtin_memcpy(&words, &pack, 16);
    store_128(to, words);
}

// Applies MACRO(suffix, type) to every element type.
#define KVERN_FOR_ELEMENTS(MACRO) MACRO(bf16, bf16) MACRO(f16, f16) MACRO(f32, f32)
