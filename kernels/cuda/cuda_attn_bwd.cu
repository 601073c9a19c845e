/* cuda_attn_bwd: gradients of softmax attention in bf16 on tensor cores. Probabilities come again
 * from lse, once for each of two kernels, so that every sum has one owner:
 *
 *   queries   A warp owns 16 queries of a head: dq, and delta = sum d_o o of its rows, which the
 *             other kernel reads beside lse. Keys and values stream through stages of shared
 *             memory. A block of threads stays with its queries for a whole chunk of images, so
 *             that the sums of dlogits over images stay in its shared memory; each chunk then
 *             writes one partial drel.
 *   keys      A warp owns 16 keys: dk and dv (cuda_attn_keys). */
#include "kernels/cuda/cuda_attn.cuh"

/* Tiles of 16 queries of a block of threads, at most; blocks of keys of a stage; stages. */
#define QUERY_WARPS(w) ((w) <= 80 ? 9 : 8)
#define QUERY_STAGE    6
#define QUERY_STAGES   2

/* Blocks of keys of a step: two where the registers hold them. */
#define QUERY_STEP(w, rel) ((rel) && (w) >= 64 ? 1 : 2)

/* Whether they also hold a word of the bias before its block's turn. */
#define QUERY_AHEAD(w) ((w) >= 64)

/* What the sums of dlogits may take of shared memory together with the stages on the largest GPU.
 */
#define QUERY_SMEM 232448

/* Bytes of the sums of a tile and a block of keys. */
#define SUMS_BLOCK (ATTN_BLOCK * ATTN_BLOCK * (int)sizeof(float))

/* A warp's 16 queries of one image; lse (in base 2) and delta of rows g and g + 8. */
template <int W> struct query_tile {
    uint32_t q[W / 16][4], g[W / 16][4];
    float dq[W / 8][4], lse[2], delta[2];
};

/* Where a stage's keys are for this lane. sums: of the tile, block 0 of the head; rel, word: the
 * next block's bias. */
struct query_keys {
    const md_bf16 *k, *k_sum;
    const uint4 *rel;
    uint4 word;
    float4 *sums;
    int tokens;
    float scale;
};

/* delta of rows g and g + 8, from rows of o and d_o as attn_load gives them. */
template <int W>
MD_DEV void query_delta(float (&delta)[2], const uint32_t (&x)[W / 16][4],
                        const uint32_t (&g)[W / 16][4], int lane)
{
    float sum = 0.0f; /* of row attn_lane_row, over this lane's columns */
#pragma unroll
    for (int k = 0; k < W / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum += md_unpack_lo(x[k][i]) * md_unpack_lo(g[k][i]) +
                   md_unpack_hi(x[k][i]) * md_unpack_hi(g[k][i]);
    sum += md_shfl_xor(sum, 2);
    const float other = md_shfl_xor(sum, 1);
    delta[0] = lane % 2 ? other : sum;
    delta[1] = lane % 2 ? sum : other;
}

template <int W>
MD_DEV void query_begin(query_tile<W> &t, const attn_bwd_args &a, int image, int head, int first)
{
    const attn_dims &d = a.d;
    const int lane = attn_thread() % MD_WARP;
    attn_rows q = {a.qkv + attn_at(d, image, head, 3 * d.row), 3 * d.row, first, ATTN_BLOCK};
    attn_rows g = {a.d_o + attn_at(d, image, head, d.row), d.row, first, ATTN_BLOCK};
    attn_rows o = {a.o + attn_at(d, image, head, d.row), d.row, first, ATTN_BLOCK};
    uint32_t x[W / 16][4];
    attn_load<W>(t.g, g, d, lane);
    attn_load<W>(x, o, d, lane);
    attn_load<W>(t.q, q, d, lane);
    query_delta<W>(t.delta, x, t.g, lane);
    attn_left<W>(t.q);
    attn_left<W>(t.g);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = first + lane / 4 + 8 * r;
        const int64_t at = ((int64_t)image * d.heads + head) * d.tokens + row;
        t.lse[r] = row < d.tokens ? a.lse[at] * MD_LOG2E : 0.0f;
        if (lane % 4 == 0 && row < d.tokens)
            a.own[at] = make_float2(t.lse[r], t.delta[r]);
    }
#pragma unroll
    for (int n = 0; n < W / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            t.dq[n][i] = 0.0f;
}

template <int W>
MD_DEV void query_end(const query_tile<W> &t, const attn_bwd_args &a, int image, int head,
                      int first)
{
    const float scale[2] = {a.d.scale, a.d.scale};
    attn_rows to = {nullptr, 3 * a.d.row, first, ATTN_BLOCK};
    attn_write<W>(a.dqkv + attn_at(a.d, image, head, 3 * a.d.row), t.dq, to, a.d, scale);
}

/* Brings near what query_begin will read of another image. */
template <int W> MD_DEV void query_expect(const attn_bwd_args &a, int image, int head, int first)
{
    const int lane = attn_thread() % MD_WARP;
    attn_rows rows = {a.o + attn_at(a.d, image, head, a.d.row), a.d.row, first, ATTN_BLOCK};
    attn_prefetch<W>(rows, a.d, lane);
    rows.from = a.d_o + attn_at(a.d, image, head, a.d.row);
    attn_prefetch<W>(rows, a.d, lane);
    rows.from = a.qkv + attn_at(a.d, image, head, 3 * a.d.row);
    rows.stride = 3 * a.d.row;
    attn_prefetch<W>(rows, a.d, lane);
}

/* Gradients of the logits of one block, in dp, and their sums over images. */
template <bool REL>
MD_DEV void query_logits(float (&s)[2][4], float (&dp)[2][4], const uint4 &word,
                         const query_keys &k, int block, const float (&row)[4])
{
    float bias[2][4] = {};
    if (REL)
        attn_bias(bias, word);
    const bool cut = !REL && ATTN_BLOCK * (block + 1) > k.tokens;
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            attn_gradient(s[h][i], dp[h][i], bias[h][i] * MD_LOG2E - row[i / 2], k.scale,
                          row[2 + i / 2]);
            if (cut && attn_column(block, h, i) >= k.tokens)
                dp[h][i] = 0.0f;
        }
        if (REL && k.sums) {
            float4 &sum = k.sums[(2 * block + h) * MD_WARP];
            float4 x = sum;
            x.x += dp[h][0], x.y += dp[h][1], x.z += dp[h][2], x.w += dp[h][3];
            sum = x;
        }
    }
}

