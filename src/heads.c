/* heads: the axis method.head: from encoder output to prediction. */
#include "src/method.h"

#include <string.h>

static md_status linear_declare(md_method *m, const md_tag *in, int width)
{
    int layer = m->student_vit.spec.layers + 1;
    md_param w = {.name = "lm_head.weight",
                  .rank = 2,
                  .global = {width, in->width},
                  .cut_dim = -1,
                  .cut_parts = 1,
                  .init = MD_INIT_TRUNC_NORMAL,
                  .init_value = (float)m->config->model_init_std,
                  .init_scale = 1.0f,
                  .decay = true,
                  .layer_id = layer};
    md_param b = {.name = "lm_head.bias",
                  .rank = 1,
                  .global = {width},
                  .cut_dim = -1,
                  .cut_parts = 1,
                  .layer_id = layer};
    m->head_w = md_params_add(&m->params, &w);
    m->head_b = md_params_add(&m->params, &b);
    return m->head_w < 0 || m->head_b < 0 ? MD_ERR_MEMORY : MD_OK;
}

static md_slot linear_build(md_method *m, md_graph *g, md_slot x)
{
    return md_n_linear(g, x, m->head_w, m->head_b, MD_ACT_NONE);
}

static const md_head_row rows[] = {
    {"linear", linear_declare, linear_build},
};

const md_head_row *md_head_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(rows); i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    return NULL;
}
