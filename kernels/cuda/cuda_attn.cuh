/* cuda_attn: what the attention kernels share.
 *
 * bf16 kernels cut tokens into blocks of 16. A warp owns 16 rows of the scores of one (image, head)
 * and walks over the blocks of columns; scores and probabilities stay in the registers that the
 * tensor cores leave them in (md_mma: lane = 4 g + t has rows g, g + 8 and columns 2t, 2t + 1 of
 * every eight). Rows beyond the tokens are zeros in shared memory and in registers; columns of keys
 * beyond them get the logit -inf.
 *
 * The bias has odd rows (T = 257), which no wide load fits, and all images read it: it is first
 * written into scratch in the order of the lanes, one 16-byte word for a lane and a 16 x 16 block,
 * with the mask of the last block in it. */
#ifndef MD_CUDA_ATTN_CUH
#define MD_CUDA_ATTN_CUH

#include "kernels/cuda/cuda_internal.h"

#define ATTN_BLOCK 16

/* Head widths of the bf16 kernels. */
#define ATTN_WIDTHS(X) X(16) X(32) X(48) X(64) X(80) X(96) X(112)

/* Shared memory of a block of threads that any GPU of compute capability 8.0 and later has, less
 * than half of what the larger ones have, so that two blocks share a multiprocessor. */
#define ATTN_SMEM 100352

/* For MD_KERNEL: so many warps in a block of threads, and so many blocks on a multiprocessor at the
 * same time, which bounds the registers. */
#define ATTN_BOUNDS(warps, blocks) MD_WARP *(warps), blocks

struct attn_dims {
    int images, tokens, heads, width; /* width: of a head */
    int row;                          /* heads * width: of o; a row of qkv has three of it */
    float scale;
};

/* What the two kernels of the backward pass take. */
struct attn_bwd_args {
    attn_dims d;
    const md_bf16 *qkv, *o, *d_o;
    const uint4 *rel; /* in the order of the lanes, then its transpose */
    const float *lse;
    md_bf16 *dqkv;
    float2 *own; /* [B, H, T]: lse in base 2, and delta */
    float *part;
    int chunks, groups; /* of images, of queries */
    int stages;         /* of an image's keys */
    int resident;       /* blocks of queries in shared memory */
    float scale;        /* of the logits in base 2 */
};

/* ---- host ---- */

static inline attn_dims attn_dims_of(const md_tensor *qkv, int heads, float scale)
{
    attn_dims d;
    d.images = (int)qkv->dim[0];
    d.tokens = (int)qkv->dim[1];
    d.heads = heads;
    d.width = (int)(qkv->dim[2] / 3 / heads);
    d.row = d.heads * d.width;
    d.scale = scale;
    return d;
}

static inline int attn_blocks(const attn_dims &d)
{
    return (d.tokens + ATTN_BLOCK - 1) / ATTN_BLOCK;
}

/* The bf16 kernels have this width. They read 16 bytes at a time. */
static inline bool attn_tensor_cores(const md_tensor *qkv, int heads)
{
    const int64_t width = qkv->dim[2] / 3 / heads;
#define IS_WIDTH(w) width == (w) ||
    return cuda_is_bf16(qkv) && (ATTN_WIDTHS(IS_WIDTH) false);
#undef IS_WIDTH
}

static inline bool attn_aligned(const md_tensor *t)
{
    return (reinterpret_cast<uintptr_t>(t->data) & 15) == 0;
}

/* Words of the bias in the order of the lanes, one form of it. */
static inline int64_t attn_rel_words(const attn_dims &d)
{
    int64_t n = attn_blocks(d);
    return d.heads * n * n * MD_WARP;
}

static inline size_t attn_line(size_t bytes)
{
    return (bytes + 255) & ~(size_t)255;
}

/* Warps of a block of threads that has `most` at most, when each warp takes one of `tiles` after
 * the other: as many as leave the fewest idle in the last round. */
static inline int attn_warps(int tiles, int most)
{
    int rounds = (tiles + most - 1) / most;
    return (tiles + rounds - 1) / rounds;
}

/* Heads, or the wrong operands: what the shape table cannot say. */
md_status attn_check(md_op op, const md_tensor *qkv, const md_tensor *rel, const md_tensor *lse,
                     int heads);

/* rel in the order of the lanes into out (attn_rel_words), then, with both, that of its transpose.
 */
void attn_arrange(const md_backend *be, const attn_dims &d, const md_bf16 *rel, uint4 *out,
                  bool both);

md_status attn_bwd_setup(void);
md_status attn_keys_setup(void);

/* dk and dv; delta is there. */
void attn_keys(const md_backend *be, attn_bwd_args k);

/* The kernels for f32, and for what the bf16 kernels cannot do. */
md_status attn_plain(md_backend *be, const md_attention_args *a);

/* delta f32 [B, H, T], with as much room behind it; part f32 [chunks, H, T, T], NULL without drel.
 */
