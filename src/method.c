/* method: resolves the axes and builds the two graphs. */
#include "src/method.h"

#include <string.h>

static const md_task_row tasks[] = {
    {.name = "pretrain"},
    {"finetune", "labels", "none", "none", "pooled", "classifier", "cross_entropy"},
    {"features", "labels", "none", "none", "encoder", "none", "cross_entropy"}, /* to look at */
};

const md_task_row *md_task_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(tasks); i++)
        if (strcmp(tasks[i].name, name) == 0)
            return &tasks[i];
    return NULL;
}

/* What the task says, or else the config. */
static const char *either(const char *task, const char *config)
{
    return task ? task : config;
}

static md_status look_up(md_method *m)
{
    const md_config *c = m->config;
    const md_task_row *t = m->task = md_task_find(c->task);
    MD_ASSERT(t, "task \"%s\" passed the config check but has no row", c->task);
    m->teacher = md_teacher_find(either(t->teacher, c->teacher_kind));
    m->target = md_target_find(either(t->target, c->target_norm));
    m->student = md_student_find(either(t->student, c->student_mode));
    m->head = md_head_find(either(t->head, c->head_kind));
    m->loss = md_loss_find(either(t->loss, c->loss_kind));
    MD_ASSERT(m->teacher && m->target && m->student && m->head && m->loss,
              "an axis name passed the config check but has no row");
    if (!t->mask)
        return md_mask_args_make(c, &m->mask);
    m->mask = md_mask_args_none(c);
    return MD_OK;
}

bool md_method_chosen_last(const md_method *m)
{
    return strcmp(m->config->model_last_block, "chosen") == 0;
}

bool md_method_needs_weights(const md_config *c)
{
    const md_task_row *task = md_task_find(c->task);
    const md_teacher_row *row = md_teacher_find(either(task->teacher, c->teacher_kind));
    return row && row->trained_weights;
}

/* Which tokens the loss is taken on, or pooled. */
static void choose_tokens(md_method *m)
{
    const md_config *c = m->config;
    const int patches = m->mask.grid_h * m->mask.grid_w;
    if (m->loss->value == MD_CLASS) {
        m->chosen_cls = strcmp(c->model_pool, "cls") == 0;
        m->chosen = m->chosen_cls ? 1 : patches;
        return;
    }
    bool all = strcmp(c->loss_on, "all") == 0;
    MD_ASSERT(all || m->mask.count > 0, "the config check lets no mask pass with loss.on = masked");
    m->chosen = all ? patches : m->mask.count;
}

/* Both registries. The teacher's is never cut. */
static md_status seal(md_method *m)
{
    const md_method_split *s = &m->split;
    MD_TRY(md_params_seal(
        &m->params, &(md_params_cut){s->tp_rank, s->tp_size, MD_MAX(s->align, MD_PARAM_ALIGN)}));
    return md_params_seal(&m->teacher_params, NULL);
}

md_status md_method_resolve(md_method *m, const md_config *c, const md_teacher_info *info,
                            const md_method_split *split)
{
    *m = (md_method){.config = c,
                     .split = split ? *split : (md_method_split){.tp_size = 1},
                     .proj_w = MD_NO_PARAM,
                     .fc_norm_w = MD_NO_PARAM,
                     .fc_norm_b = MD_NO_PARAM,
                     .t_image = MD_NO_SLOT,
                     .t_rows = MD_NO_SLOT,
                     .t_target = MD_NO_SLOT,
                     .s_mask = MD_NO_SLOT,
                     .s_mix = MD_NO_SLOT,
                     .s_rel_index = MD_NO_SLOT,
                     .s_packed_rows = MD_NO_SLOT,
                     .t_rel_index = MD_NO_SLOT};
    m->params.dtype = m->teacher_params.dtype = md_config_compute(c);
    MD_TRY(look_up(m));
    choose_tokens(m);
    if (m->teacher->trained_weights && !info)
        MD_FAIL(MD_ERR_CONFIG, "method.teacher.kind = %s needs method.teacher.weights",
                m->teacher->name);
    if (info)
        m->info = *info;
    md_tag target, encoded;
    MD_TRY(m->teacher->declare(m, &target));
    MD_TRY(m->student->declare(m, &encoded));
    MD_ASSERT((target.value == MD_CLASS) == (m->loss->value == MD_CLASS),
              "teacher %s and loss %s do not fit", m->teacher->name, m->loss->name);
    m->labels = target.value == MD_CLASS;
    m->outputs = encoded.tokens == MD_TOKENS_IMAGE ? 1 : m->chosen;
    m->target_width = target.width;
    m->teacher_cls = target.tokens == MD_TOKENS_WITH_CLS;
    MD_TRY(m->head->declare(m, &encoded, target.width));
    return seal(m);
}

