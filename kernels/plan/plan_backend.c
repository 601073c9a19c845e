/* plan_backend: one function serves every op, because their operands come first in every args
 * struct; only matrix products and attention have operations worth counting. */
#include "kernels/plan/plan_backend.h"

typedef struct plan {
    md_backend base;
    md_backend *target;
    md_plan_total total;
} plan;

/* q k^T and p v of every head: 4 B T^2 C. */
static double attention_flops(const md_tensor *qkv)
{
    double tokens = (double)qkv->dim[1];
    return 4.0 * tokens * (double)md_tensor_count(qkv) / 3.0;
}

double md_plan_op_flops(md_op op, const md_operands *args)
{
    switch (op) {
    case MD_OP_gemm: {
        const md_gemm_args *a = (const void *)args;
        int64_t k = a->trans_a ? md_tensor_rows(a->a) : md_tensor_cols(a->a);
        return 2.0 * (double)md_tensor_count(a->y) * (double)k;
    }
    case MD_OP_linear_bwd: {
        const md_linear_bwd_args *a = (const void *)args;
        return (a->dx ? 4.0 : 2.0) * (double)md_tensor_count(a->dw) * (double)md_tensor_rows(a->dy);
    }
    case MD_OP_attention:
        return attention_flops(((const md_attention_args *)(const void *)args)->qkv);
    case MD_OP_attention_bwd: /* dv, dp, dq, dk; the repeated q k^T is not counted as useful work */
        return 2.0 * attention_flops(((const md_attention_bwd_args *)(const void *)args)->qkv);
    default:
        return 0.0;
    }
}

double md_plan_op_bytes(const md_operands *a)
{
    double bytes = 0.0;
    for (int i = 0; i < MD_OP_IN; i++)
        if (a->in[i])
            bytes += (double)md_tensor_bytes(a->in[i]);
    for (int i = 0; i < MD_OP_OUT; i++)
        if (a->out[i])
            bytes += (double)md_tensor_bytes(a->out[i]) * ((a->accumulate >> i & 1) ? 2.0 : 1.0);
    return bytes;
}

static md_status plan_op(md_backend *be, md_op op, const void *args)
{
    plan *p = (plan *)be;
    const md_operands *a = args;
    MD_TRY(md_op_check(op, a));
    p->total.bytes += md_plan_op_bytes(a);
    p->total.flops += md_plan_op_flops(op, a);
    p->total.launches++;
    if (p->target && p->target->scratch_bytes) {
        size_t scratch = p->target->scratch_bytes(p->target, op, a);
        if (scratch == MD_NO_SCRATCH)
            return MD_ERR_MEMORY;
        p->total.scratch = MD_MAX(p->total.scratch, scratch);
    }
    return MD_OK;
}

#define PLAN_OP(op)                                                     \
    static md_status plan_##op(md_backend *be, const md_##op##_args *a) \
    {                                                                   \
        return plan_op(be, MD_OP_##op, a);                              \
    }
MD_OPS(PLAN_OP)

#define PLAN_ENTRY(op) .op = plan_##op,
static const md_op_table plan_ops = {MD_OPS(PLAN_ENTRY)};

static void plan_destroy(md_backend *be)
{
    md_free(be);
}

md_status md_plan_create(md_backend *target, md_backend **out)
{
    plan *p;
    MD_NEW(p, 1, "plan backend");
    p->base = (md_backend){.name = "plan", .ops = &plan_ops, .destroy = plan_destroy};
    p->target = target;
    *out = &p->base;
    return MD_OK;
}

md_plan_total md_plan_take(md_backend *be)
{
    plan *p = (plan *)be;
    md_plan_total total = p->total;
    p->total = (md_plan_total){0};
    return total;
}
