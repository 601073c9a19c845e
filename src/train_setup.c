/* train_setup: what comes before the first step of a run, and after the last. */
#include "io/h5.h"
#include "io/publish.h"
#include "mpi/agree.h"
#include "mpi/topo_table.h"
#include "src/cli.h"
#include "src/finetune.h"
#include "src/footprint.h"
#include "src/hang_dir.h"
#include "src/optim.h"
#include "src/train_run.h"
#include "src/watchdog.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static md_status load_config(md_run *r, int argc, char **argv)
{
    char path[MD_CONFIG_STR];
    MD_TRY(md_config_init(&r->config));
    if (argc < 2)
        return md_usage_error("train", "which config file?");
    MD_TRY(md_config_find(argv[1], path, sizeof path));
    MD_TRY(md_config_load(&r->config, path, argc - 2, argv + 2));
    MD_TRY(md_watch_start(r->config.hang_seconds)); /* before this rank first waits for others */
    md_log_set((md_log_level)md_config_choice("log.level", r->config.log_level));
    md_setup_run_dir(&r->config, r->dir);
    if (!*r->config.data_train)
        MD_FAIL(MD_ERR_CONFIG, "data.train is not set: give the image store to train on, made by "
                               "`md_hpc convert` (data.train=FILE.h5)");
    return md_batch_layout_make(&r->config, md_comm_size(r->world), &r->layout);
}

static md_status make_model(md_run *r)
{
    md_teacher_info info;
    const md_config *c = &r->config;
    MD_TRY(md_teacher_info_get(c, false, &info, r->teacher_hash));
    MD_TRY(md_model_make(c, md_method_needs_weights(c) ? &info : NULL, &r->topo, &r->layout,
                         &r->model));
    return md_model_allocate(c, r->be, &r->model);
}

/* A classifier needs every image's class, and as many classes as it has answers. */
static md_status check_labels(const md_run *r)
{
    const md_config *c = &r->config;
    const int classes = md_dataset_classes(r->data);
    if (classes != c->model_classes)
        MD_FAIL(MD_ERR_CONFIG,
                "model.classes = %lld, but the images of %s have %d classes: set "
                "model.classes=%d",
                (long long)c->model_classes, c->data_train, classes, classes);
    return md_labels_check(r->data, c->data_train, c->data_split);
}

static md_status open_data(md_run *r)
{
    const md_config *c = &r->config;
    MD_TRY(md_dataset_open(c->data_train, c->data_split, r->world, &r->data));
    if (strcmp(c->data_reader, "hdf5") == 0)
        MD_TRY(md_dataset_use_hdf5(r->data, r->world));
    int64_t n = md_dataset_count(r->data);
    if (n < c->train_batch)
        MD_FAIL(MD_ERR_CONFIG, "train.batch = %lld, but %s has only %lld images in split \"%s\"",
                (long long)c->train_batch, c->data_train, (long long)n, c->data_split);
    if (r->model.method.labels)
        MD_TRY(check_labels(r));
    r->steps_per_epoch = md_epoch_steps(n, c->train_batch);
    r->total_steps = md_total_steps(c, r->steps_per_epoch);
    if (r->total_steps == 0)
        MD_FAIL(MD_ERR_CONFIG, "train.epochs = %g is less than half a step (an epoch has %lld)",
                c->train_epochs, (long long)r->steps_per_epoch);
    return MD_OK;
}

/* Collective(world). Rank 0 makes and locks the run directory. */
static md_status take_dir(md_run *r)
{
    md_status st = MD_OK;
    if (md_comm_rank(r->world) == 0) {
        st = md_run_dir_make(r->dir);
        if (st == MD_OK)
            st = md_run_lock_take(r->dir, "run.dir", &r->lock);
        if (st == MD_OK)
            md_hang_clear(r->dir);
    }
    MD_TRY(md_agree(r->world, st));
    md_watch_dir(r->dir);
    return MD_OK;
}

md_snapshot md_run_snapshot(md_run *r)
{
    return (md_snapshot){.comm = r->world,
                         .dir = r->dir,
                         .config = &r->config,
                         .params = &r->model.method.params,
                         .shard = &r->model.shard,
                         .state = &r->state,
                         .averaged = &r->averaged,
                         .data_hash = md_dataset_hash(r->data),
                         .teacher_hash = r->teacher_hash};
}

