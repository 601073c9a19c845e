/* Fine-tuning against public code: two steps of timm's BEiT with timm's mixup and CutMix, soft
 * labels and layer-wise learning rates and torch's AdamW, from the bytes of the pictures to the
 * parameters afterwards, on the cpu and check backends; and the rate of every parameter of the
 * published sizes.
 */
#include "src/optim.h"
#include "src/step.h"
#include "src/step_batch.h"
#include "tests/golden/golden.h"

/* In learning rates of the parameter: the values are near 1 and rounded to fp32, and a gradient
 * near 0 shows its rounding. */
#define GOLDEN_MOVED 1e-3

typedef struct run {
    md_safetensors *file;
    md_config config;
    md_method method;
    md_topo topo;
    md_backend *backend;
    md_step_batch batch;
    void *region;
    float *start;
    md_tensor image, label;
} run;

static double golden_number(const run *r, const char *key)
{
    return strtod(golden_text(r->file, key), NULL);
}

static void configure(run *r)
{
    const md_safetensors *f = r->file;
    golden_overrides o = {.n = 0};
    golden_override(&o, "task=finetune");
    golden_override(&o, "run.seed=%d", golden_int(f, "seed"));
    golden_override(&o, "image.size=%d", golden_int(f, "image"));
    golden_override(&o, "model.width=%d", golden_int(f, "width"));
    golden_override(&o, "model.layers=%d", golden_int(f, "layers"));
    golden_override(&o, "model.heads=%d", golden_int(f, "heads"));
    golden_override(&o, "model.mlp=%d", golden_int(f, "mlp"));
    golden_override(&o, "model.patch=%d", golden_int(f, "patch"));
    golden_override(&o, "model.classes=%d", golden_int(f, "classes"));
    bool mean = strcmp(golden_text(f, "pool"), "avg") == 0;
    golden_override(&o, "model.pool=%s", mean ? "mean" : "cls");
    golden_override(&o, "model.rel_pos=per_layer");
    golden_override(&o, "model.abs_pos=true");
    golden_override(&o, "model.drop_path=0");
    golden_override(&o, "augment.mixup=0.8");
    golden_override(&o, "augment.cutmix=1");
    golden_override(&o, "augment.mix_group=%d", golden_int(f, "batch"));
    golden_override(&o, "finetune.smoothing=0.1");
    golden_override(&o, "optim.layer_decay=%s", golden_text(f, "layer_decay"));
    golden_override(&o, "optim.weight_decay=%s", golden_text(f, "weight_decay"));
    golden_override(&o, "train.batch=%d", golden_int(f, "batch"));
    golden_config(&r->config, &o);
}

static void fill_weights(run *r)
{
    const md_params *p = &r->method.params;
    int fills = 0;
    for (int i = 0; i < md_safetensors_count(r->file); i++)
        fills += strncmp(md_safetensors_at(r->file, i)->name, "fill.", 5) == 0;
    assert_int_equal(fills, p->count); /* no parameter too few, none too many */
    for (int i = 0; i < p->count; i++) {
        char name[128];
        snprintf(name, sizeof name, "fill.%s", p->row[i].name);
        md_tensor rule = golden_load(r->file, name, MD_F32);
        md_tensor value = md_param_value(p, i);
        golden_fill((uint64_t)golden_int(r->file, "seed"), p->row[i].name, md_f32(&rule),
                    p->row[i].count, md_f32(&value));
        md_free(rule.data);
    }
    r->start = md_alloc(md_params_block_bytes(p), "test");
    memcpy(r->start, p->value, md_params_block_bytes(p));
}

static void set_up(run *r, const char *file, const char *backend)
{
    *r = (run){.file = golden_open(file)};
    configure(r);
    md_method *m = &r->method;
    const int64_t batch = golden_int(r->file, "batch");
    md_stepper_bytes bytes;
    GOLDEN_OK(md_method_resolve(m, &r->config, NULL, NULL));
    GOLDEN_OK(md_method_build(m, batch, batch));
    GOLDEN_OK(md_params_allocate(&m->params, NULL, true));
    GOLDEN_OK(md_params_allocate_moments(&m->params, m->params.elements, false));
    GOLDEN_OK(md_backend_create(backend, 2, &r->backend));
    GOLDEN_OK(md_stepper_plan(m, r->backend, &bytes));
    r->backend->scratch = md_alloc(bytes.scratch, "test");
    r->backend->scratch_size = bytes.scratch;
    r->region = md_alloc(m->student_graph.region_bytes, "test");
    assert_true(r->backend->scratch && r->region);
    md_graph_bind_region(&m->student_graph, r->region);
    GOLDEN_OK(md_topo_self(&r->topo));
    GOLDEN_OK(
        md_step_batch_create(m, &r->topo, r->backend, (uint64_t)r->config.run_seed, &r->batch));
    fill_weights(r);
}

