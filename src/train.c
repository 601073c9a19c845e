/* train: the loop of a run: steps, checkpoints, signals, the end. */
#include "mpi/comm_mpi.h"
#include "src/cli.h"
#include "src/signals.h"
#include "src/train_run.h"
#include "src/watchdog.h"

#include <stdio.h>
#include <string.h>

/* ---- loop ---- */

static bool checkpoint_due(const md_run *r)
{
    int64_t every = r->config.checkpoint_every ? r->config.checkpoint_every : r->steps_per_epoch;
    return r->state.step % every == 0;
}

/* Collective(world). A checkpoint that cannot be written is a warning: training goes on with the
 * old one. */
static md_status save(md_run *r)
{
    if (r->saved_step == r->state.step)
        return MD_OK;
    double start = md_now();
    md_step_settle(r->stepper);
    md_part part = md_phase_part(MD_PART_CHECKPOINT);
    md_phase("ckpt.begin");
    md_snapshot s = md_run_snapshot(r);
    md_status st = md_snapshot_write(&s, r->checkpoint, sizeof r->checkpoint);
    md_phase_part(part);
    md_phase("ckpt.end");
    r->progress.checkpoint_seconds += md_now() - start;
    if (st == MD_OK) {
        r->saved_step = r->state.step;
        r->progress.checkpoints++;
        md_runlog_event(r->log, r->state.step, "checkpoint", "%s", r->checkpoint);
    } else {
        md_log_warn("no checkpoint at step %lld, the older ones stay: %s", (long long)r->state.step,
                    md_error_text());
        md_runlog_event(r->log, r->state.step, "checkpoint_failed", "%s", md_error_text());
    }
    return st;
}

/* Collective(world). Data that cannot be used ends the run before the step has touched parameters
 * or counters: what came before is kept, and the reason stays the error. */
static md_status save_before(md_run *r, md_status st)
{
    char reason[4096]; /* save sets others */
    snprintf(reason, sizeof reason, "%s", md_error_text());
    save(r);
    return md_error_set(st, "%s", reason);
}

static bool evaluation_due(const md_run *r)
{
    return r->evaluator && (r->state.step == r->total_steps ||
                            r->state.step % (r->config.evaluate_every * r->steps_per_epoch) == 0);
}

/* Collective(world). */
static md_status evaluate(md_run *r)
{
    const double start = md_now();
    const md_part part = md_phase_part(MD_PART_CHECKPOINT);
    const bool average = r->config.evaluate_ema;
    md_accuracy a;
    MD_TRY(average ? md_step_swap_averages(r->stepper) : md_step_parameters(r->stepper));
    MD_TRY(md_evaluate_accuracy(r->evaluator, NULL, &a));
    md_status st = average ? md_step_swap_averages(r->stepper) : MD_OK;
    md_phase_part(part);
    const md_evaluation line = {.step = r->state.step,
                                .epoch = (double)r->state.step / (double)r->steps_per_epoch,
                                .images = a.all.images,
                                .top1_hits = a.all.top1,
                                .top5_hits = a.all.top5,
                                .top1 = md_percent(a.all.top1, a.all.images),
                                .top5 = md_percent(a.all.top5, a.all.images),
                                .loss = a.loss,
                                .ema = average,
                                .seconds = md_now() - start};
    md_accuracy_free(&a);
    MD_TRY(st);
    md_runlog_evaluation(r->log, &line);
    md_log_info("evaluation%s after epoch %.4g: top-1 %.2f %% (%lld of %lld), top-5 %.2f %%, loss "
                "%.4f, %.1f s",
                average ? " of the moving average" : "", line.epoch, line.top1,
                (long long)line.top1_hits, (long long)line.images, line.top5, line.loss,
                line.seconds);
    return MD_OK;
}

