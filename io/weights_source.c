/* weights_source: see weights_source.h. */
#include "io/weights_source.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "io/checkpoint.h"
#include "src/config.h"

#define FAMILY "weights"

struct md_weights_source {
    md_weights *weights; /* or */
    md_comm *self;
    md_checkpoint *ck;
    const char *group; /* "param" or "ema": what stands before the names */
    char path[4096];
    md_weights_info info;
};

/* ---- what lies at a path ---- */

static bool is_folder(const char *path)
{
    struct stat sb;
    return stat(path, &sb) == 0 && S_ISDIR(sb.st_mode);
}

/* The folder of checkpoints that a folder means: a run directory has one below it. */
static const char *checkpoints_of(const char *path, char *buf, size_t size)
{
    if ((size_t)snprintf(buf, size, "%s/checkpoints", path) >= size || !is_folder(buf))
        snprintf(buf, size, "%s", path);
    return buf;
}

/* A checkpoint begins with its END mark (checkpoint.h), any other HDF5 file of ours with HDF5's. */
static bool begins_with(const char *path, const char mark[8])
{
    char found[8] = "";
    FILE *f = fopen(path, "rbe");
    bool same = f && fread(found, 1, sizeof found, f) == sizeof found &&
                memcmp(found, mark, sizeof found) == 0;
    if (f)
        fclose(f);
    return same;
}

bool md_weights_is_run(const char *path)
{
    char dir[4096];
    int64_t *steps = NULL;
    int n = 0;
    if (!is_folder(path))
        return begins_with(path, "MDPHCKPT");
    bool some = md_checkpoint_list(checkpoints_of(path, dir, sizeof dir), &steps, &n) == MD_OK;
    md_free(steps);
    return some && n > 0;
}

/* ---- a checkpoint ---- */

static const md_state_entry *entry_of(const md_weights_source *s, md_weight_id id, int layer)
{
    char own[MD_WEIGHT_NAME], name[MD_STATE_NAME];
    snprintf(name, sizeof name, "%s/%s", s->group, md_weight_name(id, layer, own));
    return md_checkpoint_entry(s->ck, name);
}

/* Dimension d, from the last one backwards, of a parameter; 0 when there is no such parameter. */
static int extent(const md_weights_source *s, md_weight_id id, int d)
{
    const md_state_entry *e = entry_of(s, id, 0);
    int64_t n = e && d < e->rank ? e->global[e->rank - 1 - d] : 0;
    return n <= 1 << 24 ? (int)n : 0;
}

#define HAS(id) (entry_of(s, MD_WEIGHT_##id, 0) != NULL)

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
    while (info->layers < 1024 && entry_of(s, MD_WEIGHT_NORM1_W, info->layers))
        info->layers++;
}

static md_status info_from_config(md_weights_source *s)
{
    md_config c;
    md_weights_info *info = &s->info;
    const char *text = md_checkpoint_config(s->ck);
    if (!*text)
        MD_FAIL(MD_ERR_DATA, "%s: holds no config", s->path);
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
        return md_error_prefix(st, "%s", s->path);
    if (info->width % info->heads || info->layers < 1 || info->grid < 1)
        MD_FAIL(MD_ERR_DATA, "%s: the sizes in its config are not those of its arrays", s->path);
    return MD_OK;
}

/* The shape that `info` gives a parameter; leading extents of one do not count. */
static bool same_shape(const md_weights_source *s, md_weight_id id, const md_state_entry *e)
{
    md_weight_dims dims;
    int64_t dim[MD_MAX_RANK];
    md_weights_dims(&s->info, &dims);
    int rank = md_weight_shape(id, &dims, dim), skip = e->rank - rank;
    bool same = skip >= 0 && e->dtype == MD_F32;
    for (int i = 0; i < e->rank && same; i++)
        same = e->global[i] == (i < skip ? 1 : dim[i - skip]);
    return same;
}

