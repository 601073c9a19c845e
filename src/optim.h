/* optim: gradient norm, clipping and AdamW over the groups of a parameter registry. */
#ifndef MD_OPTIM_H
#define MD_OPTIM_H

#include "kernels/backend.h"
#include "src/config.h"
#include "src/param.h"

typedef struct md_grad_stats {
    double norm;      /* global l2 norm of all gradients */
    double nonfinite; /* elements that are NaN or Inf */
} md_grad_stats;

/* Norm of the whole gradient block. Local: after the reduction every rank holds the same block. */
md_status md_optim_grad_stats(md_backend *be, const md_params *p, md_grad_stats *out);

/* Factor that clips a norm to `limit`: min(1, limit / (norm + 1e-6)), 1 when limit is 0 (PyTorch's
 * clip_grad_norm_). Local. */
double md_optim_clip(double norm, double limit);

/* One AdamW update of every parameter: weight decay on the decayed group only (matrices, mask token
 * and relative position tables; not vectors, biases, cls_token, pos_embed: microsoft/unilm,
 * beit2/optim_factory.py). update counts from 1. Local. */
md_status md_optim_update(md_backend *be, md_params *p, const md_config *c, double lr, double clip,
                          int64_t update);

#endif