/* N blocks of keys from block `at` of the stage, which is `block` of the head. With QUERY_AHEAD
 * k.word is of the bias of this block, then of the one after it: memory is slower than the
 * products. */
template <int W, bool REL, int N>
MD_DEV void query_step(query_tile<W> &t, query_keys &k, int at, int block)
{
    const int offset = at * ATTN_BLOCK * ATTN_ROW(W);
    float s[N][2][4] = {}, dp[N][2][4] = {};
    uint4 word[N] = {};
    static_assert(N == 1 || !(REL && QUERY_AHEAD(W)), "one word is read ahead");
    if (REL && QUERY_AHEAD(W))
        word[0] = k.word;
    else if (REL) {
#pragma unroll
        for (int n = 0; n < N; n++)
            word[n] = k.rel[n * MD_WARP];
    }
#pragma unroll
    for (int c = 0; c < W / 16; c++)
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int from = offset + n * ATTN_BLOCK * ATTN_ROW(W) + 16 * c;
            attn_scores(s[n], t.q[c], k.k + from);
            attn_scores(dp[n], t.g[c], k.k + from + W);
        }
    const float row[4] = {t.lse[0], t.lse[1], t.delta[0], t.delta[1]};
#pragma unroll
    for (int n = 0; n < N; n++) {
        uint32_t ds[4], keys[W / 16][4];
        attn_factors<W>(keys, k.k_sum + offset + n * ATTN_BLOCK * ATTN_ROW(W));
        query_logits<REL>(s[n], dp[n], word[n], k, block + n, row);
        if (REL && n == N - 1) {
            k.rel += N * MD_WARP;
            if (QUERY_AHEAD(W))
                k.word = *k.rel;
        }
        attn_round(ds, dp[n]);
        attn_sum_of<W>(t.dq, ds, keys);
    }
}

/* The stages of all images of a chunk in one row. */
struct query_walk {
    int image, stage;
};

MD_DEV query_walk query_after(query_walk w, int steps, int stages)
{
    for (w.stage += steps; w.stage >= stages; w.stage -= stages)
        w.image++;
    return w;
}

/* One of QUERY_STAGES buffers, which the stages take in turn. */
template <int W> MD_DEV md_bf16 *query_buffer(int buffer)
{
    return reinterpret_cast<md_bf16 *>(md_smem()) +
           buffer * (QUERY_STAGE * ATTN_BLOCK * ATTN_ROW(W));
}

/* Starts the copy of a stage's keys and values; a group even when there is nothing left before
 * image `end`. */
