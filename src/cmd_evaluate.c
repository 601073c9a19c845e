/* cmd_evaluate: `md_hpc evaluate`: how good a trained model is. */
#include "io/publish.h"
#include "mpi/agree.h"
#include "mpi/comm_mpi.h"
#include "src/cli.h"
#include "src/features.h"
#include "src/finetune.h"
#include "src/knn.h"
#include "src/log.h"
#include "src/probe.h"
#include "src/setup.h"
#include "src/signals.h"
#include "src/watchdog.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DEFAULT_IMAGES                                                         \
    64 /* of a pass, where neither evaluate.batch nor train.micro_batch is set \
        */

/* In the order of the key evaluate.kind. */
typedef enum kind { ACCURACY, KNN, FEATURES, PROBE } kind;

/* Zero at first, so that tear_down can end it from any point of set_up. */
typedef struct job {
    md_config config;
    md_comm *world;
    md_topo topo;
    md_backend *be;
    md_method method;
    md_evaluator *test, *train;
    md_accuracy accuracy; /* kinds accuracy, knn */
    md_probe_rule rule;   /* kind probe */
    int64_t probe_images;
    md_probe_result probe;
    char dir[MD_CONFIG_STR];    /* run directory */
    char output[MD_CONFIG_STR]; /* files without their ending */
    char probe_dir[MD_CONFIG_STR];
    char encoder[MD_PRETRAINED_IDENTITY]; /* kind probe */
    kind kind;
} job;

static md_status load_config(job *j, int argc, char **argv)
{
    char path[MD_CONFIG_STR], run_dir[MD_CONFIG_STR + 16];
    struct stat info;
    MD_TRY(md_config_init(&j->config));
    if (argc < 2)
        return md_usage_error("evaluate", "which run directory or config file?");
    const bool is_run = stat(argv[1], &info) == 0 && S_ISDIR(info.st_mode);
    const char **args = md_alloc((size_t)argc * sizeof *args, "arguments");
    if (!args)
        return MD_ERR_MEMORY;
    int n = 0;
    if (is_run) {
        snprintf(path, sizeof path, "%s/config.cfg", argv[1]);
        snprintf(run_dir, sizeof run_dir, "run.dir=%s", argv[1]);
        args[n++] = run_dir;
    }
    for (int i = 2; i < argc; i++)
        args[n++] = argv[i];
    md_status st = is_run ? MD_OK : md_config_find(argv[1], path, sizeof path);
    if (st == MD_OK)
        st = md_config_load(&j->config, path, n, (char *const *)(uintptr_t)args);
    md_free((void *)args);
    MD_TRY(st);
    MD_TRY(md_watch_start(j->config.hang_seconds));
    md_log_set((md_log_level)md_config_choice("log.level", j->config.log_level));
    return MD_OK;
}

/* A probe is trained once for all splits that are judged, and may be stopped. */
static md_status prepare_probe(job *j)
{
    const md_config *c = &j->config;
    const char *recipe = c->evaluate_probe_recipe;
    const int n = *c->evaluate_output
                      ? snprintf(j->probe_dir, sizeof j->probe_dir, "%s.probe", c->evaluate_output)
                      : snprintf(j->probe_dir, sizeof j->probe_dir, "%s/probe-%s", j->dir, recipe);
    if ((size_t)n >= sizeof j->probe_dir)
        MD_FAIL(MD_ERR_CREATE, "the path is too long: %s.probe", c->evaluate_output);
    md_signals_catch();
    return MD_OK;
}

/* What is measured decides which model is made: a classifier, or an encoder to take features from;
 * a classifier's own features where the run trained one. */
