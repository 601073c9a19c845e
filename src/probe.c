/* probe: see probe.h. */
#include "src/probe.h"
#include "mpi/agree.h"
#include "src/bad_images.h"
#include "src/log.h"
#include "src/signals.h"
#include "src/watchdog.h"

#include <math.h>
#include <string.h>

typedef struct probe {
    const md_probe_args *a;
    md_probe_result *out;
    md_probe_heads *heads;
    md_loader *loader;
    md_bad_images *bad;
    md_probe_state state;
    int classes;
    int64_t width, own, steps; /* values of an image; images of a step here; steps of an epoch */
    int64_t done;              /* steps */
    float *share;              /* [own, width] of a step's images here, by the ranks they go to */
    float *feature;            /* [batch, width of the heads that are trained here] */
    int32_t *label;            /* [batch] */
    int64_t *to, *from;        /* [dp] rows of a head's width that go there, and come from there */
    double *loss; /* [heads + 1] sums of an epoch; then the images that were replaced */
    /* Images that wait to be judged. */
    float *seen;         /* [MD_PROBE_TILE, width] */
    int32_t *seen_label; /* [MD_PROBE_TILE] */
    int waiting;
    md_status status; /* of judging */
} probe;

md_status md_probe_images(const md_probe_rule *rule, const md_topo *t, int64_t images, int64_t *out)
{
    const int64_t ranks = (int64_t)t->dp_size * t->tp_size, share = rule->batch / t->dp_size;
    if (rule->batch % ranks)
        MD_FAIL(MD_ERR_CONFIG,
                "the batch of %lld images (evaluate.probe_batch) does not divide over %lld ranks",
                (long long)rule->batch, (long long)ranks);
    *out = t->tp_size;
    for (int64_t n = t->tp_size; n <= MD_MIN(images, share); n += t->tp_size)
        if (share % n == 0)
            *out = n;
    if (*out < MD_MIN(images, share) / 4)
        md_log_warn("evaluate.probe_batch = %lld leaves a data-parallel rank %lld images, which "
                    "passes of more than %lld do not divide: another batch would be faster",
                    (long long)rule->batch, (long long)share, (long long)*out);
    return MD_OK;
}

/* ---- memory ---- */

static md_status make_loader(probe *p)
{
    const md_probe_args *a = p->a;
    const md_topo *t = a->topo;
    md_loader_args loader = {.source = md_evaluator_source(a->train),
                             .dp_rank = t->dp_rank,
                             .dp_size = t->dp_size,
                             .tp_rank = t->tp_rank,
                             .tp_size = t->tp_size,
                             .micro_batch = a->train_images,
                             .start_step = p->done};
    md_loader_configure(&loader, a->config, 0);
    loader.batch = a->rule.batch;
    loader.rule = (md_augment_rule){.seed = loader.rule.seed,
                                    .size = loader.rule.size,
                                    .crop_min = 0.08,
                                    .crop_max = 1.0,
                                    .ratio_min = 3.0 / 4.0,
                                    .ratio_max = 4.0 / 3.0,
                                    .flip = 0.5};
    MD_TRY(md_loader_create(&p->loader, &loader));
    return md_bad_images_create(t->world, md_evaluator_data(a->train), p->loader, &p->bad);
}

/* Each rank along dp trains heads of its own; those that share a model do the same. */
static md_status make_heads(probe *p)
{
    const md_probe_args *a = p->a;
    return md_probe_heads_create(&(md_probe_heads_args){.backend = a->backend,
                                                        .rule = a->rule,
                                                        .heads = p->out->heads,
                                                        .width = (int)p->width / p->out->heads,
                                                        .classes = p->classes,
                                                        .rank = a->topo->dp_rank,
                                                        .ranks = a->topo->dp_size,
                                                        .seed = (uint64_t)a->config->run_seed},
                                 &p->heads);
}

