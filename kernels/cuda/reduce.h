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
    const bool skipped = KVERN_PLANTED(PLANTED_MISSING_BARRIER) || (KVERN_PLANTED(PLANTED_DIVERGED_BARRIER) && threadIdx.x == 0);
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
