/* Linear probes against public code: what timm's blocks give them; both recipes over some epochs,
 * from the first weights to the logits of images that were not learned from, on the cpu and check
 * backends; and what the recipes are. */
#include "src/probe_heads.h"
#include "src/viewer.h"
#include "tests/golden/golden.h"

typedef struct run {
    md_safetensors *file;
    md_config config;
    md_probe_rule rule;
    md_backend *backend;
    md_probe_heads *heads;
    int n, steps, width, classes; /* heads; steps of an epoch */
    int rank, ranks;
    float *feature;
} run;

/* As rank `rank` of `ranks`. */
static void set_up(run *r, const char *file, const char *backend, int rank, int ranks)
{
    *r = (run){.file = golden_open(file), .rank = rank, .ranks = ranks};
    const md_safetensors *f = r->file;
    golden_overrides o = {.n = 0};
    golden_override(&o, "evaluate.probe_recipe=%s", golden_text(f, "recipe"));
    golden_override(&o, "evaluate.probe_epochs=%d", golden_int(f, "epochs"));
    golden_override(&o, "evaluate.probe_batch=%d", golden_int(f, "batch"));
    golden_override(&o, "evaluate.probe_lr=%s", golden_text(f, "lr"));
    golden_config(&r->config, &o);
    r->rule = md_probe_rule_make(&r->config);
    r->n = golden_int(f, "heads");
    r->steps = golden_int(f, "steps");
    r->width = golden_int(f, "width");
    r->classes = golden_int(f, "classes");
    GOLDEN_OK(md_backend_create(backend, 2, &r->backend));
    GOLDEN_OK(md_probe_heads_create(&(md_probe_heads_args){.backend = r->backend,
                                                           .rule = r->rule,
                                                           .heads = r->n,
                                                           .width = r->width,
                                                           .classes = r->classes,
                                                           .rank = rank,
                                                           .ranks = ranks,
                                                           .seed = (uint64_t)golden_int(f, "seed")},
                                    &r->heads));
    const int64_t rows = MD_MAX(r->rule.batch, golden_int(f, "tested"));
    r->feature = md_alloc((size_t)(rows * r->n * r->width) * sizeof *r->feature, "test");
    assert_non_null(r->feature);
}

static void tear_down(run *r)
{
    md_probe_heads_free(r->heads);
    md_backend_destroy(r->backend);
    md_config_free(&r->config);
    md_free(r->feature);
    md_safetensors_close(r->file);
}

static void fill_features(run *r, const char *name, int64_t rows)
{
    golden_fill((uint64_t)golden_int(r->file, "seed"), name,
                (float[]){0.5f, strtof(golden_text(r->file, "scale"), NULL)},
                rows * r->n * r->width, r->feature);
}

/* Of a batch, those of the heads that are trained here. */
static void keep_own_features(run *r)
{
    float *to = r->feature;
    for (int64_t i = 0; i < r->rule.batch; i++)
        for (int k = r->rank; k < r->n; k += r->ranks, to += r->width)
            memmove(to, r->feature + (i * r->n + k) * r->width, (size_t)r->width * sizeof *to);
    assert_int_equal(to - r->feature, r->rule.batch * md_probe_heads_own(r->heads) * r->width);
}

/* All epochs; loss f32 [steps in all, heads]. factor: on the rates. */
static void learn(run *r, double factor, float *loss)
{
    md_tensor label = golden_load(r->file, "label", MD_I32);
    md_tensor rate = golden_load(r->file, "rate", MD_F64);
    const int64_t batch = r->rule.batch;
    for (int step = 0; step < r->rule.epochs * r->steps; step++) {
        char name[32];
        const double lr = md_probe_lr(&r->rule, step, r->steps);
        assert_true(fabs(lr - ((const double *)rate.data)[step]) <= 1e-12 * r->rule.lr);
        snprintf(name, sizeof name, "feature.%d", step);
        fill_features(r, name, batch);
        keep_own_features(r);
        GOLDEN_OK(md_probe_heads_step(r->heads, r->feature,
                                      (const int32_t *)label.data + step * batch, factor * lr));
        for (int k = 0; k < r->n; k++)
            loss[step * r->n + k] = (float)md_probe_heads_loss(r->heads)[k];
    }
    md_free(label.data);
    md_free(rate.data);
}

static float *losses_of(const run *r)
{
    float *loss = md_alloc((size_t)(r->rule.epochs * r->steps * r->n) * sizeof *loss, "test");
    assert_non_null(loss);
    return loss;
}

