/* log: messages to people, and the machine-readable files of a run directory.
 *
 * Messages: info goes to stdout, the rest to stderr as "md_hpc: error: ...". Info, warnings and
 * errors are printed by rank 0 alone, so that a line is one line at any scale; debug messages and
 * md_log_rank are printed by the rank that calls, which names itself. Each message is one write.
 *
 * Run directory (rank 0 opens it; the others hold NULL, which every function accepts):
 *   metrics.jsonl  one object a step with the keys of MD_METRICS, never two for one step
 *   evaluations.jsonl  one object an evaluation with the keys of MD_EVALUATION
 *   events.jsonl   rare things: {"time", "step", "event", "text"}; only ever appended to
 *   status.json    {"state", "step", "exit_code", "message", "time"}, replaced atomically
 *   run.json       build, libraries, hosts, environment by whitelist, replaced atomically
 * A log that cannot be written (disk full) is warned about once and never stops the run. */
#ifndef MD_LOG_H
#define MD_LOG_H

#include "src/base.h"

/* In the order of the key log.level. */
typedef enum md_log_level { MD_LOG_DEBUG, MD_LOG_INFO, MD_LOG_WARN, MD_LOG_ERROR } md_log_level;

/* Least severe level that is printed; MD_LOG_INFO at start. Local. */
void md_log_set(md_log_level least);

void md_log_debug(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void md_log_info(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void md_log_warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void md_log_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Printed by the calling rank, whichever it is, with "rank N: " in front. */
void md_log_rank(md_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* X(type, key): a line of metrics.jsonl. A real that is not finite is written as null; reals are
 * written with 17 digits, so that equal lines mean equal bits. */
#define MD_METRICS(X)            \
    X(int64_t, step)             \
    X(double, epoch)             \
    X(double, loss)              \
    X(double, grad_norm)         \
    X(double, learning_rate)     \
    X(double, images_per_second) \
    X(double, step_seconds)      \
    X(double, data_wait_seconds) \
    X(double, comm_wait_seconds) \
    X(double, mfu)               \
    X(int64_t, memory_bytes)     \
    X(int64_t, bad_images)       \
    X(int64_t, skipped)

typedef struct md_metrics {
#define MD_METRICS_FIELD(type, key) type key;
    MD_METRICS(MD_METRICS_FIELD)
#undef MD_METRICS_FIELD
} md_metrics;

/* X(type, key): a line of evaluations.jsonl. Top-1 and top-5 as images and in per cent; ema:
 * 1 where the moving averages were evaluated; seconds it took. */
#define MD_EVALUATION(X)  \
    X(int64_t, step)      \
    X(double, epoch)      \
    X(int64_t, images)    \
    X(int64_t, top1_hits) \
    X(int64_t, top5_hits) \
    X(double, top1)       \
    X(double, top5)       \
    X(double, loss)       \
    X(int64_t, ema)       \
    X(double, seconds)

typedef struct md_evaluation {
#define MD_EVALUATION_FIELD(type, key) type key;
    MD_EVALUATION(MD_EVALUATION_FIELD)
#undef MD_EVALUATION_FIELD
} md_evaluation;

/* One "name: value" of run.json, for instance {"hdf5", "1.10.8 (compiled 1.10.8)"}. */
typedef struct md_fact {
    const char *name, *value;
} md_fact;

/* How this binary was made: version, source (git id, "-dirty" when changed), compiler, flags. The
 * array is constant; *n gets its length. Local. */
const md_fact *md_build_facts(int *n);

typedef struct md_runlog md_runlog;

/* Opens the logs of an existing directory for appending. Lines of metrics.jsonl and
 * evaluations.jsonl with a step beyond resumed_step (-1 for a new run) and torn or unreadable lines
 * are removed first. Local. MD_ERR_CREATE or MD_ERR_IO when the directory cannot be used; *out is
 * then NULL. */
md_status md_runlog_open(const char *dir, int64_t resumed_step, md_runlog **out);
void md_runlog_close(md_runlog *log);

void md_runlog_metrics(md_runlog *log, const md_metrics *m);
void md_runlog_evaluation(md_runlog *log, const md_evaluation *e);
void md_runlog_event(md_runlog *log, int64_t step, const char *event, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* state: "running", "requeue" (checkpointed, to be run again), "finished" or "failed". */
void md_runlog_status(md_runlog *log, const char *state, int64_t step, int exit_code,
                      const char *message);
/* The status.json of a run that failed, written by a rank that need not have opened the directory.
 * Local; may be called from any thread. */
void md_runlog_failed(const char *dir, int64_t step, int exit_code, const char *message);
/* Writes run.json: the build, the caller's facts (library versions, devices, hashes), host names
 * and the environment variables of launchers and libraries. */
void md_runlog_run(md_runlog *log, const md_fact *facts, int n_facts, const char *const *hosts,
                   int n_hosts);

#endif
