/* cuda_attn: softmax attention with an additive bias, forward, in bf16 on tensor cores.
 *
 * One block of threads has one (image, head): its keys and values lie in shared memory, all of them
 * where they fit, else part after part. Each warp takes 16 queries at a time through the keys, 64
 * keys at a step, with a running maximum and denominator (Milakov and Gimelshein 2018; Dao 2023).
 * The running maximum follows the true one only when that has grown by more than LAZY: the sums
 * are rescaled rarely, and the probabilities of a row stay below e^LAZY. */
#include "kernels/cuda/cuda_attn.cuh"

#define LAZY 5.5f

struct fwd_args {
    attn_dims d;
    const md_bf16 *qkv;
    const uint4 *rel; /* in the order of the lanes */
    md_bf16 *o;
    float *lse;
    int part; /* blocks of keys in shared memory */
};

/* Warps of a block of threads, at most: two blocks' registers fill a multiprocessor. Blocks of keys
 * at a step. */
#define FWD_WARPS(w) ((w) <= 80 ? 6 : 4)
#define FWD_STEP     4

/* A warp's 16 queries; max, sum: of rows g and g + 8, sum over this lane's columns only. */
template <int W> struct fwd_tile {
    uint32_t q[W / 16][4];
    float acc[W / 8][4], max[2], sum[2];
};

/* Where the keys are for this lane; first: the block that lies at k, v; tokens: of the mask. */
struct fwd_keys {
    const md_bf16 *k, *v;
    const uint4 *rel;
    int first, tokens;
    float scale;
};

template <int W> MD_DEV void fwd_rescale(fwd_tile<W> &t, const float (&top)[2])
{
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        factor[r] = 1.0f;
        if (top[r] > t.max[r] + LAZY) {
            factor[r] = md_exp(t.max[r] - top[r]);
            t.max[r] = top[r];
        }
        t.sum[r] *= factor[r];
    }
#pragma unroll
    for (int n = 0; n < W / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            t.acc[n][i] *= factor[i / 2];
}

/* Scores to logits in place; largest of each row in top. */
template <bool REL>
MD_DEV void fwd_logits(float (&s)[2][4], const uint4 &word, const fwd_keys &k, int block,
                       float (&top)[2])
{
    float bias[2][4] = {};
    if (REL)
        attn_bias(bias, word);
    bool cut = !REL && ATTN_BLOCK * (block + 1) > k.tokens;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[h][i] = s[h][i] * k.scale + bias[h][i];
            if (cut && attn_column(block, h, i) >= k.tokens)
                s[h][i] = -INFINITY;
            top[i / 2] = fmaxf(top[i / 2], s[h][i]);
        }
}

/* N blocks of keys, from `block` of the head. */
template <int W, bool REL, int N> MD_DEV void fwd_step(fwd_tile<W> &t, const fwd_keys &k, int block)
{
    int offset = (block - k.first) * ATTN_BLOCK * ATTN_ROW(W);
    float s[N][2][4] = {};
    uint4 word[N] = {};
    if (REL) {
#pragma unroll
        for (int n = 0; n < N; n++)
            word[n] = k.rel[(block + n) * MD_WARP];
    }
#pragma unroll
    for (int c = 0; c < W / 16; c++)
#pragma unroll
        for (int n = 0; n < N; n++)
            attn_scores(s[n], t.q[c], k.k + offset + n * ATTN_BLOCK * ATTN_ROW(W) + 16 * c);
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < N; n++)
        fwd_logits<REL>(s[n], word[n], k, block + n, top);
    top[0] = attn_quad_max(top[0]);
    top[1] = attn_quad_max(top[1]);
    if (top[0] > t.max[0] + LAZY || top[1] > t.max[1] + LAZY)
        fwd_rescale(t, top);
    const float shift[2] = {t.max[0] * MD_LOG2E, t.max[1] * MD_LOG2E};
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][h][i] = md_exp2(s[n][h][i] * MD_LOG2E - shift[i / 2]);
                t.sum[i / 2] += s[n][h][i];
            }
        uint32_t p[4];
        attn_round(p, s[n]);
        attn_sum<W>(t.acc, p, k.v + offset + n * ATTN_BLOCK * ATTN_ROW(W));
    }
}

