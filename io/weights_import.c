/* weights_import: safetensors -> weights file, see weights.h. What the tensors do not show (heads,
 * activation, epsilon, channel statistics) is taken from the command line, else from the config
 * files that public programs write beside the tensors, else from the dialect. */
#include "io/weights.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FAMILY "weights"

static const double clip_mean[3] = {0.48145466, 0.4578275, 0.40821073};
static const double clip_std[3] = {0.26862954, 0.26130258, 0.27577711};
static const double imagenet_mean[3] = {0.485, 0.456, 0.406};
static const double imagenet_std[3] = {0.229, 0.224, 0.225};

/* What a place in a config file says, and how. */
typedef enum fact {
    HEADS,      /* number */
    HEAD_WIDTH, /* number: heads = width / it */
    ACT,        /* name */
    ACT_MODEL,  /* a model's name, which says quickgelu or not */
    ACT_FLAG,   /* object whose quick_gelu is true, or gelu */
    EPS,
    MEAN,
    STD,
    FACT_COUNT
} fact;

/* Config files beside the tensors. */
enum { CONFIG, OPEN_CLIP, PREPROCESSOR, FILE_COUNT };
static const char *const files[FILE_COUNT] = {"config.json", "open_clip_config.json",
                                              "preprocessor_config.json"};

/* Where they say what; the first place found counts. */
static const struct {
    fact fact;
    int file;
    const char *path;
} places[] = {
    {HEADS, CONFIG, "vision_config.num_attention_heads"}, /* transformers CLIPModel */
    {HEADS, CONFIG, "num_attention_heads"},               /* transformers vision models */
    {HEADS, CONFIG, "model_args.num_heads"},              /* timm */
    {HEAD_WIDTH, OPEN_CLIP, "model_cfg.vision_cfg.head_width"},
    {ACT, CONFIG, "vision_config.hidden_act"},
    {ACT, CONFIG, "hidden_act"},
    {ACT, CONFIG, "model_args.act_layer"},
    {ACT_MODEL, CONFIG, "architecture"}, /* timm: vit_large_patch14_clip_quickgelu_224 */
    {ACT_FLAG, OPEN_CLIP, "model_cfg"},  /* its member quick_gelu, false when not there */
    {EPS, CONFIG, "vision_config.layer_norm_eps"},
    {EPS, CONFIG, "layer_norm_eps"},
    {MEAN, PREPROCESSOR, "image_mean"},
    {MEAN, CONFIG, "pretrained_cfg.mean"},
    {MEAN, OPEN_CLIP, "preprocess_cfg.mean"},
    {STD, PREPROCESSOR, "image_std"},
    {STD, CONFIG, "pretrained_cfg.std"},
    {STD, OPEN_CLIP, "preprocess_cfg.std"},
};

/* What the config files said. */
typedef struct findings {
    json_t *root[FILE_COUNT];  /* NULL if absent */
    json_t *value[FACT_COUNT]; /* borrowed from root */
    const char *from[FACT_COUNT];
} findings;

int md_weights_default_heads(int64_t width)
{
    return width == 1280 || width == 1408 || width == 1664 ? 16 : (int)MD_MAX(width / 64, 1);
}

/* ---- config files ---- */

static json_t *json_walk(json_t *at, const char *path)
{
    char key[64];
    while (at && *path) {
        size_t n = strcspn(path, ".");
        snprintf(key, sizeof key, "%.*s", (int)n, path);
        at = json_object_get(at, key);
        path += n + (path[n] == '.');
    }
    return at;
}

/* The folder of the input with a '/', or "". */
static void folder_of(const char *input, char *dir, size_t size)
{
    struct stat sb;
    bool folder = stat(input, &sb) == 0 && S_ISDIR(sb.st_mode);
    const char *slash = strrchr(input, '/');
    if (folder)
        snprintf(dir, size, "%s/", input);
    else
        snprintf(dir, size, "%.*s", slash ? (int)(slash - input) + 1 : 0, input);
}

static md_status read_config(const char *dir, const char *file, json_t **root)
{
    char path[4096];
    json_error_t err;
    *root = NULL;
    if (snprintf(path, sizeof path, "%s%s", dir, file) >= (int)sizeof path)
        MD_FAIL(MD_ERR_NOINPUT, "%s: path too long", dir);
    if (access(path, F_OK) != 0)
        return MD_OK;
    *root = json_load_file(path, JSON_REJECT_DUPLICATES, &err);
    if (!*root)
        MD_FAIL(MD_ERR_DATA, "%s: line %d: %s", path, err.line, err.text);
    return MD_OK;
}

