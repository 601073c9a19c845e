/* cmd_weights: `md_hpc weights import | export | inspect`. Needs no MPI, data or device. */
#include "src/cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/pretrained.h"
#include "io/weights_export.h"

/* ---- inspect ---- */

/* "ViT-L/14" for the published sizes, "ViT" for the others. */
static const char *model_name(int64_t width, int layers, int64_t patch, char buf[32])
{
    static const struct {
        const char *name;
        int width, layers;
    } known[] = {
        {"Ti", 192, 12}, {"S", 384, 12},  {"B", 768, 12},  {"L", 1024, 24},
        {"H", 1280, 32}, {"g", 1408, 40}, {"G", 1664, 48},
    };
    for (size_t i = 0; i < MD_COUNT(known); i++)
        if (known[i].width == width && known[i].layers == layers) {
            snprintf(buf, 32, "ViT-%s/%d", known[i].name, (int)patch);
            return buf;
        }
    return "ViT";
}

static void print_tensor(const char *name, const char *dtype, int rank, const int64_t *dim,
                         int64_t bytes)
{
    char shape[160] = "[";
    size_t used = 1;
    for (int i = 0; i < rank && used < sizeof shape; i++)
        used += (size_t)snprintf(shape + used, sizeof shape - used, "%s%lld", i ? ", " : "",
                                 (long long)dim[i]);
    if (used < sizeof shape)
        snprintf(shape + used, sizeof shape - used, "]");
    printf("%-56s %-6s %-22s %12lld\n", name, dtype, shape, (long long)bytes);
}

/* Names with numbers in their natural order: blocks.2 before blocks.10. */
static int by_natural_name(const void *a, const void *b)
{
    const md_st_entry *x = *(const md_st_entry *const *)a, *y = *(const md_st_entry *const *)b;
    return strverscmp(x->name, y->name);
}

static md_status print_tensors(const md_safetensors *st)
{
    const md_st_entry **list;
    int n = md_safetensors_count(st);
    int64_t bytes = 0, elements = 0, of[MD_ST_DTYPE_COUNT] = {0};
    MD_NEW(list, n, "tensor list");
    for (int i = 0; i < n; i++)
        list[i] = md_safetensors_at(st, i);
    qsort(list, (size_t)n, sizeof *list, by_natural_name);
    for (int i = 0; i < n; i++) {
        const md_st_entry *e = list[i];
        print_tensor(e->name, md_st_dtype_name((md_st_dtype)e->dtype), e->rank, e->dim, e->bytes);
        bytes += e->bytes;
        elements += e->count;
        of[e->dtype]++;
    }
    printf("\n%d tensors, %lld elements, %lld bytes:", n, (long long)elements, (long long)bytes);
    for (int t = 0; t < MD_ST_DTYPE_COUNT; t++)
        if (of[t])
            printf(" %lld %s", (long long)of[t], md_st_dtype_name((md_st_dtype)t));
    printf("\n");
    md_free(list);
    return MD_OK;
}

static md_status inspect_safetensors(const char *path)
{
    md_safetensors *st;
    md_dialect_map map;
    char name[32];
    MD_TRY(md_safetensors_open(path, &st));
    md_status status = print_tensors(st);
    if (status == MD_OK && md_dialect_match(st, NULL, &map) == MD_OK)
        printf("model: %s names under '%s': %s, %d layers, width %lld, patch %lld, %lld positions; "
               "%d tensors of other parts\n",
               map.dialect, map.prefix,
               model_name(map.dims.width, map.dims.layers, map.dims.patch, name), map.dims.layers,
               (long long)map.dims.width, (long long)map.dims.patch, (long long)map.dims.tokens,
               map.ignored);
    else if (status == MD_OK)
        printf("model: none that can be imported: %s\n", md_error_text());
    if (status == MD_OK)
        md_dialect_map_free(&map);
    md_safetensors_close(st);
    return status;
}

