/* probe: how well a linear classifier does on the frozen features of an encoder: it is trained on
 * one split and judged on another (the recipes: src/probe_heads.h). Training pictures are cropped
 * by torchvision's RandomResizedCrop in its defaults (area 0.08 to 1, aspect 3/4 to 4/3; bicubic)
 * and mirrored, whatever augment.* says. */
#ifndef MD_PROBE_H
#define MD_PROBE_H

#include "src/evaluate.h"
#include "src/probe_state.h"

/* Images of a pass: the most, up to `images`, that a rank's share of rule->batch divides into.
 * Warns where these are few. Local. MD_ERR_CONFIG: the batch does not divide over the ranks. */
md_status md_probe_images(const md_probe_rule *rule, const md_topo *topo, int64_t images,
                          int64_t *out);

typedef struct md_probe_args {
    const md_config *config;
    md_evaluator *train,
        *test; /* viewers of MD_SIGHT_BLOCKS where rule.blocks, else of a feature */
    md_backend *backend;
    const md_topo *topo;
    md_probe_rule rule;
    int64_t train_images; /* of a pass of train: md_probe_images */
    const char *dir;      /* where its state is kept */
    const char *encoder;  /* which weights were loaded: md_pretrained_identity */
} md_probe_args;

typedef struct md_probe_result {
    int heads, best; /* best: most top-1 hits, then the last */
    md_accuracy *head;
    double *train_loss; /* [heads] mean cross entropy of the last epoch */
} md_probe_result;

/* Collective(world). Steps, pictures and sums are those of one rank on any number of them. *out is
 * freed by md_probe_result_free. Errors of md_evaluator_run; MD_ERR_CONFIG: the stores' classes
 * differ in number, or there are fewer training images than a batch; MD_ERR_DATA: more training
 * images than data.max_bad of an epoch (and more than 10) have no picture; MD_ERR_NUMERICS: a loss
 * is no number; MD_ERR_MEMORY, MD_ERR_DEVICE; errors of md_probe_state_take and _resume.
 *
 * The state is saved behind every epoch; where that fails, a warning is given and the older one
 * stays. After a signal (src/signals.h) it is saved and MD_STOPPED returned: the same call, also on
 * other ranks, goes on from there. One that is finished is judged again. */
md_status md_probe_accuracy(const md_probe_args *args, md_probe_result *out);
void md_probe_result_free(md_probe_result *r);

#endif