static md_status findings_read(const char *input, findings *f)
{
    char dir[4096];
    folder_of(input, dir, sizeof dir);
    for (int i = 0; i < FILE_COUNT; i++)
        MD_TRY(read_config(dir, files[i], &f->root[i]));
    for (size_t i = 0; i < MD_COUNT(places); i++) {
        json_t *v = json_walk(f->root[places[i].file], places[i].path);
        if (v && !json_is_null(v) && !f->value[places[i].fact]) {
            f->value[places[i].fact] = v;
            f->from[places[i].fact] = files[places[i].file];
        }
    }
    return MD_OK;
}

static void findings_free(findings *f)
{
    for (int i = 0; i < FILE_COUNT; i++)
        json_decref(f->root[i]);
}

/* ---- the values that are not in the tensors ---- */

static md_status take_heads(const md_weights_import_args *a, const findings *f,
                            const md_dialect_map *map, md_weights_import_report *r)
{
    md_weights_info *info = &r->info;
    json_int_t heads = a->heads, width = json_integer_value(f->value[HEAD_WIDTH]);
    r->heads_from = "--heads";
    if (!a->heads && f->value[HEADS]) {
        heads = json_integer_value(f->value[HEADS]);
        r->heads_from = f->from[HEADS];
    } else if (!a->heads && width > 0) {
        heads = info->width / width;
        r->heads_from = f->from[HEAD_WIDTH];
    } else if (!a->heads) {
        heads = md_weights_default_heads(info->width);
        r->heads_from = "by the width";
    }
    if (map->dims.heads && !a->heads && !f->value[HEADS]) {
        heads = map->dims.heads;
        r->heads_from = "relative position table";
    }
    if (map->dims.heads && heads != map->dims.heads)
        MD_FAIL(MD_ERR_DATA, "%s: %lld heads (%s), but the relative position table is for %lld",
                a->input, (long long)heads, r->heads_from, (long long)map->dims.heads);
    if (heads < 1 || heads > 1024 || info->width % heads)
        MD_FAIL(MD_ERR_DATA, "%s: %lld heads (%s) do not divide width %d; say --heads", a->input,
                (long long)heads, r->heads_from, info->width);
    info->heads = (int)heads;
    return MD_OK;
}

static md_status take_act(const md_weights_import_args *a, const findings *f,
                          const md_dialect_map *map, md_weights_import_report *r)
{
    const char *name = json_string_value(f->value[ACT]);
    const char *model = json_string_value(f->value[ACT_MODEL]);
    md_act act = map->defaults.act;
    r->act_from = "usual for these names";
    if (a->act != MD_ACT_NONE) {
        act = a->act;
        r->act_from = "--act";
    } else if (name) {
        act = md_act_parse(name);
        r->act_from = f->from[ACT];
        if (act == MD_ACT_NONE)
            MD_FAIL(MD_ERR_DATA, "%s: activation '%.64s' (%s) is neither gelu nor quick_gelu",
                    a->input, name, r->act_from);
    } else if (model) {
        act = strstr(model, "quickgelu") ? MD_ACT_QUICK_GELU : MD_ACT_GELU;
        r->act_from = f->from[ACT_MODEL];
    } else if (f->value[ACT_FLAG]) {
        act = json_is_true(json_object_get(f->value[ACT_FLAG], "quick_gelu")) ? MD_ACT_QUICK_GELU
                                                                              : MD_ACT_GELU;
        r->act_from = f->from[ACT_FLAG];
    }
    if (act == MD_ACT_NONE)
        MD_FAIL(MD_ERR_DATA,
                "%s: whether this %s model uses gelu or quick_gelu cannot be seen in its tensors; "
                "say --act (OpenAI's weights: quick_gelu; most others: gelu)",
                a->input, map->dialect);
    r->info.act = act;
    return MD_OK;
}

