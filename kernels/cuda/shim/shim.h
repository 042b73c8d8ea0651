// CUDA's language on the host, enough of it to test kernels without a GPU: one fiber per CUDA thread, blocks one after
// another. Barriers and warp operations meet in fibers' switches. What goes wrong (a deadlock, an access outside of a
// buffer, lanes that meet in different operations, a misaligned vector) ends the launch with a message.
//
// It shows neither races nor the memory model. Tests run every launch in both orders of threads, over poisoned shared
// memory, so that most missing barriers show as poison or as a difference between the orders.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict

struct uint4 {
    uint32_t x, y, z, w;
};

struct uint2 {
    uint32_t x, y;
};

struct Dim3 {
    uint32_t x, y, z;
};

namespace shim {

// What a lane brings to a meeting of its warp, and takes from it.
struct Slot {
    alignas(16) unsigned char bytes[64];
};

enum class Meeting : uint32_t { None, Sync, Shuffle, Vote, LoadMatrices, Mma, Products };

struct Fiber;
extern thread_local Fiber *current;
extern thread_local Dim3 thread_index, block_index, block_size, grid_size;
extern thread_local uint32_t planted;

// Ends the launch with this message; does not return to the kernel.
[[noreturn]] void fault(const char *format, ...);

void block_barrier();

// All 32 lanes of the warp bring `bytes`; the last to come runs `last` over the slots. Returns the warp's 32 slots, which
// stay as they are until the lane's next meeting.
Slot *meet(Meeting kind, const void *value, size_t bytes, void (*last)(Slot *));

// Shared memory of the block, by the address of a tag that is one of each declaration.
void *shared(const void *tag, size_t bytes);
unsigned char *dynamic_shared();

void copy_async(void *to, const void *from, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

uint32_t lane();

// What a thread says of the launches before and after its own; a launch whose threads touch memory, or end, without
// having waited for what came before is faulty where it was launched to begin early.
void grid_launch_dependents();
void grid_dependency_wait();
void check_turn();

// Entries register themselves by name.
struct Entry {
    const char *name, *params_name;
    size_t params_bytes;
    uint32_t threads_max;
    void (*run)(const void *params);
    const Entry *next;
    Entry(const char *name, const char *params_name, size_t params_bytes, uint32_t threads_max,
          void (*run)(const void *));
};

template <class T> T shuffle(T value, uint32_t from) {
    Slot *slots = meet(Meeting::Shuffle, &value, sizeof(T), nullptr);
    T result;
    memcpy(&result, slots[from & 31].bytes, sizeof(T));
    return result;
}

inline void check_mask(uint32_t mask) {
    if (mask != 0xffffffffu) {
        fault("a warp operation for the lanes %08x; kernels use whole warps", mask);
    }
}

} // namespace shim

#define threadIdx (shim::thread_index)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)

#define KVERN_ENTRY(entry, Params, threads, blocks, BEGIN)                                                             \
    static void entry(const Params &p);                                                                                \
    static const shim::Entry register_##entry(#entry, #Params, sizeof(Params), threads, [](const void *params) {       \
        Params copy;                                                                                                   \
        memcpy(&copy, params, sizeof(copy));                                                                           \
        BEGIN();                                                                                                       \
        entry(copy);                                                                                                   \
    });                                                                                                                \
    static void entry(const Params &p)

#define KVERN_SHARED(Type, name, count)                                                                                \
    static const char shared_tag_##name = 0;                                                                           \
    Type(&name)[count] = *static_cast<Type(*)[count]>(shim::shared(&shared_tag_##name, sizeof(Type) * (count)))

#define KVERN_DYNAMIC_SHARED(name) unsigned char *name = shim::dynamic_shared()

#define KVERN_PLANTED(number) (shim::planted == (number))

inline void __syncthreads() { shim::block_barrier(); }

inline void __syncwarp() { shim::meet(shim::Meeting::Sync, nullptr, 0, nullptr); }

template <class T> T __shfl_sync(uint32_t mask, T value, int from) {
    shim::check_mask(mask);
    return shim::shuffle(value, static_cast<uint32_t>(from));
}

template <class T> T __shfl_xor_sync(uint32_t mask, T value, int with) {
    shim::check_mask(mask);
    return shim::shuffle(value, shim::lane() ^ static_cast<uint32_t>(with));
}

template <class T> T __shfl_up_sync(uint32_t mask, T value, uint32_t by) {
    shim::check_mask(mask);
    return shim::shuffle(value, shim::lane() < by ? shim::lane() : shim::lane() - by);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    shim::check_mask(mask);
    shim::Slot *slots = shim::meet(shim::Meeting::Vote, &predicate, sizeof(predicate), nullptr);
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        int vote;
        memcpy(&vote, slots[lane].bytes, sizeof(vote));
        votes |= static_cast<uint32_t>(vote != 0) << lane;
    }
    return votes;
}

// Blocks run one after another.
inline void __threadfence() {}

// Fibers take turns only at barriers and meetings, so that plain arithmetic is atomic.
template <class T> T atomicAdd(T *at, T value) {
    T before = *at;
    *at = before + value;
    return before;
}

template <class T> T atomicMax(T *at, T value) {
    T before = *at;
    *at = before > value ? before : value;
    return before;
}

template <class T> T atomicOr(T *at, T value) {
    T before = *at;
    *at = before | value;
    return before;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
