/* cmd_bench: measurements a user can repeat, on made-up pictures and without files. `bench step`
 * runs whole training steps (teacher and student forward, backward, clipping, AdamW) of a named
 * case; `bench ops` times every op of them by itself; `bench comm` counts what ranks send. */
#include "src/cmd_bench.h"
#include "kernels/timing/timing_backend.h"
#include "mpi/agree.h"
#include "mpi/comm_mpi.h"
#include "src/cli.h"
#include "src/rng.h"

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
    {"vit_h14",
     {"train.batch=32", "model.patch=14", "model.width=1280", "model.layers=32", "model.heads=16",
      "model.layer_scale=1e-5", "model.drop_path=0.25", "method.mask.count=102",
      "method.teacher.arch=clip_vit_l14"}},
};

static md_status choose_case(md_bench_options *o, const char *name)
{
    o->case_name = NULL;
    for (size_t k = 0; k < MD_COUNT(cases); k++) {
        if (strcmp(name, cases[k].name) != 0)
            continue;
        o->case_name = cases[k].name;
        o->case_keys = (char *const *)cases[k].overrides;
        for (o->n_case_keys = 0; o->case_keys[o->n_case_keys];)
            o->n_case_keys++;
    }
    if (!o->case_name)
        return md_usage_error("bench", "no case \"%s\"", name);
    return MD_OK;
}

static md_status whole_number(const char *option, const char *value, int least, int *out)
{
    char *end;
    long n = strtol(value, &end, 10);
    if (*end || n < least || n > 100000)
        return md_usage_error("bench", "%s %s", option, value);
    *out = (int)n;
    return MD_OK;
}

/* Names of ops, between commas. */
static md_status ops_named(const char *names, md_bench_options *o)
{
    o->some = true;
    for (const char *at = names; at; at = strchr(at, ',')) {
        at += *at == ',';
        int op = 0;
        const size_t length = strcspn(at, ",");
        while (op < MD_OP_COUNT && (strlen(md_op_name((md_op)op)) != length ||
                                    strncmp(at, md_op_name((md_op)op), length) != 0))
            op++;
        if (op == MD_OP_COUNT)
            return md_usage_error("bench", "no op \"%.*s\"", (int)length, at);
        o->only[op] = true;
    }
    return MD_OK;
}

static md_status parse(int argc, char **argv, md_bench_options *o)
{
    static const char *const whats[] = {"step", "ops", "comm"};
    *o = (md_bench_options){.steps = 5, .warmup = 2, .repeat = 1, .overrides = argv};
    MD_TRY(choose_case(o, cases[0].name));
    for (size_t i = 0; argc > 1 && i < MD_COUNT(whats); i++)
        if (strcmp(argv[1], whats[i]) == 0)
            o->what = whats[i];
    if (!o->what)
        return md_usage_error("bench", "name what to measure: step, ops or comm");
    for (int i = 2; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (argv[i][0] != '-' && strchr(argv[i], '=')) {
            o->overrides[o->n_overrides++] = argv[i];
            continue;
        }
        if (!value)
            return md_usage_error("bench", "option %s", argv[i]);
        if (strcmp(argv[i], "--threads") == 0)
            MD_TRY(whole_number(argv[i], value, 0, &o->threads));
        else if (strcmp(argv[i], "--steps") == 0)
            MD_TRY(whole_number(argv[i], value, 1, &o->steps));
        else if (strcmp(argv[i], "--warmup") == 0)
            MD_TRY(whole_number(argv[i], value, 0, &o->warmup));
        else if (strcmp(argv[i], "--repeat") == 0)
            MD_TRY(whole_number(argv[i], value, 1, &o->repeat));
        else if (strcmp(argv[i], "--only") == 0)
            MD_TRY(ops_named(value, o));
        else if (strcmp(argv[i], "--case") == 0)
            MD_TRY(choose_case(o, value));
        else
            return md_usage_error("bench", "option %s", argv[i]);
        i++;
    }
    if (o->some && strcmp(o->what, "ops") != 0)
        return md_usage_error("bench", "--only is for bench ops");
    return MD_OK;
}

/* ---- made-up pictures ---- */

static md_status take(void *context, int64_t step, int micro, const md_batch **batch, double *wait)
{
    md_bench *b = context;
    const int64_t own = b->model.method.own_images;
    const int64_t pass = (int64_t)b->topo.dp_rank * b->layout.accumulation + micro;
    (void)wait;
    for (int64_t i = 0; i < own; i++)
        b->sample[i] = step * b->layout.batch + pass * b->layout.micro + b->topo.tp_rank * own + i;
    *batch = &b->batch;
    return MD_OK;
}

