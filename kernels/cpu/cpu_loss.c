/* cpu_loss: the losses and the squared norm. Sums are f64, per chunk or row, added in its order. */
#include "kernels/cpu/cpu_internal.h"
#include "kernels/scalar_math.h"

#define SUM_LEAST 4096

static double add_up(const double *part, int64_t chunks)
{
    double sum = 0.0;
    for (int64_t i = 0; i < chunks; i++)
        sum += part[i];
    return sum;
}

static void store_sum(const md_tensor *t, bool accumulate, double value)
{
    double *out = t->data;
    *out = accumulate ? *out + value : value;
}

size_t cpu_loss_scratch(md_backend *be, const md_loss_args *a)
{
    (void)be, (void)a;
    return sizeof(double) * CPU_CHUNKS;
}

typedef struct loss_range {
    const float *pred, *target;
    float *dpred;
    int64_t first, end;
} loss_range;

static inline float value_of(md_loss_kind kind, float d, float beta)
{
    if (kind == MD_LOSS_SMOOTH_L1)
        return md_smooth_l1(d, beta);
    return kind == MD_LOSS_L1 ? fabsf(d) : d * d;
}

static inline float slope_of(md_loss_kind kind, float d, float beta)
{
    if (kind == MD_LOSS_SMOOTH_L1)
        return md_smooth_l1_grad(d, beta);
    if (kind == MD_LOSS_L2)
        return 2.0f * d;
    return d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : d;
}

/* Inlined with a constant kind, so that the loops have no branches. */
static inline __attribute__((always_inline)) double loss_loop(md_loss_kind kind, float beta,
                                                              float scale, const loss_range *q)
{
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = q->first; i < q->end; i++)
        sum += (double)value_of(kind, q->pred[i] - q->target[i], beta);
    if (q->dpred) {
#pragma omp simd
        for (int64_t i = q->first; i < q->end; i++)
            q->dpred[i] = scale * slope_of(kind, q->pred[i] - q->target[i], beta);
    }
    return sum;
}

static double loss_of(md_loss_kind kind, float beta, float scale, loss_range q)
{
    switch (kind) {
    case MD_LOSS_SMOOTH_L1:
        return loss_loop(MD_LOSS_SMOOTH_L1, beta, scale, &q);
    case MD_LOSS_L1:
        return loss_loop(MD_LOSS_L1, beta, scale, &q);
    case MD_LOSS_L2:
        return loss_loop(MD_LOSS_L2, beta, scale, &q);
    }
    return 0.0;
}

md_status cpu_loss(md_backend *be, const md_loss_args *a)
{
    CPU_CHECK(loss, a);
    if ((unsigned)a->kind > MD_LOSS_L2 || (a->kind == MD_LOSS_SMOOTH_L1 && !(a->beta > 0.0f)))
        MD_FAIL(MD_ERR_BUG, "loss: kind %d with beta %g", (int)a->kind, (double)a->beta);
    if (a->accumulate >> 1 & 1)
        MD_FAIL(MD_ERR_BUG, "loss: dpred does not accumulate");
    int64_t n = md_tensor_count(a->pred), chunks = cpu_chunks(n, SUM_LEAST);
    void *scratch;
    MD_TRY(cpu_scratch(be, MD_OP_loss, cpu_loss_scratch(be, a), &scratch));
    double *part = scratch;
#pragma omp parallel for num_threads(be->threads) if (n > CPU_SERIAL_BELOW)
    for (int64_t i = 0; i < chunks; i++)
        part[i] = loss_of(a->kind, a->beta, a->scale,
                          (loss_range){.pred = md_f32(a->pred),
                                       .target = md_f32(a->target),
                                       .dpred = a->dpred ? md_f32(a->dpred) : NULL,
                                       .first = cpu_chunk_begin(n, chunks, i),
                                       .end = cpu_chunk_begin(n, chunks, i + 1)});
    store_sum(a->loss, a->accumulate & 1, (double)a->scale * add_up(part, chunks));
    return MD_OK;
}

