/* tensor: what every op, collective and file routine passes around: a contiguous row-major block
 * with a shape, a type, a memory kind and a distribution over the tensor-parallel group. No
 * strides, no ownership: whoever allocated the block frees it. data == NULL is a planned tensor: it
 * has a shape but no memory (the plan backend and the arena's first pass). */
#ifndef MD_TENSOR_H
#define MD_TENSOR_H

#include "src/base.h"

MD_C_BEGIN

/* X(name, bytes) */
#define MD_DTYPES(X) X(F32, 4) X(BF16, 2) X(F64, 8) X(I32, 4) X(I64, 8) X(U8, 1) X(F16, 2)

typedef enum md_dtype {
#define MD_DTYPE_ENUM(name, bytes) MD_##name,
    MD_DTYPES(MD_DTYPE_ENUM)
#undef MD_DTYPE_ENUM
} md_dtype;

typedef enum md_mem { MD_HOST, MD_DEVICE, MD_PINNED } md_mem;

/* Distribution over the tp group. REPL: the same on every rank, and so is its gradient. ENTERED:
 * the same on every rank, but each rank's gradient of it is a part of a sum (what a column-cut
 * layer reads). CUT_ROWS: each rank has the rows of its images. CUT_COLS: each rank has its
 * channels or heads. PARTIAL: the true value is the sum over the ranks. The graph builder refuses a
 * node whose inputs do not fit, so that a reduction cannot be forgotten. */
typedef enum md_place { MD_REPL, MD_ENTERED, MD_CUT_ROWS, MD_CUT_COLS, MD_PARTIAL } md_place;

#define MD_MAX_RANK 4

typedef struct md_tensor {
    void *data;
    int64_t dim[MD_MAX_RANK];
    uint8_t rank, dtype, mem, place;
} md_tensor;

size_t md_dtype_bytes(md_dtype t);
const char *md_dtype_name(md_dtype t);
const char *md_place_name(md_place p);

/* Elements and bytes; a rank-0 tensor has one element. Local. */
int64_t md_tensor_count(const md_tensor *t);
size_t md_tensor_bytes(const md_tensor *t);
/* Last dimension, and the product of all the others: the matrix view [rows, cols]. */
int64_t md_tensor_cols(const md_tensor *t);
int64_t md_tensor_rows(const md_tensor *t);
bool md_tensor_same_shape(const md_tensor *a, const md_tensor *b);
/* "[8, 197, 768] f32" into buf; returns buf. */
const char *md_tensor_describe(const md_tensor *t, char *buf, size_t size);

/* A replicated host tensor of the given shape over data (may be NULL). rank = number of dims. */
md_tensor md_tensor_make(void *data, md_dtype dtype, int rank, const int64_t *dim);
#define MD_TENSOR(data, dtype, ...)                                            \
    md_tensor_make((data), (dtype), (int)MD_COUNT(((int64_t[]){__VA_ARGS__})), \
                   (int64_t[]){__VA_ARGS__})

/* A rank's part of an array of given global shape, as equal runs of consecutive elements
 * (row-major): run k covers elements [first + k * stride, first + k * stride + run) of the array;
 * the part's own element e lies in run e / run at e % run. Runs do not overlap. A whole array is
 * one run: {0, count, count, 1}. A cut of [O, P * N, I] into P interleaved parts over R ranks is
 * O * P runs of N / R * I elements. */
typedef struct md_view {
    int64_t first, run, stride, runs;
} md_view;

/* Element of the global array behind element e of the view. Local. */
static inline int64_t md_view_global(const md_view *v, int64_t e)
{
    return v->first + e / v->run * v->stride + e % v->run;
}

/* The tensor's own elements from `first` on, as bytes; NULL stays NULL. */
static inline void *md_tensor_from(const md_tensor *t, int64_t first)
{
    return t->data ? (char *)t->data + (size_t)first * md_dtype_bytes((md_dtype)t->dtype) : NULL;
}

static inline float *md_f32(const md_tensor *t)
{
    return (float *)t->data;
}
static inline int32_t *md_i32(const md_tensor *t)
{
    return (int32_t *)t->data;
}

MD_C_END

#endif