template <int W>
MD_DEV void query_fetch(const attn_bwd_args &a, int head, query_walk w, int end, int buffer)
{
    const int rows = QUERY_STAGE * ATTN_BLOCK;
    if (w.image < end) {
        const int padded = (a.d.tokens + ATTN_BLOCK - 1) / ATTN_BLOCK * ATTN_BLOCK;
        const int first = w.stage * rows;
        const md_bf16 *qkv = a.qkv + attn_at(a.d, w.image, head, 3 * a.d.row);
        attn_pair from = {{qkv + a.d.row, qkv + 2 * a.d.row},
                          {3 * a.d.row, 3 * a.d.row},
                          first,
                          padded - first < rows ? padded - first : rows};
        attn_fetch<W, 8>(query_buffer<W>(buffer), from, a.d);
    }
    md_async_commit();
}

/* One step for a warp's queries; stage: of the image. */
template <int W, bool REL>
MD_DEV void query_stage(query_tile<W> &t, query_keys &k, const md_bf16 *keys, int stage)
{
    const int n = QUERY_STEP(W, REL);
    const int first = stage * QUERY_STAGE, blocks = (k.tokens + ATTN_BLOCK - 1) / ATTN_BLOCK;
    const int count = blocks - first < QUERY_STAGE ? blocks - first : QUERY_STAGE;
    k.k = attn_scores_at<W>(keys);
    k.k_sum = attn_sum_at<W>(keys);
    int at = 0;
#pragma unroll 1
    for (; at + n <= count; at += n)
        query_step<W, REL, n>(t, k, at, first + at);
    if (n == 2 && at < count)
        query_step<W, REL, 1>(t, k, at, first + at);
}

/* Which part of the work a block of threads and a warp of it have. */
struct query_place {
    int head, chunk, warp, tile;
};

/* From the block's number; asked again at the end, so that nothing sits in registers until then. */
MD_DEV query_place query_where(const attn_bwd_args &a, int block)
{
    query_place p;
    p.warp = attn_warp();
    p.tile = block % a.groups * ((int)blockDim.x / MD_WARP) + p.warp;
    p.head = block / a.groups % a.d.heads;
    p.chunk = block / (a.groups * a.d.heads);
    return p;
}

/* Where a warp's sums of dlogits are for this lane: two words for a block of keys. */
template <int W> MD_DEV float4 *query_sums_at(int warp, int blocks)
{
    const int room = QUERY_STAGES * QUERY_STAGE * ATTN_BLOCK * ATTN_ROW(W);
    return reinterpret_cast<float4 *>(reinterpret_cast<md_bf16 *>(md_smem()) + room) +
           warp * 2 * blocks * MD_WARP + (int)threadIdx.x % MD_WARP;
}

/* A warp's sums of dlogits into its rows of the chunk's partial drel [T, T]. */
template <int W> MD_DEV void query_sums(const attn_bwd_args &a)
{
    const query_place p = query_where(a, md_shfl((int)blockIdx.x, 0));
    const int tokens = a.d.tokens, blocks = (tokens + ATTN_BLOCK - 1) / ATTN_BLOCK;
    const float4 *sums = query_sums_at<W>(p.warp, blocks);
    float *to = a.part + ((int64_t)p.chunk * a.d.heads + p.head) * tokens * tokens;
    const int row = p.tile * ATTN_BLOCK + (int)threadIdx.x % MD_WARP / 4;
    if (p.tile >= blocks)
        return;
#pragma unroll 1
    for (int i = 0; i < 2 * blocks; i++) {
        const float4 x = sums[i * MD_WARP];
        const float value[4] = {x.x, x.y, x.z, x.w};
        for (int j = 0; j < 4; j++) {
            int r = row + j / 2 * 8, c = attn_column(i / 2, i % 2, j);
            if (r < tokens && c < tokens)
                to[(int64_t)r * tokens + c] = value[j];
        }
    }
}

