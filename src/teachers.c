/* teachers: the axis method.teacher. A frozen ViT, the picture's own patches, or its label. */
#include "src/method.h"

#include <string.h>

/* ---- vit ---- */

/* In the order of the key method.teacher.stage. */
enum { STAGE_RAW, STAGE_LN_POST, STAGE_PROJ };

static md_status vit_grid(md_method *m)
{
    const md_config *c = m->config;
    md_vit_spec *t = &m->info.spec;
    int side = (int)(c->image_size / c->model_patch);
    t->image = c->teacher_image_size ? (int)c->teacher_image_size : side * t->patch;
    if (t->image % t->patch != 0 || t->image / t->patch != side)
        MD_FAIL(
            MD_ERR_CONFIG,
            "method.teacher.image_size = %d gives the teacher (patch %d) a grid of %g x %g, the "
            "student (image.size %d, model.patch %d) has %d x %d: set "
            "method.teacher.image_size = %d",
            t->image, t->patch, (double)t->image / t->patch, (double)t->image / t->patch,
            (int)c->image_size, (int)c->model_patch, side, side, side * t->patch);
    m->teacher_image = t->image == c->image_size ? 0 : t->image;
    return MD_OK;
}

static md_status vit_declare(md_method *m, md_tag *out)
{
    const md_config *c = m->config;
    md_vit_spec *t = &m->info.spec;
    int stage = md_config_choice("method.teacher.stage", c->teacher_stage);
    MD_TRY(vit_grid(m));
    if (c->teacher_layers > t->layers)
        MD_FAIL(MD_ERR_CONFIG, "method.teacher.layers = %d but the teacher has %d blocks",
                (int)c->teacher_layers, t->layers);
    if (stage != STAGE_RAW && m->info.norm == MD_NORM_NONE)
        MD_FAIL(MD_ERR_CONFIG,
                "method.teacher.stage = %s but %s holds no final norm: set "
                "method.teacher.stage = raw",
                c->teacher_stage, c->teacher_weights);
    if (t->rel_pos != MD_REL_NONE && m->info.grid != md_vit_side(t))
        MD_FAIL(MD_ERR_CONFIG,
                "the teacher's relative positions are for %d x %d patches, the student (image.size "
                "%d, model.patch %d) has %d x %d: such a teacher needs the same grid",
                m->info.grid, m->info.grid, (int)c->image_size, (int)c->model_patch, md_vit_side(t),
                md_vit_side(t));
    if (stage == STAGE_PROJ && m->info.proj_width == 0)
        MD_FAIL(MD_ERR_CONFIG, "method.teacher.stage = ln_post_proj but %s holds no projection",
                c->teacher_weights);
    t->final_norm = stage != STAGE_RAW;
    t->init_std = 0.02f; /* for measurements: a run has the file's weights */
    MD_TRY(md_vit_declare(&m->teacher_vit, t, &m->teacher_params));
    int width = t->width;
    if (stage == STAGE_PROJ) {
        width = m->info.proj_width;
        md_param proj = {.name = "proj.weight",
                         .init = MD_INIT_TRUNC_NORMAL,
                         .init_value = t->init_std,
                         .init_scale = 1.0f,
                         .rank = 2,
                         .global = {width, t->width},
                         .cut_dim = -1,
                         .cut_parts = 1,
                         .layer_id = t->layers + 1};
        m->proj_w = md_params_add(&m->teacher_params, &proj);
    }
    *out = (md_tag){MD_FEATURE, MD_TOKENS_WITH_CLS, width};
    return MD_OK;
}

/* Mean of the last k block outputs at the chosen rows, then the stage asked for. */
static md_slot vit_build(md_method *m, md_graph *g, md_slot image, md_slot rows)
{
    const int k = (int)m->config->teacher_layers;
    const int stage = md_config_choice("method.teacher.stage", m->config->teacher_stage);
    md_slot *out = md_alloc(sizeof *out * (size_t)k, "teacher outputs");
    if (!out) {
        g->status = MD_ERR_MEMORY;
        return MD_NO_SLOT;
    }
    const int64_t tokens = md_vit_tokens(&m->info.spec);
    if (m->info.spec.rel_pos != MD_REL_NONE)
        m->t_rel_index = md_graph_input(g, "rel_index", MD_I32, 2, (int64_t[]){tokens, tokens});
    md_vit_in in = {.images = m->own_images,
                    .image = image,
                    .mask = MD_NO_SLOT,
                    .mix = MD_NO_SLOT,
                    .index = m->t_rel_index,
                    .mean = m->info.mean,
                    .std = m->info.std,
                    .rows = rows,
                    .all_rows = rows,
                    .chosen_last = md_method_chosen_last(m),
                    .last = k};
    md_vit_build(&m->teacher_vit, g, &in, out);
    md_slot x = MD_NO_SLOT;
    for (int i = 0; i < k; i++)
        x = k == 1 ? out[i] : md_n_add_scaled(g, x, out[i], 1.0f / (float)k);
    md_free(out);
    const md_vit *v = &m->teacher_vit;
    if (stage != STAGE_RAW)
        x = md_n_layernorm(g, x, (int[]){v->norm_w, v->norm_b}, &(md_attr){.eps = v->spec.ln_eps});
    if (stage == STAGE_PROJ)
        x = md_n_linear(g, x, m->proj_w, MD_NO_PARAM, MD_ACT_NONE);
    return x;
}

/* ---- pixel: normalised pixels of each patch, order (y, x, channel) as MAE's patchify ---- */

static md_status pixel_declare(md_method *m, md_tag *out)
{
    const md_config *c = m->config;
    if (c->teacher_image_size && c->teacher_image_size != c->image_size)
        MD_FAIL(MD_ERR_CONFIG,
                "method.teacher.image_size = %d, but a pixel teacher sees the student's own crop "
                "of %d pixels: leave the key at 0",
                (int)c->teacher_image_size, (int)c->image_size);
    *out = (md_tag){MD_PIXEL, MD_TOKENS_PATCHES, (int)(3 * c->model_patch * c->model_patch)};
    return MD_OK;
}

static md_slot pixel_build(md_method *m, md_graph *g, md_slot image, md_slot rows)
{
    md_attr a = {.side = (int)m->config->model_patch, .order = MD_PATCH_HWC};
    for (int i = 0; i < 3; i++) {
        a.mean[i] = (float)m->config->image_mean[i];
        a.std[i] = (float)m->config->image_std[i];
    }
    return md_n_gather_rows(g, md_n_patchify(g, image, MD_NO_SLOT, &a), rows);
}

/* ---- labels: classes of the images, no teacher at all ---- */

static md_status labels_declare(md_method *m, md_tag *out)
{
    *out = (md_tag){MD_CLASS, MD_TOKENS_IMAGE, (int)m->config->model_classes};
    return MD_OK;
}

static const md_teacher_row teachers[] = {
    {"vit", true, vit_declare, vit_build},
    {"pixel", false, pixel_declare, pixel_build},
    {"labels", false, labels_declare, NULL},
};

const md_teacher_row *md_teacher_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(teachers); i++)
        if (strcmp(teachers[i].name, name) == 0)
            return &teachers[i];
    return NULL;
}