static md_status take_batch(void *context, int64_t step, int micro, const md_batch **batch,
                            double *wait)
{
    md_run *r = context;
    double seconds = 0;
    md_status st = md_loader_take(r->loader, step, micro, batch, &seconds);
    *wait += seconds;
    return st;
}

static void release_batch(void *context, const md_batch *batch)
{
    md_loader_release(((md_run *)context)->loader, batch);
}

static md_status make_stepper(md_run *r)
{
    const md_config *c = &r->config;
    md_loader_args loader = {.source =
                                 md_dataset_source(r->data, strcmp(c->data_reader, "hdf5") == 0),
                             .dp_rank = r->topo.dp_rank,
                             .dp_size = r->topo.dp_size,
                             .tp_rank = r->topo.tp_rank,
                             .tp_size = r->topo.tp_size,
                             .micro_batch = r->layout.micro,
                             .start_step = r->state.step};
    md_loader_configure(&loader, c, r->model.method.teacher_image);
    MD_TRY(md_loader_create(&r->loader, &loader));
    MD_TRY(md_drift_make(md_comm_size(r->world), &r->drift));
    MD_TRY(md_bad_images_create(r->world, r->data, r->loader, &r->bad));
    return md_stepper_create(&(md_stepper_args){.config = c,
                                                .method = &r->model.method,
                                                .backend = r->be,
                                                .topo = &r->topo,
                                                .shard = &r->model.shard,
                                                .source = {r, take_batch, release_batch},
                                                .steps_per_epoch = r->steps_per_epoch,
                                                .accumulation = r->layout.accumulation},
                             &r->stepper);
}

static md_status make_evaluator(md_run *r)
{
    const md_config *c = &r->config;
    if (c->evaluate_every == 0)
        return MD_OK;
    const md_evaluator_args args =
        md_evaluator_of_run(c, &r->model.method, r->be, &r->topo, r->layout.micro);
    MD_TRY(md_evaluator_create(&args, &r->evaluator));
    md_evaluator_hold(r->evaluator, r->lock);
    return MD_OK;
}

/* The file's text, NULL where there is none. Freed by md_free. */
static char *read_choices(const char *path)
{
    FILE *f = fopen(path, "r");
    if (!f)
        return NULL;
    fseek(f, 0, SEEK_END);
    const long size = ftell(f);
    rewind(f);
    char *text = size > 0 ? md_alloc((size_t)size + 1, "choices") : NULL;
    if (text && fread(text, 1, (size_t)size, f) != (size_t)size)
        text[0] = 0;
    fclose(f);
    return text;
}

static md_status write_choices(const char *path, const char *text)
{
    char part[MD_CONFIG_STR + 32];
    snprintf(part, sizeof part, "%s.partial", path);
    FILE *f = fopen(part, "w");
    if (!f)
        MD_FAIL(MD_ERR_CREATE, "cannot write %s: %s", part, strerror(errno));
    const bool whole = fputs(text, f) >= 0;
    if (fclose(f) != 0 || !whole)
        MD_FAIL(MD_ERR_IO, "cannot write %s: %s", part, strerror(errno));
    return md_publish(part, path);
}

/* Rank 0's choices: those of the run directory, where they hold for this GPU; what they lack is
 * chosen now. */
static md_status choose_products(md_run *r, char **text)
{
    char path[MD_CONFIG_STR + 16];
    md_stepper_bytes bytes;
    snprintf(path, sizeof path, "%s/products.txt", r->dir);
    char *kept = read_choices(path);
    if (kept && md_backend_choices_read(r->be, kept) != MD_OK)
        md_log_warn("%s is not used: %s", path, md_error_text());
    md_backend_tune(r->be);
    md_status st = md_stepper_plan(&r->model.method, r->be, &bytes);
    if (st == MD_OK)
        st = md_backend_choices_write(r->be, text);
    if (st == MD_OK && !(kept && strcmp(kept, *text) == 0))
        st = write_choices(path, *text);
    md_free(kept);
    return st;
}

/* Collective(world). All ranks multiply by the same algorithms, so that a rank's result does not
 * depend on what it happened to measure. */
