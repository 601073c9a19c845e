/* cuda_attn_f32: attention without tensor cores, forward and backward: for f32, and for bf16 with
 * heads that the kernels of cuda_attn and cuda_attn_bwd do not have. A warp has one row of scores
 * (one query, or, for dk and dv, one key) in its own shared memory and needs no other warp. All
 * values inside are f32; lanes stride over the row for scores and over the head for sums. */
#include "kernels/cuda/cuda_attn.cuh"

/* Warps of a block of threads, at most, and the shared memory for their rows. */
#define PLAIN_WARPS 4
#define PLAIN_SMEM  49152

template <class T> struct plain_args {
    attn_dims d;
    const T *qkv, *rel, *d_o;
    const float *lse;
    T *o, *dqkv;
    float *lse_out, *delta, *part;
    int chunks;
    int64_t warps; /* that have work */
    bool wide;     /* rows of a head are whole 16-byte pieces */
};

/* The rows of one head in a matrix. */
template <class T> struct plain_rows {
    T *first;
    int stride;
    MD_DEV T *at(int row) const
    {
        return first + (int64_t)row * stride;
    }
};

/* This warp among all, and its part of shared memory with `rows` rows of scores. */
MD_DEV int64_t plain_warp()
{
    return (int64_t)blockIdx.x * (blockDim.x / MD_WARP) + threadIdx.x / MD_WARP;
}

MD_DEV float *plain_row(const attn_dims &d, int rows)
{
    return reinterpret_cast<float *>(md_smem()) + (int)threadIdx.x / MD_WARP * rows * d.tokens;
}

template <class T>
MD_DEV plain_rows<const T> plain_qkv(const plain_args<T> &a, int64_t pair, int which)
{
    const int head = (int)(pair % a.d.heads), width = a.d.heads * a.d.width;
    const int image = (int)(pair / a.d.heads);
    return {a.qkv + attn_at(a.d, image, head, 3 * width) + which * width, 3 * width};
}

/* of o or d_o */
template <class T, class M>
MD_DEV plain_rows<M> plain_out(const plain_args<T> &a, M *m, int64_t pair)
{
    const int width = a.d.heads * a.d.width;
    return {m + attn_at(a.d, (int)(pair / a.d.heads), (int)(pair % a.d.heads), width), width};
}

/* Product of two rows of a head, in the order of the elements, wide or not. */
template <class T> MD_DEV float plain_dot(const T *a, const T *b, const plain_args<T> &k)
{
    float sum = 0.0f;
    if (!k.wide) {
#pragma unroll 1
        for (int i = 0; i < k.d.width; i++)
            sum += md_load(a + i) * md_load(b + i);
        return sum;
    }
#pragma unroll 1
    for (int i = 0; i < k.d.width; i += md_vec<T>::N) {
        float x[md_vec<T>::N], y[md_vec<T>::N];
        md_vec<T>::load(a + i, x);
        md_vec<T>::load(b + i, y);
        for (int j = 0; j < md_vec<T>::N; j++)
            sum += x[j] * y[j];
    }
    return sum;
}

/* to[c] = factor * sum over tokens of weight[j] * m[j, c]. */
template <class T>
MD_DEV void plain_sum(T *to, const float *weight, const plain_rows<const T> &m, const attn_dims &d,
                      float factor)
{
    for (int c = (int)threadIdx.x % MD_WARP; c < d.width; c += MD_WARP) {
        float sum = 0.0f;
#pragma unroll 4
        for (int j = 0; j < d.tokens; j++)
            sum += weight[j] * md_load(m.at(j) + c);
        md_store(to + c, sum * factor);
    }
}

/* Logit of one query and key of a (image, head). */
template <class T>
MD_DEV float plain_logit(const plain_args<T> &a, int64_t pair, int query, int key)
{
    float s = plain_dot(plain_qkv(a, pair, 0).at(query), plain_qkv(a, pair, 1).at(key), a);
    s *= a.d.scale;
    if (a.rel)
        s += md_load(a.rel + (pair % a.d.heads * a.d.tokens + query) * a.d.tokens + key);
    return s;
}

