/* cuda_loss: the losses and the squared norm. Elements are dealt to threads in groups of 16 bytes,
 * whatever the address of the first; a thread adds its own in f64, the block its threads, and one
 * last block the blocks, whose number depends on the number of elements and on the device. */
#include "kernels/cuda/cuda_vec.cuh"

/* Blocks of a sum at most. */
static int most_blocks(const md_backend *be)
{
    return 8 * cuda_sms(be);
}

static int sum_blocks(const md_backend *be, int64_t n, int64_t per_block)
{
    const int64_t blocks = cuda_ceil(n, per_block), most = most_blocks(be);
    return (int)(blocks < 1 ? 1 : blocks > most ? most : blocks);
}

namespace
{

/* One sum or two at once: part[s][block] and out[s]. */
struct md_last_sum {
    const double *part;
    double *out[2];
    double scale;
    int blocks, accumulate;
};

MD_DEV void md_put_partials(double (&sum)[2], double *part)
{
    md_block_sums(sum, reinterpret_cast<double *>(md_smem()));
    if (threadIdx.x < 2)
        part[threadIdx.x * gridDim.x + blockIdx.x] = threadIdx.x == 0 ? sum[0] : sum[1];
}

template <int S> MD_KERNEL(VEC_BLOCK) md_add_partials(md_last_sum k)
{
    double sum[S];
#pragma unroll
    for (int s = 0; s < S; s++) {
        sum[s] = 0.0;
        for (int i = (int)threadIdx.x; i < k.blocks; i += VEC_BLOCK)
            sum[s] += k.part[s * k.blocks + i];
    }
    md_block_sums(sum, reinterpret_cast<double *>(md_smem()));
    if (threadIdx.x == 0) {
#pragma unroll
        for (int s = 0; s < S; s++)
            *k.out[s] = (k.accumulate >> s & 1 ? *k.out[s] : 0.0) + k.scale * sum[s];
    }
}

template <class T> struct md_loss_pass {
    const T *pred, *target;
    T *dpred;
    double *part;
    int64_t n;
    float beta, scale;
};

template <int KIND> MD_DEV float md_loss_value(float d, float beta)
{
    if (KIND == MD_LOSS_SMOOTH_L1)
        return md_smooth_l1(d, beta);
    return KIND == MD_LOSS_L1 ? fabsf(d) : d * d;
}

template <int KIND> MD_DEV float md_loss_slope(float d, float beta)
{
    if (KIND == MD_LOSS_SMOOTH_L1)
        return md_smooth_l1_grad(d, beta);
    if (KIND == MD_LOSS_L2)
        return 2.0f * d;
    return d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : d;
}

/* Elements [i, i + W). */
template <class T, int KIND, bool ALIGNED, int W>
MD_DEV double md_loss_group(const md_loss_pass<T> &k, int64_t i)
{
    float pred[W], target[W];
    double sum = 0.0;
    md_get_any<ALIGNED>(k.pred + i, pred);
    md_get_any<ALIGNED>(k.target + i, target);
#pragma unroll
    for (int j = 0; j < W; j++) {
        const float d = pred[j] - target[j];
        sum += (double)md_loss_value<KIND>(d, k.beta);
        pred[j] = k.scale * md_loss_slope<KIND>(d, k.beta);
    }
    if (k.dpred)
        md_put_any<ALIGNED>(k.dpred + i, pred);
    return sum;
}

template <class T, int KIND, bool ALIGNED> MD_KERNEL(VEC_BLOCK) md_loss_sum(md_loss_pass<T> k)
{
    enum { W = md_vec<T>::N };
    const int64_t id = (int64_t)blockIdx.x * VEC_BLOCK + threadIdx.x;
    const int64_t step = (int64_t)gridDim.x * VEC_BLOCK * W;
    double sum[1] = {0.0};
    for (int64_t i = id * W; i + W <= k.n; i += step)
        sum[0] += md_loss_group<T, KIND, ALIGNED, W>(k, i);
    if (id < k.n % W)
        sum[0] += md_loss_group<T, KIND, false, 1>(k, k.n - k.n % W + id);
    md_block_sums(sum, reinterpret_cast<double *>(md_smem()));
    if (threadIdx.x == 0)
        k.part[blockIdx.x] = sum[0];
}

template <class T> struct md_cross_entropy_pass {
    const T *logits;
    const float *target;
    T *dlogits;
    double *part; /* loss of every row */
    int64_t cols;
    float scale;
};

/* Maximum over the block, the same on every thread. smem: a float per warp. All threads. */
MD_DEV float md_block_max(float v, float *smem)
{
    v = md_warp_max(v);
    if (threadIdx.x % MD_WARP == 0)
        smem[threadIdx.x / MD_WARP] = v;
    md_barrier();
    v = smem[0];
#pragma unroll
    for (int w = 1; w < VEC_WARPS; w++)
        v = fmaxf(v, smem[w]);
    return v;
}

/* A block has one row, which it reads three times, after the first from the caches: for the
 * maximum, from which logits count so that nothing overflows, the sums, and the gradient. cols is a
 * multiple of W. */
template <class T, int W> MD_KERNEL(VEC_BLOCK) md_cross_entropy(md_cross_entropy_pass<T> k)
{
    const int64_t row = blockIdx.x * k.cols;
    double *smem = reinterpret_cast<double *>(md_smem());
    float x[W], target[W], most = -INFINITY;
    for (int64_t c = (int64_t)threadIdx.x * W; c < k.cols; c += VEC_BLOCK * W) {
        md_get(k.logits + row + c, x);
#pragma unroll
        for (int j = 0; j < W; j++)
            most = fmaxf(most, x[j]);
    }
    most = md_block_max(most, reinterpret_cast<float *>(smem + 3 * VEC_WARPS));
    double sum[3] = {}; /* of e^logit, of the target, of target times logit */
    for (int64_t c = (int64_t)threadIdx.x * W; c < k.cols; c += VEC_BLOCK * W) {
        md_get(k.logits + row + c, x);
        md_get(k.target + row + c, target);
#pragma unroll
        for (int j = 0; j < W; j++) {
            sum[0] += (double)md_exp(x[j] - most);
            sum[1] += (double)target[j];
            sum[2] += (double)target[j] * (double)(x[j] - most);
        }
    }
    md_block_sums(sum, smem);
    if (threadIdx.x == 0)
        k.part[blockIdx.x] = sum[1] * log(sum[0]) - sum[2];
    if (!k.dlogits)
        return;
    const float share = (float)(sum[1] / sum[0]);
    for (int64_t c = (int64_t)threadIdx.x * W; c < k.cols; c += VEC_BLOCK * W) {
        md_get(k.logits + row + c, x);
        md_get(k.target + row + c, target);
#pragma unroll
        for (int j = 0; j < W; j++)
            x[j] = k.scale * (share * md_exp(x[j] - most) - target[j]);
        md_put(k.dlogits + row + c, x);
    }
}

struct md_sumsq_pass {
    const float *x;
    double *part;
    int64_t n;
};

template <int W> MD_DEV void md_square(const float (&x)[W], double (&sum)[2])
{
    int bad = 0;
#pragma unroll
    for (int j = 0; j < W; j++) {
        sum[0] += (double)x[j] * (double)x[j];
        bad += md_nonfinite(x[j]);
    }
    sum[1] += (double)bad;
}

/* Four groups of each thread are read at a time. */
template <bool ALIGNED> MD_KERNEL(VEC_BLOCK) md_sumsq_sum(md_sumsq_pass k)
{
    enum { W = 4, U = 4 };
    const int64_t id = (int64_t)blockIdx.x * VEC_BLOCK + threadIdx.x;
    const int64_t step = (int64_t)gridDim.x * VEC_BLOCK * W;
    double sum[2] = {0.0, 0.0};
    int64_t i = id * W;
    for (; i + (U - 1) * step + W <= k.n; i += U * step) {
        float x[U][W];
#pragma unroll
        for (int u = 0; u < U; u++)
            md_get_any<ALIGNED>(k.x + i + u * step, x[u]);
#pragma unroll
        for (int u = 0; u < U; u++)
            md_square(x[u], sum);
    }
    for (; i + W <= k.n; i += step) {
        float x[W];
        md_get_any<ALIGNED>(k.x + i, x);
        md_square(x, sum);
    }
    if (id < k.n % W) {
        const float x[1] = {k.x[k.n - k.n % W + id]};
        md_square(x, sum);
    }
    md_put_partials(sum, k.part);
}

template <class T, bool ALIGNED>
void loss_launch(cudaStream_t stream, int blocks, md_loss_kind kind, const md_loss_pass<T> &k)
{
    const auto kernel = kind == MD_LOSS_SMOOTH_L1 ? md_loss_sum<T, MD_LOSS_SMOOTH_L1, ALIGNED>
                        : kind == MD_LOSS_L1      ? md_loss_sum<T, MD_LOSS_L1, ALIGNED>
                                                  : md_loss_sum<T, MD_LOSS_L2, ALIGNED>;
    MD_LAUNCH(kernel, (unsigned)blocks, VEC_BLOCK, VEC_WARPS * sizeof(double), stream, k);
}

template <class T> md_status loss_run(md_backend *be, const md_loss_args *a, double *part)
{
    md_loss_pass<T> k;
    k.pred = cuda_data<T>(a->pred);
    k.target = cuda_data<T>(a->target);
    k.dpred = cuda_data<T>(a->dpred);
    k.part = part;
    k.n = md_tensor_count(a->pred);
    k.beta = a->beta;
    k.scale = a->scale;
    md_last_sum last = {};
    last.part = part;
    last.out[0] = cuda_data<double>(a->loss);
    last.scale = (double)a->scale;
    last.blocks = sum_blocks(be, k.n, VEC_BLOCK * md_vec<T>::N);
    last.accumulate = (int)a->accumulate;
    if (cuda_aligned(k.pred, k.target, k.dpred))
        loss_launch<T, true>(cuda_stream(be), last.blocks, a->kind, k);
    else
        loss_launch<T, false>(cuda_stream(be), last.blocks, a->kind, k);
    MD_LAUNCH(md_add_partials<1>, 1, VEC_BLOCK, VEC_WARPS * sizeof(double), cuda_stream(be), last);
    return cuda_launched(MD_OP_loss);
}

template <class T>
md_status cross_entropy_run(md_backend *be, const md_cross_entropy_args *a, double *part)
{
    md_cross_entropy_pass<T> k;
    const int64_t rows = md_tensor_rows(a->logits);
    k.logits = cuda_data<T>(a->logits);
    k.target = cuda_data<float>(a->target);
    k.dlogits = cuda_data<T>(a->dlogits);
    k.part = part;
    k.cols = md_tensor_cols(a->logits);
    k.scale = a->scale;
    enum { W = md_vec<T>::N };
    const bool aligned = cuda_aligned(k.logits, k.target, k.dlogits);
    const auto kernel =
        vec_width<T>(k.cols, aligned) == W ? md_cross_entropy<T, W> : md_cross_entropy<T, 1>;
    const size_t smem = 3 * VEC_WARPS * sizeof(double) + VEC_WARPS * sizeof(float);
    if (rows > 0)
        MD_LAUNCH(kernel, (unsigned)rows, VEC_BLOCK, smem, cuda_stream(be), k);
    md_last_sum last = {};
    last.part = part;
    last.out[0] = cuda_data<double>(a->loss);
    last.scale = (double)a->scale;
    last.blocks = (int)rows;
    last.accumulate = (int)a->accumulate;
    MD_LAUNCH(md_add_partials<1>, 1, VEC_BLOCK, VEC_WARPS * sizeof(double), cuda_stream(be), last);
    return cuda_launched(MD_OP_cross_entropy);
}

} // namespace

