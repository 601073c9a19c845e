/* cmd_bench: measurements a user can repeat. `bench step` runs whole training steps (teacher and
 * student forward, backward, clipping, AdamW) of a named case on made-up pictures, without files.
 */
#include "src/cli.h"
#include "src/config.h"
#include "src/rng.h"
#include "src/step.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Each case is a list of overrides on the defaults; the peers run the same shapes. */
static const struct bench_case {
    const char *name, *overrides[16];
} cases[] = {
    {"vit_b16",
     {"train.batch=4", "method.mask.count=75", "method.teacher.kind=pixel", "model.drop_path=0"}},
    {"small",
     {"train.batch=128", "image.size=32", "model.patch=4", "model.width=192", "model.layers=12",
      "model.heads=3", "method.mask.count=26", "method.teacher.kind=pixel", "model.drop_path=0"}},
};

typedef struct options {
    const struct bench_case *which;
    int threads, steps, warmup;
} options;

static md_status parse(int argc, char **argv, options *o)
{
    *o = (options){.which = &cases[0], .steps = 5, .warmup = 2};
    if (argc < 2 || strcmp(argv[1], "step") != 0)
        return md_usage_error("bench", "name what to measure");
    for (int i = 2; i < argc; i += 2) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        int *number = strcmp(argv[i], "--threads") == 0  ? &o->threads
                      : strcmp(argv[i], "--steps") == 0  ? &o->steps
                      : strcmp(argv[i], "--warmup") == 0 ? &o->warmup
                                                         : NULL;
        if (!value || (!number && strcmp(argv[i], "--case") != 0))
            return md_usage_error("bench", "option %s", argv[i]);
        if (number) {
            char *end;
            *number = (int)strtol(value, &end, 10);
            if (*end || *number < 0 || *number > 100000 || (number == &o->steps && *number == 0))
                return md_usage_error("bench", "%s %s", argv[i], value);
            continue;
        }
        o->which = NULL;
        for (size_t k = 0; k < MD_COUNT(cases); k++)
            if (strcmp(value, cases[k].name) == 0)
                o->which = &cases[k];
        if (!o->which)
            return md_usage_error("bench", "no case \"%s\"", value);
    }
    return MD_OK;
}

/* ---- made-up pictures ---- */

typedef struct made_up {
    md_batch batch;
    uint8_t *pixels;
    int64_t *sample;
    int64_t images;
} made_up;

static md_status take(void *context, int64_t step, int micro, const md_batch **batch, double *wait)
{
    made_up *m = context;
    (void)micro, (void)wait;
    for (int64_t i = 0; i < m->images; i++)
        m->sample[i] = step * m->images + i;
    *batch = &m->batch;
    return MD_OK;
}

static void release(void *context, const md_batch *batch)
{
    (void)context, (void)batch;
}

static md_status make_up(const md_config *c, made_up *m)
{
    int64_t side = c->image_size, n = c->train_batch;
    *m = (made_up){.images = n};
    MD_NEW(m->pixels, n * side * side * 3, "made-up pictures");
    MD_NEW(m->sample, n, "made-up pictures");
    md_rng r = md_rng_at(0, MD_RNG_TEST, 0, 0);
    for (int64_t i = 0; i < n * side * side * 3; i++)
        m->pixels[i] = (uint8_t)md_rng_u32(&r);
    m->batch.image = MD_TENSOR(m->pixels, MD_U8, n, side, side, 3);
    m->batch.sample = m->sample;
    return MD_OK;
}

