// Tiles in shared memory for products of a warpgroup, the rings that they come through, and who copies what.
//
// A tile is panels of SWIZZLE bytes by its rows, one panel after the other: its columns cut into as many as a row of a swizzle has.
//
//   queries | ring of K, STAGES tiles | ring of V, STAGES tiles       each from a multiple of 1024 bytes on
#pragma once

#include "attention.h"
#include "causal.h"
#include "ptx_hopper.h"

// Registers are given out by warpgroups, so that the warp that copies has three idle ones beside it; a whole multiprocessor's are
// 168 for each of 384 threads.
constexpr int HOPPER_GROUPS = 2, HOPPER_CONSUMERS = HOPPER_GROUPS * 128, HOPPER_THREADS = HOPPER_CONSUMERS + 128;
constexpr int HOPPER_CONSUMER_REGISTERS = 240, HOPPER_COPY_REGISTERS = 24;
static_assert(HOPPER_GROUPS * HOPPER_CONSUMER_REGISTERS + HOPPER_COPY_REGISTERS <= (HOPPER_GROUPS + 1) * 168,
              "no more registers than there were at the start");
// A swizzle's pattern goes by the address, and repeats after so many bytes at most.
constexpr uint32_t SWIZZLE_REPEATS = 1024;

template <int DIM> struct HopperShape {
    static constexpr int HEAD_DIM = DIM, GROUP_ROWS = 64, ROWS = HOPPER_GROUPS * GROUP_ROWS;
    static constexpr int POSITIONS = HEAD_DIM > 128 ? 64 : 128, STAGES = HEAD_DIM > 64 ? 2 : 3;
    static constexpr int SWIZZLE = HEAD_DIM % 64 == 0 ? 128 : 64;
    // Values of a panel's row.
    static constexpr int PANEL = SWIZZLE / 2, PANELS = HEAD_DIM / PANEL;
    static constexpr int UNITS = HEAD_DIM / 8, PANEL_UNITS = PANEL / 8;
    static constexpr int Q_BYTES = ROWS * HEAD_DIM * 2, KV_BYTES = POSITIONS * HEAD_DIM * 2;
    static_assert(HEAD_DIM % PANEL == 0 && Q_BYTES % SWIZZLE_REPEATS == 0 && KV_BYTES % SWIZZLE_REPEATS == 0,
                  "tiles are whole panels, and begin where the swizzle's pattern does");

    // Names a matrix in shared memory to a product: bits 0-13 its address, 16-29 and 32-45 two distances, all in 16 bytes, and from
    // 62 on how it is swizzled.
    static __device__ __forceinline__ uint64_t descriptor(const unsigned char *at, uint32_t leading, uint32_t stride) {
        const uint64_t address = (shared_address(at) & 0x3ffff) / 16, swizzle = SWIZZLE == 128 ? 1 : 2;
        return address | static_cast<uint64_t>(leading / 16) << 16 | static_cast<uint64_t>(stride / 16) << 32 |
               swizzle << 62;
    }

    // Rows along the sum: eight rows lie `stride` apart, and the other distance means nothing.
    static __device__ __forceinline__ uint64_t along_sum(const unsigned char *at) {
        return descriptor(at, 16, 8 * SWIZZLE);
    }

    // Columns along the sum: panels lie `leading` apart, eight columns `stride`. For tiles of K and V.
    static __device__ __forceinline__ uint64_t across_sum(const unsigned char *at) {
        const uint32_t leading = KVERN_PLANTED(PLANTED_WRONG_OFFSET) ? 8 * SWIZZLE : POSITIONS * SWIZZLE;
        return descriptor(at, leading, 8 * SWIZZLE);
    }

    // Where unit `unit` of a row of a tile of `rows` rows lies, before the swizzle.
    static __device__ __forceinline__ uint32_t offset(uint32_t rows, uint32_t row, uint32_t unit) {
        return (unit / PANEL_UNITS * rows + row) * SWIZZLE + unit % PANEL_UNITS * 16;
    }

    // The swizzle: a unit's number within its row, changed by the row's.
    static __device__ __forceinline__ uint32_t swizzled(uint32_t offset) {
        return offset ^ (offset >> 3 & (SWIZZLE - 16));
    }
};

// Tiles that a warp copies and all warpgroups read: the nth goes to stage n % STAGES, where the one STAGES before must have been
// released by every warp.
template <class Shape> struct Ring {
    unsigned char *memory;
    // STAGES that say when a tile is there, then STAGES that say when it is free.
    uint64_t *barriers;

    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < Shape::STAGES; ++stage) {
            barrier_init(barriers + stage, 1);
            barrier_init(barriers + Shape::STAGES + stage, HOPPER_CONSUMERS / 32);
        }
    }

    __device__ __forceinline__ unsigned char *tile(uint32_t n) const {
        return memory + n % Shape::STAGES * Shape::KV_BYTES;
    }

    __device__ __forceinline__ uint64_t *filled(uint32_t n) const { return barriers + n % Shape::STAGES; }

    // Waits until the nth tile is there.
    __device__ __forceinline__ void await(uint32_t n) const {
        barrier_wait(filled(n), (n / Shape::STAGES + (KVERN_PLANTED(PLANTED_WRONG_PARITY) ? 1 : 0)) % 2);
    }

    // This warp reads the nth tile no more.
    __device__ __forceinline__ void release(uint32_t n) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            barrier_arrive(filled(n) + Shape::STAGES);
        }
    }

    // Waits until there is room for the nth tile; at once for the first ones, as if a phase had ended before them.
    __device__ __forceinline__ void claim(uint32_t n) const {
        barrier_wait(filled(n) + Shape::STAGES, (n / Shape::STAGES + 1) % 2);
    }
};

