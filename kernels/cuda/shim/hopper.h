// The shim's version of ptx_hopper.h, by the instructions' definitions in NVIDIA's PTX ISA, as unkindly as they allow.
//
// A copy poisons where it goes when it begins, and takes place when no thread can go on without it. Products read shared memory when
// they begin and again when they are done, as late as that, and both must be the same; meanwhile accumulators hold poison, and neither
// they nor weights may be written. What a thread writes for products is not there before its fence.
#pragma once

#include "params.h"
#include "shim/ptx.h"

namespace shim {

// One lane's part of a product of its warpgroup.
struct Product {
    // Its accumulators; four weights where these are in registers, else null.
    float *acc;
    const uint32_t *weights;
    uint64_t a_tile, b_tile;
    float (*widen)(uint16_t);
    uint32_t columns;
    bool add;
};

void barrier_init(uint64_t *barrier, uint32_t arrivals);
void barrier_arrive(uint64_t *barrier, uint32_t bytes);
void barrier_wait(uint64_t *barrier, uint32_t parity);
void named_barrier(uint32_t number, uint32_t threads);
void fence_proxy_async();
void store_shared_128(void *to, uint4 words);
void copy_box(void *to, const TensorMap &map, uint32_t x, uint32_t y, uint64_t *barrier);
void products_fence();
void products_commit();
void products_wait(uint32_t pending);
void begin_product(const Product &product);

// The address in the window of shared memory.
uint32_t shared_address(const void *at);

template <class T> struct WidenOne;
template <> struct WidenOne<bf16> {
    static constexpr float (*RUN)(uint16_t) = widen_bf16;
};
template <> struct WidenOne<f16> {
    static constexpr float (*RUN)(uint16_t) = f16_to_float;
};

} // namespace shim

inline uint32_t shared_address(const void *at) { return shim::shared_address(at); }
inline void barrier_init(uint64_t *barrier, uint32_t arrivals) { shim::barrier_init(barrier, arrivals); }
inline void barrier_arrive(uint64_t *barrier) { shim::barrier_arrive(barrier, 0); }
inline void barrier_expect(uint64_t *barrier, uint32_t bytes) { shim::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t *barrier, uint32_t parity) { shim::barrier_wait(barrier, parity); }
inline void named_barrier(uint32_t number, uint32_t threads) { shim::named_barrier(number, threads); }
inline void fence_proxy_async() { shim::fence_proxy_async(); }
inline void store_shared_128(void *to, uint4 words) { shim::store_shared_128(to, words); }

inline void copy_box(void *to, const TensorMap &map, uint32_t x, uint32_t y, uint64_t *barrier) {
    shim::copy_box(to, map, x, y, barrier);
}

template <int REGISTERS> void give_up_registers() { __syncwarp(); }
template <int REGISTERS> void take_registers() { __syncwarp(); }
inline void products_fence() { shim::products_fence(); }
inline void products_commit() { shim::products_commit(); }
template <int PENDING> void products_wait() { shim::products_wait(PENDING); }
template <int N> void pin_registers(float (&)[N][4]) {}
template <int N> void pin_registers(uint32_t (&)[N][4]) {}

template <class T, int N> struct Products {
    static void scores(float (&acc)[N / 8][4], uint64_t a_tile, uint64_t b_tile, bool add) {
        shim::begin_product({acc[0], nullptr, a_tile, b_tile, shim::WidenOne<T>::RUN, N, add});
    }
    static void weighted(float (&acc)[N / 8][4], const uint32_t (&weights)[4], uint64_t b_tile) {
        shim::begin_product({acc[0], weights, 0, b_tile, shim::WidenOne<T>::RUN, N, true});
    }
};
