/* mm_blas: matrix products by any CBLAS (see cpu_mm.h). Bias and activation are a second pass over
 * the result. Inside a parallel region a BLAS with OpenMP threads runs on the calling thread. */
#if !MD_ONEDNN
#include "kernels/cpu/cpu_mm.h"
#include "kernels/scalar_math.h"

#include <cblas.h>
#include <limits.h>
#include <omp.h>

struct mm_provider {
    int threads;
};

struct mm_prim {
    cpu_mm_shape shape;
    int threads;
};

const char *md_backend_library(void)
{
    return "CBLAS";
}

md_status mm_provider_create(int threads, mm_provider **out)
{
    MD_NEW(*out, 1, "cpu matmul plans");
    (*out)->threads = threads;
    return MD_OK;
}

void mm_provider_destroy(mm_provider *p)
{
    md_free(p);
}

md_status mm_prim_create(mm_provider *p, const cpu_mm_shape *s, mm_prim **out, size_t *scratch)
{
    const int64_t size[] = {s->m, s->n, s->k, s->lda, s->ldb, s->ldc};
    for (size_t i = 0; i < MD_COUNT(size); i++)
        if (size[i] > INT_MAX)
            MD_FAIL(MD_ERR_CONFIG, "a matrix side of %lld is beyond this BLAS", (long long)size[i]);
    MD_NEW(*out, 1, "cpu matmul plans");
    **out = (mm_prim){.shape = *s, .threads = s->single ? 1 : p->threads};
    *scratch = 0;
    return MD_OK;
}

void mm_prim_destroy(mm_prim *prim)
{
    md_free(prim);
}

static void finish_row(float *c, const float *bias, int64_t n, uint8_t act)
{
    if (bias) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            c[j] += bias[j];
    }
    if (act == MD_ACT_GELU) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            c[j] = md_gelu(c[j]);
    } else if (act == MD_ACT_QUICK_GELU) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            c[j] = md_quick_gelu(c[j]);
    }
}

md_status mm_prim_run(const mm_prim *prim, const cpu_mm_run_args *r)
{
    const cpu_mm_shape *s = &prim->shape;
    omp_set_num_threads(prim->threads); /* a BLAS with OpenMP threads looks at this */
    for (int64_t i = 0; i < s->batch; i++) {
        float *c = r->c + i * s->step_c;
        cblas_sgemm(CblasRowMajor, s->trans_a ? CblasTrans : CblasNoTrans,
                    s->trans_b ? CblasTrans : CblasNoTrans, (int)s->m, (int)s->n, (int)s->k, 1.0f,
                    r->a + i * s->step_a, (int)s->lda, r->b + i * s->step_b, (int)s->ldb,
                    s->accumulate ? 1.0f : 0.0f, c, (int)s->ldc);
        if (!s->bias && s->act == MD_ACT_NONE)
            continue;
#pragma omp parallel for num_threads(prim->threads) if (prim->threads > 1)
        for (int64_t row = 0; row < s->m; row++)
            finish_row(c + row * s->ldc, s->bias ? r->bias : NULL, s->n, s->act);
    }
    return MD_OK;
}
#endif