/* Begins to read a tile's queries, which fwd_begin waits for. */
template <int W> MD_DEV void fwd_load(fwd_tile<W> &t, attn_rows q, const attn_dims &d, int tile)
{
    q.first = tile * ATTN_BLOCK;
    attn_load<W>(t.q, q, d, attn_thread() % MD_WARP);
}

template <int W> MD_DEV void fwd_begin(fwd_tile<W> &t)
{
    attn_left<W>(t.q);
#pragma unroll
    for (int n = 0; n < W / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            t.acc[n][i] = 0.0f;
    t.max[0] = t.max[1] = -INFINITY;
    t.sum[0] = t.sum[1] = 0.0f;
}

/* Output and denominators of a warp's queries, from row `first` on. */
template <int W>
MD_DEV void fwd_end(const fwd_args &a, fwd_tile<W> &t, int image, int head, int first)
{
    const attn_dims &d = a.d;
    int lane = (int)threadIdx.x % MD_WARP;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = attn_quad_sum(t.sum[r]);
        int row = first + lane / 4 + 8 * r;
        factor[r] = 1.0f / sum;
        if (a.lse && lane % 4 == 0 && row < d.tokens)
            a.lse[((int64_t)image * d.heads + head) * d.tokens + row] = t.max[r] + logf(sum);
    }
    attn_rows to = {nullptr, d.row, first, ATTN_BLOCK};
    attn_write<W>(a.o + attn_at(d, image, head, d.row), t.acc, to, d, factor);
}

template <int W, bool REL> MD_KERNEL(ATTN_BOUNDS(FWD_WARPS(W), 2)) attn_fwd(fwd_args a)
{
    const attn_dims d = a.d;
    const int head = (int)blockIdx.x % d.heads, image = (int)blockIdx.x / d.heads;
    const int blocks = (d.tokens + ATTN_BLOCK - 1) / ATTN_BLOCK;
    const int warps = (int)blockDim.x / MD_WARP, warp = attn_warp();
    md_bf16 *keys = reinterpret_cast<md_bf16 *>(md_smem());
    attn_rows q = {a.qkv + attn_at(d, image, head, 3 * d.row), 3 * d.row, 0, ATTN_BLOCK};
    fwd_keys k = {attn_scores_at<W>(keys), attn_sum_at<W>(keys + W), a.rel, 0, d.tokens, d.scale};
    fwd_tile<W> t;
    if (warp < blocks)
        fwd_load<W>(t, q, d, warp);
    for (int round = 0; round < blocks; round += warps) {
        const int tile = round + warp;
        if (REL)
            k.rel = a.rel + ((int64_t)head * blocks + tile) * blocks * MD_WARP +
                    (int)threadIdx.x % MD_WARP;
        for (k.first = 0; k.first < blocks; k.first += a.part) {
            const int end = k.first + a.part < blocks ? k.first + a.part : blocks;
            const bool fetch = round == 0 || blocks > a.part;
            if (fetch) {
                md_barrier();
                attn_pair from = {{q.from + d.row, q.from + 2 * d.row},
                                  {3 * d.row, 3 * d.row},
                                  k.first * ATTN_BLOCK,
                                  (end - k.first) * ATTN_BLOCK};
                attn_fetch<W, 10>(keys, from, d);
                md_async_commit();
            }
            if (k.first == 0 && tile < blocks)
                fwd_begin<W>(t);
            if (fetch) {
                md_async_wait<0>();
                md_barrier();
            }
            if (tile >= blocks)
                continue;
            int block = k.first;
#pragma unroll 1
            for (; block + FWD_STEP <= end; block += FWD_STEP)
                fwd_step<W, REL, FWD_STEP>(t, k, block);
#pragma unroll 1
            for (; block < end; block++)
                fwd_step<W, REL, 1>(t, k, block);
        }
        if (tile + warps < blocks)
            fwd_load<W>(t, q, d, tile + warps);
        if (tile < blocks)
            fwd_end<W>(a, t, image, head, tile * ATTN_BLOCK);
    }
}