/* A warp has one query of one image. */
template <class T> MD_KERNEL(MD_WARP *PLAIN_WARPS) attn_plain_fwd(plain_args<T> a)
{
    const int64_t warp = plain_warp(), pair = warp / a.d.tokens;
    const int query = (int)(warp % a.d.tokens), lane = (int)threadIdx.x % MD_WARP;
    if (warp >= a.warps)
        return;
    float *p = plain_row(a.d, 1), max = -INFINITY, sum = 0.0f;
    for (int j = lane; j < a.d.tokens; j += MD_WARP) {
        p[j] = plain_logit(a, pair, query, j);
        max = fmaxf(max, p[j]);
    }
    max = md_warp_max(max);
    for (int j = lane; j < a.d.tokens; j += MD_WARP) {
        p[j] = md_expf(p[j] - max);
        sum += p[j];
    }
    sum = md_warp_sum(sum);
    md_warp_barrier();
    plain_sum(plain_out(a, a.o, pair).at(query), p, plain_qkv(a, pair, 2), a.d, 1.0f / sum);
    if (a.lse_out && lane == 0)
        a.lse_out[warp] = max + logf(sum);
}

/* A warp has one query of a head for a chunk of images, in their order: dq, delta, and the chunk's
 * row of drel. */
template <class T> MD_KERNEL(MD_WARP *PLAIN_WARPS) attn_plain_queries(plain_args<T> a)
{
    const int64_t warp = plain_warp(), rows = (int64_t)a.d.tokens * a.d.heads;
    const int n = a.d.tokens;
    const int query = (int)(warp % n), head = (int)(warp / n % a.d.heads);
    const int chunk = (int)(warp / rows), lane = (int)threadIdx.x % MD_WARP;
    if (warp >= a.warps)
        return;
    const int end = (int)((int64_t)a.d.images * (chunk + 1) / a.chunks);
    float *p = plain_row(a.d, 3), *ds = p + n, *total = ds + n;
    for (int j = lane; j < n; j += MD_WARP)
        total[j] = 0.0f;
    for (int image = (int)((int64_t)a.d.images * chunk / a.chunks); image < end; image++) {
        const int64_t pair = (int64_t)image * a.d.heads + head;
        const T *g = plain_out(a, a.d_o, pair).at(query);
        float delta = 0.0f;
        for (int j = lane; j < n; j += MD_WARP) {
            p[j] = md_expf(plain_logit(a, pair, query, j) - a.lse[pair * n + query]);
            ds[j] = plain_dot(g, plain_qkv(a, pair, 2).at(j), a);
            delta += p[j] * ds[j];
        }
        delta = md_warp_sum(delta);
#pragma unroll 1
        for (int j = lane; j < n; j += MD_WARP) {
            ds[j] = p[j] * (ds[j] - delta);
            total[j] += ds[j];
        }
        if (lane == 0)
            a.delta[pair * n + query] = delta;
        md_warp_barrier();
        T *dq = a.dqkv + (plain_qkv(a, pair, 0).at(query) - a.qkv);
        plain_sum(dq, ds, plain_qkv(a, pair, 1), a.d, a.d.scale);
        md_warp_barrier();
    }
    if (!a.part)
        return;
#pragma unroll 1
    for (int j = lane; j < n; j += MD_WARP)
        a.part[warp * n + j] = total[j];
}

/* A warp has one key of one image: dk, dv. */
template <class T> MD_KERNEL(MD_WARP *PLAIN_WARPS) attn_plain_keys(plain_args<T> a)
{
    const int64_t warp = plain_warp(), n = a.d.tokens, pair = warp / n;
    const int key = (int)(warp % n), lane = (int)threadIdx.x % MD_WARP;
    if (warp >= a.warps)
        return;
    float *p = plain_row(a.d, 2), *ds = p + n;
    const plain_rows<const T> g = plain_out(a, a.d_o, pair);
    const T *v = plain_qkv(a, pair, 2).at(key);
    for (int i = lane; i < n; i += MD_WARP) {
        p[i] = md_expf(plain_logit(a, pair, i, key) - a.lse[pair * n + i]);
        ds[i] = p[i] * (plain_dot(g.at(i), v, a) - a.delta[pair * n + i]);
    }
    md_warp_barrier();
    plain_sum(a.dqkv + (plain_qkv(a, pair, 1).at(key) - a.qkv), ds, plain_qkv(a, pair, 0), a.d,
              a.d.scale);
    plain_sum(a.dqkv + (v - a.qkv), p, g, a.d, 1.0f);
}