size_t cpu_cross_entropy_scratch(md_backend *be, const md_cross_entropy_args *a)
{
    (void)be;
    return sizeof(double) * (size_t)md_tensor_rows(a->logits);
}

/* Loss of one row of k classes; out (may be x, or NULL) receives its gradient times scale. Logits
 * count from their maximum: nothing overflows, and large ones lose nothing in the sums. */
static double cross_entropy_row(const float *x, const float *target, int64_t k, float scale,
                                float *out)
{
    float most = x[0];
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < k; i++)
        most = x[i] > most ? x[i] : most;
    double sum = 0.0, all = 0.0, dot = 0.0;
#pragma omp simd reduction(+ : sum, all, dot)
    for (int64_t i = 0; i < k; i++) {
        float z = x[i] - most;
        sum += (double)md_expf(z);
        all += (double)target[i];
        dot += (double)target[i] * (double)z;
    }
    float share = (float)(all / sum);
    if (out) {
#pragma omp simd
        for (int64_t i = 0; i < k; i++)
            out[i] = scale * (share * md_expf(x[i] - most) - target[i]);
    }
    return all * log(sum) - dot;
}

md_status cpu_cross_entropy(md_backend *be, const md_cross_entropy_args *a)
{
    CPU_CHECK(cross_entropy, a);
    int64_t rows = md_tensor_rows(a->logits), k = md_tensor_cols(a->logits);
    if (k < 1 || a->accumulate >> 1 & 1)
        MD_FAIL(MD_ERR_BUG, "cross_entropy: %lld classes; dlogits does not accumulate",
                (long long)k);
    const float *logits = md_f32(a->logits), *target = md_f32(a->target);
    float *out = a->dlogits ? md_f32(a->dlogits) : NULL;
    void *scratch;
    MD_TRY(cpu_scratch(be, MD_OP_cross_entropy, cpu_cross_entropy_scratch(be, a), &scratch));
    double *part = scratch;
#pragma omp parallel for num_threads(be->threads) if (rows * k > CPU_SERIAL_BELOW)
    for (int64_t b = 0; b < rows; b++)
        part[b] = cross_entropy_row(logits + b * k, target + b * k, k, a->scale,
                                    out ? out + b * k : NULL);
    store_sum(a->loss, a->accumulate & 1, (double)a->scale * add_up(part, rows));
    return MD_OK;
}

size_t cpu_sumsq_scratch(md_backend *be, const md_sumsq_args *a)
{
    (void)be, (void)a;
    return 2 * sizeof(double) * CPU_CHUNKS;
}

md_status cpu_sumsq(md_backend *be, const md_sumsq_args *a)
{
    CPU_CHECK(sumsq, a);
    const float *x = md_f32(a->x);
    int64_t n = md_tensor_count(a->x), chunks = cpu_chunks(n, SUM_LEAST);
    void *scratch;
    MD_TRY(cpu_scratch(be, MD_OP_sumsq, cpu_sumsq_scratch(be, a), &scratch));
    double *part = scratch, *part_bad = part + CPU_CHUNKS;
#pragma omp parallel for num_threads(be->threads) if (n > CPU_SERIAL_BELOW)
    for (int64_t i = 0; i < chunks; i++) {
        double sum = 0.0;
        int32_t bad = 0;
        int64_t end = cpu_chunk_begin(n, chunks, i + 1);
#pragma omp simd reduction(+ : sum, bad)
        for (int64_t j = cpu_chunk_begin(n, chunks, i); j < end; j++) {
            sum += (double)x[j] * (double)x[j];
            bad += md_nonfinite(x[j]);
        }
        part[i] = sum;
        part_bad[i] = (double)bad;
    }
    store_sum(a->sum, a->accumulate & 1, add_up(part, chunks));
    store_sum(a->nonfinite, a->accumulate >> 1 & 1, add_up(part_bad, chunks));
    return MD_OK;
}