template <int W, bool REL>
MD_KERNEL(ATTN_BOUNDS(QUERY_WARPS(W), 1))
attn_bwd_queries(attn_bwd_args a)
{
    const attn_dims d = a.d;
    const query_place place = query_where(a, (int)blockIdx.x);
    const int head = place.head, chunk = place.chunk, tile = place.tile, first = tile * ATTN_BLOCK;
    const int blocks = (d.tokens + ATTN_BLOCK - 1) / ATTN_BLOCK;
    const int begin = (int)((int64_t)d.images * chunk / a.chunks);
    const int end = (int)((int64_t)d.images * (chunk + 1) / a.chunks);
    query_walk now = {begin, 0};
    int buffer = 0; /* of the stage now */
    query_keys k = {};
    k.tokens = d.tokens;
    k.scale = a.scale;
    if (REL && a.part) {
        k.sums = query_sums_at<W>(place.warp, blocks);
#pragma unroll 1
        for (int i = 0; i < 2 * blocks; i++)
            k.sums[i * MD_WARP] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    for (int i = 0; i + 1 < QUERY_STAGES; i++)
        query_fetch<W>(a, head, query_after(now, i, a.stages), end, i);
    query_tile<W> t;
    while (now.image < end) {
        if (now.stage == 0 && tile < blocks) {
            if (REL)
                k.rel = a.rel + ((int64_t)head * blocks + tile) * blocks * MD_WARP +
                        attn_thread() % MD_WARP;
            if (REL && QUERY_AHEAD(W))
                k.word = *k.rel;
            query_begin<W>(t, a, now.image, head, first);
            if (now.image + 1 < end)
                query_expect<W>(a, now.image + 1, head, first);
        }
        md_async_wait<QUERY_STAGES - 2>();
        md_barrier(); /* this stage is there, and the one before it has been read */
        query_fetch<W>(a, head, query_after(now, QUERY_STAGES - 1, a.stages), end,
                       buffer == 0 ? QUERY_STAGES - 1 : buffer - 1);
        if (tile < blocks)
            query_stage<W, REL>(t, k, query_buffer<W>(buffer), now.stage);
        if (now.stage == a.stages - 1 && tile < blocks)
            query_end<W>(t, a, now.image, head, first);
        now = query_after(now, 1, a.stages);
        buffer = buffer + 1 == QUERY_STAGES ? 0 : buffer + 1;
    }
    if (REL && a.part)
        query_sums<W>(a);
}

/* ---- host ---- */

typedef void (*bwd_kernel)(attn_bwd_args);

static bwd_kernel queries_of(int width, bool rel)
{
    switch (width) {
#define CASE(w) \
    case w:     \
        return rel ? attn_bwd_queries<w, true> : attn_bwd_queries<w, false>;
        ATTN_WIDTHS(CASE)
#undef CASE
    }
    return nullptr;
}

/* Shared memory that a block of threads of the queries kernel may have: found at setup, without a
 * device what the largest GPU gives. */
static int query_smem = QUERY_SMEM;

md_status attn_bwd_setup(void)
{
    static const int room[] = {QUERY_SMEM, 163 * 1024, ATTN_SMEM};
    size_t i = 0;
    while (i + 1 < MD_COUNT(room) &&
           MD_ALLOW_SMEM((attn_bwd_queries<80, true>), room[i]) != cudaSuccess) {
        (void)cudaGetLastError(); /* a smaller GPU */
        i++;
    }
    query_smem = room[i];
#define ALLOW(w)                                                                               \
    MD_TRY(cuda_ok(MD_ALLOW_SMEM((attn_bwd_queries<w, false>), query_smem), "shared memory")); \
    MD_TRY(cuda_ok(MD_ALLOW_SMEM((attn_bwd_queries<w, true>), query_smem), "shared memory"));
    ATTN_WIDTHS(ALLOW)
#undef ALLOW
    return attn_keys_setup();
}

static int stage_bytes(int width)
{
    return QUERY_STAGES * QUERY_STAGE * ATTN_BLOCK * ATTN_ROW(width) * (int)sizeof(md_bf16);
}

/* Tiles of a block of threads that keeps the sums of dlogits, with `smem` bytes; 0: not even one.
 */
static int query_tiles(const attn_dims &d, int width, int smem)
{
    int most = (smem - stage_bytes(width)) / (SUMS_BLOCK * attn_blocks(d));
    return most < 1 ? 0 : attn_warps(attn_blocks(d), MD_MIN(most, QUERY_WARPS(width)));
}

/* Chunks of images: as many as fill the GPU when each block of threads has a multiprocessor for
 * itself. Without drel every image is its own. */
static int image_chunks(const md_backend *be, const md_attention_bwd_args *a, const attn_dims &d)
{
    if (!a->drel)
        return d.images;
    int tiles = attn_tensor_cores(a->qkv, a->heads) ? query_tiles(d, d.width, query_smem)
                                                    : QUERY_WARPS(d.width);
    int groups = (int)cuda_ceil(attn_blocks(d), MD_MAX(tiles, 1));
    return MD_MAX(1, MD_MIN(d.images, cuda_sms(be) / (d.heads * groups)));
}

/* Words that are read ahead, behind the last block of keys or queries. */
#define AHEAD MD_WARP

/* Offsets in the scratch, which begins with lse and delta: the bias, the partial drel; its end. */
struct bwd_layout {
    size_t rel, part, end;
};

static bwd_layout layout_of(const md_backend *be, const md_attention_bwd_args *a,
                            const attn_dims &d)
{
    const size_t rows = (size_t)d.heads * (size_t)d.tokens;
    bwd_layout l;
    l.rel = attn_line(sizeof(float2) * rows * (size_t)d.images);
    l.part = l.rel + (a->rel && attn_tensor_cores(a->qkv, a->heads)
                          ? attn_line(sizeof(uint4) * (2 * (size_t)attn_rel_words(d) + AHEAD))
                          : 0);
    l.end = l.part;
    if (a->drel)
        l.end += sizeof(float) * rows * (size_t)d.tokens * (size_t)image_chunks(be, a, d);
    return l;
}

size_t cuda_attention_bwd_scratch(md_backend *be, const md_attention_bwd_args *a)
{
    return layout_of(be, a, attn_dims_of(a->qkv, a->heads, a->scale)).end;
}

/* Whether the bf16 kernels can do it. */
static bool fits(const md_attention_bwd_args *a, const attn_dims &d)
{
    return attn_tensor_cores(a->qkv, a->heads) && attn_aligned(a->qkv) && attn_aligned(a->o) &&
           attn_aligned(a->d_o) && attn_aligned(a->dqkv) &&
           (!a->drel || query_tiles(d, d.width, query_smem) > 0);
}

static md_status launch(md_backend *be, const md_attention_bwd_args *a, attn_bwd_args k)
{
    const int width = k.d.width, blocks = attn_blocks(k.d);
    const int tiles =
        k.part ? query_tiles(k.d, width, query_smem) : attn_warps(blocks, QUERY_WARPS(width));
    const int sums = k.part ? tiles * blocks * SUMS_BLOCK : 0;
    k.groups = (int)cuda_ceil(blocks, tiles);
    k.stages = (int)cuda_ceil(blocks, QUERY_STAGE);
    bwd_kernel queries = queries_of(width, a->rel != nullptr);
    MD_LAUNCH(queries, k.groups * k.d.heads * k.chunks, tiles * MD_WARP, stage_bytes(width) + sums,
              cuda_stream(be), k);
    attn_keys(be, k);
    return cuda_launched(MD_OP_attention_bwd);
}

md_status cuda_attention_bwd(md_backend *be, const md_attention_bwd_args *a)
{
    CUDA_CHECK(attention_bwd, a);
    MD_TRY(attn_check(MD_OP_attention_bwd, a->qkv, a->rel, a->lse, a->heads));
    if (a->accumulate & 1 || (a->drel && !a->rel))
        MD_FAIL(MD_ERR_BUG, "attention_bwd: dqkv does not accumulate, and drel needs rel");
    const attn_dims d = attn_dims_of(a->qkv, a->heads, a->scale);
    const bwd_layout l = layout_of(be, a, d);
    void *scratch;
    MD_TRY(cuda_scratch(be, MD_OP_attention_bwd, l.end, &scratch));
    char *base = static_cast<char *>(scratch);
    attn_bwd_room room = {reinterpret_cast<float *>(base),
                          a->drel ? reinterpret_cast<float *>(base + l.part) : nullptr,
                          image_chunks(be, a, d)};
    if (!fits(a, d)) {
        MD_TRY(attn_plain_bwd(be, a, room));
    } else {
        attn_bwd_args k = {};
        k.d = d;
        k.scale = d.scale * MD_LOG2E;
        k.qkv = cuda_data<md_bf16>(a->qkv);
        k.o = cuda_data<md_bf16>(a->o);
        k.d_o = cuda_data<md_bf16>(a->d_o);
        k.lse = cuda_data<float>(a->lse);
        k.dqkv = cuda_data<md_bf16>(a->dqkv);
        k.own = static_cast<float2 *>(scratch);
        k.part = room.part;
        k.chunks = room.chunks;
        if (a->rel) {
            uint4 *rel = reinterpret_cast<uint4 *>(base + l.rel);
            attn_arrange(be, d, cuda_data<md_bf16>(a->rel), rel, true);
            k.rel = rel;
        }
        MD_TRY(launch(be, a, k));
    }
    if (!a->drel)
        return MD_OK;
    const cuda_sums sums = {room.part,
                            room.chunks,
                            (int64_t)d.heads * d.tokens * d.tokens,
                            {cuda_data<float>(a->drel)},
                            {(a->accumulate >> 1 & 1) != 0}};
    return cuda_reduce_sums(be, MD_OP_attention_bwd, &sums);
}
