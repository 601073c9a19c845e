/* weights_export: what is written comes back bit for bit under every naming, from a weights file
 * and from a checkpoint; types are rounded; what a naming has no place for is left out or refused.
 */
#include "tests/unit/weights_set.h"

#include <math.h>
#include <sys/stat.h>

#include "io/checkpoint.h"
#include "io/pretrained.h"
#include "io/weights_export.h"

static char export_dir[96];

static const char *in_export(const char *name)
{
    static char path[160];
    snprintf(path, sizeof path, "%s/%s", export_dir, name);
    return path;
}

static md_status export_from(const char *path, bool ema, md_export_names names, md_dtype dtype,
                             md_weights_export_report *r)
{
    md_weights_source *source;
    snprintf(export_dir, sizeof export_dir, "%s/export", folder);
    md_status st = md_weights_source_open(path, ema, &source);
    if (st != MD_OK)
        return st;
    st = md_weights_export(
        source, &(md_weights_export_args){.output = export_dir, .names = names, .dtype = dtype}, r);
    md_weights_source_close(source);
    return st;
}

/* Imports the last export into back.h5. */
static void import_back(char hash[24])
{
    char back[128];
    md_weights_import_report r;
    snprintf(back, sizeof back, "%s/back.h5", folder);
    want(md_weights_import(&(md_weights_import_args){.input = export_dir, .output = back}, &r),
         MD_OK, "");
    memcpy(hash, r.info.hash, sizeof r.info.hash);
    assert_true(r.info.heads == 2 && r.info.ln_eps == 1e-6 && r.info.mean[1] == 1.0 / 3);
}

/* in.safetensors and out.h5 of a model; its hash. */
static void make_model(const md_weights_info *info, set *s, char hash[24])
{
    md_weights_import_report r;
    *s = (set){0};
    add_model(s, "", info);
    want(import_set(s,
                    (md_weights_import_args){.heads = 2,
                                             .mean = (double[]){0.5, 1.0 / 3, 0.1},
                                             .std = (double[]){0.25, 0.3, 1.0 / 7}},
                    &r),
         MD_OK, "");
    memcpy(hash, r.info.hash, sizeof r.info.hash);
}

static void comes_back(void **state)
{
    (void)state;
    md_weights_info kinds[6] = {pretraining(), fine_tuned(), pretraining(),
                                fine_tuned(),  fine_tuned(), pretraining()};
    kinds[2].abs_pos = 1, kinds[2].rel_pos = MD_WEIGHTS_REL_NONE, kinds[2].layer_scale = 0;
    kinds[3].fc_norm = 0, kinds[3].final_norm = 1;
    kinds[4].classes = 0;
    kinds[5].lm_width = kinds[5].mask_token = 0;
    for (size_t i = 0; i < MD_COUNT(kinds); i++) {
        set s;
        char hash[24], back[24];
        md_weights_export_report r;
        make_model(&kinds[i], &s, hash);
        for (int names = 0; names < MD_EXPORT_COUNT; names++) {
            want(export_from(out_path, false, (md_export_names)names, MD_F32, &r), MD_OK, "");
            assert_string_equal(r.path, in_export("model.safetensors"));
            assert_int_equal(access(in_export("model.safetensors.partial"), F_OK), -1);
            assert_int_equal(access(in_export("config.json.partial"), F_OK), -1);
            import_back(back);
            bool whole = names != MD_EXPORT_TIMM || kinds[i].lm_width == 0;
            assert_int_equal(*r.left_out == 0, whole);
            assert_int_equal(strcmp(hash, back) == 0, whole);
        }
    }
}

/* Timm's Beit has neither mask token nor pretraining head: what is left is the same model. */
static void leaves_out(void **state)
{
    (void)state;
    set s;
    char hash[24], back[24];
    md_weights_export_report r;
    md_weights_info info = pretraining();
    make_model(&info, &s, hash);
    want(export_from(out_path, false, MD_EXPORT_TIMM, MD_F32, &r), MD_OK, "");
    assert_string_equal(r.left_out, "mask_token, lm_head.weight, lm_head.bias");
    import_back(back);
    drop(&s, "mask_token");
    drop(&s, "lm_head.weight");
    drop(&s, "lm_head.bias");
    md_weights_import_report i;
    want(import_set(&s,
                    (md_weights_import_args){.heads = 2,
                                             .mean = (double[]){0.5, 1.0 / 3, 0.1},
                                             .std = (double[]){0.25, 0.3, 1.0 / 7}},
                    &i),
         MD_OK, "");
    assert_string_equal(i.info.hash, back);
}