struct arrange_args {
    const md_bf16 *rel;
    uint4 *out;
    int tokens, blocks, words; /* words: of one form */
    bool both;
};

/* A lane's word of the 16 x 16 block at column `col` of a strip of 16 queries in shared memory,
 * whose rows are `stride` long; transposed: keys are the rows. Keys beyond the tokens get the mask,
 * queries beyond them are zeros. */
MD_DEV uint4 arrange_word(const uint16_t *strip, int stride, int col, bool transposed)
{
    const int lane = (int)threadIdx.x % MD_WARP, g = lane / 4, t = lane % 4 * 2;
    uint32_t out[4];
    for (int i = 0; i < 4; i++) {
        uint32_t half[2];
        for (int j = 0; j < 2; j++) {
            const int r = g + i % 2 * 8, c = t + i / 2 * 8 + j;
            half[j] = transposed ? strip[c * stride + col + r] : strip[r * stride + col + c];
        }
        out[i] = half[0] | half[1] << 16;
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

/* Blocks of keys of a strip. */
#define ARRANGE_BLOCKS 32

/* A strip of 16 queries of a head, by way of shared memory, in one form or both; its part of the
 * keys by blockIdx.y. */
MD_KERNEL(256) attn_arrange_rel(arrange_args a)
{
    const int stride = ARRANGE_BLOCKS * ATTN_BLOCK + 2, warps = (int)blockDim.x / MD_WARP;
    uint16_t *strip = reinterpret_cast<uint16_t *>(md_smem());
    const int tile = (int)blockIdx.x % a.blocks, head = (int)blockIdx.x / a.blocks;
    const int first = (int)blockIdx.y * ARRANGE_BLOCKS, lane = (int)threadIdx.x % MD_WARP;
    const int count = a.blocks - first < ARRANGE_BLOCKS ? a.blocks - first : ARRANGE_BLOCKS;
    const md_bf16 *rel = a.rel + (int64_t)head * a.tokens * a.tokens;
    for (int i = (int)threadIdx.x; i < ATTN_BLOCK * count * ATTN_BLOCK; i += (int)blockDim.x) {
        const int row = i / (count * ATTN_BLOCK), col = i % (count * ATTN_BLOCK);
        const int query = tile * ATTN_BLOCK + row, key = first * ATTN_BLOCK + col;
        strip[row * stride + col] = key >= a.tokens     ? (uint16_t)0xff80u /* -inf */
                                    : query >= a.tokens ? (uint16_t)0
                                                        : rel[(int64_t)query * a.tokens + key].bits;
    }
    md_barrier();
    const int64_t head_at = (int64_t)head * a.blocks * a.blocks;
    for (int n = (int)threadIdx.x / MD_WARP; n < count; n += warps) {
        a.out[(head_at + tile * a.blocks + first + n) * MD_WARP + lane] =
            arrange_word(strip, stride, n * ATTN_BLOCK, false);
        if (a.both)
            a.out[a.words + (head_at + (first + n) * a.blocks + tile) * MD_WARP + lane] =
                arrange_word(strip, stride, n * ATTN_BLOCK, true);
    }
}

/* ---- host ---- */

void attn_arrange(const md_backend *be, const attn_dims &d, const md_bf16 *rel, uint4 *out,
                  bool both)
{
    arrange_args a = {rel, out, d.tokens, attn_blocks(d), (int)attn_rel_words(d), both};
    const size_t strip = ATTN_BLOCK * (ARRANGE_BLOCKS * ATTN_BLOCK + 2) * sizeof(uint16_t);
    const dim3 grid((unsigned)(d.heads * a.blocks), (unsigned)cuda_ceil(a.blocks, ARRANGE_BLOCKS));
    MD_LAUNCH(attn_arrange_rel, grid, 256, strip, cuda_stream(be), a);
}

typedef void (*fwd_kernel)(fwd_args);

static fwd_kernel kernel_of(int width, bool rel)
{
    switch (width) {
#define CASE(w) \
    case w:     \
        return rel ? attn_fwd<w, true> : attn_fwd<w, false>;
        ATTN_WIDTHS(CASE)
#undef CASE
    }
    return nullptr;
}

md_status cuda_attn_setup(void)
{
#define ALLOW(w)                                                                      \
    MD_TRY(cuda_ok(MD_ALLOW_SMEM((attn_fwd<w, false>), ATTN_SMEM), "shared memory")); \
    MD_TRY(cuda_ok(MD_ALLOW_SMEM((attn_fwd<w, true>), ATTN_SMEM), "shared memory"));
    ATTN_WIDTHS(ALLOW)
#undef ALLOW
    return attn_bwd_setup();
}

md_status attn_check(md_op op, const md_tensor *qkv, const md_tensor *rel, const md_tensor *lse,
                     int heads)
{
    if (heads < 1 || qkv->dim[2] / 3 % heads != 0 || (rel && rel->dim[0] != heads) ||
        (lse && lse->dim[1] != heads))
        MD_FAIL(MD_ERR_BUG, "%s: %d heads do not fit width %lld or the other operands",
                md_op_name(op), heads, (long long)(qkv->dim[2] / 3));
    return MD_OK;
}

size_t cuda_attention_scratch(md_backend *be, const md_attention_args *a)
{
    (void)be;
    if (!a->rel || !attn_tensor_cores(a->qkv, a->heads))
        return 0;
    return sizeof(uint4) * (size_t)attn_rel_words(attn_dims_of(a->qkv, a->heads, a->scale));
}

md_status cuda_attention(md_backend *be, const md_attention_args *a)
{
    CUDA_CHECK(attention, a);
    MD_TRY(attn_check(MD_OP_attention, a->qkv, a->rel, a->lse, a->heads));
    if (a->accumulate)
        MD_FAIL(MD_ERR_BUG, "attention: it does not accumulate");
    if (!attn_tensor_cores(a->qkv, a->heads) || !attn_aligned(a->qkv) || !attn_aligned(a->o))
        return attn_plain(be, a);
    const attn_dims d = attn_dims_of(a->qkv, a->heads, a->scale);
    void *scratch = nullptr;
    if (a->rel) {
        MD_TRY(cuda_scratch(be, MD_OP_attention, cuda_attention_scratch(be, a), &scratch));
        attn_arrange(be, d, cuda_data<md_bf16>(a->rel), static_cast<uint4 *>(scratch), false);
    }
    const int blocks = attn_blocks(d);
    const int block_bytes = ATTN_BLOCK * ATTN_ROW(d.width) * (int)sizeof(md_bf16);
    fwd_args k = {d,
                  cuda_data<md_bf16>(a->qkv),
                  static_cast<const uint4 *>(scratch),
                  cuda_data<md_bf16>(a->o),
                  cuda_data<float>(a->lse),
                  MD_MIN(blocks, ATTN_SMEM / block_bytes)};
    const int warps = attn_warps(blocks, FWD_WARPS(d.width));
    fwd_kernel kernel = kernel_of(d.width, a->rel != nullptr);
    MD_LAUNCH(kernel, d.images * d.heads, warps * MD_WARP, k.part * block_bytes, cuda_stream(be),
              k);
    return cuda_launched(MD_OP_attention);
}
