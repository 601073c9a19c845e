/* augment: the crop of a picture that a model sees, byte for byte what torchvision, timm and Pillow
 * give for the same draws. For training, as BEiT v2 does it (microsoft/unilm beit2/datasets.py,
 * transforms.py), in this order:
 *   1. jitter on the whole picture: brightness, contrast, saturation, each by a factor from
 *      U[max(0, 1-s), 1+s], in random order (Pillow ImageEnhance: blend with black, with the
 * rounded mean luma, with the luma; truncated to 8 bits and clipped);
 *   2. mirror left to right with probability `flip`;
 *   3. a box of area U(crop_min, crop_max) of the picture and aspect ratio log-uniform in
 *      [ratio_min, ratio_max], ten tries, then the central box of the nearest allowed aspect;
 *   4. the box resized to size x size and, for a teacher of another resolution, to size2 x size2;
 *   5. RandAugment on each crop (io/randaugment.h), as fine-tuning does it.
 * Only the bytes are as if done in this order: outside the box only the contrast's mean is
 * computed.
 *
 * For evaluation (eval_resize > 0) nothing is drawn: torchvision's Resize(eval_resize, bicubic) of
 * the short side and CenterCrop(size).
 *
 * What is drawn is a pure function of (seed, epoch, sample, picture size); rank, thread and batch
 * do not enter. */
#ifndef MD_AUGMENT_H
#define MD_AUGMENT_H

#include "io/randaugment.h"
#include "io/resize.h"

/* MD_JITTER_OPS in the order of a draw's factor[]. */
typedef enum md_jitter_op { MD_BRIGHTNESS, MD_CONTRAST, MD_SATURATION, MD_JITTER_OPS } md_jitter_op;

typedef struct md_augment_rule {
    uint64_t seed;
    int size, size2; /* pixels; size2 = 0: one crop */
    double crop_min, crop_max, ratio_min, ratio_max;
    double flip;   /* probability */
    double jitter; /* strength s; 0 = off */
    md_randaugment_rule randaugment;
    int eval_resize; /* pixels, >= size; 0 = the training crop. Takes no second crop */
} md_augment_rule;

typedef struct md_augment_draw {
    md_box box; /* in the picture as decoded: of a mirrored one, x is already mirrored back */
    bool jitter;
    md_jitter_op order[MD_JITTER_OPS];
    float factor[MD_JITTER_OPS]; /* indexed by md_jitter_op */
    md_randaugment_draw randaugment;
} md_augment_draw;

/* What happens to `sample` in `epoch` when its picture has w x h pixels; for evaluation the box is
 * the whole picture. Local. */
md_augment_draw md_augment_choose(const md_augment_rule *rule, uint32_t epoch, uint64_t sample,
                                  int w, int h);

/* Step 1 on the pixels of the draw's box, in place; pixels outside the box are left undefined.
 * Local. */
void md_augment_jitter(md_image *im, const md_augment_draw *draw);

/* What one thread needs; scratch: md_augment_scratch bytes, aligned to 16. */
typedef struct md_augment_tools {
    md_resizer *resizer;
    void *scratch;
} md_augment_tools;

/* All steps: jitters `im` in place, writes crop[size][size][3] and, when rule->size2 > 0,
 * crop2[size2][size2][3]. MD_ERR_MEMORY when the resizer's scratch cannot grow. Local. */
md_status md_augment_image(const md_augment_rule *rule, const md_augment_draw *draw,
                           md_augment_tools tools, md_image *im, uint8_t *crop, uint8_t *crop2);
/* 0 where the rule needs none. */
size_t md_augment_scratch(const md_augment_rule *rule);

#endif
