/* setup: see setup.h. */
#include "src/setup.h"
#include "io/weights.h"
#include "mpi/agree.h"
#include "src/mix.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL /* no library to link, compiled for this machine */
#include <xxhash.h>

void md_setup_run_dir(const md_config *c, char dir[MD_CONFIG_STR])
{
    if (*c->run_dir) {
        snprintf(dir, MD_CONFIG_STR, "%s", c->run_dir);
        return;
    }
    const char *name = strrchr(c->source, '/');
    name = name ? name + 1 : c->source;
    snprintf(dir, MD_CONFIG_STR, "runs/%.*s", (int)(strlen(name) - 4), name);
}

md_status md_setup_same_config(md_comm *world, const md_config *c)
{
    char *text = NULL;
    md_status st = md_agree(world, md_config_text(c, &text));
    int64_t h = st == MD_OK ? (int64_t)(XXH3_64bits(text, strlen(text)) >> 1) : 0;
    free(text);
    MD_TRY(st);
    return md_agree_same(world, "the configuration (a hash of its values)", h);
}

/* A pass is shared by the tensor-parallel ranks, image by image. */
static md_status check_micro(const md_config *c, const md_batch_layout *l)
{
    const int64_t each = l->batch / l->dp;
    const bool set = c->train_micro_batch != 0;
    if (each % l->micro != 0)
        MD_FAIL(MD_ERR_CONFIG,
                "train.micro_batch = %lld does not divide the %lld images of a data-parallel rank "
                "(train.batch = %lld over %d)",
                (long long)l->micro, (long long)each, (long long)l->batch, l->dp);
    if (l->micro % l->tp != 0)
        MD_FAIL(
            MD_ERR_CONFIG,
            "%s = %lld images of a pass do not divide over parallel.tensor = %d ranks: choose a "
            "multiple of %d",
            set ? "train.micro_batch" : "train.batch / data-parallel ranks", (long long)l->micro,
            l->tp, l->tp);
    const md_mix_rule mix = md_mix_rule_make(c);
    const int64_t rows = c->parallel_sequence ? l->micro / l->tp : l->micro;
    if ((mix.mixup > 0 || mix.cutmix > 0) && rows % mix.group != 0)
        MD_FAIL(MD_ERR_CONFIG,
                "augment.mix_group = %d does not divide the %lld images that a rank holds in a "
                "pass: images are mixed within a group",
                mix.group, (long long)rows);
    return MD_OK;
}

md_status md_batch_layout_make(const md_config *c, int ranks, md_batch_layout *out)
{
    const int64_t batch = c->train_batch;
    const int tp = (int)c->parallel_tensor;
    if (ranks % tp != 0)
        MD_FAIL(MD_ERR_CONFIG,
                "parallel.tensor = %d does not divide the %d ranks: start a multiple of %d ranks",
                tp, ranks, tp);
    const int dp = ranks / tp;
    if (batch % dp != 0)
        MD_FAIL(MD_ERR_CONFIG,
                "train.batch = %lld does not divide over %d data-parallel ranks: the next batches "
                "that do are %lld and %lld",
                (long long)batch, dp, (long long)MD_MAX(batch / dp, 1) * dp,
                (long long)(batch / dp + 1) * dp);
    int64_t micro = c->train_micro_batch ? c->train_micro_batch : batch / dp;
    *out = (md_batch_layout){.batch = batch, .micro = micro, .ranks = ranks, .dp = dp, .tp = tp};
    MD_TRY(check_micro(c, out));
    out->accumulation = (int)(batch / dp / micro);
    return MD_OK;
}

md_status md_model_make(const md_config *c, const md_teacher_info *info, const md_topo *topo,
                        const md_batch_layout *layout, md_model *out)
{
    const bool zero = c->parallel_zero > 0;
    MD_TRY(md_method_resolve(&out->method, c, info,
                             &(md_method_split){.tp = topo->op_tp,
                                                .tp_rank = topo->tp_rank,
                                                .tp_size = topo->tp_size,
                                                .sequence = c->parallel_sequence,
                                                .align = md_shard_align(topo, zero)}));
    MD_TRY(md_method_build(&out->method, layout->micro, layout->batch));
    return md_shard_make(
        &(md_shard_args){.graph = &out->method.student_graph,
                         .topo = topo,
                         .zero = zero,
                         .bucket_bytes = (int64_t)(c->parallel_bucket_mib * 1048576.0)},
        &out->shard);
}

