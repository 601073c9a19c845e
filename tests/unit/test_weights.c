/* weights: dialects give the tensors the public programs stored, values come from where they
 * should, damage is found. */
#include "tests/unit/weights_set.h"

/* The small model as timm and as timm's CLIP store it. */
static void add_timm(set *s, const char *prefix, bool clip)
{
    md_weights_info info = tiny;
    info.patch_bias = !clip;
    info.pre_norm = clip;
    info.abs_pos = info.final_norm = 1;
    add_model(s, prefix, &info);
}

/* ---- dialects ---- */

static void hash_of(const char *input, int heads, char hash[24])
{
    md_weights_import_report r;
    md_weights_import_args a = {.input = input, .output = out_path, .heads = heads};
    want(md_weights_import(&a, &r), MD_OK, "");
    snprintf(hash, 24, "%s", r.info.hash);
}

/* The same weights as transformers and as OpenAI store them: equal content. */
static void clip_names_agree(void **state)
{
    (void)state;
    char hf[24], openai[24];
    hash_of(GOLDEN "clip_hf", 0, hf);
    hash_of(GOLDEN "clip_openai.safetensors", 2, openai);
    assert_string_equal(hf, openai);
}

static void read_part(const md_safetensors *st, const char *name, float *out)
{
    int i = md_safetensors_find(st, name);
    assert_true(i >= 0);
    want(md_safetensors_read_f32(st, i, out), MD_OK, "");
}

static void imports_clip(void **state)
{
    (void)state;
    md_weights_import_args a = {.input = GOLDEN "clip_hf", .output = out_path};
    md_weights_import_report r;
    want(md_weights_import(&a, &r), MD_OK, "");
    assert_string_equal(r.info.dialect, "hf-clip");
    assert_string_equal(r.stored, "F32");
    assert_string_equal(r.heads_from, "config.json");
    assert_int_equal(r.ignored, 22);
    md_weights_info info;
    want(md_weights_info_read(out_path, &info), MD_OK, "");
    assert_memory_equal(&info.hash, &r.info.hash, sizeof info.hash);
    assert_true(info.width == 32 && info.layers == 2 && info.heads == 2 && info.patch == 4);
    assert_true(info.grid == 16 && info.mlp == 128 && info.proj_width == 24 && info.pre_norm);
    assert_true(info.act == MD_ACT_QUICK_GELU && info.ln_eps == 1e-5 && !info.patch_bias);
    assert_true(info.mean[0] == 0.48145466 && info.std[2] == 0.27577711);

    md_safetensors *st;
    md_weights *w;
    static float v[3 * 32 * 32];
    want(md_safetensors_open(GOLDEN "clip_hf", &st), MD_OK, "");
    want(md_weights_open(NULL, out_path, &w), MD_OK, "");
    for (int k = 0; k < 3; k++) {
        char name[96];
        snprintf(name, sizeof name, "vision_model.encoder.layers.1.self_attn.%c_proj.weight",
                 "qkv"[k]);
        read_part(st, name, v + k * 32 * 32);
    }
    want_values(w, "blocks.1.attn.qkv.weight", v, MD_TENSOR(NULL, MD_F32, 96, 32));
    read_part(st, "visual_projection.weight", v);
    want_values(w, "proj.weight", v, MD_TENSOR(NULL, MD_F32, 24, 32));
    read_part(st, "vision_model.embeddings.class_embedding", v);
    want_values(w, "cls_token", v, MD_TENSOR(NULL, MD_F32, 1, 1, 32));
    md_weights_close(w);
    md_safetensors_close(st);
}

