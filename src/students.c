/* students: the axis method.student.mode: what the encoder sees of a picture, and what of its
 * output is passed on. */
#include "src/method.h"

#include <stdio.h>
#include <string.h>

/* What the encoder is, but for what a row decides. */
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
        .qv_bias = true,
        .patch_bias = true,
        .act = MD_ACT_GELU,
        .ln_eps = (float)c->model_ln_eps,
        .layer_scale = (float)c->model_layer_scale,
        .drop_path = (float)c->model_drop_path,
        .init_std = (float)c->model_init_std,
        .recompute = (int)c->train_recompute,
    };
}

/* Drop path: the factors of every branch, and where dropped images are skipped the indices of the
 * others. Ranks of a sequence-parallel group would have different numbers of them, which their
 * collectives do not take. */
static md_status add_drop_path(md_method *m, md_graph *g)
{
    const md_vit_spec *s = &m->student_vit.spec;
    const int branches = 2 * s->layers;
    const int64_t images = m->row_images;
    if (s->drop_path <= 0)
        return MD_OK;
    MD_NEW(m->s_keep, branches, "drop path inputs");
    if (!m->split.sequence && strcmp(m->config->model_drop_path_mode, "mask") != 0)
        MD_NEW(m->s_packed, branches, "drop path inputs");
    for (int k = 0; k < branches; k++) {
        const bool drops = md_vit_drop_rate(s, k / 2) > 0;
        m->s_keep[k] =
            drops ? md_method_input(m, g, "keep", MD_F32, 1, (int64_t[]){images}) : MD_NO_SLOT;
        if (m->s_packed)
            m->s_packed[k] = drops ? md_graph_packed(g, "packed", images) : MD_NO_SLOT;
    }
    if (m->s_packed && md_method_chosen_last(m) && m->s_packed[branches - 2] != MD_NO_SLOT) {
        m->s_packed_rows =
            md_graph_input(g, "packed rows", MD_I32, 2, (int64_t[]){images, m->chosen});
        md_graph_set_packed(g, m->s_packed_rows, m->s_packed[branches - 2]);
    }
    return MD_OK;
}

/* The encoder, in the colours of the config. */
static void build(const md_method *m, md_graph *g, md_vit_in *in, md_slot *out)
{
    float mean[3], std[3];
    for (int i = 0; i < 3; i++) {
        mean[i] = (float)m->config->image_mean[i];
        std[i] = (float)m->config->image_std[i];
    }
    in->mean = mean;
    in->std = std;
    md_vit_build(&m->student_vit, g, in, out);
}

void md_student_blocks(const md_method *m, md_graph *g, const md_vit_in *given, md_slot *out)
{
    md_vit_in in = *given;
    in.rows = in.all_rows = MD_NO_SLOT;
    in.chosen_last = false;
    in.last = m->student_vit.spec.layers;
    build(m, g, &in, out);
}

md_slot md_student_encode(const md_method *m, md_graph *g, const md_vit_in *given)
{
    const md_vit *v = &m->student_vit;
    md_vit_in in = *given;
    in.chosen_last = md_method_chosen_last(m);
    in.last = 1;
    md_slot x = MD_NO_SLOT, unused;
    build(m, g, &in, &x);
    if (v->norm_w == MD_NO_PARAM)
        return x;
    md_n_residual_ln(g,
                     &(md_residual_in){.x = x,
                                       .branch = MD_NO_SLOT,
                                       .keep = MD_NO_SLOT,
                                       .from = MD_NO_SLOT,
                                       .to = MD_NO_SLOT,
                                       .gamma = MD_NO_PARAM,
                                       .weight = v->norm_w,
                                       .bias = v->norm_b,
                                       .eps = v->spec.ln_eps},
                     &unused, &x);
    return x;
}