static void expect(const run *r, const char *what, int k, const float *got, int64_t n)
{
    char key[32];
    snprintf(key, sizeof key, "%s.%d", what, k);
    golden_expect(r->file, key, got, n, GOLDEN_OUTPUT);
}

static void learns_as_published(const char *file, const char *backend)
{
    run r;
    set_up(&r, file, backend, 0, 1);
    float *loss = losses_of(&r);
    learn(&r, 1.0, loss);
    golden_expect(r.file, "loss", loss, r.rule.epochs * r.steps * r.n, GOLDEN_OUTPUT);
    const int64_t values = (int64_t)r.classes * r.width, tested = golden_int(r.file, "tested");
    float *weight = md_alloc((size_t)values * sizeof *weight, "test");
    float *bias = md_alloc((size_t)r.classes * sizeof *bias, "test");
    assert_true(weight && bias);
    fill_features(&r, "test", tested);
    for (int k = 0; k < r.n; k++) {
        const float *logits;
        GOLDEN_OK(md_probe_heads_read(r.heads, k, weight, bias));
        expect(&r, "weight", k, weight, values);
        expect(&r, "bias", k, bias, r.classes);
        GOLDEN_OK(md_probe_heads_logits(r.heads, k, r.feature, (int)tested, &logits));
        expect(&r, "logits", k, logits, tested * r.classes);
    }
    md_free(weight);
    md_free(bias);
    md_free(loss);
    tear_down(&r);
}

static void beit(void **state)
{
    (void)state;
    learns_as_published("probe_beit.safetensors", "cpu");
    learns_as_published("probe_beit.safetensors", "check");
}

static void mae(void **state)
{
    (void)state;
    learns_as_published("probe_mae.safetensors", "cpu");
    learns_as_published("probe_mae.safetensors", "check");
}

/* The comparison is sharp: a rate a hundredth off does not pass. */
static void small_faults_are_seen(void **state)
{
    (void)state;
    static const char *const files[] = {"probe_beit.safetensors", "probe_mae.safetensors"};
    for (size_t i = 0; i < MD_COUNT(files); i++) {
        run r;
        set_up(&r, files[i], "cpu", 0, 1);
        float *loss = losses_of(&r);
        learn(&r, 1.01, loss);
        md_tensor want = golden_load(r.file, "loss", MD_F32);
        assert_true(golden_error(loss, md_f32(&want), md_tensor_count(&want), 1) >
                    5 * GOLDEN_OUTPUT);
        md_free(want.data);
        md_free(loss);
        tear_down(&r);
    }
}

/* Each head has the same bits whoever trains it. */
static void heads_do_not_depend_on_the_ranks(void **state)
{
    (void)state;
    run one, part;
    set_up(&one, "probe_beit.safetensors", "cpu", 0, 1);
    float *want = losses_of(&one), *got = losses_of(&one);
    const int64_t n = one.rule.epochs * one.steps * one.n;
    learn(&one, 1.0, want);
    for (int ranks = 2; ranks <= 4; ranks++)
        for (int rank = 0; rank < ranks; rank++) {
            set_up(&part, "probe_beit.safetensors", "cpu", rank, ranks);
            learn(&part, 1.0, got);
            for (int64_t i = 0; i < n; i++)
                assert_true(got[i] == (i % one.n % ranks == rank ? want[i] : 0.0f));
            tear_down(&part);
        }
    md_free(want);
    md_free(got);
    tear_down(&one);
}

static md_probe_rule rule_of(const char *recipe, const char *key)
{
    md_config c;
    golden_overrides o = {.n = 0};
    golden_override(&o, "evaluate.probe_recipe=%s", recipe);
    if (key)
        golden_override(&o, "%s", key);
    golden_config(&c, &o);
    const md_probe_rule r = md_probe_rule_make(&c);
    md_config_free(&c);
    return r;
}

static void expect_rule(const md_probe_rule *r, int epochs, int batch, double lr, double warmup)
{
    assert_int_equal(r->epochs, epochs);
    assert_int_equal(r->batch, batch);
    golden_expect_number("rate", r->lr, lr, 1e-12);
    golden_expect_number("warm-up", r->warmup, warmup, 1e-12);
}