/* Every tensor of timm's file, bit for bit. */
static void imports_timm(void **state)
{
    (void)state;
    md_weights_import_args a = {.input = GOLDEN "vit_timm.safetensors", .output = out_path};
    md_weights_import_report r;
    md_safetensors *st;
    md_weights *w;
    want(md_weights_import(&a, &r), MD_OK, "");
    assert_string_equal(r.info.dialect, "timm");
    assert_true(r.info.act == MD_ACT_GELU && r.info.ln_eps == 1e-6 && r.info.patch_bias);
    assert_true(r.info.mean[0] == 0.485 && r.info.grid == 5 && r.ignored == 2);
    want(md_safetensors_open(a.input, &st), MD_OK, "");
    want(md_weights_open(NULL, out_path, &w), MD_OK, "");
    int64_t elements = 0;
    for (int i = 0; i < md_safetensors_count(st); i++) {
        const md_st_entry *e = md_safetensors_at(st, i);
        if (strncmp(e->name, "head.", 5) == 0)
            continue;
        md_tensor t;
        want(md_safetensors_load(st, e->name, MD_F32, &t), MD_OK, "");
        want_values(w, e->name, t.data, t);
        elements += e->count;
        md_free(t.data);
    }
    assert_int_equal(elements, r.info.params);
    md_weights_close(w);
    md_safetensors_close(st);
}

static void imports_hf_vit(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int rank;
        int64_t dim[4];
    } rows[] = {
        {"vit.embeddings.cls_token", 3, {1, 1, 8}},
        {"vit.embeddings.position_embeddings", 3, {1, 5, 8}},
        {"vit.embeddings.patch_embeddings.projection.weight", 4, {8, 3, 2, 2}},
        {"vit.embeddings.patch_embeddings.projection.bias", 1, {8}},
        {"vit.encoder.layer.0.layernorm_before.weight", 1, {8}},
        {"vit.encoder.layer.0.layernorm_before.bias", 1, {8}},
        {"vit.encoder.layer.0.attention.attention.query.weight", 2, {8, 8}},
        {"vit.encoder.layer.0.attention.attention.key.weight", 2, {8, 8}},
        {"vit.encoder.layer.0.attention.attention.value.weight", 2, {8, 8}},
        {"vit.encoder.layer.0.attention.attention.query.bias", 1, {8}},
        {"vit.encoder.layer.0.attention.attention.key.bias", 1, {8}},
        {"vit.encoder.layer.0.attention.attention.value.bias", 1, {8}},
        {"vit.encoder.layer.0.attention.output.dense.weight", 2, {8, 8}},
        {"vit.encoder.layer.0.attention.output.dense.bias", 1, {8}},
        {"vit.encoder.layer.0.layernorm_after.weight", 1, {8}},
        {"vit.encoder.layer.0.layernorm_after.bias", 1, {8}},
        {"vit.encoder.layer.0.intermediate.dense.weight", 2, {12, 8}},
        {"vit.encoder.layer.0.intermediate.dense.bias", 1, {12}},
        {"vit.encoder.layer.0.output.dense.weight", 2, {8, 12}},
        {"vit.encoder.layer.0.output.dense.bias", 1, {8}},
        {"vit.layernorm.weight", 1, {8}},
        {"vit.layernorm.bias", 1, {8}},
        {"classifier.weight", 2, {2, 8}},
        {"decoder.mask_token", 1, {8}},
    };
    set s = {0};
    md_weights_import_report r;
    for (size_t i = 0; i < MD_COUNT(rows); i++)
        add(&s, rows[i].name, rows[i].rank, rows[i].dim);
    put_text("config.json", "{\"num_attention_heads\": 4, \"hidden_act\": \"gelu\","
                            " \"layer_norm_eps\": 1e-12}");
    put_text("preprocessor_config.json",
             "{\"image_mean\": [0.5, 0.5, 0.5], \"image_std\": [0.5, 0.5, 0.25]}");
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_OK, "");
    put_text("config.json", NULL);
    put_text("preprocessor_config.json", NULL);
    assert_string_equal(r.info.dialect, "hf-vit");
    assert_true(r.info.heads == 4 && r.info.ln_eps == 1e-12 && r.info.std[2] == 0.25);
    assert_int_equal(r.ignored, 2);
    md_weights *w;
    float v[24];
    static const char *const parts[] = {"query", "key", "value"};
    for (int k = 0; k < 3; k++) {
        char name[96];
        snprintf(name, sizeof name, "vit.encoder.layer.0.attention.attention.%s.bias", parts[k]);
        memcpy(v + 8 * k, s.t[place_of(&s, name)].t.data, 8 * sizeof *v);
    }
    want(md_weights_open(NULL, out_path, &w), MD_OK, "");
    want_values(w, "blocks.0.attn.qkv.bias", v, MD_TENSOR(NULL, MD_F32, 24));
    md_weights_close(w);
}

