/* Teachers against public code, from the weights file a user has to the target: tokens of
 * transformers' CLIP at its native 16 x 16 patches and at 14 x 14 by both position rules, from
 * Hugging Face's and OpenAI's names, of timm's VisionTransformer, of timm's pretrained BEiT and of
 * transformers' fine-tuned one, on cpu and check. */
#include "io/weights.h"
#include "src/setup.h"
#include "src/step.h"
#include "tests/golden/golden.h"

#include <unistd.h>

typedef struct row {
    const char *weights, *features, *image; /* file or folder to import; golden file; its picture */
    const char *prefix;                     /* of the tensors in the golden file */
    const char *rule;                       /* method.teacher.pos_interpolation */
    const char *stage;
    int layers; /* targets are the mean of the last ones */
} row;

static char imported[64];

static int make_path(void **state)
{
    (void)state;
    snprintf(imported, sizeof imported, "/tmp/md_teacher.%ld.h5", (long)getpid());
    return 0;
}

static int drop_path(void **state)
{
    (void)state;
    return unlink(imported);
}

static void configure(md_config *c, const md_safetensors *f, const row *r)
{
    golden_overrides o = {.n = 0};
    md_tensor image = golden_load(f, r->image, MD_U8);
    golden_override(&o, "image.size=%d", (int)image.dim[1]);
    golden_override(&o, "train.batch=%d", (int)image.dim[0]);
    golden_override(&o, "model.patch=%d", golden_int(f, "patch"));
    golden_override(&o, "model.width=8");
    golden_override(&o, "model.heads=1");
    golden_override(&o, "model.layers=1");
    golden_override(&o, "method.mask.kind=none");
    golden_override(&o, "method.loss.on=all");
    golden_override(&o, "method.target.norm=none");
    golden_override(&o, "method.teacher.weights=%s", imported);
    golden_override(&o, "method.teacher.stage=%s", r->stage);
    golden_override(&o, "method.teacher.layers=%d", r->layers);
    golden_override(&o, "method.teacher.pos_interpolation=%s", r->rule);
    golden_config(c, &o);
    md_free(image.data);
}

/* What the targets should be: a stage of the last block, or the mean of the block outputs. */
static float *expected(const md_safetensors *f, const row *r, int64_t n)
{
    char key[64];
    float *sum = md_alloc(sizeof *sum * (size_t)n, "test");
    assert_non_null(sum);
    for (int k = 0; k < r->layers; k++) {
        if (strcmp(r->stage, "raw") == 0)
            snprintf(key, sizeof key, "%s.block.%d", r->prefix, 2 - r->layers + k);
        else
            snprintf(key, sizeof key, "%s.%s", r->prefix, r->stage);
        md_tensor t = golden_load(f, key, MD_F32);
        assert_int_equal(md_tensor_count(&t), n);
        for (int64_t i = 0; i < n; i++)
            sum[i] += md_f32(&t)[i] / (float)r->layers;
        md_free(t.data);
    }
    return sum;
}

static void import(const md_safetensors *f, const row *r)
{
    char path[256];
    md_weights_import_report report;
    snprintf(path, sizeof path, "tests/golden/%s", r->weights);
    unlink(imported);
    /* No file says how many heads: the published models have 64 channels a head, these have 16. */
    md_weights_import_args args = {
        .input = path, .output = imported, .act = MD_ACT_NONE, .heads = golden_int(f, "heads")};
    if (strcmp(r->weights, "vit_timm.safetensors") == 0)
        args.act = MD_ACT_GELU;
    GOLDEN_OK(md_weights_import(&args, &report));
    assert_int_equal(report.info.layers, 2);
}

/* Resolves and runs the teacher graph; returns the error of the targets. */
static double run(const md_safetensors *f, const row *r, const char *backend)
{
    md_config c;
    md_method m;
    md_teacher_info info;
    md_backend *be;
    md_comm *self;
    md_stepper_bytes bytes;
    char hash[17];
    configure(&c, f, r);
    GOLDEN_OK(md_teacher_info_get(&c, false, &info, hash));
    GOLDEN_OK(md_method_resolve(&m, &c, &info, NULL));
    GOLDEN_OK(md_method_build(&m, c.train_batch, c.train_batch));
    GOLDEN_OK(md_params_allocate(&m.teacher_params, NULL, false));
    GOLDEN_OK(md_comm_self(&self));
    GOLDEN_OK(md_teacher_load(self, &c, &m));
    GOLDEN_OK(md_backend_create(backend, 2, &be));
    GOLDEN_OK(md_stepper_plan(&m, be, &bytes));
    be->scratch = md_alloc(bytes.scratch, "test");
    be->scratch_size = bytes.scratch;

    md_graph *g = &m.teacher_graph;
    int64_t patches = m.chosen, n = m.images * patches * m.target_width;
    void *region = md_alloc(g->region_bytes, "test");
    float *target = md_alloc(sizeof *target * (size_t)n, "test");
    int32_t *rows = md_alloc(sizeof *rows * (size_t)(m.images * patches), "test");
    int32_t *index = md_alloc(sizeof *index * (size_t)((patches + 1) * (patches + 1)), "test");
    assert_true(be->scratch && region && target && rows && index);
    for (int64_t i = 0; i < m.images * patches; i++)
        rows[i] = (int32_t)(i / patches * (patches + 1) + 1 + i % patches);
    md_tensor image = golden_load(f, r->image, MD_U8);
    md_graph_bind_region(g, region);
    md_graph_bind(g, m.t_image, image.data);
    md_graph_bind(g, m.t_rows, rows);
    md_graph_bind(g, m.t_target, target);
    md_vit_rel_index(md_vit_side(&m.teacher_vit.spec), index);
    if (m.t_rel_index != MD_NO_SLOT)
        md_graph_bind(g, m.t_rel_index, index);
    GOLDEN_OK(md_graph_forward(g, be));
    float *want = expected(f, r, n);
    double error = golden_error(target, want, n, 1);

    void *memory[] = {region, target, rows, index, image.data, want, be->scratch};
    for (size_t i = 0; i < MD_COUNT(memory); i++)
        md_free(memory[i]);
    be->scratch = NULL;
    md_backend_destroy(be);
    md_comm_free(self);
    md_method_free(&m);
    md_config_free(&c);
    return error;
}

