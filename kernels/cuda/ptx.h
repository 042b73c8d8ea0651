// Every instruction that C++ has no word for, one small function each; those of sm_90a alone are in ptx_hopper.h. The host shim has
// its own versions in shim/ptx.h: nothing else in a kernel may hold inline assembly.
#pragma once

#include <stdint.h>

#ifdef KVERN_HOST_SHIM
#include "shim/ptx.h"
#else

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float x) { return __float_as_uint(x); }

__device__ __forceinline__ float f16_to_float(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ uint16_t float_to_f16(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ uint16_t float_to_bf16(float x) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The upper 64 bits of a product of 128.
__device__ __forceinline__ unsigned long long multiply_high(unsigned long long a, unsigned long long b) {
    return __umul64hi(a, b);
}

// The number of the lowest bit that is set; -1 of none.
__device__ __forceinline__ int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }

// 2^x, relative error below 2^-22; 0 for -infinity.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint4 load_128(const void *from) { return *static_cast<const uint4 *>(from); }
__device__ __forceinline__ void store_128(void *to, uint4 words) { *static_cast<uint4 *>(to) = words; }

__device__ __forceinline__ void store_32(void *to, uint32_t word) { *static_cast<uint32_t *>(to) = word; }

// 16 bytes of weights, which are read once per step: past L1, and first to leave L2.
__device__ __forceinline__ uint4 load_128_streaming(const void *from) {
    return __ldcs(static_cast<const uint4 *>(from));
}

// Before sm_90 launches on a stream take turns, and these functions do nothing.
#if __CUDA_ARCH__ >= 900

// The launch after this one may begin, if it was launched so, once all blocks have said this or are done.
__device__ __forceinline__ void grid_launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the launches before are done, and all that they wrote can be seen.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Begins to fetch the line of an address into L2.
__device__ __forceinline__ void prefetch_l2(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

#else

__device__ __forceinline__ void grid_launch_dependents() {}
__device__ __forceinline__ void grid_dependency_wait() {}
__device__ __forceinline__ void prefetch_l2(const void *) {}

#endif

// The x of the thread's and the block's index; each call reads the register that has it.
__device__ __forceinline__ uint32_t fresh_thread_index() {
    uint32_t index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

__device__ __forceinline__ uint32_t fresh_block_index() {
    uint32_t index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
}

__device__ __forceinline__ uint32_t shared_address(const void *at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Copies 16 bytes from global to shared memory in the background, or fills with zeros where `valid` is false.
__device__ __forceinline__ void copy_async_128(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` of this thread's committed groups are under way.
template <int PENDING> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8. Register j of lane l holds the elements
// 2 (l % 4) and the next of row l / 4 of matrix j.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// acc[16][8] += a[16][16] * b[16][8] over a warp, f32 sums. With g = lane / 4 and t = lane % 4: a holds rows g and g + 8 by
// columns 2t, 2t + 1, then the same eight columns on; b holds column g by rows 2t, 2t + 1, then 8 on; acc holds row g by
// columns 2t, 2t + 1, then row g + 8.
struct bf16;
struct f16;
template <class T>
__device__ __forceinline__ void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<bf16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<f16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
