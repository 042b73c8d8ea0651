// Stands in for cuBLASLt in a test: notes what it is asked and computes nothing. FAKE_CUBLAS is its version. An
// algorithm remembers the rows that it was asked for; a product of 70 rows takes no other's, and one of 99 rows fails.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };

#define NOTE(...) (fprintf(stderr, "> "), fprintf(stderr, __VA_ARGS__), fprintf(stderr, "\n"))

struct layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};

struct answer {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};

// Descriptions that are not destroyed yet.
static int living;

size_t cublasLtGetVersion(void) {
    const char *text = getenv("FAKE_CUBLAS");
    return text ? (size_t)atoi(text) : 130002;
}

int cublasLtCreate(void **handle) {
    *handle = &living;
    return SUCCESS;
}

int cublasLtDestroy(void *handle) {
    (void)handle;
    NOTE("cublasLtDestroy, %d descriptions live", living);
    return SUCCESS;
}

static int create(void **object) {
    *object = malloc(1);
    ++living;
    return SUCCESS;
}

static int destroy(void *object) {
    free(object);
    --living;
    return SUCCESS;
}

static unsigned long long number(const void *value, size_t bytes) {
    unsigned long long found = 0;
    memcpy(&found, value, bytes);
    return found;
}

int cublasLtMatmulDescCreate(void **description, int compute, int scale) {
    NOTE("product: compute %d scale %d", compute, scale);
    return create(description);
}

int cublasLtMatmulDescSetAttribute(void *description, int attribute, const void *value, size_t bytes) {
    (void)description;
    NOTE("product: %d = %llu of %zu bytes", attribute, number(value, bytes), bytes);
    return SUCCESS;
}

int cublasLtMatmulDescDestroy(void *description) {
    return destroy(description);
}

int cublasLtMatmulPreferenceCreate(void **preference) {
    return create(preference);
}

int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value, size_t bytes) {
    (void)preference;
    NOTE("wish: %d = %llu of %zu bytes", attribute, number(value, bytes), bytes);
    return SUCCESS;
}

int cublasLtMatmulPreferenceDestroy(void *preference) {
    return destroy(preference);
}

int cublasLtMatrixLayoutCreate(struct layout **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *layout = malloc(sizeof **layout);
    **layout = (struct layout){type, rows, columns, stride};
    ++living;
    return SUCCESS;
}

int cublasLtMatrixLayoutDestroy(struct layout *layout) {
    return destroy(layout);
}

static void note(const char *what, const struct layout *a, const struct layout *b, const struct layout *d) {
    const struct layout *all[] = {a, b, d};
    fprintf(stderr, "> %s", what);
    for (int i = 0; i < 3; ++i) {
        fprintf(stderr, " %llux%llu/%lld of %d", (unsigned long long)all[i]->rows, (unsigned long long)all[i]->columns,
                (long long)all[i]->stride, all[i]->type);
    }
    fprintf(stderr, "\n");
}

// The first answer is none; a matrix of 13 columns has no answer at all.
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, struct layout *a, struct layout *b,
                                   struct layout *c, struct layout *d, void *preference, int asked,
                                   struct answer *answers, int *found) {
    (void)handle, (void)description, (void)c, (void)preference;
    note("cublasLtMatmulAlgoGetHeuristic", a, b, d);
    *found = a->columns == 13 || asked < 2 ? 0 : 2;
    memset(answers, 0, (size_t)asked * sizeof *answers);
    answers[0].state = NOT_SUPPORTED;
    answers[1].algorithm[0] = b->columns;
    return SUCCESS;
}

int cublasLtMatmul(void *handle, void *description, const float *alpha, const void *a, struct layout *a_layout,
                   const void *b, struct layout *b_layout, const float *beta, const void *c, struct layout *c_layout,
                   void *d, struct layout *d_layout, const uint64_t *algorithm, void *workspace, size_t workspace_bytes,
                   void *stream) {
    (void)handle, (void)description;
    note("cublasLtMatmul", a_layout, b_layout, d_layout);
    NOTE("  %g x %p x %p + %g x %p into %p (%d) for %llu rows, workspace %p of %zu, on %p", *alpha, a, b, *beta, c, d,
         c_layout == d_layout, (unsigned long long)algorithm[0], workspace, workspace_bytes, stream);
    if (b_layout->columns == 70 && algorithm[0] != 70) return NOT_SUPPORTED;
    return b_layout->columns == 99 ? EXECUTION_FAILED : SUCCESS;
}
