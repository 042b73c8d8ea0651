// A row's slices, ranks and weights, and how its blocks meet; for sample.cu.
#pragma once

#include "element.h"
#include "reduce.h"

constexpr uint32_t THREADS = 512, WARPS = THREADS / 32;
// A thread has QUADS times four neighbors of its block's slice, which are THREADS quads apart.
constexpr uint32_t QUADS = SAMPLE_SLICE / THREADS / 4, EACH = 4 * QUADS;
constexpr Wide FAILED = ~0ull;

// The place of a thread's value `n` in a slice.
__device__ __forceinline__ uint32_t place_of(uint32_t n) { return (n / 4 * THREADS + threadIdx.x) * 4 + n % 4; }

// The thread's values of the slice that begins with token `first`; -infinity, which changes nothing, past the end of the row. All loads
// are under way before the first is used.
__device__ __forceinline__ void load_slice(const float *row, uint32_t first, uint32_t vocab, float (&values)[EACH]) {
    if (vocab % 4 == 0) {
#pragma unroll
        for (uint32_t quad = 0; quad < QUADS; ++quad) {
            const uint32_t at = first + place_of(4 * quad);
            Pack<float> pack = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
            if (at < vocab) {
                pack = load_pack(row + at);
            }
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                values[4 * quad + i] = pack.values[i];
            }
        }
    } else {
#pragma unroll
        for (uint32_t n = 0; n < EACH; ++n) {
            const uint32_t at = first + place_of(n);
            values[n] = at < vocab ? row[at] : -INFINITY;
        }
    }
}

__device__ __forceinline__ void store_slice(float *row, uint32_t first, uint32_t vocab, const float (&values)[EACH]) {
    if (vocab % 4 == 0) {
#pragma unroll
        for (uint32_t quad = 0; quad < QUADS; ++quad) {
            const uint32_t at = first + place_of(4 * quad);
            if (at < vocab) {
                const float *own = values + 4 * quad;
                store_pack(row + at, Pack<float>{{own[0], own[1], own[2], own[3]}});
            }
        }
    } else {
#pragma unroll
        for (uint32_t n = 0; n < EACH; ++n) {
            const uint32_t at = first + place_of(n);
            if (at < vocab) {
                row[at] = values[n];
            }
        }
    }
}

// Larger for a larger logit, and at a tie for a lower token; FAILED for NaN and +infinity. Both zeros are one.
__device__ __forceinline__ Wide rank_of(float logit, uint32_t token) {
    if (!(logit < INFINITY)) {
        return FAILED;
    }
    const uint32_t bits = float_to_bits(logit + 0.0f);
    const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<Wide>(ordered) << 32 | (0xffffffffu - token);
}

__device__ __forceinline__ uint32_t token_of(Wide rank) { return 0xffffffffu - static_cast<uint32_t>(rank); }

