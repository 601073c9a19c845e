/* optim: gradient norm, clipping and AdamW over pieces of a parameter registry. */
#ifndef MD_OPTIM_H
#define MD_OPTIM_H

#include "kernels/backend.h"
#include "src/config.h"
#include "src/param.h"

typedef struct md_grad_stats {
    double squares;   /* sum of the squares */
    double nonfinite; /* elements that are NaN or Inf */
} md_grad_stats;

/* Of the reduced gradients of n pieces, into operand memory, which stays as it is without a piece.
 * Local: the caller sums over the ranks what each answers for; the norm is the root of that sum. */
md_status md_optim_grad_stats(md_backend *be, const md_params *p, const md_piece *piece, int n,
                              md_grad_stats *out);

/* Factor that clips a norm to `limit`: min(1, limit / (norm + 1e-6)), 1 when limit is 0 (PyTorch's
 * clip_grad_norm_). Local. */
double md_optim_clip(double norm, double limit);

/* What an update needs besides gradients. */
typedef struct md_optim_args {
    const md_config *config;
    double lr, clip; /* clip: factor on the gradients */
    int64_t update;  /* counts from 1 */
} md_optim_args;
/* One AdamW update of n pieces: weight decay on the decayed ones only (matrices, mask token and
 * relative position tables; not vectors, biases, cls_token, pos_embed: microsoft/unilm,
 * beit2/optim_factory.py). The rate of a row of layer i of L + 2 is lr * layer_decay^(L + 1 - i).
 * Where there is a moving average, it becomes d * average + (1 - d) * value. Local. */
md_status md_optim_update(md_backend *be, md_params *p, const md_piece *piece, int n,
                          const md_optim_args *a);
/* The moving average begins with the values as they are. Local. */
md_status md_optim_ema_start(md_backend *be, md_params *p, const md_piece *piece, int n);
/* Values and moving averages of n pieces change places by way of `between`, operand memory whose
 * values are lost; a second call gives the same bits back. The rounded copy stays as it is. Local.
 * MD_ERR_DEVICE. */
md_status md_optim_ema_swap(md_backend *be, md_params *p, const md_piece *piece, int n,
                            md_scratch between);

#endif
