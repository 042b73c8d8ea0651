// Logits to tokens without sorting. The order of operations, and what each means, are those of the server's CPU sampler: bias and mask,
// penalties, temperature, min-p, top-k, top-p, draw.
//
// Weights e^((logit - max) / temperature) are counted in units of 2^-40, as integers: sums do not depend on the order in which threads
// and blocks add, so a draw repeats itself exactly. A block has a slice of 8192 tokens of one row in registers, and the last of a
// row's blocks to be done ends what the launch does for the row. What a row needs decides how many launches it takes part in:
//
//     row                   launches              reads of the row   of 128,256 logits, other bytes
//     greedy                best                  1                  -
//     temperature           best, weigh           2                  32 KB again: the slice in which the draw falls
//     top-k, top-p, min-p   best, weigh, select   3                  32 KB of bins, read by each of 16 blocks; some 10 KB of list
//     with log-probabilities                      as above, at least best and weigh; with penalties, bias or mask, best writes the
//                                                 row once, reads 256 KB of seen tokens, and the others read what it wrote
//
// top-k, top-p and the draw are one question: in the order of falling weight (the lower token at a tie), where does a running count, or
// mass, reach a target? `weigh` groups weights into 2048 bins by their upper bits. `select` reads off the bins in which the three
// answers can lie, lists the tokens of those, and finds the answers in the list by two more digits each (sample_select.h). Where the
// list is too short, as thousands of equal weights make it, the last block reads the row instead: seldom, slower, and the same result.
#include "sample_select.h"

// The thread's values of a slice of a slot's seen tokens, four at once where the row allows it.
__device__ __forceinline__ void load_seen(const uint16_t *seen, uint32_t first, uint32_t vocab, uint16_t (&values)[EACH]) {
    struct alignas(8) Four {
        uint16_t values[4];
    };
#pragma unroll
    for (uint32_t quad = 0; quad < QUADS; ++quad) {
        const uint32_t at = first + place_of(4 * quad);
        if (vocab % 4 == 0 && at < vocab) {
            const Four four = *reinterpret_cast<const Four *>(seen + at);
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                values[4 * quad + i] = four.values[i];
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                values[4 * quad + i] = at + i < vocab ? seen[at + i] : 0;
            }
        }
    }
}

// A slot's seen tokens become those of the row's list, which are distinct; of the block's slice.
__device__ __forceinline__ void see_anew(const SampleParams &p, const SampleRow &row, uint16_t *seen, uint32_t first) {
    const uint32_t end = min(first + SAMPLE_SLICE, p.vocab);
    for (uint32_t i = first + threadIdx.x; i < end; i += THREADS) {
        seen[i] = 0;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < row.count_count; i += THREADS) {
        const TokenCount entry = p.counts[row.count_first + i];
        if (entry.token >= first && entry.token < end) {
            const uint32_t count = min(entry.count, static_cast<uint32_t>(SEEN_COUNT_MAX));
            seen[entry.token] = count == 0 ? SEEN_IN_PROMPT : static_cast<uint16_t>(count);
        }
    }
    __syncthreads();
}

// Bias, mask and penalties of the block's slice. Among biases tokens are distinct, so that no two threads are at one logit.
__device__ __forceinline__ void adjust(const SampleParams &p, const SampleRow &row, uint16_t *seen, uint32_t first,
                                       float (&values)[EACH]) {
    float *scratch = p.scratch + static_cast<size_t>(blockIdx.x) * p.vocab;
    if (p.mask) {
        const uint32_t *mask = p.mask + static_cast<size_t>(blockIdx.x) * ((p.vocab + 31) / 32);
#pragma unroll
        for (uint32_t n = 0; n < EACH; ++n) {
            const uint32_t at = first + place_of(n);
            const bool allowed = at < p.vocab && (mask[at / 32] >> (at % 32) & 1) != 0;
            values[n] = allowed ? values[n] : -INFINITY;
        }
    }
    if (row.bias_count != 0) {
        store_slice(scratch, first, p.vocab, values);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < row.bias_count; i += THREADS) {
            const TokenBias bias = p.biases[row.bias_first + i];
            if (bias.token >= first && bias.token < min(first + SAMPLE_SLICE, p.vocab)) {
                scratch[bias.token] += bias.bias;
            }
        }
        __syncthreads();
        load_slice(scratch, first, p.vocab, values);
    }
    if (seen) {
        uint16_t counts[EACH];
        load_seen(seen, first, p.vocab, counts);
#pragma unroll
        for (uint32_t n = 0; n < EACH; ++n) {
            const uint32_t count = counts[n] & SEEN_COUNT_MAX;
            if (counts[n] != 0) {
                values[n] = values[n] > 0 ? values[n] / row.repetition_penalty : values[n] * row.repetition_penalty;
            }
            if (count > 0) {
                values[n] -= row.frequency_penalty * static_cast<float>(count) + row.presence_penalty;
            }
        }
    }
    store_slice(scratch, first, p.vocab, values);
}

