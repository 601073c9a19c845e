/* cuda_norm: LayerNorm alone, and fused with the residual step before it. */
#include "kernels/cuda/cuda_norm.cuh"

/* x, branch. */
#define FWD_OPERANDS 2
/* Shared memory begins with two sums of R rows, in bytes; the stages follow. */
#define FWD_SUMS(R, threads) (2 * (R) * ((threads) / MD_WARP) * (int)sizeof(float))

namespace
{

template <class T> struct md_ln {
    const T *x, *branch;
    const float *gamma, *weight, *bias;
    T *r, *y;
    float *mean, *rstd;
    md_ln_images images;
    int rows, cols;
    float eps, per_col, per_term; /* 1 / C; 1 / what the variance is divided by */
};

/* r = x + keep * gamma * branch of one vector, rounded as it is stored: the statistics are those of
 * what backward reads. */
template <class T>
MD_DEV void md_residual(uint4 &x, uint4 branch, const float (&gamma)[md_vec<T>::N], float keep)
{
    float a[md_vec<T>::N], b[md_vec<T>::N];
    md_raw<T>::unpack(x, a);
    md_raw<T>::unpack(branch, b);
#pragma unroll
    for (int j = 0; j < md_vec<T>::N; j++)
        a[j] += keep * gamma[j] * b[j];
    x = md_raw<T>::pack(a);
}

/* mean and 1 / sqrt(var + eps) of R rows, in two passes: the variance of differences does not
 * cancel. All threads. */
template <class T, int R>
MD_DEV void md_row_stats(const md_ln<T> &k, const uint4 (&x)[R], bool there, float (&mean)[R],
                         float (&rstd)[R])
{
    enum { N = md_vec<T>::N };
    float *smem = reinterpret_cast<float *>(md_smem());
#pragma unroll
    for (int i = 0; i < R; i++) {
        float v[N];
        md_raw<T>::unpack(x[i], v);
        mean[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++)
            mean[i] += v[j];
    }
    md_block_sums(mean, smem);
#pragma unroll
    for (int i = 0; i < R; i++) {
        float v[N];
        md_raw<T>::unpack(x[i], v);
        mean[i] *= k.per_col;
        rstd[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++)
            rstd[i] += there ? (v[j] - mean[i]) * (v[j] - mean[i]) : 0.0f;
    }
    md_block_sums(rstd, smem + blockDim.x / MD_WARP * R);
#pragma unroll
    for (int i = 0; i < R; i++)
        rstd[i] = 1.0f / sqrtf(rstd[i] * k.per_term + k.eps);
}

/* Sends a batch to this thread's slots of a stage, which lie blockDim.x apart. Rows that are not
 * there become zeros. */
template <class T, int R>
MD_DEV void md_ln_fetch(const md_ln<T> &k, md_ln_spot at, uint4 *slot, md_ln_places<R> &place)
{
    md_places_of(k.images, at.row, at.end, place);
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int own = at.row + i < at.end ? at.row + i : -1;
        md_ln_send(slot + i * blockDim.x, k.x, own, k.cols, at.col);
        if (k.branch)
            md_ln_send(slot + (R + i) * blockDim.x, k.branch, place.from[i], k.cols, at.col);
    }
    md_async_commit();
}

/* The parameters at a thread's columns. */
template <int N> struct md_ln_affine {
    float gamma[N], weight[N], bias[N];
};

/* r of a batch that has come; writes it where that is wanted. */
template <class T, int R>
MD_DEV void md_ln_residual(const md_ln<T> &k, md_ln_spot at, const uint4 *slot,
                           const md_ln_places<R> &place, const md_ln_affine<md_vec<T>::N> &c,
                           uint4 (&x)[R])
{
#pragma unroll
    for (int i = 0; i < R; i++) {
        x[i] = slot[i * blockDim.x];
        if (k.branch)
            md_residual<T>(x[i], slot[(R + i) * blockDim.x], c.gamma, place.keep[i]);
        if (k.r && at.row + i < at.end)
            md_store16(k.r + md_ln_at(at.row + i, k.cols, at.col), x[i]);
    }
}

/* LayerNorm of the same. All threads. */
template <class T, int R>
MD_DEV void md_ln_normalise(const md_ln<T> &k, md_ln_spot at, const md_ln_places<R> &place,
                            const md_ln_affine<md_vec<T>::N> &c, const uint4 (&x)[R])
{
    enum { N = md_vec<T>::N };
    float mean[R], rstd[R];
    md_row_stats(k, x, at.end > 0, mean, rstd);
#pragma unroll
    for (int i = 0; i < R; i++) {
        if (at.row + i >= at.end)
            continue;
        float v[N];
        md_raw<T>::unpack(x[i], v);
#pragma unroll
        for (int j = 0; j < N; j++)
            v[j] = (v[j] - mean[i]) * rstd[i] * c.weight[j] + c.bias[j];
        if (k.y && place.to[i] >= 0)
            md_vec<T>::store(k.y + md_ln_at(place.to[i], k.cols, at.col), v);
        if (k.mean && threadIdx.x == 0)
            k.mean[at.row + i] = mean[i];
        if (k.rstd && threadIdx.x == 0)
            k.rstd[at.row + i] = rstd[i];
    }
}