static void tear_down(run *r)
{
    md_step_batch_free(&r->batch);
    md_topo_free(&r->topo);
    md_free(r->backend->scratch);
    r->backend->scratch = NULL;
    md_backend_destroy(r->backend);
    md_method_free(&r->method);
    md_config_free(&r->config);
    md_free(r->region);
    md_free(r->start);
    md_safetensors_close(r->file);
}

static md_tensor load(const run *r, int step, const char *what, md_dtype dtype)
{
    char key[32];
    snprintf(key, sizeof key, "%d.%s", step, what);
    return golden_load(r->file, key, dtype);
}

/* What the program draws is what the file was made with. */
static void check_draw(const run *r, int step)
{
    md_tensor lambda = load(r, step, "lambda", MD_F64), box = load(r, step, "box", MD_I32);
    const md_mix_draw d = md_mix_choose(&r->batch.mix, step, 0);
    assert_true(fabs(d.lambda - *(const double *)lambda.data) < 1e-12);
    assert_memory_equal(d.box, box.data, sizeof d.box);
    md_free(lambda.data);
    md_free(box.data);
}

static void expect(const run *r, int step, const char *what, const md_tensor *got)
{
    char key[32];
    snprintf(key, sizeof key, "%d.%s", step, what);
    golden_expect(r->file, key, md_f32(got), md_tensor_count(got), GOLDEN_OUTPUT);
}

/* What a step's tensor `kind` of a parameter holds: elements 0, *stride, ... of it. */
static md_tensor load_part(const run *r, const char *kind, int i, int64_t *stride)
{
    char key[128];
    const md_param *row = &r->method.params.row[i];
    snprintf(key, sizeof key, "%s.%s", kind, row->name);
    md_tensor part = golden_load(r->file, key, MD_F32);
    *stride = 1;
    if (md_tensor_count(&part) < row->count) {
        snprintf(key, sizeof key, "0.step.%s", row->name);
        md_tensor stored = golden_load(r->file, key, MD_I32);
        *stride = *(const int32_t *)stored.data;
        md_free(stored.data);
    }
    assert_int_equal((row->count + *stride - 1) / *stride, md_tensor_count(&part));
    return part;
}

/* Sum of the squares of a whole gradient, of which the file may hold a part. */
static void check_squares(const run *r, int step, int i)
{
    char key[128];
    const md_param *row = &r->method.params.row[i];
    snprintf(key, sizeof key, "%d.moments.%s", step, row->name);
    if (md_safetensors_find(r->file, key) < 0)
        return;
    md_tensor moments = golden_load(r->file, key, MD_F64), grad;
    grad = md_param_grad(&r->method.params, i);
    double squares = 0;
    for (int64_t e = 0; e < row->count; e++)
        squares += (double)md_f32(&grad)[e] * (double)md_f32(&grad)[e];
    golden_expect_number(key, squares, ((const double *)moments.data)[1], GOLDEN_GRADIENT);
    md_free(moments.data);
}

static double check_gradients(const run *r, int step)
{
    double worst = 0;
    char kind[16];
    snprintf(kind, sizeof kind, "%d.grad", step);
    for (int i = 0; i < r->method.params.count; i++) {
        int64_t stride;
        md_tensor want = load_part(r, kind, i, &stride);
        md_tensor grad = md_param_grad(&r->method.params, i);
        double error = golden_error(md_f32(&grad), md_f32(&want), md_tensor_count(&want), stride);
        worst = fmax(worst, error);
        if (!(error <= GOLDEN_GRADIENT))
            fail_msg("step %d, gradient of %s: relative error %.3g", step,
                     r->method.params.row[i].name, error);
        check_squares(r, step, i);
        md_free(want.data);
    }
    return worst;
}

