// What every kernel file includes: how an entry is declared, shared memory, and the means of the language that the host
// shim stands in for. The same .cu compiles under nvcc and, with KVERN_HOST_SHIM, under a plain C++ compiler.
#pragma once

#include "params.h"
#include "ptx.h"

// A launch may begin while the one before it on its stream ends (docs/adr/0030-programmatic-launches.md). So every thread
// first lets the launch after this one do the same, and then waits until all that came before is done and can be seen;
// that comes before any access to memory that a kernel writes. KVERN_KERNEL does both; the body of a KVERN_KERNEL_EARLY
// waits itself, by wait_for_launches_before(), and until then may fetch what no kernel writes. Where launches take turns,
// as they all do below sm_90, neither does anything.
#ifndef KVERN_HOST_SHIM

// An entry point: one parameter struct by value, at most `threads` threads per block and at least `blocks` blocks per
// multiprocessor, from which the compiler takes its bound on registers. `BEGIN` is what comes before the body.
#define KVERN_ENTRY(name, Params, threads, blocks, BEGIN)                                                              \
    static __device__ __forceinline__ void name##_body(const Params &p);                                               \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p) {             \
        BEGIN();                                                                                                       \
        name##_body(p);                                                                                                \
    }                                                                                                                  \
    static __device__ __forceinline__ void name##_body(const Params &p)

// `count` elements of static shared memory.
#define KVERN_SHARED(Type, name, count) __shared__ alignas(16) Type name[count]

// The block's dynamic shared memory.
#define KVERN_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// A fault that tests ask for by number; never on a device.
#define KVERN_PLANTED(number) false

#endif

#define KVERN_KERNEL_BLOCKS(name, Params, threads, blocks) KVERN_ENTRY(name, Params, threads, blocks, take_turn)
#define KVERN_KERNEL(name, Params, threads) KVERN_KERNEL_BLOCKS(name, Params, threads, 1)
#define KVERN_KERNEL_EARLY(name, Params, threads) KVERN_ENTRY(name, Params, threads, 1, let_next_launch_begin)

// Faults that tests plant, to see that they are noticed.
enum Planted : unsigned {
    PLANTED_NONE = 0,
    PLANTED_MISSING_BARRIER = 1,
    PLANTED_TABLE_OFF_BY_ONE = 2,
    PLANTED_WRONG_SCALE = 3,
    PLANTED_UNWRITTEN_TAIL = 4,
    PLANTED_MISSING_WAIT = 5,
    PLANTED_READ_PAST_END = 6,
    PLANTED_DIVERGED_BARRIER = 7,
    PLANTED_EARLY_RELEASE = 8,
    PLANTED_WRONG_PARITY = 9,
    PLANTED_WRONG_OFFSET = 10,
    PLANTED_MISSING_FENCE = 11,
    PLANTED_WRONG_BYTES = 12,
    PLANTED_UNFENCED_PRODUCTS = 13,
    PLANTED_EARLY_WEIGHTS = 14,
    PLANTED_MISSING_TURN = 15,
};

__device__ __forceinline__ void wait_for_launches_before() {
    if (!KVERN_PLANTED(PLANTED_MISSING_TURN)) {
        grid_dependency_wait();
    }
}

__device__ __forceinline__ void let_next_launch_begin() { grid_launch_dependents(); }

__device__ __forceinline__ void take_turn() {
    let_next_launch_begin();
    wait_for_launches_before();
}
