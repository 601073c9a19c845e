/* cpu_norm: LayerNorm alone, and fused with the residual step before it, forward and backward. Each
 * row is read from memory once and finished while it is in the first-level cache. */
#include "kernels/cpu/cpu_internal.h"

typedef struct row_stats {
    float mean, rstd;
} row_stats;

/* Sum of x and sum of (x - mean)^2; two vectors at a time, because an addition takes four cycles.
 */
static float sum_of(const float *x, int64_t n)
{
    cpu_vec a = {0}, b = {0};
    float rest = 0.0f;
    int64_t c = 0;
    for (; c + 2 * CPU_LANES <= n; c += 2 * CPU_LANES) {
        a += cpu_load(x + c);
        b += cpu_load(x + c + CPU_LANES);
    }
    for (; c < n; c++)
        rest += x[c];
    return cpu_sum_lanes(a + b) + rest;
}

static float square_of(const float *x, float mean, int64_t n)
{
    cpu_vec a = {0}, b = {0};
    float rest = 0.0f;
    int64_t c = 0;
    for (; c + 2 * CPU_LANES <= n; c += 2 * CPU_LANES) {
        cpu_vec p = cpu_load(x + c) - mean, q = cpu_load(x + c + CPU_LANES) - mean;
        a += p * p;
        b += q * q;
    }
    for (; c < n; c++)
        rest += (x[c] - mean) * (x[c] - mean);
    return cpu_sum_lanes(a + b) + rest;
}

/* Two passes over the row: the variance of differences does not cancel. */
static row_stats stats_of(const float *x, int64_t n, float eps, int64_t divisor)
{
    float mean = sum_of(x, n) / (float)n;
    return (row_stats){mean, 1.0f / sqrtf(square_of(x, mean, n) / (float)divisor + eps)};
}

static void normalise(const float *x, row_stats s, const float *weight, const float *bias, float *y,
                      int64_t n)
{
    if (weight) {
#pragma omp simd
        for (int64_t c = 0; c < n; c++)
            y[c] = (x[c] - s.mean) * s.rstd * weight[c] + bias[c];
    } else {
#pragma omp simd
        for (int64_t c = 0; c < n; c++)
            y[c] = (x[c] - s.mean) * s.rstd;
    }
}

static const float *in_data(const md_tensor *t)
{
    return t ? md_f32(t) : NULL;
}

static float *out_data(md_tensor *t)
{
    return t ? md_f32(t) : NULL;
}

md_status cpu_layernorm(md_backend *be, const md_layernorm_args *a)
{
    CPU_CHECK(layernorm, a);
    if (!a->weight != !a->bias || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "layernorm: weight and bias come together, and nothing accumulates");
    const float *x = md_f32(a->x), *weight = in_data(a->weight), *bias = in_data(a->bias);
    float *y = md_f32(a->y), *mean = out_data(a->mean), *rstd = out_data(a->rstd);
    int64_t rows = md_tensor_rows(a->x), cols = md_tensor_cols(a->x);
    int64_t divisor = a->unbiased ? MD_MAX(1, cols - 1) : cols;
#pragma omp parallel for num_threads(be->threads) if (rows * cols > CPU_SERIAL_BELOW)
    for (int64_t r = 0; r < rows; r++) {
        row_stats s = stats_of(x + r * cols, cols, a->eps, divisor);
        normalise(x + r * cols, s, weight, bias, y + r * cols, cols);
        if (mean)
            mean[r] = s.mean;
        if (rstd)
            rstd[r] = s.rstd;
    }
    return MD_OK;
}

/* Row `row` in an operand that holds some images only; -1: not there. packed NULL: it holds all. */
static int64_t packed_row(const int32_t *packed, int64_t row, int64_t tokens)
{
    const int64_t image = row / tokens;
    if (!packed)
        return row;
    return packed[image] < 0 ? -1 : packed[image] * tokens + (row - image * tokens);
}

