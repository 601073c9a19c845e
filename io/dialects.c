/* dialects: see dialects.h.
 *
 * Sources of the names: OpenAI CLIP clip/model.py; Hugging Face transformers modeling_clip.py and
 * modeling_vit.py; timm models/vision_transformer.py (also DINO vision_transformer.py, MAE
 * models_mae.py and SLIP models.py, which use the same names). */
#include "io/dialects.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define FAMILY "weights"

static const struct {
    const char *name, *shape;
    bool layer;
} weights[] = {
#define WEIGHT_ROW(id, name, shape, layer) {name, shape, layer},
    MD_WEIGHTS(WEIGHT_ROW)
#undef WEIGHT_ROW
};

/* One parameter in a dialect. Names are relative to the dialect's root, or, after a '/', to the
 * wrapper around it; %d is the layer. */
typedef struct rule {
    md_weight_id id;
    const char *from[MD_DIALECT_PARTS];
    bool transposed, optional;
    const char *zero; /* the rule holds only if this tensor is absent or all zeros */
} rule;

#define MAX_ROOTS   4
#define MAX_IGNORED 12

typedef struct dialect {
    const char *name;
    const char *probe, *absent; /* it is this dialect if the first is there and the second not */
    const char *root[MAX_ROOTS];
    const char *ignored[MAX_IGNORED]; /* beginnings of names below the root that are no business of
                                         the encoder; what lies outside the root never is */
    md_dialect_defaults defaults;
    const rule *rules;
    int count;
} dialect;

/* Prefixes that training programs put in front of whole models. */
static const char *const wrappers[] = {
    "",
    "module.",
    "model.",
    "student.",
    "teacher.",
    "backbone.",
    "encoder.",
    "student.backbone.",
    "teacher.backbone.",
    "module.backbone.",
    "student.module.backbone.",
    "teacher.module.backbone.",
    "vision_encoder.",
    "base_model.",
};

#define BOTH(w, b, name)   \
    {w, {name ".weight"}}, \
    {                      \
        b,                 \
        {                  \
            name ".bias"   \
        }                  \
    }
#define THREE(w, b, q, k, v)                      \
    {w, {q ".weight", k ".weight", v ".weight"}}, \
    {                                             \
        b,                                        \
        {                                         \
            q ".bias", k ".bias", v ".bias"       \
        }                                         \
    }
#define W(id) MD_WEIGHT_##id##_W
#define B(id) MD_WEIGHT_##id##_B

#define TIMM_BLOCKS                                                                               \
    BOTH(W(NORM1), B(NORM1), "blocks.%d.norm1"), BOTH(W(QKV), B(QKV), "blocks.%d.attn.qkv"),      \
        BOTH(W(OUT), B(OUT), "blocks.%d.attn.proj"), BOTH(W(NORM2), B(NORM2), "blocks.%d.norm2"), \
        BOTH(W(FC1), B(FC1), "blocks.%d.mlp.fc1"), BOTH(W(FC2), B(FC2), "blocks.%d.mlp.fc2"),     \
        BOTH(W(NORM), B(NORM), "norm")

static const rule timm_rules[] = {
    {MD_WEIGHT_CLS, {"cls_token"}},
    {MD_WEIGHT_POS, {"pos_embed"}},
    BOTH(W(PATCH), B(PATCH), "patch_embed.proj"),
    TIMM_BLOCKS,
};

/* timm keeps CLIP's projection as a classifier with a zero bias; any other bias is a real one. */
static const rule timm_clip_rules[] = {
    {MD_WEIGHT_CLS, {"cls_token"}},
    {MD_WEIGHT_POS, {"pos_embed"}},
    {W(PATCH), {"patch_embed.proj.weight"}},
    BOTH(W(PRE), B(PRE), "norm_pre"),
    TIMM_BLOCKS,
    {W(PROJ), {"head.weight"}, .optional = true, .zero = "head.bias"},
};