struct attn_bwd_room {
    float *delta, *part;
    int chunks;
};
md_status attn_plain_bwd(md_backend *be, const md_attention_bwd_args *a, const attn_bwd_room &room);

/* ---- device ---- */

/* First element of an image's head in a matrix whose rows are `row` wide. */
MD_DEV int64_t attn_at(const attn_dims &d, int image, int head, int row)
{
    return (int64_t)image * d.tokens * row + head * d.width;
}

/* Elements of a row in shared memory: those of two matrices side by side (keys and values, or
 * queries and d_o), then eight more, so that the rows of an ldmatrix lie in different banks. */
#define ATTN_ROW(w) (2 * (w) + 8)

/* threadIdx.x, fetched anew: addresses that come from it are computed where they are used, and do
 * not sit in registers through the loops of products. All 32 lanes. */
MD_DEV int attn_thread()
{
    return md_shfl((int)threadIdx.x, (int)threadIdx.x % MD_WARP);
}

/* Number of the warp, in a form in which the compiler sees that its lanes agree. */
MD_DEV int attn_warp()
{
    return md_shfl((int)threadIdx.x / MD_WARP, 0);
}

/* Rows [first, first + count) of a head's matrix. */
struct attn_rows {
    const md_bf16 *from;
    int stride, first, count;
};

/* Rows [first, first + count) of two of a head's matrices, which lie side by side in shared memory.
 */
struct attn_pair {
    const md_bf16 *from[2];
    int stride[2], first, count;
};

/* Starts copies of rows into shared memory, all threads of the block together; zeros beyond the
 * tokens. A thread has 16 bytes of every so-many-th row; those that are left over have none. A
 * copy holds its addresses until the memory has them, so U of them have registers. */
template <int W, int U> MD_DEV void attn_fetch(md_bf16 *to, const attn_pair &r, const attn_dims &d)
{
    const int step = (int)blockDim.x / (W / 4), thread = attn_thread();
    const int begin = thread / (W / 4), col = thread % (W / 4) * 8, second = col >= W;
    const int stride = second ? r.stride[1] : r.stride[0];
    const md_bf16 *from = (second ? r.from[1] - W : r.from[0]) + r.first * stride + col;
    if (begin >= step)
        return;
    for (int first = begin; first < r.count; first += U * step) {
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int row = first + u * step;
            if (row < r.count)
                md_async_copy16(to + row * ATTN_ROW(W) + col, from + row * stride,
                                r.first + row < d.tokens);
        }
    }
}

/* Brings a warp's 16 rows near, 32 bytes a lane at a time. */
template <int W> MD_DEV void attn_prefetch(const attn_rows &r, const attn_dims &d, int lane)
{
#pragma unroll
    for (int part = 0; part < W; part += MD_WARP) {
        const int i = part + lane, row = r.first + i / (W / 16);
        if (i < W && row < d.tokens)
            md_prefetch(r.from + row * r.stride + i % (W / 16) * 16);
    }
}

/* Turns a 4 x 4 matrix that lies over four lanes: word j of lane 4 g + t becomes word t of lane
 * 4 g + j. All 32 lanes. */
MD_DEV void attn_turn(uint32_t (&w)[4])
{
    const int lane = (int)threadIdx.x % MD_WARP;
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        const bool high = (lane & bit) != 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit)
                continue;
            const uint32_t other = md_shfl_xor(high ? w[i] : w[i | bit], bit);
            w[i | bit] = high ? w[i | bit] : other;
            w[i] = high ? other : w[i];
        }
    }
}

/* The row among a warp's 16 and the first column among 16 of the 16 bytes that a lane reads or
 * writes; attn_turn makes of these bytes the factor of a product, and of its result these bytes. */
MD_DEV int attn_lane_row(int lane)
{
    return lane / 4 + lane % 2 * 8;
}

MD_DEV int attn_lane_column(int lane)
{
    return lane % 4 / 2 * 8;
}

/* A warp's 16 rows, 16 bytes a lane for every 16 columns; zeros beyond the tokens. */
template <int W>
MD_DEV void attn_load(uint32_t (&a)[W / 16][4], const attn_rows &r, const attn_dims &d, int lane)
{
    const int row = r.first + attn_lane_row(lane);
    const bool there = row < d.tokens;
    const md_bf16 *from = r.from + (there ? row : 0) * r.stride + attn_lane_column(lane);
#pragma unroll
    for (int k = 0; k < W / 16; k++) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (there)
            x = md_load16(from + 16 * k);
        a[k][0] = x.x, a[k][1] = x.y, a[k][2] = x.z, a[k][3] = x.w;
    }
}

/* A warp's 16 rows as the left factor of products, from what attn_load gave. */
template <int W> MD_DEV void attn_left(uint32_t (&a)[W / 16][4])
{
#pragma unroll
    for (int k = 0; k < W / 16; k++)
        attn_turn(a[k]);
}

