/* Data, tensor, sequence parallelism, ZeRO and accumulation change the speed and nothing else: ten
 * steps of one tiny model under every combination that fits the ranks there are give the losses,
 * gradient norms and parameters of one rank alone, within LIMIT, and the same layout the same bits.
 */
#include "tests/par/par_main.h"

#include <math.h>

#include "src/rng.h"
#include "src/setup.h"
#include "src/step.h"

/* Relative, of losses and norms: sums of fp32 in another order, a few 1e-8 where it was measured.
 * Parameters, in learning rates: AdamW's first updates are nearly the gradient's sign, so that a
 * gradient near 0 shows its rounding; 3e-4 was measured. */
#define LIMIT       1e-6
#define PARAM_LIMIT 3e-3

enum { STEPS = 10, BATCH = 16, SIDE = 8, RATE_INV = 250, CLASSES = 4, MORE = 11 };

typedef struct layout {
    int dp, tp, accumulation;
    bool sequence, zero;
    const char *const *more; /* [MORE] further keys, the same for the run it is compared with */
} layout;

typedef struct run {
    md_config config;
    md_topo topo;
    md_batch_layout batch_layout;
    md_model model;
    md_backend *be;
    md_stepper *stepper;
    uint8_t pixels[BATCH * SIDE * SIDE * 3];
    int64_t sample[BATCH];
    int32_t label[BATCH];
    md_batch batch;
    double loss[STEPS], norm[STEPS];
} run;

static void configure(run *r, const layout *l)
{
    char keys[4][64];
    snprintf(keys[0], 64, "parallel.tensor=%d", l->tp);
    snprintf(keys[1], 64, "parallel.sequence=%s", l->sequence ? "true" : "false");
    snprintf(keys[2], 64, "parallel.zero=%d", l->zero);
    snprintf(keys[3], 64, "train.micro_batch=%d", BATCH / l->dp / l->accumulation);
    char *list[32] = {
        "method.teacher.kind=pixel",
        "method.target.norm=none",
        "method.mask.count=6",
        "method.mask.min_block=4",
        "model.layers=2",
        "model.width=16",
        "model.heads=4",
        "model.patch=2",
        "model.drop_path=0.3",
        "image.size=8",
        "train.batch=16",
        "optim.lr=4e-3",
        "optim.warmup_epochs=0",
        "optim.clip=0.5",
        "parallel.bucket_mib=0.001", /* many buckets, more than can be under way */
        keys[0],
        keys[1],
        keys[2],
        keys[3],
    };
    int n = 0;
    while (list[n])
        n++;
    for (int i = 0; i < MORE && l->more[i]; i++)
        list[n++] = (char *)l->more[i];
    assert_ok(md_config_init(&r->config));
    assert_ok(md_config_load(&r->config, NULL, n, list));
}

/* Pictures by their position in the run: one colour each, with a ramp, so that ten steps learn; the
 * label goes by the colour. */
static md_status take(void *context, int64_t step, int micro, const md_batch **batch, double *wait)
{
    run *r = context;
    const int64_t own = r->model.method.own_images, m = r->batch_layout.micro;
    const int64_t pass = (int64_t)r->topo.dp_rank * r->batch_layout.accumulation + micro;
    (void)wait;
    for (int64_t j = 0; j < own; j++) {
        int64_t image = step * BATCH + pass * m + r->topo.tp_rank * own + j;
        md_rng rng = md_rng_at(1, MD_RNG_TEST, 0, (uint64_t)image);
        r->sample[j] = image;
        const uint32_t colour[3] = {md_rng_below(&rng, 200), 100, 200};
        r->label[j] = (int32_t)(colour[0] * CLASSES / 200);
        for (uint32_t i = 0; i < SIDE * SIDE * 3; i++)
            r->pixels[j * SIDE * SIDE * 3 + i] = (uint8_t)(colour[i % 3] + i / 3 / SIDE * 5);
    }
    *batch = &r->batch;
    return MD_OK;
}

static void release(void *context, const md_batch *batch)
{
    (void)context, (void)batch;
}

