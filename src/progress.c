/* progress: see progress.h. */
#include "src/progress.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

int64_t md_memory_peak(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (int64_t)usage.ru_maxrss * 1024;
}

void md_progress_start(md_progress *p, int64_t first_step, int64_t total_steps,
                       int64_t steps_per_epoch, int64_t batch)
{
    double now = md_now();
    *p = (md_progress){.first_step = first_step,
                       .total_steps = total_steps,
                       .steps_per_epoch = steps_per_epoch,
                       .batch = batch,
                       .started = now,
                       .last_line = now,
                       .last_line_step = first_step,
                       .step_min = INFINITY,
                       .first_loss = NAN,
                       .last_loss = NAN};
}

void md_progress_step(md_progress *p, const md_train_state *s, const md_step_result *r,
                      double seconds, md_metrics *m)
{
    if (p->steps++ == 0)
        p->first_loss = r->loss;
    p->last_loss = r->loss;
    p->step_seconds += seconds;
    p->step_min = MD_MIN(p->step_min, seconds);
    p->step_max = MD_MAX(p->step_max, seconds);
    p->data_wait += r->data_wait;
    p->comm_wait += r->comm_wait;
    *m = (md_metrics){.step = s->step,
                      .epoch = (double)s->step / (double)p->steps_per_epoch,
                      .loss = r->loss,
                      .grad_norm = r->grad_norm,
                      .learning_rate = r->learning_rate,
                      .images_per_second = (double)p->batch / seconds,
                      .step_seconds = seconds,
                      .data_wait_seconds = r->data_wait,
                      .comm_wait_seconds = r->comm_wait,
                      .mfu = NAN, /* no published peak for this device */
                      .memory_bytes = md_memory_peak(),
                      .bad_images = s->bad_images,
                      .skipped = s->skipped};
}

/* "8h12m", "12m03s", "45s". */
static const char *duration(double seconds, char *buf, size_t size)
{
    int64_t s = (int64_t)(seconds + 0.5);
    if (s >= 86400)
        snprintf(buf, size, "%lldd%02lldh", (long long)(s / 86400), (long long)(s % 86400 / 3600));
    else if (s >= 3600)
        snprintf(buf, size, "%lldh%02lldm", (long long)(s / 3600), (long long)(s % 3600 / 60));
    else if (s >= 60)
        snprintf(buf, size, "%lldm%02llds", (long long)(s / 60), (long long)(s % 60));
    else
        snprintf(buf, size, "%llds", (long long)s);
    return buf;
}

void md_progress_line(md_progress *p, const md_metrics *m)
{
    double now = md_now();
    int64_t steps = MD_MAX(m->step - p->last_line_step, 1);
    double per_step = (now - p->last_line) / (double)steps;
    char eta[32];
    md_log_info("step %6lld/%lld  epoch %7.2f  loss %.5f  gnorm %8.3f  lr %.3e | %8.1f img/s %7.0f "
                "ms (data %.0f comm %.0f) | mem %.2f GiB  bad %lld  skip %lld | eta %s",
                (long long)m->step, (long long)p->total_steps, m->epoch, m->loss, m->grad_norm,
                m->learning_rate, (double)p->batch / per_step, 1e3 * per_step,
                1e3 * m->data_wait_seconds, 1e3 * m->comm_wait_seconds,
                (double)m->memory_bytes / 1073741824.0, (long long)m->bad_images,
                (long long)m->skipped,
                duration(per_step * (double)(p->total_steps - m->step), eta, sizeof eta));
    p->last_line = now;
    p->last_line_step = m->step;
}

/* Least, mean and greatest of one value over the ranks, and the host of the greatest. */
typedef struct spread {
    double min, mean, max;
    int slowest;
} spread;

static spread over_ranks(md_comm *c, double value)
{
    double both[2] = {-value, value}, sum = value;
    md_comm_allreduce(c, both, 2, MD_F64, MD_MAX_OP);
    md_comm_allreduce(c, &sum, 1, MD_F64, MD_SUM);
    int64_t slowest = value >= both[1] ? md_comm_rank(c) : INT32_MAX;
    md_comm_allreduce(c, &slowest, 1, MD_I64, MD_MIN_OP);
    return (spread){-both[0], sum / md_comm_size(c), both[1], (int)slowest};
}

static void region(const char *name, double seconds, double wall, spread s)
{
    md_log_info("  %-14s %10.2f s  %5.1f %%   over ranks %.2f / %.2f / %.2f s (rank %d most)", name,
                seconds, wall > 0 ? 100.0 * seconds / wall : 0.0, s.min, s.mean, s.max, s.slowest);
}

void md_progress_summary(const md_progress *p, md_comm *c, const char *checkpoint)
{
    double wall = md_now() - p->started;
    spread step = over_ranks(c, p->step_seconds), data = over_ranks(c, p->data_wait);
    spread comm = over_ranks(c, p->comm_wait), ckpt = over_ranks(c, p->checkpoint_seconds);
    spread memory = over_ranks(c, (double)md_memory_peak() / 1073741824.0);
    if (p->steps == 0)
        return;
    double rate = (double)(p->steps * p->batch) / p->step_seconds;
    md_log_info("%lld steps in %.1f s: %.1f images/s, loss %.5f -> %.5f", (long long)p->steps, wall,
                rate, p->first_loss, p->last_loss);
    region("training steps", p->step_seconds, wall, step);
    region("- data wait", p->data_wait, wall, data);
    region("- comm wait", p->comm_wait, wall, comm);
    region("checkpoints", p->checkpoint_seconds, wall, ckpt);
    md_log_info("  memory peak    %.2f / %.2f / %.2f GiB a rank (min / mean / max)", memory.min,
                memory.mean, memory.max);
    if (data.max > 0.05 * p->step_seconds)
        md_log_info(
            "NOTE: %.0f %% of the step waits for data: raise data.workers or data.prefetch, "
            "or put the image store on a faster disk",
            100.0 * data.max / p->step_seconds);
    if (comm.max > 0.10 * p->step_seconds)
        md_log_info("NOTE: %.0f %% of the step waits for gradients: use fewer ranks, a larger "
                    "batch, or check that ranks and cores match",
                    100.0 * comm.max / p->step_seconds);
    if (checkpoint && *checkpoint)
        md_log_info("last checkpoint: %s", checkpoint);
}