#define RES "transformer.resblocks.%d."
static const rule openai_rules[] = {
    {MD_WEIGHT_CLS, {"class_embedding"}},
    {MD_WEIGHT_POS, {"positional_embedding"}},
    {W(PATCH), {"conv1.weight"}},
    BOTH(W(PRE), B(PRE), "ln_pre"),
    BOTH(W(NORM1), B(NORM1), RES "ln_1"),
    {W(QKV), {RES "attn.in_proj_weight"}},
    {B(QKV), {RES "attn.in_proj_bias"}},
    BOTH(W(OUT), B(OUT), RES "attn.out_proj"),
    BOTH(W(NORM2), B(NORM2), RES "ln_2"),
    BOTH(W(FC1), B(FC1), RES "mlp.c_fc"),
    BOTH(W(FC2), B(FC2), RES "mlp.c_proj"),
    BOTH(W(NORM), B(NORM), "ln_post"),
    {W(PROJ), {"proj"}, .transposed = true, .optional = true},
};

#define LAYERS "encoder.layers.%d."
static const rule hf_clip_rules[] = {
    {MD_WEIGHT_CLS, {"embeddings.class_embedding"}},
    {MD_WEIGHT_POS, {"embeddings.position_embedding.weight"}},
    {W(PATCH), {"embeddings.patch_embedding.weight"}},
    BOTH(W(PRE), B(PRE), "pre_layrnorm"), /* spelt so there */
    BOTH(W(NORM1), B(NORM1), LAYERS "layer_norm1"),
    THREE(W(QKV), B(QKV), LAYERS "self_attn.q_proj", LAYERS "self_attn.k_proj",
          LAYERS "self_attn.v_proj"),
    BOTH(W(OUT), B(OUT), LAYERS "self_attn.out_proj"),
    BOTH(W(NORM2), B(NORM2), LAYERS "layer_norm2"),
    BOTH(W(FC1), B(FC1), LAYERS "mlp.fc1"),
    BOTH(W(FC2), B(FC2), LAYERS "mlp.fc2"),
    BOTH(W(NORM), B(NORM), "post_layernorm"),
    {W(PROJ), {"/visual_projection.weight"}, .optional = true},
};

#define LAYER "encoder.layer.%d."
static const rule hf_vit_rules[] = {
    {MD_WEIGHT_CLS, {"embeddings.cls_token"}},
    {MD_WEIGHT_POS, {"embeddings.position_embeddings"}},
    BOTH(W(PATCH), B(PATCH), "embeddings.patch_embeddings.projection"),
    BOTH(W(NORM1), B(NORM1), LAYER "layernorm_before"),
    THREE(W(QKV), B(QKV), LAYER "attention.attention.query", LAYER "attention.attention.key",
          LAYER "attention.attention.value"),
    BOTH(W(OUT), B(OUT), LAYER "attention.output.dense"),
    BOTH(W(NORM2), B(NORM2), LAYER "layernorm_after"),
    BOTH(W(FC1), B(FC1), LAYER "intermediate.dense"),
    BOTH(W(FC2), B(FC2), LAYER "output.dense"),
    BOTH(W(NORM), B(NORM), "layernorm"),
};

#define RULES(table) .rules = table, .count = (int)MD_COUNT(table)
/* QuickGELU and GELU leave no trace in the tensors. The published CLIP files use QuickGELU; timm
 * has both, so there a config file or the user must say it. */
static const dialect dialects[] = {
    {"openai-clip",
     "conv1.weight",
     "blocks.0.norm1.weight",
     {"visual.", ""},
     {"attn_mask"},
     {MD_ACT_QUICK_GELU, 1e-5, true},
     RULES(openai_rules)},
    {"hf-clip",
     "embeddings.class_embedding",
     NULL,
     {"vision_model.", ""},
     {"embeddings.position_ids", "visual_projection.", "text_", "logit_scale"},
     {MD_ACT_QUICK_GELU, 1e-5, true},
     RULES(hf_clip_rules)},
    {"timm-clip",
     "norm_pre.weight",
     NULL,
     {"", "visual.", "visual.trunk."},
     {"head."},
     {MD_ACT_NONE, 1e-5, true},
     RULES(timm_clip_rules)},
    {"timm",
     "blocks.0.attn.qkv.weight",
     "norm_pre.weight",
     {"", "visual.", "visual.trunk."},
     {"head.", "mask_token", "decoder_", "head_dist.", "pre_logits."},
     {MD_ACT_GELU, 1e-6, false},
     RULES(timm_rules)},
    {"hf-vit",
     "embeddings.patch_embeddings.projection.weight",
     NULL,
     {"vit.", ""},
     {"pooler.", "classifier.", "embeddings.mask_token", "decoder."},
     {MD_ACT_GELU, 1e-12, false},
     RULES(hf_vit_rules)},
};

