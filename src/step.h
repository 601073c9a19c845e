/* step: one optimizer step, the only place that orders its phases. */
#ifndef MD_STEP_H
#define MD_STEP_H

#include "io/prefetch.h"
#include "mpi/grad_reduce.h"
#include "src/method.h"
#include "src/shard.h"

/* What training carries from step to step besides parameters and moments; saved in checkpoints. */
typedef struct md_train_state {
    int64_t step;    /* next step to run */
    int64_t updates; /* optimizer updates applied */
    int64_t skipped; /* steps whose update was skipped */
    int64_t skipped_in_row;
    int64_t bad_images;   /* replaced so far, over all ranks */
    int64_t bad_in_epoch; /* of them, in the present epoch */
} md_train_state;

typedef struct md_step_result {
    double loss, grad_norm, learning_rate;
    double data_wait, comm_wait; /* seconds on this rank */
    double backward_begin;       /* of the last pass, as md_now() has it */
    int64_t bad; /* images replaced in this step, on all ranks; also when it fails */
    bool skipped;
    bool stop; /* some rank wants to stop */
} md_step_result;

/* Where micro-batches come from: the loader, or made-up pictures in a benchmark. take gives this
 * rank's own images of micro-batch `micro` of global step `step` and adds the seconds waited to
 * *wait. */
typedef struct md_batch_source {
    void *context;
    md_status (*take)(void *context, int64_t step, int micro, const md_batch **batch, double *wait);
    void (*release)(void *context, const md_batch *batch);
} md_batch_source;

typedef struct md_stepper_args {
    const md_config *config;
    md_method *method; /* built; registries allocated, with moments for the shard */
    md_backend *backend;
    const md_topo *topo;
    const md_shard *shard;
    md_batch_source source;
    int64_t steps_per_epoch;
    int accumulation; /* micro-batches of method->images a step and dp rank */
} md_stepper_args;

typedef struct md_stepper md_stepper;

/* Allocates the activations, scratch and host-side batch buffers, and binds the graphs. Local. */
md_status md_stepper_create(const md_stepper_args *args, md_stepper **out);
void md_stepper_free(md_stepper *t);

/* Bytes of one stepper's buffers (activations, scratch, batch as operands; host_batch on the host),
 * from shapes alone; and what this rank computes in one pass. method's graphs run over a group of
 * the plan carrier, or alone. */
typedef struct md_stepper_bytes {
    size_t activations, scratch, batch, host_batch;
    /* FLOP of one micro-batch, as if drop path skipped nothing; what of the student's forward pass
     * is done once more in the backward pass; and how many of all these it is expected to skip. */
    double student_forward, student_backward, teacher_forward, student_recomputed, student_skipped;
} md_stepper_bytes;
md_status md_stepper_plan(const md_method *method, md_backend *backend, md_stepper_bytes *out);

/* Collective(world). Runs step s->step on its images and advances s. stop_wanted travels to all
 * ranks in the step's one small reduction. A failure of the loader on one rank is agreed upon after
 * the gradient reduction, so that every rank returns the same status and none waits; one of an op
 * ends the job where other ranks would wait in the middle of a pass or an update. MD_ERR_DATA
 * beyond data.max_bad, counted over all ranks; MD_ERR_NUMERICS after optim.max_skipped skipped
 * updates in a row. On error the parameters are those of the last finished step.
 *
 * Under ZeRO the parameters are still being gathered when this returns: md_step_settle first. */
md_status md_step_run(md_stepper *t, md_train_state *s, bool stop_wanted, md_step_result *out);
/* Collective(world). Waits until every rank has all parameters; returns the seconds waited. */
double md_step_settle(md_stepper *t);

/* Collective(world). The same, and the parameters are as the forward pass reads them: for a look
 * between steps. MD_ERR_DEVICE. */
md_status md_step_parameters(md_stepper *t);

/* Collective(world). The same, with parameters and their moving averages in each other's place; a
 * second call undoes it to the bit. The same status on every rank: MD_ERR_DEVICE. */
md_status md_step_swap_averages(md_stepper *t);

/* The reducer, for traces. */
const md_grad_reduce *md_step_reducer(const md_stepper *t);

#endif