/* unilm's classes keep the index of the relative positions among their tensors. */
static void writes_unilm_buffers(void **state)
{
    (void)state;
    set s;
    char hash[24];
    md_weights_export_report r;
    md_safetensors *st;
    md_weights_info info = fine_tuned();
    make_model(&info, &s, hash);
    want(export_from(out_path, false, MD_EXPORT_BEIT2, MD_F32, &r), MD_OK, "");
    want(md_safetensors_open(export_dir, &st), MD_OK, "");
    /* what BEiT's RelativePositionBias gives for a window of 2 x 2 */
    static const int64_t index[25] = {11, 9, 9,  9, 9, 10, 4, 3,  1, 0, 10, 5, 4,
                                      2,  1, 10, 7, 6, 4,  3, 10, 8, 7, 5,  4};
    int64_t got[25];
    int i = md_safetensors_find(st, "blocks.1.attn.relative_position_index");
    assert_true(i >= 0);
    assert_int_equal(md_safetensors_at(st, i)->count, 25);
    want(md_safetensors_read(st, i, got), MD_OK, "");
    assert_memory_equal(got, index, sizeof index);
    i = md_safetensors_find(st, "cls_token");
    assert_int_equal(md_safetensors_at(st, i)->rank, 3);
    assert_string_equal(md_safetensors_metadata(st, "format"), "pt");
    md_safetensors_close(st);
}

/* ---- types ---- */

/* Exports head.bias = v in a type and reads it back. */
static md_status through(md_dtype dtype, const float v[5], float out[5])
{
    set s = {0};
    md_weights_info info = fine_tuned();
    md_weights_import_report i;
    md_weights_export_report r;
    md_safetensors *st;
    add_model(&s, "", &info);
    s.t[place_of(&s, "head.bias")].t.data = (void *)(uintptr_t)v;
    want(import_set(&s, (md_weights_import_args){0}, &i), MD_OK, "");
    md_status status = export_from(out_path, false, MD_EXPORT_TIMM, dtype, &r);
    if (status != MD_OK)
        return status;
    want(md_safetensors_open(export_dir, &st), MD_OK, "");
    int at = md_safetensors_find(st, "head.bias");
    assert_int_equal(md_safetensors_at(st, at)->dtype, md_st_dtype_of(dtype));
    want(md_safetensors_read_f32(st, at, out), MD_OK, "");
    md_safetensors_close(st);
    return MD_OK;
}

static void rounds_to_nearest_even(void **state)
{
    (void)state;
    float out[5];
    const float bf16[5] = {1.0f, 1.00390625f, 1.01171875f, -3.3e38f, 1e-40f};
    const float bf16_want[5] = {1.0f, 1.0f, 1.015625f, -0x1.f0p+127f, 0x1.1p-133f};
    want(through(MD_BF16, bf16, out), MD_OK, "");
    assert_memory_equal(out, bf16_want, 3 * sizeof *out);
    assert_true(fabsf(out[3] / bf16[3] - 1.0f) < 0x1p-8f);
    assert_true(out[4] > 0.9e-40f && out[4] < 1.1e-40f && bf16_want[4] > 0);

    /* ties: 1 + 2^-11 down, 1 + 3 * 2^-11 up; the largest; multiples of 2^-24 below 2^-14 */
    const float f16[5] = {1.00048828125f, 1.00146484375f, -65519.0f, 0x1.8p-24f, -0x1.fffp-15f};
    const float f16_want[5] = {1.0f, 1.001953125f, -65504.0f, 0x1p-23f, -0x1p-14f};
    want(through(MD_F16, f16, out), MD_OK, "");
    assert_memory_equal(out, f16_want, sizeof out);
    want(through(MD_F16, (float[]){0, 0, 65520.0f, 0, 0}, out), MD_ERR_DATA, "head.bias");
}

/* ---- refusals ---- */