template <class T> MD_KERNEL(LN_BLOCK) md_ln_rows(md_ln<T> k)
{
    enum { N = md_vec<T>::N, R = LN_ROWS };
    const int threads = (int)blockDim.x, stage = FWD_OPERANDS * R * threads;
    const int col = (int)threadIdx.x * N,
              next = (int)gridDim.x * R; /* to this block's next batch */
    md_ln_spot at = {(int)blockIdx.x * R, col < k.cols ? k.rows : 0, col};
    uint4 *slot = reinterpret_cast<uint4 *>(md_smem() + FWD_SUMS(R, threads)) + threadIdx.x;
    md_ln_affine<N> c;
    md_parameters(k.gamma, col, at.end > 0, 1.0f, c.gamma);
    md_parameters(k.weight, col, at.end > 0, 1.0f, c.weight);
    md_parameters(k.bias, col, at.end > 0, 0.0f, c.bias);
    md_ln_places<R> coming[LN_STAGES - 1];
    int from = 0, to = 0;
#pragma unroll
    for (int s = 0; s < LN_STAGES - 1; s++, to += stage)
        md_ln_fetch(k, {at.row + s * next, at.end, col}, slot + to, coming[s]);
    for (; at.row < k.rows; at.row += next) {
        const md_ln_places<R> place = coming[0];
        uint4 x[R];
#pragma unroll
        for (int s = 1; s < LN_STAGES - 1; s++)
            coming[s - 1] = coming[s];
        md_ln_fetch(k, {at.row + (LN_STAGES - 1) * next, at.end, col}, slot + to,
                    coming[LN_STAGES - 2]);
        to = to == (LN_STAGES - 1) * stage ? 0 : to + stage;
        md_async_wait<LN_STAGES - 1>();
        md_ln_residual(k, at, slot + from, place, c, x);
        from = from == (LN_STAGES - 1) * stage ? 0 : from + stage;
        if (k.y || k.mean || k.rstd)
            md_ln_normalise(k, at, place, c, x);
    }
    md_async_wait<0>();
}

/* The same for any width and address, one row at a time. A thread always has the same columns, so
 * it reads back only what it wrote itself. */
template <class T> MD_KERNEL(VEC_BLOCK) md_ln_any(md_ln<T> k)
{
    float *smem = reinterpret_cast<float *>(md_smem());
    for (int row = (int)blockIdx.x; row < k.rows; row += (int)gridDim.x) {
        md_ln_places<1> place;
        md_places_of(k.images, row, k.rows, place);
        const T *x = k.x + md_ln_at(row, k.cols, 0);
        const T *branch = k.branch && place.from[0] >= 0
                              ? k.branch + md_ln_at(place.from[0], k.cols, 0)
                              : nullptr;
        if (k.r) {
            T *r = k.r + md_ln_at(row, k.cols, 0);
            for (int c = (int)threadIdx.x; c < k.cols; c += VEC_BLOCK)
                md_store(&r[c],
                         md_load(&x[c]) + (branch ? place.keep[0] * (k.gamma ? k.gamma[c] : 1.0f) *
                                                        md_load(&branch[c])
                                                  : 0.0f));
            x = r;
        }
        if (!k.y && !k.mean && !k.rstd)
            continue;
        float mean[1] = {0.0f}, rstd[1] = {0.0f};
        for (int c = (int)threadIdx.x; c < k.cols; c += VEC_BLOCK)
            mean[0] += md_load(&x[c]);
        md_block_sums(mean, smem);
        mean[0] *= k.per_col;
        for (int c = (int)threadIdx.x; c < k.cols; c += VEC_BLOCK) {
            const float d = md_load(&x[c]) - mean[0];
            rstd[0] += d * d;
        }
        md_block_sums(rstd, smem + VEC_WARPS);
        rstd[0] = 1.0f / sqrtf(rstd[0] * k.per_term + k.eps);
        T *y = k.y && place.to[0] >= 0 ? k.y + md_ln_at(place.to[0], k.cols, 0) : nullptr;
        for (int c = (int)threadIdx.x; y && c < k.cols; c += VEC_BLOCK)
            md_store(&y[c], (md_load(&x[c]) - mean[0]) * rstd[0] * (k.weight ? k.weight[c] : 1.0f) +
                                (k.bias ? k.bias[c] : 0.0f));
        if (k.mean && threadIdx.x == 0)
            k.mean[row] = mean[0];
        if (k.rstd && threadIdx.x == 0)
            k.rstd[row] = rstd[0];
    }
}