static void strips_prefixes(void **state)
{
    (void)state;
    static const char *const known[] = {"", "module.visual.", "encoder.", "teacher.backbone.",
                                        "visual.trunk."};
    md_weights_import_report r;
    char first[24] = "";
    for (size_t i = 0; i < MD_COUNT(known); i++) {
        set s = {0};
        add_timm(&s, known[i], false);
        want(import_set(&s, (md_weights_import_args){0}, &r), MD_OK, "");
        if (i == 0)
            memcpy(first, r.info.hash, sizeof first);
        assert_string_equal(r.info.hash, first);
    }
    set odd = {0};
    add_timm(&odd, "some.where.", false);
    want(import_set(&odd, (md_weights_import_args){0}, &r), MD_ERR_DATA, "no known names");
    want(import_set(&odd, (md_weights_import_args){.prefix = "some.where."}, &r), MD_OK, "");
    want(import_set(&odd, (md_weights_import_args){.prefix = "none."}, &r), MD_ERR_DATA, "'none.'");
}

static void refuses_two_models(void **state)
{
    (void)state;
    md_weights_import_report r;
    set s = {0};
    add_timm(&s, "student.", false);
    add_timm(&s, "teacher.", false);
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA, "choose with --prefix");
    want(import_set(&s, (md_weights_import_args){.prefix = "teacher."}, &r), MD_OK, "");
    assert_int_equal(r.ignored, 30);
}

static void names_what_is_wrong(void **state)
{
    (void)state;
    md_weights_import_report r;
    set s = {0};
    unlink(out_path);
    add_timm(&s, "", false);
    drop(&s, "blocks.1.norm2.bias");
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA,
         "1 missing (blocks.1.norm2.bias)");

    s.n = 0;
    add_timm(&s, "", false);
    add(&s, "blocks.0.ls1.gamma", 1, (int64_t[]){8});
    add(&s, "head.weight", 2, (int64_t[]){2, 8});
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA,
         "1 unknown (blocks.0.ls1.gamma)");

    s.n = 0;
    add_timm(&s, "", false);
    s.t[place_of(&s, "blocks.1.mlp.fc2.weight")].t = MD_TENSOR(pool, MD_F32, 12, 8);
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA,
         "1 misshapen (blocks.1.mlp.fc2.weight [12,8])");

    s.n = 0;
    add_timm(&s, "", false);
    s.t[place_of(&s, "pos_embed")].t = MD_TENSOR(pool, MD_F32, 1, 6, 8);
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA, "6 rows");

    s.n = 0; /* a hole in the layers */
    add_timm(&s, "", false);
    for (int i = 0; i < s.n; i++)
        if (strncmp(s.name[i], "blocks.1.", 9) == 0)
            s.name[i][7] = '2';
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA, "12 unknown (blocks.2.");
    assert_int_equal(access(out_path, F_OK), -1);
}

