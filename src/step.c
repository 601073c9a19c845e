/* step: see step.h. A failing rank keeps taking part in the step's collectives with whatever its
 * buffers hold; the values are thrown away because every rank then sees the failure. */
#include "src/step.h"
#include "kernels/plan/plan_backend.h"
#include "mpi/agree.h"
#include "src/optim.h"
#include "src/rng.h"
#include "src/schedule.h"

#include <math.h>
#include <string.h>

struct md_stepper {
    md_stepper_args args;
    md_schedule schedule;
    md_grad_reduce *reduce;
    void *region; /* activations of either graph: the teacher is done before the student starts */
    float *target, *keep;
    double loss;
    int32_t *rel_index, *teacher_rows, *student_rows, *chosen;
    uint8_t *mask;
    int spans, *span_of; /* gradient spans in backward order; span of each parameter */
    bool *span_ready;
};

/* ---- memory ---- */

static size_t region_bytes(const md_method *m)
{
    return MD_MAX(m->teacher_graph.region_bytes, m->student_graph.region_bytes);
}

/* Host-side buffers of one micro-batch, by name, so that allocation and planning cannot differ. */
typedef struct batch_sizes {
    size_t target, keep, rel_index, rows, chosen, mask;
} batch_sizes;

static batch_sizes batch_layout(const md_method *m)
{
    const md_vit_spec *s = &m->student_vit.spec;
    size_t images = (size_t)m->images, chosen = (size_t)m->chosen;
    size_t patches = (size_t)md_vit_patches(s), tokens = patches + 1;
    return (batch_sizes){.target = images * chosen * (size_t)m->target_width,
                         .keep = 2 * (size_t)s->layers * images,
                         .rel_index = s->rel_pos == MD_REL_NONE ? 0 : tokens * tokens,
                         .rows = images * chosen,
                         .chosen = patches,
                         .mask = images * patches};
}