// A block's tile of queries, and what K and V it sees.
template <class T, class HopperShape> struct HopperTile {
    using Shape = HopperShape;
    PrefillTile own;
    Pages pages;
    const T *qkv;
    uint32_t qkv_stride, group, last, begin, count;
    unsigned char *memory;
    uint64_t *barriers;

    __device__ __forceinline__ HopperTile(const PrefillHopperParams &p, unsigned char *dynamic, uint64_t *barriers)
        : own(p.tiles[blockIdx.x]), pages{p.block_tables + static_cast<size_t>(own.table) * p.table_stride,
                                          p.block_size, p.kv_heads, blockIdx.y},
          qkv(static_cast<const T *>(p.qkv)), qkv_stride(p.qkv_stride), group(p.heads / p.kv_heads),
          last(own.position + own.rows - 1), barriers(barriers) {
        const CausalMask<Shape::POSITIONS> mask = {own.position, last, group, p.window};
        begin = mask.seen_from(own.position) / Shape::POSITIONS;
        count = last / Shape::POSITIONS + 1 - begin;
        memory = dynamic + (SWIZZLE_REPEATS - shared_address(dynamic) % SWIZZLE_REPEATS) % SWIZZLE_REPEATS;
    }

    __device__ __forceinline__ Ring<Shape> keys() const { return {memory + Shape::Q_BYTES, barriers}; }

    __device__ __forceinline__ Ring<Shape> values() const {
        return {memory + Shape::Q_BYTES + Shape::STAGES * Shape::KV_BYTES, barriers + 2 * Shape::STAGES};
    }

    // The first pair of this lane; the other one is 8 on.
    static __device__ __forceinline__ uint32_t pair() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }

    __device__ __forceinline__ uint32_t head_of(uint32_t packed) const { return pages.kv_head * group + packed % group; }

    // The queries of this thread's warpgroup into shared memory, zeros for pairs past the last.
    __device__ __forceinline__ const unsigned char *bring_queries() const {
        const uint32_t first = threadIdx.x / 128 * Shape::GROUP_ROWS;
        for (uint32_t i = threadIdx.x % 128; i < Shape::GROUP_ROWS * Shape::UNITS; i += 128) {
            const uint32_t packed = first + i / Shape::UNITS, unit = i % Shape::UNITS;
            uint4 words = {0, 0, 0, 0};
            if (packed < own.rows * group) {
                const size_t row = own.row + packed / group;
                words = load_128(qkv + row * qkv_stride + head_of(packed) * Shape::HEAD_DIM + unit * 8);
            }
            store_shared_128(memory + Shape::swizzled(Shape::offset(Shape::ROWS, packed, unit)), words);
        }
        if (!KVERN_PLANTED(PLANTED_MISSING_FENCE)) {
            fence_proxy_async();
        }
        named_barrier(1 + threadIdx.x / 128, 128);
        return memory + first * Shape::SWIZZLE;
    }

    // Zeros for values past the last position, of the last tile: a weight of zero times what lies there could be NaN.
    __device__ __forceinline__ void clear_tail(unsigned char *tile) const {
        const uint32_t valid = last % Shape::POSITIONS + 1;
        if (valid == Shape::POSITIONS || KVERN_PLANTED(PLANTED_UNWRITTEN_TAIL)) {
            return;
        }
        for (uint32_t i = threadIdx.x; i < (Shape::POSITIONS - valid) * Shape::UNITS; i += HOPPER_CONSUMERS) {
            const uint32_t row = valid + i / Shape::UNITS;
            // A swizzle keeps a row's units in their row.
            store_shared_128(tile + Shape::offset(Shape::POSITIONS, row, i % Shape::UNITS), uint4{0, 0, 0, 0});
        }
        fence_proxy_async();
        named_barrier(1 + HOPPER_GROUPS, HOPPER_CONSUMERS);
    }

    // The part of the warp that copies: every tile of K and V, in order.
    __device__ __forceinline__ void copy_tiles(const PrefillHopperParams &p) const {
        for (uint32_t n = 0; n < count; ++n) {
            copy_tile(keys(), p.k_map, n);
            copy_tile(values(), p.v_map, n);
        }
    }

    // Blocks past the one of the last position are not copied: the table ends there.
    __device__ __forceinline__ void copy_tile(const Ring<Shape> &ring, const TensorMap &map, uint32_t n) const {
        const uint32_t first = (begin + n) * Shape::POSITIONS, in_tile = Shape::POSITIONS / pages.block_size;
        const uint32_t blocks = min(in_tile, (last - first) / pages.block_size + 1);
        const uint32_t panel_bytes = pages.block_size * Shape::SWIZZLE, lane = threadIdx.x % 32;
        ring.claim(n);
        if (lane == 0) {
            const uint32_t expected = KVERN_PLANTED(PLANTED_WRONG_BYTES) ? in_tile : blocks;
            barrier_expect(ring.filled(n), expected * panel_bytes * Shape::PANELS);
        }
        __syncwarp();
        for (uint32_t i = lane; i < blocks * Shape::PANELS; i += 32) {
            const uint32_t block = i / Shape::PANELS, panel = i % Shape::PANELS;
            unsigned char *to = ring.tile(n) + Shape::offset(Shape::POSITIONS, block * pages.block_size,
                                                             panel * Shape::PANEL_UNITS);
            copy_box(to, map, panel * Shape::PANEL, pages.row(first + block * pages.block_size), ring.filled(n));
        }
    }
};
