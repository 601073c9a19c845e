/* cmd_plan: what a run will need, worked out from the config alone: no MPI, no GPU, no data. The
 * graphs are built as for training and run on the plan backend, which has no memory. */
#include "src/cli.h"
#include "src/footprint.h"
#include "src/volume.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct options {
    const char *config;
    int ranks;
    int64_t images;
    double tflops, memory_gib;
    int n_overrides;
    char **overrides;
} options;

static md_status positive(const char *option, const char *text, double *out)
{
    char *end;
    *out = text ? strtod(text, &end) : 0;
    if (!text || *end || !(*out > 0) || *out > 1e15)
        return md_usage_error("plan", "%s needs a positive number", option);
    return MD_OK;
}

static md_status parse(int argc, char **argv, options *o)
{
    double ranks = 1, images = 1281167; /* ImageNet-1k's training split */
    *o = (options){.overrides = argv};
    for (int i = 1; i < argc; i++) {
        double *number = strcmp(argv[i], "--ranks") == 0    ? &ranks
                         : strcmp(argv[i], "--images") == 0 ? &images
                         : strcmp(argv[i], "--tflops") == 0 ? &o->tflops
                         : strcmp(argv[i], "--memory") == 0 ? &o->memory_gib
                                                            : NULL;
        if (number)
            MD_TRY(positive(argv[i], i + 1 < argc ? argv[i + 1] : NULL, number));
        if (number)
            i++;
        else if (argv[i][0] == '-')
            return md_usage_error("plan", "option %s", argv[i]);
        else if (!o->config && !strchr(argv[i], '='))
            o->config = argv[i];
        else
            o->overrides[o->n_overrides++] = argv[i];
    }
    if (!o->config)
        return md_usage_error("plan", "which config file?");
    if (ranks != floor(ranks) || ranks > 1e6 || images != floor(images))
        return md_usage_error("plan", "--ranks and --images need whole numbers");
    o->ranks = (int)ranks;
    o->images = (int64_t)images;
    return MD_OK;
}

typedef struct plan {
    md_config config;
    md_teacher_info info;
    const md_teacher_info *teacher; /* &info where the method has one */
    md_loader_args loader;
    int64_t images;     /* of the image store, or assumed */
    size_t index_bytes; /* of the store's index, shared by the ranks of a node */
    md_batch_layout layout;
    md_topo topo;
    md_model model;
    md_backend *be;
    md_stepper_bytes step;
    md_viewer_bytes evaluation;
    double nominal, executed; /* FLOP of one image: the whole model, and what is run on average */
    int64_t per_epoch, steps;
} plan;

/* ImageNet-1k's largest file and picture (bytes and pixels), and its validation images, where the
 * store is not at hand. */
enum { ASSUMED_BYTES = 15800000, ASSUMED_PIXELS = 32000000, ASSUMED_JUDGED = 50000 };

/* A split where its store is at hand; else *out stays as it is. */
static md_status look_at_split(const char *path, const char *split, bool hdf5, md_source *out)
{
    md_dataset *d;
    if (!*path || access(path, R_OK) != 0)
        return MD_OK;
    MD_TRY(md_dataset_open(path, split, NULL, &d));
    *out = md_dataset_source(d, hdf5);
    md_dataset_close(d);
    return MD_OK;
}

static md_status look_at_data(plan *p, const options *o)
{
    const md_config *c = &p->config;
    md_loader_args *a = &p->loader;
    *a = (md_loader_args){
        .source = {.count = o->images, .max_bytes = ASSUMED_BYTES, .max_pixels = ASSUMED_PIXELS},
        .dp_size = p->layout.dp,
        .tp_size = p->layout.tp,
        .micro_batch = p->layout.micro};
    MD_TRY(look_at_split(c->data_train, c->data_split, strcmp(c->data_reader, "hdf5") == 0,
                         &a->source));
    md_loader_configure(a, c, p->model.method.teacher_image);
    p->images = a->source.count;
    p->index_bytes = md_dataset_index_bytes(p->images);
    return MD_OK;
}

/* The convention for training FLOPs: 3 x student forward + teacher forward, with every token in
 * every block, whatever the program leaves out because the loss does not depend on it. */