md_status md_stepper_plan(const md_method *method, md_backend *backend, md_stepper_bytes *out)
{
    md_method m = *method; /* running the graphs only reads them, apart from the backend pointer */
    md_backend *plan;
    MD_TRY(md_plan_create(backend, &plan));
    md_status st = md_graph_forward(&m.teacher_graph, plan);
    md_plan_total teacher = md_plan_take(plan);
    if (st == MD_OK)
        st = md_graph_forward(&m.student_graph, plan);
    md_plan_total student = md_plan_take(plan);
    if (st == MD_OK)
        st = md_graph_backward(&m.student_graph, plan, true, NULL, NULL);
    md_plan_total backward = md_plan_take(plan);
    plan->destroy(plan);
    batch_sizes b = batch_layout(method);
    *out = (md_stepper_bytes){
        .activations = region_bytes(method),
        .scratch = MD_MAX(MD_MAX(teacher.scratch, student.scratch), backward.scratch),
        .batch = 4 * (b.target + b.keep + b.rel_index + 2 * b.rows + b.chosen) + b.mask,
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
    batch_sizes b = batch_layout(m);
    MD_NEW(t->target, b.target, "targets");
    MD_NEW(t->keep, b.keep, "drop path");
    MD_NEW(t->rel_index, b.rel_index, "relative position index");
    MD_NEW(t->teacher_rows, b.rows, "chosen rows");
    MD_NEW(t->student_rows, b.rows, "chosen rows");
    MD_NEW(t->chosen, b.chosen, "chosen patches");
    MD_NEW(t->mask, b.mask, "masks");
    return MD_OK;
}

static void bind(md_stepper *t)
{
    md_method *m = t->args.method;
    md_graph *teacher = &m->teacher_graph, *student = &m->student_graph;
    md_graph_bind_region(teacher, t->region);
    md_graph_bind_region(student, t->region);
    md_graph_bind(teacher, m->t_rows, t->teacher_rows);
    md_graph_bind(teacher, m->t_target, t->target);
    md_graph_bind(student, m->s_target, t->target);
    md_graph_bind(student, m->s_rows, t->student_rows);
    md_graph_bind(student, m->s_loss, &t->loss);
    if (m->s_mask != MD_NO_SLOT)
        md_graph_bind(student, m->s_mask, t->mask);
    if (m->s_rel_index != MD_NO_SLOT) {
        md_vit_rel_index(md_vit_side(&m->student_vit.spec), t->rel_index);
        md_graph_bind(student, m->s_rel_index, t->rel_index);
    }
    for (int k = 0; m->s_keep && k < 2 * m->student_vit.spec.layers; k++)
        if (m->s_keep[k] != MD_NO_SLOT)
            md_graph_bind(student, m->s_keep[k], t->keep + k * m->images);
}

static md_status make_reduce(md_stepper *t)
{
    const md_method *m = t->args.method;
    const md_params *p = &m->params;
    int *order;
    md_grad_span *spans;
    MD_NEW(order, p->count, "gradient order");
    MD_NEW(spans, p->count, "gradient order");
    MD_NEW(t->span_of, p->count, "gradient order");
    MD_NEW(t->span_ready, p->count, "gradient order");
    t->spans = md_graph_grad_order(&m->student_graph, order);
    for (int i = 0; i < t->spans; i++) {
        const md_param *row = &p->row[order[i]];
        spans[i] = (md_grad_span){.offset = row->offset, .count = row->count};
        t->span_of[order[i]] = i;
    }
    md_status st = md_grad_reduce_create(
        &(md_grad_reduce_args){.dp = t->args.dp,
                               .flat = p->grad,
                               .n = p->elements,
                               .span = spans,
                               .spans = t->spans,
                               .bucket_bytes = t->args.config->parallel_bucket_mib << 20,
                               .overlap = t->args.config->parallel_overlap},
        &t->reduce);
    md_free(order);
    md_free(spans);
    return st;
}

md_status md_stepper_create(const md_stepper_args *args, md_stepper **out)
{
    md_stepper *t;
    MD_NEW(t, 1, "stepper");
    *out = t;
    t->args = *args;
    t->schedule = md_schedule_make(args->config, args->steps_per_epoch);
    MD_TRY(allocate(t));
    bind(t);
    return make_reduce(t);
}

void md_stepper_free(md_stepper *t)
{
    if (!t)
        return;
    md_grad_reduce_free(t->reduce);
    md_free(t->args.backend->scratch);
    t->args.backend->scratch = NULL;
    md_free(t->region);
    md_free(t->target);
    md_free(t->keep);
    md_free(t->rel_index);
    md_free(t->teacher_rows);
    md_free(t->student_rows);
    md_free(t->chosen);
    md_free(t->mask);
    md_free(t->span_of);
    md_free(t->span_ready);
    md_free(t);
}

/* ---- gradient reduction ---- */

/* The graph's hook: a parameter's gradient is complete. */
static void grad_ready(void *context, int param)
{
    md_stepper *t = context;
    int i = t->span_of[param];
    t->span_ready[i] = true;
    md_grad_reduce_ready(t->reduce, i);
    md_grad_reduce_poll(t->reduce);
}

/* After a failure: whatever the buffers hold goes into the reduction, so that no rank waits. */
static void give_up_gradients(md_stepper *t)
{
    for (int i = 0; i < t->spans; i++)
        if (!t->span_ready[i])
            md_grad_reduce_ready(t->reduce, i);
}

/* ---- one micro-batch ---- */

/* Masks, chosen rows and drop-path draws of a micro-batch: functions of the global sample and of
 * the position in the global batch, so they do not depend on the process grid. */
static void draw(md_stepper *t, int64_t step, int64_t first_position, const md_batch *batch)
{
    const md_method *m = t->args.method;
    const md_vit_spec *s = &m->student_vit.spec;
    const int patches = md_vit_patches(s);
    const bool all = m->chosen == patches;
    for (int64_t j = 0; j < m->images; j++) {
        md_mask_sample(&m->mask, batch->epoch, batch->sample[j], t->mask + j * patches, t->chosen,
                       NULL);
        for (int i = 0; i < m->chosen; i++) {
            int patch = all ? i : t->chosen[i];
            int32_t with_cls = (int32_t)(j * (patches + 1) + 1 + patch);
            t->student_rows[j * m->chosen + i] = with_cls;
            t->teacher_rows[j * m->chosen + i] =
                m->teacher_cls ? with_cls : (int32_t)(j * patches + patch);
        }
    }
    for (int k = 0; m->s_keep && k < 2 * s->layers; k++) {
        float rate = md_vit_drop_rate(s, k / 2);
        for (int64_t j = 0; j < m->images; j++) {
            uint64_t index = (uint64_t)(first_position + j) * 2 * (uint64_t)s->layers + (uint64_t)k;
            md_rng r = md_rng_at((uint64_t)t->args.config->run_seed, MD_RNG_DROP_PATH,
                                 (uint32_t)step, index);
            t->keep[k * m->images + j] = md_rng_float(&r) >= rate ? 1.0f / (1.0f - rate) : 0.0f;
        }
    }
}

static md_status micro_pass(md_stepper *t, int64_t step, int micro, md_step_result *out)
{
    md_method *m = t->args.method;
    const md_batch *batch;
    const md_batch_source *source = &t->args.source;
    MD_TRY(source->take(source->context, step, micro, &batch, &out->data_wait));
    out->bad += batch->bad;
    int64_t first = (int64_t)md_comm_rank(t->args.dp) * t->args.accumulation * m->images +
                    (int64_t)micro * m->images;
    draw(t, step, first, batch);
    md_graph_bind(&m->teacher_graph, m->t_image,
                  m->teacher_image ? batch->image2.data : batch->image.data);
    md_graph_bind(&m->student_graph, m->s_image, batch->image.data);
    md_status st = md_graph_forward(&m->teacher_graph, t->args.backend);
    if (st == MD_OK)
        st = md_graph_forward(&m->student_graph, t->args.backend);
    out->loss += md_fault("step.nan") ? (double)NAN : t->loss;
    bool last = micro + 1 == t->args.accumulation;
    if (st == MD_OK)
        st = md_graph_backward(&m->student_graph, t->args.backend, micro > 0,
                               last ? grad_ready : NULL, t);
    source->release(source->context, batch);
    return st;
}

/* ---- the step ---- */

/* The step's one small reduction. */
enum { SUM_LOSS, SUM_NORM, SUM_NONFINITE, SUM_STOP, SUM_FAILED, SUM_BAD, SUM_COUNT };

static md_status share(md_stepper *t, md_status st, bool stop_wanted, int64_t bad, double *v)
{
    v[SUM_STOP] = stop_wanted;
    v[SUM_FAILED] = st != MD_OK;
    v[SUM_BAD] = (double)bad;
    v[SUM_NORM] /= md_comm_size(t->args.dp);
    md_comm_allreduce(t->args.dp, v, SUM_COUNT, MD_F64, MD_SUM);
    return v[SUM_FAILED] > 0 ? md_agree(t->args.dp, st) : MD_OK;
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
    out->skipped = !isfinite(v[SUM_LOSS]) || !isfinite(v[SUM_NORM]) || v[SUM_NONFINITE] > 0;
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
    return md_optim_update(t->args.backend, &t->args.method->params, c, out->learning_rate,
                           md_optim_clip(out->grad_norm, c->optim_clip), s->updates);
}

md_status md_step_run(md_stepper *t, md_train_state *s, bool stop_wanted, md_step_result *out)
{
    md_status st = MD_OK;
    md_grad_stats stats = {0};
    *out = (md_step_result){.learning_rate = md_schedule_lr(&t->schedule, s->step)};
    md_grad_reduce_reset(t->reduce);
    memset(t->span_ready, 0, (size_t)t->spans * sizeof *t->span_ready);
    for (int micro = 0; micro < t->args.accumulation && st == MD_OK; micro++)
        st = micro_pass(t, s->step, micro, out);
    if (st != MD_OK)
        give_up_gradients(t);
    out->comm_wait = md_grad_reduce_finish(t->reduce);
    if (st == MD_OK)
        st = md_optim_grad_stats(t->args.backend, &t->args.method->params, &stats);
    double v[SUM_COUNT] = {
        [SUM_LOSS] = out->loss, [SUM_NORM] = stats.norm, [SUM_NONFINITE] = stats.nonfinite};
    st = share(t, st, stop_wanted, out->bad, v);
    out->bad = (int64_t)v[SUM_BAD];
    MD_TRY(st);
    out->loss = v[SUM_LOSS];
    out->grad_norm = v[SUM_NORM];
    out->stop = v[SUM_STOP] > 0;
    MD_TRY(limit_bad(t, s, out->bad));
    MD_TRY(update(t, s, v, out));
    s->step++;
    return MD_OK;
}
