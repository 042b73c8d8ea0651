// Attention in f32, for prefill and decode alike: the oracle on a device, made to be read. A block per tile and head; each
// thread scores one position at a time.
#include "element.h"
#include "reduce.h"

constexpr uint32_t THREADS = 128, DIM_MAX = 256;

KVERN_KERNEL(kvern_attention_f32, PrefillParams, THREADS) {
    KVERN_SHARED(float, query, DIM_MAX);
    KVERN_SHARED(float, scores, THREADS);
    const PrefillTile tile = p.tiles[blockIdx.x];
    const uint32_t head = blockIdx.y, kv_head = head / (p.heads / p.kv_heads), dim = p.head_dim;
    const uint32_t *table = p.block_tables + static_cast<size_t>(tile.table) * p.table_stride;
    const float *k_cache = static_cast<const float *>(p.k_cache), *v_cache = static_cast<const float *>(p.v_cache);
    auto cache_row = [&](uint32_t position) {
        const size_t page = static_cast<size_t>(table[position / p.block_size]) * p.kv_heads + kv_head;
        return (page * p.block_size + position % p.block_size) * dim;
    };
    for (uint32_t row = 0; row < tile.rows; ++row) {
        const uint32_t own = tile.position + row, seen = p.window != 0 && own >= p.window ? own - p.window + 1 : 0;
        const float *q = static_cast<const float *>(p.qkv) + static_cast<size_t>(tile.row + row) * p.qkv_stride;
        for (uint32_t i = threadIdx.x; i < dim; i += THREADS) {
            query[i] = q[head * dim + i];
        }
        __syncthreads();
        float top = -INFINITY, sum = 0, acc[DIM_MAX / THREADS] = {};
        for (uint32_t first = seen; first <= own; first += THREADS) {
            const uint32_t count = min(THREADS, own + 1 - first);
            if (threadIdx.x < count) {
                const float *k = k_cache + cache_row(first + threadIdx.x);
                float dot = 0;
                for (uint32_t i = 0; i < dim; ++i) {
                    dot += query[i] * k[i];
                }
                scores[threadIdx.x] = dot * p.scale_log2;
            }
            __syncthreads();
            float higher = top;
            for (uint32_t i = 0; i < count; ++i) {
                higher = fmaxf(higher, scores[i]);
            }
            const float shrink = exp2f(top - higher);
            top = higher;
            sum *= shrink;
#pragma unroll
            for (uint32_t part = 0; part < DIM_MAX / THREADS; ++part) {
                acc[part] *= shrink;
            }
            for (uint32_t i = 0; i < count; ++i) {
                const float weight = exp2f(scores[i] - top), *v = v_cache + cache_row(first + i);
                sum += weight;
#pragma unroll
                for (uint32_t part = 0; part < DIM_MAX / THREADS; ++part) {
                    const uint32_t value = part * THREADS + threadIdx.x;
                    acc[part] += value < dim ? weight * v[value] : 0.0f;
                }
            }
            __syncthreads();
        }
        float *out = static_cast<float *>(p.out) + (static_cast<size_t>(tile.row + row) * p.heads + head) * dim;
#pragma unroll
        for (uint32_t part = 0; part < DIM_MAX / THREADS; ++part) {
            const uint32_t value = part * THREADS + threadIdx.x;
            if (value < dim) {
                out[value] = acc[part] / sum;
            }
        }
    }
}