/* What BEiT's architecture adds. */
static void print_beit(const md_weights_info *i)
{
    static const char *const rel[] = {"no relative positions", "shared relative positions",
                                      "relative positions in every block"};
    printf("%s%s%s%s%s%s", rel[i->rel_pos], i->abs_pos ? ", absolute positions" : "",
           i->layer_scale ? ", layer scale" : "", i->qv_bias ? ", biases of q and v" : "",
           i->mask_token ? ", mask token" : "", i->final_norm ? ", final norm" : "");
    printf("%s", i->fc_norm ? ", norm behind the mean of the tokens" : "");
    if (i->classes)
        printf(", classifier of %d classes", i->classes);
    if (i->lm_width)
        printf(", pretraining head of width %d", i->lm_width);
    printf("\n");
}

static void print_info(const md_weights_info *i)
{
    char name[32];
    printf("model: %s, %d layers, width %d, %d heads, mlp %d, patch %d, position grid %d, "
           "projection %d\n"
           "act %s, ln_eps %g, mean %g %g %g, std %g %g %g%s%s\n",
           model_name(i->width, i->layers, i->patch, name), i->layers, i->width, i->heads, i->mlp,
           i->patch, i->grid, i->proj_width, md_act_name(i->act), i->ln_eps, i->mean[0], i->mean[1],
           i->mean[2], i->std[0], i->std[1], i->std[2],
           i->pre_norm ? ", norm before the first block" : "", i->patch_bias ? ", patch bias" : "");
    print_beit(i);
    if (*i->hash)
        printf("made from %s (%s names), %lld parameters, hash %s\n", i->source, i->dialect,
               (long long)i->params, i->hash);
}

/* Loads one parameter, which checks its hash, and prints its row. */
static md_status inspect_parameter(md_weights *w, md_weight_id id, int layer)
{
    char name[MD_WEIGHT_NAME];
    md_weight_dims dims;
    md_tensor t = {.dtype = MD_F32};
    md_weights_dims(md_weights_get_info(w), &dims);
    t.rank = (uint8_t)md_weight_shape(id, &dims, t.dim);
    md_weight_name(id, layer, name);
    float *data;
    MD_NEW(data, md_tensor_count(&t), "weights");
    t.data = data;
    md_status st = md_weights_load(w, name, &t);
    if (st == MD_OK)
        print_tensor(name, "F32", t.rank, t.dim, (int64_t)md_tensor_bytes(&t));
    md_free(data);
    return st;
}

static md_status inspect_ours(const char *path)
{
    md_weights *w;
    md_status st = MD_OK;
    MD_TRY(md_weights_open(NULL, path, &w));
    const md_weights_info *info = md_weights_get_info(w);
    for (int id = 0; id < MD_WEIGHT_COUNT && st == MD_OK; id++) {
        int copies = md_weight_per_layer((md_weight_id)id) ? info->layers : 1;
        for (int layer = 0; layer < copies && st == MD_OK; layer++)
            if (md_weights_has(info, (md_weight_id)id))
                st = inspect_parameter(w, (md_weight_id)id, layer);
    }
    if (st == MD_OK) {
        printf("\nall hashes verified\n");
        print_info(info);
    }
    md_weights_close(w);
    return st;
}

static bool is_hdf5(const char *path)
{
    char magic[8] = "";
    FILE *f = fopen(path, "rbe");
    bool is = f && fread(magic, 1, sizeof magic, f) == sizeof magic &&
              memcmp(magic, "\x89HDF\r\n\x1a\n", sizeof magic) == 0;
    if (f)
        fclose(f);
    return is;
}

/* ---- import ---- */

static md_status parse_triple(const char *option, const char *text, double out[3])
{
    const char *p = text;
    for (int i = 0; i < 3; i++) {
        char *end;
        out[i] = strtod(p, &end);
        if (end == p || *end != (i < 2 ? ',' : '\0'))
            return md_usage_error("weights", "%s wants three numbers like 0.5,0.5,0.5, not %s",
                                  option, text);
        p = end + 1;
    }
    return MD_OK;
}

typedef struct import_options {
    md_weights_import_args args;
    double mean[3], std[3];
} import_options;