/* ---- the run ---- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(const options *o, const md_config *c, double *ms, const double *loss,
                   double flops)
{
    int n = o->steps;
    printf("{\"program\": \"md_hpc\", \"version\": \"%s\", \"case\": \"%s\", \"threads\": %d, "
           "\"batch\": %lld, \"steps\": %d, ",
           MD_VERSION, o->which->name, o->threads, (long long)c->train_batch, n);
    printf("\"ms\": [");
    for (int i = 0; i < n; i++)
        printf("%s%.1f", i ? ", " : "", ms[i]);
    qsort(ms, (size_t)n, sizeof *ms, by_value);
    double median = n % 2 ? ms[n / 2] : 0.5 * (ms[n / 2 - 1] + ms[n / 2]);
    printf("], \"images_per_second\": %.3f, \"images_per_second_median\": %.3f, "
           "\"gflops_median\": %.1f, \"loss\": [%.6f, %.6f]}\n",
           1e3 * (double)c->train_batch / ms[0], 1e3 * (double)c->train_batch / median,
           1e-6 * flops / median, loss[0], loss[n - 1]);
}

/* Everything one run holds; zero-initialised, freed in one place. */
typedef struct run {
    md_config config;
    md_method method;
    md_backend *be;
    md_comm *self;
    md_stepper *stepper;
    made_up pictures;
    double *ms, *loss;
} run;

static md_status set_up(run *r, const options *o)
{
    int n = 0;
    while (n < (int)MD_COUNT(o->which->overrides) && o->which->overrides[n])
        n++;
    md_config *c = &r->config;
    MD_TRY(md_config_init(c));
    MD_TRY(md_config_load(c, NULL, n, (char *const *)o->which->overrides));
    MD_TRY(md_backend_create("cpu", o->threads, &r->be));
    MD_TRY(md_comm_self(&r->self));
    MD_TRY(md_method_resolve(&r->method, c, NULL));
    MD_TRY(md_method_build(&r->method, c->train_batch, c->train_batch));
    MD_TRY(md_params_allocate(&r->method.params, true, true));
    md_params_initialise(&r->method.params, 0);
    MD_TRY(make_up(c, &r->pictures));
    MD_NEW(r->ms, o->steps, "timings");
    MD_NEW(r->loss, o->steps, "losses");
    return md_stepper_create(&(md_stepper_args){.config = c,
                                                .method = &r->method,
                                                .backend = r->be,
                                                .dp = r->self,
                                                .source = {&r->pictures, take, release},
                                                .steps_per_epoch = 1000,
                                                .accumulation = 1},
                             &r->stepper);
}

static md_status measure(run *r, const options *o)
{
    md_train_state state = {0};
    for (int i = 0; i < o->warmup + o->steps; i++) {
        md_step_result result;
        double start = md_now();
        MD_TRY(md_step_run(r->stepper, &state, false, &result));
        if (i >= o->warmup) {
            r->ms[i - o->warmup] = 1e3 * (md_now() - start);
            r->loss[i - o->warmup] = result.loss;
        }
    }
    md_stepper_bytes plan;
    MD_TRY(md_stepper_plan(&r->method, NULL, &plan));
    report(o, &r->config, r->ms, r->loss,
           plan.student_forward + plan.student_backward + plan.teacher_forward);
    return MD_OK;
}

static void tear_down(run *r)
{
    md_stepper_free(r->stepper);
    md_method_free(&r->method);
    md_comm_free(r->self);
    md_backend_destroy(r->be);
    md_config_free(&r->config);
    md_free(r->pictures.pixels);
    md_free(r->pictures.sample);
    md_free(r->ms);
    md_free(r->loss);
}

static md_status cmd_bench(int argc, char **argv)
{
    options o;
    run r = {0};
    MD_TRY(parse(argc, argv, &o));
    md_status st = set_up(&r, &o);
    if (st == MD_OK)
        st = measure(&r, &o);
    tear_down(&r);
    return st;
}

const md_verb md_verb_bench = {
    "bench", cmd_bench, "measure training steps on made-up pictures",
    "md_hpc bench step [--case vit_b16|small] [--threads N] [--steps N] [--warmup N]\n"
    "\n"
    "Prints one JSON line with the milliseconds of each step and images per second."};
