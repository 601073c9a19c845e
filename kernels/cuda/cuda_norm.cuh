/* cuda_norm: what LayerNorm forward and backward share.
 *
 * A block has whole rows, each of its threads the same 16 bytes of every row: so memory is read
 * once. Rows that are too long for that, or not in whole vectors, and operands or parameters that
 * are not aligned take slow kernels, which read a row several times. */
#ifndef MD_CUDA_NORM_CUH
#define MD_CUDA_NORM_CUH

#include "kernels/cuda/cuda_vec.cuh"

/* Threads of a block at most. */
#define LN_BLOCK 512

/* A vector of parameters, aligned, or ones or zeros in its place. */
template <int N>
MD_DEV void md_parameters(const float *p, int64_t col, bool there, float absent, float (&x)[N])
{
    if (p && there) {
        md_get(p + col, x);
        return;
    }
#pragma unroll
    for (int j = 0; j < N; j++)
        x[j] = absent;
}

/* Element `col` of row `row`. */
MD_DEV int64_t md_ln_at(int row, int cols, int col)
{
    return (int64_t)row * cols + col;
}

/* The images of rows: `tokens` rows each. keep, from and to of an image as residual_ln has them;
 * without any of them all rows are one image. A row's image is row * magic / 2^shift. */
struct md_ln_images {
    const float *keep;
    const int32_t *from, *to;
    int tokens;
    unsigned magic, shift;
};

/* Of R rows: the factor of the branch, and the row in the branch and in y; -1: not there. */
template <int R> struct md_ln_places {
    float keep[R];
    int from[R], to[R];
};

/* Those of R rows from `row` on, below `end`. */
template <int R>
MD_DEV void md_places_of(const md_ln_images &k, int row, int end, md_ln_places<R> &p)
{
#pragma unroll
    for (int i = 0; i < R; i++) {
        p.keep[i] = 0.0f;
        p.from[i] = p.to[i] = -1;
        if (row + i >= end)
            continue;
        const int image = (int)((uint64_t)(unsigned)(row + i) * k.magic >> k.shift);
        const int token = row + i - image * k.tokens;
        const int from = k.from ? k.from[image] : image, to = k.to ? k.to[image] : image;
        p.keep[i] = k.keep ? k.keep[image] : 1.0f;
        p.from[i] = from < 0 ? -1 : from * k.tokens + token;
        p.to[i] = to < 0 ? -1 : to * k.tokens + token;
    }
}

/* What a kernel takes of the operands. */
static inline md_status ln_images(md_op op, const md_tensor *keep, const md_tensor *from,
                                  const md_tensor *to, const md_tensor *x, md_ln_images *out)
{
    const int64_t rows = md_tensor_rows(x), cols = md_tensor_cols(x);
    const md_tensor *index = keep ? keep : from ? from : to;
    const int64_t images = index ? md_tensor_count(index) : 1;
    unsigned log = 0; /* the least with 2^log >= tokens: then the quotient is exact below 2^31 */
    if (rows > INT32_MAX / 2 || cols > INT32_MAX - LN_BLOCK)
        MD_FAIL(MD_ERR_BUG, "%s: %lld rows of %lld", md_op_name(op), (long long)rows,
                (long long)cols);
    out->keep = cuda_data<const float>(keep);
    out->from = cuda_data<const int32_t>(from);
    out->to = cuda_data<const int32_t>(to);
    out->tokens = images && rows ? (int)(rows / images) : 1;
    while (1ll << log < out->tokens)
        log++;
    out->shift = 31 + log;
    out->magic = (unsigned)((1ull << out->shift) / (unsigned)out->tokens + 1);
    return MD_OK;
}

/* Threads for rows of cols numbers of type T: whole warps; 0: they need the slow kernel. */
template <class T> static int ln_threads(int64_t cols, bool aligned)
{
    const int64_t vectors = cols / md_vec<T>::N;
    if (!aligned || cols % md_vec<T>::N != 0 || vectors > LN_BLOCK)
        return 0;
    return (int)cuda_ceil(vectors, MD_WARP) * MD_WARP;
}

#endif
