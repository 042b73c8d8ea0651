// GGUF blocks as stored, eight values at a time. Layouts are ggml's (ggml-common.h); kernels/src/format.rs is the specification:
// value = scale * (code - zero point) + minimum, where the product is exact.
#pragma once

#include "element.h"

template <int ALIGN> __device__ __forceinline__ void load_codes(uint32_t (&words)[2], const uint8_t *from) {
    if constexpr (ALIGN == 8) {
        const uint2 both = *reinterpret_cast<const uint2 *>(from);
        words[0] = both.x;
        words[1] = both.y;
    } else if constexpr (ALIGN == 4) {
        words[0] = reinterpret_cast<const uint32_t *>(from)[0];
        words[1] = reinterpret_cast<const uint32_t *>(from)[1];
    } else {
        const uint16_t *halves = reinterpret_cast<const uint16_t *>(from);
        words[0] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
        words[1] = halves[2] | static_cast<uint32_t>(halves[3]) << 16;
    }
}

__device__ __forceinline__ float half_at(const uint8_t *from) {
    return f16_to_float(*reinterpret_cast<const uint16_t *>(from));
}

// Nibbles of eight bytes, the low ones (0) or the high ones (4), less `zero`, times the scale, plus the minimum.
__device__ __forceinline__ void scale_nibbles(float (&out)[8], const uint32_t (&words)[2], uint32_t shift, int zero,
                                              float scale, float minimum) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int code = static_cast<int>(words[i / 4] >> (8 * (i % 4) + shift) & 15) - zero;
        out[i] = scale * static_cast<float>(code) + minimum;
    }
}

// Each format: elements and bytes of a block, and the eight values from element `first` on, a multiple of 8.
struct Q4_0 {
    static constexpr uint32_t ELEMENTS = 32, BYTES = 18;
    static __device__ __forceinline__ void values(float (&out)[8], const uint8_t *block, uint32_t first) {
        uint32_t words[2];
        load_codes<2>(words, block + 2 + first % 16);
        scale_nibbles(out, words, first / 16 * 4, 8, half_at(block), 0);
    }
};

struct Q4_1 {
    static constexpr uint32_t ELEMENTS = 32, BYTES = 20;
    static __device__ __forceinline__ void values(float (&out)[8], const uint8_t *block, uint32_t first) {
        uint32_t words[2];
        load_codes<4>(words, block + 4 + first % 16);
        scale_nibbles(out, words, first / 16 * 4, 0, half_at(block), half_at(block + 2));
    }
};

struct Q8_0 {
    static constexpr uint32_t ELEMENTS = 32, BYTES = 34;
    static __device__ __forceinline__ void values(float (&out)[8], const uint8_t *block, uint32_t first) {
        uint32_t words[2];
        load_codes<2>(words, block + 2 + first);
        const float scale = half_at(block);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            out[i] = scale * static_cast<float>(static_cast<int8_t>(words[i / 4] >> (8 * (i % 4))));
        }
    }
};

struct Q4_K {
    static constexpr uint32_t ELEMENTS = 256, BYTES = 144;
    static __device__ __forceinline__ void values(float (&out)[8], const uint8_t *block, uint32_t first) {
        const uint32_t group = first / 32;
        const uint8_t *bytes = block + 4;
        // Six bits of scale and minimum: whole in the first four groups, in two parts in the others.
        uint32_t scale, minimum;
        if (group < 4) {
            scale = bytes[group] & 63;
            minimum = bytes[group + 4] & 63;
        } else {
            scale = (bytes[group + 4] & 15) | bytes[group - 4] >> 6 << 4;
            minimum = bytes[group + 4] >> 4 | bytes[group] >> 6 << 4;
        }
        uint32_t words[2];
        load_codes<8>(words, block + 16 + first / 64 * 32 + first % 32);
        scale_nibbles(out, words, group % 2 * 4, 0, half_at(block) * static_cast<float>(scale),
                      -half_at(block + 2) * static_cast<float>(minimum));
    }
};

struct Q6_K {
    static constexpr uint32_t ELEMENTS = 256, BYTES = 210;
    static __device__ __forceinline__ void values(float (&out)[8], const uint8_t *block, uint32_t first) {
        const uint32_t half = first / 128, quarter = first / 32 % 4, at = first % 32;
        uint32_t low[2], high[2];
        load_codes<2>(low, block + half * 64 + quarter % 2 * 32 + at);
        load_codes<2>(high, block + 128 + half * 32 + at);
        const float scale =
            half_at(block + 208) * static_cast<float>(static_cast<int8_t>(block[192 + first / 16]));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t byte = 8 * (i % 4);
            const uint32_t code = (low[i / 4] >> (byte + quarter / 2 * 4) & 15) | (high[i / 4] >> (byte + 2 * quarter) & 3) << 4;
            out[i] = scale * static_cast<float>(static_cast<int>(code) - 32);
        }
    }
};

// Applies MACRO(suffix, format, ...) to every format.
#define KVERN_FOR_FORMATS(MACRO, ...)                                                                                  \
    MACRO(q4_0, Q4_0, __VA_ARGS__)                                                                                     \
    MACRO(q4_1, Q4_1, __VA_ARGS__)                                                                                     \
    MACRO(q8_0, Q8_0, __VA_ARGS__)                                                                                     \
    MACRO(q4_k, Q4_K, __VA_ARGS__)                                                                                     \
    MACRO(q6_k, Q6_K, __VA_ARGS__)