// The logit of a rank that has not failed.
__device__ __forceinline__ float logit_of(Wide rank) {
    const uint32_t ordered = static_cast<uint32_t>(rank >> 32);
    return bits_to_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// A weight of at most 1 in units of 2^-40; the product is exact.
__device__ __forceinline__ Wide mass_of(float weight) { return static_cast<Wide>(weight * 0x1p40f); }

// How a row's weights come from its adjusted logits.
struct Scale {
    float top, inverse, least;

    // e^((logit - max) / temperature); zero below min-p.
    __device__ __forceinline__ float weight(float logit) const {
        const float x = (logit - top) * inverse, weight = x < -87.0f ? 0.0f : expf(x);
        return weight >= least ? weight : 0.0f;
    }
};

__device__ __forceinline__ Scale scale_of(const SampleRow &row, Wide best) {
    return Scale{logit_of(best), 1.0f / row.temperature, fminf(row.min_p, 1.0f)};
}

// What a row asks for.
__device__ __forceinline__ bool is_greedy(const SampleRow &row) {
    return row.temperature == 0.0f || !(1.0f / row.temperature < INFINITY);
}
__device__ __forceinline__ bool by_count(const SampleRow &row, uint32_t vocab) { return row.top_k != 0 && row.top_k < vocab; }
__device__ __forceinline__ bool is_filtered(const SampleRow &row, uint32_t vocab) {
    return !is_greedy(row) && (by_count(row, vocab) || row.top_p < 1.0f || row.min_p > 0.0f);
}
__device__ __forceinline__ bool is_adjusted(const SampleParams &p, const SampleRow &row) {
    return row.bias_count != 0 || row.seen_slot != KVERN_NONE || p.mask;
}

// Where the block's row has its logits, as adjusted.
__device__ __forceinline__ const float *adjusted_of(const SampleParams &p, const SampleRow &row) {
    return (is_adjusted(p, row) ? p.scratch : p.logits) + static_cast<size_t>(blockIdx.x) * p.vocab;
}

// The seen tokens of the block's row; null where there are no penalties.
__device__ __forceinline__ uint16_t *seen_of(const SampleParams &p, const SampleRow &row) {
    return row.seen_slot != KVERN_NONE ? p.seen + static_cast<size_t>(row.seen_slot) * p.vocab : nullptr;
}

// What a part leaves for its row: its place in `partials`, and the numbers there.
enum Partial : uint32_t { BEST_LOGIT, BEST_ADJUSTED, MASS, RAW_MASS };
static_assert(RAW_MASS + 1 == SAMPLE_PARTIALS, "as many as the host makes room for");

__device__ __forceinline__ uint64_t &partial(const SampleParams &p, uint32_t part, uint32_t which) {
    const size_t at = static_cast<size_t>(blockIdx.x) * gridDim.y + part;
    return p.partials[at * (SAMPLE_PARTIALS + p.top_stride) + which];
}

// The largest of a number of all parts of the row; every thread gets it.
__device__ __forceinline__ Wide best_part(const SampleParams &p, uint32_t which) {
    return block_max(threadIdx.x < gridDim.y ? static_cast<Wide>(partial(p, threadIdx.x, which)) : 0);
}

__device__ __forceinline__ bool is_valid(Wide best) { return best != FAILED && logit_of(best) != -INFINITY; }

// Whether all other blocks of the row are done with this launch: of one block this is true, and it sees what they wrote. Each counter
// is for one launch, and zero again after it.
__device__ __forceinline__ bool is_last_of_row(const SampleParams &p, uint32_t launch) {
    KVERN_SHARED(uint32_t, before, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t *counter = p.counters + blockIdx.x * 4 + launch;
        __threadfence();
        before[0] = atomicAdd(counter, 1u);
        if (before[0] == gridDim.y - 1) {
            *counter = 0;
        }
        __threadfence();
    }
    __syncthreads();
    return before[0] == (KVERN_PLANTED(PLANTED_EARLY_RELEASE) ? 0 : gridDim.y - 1);
}

// The row's likeliest tokens are the best of its parts' likeliest.
__device__ __forceinline__ void logprobs(const SampleParams &p, const SampleRow &row, uint32_t token) {
    const float *logits = p.logits + static_cast<size_t>(blockIdx.x) * p.vocab;
    const float top = logit_of(best_part(p, BEST_LOGIT));
    const Wide mass = block_sum(threadIdx.x < gridDim.y ? static_cast<Wide>(partial(p, threadIdx.x, RAW_MASS)) : 0);
    const double log_total = static_cast<double>(top) + log(static_cast<double>(mass) * 0x1p-40);
    auto logprob = [&](float logit) { return static_cast<float>(static_cast<double>(logit) - log_total); };
    float *out = p.logprobs + static_cast<size_t>(blockIdx.x) * (p.top_stride + 1);
    if (threadIdx.x == 0) {
        out[0] = logprob(logits[token]);
    }
    const uint32_t count = min(row.top_logprobs, min(p.top_stride, p.vocab)), all = count * gridDim.y;
    Wide before = FAILED;
    for (uint32_t n = 0; n < count; ++n) {
        Wide best = 0;
        for (uint32_t i = threadIdx.x; i < all; i += THREADS) {
            const Wide rank = partial(p, i / count, SAMPLE_PARTIALS + i % count);
            best = rank < before ? max(best, rank) : best;
        }
        before = block_max(best);
        if (threadIdx.x == 0) {
            // As read, not as ranked: of the two zeros it may be the other.
            out[n + 1] = logprob(logits[token_of(before)]);
            p.top_tokens[static_cast<size_t>(blockIdx.x) * p.top_stride + n] = token_of(before);
        }
    }
}

// A row's token, by one block; NONE where the row has failed.
__device__ __forceinline__ void publish(const SampleParams &p, const SampleRow &row, uint32_t token) {
    if (threadIdx.x == 0) {
        p.tokens[blockIdx.x] = token;
        uint16_t *seen = seen_of(p, row);
        if (seen && token != KVERN_NONE && (seen[token] & SEEN_COUNT_MAX) != SEEN_COUNT_MAX) {
            seen[token] = static_cast<uint16_t>(seen[token] + 1);
        }
    }
}

// 53 bits from a seed and a position alone: two rounds of SplitMix64's finalizer (Steele, Lea and Flood, 2014), as on the CPU.
__device__ __forceinline__ Wide uniform_bits(Wide seed, uint32_t position) {
    auto mix = [](Wide z) {
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    };
    const Wide key = mix(seed + 0x9e3779b97f4a7c15ull);
    return mix(key + (static_cast<Wide>(position) + 1) * 0x9e3779b97f4a7c15ull) >> 11;
}

// A uniform number below `mass`.
__device__ __forceinline__ Wide below(const SampleRow &row, Wide mass) {
    return multiply_high(uniform_bits(row.seed, row.position) << 11, mass);
}

// The first token at which the running sum of masses, in the order of tokens, passes `target`, which the sum of all does.
__device__ __forceinline__ uint32_t walk(const SampleParams &p, const SampleRow &row, const Scale &scale, Wide target) {
    constexpr uint32_t CHUNKS = QUADS * WARPS;
    KVERN_SHARED(Wide, masses, SAMPLE_VOCAB_MAX / SAMPLE_SLICE + CHUNKS);
    KVERN_SHARED(uint32_t, found, 1);
    if (threadIdx.x < gridDim.y) {
        masses[threadIdx.x] = partial(p, threadIdx.x, MASS);
    }
    __syncthreads();
    uint32_t part = 0;
    for (; target >= masses[part]; ++part) {
        target -= masses[part];
    }
    float weights[EACH];
    load_slice(adjusted_of(p, row), part * SAMPLE_SLICE, p.vocab, weights);
    // A warp has 128 neighbors of each of its thread's quads: a chunk.
    Wide *chunks = masses + SAMPLE_VOCAB_MAX / SAMPLE_SLICE, upto[QUADS];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t quad = 0; quad < QUADS; ++quad) {
        upto[quad] = 0;
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            weights[4 * quad + i] = scale.weight(weights[4 * quad + i]);
            upto[quad] += mass_of(weights[4 * quad + i]);
        }
        upto[quad] = warp_scan(upto[quad]);
        if (lane == 31) {
            chunks[quad * WARPS + warp] = upto[quad];
        }
    }
    __syncthreads();
    uint32_t chunk = 0;
    for (; target >= chunks[chunk]; ++chunk) {
        target -= chunks[chunk];
    }
#pragma unroll
    for (uint32_t quad = 0; quad < QUADS; ++quad) {
        Wide end = upto[quad];
#pragma unroll
        for (uint32_t i = 4; i-- > 0;) {
            const Wide own = mass_of(weights[4 * quad + i]);
            if (chunk == quad * WARPS + warp && target < end && target + own >= end) {
                found[0] = part * SAMPLE_SLICE + place_of(4 * quad + i);
            }
            end -= own;
        }
    }
    __syncthreads();
    return found[0];
}
