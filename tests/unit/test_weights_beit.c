/* weights of BEiT's architecture: unilm's, timm's and transformers' names become ours, whatever
 * parts the model has, and what does not fit together is refused. */
#include "tests/unit/weights_set.h"

/* The file says of the model what `info` says, and holds every tensor of the set. */
static void want_model(const set *s, const md_weights_info *info)
{
    md_weights *w;
    want(md_weights_open(NULL, out_path, &w), MD_OK, "");
    const md_weights_info *got = md_weights_get_info(w);
    assert_int_equal(got->rel_pos, info->rel_pos);
    assert_int_equal(got->abs_pos, info->abs_pos);
    assert_int_equal(got->layer_scale, info->layer_scale);
    assert_int_equal(got->qv_bias, info->qv_bias);
    assert_int_equal(got->mask_token, info->mask_token);
    assert_int_equal(got->final_norm, info->final_norm);
    assert_int_equal(got->fc_norm, info->fc_norm);
    assert_int_equal(got->classes, info->classes);
    assert_int_equal(got->lm_width, info->lm_width);
    assert_true(got->grid == 2 && got->heads == 2 && got->layers == 2);
    for (int i = 0; i < s->n; i++)
        if (s->t[i].t.dtype == MD_F32)
            want_values(w, s->name[i], s->t[i].t.data, s->t[i].t);
    md_weights_close(w);
}

static void imports_unilm_and_timm(void **state)
{
    (void)state;
    md_weights_import_report r;
    md_weights_info kinds[5] = {pretraining(), fine_tuned(), pretraining(), fine_tuned(),
                                fine_tuned()};
    kinds[2].abs_pos = 1;
    kinds[3].fc_norm = kinds[3].layer_scale = 0, kinds[3].final_norm = 1;
    kinds[4].fc_norm = kinds[4].classes = 0, kinds[4].rel_pos = 0, kinds[4].abs_pos = 1;
    put_text("config.json", "{\"model_args\": {\"num_heads\": 2}}");
    for (size_t i = 0; i < MD_COUNT(kinds); i++) {
        set s = {0};
        add_model(&s, "", &kinds[i]);
        want(import_set(&s, (md_weights_import_args){0}, &r), MD_OK, "");
        assert_string_equal(r.info.dialect, "beit");
        assert_true(r.info.act == MD_ACT_GELU && r.info.ln_eps == 1e-6 && r.ignored == 0);
        want_model(&s, &kinds[i]);
    }
    put_text("config.json", NULL);
}

/* unilm stores the index of the relative positions as well, and BEiT v2 its shallow head. */
static void ignores_buffers(void **state)
{
    (void)state;
    md_weights_import_report r;
    static const int64_t index[25];
    set s = {0}, all;
    md_weights_info info = pretraining();
    add_model(&s, "module.", &info);
    all = s;
    for (int i = 0; i < all.n; i++)
        all.t[i].name = all.name[i];
    add(&all, "module.rel_pos_bias.relative_position_index", 2, (int64_t[]){5, 5});
    all.t[all.n - 1].t = MD_TENSOR((void *)(uintptr_t)index, MD_I64, 5, 5);
    add(&all, "module.cls_pt_layers.0.norm1.weight", 1, (int64_t[]){8});
    want(import_set(&all, (md_weights_import_args){0}, &r), MD_OK, "");
    assert_int_equal(r.ignored, 2);
    assert_string_equal(r.heads_from, "relative position table");
    char hash[24];
    memcpy(hash, r.info.hash, sizeof hash);
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_OK, "");
    assert_string_equal(r.info.hash, hash);
}

