/* optim: see optim.h. */
#include "src/optim.h"

#include <math.h>

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

/* The layer of element `at` of a piece, and where in the piece the next layer begins. */
static int layer_at(const md_params *p, const md_piece *piece, int64_t at, int64_t *end)
{
    const int64_t here = piece->offset + at;
    int row = -1;
    for (int i = 0; i < p->count; i++)
        if (p->row[i].offset <= here && (row < 0 || p->row[i].offset > p->row[row].offset))
            row = i;
    const int layer = row < 0 ? 0 : p->row[row].layer_id;
    *end = piece->count;
    for (int i = 0; i < p->count; i++)
        if (p->row[i].offset > here && p->row[i].layer_id != layer)
            *end = MD_MIN(*end, p->row[i].offset - piece->offset);
    return layer;
}

static int last_layer(const md_params *p)
{
    int last = 0;
    for (int i = 0; i < p->count; i++)
        last = MD_MAX(last, p->row[i].layer_id);
    return last;
}

/* One stretch of a piece, `skip` elements into it, at one rate. */
static md_status update_range(md_backend *be, md_params *p, const md_piece *piece, int64_t skip,
                              int64_t count, const md_optim_args *a)
{
    const md_config *c = a->config;
    md_piece part = *piece;
    part.offset += skip;
    part.moment += skip;
    part.count = count;
    md_tensor grad = gradient(p, &part);
    md_tensor value = range(p->value, part.offset, count);
    md_tensor m = range(p->m, part.moment, count);
    md_tensor v = range(p->v, part.moment, count);
    md_tensor copy = MD_TENSOR(p->rounded ? p->rounded + part.offset : NULL, MD_BF16, count);
    return MD_OP(be, adamw, .grad = &grad, .param = &value, .m = &m, .v = &v,
                 .copy = p->rounded ? &copy : NULL, .accumulate = 7u, .lr = a->lr,
                 .beta1 = c->optim_beta1, .beta2 = c->optim_beta2, .eps = c->optim_eps,
                 .weight_decay = piece->decay ? c->optim_weight_decay : 0.0, .grad_scale = a->clip,
                 .step = a->update);
}

static md_status average(md_backend *be, md_params *p, const md_piece *piece, double decay)
{
    md_tensor value = range(p->value, piece->offset, piece->count);
    md_tensor ema = range(p->ema, piece->moment, piece->count);
    if (decay > 0)
        MD_TRY(MD_OP(be, axpy, .x = &ema, .y = &ema, .alpha = (float)decay));
    return MD_OP(be, axpy, .x = &value, .y = &ema, .alpha = (float)(1.0 - decay),
                 .accumulate = decay > 0);
}

md_status md_optim_ema_start(md_backend *be, md_params *p, const md_piece *piece, int n)
{
    for (int i = 0; i < n && p->ema; i++)
        MD_TRY(average(be, p, &piece[i], 0.0));
    return md_backend_sync(be);
}

/* `count` elements by way of a block of memory. */
static md_status swap_range(md_backend *be, float *value, float *ema, float *between, int64_t count)
{
    md_tensor a = range(value, 0, count), b = range(ema, 0, count), c = range(between, 0, count);
    MD_TRY(MD_OP(be, axpy, .x = &a, .y = &c, .alpha = 1.0f));
    MD_TRY(MD_OP(be, axpy, .x = &b, .y = &a, .alpha = 1.0f));
    return MD_OP(be, axpy, .x = &c, .y = &b, .alpha = 1.0f);
}

md_status md_optim_ema_swap(md_backend *be, md_params *p, const md_piece *piece, int n,
                            md_scratch between)
{
    const int64_t most = (int64_t)(between.size / sizeof(float)) / MD_PARAM_ALIGN * MD_PARAM_ALIGN;
    MD_ASSERT(most > 0, "%zu bytes to swap by", between.size);
    for (int i = 0; i < n; i++)
        for (int64_t at = 0; at < piece[i].count; at += most)
            MD_TRY(swap_range(be, p->value + piece[i].offset + at, p->ema + piece[i].moment + at,
                              between.memory, MD_MIN(most, piece[i].count - at)));
    return md_backend_sync(be);
}

md_status md_optim_update(md_backend *be, md_params *p, const md_piece *piece, int n,
                          const md_optim_args *a)
{
    const double decay = a->config->optim_layer_decay;
    const int last = last_layer(p);
    for (int i = 0; i < n; i++) {
        for (int64_t at = 0, end = piece[i].count; at < piece[i].count; at = end) {
            md_optim_args here = *a;
            if (decay < 1.0)
                here.lr *= pow(decay, last - layer_at(p, &piece[i], at, &end));
            MD_TRY(update_range(be, p, &piece[i], at, end - at, &here));
        }
        if (p->ema)
            MD_TRY(average(be, p, &piece[i], a->config->optim_ema));
    }
    return MD_OK;
}