/* Values that are not in the tensors: option before config file before dialect. */
static void takes_values_in_order(void **state)
{
    (void)state;
    md_weights_import_report r;
    set s = {0};
    float zero[5] = {0};
    add_timm(&s, "", true);
    add(&s, "head.weight", 2, (int64_t[]){5, 8});
    add(&s, "head.bias", 1, (int64_t[]){5});
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA, "say --act");
    md_weights_import_args gelu = {.act = MD_ACT_GELU};
    want(import_set(&s, gelu, &r), MD_OK, "");
    assert_string_equal(r.info.dialect, "timm-clip");
    assert_true(r.info.proj_width == 0 && r.ignored == 2 && r.info.ln_eps == 1e-5);
    s.t[s.n - 1].t.data = zero; /* a zero bias: the classifier is CLIP's projection */
    want(import_set(&s, gelu, &r), MD_OK, "");
    assert_true(r.info.proj_width == 5 && r.ignored == 1 && r.info.heads == 1);

    put_text("config.json", "{\"architecture\": \"vit_tiny_patch2_clip_quickgelu_4\", "
                            "\"model_args\": {\"num_heads\": 2}}");
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_OK, "");
    assert_true(r.info.act == MD_ACT_QUICK_GELU && r.info.heads == 2);
    md_weights_import_args all = {.act = MD_ACT_GELU,
                                  .heads = 8,
                                  .mean = (double[]){0.1, 0.2, 0.3},
                                  .std = (double[]){1, 2, 3}};
    want(import_set(&s, all, &r), MD_OK, "");
    assert_true(r.info.act == MD_ACT_GELU && r.info.heads == 8 && r.info.mean[1] == 0.2);
    all.heads = 3;
    want(import_set(&s, all, &r), MD_ERR_DATA, "3 heads");
    all.heads = 8, all.std = (double[]){1, 0, 3};
    want(import_set(&s, all, &r), MD_ERR_DATA, "channel 1");
    put_text("config.json", "{\"hidden_act\": \"silu\"}");
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA, "'silu'");
    put_text("config.json", "{");
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA, "config.json");
    put_text("config.json", NULL);

    assert_int_equal(md_weights_default_heads(768), 12);
    assert_int_equal(md_weights_default_heads(1024), 16);
    assert_int_equal(md_weights_default_heads(1280), 16);
}

/* OpenCLIP writes quick_gelu only where it is true, and heads as their width. */
static void reads_open_clip_configs(void **state)
{
    (void)state;
    md_weights_import_report r;
    set s = {0};
    add_timm(&s, "", true);
    put_text("open_clip_config.json",
             "{\"model_cfg\": {\"vision_cfg\": {\"head_width\": 2}},"
             " \"preprocess_cfg\": {\"mean\": [0, 0, 0.5], \"std\": [1, 1, 1]}}");
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_OK, "");
    assert_true(r.info.act == MD_ACT_GELU && r.info.heads == 4 && r.info.mean[2] == 0.5);
    put_text("open_clip_config.json", "{\"model_cfg\": {\"quick_gelu\": true}}");
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_OK, "");
    assert_true(r.info.act == MD_ACT_QUICK_GELU && r.info.heads == 1);
    put_text("open_clip_config.json", "{\"preprocess_cfg\": {\"mean\": [0], \"std\": [1]}}");
    want(import_set(&s, (md_weights_import_args){.act = MD_ACT_GELU}, &r), MD_ERR_DATA,
         "three numbers");
    put_text("open_clip_config.json", NULL);
}

/* ---- our file ---- */

static void want_load(const char *name, md_tensor t, md_status status, const char *word)
{
    md_weights *w;
    static float data[4096];
    want(md_weights_open(NULL, out_path, &w), MD_OK, "");
    t.data = data;
    want(md_weights_load(w, name, &t), status, word);
    md_weights_close(w);
}

