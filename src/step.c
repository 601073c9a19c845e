/* step: see step.h. A failing rank keeps taking part in the step's collectives with whatever its
 * buffers hold; the values are thrown away because every rank then sees the failure. */
#include "src/step.h"
#include "mpi/agree.h"
#include "src/log.h"
#include "src/optim.h"
#include "src/schedule.h"
#include "src/step_batch.h"
#include "src/watchdog.h"

#include <math.h>
#include <string.h>

/* Stretches of a pass without communication, which a backend may record. */
typedef enum stretch { TEACHER, FORWARD, BACKWARD, BACKWARD_ADD, STRETCHES } stretch;

struct md_stepper {
    md_stepper_args args;
    md_schedule schedule;
    md_grad_reduce *reduce;
    void *region; /* activations of either graph: the teacher is done before the student starts */
    size_t region_bytes;
    md_step_batch batch;
    bool *span_ready;
    bool collecting;      /* gradients of this step go into the reduction */
    bool unrounded;       /* parameters have been gathered since they were last rounded */
    bool nan;             /* a test spoils this step's loss */
    double settled;       /* seconds waited for parameters since the last step's end */
    md_grad_stats *stats; /* operand */
    double *loss;         /* [accumulation] what the host has read of the passes' losses, */
    md_grad_stats *read;  /* and of the stats: after a sync */
    md_recording *recording[MD_FEED_SLOTS][STRETCHES];
    bool ran[MD_FEED_SLOTS][STRETCHES];
};

/* ---- memory ---- */

/* What the host reads of a step. */
static md_status allocate_results(md_stepper *t)
{
    md_backend *be = t->args.backend;
    void *p;
    MD_TRY(md_backend_alloc(be, sizeof *t->stats, "gradient norm", &p));
    t->stats = p;
    MD_TRY(md_backend_pinned(be, sizeof *t->read, "gradient norm", &p));
    t->read = p;
    MD_TRY(md_backend_pinned(be, (size_t)t->args.accumulation * sizeof *t->loss, "losses", &p));
    t->loss = p;
    return MD_OK;
}

static md_status allocate(md_stepper *t)
{
    md_method *m = t->args.method;
    md_backend *be = t->args.backend;
    md_stepper_bytes bytes;
    MD_TRY(md_stepper_plan(m, be, &bytes));
    MD_TRY(md_backend_alloc(be, bytes.scratch, "scratch", &be->scratch));
    be->scratch_size = bytes.scratch;
    t->region_bytes = bytes.activations;
    MD_TRY(md_backend_alloc(be, t->region_bytes, "activations", &t->region));
    MD_TRY(allocate_results(t));
    md_graph_bind_region(&m->teacher_graph, t->region);
    md_graph_bind_region(&m->student_graph, t->region);
    MD_NEW(t->span_ready, t->args.shard->buckets.spans, "gradient order");
    return md_step_batch_create(m, t->args.topo, be, (uint64_t)t->args.config->run_seed, &t->batch);
}

static md_status make_reduce(md_stepper *t)
{
    const md_shard *s = t->args.shard;
    const md_params *p = &t->args.method->params;
    md_grad_reduce_args a = {.buckets = &s->buckets,
                             .flat = p->grad,
                             .share = p->reduced,
                             .share_at = s->share_at,
                             .overlap = t->args.config->parallel_overlap};
    for (int set = 0; set < MD_GRAD_SETS; set++)
        a.group[set] = md_shard_group(t->args.topo, set);
    return md_grad_reduce_create(&a, &t->reduce);
}

/* While the teacher runs, which needs none of the student's parameters, these arrive. */
static void let_arrive(void *context)
{
    md_grad_reduce_poll(((md_stepper *)context)->reduce);
}

md_status md_stepper_create(const md_stepper_args *args, md_stepper **out)
{
    md_stepper *t;
    MD_NEW(t, 1, "stepper");
    *out = t;
    t->args = *args;
    t->schedule = md_schedule_make(args->config, args->steps_per_epoch);
    MD_TRY(allocate(t));
    args->method->teacher_graph.between = let_arrive;
    args->method->teacher_graph.between_context = t;
    return make_reduce(t);
}

