// Stands in for NVIDIA's driver in a test: notes each call on standard error and computes nothing. The environment
// says what goes wrong: FAKE_INIT a status of cuInit, FAKE_VERSION a version, FAKE_CAPABILITY and FAKE_MINOR a compute
// capability, FAKE_BLOCK_SHARED the most shared memory of a block, FAKE_CAPTURE a status of cuStreamEndCapture,
// FAKE_PARTS one of cuDeviceGetDevResource. A launch of 666 blocks loses the device.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2 };
enum { INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700 };
enum { DISABLE_TIMING = 2, EVENTS_MAX = 0x1000 };

static __thread void *current;
static int lost;
// Apart, so that the other handles do not depend on how many libraries there are.
static uintptr_t last_handle = 0x100, last_library = 0x1000;

static void *const CONTEXT = (void *)0xc0;

#define NOTE(...) (fprintf(stderr, "> "), fprintf(stderr, __VA_ARGS__), fprintf(stderr, "\n"))
#define IN_CONTEXT                                                                                                     \
    if (lost) return lost;                                                                                             \
    if (current != CONTEXT) return INVALID_CONTEXT
// Contexts of parts of the device lie above it.
#define IN_SOME_CONTEXT                                                                                                \
    if (lost) return lost;                                                                                             \
    if (current < CONTEXT) return INVALID_CONTEXT

static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static void *handle(void) {
    return (void *)++last_handle;
}

int cuInit(unsigned flags) {
    NOTE("cuInit %u", flags);
    return setting("FAKE_INIT", SUCCESS);
}

int cuDriverGetVersion(int *version) {
    *version = setting("FAKE_VERSION", 13000);
    return SUCCESS;
}

int cuGetErrorString(int status, const char **text) {
    *text = status == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "what it means";
    return SUCCESS;
}

int cuDeviceGetCount(int *count) {
    *count = 2;
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = 70 + ordinal;
    return SUCCESS;
}

int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "Fake %d", device);
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = 1000u * device;
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 75: *value = setting("FAKE_CAPABILITY", 9); break;
    case 76: *value = setting("FAKE_MINOR", 0); break;
    case 97: *value = setting("FAKE_BLOCK_SHARED", 232448); break;
    default: *value = attribute;
    }
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    NOTE("cuDevicePrimaryCtxRetain %d", device);
    *context = CONTEXT;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    NOTE("cuDevicePrimaryCtxRelease %d", device);
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) {
    current = context;
    return SUCCESS;
}

int cuCtxSynchronize(void) {
    NOTE("cuCtxSynchronize");
    IN_CONTEXT;
    return SUCCESS;
}

int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    IN_CONTEXT;
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    IN_CONTEXT;
    *free_bytes = 100;
    *total = 200;
    return SUCCESS;
}

int cuMemAlloc_v2(uint64_t *memory, size_t bytes) {
    IN_CONTEXT;
    NOTE("cuMemAlloc %zu", bytes);
    if (bytes > 1 << 20) return OUT_OF_MEMORY;
    *memory = (uint64_t)(uintptr_t)malloc(bytes);
    return SUCCESS;
}

int cuMemFree_v2(uint64_t memory) {
    IN_CONTEXT;
    NOTE("cuMemFree");
    free((void *)(uintptr_t)memory);
    return SUCCESS;
}

int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) {
    IN_CONTEXT;
    NOTE("cuMemHostAlloc %zu flags %u", bytes, flags);
    *memory = malloc(bytes);
    memset(*memory, 0xab, bytes);
    return SUCCESS;
}

int cuMemFreeHost(void *memory) {
    IN_CONTEXT;
    NOTE("cuMemFreeHost");
    free(memory);
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    IN_CONTEXT;
    NOTE("cuMemcpyHtoDAsync %zu on %p", bytes, stream);
    memcpy((void *)(uintptr_t)to, from, bytes);
    return SUCCESS;
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    IN_CONTEXT;
    NOTE("cuMemcpyDtoHAsync %zu on %p", bytes, stream);
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return SUCCESS;
}

int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    IN_CONTEXT;
    *stream = handle();
    NOTE("cuStreamCreateWithPriority %p flags %u priority %d", *stream, flags, priority);
    return SUCCESS;
}

int cuStreamDestroy_v2(void *stream) {
    NOTE("cuStreamDestroy %p", stream);
    return SUCCESS;
}

int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    IN_CONTEXT;
    NOTE("cuStreamWaitEvent %p for %p flags %u", stream, event, flags);
    return SUCCESS;
}

// An event by its handle: where, and as which of all records, it was recorded last, and which of its records the host
// has waited for; 0 is none.
static struct event {
    unsigned flags, recorded, reached;
    void *stream;
} events[EVENTS_MAX];
static unsigned records;

static struct event *event_of(void *handle) {
    return &events[(uintptr_t)handle % EVENTS_MAX];
}

int cuEventCreate(void **event, unsigned flags) {
    IN_SOME_CONTEXT;
    *event = handle();
    event_of(*event)->flags = flags;
    NOTE("cuEventCreate %p flags %u in %p", *event, flags, current);
    return SUCCESS;
}