static void check(const row *rows, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        md_safetensors *f = golden_open(rows[i].features);
        import(f, &rows[i]);
        double cpu = run(f, &rows[i], "cpu"), checked = run(f, &rows[i], "check");
        print_message("%s %s %s: %.2g\n", rows[i].weights, rows[i].prefix, rows[i].stage, cpu);
        assert_true(cpu <= GOLDEN_OUTPUT && checked <= GOLDEN_OUTPUT);
        md_safetensors_close(f);
    }
}

#define FEATURES "clip_features.safetensors"
#define OPENAI   "clip_openai.safetensors"

static void clip_of_transformers(void **state)
{
    (void)state;
    static const row rows[] = {
        {"clip_hf", FEATURES, "image64", "native", "beit2", "raw", 1},
        {"clip_hf", FEATURES, "image64", "native", "beit2", "raw", 2},
        {"clip_hf", FEATURES, "image64", "native", "exact", "ln_post", 1},
        {"clip_hf", FEATURES, "image64", "native", "exact", "ln_post_proj", 1},
    };
    check(rows, MD_COUNT(rows));
}

static void clip_with_resized_positions(void **state)
{
    (void)state;
    static const row rows[] = {
        {"clip_hf", FEATURES, "image56", "exact", "exact", "raw", 1},
        {"clip_hf", FEATURES, "image56", "exact", "exact", "ln_post", 1},
        {"clip_hf", FEATURES, "image56", "exact", "exact", "ln_post_proj", 1},
        {"clip_hf", FEATURES, "image56", "beit2", "beit2", "raw", 2},
        {"clip_hf", FEATURES, "image56", "beit2", "beit2", "ln_post", 1},
        {"clip_hf", FEATURES, "image56", "beit2", "beit2", "ln_post_proj", 1},
    };
    check(rows, MD_COUNT(rows));
}

/* The two position rules are told apart: one rule's tokens are not the other's. */
static void rules_differ(void **state)
{
    (void)state;
    static const row wrong = {"clip_hf", FEATURES, "image56", "beit2", "exact", "ln_post", 1};
    md_safetensors *f = golden_open(wrong.features);
    import(f, &wrong);
    assert_true(run(f, &wrong, "cpu") > 10 * GOLDEN_OUTPUT);
    md_safetensors_close(f);
}

static void clip_of_openai(void **state)
{
    (void)state;
    static const row rows[] = {
        {OPENAI, FEATURES, "image64", "native", "beit2", "ln_post", 1},
        {OPENAI, FEATURES, "image64", "native", "beit2", "ln_post_proj", 1},
        {OPENAI, FEATURES, "image56", "beit2", "beit2", "ln_post_proj", 1},
    };
    check(rows, MD_COUNT(rows));
}

static void vit_of_timm(void **state)
{
    (void)state;
    static const row rows[] = {
        {"vit_timm.safetensors", "vit_features.safetensors", "image", "native", "beit2", "raw", 1},
        {"vit_timm.safetensors", "vit_features.safetensors", "image", "native", "beit2", "raw", 2},
        {"vit_timm.safetensors", "vit_features.safetensors", "image", "native", "beit2", "ln_post",
         1},
    };
    check(rows, MD_COUNT(rows));
}

static void beit_of_timm(void **state)
{
    (void)state;
    static const row rows[] = {
        {"beit_timm.safetensors", "beit_timm_features.safetensors", "image", "native", "beit2",
         "raw", 1},
        {"beit_timm.safetensors", "beit_timm_features.safetensors", "image", "native", "beit2",
         "raw", 2},
        {"beit_timm.safetensors", "beit_timm_features.safetensors", "image", "native", "beit2",
         "ln_post", 1},
    };
    check(rows, MD_COUNT(rows));
}

/* Fine-tuned: ln_post is the norm behind the mean of the tokens, applied to each. */
static void beit_of_transformers(void **state)
{
    (void)state;
    static const row rows[] = {
        {"beit_hf", "beit_hf_features.safetensors", "image", "native", "beit2", "raw", 1},
        {"beit_hf", "beit_hf_features.safetensors", "image", "native", "beit2", "raw", 2},
        {"beit_hf", "beit_hf_features.safetensors", "image", "native", "beit2", "ln_post", 1},
    };
    check(rows, MD_COUNT(rows));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(clip_of_transformers), cmocka_unit_test(clip_with_resized_positions),
        cmocka_unit_test(rules_differ),         cmocka_unit_test(clip_of_openai),
        cmocka_unit_test(vit_of_timm),          cmocka_unit_test(beit_of_timm),
        cmocka_unit_test(beit_of_transformers),
    };
    return cmocka_run_group_tests(tests, make_path, drop_path);
}
