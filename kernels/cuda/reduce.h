// Sums and maxima over a warp and a block, always in the same order.
#pragma once

#include "kernel.h"

constexpr uint32_t WHOLE_WARP = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int with = 16; with > 0; with /= 2) {
        x += __shfl_xor_sync(WHOLE_WARP, x, with);
    }
    return x;
}

// Every thread gets the sum over the block, of at most 32 warps. May be called again at once.
__device__ __forceinline__ float block_sum(float x) {
    KVERN_SHARED(float, sums, 32);
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = x;
    }
    const bool diverged = KVERN_PLANTED(PLANTED_DIVERGED_BARRIER) && threadIdx.x == 0;
    const bool skipped = KVERN_PLANTED(PLANTED_MISSING_BARRIER) || diverged;
    if (!skipped) {
        __syncthreads();
    }
    float total = 0;
    for (uint32_t warp = 0; warp < blockDim.x / 32; ++warp) {
        total += sums[warp];
    }
    __syncthreads();
    return total;
}

using Wide = unsigned long long;

// Every thread gets the largest over the block, or the sum. Of integers, so that no order shows.
template <bool SUM> __device__ __forceinline__ Wide block_fold(Wide x) {
    KVERN_SHARED(Wide, folded, 32);
    auto fold = [](Wide a, Wide b) { return SUM ? a + b : max(a, b); };
#pragma unroll
    for (int with = 16; with > 0; with /= 2) {
        x = fold(x, __shfl_xor_sync(WHOLE_WARP, x, with));
    }
    if (threadIdx.x % 32 == 0) {
        folded[threadIdx.x / 32] = x;
    }
    __syncthreads();
    Wide total = folded[0];
    for (uint32_t warp = 1; warp < blockDim.x / 32; ++warp) {
        total = fold(total, folded[warp]);
    }
    __syncthreads();
    return total;
}

__device__ __forceinline__ Wide block_max(Wide x) { return block_fold<false>(x); }
__device__ __forceinline__ Wide block_sum(Wide x) { return block_fold<true>(x); }

// The sum over this lane and those before it.
__device__ __forceinline__ Wide warp_scan(Wide x) {
#pragma unroll
    for (uint32_t by = 1; by < 32; by *= 2) {
        const Wide before = __shfl_up_sync(WHOLE_WARP, x, by);
        x += threadIdx.x % 32 >= by ? before : 0;
    }
    return x;
}