static md_status choose(job *j)
{
    md_config *c = &j->config;
    j->kind = (kind)md_config_choice("evaluate.kind", c->evaluate_kind);
    const bool classifier = strcmp(c->task, "finetune") == 0;
    if (j->kind == ACCURACY && !classifier)
        MD_FAIL(MD_ERR_CONFIG, "evaluate.kind = accuracy needs a classifier (task = \"finetune\"); "
                               "for a pretrained model use evaluate.kind=knn or probe");
    if (!*c->evaluate_data && !*c->data_train)
        MD_FAIL(MD_ERR_CONFIG, "neither evaluate.data nor data.train is set: give the image store "
                               "to evaluate on (evaluate.data=FILE.h5)");
    if (j->kind == KNN && !*c->data_train)
        MD_FAIL(MD_ERR_CONFIG, "evaluate.kind = knn needs data.train: the images that vote");
    if (j->kind == PROBE && !*c->data_train)
        MD_FAIL(MD_ERR_CONFIG, "evaluate.kind = probe needs data.train: the images to learn from");
    j->rule = md_probe_rule_make(c);
    if (j->kind == PROBE && !j->rule.blocks && strcmp(c->evaluate_feature, "logits") == 0)
        MD_FAIL(MD_ERR_CONFIG, "a probe learns from features, not from evaluate.feature = logits");
    if (!classifier)
        snprintf(c->task, sizeof c->task, "features");
    md_setup_run_dir(c, j->dir);
    if (*c->evaluate_output)
        snprintf(j->output, sizeof j->output, "%s", c->evaluate_output);
    else if ((size_t)snprintf(j->output, sizeof j->output, "%s/evaluation-%s-%s", j->dir,
                              c->evaluate_kind, c->evaluate_split) >= sizeof j->output)
        MD_FAIL(MD_ERR_CREATE, "the path of the run directory is too long: %s", j->dir);
    return j->kind == PROBE ? prepare_probe(j) : MD_OK;
}

static md_status make_model(job *j)
{
    const md_topo *t = &j->topo;
    MD_TRY(md_method_resolve(&j->method, &j->config, NULL,
                             &(md_method_split){.tp = t->op_tp,
                                                .tp_rank = t->tp_rank,
                                                .tp_size = t->tp_size,
                                                .align = md_shard_align(t, false)}));
    return md_params_allocate(&j->method.params, j->be, false);
}

/* Collective(world). */
static md_status load_weights(job *j)
{
    const md_config *c = &j->config;
    const bool other = *c->evaluate_from != 0;
    if (strcmp(c->evaluate_from, "none") == 0) {
        md_params_initialise(&j->method.params, (uint64_t)c->run_seed);
        snprintf(j->encoder, sizeof j->encoder, "none");
        return md_agree(j->world, md_params_store(&j->method.params));
    }
    return md_finetune_load(j->world,
                            &(md_start_args){.key = other ? "evaluate.from" : "run.dir",
                                             .path = other ? c->evaluate_from : j->dir,
                                             .whole = true,
                                             .ema = c->evaluate_ema,
                                             .identity = j->encoder},
                            &j->method);
}

static md_sight sight_of(const job *j)
{
    const md_config *c = &j->config;
    static const md_sight feature[] = {MD_SIGHT_MEAN, MD_SIGHT_CLS, MD_SIGHT_LOGITS};
    if (j->kind == ACCURACY)
        return MD_SIGHT_LOGITS;
    if (j->kind == PROBE && j->rule.blocks)
        return MD_SIGHT_BLOCKS;
    return feature[md_config_choice("evaluate.feature", c->evaluate_feature)];
}

/* Of a pass. */
static int64_t images_of(const job *j)
{
    const md_config *c = &j->config;
    return md_evaluator_images(&j->topo, c->evaluate_batch      ? c->evaluate_batch
                                         : c->train_micro_batch ? c->train_micro_batch
                                                                : DEFAULT_IMAGES);
}

typedef struct view {
    const char *data, *split;
    int64_t images, limit;
} view;

/* Collective(world). */
static md_status make_evaluator(job *j, const view *v, md_evaluator **out)
{
    const md_config *c = &j->config;
    return md_evaluator_create(&(md_evaluator_args){.config = c,
                                                    .method = &j->method,
                                                    .backend = j->be,
                                                    .topo = &j->topo,
                                                    .data = v->data,
                                                    .split = v->split,
                                                    .limit = v->limit,
                                                    .sight = sight_of(j),
                                                    .images = v->images},
                               out);
}

