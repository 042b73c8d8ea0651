// What every kernel file includes: how an entry is declared, shared memory, and the means of the language that the host
// shim stands in for. The same .cu compiles under nvcc and, with KVERN_HOST_SHIM, under a plain C++ compiler.
#pragma once

#include "params.h"

#ifdef KVERN_HOST_SHIM
#include "shim/shim.h"
#else

// An entry point: one parameter struct by value, at most `threads` threads per block and at least `blocks` blocks per
// multiprocessor, from which the compiler takes its bound on registers.
#define KVERN_KERNEL_BLOCKS(name, Params, threads, blocks)                                                             \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)

// `count` elements of static shared memory.
#define KVERN_SHARED(Type, name, count) __shared__ alignas(16) Type name[count]

// The block's dynamic shared memory.
#define KVERN_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// A fault that tests ask for by number; never on a device.
#define KVERN_PLANTED(number) false

#endif

#define KVERN_KERNEL(name, Params, threads) KVERN_KERNEL_BLOCKS(name, Params, threads, 1)

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
};