static void refuses_other_models(void **state)
{
    (void)state;
    set s;
    char hash[24];
    md_weights_export_report r;
    md_weights_info info = tiny;
    info.patch_bias = info.abs_pos = info.final_norm = 1;
    make_model(&info, &s, hash);
    want(export_from(out_path, false, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA, "architecture");
    want(export_from(out_path, true, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA, "moving averages");
    want(export_from("/nowhere/x.h5", false, MD_EXPORT_HF, MD_F32, &r), MD_ERR_NOINPUT,
         "/nowhere/x.h5");
    want(export_from(in_path, false, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA, in_path);
    info = pretraining();
    info.final_norm = 0;
    make_model(&info, &s, hash);
    want(export_from(out_path, false, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA, "no final norm");
    md_weights_source *source;
    want(md_weights_source_open(out_path, false, &source), MD_OK, "");
    md_weights_export_args nowhere = {.output = "/nowhere/y/x.safetensors", .dtype = MD_F32};
    want(md_weights_export(source, &nowhere, &r), MD_ERR_DATA, "no final norm");
    md_weights_source_close(source);
    info.final_norm = 1;
    make_model(&info, &s, hash);
    want(md_weights_source_open(out_path, false, &source), MD_OK, "");
    want(md_weights_export(source, &nowhere, &r), MD_ERR_CREATE, "/nowhere/y/x.safetensors");
    nowhere.output = "/nowhere/y";
    want(md_weights_export(source, &nowhere, &r), MD_ERR_CREATE, "/nowhere/y");
    md_weights_source_close(source);
}

/* ---- checkpoints ---- */

#define CONFIG                                                             \
    "image = { mean = [0.5, 0.33333333333333331, 0.1]; std = [0.25, 0.3, " \
    "0.14285714285714285]; };\nmodel = { heads = 2; patch = 2; ln_eps = 1e-6; };\n"

/* The set as a checkpoint, its parameters under `group`. */
static void write_checkpoint(const set *s, const char *group, const char *config, const char *path)
{
    static md_state_item item[96];
    static char name[96][MD_STATE_NAME];
    md_comm *self;
    for (int i = 0; i < s->n; i++) {
        snprintf(name[i], sizeof name[i], "%s/%s", group, s->name[i]);
        item[i] = md_state_item_make(name[i], &s->t[i].t);
    }
    want(md_comm_self(&self), MD_OK, "");
    want(md_checkpoint_write_file(
             &(md_checkpoint_args){
                 .comm = self, .step = 7, .item = item, .items = s->n, .config = config, .keep = 1},
             path),
         MD_OK, "");
    md_comm_free(self);
}

static void exports_checkpoints(void **state)
{
    (void)state;
    set s;
    char hash[24], back[24], run[96], path[160];
    md_weights_export_report r;
    md_weights_info info = pretraining();
    make_model(&info, &s, hash);
    snprintf(run, sizeof run, "%s/checkpoints", folder);
    assert_int_equal(mkdir(run, 0777), 0);
    snprintf(path, sizeof path, "%s/step-00000007.h5", run);
    write_checkpoint(&s, "param", CONFIG, path);
    assert_true(md_pretrained_is_run(folder) && md_pretrained_is_run(run) &&
                md_pretrained_is_run(path));
    assert_false(md_pretrained_is_run(in_path) || md_pretrained_is_run(out_path));
    const char *const inputs[] = {path, run, folder};
    for (size_t i = 0; i < MD_COUNT(inputs); i++) {
        want(export_from(inputs[i], false, MD_EXPORT_HF, MD_F32, &r), MD_OK, "");
        import_back(back);
        assert_string_equal(back, hash);
    }
    want(export_from(path, true, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA,
         "holds no moving averages");
    write_checkpoint(&s, "ema", CONFIG, path);
    want(export_from(path, true, MD_EXPORT_BEIT2, MD_F32, &r), MD_OK, "");
    import_back(back);
    assert_string_equal(back, hash);
    want(export_from(path, false, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA, "cls_token");
}

static void refuses_odd_checkpoints(void **state)
{
    (void)state;
    set s;
    char hash[24], path[160];
    md_weights_export_report r;
    md_weights_info info = pretraining();
    make_model(&info, &s, hash);
    snprintf(path, sizeof path, "%s/odd.h5", folder);
    write_checkpoint(&s, "param", NULL, path);
    want(export_from(path, false, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA, "no config");
    write_checkpoint(&s, "param", "model = { heads = 3; };", path);
    want(export_from(path, false, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA, "the sizes");
    set other = s;
    for (int i = 0; i < other.n; i++)
        other.t[i].name = other.name[i];
    other.t[place_of(&s, "rel_pos_bias.relative_position_bias_table")].t =
        MD_TENSOR(pool, MD_F32, 13, 2);
    write_checkpoint(&other, "param", CONFIG, path);
    want(export_from(path, false, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA,
         "relative_position_bias_table has not the shape");
    set more = s;
    for (int i = 0; i < more.n; i++)
        more.t[i].name = more.name[i];
    add(&more, "other.weight", 1, (int64_t[]){8});
    write_checkpoint(&more, "param", CONFIG, path);
    want(export_from(path, false, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA, "of which");
    drop(&s, "blocks.1.gamma_2");
    write_checkpoint(&s, "param", CONFIG, path);
    want(export_from(path, false, MD_EXPORT_HF, MD_F32, &r), MD_ERR_DATA,
         "has no blocks.1.gamma_2");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(comes_back),
        cmocka_unit_test(leaves_out),
        cmocka_unit_test(writes_unilm_buffers),
        cmocka_unit_test(rounds_to_nearest_even),
        cmocka_unit_test(refuses_other_models),
        cmocka_unit_test(exports_checkpoints),
        cmocka_unit_test(refuses_odd_checkpoints),
    };
    return cmocka_run_group_tests_name("weights_export", tests, make_folder, drop_folder);
}
