/* cuda_internal: what the files of the cuda backend share on the host side (C++).
 *
 * Sums that cross blocks are cut into chunks whose number and borders depend on the shape only;
 * each chunk has its own row of the scratch, and a second kernel adds the rows in order. */
#ifndef MD_CUDA_INTERNAL_H
#define MD_CUDA_INTERNAL_H

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_common.cuh"

#include <stddef.h>

/* The stream of the ops. */
cudaStream_t cuda_stream(const md_backend *be);

/* MD_OK, or MD_ERR_DEVICE with the text of the error: of a call, or of the launches of op so far.
 */
md_status cuda_ok(cudaError_t err, const char *what);
md_status cuda_launched(md_op op);

/* Fails with MD_ERR_BUG when the scratch set by the planner is smaller than need. */
md_status cuda_scratch(const md_backend *be, md_op op, size_t need, void **scratch);

static inline bool cuda_is_bf16(const md_tensor *t)
{
    return t->dtype == MD_BF16;
}

template <class T> static inline T *cuda_data(const md_tensor *t)
{
    return t ? static_cast<T *>(t->data) : nullptr;
}

static inline int64_t cuda_ceil(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Number of chunks for n items of at least `least` items each, at most `most`; first item of i. */
static inline int64_t cuda_chunks(int64_t n, int64_t least, int64_t most)
{
    int64_t chunks = n / least;
    return chunks < 1 ? 1 : chunks > most ? most : chunks;
}

#define CUDA_CHECK(op, a) MD_TRY(md_op_check(MD_OP_##op, (const md_operands *)(const void *)(a)))

/* One cuda_<op> per row; cuda_<op>_scratch for the rows that need scratch, arithmetic on shapes
 * alone (no device is touched, data pointers may be NULL). */
#define CUDA_DECLARE(op) md_status cuda_##op(md_backend *be, const md_##op##_args *a);
MD_OPS(CUDA_DECLARE)
#undef CUDA_DECLARE

#define CUDA_OPS_WITH_SCRATCH(X) \
    X(gemm)                      \
    X(linear_bwd)                \
    X(colsum)                    \
    X(qv_bias_bwd)               \
    X(act_bwd)                   \
    X(residual_ln_bwd)           \
    X(attention)                 \
    X(attention_bwd)             \
    X(tokens_bwd)                \
    X(loss)                      \
    X(cross_entropy)             \
    X(sumsq)
#define CUDA_DECLARE(op) size_t cuda_##op##_scratch(md_backend *be, const md_##op##_args *a);
CUDA_OPS_WITH_SCRATCH(CUDA_DECLARE)
#undef CUDA_DECLARE

/* Multiprocessors of the device, for which grids, and with them the borders of sums, are cut; those
 * of an H100 SXM where there is no device. */
int cuda_sms(const md_backend *be);

/* Setup of a file's kernels: shared memory limits. */
md_status cuda_attn_setup(void);
md_status cuda_norm_setup(void);

/* Column sums that are cut into chunks: for s below 4, out[s] (where not NULL) = or += the sum of
 * part[s][chunk][width] over the chunks: in chunk order where they are few, else cut into runs,
 * each added in chunk order, then the runs are. */
typedef struct cuda_sums {
    const float *part;
    int64_t chunks, width;
    float *out[4];
    bool accumulate[4];
} cuda_sums;

md_status cuda_reduce_sums(md_backend *be, md_op op, const cuda_sums *sums);

/* y = act(x) of any act, all elements; x and y of one type, x may be y. */
md_status cuda_act_forward(md_backend *be, md_op op, const md_tensor *x, md_tensor *y, md_act act);

#endif
