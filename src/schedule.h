/* schedule: the learning rate as a pure function of the optimizer step; nothing to save or resume.
 */
#ifndef MD_SCHEDULE_H
#define MD_SCHEDULE_H

#include "src/base.h"
#include "src/config.h"

typedef struct md_schedule {
    double peak, min;      /* learning rates */
    int64_t warmup, total; /* optimizer steps */
} md_schedule;

/* Steps of an epoch times train.epochs and optim.warmup_epochs, each rounded to whole steps. An
 * epoch drops its last, incomplete batch: steps_per_epoch = images / batch. Local. */
md_schedule md_schedule_make(const md_config *c, int64_t steps_per_epoch);

/* The learning rate of step 0, 1, ...: linear from 0 at the first warm-up step to peak at the last,
 * then a half cosine that would reach min at step `total`; min from there on. A warm-up of one step
 * has rate 0, as the source's has. Local.
 * Source: cosine_scheduler of microsoft/unilm, beit2/utils.py; schedule of MaskDistill, appendix A.
 */
double md_schedule_lr(const md_schedule *s, int64_t step);

#endif
