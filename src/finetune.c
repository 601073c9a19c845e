/* finetune: see finetune.h. */
#include "src/finetune.h"
#include "io/weights.h"
#include "mpi/agree.h"
#include "src/log.h"

#include <stdio.h>
#include <string.h>

#define SHARED_TABLE "rel_pos_bias.relative_position_bias_table"

/* An array as the source has it. */
typedef struct stored {
    const char *name;
    int64_t dim[MD_MAX_RANK];
    int rank;
    int64_t count;
    float *data;
} stored;

static bool is_own(const char *name)
{
    return strncmp(name, "head.", 5) == 0 || strncmp(name, "fc_norm.", 8) == 0;
}

static bool is_rel_table(const char *name)
{
    return strstr(name, "relative_position_bias_table") != NULL;
}

/* The source's name for a row; NULL when it has none. */
static const char *source_name(const md_pretrained *p, const char *name)
{
    if (md_pretrained_has(p, name))
        return name;
    return is_rel_table(name) && md_pretrained_has(p, SHARED_TABLE) ? SHARED_TABLE : NULL;
}

static int64_t global_count(const md_param *row)
{
    int64_t n = 1;
    for (int d = 0; d < row->rank; d++)
        n *= row->global[d];
    return n;
}

/* Side of the square grid behind a table of `rows` rows with `extra` besides: grid (positions) or 2
 * grid - 1 (relative positions); 0 when it is none. */
static int side_of(int64_t rows, int extra, bool relative)
{
    int side = 1;
    while ((int64_t)side * side < rows - extra)
        side++;
    if ((int64_t)side * side != rows - extra)
        return 0;
    return relative ? (side + 1) / 2 : side;
}

/* What is under way. */
typedef struct start {
    const md_start_args *args;
    md_comm *world;
    md_method *m;
    md_pretrained *p;
    int taken;
} start;

/* Writes the whole array of a row, of the source's or (tables of positions) another grid. */
static md_status convert(const start *t, const md_param *row, const stored *s, float *whole)
{
    const md_method *m = t->m;
    const int64_t n = global_count(row);
    const int grid = md_vit_side(&m->student_vit.spec);
    const bool relative = is_rel_table(row->name);
    const int64_t width = row->global[row->rank - 1];
    if (s->count == n) {
        memcpy(whole, s->data, (size_t)n * sizeof *whole);
        return MD_OK;
    }
    const int from =
        s->dim[s->rank - 1] == width ? side_of(s->count / width, relative ? 3 : 1, relative) : 0;
    if (from && relative)
        return md_rel_pos_resize(&(md_rel_pos_resize_args){
            .src = s->data, .dst = whole, .g_src = from, .g_dst = grid, .heads = (int)width});
    if (from && strcmp(row->name, "pos_embed") == 0) {
        md_pos_resize(&(md_pos_resize_args){.src = s->data,
                                            .dst = whole,
                                            .g_src = from,
                                            .g_dst = grid,
                                            .width = (int)width,
                                            .rule = MD_POS_EXACT});
        return MD_OK;
    }
    MD_FAIL(MD_ERR_CONFIG,
            "%s: %s has %lld values in %s, the model's %s has %lld: model.width, model.mlp, "
            "model.heads and model.patch must be those of the run that made it",
            t->args->key, s->name, (long long)s->count, t->args->path, row->name, (long long)n);
}

/* Collective. Reads one array. */
static md_status read_stored(const start *t, stored *s)
{
    s->rank = md_pretrained_shape(t->p, s->name, s->dim);
    s->count = 1;
    for (int d = 0; d < s->rank; d++)
        s->count *= s->dim[d];
    s->data = md_alloc((size_t)s->count * sizeof *s->data, "starting weights");
    MD_TRY(md_agree(t->world, s->data ? MD_OK : MD_ERR_MEMORY));
    return md_pretrained_load(t->p, s->name, s->data);
}

/* Collective. One row from the source into this rank's part. */
static md_status take(start *t, int i, const char *name)
{
    md_params *params = &t->m->params;
    const md_param *row = &params->row[i];
    stored s = {.name = name};
    float *whole = md_alloc((size_t)global_count(row) * sizeof *whole, "starting weights");
    md_status st = md_agree(t->world, whole ? MD_OK : MD_ERR_MEMORY);
    if (st == MD_OK)
        st = read_stored(t, &s);
    if (st == MD_OK)
        st = md_agree(t->world, convert(t, row, &s, whole));
    if (st == MD_OK) {
        t->taken++;
        float *part = md_param_host(params, i).data;
        for (int64_t e = 0; e < row->count; e++)
            part[e] = whole[md_view_global(&row->view, e)];
    }
    md_free(whole);
    md_free(s.data);
    return st;
}

/* A head of other classes is left alone. */
static bool fits(md_pretrained *p, const md_param *row, const char *name)
{
    int64_t dim[MD_MAX_RANK] = {0}, n = 1;
    const int rank = md_pretrained_shape(p, name, dim);
    for (int d = 0; d < rank; d++)
        n *= dim[d];
    return n == global_count(row);
}

static md_status take_all(start *t)
{
    for (int i = 0; i < t->m->params.count; i++) {
        const md_param *row = &t->m->params.row[i];
        const char *name = source_name(t->p, row->name);
        if (!t->args->whole && is_own(row->name) && (!name || !fits(t->p, row, name)))
            continue;
        if (!name)
            MD_FAIL(MD_ERR_CONFIG, "%s: %s has no parameter %s, which the model has", t->args->key,
                    t->args->path, row->name);
        MD_TRY(take(t, i, name));
    }
    return MD_OK;
}

md_status md_finetune_load(md_comm *world, const md_start_args *args, md_method *m)
{
    start t = {.args = args, .world = world, .m = m};
    md_status st = md_pretrained_open(world, args->path, args->ema, &t.p);
    if (st != MD_OK)
        return md_error_prefix(st, "%s", args->key);
    st = take_all(&t);
    if (st == MD_OK) {
        st = md_agree(world, md_params_store(&m->params));
        if (args->identity)
            snprintf(args->identity, MD_PRETRAINED_IDENTITY, "%s", md_pretrained_identity(t.p));
        md_log_info("%d of %d parameters from %s", t.taken, m->params.count,
                    md_pretrained_describe(t.p));
    }
    md_pretrained_close(t.p);
    return st;
}
