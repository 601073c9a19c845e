/* optim: see optim.h. */
#include "src/optim.h"

static md_tensor range(float *block, int64_t first, int64_t count)
{
    return MD_TENSOR(block ? block + first : NULL, MD_F32, count);
}

static md_tensor gradient(const md_params *p, const md_piece *piece)
{
    return piece->sharded ? range(p->reduced, piece->moment, piece->count)
                          : range(p->grad, piece->offset, piece->count);
}

md_status md_optim_grad_stats(md_backend *be, const md_params *p, const md_piece *piece, int n,
                              md_grad_stats *out)
{
    md_tensor sum = MD_TENSOR(&out->squares, MD_F64, 1);
    md_tensor bad = MD_TENSOR(&out->nonfinite, MD_F64, 1);
    for (int i = 0; i < n; i++) {
        md_tensor grad = gradient(p, &piece[i]);
        MD_TRY(MD_OP(be, sumsq, .x = &grad, .sum = &sum, .nonfinite = &bad,
                     .accumulate = i > 0 ? 3u : 0u));
    }
    return MD_OK;
}

double md_optim_clip(double norm, double limit)
{
    if (limit <= 0)
        return 1.0;
    return MD_MIN(1.0, limit / (norm + 1e-6));
}

md_status md_optim_update(md_backend *be, md_params *p, const md_piece *piece, int n,
                          const md_optim_args *a)
{
    const md_config *c = a->config;
    for (int i = 0; i < n; i++) {
        md_tensor grad = gradient(p, &piece[i]);
        md_tensor value = range(p->value, piece[i].offset, piece[i].count);
        md_tensor m = range(p->m, piece[i].moment, piece[i].count);
        md_tensor v = range(p->v, piece[i].moment, piece[i].count);
        md_tensor copy =
            MD_TENSOR(p->rounded ? p->rounded + piece[i].offset : NULL, MD_BF16, piece[i].count);
        MD_TRY(MD_OP(be, adamw, .grad = &grad, .param = &value, .m = &m, .v = &v,
                     .copy = p->rounded ? &copy : NULL, .accumulate = 7u, .lr = a->lr,
                     .beta1 = c->optim_beta1, .beta2 = c->optim_beta2, .eps = c->optim_eps,
                     .weight_decay = piece[i].decay ? c->optim_weight_decay : 0.0,
                     .grad_scale = a->clip, .step = a->update));
    }
    return MD_OK;
}