void md_stepper_free(md_stepper *t)
{
    if (!t)
        return;
    md_backend *be = t->args.backend;
    t->args.method->teacher_graph.between = NULL;
    for (int i = 0; i < MD_FEED_SLOTS * STRETCHES; i++)
        md_backend_record_free(be, t->recording[i / STRETCHES][i % STRETCHES]);
    md_grad_reduce_free(t->reduce);
    md_step_batch_free(&t->batch);
    md_backend_free(be, be->scratch);
    be->scratch = NULL;
    md_backend_free(be, t->region);
    md_backend_free(be, t->stats);
    md_backend_pinned_free(be, t->read);
    md_backend_pinned_free(be, t->loss);
    md_free(t->span_ready);
    md_free(t);
}

const md_grad_reduce *md_step_reducer(const md_stepper *t)
{
    return t->reduce;
}

/* ---- gradient reduction ---- */

/* The graph's hook: a parameter's gradient is complete. */
static void grad_ready(void *context, int param)
{
    md_stepper *t = context;
    int i = t->args.shard->span_of[param];
    t->span_ready[i] = true;
    md_grad_reduce_ready(t->reduce, i);
}

double md_step_settle(md_stepper *t)
{
    double waited = md_grad_reduce_gather_finish(t->reduce);
    t->settled += waited;
    return waited;
}

static md_status round_parameters(md_stepper *t)
{
    if (t->unrounded)
        MD_TRY(md_params_round(&t->args.method->params));
    t->unrounded = false;
    return MD_OK;
}

md_status md_step_parameters(md_stepper *t)
{
    md_step_settle(t);
    return md_agree(t->args.topo->world, round_parameters(t));
}

md_status md_step_swap_averages(md_stepper *t)
{
    const md_shard *s = t->args.shard;
    md_params *p = &t->args.method->params;
    const md_scratch between = {t->region, t->region_bytes};
    md_step_settle(t);
    const double settled = t->settled;
    MD_TRY(md_agree(t->args.topo->world,
                    md_optim_ema_swap(t->args.backend, p, s->update, s->updates, between)));
    if (s->zero)
        md_grad_reduce_gather(t->reduce, p->value);
    t->unrounded = true;
    md_status st = md_step_parameters(t);
    t->settled = settled; /* no step waits for this */
    return st;
}

/* Before the first gradient of a step: the reducer is done with the step before. */
static void collect_gradients(md_stepper *t)
{
    if (t->collecting)
        return;
    md_step_settle(t);
    md_grad_reduce_reset(t->reduce);
    t->collecting = true;
}

/* All gradients that have not been handed over one by one: a recorded backward pass calls no hook.
 * After a failure it is whatever the buffers hold, so that no rank waits. */
static void hand_over_rest(md_stepper *t)
{
    collect_gradients(t);
    for (int i = 0; i < t->args.shard->buckets.spans; i++)
        if (!t->span_ready[i])
            md_grad_reduce_ready(t->reduce, i);
}

/* ---- one micro-batch ---- */

static md_status issue(md_stepper *t, stretch what, md_grad_ready hook)
{
    md_method *m = t->args.method;
    md_backend *be = t->args.backend;
    if (what == TEACHER)
        return md_graph_forward(&m->teacher_graph, be);
    if (what == FORWARD)
        return md_graph_forward(&m->student_graph, be);
    return md_graph_backward(&m->student_graph, be, what == BACKWARD_ADD, hook, t);
}

/* A stretch that is the same in every pass, without a collective in the middle. */
static bool can_record(const md_stepper *t, stretch what, md_grad_ready hook)
{
    const bool skips = what != TEACHER && t->args.method->s_packed;
    return md_backend_can_record(t->args.backend) && !hook && t->args.topo->tp_size == 1 && !skips;
}

/* Issues a stretch: the first time op by op, then recorded, where that can be. Each slot of the
 * batch has its own operands, thus recordings. */
