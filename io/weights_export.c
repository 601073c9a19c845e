/* weights_export: see weights_export.h. */
#include "io/weights_export.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/publish.h"
#include "kernels/scalar_math.h"

#define FAMILY "export"

/* Parameters that a class has no place for and works without. */
enum { OMITS_NONE, OMITS_MASK = 1, OMITS_LM_HEAD = 2 };

static const struct {
    const char *word, *dialect;
    int omits;
} targets[MD_EXPORT_COUNT] = {
    [MD_EXPORT_BEIT2] = {"beit2", "beit", OMITS_NONE},
    [MD_EXPORT_TIMM] = {"timm", "beit", OMITS_MASK | OMITS_LM_HEAD},
    [MD_EXPORT_HF] = {"hf", "hf-beit", OMITS_NONE},
};

/* An export under way. */
typedef struct job {
    md_weights_source *source;
    const md_weights_info *info;
    const md_weights_export_args *args;
    md_weights_export_report *report;
    md_st_tensor *tensor;
    char (*name)[MD_DIALECT_NAME];
    void **block; /* memory of the tensors */
    int tensors, blocks;
} job;

int md_export_names_parse(const char *word)
{
    for (int i = 0; i < MD_EXPORT_COUNT; i++)
        if (strcmp(targets[i].word, word) == 0)
            return i;
    return -1;
}

/* ---- narrower types ---- */

/* To nearest even; false when the value is beyond f16. */
static bool f16_from_f32(float f, uint16_t *out)
{
    uint32_t u = md_f32_to_bits(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    float size = md_bits_to_f32(rest);
    if (!(size < 65520.0f))
        return false;
    if (size < 0x1p-14f) /* a multiple of 2^-24 */
        *out = (uint16_t)(sign | (uint32_t)lrintf(size * 0x1p24f));
    else
        *out = (uint16_t)(sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112 << 10)));
    return true;
}

static md_status narrow(const float *in, int64_t n, md_dtype dtype, void *out)
{
    uint16_t *to = out;
    bool fits = true;
    for (int64_t i = 0; i < n && fits; i++) {
        fits = !md_nonfinite(in[i]);
        if (dtype == MD_BF16)
            to[i] = md_bf16_from_f32(in[i]);
        else
            fits = f16_from_f32(in[i], &to[i]);
    }
    if (!fits)
        MD_FAIL(MD_ERR_DATA, "holds a value that %s cannot hold: choose another --dtype",
                md_dtype_name(dtype));
    return MD_OK;
}

/* ---- what does not fit ---- */

static md_status check_model(const job *j)
{
    const md_weights_info *i = j->info;
    const md_export_names names = j->args->names;
    const char *why = NULL;
    if (!i->qv_bias || i->pre_norm || !i->patch_bias || i->proj_width)
        why = "it is not of BEiT's architecture (biases of q and v alone, a patch bias, no norm "
              "before the first block, no projection)";
    else if (i->final_norm && i->fc_norm)
        why = "it has both a final norm and one behind the mean of the tokens";
    else if (!i->final_norm && !i->fc_norm)
        why = "it has no final norm";
    else if (i->act != MD_ACT_GELU && names != MD_EXPORT_HF)
        why = "its activation is not gelu";
    else if (i->classes && i->lm_width && names == MD_EXPORT_BEIT2)
        why = "it has both a classifier and a pretraining head";
    if (why)
        MD_FAIL(MD_ERR_DATA, "%s cannot be exported under the names of %s: %s",
                md_weights_source_path(j->source), targets[names].word, why);
    if (i->ln_eps != 1e-6 && names == MD_EXPORT_TIMM)
        snprintf(j->report->caveat, sizeof j->report->caveat,
                 "timm's Beit has LayerNorms of epsilon 1e-06, this model was trained with %g",
                 i->ln_eps);
    return MD_OK;
}

static bool is_omitted(const job *j, md_weight_id id)
{
    int omits = targets[j->args->names].omits;
    if (j->args->names == MD_EXPORT_HF && j->info->classes)
        omits |= OMITS_LM_HEAD;
    return (id == MD_WEIGHT_MASK && omits & OMITS_MASK) ||
           ((id == MD_WEIGHT_LM_HEAD_W || id == MD_WEIGHT_LM_HEAD_B) && omits & OMITS_LM_HEAD);
}

static void note_left_out(md_weights_export_report *r, const char *name)
{
    size_t used = strlen(r->left_out);
    snprintf(r->left_out + used, sizeof r->left_out - used, "%s%s", used ? ", " : "", name);
}

