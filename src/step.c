/* step: see step.h. A failing rank keeps taking part in the step's collectives with whatever its
 * buffers hold; the values are thrown away because every rank then sees the failure. */
#include "src/step.h"
#include "kernels/plan/plan_backend.h"
#include "mpi/agree.h"
#include "src/log.h"
#include "src/optim.h"
#include "src/schedule.h"
#include "src/step_batch.h"
#include "src/watchdog.h"

#include <math.h>
#include <string.h>

struct md_stepper {
    md_stepper_args args;
    md_schedule schedule;
    md_grad_reduce *reduce;
    void *region; /* activations of either graph: the teacher is done before the student starts */
    md_step_batch batch;
    bool *span_ready;
    bool collecting; /* gradients of this step go into the reduction */
    double settled;  /* seconds waited for parameters since the last step's end */
};

/* ---- memory ---- */

static size_t region_bytes(const md_method *m)
{
    return MD_MAX(m->teacher_graph.region_bytes, m->student_graph.region_bytes);
}

md_status md_stepper_plan(const md_method *method, md_backend *backend, md_stepper_bytes *out)
{
    md_method m = *method; /* running the graphs only reads them, apart from backend and group */
    md_backend *plan;
    md_comm *tp;
    MD_TRY(md_comm_plan(m.split.tp_rank, m.split.tp_size, &tp));
    md_status st = md_plan_create(backend, &plan);
    if (st != MD_OK) {
        md_comm_free(tp);
        return st;
    }
    m.teacher_graph.tp = m.student_graph.tp = tp;
    m.teacher_graph.between = NULL;
    st = md_graph_forward(&m.teacher_graph, plan);
    md_plan_total teacher = md_plan_take(plan);
    if (st == MD_OK)
        st = md_graph_forward(&m.student_graph, plan);
    md_plan_total student = md_plan_take(plan);
    if (st == MD_OK)
        st = md_graph_backward(&m.student_graph, plan, true, NULL, NULL);
    md_plan_total backward = md_plan_take(plan);
    plan->destroy(plan);
    md_comm_free(tp);
    *out = (md_stepper_bytes){
        .activations = region_bytes(method),
        .scratch = MD_MAX(MD_MAX(teacher.scratch, student.scratch), backward.scratch),
        .batch = md_step_batch_bytes(method),
        .student_forward = student.flops,
        .student_backward = backward.flops,
        .teacher_forward = teacher.flops,
    };
    return st;
}

static md_status allocate(md_stepper *t)
{
    md_method *m = t->args.method;
    md_backend *be = t->args.backend;
    md_stepper_bytes bytes;
    MD_TRY(md_stepper_plan(m, be, &bytes));
    be->scratch = md_alloc(bytes.scratch, "scratch");
    be->scratch_size = bytes.scratch;
    t->region = md_alloc(region_bytes(m), "activations");
    if (!be->scratch || !t->region)
        return MD_ERR_MEMORY;
    md_graph_bind_region(&m->teacher_graph, t->region);
    md_graph_bind_region(&m->student_graph, t->region);
    MD_NEW(t->span_ready, t->args.shard->buckets.spans, "gradient order");
    return md_step_batch_create(m, t->args.topo, (uint64_t)t->args.config->run_seed, &t->batch);
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
    t->args.method->teacher_graph.between = NULL;
    md_grad_reduce_free(t->reduce);
    md_step_batch_free(&t->batch);
    md_free(t->args.backend->scratch);
    t->args.backend->scratch = NULL;
    md_free(t->region);
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

/* Before the first gradient of a step: the reducer is done with the step before. */
static void collect_gradients(md_stepper *t)
{
    if (t->collecting)
        return;
    md_step_settle(t);
    md_grad_reduce_reset(t->reduce);
    t->collecting = true;
}

/* After a failure: whatever the buffers hold goes into the reduction, so that no rank waits. */
static void give_up_gradients(md_stepper *t)
{
    collect_gradients(t);
    for (int i = 0; i < t->args.shard->buckets.spans; i++)
        if (!t->span_ready[i])
            md_grad_reduce_ready(t->reduce, i);
}

/* ---- one micro-batch ---- */

/* An op fails for lack of a device or by a bug of ours. */
static md_status run_graphs(md_stepper *t, int micro, md_step_result *out)
{
    md_method *m = t->args.method;
    md_backend *be = t->args.backend;
    const bool last = micro + 1 == t->args.accumulation;
    md_fault("step.forward");
    MD_TRY(md_graph_forward(&m->teacher_graph, be));
    collect_gradients(t);
    MD_TRY(md_graph_forward(&m->student_graph, be));
    md_fault("step.backward");
    out->backward_begin = md_now();
    return md_graph_backward(&m->student_graph, be, micro > 0, last ? grad_ready : NULL, t);
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
        md_step_batch_set(&t->batch, batch, step, passes * m->images);
        st = run_graphs(t, micro, out);
        if (st != MD_OK && topo->tp_size > 1)
            give_up(st);
        out->loss += md_fault("step.nan") ? (double)NAN : t->batch.loss;
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
    return MD_OK;
}

/* What this rank answers for. */
static md_status grad_stats(md_stepper *t, md_grad_stats *stats)
{
    const md_shard *s = t->args.shard;
    return md_optim_grad_stats(t->args.backend, &t->args.method->params, s->own, s->owns, stats);
}

md_status md_step_run(md_stepper *t, md_train_state *s, bool stop_wanted, md_step_result *out)
{
    md_phase_step(s->step + 1);
    md_status st = MD_OK;
    md_grad_stats stats = {0};
    *out = (md_step_result){.learning_rate = md_schedule_lr(&t->schedule, s->step)};
    memset(t->span_ready, 0, (size_t)t->args.shard->buckets.spans * sizeof *t->span_ready);
    t->collecting = false;
    for (int micro = 0; micro < t->args.accumulation && st == MD_OK; micro++)
        st = micro_pass(t, s->step, micro, out);
    if (st != MD_OK)
        give_up_gradients(t);
    out->comm_wait = md_grad_reduce_finish(t->reduce) + t->settled;
    t->settled = 0;
    if (st == MD_OK)
        st = grad_stats(t, &stats);
    double v[SUM_COUNT] = {
        [SUM_LOSS] = out->loss, [SUM_SQUARES] = stats.squares, [SUM_NONFINITE] = stats.nonfinite};
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
