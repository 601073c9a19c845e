/* cpu_backend: the table of the cpu backend and what its ops share. */
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_internal.h"

static const md_op_table table = {
#define CPU_ENTRY(op) .op = cpu_##op,
    MD_OPS(CPU_ENTRY)
#undef CPU_ENTRY
};

static size_t cpu_scratch_bytes(md_backend *be, md_op op, const md_operands *a)
{
    switch ((int)op) {
#define CPU_CASE(op) \
    case MD_OP_##op: \
        return cpu_##op##_scratch(be, (const md_##op##_args *)(const void *)a);
        CPU_OPS_WITH_SCRATCH(CPU_CASE)
#undef CPU_CASE
    default:
        return 0;
    }
}

static void cpu_destroy(md_backend *be)
{
    cpu_mm_cache_destroy(be->impl);
    md_free(be);
}

md_status md_cpu_create(int threads, md_backend **out)
{
    if (threads < 0)
        MD_FAIL(MD_ERR_CONFIG, "the cpu backend cannot run on %d threads", threads);
    if (threads == 0)
        threads = omp_get_max_threads();
    omp_set_num_threads(threads);
    md_backend *be;
    MD_NEW(be, 1, "cpu backend");
    *be = (md_backend){.name = "cpu",
                       .ops = &table,
                       .scratch_bytes = cpu_scratch_bytes,
                       .destroy = cpu_destroy,
                       .threads = threads};
    cpu_mm_cache *cache = NULL;
    md_status st = cpu_mm_cache_create(threads, &cache);
    be->impl = cache;
    if (st != MD_OK) {
        cpu_destroy(be);
        return st;
    }
    *out = be;
    return MD_OK;
}

md_status cpu_scratch(const md_backend *be, md_op op, size_t need, void **scratch)
{
    if (be->scratch_size < need)
        MD_FAIL(MD_ERR_BUG, "%s needs %zu bytes of scratch but the backend was given %zu",
                md_op_name(op), need, be->scratch_size);
    *scratch = be->scratch;
    return MD_OK;
}

md_status cpu_check(md_op op, const md_operands *a)
{
    MD_TRY(md_op_check(op, a));
    for (int i = 0; i < MD_OP_IN; i++)
        if (a->in[i] && a->in[i]->dtype == MD_BF16)
            MD_FAIL(MD_ERR_BUG, "%s: the cpu backend has no bf16", md_op_name(op));
    return MD_OK;
}

md_status cpu_check_index(md_op op, const md_tensor *index, int64_t limit)
{
    const int32_t *ix = index->data;
    int64_t n = md_tensor_count(index), bad = 0;
#pragma omp simd reduction(+ : bad)
    for (int64_t i = 0; i < n; i++)
        bad += ix[i] < 0 || ix[i] >= limit;
    if (bad)
        MD_FAIL(MD_ERR_BUG, "%s: %lld indices are not in [0, %lld)", md_op_name(op), (long long)bad,
                (long long)limit);
    return MD_OK;
}

void cpu_reduce_chunks(const md_backend *be, const float *part, int64_t chunks, int64_t width,
                       const md_tensor *out, bool accumulate)
{
    enum { BLOCK = 256 };
    if (!out)
        return;
    float *y = md_f32(out);
#pragma omp parallel for num_threads(be->threads) if (chunks * width > CPU_SERIAL_BELOW)
    for (int64_t first = 0; first < width; first += BLOCK) {
        int64_t n = MD_MIN(BLOCK, width - first);
        float sum[BLOCK] = {0};
        for (int64_t i = 0; i < chunks; i++) {
            const float *row = part + i * width + first;
#pragma omp simd
            for (int64_t c = 0; c < n; c++)
                sum[c] += row[c];
        }
        for (int64_t c = 0; c < n; c++)
            y[first + c] = accumulate ? y[first + c] + sum[c] : sum[c];
    }
}