md_status md_model_allocate(const md_config *c, md_backend *be, md_model *m)
{
    md_params *p = &m->method.params;
    MD_TRY(md_params_allocate(p, be, true));
    MD_TRY(md_params_allocate_moments(p, m->shard.moments, m->shard.zero));
    if (c->optim_ema > 0)
        MD_TRY(md_params_allocate_ema(p));
    MD_TRY(md_params_allocate(&m->method.teacher_params, be, false));
    md_params_initialise(p, (uint64_t)c->run_seed);
    return md_params_store(p);
}

md_status md_model_backend(const md_config *c, const md_topo *topo, md_backend **out)
{
    return md_backend_make(&(md_backend_args){.name = c->backend,
                                              .threads = (int)c->threads,
                                              .compute = md_config_compute(c),
                                              .node_rank = topo->node_rank,
                                              .node_size = topo->node_size},
                           out);
}

void md_model_free(md_model *m)
{
    md_shard_free(&m->shard);
    md_method_free(&m->method);
}

int64_t md_total_steps(const md_config *c, int64_t steps_per_epoch)
{
    int64_t steps = llround(c->train_epochs * (double)steps_per_epoch);
    return c->train_max_steps ? MD_MIN(steps, c->train_max_steps) : steps;
}

/* Teachers that are known by name. The qkv bias is full, positions are absolute in all of them. */
static const struct {
    const char *name;
    int width, layers, heads, patch, grid, proj_width;
    bool clip;
} known[] = {
    {"clip_vit_b16", 768, 12, 12, 16, 14, 512, true},
    {"clip_vit_l14", 1024, 24, 16, 14, 16, 768, true},
    {"vit_b16", 768, 12, 12, 16, 14, 0, false},
};

/* The table's row as weights information; false for "file". */
static bool info_from_name(const char *name, md_teacher_info *out)
{
    for (size_t i = 0; i < MD_COUNT(known); i++) {
        if (strcmp(known[i].name, name) != 0)
            continue;
        *out = (md_teacher_info){
            .grid = known[i].grid, .proj_width = known[i].proj_width, .std = {1.0f, 1.0f, 1.0f}};
        out->spec = (md_vit_spec){.patch = known[i].patch,
                                  .width = known[i].width,
                                  .layers = known[i].layers,
                                  .heads = known[i].heads,
                                  .mlp = 4 * known[i].width,
                                  .rel_pos = MD_REL_NONE,
                                  .abs_pos = true,
                                  .patch_bias = !known[i].clip,
                                  .pre_norm = known[i].clip,
                                  .act = known[i].clip ? MD_ACT_QUICK_GELU : MD_ACT_GELU,
                                  .ln_eps = known[i].clip ? 1e-5f : 1e-6f};
        return true;
    }
    return false;
}

static const md_rel_pos rel_pos_of[] = {
    [MD_WEIGHTS_REL_NONE] = MD_REL_NONE,
    [MD_WEIGHTS_REL_SHARED] = MD_REL_SHARED,
    [MD_WEIGHTS_REL_PER_LAYER] = MD_REL_PER_LAYER,
};