/* Rows of one image, where operands have images. */
static int64_t rows_of_image(int64_t rows, const md_tensor *keep, const md_tensor *from,
                             const md_tensor *to)
{
    const md_tensor *images = keep ? keep : from ? from : to;
    return images ? rows / md_tensor_count(images) : MD_MAX(rows, 1);
}

static const int32_t *index_data(const md_tensor *t)
{
    return t ? md_i32(t) : NULL;
}

/* The images of `packed` are counted through by index, as the contract has it. */
static md_status check_packed(md_op op, const md_tensor *index, const md_tensor *packed,
                              int64_t tokens)
{
    int64_t next = 0;
    for (int64_t i = 0; index && i < md_tensor_count(index); i++) {
        const int32_t at = md_i32(index)[i];
        if (at >= 0 && at != next++)
            MD_FAIL(MD_ERR_BUG, "%s: image %lld is packed image %d, not %lld", md_op_name(op),
                    (long long)i, (int)at, (long long)next - 1);
    }
    if (index && next * tokens != md_tensor_rows(packed))
        MD_FAIL(MD_ERR_BUG, "%s: %lld images are packed, but %lld rows", md_op_name(op),
                (long long)next, (long long)md_tensor_rows(packed));
    return MD_OK;
}

/* r = x + k * gamma * branch */
static void residual_row(const float *x, const float *branch, const float *gamma, float k, float *r,
                         int64_t n)
{
    if (gamma) {
#pragma omp simd
        for (int64_t c = 0; c < n; c++)
            r[c] = x[c] + k * gamma[c] * branch[c];
    } else {
#pragma omp simd
        for (int64_t c = 0; c < n; c++)
            r[c] = x[c] + k * branch[c];
    }
}

static md_status residual_ln_check(const md_residual_ln_args *a)
{
    CPU_CHECK(residual_ln, a);
    if (!a->weight != !a->bias || (a->branch && !a->r) || (!a->branch && (a->gamma || a->keep)) ||
        (!a->r && !a->y) || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "residual_ln: this set of operands makes no sense");
    const int64_t tokens = rows_of_image(md_tensor_rows(a->x), a->keep, a->from, a->to);
    MD_TRY(check_packed(MD_OP_residual_ln, a->from, a->branch, tokens));
    return check_packed(MD_OP_residual_ln, a->to, a->y, tokens);
}

md_status cpu_residual_ln(md_backend *be, const md_residual_ln_args *a)
{
    MD_TRY(residual_ln_check(a));
    const float *x = md_f32(a->x), *branch = in_data(a->branch), *gamma = in_data(a->gamma);
    const float *keep = in_data(a->keep), *weight = in_data(a->weight), *bias = in_data(a->bias);
    float *r = out_data(a->r), *y = out_data(a->y);
    float *mean = out_data(a->mean), *rstd = out_data(a->rstd);
    int64_t rows = md_tensor_rows(a->x), cols = md_tensor_cols(a->x);
    const int32_t *from = index_data(a->from), *to = index_data(a->to);
    const int64_t tokens = rows_of_image(rows, a->keep, a->from, a->to);
#pragma omp parallel for num_threads(be->threads) if (rows * cols > CPU_SERIAL_BELOW)
    for (int64_t i = 0; i < rows; i++) {
        const float *row = x + i * cols;
        float *sum = r ? r + i * cols : NULL;
        const int64_t b = packed_row(from, i, tokens), out = packed_row(to, i, tokens);
        if (branch && b >= 0)
            residual_row(row, branch + b * cols, gamma, keep ? keep[i / tokens] : 1.0f, sum, cols);
        else if (sum && sum != row)
            memcpy(sum, row, sizeof *sum * (size_t)cols);
        if (!y && !mean && !rstd)
            continue;
        row = sum ? sum : row;
        row_stats s = stats_of(row, cols, a->eps, cols);
        if (y && out >= 0)
            normalise(row, s, weight, bias, y + out * cols, cols);
        if (mean)
            mean[i] = s.mean;
        if (rstd)
            rstd[i] = s.rstd;
    }
    return MD_OK;
}

