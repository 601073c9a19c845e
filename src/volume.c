/* volume: see volume.h. Closed formulas on purpose: counting what the graph does would agree with a
 * forgotten or a doubled collective. */
#include "src/volume.h"

/* What 2 (n - 1) / n of an all-reduced byte is. */
static double all_reduce(double n)
{
    return 2.0 * (n - 1.0) / n;
}

/* Elements of this rank's cut and whole parameters. */
static void count(const md_params *p, double *cut, double *whole)
{
    *cut = *whole = 0;
    for (int i = 0; i < p->count; i++)
        *(p->row[i].cut ? cut : whole) += (double)p->row[i].count;
}

md_volume md_volume_predict(const md_model *model, const md_batch_layout *layout)
{
    const md_method *m = &model->method;
    const md_vit_spec *s = &m->student_vit.spec;
    const double t = layout->tp, d = layout->dp, passes = layout->accumulation;
    const double images = (double)layout->micro, tokens = md_vit_tokens(s), chosen = m->chosen;
    const double size = (double)md_dtype_bytes(m->params.dtype);
    const double row = size * s->width; /* bytes of a token */
    double cut, whole;
    count(&m->params, &cut, &whole);
    md_volume v = {.gradients_dp = all_reduce(d) * 4.0 * (cut + (m->split.sequence ? 0 : whole))};
    if (m->split.sequence)
        v.gradients_all = all_reduce(t * d) * 4.0 * whole;
    /* Of the last block only the first of the four runs at all tokens. */
    double sums = md_method_chosen_last(m) ? (4.0 * s->layers - 3.0) * tokens + 3.0 * chosen
                                           : 4.0 * s->layers * tokens;
    /* Blocks that are run again: the sum behind the attention; spread over the rows, it is half of
     * one, and so is each of the two gathers. */
    sums += md_vit_recomputed(s) * (m->split.sequence ? 1.5 : 1.0) * tokens;
    v.activations = passes * all_reduce(t) * images * row * sums;
    if (!m->split.sequence) {
        v.targets = passes * 0.5 * all_reduce(t) * images * chosen * size * m->target_width;
        v.pictures = passes * 0.5 * all_reduce(t) * images * 3.0 * s->image * s->image;
    }
    return v;
}