/* The checkpoint's parameters are those of the model, no more and no fewer. */
static md_status entries_check(const md_weights_source *s)
{
    const size_t group = strlen(s->group);
    int n, there = 0, wanted = 0;
    const md_state_entry *list = md_checkpoint_entries(s->ck, &n);
    for (int i = 0; i < n; i++)
        there += strncmp(list[i].name, s->group, group) == 0 && list[i].name[group] == '/';
    for (int id = 0; id < MD_WEIGHT_COUNT; id++) {
        int copies = md_weight_per_layer((md_weight_id)id) ? s->info.layers : 1;
        for (int layer = 0; layer < copies && md_weights_has(&s->info, (md_weight_id)id); layer++) {
            char name[MD_WEIGHT_NAME];
            const md_state_entry *e = entry_of(s, (md_weight_id)id, layer);
            md_weight_name((md_weight_id)id, layer, name);
            if (!e)
                MD_FAIL(MD_ERR_DATA, "%s: has no %s/%s", s->path, s->group, name);
            if (!same_shape(s, (md_weight_id)id, e))
                MD_FAIL(MD_ERR_DATA,
                        "%s: %s has not the shape that the rest of the model and its "
                        "config ask for",
                        s->path, e->name);
            wanted++;
        }
    }
    if (there != wanted)
        MD_FAIL(MD_ERR_DATA, "%s: holds %d arrays %s/..., of which %d make a BEiT", s->path, there,
                s->group, wanted);
    return MD_OK;
}

static void warn_skipped(void *arg, const char *path, const char *reason)
{
    (void)arg;
    md_log_warn("checkpoint skipped: %s: %s", path, reason);
}

static md_status open_checkpoint(md_weights_source *s, const char *path, bool ema)
{
    char dir[sizeof s->path];
    MD_TRY(md_comm_self(&s->self));
    MD_TRY(md_checkpoint_find(s->self,
                              is_folder(path) ? checkpoints_of(path, dir, sizeof dir) : path,
                              warn_skipped, NULL, &s->ck));
    snprintf(s->path, sizeof s->path, "%s", md_checkpoint_path(s->ck));
    s->group = ema ? "ema" : "param";
    if (!entry_of(s, MD_WEIGHT_CLS, 0))
        MD_FAIL(MD_ERR_DATA, "%s: holds no %s (no array %s/cls_token)", s->path,
                ema ? "averaged parameters" : "parameters of a model", s->group);
    info_from_entries(s);
    MD_TRY(info_from_config(s));
    const char *slash = strrchr(s->path, '/');
    snprintf(s->info.dialect, sizeof s->info.dialect, "md_hpc");
    snprintf(s->info.source, sizeof s->info.source, "%.255s", slash ? slash + 1 : s->path);
    return entries_check(s);
}

static md_status fill_checkpoint(const md_weights_source *s, md_weight_id id, int layer, float *out)
{
    const md_state_entry *e = entry_of(s, id, layer);
    MD_ASSERT(e, "parameter %d of layer %d", (int)id, layer);
    md_tensor t = md_tensor_make(out, MD_F32, e->rank, e->global);
    md_state_item item = md_state_item_make(e->name, &t);
    return md_checkpoint_read(s->ck, &item, 1);
}

/* ---- public ---- */

static md_status open_weights(md_weights_source *s, const char *path, bool ema)
{
    if (ema)
        MD_FAIL(MD_ERR_DATA, "%s: a weights file holds no averaged parameters", path);
    MD_TRY(md_weights_open(NULL, path, &s->weights));
    s->info = *md_weights_get_info(s->weights);
    snprintf(s->path, sizeof s->path, "%s", path);
    return MD_OK;
}

md_status md_weights_source_open(const char *path, bool ema, md_weights_source **out)
{
    md_weights_source *s;
    *out = NULL;
    MD_NEW(s, 1, FAMILY);
    md_status st = begins_with(path, "\x89HDF\r\n\x1a\n") ? open_weights(s, path, ema)
                                                          : open_checkpoint(s, path, ema);
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
    md_weights_close(s->weights);
    if (s->ck)
        md_checkpoint_close(s->ck);
    if (s->self)
        md_comm_free(s->self);
    md_free(s);
}

const md_weights_info *md_weights_source_info(const md_weights_source *s)
{
    return &s->info;
}

const char *md_weights_source_path(const md_weights_source *s)
{
    return s->path;
}

md_status md_weights_source_fill(void *source, md_weight_id id, int layer, float *out)
{
    md_weights_source *s = source;
    if (s->ck)
        return fill_checkpoint(s, id, layer, out);
    char name[MD_WEIGHT_NAME];
    md_weight_dims dims;
    md_tensor t = {.data = out, .dtype = MD_F32};
    md_weights_dims(&s->info, &dims);
    t.rank = (uint8_t)md_weight_shape(id, &dims, t.dim);
    return md_weights_load(s->weights, md_weight_name(id, layer, name), &t);
}
