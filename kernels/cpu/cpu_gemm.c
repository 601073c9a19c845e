/* cpu_gemm: gemm, the forward activation where its input is kept, act_bwd, and biases: column sums,
 * and those of qkv. */
#include "kernels/cpu/cpu_internal.h"
#include "kernels/scalar_math.h"

/* With pre the product goes there and a second pass makes y from it. */
static cpu_mm_shape gemm_shape(const md_gemm_args *a)
{
    int64_t m = md_tensor_rows(a->y), n = md_tensor_cols(a->y);
    int64_t k = a->trans_a ? md_tensor_rows(a->a) : md_tensor_cols(a->a);
    return (cpu_mm_shape){.m = m,
                          .n = n,
                          .k = k,
                          .lda = a->trans_a ? m : k,
                          .ldb = a->trans_b ? k : n,
                          .ldc = n,
                          .batch = 1,
                          .trans_a = a->trans_a,
                          .trans_b = a->trans_b,
                          .accumulate = a->accumulate & 1,
                          .bias = a->bias != NULL,
                          .act = (uint8_t)(a->pre ? MD_ACT_NONE : a->act)};
}

size_t cpu_gemm_scratch(md_backend *be, const md_gemm_args *a)
{
    cpu_mm_shape s = gemm_shape(a);
    cpu_mm *mm;
    if (s.m == 0 || s.n == 0 || s.k == 0)
        return 0;
    return cpu_mm_plan(cpu_mm_of(be), &s, &mm) == MD_OK ? cpu_mm_scratch(mm) : MD_NO_SCRATCH;
}

static void act_forward(const md_backend *be, const float *x, float *y, int64_t n, md_act act)
{
    enum { BLOCK = 4096 };
#pragma omp parallel for num_threads(be->threads) if (n > CPU_SERIAL_BELOW)
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t end = MD_MIN(n, first + BLOCK);
        if (act == MD_ACT_GELU) {
#pragma omp simd
            for (int64_t i = first; i < end; i++)
                y[i] = md_gelu(x[i]);
        } else {
#pragma omp simd
            for (int64_t i = first; i < end; i++)
                y[i] = md_quick_gelu(x[i]);
        }
    }
}

/* The product over k = 0 terms, which the libraries do not take: only bias and old value are left.
 */
static void empty_sum(const md_gemm_args *a, const cpu_mm_shape *s, float *c)
{
    const float *bias = a->bias ? md_f32(a->bias) : NULL;
    for (int64_t i = 0; i < s->m * s->n; i++)
        c[i] = (s->accumulate ? c[i] : 0.0f) + (bias ? bias[i % s->n] : 0.0f);
}

static md_status product(md_backend *be, const md_gemm_args *a, const cpu_mm_shape *s, float *c)
{
    cpu_mm *mm;
    void *scratch;
    MD_TRY(cpu_mm_plan(cpu_mm_of(be), s, &mm));
    MD_TRY(cpu_scratch(be, MD_OP_gemm, cpu_mm_scratch(mm), &scratch));
    return cpu_mm_run(mm, &(cpu_mm_run_args){.a = md_f32(a->a),
                                             .b = md_f32(a->b),
                                             .c = c,
                                             .bias = a->bias ? md_f32(a->bias) : NULL,
                                             .scratch = scratch});
}

md_status cpu_gemm(md_backend *be, const md_gemm_args *a)
{
    CPU_CHECK(gemm, a);
    if (a->act != MD_ACT_NONE && a->accumulate)
        MD_FAIL(MD_ERR_BUG, "gemm: accumulation with an activation");
    if (a->pre && a->act == MD_ACT_NONE)
        MD_FAIL(MD_ERR_BUG, "gemm: pre without an activation");
    cpu_mm_shape s = gemm_shape(a);
    float *c = md_f32(a->pre ? a->pre : a->y);
    if (s.k == 0)
        empty_sum(a, &s, c);
    else if (s.m > 0 && s.n > 0)
        MD_TRY(product(be, a, &s, c));
    if (a->act != MD_ACT_NONE && (a->pre || s.k == 0))
        act_forward(be, c, md_f32(a->y), s.m * s.n, a->act);
    return MD_OK;
}

