/* augment: see augment.h. A pixel is one 32-bit lane (red in the low byte), so that the loops below
 * are plain integer and float loops over lanes. */
#include "io/augment.h"
#include "io/blend.h"
#include "src/rng.h"

#include <math.h>
#include <string.h>

/* ---- draws ---- */

static double uniform(md_rng *r, double lo, double hi)
{
    return lo + (hi - lo) * md_rng_double(r);
}

static void choose_jitter(const md_augment_rule *rule, uint32_t epoch, uint64_t sample,
                          md_augment_draw *d)
{
    md_rng r = md_rng_at(rule->seed, MD_RNG_JITTER, epoch, sample);
    double s = rule->jitter;
    d->jitter = s > 0;
    for (int i = 0; i < MD_JITTER_OPS; i++) {
        d->order[i] = (md_jitter_op)i;
        d->factor[i] = (float)uniform(&r, MD_MAX(0.0, 1.0 - s), 1.0 + s);
    }
    for (uint32_t i = MD_JITTER_OPS - 1; i > 0; i--) {
        uint32_t j = md_rng_below(&r, i + 1);
        md_jitter_op t = d->order[i];
        d->order[i] = d->order[j];
        d->order[j] = t;
    }
}

/* The central box of the allowed aspect ratio nearest to the picture's. */
static md_box central_box(const md_augment_rule *rule, int w, int h)
{
    double ratio = (double)w / h;
    md_box b = {0, 0, w, h, false};
    if (ratio < rule->ratio_min)
        b.h = MD_MIN(h, (int)rint(w / rule->ratio_min));
    else if (ratio > rule->ratio_max)
        b.w = MD_MIN(w, (int)rint(h * rule->ratio_max));
    b.x = (w - b.w) / 2;
    b.y = (h - b.h) / 2;
    return b;
}

static md_box choose_box(const md_augment_rule *rule, uint32_t epoch, uint64_t sample, int w, int h)
{
    md_rng r = md_rng_at(rule->seed, MD_RNG_CROP, epoch, sample);
    double log_min = log(rule->ratio_min), log_max = log(rule->ratio_max);
    for (int tries = 0; tries < 10; tries++) {
        double area = uniform(&r, rule->crop_min, rule->crop_max) * ((double)w * h);
        double ratio = exp(uniform(&r, log_min, log_max));
        double bw = rint(sqrt(area * ratio)), bh = rint(sqrt(area / ratio));
        if (bw < 1 || bh < 1 || bw > w || bh > h)
            continue;
        md_box b = {0, 0, (int)bw, (int)bh, false};
        b.y = (int)md_rng_below(&r, (uint32_t)(h - b.h + 1));
        b.x = (int)md_rng_below(&r, (uint32_t)(w - b.w + 1));
        return b;
    }
    return central_box(rule, w, h);
}

md_augment_draw md_augment_choose(const md_augment_rule *rule, uint32_t epoch, uint64_t sample,
                                  int w, int h)
{
    md_augment_draw d = {.box = {0, 0, w, h, false}};
    if (rule->eval_resize > 0)
        return d;
    choose_jitter(rule, epoch, sample, &d);
    md_rng r = md_rng_at(rule->seed, MD_RNG_FLIP, epoch, sample);
    d.box = choose_box(rule, epoch, sample, w, h);
    d.box.mirror = md_rng_double(&r) < rule->flip;
    if (d.box.mirror) /* the box was drawn in the mirrored picture */
        d.box.x = w - d.box.x - d.box.w;
    d.randaugment = md_randaugment_choose(&rule->randaugment, epoch, sample);
    return d;
}

/* ---- jitter ---- */

static inline int red(uint32_t p)
{
    return (int)(p & 255);
}
static inline int green(uint32_t p)
{
    return (int)(p >> 8 & 255);
}
static inline int blue(uint32_t p)
{
    return (int)(p >> 16 & 255);
}

static inline int luma(uint32_t p)
{
    return md_luma(red(p), green(p), blue(p));
}

static inline uint32_t blend_pixel(int d, uint32_t p, float factor)
{
    return md_blend(d, red(p), factor) | md_blend(d, green(p), factor) << 8 |
           md_blend(d, blue(p), factor) << 16;
}

