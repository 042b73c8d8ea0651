// As ptx.h, for instructions that sm_90a alone has: barriers in shared memory that count bytes, copies of boxes of a tensor (TMA),
// products of a warpgroup (wgmma). The host shim has its own versions in shim/hopper.h.
//
// A warpgroup is four warps, the first a multiple of four. What it multiplies lies in shared memory in panels: rows of SWIZZLE
// bytes, one after the other, whose 16-byte units are permuted by the row's number, so that neither rows nor columns share banks.
#pragma once

#include "ptx.h"

#ifdef KVERN_HOST_SHIM
#include "shim/hopper.h"
#else

// Makes a barrier whose phases end after `arrivals` arrivals and all bytes that were expected. The first phase has parity 0.
__device__ __forceinline__ void barrier_init(uint64_t *barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of copies too.
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity has ended: the current one, or the one before it.
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity) {
    uint32_t ended;
    do {
        asm volatile("{\n"
                     ".reg .pred ended;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, ended;\n"
                     "}"
                     : "=r"(ended)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (ended == 0);
}

// `threads` threads meet, those that name the same `number`, 1 to 15.
__device__ __forceinline__ void named_barrier(uint32_t number, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// What this thread wrote to shared memory, barriers it made included, is there for copies and products that begin later.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes to shared memory, for products to read after a fence.
__device__ __forceinline__ void store_shared_128(void *to, uint4 words) { store_128(to, words); }

// Begins to copy the box of a tensor at column x and row y to shared memory; the barrier counts its bytes.
__device__ __forceinline__ void copy_box(void *to, const TensorMap &map, uint32_t x, uint32_t y, uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
                 "[%2];" ::"r"(shared_address(to)),
                 "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
                 : "memory");
}

// From here on the threads of this warpgroup have so many registers each, a multiple of 8: fewer than before, or more, which waits
// until other warpgroups have given up as many.
template <int REGISTERS> __device__ __forceinline__ void give_up_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Comes before the first product of a batch: registers that it uses have their values.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last commit are a batch.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING batches are under way.
template <int PENDING> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of these registers past this place: it takes a product for done when it is begun.
template <int N> __device__ __forceinline__ void pin_registers(float (&registers)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            asm volatile("" : "+f"(registers[n][i])::"memory");
        }
    }
}

template <int N> __device__ __forceinline__ void pin_registers(uint32_t (&registers)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            asm volatile("" : "+r"(registers[n][i])::"memory");
        }
    }
}

// Begins acc[64][N] (+)= a[64][16] b[16][N] over a warpgroup, of which a warp has 16 rows, as in mma's acc. Operands in shared
// memory are named by descriptors; of `scores` both have their rows along the sum, of `weighted` b has its columns there, and a is
// in registers, as in mma's a. Their registers are the product's until it was waited for.
template <class T, int N> struct Products;

#define KVERN_ACC_OF_8(n) "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])
#define KVERN_ACC_OF_32(n) KVERN_ACC_OF_8(n), KVERN_ACC_OF_8(n + 1), KVERN_ACC_OF_8(n + 2), KVERN_ACC_OF_8(n + 3)
#define KVERN_ACC_64 KVERN_ACC_OF_32(0), KVERN_ACC_OF_32(4)
#define KVERN_ACC_96 KVERN_ACC_64, KVERN_ACC_OF_32(8)
#define KVERN_ACC_128 KVERN_ACC_96, KVERN_ACC_OF_32(12)
#define KVERN_ACC_256                                                                                                  \
    KVERN_ACC_128, KVERN_ACC_OF_32(16), KVERN_ACC_OF_32(20), KVERN_ACC_OF_32(24), KVERN_ACC_OF_32(28)
#define KVERN_REGISTERS_64                                                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KVERN_REGISTERS_96                                                                                             \
    KVERN_REGISTERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define KVERN_REGISTERS_128                                                                                            \
    KVERN_REGISTERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KVERN_REGISTERS_256                                                                                            \
    KVERN_REGISTERS_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                                 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                     \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// The operands that follow the accumulator are numbered from `first` on.
#define KVERN_PRODUCTS(T, name, columns, first, second, third, fourth, fifth)                                          \
    template <> struct Products<T, columns> {                                                                          \
        static __device__ __forceinline__ void scores(float (&acc)[columns / 8][4], uint64_t a_tile,                   \
                                                      uint64_t b_tile, bool add) {                                     \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #third ", 0;\n"                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name                         \
                         " {" KVERN_REGISTERS_##columns "}, %" #first ", %" #second ", add, 1, 1, 0, 0;\n}"            \
                         : KVERN_ACC_##columns                                                                         \
                         : "l"(a_tile), "l"(b_tile), "r"(static_cast<int>(add)));                                      \
        }                                                                                                              \
        static __device__ __forceinline__ void weighted(float (&acc)[columns / 8][4],                                  \
                                                        const uint32_t (&weights)[4], uint64_t b_tile) {               \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name                         \
                         " {" KVERN_REGISTERS_##columns "}, {%" #first ", %" #second ", %" #third ", %" #fourth        \
                         "}, %" #fifth ", 1, 1, 1, 1;"                                                                 \
                         : KVERN_ACC_##columns                                                                         \
                         : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(b_tile));           \
        }                                                                                                              \
    };

#define KVERN_PRODUCTS_OF(T, name)                                                                                     \
    KVERN_PRODUCTS(T, name, 64, 32, 33, 34, 35, 36)                                                                    \
    KVERN_PRODUCTS(T, name, 96, 48, 49, 50, 51, 52)                                                                    \
    KVERN_PRODUCTS(T, name, 128, 64, 65, 66, 67, 68)                                                                   \
    KVERN_PRODUCTS(T, name, 256, 128, 129, 130, 131, 132)
KVERN_PRODUCTS_OF(bf16, "bf16")
KVERN_PRODUCTS_OF(f16, "f16")

#endif