static md_status one_step(md_run *r, bool *stop)
{
    const md_config *c = &r->config;
    md_step_result result;
    md_metrics metrics;
    double start = md_now();
    const int64_t step = r->state.step + 1; /* in logs, steps count from 1 */
    md_status st = md_step_run(r->stepper, &r->state, md_signals_came(), &result);
    if (result.bad > 0)
        md_bad_images_tell(r->bad, step, r->log);
    if (st == MD_ERR_DATA && r->state.step > 0)
        return save_before(r, st);
    MD_TRY(st);
    md_phase("log");
    md_progress_step(&r->progress, &r->state, &result, md_now() - start, &metrics);
    md_runlog_metrics(r->log, &metrics);
    if (r->lock)
        md_run_lock_touch(r->lock);
    if (result.skipped)
        md_runlog_event(r->log, r->state.step, "skipped", "loss %g, gradient norm %g", result.loss,
                        result.grad_norm);
    if (r->state.step % c->log_every == 0 || r->state.step == r->total_steps)
        md_progress_line(&r->progress, &metrics);
    if (c->check_every && r->state.step % c->check_every == 0) {
        md_step_settle(r->stepper);
        MD_TRY(md_drift_check(&r->drift, &r->topo, &r->model, r->state.step));
    }
    if (checkpoint_due(r))
        save(r);
    if (evaluation_due(r) && !result.stop)
        MD_TRY(evaluate(r));
    *stop = result.stop;
    return MD_OK;
}

/* Collective(world). Ends at the last step, or at the step at which some rank had a signal. */
static md_status loop(md_run *r)
{
    bool stop = false;
    if (r->state.step >= r->total_steps) {
        md_log_info("the run is finished: it has %lld of %lld steps; to go on, raise train.epochs "
                    "or train.max_steps",
                    (long long)r->state.step, (long long)r->total_steps);
        return save(r); /* of a run that began with the last step of another one */
    }
    md_progress_start(&r->progress, r->state.step, r->total_steps, r->steps_per_epoch,
                      r->layout.batch);
    md_runlog_status(r->log, "running", r->state.step, 0, "");
    md_runlog_event(r->log, r->state.step, *r->checkpoint ? "resume" : "start", "%d ranks%s%s",
                    r->layout.ranks, *r->checkpoint ? ", from " : "", r->checkpoint);
    md_phase_part(MD_PART_STEP);
    while (r->state.step < r->total_steps && !stop)
        MD_TRY(one_step(r, &stop));
    if (stop)
        md_runlog_event(r->log, r->state.step, "stop", "a rank had a signal");
    MD_TRY(save(r));
    md_progress_summary(&r->progress, r->world, r->checkpoint);
    if (r->state.step == r->total_steps)
        return MD_OK;
    bool automatic = strcmp(r->config.checkpoint_resume, "auto") == 0;
    MD_FAIL(MD_STOPPED, "stopped at step %lld of %lld with a checkpoint: %s goes on from there",
            (long long)r->state.step, (long long)r->total_steps,
            automatic ? "the same command" : "checkpoint.resume=auto");
}

static void close_logs(md_run *r, md_status st)
{
    const char *state = st == MD_OK ? "finished" : st == MD_STOPPED ? "requeue" : "failed";
    md_runlog_status(r->log, state, r->state.step, st, st == MD_OK ? "" : md_error_text());
    md_runlog_close(r->log);
}
static md_status cmd_train(int argc, char **argv)
{
    md_run r = {0};
    md_signals_catch(); /* first: one that comes during setup stops the run after its first step */
    MD_TRY(md_mpi_start(&argc, &argv, &r.world));
    md_status st = md_run_set_up(&r, argc, argv);
    if (st == MD_OK)
        st = loop(&r);
    md_phase("end");
    close_logs(&r, st);
    md_run_tear_down(&r);
    md_watch_stop();
    md_cli_report(st);
    md_mpi_stop(r.world);
    return st;
}

const md_verb md_verb_train = {
    "train", cmd_train, "train what a config file describes (the verb may be left out)",
    "mpirun -np N md_hpc [train] FILE.cfg [key=value ...]\n"
    "\n"
    "Writes checkpoints, metrics.jsonl, events.jsonl, status.json, run.json and the resolved\n"
    "config.cfg into the run directory (run.dir), and goes on from its newest checkpoint.\n"
    "USR1 (to mpirun or any rank), TERM and INT (to a rank, as srun sends them) stop it after the\n"
    "current step with a checkpoint and exit code 75; mpirun itself kills its ranks on TERM."};