static md_status count_flops(plan *p)
{
    md_config *c = &p->config;
    md_method whole;
    md_stepper_bytes s;
    const double share =
        (double)p->layout.micro / p->layout.tp; /* images' worth of a rank's pass */
    p->executed = (p->step.student_forward + p->step.student_backward + p->step.teacher_forward +
                   p->step.student_recomputed - p->step.student_skipped) /
                  share;
    char chosen[sizeof c->model_last_block];
    memcpy(chosen, c->model_last_block, sizeof chosen);
    snprintf(c->model_last_block, sizeof c->model_last_block, "all");
    md_status st = md_method_resolve(&whole, c, p->teacher, NULL);
    if (st == MD_OK)
        st = md_method_build(&whole, 1, 1);
    if (st == MD_OK)
        st = md_stepper_plan(&whole, NULL, &s);
    md_method_free(&whole);
    memcpy(c->model_last_block, chosen, sizeof chosen);
    if (st == MD_OK)
        p->nominal = 3 * s.student_forward + s.teacher_forward;
    return st;
}

static md_status work_out(plan *p, const options *o)
{
    char path[MD_CONFIG_STR], hash[17];
    md_config *c = &p->config;
    MD_TRY(md_config_init(c));
    MD_TRY(md_config_find(o->config, path, sizeof path));
    MD_TRY(md_config_load(c, path, o->n_overrides, o->overrides));
    MD_TRY(md_batch_layout_make(c, o->ranks, &p->layout));
    MD_TRY(md_teacher_info_get(c, true, &p->info, hash));
    p->teacher = md_method_needs_weights(c) ? &p->info : NULL;
    MD_TRY(md_topo_plan(o->ranks, p->layout.tp, &p->topo));
    MD_TRY(md_model_make(c, p->teacher, &p->topo, &p->layout, &p->model));
    const bool cuda = strcmp(c->backend, "cuda") == 0;
    MD_TRY(md_backend_make(&(md_backend_args){.name = cuda ? "cuda" : "cpu",
                                              .threads = (int)c->threads,
                                              .compute = md_config_compute(c),
                                              .planning = true},
                           &p->be));
    MD_TRY(md_stepper_plan(&p->model.method, p->be, &p->step));
    MD_TRY(count_flops(p));
    MD_TRY(look_at_data(p, o));
    if (p->images < c->train_batch)
        MD_FAIL(MD_ERR_CONFIG, "train.batch = %lld is more than the %lld images there are",
                (long long)c->train_batch, (long long)p->images);
    if (c->evaluate_every > 0) {
        const md_evaluator_args args =
            md_evaluator_of_run(c, &p->model.method, p->be, &p->topo, p->layout.micro);
        md_source judged = {

            .count = ASSUMED_JUDGED, .max_bytes = ASSUMED_BYTES, .max_pixels = ASSUMED_PIXELS};
        MD_TRY(look_at_split(args.data, args.split, false, &judged));
        MD_TRY(md_evaluator_plan(&args, &judged, &p->evaluation));
        p->index_bytes += md_dataset_index_bytes(judged.count);
    }
    p->per_epoch = md_epoch_steps(p->images, c->train_batch);
    p->steps = md_total_steps(c, p->per_epoch);
    return MD_OK;
}

static void report_work(const plan *p)
{
    const md_params *student = &p->model.method.params;
    const md_batch_layout *l = &p->layout;
    printf("parameters                 %lld (student and head), %lld (teacher)\n",
           (long long)md_params_total(student),
           (long long)md_params_total(&p->model.method.teacher_params));
    printf("steps                      %lld (%lld an epoch of %lld images, %g epochs)\n",
           (long long)p->steps, (long long)p->per_epoch, (long long)p->images,
           p->config.train_epochs);
    printf("ranks                      %d = data %d x tensor %d%s%s\n", l->ranks, l->dp, l->tp,
           p->model.method.split.sequence ? ", sequence" : "",
           p->model.shard.zero ? ", ZeRO-1" : "");
    printf("batch                      %lld = %d data-parallel ranks x %d passes x %lld images\n",
           (long long)l->batch, l->dp, l->accumulation, (long long)l->micro);
    printf(
        "compute                    %.1f GFLOP an image (3 x student forward + teacher forward), "
        "%.4g FLOP in all\n",
        1e-9 * p->nominal, p->nominal * (double)l->batch * (double)p->steps);
    printf("  really run               %.1f GFLOP an image (model.last_block = %s, drop path %s",
           1e-9 * p->executed, md_method_chosen_last(&p->model.method) ? "chosen" : "all",
           p->step.student_skipped > 0 ? "skips" : "skips nothing");
    const int again = md_vit_recomputed(&p->model.method.student_vit.spec);
    if (again > 0)
        printf(", %d blocks run again", again);
    puts(")");
}