/* wrapper + root + from, the layer filled in. */
static void full_name(const char *wrapper, const char *root, const char *from, int layer, char *buf,
                      size_t size)
{
    const char *mark = strstr(from, "%d"), *base = *from == '/' ? "" : root;
    from += *from == '/';
    if (mark)
        snprintf(buf, size, "%s%s%.*s%d%s", wrapper, base, (int)(mark - from), from, layer,
                 mark + 2);
    else
        snprintf(buf, size, "%s%s%s", wrapper, base, from);
}

/* ---- our own names ---- */

const char *md_weight_name(md_weight_id id, int layer, char buf[MD_WEIGHT_NAME])
{
    full_name("", "", weights[id].name, layer, buf, MD_WEIGHT_NAME);
    return buf;
}

bool md_weight_per_layer(md_weight_id id)
{
    return weights[id].layer;
}

/* The place of a letter in dims; NULL for letters that are not free. */
static int64_t *letter_place(md_weight_dims *d, char letter)
{
    switch (letter) {
    case 'W':
        return &d->width;
    case 'F':
        return &d->mlp;
    case 'T':
        return &d->tokens;
    case 'P':
        return &d->patch;
    case 'O':
        return &d->proj;
    default:
        return NULL;
    }
}

static int64_t letter_value(const md_weight_dims *d, char letter)
{
    md_weight_dims copy = *d;
    const int64_t *place = letter_place(&copy, letter);
    return place ? *place : letter == 'Q' ? 3 * d->width : 3;
}

int md_weight_shape(md_weight_id id, const md_weight_dims *d, int64_t dim[MD_MAX_RANK])
{
    int rank = 0;
    for (const char *p = weights[id].shape; *p; p++)
        dim[rank++] = letter_value(d, *p);
    return rank;
}

/* ---- matching ---- */

/* A match under way, and what was found wrong. */
typedef struct matcher {
    const md_safetensors *st;
    const dialect *d;
    const char *wrapper, *root;
    md_dialect_map *map;
    bool *used; /* per tensor of the set */
    char wrong[3][200];
    int wrong_count[3];
} matcher;

enum { MISSING, UNKNOWN, MISSHAPEN };

