/* cuda_attn_keys: gradients of keys and values, the second half of cuda_attn_bwd. A warp owns 16
 * keys: the scores are transposed, keys by queries. Queries and d_o of the head lie in shared
 * memory, all of them where they fit, else part after part. */
#include "kernels/cuda/cuda_attn.cuh"

/* Warps of a block of threads, at most: two blocks fill a multiprocessor. */
#define KEY_WARPS(w) ((w) <= 80 ? 6 : 4)

/* A warp's 16 keys. */
template <int W> struct key_tile {
    uint32_t k[W / 16][4], v[W / 16][4];
    float dk[W / 8][4], dv[W / 8][4];
};

/* Where the queries are for this lane: as right factor of scores and of sums, and the columns' own
 * numbers; d_o is W further. first: the block that lies there. */
struct key_queries {
    const md_bf16 *q, *q_sum, *own;
    const uint4 *rel;
    int first;
    float scale;
};

/* What the queries bring, lse (in base 2) and delta, lies behind their rows. */
template <int W> MD_DEV float2 *key_own(md_bf16 *row)
{
    return reinterpret_cast<float2 *>(row + 2 * W);
}

/* One block of queries. Rows are keys: those beyond the tokens go nowhere; queries beyond them are
 * zeros, and so are their d_o. word: of the bias of this block, then of the one after it. */
template <int W, bool REL>
MD_DEV void key_step(key_tile<W> &t, const key_queries &k, uint4 &word, int block)
{
    const int offset = (block - k.first) * ATTN_BLOCK * ATTN_ROW(W);
    float s[2][4] = {}, dp[2][4] = {}, bias[2][4] = {};
#pragma unroll
    for (int c = 0; c < W / 16; c++) {
        attn_scores(s, t.k[c], k.q + offset + 16 * c);
        attn_scores(dp, t.v[c], k.q + offset + 16 * c + W);
    }
    if (REL)
        attn_bias(bias, word);
    uint32_t factor[W / 16][4];
    attn_factors<W>(factor, k.q_sum + offset + W);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float2 own =
                *reinterpret_cast<const float2 *>(k.own + offset + (8 * h + j) * ATTN_ROW(W));
            attn_gradient(s[h][j], dp[h][j], bias[h][j] * MD_LOG2E - own.x, k.scale, own.y);
            attn_gradient(s[h][j + 2], dp[h][j + 2], bias[h][j + 2] * MD_LOG2E - own.x, k.scale,
                          own.y);
        }
    if (REL)
        word = k.rel[(block + 1) * MD_WARP];
    uint32_t p[4], ds[4];
    attn_round(p, s);
    attn_round(ds, dp);
#pragma unroll
    for (int n = 0; n < W / 16; n++) { /* each of the factors of dk when one of dv's is through */
        attn_add(t.dv, n, p, factor[n]);
        md_ldmatrix_trans(factor[n], k.q_sum + offset + 16 * n);
    }
    attn_sum_of<W>(t.dk, ds, factor);
}

/* Begins to read a tile's keys and values, which key_begin waits for. */
template <int W>
MD_DEV void key_load(key_tile<W> &t, const attn_bwd_args &a, int image, int head, int first)
{
    const int lane = attn_thread() % MD_WARP;
    attn_rows from = {a.qkv + attn_at(a.d, image, head, 3 * a.d.row) + a.d.row, 3 * a.d.row, first,
                      ATTN_BLOCK};
    attn_load<W>(t.k, from, a.d, lane);
    from.from += a.d.row;
    attn_load<W>(t.v, from, a.d, lane);
}