// The best of the block's slice that comes after `before`.
__device__ __forceinline__ Wide best_of(const float (&values)[EACH], uint32_t first, Wide before) {
    Wide best = 0;
#pragma unroll
    for (uint32_t n = 0; n < EACH; ++n) {
        const Wide rank = rank_of(values[n], first + place_of(n));
        best = rank <= before ? max(best, rank) : best;
    }
    return block_max(best);
}

// The best logit of every slice, as it is and adjusted. Rows for which that is all are done.
KVERN_KERNEL_BLOCKS(kvern_sample_best, SampleParams, THREADS, 2) {
    const SampleRow row = p.rows[blockIdx.x];
    const uint32_t part = blockIdx.y, first = part * SAMPLE_SLICE;
    float values[EACH];
    load_slice(p.logits + static_cast<size_t>(blockIdx.x) * p.vocab, first, p.vocab, values);
    if (is_filtered(row, p.vocab)) {
        SampleBin *bins = p.bins + static_cast<size_t>(blockIdx.x) * SAMPLE_BINS;
        for (uint32_t i = part * THREADS + threadIdx.x; i < SAMPLE_BINS; i += gridDim.y * THREADS) {
            store_128(bins + i, uint4{0, 0, 0, 0});
        }
    }
    uint16_t *seen = seen_of(p, row);
    if (seen && row.seen_anew != 0) {
        see_anew(p, row, seen, first);
    }
    const Wide best = best_of(values, first, FAILED);
    Wide best_adjusted = best;
    if (is_adjusted(p, row)) {
        adjust(p, row, seen, first, values);
        best_adjusted = best_of(values, first, FAILED);
    }
    if (threadIdx.x == 0) {
        partial(p, part, BEST_LOGIT) = best;
        partial(p, part, BEST_ADJUSTED) = best_adjusted;
    }
    if (is_greedy(row) && row.wants_logprob == 0 && is_last_of_row(p, 0)) {
        const Wide raw = best_part(p, BEST_LOGIT), adjusted = best_part(p, BEST_ADJUSTED);
        publish(p, row, is_valid(raw) && is_valid(adjusted) ? token_of(adjusted) : KVERN_NONE);
    }
}

// Adds the weights of the block's slice to the row's bins. In shared memory even and odd lanes have bins of their own, next to each
// other: half as many lanes meet at an address.
__device__ __forceinline__ void bin(const SampleParams &p, const float (&weights)[EACH]) {
    KVERN_SHARED(uint32_t, counts, 2 * SAMPLE_BINS);
    KVERN_SHARED(uint32_t, lowers, 2 * SAMPLE_BINS);
    for (uint32_t i = threadIdx.x * 4; i < 2 * SAMPLE_BINS; i += THREADS * 4) {
        store_128(counts + i, uint4{0, 0, 0, 0});
        store_128(lowers + i, uint4{0, 0, 0, 0});
    }
    __syncthreads();
#pragma unroll
    for (uint32_t n = 0; n < EACH; ++n) {
        const uint32_t bits = float_to_bits(weights[n]), at = bin_of(bits) * 2 + threadIdx.x % 2;
        if (bits != 0) {
            atomicAdd(&counts[at], 1u);
            atomicAdd(&lowers[at], lower_part(bits, LOW_BITS));
        }
    }
    __syncthreads();
    SampleBin *bins = p.bins + static_cast<size_t>(blockIdx.x) * SAMPLE_BINS;
    for (uint32_t i = threadIdx.x; i < SAMPLE_BINS; i += THREADS) {
        const uint32_t count = counts[2 * i] + counts[2 * i + 1], lower = lowers[2 * i] + lowers[2 * i + 1];
        if (count != 0) {
            atomicAdd(&bins[i].count, count);
            atomicAdd(reinterpret_cast<Wide *>(&bins[i].mass), mass_from(i << LOW_BITS, count, lower));
        }
    }
}
static_assert((Wide{SAMPLE_SLICE} << LOW_BITS) <= Wide{1} << 32, "the lower bits of a slice's weights have a sum of 32 bits");

// What a part has to say of log-probabilities: its mass under the raw logits, and its likeliest tokens.
__device__ __forceinline__ void part_logprobs(const SampleParams &p, const SampleRow &row, Wide best) {
    const uint32_t part = blockIdx.y, first = part * SAMPLE_SLICE;
    float values[EACH];
    load_slice(p.logits + static_cast<size_t>(blockIdx.x) * p.vocab, first, p.vocab, values);
    const float top = logit_of(best);
    Wide mass = 0;
#pragma unroll
    for (uint32_t n = 0; n < EACH; ++n) {
        mass += mass_of(expf(values[n] - top));
    }
    mass = block_sum(mass);
    if (threadIdx.x == 0) {
        partial(p, part, RAW_MASS) = mass;
    }
    Wide next = FAILED;
#pragma unroll 1
    for (uint32_t n = 0; n < min(row.top_logprobs, min(p.top_stride, p.vocab)); ++n) {
        next = best_of(values, first, next - 1);
        if (threadIdx.x == 0) {
            partial(p, part, SAMPLE_PARTIALS + n) = next;
        }
    }
}