/* Writes a warp's 16 rows of sums, times a factor for rows g and g + 8. */
template <int W>
MD_DEV void attn_write(md_bf16 *to, const float (&acc)[W / 8][4], const attn_rows &r,
                       const attn_dims &d, const float (&factor)[2])
{
    const int lane = attn_thread() % MD_WARP, row = r.first + attn_lane_row(lane);
    to += row * r.stride + attn_lane_column(lane);
#pragma unroll
    for (int k = 0; k < W / 16; k++) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float(&x)[4] = acc[2 * k + i / 2];
            w[i] = md_pack(x[i % 2 * 2] * factor[i % 2], x[i % 2 * 2 + 1] * factor[i % 2]);
        }
        attn_turn(w);
        if (row < d.tokens)
            *reinterpret_cast<uint4 *>(to + 16 * k) = make_uint4(w[0], w[1], w[2], w[3]);
    }
}

/* Where this lane points in a matrix in shared memory whose first 16 rows are the right factor of
 * attn_scores, or of attn_sum and attn_factors. */
template <int W> MD_DEV const md_bf16 *attn_scores_at(const md_bf16 *m)
{
    int lane = (int)threadIdx.x % MD_WARP;
    return m + (lane % 8 + lane / 16 * 8) * ATTN_ROW(W) + lane / 8 % 2 * 8;
}

template <int W> MD_DEV const md_bf16 *attn_sum_at(const md_bf16 *m)
{
    int lane = (int)threadIdx.x % MD_WARP;
    return m + lane % 16 * ATTN_ROW(W) + lane / 16 * 8;
}

/* s[16, 16] += a[16, 16] b^T over columns [16 k, 16 k + 16). */
MD_DEV void attn_scores(float (&s)[2][4], const uint32_t (&a)[4], const md_bf16 *b)
{
    uint32_t r[4];
    md_ldmatrix(r, b);
    md_mma(s[0], a, r[0], r[1]);
    md_mma(s[1], a, r[2], r[3]);
}

/* Columns [16 n, 16 n + 16) of acc[16, W] += p[16, 16] b[16, W], r the right factor of these. */
template <int M>
MD_DEV void attn_add(float (&acc)[M][4], int n, const uint32_t (&p)[4], const uint32_t (&r)[4])
{
    md_mma(acc[2 * n], p, r[0], r[1]);
    md_mma(acc[2 * n + 1], p, r[2], r[3]);
}

/* All columns. */
template <int W>
MD_DEV void attn_sum(float (&acc)[W / 8][4], const uint32_t (&p)[4], const md_bf16 *b)
{
#pragma unroll
    for (int n = 0; n < W / 16; n++) {
        uint32_t r[4];
        md_ldmatrix_trans(r, b + 16 * n);
        attn_add(acc, n, p, r);
    }
}

/* The same in two halves: the right factors, which are on their way while other things are done,
 * and the products. */
template <int W> MD_DEV void attn_factors(uint32_t (&r)[W / 16][4], const md_bf16 *b)
{
#pragma unroll
    for (int n = 0; n < W / 16; n++)
        md_ldmatrix_trans(r[n], b + 16 * n);
}

template <int W>
MD_DEV void attn_sum_of(float (&acc)[W / 8][4], const uint32_t (&p)[4],
                        const uint32_t (&r)[W / 16][4])
{
#pragma unroll
    for (int n = 0; n < W / 16; n++)
        attn_add(acc, n, p, r[n]);
}

/* A block of values as the left factor of the next product. */
MD_DEV void attn_round(uint32_t (&p)[4], const float (&s)[2][4])
{
    p[0] = md_pack(s[0][0], s[0][1]);
    p[1] = md_pack(s[0][2], s[0][3]);
    p[2] = md_pack(s[1][0], s[1][1]);
    p[3] = md_pack(s[1][2], s[1][3]);
}

/* A lane's word of the bias as the eight values of a block. */
MD_DEV void attn_bias(float (&x)[2][4], const uint4 &word)
{
    const uint32_t pair[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i / 2][i % 2 * 2] = md_unpack_lo(pair[i]);
        x[i / 2][i % 2 * 2 + 1] = md_unpack_hi(pair[i]);
    }
}

/* One block of scores as probabilities and gradients of the logits, from scores and gradients of
 * the probabilities: p = 2^(s scale + bias), ds = p (dp - delta); bias and scale in base 2. */
MD_DEV void attn_gradient(float &s, float &dp, float bias, float scale, float delta)
{
    s = md_exp2(s * scale + bias);
    dp = s * (dp - delta);
}

/* Column of value i of half `half` of a block. */
MD_DEV int attn_column(int block, int half, int i)
{
    return ATTN_BLOCK * block + 8 * half + (int)threadIdx.x % 4 * 2 + i % 2;
}

/* The sum over the four lanes that share a row. */
MD_DEV float attn_quad_sum(float x)
{
    x += md_shfl_xor(x, 1);
    return x + md_shfl_xor(x, 2);
}

MD_DEV float attn_quad_max(float x)
{
    x = fmaxf(x, md_shfl_xor(x, 1));
    return fmaxf(x, md_shfl_xor(x, 2));
}

#endif