size_t cuda_loss_scratch(md_backend *be, const md_loss_args *a)
{
    (void)a;
    return sizeof(double) * (size_t)most_blocks(be);
}

md_status cuda_loss(md_backend *be, const md_loss_args *a)
{
    CUDA_CHECK(loss, a);
    if ((unsigned)a->kind > MD_LOSS_L2 || (a->kind == MD_LOSS_SMOOTH_L1 && !(a->beta > 0.0f)))
        MD_FAIL(MD_ERR_BUG, "loss: kind %d with beta %g", (int)a->kind, (double)a->beta);
    if (a->accumulate >> 1 & 1)
        MD_FAIL(MD_ERR_BUG, "loss: dpred does not accumulate");
    void *scratch;
    MD_TRY(cuda_scratch(be, MD_OP_loss, cuda_loss_scratch(be, a), &scratch));
    double *part = static_cast<double *>(scratch);
    return cuda_is_bf16(a->pred) ? loss_run<md_bf16>(be, a, part) : loss_run<float>(be, a, part);
}

size_t cuda_cross_entropy_scratch(md_backend *be, const md_cross_entropy_args *a)
{
    (void)be;
    return sizeof(double) * (size_t)md_tensor_rows(a->logits);
}

md_status cuda_cross_entropy(md_backend *be, const md_cross_entropy_args *a)
{
    CUDA_CHECK(cross_entropy, a);
    if (md_tensor_cols(a->logits) < 1 || a->accumulate >> 1 & 1)
        MD_FAIL(MD_ERR_BUG, "cross_entropy: %lld classes; dlogits does not accumulate",
                (long long)md_tensor_cols(a->logits));
    void *scratch;
    MD_TRY(cuda_scratch(be, MD_OP_cross_entropy, cuda_cross_entropy_scratch(be, a), &scratch));
    double *part = static_cast<double *>(scratch);
    return cuda_is_bf16(a->logits) ? cross_entropy_run<md_bf16>(be, a, part)
                                   : cross_entropy_run<float>(be, a, part);
}

