/* cuda_act: activations forward and backward, and column sums. */
#include "kernels/cuda/cuda_vec.cuh"

namespace
{

/* ---- activations. In f32 the formulas of scalar_math. In bf16 the same with approximate 2^x and
 * 1/x, because the exact ones would cost more than the memory traffic: the terms agree within 2e-6
 * for |x| < 5.7 and within 1e-5 further out, where bf16 rounds to 4e-3. ---- */

template <class T> struct md_terms;

template <> struct md_terms<float> {
    static MD_DEV float cdf(float x, float e)
    {
        return md_normal_cdf(x, e);
    }
    static MD_DEV float bell(float x) /* e^(-x^2/2) */
    {
        return md_expf(-0.5f * x * x);
    }
    static MD_DEV float sigmoid(float x)
    {
        return md_sigmoid(x);
    }
};

template <> struct md_terms<md_bf16> {
    /* md_normal_cdf but for the division. */
    static MD_DEV float cdf(float x, float e)
    {
        const float k = md_rcp(1.0f + 0.43f * 0.707106781f * fabsf(x));
        float p = 7.371188208e-2f;
        p = p * k - 3.103908807e-1f;
        p = p * k + 3.837378967e-1f;
        p = p * k - 8.575759334e-2f;
        p = p * k + 2.468626627e-1f;
        p = p * k + 2.049450855e-1f;
        p = p * k + 2.443764988e-1f;
        p = p * k + 2.425145322e-1f;
        const float tail = 0.5f * e * p * k;
        return x < 0.0f ? tail : 1.0f - tail;
    }
    static MD_DEV float bell(float x)
    {
        return md_exp2(-0.5f * MD_LOG2E * (x * x));
    }
    /* The bound keeps 2^y finite, as md_expf does. */
    static MD_DEV float sigmoid(float x)
    {
        const float y = -MD_LOG2E * x;
        return md_rcp(1.0f + md_exp2(y > 126.0f ? 126.0f : y));
    }
};

template <class T, int ACT> MD_DEV float md_act_value(float x)
{
    if (ACT == MD_ACT_GELU)
        return x * md_terms<T>::cdf(x, md_terms<T>::bell(x));
    if (ACT == MD_ACT_QUICK_GELU)
        return x * md_terms<T>::sigmoid(1.702f * x);
    return x;
}

template <class T, int ACT> MD_DEV float md_act_slope(float x)
{
    if (ACT == MD_ACT_GELU) {
        const float e = md_terms<T>::bell(x);
        return md_terms<T>::cdf(x, e) + x * 0.398942280f * e;
    }
    if (ACT == MD_ACT_QUICK_GELU) {
        const float s = md_terms<T>::sigmoid(1.702f * x);
        return s + 1.702f * x * s * (1.0f - s);
    }
    return 1.0f;
}

template <class T, int ACT> struct md_act_pass {
    const T *x;
    T *y;

    template <int W> struct data {
        float x[W];
    };
    template <int W> MD_DEV void load(data<W> &d, int64_t i) const
    {
        md_get(x + i, d.x);
    }
    template <int W> MD_DEV void store(data<W> &d, int64_t i) const
    {
#pragma unroll
        for (int j = 0; j < W; j++)
            d.x[j] = md_act_value<T, ACT>(d.x[j]);
        md_put(y + i, d.x);
    }
};

/* After store() the data holds the terms of the column sums, not yet rounded. */
template <class T, int ACT> struct md_act_bwd_pass {
    const T *x, *dy;
    T *dx;

    template <int W> struct data {
        float x[W], term[W];
    };
    template <int W> MD_DEV void load(data<W> &d, int64_t i) const
    {
        if (ACT != MD_ACT_NONE)
            md_get(x + i, d.x);
        md_get(dy + i, d.term);
    }
    template <int W> MD_DEV void store(data<W> &d, int64_t i) const
    {
        if (ACT != MD_ACT_NONE) {
#pragma unroll
            for (int j = 0; j < W; j++)
                d.term[j] *= md_act_slope<T, ACT>(d.x[j]);
        }
        md_put(dx + i, d.term);
    }
};

template <class T> struct md_colsum_pass {
    const T *x;

    template <int W> struct data {
        float term[W];
    };
    template <int W> MD_DEV void load(data<W> &d, int64_t i) const
    {
        md_get(x + i, d.term);
    }
    template <int W> MD_DEV void store(data<W> &, int64_t) const
    {
    }
};

/* ---- column sums ---- */

/* Rows of a chunk at least, and chunks at most: the partial rows stay small beside the matrix. Of
 * blocks, as many as run at once: were there a few more, they would run alone at the end. */
#define COLUMN_ROWS   64
#define COLUMN_CHUNKS 256
#define COLUMN_PER_SM 4

/* Sets of `cols` columns of a matrix whose rows are `stride` numbers: the first, and one that ends
 * with the row, or all as one. */
struct md_matrix {
    float *part; /* [sets, chunks, cols] */
    int64_t rows, cols, stride;
};

/* A pass over a matrix that adds up the columns of its terms. A block has 32 W columns of one chunk
 * of rows: blockIdx.x tile of columns, blockIdx.y chunk, blockIdx.z set; its warps take the rows in
 * turn. */
template <class Op, int W, int U>
MD_KERNEL_OF(VEC_BLOCK, COLUMN_PER_SM)
md_columns(Op op, md_matrix m)
{
    const int lane = (int)threadIdx.x % MD_WARP, warp = (int)threadIdx.x / MD_WARP;
    const int64_t tile = (int64_t)blockIdx.x * MD_WARP * W, col = tile + lane * W;
    const int64_t at = blockIdx.z * (m.stride - m.cols) + col;
    const int64_t end = m.rows * (blockIdx.y + 1) / gridDim.y;
    float *part = m.part + ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * m.cols;
    float sum[W] = {};
    for (int64_t row = m.rows * blockIdx.y / gridDim.y + warp; row < end; row += VEC_WARPS * U) {
        typename Op::template data<W> d[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (col < m.cols && row + u * VEC_WARPS < end)
                op.load(d[u], (row + u * VEC_WARPS) * m.stride + at);
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (col >= m.cols || row + u * VEC_WARPS >= end)
                continue;
            op.store(d[u], (row + u * VEC_WARPS) * m.stride + at);
#pragma unroll
            for (int j = 0; j < W; j++)
                sum[j] += d[u].term[j];
        }
    }
    md_add_warps(sum, reinterpret_cast<float *>(md_smem()), part, tile, m.cols, false);
}

/* Sums of up to so many chunks are added by one thread a column. */
#define FEW_CHUNKS 16
/* Else a block adds those of so many columns. */
#define REDUCE_COLS 16

/* Sum s of the four, by blockIdx.y, that a reduction makes; false: it is not wanted. */
MD_DEV bool md_reduction(const cuda_sums &k, float *&out, const float *&part, bool &accumulate)
{
    const int s = (int)blockIdx.y;
    out = s == 0 ? k.out[0] : s == 1 ? k.out[1] : s == 2 ? k.out[2] : k.out[3];
    accumulate = s == 0   ? k.accumulate[0]
                 : s == 1 ? k.accumulate[1]
                 : s == 2 ? k.accumulate[2]
                          : k.accumulate[3];
    part = k.part + s * k.chunks * k.width;
    return out != nullptr;
}

/* Many chunks: each of a block's runs of threads has a part of them; the runs are added in order.
 */
MD_KERNEL(VEC_BLOCK) md_reduce(cuda_sums k)
{
    enum { COLS = REDUCE_COLS, RUNS = VEC_BLOCK / COLS };
    float *smem = reinterpret_cast<float *>(md_smem()), *out;
    const float *part;
    bool accumulate;
    if (!md_reduction(k, out, part, accumulate))
        return;
    const int run = (int)threadIdx.x / COLS;
    const int64_t col = (int64_t)blockIdx.x * COLS + threadIdx.x % COLS;
    const int64_t end = k.chunks * (run + 1) / RUNS;
    float sum = 0.0f;
    if (col < k.width) {
#pragma unroll 8
        for (int64_t i = k.chunks * run / RUNS; i < end; i++)
            sum += part[i * k.width + col];
    }
    smem[threadIdx.x] = sum;
    md_barrier();
    if (run > 0 || col >= k.width)
        return;
#pragma unroll
    for (int r = 1; r < RUNS; r++)
        sum += smem[r * COLS + threadIdx.x];
    out[col] = accumulate ? out[col] + sum : sum;
}

/* Few chunks: a thread has a column. */
MD_KERNEL(VEC_BLOCK) md_reduce_few(cuda_sums k)
{
    float *out;
    const float *part;
    bool accumulate;
    const int64_t col = (int64_t)blockIdx.x * VEC_BLOCK + threadIdx.x;
    if (!md_reduction(k, out, part, accumulate) || col >= k.width)
        return;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t i = 0; i < k.chunks; i++)
        sum += part[i * k.width + col];
    out[col] = accumulate ? out[col] + sum : sum;
}