/* A step as src/step.c takes it, in parts. */
static void forward(run *r, int step)
{
    static int64_t sample[16];
    r->image = load(r, step, "image", MD_U8);
    r->label = load(r, step, "label", MD_I32);
    const md_batch batch = {.image = r->image, .label = r->label.data, .sample = sample};
    GOLDEN_OK(md_step_batch_set(&r->batch, &batch, step, 0));
    GOLDEN_OK(md_graph_forward(&r->method.student_graph, r->backend));
}

static void backward(run *r)
{
    GOLDEN_OK(md_graph_backward(&r->method.student_graph, r->backend, false, NULL, NULL));
}

static void update(run *r, int step)
{
    md_params *p = &r->method.params;
    md_piece piece[MD_GROUPS];
    const int n = md_params_pieces(p, piece);
    const md_optim_args a = {&r->config, golden_number(r, "lr"), 1.0, step + 1};
    GOLDEN_OK(md_optim_update(r->backend, p, piece, n, &a));
    md_free(r->image.data);
    md_free(r->label.data);
}

static double check_step(run *r, int step)
{
    md_graph *g = &r->method.student_graph;
    check_draw(r, step);
    forward(r, step);
    expect(r, step, "target", md_graph_tensor(g, r->method.s_target));
    assert_string_equal(g->node[0].kind->name, "patchify");
    expect(r, step, "patches", md_out(g, &g->node[0], 0));
    expect(r, step, "logits", md_in(g, &g->node[g->nodes - 1], 0));
    md_tensor loss = load(r, step, "loss", MD_F64);
    golden_expect_number("loss", *r->batch.loss, *(const double *)loss.data, GOLDEN_OUTPUT);
    md_free(loss.data);
    backward(r);
    double worst = check_gradients(r, step);
    update(r, step);
    return worst;
}

/* How far every parameter has moved, in its own learning rates. */
static double moved_error(const run *r)
{
    const md_params *p = &r->method.params;
    const int last = golden_int(r->file, "layers") + 1;
    double worst = 0;
    for (int i = 0; i < p->count; i++) {
        int64_t stride;
        md_tensor want = load_part(r, "moved", i, &stride);
        const float *now = p->value + p->row[i].offset, *then = r->start + p->row[i].offset;
        double rate =
            golden_number(r, "lr") * pow(r->config.optim_layer_decay, last - p->row[i].layer_id);
        for (int64_t e = 0; e < md_tensor_count(&want); e++) {
            double got = (double)now[e * stride] - (double)then[e * stride];
            worst = fmax(worst, fabs(got - (double)md_f32(&want)[e]) / rate);
        }
        md_free(want.data);
    }
    return worst;
}

static void check(const char *file, const char *backend)
{
    run r;
    set_up(&r, file, backend);
    double worst = check_step(&r, 0);
    worst = fmax(worst, check_step(&r, 1));
    double moved = moved_error(&r);
    print_message("%s on %s: worst gradient %.2g, parameter %.2g\n", file, backend, worst, moved);
    assert_true(moved <= GOLDEN_MOVED);
    tear_down(&r);
}

static void pooled_by_mean(void **state)
{
    (void)state;
    check("finetune_beit.safetensors", "cpu");
    check("finetune_beit.safetensors", "check");
}

static void pooled_by_cls(void **state)
{
    (void)state;
    check("finetune_beit_cls.safetensors", "cpu");
    check("finetune_beit_cls.safetensors", "check");
}

/* ---- learning rates ---- */

/* A model of so many blocks, all its values 0 and its gradients 1: an update without weight decay
 * subtracts each element's own learning rate. */
static void set_up_rates(run *r, int layers)
{
    char key[32];
    golden_overrides o = {.n = 0};
    *r = (run){.file = golden_open("finetune_beit.safetensors")};
    snprintf(key, sizeof key, "layer_decay.%d", layers);
    golden_override(&o, "task=finetune");
    golden_override(&o, "image.size=8");
    golden_override(&o, "model.patch=4");
    golden_override(&o, "model.width=8");
    golden_override(&o, "model.mlp=8");
    golden_override(&o, "model.heads=1");
    golden_override(&o, "model.layers=%d", layers);
    golden_override(&o, "model.rel_pos=per_layer");
    golden_override(&o, "model.abs_pos=true");
    golden_override(&o, "model.classes=2");
    golden_override(&o, "optim.layer_decay=%.17g", golden_f64(r->file, key));
    golden_override(&o, "optim.weight_decay=0");
    golden_config(&r->config, &o);
    md_params *p = &r->method.params;
    GOLDEN_OK(md_method_resolve(&r->method, &r->config, NULL, NULL));
    GOLDEN_OK(md_params_allocate(p, NULL, true));
    GOLDEN_OK(md_params_allocate_moments(p, p->elements, false));
    GOLDEN_OK(md_backend_create("cpu", 1, &r->backend));
    GOLDEN_OK(md_topo_self(&r->topo));
    for (int64_t i = 0; i < p->elements; i++)
        p->grad[i] = 1.0f;
}

