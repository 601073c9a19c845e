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

/* Element `col` of row `row`. */
MD_DEV int64_t md_ln_at(int row, int cols, int col)
{
    return (int64_t)row * cols + col;
}

/* The vectors of the rows [row, end) of R, the first at element `at`. Absent operands and rows are
 * zeros. */
template <int R, class T>
MD_DEV void md_read_rows(const T *p, int row, int end, int64_t at, int64_t cols, uint4 (&x)[R])
{
#pragma unroll
    for (int i = 0; i < R; i++)
        x[i] = p && row + i < end ? *reinterpret_cast<const uint4 *>(p + at + i * cols)
                                  : make_uint4(0, 0, 0, 0);
}

/* The images of rows: `tokens` rows each. keep, from and to of an image as residual_ln has them;
 * without any of them all rows are one image. */
struct md_ln_images {
    const float *keep;
    const int32_t *from, *to;
    int images, tokens;
};

/* One image, and a row of it, for going through rows one after the other: what is known of an image
 * is read once. */
struct md_ln_cursor {
    int image, token, from, to;
    float keep;
};

MD_DEV void md_cursor_read(md_ln_cursor &c, const md_ln_images &k)
{
    if (c.image >= k.images)
        return;
    c.keep = k.keep ? k.keep[c.image] : 1.0f;
    c.from = k.from ? k.from[c.image] : c.image;
    c.to = k.to ? k.to[c.image] : c.image;
}

MD_DEV void md_cursor_begin(md_ln_cursor &c, const md_ln_images &k, int row)
{
    c.image = row / k.tokens;
    c.token = row - c.image * k.tokens;
    md_cursor_read(c, k);
}

/* Of R rows: the factor of the branch, and the row in the branch and in y; -1: not there. */
template <int R> struct md_ln_places {
    float keep[R];
    int from[R], to[R];
};

/* Those of the rows [row, end) of R; the cursor is at `row` and goes on. */
template <int R>
MD_DEV void md_places_of(md_ln_cursor &c, const md_ln_images &k, int row, int end,
                         md_ln_places<R> &p)
{
#pragma unroll
    for (int i = 0; i < R; i++) {
        const bool there = row + i < end;
        p.keep[i] = c.keep;
        p.from[i] = there && c.from >= 0 ? c.from * k.tokens + c.token : -1;
        p.to[i] = there && c.to >= 0 ? c.to * k.tokens + c.token : -1;
        if (++c.token == k.tokens) {
            c.token = 0;
            c.image++;
            md_cursor_read(c, k);
        }
    }
}

/* As md_read_rows, of the rows at[i]. */
template <int R, class T>
MD_DEV void md_read_places(const T *p, const int (&at)[R], int col, int cols, uint4 (&x)[R])
{
#pragma unroll
    for (int i = 0; i < R; i++)
        x[i] = p && at[i] >= 0 ? *reinterpret_cast<const uint4 *>(p + md_ln_at(at[i], cols, col))
                               : make_uint4(0, 0, 0, 0);
}

/* First of `rows` rows that block `block` has. */
MD_DEV int md_ln_first(int rows, unsigned block)
{
    return (int)((int64_t)rows * block / gridDim.x);
}

/* What a kernel takes of the operands. */
static inline md_status ln_images(md_op op, const md_tensor *keep, const md_tensor *from,
                                  const md_tensor *to, const md_tensor *x, md_ln_images *out)
{
    const int64_t rows = md_tensor_rows(x), cols = md_tensor_cols(x);
    const md_tensor *index = keep ? keep : from ? from : to;
    const int64_t images = index ? md_tensor_count(index) : 1;
    if (rows > INT32_MAX - LN_BLOCK || cols > INT32_MAX - LN_BLOCK)
        MD_FAIL(MD_ERR_BUG, "%s: %lld rows of %lld", md_op_name(op), (long long)rows,
                (long long)cols);
    out->keep = cuda_data<const float>(keep);
    out->from = cuda_data<const int32_t>(from);
    out->to = cuda_data<const int32_t>(to);
    out->images = (int)images;
    out->tokens = images && rows ? (int)(rows / images) : 1;
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

/* Blocks for rows of which each takes at least `least`, so many on each multiprocessor. */
static inline int64_t ln_blocks(int64_t rows, int64_t least, int64_t per_sm)
{
    return cuda_chunks(rows, least, VEC_SMS * (per_sm < 1 ? 1 : per_sm > 16 ? 16 : per_sm));
}

#endif
