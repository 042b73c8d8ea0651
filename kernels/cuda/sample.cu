// Logits to tokens without sorting; one block per row. The order of operations, and what each means, are those of the server's
// CPU sampler: bias and mask, penalties, temperature, min-p, top-k, top-p, draw.
//
// Weights e^((logit - max) / temperature) are counted in units of 2^-40, as integers: their sums do not depend on the order in which
// threads add, so a draw repeats itself exactly. top-k, top-p and the draw are one question: in the order of falling weight (the lower
// token at a tie), where does a running count, or mass, reach a target? Three passes over a histogram of the bits of a weight
// (11, 11 and 10 of them) find that weight; a walk in the order of tokens finds which of those that have it.
#include "element.h"
#include "reduce.h"

constexpr uint32_t THREADS = 512, WARPS = THREADS / 32, BINS = 2048, BINS_PER_LANE = BINS / 32;
constexpr Wide FAILED = ~0ull;

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

// The best of a row; FAILED if any is, or if all are -infinity.
__device__ __forceinline__ Wide best_of(const float *logits, uint32_t vocab) {
    Wide best = 0;
    for (uint32_t i = threadIdx.x; i < vocab; i += THREADS) {
        best = max(best, rank_of(logits[i], i));
    }
    best = block_max(best);
    return best == FAILED || logits[token_of(best)] == -INFINITY ? FAILED : best;
}

// A weight of at most 1 in units of 2^-40; the product is exact.
__device__ __forceinline__ Wide mass_of(float weight) { return static_cast<Wide>(weight * 0x1p40f); }

// The first token, in order, at which the running sum of `value` passes `target`, which the sum of all does.
template <class Value> __device__ __forceinline__ uint32_t walk(uint32_t vocab, Wide target, Value value) {
    KVERN_SHARED(Wide, totals, WARPS);
    KVERN_SHARED(uint32_t, found, 1);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t stretch = (vocab + THREADS - 1) / THREADS * 32, first = warp * stretch;
    const uint32_t end = min(first + stretch, vocab);
    Wide total = 0;
    for (uint32_t i = first + lane; i < end; i += 32) {
        total += value(i);
    }
    total = warp_scan(total);
    if (lane == 31) {
        totals[warp] = total;
    }
    __syncthreads();
    Wide before = 0;
    for (uint32_t from = 0; from < warp; ++from) {
        before += totals[from];
    }
    // One warp has the place; it goes over its stretch 32 at a time.
    if (before <= target && target < before + totals[warp]) {
        for (uint32_t i = first; i < first + stretch; i += 32) {
            const Wide upto = before + warp_scan(i + lane < end ? value(i + lane) : 0);
            const uint32_t past = __ballot_sync(WHOLE_WARP, upto > target);
            if (past != 0) {
                if (lane == 0) {
                    found[0] = i + static_cast<uint32_t>(lowest_bit(past));
                }
                break;
            }
            before = __shfl_sync(WHOLE_WARP, upto, 31);
        }
    }
    __syncthreads();
    const uint32_t result = found[0];
    __syncthreads();
    return result;
}

// A place in the order of falling weight: the weight's bits, how many tokens of that very weight belong to the prefix, and the
// prefix's mass.
struct Place {
    uint32_t bits;
    Wide ties;
    Wide mass;
};

struct Histogram {
    uint32_t counts[BINS];
    Wide masses[BINS];
    Wide step[3];
};