static void release(void *context, const md_batch *batch)
{
    (void)context, (void)batch;
}

static md_status make_up(md_bench *b)
{
    int64_t side = b->config.image_size, n = b->model.method.own_images;
    MD_NEW(b->pixels, n * side * side * 3, "made-up pictures");
    MD_NEW(b->sample, n, "made-up pictures");
    md_rng r = md_rng_at(0, MD_RNG_TEST, 0, (uint64_t)md_comm_rank(b->world));
    for (int64_t i = 0; i < n * side * side * 3; i++)
        b->pixels[i] = (uint8_t)md_rng_u32(&r);
    b->batch.image = MD_TENSOR(b->pixels, MD_U8, n, side, side, 3);
    b->batch.sample = b->sample;
    return MD_OK;
}

/* ---- the run ---- */

static md_status load(md_bench *b, const md_bench_options *o)
{
    char *keys[64];
    int n = 0;
    for (int i = 0; i < o->n_case_keys; i++)
        keys[n++] = o->case_keys[i];
    /* Skipping would spread each op over as many shapes as there are numbers of images. */
    if (strcmp(o->what, "ops") == 0)
        keys[n++] = "model.drop_path_mode=mask";
    for (int i = 0; i < o->n_overrides && n < (int)MD_COUNT(keys); i++)
        keys[n++] = o->overrides[i];
    MD_TRY(md_config_init(&b->config));
    MD_TRY(md_config_load(&b->config, NULL, n, keys));
    if (md_method_needs_weights(&b->config) && strcmp(b->config.teacher_arch, "file") == 0)
        MD_FAIL(MD_ERR_CONFIG, "bench reads no weights: set method.teacher.arch to the name of a "
                               "teacher, or method.teacher.kind = pixel");
    return md_batch_layout_make(&b->config, md_comm_size(b->world), &b->layout);
}

static md_status make(md_bench *b, const md_bench_options *o)
{
    const md_config *c = &b->config;
    md_teacher_info info;
    char hash[17];
    const bool named = md_method_needs_weights(c);
    if (named)
        MD_TRY(md_teacher_info_get(c, true, &info, hash));
    MD_TRY(md_model_make(c, named ? &info : NULL, &b->topo, &b->layout, &b->model));
    MD_TRY(md_model_allocate(c, b->be, &b->model));
    md_params_initialise(&b->model.method.teacher_params, 1);
    MD_TRY(md_params_store(&b->model.method.teacher_params));
    MD_TRY(make_up(b));
    MD_NEW(b->ms, o->steps, "timings");
    MD_NEW(b->loss, o->steps, "losses");
    return md_stepper_create(&(md_stepper_args){.config = c,
                                                .method = &b->model.method,
                                                .backend = b->be,
                                                .topo = &b->topo,
                                                .shard = &b->model.shard,
                                                .source = {b, take, release},
                                                .steps_per_epoch = 1000,
                                                .accumulation = b->layout.accumulation},
                             &b->stepper);
}

static md_status set_up(md_bench *b, const md_bench_options *o)
{
    MD_TRY(md_agree(b->world, load(b, o)));
    const md_topo_args grid = {.tensor = b->layout.tp,
                               .across_nodes = b->config.parallel_tensor_across_nodes};
    MD_TRY(md_topo_create(b->world, &grid, &b->topo));
    if (o->threads > 0)
        b->config.threads = o->threads;
    MD_TRY(md_agree(b->world, md_model_backend(&b->config, &b->topo, &b->be)));
    MD_TRY(md_topo_operands(&b->topo, b->be, b->config.parallel_comm));
    if (b->config.cuda_tune)
        md_backend_tune(b->be);
    if (strcmp(o->what, "ops") == 0) {
        md_backend *timed;
        if (md_comm_size(b->world) > 1)
            MD_FAIL(MD_ERR_CONFIG, "bench ops runs on one rank");
        MD_TRY(md_timing_create(b->be, o->repeat, o->some ? o->only : NULL, &timed));
        b->be = timed;
    }
    return md_agree(b->world, make(b, o));
}