static void run_make(run *r, md_comm *world, const layout *l)
{
    memset(r, 0, sizeof *r);
    configure(r, l);
    const int ranks = l->dp * l->tp;
    if (world)
        assert_ok(md_topo_create(world, &(md_topo_args){.tensor = l->tp}, &r->topo));
    else
        assert_ok(md_topo_self(&r->topo));
    assert_ok(md_batch_layout_make(&r->config, ranks, &r->batch_layout));
    assert_int_equal(r->batch_layout.accumulation, l->accumulation);
    assert_ok(md_model_make(&r->config, NULL, &r->topo, &r->batch_layout, &r->model));
    assert_ok(md_backend_create("cpu", 1, &r->be));
    assert_ok(md_model_allocate(&r->config, r->be, &r->model));
    r->batch.image = MD_TENSOR(r->pixels, MD_U8, r->model.method.own_images, SIDE, SIDE, 3);
    r->batch.sample = r->sample;
    r->batch.label = r->label;
    assert_ok(md_stepper_create(&(md_stepper_args){.config = &r->config,
                                                   .method = &r->model.method,
                                                   .backend = r->be,
                                                   .topo = &r->topo,
                                                   .shard = &r->model.shard,
                                                   .source = {r, take, release},
                                                   .steps_per_epoch = 100,
                                                   .accumulation = l->accumulation},
                                &r->stepper));
}

static void run_steps(run *r)
{
    md_train_state state = {0};
    for (int i = 0; i < STEPS; i++) {
        md_step_result result;
        assert_ok(md_step_run(r->stepper, &state, false, &result));
        r->loss[i] = result.loss;
        r->norm[i] = result.grad_norm;
    }
    md_step_settle(r->stepper);
}

static void run_free(run *r)
{
    md_stepper_free(r->stepper);
    md_model_free(&r->model);
    md_topo_free(&r->topo);
    md_backend_destroy(r->be);
    md_config_free(&r->config);
}

/* Largest difference of this rank's parameters from those of one rank, in learning rates. */
static double param_error(const run *r, const run *alone)
{
    const md_params *p = &r->model.method.params, *w = &alone->model.method.params;
    double worst = 0;
    for (int i = 0; i < p->count; i++)
        for (int64_t e = 0; e < p->row[i].count; e++) {
            int64_t at = md_view_global(&p->row[i].view, e);
            double d = fabs((double)p->value[p->row[i].offset + e] -
                            (double)w->value[w->row[i].offset + at]);
            worst = fmax(worst, d * RATE_INV);
        }
    return worst;
}

static void compare(const run *r, const run *alone, const layout *l)
{
    for (int i = 0; i < STEPS; i++)
        if (!(fabs(r->loss[i] - alone->loss[i]) <= LIMIT * alone->loss[i] &&
              fabs(r->norm[i] - alone->norm[i]) <= LIMIT * alone->norm[i]))
            fail_msg(
                "data %d tensor %d sequence %d zero %d accumulation %d, step %d: loss %.9g and "
                "norm %.9g, alone %.9g and %.9g",
                l->dp, l->tp, l->sequence, l->zero, l->accumulation, i + 1, r->loss[i], r->norm[i],
                alone->loss[i], alone->norm[i]);
    double error = param_error(r, alone);
    if (!(error <= PARAM_LIMIT))
        fail_msg("data %d tensor %d sequence %d zero %d accumulation %d: a parameter is off by %g "
                 "learning rates",
                 l->dp, l->tp, l->sequence, l->zero, l->accumulation, error);
}

/* On the first dp * tp ranks; the others wait. */
static void check_layout(const run *alone, const layout *l)
{
    static run first, second;
    const int ranks = l->dp * l->tp;
    md_comm *some;
    const bool in = md_comm_rank(par_world) < ranks;
    if (ranks > md_comm_size(par_world))
        return;
    assert_ok(md_comm_split(par_world, in, md_comm_rank(par_world), &some));
    if (in) {
        run_make(&first, some, l);
        run_steps(&first);
        compare(&first, alone, l);
        run_make(&second, some, l);
        run_steps(&second);
        assert_memory_equal(first.loss, second.loss, sizeof first.loss);
        assert_memory_equal(first.norm, second.norm, sizeof first.norm);
        assert_memory_equal(first.model.method.params.value, second.model.method.params.value,
                            md_params_block_bytes(&first.model.method.params));
        run_free(&first);
        run_free(&second);
    }
    md_comm_free(some);
}