size_t ln_smem(int threads)
{
    const int stages = LN_STAGES * FWD_OPERANDS * LN_ROWS * threads;
    return (size_t)FWD_SUMS(LN_ROWS, threads) + (size_t)stages * sizeof(uint4);
}

template <class T> md_status ln_run(md_backend *be, md_op op, const md_ln<T> &k)
{
    if (k.rows == 0 || k.cols == 0)
        return MD_OK;
    const int threads = ln_threads<T>(k.cols, cuda_aligned(k.x, k.branch, k.r, k.y));
    if (threads == 0) {
        const int64_t sms = cuda_sms(be), blocks = k.rows < 8 * sms ? k.rows : 8 * sms;
        MD_LAUNCH(md_ln_any<T>, (unsigned)blocks, VEC_BLOCK, 2 * VEC_WARPS * sizeof(float),
                  cuda_stream(be), k);
        return cuda_launched(op);
    }
    const int64_t blocks = ln_blocks(be, k.rows, LN_THREADS / threads);
    MD_LAUNCH(md_ln_rows<T>, (unsigned)blocks, (unsigned)threads, ln_smem(threads), cuda_stream(be),
              k);
    return cuda_launched(op);
}

template <class T> md_status layernorm_run(md_backend *be, const md_layernorm_args *a)
{
    md_ln<T> k = {};
    k.x = cuda_data<T>(a->x);
    k.weight = cuda_data<float>(a->weight);
    k.bias = cuda_data<float>(a->bias);
    k.y = cuda_data<T>(a->y);
    k.mean = cuda_data<float>(a->mean);
    k.rstd = cuda_data<float>(a->rstd);
    MD_TRY(ln_images(MD_OP_layernorm, NULL, NULL, NULL, a->x, &k.images));
    k.rows = (int)md_tensor_rows(a->x);
    k.cols = (int)md_tensor_cols(a->x);
    k.eps = a->eps;
    k.per_col = 1.0f / (float)k.cols;
    k.per_term = 1.0f / (float)(a->unbiased && k.cols > 1 ? k.cols - 1 : k.cols);
    return ln_run(be, MD_OP_layernorm, k);
}

template <class T> md_status residual_run(md_backend *be, const md_residual_ln_args *a)
{
    md_ln<T> k = {};
    k.x = cuda_data<T>(a->x);
    k.branch = cuda_data<T>(a->branch);
    k.gamma = cuda_data<float>(a->gamma);
    k.weight = cuda_data<float>(a->weight);
    k.bias = cuda_data<float>(a->bias);
    k.r = cuda_data<T>(a->r);
    k.y = cuda_data<T>(a->y);
    k.mean = cuda_data<float>(a->mean);
    k.rstd = cuda_data<float>(a->rstd);
    MD_TRY(ln_images(MD_OP_residual_ln, a->keep, a->from, a->to, a->x, &k.images));
    k.rows = (int)md_tensor_rows(a->x);
    k.cols = (int)md_tensor_cols(a->x);
    k.eps = a->eps;
    k.per_col = k.per_term = 1.0f / (float)k.cols;
    return ln_run(be, MD_OP_residual_ln, k);
}

} // namespace

md_status cuda_norm_setup(void)
{
    MD_TRY(cuda_ok(MD_ALLOW_SMEM(md_ln_rows<float>, ln_smem(LN_BLOCK)), "shared memory"));
    MD_TRY(cuda_ok(MD_ALLOW_SMEM(md_ln_rows<md_bf16>, ln_smem(LN_BLOCK)), "shared memory"));
    return cuda_norm_bwd_setup();
}

md_status cuda_layernorm(md_backend *be, const md_layernorm_args *a)
{
    CUDA_CHECK(layernorm, a);
    if (!a->weight != !a->bias || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "layernorm: weight and bias come together, and nothing accumulates");
    return cuda_is_bf16(a->x) ? layernorm_run<md_bf16>(be, a) : layernorm_run<float>(be, a);
}

md_status cuda_residual_ln(md_backend *be, const md_residual_ln_args *a)
{
    CUDA_CHECK(residual_ln, a);
    if (!a->weight != !a->bias || (a->branch && !a->r) || (!a->branch && (a->gamma || a->keep)) ||
        (!a->r && !a->y) || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "residual_ln: this set of operands makes no sense");
    return cuda_is_bf16(a->x) ? residual_run<md_bf16>(be, a) : residual_run<float>(be, a);
}