static md_status parse_option(import_options *o, const char *option, const char *value)
{
    if (!value)
        return md_usage_error("weights", "%s wants a value", option);
    if (strcmp(option, "--out") == 0) {
        o->args.output = value;
    } else if (strcmp(option, "--prefix") == 0) {
        o->args.prefix = value;
    } else if (strcmp(option, "--act") == 0) {
        o->args.act = md_act_parse(value);
        if (o->args.act == MD_ACT_NONE)
            return md_usage_error("weights", "--act is gelu or quick_gelu, not %s", value);
    } else if (strcmp(option, "--heads") == 0) {
        char *end;
        long n = strtol(value, &end, 10);
        if (end == value || *end || n < 1 || n > 1024)
            return md_usage_error("weights", "--heads wants a number from 1 to 1024, not %s",
                                  value);
        o->args.heads = (int)n;
    } else if (strcmp(option, "--mean") == 0) {
        o->args.mean = o->mean;
        return parse_triple(option, value, o->mean);
    } else if (strcmp(option, "--std") == 0) {
        o->args.std = o->std;
        return parse_triple(option, value, o->std);
    } else {
        return md_usage_error("weights", "unknown option %s", option);
    }
    return MD_OK;
}

static md_status parse_import(import_options *o, int argc, char **argv)
{
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "--", 2) == 0) {
            MD_TRY(parse_option(o, argv[i], i + 1 < argc ? argv[i + 1] : NULL));
            i++;
        } else if (o->args.input) {
            return md_usage_error("weights", "weights import takes one file or folder");
        } else {
            o->args.input = argv[i];
        }
    }
    if (!o->args.input || !o->args.output)
        return md_usage_error("weights", "weights import wants --out OUT.h5 and a file or folder");
    return MD_OK;
}

/* A training run's student as a weights file. */
static md_status import_run(const import_options *o)
{
    md_weights_source *source;
    const md_weights_import_args *a = &o->args;
    if (a->prefix || a->heads || a->act != MD_ACT_NONE || a->mean || a->std)
        return md_usage_error("weights", "a checkpoint says itself what it holds: only --out goes "
                                         "with it");
    MD_TRY(md_weights_source_open(a->input, false, &source));
    md_weights_info info = *md_weights_source_info(source);
    md_status st = md_weights_write(a->output, &info, md_weights_source_fill, source);
    if (st == MD_OK) {
        print_info(&info);
        printf("wrote %s from %s\n", a->output, md_weights_source_path(source));
    }
    md_weights_source_close(source);
    return st;
}

static md_status import(int argc, char **argv)
{
    import_options o = {0};
    md_weights_import_report r;
    MD_TRY(parse_import(&o, argc, argv));
    if (md_pretrained_is_run(o.args.input))
        return import_run(&o);
    MD_TRY(md_weights_import(&o.args, &r));
    print_info(&r.info);
    printf("heads: %s; act: %s; ln_eps: %s; mean and std: %s\n"
           "%s tensors in %s, missing 0, ignored %d\n",
           r.heads_from, r.act_from, r.eps_from, r.colours_from, r.stored, o.args.input, r.ignored);
    printf("wrote %s\n", o.args.output);
    return MD_OK;
}

/* ---- export ---- */

typedef struct export_options {
    const char *input;
    md_weights_export_args args;
    bool named, ema;
} export_options;

static md_status parse_dtype(const char *text, md_dtype *out)
{
    static const struct {
        const char *name;
        md_dtype dtype;
    } types[] = {{"f32", MD_F32}, {"bf16", MD_BF16}, {"f16", MD_F16}};
    for (size_t i = 0; i < MD_COUNT(types); i++)
        if (strcmp(text, types[i].name) == 0) {
            *out = types[i].dtype;
            return MD_OK;
        }
    return md_usage_error("weights", "--dtype is f32, bf16 or f16, not %s", text);
}

static md_status parse_export_option(export_options *o, const char *option, const char *value)
{
    if (!value)
        return md_usage_error("weights", "%s wants a value", option);
    if (strcmp(option, "--out") == 0) {
        o->args.output = value;
    } else if (strcmp(option, "--names") == 0) {
        int names = md_export_names_parse(value);
        if (names < 0)
            return md_usage_error("weights", "--names is beit2, timm or hf, not %s", value);
        o->args.names = (md_export_names)names;
        o->named = true;
    } else if (strcmp(option, "--dtype") == 0) {
        return parse_dtype(value, &o->args.dtype);
    } else {
        return md_usage_error("weights", "unknown option %s", option);
    }
    return MD_OK;
}