static md_status tune(md_run *r)
{
    const bool first = md_comm_rank(r->world) == 0;
    char *text = NULL;
    if (!r->config.cuda_tune)
        return MD_OK;
    md_status st = md_agree(r->world, first ? choose_products(r, &text) : MD_OK);
    int64_t bytes = text ? (int64_t)strlen(text) + 1 : 0;
    if (st == MD_OK) {
        md_comm_bcast(r->world, &bytes, sizeof bytes, 0);
        if (!first)
            text = md_alloc((size_t)bytes, "choices");
        st = md_agree(r->world, text ? MD_OK : MD_ERR_MEMORY);
    }
    if (st == MD_OK) {
        md_comm_bcast(r->world, text, bytes, 0);
        st = md_agree(r->world, md_backend_choices_read(r->be, text));
    }
    md_free(text);
    return st;
}

static void write_run_json(md_run *r)
{
    char data[32];
    snprintf(data, sizeof data, "%016llx", (unsigned long long)md_dataset_hash(r->data));
    const md_fact facts[] = {{"mpi", md_comm_library()},
                             {"hdf5", md_h5_library()},
                             {"libconfig", md_config_library()},
                             {"backend", r->be->name},
                             {"device", r->be->device},
                             {"dataset", r->config.data_train},
                             {"dataset_hash", data},
                             {"teacher_hash", r->teacher_hash}};
    enum { HOST = 64 };
    int n = md_comm_size(r->world);
    char mine[HOST] = "", *all = md_alloc((size_t)n * HOST, "host names");
    const char **hosts = md_alloc((size_t)n * sizeof *hosts, "host names");
    md_status st = md_agree(r->world, all && hosts ? MD_OK : MD_ERR_MEMORY);
    gethostname(mine, sizeof mine - 1);
    if (st == MD_OK) {
        md_comm_allgather(r->world, mine, all, HOST);
        for (int i = 0; i < n; i++)
            hosts[i] = all + (size_t)i * HOST;
        md_watch_hosts(all, HOST);
        md_runlog_run(r->log, facts, (int)MD_COUNT(facts), hosts, n);
    }
    md_free(all);
    md_free((void *)hosts);
}

/* run.dir/config.cfg: a whole one at any moment. */
static md_status write_config(const md_run *r)
{
    char path[MD_CONFIG_STR + 16], part[MD_CONFIG_STR + 32];
    snprintf(path, sizeof path, "%s/config.cfg", r->dir);
    snprintf(part, sizeof part, "%s.partial", path);
    FILE *f = fopen(part, "w");
    if (!f)
        MD_FAIL(MD_ERR_CREATE, "cannot write %s: %s", part, strerror(errno));
    md_status st = md_config_write(&r->config, f, true);
    if (st != MD_OK)
        md_error_prefix(st, "%s", part);
    if (fclose(f) != 0 && st == MD_OK)
        st = md_error_set(MD_ERR_IO, "cannot write %s: %s", part, strerror(errno));
    if (st == MD_OK)
        return md_publish(part, path);
    unlink(part);
    return st;
}

/* Writes the resolved config and opens the logs (rank 0). */
static md_status open_logs(md_run *r)
{
    if (md_comm_rank(r->world) != 0)
        return MD_OK;
    MD_TRY(write_config(r));
    return md_runlog_open(r->dir, r->state.step, &r->log);
}

static void announce(const md_run *r)
{
    const md_method *m = &r->model.method;
    const md_batch_layout *l = &r->layout;
    md_log_info("md_hpc %s: %d rank%s (data %d x tensor %d%s%s), %lld images (%lld a pass, %d "
                "pass%s a step), %lld steps of %lld an epoch",
                MD_VERSION, l->ranks, l->ranks > 1 ? "s" : "", l->dp, l->tp,
                m->split.sequence ? ", sequence" : "", r->model.shard.zero ? ", ZeRO-1" : "",
                (long long)l->batch, (long long)l->micro, l->accumulation,
                l->accumulation > 1 ? "es" : "", (long long)r->total_steps,
                (long long)r->steps_per_epoch);
    if (m->labels)
        md_log_info("classifier %lld parameters, %d classes",
                    (long long)md_params_total(&m->params), m->target_width);
    else
        md_log_info(
            "student %lld parameters; teacher %s, %lld parameters; %d of %d patches predicted, "
            "%d values each",
            (long long)md_params_total(&m->params), m->teacher->name,
            (long long)md_params_total(&m->teacher_params), m->chosen,
            md_vit_patches(&m->student_vit.spec), m->target_width);
    md_log_info("run directory %s, step %lld%s%s", r->dir, (long long)r->state.step,
                *r->checkpoint ? ", resumed from " : "", r->checkpoint);
}