static void begin_alone(run *alone, const char *const more[MORE], double fall)
{
    run_make(alone, NULL, &(layout){1, 1, 1, false, false, more});
    assert_true(alone->model.shard.buckets.count > 8);
    run_steps(alone);
    assert_true(alone->loss[STEPS - 1] < fall * alone->loss[0]); /* it learns, so it can go wrong */
}

/* The whole product, as far as there are ranks. */
static void test_every_layout(void **state)
{
    (void)state;
    static const int sizes[] = {1, 2, 4};
    static const char *const more[MORE] = {"model.last_block=chosen", "model.abs_pos=false"};
    static run alone;
    int checked = 0;
    begin_alone(&alone, more, 0.9);
    for (int k = 0; k < 9 * 8; k++) {
        layout l = {.dp = sizes[k % 3],
                    .tp = sizes[k / 3 % 3],
                    .accumulation = k / 9 % 2 ? 2 : 1,
                    .sequence = k / 18 % 2,
                    .zero = k / 36,
                    .more = more};
        if (l.dp * l.tp > 8 || (l.sequence && l.tp == 1))
            continue;
        check_layout(&alone, &l);
        checked += l.dp * l.tp <= md_comm_size(par_world);
    }
    if (md_comm_size(par_world) == 8)
        assert_int_equal(checked, 4 * (3 + 2 * 5));
    run_free(&alone);
}

/* Other models on the layouts in which most happens. */
static void test_other_models(void **state)
{
    (void)state;
    static const char *const models[][MORE] = {
        {"model.last_block=all", "model.abs_pos=true"},
        {"model.rel_pos=per_layer", "model.last_block=chosen"},
        {"model.rel_pos=none", "model.layer_scale=0"},
        {"parallel.overlap=false", "model.last_block=chosen"},
        {"method.loss.on=all", "method.loss.kind=l2"},
        {"model.drop_path=0.95"}}; /* branches that all images of a pass are dropped for */
    static run alone;
    for (size_t i = 0; i < MD_COUNT(models); i++) {
        begin_alone(&alone, models[i], 0.9);
        for (int k = 0; k < 4; k++) {
            layout l = {.dp = 2,
                        .tp = 2,
                        .accumulation = 2,
                        .sequence = k & 1,
                        .zero = k >> 1,
                        .more = models[i]};
            check_layout(&alone, &l);
            l.dp = 1;
            check_layout(&alone, &l);
        }
        run_free(&alone);
    }
}

/* A classifier: labels and pictures of other ranks, mixing within a pass, rates by layer. */
static void test_classifiers(void **state)
{
    (void)state;
    static const char *const models[][MORE] = {
        {"task=finetune", "model.classes=4", "model.rel_pos=per_layer", "finetune.head_scale=1",
         "augment.mixup=0.8", "augment.cutmix=1", "augment.mix_group=2", "augment.erasing=0.5",
         "optim.layer_decay=0.8", "augment.mix_probability=0.7", "model.pool=mean"},
        {"task=finetune", "model.classes=4", "model.abs_pos=true", "finetune.head_scale=1",
         "augment.mixup=0.8", "augment.cutmix=1", "augment.mix_group=4", "augment.erasing=0.5",
         "optim.layer_decay=0.8", "augment.mix_probability=0.7", "model.pool=cls"}};
    static const layout layouts[] = {
        {2, 1, 1, false, false, NULL}, {1, 2, 1, false, false, NULL}, {1, 2, 1, true, false, NULL},
        {1, 1, 4, false, false, NULL}, {2, 1, 2, false, true, NULL},  {4, 1, 1, false, true, NULL},
        {2, 2, 1, false, true, NULL},  {2, 2, 1, true, true, NULL},   {1, 4, 1, true, false, NULL}};
    static run alone;
    for (size_t i = 0; i < MD_COUNT(models); i++) {
        begin_alone(&alone, models[i], 0.97);
        for (size_t k = 0; k < MD_COUNT(layouts); k++) {
            layout l = layouts[k];
            l.more = models[i];
            check_layout(&alone, &l);
        }
        run_free(&alone);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_every_layout),
    cmocka_unit_test(test_other_models),
    cmocka_unit_test(test_classifiers),
};

PAR_MAIN(tests)