static md_status info_from_file(const md_config *c, md_teacher_info *out, char hash[17])
{
    md_weights_info w;
    md_status st = md_weights_info_read(c->teacher_weights, &w);
    if (st != MD_OK)
        return md_error_prefix(st, "method.teacher.weights");
    out->spec = (md_vit_spec){.patch = w.patch,
                              .width = w.width,
                              .layers = w.layers,
                              .heads = w.heads,
                              .mlp = w.mlp,
                              .rel_pos = rel_pos_of[w.rel_pos],
                              .abs_pos = w.abs_pos,
                              .qv_bias = w.qv_bias,
                              .patch_bias = w.patch_bias,
                              .layer_scale = w.layer_scale ? 1.0f : 0.0f, /* its value is read */
                              .pre_norm = w.pre_norm,
                              .act = w.act,
                              .ln_eps = (float)w.ln_eps};
    out->grid = w.grid;
    out->proj_width = w.proj_width;
    out->norm = w.final_norm ? MD_NORM_LAST : w.fc_norm ? MD_NORM_MEAN : MD_NORM_NONE;
    for (int i = 0; i < 3; i++) {
        out->mean[i] = (float)w.mean[i];
        out->std[i] = (float)w.std[i];
    }
    memcpy(hash, w.hash, 17);
    return MD_OK;
}

md_status md_teacher_info_get(const md_config *c, bool planning, md_teacher_info *out,
                              char hash[17])
{
    *out = (md_teacher_info){0};
    hash[0] = 0;
    if (!md_method_needs_weights(c))
        return MD_OK;
    bool there = *c->teacher_weights && access(c->teacher_weights, R_OK) == 0;
    if (planning && !there && info_from_name(c->teacher_arch, out))
        return MD_OK;
    if (!*c->teacher_weights)
        MD_FAIL(MD_ERR_CONFIG,
                "method.teacher.kind = %s needs method.teacher.weights: a file made "
                "by `md_hpc weights import`%s",
                c->teacher_kind, planning ? ", or method.teacher.arch for planning" : "");
    return info_from_file(c, out, hash);
}

/* What the weights call a row of the teacher's registry. */
static const char *stored_name(const md_method *m, int row, char buf[MD_WEIGHT_NAME])
{
    const bool weight = row == m->teacher_vit.norm_w;
    if (m->info.norm != MD_NORM_MEAN || (!weight && row != m->teacher_vit.norm_b))
        return m->teacher_params.row[row].name;
    return md_weight_name(weight ? MD_WEIGHT_FC_NORM_W : MD_WEIGHT_FC_NORM_B, 0, buf);
}

/* Positions of another grid than the teacher will see. */
static md_status load_positions(md_comm *world, const md_config *c, const md_method *m,
                                md_weights *w, md_tensor *dst)
{
    const md_vit_spec *s = &m->info.spec;
    const int64_t rows = (int64_t)m->info.grid * m->info.grid + 1;
    float *stored = md_alloc((size_t)(rows * s->width) * sizeof *stored, "stored positions");
    md_tensor src = MD_TENSOR(stored, MD_F32, rows, s->width);
    md_status st = md_agree(world, stored ? MD_OK : MD_ERR_MEMORY);
    if (st == MD_OK)
        st = md_weights_load(w, m->teacher_params.row[m->teacher_vit.pos].name, &src);
    if (st == MD_OK)
        md_pos_resize(&(md_pos_resize_args){
            .src = stored,
            .dst = dst->data,
            .g_src = m->info.grid,
            .g_dst = md_vit_side(s),
            .width = s->width,
            .rule =
                (md_pos_rule)md_config_choice("method.teacher.pos_interpolation", c->teacher_pos)});
    md_free(stored);
    return st;
}

md_status md_teacher_load(md_comm *world, const md_config *c, md_method *m)
{
    md_params *p = &m->teacher_params;
    md_weights *w;
    if (!m->teacher->trained_weights)
        return MD_OK;
    MD_TRY(md_weights_open(world, c->teacher_weights, &w));
    md_status st = MD_OK;
    for (int i = 0; i < p->count && st == MD_OK; i++) {
        char name[MD_WEIGHT_NAME];
        md_tensor dst = md_param_host(p, i);
        bool other = i == m->teacher_vit.pos && m->info.grid != md_vit_side(&m->info.spec);
        st = other ? load_positions(world, c, m, w, &dst)
                   : md_weights_load(w, stored_name(m, i, name), &dst);
    }
    md_weights_close(w);
    if (st == MD_OK)
        st = md_agree(world, md_params_store(p));
    md_params_drop_host(p);
    return st;
}
