// Rows that move: embedding, gather, copies of KV blocks, and the step's inputs.
#include "element.h"

template <class T> __device__ __forceinline__ void gather(const GatherParams &p) {
    constexpr uint32_t LEN = Pack<T>::LEN;
    const uint32_t id = p.ids[blockIdx.x];
    const T *from = static_cast<const T *>(p.table) + static_cast<size_t>(id) * p.columns;
    T *to = static_cast<T *>(p.out) + static_cast<size_t>(blockIdx.x) * p.columns;
    // An id out of range is a fault of the planner's; its row reads nothing.
    const bool valid = id < p.table_rows;
    const uint32_t end = p.columns + (KVERN_PLANTED(PLANTED_READ_PAST_END) ? 4096u : 0u);
    if (p.columns % LEN == 0) {
        for (uint32_t i = threadIdx.x * LEN; i < end; i += blockDim.x * LEN) {
            store_pack(to + i, valid ? load_pack(from + i) : Pack<T>{});
        }
    } else {
        for (uint32_t i = threadIdx.x; i < end; i += blockDim.x) {
            to[i] = valid ? from[i] : T{};
        }
    }
}

#define ENTRY(suffix, T)                                                                                               \
    KVERN_KERNEL(kvern_gather_##suffix, GatherParams, 256) { gather<T>(p); }
KVERN_FOR_ELEMENTS(ENTRY)

KVERN_KERNEL(kvern_block_copy, BlockCopyParams, 256) {
    unsigned char *pool = reinterpret_cast<unsigned char *>(p.pools[blockIdx.y]);
    const unsigned char *from = pool + p.pairs[2 * blockIdx.x] * p.block_bytes;
    unsigned char *to = pool + p.pairs[2 * blockIdx.x + 1] * p.block_bytes;
    for (uint64_t i = threadIdx.x * 16; i < p.block_bytes; i += blockDim.x * 16) {
        store_128(to + i, load_128(from + i));
    }
}

KVERN_KERNEL(kvern_step_inputs, StepInputsParams, 128) {
    const SequenceSlice slice = p.slices[blockIdx.x];
    const uint32_t *table = p.block_tables + static_cast<size_t>(slice.table) * p.table_stride;
    for (uint32_t i = threadIdx.x; i < slice.rows; i += blockDim.x) {
        const uint32_t position = slice.start + i;
        p.positions[slice.row + i] = position;
        p.slots[slice.row + i] = table[position / p.block_size] * p.block_size + position % p.block_size;
        if (slice.sampled != KVERN_NONE) {
            p.ids[slice.row + i] = p.last_sampled[slice.sampled];
        }
    }
}
