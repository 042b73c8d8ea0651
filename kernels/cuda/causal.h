// What rows of a prefill tile see: positions up to their own, of a window the last ones.
#pragma once

#include "element.h"

// Of a tile whose first row is at `position` and whose last one at `last`. Scores are of POSITIONS positions at a time.
template <int POSITIONS> struct CausalMask {
    uint32_t position, last, group, window;

    // The first position that a row at `at` sees.
    __device__ __forceinline__ uint32_t seen_from(uint32_t at) const {
        return window != 0 && at >= window ? at - window + 1 : 0;
    }

    // Makes scores of what rows do not see -infinity. scores[0][0] is of pair `packed` and position `first`, as of a lane that holds
    // fragments of mma. Pairs past the tile's are as its last row.
    __device__ __forceinline__ void operator()(float (&scores)[POSITIONS / 8][4], uint32_t packed,
                                               uint32_t first) const {
        const uint32_t start = first / POSITIONS * POSITIONS;
        // Only tiles at an edge of what some row sees need the mask.
        if (start + POSITIONS - 1 <= position && (window == 0 || start + window > last)) {
            return;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t own = min(position + (packed + half * 8) / group, last), seen = seen_from(own);
#pragma unroll
            for (int n = 0; n < POSITIONS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint32_t at = first + n * 8 + i;
                    if (at > own || at < seen) {
                        scores[n][2 * half + i] = -INFINITY;
                    }
                }
            }
        }
    }
};
