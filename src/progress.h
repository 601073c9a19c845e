/* progress: what a person sees of a run: one line per log.every steps, a summary at the end. */
#ifndef MD_PROGRESS_H
#define MD_PROGRESS_H

#include "mpi/comm.h"
#include "src/log.h"
#include "src/step.h"

typedef struct md_progress {
    int64_t first_step, total_steps, steps_per_epoch, batch;
    double started;   /* md_now() at the first step */
    double last_line; /* md_now() of the last line */
    int64_t last_line_step;
    double step_seconds, step_min, step_max, data_wait, comm_wait; /* sums over steps */
    double checkpoint_seconds;
    int64_t checkpoints, steps;
    double first_loss, last_loss;
} md_progress;

/* Starts counting at `first_step`. Local. */
void md_progress_start(md_progress *p, int64_t first_step, int64_t total_steps,
                       int64_t steps_per_epoch, int64_t batch);
/* Takes in one finished step and fills the metrics of it. Local. */
void md_progress_step(md_progress *p, const md_train_state *s, const md_step_result *r,
                      double seconds, md_metrics *m);
/* Prints the line of a step (rank 0). Local. */
void md_progress_line(md_progress *p, const md_metrics *m);
/* Prints the summary with the spread over ranks and advice. Collective(c). */
void md_progress_summary(const md_progress *p, md_comm *c, const char *checkpoint);

/* Most memory this process has held, bytes (VmHWM). Local. */
int64_t md_memory_peak(void);

#endif
