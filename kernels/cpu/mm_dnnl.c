/* mm_dnnl: matrix products by oneDNN 2.x matmul primitives (see cpu_mm.h).
 *
 * A transposed operand is a strided memory descriptor; bias, activation and accumulation are
 * oneDNN's bias argument and post-ops. Scratchpads are the caller's, so a run allocates nothing but
 * the few bytes of oneDNN's argument list. Each thread has its own stream and memory objects,
 * because setting a data handle is not thread-safe. Weights are not packed ahead: on 788 to 8320
 * rows that gains 3 to 10 % of a product, and packing once a step costs as much. */
#if MD_ONEDNN
#include "kernels/cpu/cpu_mm.h"

#include <dnnl.h>
#include <omp.h>
#include <stdio.h>

#define MM_ARGS 5

struct mm_provider {
    int threads;
    dnnl_engine_t engine;
    dnnl_stream_t *stream; /* one per thread */
};

struct mm_prim {
    const mm_provider *provider;
    dnnl_primitive_t prim;
    int sets, args;                  /* one set of arguments per thread that may run it */
    dnnl_exec_arg_t (*arg)[MM_ARGS]; /* src, weights, dst, scratchpad, bias */
};

#define DNNL_TRY(call)                                                            \
    do {                                                                          \
        dnnl_status_t dnnl_try_ = (call);                                         \
        if (dnnl_try_ != dnnl_success)                                            \
            MD_FAIL(dnnl_try_ == dnnl_out_of_memory ? MD_ERR_MEMORY : MD_ERR_BUG, \
                    "oneDNN status %d from %s", (int)dnnl_try_, #call);           \
    } while (0)

const char *md_backend_library(void)
{
    static char text[64];
    const dnnl_version_t *v = dnnl_version();
    snprintf(text, sizeof text, "oneDNN %d.%d.%d", v->major, v->minor, v->patch);
    return text;
}

md_status mm_provider_create(int threads, mm_provider **out)
{
    MD_NEW(*out, 1, "cpu matmul plans");
    mm_provider *p = *out;
    p->threads = threads;
    MD_NEW(p->stream, threads, "cpu matmul plans");
    DNNL_TRY(dnnl_engine_create(&p->engine, dnnl_cpu, 0));
    for (int t = 0; t < threads; t++)
        DNNL_TRY(dnnl_stream_create(&p->stream[t], p->engine, dnnl_stream_default_flags));
    return MD_OK;
}

void mm_provider_destroy(mm_provider *p)
{
    if (!p)
        return;
    for (int t = 0; p->stream && t < p->threads; t++)
        if (p->stream[t])
            dnnl_stream_destroy(p->stream[t]);
    if (p->engine)
        dnnl_engine_destroy(p->engine);
    md_free(p->stream);
    md_free(p);
}

typedef struct mat {
    int64_t batch, rows, cols, ld, step;
    bool trans;
} mat;

/* A batch of matrices [rows, cols]; trans: they are stored transposed, with row stride ld. */
static md_status mat_desc(dnnl_memory_desc_t *md, mat x)
{
    dnnl_dims_t dims = {x.batch, x.rows, x.cols};
    dnnl_dims_t strides = {x.step, x.trans ? 1 : x.ld, x.trans ? x.ld : 1};
    int skip = x.batch == 1 ? 1 : 0;
    DNNL_TRY(dnnl_memory_desc_init_by_strides(md, 3 - skip, dims + skip, dnnl_f32, strides + skip));
    return MD_OK;
}

typedef struct mm_descs {
    dnnl_memory_desc_t a, b, bias, c;
} mm_descs;

static md_status descs_make(const cpu_mm_shape *s, mm_descs *d)
{
    MD_TRY(mat_desc(&d->a, (mat){s->batch, s->m, s->k, s->lda, s->step_a, s->trans_a}));
    MD_TRY(mat_desc(&d->b, (mat){s->batch, s->k, s->n, s->ldb, s->step_b, s->trans_b}));
    MD_TRY(mat_desc(&d->c, (mat){s->batch, s->m, s->n, s->ldc, s->step_c, false}));
    dnnl_dims_t one = {1, 1, 1}, strides = {s->n, s->n, 1};
    int skip = s->batch == 1 ? 1 : 0;
    one[2] = s->n;
    DNNL_TRY(
        dnnl_memory_desc_init_by_strides(&d->bias, 3 - skip, one + skip, dnnl_f32, strides + skip));
    return MD_OK;
}

static md_status attr_make(const cpu_mm_shape *s, dnnl_primitive_attr_t attr)
{
    DNNL_TRY(dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user));
    dnnl_post_ops_t ops;
    DNNL_TRY(dnnl_post_ops_create(&ops));
    dnnl_status_t st = dnnl_success;
    if (s->accumulate)
        st = dnnl_post_ops_append_sum(ops, 1.0f);
    else if (s->act == MD_ACT_GELU)
        st = dnnl_post_ops_append_eltwise(ops, 1.0f, dnnl_eltwise_gelu_erf, 0.0f, 0.0f);
    else if (s->act == MD_ACT_QUICK_GELU)
        st = dnnl_post_ops_append_eltwise(ops, 1.0f, dnnl_eltwise_swish, 1.702f, 0.0f);
    if (st == dnnl_success)
        st = dnnl_primitive_attr_set_post_ops(attr, ops);
    dnnl_post_ops_destroy(ops);
    DNNL_TRY(st);
    return MD_OK;
}