/* Head h is trained by rank h % ranks of dp. */
static md_status make_exchange(probe *p)
{
    const int ranks = p->a->topo->dp_size, heads = p->out->heads;
    const int trained = md_probe_heads_own(p->heads);
    MD_NEW(p->to, ranks, "features");
    MD_NEW(p->from, ranks, "features");
    for (int r = 0; r < ranks; r++) {
        p->to[r] = p->own * ((heads - r + ranks - 1) / ranks);
        p->from[r] = p->own * trained;
    }
    MD_NEW(p->share, p->own * p->width, "features");
    MD_NEW(p->feature, p->a->rule.batch * MD_MAX(trained, 1) * (p->width / heads), "features");
    return MD_OK;
}

static md_status set_up(probe *p)
{
    const md_probe_args *a = p->a;
    md_probe_result *r = p->out;
    p->classes = md_dataset_classes(md_evaluator_data(a->train));
    p->width = md_evaluator_width(a->train);
    p->own = a->rule.batch / a->topo->dp_size;
    p->steps = md_epoch_steps(md_evaluator_count(a->train), a->rule.batch);
    *r = (md_probe_result){.heads = a->rule.blocks ? (int)a->config->model_layers : 1};
    MD_NEW(r->head, r->heads, "results");
    MD_NEW(r->train_loss, r->heads, "results");
    for (int k = 0; k < r->heads; k++)
        MD_TRY(md_accuracy_make(p->classes, &r->head[k]));
    MD_NEW(p->loss, r->heads + 1, "losses");
    MD_NEW(p->label, a->rule.batch, "labels");
    MD_NEW(p->seen, MD_PROBE_TILE * p->width, "features");
    MD_NEW(p->seen_label, MD_PROBE_TILE, "labels");
    MD_TRY(make_heads(p));
    MD_TRY(make_exchange(p));
    p->state = (md_probe_state){.config = a->config,
                                .topo = a->topo,
                                .rule = &a->rule,
                                .heads = p->heads,
                                .n = r->heads,
                                .dir = a->dir,
                                .encoder = a->encoder,
                                .data = md_dataset_hash(md_evaluator_data(a->train)),
                                .loss = p->loss,
                                .train_loss = r->train_loss,
                                .lock = p->state.lock};
    return MD_OK;
}

static void tear_down(probe *p)
{
    md_bad_images_free(p->bad);
    md_loader_destroy(p->loader);
    md_probe_heads_free(p->heads);
    md_free(p->loss);
    md_free(p->to);
    md_free(p->from);
    md_free(p->share);
    md_free(p->feature);
    md_free(p->label);
    md_free(p->seen);
    md_free(p->seen_label);
}

/* ---- training ---- */

/* Puts the values of image i of this rank's share where the ranks' rows begin that train them. */
static void sort_out(probe *p, int64_t i, const float *values)
{
    const int ranks = p->a->topo->dp_size, heads = p->out->heads;
    const int64_t width = p->width / heads;
    float *rows = p->share;
    for (int r = 0; r < ranks; r++) {
        const int64_t n = p->to[r] / p->own; /* heads of rank r */
        for (int64_t k = 0; k < n; k++)
            memcpy(rows + (i * n + k) * width, values + (r + k * ranks) * width,
                   (size_t)width * sizeof *rows);
        rows += p->to[r] * width;
    }
}

/* Features and labels of one pass. */
static md_status look(probe *p, int64_t step, int64_t pass)
{
    const md_probe_args *a = p->a;
    const md_topo *t = a->topo;
    const int64_t at = t->dp_rank * p->own + pass * a->train_images;
    const md_batch *batch;
    const float *values;
    md_status st = md_loader_take(p->loader, step, pass, &batch, NULL);
    const bool taken = st == MD_OK;
    st = md_agree(t->world, st);
    if (st == MD_OK) {
        md_comm_allgather(t->tp, batch->label, p->label + at,
                          a->train_images / t->tp_size * (int64_t)sizeof *p->label);
        st = md_viewer_run(md_evaluator_viewer(a->train), batch->image.data, &values);
    }
    if (st == MD_OK) {
        for (int64_t i = 0; i < a->train_images; i++)
            sort_out(p, pass * a->train_images + i, values + i * p->width);
        p->loss[p->out->heads] += (double)batch->bad;
    }
    if (taken)
        md_loader_release(p->loader, batch);
    return md_agree(t->world, st);
}

