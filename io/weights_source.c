/* weights_source: see weights_source.h. */
#include "io/weights_source.h"

#include <stdio.h>
#include <string.h>

#include "io/pretrained.h"
#include "src/config.h"

#define FAMILY "weights"

struct md_weights_source {
    md_comm *self;
    md_pretrained *from;
    md_weights_info info;
};

/* ---- the model in a checkpoint ---- */

static int shape_of(const md_weights_source *s, md_weight_id id, int layer,
                    int64_t dim[MD_MAX_RANK])
{
    char name[MD_WEIGHT_NAME];
    return md_pretrained_shape(s->from, md_weight_name(id, layer, name), dim);
}

/* Dimension d, from the last one backwards, of a parameter; 0 when there is no such parameter. */
static int extent(const md_weights_source *s, md_weight_id id, int d)
{
    int64_t dim[MD_MAX_RANK];
    const int rank = shape_of(s, id, 0, dim);
    const int64_t n = d < rank ? dim[rank - 1 - d] : 0;
    return n <= 1 << 24 ? (int)n : 0;
}

static bool has(const md_weights_source *s, md_weight_id id, int layer)
{
    int64_t dim[MD_MAX_RANK];
    return shape_of(s, id, layer, dim) > 0;
}

#define HAS(id) has(s, MD_WEIGHT_##id, 0)

/* The model as names and shapes show it. */
static void info_from_entries(md_weights_source *s)
{
    md_weights_info *info = &s->info;
    *info = (md_weights_info){.width = extent(s, MD_WEIGHT_CLS, 0),
                              .patch = extent(s, MD_WEIGHT_PATCH_W, 0),
                              .mlp = extent(s, MD_WEIGHT_FC1_W, 1),
                              .classes = extent(s, MD_WEIGHT_HEAD_W, 1),
                              .lm_width = extent(s, MD_WEIGHT_LM_HEAD_W, 1),
                              .patch_bias = HAS(PATCH_B),
                              .abs_pos = HAS(POS),
                              .layer_scale = HAS(GAMMA_1),
                              .qv_bias = HAS(Q_B),
                              .mask_token = HAS(MASK),
                              .final_norm = HAS(NORM_W),
                              .fc_norm = HAS(FC_NORM_W),
                              .act = MD_ACT_GELU};
    info->rel_pos = HAS(REL_SHARED) ? MD_WEIGHTS_REL_SHARED
                    : HAS(REL)      ? MD_WEIGHTS_REL_PER_LAYER
                                    : MD_WEIGHTS_REL_NONE;
    const int tokens = extent(s, MD_WEIGHT_POS, 1);
    const int rows = MD_MAX(extent(s, MD_WEIGHT_REL_SHARED, 1), extent(s, MD_WEIGHT_REL, 1));
    while (info->grid < 1024 && (info->grid * info->grid + 1 < tokens ||
                                 (2 * info->grid - 1) * (2 * info->grid - 1) + 3 < rows))
        info->grid++;
    while (info->layers < 1024 && has(s, MD_WEIGHT_NORM1_W, info->layers))
        info->layers++;
}

static md_status info_from_config(md_weights_source *s)
{
    md_config c;
    md_weights_info *info = &s->info;
    const char *text = md_pretrained_config(s->from);
    if (!*text)
        MD_FAIL(MD_ERR_DATA, "%s: holds no config", md_pretrained_path(s->from));
    MD_TRY(md_config_init(&c));
    md_status st = md_config_read_written(&c, text, "the config in the checkpoint");
    info->heads = (int)c.model_heads;
    if (info->grid == 0 && info->patch > 0) /* no tables */
        info->grid = (int)c.image_size / info->patch;
    info->ln_eps = c.model_ln_eps;
    memcpy(info->mean, c.image_mean, sizeof info->mean);
    memcpy(info->std, c.image_std, sizeof info->std);
    md_config_free(&c);
    if (st != MD_OK)
        return md_error_prefix(st, "%s", md_pretrained_path(s->from));
    if (info->width % info->heads || info->layers < 1 || info->grid < 1)
        MD_FAIL(MD_ERR_DATA, "%s: the sizes in its config are not those of its arrays",
                md_pretrained_path(s->from));
    return MD_OK;
}