static md_status take_eps(const md_weights_import_args *a, const findings *f,
                          const md_dialect_map *map, md_weights_import_report *r)
{
    r->info.ln_eps = f->value[EPS] ? json_number_value(f->value[EPS]) : map->defaults.ln_eps;
    r->eps_from = f->value[EPS] ? f->from[EPS] : "usual for these names";
    if (!(r->info.ln_eps > 0 && r->info.ln_eps < 1))
        MD_FAIL(MD_ERR_DATA, "%s: LayerNorm epsilon %g (%s)", a->input, r->info.ln_eps,
                r->eps_from);
    return MD_OK;
}

/* Three numbers, or false. */
static bool triple(json_t *list, double out[3])
{
    bool ok = json_array_size(list) == 3;
    for (size_t i = 0; i < 3 && ok; i++) {
        ok = json_is_number(json_array_get(list, i));
        out[i] = json_number_value(json_array_get(list, i));
    }
    return ok;
}

static md_status take_colours(const md_weights_import_args *a, const findings *f,
                              const md_dialect_map *map, md_weights_import_report *r)
{
    md_weights_info *info = &r->info;
    bool clip = map->defaults.clip_colours;
    const size_t bytes = sizeof info->mean;
    memcpy(info->mean, clip ? clip_mean : imagenet_mean, bytes);
    memcpy(info->std, clip ? clip_std : imagenet_std, bytes);
    r->colours_from = clip ? "CLIP's" : "ImageNet's";
    if (f->value[MEAN] && f->value[STD]) {
        r->colours_from = f->from[MEAN];
        if (!triple(f->value[MEAN], info->mean) || !triple(f->value[STD], info->std))
            MD_FAIL(MD_ERR_DATA, "%s: mean and std in %s are not three numbers each", a->input,
                    r->colours_from);
    }
    if (a->mean)
        memcpy(info->mean, a->mean, bytes);
    if (a->std)
        memcpy(info->std, a->std, bytes);
    if (a->mean || a->std)
        r->colours_from = "--mean and --std";
    for (int i = 0; i < 3; i++)
        if (!(info->std[i] > 0 && info->std[i] < 100 && info->mean[i] > -100 &&
              info->mean[i] < 100))
            MD_FAIL(MD_ERR_DATA, "%s: mean %g and std %g of channel %d (%s)", a->input,
                    info->mean[i], info->std[i], i, r->colours_from);
    return MD_OK;
}

static md_status take_values(const md_weights_import_args *a, const md_dialect_map *map,
                             md_weights_import_report *r)
{
    findings f = {0};
    md_status st = findings_read(a->input, &f);
    if (st == MD_OK)
        st = take_heads(a, &f, map, r);
    if (st == MD_OK)
        st = take_act(a, &f, map, r);
    if (st == MD_OK)
        st = take_eps(a, &f, map, r);
    if (st == MD_OK)
        st = take_colours(a, &f, map, r);
    findings_free(&f);
    return st;
}

/* ---- the tensors ---- */

typedef struct source {
    const md_safetensors *st;
    const md_dialect_map *map;
} source;

static md_status read_transposed(const md_safetensors *st, int tensor, float *out)
{
    const md_st_entry *e = md_safetensors_at(st, tensor);
    const int64_t rows = e->dim[e->rank - 2], cols = e->dim[e->rank - 1];
    float *in;
    MD_NEW(in, e->count, FAMILY);
    md_status status = md_safetensors_read_f32(st, tensor, in);
    for (int64_t r = 0; r < rows && status == MD_OK; r++)
        for (int64_t c = 0; c < cols; c++)
            out[c * rows + r] = in[r * cols + c];
    md_free(in);
    return status;
}

static md_status fill(void *arg, md_weight_id id, int layer, float *out)
{
    const source *s = arg;
    for (int i = 0; i < s->map->count; i++) {
        const md_dialect_copy *c = &s->map->copy[i];
        if (c->id != id || c->layer != layer)
            continue;
        for (int k = 0; k < c->parts; k++) {
            MD_TRY(c->transposed ? read_transposed(s->st, c->tensor[k], out)
                                 : md_safetensors_read_f32(s->st, c->tensor[k], out));
            out += md_safetensors_at(s->st, c->tensor[k])->count;
        }
        return MD_OK;
    }
    MD_FAIL(MD_ERR_BUG, "parameter %d of layer %d has no source", (int)id, layer);
}

/* How many layers have it. */
static int copies(const md_dialect_map *map, md_weight_id id)
{
    int n = 0;
    for (int i = 0; i < map->count; i++)
        n += map->copy[i].id == id;
    return n;
}