// The shortest prefix whose count (or mass) is at least `target`, which is at least 1 and at most that of all.
template <bool BY_MASS>
__device__ __forceinline__ Place descend(const float *weights, uint32_t vocab, Wide target, Histogram &histogram) {
    auto &[counts, masses, step] = histogram;
    uint32_t prefix = 0;
    Wide count_above = 0, mass_above = 0;
#pragma unroll 1
    for (uint32_t pass = 0; pass < 3; ++pass) {
        const uint32_t shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, width = pass == 2 ? 10 : 11;
        for (uint32_t i = threadIdx.x; i < BINS; i += THREADS) {
            counts[i] = 0;
            masses[i] = 0;
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < vocab; i += THREADS) {
            const uint32_t bits = float_to_bits(weights[i]);
            const bool within = bits != 0 && (pass == 0 || bits >> (shift + width) == prefix);
            if (within) {
                const uint32_t bin = bits >> shift & ((1u << width) - 1);
                atomicAdd(&counts[bin], 1u);
                atomicAdd(&masses[bin], mass_of(weights[i]));
            }
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            // Lane 0 has the highest bins.
            const uint32_t top = BINS - 1 - threadIdx.x * BINS_PER_LANE;
            Wide count = 0, mass = 0;
            for (uint32_t i = 0; i < BINS_PER_LANE; ++i) {
                count += counts[top - i];
                mass += masses[top - i];
            }
            Wide count_before = count_above + warp_scan(count) - count, mass_before = mass_above + warp_scan(mass) - mass;
            const bool reached = (BY_MASS ? mass_before + mass : count_before + count) >= target;
            const uint32_t reaching = __ballot_sync(WHOLE_WARP, reached);
            if (threadIdx.x == static_cast<uint32_t>(lowest_bit(reaching))) {
                uint32_t bin = top;
                while ((BY_MASS ? mass_before + masses[bin] : count_before + counts[bin]) < target) {
                    count_before += counts[bin];
                    mass_before += masses[bin];
                    --bin;
                }
                step[0] = bin;
                step[1] = count_before;
                step[2] = mass_before;
            }
        }
        __syncthreads();
        prefix = prefix << width | static_cast<uint32_t>(step[0]);
        count_above = step[1];
        mass_above = step[2];
        __syncthreads();
    }
    const Wide each = mass_of(bits_to_float(prefix));
    const Wide ties = BY_MASS ? (target - mass_above + each - 1) / each : target - count_above;
    return Place{prefix, ties, mass_above + ties * each};
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

// The seen tokens of the block's row; null where there are no penalties.
__device__ __forceinline__ uint16_t *seen_of(const SampleParams &p) {
    const uint32_t slot = p.rows[blockIdx.x].seen_slot;
    return slot != KVERN_NONE ? p.seen + static_cast<size_t>(slot) * p.vocab : nullptr;
}

// A slot's seen tokens become those of the row's list, which are distinct.
__device__ __forceinline__ void see_anew(const SampleParams &p, const SampleRow &row, uint16_t *seen) {
    for (uint32_t i = threadIdx.x; i < p.vocab; i += THREADS) {
        seen[i] = 0;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < row.count_count; i += THREADS) {
        const TokenCount entry = p.counts[row.count_first + i];
        if (entry.token < p.vocab) {
            const uint32_t count = min(entry.count, static_cast<uint32_t>(SEEN_COUNT_MAX));
            seen[entry.token] = count == 0 ? SEEN_IN_PROMPT : static_cast<uint16_t>(count);
        }
    }
    __syncthreads();
}

// Bias, mask and penalties. Among biases tokens are distinct, so that no two threads are at one logit. `seen` is null where there
// are no penalties.
__device__ __forceinline__ void adjust(const SampleParams &p, const SampleRow &row, const uint16_t *seen, const float *logits,
                                       float *adjusted) {
    const uint32_t *mask = p.mask ? p.mask + static_cast<size_t>(blockIdx.x) * ((p.vocab + 31) / 32) : nullptr;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += THREADS) {
        const bool allowed = !mask || (mask[i / 32] >> (i % 32) & 1) != 0;
        adjusted[i] = allowed ? logits[i] : -INFINITY;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < row.bias_count; i += THREADS) {
        const TokenBias bias = p.biases[row.bias_first + i];
        if (bias.token < p.vocab) {
            adjusted[bias.token] += bias.bias;
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; seen && i < p.vocab; i += THREADS) {
        if (seen[i] != 0) {
            const uint32_t count = seen[i] & SEEN_COUNT_MAX;
            float logit = adjusted[i];
            logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
            if (count > 0) {
                logit -= row.frequency_penalty * static_cast<float>(count) + row.presence_penalty;
            }
            adjusted[i] = logit;
        }
    }
    __syncthreads();
}

// Weights in place of logits, zero below min-p; returns their mass.
__device__ __forceinline__ Wide weigh(float *values, uint32_t vocab, float top, float inverse, float min_p) {
    Wide mass = 0;
    for (uint32_t i = threadIdx.x; i < vocab; i += THREADS) {
        const float x = (values[i] - top) * inverse, weight = x < -87.0f ? 0.0f : expf(x);
        values[i] = weight >= fminf(min_p, 1.0f) ? weight : 0.0f;
        mass += mass_of(values[i]);
    }
    return block_sum(mass);
}

__device__ __forceinline__ uint32_t draw(const SampleRow &row, const float *weights, uint32_t vocab, Wide mass,
                                         Histogram &histogram) {
    const Wide u = uniform_bits(row.seed, row.position) << 11;
    const bool by_k = row.top_k != 0 && row.top_k < vocab, by_p = row.top_p < 1.0f;
    if (!by_k && !by_p && row.min_p <= 0.0f) {
        return walk(vocab, multiply_high(u, mass), [&](uint32_t i) { return mass_of(weights[i]); });
    }
    if (by_k) {
        Wide count = 0;
        for (uint32_t i = threadIdx.x; i < vocab; i += THREADS) {
            count += weights[i] > 0.0f;
        }
        count = block_sum(count);
        mass = count > row.top_k ? descend<false>(weights, vocab, row.top_k, histogram).mass : mass;
    }
    if (by_p) {
        const Wide target = static_cast<Wide>(ceil(static_cast<double>(row.top_p) * static_cast<double>(mass)));
        mass = descend<true>(weights, vocab, min(max(target, static_cast<Wide>(1)), mass), histogram).mass;
    }
    const Place drawn = descend<true>(weights, vocab, multiply_high(u, mass) + 1, histogram);
    return walk(vocab, drawn.ties - 1, [&](uint32_t i) -> Wide { return float_to_bits(weights[i]) == drawn.bits; });
}

__device__ __forceinline__ void logprobs(const SampleParams &p, const SampleRow &row, const float *logits, Wide best,
                                         uint32_t token) {
    const float top = logits[token_of(best)];
    Wide mass = 0;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += THREADS) {
        mass += mass_of(expf(logits[i] - top));
    }
    mass = block_sum(mass);
    const double log_total = static_cast<double>(top) + log(static_cast<double>(mass) * 0x1p-40);
    auto logprob = [&](uint32_t of) { return static_cast<float>(static_cast<double>(logits[of]) - log_total); };
    float *out = p.logprobs + static_cast<size_t>(blockIdx.x) * (p.top_stride + 1);
    if (threadIdx.x == 0) {
        out[0] = logprob(token);
    }
    for (uint32_t n = 0; n < min(row.top_logprobs, min(p.top_stride, p.vocab)); ++n) {
        if (threadIdx.x == 0) {
            out[n + 1] = logprob(token_of(best));
            p.top_tokens[static_cast<size_t>(blockIdx.x) * p.top_stride + n] = token_of(best);
        }
        Wide next = 0;
        for (uint32_t i = threadIdx.x; i < p.vocab; i += THREADS) {
            const Wide rank = rank_of(logits[i], i);
            next = rank < best ? max(next, rank) : next;
        }
        best = block_max(next);
    }
}

