// Where, in the order of falling weight (the lower token at a tie), a running count or mass reaches a target; for sample.cu.
//
//     weight   [ exponent, 4 bits of the mantissa | 19 bits ]     a bin is the weights with the same upper 13 bits
//     key      [ weight : 32 | token's complement : 32 ]          the order: a larger key comes first
//
// A bin's mass is its count times its least weight's mass, and the sum of what the lower bits add, which for a slice is below 2^32.
// So nothing in shared memory has more than 32 bits, and no addition there is a loop.
#pragma once

#include "sample.h"

constexpr uint32_t LOW_BITS = 19, DIGIT_BITS = 10, DIGITS = 1u << DIGIT_BITS;

__device__ __forceinline__ uint32_t bin_of(uint32_t weight_bits) { return weight_bits >> LOW_BITS; }

// What the bits below a prefix of `upper` bits add to a weight's mass, in units of lower_unit(); exact, as mass_of() cuts what is below
// 2^-40, which none of the prefix's bits is where a lower one counts.
__device__ __forceinline__ uint32_t lower_part(uint32_t weight_bits, uint32_t lower_bits) {
    const uint32_t exponent = weight_bits >> 23, cut = exponent < 110 ? min(110 - exponent, 31u) : 0;
    return (weight_bits & ((1u << lower_bits) - 1)) >> cut;
}

// The binary logarithm of the unit, of any weight of the same exponent.
__device__ __forceinline__ uint32_t lower_unit(uint32_t weight_bits) { return max(weight_bits >> 23, 110u) - 110; }

// The mass of `count` weights that begin with the bits of `first`, whose lower bits are zeros, and add `lower`.
__device__ __forceinline__ Wide mass_from(uint32_t first, uint32_t count, Wide lower) {
    return mass_of(bits_to_float(first)) * count + (lower << lower_unit(first));
}

// Groups of weights in falling order, STEPS a thread, with the sums over the groups before the thread's.
template <uint32_t STEPS> struct Ladder {
    uint32_t counts[STEPS];
    Wide masses[STEPS];
    Wide count_before, mass_before;
};

// The group at which a sum reaches a target, by its number, and the sums before it.
struct Step {
    uint32_t number;
    Wide count_before, mass_before;
};

template <uint32_t STEPS> __device__ __forceinline__ void sum_up(Ladder<STEPS> &ladder) {
    KVERN_SHARED(Wide, counts, WARPS);
    KVERN_SHARED(Wide, masses, WARPS);
    Wide count = 0, mass = 0;
#pragma unroll
    for (uint32_t i = 0; i < STEPS; ++i) {
        count += ladder.counts[i];
        mass += ladder.masses[i];
    }
    const Wide count_upto = warp_scan(count), mass_upto = warp_scan(mass);
    if (threadIdx.x % 32 == 31) {
        counts[threadIdx.x / 32] = count_upto;
        masses[threadIdx.x / 32] = mass_upto;
    }
    __syncthreads();
    ladder.count_before = count_upto - count;
    ladder.mass_before = mass_upto - mass;
    for (uint32_t warp = 0; warp < threadIdx.x / 32; ++warp) {
        ladder.count_before += counts[warp];
        ladder.mass_before += masses[warp];
    }
    __syncthreads();
}

// `target` is at least 1, and at most the sum of all.
template <uint32_t STEPS>
__device__ __forceinline__ Step seek(const Ladder<STEPS> &ladder, bool by_mass, Wide target) {
    KVERN_SHARED(Step, found, 1);
    Wide count = ladder.count_before, mass = ladder.mass_before;
#pragma unroll
    for (uint32_t i = 0; i < STEPS; ++i) {
        const Wide before = by_mass ? mass : count, own = by_mass ? ladder.masses[i] : ladder.counts[i];
        if (before < target && target <= before + own) {
            found[0] = Step{threadIdx.x * STEPS + i, count, mass};
        }
        count += ladder.counts[i];
        mass += ladder.masses[i];
    }
    __syncthreads();
    const Step step = found[0];
    __syncthreads();
    return step;
}

using BinLadder = Ladder<SAMPLE_BINS / THREADS>;

__device__ __forceinline__ uint32_t bin_at(uint32_t step) { return SAMPLE_BINS - 1 - step; }