/* The set under transformers' names: of three parts where q, k and v are apart. */
static void rename_hf(const set *s, const md_weights_info *info, const char *root, set *out)
{
    *out = (set){0};
    for (int id = 0; id < MD_WEIGHT_COUNT; id++) {
        int copies = md_weight_per_layer((md_weight_id)id) ? info->layers : 1;
        for (int layer = 0; layer < copies && md_weights_has(info, (md_weight_id)id); layer++) {
            char name[MD_DIALECT_PARTS][MD_DIALECT_NAME], own[MD_WEIGHT_NAME];
            int parts = md_dialect_names("hf-beit", (md_weight_id)id, layer, info->classes, name);
            int from = place_of(s, md_weight_name((md_weight_id)id, layer, own));
            assert_true(parts == (id == MD_WEIGHT_QKV_W ? 3 : 1));
            for (int k = 0; k < parts; k++, out->n++) {
                bool inside = strncmp(name[k], "beit.", 5) == 0;
                md_tensor t = s->t[from].t;
                t.dim[0] /= parts;
                t.data = (float *)t.data + k * md_tensor_count(&t);
                snprintf(out->name[out->n], MD_DIALECT_NAME, "%s%.120s", inside ? root : "",
                         name[k] + (inside ? 5 : 0));
                out->t[out->n] = (md_st_tensor){out->name[out->n], t};
            }
        }
    }
}

static void imports_hf_beit(void **state)
{
    (void)state;
    md_weights_info kinds[3] = {pretraining(), fine_tuned(), fine_tuned()};
    kinds[2].fc_norm = 0, kinds[2].final_norm = 1;
    put_text("config.json", "{\"num_attention_heads\": 2, \"layer_norm_eps\": 1e-6}");
    for (size_t i = 0; i < MD_COUNT(kinds); i++) {
        md_weights_import_report r;
        set s = {0}, hf;
        char hash[24];
        add_model(&s, "", &kinds[i]);
        want(import_set(&s, (md_weights_import_args){0}, &r), MD_OK, "");
        memcpy(hash, r.info.hash, sizeof hash);
        rename_hf(&s, &kinds[i], "beit.", &hf);
        want(import_set(&hf, (md_weights_import_args){0}, &r), MD_OK, "");
        assert_string_equal(r.info.dialect, "hf-beit");
        assert_string_equal(r.info.hash, hash);
        rename_hf(&s, &kinds[i], "", &hf); /* a bare BeitModel */
        want(import_set(&hf, (md_weights_import_args){0}, &r), MD_OK, "");
        assert_string_equal(r.info.hash, hash);
    }
    put_text("config.json", NULL);
}

/* One tensor too few or too many. */
static void refuses_what_does_not_fit(void **state)
{
    (void)state;
    md_weights_import_report r;
    static const char *const one[] = {"blocks.1.gamma_2",
                                      "blocks.1.gamma_1",
                                      "fc_norm.bias",
                                      "head.bias",
                                      "head.weight",
                                      "fc_norm.weight",
                                      "blocks.1.attn.relative_position_bias_table"};
    md_weights_info info = fine_tuned();
    set s;
    for (size_t i = 0; i < MD_COUNT(one); i++) {
        s = (set){0};
        add_model(&s, "", &info);
        drop(&s, one[i]);
        want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA,
             "which does not go with the rest");
    }
    s = (set){0};
    add_model(&s, "", &info);
    add(&s, "rel_pos_bias.relative_position_bias_table", 2, (int64_t[]){12, 2});
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA,
         "blocks.0.attn.relative_position_bias_table");
    drop(&s, "rel_pos_bias.relative_position_bias_table");
    want(import_set(&s, (md_weights_import_args){.heads = 4}, &r), MD_ERR_DATA, "table is for 2");
    s.t[place_of(&s, "blocks.1.attn.relative_position_bias_table")].t =
        MD_TENSOR(pool, MD_F32, 13, 2);
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA, "1 misshapen");
    info.abs_pos = 1;
    s = (set){0};
    add_model(&s, "", &info);
    s.t[place_of(&s, "pos_embed")].t = MD_TENSOR(pool, MD_F32, 1, 10, 8);
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA, "a grid of side 3");
    drop(&s, "pos_embed");
    drop(&s, "blocks.0.attn.relative_position_bias_table");
    drop(&s, "blocks.1.attn.relative_position_bias_table");
    want(import_set(&s, (md_weights_import_args){0}, &r), MD_ERR_DATA, "without position tables");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(imports_unilm_and_timm),
        cmocka_unit_test(ignores_buffers),
        cmocka_unit_test(imports_hf_beit),
        cmocka_unit_test(refuses_what_does_not_fit),
    };
    return cmocka_run_group_tests_name("weights_beit", tests, make_folder, drop_folder);
}
