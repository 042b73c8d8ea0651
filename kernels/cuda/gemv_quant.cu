// Products of few rows with GGUF weights, dequantized on the way. The entry's number is the most rows it takes.
#include "gemv.h"
#include "quant.h"

#define ENTRY(format, Format, suffix, T, rows)                                                                         \
    KVERN_KERNEL_EARLY(kvern_gemv_##format##_##suffix##_r##rows, GemvParams, GEMV_WARPS * 32) {                        \
        gemv<T, rows>(p, BlockWeights<Format>{static_cast<const uint8_t *>(p.w), p.inner});                            \
    }
#define ENTRIES(suffix, T)                                                                                             \
    KVERN_FOR_FORMATS(ENTRY, suffix, T, 1)                                                                             \
    KVERN_FOR_FORMATS(ENTRY, suffix, T, 4)                                                                             \
    KVERN_FOR_FORMATS(ENTRY, suffix, T, 8)
KVERN_FOR_ELEMENTS(ENTRIES)