/* The shape that `info` gives a parameter; leading extents of one do not count. */
static bool same_shape(const md_weights_source *s, md_weight_id id, int stored, const int64_t *have)
{
    md_weight_dims dims;
    int64_t dim[MD_MAX_RANK];
    md_weights_dims(&s->info, &dims);
    const int rank = md_weight_shape(id, &dims, dim), skip = stored - rank;
    bool same = skip >= 0;
    for (int i = 0; i < stored && same; i++)
        same = have[i] == (i < skip ? 1 : dim[i - skip]);
    return same;
}

static md_status check_one(const md_weights_source *s, md_weight_id id, int layer)
{
    char name[MD_WEIGHT_NAME];
    int64_t dim[MD_MAX_RANK];
    const int rank = shape_of(s, id, layer, dim);
    md_weight_name(id, layer, name);
    if (rank == 0)
        MD_FAIL(MD_ERR_DATA, "%s: has no %s", md_pretrained_path(s->from), name);
    if (!same_shape(s, id, rank, dim))
        MD_FAIL(MD_ERR_DATA,
                "%s: %s has not the shape that the rest of the model and its config ask for",
                md_pretrained_path(s->from), name);
    return MD_OK;
}

/* The checkpoint's parameters are those of the model, no more and no fewer. */
static md_status check_all(const md_weights_source *s)
{
    const int there = md_pretrained_count(s->from);
    int wanted = 0;
    for (int id = 0; id < MD_WEIGHT_COUNT; id++) {
        const int copies = md_weight_per_layer((md_weight_id)id) ? s->info.layers : 1;
        for (int layer = 0; layer < copies && md_weights_has(&s->info, (md_weight_id)id); layer++) {
            MD_TRY(check_one(s, (md_weight_id)id, layer));
            wanted++;
        }
    }
    if (there != wanted)
        MD_FAIL(MD_ERR_DATA, "%s: holds %d parameters, of which %d make a BEiT",
                md_pretrained_path(s->from), there, wanted);
    return MD_OK;
}

static md_status find_info(md_weights_source *s)
{
    const md_weights_info *stored = md_pretrained_weights(s->from);
    if (stored) {
        s->info = *stored;
        return MD_OK;
    }
    const char *path = md_pretrained_path(s->from), *slash = strrchr(path, '/');
    if (!HAS(CLS))
        MD_FAIL(MD_ERR_DATA, "%s: holds no parameters of a model (no cls_token)", path);
    info_from_entries(s);
    MD_TRY(info_from_config(s));
    snprintf(s->info.dialect, sizeof s->info.dialect, "md_hpc");
    snprintf(s->info.source, sizeof s->info.source, "%.255s", slash ? slash + 1 : path);
    return check_all(s);
}

/* ---- public ---- */

md_status md_weights_source_open(const char *path, bool ema, md_weights_source **out)
{
    md_weights_source *s;
    *out = NULL;
    MD_NEW(s, 1, FAMILY);
    md_status st = md_comm_self(&s->self);
    if (st == MD_OK)
        st = md_pretrained_open(s->self, path, ema, &s->from);
    if (st == MD_OK)
        st = find_info(s);
    if (st != MD_OK)
        md_weights_source_close(s);
    else
        *out = s;
    return st;
}

void md_weights_source_close(md_weights_source *s)
{
    if (!s)
        return;
    md_pretrained_close(s->from);
    md_comm_free(s->self);
    md_free(s);
}

const md_weights_info *md_weights_source_info(const md_weights_source *s)
{
    return &s->info;
}

const char *md_weights_source_path(const md_weights_source *s)
{
    return md_pretrained_path(s->from);
}

md_status md_weights_source_fill(void *source, md_weight_id id, int layer, float *out)
{
    md_weights_source *s = source;
    char name[MD_WEIGHT_NAME];
    return md_pretrained_load(s->from, md_weight_name(id, layer, name), out);
}