static void note(matcher *m, int what, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void note(matcher *m, int what, const char *fmt, ...)
{
    char *text = m->wrong[what];
    size_t used = strlen(text), room = sizeof m->wrong[what] - used;
    char item[160];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(item, sizeof item, fmt, ap);
    va_end(ap);
    m->wrong_count[what]++;
    if (m->wrong_count[what] <= 4 && strlen(item) + 12 < room)
        snprintf(text + used, room, "%s%s", used ? ", " : "", item);
    else if (used && text[used - 1] != '.')
        snprintf(text + used, room, ", ...");
}

static int find(const matcher *m, const char *from, int layer)
{
    char name[MD_ST_MAX_NAME];
    full_name(m->wrapper, m->root, from, layer, name, sizeof name);
    return md_safetensors_find(m->st, name);
}

static void describe(const md_st_entry *e, char buf[96])
{
    size_t used = (size_t)snprintf(buf, 96, "[");
    for (int i = 0; i < e->rank && used < 96; i++)
        used +=
            (size_t)snprintf(buf + used, 96 - used, "%s%lld", i ? "," : "", (long long)e->dim[i]);
    if (used < 96)
        snprintf(buf + used, 96 - used, "]");
}

/* Holds a stored shape against the letters, binding those that are still free. Leading extents of
 * one are not counted. */
static bool shape_fits(const md_st_entry *e, const rule *r, int parts, md_weight_dims *dims)
{
    const char *letters = weights[r->id].shape;
    int rank = (int)strlen(letters), skip = e->rank - rank;
    if (skip < 0)
        return false;
    for (int i = 0; i < skip; i++)
        if (e->dim[i] != 1)
            return false;
    for (int i = 0; i < rank; i++) {
        int64_t stored = e->dim[skip + (r->transposed ? rank - 1 - i : i)];
        int64_t *place = letter_place(dims, letters[i]);
        if (i == 0)
            stored *= parts;
        if (stored <= 0 || stored > 1 << 24)
            return false;
        if (place && !*place)
            *place = stored;
        if (stored != letter_value(dims, letters[i]))
            return false;
    }
    return true;
}

static md_status all_zero(const md_safetensors *st, int tensor, bool *zero)
{
    float *v;
    int64_t n = md_safetensors_at(st, tensor)->count;
    MD_NEW(v, n, FAMILY);
    md_status status = md_safetensors_read_f32(st, tensor, v);
    *zero = true;
    for (int64_t i = 0; i < n && *zero; i++)
        *zero = v[i] == 0.0f;
    md_free(v);
    return status;
}

/* Maps one rule at one layer. */
static md_status match_rule(matcher *m, const rule *r, int layer)
{
    md_dialect_copy copy = {.id = r->id, .layer = layer, .transposed = r->transposed};
    int there = 0;
    while (copy.parts < MD_DIALECT_PARTS && r->from[copy.parts]) {
        copy.tensor[copy.parts] = find(m, r->from[copy.parts], layer);
        there += copy.tensor[copy.parts++] >= 0;
    }
    if (there == 0 && r->optional)
        return MD_OK;
    bool holds = true;
    int zero = r->zero ? find(m, r->zero, layer) : -1;
    if (zero >= 0)
        MD_TRY(all_zero(m->st, zero, &holds));
    if (!holds)
        return MD_OK;
    for (int k = 0; k < copy.parts; k++) {
        char name[MD_ST_MAX_NAME], shape[96];
        full_name("", "", r->from[k] + (r->from[k][0] == '/'), layer, name, sizeof name);
        if (copy.tensor[k] < 0) {
            note(m, MISSING, "%s", name);
            continue;
        }
        const md_st_entry *e = md_safetensors_at(m->st, copy.tensor[k]);
        m->used[copy.tensor[k]] = true;
        if (!shape_fits(e, r, copy.parts, &m->map->dims)) {
            describe(e, shape);
            note(m, MISSHAPEN, "%s %s", name, shape);
        }
    }
    m->map->copy[m->map->count++] = copy;
    return MD_OK;
}

/* Layers end where no tensor of the next one is there; a hole in the middle shows as unknown
 * tensors behind it. */
static int count_layers(const matcher *m)
{
    for (int layer = 0;; layer++) {
        bool any = false;
        for (int i = 0; i < m->d->count && !any; i++)
            if (weights[m->d->rules[i].id].layer)
                any = find(m, m->d->rules[i].from[0], layer) >= 0;
        if (!any)
            return layer;
    }
}

static md_status match_rules(matcher *m)
{
    const dialect *d = m->d;
    int layers = m->map->dims.layers = count_layers(m);
    MD_NEW(m->map->copy, (int64_t)d->count * MD_MAX(layers, 1), FAMILY);
    for (int i = 0; i < d->count; i++)
        if (!weights[d->rules[i].id].layer)
            MD_TRY(match_rule(m, &d->rules[i], 0));
    for (int layer = 0; layer < layers; layer++)
        for (int i = 0; i < d->count; i++)
            if (weights[d->rules[i].id].layer)
                MD_TRY(match_rule(m, &d->rules[i], layer));
    return MD_OK;
}

static bool is_ignored(const matcher *m, const char *name)
{
    size_t wrapper = strlen(m->wrapper), root = strlen(m->root);
    if (strncmp(name, m->wrapper, wrapper) != 0 || strncmp(name + wrapper, m->root, root) != 0)
        return true;
    for (int i = 0; i < MAX_IGNORED && m->d->ignored[i]; i++)
        if (strncmp(name + wrapper + root, m->d->ignored[i], strlen(m->d->ignored[i])) == 0)
            return true;
    return false;
}

static md_status report(const matcher *m)
{
    static const char *const what[] = {"missing", "unknown", "misshapen"};
    char text[800] = "";
    size_t used = 0;
    for (int i = 0; i < 3; i++)
        if (m->wrong_count[i])
            used += (size_t)snprintf(text + used, sizeof text - used, "%s%d %s (%s)",
                                     used ? "; " : "", m->wrong_count[i], what[i], m->wrong[i]);
    if (used)
        MD_FAIL(MD_ERR_DATA, "%s names under '%s' do not make a model: %s", m->d->name,
                m->map->prefix, text);
    return MD_OK;
}

static md_status match(matcher *m)
{
    md_weight_dims *dims = &m->map->dims;
    MD_TRY(match_rules(m));
    for (int i = 0; i < md_safetensors_count(m->st); i++) {
        const char *name = md_safetensors_at(m->st, i)->name;
        if (m->used[i])
            continue;
        if (is_ignored(m, name))
            m->map->ignored++;
        else
            note(m, UNKNOWN, "%.80s", name + strlen(m->map->prefix));
    }
    int64_t side = 0;
    while (side * side < dims->tokens - 1)
        side++;
    if (dims->tokens && side * side + 1 != dims->tokens)
        note(m, MISSHAPEN, "position table of %lld rows, not a square and one",
             (long long)dims->tokens);
    return report(m);
}

/* Tries one place; *found counts those that fit. */
static md_status probe(matcher *m, int *found)
{
    md_dialect_map *map = m->map;
    if (find(m, m->d->probe, 0) < 0 || (m->d->absent && find(m, m->d->absent, 0) >= 0))
        return MD_OK;
    char prefix[sizeof map->prefix];
    snprintf(prefix, sizeof prefix, "%s%s", m->wrapper, m->root);
    if ((*found)++)
        MD_FAIL(MD_ERR_DATA,
                "holds more than one model, under '%s' (%s) and '%s' (%s): choose with --prefix",
                map->prefix, map->dialect, prefix, m->d->name);
    map->dialect = m->d->name;
    map->defaults = m->d->defaults;
    memcpy(map->prefix, prefix, sizeof prefix);
    return MD_OK;
}

/* Leaves m at the one dialect, wrapper and root that fit. */
static md_status choose(matcher *m, const char *wrapper)
{
    matcher at = *m;
    int found = 0;
    for (size_t d = 0; d < MD_COUNT(dialects); d++)
        for (size_t w = 0; w < (wrapper ? 1 : MD_COUNT(wrappers)); w++)
            for (int r = 0; r < MAX_ROOTS && dialects[d].root[r]; r++) {
                at.d = &dialects[d];
                at.wrapper = wrapper ? wrapper : wrappers[w];
                at.root = dialects[d].root[r];
                int before = found;
                MD_TRY(probe(&at, &found));
                if (found > before)
                    *m = at;
            }
    if (!found)
        MD_FAIL(MD_ERR_DATA,
                "no known names of a Vision Transformer (CLIP, timm, DINO, MAE, Hugging Face ViT) "
                "under %s%s%s; see md_hpc weights inspect",
                wrapper ? "'" : "the known prefixes", wrapper ? wrapper : "", wrapper ? "'" : "");
    return MD_OK;
}

md_status md_dialect_match(const md_safetensors *st, const char *wrapper, md_dialect_map *map)
{
    *map = (md_dialect_map){0};
    matcher m = {.st = st, .map = map};
    MD_TRY(choose(&m, wrapper));
    MD_NEW(m.used, md_safetensors_count(st), FAMILY);
    md_status status = match(&m);
    md_free(m.used);
    return status;
}

void md_dialect_map_free(md_dialect_map *map)
{
    md_free(map->copy);
    map->copy = NULL;
}