template <int W> MD_DEV void key_begin(key_tile<W> &t)
{
    attn_left<W>(t.k);
    attn_left<W>(t.v);
#pragma unroll
    for (int n = 0; n < W / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            t.dk[n][i] = t.dv[n][i] = 0.0f;
}

/* Starts the copy of `count` rows of queries, d_o, lse and delta, from block k.first on, into
 * shared memory. */
template <int W>
MD_DEV void key_fetch(const attn_bwd_args &a, int image, int head, const key_queries &k, int count)
{
    const int first = k.first * ATTN_BLOCK;
    md_bf16 *to = reinterpret_cast<md_bf16 *>(md_smem());
    const float2 *own = a.own + ((int64_t)image * a.d.heads + head) * a.d.tokens + first;
#pragma unroll 1
    for (int i = attn_thread(); i < count; i += (int)blockDim.x)
        md_async_copy8(key_own<W>(to + i * ATTN_ROW(W)), own + i, first + i < a.d.tokens);
    attn_pair from = {{a.qkv + attn_at(a.d, image, head, 3 * a.d.row),
                       a.d_o + attn_at(a.d, image, head, a.d.row)},
                      {3 * a.d.row, a.d.row},
                      first,
                      count};
    attn_fetch<W, 10>(to, from, a.d);
    md_async_commit();
}

template <int W>
MD_DEV void key_end(const attn_bwd_args &a, const key_tile<W> &t, int image, int head, int first)
{
    const float scale[2] = {a.d.scale, a.d.scale}, one[2] = {1.0f, 1.0f};
    md_bf16 *to = a.dqkv + attn_at(a.d, image, head, 3 * a.d.row) + a.d.row;
    attn_rows rows = {nullptr, 3 * a.d.row, first, ATTN_BLOCK};
    attn_write<W>(to, t.dk, rows, a.d, scale);
    attn_write<W>(to + a.d.row, t.dv, rows, a.d, one);
}

template <int W, bool REL> MD_KERNEL(ATTN_BOUNDS(KEY_WARPS(W), 2)) attn_bwd_keys(attn_bwd_args a)
{
    const attn_dims &d = a.d;
    const int head = (int)blockIdx.x % d.heads, image = (int)blockIdx.x / d.heads;
    const int blocks = (d.tokens + ATTN_BLOCK - 1) / ATTN_BLOCK;
    const int warps = (int)blockDim.x / MD_WARP;
    const int warp = W > 64 ? attn_warp() : (int)threadIdx.x / MD_WARP; /* no spills with either */
    md_bf16 *q = reinterpret_cast<md_bf16 *>(md_smem());
    key_queries k = {attn_scores_at<W>(q),
                     attn_sum_at<W>(q),
                     q + (int)threadIdx.x % 4 * 2 * ATTN_ROW(W) + 2 * W,
                     nullptr,
                     0,
                     a.scale};
    key_tile<W> t;
    if (warp < blocks)
        key_load<W>(t, a, image, head, warp * ATTN_BLOCK);
    key_fetch<W>(a, image, head, k, MD_MIN(a.resident, blocks) * ATTN_BLOCK);
    for (int round = 0; round < blocks; round += warps) {
        const int tile = round + warp;
        uint4 word = {};
        if (REL && tile < blocks) {
            k.rel = a.rel + ((int64_t)(d.heads + head) * blocks + tile) * blocks * MD_WARP +
                    attn_thread() % MD_WARP;
            word = *k.rel;
        }
        if (tile < blocks)
            key_begin<W>(t);
        for (k.first = 0; k.first < blocks; k.first += a.resident) {
            const int end = k.first + a.resident < blocks ? k.first + a.resident : blocks;
            if (k.first > 0 || (round > 0 && blocks > a.resident)) {
                md_barrier();
                key_fetch<W>(a, image, head, k, (end - k.first) * ATTN_BLOCK);
            }
            if (round == 0 || blocks > a.resident) {
                md_async_wait<0>();
                md_barrier();
            }
#pragma unroll 1
            for (int block = k.first; tile < blocks && block < end; block++)
                key_step<W, REL>(t, k, word, block);
        }
        if (tile + warps < blocks)
            key_load<W>(t, a, image, head, (tile + warps) * ATTN_BLOCK);
        if (tile < blocks)
            key_end<W>(a, t, image, head, tile * ATTN_BLOCK);
    }
}

/* ---- host ---- */

typedef void (*keys_kernel)(attn_bwd_args);

static keys_kernel kernel_of(int width, bool rel)
{
    switch (width) {
#define CASE(w) \
    case w:     \
        return rel ? attn_bwd_keys<w, true> : attn_bwd_keys<w, false>;
        ATTN_WIDTHS(CASE)
#undef CASE
    }
    return nullptr;
}

md_status attn_keys_setup(void)
{
#define ALLOW(w)                                                                           \
    MD_TRY(cuda_ok(MD_ALLOW_SMEM((attn_bwd_keys<w, false>), ATTN_SMEM), "shared memory")); \
    MD_TRY(cuda_ok(MD_ALLOW_SMEM((attn_bwd_keys<w, true>), ATTN_SMEM), "shared memory"));
    ATTN_WIDTHS(ALLOW)
#undef ALLOW
    return MD_OK;
}

void attn_keys(const md_backend *be, attn_bwd_args k)
{
    const int blocks = attn_blocks(k.d), warps = attn_warps(blocks, KEY_WARPS(k.d.width));
    const int block_bytes = ATTN_BLOCK * ATTN_ROW(k.d.width) * (int)sizeof(md_bf16);
    k.resident = MD_MIN(blocks, ATTN_SMEM / block_bytes);
    keys_kernel kernel = kernel_of(k.d.width, k.rel != nullptr);
    MD_LAUNCH(kernel, k.d.heads * k.d.images, warps * MD_WARP, k.resident * block_bytes,
              cuda_stream(be), k);
}