/* The columns whose sums are wanted: all of x, or, with a second output, its first and its last
 * third. */
typedef struct column_args {
    md_op op;
    const md_tensor *x;
    bool aligned;
    float *out[2];
    bool accumulate[2];
} column_args;

int64_t column_chunks(const md_backend *be, const md_tensor *x, int sets)
{
    const int64_t cols = md_tensor_cols(x) / (sets == 2 ? 3 : 1);
    const int64_t tiles = sets * cuda_ceil(cols, MD_WARP * (cuda_is_bf16(x) ? 8 : 4));
    const int64_t blocks = COLUMN_PER_SM * cuda_sms(be) / (tiles > 0 ? tiles : 1);
    const int64_t most = blocks < 1 ? 1 : blocks > COLUMN_CHUNKS ? COLUMN_CHUNKS : blocks;
    return cuda_chunks(md_tensor_rows(x), COLUMN_ROWS, most);
}

size_t column_scratch(const md_backend *be, const md_tensor *x, int sets)
{
    const int64_t cols = md_tensor_cols(x) / (sets == 2 ? 3 : 1);
    return sizeof(float) * (size_t)(sets * column_chunks(be, x, sets) * cols);
}

template <int W, int U, class Op>
md_status columns_run(md_backend *be, const Op &k, const column_args *a)
{
    const int sets = a->out[1] ? 2 : 1;
    void *scratch;
    MD_TRY(cuda_scratch(be, a->op, column_scratch(be, a->x, sets), &scratch));
    md_matrix m;
    m.part = static_cast<float *>(scratch);
    m.rows = md_tensor_rows(a->x);
    m.stride = md_tensor_cols(a->x);
    m.cols = m.stride / (sets == 2 ? 3 : 1);
    if (m.cols == 0)
        return MD_OK;
    const int64_t chunks = column_chunks(be, a->x, sets);
    const int width = a->aligned && m.cols % W == 0 ? W : 1;
    const auto kernel = width == W ? md_columns<Op, W, U> : md_columns<Op, 1, U>;
    const dim3 grid(cuda_blocks(m.cols, MD_WARP * width), (unsigned)chunks, (unsigned)sets);
    MD_LAUNCH(kernel, grid, VEC_BLOCK, VEC_BLOCK * width * sizeof(float), cuda_stream(be), k, m);
    const cuda_sums sums = {
        m.part, chunks, m.cols, {a->out[0], a->out[1]}, {a->accumulate[0], a->accumulate[1]}};
    return cuda_reduce_sums(be, a->op, &sums);
}

