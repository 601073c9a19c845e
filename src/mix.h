/* mix: what fine-tuning does to pictures and labels besides the crop: random erasing, mixup and
 * CutMix, label smoothing. The pixels are changed by the op patchify (kernels/backend.h: md_mix);
 * here is what is drawn, and the target distributions that go with it.
 *
 * Images are mixed within groups of `group` consecutive positions of the global batch, each with
 * its mirror image (the first with the last, ...), all with one lambda: timm's batch mode for the
 * group (huggingface/pytorch-image-models, timm/data/mixup.py). What is drawn is a pure function of
 * (seed, step, group), for erasing of (seed, epoch, sample), so it is the same on every layout. */
#ifndef MD_MIX_H
#define MD_MIX_H

#include "kernels/backend.h"
#include "src/config.h"

typedef struct md_mix_rule {
    uint64_t seed;
    double mixup, cutmix;       /* alphas; 0 = off */
    double probability, choose; /* of mixing a group; of CutMix where both are on */
    double erasing;             /* probability */
    double smoothing;
    int group, size; /* images; pixels of a picture's side */
} md_mix_rule;

/* From the config; all off unless the task is one with labels. Local. */
md_mix_rule md_mix_rule_make(const md_config *c);

/* One group's draw: lambda of the image itself, and the box of CutMix (w = 0: mixup). For CutMix
 * lambda is 1 - area of the box / area of the picture. */
typedef struct md_mix_draw {
    double lambda;
    int32_t box[4]; /* x, y, w, h */
} md_mix_draw;
md_mix_draw md_mix_choose(const md_mix_rule *r, int64_t step, int64_t group);

/* The box to erase: area uniform in [0.02, 1/3] of the picture, aspect ratio log-uniform in [0.3,
 * 1/0.3], ten tries; w = 0 for none (Zhong et al. 2020; timm/data/random_erasing.py). Local. */
void md_erase_choose(const md_mix_rule *r, uint32_t epoch, int64_t sample, int32_t box[4]);

/* Record of the image at position `position` of the batch; its partner is given as the distance in
 * positions. Local. */
md_mix md_mix_record(const md_mix_rule *r, int64_t step, int64_t position, uint32_t epoch,
                     int64_t sample);
/* The image's weight in its own target. Local. */
double md_mix_weight(const md_mix_rule *r, int64_t step, int64_t position);

/* Adds weight * (smoothed one-hot of label) to target[classes]: 1 - s + s / K at the label, s / K
 * elsewhere. Local. */
void md_mix_target(const md_mix_rule *r, double weight, int32_t label, int classes, float *target);

#endif
