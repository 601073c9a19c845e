/* cpu_optim: adamw, and the plain vector ops axpy and cast. */
#include "kernels/cpu/cpu_internal.h"
#include "kernels/scalar_math.h"

#define BLOCK 4096

md_status cpu_adamw(md_backend *be, const md_adamw_args *a)
{
    CPU_CHECK(adamw, a);
    if (a->step < 1)
        MD_FAIL(MD_ERR_BUG, "adamw: step %lld, the first one is 1", (long long)a->step);
    double t = (double)a->step;
    md_adamw_coef k = {.decay = (float)(1.0 - a->lr * a->weight_decay),
                       .rest1 = (float)(1.0 - a->beta1),
                       .beta2 = (float)a->beta2,
                       .rest2 = (float)(1.0 - a->beta2),
                       .step_size = (float)(a->lr / (1.0 - pow(a->beta1, t))),
                       .root = (float)(1.0 / sqrt(1.0 - pow(a->beta2, t))),
                       .eps = (float)a->eps,
                       .grad_scale = (float)a->grad_scale};
    const float *grad = md_f32(a->grad);
    float *p = md_f32(a->param), *m = md_f32(a->m), *v = md_f32(a->v);
    uint16_t *copy = a->copy ? a->copy->data : NULL;
    int64_t n = md_tensor_count(a->grad);
#pragma omp parallel for num_threads(be->threads) if (n > CPU_SERIAL_BELOW)
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t end = MD_MIN(n, first + BLOCK);
#pragma omp simd
        for (int64_t i = first; i < end; i++)
            md_adamw_one(&k, grad[i], &p[i], &m[i], &v[i]);
        if (copy)
            for (int64_t i = first; i < end; i++)
                copy[i] = md_bf16_from_f32(p[i]);
    }
    return MD_OK;
}

md_status cpu_axpy(md_backend *be, const md_axpy_args *a)
{
    CPU_CHECK(axpy, a);
    const float *x = md_f32(a->x);
    float *y = md_f32(a->y), alpha = a->alpha;
    int64_t n = md_tensor_count(a->x);
    if (a->accumulate & 1) {
#pragma omp parallel for simd num_threads(be->threads) if (n > CPU_SERIAL_BELOW)
        for (int64_t i = 0; i < n; i++)
            y[i] += alpha * x[i];
    } else {
#pragma omp parallel for simd num_threads(be->threads) if (n > CPU_SERIAL_BELOW)
        for (int64_t i = 0; i < n; i++)
            y[i] = alpha * x[i];
    }
    return MD_OK;
}

md_status cpu_cast(md_backend *be, const md_cast_args *a)
{
    MD_TRY(md_op_check(MD_OP_cast, (const md_operands *)(const void *)a));
    int64_t n = md_tensor_count(a->x);
    if (a->accumulate)
        MD_FAIL(MD_ERR_BUG, "cast: it does not accumulate");
    const bool narrow = a->y->dtype == MD_BF16, same = a->x->dtype == a->y->dtype;
    const float *x = a->x->data;
    const uint16_t *half = a->x->data;
    float *y = a->y->data;
    uint16_t *out = a->y->data;
#pragma omp parallel for num_threads(be->threads) if (n > CPU_SERIAL_BELOW)
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t end = MD_MIN(n, first + BLOCK);
        if (same && narrow)
            memcpy(out + first, half + first, sizeof *out * (size_t)(end - first));
        else if (same)
            memcpy(y + first, x + first, sizeof *y * (size_t)(end - first));
        else if (narrow)
            for (int64_t i = first; i < end; i++)
                out[i] = md_bf16_from_f32(x[i]);
        else
            for (int64_t i = first; i < end; i++)
                y[i] = md_f32_from_bf16(half[i]);
    }
    return MD_OK;
}
