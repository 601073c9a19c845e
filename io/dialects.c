/* dialects: see dialects.h. */
#include "io/dialects_table.h"

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
    case 'R':
        return &d->rel_rows;
    case 'H':
        return &d->heads;
    case 'K':
        return &d->classes;
    case 'L':
        return &d->lm_width;
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
    const md_dialect *d;
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
static bool shape_fits(const md_st_entry *e, const md_dialect_rule *r, int parts,
                       md_weight_dims *dims)
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

static bool is_mapped(const md_dialect_map *map, md_weight_id id, int layer)
{
    for (int i = 0; i < map->count; i++)
        if (map->copy[i].id == id && map->copy[i].layer == layer)
            return true;
    return false;
}

/* Maps one rule at one layer. */
static md_status match_rule(matcher *m, const md_dialect_rule *r, int layer)
{
    md_dialect_copy copy = {.id = r->id, .layer = layer, .transposed = r->transposed};
    int there = 0;
    if (is_mapped(m->map, r->id, layer))
        return MD_OK;
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
    const md_dialect *d = m->d;
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
    const char *base = name + wrapper + root;
    for (int i = 0; i < MD_DIALECT_IGNORED && m->d->ignored[i]; i++) {
        const char *word = m->d->ignored[i];
        const bool at_end = *word == '*';
        size_t n = strlen(word += at_end), all = strlen(base);
        if (n <= all && strncmp(at_end ? base + all - n : base, word, n) == 0)
            return true;
    }
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

/* Position tables must be those of one square grid; either tells its side. */
static void note_tables(matcher *m, md_weight_dims *d)
{
    int64_t side = 0, reach = 0;
    while (side * side < d->tokens - 1)
        side++;
    while (reach * reach < d->rel_rows - 3)
        reach++;
    if (d->tokens && side * side + 1 != d->tokens)
        note(m, MISSHAPEN, "position table of %lld rows, not a square and one",
             (long long)d->tokens);
    else if (d->rel_rows && (reach * reach + 3 != d->rel_rows || reach % 2 == 0))
        note(m, MISSHAPEN, "relative position table of %lld rows, not an odd square and three",
             (long long)d->rel_rows);
    else if (d->tokens && d->rel_rows && 2 * side - 1 != reach)
        note(m, MISSHAPEN, "a grid of side %lld in one position table and of side %lld in another",
             (long long)side, (long long)(reach + 1) / 2);
    else if (d->rel_rows)
        d->tokens = (reach + 1) / 2 * ((reach + 1) / 2) + 1;
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
    note_tables(m, dims);
    return report(m);
}

/* Tries one place; *found counts those that fit. */
static md_status probe(matcher *m, int *found)
{
    md_dialect_map *map = m->map;
    if (find(m, m->d->probe, 0) < 0)
        return MD_OK;
    for (size_t i = 0; i < MD_COUNT(m->d->absent); i++)
        if (m->d->absent[i] && find(m, m->d->absent[i], 0) >= 0)
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
    for (size_t d = 0; d < (size_t)md_dialect_count; d++)
        for (size_t w = 0; w < (wrapper ? 1 : MD_COUNT(wrappers)); w++)
            for (int r = 0; r < MD_DIALECT_ROOTS && md_dialects[d].root[r]; r++) {
                at.d = &md_dialects[d];
                at.wrapper = wrapper ? wrapper : wrappers[w];
                at.root = md_dialects[d].root[r];
                int before = found;
                MD_TRY(probe(&at, &found));
                if (found > before)
                    *m = at;
            }
    if (!found)
        MD_FAIL(MD_ERR_DATA,
                "no known names of a Vision Transformer (CLIP, timm, DINO, MAE, BEiT, Hugging Face "
                "ViT) under %s%s%s; see md_hpc weights inspect",
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

static const md_dialect *dialect_find(const char *name)
{
    for (int i = 0; i < md_dialect_count; i++)
        if (strcmp(md_dialects[i].name, name) == 0)
            return &md_dialects[i];
    MD_ASSERT(false, "no dialect %s", name);
    return NULL;
}

int md_dialect_names(const char *dialect, md_weight_id id, int layer, bool inside,
                     char name[MD_DIALECT_PARTS][MD_DIALECT_NAME])
{
    const md_dialect *d = dialect_find(dialect);
    const md_dialect_rule *rule = NULL;
    for (int i = 0; i < d->count; i++)
        if (d->rules[i].id == id && (!rule || inside))
            rule = &d->rules[i];
    if (!rule)
        return 0;
    int parts = 0;
    for (; parts < MD_DIALECT_PARTS && rule->from[parts]; parts++)
        full_name("", d->root[0], rule->from[parts], layer, name[parts], MD_DIALECT_NAME);
    return parts;
}