/* The training graph's inputs, and the encoder on them. */
static md_slot encode(md_method *m, md_graph *g)
{
    const md_vit_spec *s = &m->student_vit.spec;
    const int64_t tokens = md_vit_tokens(s);
    if (g->status == MD_OK)
        g->status = add_drop_path(m, g);
    if (s->rel_pos != MD_REL_NONE)
        m->s_rel_index = md_graph_input(g, "rel_index", MD_I32, 2, (int64_t[]){tokens, tokens});
    if (s->mask_token)
        m->s_mask = md_method_input(m, g, "mask", MD_U8, 2, (int64_t[]){m->row_images, tokens - 1});
    return md_student_encode(m, g,
                             &(md_vit_in){.images = m->row_images,
                                          .image = m->s_image,
                                          .mask = m->s_mask,
                                          .mix = m->s_mix,
                                          .index = m->s_rel_index,
                                          .keep = m->s_keep,
                                          .packed = m->s_packed,
                                          .packed_rows = m->s_packed_rows,
                                          .rows = m->s_rows,
                                          .all_rows = m->s_all_rows});
}

/* ---- replace: mask tokens stand in for the hidden patches (BEiT); the final norm runs on the
 * chosen rows only ---- */

static md_status replace_declare(md_method *m, md_tag *out)
{
    md_vit_spec spec = student_spec(m);
    spec.mask_token = m->mask.count > 0;
    spec.final_norm = true;
    *out = (md_tag){MD_FEATURE, MD_TOKENS_CHOSEN, spec.width};
    return md_vit_declare(&m->student_vit, &spec, &m->params);
}

/* ---- pooled: one vector an image: the mean of the patch tokens behind a LayerNorm of its own, or
 * the normalised cls token (microsoft/unilm, beit2/modeling_finetune.py) ---- */

static int add_fc_norm(md_method *m, const char *name, float value)
{
    const md_vit_spec *s = &m->student_vit.spec;
    md_param p = {.rank = 1,
                  .global = {s->width},
                  .cut_dim = -1,
                  .cut_parts = 1,
                  .init_value = value,
                  .init_scale = 1.0f,
                  .layer_id = s->layers + 1};
    snprintf(p.name, sizeof p.name, "%s", name);
    return md_params_add(&m->params, &p);
}

static md_status pooled_declare(md_method *m, md_tag *out)
{
    md_vit_spec spec = student_spec(m);
    spec.final_norm = m->chosen_cls;
    *out = (md_tag){MD_FEATURE, MD_TOKENS_IMAGE, spec.width};
    MD_TRY(md_vit_declare(&m->student_vit, &spec, &m->params));
    if (m->chosen_cls)
        return MD_OK;
    m->fc_norm_w = add_fc_norm(m, "fc_norm.weight", 1.0f);
    m->fc_norm_b = add_fc_norm(m, "fc_norm.bias", 0.0f);
    return m->fc_norm_w < 0 || m->fc_norm_b < 0 ? MD_ERR_MEMORY : MD_OK;
}

md_slot md_student_pool(const md_method *m, md_graph *g, md_slot x)
{
    md_slot unused, y = md_n_mean_rows(g, x);
    if (m->fc_norm_w == MD_NO_PARAM)
        return y;
    md_n_residual_ln(g,
                     &(md_residual_in){.x = y,
                                       .branch = MD_NO_SLOT,
                                       .keep = MD_NO_SLOT,
                                       .from = MD_NO_SLOT,
                                       .to = MD_NO_SLOT,
                                       .gamma = MD_NO_PARAM,
                                       .weight = m->fc_norm_w,
                                       .bias = m->fc_norm_b,
                                       .eps = m->student_vit.spec.ln_eps},
                     &unused, &y);
    return y;
}

static md_slot pooled_build(md_method *m, md_graph *g)
{
    return md_student_pool(m, g, encode(m, g));
}

/* ---- encoder: a pretrained encoder with its final norm, for looking at what it gives ---- */

static md_status encoder_declare(md_method *m, md_tag *out)
{
    md_vit_spec spec = student_spec(m);
    spec.final_norm = true;
    *out = (md_tag){MD_FEATURE, MD_TOKENS_CHOSEN, spec.width};
    return md_vit_declare(&m->student_vit, &spec, &m->params);
}

static const md_student_row rows[] = {
    {"replace", replace_declare, encode},
    {"pooled", pooled_declare, pooled_build},
    {"encoder", encoder_declare, encode},
};

const md_student_row *md_student_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(rows); i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    return NULL;
}