/* Collective(world). The images that vote, or are learned from. */
static md_status make_train(job *j)
{
    const md_config *c = &j->config;
    view v = {c->data_train, c->data_split, images_of(j), c->evaluate_knn_images};
    if (j->kind != KNN && j->kind != PROBE)
        return MD_OK;
    if (j->kind == PROBE) {
        MD_TRY(md_agree(j->world, md_probe_images(&j->rule, &j->topo, v.images, &j->probe_images)));
        v.images = j->probe_images;
        v.limit = 0;
    }
    return make_evaluator(j, &v, &j->train);
}

static md_status set_up(job *j, int argc, char **argv)
{
    md_comm *w = j->world;
    const md_config *c = &j->config;
    md_phase("setup.config");
    md_status st = load_config(j, argc, argv);
    MD_TRY(md_agree(w, st == MD_OK ? choose(j) : st));
    MD_TRY(md_setup_same_config(w, c));
    MD_TRY(md_topo_create(w,
                          &(md_topo_args){.tensor = (int)c->parallel_tensor,
                                          .across_nodes = c->parallel_tensor_across_nodes},
                          &j->topo));
    MD_TRY(md_agree(w, md_model_backend(c, &j->topo, &j->be)));
    MD_TRY(md_topo_operands(&j->topo, j->be, c->parallel_comm));
    MD_TRY(md_agree(w, make_model(j)));
    md_phase("setup.weights");
    MD_TRY(load_weights(j));
    md_phase("setup.data");
    MD_TRY(make_evaluator(j,
                          &(view){*c->evaluate_data ? c->evaluate_data : c->data_train,
                                  c->evaluate_split, images_of(j), 0},
                          &j->test));
    return make_train(j);
}

static void tear_down(job *j)
{
    md_accuracy_free(&j->accuracy);
    md_probe_result_free(&j->probe);
    md_evaluator_free(j->test);
    md_evaluator_free(j->train);
    md_method_free(&j->method);
    md_topo_free(&j->topo);
    md_backend_destroy(j->be);
    md_config_free(&j->config);
}

static md_status measure(job *j)
{
    const md_config *c = &j->config;
    if (j->kind == FEATURES) {
        const bool logits = strcmp(c->evaluate_feature, "logits") == 0;
        char path[MD_CONFIG_STR + 16];
        snprintf(path, sizeof path, "%s.safetensors", j->output);
        return md_features_write(j->test, &j->topo, c, logits ? "logits" : "features", path);
    }
    if (j->kind == ACCURACY)
        return md_evaluate_accuracy(j->test, md_class_subset_find(c->evaluate_classes),
                                    &j->accuracy);
    if (j->kind == PROBE)
        return md_probe_accuracy(&(md_probe_args){.config = c,
                                                  .train = j->train,
                                                  .test = j->test,
                                                  .backend = j->be,
                                                  .topo = &j->topo,
                                                  .rule = j->rule,
                                                  .dir = j->probe_dir,
                                                  .encoder = j->encoder,
                                                  .train_images = j->probe_images},
                                 &j->probe);
    return md_knn_accuracy(&(md_knn_args){.train = j->train,
                                          .test = j->test,
                                          .backend = j->be,
                                          .topo = &j->topo,
                                          .k = (int)c->evaluate_knn_k,
                                          .temperature = c->evaluate_knn_temperature},
                           &j->accuracy);
}

/* ---- what came out; rank 0 ---- */

/* What tables are made of: of a probe, its best head. */
static const md_accuracy *accuracy_of(const job *j)
{
    return j->kind == PROBE ? &j->probe.head[j->probe.best] : &j->accuracy;
}

static void put_hits(json_t *o, const md_hits *h)
{
    json_object_set_new(o, "top1_hits", json_integer(h->top1));
    json_object_set_new(o, "top5_hits", json_integer(h->top5));
    json_object_set_new(o, "top1", json_real(md_percent(h->top1, h->images)));
    json_object_set_new(o, "top5", json_real(md_percent(h->top5, h->images)));
}