int cuEventDestroy_v2(void *event) {
    NOTE("cuEventDestroy %p", event);
    return SUCCESS;
}

int cuEventRecord(void *event, void *stream) {
    IN_CONTEXT;
    NOTE("cuEventRecord %p on %p", event, stream);
    event_of(event)->recorded = ++records;
    event_of(event)->stream = stream;
    return SUCCESS;
}

int cuEventSynchronize(void *event) {
    IN_CONTEXT;
    NOTE("cuEventSynchronize %p", event);
    // And with it what was recorded on its stream before.
    const struct event *waited = event_of(event);
    for (struct event *other = events; other < events + EVENTS_MAX; ++other) {
        if (other->stream == waited->stream && other->recorded <= waited->recorded) other->reached = other->recorded;
    }
    return SUCCESS;
}

// Half a millisecond from one record to the next.
int cuEventElapsedTime_v2(float *milliseconds, void *from, void *to) {
    IN_CONTEXT;
    NOTE("cuEventElapsedTime %p to %p", from, to);
    const struct event *both[] = {event_of(from), event_of(to)};
    for (int i = 0; i < 2; ++i) {
        if (both[i]->flags & DISABLE_TIMING || both[i]->recorded == 0) return INVALID_HANDLE;
    }
    for (int i = 0; i < 2; ++i) {
        if (both[i]->reached != both[i]->recorded) return NOT_READY;
    }
    *milliseconds = ((float)both[1]->recorded - (float)both[0]->recorded) / 2;
    return SUCCESS;
}

int cuLibraryLoadData(void **library, const void *image, void *jit, void *jit_values, unsigned jit_count, void *options,
                      void *values, unsigned count) {
    IN_CONTEXT;
    *library = (void *)++last_library;
    // As fatbins begin, at an address that is one of numbers.
    int good = (uintptr_t)image % 8 == 0 && *(const uint32_t *)image == 0xba55ed50;
    int plain = !jit && !jit_values && jit_count == 0 && !options && !values && count == 0;
    NOTE("cuLibraryLoadData %s", good && plain ? "of a fatbin" : "of something else");
    return good && plain ? SUCCESS : INVALID_VALUE;
}

int cuLibraryUnload(void *library) {
    (void)library;
    NOTE("cuLibraryUnload");
    return SUCCESS;
}

// Every second library has every kernel.
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    IN_CONTEXT;
    if ((uintptr_t)library % 2 != 0 || strncmp(name, "kvern_", 6) != 0) return NOT_FOUND;
    *kernel = strdup(name);
    return SUCCESS;
}

int cuKernelGetFunction(void **function, void *kernel) {
    IN_CONTEXT;
    *function = kernel;
    return SUCCESS;
}

int cuFuncLoad(void *function) {
    IN_CONTEXT;
    NOTE("cuFuncLoad %s", (char *)function);
    return SUCCESS;
}

int cuKernelGetParamInfo(void *kernel, size_t index, size_t *offset, size_t *bytes) {
    IN_CONTEXT;
    (void)kernel;
    *offset = 0;
    *bytes = 48;
    return index == 0 ? SUCCESS : INVALID_VALUE;
}

// Static shared memory: 1 KiB.
int cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
    IN_CONTEXT;
    (void)kernel;
    *value = attribute == 1 && device >= 70 ? 1024 : 0;
    return SUCCESS;
}

int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
    IN_CONTEXT;
    NOTE("cuKernelSetAttribute %s %d = %d on %d", (char *)kernel, attribute, value, device);
    return value > 200000 ? INVALID_VALUE : SUCCESS;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared_bytes) {
    IN_CONTEXT;
    (void)function;
    *blocks = shared_bytes > 100000 ? 0 : 1024 / threads;
    return SUCCESS;
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared_bytes, void *stream, void **parameters, void **extra) {
    IN_CONTEXT;
    NOTE("cuLaunchKernel %s %ux%ux%u of %ux%ux%u shared %u on %p parameter %llu extra %d", (char *)function, x, y, z,
         threads, threads_y, threads_z, shared_bytes, stream, *(unsigned long long *)parameters[0], extra != NULL);
    if (x == 666) lost = ILLEGAL_ADDRESS;
    return x == 0 ? INVALID_VALUE : SUCCESS;
}

struct attribute {
    int id;
    char pad[4];
    int value;
    char rest[60];
};

struct launch {
    unsigned x, y, z, threads, threads_y, threads_z, shared_bytes;
    void *stream;
    const struct attribute *attributes;
    unsigned count;
};

int cuLaunchKernelEx(const struct launch *launch, void *function, void **parameters, void **extra) {
    IN_CONTEXT;
    NOTE("cuLaunchKernelEx %s %ux%ux%u of %ux%ux%u shared %u on %p, %u attribute: %d = %d, parameter %llu extra %d",
         (char *)function, launch->x, launch->y, launch->z, launch->threads, launch->threads_y, launch->threads_z,
         launch->shared_bytes, launch->stream, launch->count, launch->attributes->id, launch->attributes->value,
         *(unsigned long long *)parameters[0], extra != NULL);
    return launch->x == 0 ? INVALID_VALUE : SUCCESS;
}