// The bins of the block's row.
__device__ __forceinline__ BinLadder load_bins(const SampleParams &p) {
    BinLadder ladder;
    const SampleBin *bins = p.bins + static_cast<size_t>(blockIdx.x) * SAMPLE_BINS;
#pragma unroll
    for (uint32_t i = 0; i < SAMPLE_BINS / THREADS; ++i) {
        const uint4 words = load_128(bins + bin_at(threadIdx.x * (SAMPLE_BINS / THREADS) + i));
        ladder.masses[i] = static_cast<Wide>(words.y) << 32 | words.x;
        ladder.counts[i] = words.z;
    }
    sum_up(ladder);
    return ladder;
}

// Keys to search: a list, or where that is too short, or wrong, all weights of the row.
struct Keys {
    const uint64_t *listed;
    const float *logits;
    Scale scale;
    uint32_t count;

    __device__ __forceinline__ Wide key(uint32_t i) const {
        return listed ? static_cast<Wide>(listed[i])
                      : static_cast<Wide>(float_to_bits(scale.weight(logits[i]))) << 32 | (0xffffffffu - i);
    }
};

// Groups the keys that begin with `prefix` by their next digit, of `width` bits above the lowest `shift`.
__device__ __forceinline__ Ladder<DIGITS / THREADS> group(const Keys &keys, Wide prefix, uint32_t shift, uint32_t width) {
    KVERN_SHARED(uint32_t, counts, DIGITS);
    KVERN_SHARED(uint32_t, lowers, DIGITS);
    const bool of_weight = shift >= 32;
    for (uint32_t i = threadIdx.x; i < DIGITS; i += THREADS) {
        counts[i] = lowers[i] = 0;
    }
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < keys.count; i += THREADS) {
        const Wide key = keys.key(i);
        if (key >> (shift + width) == prefix) {
            const uint32_t digit = static_cast<uint32_t>(key >> shift) & ((1u << width) - 1);
            atomicAdd(&counts[digit], 1u);
            if (of_weight) {
                atomicAdd(&lowers[digit], lower_part(static_cast<uint32_t>(key >> 32), shift - 32));
            }
        }
    }
    __syncthreads();
    Ladder<DIGITS / THREADS> ladder;
#pragma unroll
    for (uint32_t i = 0; i < DIGITS / THREADS; ++i) {
        const uint32_t digit = DIGITS - 1 - (threadIdx.x * (DIGITS / THREADS) + i);
        ladder.counts[i] = counts[digit];
        ladder.masses[i] = 0;
        if (of_weight && counts[digit] != 0) {
            const uint32_t first = static_cast<uint32_t>((prefix << width | digit) << (shift - 32));
            ladder.masses[i] = mass_from(first, counts[digit], lowers[digit]);
        }
    }
    sum_up(ladder);
    return ladder;
}

// The last token of a prefix of the order, if it was asked for, and the prefix's mass.
struct Found {
    uint32_t token;
    Wide mass;
};

// The shortest prefix of the order whose count, or mass, is at least `target`, from the bin's step on down: its mass, and its last token
// if that is wanted. Bits of a weight are found by the sum that is asked for; the token by how many of that very weight are needed.
__device__ __forceinline__ Found descend(const Keys &keys, const Step &bin, bool by_mass, Wide target, bool wants_token) {
    constexpr uint32_t LAST = 4;
    Wide prefix = bin_at(bin.number), mass = bin.mass_before;
    target -= by_mass ? bin.mass_before : bin.count_before;
#pragma unroll 1
    for (uint32_t level = 0; level < (wants_token ? LAST : 2); ++level) {
        const uint32_t width = level == 1 ? LOW_BITS - DIGIT_BITS : DIGIT_BITS;
        const uint32_t shift = level == 0 ? 32 + LOW_BITS - DIGIT_BITS : level == 1 ? 32 : level == 2 ? DIGIT_BITS : 0;
        const Ladder<DIGITS / THREADS> ladder = group(keys, prefix, shift, width);
        const bool sums_mass = by_mass && level < 2;
        const Step step = seek(ladder, sums_mass, target);
        target -= sums_mass ? step.mass_before : step.count_before;
        mass += step.mass_before;
        prefix = prefix << width | (DIGITS - 1 - step.number);
        if (level == 1) {
            const Wide one = mass_of(bits_to_float(static_cast<uint32_t>(prefix)));
            target = by_mass ? (target + one - 1) / one : target;
            mass += target * one;
            // A token's complement has ones above the bits that tokens have.
            prefix = prefix << (32 - 2 * DIGIT_BITS) | ((1u << (32 - 2 * DIGIT_BITS)) - 1);
        }
    }
    return Found{token_of(prefix), mass};
}
static_assert(SAMPLE_VOCAB_MAX == 1u << (2 * DIGIT_BITS), "two digits are a token");
static_assert(SAMPLE_BINS == 1u << (32 - 1 - LOW_BITS - 1), "a weight is at most 1, whose upper bits are those of 0x3f8");