/* How the probe was trained, and what each of its heads says. */
static void put_probe(json_t *o, const job *j)
{
    const md_probe_rule *r = &j->rule;
    json_object_set_new(o, "recipe", json_string(j->config.evaluate_probe_recipe));
    json_object_set_new(o, "epochs", json_integer(r->epochs));
    json_object_set_new(o, "batch", json_integer(r->batch));
    json_object_set_new(o, "learning_rate", json_real(r->lr));
    if (!r->blocks) {
        json_object_set_new(o, "feature", json_string(j->config.evaluate_feature));
        json_object_set_new(o, "train_loss", json_real(j->probe.train_loss[0]));
        return;
    }
    json_t *blocks = json_array();
    for (int k = 0; k < j->probe.heads; k++) {
        json_t *b = json_object();
        json_object_set_new(b, "block", json_integer(k));
        put_hits(b, &j->probe.head[k].all);
        json_object_set_new(b, "loss", json_real(j->probe.head[k].loss));
        json_object_set_new(b, "train_loss", json_real(j->probe.train_loss[k]));
        json_array_append_new(blocks, b);
    }
    json_object_set_new(o, "best_block", json_integer(j->probe.best));
    json_object_set_new(o, "blocks", blocks);
}

static json_t *result_json(const job *j)
{
    const md_config *c = &j->config;
    const md_accuracy *a = accuracy_of(j);
    json_t *o = json_object();
    json_object_set_new(o, "kind", json_string(c->evaluate_kind));
    json_object_set_new(o, "data",
                        json_string(*c->evaluate_data ? c->evaluate_data : c->data_train));
    json_object_set_new(o, "split", json_string(c->evaluate_split));
    json_object_set_new(o, "from", json_string(*c->evaluate_from ? c->evaluate_from : j->dir));
    json_object_set_new(o, "images", json_integer(a->all.images));
    json_object_set_new(o, "classes", json_integer(a->classes));
    put_hits(o, &a->all);
    if (j->kind == KNN) {
        json_object_set_new(o, "k", json_integer(c->evaluate_knn_k));
        json_object_set_new(o, "temperature", json_real(c->evaluate_knn_temperature));
        json_object_set_new(o, "feature", json_string(c->evaluate_feature));
    } else {
        json_object_set_new(o, "loss", json_real(a->loss));
    }
    if (j->kind == PROBE)
        put_probe(o, j);
    return o;
}

static bool print_json(const job *j, FILE *f)
{
    json_t *o = result_json(j);
    const bool whole = json_dumpf(o, f, JSON_INDENT(2) | JSON_REAL_PRECISION(17)) == 0;
    json_decref(o);
    return whole && fputc('\n', f) != EOF;
}

/* A class's name in quotes, as RFC 4180 has it. */
static void print_name(const char *name, FILE *f)
{
    fputc('"', f);
    for (; *name; name++) {
        if (*name == '"')
            fputc('"', f);
        fputc(*name, f);
    }
    fputc('"', f);
}

static bool print_csv(const job *j, FILE *f)
{
    const md_dataset *d = md_evaluator_data(j->test);
    fprintf(f, "class,name,images,top1_hits,top5_hits,top1,top5\n");
    const md_accuracy *a = accuracy_of(j);
    for (int i = 0; i < a->classes; i++) {
        const md_hits *h = &a->by_class[i];
        fprintf(f, "%d,", i);
        print_name(md_dataset_class_name(d, i), f);
        fprintf(f, ",%lld,%lld,%lld,%.4f,%.4f\n", (long long)h->images, (long long)h->top1,
                (long long)h->top5, md_percent(h->top1, h->images), md_percent(h->top5, h->images));
    }
    return !ferror(f);
}

/* A whole file at any moment. */
static md_status write_file(const job *j, const char *ending, bool (*print)(const job *, FILE *))
{
    char path[MD_CONFIG_STR + 16], part[MD_CONFIG_STR + 32];
    snprintf(path, sizeof path, "%s.%s", j->output, ending);
    snprintf(part, sizeof part, "%s.partial", path);
    FILE *f = fopen(part, "w");
    if (!f)
        MD_FAIL(MD_ERR_CREATE, "cannot write %s: %s", part, strerror(errno));
    const bool whole = print(j, f);
    if (fclose(f) == 0 && whole)
        return md_publish(part, path);
    md_status st = md_error_set(MD_ERR_IO, "cannot write %s: %s", part, strerror(errno));
    unlink(part);
    return st;
}