// Weights: their masses by slice or, where a draw needs their order, by bin.
KVERN_KERNEL_BLOCKS(kvern_sample_weigh, SampleParams, THREADS, 2) {
    const SampleRow row = p.rows[blockIdx.x];
    if (is_greedy(row) && row.wants_logprob == 0) {
        return;
    }
    float values[EACH];
    load_slice(adjusted_of(p, row), blockIdx.y * SAMPLE_SLICE, p.vocab, values);
    const Wide raw = best_part(p, BEST_LOGIT), best = best_part(p, BEST_ADJUSTED);
    if (!is_valid(raw) || !is_valid(best)) {
        if (blockIdx.y == 0) {
            publish(p, row, KVERN_NONE);
        }
        return;
    }
    if (row.wants_logprob != 0) {
        part_logprobs(p, row, raw);
    }
    const Scale scale = scale_of(row, best);
    if (!is_greedy(row)) {
        Wide mass = 0;
#pragma unroll
        for (uint32_t n = 0; n < EACH; ++n) {
            values[n] = scale.weight(values[n]);
            mass += mass_of(values[n]);
        }
        if (is_filtered(row, p.vocab)) {
            bin(p, values);
            return;
        }
        mass = block_sum(mass);
        if (threadIdx.x == 0) {
            partial(p, blockIdx.y, MASS) = mass;
        }
    }
    if (is_last_of_row(p, 1)) {
        uint32_t token = token_of(best);
        if (!is_greedy(row)) {
            const Wide own = threadIdx.x < gridDim.y ? static_cast<Wide>(partial(p, threadIdx.x, MASS)) : 0;
            token = walk(p, row, scale, below(row, block_sum(own)));
        }
        publish(p, row, token);
        if (row.wants_logprob != 0) {
            logprobs(p, row, token);
        }
    }
}

// Draws from what top-k, top-p and min-p leave.
KVERN_KERNEL(kvern_sample_select, SampleParams, THREADS) {
    const SampleRow row = p.rows[blockIdx.x];
    if (!is_filtered(row, p.vocab)) {
        return;
    }
    const float *logits = adjusted_of(p, row);
    const BinLadder bins = load_bins(p);
    const Wide raw = best_part(p, BEST_LOGIT), best = best_part(p, BEST_ADJUSTED);
    if (!is_valid(raw) || !is_valid(best)) {
        return;
    }
    const Scale scale = scale_of(row, best);
    KVERN_SHARED(Wide, totals, 2);
    if (threadIdx.x == THREADS - 1) {
        totals[0] = bins.count_before;
        totals[1] = bins.mass_before;
#pragma unroll
        for (uint32_t i = 0; i < SAMPLE_BINS / THREADS; ++i) {
            totals[0] += bins.counts[i];
            totals[1] += bins.masses[i];
        }
    }
    __syncthreads();
    const Plan plan = plan_of(p, row, bins, totals[0], totals[1]);
    float values[EACH];
    load_slice(logits, blockIdx.y * SAMPLE_SLICE, p.vocab, values);
#pragma unroll
    for (uint32_t n = 0; n < EACH; ++n) {
        values[n] = scale.weight(values[n]);
    }
    list(p, plan, values);
    if (!is_last_of_row(p, 2)) {
        return;
    }
    KVERN_SHARED(uint32_t, length, 1);
    if (threadIdx.x == 0) {
        length[0] = p.counters[blockIdx.x * 4 + 3];
        p.counters[blockIdx.x * 4 + 3] = 0;
    }
    __syncthreads();
    const uint32_t count = length[0];
    const uint64_t *listed = p.listed + static_cast<size_t>(blockIdx.x) * SAMPLE_LISTED;
    Wide mass = totals[1];
    Found found = {KVERN_NONE, mass};
    // Ends in the order in which one depends on the other: what top-k leaves, what top-p leaves of that, the draw of that.
#pragma unroll 1
    for (uint32_t end = 0; end < 3; ++end) {
        const bool by_mass = end > 0;
        if (end == 0 ? !by_count(row, p.vocab) || totals[0] <= row.top_k : end == 1 && !(row.top_p < 1.0f)) {
            continue;
        }
        const Wide target = end == 0 ? row.top_k : end == 1 ? top_p_target(row, mass) : below(row, mass) + 1;
        const Step step = seek(bins, by_mass, target);
        const bool is_listed = count <= SAMPLE_LISTED && plan.has(bin_at(step.number));
        const Keys keys = {is_listed ? listed : nullptr, logits, scale, is_listed ? count : p.vocab};
        found = descend(keys, step, by_mass, target, end == 2);
        mass = found.mass;
    }
    publish(p, row, found.token);
    if (row.wants_logprob != 0) {
        logprobs(p, row, found.token);
    }
}