/* The two products. */
static md_gemm_args weight_gradient(const md_linear_bwd_args *a)
{
    return (md_gemm_args){
        .a = a->dy, .b = a->x, .y = a->dw, .trans_a = true, .accumulate = a->accumulate & 1};
}

static md_gemm_args input_gradient(const md_linear_bwd_args *a)
{
    return (md_gemm_args){.a = a->dy, .b = a->w, .y = a->dx};
}

size_t cpu_linear_bwd_scratch(md_backend *be, const md_linear_bwd_args *a)
{
    const md_gemm_args weights = weight_gradient(a), inputs = input_gradient(a);
    const size_t first = cpu_gemm_scratch(be, &weights);
    const size_t second = a->dx && a->w ? cpu_gemm_scratch(be, &inputs) : 0;
    return MD_MAX(first, second); /* MD_NO_SCRATCH is the largest number */
}

md_status cpu_linear_bwd(md_backend *be, const md_linear_bwd_args *a)
{
    CPU_CHECK(linear_bwd, a);
    if ((a->dx && !a->w) || a->accumulate & 2)
        MD_FAIL(MD_ERR_BUG, "linear_bwd: dx needs w and does not accumulate");
    const md_gemm_args weights = weight_gradient(a), inputs = input_gradient(a);
    MD_TRY(cpu_gemm(be, &weights));
    return a->dx ? cpu_gemm(be, &inputs) : MD_OK;
}

/* Rows of a chunk of a column sum: enough that the partial rows stay small beside the input. */
#define COLSUM_ROWS 8

static size_t columns_scratch(int64_t rows, int64_t cols)
{
    return sizeof(float) * (size_t)(cpu_chunks(rows, COLSUM_ROWS) * cols);
}

/* A matrix within a wider one: rows of `cols` numbers, `stride` apart. */
typedef struct columns {
    const float *x;
    int64_t rows, cols, stride;
} columns;

static void add_columns(const md_backend *be, const columns *a, float *part, const md_tensor *y,
                        bool accumulate)
{
    const int64_t chunks = cpu_chunks(a->rows, COLSUM_ROWS);
#pragma omp parallel for num_threads(be->threads) if (a->rows * a->cols > CPU_SERIAL_BELOW)
    for (int64_t i = 0; i < chunks; i++) {
        float *sum = part + i * a->cols;
        const int64_t end = cpu_chunk_begin(a->rows, chunks, i + 1);
        memset(sum, 0, sizeof *sum * (size_t)a->cols);
        for (int64_t r = cpu_chunk_begin(a->rows, chunks, i); r < end; r++) {
#pragma omp simd
            for (int64_t c = 0; c < a->cols; c++)
                sum[c] += a->x[r * a->stride + c];
        }
    }
    cpu_reduce_chunks(be, part, chunks, a->cols, y, accumulate);
}

size_t cpu_colsum_scratch(md_backend *be, const md_colsum_args *a)
{
    (void)be;
    return columns_scratch(md_tensor_rows(a->x), md_tensor_cols(a->x));
}

md_status cpu_colsum(md_backend *be, const md_colsum_args *a)
{
    CPU_CHECK(colsum, a);
    const int64_t cols = md_tensor_cols(a->x);
    const columns x = {md_f32(a->x), md_tensor_rows(a->x), cols, cols};
    void *scratch;
    MD_TRY(cpu_scratch(be, MD_OP_colsum, cpu_colsum_scratch(be, a), &scratch));
    add_columns(be, &x, scratch, a->y, a->accumulate & 1);
    return MD_OK;
}