struct resource {
    int type;
    unsigned char padding[92];
    unsigned count;
    unsigned char rest[44];
};

enum { INVALID_RESOURCE = 0, MULTIPROCESSORS = 1 };

int cuDeviceGetDevResource(int device, struct resource *resource, int type) {
    IN_CONTEXT;
    NOTE("cuDeviceGetDevResource %d of type %d", device, type);
    *resource = (struct resource){.type = MULTIPROCESSORS, .count = 16};
    return setting("FAKE_PARTS", SUCCESS);
}

// In fours.
int cuDevSmResourceSplitByCount(struct resource *first, unsigned *groups, const struct resource *all,
                                struct resource *rest, unsigned flags, unsigned least) {
    IN_CONTEXT;
    NOTE("cuDevSmResourceSplitByCount %u groups of at least %u of %u flags %u", *groups, least, all->count, flags);
    unsigned count = (least + 3) / 4 * 4;
    *first = (struct resource){.type = MULTIPROCESSORS, .count = count};
    *rest = (struct resource){.type = count < all->count ? MULTIPROCESSORS : INVALID_RESOURCE,
                              .count = all->count - count};
    return SUCCESS;
}

// A description is the number of multiprocessors.
int cuDevResourceGenerateDesc(void **description, struct resource *resources, unsigned count) {
    IN_CONTEXT;
    *description = (void *)(uintptr_t)(count == 1 ? resources->count : 0);
    return SUCCESS;
}

int cuGreenCtxCreate(void **green, void *description, int device, unsigned flags) {
    IN_CONTEXT;
    *green = handle();
    NOTE("cuGreenCtxCreate %p of %d on %d flags %u", *green, (int)(uintptr_t)description, device, flags);
    return SUCCESS;
}

int cuCtxFromGreenCtx(void **context, void *green) {
    IN_CONTEXT;
    *context = (char *)green + 0x1000;
    return SUCCESS;
}

int cuGreenCtxStreamCreate(void **stream, void *green, unsigned flags, int priority) {
    IN_CONTEXT;
    *stream = handle();
    NOTE("cuGreenCtxStreamCreate %p of %p flags %u priority %d", *stream, green, flags, priority);
    return SUCCESS;
}

int cuGreenCtxDestroy(void *green) {
    NOTE("cuGreenCtxDestroy %p", green);
    return SUCCESS;
}

int cuTensorMapEncodeTiled(uint64_t *map, int type, unsigned rank, void *memory, const uint64_t *sizes,
                           const uint64_t *strides, const unsigned *box, const unsigned *steps, int interleave,
                           int swizzle, int promotion, int fill) {
    IN_CONTEXT;
    NOTE("cuTensorMapEncodeTiled type %d rank %u at %p, %llu x %llu by %llu, box %u x %u by %u x %u, %d %d %d %d", type,
         rank, memory, (unsigned long long)sizes[0], (unsigned long long)sizes[1], (unsigned long long)strides[0],
         box[0], box[1], steps[0], steps[1], interleave, swizzle, promotion, fill);
    for (int i = 0; i < 16; ++i) map[i] = i;
    return (uintptr_t)map % 64 == 0 && box[1] < 200 ? SUCCESS : INVALID_VALUE;
}

int cuStreamBeginCapture_v2(void *stream, int mode) {
    IN_CONTEXT;
    NOTE("cuStreamBeginCapture %p mode %d", stream, mode);
    return SUCCESS;
}

int cuThreadExchangeStreamCaptureMode(int *mode) {
    static __thread int known;
    int before = known;
    known = *mode;
    *mode = before;
    NOTE("cuThreadExchangeStreamCaptureMode %d for %d", known, before);
    return SUCCESS;
}

int cuStreamEndCapture(void *stream, void **graph) {
    IN_CONTEXT;
    NOTE("cuStreamEndCapture %p", stream);
    int status = setting("FAKE_CAPTURE", SUCCESS);
    *graph = status == SUCCESS ? handle() : NULL;
    return status;
}

int cuGraphInstantiateWithFlags(void **ready, void *graph, unsigned long long flags) {
    IN_CONTEXT;
    *ready = handle();
    NOTE("cuGraphInstantiate %p of %p flags %llu", *ready, graph, flags);
    return SUCCESS;
}

int cuGraphUpload(void *ready, void *stream) {
    IN_CONTEXT;
    NOTE("cuGraphUpload %p by %p", ready, stream);
    return SUCCESS;
}

int cuGraphDestroy(void *graph) {
    NOTE("cuGraphDestroy %p", graph);
    return SUCCESS;
}

int cuGraphLaunch(void *ready, void *stream) {
    IN_CONTEXT;
    NOTE("cuGraphLaunch %p on %p", ready, stream);
    return SUCCESS;
}

int cuGraphExecDestroy(void *ready) {
    NOTE("cuGraphExecDestroy %p", ready);
    return SUCCESS;
}
