/* mix: see mix.h. */
#include "src/mix.h"
#include "src/rng.h"

#include <math.h>
#include <string.h>

#define ERASE_TRIES 10

md_mix_rule md_mix_rule_make(const md_config *c)
{
    const bool labels = strcmp(c->task, "finetune") == 0;
    return (md_mix_rule){.seed = (uint64_t)c->run_seed,
                         .mixup = labels ? c->augment_mixup : 0.0,
                         .cutmix = labels ? c->augment_cutmix : 0.0,
                         .probability = c->augment_mix_probability,
                         .choose = c->augment_mix_switch,
                         .erasing = labels ? c->augment_erasing : 0.0,
                         .smoothing = labels ? c->finetune_smoothing : 0.0,
                         .group = (int)c->augment_mix_group,
                         .size = (int)c->image_size};
}

/* ---- Beta distribution ---- */

/* (0, 1): its logarithm is finite. */
static double open_uniform(md_rng *r)
{
    return 1.0 - md_rng_double(r);
}

static double normal(md_rng *r)
{
    double radius = sqrt(-2.0 * log(open_uniform(r)));
    return radius * cos(6.283185307179586 * md_rng_double(r));
}

/* Gamma with shape a > 0 and scale 1: Marsaglia and Tsang, "A simple method for generating gamma
 * variables" (2000), and for a < 1 its relation to shape a + 1. */
static double gamma_draw(md_rng *r, double a)
{
    const double boost = a < 1.0 ? pow(open_uniform(r), 1.0 / a) : 1.0;
    const double d = (a < 1.0 ? a + 1.0 : a) - 1.0 / 3.0, c = 1.0 / sqrt(9.0 * d);
    for (;;) {
        double x = normal(r), t = 1.0 + c * x, v = t * t * t;
        if (t > 0 && log(open_uniform(r)) < 0.5 * x * x + d - d * v + d * log(v))
            return d * v * boost;
    }
}

static double beta_draw(md_rng *r, double alpha)
{
    double x = gamma_draw(r, alpha), y = gamma_draw(r, alpha);
    return x + y > 0 ? x / (x + y) : 0.5;
}

/* ---- mixup and CutMix ---- */

/* A box of the picture's aspect around a uniform centre, cut at the borders. */
static void cut_box(md_rng *rng, int size, md_mix_draw *d)
{
    const int side = (int)(size * sqrt(1.0 - d->lambda));
    const int y = (int)md_rng_below(rng, (uint32_t)size),
              x = (int)md_rng_below(rng, (uint32_t)size);
    const int before = side / 2, behind = (side + 1) / 2;
    const int y0 = MD_MAX(y - before, 0), y1 = MD_MIN(y + behind, size);
    const int x0 = MD_MAX(x - before, 0), x1 = MD_MIN(x + behind, size);
    d->box[0] = x0, d->box[1] = y0, d->box[2] = x1 - x0, d->box[3] = y1 - y0;
    d->lambda = 1.0 - (double)(x1 - x0) * (y1 - y0) / ((double)size * size);
    if (d->box[2] == 0 || d->box[3] == 0)
        memset(d->box, 0, sizeof d->box);
}

md_mix_draw md_mix_choose(const md_mix_rule *r, int64_t step, int64_t group)
{
    md_mix_draw d = {.lambda = 1.0};
    if (r->mixup <= 0 && r->cutmix <= 0)
        return d;
    md_rng rng = md_rng_at(r->seed, MD_RNG_MIX, (uint32_t)step, (uint64_t)group);
    if (md_rng_double(&rng) >= r->probability)
        return d;
    const bool both = r->mixup > 0 && r->cutmix > 0, low = md_rng_double(&rng) < r->choose;
    const bool cut = both ? low : r->cutmix > 0;
    d.lambda = beta_draw(&rng, cut ? r->cutmix : r->mixup);
    if (cut)
        cut_box(&rng, r->size, &d);
    return d;
}

double md_mix_weight(const md_mix_rule *r, int64_t step, int64_t position)
{
    return md_mix_choose(r, step, position / r->group).lambda;
}

/* ---- erasing ---- */

void md_erase_choose(const md_mix_rule *r, uint32_t epoch, int64_t sample, int32_t box[4])
{
    memset(box, 0, 4 * sizeof *box);
    md_rng rng = md_rng_at(r->seed, MD_RNG_ERASE, epoch, (uint64_t)sample);
    if (md_rng_double(&rng) >= r->erasing)
        return;
    const double whole = (double)r->size * r->size, log_aspect = log(0.3);
    for (int i = 0; i < ERASE_TRIES; i++) {
        double area = (0.02 + (1.0 / 3.0 - 0.02) * md_rng_double(&rng)) * whole;
        double aspect = exp(log_aspect - 2.0 * log_aspect * md_rng_double(&rng));
        int h = (int)rint(sqrt(area * aspect)), w = (int)rint(sqrt(area / aspect));
        if (w < 1 || h < 1 || w >= r->size || h >= r->size)
            continue;
        box[1] = (int32_t)md_rng_below(&rng, (uint32_t)(r->size - h + 1));
        box[0] = (int32_t)md_rng_below(&rng, (uint32_t)(r->size - w + 1));
        box[2] = w, box[3] = h;
        return;
    }
}

/* ---- what goes into a batch ---- */

md_mix md_mix_record(const md_mix_rule *r, int64_t step, int64_t position, uint32_t epoch,
                     int64_t sample)
{
    const md_mix_draw d = md_mix_choose(r, step, position / r->group);
    const bool cut = d.box[2] > 0;
    /* The noise is the picture's own, so its key follows the sample. */
    md_rng noise = md_rng_at(r->seed, MD_RNG_ERASE, epoch, (uint64_t)sample | (uint64_t)1 << 47);
    md_mix m = {.partner = d.lambda < 1.0 ? (int32_t)(r->group - 1 - 2 * (position % r->group)) : 0,
                .lambda = cut ? 1.0f : (float)d.lambda,
                .key = {md_rng_u32(&noise), md_rng_u32(&noise)}};
    memcpy(m.box, d.box, sizeof m.box);
    md_erase_choose(r, epoch, sample, m.erase);
    return m;
}

void md_mix_target(const md_mix_rule *r, double weight, int32_t label, int classes, float *target)
{
    const double off = r->smoothing / classes;
    for (int k = 0; k < classes; k++)
        target[k] += (float)(weight * off);
    target[label] += (float)(weight * (1.0 - r->smoothing));
}