md_status cpu_qv_bias(md_backend *be, const md_qv_bias_args *a)
{
    (void)be;
    CPU_CHECK(qv_bias, a);
    if (a->accumulate)
        MD_FAIL(MD_ERR_BUG, "qv_bias: it does not accumulate");
    const size_t third = md_tensor_bytes(a->q);
    char *y = a->y->data;
    memcpy(y, a->q->data, third);
    memset(y + third, 0, third);
    memcpy(y + 2 * third, a->v->data, third);
    return MD_OK;
}

size_t cpu_qv_bias_bwd_scratch(md_backend *be, const md_qv_bias_bwd_args *a)
{
    (void)be;
    return columns_scratch(md_tensor_rows(a->x), md_tensor_cols(a->x) / 3);
}

md_status cpu_qv_bias_bwd(md_backend *be, const md_qv_bias_bwd_args *a)
{
    CPU_CHECK(qv_bias_bwd, a);
    const int64_t stride = md_tensor_cols(a->x), cols = stride / 3;
    const columns q = {md_f32(a->x), md_tensor_rows(a->x), cols, stride};
    columns v = q;
    v.x += 2 * cols;
    void *scratch;
    MD_TRY(cpu_scratch(be, MD_OP_qv_bias_bwd, cpu_qv_bias_bwd_scratch(be, a), &scratch));
    add_columns(be, &q, scratch, a->dq, a->accumulate & 1);
    add_columns(be, &v, scratch, a->dv, a->accumulate >> 1 & 1);
    return MD_OK;
}

size_t cpu_act_bwd_scratch(md_backend *be, const md_act_bwd_args *a)
{
    (void)be;
    return a->dbias ? columns_scratch(md_tensor_rows(a->x), md_tensor_cols(a->x)) : 0;
}

static void act_bwd_row(md_act act, const float *x, const float *dy, float *dx, int64_t n)
{
    if (act == MD_ACT_GELU) {
#pragma omp simd
        for (int64_t c = 0; c < n; c++)
            dx[c] = dy[c] * md_gelu_grad(x[c]);
    } else if (act == MD_ACT_QUICK_GELU) {
#pragma omp simd
        for (int64_t c = 0; c < n; c++)
            dx[c] = dy[c] * md_quick_gelu_grad(x[c]);
    } else if (dx != dy) {
        memcpy(dx, dy, sizeof *dx * (size_t)n);
    }
}

md_status cpu_act_bwd(md_backend *be, const md_act_bwd_args *a)
{
    CPU_CHECK(act_bwd, a);
    if (a->accumulate & 1)
        MD_FAIL(MD_ERR_BUG, "act_bwd: dx does not accumulate");
    const float *x = md_f32(a->x), *dy = md_f32(a->dy);
    float *dx = md_f32(a->dx);
    int64_t rows = md_tensor_rows(a->x), cols = md_tensor_cols(a->x);
    int64_t chunks = cpu_chunks(rows, COLSUM_ROWS);
    void *scratch;
    MD_TRY(cpu_scratch(be, MD_OP_act_bwd, cpu_act_bwd_scratch(be, a), &scratch));
    float *part = a->dbias ? scratch : NULL;
#pragma omp parallel for num_threads(be->threads) if (rows * cols > CPU_SERIAL_BELOW)
    for (int64_t i = 0; i < chunks; i++) {
        float *sum = part ? part + i * cols : NULL;
        if (sum)
            memset(sum, 0, sizeof *sum * (size_t)cols);
        for (int64_t r = cpu_chunk_begin(rows, chunks, i); r < cpu_chunk_begin(rows, chunks, i + 1);
             r++) {
            float *out = dx + r * cols;
            act_bwd_row(a->act, x + r * cols, dy + r * cols, out, cols);
            if (!sum)
                continue;
#pragma omp simd
            for (int64_t c = 0; c < cols; c++)
                sum[c] += out[c];
        }
    }
    if (part)
        cpu_reduce_chunks(be, part, chunks, cols, a->dbias, a->accumulate >> 1 & 1);
    return MD_OK;
}