/* Backward. Absent vectors become a row of ones or zeros in the scratch, so that the inner loops
 * have no conditions. Scratch: ones [C], zeros [C], then per chunk the sums dgamma, dweight, dbias
 * [3, C]. */
#define LN_BWD_ROWS 8

typedef struct ln_bwd {
    const float *r, *branch, *gamma, *keep, *weight, *mean, *rstd, *dr, *dy;
    const int32_t *from, *to;
    float *dx, *dbranch;
    const float *zeros;
    int64_t cols, tokens;
} ln_bwd;

size_t cpu_residual_ln_bwd_scratch(md_backend *be, const md_residual_ln_bwd_args *a)
{
    (void)be;
    int64_t chunks = cpu_chunks(md_tensor_rows(a->dx), LN_BWD_ROWS);
    return sizeof(float) * (size_t)((2 + 4 * chunks) * md_tensor_cols(a->dx));
}

/* The sums over one row that LN' needs: of dy weight and of dy weight xhat. */
typedef struct row_sums {
    float plain, xhat;
} row_sums;

/* They are taken in the pass that adds the row's part of dweight and dbias. dy: of row i. */
static row_sums ln_bwd_sums(const ln_bwd *k, int64_t i, const float *dy, float *dweight,
                            float *dbias)
{
    int64_t n = k->cols, c = 0;
    const float *r = k->r + i * n, *weight = k->weight;
    float mean = k->mean[i], rstd = k->rstd[i], rest1 = 0.0f, rest2 = 0.0f;
    cpu_vec s1 = {0}, s2 = {0};
    for (; c + CPU_LANES <= n; c += CPU_LANES) {
        cpu_vec xhat = (cpu_load(r + c) - mean) * rstd, d = cpu_load(dy + c);
        cpu_vec g = d * cpu_load(weight + c);
        s1 += g;
        s2 += g * xhat;
        cpu_store(dweight + c, cpu_load(dweight + c) + d * xhat);
        cpu_store(dbias + c, cpu_load(dbias + c) + d);
    }
    for (; c < n; c++) {
        float xhat = (r[c] - mean) * rstd, g = dy[c] * weight[c];
        rest1 += g;
        rest2 += g * xhat;
        dweight[c] += dy[c] * xhat;
        dbias[c] += dy[c];
    }
    return (row_sums){(cpu_sum_lanes(s1) + rest1) / (float)n,
                      (cpu_sum_lanes(s2) + rest2) / (float)n};
}

/* g = dr + LN'(dy) for one row into dx; adds the row's part of dweight and dbias. */
static void ln_bwd_row(const ln_bwd *k, int64_t i, float *dweight, float *dbias)
{
    int64_t n = k->cols;
    const float *dr = k->dr ? k->dr + i * n : k->zeros;
    float *dx = k->dx + i * n;
    const int64_t at = packed_row(k->to, i, k->tokens);
    if (!k->dy || at < 0) {
        if (dx != dr)
            memcpy(dx, dr, sizeof *dx * (size_t)n);
        return;
    }
    const float *r = k->r + i * n, *dy = k->dy + at * n, *weight = k->weight;
    const row_sums s = ln_bwd_sums(k, i, dy, dweight, dbias);
    float mean = k->mean[i], rstd = k->rstd[i];
#pragma omp simd
    for (int64_t c = 0; c < n; c++) {
        float xhat = (r[c] - mean) * rstd;
        dx[c] = dr[c] + rstd * (dy[c] * weight[c] - s.plain - xhat * s.xhat);
    }
}

static void branch_bwd_row(const ln_bwd *k, int64_t i, float *dgamma, float *sum)
{
    int64_t n = k->cols;
    const float *g = k->dx + i * n, *gamma = k->gamma, *branch = k->branch;
    float keep = k->keep ? k->keep[i / k->tokens] : 1.0f;
    const int64_t at = packed_row(k->from, i, k->tokens);
    if (at < 0)
        return;
    if (k->dbranch) {
        float *out = k->dbranch + at * n;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            out[c] = keep * gamma[c] * g[c];
            sum[c] += out[c];
        }
    }
    if (branch) {
#pragma omp simd
        for (int64_t c = 0; c < n; c++)
            dgamma[c] += keep * branch[at * n + c] * g[c];
    }
}

