/* students: the axis method.student.mode: what the encoder sees of the hidden patches. */
#include "src/method.h"

#include <string.h>

static md_vit_spec student_spec(const md_method *m)
{
    const md_config *c = m->config;
    return (md_vit_spec){
        .image = (int)c->image_size,
        .patch = (int)c->model_patch,
        .width = (int)c->model_width,
        .layers = (int)c->model_layers,
        .heads = (int)c->model_heads,
        .mlp = (int)(c->model_mlp ? c->model_mlp : 4 * c->model_width),
        .rel_pos = (md_rel_pos)md_config_choice("model.rel_pos", c->model_rel_pos),
        .abs_pos = c->model_abs_pos,
        .mask_token = m->mask.count > 0,
        .qv_bias = true,
        .patch_bias = true,
        .final_norm = true,
        .act = MD_ACT_GELU,
        .ln_eps = (float)c->model_ln_eps,
        .layer_scale = (float)c->model_layer_scale,
        .drop_path = (float)c->model_drop_path,
        .init_std = (float)c->model_init_std,
    };
}

static md_status replace_declare(md_method *m, md_tag *out)
{
    md_vit_spec spec = student_spec(m);
    *out = (md_tag){MD_FEATURE, MD_TOKENS_WITH_CLS, spec.width};
    return md_vit_declare(&m->student_vit, &spec, &m->params);
}

static md_status add_keep_inputs(md_method *m, md_graph *g)
{
    const md_vit_spec *s = &m->student_vit.spec;
    if (s->drop_path <= 0)
        return MD_OK;
    MD_NEW(m->s_keep, 2 * s->layers, "drop path inputs");
    for (int k = 0; k < 2 * s->layers; k++)
        m->s_keep[k] = md_vit_drop_rate(s, k / 2) > 0
                           ? md_method_input(m, g, "keep", MD_F32, 1, (int64_t[]){m->row_images})
                           : MD_NO_SLOT;
    return MD_OK;
}

/* Mask tokens stand in for the hidden patches (BEiT); the final norm runs on the chosen rows only.
 */
static md_slot replace_build(md_method *m, md_graph *g)
{
    const md_vit *v = &m->student_vit;
    const md_vit_spec *s = &v->spec;
    const int64_t tokens = md_vit_tokens(s);
    float mean[3], std[3];
    for (int i = 0; i < 3; i++) {
        mean[i] = (float)m->config->image_mean[i];
        std[i] = (float)m->config->image_std[i];
    }
    if (g->status == MD_OK)
        g->status = add_keep_inputs(m, g);
    if (s->rel_pos != MD_REL_NONE)
        m->s_rel_index = md_graph_input(g, "rel_index", MD_I32, 2, (int64_t[]){tokens, tokens});
    if (s->mask_token)
        m->s_mask = md_method_input(m, g, "mask", MD_U8, 2, (int64_t[]){m->row_images, tokens - 1});
    md_vit_in in = {.images = m->row_images,
                    .image = m->s_image,
                    .mask = m->s_mask,
                    .index = m->s_rel_index,
                    .keep = m->s_keep,
                    .mean = mean,
                    .std = std,
                    .rows = m->s_rows,
                    .all_rows = m->s_all_rows,
                    .chosen_last = md_method_chosen_last(m),
                    .last = 1};
    md_slot x = MD_NO_SLOT, y, unused;
    md_vit_build(v, g, &in, &x);
    md_n_residual_ln(g,
                     &(md_residual_in){.x = x,
                                       .branch = MD_NO_SLOT,
                                       .keep = MD_NO_SLOT,
                                       .gamma = MD_NO_PARAM,
                                       .weight = v->norm_w,
                                       .bias = v->norm_b,
                                       .eps = s->ln_eps},
                     &unused, &y);
    return y;
}

static const md_student_row rows[] = {
    {"replace", replace_declare, replace_build},
};

const md_student_row *md_student_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(rows); i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    return NULL;
}