size_t cuda_sumsq_scratch(md_backend *be, const md_sumsq_args *a)
{
    (void)a;
    return 2 * sizeof(double) * (size_t)most_blocks(be);
}

md_status cuda_sumsq(md_backend *be, const md_sumsq_args *a)
{
    CUDA_CHECK(sumsq, a);
    void *scratch;
    MD_TRY(cuda_scratch(be, MD_OP_sumsq, cuda_sumsq_scratch(be, a), &scratch));
    md_sumsq_pass k;
    k.x = cuda_data<float>(a->x);
    k.part = static_cast<double *>(scratch);
    k.n = md_tensor_count(a->x);
    md_last_sum last = {};
    last.part = k.part;
    last.out[0] = cuda_data<double>(a->sum);
    last.out[1] = cuda_data<double>(a->nonfinite);
    last.scale = 1.0;
    last.blocks = sum_blocks(be, k.n, VEC_BLOCK * 16);
    last.accumulate = (int)a->accumulate;
    const auto kernel = cuda_aligned(k.x) ? md_sumsq_sum<true> : md_sumsq_sum<false>;
    const size_t smem = 2 * VEC_WARPS * sizeof(double);
    MD_LAUNCH(kernel, (unsigned)last.blocks, VEC_BLOCK, smem, cuda_stream(be), k);
    MD_LAUNCH(md_add_partials<2>, 1, VEC_BLOCK, smem, cuda_stream(be), last);
    return cuda_launched(MD_OP_sumsq);
}
