/* cuda_norm: LayerNorm alone, and fused with the residual step before it. */
#include "kernels/cuda/cuda_norm.cuh"

/* Threads of a multiprocessor for which there are registers, in blocks of LN_BLOCK: each reads 16
 * bytes of x and of the branch, so 48 KiB are under way, or a little less in other blocks. */
#define FWD_THREADS 1536

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

/* mean and 1 / sqrt(var + eps) of a row, in two passes: the variance of differences does not
 * cancel. All threads. */
template <class T>
MD_DEV void md_row_stats(const md_ln<T> &k, uint4 x, bool there, float (&mean)[1], float (&rstd)[1])
{
    enum { N = md_vec<T>::N };
    float *smem = reinterpret_cast<float *>(md_smem()), v[N];
    md_raw<T>::unpack(x, v);
    mean[0] = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++)
        mean[0] += v[j];
    md_block_sums(mean, smem);
    mean[0] *= k.per_col;
    rstd[0] = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++)
        rstd[0] += there ? (v[j] - mean[0]) * (v[j] - mean[0]) : 0.0f;
    md_block_sums(rstd, smem + blockDim.x / MD_WARP);
    rstd[0] = 1.0f / sqrtf(rstd[0] * k.per_term + k.eps);
}

/* A block has one row: many short blocks keep memory busier than few that go through rows, whose
 * threads wait for each other at every one. */
template <class T> MD_KERNEL_OF(LN_BLOCK, FWD_THREADS / LN_BLOCK) md_ln_row(md_ln<T> k)
{
    enum { N = md_vec<T>::N };
    const int row = (int)blockIdx.x, col = (int)threadIdx.x * N;
    const bool there = col < k.cols;
    const int64_t at = md_ln_at(row, k.cols, col);
    uint4 x = there ? md_load16(k.x + at) : make_uint4(0, 0, 0, 0);
    md_ln_places<1> place;
    md_places_of(k.images, row, k.rows, place);
    if (k.branch && there && place.from[0] >= 0) {
        const uint4 branch = md_load16(k.branch + md_ln_at(place.from[0], k.cols, col));
        float gamma[N];
        md_parameters(k.gamma, col, true, 1.0f, gamma);
        md_residual<T>(x, branch, gamma, place.keep[0]);
    }
    if (k.r && there)
        md_store16(k.r + at, x);
    if (!k.y && !k.mean && !k.rstd)
        return;
    float mean[1], rstd[1], weight[N], bias[N], y[N];
    md_parameters(k.weight, col, there, 1.0f, weight);
    md_parameters(k.bias, col, there, 0.0f, bias);
    md_row_stats(k, x, there, mean, rstd);
    if (threadIdx.x == 0) {
        if (k.mean)
            k.mean[row] = mean[0];
        if (k.rstd)
            k.rstd[row] = rstd[0];
    }
    if (!k.y || !there || place.to[0] < 0)
        return;
    md_raw<T>::unpack(x, y);
#pragma unroll
    for (int j = 0; j < N; j++)
        y[j] = (y[j] - mean[0]) * rstd[0] * weight[j] + bias[j];
    md_vec<T>::store(k.y + md_ln_at(place.to[0], k.cols, col), y);
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

template <class T> md_status ln_run(md_backend *be, md_op op, const md_ln<T> &k)
{
    if (k.rows == 0 || k.cols == 0)
        return MD_OK;
    const int threads =
        ln_threads<T>(k.cols, cuda_aligned(k.x, k.branch, k.r, k.y, k.gamma, k.weight, k.bias));
    if (threads == 0) {
        const int64_t sms = cuda_sms(be), blocks = k.rows < 8 * sms ? k.rows : 8 * sms;
        MD_LAUNCH(md_ln_any<T>, (unsigned)blocks, VEC_BLOCK, 2 * VEC_WARPS * sizeof(float),
                  cuda_stream(be), k);
        return cuda_launched(op);
    }
    MD_LAUNCH(md_ln_row<T>, (unsigned)k.rows, (unsigned)threads,
              2 * (threads / MD_WARP) * sizeof(float), cuda_stream(be), k);
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
