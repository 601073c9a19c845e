/* heads: the axis method.head: from encoder output to prediction. */
#include "src/method.h"

#include <stdio.h>
#include <string.h>

/* A linear layer under two names: BEiT's lm_head of pretraining and head of fine-tuning. */
static md_status declare(md_method *m, const char *name, int width, int in, float scale)
{
    const int layer = m->student_vit.spec.layers + 1;
    md_param w = {.rank = 2,
                  .global = {width, in},
                  .cut_dim = -1,
                  .cut_parts = 1,
                  .init = MD_INIT_TRUNC_NORMAL,
                  .init_value = (float)m->config->model_init_std,
                  .init_scale = scale,
                  .decay = true,
                  .layer_id = layer};
    md_param b = {.rank = 1, .global = {width}, .cut_dim = -1, .cut_parts = 1, .layer_id = layer};
    snprintf(w.name, sizeof w.name, "%s.weight", name);
    snprintf(b.name, sizeof b.name, "%s.bias", name);
    m->head_w = md_params_add(&m->params, &w);
    m->head_b = md_params_add(&m->params, &b);
    return m->head_w < 0 || m->head_b < 0 ? MD_ERR_MEMORY : MD_OK;
}

static md_status linear_declare(md_method *m, const md_tag *in, int width)
{
    return declare(m, "lm_head", width, in->width, 1.0f);
}

/* The small start keeps what the encoder has learned (microsoft/unilm,
 * beit2/modeling_finetune.py: init_scale). */
static md_status classifier_declare(md_method *m, const md_tag *in, int width)
{
    return declare(m, "head", width, in->width, (float)m->config->finetune_head_scale);
}

static md_slot linear_build(md_method *m, md_graph *g, md_slot x)
{
    return md_n_linear(g, x, m->head_w, m->head_b, MD_ACT_NONE);
}

static md_status none_declare(md_method *m, const md_tag *in, int width)
{
    (void)m, (void)in, (void)width;
    return MD_OK;
}

static md_slot none_build(md_method *m, md_graph *g, md_slot x)
{
    (void)m, (void)g;
    return x;
}

static const md_head_row rows[] = {
    {"linear", linear_declare, linear_build},
    {"classifier", classifier_declare, linear_build},
    {"none", none_declare, none_build},
};

const md_head_row *md_head_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(rows); i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    return NULL;
}