template <class T, int ACT> md_status act_bwd_run(md_backend *be, const md_act_bwd_args *a)
{
    md_act_bwd_pass<T, ACT> k;
    k.x = cuda_data<T>(a->x);
    k.dy = cuda_data<T>(a->dy);
    k.dx = cuda_data<T>(a->dx);
    const bool aligned = cuda_aligned(k.x, k.dy, k.dx);
    if (!a->dbias)
        return cuda_each<md_vec<T>::N>(be, MD_OP_act_bwd, k, md_tensor_count(a->x), aligned);
    const column_args c = {
        MD_OP_act_bwd, a->x, aligned, {cuda_data<float>(a->dbias)}, {(a->accumulate & 2) != 0}};
    return columns_run<md_vec<T>::N, 2>(be, k, &c);
}

template <class T> md_status act_bwd_of(md_backend *be, const md_act_bwd_args *a)
{
    if (a->act == MD_ACT_GELU)
        return act_bwd_run<T, MD_ACT_GELU>(be, a);
    if (a->act == MD_ACT_QUICK_GELU)
        return act_bwd_run<T, MD_ACT_QUICK_GELU>(be, a);
    return act_bwd_run<T, MD_ACT_NONE>(be, a);
}

/* Sums of the columns of x as it is; `aligned` is found here. */
template <class T> md_status colsum_run(md_backend *be, column_args c)
{
    md_colsum_pass<T> k;
    k.x = cuda_data<T>(c.x);
    c.aligned = cuda_aligned(k.x);
    return columns_run<md_vec<T>::N, 4>(be, k, &c);
}