/* Whether the run goes on from its own directory, not from another run's checkpoint. */
static bool resumed_own(const md_run *r)
{
    size_t n = strlen(r->dir);
    return strncmp(r->checkpoint, r->dir, n) == 0 && r->checkpoint[n] == '/';
}

/* Collective(world). Where the memory of a GPU is not enough, tells what it has to hold and what
 * would lessen it; the error stays. */
static md_status agree_on_memory(md_run *r, md_status st)
{
    char reason[1024], advice[2048], hash[17];
    md_teacher_info info;
    st = md_agree(r->world, st);
    if (st != MD_ERR_MEMORY || !md_backend_is_device(r->be) || md_comm_rank(r->world) != 0)
        return st;
    snprintf(reason, sizeof reason, "%s", md_error_text());
    const md_config *c = &r->config;
    if (md_teacher_info_get(c, false, &info, hash) == MD_OK) {
        md_footprint_advice(c, md_method_needs_weights(c) ? &info : NULL, r->layout.ranks,
                            (double)r->be->device_bytes, advice, sizeof advice);
        for (char *line = advice, *end; *line && (end = strchr(line, '\n')); line = end + 1)
            md_log_warn("%.*s", (int)(end - line), line);
    }
    return md_error_set(st, "%s", reason);
}

md_status md_run_set_up(md_run *r, int argc, char **argv)
{
    md_comm *w = r->world;
    md_phase("setup.config");
    MD_TRY(md_agree(w, load_config(r, argc, argv)));
    MD_TRY(md_setup_same_config(w, &r->config));
    md_phase("setup.grid");
    MD_TRY(md_topo_create(w,
                          &(md_topo_args){.tensor = (int)r->config.parallel_tensor,
                                          .across_nodes = r->config.parallel_tensor_across_nodes},
                          &r->topo));
    md_phase("setup.backend");
    MD_TRY(md_agree(w, md_model_backend(&r->config, &r->topo, &r->be)));
    MD_TRY(md_topo_operands(&r->topo, r->be, r->config.parallel_comm));
    md_phase("setup.model");
    MD_TRY(agree_on_memory(r, make_model(r)));
    md_phase("setup.data");
    MD_TRY(md_agree(w, open_data(r)));
    md_phase("setup.dir");
    MD_TRY(take_dir(r));
    md_phase("setup.teacher");
    MD_TRY(md_teacher_load(r->world, &r->config, &r->model.method));
    md_phase("setup.resume");
    md_snapshot s = md_run_snapshot(r);
    MD_TRY(md_snapshot_resume(&s, r->checkpoint, sizeof r->checkpoint));
    if (!*r->checkpoint && *r->config.finetune_from)
        MD_TRY(md_finetune_load(
            w, &(md_start_args){.key = "finetune.from", .path = r->config.finetune_from},
            &r->model.method));
    if (!r->averaged)
        MD_TRY(md_agree(w, md_optim_ema_start(r->be, &r->model.method.params, r->model.shard.update,
                                              r->model.shard.updates)));
    r->saved_step = resumed_own(r) ? r->state.step : -1;
    md_phase("setup.tune");
    MD_TRY(tune(r));
    md_phase("setup.memory");
    MD_TRY(agree_on_memory(r, make_stepper(r)));
    MD_TRY(agree_on_memory(r, make_evaluator(r)));
    md_phase("setup.logs");
    MD_TRY(md_agree(w, open_logs(r)));
    write_run_json(r);
    announce(r);
    return md_topo_table(&r->topo, *r->be->device ? r->be->device : "-");
}

void md_run_tear_down(md_run *r)
{
    md_evaluator_free(r->evaluator);
    md_bad_images_free(r->bad);
    md_stepper_free(r->stepper);
    md_drift_free(&r->drift);
    md_loader_destroy(r->loader);
    md_dataset_close(r->data);
    md_model_free(&r->model);
    md_topo_free(&r->topo);
    md_backend_destroy(r->be);
    md_run_lock_release(r->lock);
    md_config_free(&r->config);
}