static md_status run(md_stepper *t, stretch what, md_grad_ready hook)
{
    md_backend *be = t->args.backend;
    md_recording **r = &t->recording[t->batch.slot][what];
    bool *ran = &t->ran[t->batch.slot][what];
    if (!can_record(t, what, hook) || !*ran) {
        *ran = true;
        return issue(t, what, hook);
    }
    if (!*r) {
        MD_TRY(md_backend_record_begin(be));
        md_status st = issue(t, what, NULL);
        MD_TRY(st == MD_OK ? md_backend_record_end(be, r) : st);
    }
    md_phase(what < BACKWARD ? "forward" : "backward");
    return md_backend_replay(be, *r);
}

/* An op fails for lack of a device or by a bug of ours. */
static md_status run_graphs(md_stepper *t, int micro, md_step_result *out)
{
    md_backend *be = t->args.backend;
    const bool last = micro + 1 == t->args.accumulation;
    const bool alone = md_comm_size(t->args.topo->world) == 1; /* no reduction to overlap */
    md_fault("step.forward");
    MD_TRY(run(t, TEACHER, NULL));
    collect_gradients(t);
    MD_TRY(round_parameters(t));
    MD_TRY(run(t, FORWARD, NULL));
    md_fault("step.backward");
    out->backward_begin = md_now();
    MD_TRY(run(t, micro > 0 ? BACKWARD_ADD : BACKWARD, last && !alone ? grad_ready : NULL));
    if (last)
        hand_over_rest(t);
    return md_backend_download(be, &t->loss[micro], t->batch.loss, sizeof *t->loss);
}

/* What the other ranks wait for in the middle of a pass or an update will not come. */
_Noreturn static void give_up(md_status st)
{
    md_log_rank(MD_LOG_ERROR, "%s", md_error_text());
    md_abort(st);
}

static md_status micro_pass(md_stepper *t, int64_t step, int micro, md_step_result *out)
{
    const md_method *m = t->args.method;
    const md_topo *topo = t->args.topo;
    const md_batch_source *source = &t->args.source;
    const md_batch *batch;
    md_status st = source->take(source->context, step, micro, &batch, &out->data_wait);
    if (st == MD_OK)
        out->bad += batch->bad;
    const bool mine = st == MD_OK;
    st = md_agree(topo->tp, st); /* they go through the graphs together or not at all */
    if (st == MD_OK) {
        int64_t passes = (int64_t)topo->dp_rank * t->args.accumulation + micro;
        st = md_step_batch_set(&t->batch, batch, step, passes * m->images);
        if (st == MD_OK)
            st = run_graphs(t, micro, out);
        if (st == MD_OK)
            st = md_step_batch_used(&t->batch);
        if (st != MD_OK && topo->tp_size > 1)
            give_up(st);
        t->nan |= md_fault("step.nan");
    }
    if (mine)
        source->release(source->context, batch);
    return st;
}

/* ---- the step ---- */

/* The step's one small reduction. */
enum { SUM_LOSS, SUM_SQUARES, SUM_NONFINITE, SUM_STOP, SUM_FAILED, SUM_BAD, SUM_COUNT };

/* Where the ranks of tp have the same loss, it counts once. */
static bool counts_loss(const md_stepper *t)
{
    const md_method *m = t->args.method;
    return t->args.topo->tp_rank == 0 ||
           md_graph_tensor(&m->student_graph, m->s_loss)->place == MD_PARTIAL;
}

static md_status share(md_stepper *t, md_status st, bool stop_wanted, int64_t bad, double *v)
{
    md_comm *world = t->args.topo->world;
    v[SUM_LOSS] = counts_loss(t) ? v[SUM_LOSS] : 0.0;
    v[SUM_STOP] = stop_wanted;
    v[SUM_FAILED] = st != MD_OK;
    v[SUM_BAD] = (double)bad;
    md_comm_allreduce(world, v, SUM_COUNT, MD_F64, MD_SUM);
    return v[SUM_FAILED] > 0 ? md_agree(world, st) : MD_OK;
}

/* Counted over all ranks, so that the run ends at the same step on any layout. *s changes on
 * success only: it is then still the state of the step before. */