/* As published, and with numbers of one's own. */
static void recipes(void **state)
{
    (void)state;
    md_probe_rule r = rule_of("beit", NULL);
    expect_rule(&r, 100, 1024, 4e-3, 0);
    assert_true(r.blocks && !r.norm && !r.lars && r.weight_decay == 1e-4);
    r = rule_of("mae", NULL);
    expect_rule(&r, 90, 16384, 6.4, 10);
    assert_true(!r.blocks && r.norm && r.lars && r.weight_decay == 0);
    r = rule_of("beit", "evaluate.probe_batch=64");
    expect_rule(&r, 100, 64, 4e-3, 0);
    r = rule_of("mae", "evaluate.probe_batch=64");
    expect_rule(&r, 90, 64, 0.025, 10);
    r = rule_of("mae", "evaluate.probe_epochs=45");
    expect_rule(&r, 45, 16384, 6.4, 5);
    r = rule_of("mae", "evaluate.probe_lr=0.5");
    expect_rule(&r, 90, 16384, 0.5, 10);
    assert_true(md_probe_lr(&r, 0, 10) == 0);
    golden_expect_number("in the warm-up", md_probe_lr(&r, 50, 10), 0.25, 1e-12);
    golden_expect_number("at its end", md_probe_lr(&r, 100, 10), 0.5, 1e-12);
    golden_expect_number("half way down", md_probe_lr(&r, 500, 10), 0.25, 1e-12);
}

/* ---- what a probe sees ---- */

typedef struct sight {
    md_safetensors *file;
    md_config config;
    md_backend *backend;
    md_method method;
    md_topo topo;
} sight;

static void open_eyes(sight *s, const char *backend)
{
    *s = (sight){.file = golden_open("probe_blocks.safetensors")};
    const md_safetensors *f = s->file;
    golden_overrides o = {.n = 0};
    golden_override(&o, "image.size=%d", golden_int(f, "image"));
    golden_override(&o, "model.width=%d", golden_int(f, "width"));
    golden_override(&o, "model.layers=%d", golden_int(f, "layers"));
    golden_override(&o, "model.heads=%d", golden_int(f, "heads"));
    golden_override(&o, "model.mlp=%d", golden_int(f, "mlp"));
    golden_override(&o, "model.patch=%d", golden_int(f, "patch"));
    golden_override(&o, "model.rel_pos=per_layer");
    golden_override(&o, "model.abs_pos=true");
    golden_override(&o, "method.mask.min_block=1");
    golden_config(&s->config, &o);
    snprintf(s->config.task, sizeof s->config.task, "features");
    GOLDEN_OK(md_backend_create(backend, 2, &s->backend));
    GOLDEN_OK(md_method_resolve(&s->method, &s->config, NULL, NULL));
    GOLDEN_OK(md_topo_self(&s->topo));
    md_params *p = &s->method.params;
    GOLDEN_OK(md_params_allocate(p, s->backend, false));
    for (int i = 0; i < p->count; i++) {
        char name[128];
        snprintf(name, sizeof name, "fill.%s", p->row[i].name);
        md_tensor rule = golden_load(f, name, MD_F32), value = md_param_host(p, i);
        golden_fill((uint64_t)golden_int(f, "seed"), p->row[i].name, md_f32(&rule), p->row[i].count,
                    md_f32(&value));
        md_free(rule.data);
    }
    GOLDEN_OK(md_params_store(p));
}

static void close_eyes(sight *s)
{
    md_topo_free(&s->topo);
    md_method_free(&s->method);
    md_backend_destroy(s->backend);
    md_config_free(&s->config);
    md_safetensors_close(s->file);
}

static void sees_every_block(const char *backend)
{
    sight s;
    md_viewer *viewer;
    const float *values;
    open_eyes(&s, backend);
    const int images = golden_int(s.file, "images");
    md_tensor image = golden_load(s.file, "image", MD_U8);
    GOLDEN_OK(md_viewer_create(&(md_viewer_args){.method = &s.method,
                                                 .backend = s.backend,
                                                 .topo = &s.topo,
                                                 .sight = MD_SIGHT_BLOCKS,
                                                 .images = images},
                               &viewer));
    GOLDEN_OK(md_viewer_run(viewer, image.data, &values));
    assert_int_equal(md_viewer_width(viewer),
                     2 * golden_int(s.file, "layers") * golden_int(s.file, "width"));
    golden_expect(s.file, "blocks", values, images * md_viewer_width(viewer), GOLDEN_OUTPUT);
    md_free(image.data);
    md_viewer_free(viewer);
    close_eyes(&s);
}

static void blocks(void **state)
{
    (void)state;
    sees_every_block("cpu");
    sees_every_block("check");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks),
        cmocka_unit_test(beit),
        cmocka_unit_test(mae),
        cmocka_unit_test(small_faults_are_seen),
        cmocka_unit_test(heads_do_not_depend_on_the_ranks),
        cmocka_unit_test(recipes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