static md_status run_step(probe *p, int64_t step)
{
    md_comm *dp = p->a->topo->dp;
    const int64_t first = md_comm_rank(dp) * p->own;
    const int64_t row = p->width / p->out->heads * (int64_t)sizeof *p->feature;
    for (int64_t pass = 0; pass < p->own / p->a->train_images; pass++) {
        md_phase("probe");
        MD_TRY(look(p, step, pass));
    }
    md_comm_alltoallv(dp, p->share, p->to, p->feature, p->from, row);
    md_comm_allgather(dp, p->label + first, p->label, p->own * (int64_t)sizeof *p->label);
    MD_TRY(
        md_agree(p->a->topo->world, md_probe_heads_step(p->heads, p->feature, p->label,
                                                        md_probe_lr(&p->a->rule, step, p->steps))));
    for (int k = 0; k < p->out->heads; k++)
        p->loss[k] += md_probe_heads_loss(p->heads)[k];
    return MD_OK;
}

/* What an epoch's sums say; the same on every rank. */
static md_status judge_epoch(probe *p, int64_t epoch)
{
    const md_probe_args *a = p->a;
    const int heads = p->out->heads;
    /* The ranks that share a model have the same losses, and each its own images. */
    md_comm_allreduce(a->topo->tp, p->loss + heads, 1, MD_F64, MD_SUM);
    md_comm_allreduce(a->topo->dp, p->loss, heads + 1, MD_F64, MD_SUM);
    const double bad = p->loss[heads];
    double sum = 0;
    if (bad > 0)
        md_bad_images_tell(p->bad, (epoch + 1) * p->steps - 1, NULL);
    if (bad > MD_MAX(10.0, a->config->data_max_bad * (double)(p->steps * a->rule.batch)))
        MD_FAIL(MD_ERR_DATA,
                "%.0f of the %lld images of epoch %lld could not be read or decoded, more than "
                "data.max_bad = %g allows",
                bad, (long long)(p->steps * a->rule.batch), (long long)epoch,
                a->config->data_max_bad);
    for (int k = 0; k < heads; k++) {
        p->out->train_loss[k] = p->loss[k] / (double)p->steps;
        sum += p->out->train_loss[k];
        if (!isfinite(p->loss[k]))
            MD_FAIL(MD_ERR_NUMERICS,
                    "the loss of head %d of the probe is no number after epoch %lld: "
                    "evaluate.probe_lr = %g is too high, or the features are none",
                    k, (long long)epoch + 1, a->rule.lr);
    }
    md_log_info("probe: epoch %lld of %lld, loss %.5f", (long long)epoch + 1,
                (long long)a->rule.epochs, sum / heads);
    memset(p->loss, 0, (size_t)(heads + 1) * sizeof *p->loss);
    return MD_OK;
}

static bool anyone_has_a_signal(const probe *p)
{
    int64_t came = md_signals_came();
    md_comm_allreduce(p->a->topo->world, &came, 1, MD_I64, MD_MAX_OP);
    return came != 0;
}

static md_status stopped(const probe *p)
{
    MD_FAIL(MD_STOPPED,
            "the probe is stopped at step %lld of %lld: the same command goes on from there",
            (long long)p->done, (long long)(p->a->rule.epochs * p->steps));
}

