/* step_plan: what a step takes and computes, from shapes alone: its passes on the plan backend,
 * which also lets the real backend prepare itself for every shape that a step can bring. */
#include "kernels/plan/plan_backend.h"
#include "src/optim.h"
#include "src/step.h"
#include "src/step_batch.h"

#include <math.h>

/* The teacher is done before the student starts. */
static size_t region_bytes(const md_method *m)
{
    return MD_MAX(m->teacher_graph.region_bytes, m->student_graph.region_bytes);
}

/* The norm over whole groups; with ZeRO a rank takes parts of them. */
static md_status plan_norm(const md_params *p, md_backend *plan)
{
    md_piece piece[MD_GROUPS];
    md_grad_stats stats;
    return md_optim_grad_stats(plan, p, piece, md_params_pieces(p, piece), &stats);
}

/* So many images in every branch that drop path drops some of; 0: as many as it leaves on average.
 */
static void pack_all(md_method *m, int64_t images)
{
    const md_vit_spec *s = &m->student_vit.spec;
    for (int k = 0; m->s_packed && k < 2 * s->layers; k++) {
        const double mean = (1.0 - (double)md_vit_drop_rate(s, k / 2)) * (double)m->row_images;
        if (m->s_packed[k] != MD_NO_SLOT)
            md_graph_pack(&m->student_graph, m->s_packed[k],
                          images ? images : md_method_packed(m, llround(mean)));
    }
}

/* What the student's passes come to; `recomputed` of the backward pass is work done twice. */
typedef struct student_plan {
    double forward, backward, recomputed; /* FLOP */
    size_t scratch;
} student_plan;

/* Both ways to run backward, because they may be different products to the backend. */
static md_status plan_student(md_method *m, md_backend *plan, student_plan *out)
{
    md_graph *g = &m->student_graph;
    md_status st = md_graph_forward(g, plan);
    md_plan_total pass = md_plan_take(plan);
    *out = (student_plan){.forward = pass.flops, .scratch = pass.scratch};
    for (int add = 0; add < 2 && st == MD_OK; add++) {
        st = md_graph_backward(g, plan, add, NULL, NULL);
        pass = md_plan_take(plan);
        out->scratch = MD_MAX(out->scratch, pass.scratch);
    }
    out->backward = pass.flops;
    if (st == MD_OK && g->segments > 0) {
        g->recomputes = false;
        st = md_graph_backward(g, plan, false, NULL, NULL);
        g->recomputes = true;
        out->backward = md_plan_take(plan).flops;
        out->recomputed = pass.flops - out->backward;
    }
    return st;
}

/* All that a step runs; where drop path skips, at every number of images, so that the backend has
 * met every shape. */
static md_status plan_passes(md_method *m, md_backend *plan, md_stepper_bytes *out)
{
    student_plan student;
    pack_all(m, m->row_images);
    MD_TRY(md_graph_forward(&m->teacher_graph, plan));
    const md_plan_total teacher = md_plan_take(plan);
    MD_TRY(plan_student(m, plan, &student));
    out->teacher_forward = teacher.flops;
    out->student_forward = student.forward;
    out->student_backward = student.backward;
    out->student_recomputed = student.recomputed;
    out->scratch = MD_MAX(teacher.scratch, student.scratch);
    const int64_t unit = md_method_packed(m, 1), most = m->s_packed ? m->row_images - 1 : 0;
    for (int64_t images = most / unit * unit; images >= 0; images -= unit) {
        pack_all(m, images);
        MD_TRY(plan_student(m, plan, &student));
        out->scratch = MD_MAX(out->scratch, student.scratch);
    }
    out->student_skipped = out->student_forward + out->student_backward + out->student_recomputed -
                           (student.forward + student.backward + student.recomputed);
    pack_all(m, m->row_images);
    MD_TRY(plan_norm(&m->params, plan));
    const md_plan_total norm = md_plan_take(plan);
    out->scratch = MD_MAX(out->scratch, norm.scratch);
    return MD_OK;
}

md_status md_stepper_plan(const md_method *method, md_backend *backend, md_stepper_bytes *out)
{
    /* What running the graphs changes in them, each pass says anew: backend and group, how many
     * images are packed, and where dropped values lie (md_graph_place). */
    md_method m = *method;
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
    *out = (md_stepper_bytes){.activations = region_bytes(method)};
    st = plan_passes(&m, plan, out);
    plan->destroy(plan);
    md_comm_free(tp);
    md_step_batch_bytes(method, backend && md_backend_is_device(backend), &out->batch,
                        &out->host_batch);
    return st;
}