static md_status parse_export(export_options *o, int argc, char **argv)
{
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "--ema") == 0) {
            o->ema = true;
        } else if (strncmp(argv[i], "--", 2) == 0) {
            MD_TRY(parse_export_option(o, argv[i], i + 1 < argc ? argv[i + 1] : NULL));
            i++;
        } else if (o->input) {
            return md_usage_error("weights", "weights export takes one checkpoint or run");
        } else {
            o->input = argv[i];
        }
    }
    if (!o->input || !o->args.output || !o->named)
        return md_usage_error("weights",
                              "weights export wants --out, --names and a checkpoint or run");
    return MD_OK;
}

static md_status export(int argc, char **argv)
{
    export_options o = {.args = {.dtype = MD_F32}};
    md_weights_export_report r;
    md_weights_source *source;
    MD_TRY(parse_export(&o, argc, argv));
    MD_TRY(md_weights_source_open(o.input, o.ema, &source));
    md_status st = md_weights_export(source, &o.args, &r);
    if (st == MD_OK) {
        print_info(md_weights_source_info(source));
        if (*r.left_out)
            printf("left out, since %s has not: %s\n", r.model, r.left_out);
        if (*r.caveat)
            printf("note: %s\n", r.caveat);
        printf("%d tensors in %s, %lld bytes, for %s, from %s%s\nwrote %s and its config\n",
               r.tensors, md_dtype_name(o.args.dtype), (long long)r.bytes, r.model,
               md_weights_source_path(source), o.ema ? " (averaged)" : "", r.path);
    }
    md_weights_source_close(source);
    return st;
}

static md_status cmd_weights(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "import") == 0)
        return import(argc - 2, argv + 2);
    if (strcmp(what, "export") == 0)
        return export(argc - 2, argv + 2);
    if (strcmp(what, "inspect") != 0 || argc != 3)
        return md_usage_error("weights", "weights wants import, export or inspect FILE");
    return is_hdf5(argv[2]) ? inspect_ours(argv[2]) : inspect_safetensors(argv[2]);
}

const md_verb md_verb_weights = {
    "weights", cmd_weights, "look at pretrained weights, import and export them",
    "md_hpc weights import --out OUT.h5 [options] FILE.safetensors|FOLDER|RUN\n"
    "       md_hpc weights export --out FILE.safetensors|FOLDER --names beit2|timm|hf\n"
    "                             [--dtype f32|bf16|f16] [--ema] RUN|FILE.h5\n"
    "       md_hpc weights inspect FILE\n"
    "\n"
    "RUN is a checkpoint, or a folder of them or a run directory: its newest whole one.\n"
    "import   makes the file that method.teacher.weights wants from a model in safetensors form\n"
    "         with the names of CLIP (OpenAI, OpenCLIP, Hugging Face), timm, Hugging Face ViT or\n"
    "         BEiT (unilm, timm, Hugging Face), or from a run of this program\n"
    "  --act gelu|quick_gelu  activation of the MLP, where no config.json beside it says so\n"
    "  --heads N              attention heads, likewise\n"
    "  --mean R,G,B --std R,G,B  channel statistics of its input, likewise\n"
    "  --prefix P             what stands before the names, when there is more than one model\n"
    "export   writes what a run trained, or a file import made from a BEiT, as safetensors with\n"
    "         config.json beside it (older files of these names are replaced):\n"
    "  --names beit2          for microsoft/unilm's beit2, load_state_dict as it is\n"
    "  --names timm           for timm.create_model(\"local-dir:FOLDER\", pretrained=True)\n"
    "  --names hf             for transformers' BeitModel, BeitForMaskedImageModeling or\n"
    "                         BeitForImageClassification.from_pretrained(FOLDER)\n"
    "  --dtype T              type of all tensors (f32), rounded to nearest\n"
    "  --ema                  the averaged parameters instead of the last ones\n"
    "  Exit codes: 64 command line, 65 the model has parts these names have no place for, no\n"
    "  averaged parameters or damage, 66 no such checkpoint, 73 and 74 the files cannot be "
    "written\n"
    "inspect  lists the tensors of a safetensors file or of a file import made, checks its\n"
    "         hashes, and says which model it is"};