/* One step, and what is due behind it. */
static md_status advance(probe *p)
{
    md_comm *world = p->a->topo->world;
    MD_TRY(run_step(p, p->done));
    p->done++;
    md_run_lock_touch(p->state.lock);
    const bool whole = p->done % p->steps == 0;
    if (whole)
        MD_TRY(md_agree(world, judge_epoch(p, p->done / p->steps - 1)));
    const bool stop = anyone_has_a_signal(p);
    if (!whole && !stop)
        return MD_OK;
    if (!whole) /* the names of what was replaced go with the loader */
        md_bad_images_tell(p->bad, p->done - 1, NULL);
    md_phase("probe.save");
    md_status st = md_probe_state_save(&p->state, p->done);
    if (stop)
        return st == MD_OK ? stopped(p) : st;
    if (st != MD_OK)
        md_log_warn("the probe's state of step %lld is not kept: %s", (long long)p->done,
                    md_error_text());
    return MD_OK;
}

/* What comes behind it may be done again: there a signal ends the program. */
static md_status train(probe *p)
{
    md_comm *world = p->a->topo->world;
    const int64_t total = p->a->rule.epochs * p->steps;
    MD_TRY(md_probe_state_resume(&p->state, &p->done));
    /* It also tells when there are too few images for a step. */
    MD_TRY(md_agree(world, p->done < total || total == 0 ? make_loader(p) : MD_OK));
    while (p->done < total)
        MD_TRY(advance(p));
    if (anyone_has_a_signal(p))
        return stopped(p);
    md_signals_release();
    return md_agree(world, md_probe_heads_share(p->heads, p->a->topo->dp));
}

/* ---- judging ---- */

static void flush(probe *p)
{
    for (int k = 0; k < p->out->heads && p->waiting > 0 && p->status == MD_OK; k++) {
        const float *logits;
        p->status = md_probe_heads_logits(p->heads, k, p->seen, p->waiting, &logits);
        for (int i = 0; i < p->waiting && p->status == MD_OK; i++)
            md_accuracy_count(&p->out->head[k], NULL, p->seen_label[i],
                              logits + (int64_t)i * p->classes);
    }
    p->waiting = 0;
}

static void judge(void *context, const md_seen *seen)
{
    probe *p = context;
    memcpy(p->seen + p->waiting * p->width, seen->values, (size_t)p->width * sizeof *p->seen);
    p->seen_label[p->waiting++] = seen->label;
    if (p->waiting == MD_PROBE_TILE)
        flush(p);
}

static md_status test(probe *p)
{
    md_comm *world = p->a->topo->world;
    md_probe_result *r = p->out;
    md_evaluator_hold(p->a->test, p->state.lock);
    md_status st = md_evaluator_run(p->a->test, judge, p);
    if (st == MD_OK)
        flush(p);
    MD_TRY(md_agree(world, st == MD_OK ? p->status : st));
    for (int k = 0; k < r->heads; k++) {
        md_accuracy_sum(world, &r->head[k]);
        if (r->head[k].all.top1 >= r->head[r->best].all.top1)
            r->best = k;
    }
    return MD_OK;
}

md_status md_probe_accuracy(const md_probe_args *a, md_probe_result *out)
{
    md_comm *world = a->topo->world;
    probe p = {.a = a, .out = out, .state = {.topo = a->topo, .dir = a->dir}};
    *out = (md_probe_result){0};
    MD_TRY(md_agree(world, md_evaluator_same_classes(a->train, a->test)));
    md_status st = md_probe_state_take(&p.state);
    if (st == MD_OK)
        st = md_agree(world, set_up(&p));
    if (st == MD_OK)
        st = train(&p);
    if (st == MD_OK)
        st = test(&p);
    tear_down(&p);
    md_probe_state_release(&p.state);
    if (st != MD_OK)
        md_probe_result_free(out);
    return st;
}

void md_probe_result_free(md_probe_result *r)
{
    for (int k = 0; k < r->heads && r->head; k++)
        md_accuracy_free(&r->head[k]);
    md_free(r->head);
    md_free(r->train_loss);
    *r = (md_probe_result){0};
}