// The mass that top-p asks for, of a mass that is left.
__device__ __forceinline__ Wide top_p_target(const SampleRow &row, Wide mass) {
    const Wide target = static_cast<Wide>(ceil(static_cast<double>(row.top_p) * static_cast<double>(mass)));
    return min(max(target, static_cast<Wide>(1)), mass);
}

// The bins that hold the ends of what top-k and top-p leave, and the draw: `first` and `last` of each in the order of bits.
struct Plan {
    uint32_t first[3], last[3];

    __device__ __forceinline__ bool has(uint32_t bin) const {
        bool within = false;
#pragma unroll
        for (uint32_t i = 0; i < 3; ++i) {
            within |= first[i] <= bin && bin <= last[i];
        }
        return within;
    }
};

// Only the first end is known from the bins alone. How much mass the prefix has that ends within a bin is known but for what the bin's
// weights differ by, some 6%; so a plan has a range of bins for what comes after. One that is wrong costs time, and nothing else.
__device__ __forceinline__ Plan plan_of(const SampleParams &p, const SampleRow &row, const BinLadder &bins, Wide count,
                                        Wide mass) {
    Plan plan = {{1, 1, 1}, {0, 0, 0}};
    Wide least = mass, most = mass;
    auto above = [](uint32_t bin) { return mass_of(bits_to_float((bin + 1) << LOW_BITS)); };
    if (by_count(row, p.vocab) && count > row.top_k) {
        const Step end = seek(bins, false, row.top_k);
        const uint32_t bin = bin_at(end.number);
        const Wide within = row.top_k - end.count_before;
        plan.first[0] = plan.last[0] = bin;
        least = end.mass_before + within * mass_of(bits_to_float(bin << LOW_BITS));
        most = min(end.mass_before + within * above(bin), mass);
    }
    if (row.top_p < 1.0f) {
        const Wide low = top_p_target(row, least), high = top_p_target(row, most);
        plan.last[1] = bin_at(seek(bins, true, low).number);
        plan.first[1] = bin_at(seek(bins, true, high).number);
        least = low;
        most = min(high + above(plan.last[1]), most);
    }
    plan.last[2] = bin_at(seek(bins, true, below(row, least) + 1).number);
    plan.first[2] = bin_at(seek(bins, true, below(row, most) + 1).number);
    const uint32_t shift = KVERN_PLANTED(PLANTED_TABLE_OFF_BY_ONE) ? 1 : 0;
#pragma unroll
    for (uint32_t i = 0; i < 3; ++i) {
        plan.first[i] += shift;
        plan.last[i] += shift;
    }
    return plan;
}

// Appends the slice's tokens of the plan's bins to the row's list, in any order.
__device__ __forceinline__ void list(const SampleParams &p, const Plan &plan, const float (&weights)[EACH]) {
    uint32_t own = 0;
#pragma unroll
    for (uint32_t n = 0; n < EACH; ++n) {
        const uint32_t bits = float_to_bits(weights[n]);
        own += bits != 0 && plan.has(bin_of(bits));
    }
    const uint32_t upto = static_cast<uint32_t>(warp_scan(own));
    uint32_t start = 0;
    if (threadIdx.x % 32 == 31 && upto != 0) {
        start = atomicAdd(&p.counters[blockIdx.x * 4 + 3], upto);
    }
    start = __shfl_sync(WHOLE_WARP, start, 31) + upto - own;
    uint64_t *listed = p.listed + static_cast<size_t>(blockIdx.x) * SAMPLE_LISTED;
#pragma unroll
    for (uint32_t n = 0; n < EACH; ++n) {
        const uint32_t bits = float_to_bits(weights[n]);
        if (bits != 0 && plan.has(bin_of(bits))) {
            if (start < SAMPLE_LISTED) {
                const uint32_t token = blockIdx.y * SAMPLE_SLICE + place_of(n);
                listed[start] = static_cast<uint64_t>(bits) << 32 | (0xffffffffu - token);
            }
            ++start;
        }
    }
}
