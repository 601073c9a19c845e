/* optim: see optim.h. The registry keeps each group in one range, so a group is one launch. */
#include "src/optim.h"

#include <math.h>

md_status md_optim_grad_stats(md_backend *be, const md_params *p, md_grad_stats *out)
{
    double sum = 0, bad = 0;
    md_tensor grad = MD_TENSOR(p->grad, MD_F32, p->elements);
    md_tensor s = MD_TENSOR(&sum, MD_F64, 1), n = MD_TENSOR(&bad, MD_F64, 1);
    MD_TRY(MD_OP(be, sumsq, .x = &grad, .sum = &s, .nonfinite = &n));
    *out = (md_grad_stats){.norm = sqrt(sum), .nonfinite = bad};
    return MD_OK;
}

double md_optim_clip(double norm, double limit)
{
    if (limit <= 0)
        return 1.0;
    return MD_MIN(1.0, limit / (norm + 1e-6));
}

static md_tensor range(float *block, int64_t first, int64_t end)
{
    return MD_TENSOR(block ? block + first : NULL, MD_F32, end - first);
}

md_status md_optim_update(md_backend *be, md_params *p, const md_config *c, double lr, double clip,
                          int64_t update)
{
    const struct {
        int64_t first, end;
        double decay;
    } groups[] = {{0, p->decay_end, c->optim_weight_decay}, {p->decay_end, p->elements, 0.0}};
    for (size_t i = 0; i < MD_COUNT(groups); i++) {
        int64_t first = groups[i].first, end = groups[i].end;
        if (first == end)
            continue;
        md_tensor grad = range(p->grad, first, end), value = range(p->value, first, end);
        md_tensor m = range(p->m, first, end), v = range(p->v, first, end);
        MD_TRY(MD_OP(be, adamw, .grad = &grad, .param = &value, .m = &m, .v = &v, .accumulate = 7u,
                     .lr = lr, .beta1 = c->optim_beta1, .beta2 = c->optim_beta2,
                     .eps = c->optim_eps, .weight_decay = groups[i].decay, .grad_scale = clip,
                     .step = update));
    }
    return MD_OK;
}
