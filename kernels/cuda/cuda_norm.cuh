/* cuda_norm: what LayerNorm forward and backward share.
 *
 * A block has whole rows, each of its threads the same 16 bytes of every row: so the parameters and
 * the sums of their gradients stay in registers, and memory is read once. LN_ROWS rows of a block
 * are under way at once. Rows that are too long for that, or not in whole aligned vectors, take
 * slow kernels, which read a row several times. */
#ifndef MD_CUDA_NORM_CUH
#define MD_CUDA_NORM_CUH

#include "kernels/cuda/cuda_vec.cuh"

#define LN_ROWS 4
/* Threads of a block at most. */
#define LN_BLOCK 512
/* Threads of a multiprocessor, forward and backward: with LN_ROWS rows of two operands, or two of
 * four by copies, these have 60 KiB of reads under way at any time. As many fit, by registers and
 * shared memory; so all blocks run at once, with equal shares of the rows. */
#define LN_THREADS     512
#define LN_BWD_THREADS 480

/* A vector of parameters, or ones or zeros in its place. */
template <int N>
MD_DEV void md_parameters(const float *p, int64_t col, bool there, float absent, float (&x)[N])
{
#pragma unroll
    for (int j = 0; j < N; j++)
        x[j] = p && there ? p[col + j] : absent;
}

/* The vectors at col of the rows [row, end) of R. Absent operands and rows are zeros. */
template <int R, class T>
MD_DEV void md_read_rows(const T *p, int64_t row, int64_t end, int64_t at, int64_t cols,
                         uint4 (&x)[R])
{
#pragma unroll
    for (int i = 0; i < R; i++)
        x[i] = p && row + i < end ? *reinterpret_cast<const uint4 *>(p + at + i * cols)
                                  : make_uint4(0, 0, 0, 0);
}

/* keep of the images that R rows from `row` on are of. */
template <int R>
MD_DEV void md_keep_of(const float *keep, int64_t row, int64_t end, int64_t tokens, float (&x)[R])
{
    if (!keep) {
#pragma unroll
        for (int i = 0; i < R; i++)
            x[i] = 1.0f;
        return;
    }
    int64_t image = row / tokens, token = row - image * tokens;
#pragma unroll
    for (int i = 0; i < R; i++) {
        x[i] = row + i < end ? keep[image] : 0.0f;
        if (++token == tokens)
            token = 0, image++;
    }
}

/* Threads for rows of cols numbers of type T: whole warps; 0: they need the slow kernel. */
template <class T> static int ln_threads(int64_t cols, bool aligned)
{
    const int64_t vectors = cols / md_vec<T>::N;
    if (!aligned || cols % md_vec<T>::N != 0 || vectors > LN_BLOCK)
        return 0;
    return (int)cuda_ceil(vectors, MD_WARP) * MD_WARP;
}

/* Blocks for rows of which each takes at least `least`, so many on each multiprocessor. */
static inline int64_t ln_blocks(int64_t rows, int64_t least, int64_t per_sm)
{
    return cuda_chunks(rows, least, VEC_SMS * (per_sm < 1 ? 1 : per_sm > 16 ? 16 : per_sm));
}

#endif