static void print_blocks(const job *j)
{
    printf("\n%-10s %8s %9s\n", "block", "top-1 %", "top-5 %");
    for (int k = 0; k < j->probe.heads; k++) {
        const md_hits *h = &j->probe.head[k].all;
        printf("%-10d %8.2f %9.2f%s\n", k, md_percent(h->top1, h->images),
               md_percent(h->top5, h->images), k == j->probe.best ? "  best" : "");
    }
}

/* Images that a probe has learned from, each as often as it was seen. */
static int64_t learned(const job *j)
{
    if (j->kind != PROBE)
        return 0;
    return j->rule.epochs * j->rule.batch *
           md_epoch_steps(md_evaluator_count(j->train), j->rule.batch);
}

static md_status report(const job *j, double seconds)
{
    const md_config *c = &j->config;
    if (j->kind == FEATURES) {
        printf("%s.safetensors: %lld images, %d values each\n", j->output,
               (long long)md_evaluator_count(j->test), md_evaluator_width(j->test));
        return MD_OK;
    }
    const md_accuracy *a = accuracy_of(j);
    const md_hits *h = &a->all;
    MD_TRY(write_file(j, "json", print_json));
    MD_TRY(write_file(j, "csv", print_csv));
    printf("\n%-10s %-28s %8s %8s %8s %9s\n", "kind", "split", "images", "classes", "top-1 %",
           "top-5 %");
    printf("%-10s %-28s %8lld %8d %8.2f %9.2f\n", c->evaluate_kind, c->evaluate_split,
           (long long)h->images, a->classes, md_percent(h->top1, h->images),
           md_percent(h->top5, h->images));
    if (j->kind == PROBE && j->rule.blocks)
        print_blocks(j);
    printf("\n%.0f images/s; %s.json, and every class in %s.csv\n",
           (double)(h->images + learned(j)) / MD_MAX(seconds, 1e-9), j->output, j->output);
    return MD_OK;
}

static md_status cmd_evaluate(int argc, char **argv)
{
    job j = {0};
    MD_TRY(md_mpi_start(&argc, &argv, &j.world));
    md_status st = set_up(&j, argc, argv);
    const double start = md_now();
    if (st == MD_OK)
        st = measure(&j);
    const double seconds = md_now() - start;
    md_phase("end");
    if (st == MD_OK)
        st = md_agree(j.world, md_comm_rank(j.world) == 0 ? report(&j, seconds) : MD_OK);
    md_comm *world = j.world;
    tear_down(&j);
    md_watch_stop();
    md_cli_report(st);
    md_mpi_stop(world);
    return st;
}

const md_verb md_verb_evaluate = {
    "evaluate", cmd_evaluate,
    "measure a trained model: accuracy of a classifier, nearest neighbours, linear probe",
    "mpirun -np N md_hpc evaluate RUN_DIRECTORY|FILE.cfg [key=value ...]\n"
    "\n"
    "RUN_DIRECTORY is what training wrote; its config and newest checkpoint are taken (another "
    "one:\n"
    "evaluate.from). evaluate.kind=accuracy: top-1 and top-5 of a classifier on evaluate.split of\n"
    "evaluate.data (or data.train). evaluate.kind=knn: how often the nearest images of data.train\n"
    "tell the class. evaluate.kind=probe: trains a linear classifier of frozen features on\n"
    "data.train first, by a published recipe (evaluate.probe_recipe). evaluate.kind=features:\n"
    "writes what the model sees, as safetensors. Prints a table and writes a .json and a .csv\n"
    "with every class (evaluate.output). Every image is counted once, on any number of ranks.\n"
    "A probe that is stopped by USR1, TERM or INT (exit code 75) goes on when called again.\n"
    "`md_hpc help evaluate.` lists the keys."};