md_status colsum_of(md_backend *be, const column_args &c)
{
    return cuda_is_bf16(c.x) ? colsum_run<md_bf16>(be, c) : colsum_run<float>(be, c);
}

typedef struct act_args {
    md_op op;
    const md_tensor *x, *y;
} act_args;

template <class T, int ACT> md_status act_run(md_backend *be, const act_args *a)
{
    md_act_pass<T, ACT> k;
    k.x = cuda_data<T>(a->x);
    k.y = cuda_data<T>(a->y);
    return cuda_each<md_vec<T>::N>(be, a->op, k, md_tensor_count(a->x), cuda_aligned(k.x, k.y));
}

template <class T> md_status act_of(md_backend *be, const act_args *a, md_act act)
{
    if (act == MD_ACT_GELU)
        return act_run<T, MD_ACT_GELU>(be, a);
    if (act == MD_ACT_QUICK_GELU)
        return act_run<T, MD_ACT_QUICK_GELU>(be, a);
    return act_run<T, MD_ACT_NONE>(be, a);
}

} // namespace

md_status cuda_act_forward(md_backend *be, md_op op, const md_tensor *x, md_tensor *y, md_act act)
{
    const act_args a = {op, x, y};
    return cuda_is_bf16(x) ? act_of<md_bf16>(be, &a, act) : act_of<float>(be, &a, act);
}

md_status cuda_reduce_sums(md_backend *be, md_op op, const cuda_sums *sums)
{
    int count = 4;
    while (count > 0 && !sums->out[count - 1])
        count--;
    if (count == 0 || sums->width == 0)
        return MD_OK;
    if (sums->chunks <= FEW_CHUNKS) {
        const dim3 grid(cuda_blocks(sums->width, VEC_BLOCK), (unsigned)count);
        MD_LAUNCH(md_reduce_few, grid, VEC_BLOCK, 0, cuda_stream(be), *sums);
    } else {
        const dim3 grid(cuda_blocks(sums->width, REDUCE_COLS), (unsigned)count);
        MD_LAUNCH(md_reduce, grid, VEC_BLOCK, VEC_BLOCK * sizeof(float), cuda_stream(be), *sums);
    }
    return cuda_launched(op);
}

size_t cuda_colsum_scratch(md_backend *be, const md_colsum_args *a)
{
    return column_scratch(be, a->x, 1);
}

md_status cuda_colsum(md_backend *be, const md_colsum_args *a)
{
    CUDA_CHECK(colsum, a);
    return colsum_of(
        be, {MD_OP_colsum, a->x, false, {cuda_data<float>(a->y)}, {(a->accumulate & 1) != 0}});
}

size_t cuda_qv_bias_bwd_scratch(md_backend *be, const md_qv_bias_bwd_args *a)
{
    return column_scratch(be, a->x, 2);
}

md_status cuda_qv_bias_bwd(md_backend *be, const md_qv_bias_bwd_args *a)
{
    CUDA_CHECK(qv_bias_bwd, a);
    return colsum_of(be, {MD_OP_qv_bias_bwd,
                          a->x,
                          false,
                          {cuda_data<float>(a->dq), cuda_data<float>(a->dv)},
                          {(a->accumulate & 1) != 0, (a->accumulate & 2) != 0}});
}

size_t cuda_act_bwd_scratch(md_backend *be, const md_act_bwd_args *a)
{
    return a->dbias ? column_scratch(be, a->x, 1) : 0;
}

md_status cuda_act_bwd(md_backend *be, const md_act_bwd_args *a)
{
    CUDA_CHECK(act_bwd, a);
    if (a->accumulate & 1)
        MD_FAIL(MD_ERR_BUG, "act_bwd: dx does not accumulate");
    return cuda_is_bf16(a->x) ? act_bwd_of<md_bf16>(be, a) : act_bwd_of<float>(be, a);
}
