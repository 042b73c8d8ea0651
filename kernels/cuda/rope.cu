// Norm per head, split-half RoPE and the write to the paged cache, in one pass. One warp per head of a row; lanes take pairs of
// neighbours, so that a head is read and written in whole sectors.
#include "element.h"
#include "reduce.h"

constexpr uint32_t HEAD_DIM_MAX = 256, ROPE_WARPS = 4;

template <class T> struct alignas(2 * sizeof(T)) Two {
    T values[2];
};

template <class T> __device__ __forceinline__ void rope_store(const RopeStoreParams &p) {
    KVERN_SHARED(float, staged, ROPE_WARPS * HEAD_DIM_MAX);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t row_heads = p.heads + 2 * p.kv_heads, dim = p.head_dim;
    const uint64_t task = static_cast<uint64_t>(blockIdx.x) * ROPE_WARPS + warp;
    // The same for a whole warp; no barrier of the block follows.
    if (task >= static_cast<uint64_t>(p.rows) * row_heads) {
        return;
    }
    const uint32_t row = static_cast<uint32_t>(task / row_heads), head = static_cast<uint32_t>(task % row_heads);
    const bool is_q = head < p.heads, is_k = !is_q && head < p.heads + p.kv_heads;
    T *own = static_cast<T *>(p.qkv) + (static_cast<size_t>(row) * row_heads + head) * dim;
    float *values = staged + warp * HEAD_DIM_MAX;

    T *to = own;
    if (!is_q) {
        const uint32_t kv_head = (head - p.heads) % p.kv_heads, slot = p.slots[row];
        const size_t page = static_cast<size_t>(slot / p.block_size) * p.kv_heads + kv_head;
        T *cache = static_cast<T *>(is_k ? p.k_cache : p.v_cache);
        to = cache + (page * p.block_size + slot % p.block_size) * dim;
    }
    const Two<T> *from = reinterpret_cast<const Two<T> *>(own);
    if (!is_q && !is_k) {
        for (uint32_t i = lane; i < dim / 2; i += 32) {
            reinterpret_cast<Two<T> *>(to)[i] = from[i];
        }
        return;
    }

    float squares = 0;
    for (uint32_t i = lane; i < dim / 2; i += 32) {
        Two<T> two = from[i];
        const float a = to_float(two.values[0]), b = to_float(two.values[1]);
        values[2 * i] = a;
        values[2 * i + 1] = b;
        squares += a * a + b * b;
    }
    const T *weight = static_cast<const T *>(is_q ? p.q_weight : p.k_weight);
    float scale = 1;
    if (weight) {
        scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(dim) + p.eps);
    }
    __syncwarp();

    const uint32_t half = p.rotary_dim / 2;
    const float *cos = p.cos + static_cast<size_t>(p.positions[row]) * half;
    const float *sin = p.sin + static_cast<size_t>(p.positions[row]) * half;
    auto normed = [&](uint32_t i) { return weight ? values[i] * scale * to_float(weight[i]) : values[i]; };
    auto turned = [&](uint32_t i) {
        if (i >= 2 * half) {
            return normed(i);
        }
        return i < half ? normed(i) * cos[i] - normed(i + half) * sin[i]
                        : normed(i) * cos[i - half] + normed(i - half) * sin[i - half];
    };
    for (uint32_t i = lane; i < dim / 2; i += 32) {
        reinterpret_cast<Two<T> *>(to)[i] = Two<T>{{from_float<T>(turned(2 * i)), from_float<T>(turned(2 * i + 1))}};
    }
}

#define ENTRY(suffix, T)                                                                                               \
    KVERN_KERNEL(kvern_rope_store_##suffix, RopeStoreParams, ROPE_WARPS * 32) { rope_store<T>(p); }
KVERN_FOR_ELEMENTS(ENTRY)