static md_status limit_bad(const md_stepper *t, md_train_state *s, int64_t bad)
{
    const int64_t of_epoch = t->args.steps_per_epoch;
    const double images = (double)(of_epoch * t->args.config->train_batch);
    const double limit = MD_MAX(10.0, t->args.config->data_max_bad * images);
    const int64_t of_this = bad + (s->step % of_epoch == 0 ? 0 : s->bad_in_epoch);
    if (bad > 0 && (double)of_this > limit)
        MD_FAIL(MD_ERR_DATA,
                "%lld of the %.0f images of epoch %lld could not be read or decoded, more than "
                "data.max_bad = %g allows; events.jsonl names them",
                (long long)of_this, images, (long long)(s->step / of_epoch),
                t->args.config->data_max_bad);
    s->bad_images += bad;
    s->bad_in_epoch = of_this;
    return MD_OK;
}

static md_status update(md_stepper *t, md_train_state *s, const double *v, md_step_result *out)
{
    const md_config *c = t->args.config;
    out->skipped = !isfinite(v[SUM_LOSS]) || !isfinite(v[SUM_SQUARES]) || v[SUM_NONFINITE] > 0;
    if (out->skipped) {
        s->skipped++;
        if (++s->skipped_in_row >= c->optim_max_skipped)
            MD_FAIL(MD_ERR_NUMERICS,
                    "loss or gradients were not finite %lld steps in a row, up to "
                    "step %lld (optim.max_skipped)",
                    (long long)s->skipped_in_row, (long long)s->step + 1);
        return MD_OK;
    }
    s->skipped_in_row = 0;
    s->updates++;
    const md_shard *shard = t->args.shard;
    md_params *p = &t->args.method->params;
    const md_optim_args how = {.config = c,
                               .lr = out->learning_rate,
                               .clip = md_optim_clip(out->grad_norm, c->optim_clip),
                               .update = s->updates};
    md_status st = md_optim_update(t->args.backend, p, shard->update, shard->updates, &how);
    if (st != MD_OK && md_comm_size(t->args.topo->world) > 1)
        give_up(st);
    MD_TRY(st);
    if (shard->zero)
        md_grad_reduce_gather(t->reduce, p->value);
    t->unrounded = shard->zero;
    return MD_OK;
}

/* What this rank answers for, and the sum of its passes' losses: the one wait for the backend. */
static md_status results(md_stepper *t, double *v)
{
    const md_shard *s = t->args.shard;
    md_backend *be = t->args.backend;
    MD_TRY(md_optim_grad_stats(be, &t->args.method->params, s->own, s->owns, t->stats));
    MD_TRY(md_backend_download(be, t->read, t->stats, sizeof *t->read));
    MD_TRY(md_backend_sync(be));
    for (int i = 0; i < t->args.accumulation; i++)
        v[SUM_LOSS] += t->loss[i];
    if (t->nan)
        v[SUM_LOSS] = (double)NAN;
    v[SUM_SQUARES] = t->read->squares;
    v[SUM_NONFINITE] = t->read->nonfinite;
    return MD_OK;
}

md_status md_step_run(md_stepper *t, md_train_state *s, bool stop_wanted, md_step_result *out)
{
    md_phase_step(s->step + 1);
    md_status st = MD_OK;
    double v[SUM_COUNT] = {0};
    *out = (md_step_result){.learning_rate = md_schedule_lr(&t->schedule, s->step)};
    memset(t->span_ready, 0, (size_t)t->args.shard->buckets.spans * sizeof *t->span_ready);
    t->collecting = t->nan = false;
    for (int micro = 0; micro < t->args.accumulation && st == MD_OK; micro++)
        st = micro_pass(t, s->step, micro, out);
    if (st != MD_OK)
        hand_over_rest(t);
    out->comm_wait = md_grad_reduce_finish(t->reduce) + t->settled;
    t->settled = 0;
    if (st == MD_OK)
        st = results(t, v);
    st = share(t, st, stop_wanted, out->bad, v);
    out->bad = (int64_t)v[SUM_BAD];
    MD_TRY(st);
    out->loss = v[SUM_LOSS];
    out->grad_norm = sqrt(v[SUM_SQUARES]);
    out->stop = v[SUM_STOP] > 0;
    MD_TRY(limit_bad(t, s, out->bad));
    md_phase("update");
    md_fault("step.update");
    MD_TRY(update(t, s, v, out));
    s->step++;
    return MD_OK;
}