/* ---- tensors ---- */

static md_status block_new(job *j, size_t bytes, void **out)
{
    if (!(*out = md_alloc(bytes, FAMILY)))
        return MD_ERR_MEMORY;
    j->block[j->blocks++] = *out;
    return MD_OK;
}

static void add_tensor(job *j, const char *name, md_tensor t)
{
    snprintf(j->name[j->tensors], MD_DIALECT_NAME, "%.*s", MD_DIALECT_NAME - 1, name);
    j->tensor[j->tensors] = (md_st_tensor){j->name[j->tensors], t};
    j->tensors++;
    j->report->bytes += (int64_t)md_tensor_bytes(&t);
}

/* Values of a parameter in the type asked for. */
static md_status load(job *j, md_weight_id id, int layer, int64_t n, void **out)
{
    const md_dtype dtype = j->args->dtype;
    MD_TRY(block_new(j, (size_t)n * md_dtype_bytes(dtype), out));
    if (dtype == MD_F32)
        return md_weights_source_fill(j->source, id, layer, *out);
    float *wide;
    char name[MD_WEIGHT_NAME];
    MD_NEW(wide, n, FAMILY);
    md_status st = md_weights_source_fill(j->source, id, layer, wide);
    if (st == MD_OK && (st = narrow(wide, n, dtype, *out)) != MD_OK)
        md_error_prefix(st, "%s", md_weight_name(id, layer, name));
    md_free(wide);
    return st;
}

/* Tokens and positions have leading extents of one everywhere. */
static md_tensor tensor_of(const job *j, md_weight_id id)
{
    md_weight_dims dims;
    md_tensor t = {.dtype = (uint8_t)j->args->dtype};
    int64_t dim[MD_MAX_RANK];
    md_weights_dims(j->info, &dims);
    int rank = md_weight_shape(id, &dims, dim);
    bool token = id == MD_WEIGHT_CLS || id == MD_WEIGHT_MASK || id == MD_WEIGHT_POS;
    int ones = token ? 3 - rank : 0;
    t.rank = (uint8_t)(rank + ones);
    for (int i = 0; i < t.rank; i++)
        t.dim[i] = i < ones ? 1 : dim[i - ones];
    return t;
}

static md_status add_parameter(job *j, md_weight_id id, int layer)
{
    char name[MD_DIALECT_PARTS][MD_DIALECT_NAME];
    const md_weights_info *i = j->info;
    const bool inside = i->classes || !i->lm_width;
    int parts = md_dialect_names(targets[j->args->names].dialect, id, layer, inside, name);
    MD_ASSERT(parts > 0, "no name for parameter %d", (int)id);
    md_tensor t = tensor_of(j, id);
    MD_TRY(load(j, id, layer, md_tensor_count(&t), &t.data));
    t.dim[0] /= parts;
    for (int k = 0; k < parts; k++) {
        add_tensor(j, name[k], t);
        t.data = md_tensor_from(&t, md_tensor_count(&t));
    }
    return MD_OK;
}

/* Which row of a relative position table each pair of tokens takes (microsoft/unilm,
 * beit2/modeling_finetune.py: RelativePositionBias). unilm's classes keep it among their tensors.
 */
static void rel_index(int g, int64_t *index)
{
    const int t = g * g + 1, reach = 2 * g - 1;
    for (int a = 0; a < t * t; a++) {
        int i = a / t, j = a % t, down = (i - 1) / g - (j - 1) / g,
            right = (i - 1) % g - (j - 1) % g;
        index[a] = i && j ? (down + g - 1) * reach + right + g - 1
                          : reach * reach + (i   ? 1
                                             : j ? 0
                                                 : 2);
    }
}

static md_status add_rel_index(job *j)
{
    const int g = j->info->grid,
              copies = j->info->rel_pos == MD_WEIGHTS_REL_SHARED ? 1 : j->info->layers;
    const int64_t tokens = (int64_t)g * g + 1;
    void *index;
    if (j->args->names != MD_EXPORT_BEIT2 || j->info->rel_pos == MD_WEIGHTS_REL_NONE)
        return MD_OK;
    MD_TRY(block_new(j, (size_t)(tokens * tokens) * sizeof(int64_t), &index));
    rel_index(g, index);
    for (int layer = 0; layer < copies; layer++) {
        char name[MD_DIALECT_NAME] = "rel_pos_bias.relative_position_index";
        if (j->info->rel_pos == MD_WEIGHTS_REL_PER_LAYER)
            snprintf(name, sizeof name, "blocks.%d.attn.relative_position_index", layer);
        add_tensor(j, name, MD_TENSOR(index, MD_I64, tokens, tokens));
    }
    return MD_OK;
}

