// Products of few rows with weights of the activations' type. The entry's number is the most rows it takes.
#include "gemv.h"

#define ENTRY(suffix, T, rows)                                                                                         \
    KVERN_KERNEL_EARLY(kvern_gemv_##suffix##_r##rows, GemvParams, GEMV_WARPS * 32) {                                   \
        gemv<T, rows>(p, DenseWeights<T>{static_cast<const T *>(p.w), p.inner});                                       \
    }
#define ENTRIES(suffix, T) ENTRY(suffix, T, 1) ENTRY(suffix, T, 2) ENTRY(suffix, T, 4) ENTRY(suffix, T, 8)
KVERN_FOR_ELEMENTS(ENTRIES)