int64_t md_method_packed(const md_method *m, int64_t kept)
{
    const int64_t unit = (m->row_images + MD_PACKED_COUNTS - 1) / MD_PACKED_COUNTS;
    const int64_t whole = (MD_MAX(kept, 1) + unit - 1) / unit * unit;
    return MD_MIN(whole, m->row_images);
}

md_slot md_method_input(const md_method *m, md_graph *g, const char *name, md_dtype dtype, int rank,
                        const int64_t *dim)
{
    md_slot s = md_graph_input(g, name, dtype, rank, dim);
    if (m->row_images < m->images)
        md_graph_cut_rows(g, s);
    return s;
}

static md_status build_teacher(md_method *m)
{
    md_graph *g = &m->teacher_graph;
    const int64_t side = m->teacher_image ? m->teacher_image : m->config->image_size;
    md_graph_init(g, &m->teacher_params, false, m->split.tp);
    if (!m->teacher->build)
        return md_graph_finish(g);
    m->t_image = md_graph_input(g, "image", MD_U8, 4, (int64_t[]){m->own_images, side, side, 3});
    m->t_rows = md_graph_input(g, "rows", MD_I32, 2, (int64_t[]){m->own_images, m->chosen});
    md_graph_cut_rows(g, m->t_image);
    md_graph_cut_rows(g, m->t_rows);
    md_slot x = m->teacher->build(m, g, m->t_image, m->t_rows);
    m->t_target = m->target->build(m, g, x);
    if (m->row_images > m->own_images)
        m->t_target = md_n_all_rows(g, m->t_target);
    md_graph_set_external(g, m->t_target);
    return md_graph_finish(g);
}

static md_status build_student(md_method *m, int64_t step_images)
{
    md_graph *g = &m->student_graph;
    const int64_t side = m->config->image_size, n = m->row_images;
    md_graph_init(g, &m->params, true, m->split.tp);
    m->s_image = md_method_input(m, g, "image", MD_U8, 4, (int64_t[]){n, side, side, 3});
    m->s_rows = md_method_input(m, g, "rows", MD_I32, 2, (int64_t[]){n, m->chosen});
    m->s_all_rows = n == m->images ? m->s_rows
                                   : md_graph_input(g, "all rows", MD_I32, 2,
                                                    (int64_t[]){m->images, m->chosen});
    m->s_target = md_method_input(m, g, "target", m->labels ? MD_F32 : g->params->dtype, 2,
                                  (int64_t[]){n * m->outputs, m->target_width});
    if (m->labels)
        m->s_mix = md_method_input(m, g, "mix", MD_I32, 2, (int64_t[]){n, MD_MIX_WORDS});
    md_slot pred = m->head->build(m, g, m->student->build(m, g));
    double values = (double)step_images * m->outputs;
    values *= m->loss->per_value ? m->target_width : 1;
    m->s_loss = m->loss->build(g, pred, m->s_target,
                               &(md_attr){.loss = m->loss->kind,
                                          .beta = (float)m->config->loss_beta,
                                          .scale = (float)(1.0 / values)});
    return md_graph_finish(g);
}

md_status md_method_build(md_method *m, int64_t images, int64_t step_images)
{
    MD_ASSERT(images % m->split.tp_size == 0, "%lld images over %d ranks", (long long)images,
              m->split.tp_size);
    m->images = images;
    m->own_images = images / m->split.tp_size;
    m->row_images = m->split.sequence ? m->own_images : images;
    MD_TRY(build_teacher(m));
    return build_student(m, step_images);
}

void md_method_free(md_method *m)
{
    md_graph_free(&m->teacher_graph);
    md_graph_free(&m->student_graph);
    md_vit_free(&m->student_vit);
    md_vit_free(&m->teacher_vit);
    md_params_free(&m->params);
    md_params_free(&m->teacher_params);
    md_free(m->s_keep);
    md_free(m->s_packed);
    *m = (md_method){0};
}