static md_status collect(job *j)
{
    const int most = MD_WEIGHT_COUNT * (j->info->layers + MD_DIALECT_PARTS) * MD_DIALECT_PARTS;
    MD_NEW(j->tensor, most, FAMILY);
    MD_NEW(j->block, most, FAMILY);
    j->name = md_alloc((size_t)most * sizeof *j->name, FAMILY);
    if (!j->name)
        return MD_ERR_MEMORY;
    for (int id = 0; id < MD_WEIGHT_COUNT; id++) {
        int copies = md_weight_per_layer((md_weight_id)id) ? j->info->layers : 1;
        char name[MD_WEIGHT_NAME];
        if (!md_weights_has(j->info, (md_weight_id)id))
            continue;
        if (is_omitted(j, (md_weight_id)id)) {
            note_left_out(j->report, md_weight_name((md_weight_id)id, 0, name));
            continue;
        }
        for (int layer = 0; layer < copies; layer++)
            MD_TRY(add_parameter(j, (md_weight_id)id, layer));
    }
    return add_rel_index(j);
}

static void job_free(job *j)
{
    for (int i = 0; i < j->blocks; i++)
        md_free(j->block[i]);
    md_free(j->block);
    md_free(j->tensor);
    md_free(j->name);
}

/* ---- files ---- */

/* The file that --out means; makes the folder where it names one. */
static md_status output_path(const char *out, char *path, size_t size)
{
    static const char end[] = ".safetensors";
    size_t n = strlen(out), m = sizeof end - 1;
    struct stat sb;
    bool file = n > m && strcmp(out + n - m, end) == 0;
    if ((size_t)snprintf(path, size, "%s%s", out, file ? "" : "/model.safetensors") >= size)
        MD_FAIL(MD_ERR_CREATE, "%s: path too long", out);
    if (!file && stat(out, &sb) != 0 && mkdir(out, 0777) != 0)
        MD_FAIL(MD_ERR_CREATE, "%s: cannot be made: %s", out, strerror(errno));
    return MD_OK;
}

static md_status text_publish(const char *path, const char *text)
{
    char *part;
    MD_TRY(md_publish_part(path, &part));
    md_status st = MD_OK;
    FILE *f = fopen(part, "we");
    if (!f)
        st = md_error_set(MD_ERR_CREATE, "%s: cannot be created: %s", part, strerror(errno));
    if (f) {
        bool written = fprintf(f, "%s\n", text) > 0;
        written = fclose(f) == 0 && written;
        if (!written)
            st = md_error_set(MD_ERR_IO, "%s: write failed: %s", part, strerror(errno));
        if (st == MD_OK)
            st = md_publish(part, path);
        else
            unlink(part);
    }
    md_free(part);
    return st;
}

static md_status write_config(const job *j, const char *name, bool preprocessor)
{
    char path[sizeof j->report->path + 32];
    const char *slash = strrchr(j->report->path, '/');
    snprintf(path, sizeof path, "%.*s%s", slash ? (int)(slash - j->report->path) + 1 : 0,
             j->report->path, name);
    char *text = md_export_config(j->info, j->args->names, j->args->dtype, preprocessor);
    if (!text)
        MD_FAIL(MD_ERR_MEMORY, "%s: out of memory", path);
    md_status st = text_publish(path, text);
    free(text); /* jansson's own allocation */
    return st;
}

static md_status write_all(job *j)
{
    const md_st_meta meta[] = {{"format", "pt"}, {"made by", "md_hpc " MD_VERSION}};
    MD_TRY(output_path(j->args->output, j->report->path, sizeof j->report->path));
    MD_TRY(md_safetensors_write(j->report->path, j->tensor, j->tensors, meta, MD_COUNT(meta)));
    MD_TRY(write_config(j, "config.json", false));
    return j->args->names == MD_EXPORT_HF ? write_config(j, "preprocessor_config.json", true)
                                          : MD_OK;
}

md_status md_weights_export(md_weights_source *source, const md_weights_export_args *args,
                            md_weights_export_report *report)
{
    job j = {
        .source = source, .info = md_weights_source_info(source), .args = args, .report = report};
    *report = (md_weights_export_report){.model = md_export_model(j.info, args->names)};
    MD_TRY(check_model(&j));
    md_status st = collect(&j);
    if (st == MD_OK)
        st = write_all(&j);
    report->tensors = j.tensors;
    job_free(&j);
    return st;
}