#define has(map, id) (copies(map, MD_WEIGHT_##id) > 0)

/* Optional parameters come all together or not at all. */
static md_status check_whole(const md_weights_import_args *a, const md_dialect_map *map,
                             const md_weights_info *info)
{
    char name[MD_WEIGHT_NAME];
    for (int id = 0; id < MD_WEIGHT_COUNT; id++) {
        const int there = copies(map, (md_weight_id)id);
        const int layers = md_weight_per_layer((md_weight_id)id) ? info->layers : 1;
        const bool wanted = md_weights_has(info, (md_weight_id)id);
        if (there == (wanted ? layers : 0))
            continue;
        MD_FAIL(MD_ERR_DATA,
                "%s: %s (as this program calls it) is %s, which does not go with the "
                "rest of the model",
                a->input, md_weight_name((md_weight_id)id, wanted ? layers - 1 : 0, name),
                wanted ? "missing" : "there");
    }
    return MD_OK;
}

/* What the tensors themselves show. */
static md_status take_shape(const md_weights_import_args *a, const source *s,
                            md_weights_import_report *r)
{
    const md_dialect_map *map = s->map;
    const md_weight_dims *d = &map->dims;
    const char *slash = strrchr(a->input, '/');
    md_weights_info *info = &r->info;
    *info = (md_weights_info){.width = (int)d->width,
                              .layers = d->layers,
                              .patch = (int)d->patch,
                              .mlp = (int)d->mlp,
                              .proj_width = (int)d->proj,
                              .pre_norm = has(map, PRE_W),
                              .patch_bias = has(map, PATCH_B),
                              .abs_pos = has(map, POS),
                              .layer_scale = has(map, GAMMA_1),
                              .qv_bias = has(map, Q_B),
                              .mask_token = has(map, MASK),
                              .final_norm = has(map, NORM_W),
                              .fc_norm = has(map, FC_NORM_W),
                              .classes = (int)d->classes,
                              .lm_width = (int)d->lm_width};
    info->rel_pos = has(map, REL_SHARED) ? MD_WEIGHTS_REL_SHARED
                    : has(map, REL)      ? MD_WEIGHTS_REL_PER_LAYER
                                         : MD_WEIGHTS_REL_NONE;
    while ((int64_t)(info->grid + 1) * (info->grid + 1) < d->tokens)
        info->grid++;
    if (info->grid < 1)
        MD_FAIL(MD_ERR_DATA, "%s: a model without position tables", a->input);
    if (info->layers < 1 || info->layers > 1024)
        MD_FAIL(MD_ERR_DATA, "%s: a model of %d layers", a->input, info->layers);
    snprintf(info->dialect, sizeof info->dialect, "%s", map->dialect);
    snprintf(info->source, sizeof info->source, "%s", slash && slash[1] ? slash + 1 : a->input);
    r->ignored = map->ignored;
    for (int i = 0; i < map->count; i++)
        for (int k = 0; k < map->copy[i].parts; k++) {
            const md_st_entry *e = md_safetensors_at(s->st, map->copy[i].tensor[k]);
            const char *name = md_st_dtype_name((md_st_dtype)e->dtype);
            bool other = *r->stored && strcmp(r->stored, name) != 0;
            snprintf(r->stored, sizeof r->stored, "%s", other ? "mixed" : name);
        }
    return check_whole(a, map, info);
}

static md_status import_set(const md_weights_import_args *a, const md_safetensors *st,
                            md_dialect_map *map, md_weights_import_report *r)
{
    source s = {.st = st, .map = map};
    md_status status = md_dialect_match(st, a->prefix, map);
    if (status != MD_OK)
        return md_error_prefix(status, "%s", a->input);
    MD_TRY(take_shape(a, &s, r));
    MD_TRY(take_values(a, map, r));
    return md_weights_write(a->output, &r->info, fill, &s);
}

md_status md_weights_import(const md_weights_import_args *args, md_weights_import_report *report)
{
    md_safetensors *st;
    md_dialect_map map = {0};
    *report = (md_weights_import_report){0};
    MD_TRY(md_safetensors_open(args->input, &st));
    md_status status = import_set(args, st, &map, report);
    md_dialect_map_free(&map);
    md_safetensors_close(st);
    return status;
}