/* Brightness (grey = 0) and contrast (grey = mean luma). */
static void blend_gray(uint32_t *p, int n, int gray, float factor)
{
    for (int i = 0; i < n; i++)
        p[i] = blend_pixel(gray, p[i], factor);
}

static void blend_luma(uint32_t *p, int n, float factor)
{
    for (int i = 0; i < n; i++)
        p[i] = blend_pixel(luma(p[i]), p[i], factor);
}

static uint32_t luma_sum(const uint32_t *p, int n)
{
    uint32_t sum = 0;
    for (int i = 0; i < n; i++)
        sum += (uint32_t)luma(p[i]);
    return sum;
}

static uint32_t *row_of(md_image *im, int x, int y)
{
    return (uint32_t *)(void *)im->pixels + (size_t)y * (size_t)im->w + (size_t)x;
}

static void apply_op(uint32_t *p, int n, const md_augment_draw *d, md_jitter_op op, int mean)
{
    if (op == MD_SATURATION)
        blend_luma(p, n, d->factor[op]);
    else
        blend_gray(p, n, op == MD_CONTRAST ? mean : 0, d->factor[op]);
}

/* What comes before the contrast is done on the whole picture, because the contrast needs the mean
 * of the result; the rest on the box alone. */
void md_augment_jitter(md_image *im, const md_augment_draw *d)
{
    int before = 0; /* ops before the contrast */
    while (d->order[before] != MD_CONTRAST)
        before++;
    uint64_t sum = 0;
    for (int y = 0; y < im->h; y++) {
        uint32_t *row = row_of(im, 0, y);
        for (int i = 0; i < before; i++)
            apply_op(row, im->w, d, d->order[i], 0);
        sum += luma_sum(row, im->w);
    }
    int mean = (int)((double)sum / ((double)im->w * im->h) + 0.5);
    for (int y = d->box.y; y < d->box.y + d->box.h; y++)
        for (int i = before; i < MD_JITTER_OPS; i++)
            apply_op(row_of(im, d->box.x, y), d->box.w, d, d->order[i], mean);
}

/* ---- the crop ---- */

/* The middle of the picture with its short side resized: torchvision's sizes and offsets. */
static md_status evaluate(const md_augment_rule *rule, md_resizer *r, const md_image *im,
                          uint8_t *crop)
{
    const int short_side = rule->eval_resize, size = rule->size;
    MD_ASSERT(short_side >= size && rule->size2 == 0, "resize to %d, crops of %d and %d",
              short_side, size, rule->size2);
    int64_t in_short = MD_MIN(im->w, im->h), in_long = MD_MAX(im->w, im->h);
    int long_side = (int)((double)(short_side * in_long) / (double)in_short);
    int w = im->w <= im->h ? short_side : long_side, h = im->w <= im->h ? long_side : short_side;
    int x = (int)rint((w - size) / 2.0), y = (int)rint((h - size) / 2.0);
    md_resize_part middle = {w, h, {x, y, size, size, false}};
    return md_resize_box_part(r, im, (md_box){0, 0, im->w, im->h, false}, &middle, crop);
}

md_status md_augment_image(const md_augment_rule *rule, const md_augment_draw *draw,
                           md_augment_tools tools, md_image *im, uint8_t *crop, uint8_t *crop2)
{
    md_resizer *r = tools.resizer;
    if (rule->eval_resize > 0)
        return evaluate(rule, r, im, crop);
    if (draw->jitter)
        md_augment_jitter(im, draw);
    const uint8_t *fill = rule->randaugment.fill;
    MD_TRY(md_resize_box(r, im, draw->box, rule->size, rule->size, crop));
    md_randaugment_apply(&draw->randaugment, fill, crop, rule->size, tools.scratch);
    if (rule->size2 > 0) {
        MD_TRY(md_resize_box(r, im, draw->box, rule->size2, rule->size2, crop2));
        md_randaugment_apply(&draw->randaugment, fill, crop2, rule->size2, tools.scratch);
    }
    return MD_OK;
}

size_t md_augment_scratch(const md_augment_rule *rule)
{
    if (rule->randaugment.ops == 0 || rule->eval_resize > 0)
        return 0;
    return md_randaugment_scratch(MD_MAX(rule->size, rule->size2));
}
