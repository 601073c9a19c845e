/* randaugment: RandAugment (Cubuk et al., arXiv 1909.13719) as timm gives it with
 * `rand-m9-mstd0.5-inc1` (huggingface/pytorch-image-models timm/data/auto_augment.py), on a
 * finished crop of packed RGB bytes, equal byte for byte to what timm and Pillow make of the same
 * draws.
 *
 * `ops` times, one of the 15 ops below is drawn uniformly and with replacement, and applied with
 * `probability`; its magnitude is drawn from N(magnitude, deviation) and clipped to [0, 10], and
 * where an op has two directions either is as likely. Where Pillow changed over time this is what
 * it did when published results were made: Posterize to 0 bits gives black (later versions refuse).
 */
#ifndef MD_RANDAUGMENT_H
#define MD_RANDAUGMENT_H

#include "src/base.h"

#define MD_RANDAUGMENT_MAX 8 /* ops of an image */

/* In timm's order. */
typedef enum md_randaugment_op {
    MD_RA_AUTO_CONTRAST,
    MD_RA_EQUALIZE,
    MD_RA_INVERT,
    MD_RA_ROTATE,
    MD_RA_POSTERIZE,
    MD_RA_SOLARIZE,
    MD_RA_SOLARIZE_ADD,
    MD_RA_COLOR,
    MD_RA_CONTRAST,
    MD_RA_BRIGHTNESS,
    MD_RA_SHARPNESS,
    MD_RA_SHEAR_X,
    MD_RA_SHEAR_Y,
    MD_RA_TRANSLATE_X,
    MD_RA_TRANSLATE_Y,
    MD_RA_OPS
} md_randaugment_op;

typedef struct md_randaugment_rule {
    uint64_t seed;
    int ops;            /* drawn for an image, at most MD_RANDAUGMENT_MAX; 0 = off */
    double probability; /* of each to be applied */
    double magnitude, deviation;
    uint8_t fill[3]; /* what comes in at the borders */
} md_randaugment_rule;

/* The ops to apply, in this order. Translations are in fractions of the side, so that a draw serves
 * crops of any size. */
typedef struct md_randaugment_draw {
    int n;
    struct md_randaugment_step {
        md_randaugment_op op;
        double argument;
    } step[MD_RANDAUGMENT_MAX];
} md_randaugment_draw;

/* What happens to `sample` in `epoch`: a pure function of (rule, epoch, sample). Local. */
md_randaugment_draw md_randaugment_choose(const md_randaugment_rule *rule, uint32_t epoch,
                                          uint64_t sample);

/* An op's argument at a magnitude in [0, 10]: degrees, bits kept, threshold, what is added, factor,
 * shear or fraction of the side; 0 for ops without one. Local. */
double md_randaugment_argument(md_randaugment_op op, double magnitude, bool negative);

/* Applies a draw to rgb[size][size][3] in place. scratch: md_randaugment_scratch(size) bytes,
 * aligned to 16. Local. */
void md_randaugment_apply(const md_randaugment_draw *draw, const uint8_t fill[3], uint8_t *rgb,
                          int size, void *scratch);
size_t md_randaugment_scratch(int size);

#endif