static void report_traffic(const plan *p)
{
    md_volume v = md_volume_predict(&p->model, &p->layout);
    printf("sent by a rank and step    %.3f GB: gradients%s %.3f, activations %.3f, targets %.3f, "
           "pictures %.3f\n",
           1e-9 * (v.gradients_dp + v.gradients_all + v.activations + v.targets + v.pictures),
           p->model.shard.zero ? " and parameters" : "", 1e-9 * (v.gradients_dp + v.gradients_all),
           1e-9 * v.activations, 1e-9 * v.targets, 1e-9 * v.pictures);
}

/* Activations cross the tensor-parallel group for every image; gradients and parameters cross the
 * data-parallel one once a step. */
static void report_advice(const plan *p)
{
    const double alone = 2.0 * (p->layout.ranks - 1) / p->layout.ranks * 4.0 *
                         (double)md_params_total(&p->model.method.params);
    if (p->layout.tp > 1 && p->layout.batch % p->layout.ranks == 0)
        printf(
            "advice                     parallel.tensor = 1 with parallel.zero = 1 sends %.3f GB, "
            "beside the backward pass and the teacher; tensor parallelism pays where a model does "
            "not fit or ranks outnumber images\n",
            1e-9 * alone);
    else if (p->layout.dp > 1 && !p->model.shard.zero)
        printf(
            "advice                     parallel.zero = 1 sends the same bytes and keeps 1/%d of "
            "the moments\n",
            p->layout.dp);
}

/* limit: of what holds the operands. */
static void report_memory(const plan *p, double limit_gib)
{
    char text[2048];
    md_footprint f;
    md_footprint_make(
        &(md_footprint_args){.model = &p->model,
                             .topo = &p->topo,
                             .be = p->be,
                             .step = &p->step,
                             .loader = &p->loader,
                             .index_bytes = p->index_bytes,
                             .evaluation = p->config.evaluate_every > 0 ? &p->evaluation : NULL},
        &f);
    if (f.device) {
        md_memory_map_print(&f.operands, "memory of a GPU", text, sizeof text);
        fputs(text, stdout);
    }
    md_memory_map_print(&f.host, f.device ? "memory of a rank on the host" : "memory of a rank",
                        text, sizeof text);
    const double most = f.device ? f.operands.total : f.host.total;
    const bool fits = most <= limit_gib * 1073741824.0;
    fputs(text, stdout);
    if (limit_gib > 0)
        printf("  %s\n", fits ? "fits" : "does NOT fit");
    if (limit_gib > 0 && !fits && f.device) {
        md_footprint_changes(&p->config, p->teacher, p->layout.ranks, limit_gib * 1073741824.0,
                             text, sizeof text);
        fputs(text, stdout);
    }
}

static void report(const plan *p, const options *o)
{
    const double params = (double)md_params_total(&p->model.method.params);
    double step_flops = p->nominal * (double)p->layout.batch / (double)p->layout.ranks;
    report_work(p);
    report_traffic(p);
    const double bytes = (p->config.optim_ema > 0 ? 16.0 : 12.0) * params; /* values and moments */
    printf("checkpoint                 %.0f bytes (%.3f GB)\n", bytes, 1e-9 * bytes);
    report_memory(p, o->memory_gib);
    report_advice(p);
    if (o->tflops > 0)
        printf("time                       %.3f s a step, %.2f days in all at %g TFLOP/s a rank\n",
               step_flops / (1e12 * o->tflops),
               step_flops / (1e12 * o->tflops) * (double)p->steps / 86400.0, o->tflops);
}

static md_status cmd_plan(int argc, char **argv)
{
    options o;
    plan p = {0};
    MD_TRY(parse(argc, argv, &o));
    md_status st = work_out(&p, &o);
    if (st == MD_OK)
        report(&p, &o);
    md_model_free(&p.model);
    md_topo_free(&p.topo);
    md_backend_destroy(p.be);
    md_config_free(&p.config);
    return st;
}

const md_verb md_verb_plan = {
    "plan", cmd_plan, "what a run will need: memory, FLOPs, steps, bytes",
    "md_hpc plan FILE.cfg [--ranks N] [--images N] [--tflops X] [--memory GIB] [key=value ...]\n"
    "\n"
    "Needs no MPI, no GPU, no data and no weights (method.teacher.arch names the teacher).\n"
    "--ranks   ranks in all, of which parallel.tensor share a model (default 1)\n"
    "--images  images of an epoch where data.train is not there (default ImageNet-1k's)\n"
    "--tflops  sustained TFLOP/s of a rank, as `md_hpc bench step` reports: adds the time\n"
    "--memory  GiB a rank, or with backend=cuda its GPU, has: adds whether it fits; and where a "
    "GPU's\n"
    "          are not enough, which changes would lessen it"};