static void checks_what_is_asked(void **state)
{
    (void)state;
    set s = {0};
    md_weights_import_report r;
    md_weights *w;
    add_timm(&s, "", false);
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_OK, "");
    want_load("norm.weight", MD_TENSOR(NULL, MD_F32, 8), MD_OK, "");
    want_load("norm.weight", MD_TENSOR(NULL, MD_F32, 1, 1, 8), MD_OK, "");
    want_load("norm.weight", MD_TENSOR(NULL, MD_F32, 9), MD_ERR_DATA, "[8]");
    want_load("norm.weight", MD_TENSOR(NULL, MD_F32, 8, 1), MD_ERR_DATA, "norm.weight");
    want_load("norm_pre.weight", MD_TENSOR(NULL, MD_F32, 8), MD_ERR_DATA, "norm_pre.weight");
    want_load("blocks.2.norm1.weight", MD_TENSOR(NULL, MD_F32, 8), MD_ERR_DATA, "blocks.2");
    want(md_weights_open(NULL, "/nowhere/x.h5", &w), MD_ERR_NOINPUT, "/nowhere/x.h5");
    want(md_weights_open(NULL, in_path, &w), MD_ERR_DATA, "not an HDF5 file");
    md_weights_info info;
    want(md_weights_info_read("/nowhere/x.h5", &info), MD_ERR_NOINPUT, "/nowhere/x.h5");
    md_weights_import_args a = {.input = in_path, .output = "/nowhere/x.h5"};
    want(md_weights_import(&a, &r), MD_ERR_CREATE, "/nowhere/x.h5");
}

static size_t read_file(const char *path, char *buf, size_t size)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t n = fread(buf, 1, size, f);
    fclose(f);
    assert_true(n < size);
    return n;
}

static void put_byte(long place, char value)
{
    FILE *f = fopen(out_path, "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, place, SEEK_SET), 0);
    fputc(value, f);
    fclose(f);
}

/* A changed bit in a parameter, in the values beside them or in a hash is found. */
static void finds_damage(void **state)
{
    (void)state;
    static char good[1 << 20];
    set s = {0};
    md_weights_import_report r;
    md_weights *w;
    add_timm(&s, "", false);
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_OK, "");
    size_t n = read_file(out_path, good, sizeof good);
    const struct {
        const char *at, *word;
    } places[] = {
        {memmem(good, n, s.t[place_of(&s, "blocks.1.mlp.fc1.weight")].t.data, 12 * 8 * 4), NULL},
        {memmem(good, n, &r.info.mean[1], 8), "not what it was written with"},
        {memmem(good, n, r.info.hash, 16), "not what it was written with"},
        {memmem(good, n, "gelu", 5), "unknown activation"},
    };
    for (size_t i = 0; i < MD_COUNT(places); i++) {
        assert_non_null(places[i].at);
        long place = places[i].at - good + 3;
        put_byte(place, (char)(good[place] ^ 1));
        if (places[i].word)
            want(md_weights_open(NULL, out_path, &w), MD_ERR_DATA, places[i].word);
        else
            want_load("blocks.1.mlp.fc1.weight", MD_TENSOR(NULL, MD_F32, 12, 8), MD_ERR_DATA,
                      "'blocks.1.mlp.fc1.weight' is damaged");
        put_byte(place, good[place]);
    }
    want(md_weights_open(NULL, out_path, &w), MD_OK, "");
    md_weights_close(w);
    assert_int_equal(truncate(out_path, (off_t)n / 2), 0);
    want(md_weights_open(NULL, out_path, &w), MD_ERR_DATA, out_path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(clip_names_agree),
        cmocka_unit_test(imports_clip),
        cmocka_unit_test(imports_timm),
        cmocka_unit_test(imports_hf_vit),
        cmocka_unit_test(strips_prefixes),
        cmocka_unit_test(refuses_two_models),
        cmocka_unit_test(names_what_is_wrong),
        cmocka_unit_test(takes_values_in_order),
        cmocka_unit_test(reads_open_clip_configs),
        cmocka_unit_test(checks_what_is_asked),
        cmocka_unit_test(finds_damage),
    };
    return cmocka_run_group_tests_name("weights", tests, make_folder, drop_folder);
}