KVERN_KERNEL(kvern_sample, SampleParams, THREADS) {
    KVERN_SHARED(Histogram, histogram, 1);
    const SampleRow row = p.rows[blockIdx.x];
    const float *logits = p.logits + static_cast<size_t>(blockIdx.x) * p.vocab;
    float *scratch = p.scratch + static_cast<size_t>(blockIdx.x) * p.vocab;
    uint16_t *seen = seen_of(p);
    if (seen && row.seen_anew != 0) {
        see_anew(p, row, seen);
    }
    const Wide raw_best = best_of(logits, p.vocab);
    Wide best = raw_best;
    uint32_t token = KVERN_NONE;
    const bool adjusts = row.bias_count != 0 || seen || p.mask;
    // The same for all threads, as are the conditions below.
    if (raw_best != FAILED && (adjusts || row.temperature != 0.0f)) {
        adjust(p, row, seen, logits, scratch);
        best = best_of(scratch, p.vocab);
    }
    if (best != FAILED) {
        const float inverse = row.temperature == 0.0f ? INFINITY : 1.0f / row.temperature;
        token = token_of(best);
        if (inverse < INFINITY) {
            const float top = scratch[token];
            __syncthreads();
            const Wide mass = weigh(scratch, p.vocab, top, inverse, row.min_p);
            token = draw(row, scratch, p.vocab, mass, histogram[0]);
        }
        if (row.wants_logprob != 0) {
            logprobs(p, row, logits, raw_best, token);
        }
    }
    if (threadIdx.x == 0) {
        p.tokens[blockIdx.x] = token;
        // Looked up again: kept from the beginning, the address would take registers from the draw.
        seen = seen_of(p);
        if (seen && token != KVERN_NONE && (seen[token] & SEEN_COUNT_MAX) != SEEN_COUNT_MAX) {
            seen[token] = static_cast<uint16_t>(seen[token] + 1);
        }
    }
}