/* In stretches of at most `most` elements, as a rank that updates a share of them has it. */
static void update_in_pieces(run *r, int64_t most)
{
    md_params *p = &r->method.params;
    md_piece piece[MD_GROUPS];
    const int n = md_params_pieces(p, piece);
    const md_optim_args a = {&r->config, 1.0, 1.0, 1};
    for (int i = 0; i < n; i++)
        for (int64_t at = 0; at < piece[i].count; at += most) {
            md_piece part = piece[i];
            part.offset += at, part.moment += at;
            part.count = MD_MIN(most, piece[i].count - at);
            GOLDEN_OK(md_optim_update(r->backend, p, &part, 1, &a));
        }
}

static void check_rates(int layers, int64_t most, const double known[3])
{
    run r;
    char key[32], name[MD_PARAM_NAME];
    set_up_rates(&r, layers);
    const md_params *p = &r.method.params;
    update_in_pieces(&r, most);
    snprintf(key, sizeof key, "scale.%d", layers);
    md_tensor scale = golden_load(r.file, key, MD_F64);
    snprintf(key, sizeof key, "decay.%d", layers);
    md_tensor decay = golden_load(r.file, key, MD_U8);
    snprintf(key, sizeof key, "names.%d", layers);
    const char *names = golden_text(r.file, key);
    assert_int_equal(md_tensor_count(&scale), p->count);
    for (int k = 0; k < p->count; k++) {
        snprintf(name, sizeof name, "%.*s", (int)strcspn(names, ","), names);
        names += strlen(name) + (k + 1 < p->count);
        const int i = md_params_find(p, name);
        if (i < 0)
            fail_msg("%s: no such parameter", name);
        const double want = ((const double *)scale.data)[k];
        assert_int_equal(p->row[i].decay, ((const uint8_t *)decay.data)[k]);
        for (int64_t e = 0; e < p->row[i].count; e++)
            golden_expect_number(name, -(double)p->value[p->row[i].offset + e], want, 1e-6);
        const int id = p->row[i].layer_id;
        if (id < 2 || id == layers)
            golden_expect_number(name, want, known[id < 2 ? id : 2], 1e-5);
    }
    assert_int_equal(*names, 0);
    md_free(scale.data);
    md_free(decay.data);
    tear_down(&r);
}

/* The published rates: embeddings, first block, last block. */
static void layer_rates(void **state)
{
    (void)state;
    check_rates(12, INT64_MAX, (double[]){0.00369721, 0.00568801, 0.65});
    check_rates(24, INT64_MAX, (double[]){0.00377789, 0.00472237, 0.8});
    check_rates(32, INT64_MAX, (double[]){0.00468624, 0.00551322, 0.85});
    check_rates(12, 48, (double[]){0.00369721, 0.00568801, 0.65});
}

/* The comparison is sharp: neither a layer decay a hundredth off nor a weight decay a tenth off
 * passes. */
static void small_faults_are_seen(void **state)
{
    (void)state;
    run r;
    for (int fault = 0; fault < 2; fault++) {
        set_up(&r, "finetune_beit.safetensors", "cpu");
        r.config.optim_layer_decay *= fault == 0 ? 0.99 : 1.0;
        r.config.optim_weight_decay *= fault == 1 ? 0.9 : 1.0;
        for (int step = 0; step < 2; step++) {
            forward(&r, step);
            backward(&r);
            update(&r, step);
        }
        assert_true(moved_error(&r) > 5 * GOLDEN_MOVED);
        tear_down(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pooled_by_mean),
        cmocka_unit_test(pooled_by_cls),
        cmocka_unit_test(layer_rates),
        cmocka_unit_test(small_faults_are_seen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