/* ---- host ---- */

/* Threads, blocks and shared memory for so many warps with `rows` rows of scores each. */
struct plain_grid {
    unsigned blocks, threads;
    size_t smem;
};

static md_status grid_of(md_op op, const attn_dims &d, int rows, int64_t warps, plain_grid *g)
{
    const size_t each = sizeof(float) * (size_t)rows * (size_t)d.tokens;
    const size_t most = MD_MIN(PLAIN_SMEM / each, (size_t)PLAIN_WARPS);
    if (most < 1)
        MD_FAIL(MD_ERR_BUG, "%s: %d tokens are more than a row of scores may have", md_op_name(op),
                d.tokens);
    g->blocks = (unsigned)cuda_ceil(warps, (int64_t)most);
    g->threads = (unsigned)most * MD_WARP;
    g->smem = most * each;
    return MD_OK;
}

template <class T>
static md_status plain_fwd(md_backend *be, const md_attention_args *a, const attn_dims &d)
{
    plain_args<T> k = {};
    plain_grid g = {};
    k.d = d;
    k.qkv = cuda_data<T>(a->qkv);
    k.rel = cuda_data<T>(a->rel);
    k.o = cuda_data<T>(a->o);
    k.lse_out = cuda_data<float>(a->lse);
    k.warps = (int64_t)d.images * d.heads * d.tokens;
    k.wide = d.width % md_vec<T>::N == 0 && attn_aligned(a->qkv);
    MD_TRY(grid_of(MD_OP_attention, d, 1, k.warps, &g));
    MD_LAUNCH(attn_plain_fwd<T>, g.blocks, g.threads, g.smem, cuda_stream(be), k);
    return cuda_launched(MD_OP_attention);
}

md_status attn_plain(md_backend *be, const md_attention_args *a)
{
    const attn_dims d = attn_dims_of(a->qkv, a->heads, a->scale);
    return cuda_is_bf16(a->qkv) ? plain_fwd<md_bf16>(be, a, d) : plain_fwd<float>(be, a, d);
}

template <class T>
static md_status plain_bwd(md_backend *be, const md_attention_bwd_args *a, const attn_dims &d,
                           const attn_bwd_room &room)
{
    plain_args<T> k = {};
    plain_grid g = {};
    k.d = d;
    k.qkv = cuda_data<T>(a->qkv);
    k.rel = cuda_data<T>(a->rel);
    k.d_o = cuda_data<T>(a->d_o);
    k.lse = cuda_data<float>(a->lse);
    k.dqkv = cuda_data<T>(a->dqkv);
    k.delta = room.delta;
    k.part = room.part;
    k.chunks = room.chunks;
    k.wide = d.width % md_vec<T>::N == 0 && attn_aligned(a->qkv) && attn_aligned(a->d_o);
    k.warps = (int64_t)room.chunks * d.heads * d.tokens;
    MD_TRY(grid_of(MD_OP_attention_bwd, d, 3, k.warps, &g));
    MD_LAUNCH(attn_plain_queries<T>, g.blocks, g.threads, g.smem, cuda_stream(be), k);
    k.warps = (int64_t)d.images * d.heads * d.tokens;
    MD_TRY(grid_of(MD_OP_attention_bwd, d, 2, k.warps, &g));
    MD_LAUNCH(attn_plain_keys<T>, g.blocks, g.threads, g.smem, cuda_stream(be), k);
    return cuda_launched(MD_OP_attention_bwd);
}

md_status attn_plain_bwd(md_backend *be, const md_attention_bwd_args *a, const attn_bwd_room &room)
{
    const attn_dims d = attn_dims_of(a->qkv, a->heads, a->scale);
    return cuda_is_bf16(a->qkv) ? plain_bwd<md_bf16>(be, a, d, room)
                                : plain_bwd<float>(be, a, d, room);
}
