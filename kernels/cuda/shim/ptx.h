// The shim's version of ptx.h, by the instructions' definitions in NVIDIA's PTX ISA.
#pragma once

#include "shim.h"

inline float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float f16_to_float(uint16_t bits) {
    uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
    if (exponent == 31) {
        return bits_to_float(sign | 0x7f800000u | mantissa << 13);
    }
    // A subnormal is its mantissa times 2^-24, which f32 holds exactly.
    float magnitude = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-24f
                                    : bits_to_float((exponent + 112) << 23 | mantissa << 13);
    return sign ? -magnitude : magnitude;
}

inline uint16_t float_to_f16(float x) {
    uint16_t sign = static_cast<uint16_t>(float_to_bits(x) >> 16 & 0x8000u);
    float magnitude = fabsf(x);
    if (magnitude != magnitude) {
        return static_cast<uint16_t>(sign | 0x7fffu);
    }
    if (magnitude >= 65520.0f) {
        return static_cast<uint16_t>(sign | 0x7c00u);
    }
    if (magnitude < 0x1p-14f) {
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(nearbyintf(magnitude * 0x1p24f)));
    }
    uint32_t bits = float_to_bits(magnitude);
    bits += 0xfffu + (bits >> 13 & 1u);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>((bits >> 13) - (112u << 10)));
}

inline uint16_t float_to_bf16(float x) {
    uint32_t bits = float_to_bits(x);
    if (x != x) {
        return 0x7fff;
    }
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline uint32_t pack_bf16(float low, float high) {
    return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}

inline uint32_t pack_f16(float low, float high) {
    return float_to_f16(low) | static_cast<uint32_t>(float_to_f16(high)) << 16;
}

inline unsigned long long multiply_high(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline int lowest_bit(uint32_t x) { return __builtin_ffs(static_cast<int>(x)) - 1; }

inline float exp2_fast(float x) { return exp2f(x); }

inline void grid_launch_dependents() { shim::grid_launch_dependents(); }
inline void grid_dependency_wait() { shim::grid_dependency_wait(); }

// A fetch from outside of memory would be ignored on a device; here it is a fault.
inline void prefetch_l2(const void *at) { static_cast<void>(*static_cast<const volatile unsigned char *>(at)); }

inline uint32_t fresh_thread_index() { return threadIdx.x; }
inline uint32_t fresh_block_index() { return blockIdx.x; }

// Of every access that goes through here.
inline void check_aligned(const void *at) {
    shim::check_turn();
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) {
        shim::fault("an access of 16 bytes at %p, which is not a multiple of 16", at);
    }
}

inline uint4 load_128(const void *from) {
    check_aligned(from);
    uint4 words;
    memcpy(&words, from, 16);
    return words;
}

inline uint4 load_128_streaming(const void *from) { return load_128(from); }

inline void store_128(void *to, uint4 words) {
    check_aligned(to);
    memcpy(to, &words, 16);
}

inline void store_32(void *to, uint32_t word) { memcpy(to, &word, 4); }

inline void copy_async_128(void *to, const void *from, bool valid) {
    check_aligned(to);
    check_aligned(from);
    shim::copy_async(to, from, valid);
}

inline void copy_async_commit() { shim::copy_async_commit(); }
template <int PENDING> void copy_async_wait() { shim::copy_async_wait(PENDING); }

namespace shim {

// Reads the rows that the lanes named, and lays out all four matrices. Rows of one matrix that lie in the same banks are
// correct on a device and slow: a kernel that does so has lost its swizzle, and is stopped.
template <bool TRANSPOSED> void load_matrices(Slot *slots) {
    uint16_t matrices[4][8][8];
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t banks = 0;
        for (int row = 0; row < 8; ++row) {
            const unsigned char *from;
            memcpy(&from, slots[matrix * 8 + row].bytes, sizeof(from));
            check_aligned(from);
            memcpy(matrices[matrix][row], from, 16);
            banks |= 1u << (reinterpret_cast<uintptr_t>(from) / 16 % 8);
        }
        if (banks != 0xff) {
            fault("rows of a matrix share banks of shared memory (mask %02x)", banks);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        uint32_t registers[4];
        for (int matrix = 0; matrix < 4; ++matrix) {
            auto &m = matrices[matrix];
            int a = lane / 4, b = lane % 4 * 2;
            uint32_t low = TRANSPOSED ? m[b][a] : m[a][b], high = TRANSPOSED ? m[b + 1][a] : m[a][b + 1];
            registers[matrix] = low | high << 16;
        }
        memcpy(slots[lane].bytes, registers, sizeof(registers));
    }
}

struct MmaOperands {
    float acc[4];
    uint32_t a[4], b[2];
};

template <float (*WIDEN)(uint16_t)> void mma(Slot *slots) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        MmaOperands own;
        memcpy(&own, slots[lane].bytes, sizeof(own));
        int g = lane / 4, t = lane % 4 * 2;
        for (int half = 0; half < 2; ++half) {
            auto value = [half](uint32_t pair) { return WIDEN(static_cast<uint16_t>(pair >> (16 * half))); };
            a[g][t + half] = value(own.a[0]);
            a[g + 8][t + half] = value(own.a[1]);
            a[g][t + 8 + half] = value(own.a[2]);
            a[g + 8][t + 8 + half] = value(own.a[3]);
            b[t + half][g] = value(own.b[0]);
            b[t + 8 + half][g] = value(own.b[1]);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        MmaOperands own;
        memcpy(&own, slots[lane].bytes, sizeof(own));
        for (int i = 0; i < 4; ++i) {
            int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = own.acc[i];
            for (int k = 0; k < 16; ++k) {
                sum += a[row][k] * b[k][column];
            }
            own.acc[i] = sum;
        }
        memcpy(slots[lane].bytes, &own, sizeof(own));
    }
}

inline float widen_bf16(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

} // namespace shim

inline void load_matrices(uint32_t (&to)[4], const void *row) {
    shim::Slot *slots =
        shim::meet(shim::Meeting::LoadMatrices, &row, sizeof(row), shim::load_matrices<false>);
    memcpy(to, slots[shim::lane()].bytes, sizeof(to));
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void *row) {
    shim::Slot *slots = shim::meet(shim::Meeting::LoadMatrices, &row, sizeof(row), shim::load_matrices<true>);
    memcpy(to, slots[shim::lane()].bytes, sizeof(to));
}

struct bf16;
struct f16;

template <class T> struct Widen;
template <> struct Widen<bf16> {
    static constexpr void (*RUN)(shim::Slot *) = shim::mma<shim::widen_bf16>;
};
template <> struct Widen<f16> {
    static constexpr void (*RUN)(shim::Slot *) = shim::mma<f16_to_float>;
};

template <class T> void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    shim::MmaOperands own = {{acc[0], acc[1], acc[2], acc[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    shim::Slot *slots = shim::meet(shim::Meeting::Mma, &own, sizeof(own), Widen<T>::RUN);
    memcpy(acc, slots[shim::lane()].bytes, sizeof(acc));
}