md_status md_bench_steps(md_bench *b, int steps, bool keep, md_step_result *last)
{
    for (int i = 0; i < steps; i++) {
        double start = md_now();
        MD_TRY(md_step_run(b->stepper, &b->state, false, last));
        if (keep) {
            b->ms[i] = 1e3 * (md_now() - start);
            b->loss[i] = last->loss;
        }
    }
    md_step_settle(b->stepper);
    return MD_OK;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* flops: of a step, as the model asks for them, and as they were run. */
static void report(md_bench *b, const md_bench_options *o, double flops, double executed)
{
    int n = o->steps;
    const double batch = (double)b->layout.batch;
    printf("{\"program\": \"md_hpc\", \"version\": \"%s\", \"case\": \"%s\", \"data\": %d, "
           "\"tensor\": %d, \"sequence\": %s, \"zero\": %s, \"recompute\": %d, \"threads\": %d, "
           "\"batch\": %.0f, \"steps\": %d, ",
           MD_VERSION, o->case_name, b->layout.dp, b->layout.tp,
           b->model.method.split.sequence ? "true" : "false",
           b->model.shard.zero ? "true" : "false",
           md_vit_recomputed(&b->model.method.student_vit.spec), o->threads, batch, n);
    printf("\"ms\": [");
    for (int i = 0; i < n; i++)
        printf("%s%.1f", i ? ", " : "", b->ms[i]);
    qsort(b->ms, (size_t)n, sizeof *b->ms, by_value);
    double median = n % 2 ? b->ms[n / 2] : 0.5 * (b->ms[n / 2 - 1] + b->ms[n / 2]);
    printf("], \"images_per_second\": %.3f, \"images_per_second_median\": %.3f, "
           "\"gflops_median\": %.1f, \"gflops_executed_median\": %.1f, \"loss\": [%.6f, %.6f]}\n",
           1e3 * batch / b->ms[0], 1e3 * batch / median, 1e-6 * flops / median,
           1e-6 * executed / median, b->loss[0], b->loss[n - 1]);
}

static md_status bench_step(md_bench *b, const md_bench_options *o)
{
    md_step_result last;
    md_stepper_bytes plan;
    MD_TRY(md_bench_steps(b, o->warmup, false, &last));
    MD_TRY(md_bench_steps(b, o->steps, true, &last));
    MD_TRY(md_agree(b->world, md_stepper_plan(&b->model.method, NULL, &plan)));
    const double passes = (double)b->layout.accumulation * b->layout.ranks; /* all ranks do alike */
    const double flops = plan.student_forward + plan.student_backward + plan.teacher_forward;
    if (md_comm_rank(b->world) == 0)
        report(b, o, flops * passes,
               (flops + plan.student_recomputed - plan.student_skipped) * passes);
    return MD_OK;
}

static void tear_down(md_bench *b)
{
    md_stepper_free(b->stepper);
    md_model_free(&b->model);
    md_topo_free(&b->topo);
    md_backend_destroy(b->be);
    md_config_free(&b->config);
    md_free(b->pixels);
    md_free(b->sample);
    md_free(b->ms);
    md_free(b->loss);
}

static md_status cmd_bench(int argc, char **argv)
{
    md_bench_options o;
    md_bench b = {0};
    MD_TRY(parse(argc, argv, &o));
    MD_TRY(md_mpi_start(&argc, &argv, &b.world));
    md_status st = set_up(&b, &o);
    if (st == MD_OK)
        st = strcmp(o.what, "step") == 0  ? bench_step(&b, &o)
             : strcmp(o.what, "ops") == 0 ? md_bench_ops(&b, &o)
                                          : md_bench_comm(&b, &o);
    tear_down(&b);
    md_cli_report(st);
    md_mpi_stop(b.world);
    return st;
}

const md_verb md_verb_bench = {
    "bench", cmd_bench,
    "measure training steps and their ops, or count what ranks send, on made-up pictures",
    "[mpirun -np N] md_hpc bench step|ops|comm [--case vit_b16|small|vit_h14] [--threads N]\n"
    "                       [--steps N] [--warmup N] [--repeat N] [--only OP,...] [key=value ...]\n"
    "\n"
    "step  one JSON line with the milliseconds of each step and images per second\n"
    "ops   a line for each op and shape: time, share, bytes and FLOP a second; every op is issued\n"
    "      --repeat times and waited for (more than once: the numbers trained on are nonsense);\n"
    "      with --only these ops alone are, so that many repetitions take little time, and\n"
    "      shares and sum are of these;\n"
    "      drop path skips nothing here, unless model.drop_path_mode says so\n"
    "comm  bytes that rank 0 sends in a step, by group of ranks, beside what formulas predict\n"
    "      where drop path skips nothing, and when each gradient bucket was started\n"
    "Keys: parallel.tensor, parallel.sequence, parallel.zero, train.batch and so on.\n"
    "With cuda.tune each rank takes the algorithms that it finds fastest."};