static md_status memories_make(mm_prim *prim, const mm_descs *d, const dnnl_memory_desc_t *pad)
{
    struct {
        int arg;
        const dnnl_memory_desc_t *md;
    } list[MM_ARGS] = {{DNNL_ARG_SRC, &d->a},
                       {DNNL_ARG_WEIGHTS, &d->b},
                       {DNNL_ARG_DST, &d->c},
                       {DNNL_ARG_SCRATCHPAD, pad},
                       {DNNL_ARG_BIAS, &d->bias}};
    MD_NEW(prim->arg, prim->sets, "cpu matmul plans");
    for (int t = 0; t < prim->sets; t++)
        for (int i = 0; i < prim->args; i++) {
            prim->arg[t][i].arg = list[i].arg;
            DNNL_TRY(dnnl_memory_create(&prim->arg[t][i].memory, list[i].md, prim->provider->engine,
                                        DNNL_MEMORY_NONE));
        }
    return MD_OK;
}

static md_status prim_make(mm_prim *prim, const cpu_mm_shape *s, dnnl_primitive_attr_t attr,
                           size_t *scratch)
{
    mm_descs d;
    MD_TRY(descs_make(s, &d));
    MD_TRY(attr_make(s, attr));
    dnnl_matmul_desc_t desc;
    DNNL_TRY(dnnl_matmul_desc_init(&desc, &d.a, &d.b, s->bias ? &d.bias : NULL, &d.c));
    dnnl_primitive_desc_t pd = NULL;
    DNNL_TRY(dnnl_primitive_desc_create(&pd, &desc, attr, prim->provider->engine, NULL));
    const dnnl_memory_desc_t *pad = dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
    *scratch = dnnl_memory_desc_get_size(pad);
    md_status st = memories_make(prim, &d, pad);
    dnnl_status_t made = dnnl_primitive_create(&prim->prim, pd);
    dnnl_primitive_desc_destroy(pd);
    MD_TRY(st);
    DNNL_TRY(made);
    return MD_OK;
}

/* oneDNN fixes the thread count of a primitive when it is made: one for a single product. */
md_status mm_prim_create(mm_provider *p, const cpu_mm_shape *s, mm_prim **out, size_t *scratch)
{
    mm_prim *prim;
    MD_NEW(prim, 1, "cpu matmul plans");
    *prim = (mm_prim){
        .provider = p, .sets = s->single ? p->threads : 1, .args = s->bias ? MM_ARGS : MM_ARGS - 1};
    dnnl_primitive_attr_t attr;
    md_status st = dnnl_primitive_attr_create(&attr) == dnnl_success
                       ? MD_OK
                       : md_error_set(MD_ERR_MEMORY, "oneDNN: no memory for attributes");
    if (st == MD_OK) {
        omp_set_num_threads(s->single ? 1 : p->threads);
        st = prim_make(prim, s, attr, scratch);
        omp_set_num_threads(p->threads);
        dnnl_primitive_attr_destroy(attr);
    }
    if (st != MD_OK) {
        mm_prim_destroy(prim);
        return st;
    }
    *out = prim;
    return MD_OK;
}

void mm_prim_destroy(mm_prim *prim)
{
    if (!prim)
        return;
    for (int t = 0; prim->arg && t < prim->sets; t++)
        for (int i = 0; i < prim->args; i++)
            if (prim->arg[t][i].memory)
                dnnl_memory_destroy(prim->arg[t][i].memory);
    if (prim->prim)
        dnnl_primitive_destroy(prim->prim);
    md_free(prim->arg);
    md_free(prim);
}

md_status mm_prim_run(const mm_prim *prim, const cpu_mm_run_args *r)
{
    dnnl_exec_arg_t *arg = prim->arg[r->thread];
    const void *handle[MM_ARGS] = {r->a, r->b, r->c, r->scratch, r->bias};
    for (int i = 0; i < prim->args; i++)
        DNNL_TRY(dnnl_memory_set_data_handle(arg[i].memory, (void *)(uintptr_t)handle[i]));
    dnnl_stream_t stream = prim->provider->stream[r->thread];
    DNNL_TRY(dnnl_primitive_execute(prim->prim, stream, prim->args, arg));
    return MD_OK;
}
#endif
