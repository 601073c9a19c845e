/* probe_rule: the two published recipes by which a linear probe is trained:
 *
 *   beit  a head behind every block, AdamW with weight decay on all values (torch's default), the
 *         rate a half cosine from epoch to epoch (microsoft/unilm, beit/run_linear_eval.py)
 *   mae   one head, behind batch norm without parameters, LARS, the rate with warm-up and a half
 *         cosine from step to step (facebookresearch/mae, main_linprobe.py, util/lars.py). */
#ifndef MD_PROBE_RULE_H
#define MD_PROBE_RULE_H

#include "src/base.h"
#include "src/config.h"

/* A recipe with the config's own numbers in it. */
typedef struct md_probe_rule {
    bool blocks;   /* heads behind every block; else one behind the encoder's end */
    bool norm;     /* batch norm without parameters, eps 1e-6, momentum 0.1 */
    bool lars;     /* momentum 0.9, trust 0.001, which vectors are exempt from; else AdamW */
    bool by_epoch; /* the rate stays as it is for an epoch */
    double lr, weight_decay;
    double warmup; /* epochs */
    int64_t epochs, batch;
} md_probe_rule;

/* The row of evaluate.probe_recipe with evaluate.probe_epochs, _batch and _lr. A warm-up keeps its
 * share of the epochs, a rate that is given for 256 images grows with the batch. Local. */
md_probe_rule md_probe_rule_make(const md_config *c);
/* The learning rate of step 0, 1, ... of `steps` an epoch. Local. */
double md_probe_lr(const md_probe_rule *r, int64_t step, int64_t steps);

#endif