static md_status ln_bwd_check(const md_residual_ln_bwd_args *a)
{
    CPU_CHECK(residual_ln_bwd, a);
    if ((!a->dr && !a->dy) || (a->dy && (!a->r || !a->mean || !a->rstd)) ||
        (a->dgamma && (!a->branch || !a->gamma)) || ((a->dweight || a->dbias) && !a->dy) ||
        (a->dbranch_sum && !a->dbranch) || (a->accumulate & 3))
        MD_FAIL(MD_ERR_BUG, "residual_ln_bwd: this set of operands makes no sense");
    const int64_t tokens = rows_of_image(md_tensor_rows(a->dx), a->keep, a->from, a->to);
    MD_TRY(
        check_packed(MD_OP_residual_ln_bwd, a->from, a->branch ? a->branch : a->dbranch, tokens));
    return check_packed(MD_OP_residual_ln_bwd, a->to, a->dy, tokens);
}

md_status cpu_residual_ln_bwd(md_backend *be, const md_residual_ln_bwd_args *a)
{
    MD_TRY(ln_bwd_check(a));
    void *scratch;
    MD_TRY(cpu_scratch(be, MD_OP_residual_ln_bwd, cpu_residual_ln_bwd_scratch(be, a), &scratch));
    int64_t rows = md_tensor_rows(a->dx), cols = md_tensor_cols(a->dx);
    int64_t chunks = cpu_chunks(rows, LN_BWD_ROWS);
    float *ones = scratch, *zeros = ones + cols, *part = zeros + cols;
    for (int64_t c = 0; c < cols; c++)
        ones[c] = 1.0f;
    memset(zeros, 0, sizeof *zeros * (size_t)cols);
    ln_bwd k = {.r = in_data(a->r),
                .branch = a->dgamma ? md_f32(a->branch) : NULL,
                .gamma = a->gamma ? md_f32(a->gamma) : ones,
                .keep = in_data(a->keep),
                .weight = a->weight ? md_f32(a->weight) : ones,
                .mean = in_data(a->mean),
                .rstd = in_data(a->rstd),
                .dr = in_data(a->dr),
                .dy = in_data(a->dy),
                .from = index_data(a->from),
                .to = index_data(a->to),
                .dx = md_f32(a->dx),
                .dbranch = out_data(a->dbranch),
                .zeros = zeros,
                .cols = cols,
                .tokens = rows_of_image(rows, a->keep, a->from, a->to)};
    const int64_t block = chunks * cols;
    float *dgamma = part, *dweight = part + block, *dbias = part + 2 * block;
    float *sum = part + 3 * block;
#pragma omp parallel for num_threads(be->threads) if (rows * cols > CPU_SERIAL_BELOW)
    for (int64_t i = 0; i < chunks; i++) {
        for (int s = 0; s < 4; s++)
            memset(part + (s * chunks + i) * cols, 0, sizeof *part * (size_t)cols);
        int64_t end = cpu_chunk_begin(rows, chunks, i + 1);
        for (int64_t row = cpu_chunk_begin(rows, chunks, i); row < end; row++) {
            ln_bwd_row(&k, row, dweight + i * cols, dbias + i * cols);
            if (k.dbranch || k.branch)
                branch_bwd_row(&k, row, dgamma + i * cols, sum + i * cols);
        }
    }
    cpu_reduce_chunks(be, dgamma, chunks, cols, a->dgamma, a->accumulate >> 2 & 1);
    cpu_reduce_chunks(be, dweight, chunks, cols, a->dweight, a->accumulate >> 3 & 1);
    cpu_reduce_chunks(be, dbias, chunks, cols, a->dbias, a->accumulate >> 4 & 1);
    cpu_reduce_chunks(be, sum, chunks, cols, a->dbranch_sum, a->accumulate >> 5 & 1);
    return MD_OK;
}
