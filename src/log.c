/* log: see log.h. Log lines are written with one write() each to a file opened for appending; after
 * a short write the file is cut back to its last whole line, so a full disk never leaves half an
 * object in the middle of a log. */
#include "src/log.h"

#include "build_stamp.h" /* made by the Makefile: MD_BUILD_SOURCE, MD_BUILD_FLAGS */

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MESSAGE_SIZE 4608 /* an error text and what is put in front of its lines */
#define PATH_SIZE    4096
#define JSON_FLAGS   (JSON_COMPACT | JSON_REAL_PRECISION(17))

extern char **environ;

static md_log_level least_level = MD_LOG_INFO;

static const char *const level_fronts[] = {"md_hpc: debug: ", "",
                                           "md_hpc: warning: ", "md_hpc: error: "};

/* A file of JSON lines. */
typedef struct json_lines {
    char path[PATH_SIZE];
    int fd;
    off_t size;  /* end of the last whole line */
    bool warned; /* told once that it cannot be written */
} json_lines;

struct md_runlog {
    char dir[PATH_SIZE - 64];
    json_lines metrics, evaluations, events;
    bool warned; /* about status.json or run.json */
};

/* ---- messages ---- */

/* Prints every line of `text` behind the level's front, in one write. */
static void emit(md_log_level level, bool name_rank, const char *text)
{
    char out[2 * MESSAGE_SIZE], rank[32] = "";
    if (name_rank)
        snprintf(rank, sizeof rank, "rank %d: ", md_base_rank());
    size_t used = 0;
    while (*text && used < sizeof out - 1) {
        size_t line = strcspn(text, "\n");
        int n = snprintf(out + used, sizeof out - used, "%s%s%.*s\n", level_fronts[level], rank,
                         (int)line, text);
        used = MD_MIN(used + (size_t)n, sizeof out - 1);
        text += line + (text[line] == '\n');
    }
    FILE *to = level == MD_LOG_INFO ? stdout : stderr;
    fwrite(out, 1, used, to);
    fflush(to);
}

static void message(md_log_level level, bool every_rank, const char *fmt, va_list ap)
{
    if (level < least_level || (!every_rank && md_base_rank() != 0))
        return;
    char text[MESSAGE_SIZE];
    vsnprintf(text, sizeof text, fmt, ap);
    emit(level, every_rank && md_base_size() > 1, text);
}

void md_log_set(md_log_level least)
{
    least_level = least;
}

#define MESSAGE(level, every_rank)       \
    va_list ap;                          \
    va_start(ap, fmt);                   \
    message(level, every_rank, fmt, ap); \
    va_end(ap)

void md_log_debug(const char *fmt, ...)
{
    MESSAGE(MD_LOG_DEBUG, true);
}

void md_log_info(const char *fmt, ...)
{
    MESSAGE(MD_LOG_INFO, false);
}

void md_log_warn(const char *fmt, ...)
{
    MESSAGE(MD_LOG_WARN, false);
}

void md_log_error(const char *fmt, ...)
{
    MESSAGE(MD_LOG_ERROR, false);
}

void md_log_rank(md_log_level level, const char *fmt, ...)
{
    MESSAGE(level, true);
}

const md_fact *md_build_facts(int *n)
{
    static const md_fact facts[] = {
        {"version", MD_VERSION},   {"source", MD_BUILD_SOURCE},  {"compiler", "gcc " __VERSION__},
        {"flags", MD_BUILD_FLAGS}, {"jansson", JANSSON_VERSION},
    };
    *n = (int)MD_COUNT(facts);
    return facts;
}

/* ---- files of the run directory ---- */

static void warn_once(bool *warned, const char *path, const char *what)
{
    if (!*warned)
        md_log_warn("cannot write %s: %s; the run goes on without it", path, what);
    *warned = true;
}

static json_t *time_now(void)
{
    struct timespec t;
    struct tm tm;
    char day[32], text[48];
    clock_gettime(CLOCK_REALTIME, &t);
    gmtime_r(&t.tv_sec, &tm);
    strftime(day, sizeof day, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(text, sizeof text, "%s.%03dZ", day, (int)(t.tv_nsec / 1000000));
    return json_string(text);
}

/* Text from elsewhere (file names, messages of libraries) need not be UTF-8, which JSON asks for.
 */
static json_t *text_json(const char *text)
{
    json_t *j = json_string(text);
    if (j)
        return j;
    char ascii[MESSAGE_SIZE];
    size_t i = 0;
    for (; text[i] && i < sizeof ascii - 1; i++)
        ascii[i] = (unsigned char)text[i] < 0x80 ? text[i] : '?';
    ascii[i] = 0;
    return json_string(ascii);
}

/* Appends one object as a line and drops the caller's reference to it. */
static void lines_append(json_lines *f, json_t *object)
{
    char *text = json_dumps(object, JSON_FLAGS);
    json_decref(object);
    if (!text) {
        warn_once(&f->warned, f->path, "out of memory");
        return;
    }
    size_t n = strlen(text);
    text[n++] = '\n'; /* in place of the terminator */
    size_t part = md_fault("log.write") ? n / 2 : n;
    errno = ENOSPC; /* what a short write without an error code means */
    ssize_t done = write(f->fd, text, part);
    if (done == (ssize_t)n) {
        f->size += done;
    } else {
        warn_once(&f->warned, f->path, strerror(errno));
        if (ftruncate(f->fd, f->size) != 0)
            f->size += MD_MAX(done, 0);
    }
    free(text);
}

/* True when the line (without its end) is an object whose step, if it has one, is not too late. */
static bool line_keep(const char *line, size_t n, int64_t last_step)
{
    json_t *j = json_loadb(line, n, JSON_REJECT_DUPLICATES, NULL);
    json_t *step = json_object_get(j, "step");
    bool keep = json_is_object(j) && (!step || json_integer_value(step) <= last_step);
    json_decref(j);
    return keep;
}

/* Copies the lines worth keeping of f->path to `to`. *dropped counts the others. */
static md_status lines_filter(json_lines *f, const char *to, int64_t last_step, bool *dropped)
{
    FILE *in = fopen(f->path, "r");
    if (!in && errno != ENOENT)
        MD_FAIL(MD_ERR_IO, "cannot read %s: %s", f->path, strerror(errno));
    FILE *out = fopen(to, "w");
    if (!out) {
        if (in)
            fclose(in);
        MD_FAIL(MD_ERR_CREATE, "cannot create %s: %s", to, strerror(errno));
    }
    char *line = NULL;
    size_t room = 0;
    ssize_t n;
    while (in && (n = getline(&line, &room, in)) > 0) {
        bool keep = line[n - 1] == '\n' && line_keep(line, (size_t)n - 1, last_step);
        *dropped |= !keep;
        if (keep) {
            fwrite(line, 1, (size_t)n, out);
            f->size += n;
        }
    }
    free(line);
    bool bad = in && ferror(in);
    if (in)
        fclose(in);
    bad |= fflush(out) != 0 || fsync(fileno(out)) != 0;
    bad |= fclose(out) != 0;
    if (bad)
        MD_FAIL(MD_ERR_IO, "cannot copy %s to %s: %s", f->path, to, strerror(errno));
    return MD_OK;
}

static md_status lines_open(json_lines *f, const char *dir, const char *name, int64_t last_step)
{
    char fresh[PATH_SIZE + 8];
    bool dropped = false;
    f->fd = -1;
    snprintf(f->path, sizeof f->path, "%s/%s", dir, name);
    snprintf(fresh, sizeof fresh, "%s.new", f->path);
    md_status st = lines_filter(f, fresh, last_step, &dropped);
    if (st == MD_OK && dropped && rename(fresh, f->path) != 0)
        st = md_error_set(MD_ERR_IO, "cannot replace %s: %s", f->path, strerror(errno));
    if (st != MD_OK || !dropped)
        unlink(fresh);
    MD_TRY(st);
    errno = EIO;
    f->fd =
        md_fault("log.open") ? -1 : open(f->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (f->fd < 0)
        MD_FAIL(MD_ERR_CREATE, "cannot open %s: %s", f->path, strerror(errno));
    return MD_OK;
}

md_status md_runlog_open(const char *dir, int64_t resumed_step, md_runlog **out)
{
    *out = NULL;
    md_runlog *log;
    MD_NEW(log, 1, "log");
    log->metrics.fd = log->evaluations.fd = log->events.fd = -1;
    snprintf(log->dir, sizeof log->dir, "%s", dir);
    md_status st = lines_open(&log->metrics, log->dir, "metrics.jsonl", resumed_step);
    if (st == MD_OK)
        st = lines_open(&log->evaluations, log->dir, "evaluations.jsonl", resumed_step);
    if (st == MD_OK)
        st = lines_open(&log->events, log->dir, "events.jsonl", INT64_MAX);
    if (st != MD_OK) {
        md_runlog_close(log);
        return st;
    }
    *out = log;
    return MD_OK;
}

void md_runlog_close(md_runlog *log)
{
    if (!log)
        return;
    if (log->metrics.fd >= 0)
        close(log->metrics.fd);
    if (log->evaluations.fd >= 0)
        close(log->evaluations.fd);
    if (log->events.fd >= 0)
        close(log->events.fd);
    md_free(log);
}

static json_t *int64_t_json(int64_t v)
{
    return json_integer(v);
}

static json_t *double_json(double v)
{
    return isfinite(v) ? json_real(v) : json_null();
}

void md_runlog_metrics(md_runlog *log, const md_metrics *m)
{
    if (!log)
        return;
    json_t *j = json_object();
#define MD_METRICS_PUT(type, key) json_object_set_new(j, #key, type##_json(m->key));
    MD_METRICS(MD_METRICS_PUT)
#undef MD_METRICS_PUT
    lines_append(&log->metrics, j);
}

void md_runlog_evaluation(md_runlog *log, const md_evaluation *e)
{
    if (!log)
        return;
    json_t *j = json_object();
#define MD_EVALUATION_PUT(type, key) json_object_set_new(j, #key, type##_json(e->key));
    MD_EVALUATION(MD_EVALUATION_PUT)
#undef MD_EVALUATION_PUT
    lines_append(&log->evaluations, j);
}

void md_runlog_event(md_runlog *log, int64_t step, const char *event, const char *fmt, ...)
{
    if (!log)
        return;
    char text[MESSAGE_SIZE];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    json_t *j = json_object();
    json_object_set_new(j, "time", time_now());
    json_object_set_new(j, "step", json_integer(step));
    json_object_set_new(j, "event", text_json(event));
    json_object_set_new(j, "text", text_json(text));
    lines_append(&log->events, j);
}

/* Writes `object` to dir/name so that a reader sees the old file or the new one, never a part. */
static void replace_json(md_runlog *log, const char *name, json_t *object)
{
    char path[PATH_SIZE], fresh[PATH_SIZE + 8];
    snprintf(path, sizeof path, "%s/%s", log->dir, name);
    snprintf(fresh, sizeof fresh, "%s.new", path);
    FILE *f = fopen(fresh, "w");
    bool good = f && json_dumpf(object, f, JSON_INDENT(2) | JSON_REAL_PRECISION(17)) == 0;
    good = good && fputc('\n', f) != EOF && fflush(f) == 0 && fsync(fileno(f)) == 0;
    if (f)
        good = (fclose(f) == 0) && good;
    if (md_fault("log.replace")) {
        good = false;
        errno = ENOSPC;
    }
    good = good && rename(fresh, path) == 0;
    if (!good) {
        warn_once(&log->warned, path, strerror(errno));
        unlink(fresh);
    }
    json_decref(object);
}

void md_runlog_status(md_runlog *log, const char *state, int64_t step, int exit_code,
                      const char *message_text)
{
    if (!log)
        return;
    json_t *j = json_object();
    json_object_set_new(j, "state", text_json(state));
    json_object_set_new(j, "step", json_integer(step));
    json_object_set_new(j, "exit_code", json_integer(exit_code));
    json_object_set_new(j, "message", text_json(message_text));
    json_object_set_new(j, "time", time_now());
    replace_json(log, "status.json", j);
}

void md_runlog_failed(const char *dir, int64_t step, int exit_code, const char *message_text)
{
    md_runlog log = {.warned = true}; /* the message is on its way to people by itself */
    snprintf(log.dir, sizeof log.dir, "%s", dir);
    md_runlog_status(&log, "failed", step, exit_code, message_text);
}

/* The variables that change how a run behaves. Never the whole environment: it holds secrets. */
static json_t *environment_json(void)
{
    static const char *const fronts[] = {"SLURM_", "PBS_",  "OMPI_", "OMP_",
                                         "CUDA_",  "NCCL_", "UCX_",  "HDF5_"};
    json_t *j = json_object();
    for (char **e = environ; e && *e; e++) {
        const char *value = strchr(*e, '=');
        for (size_t i = 0; value && i < MD_COUNT(fronts); i++) {
            char name[256];
            if (strncmp(*e, fronts[i], strlen(fronts[i])) != 0)
                continue;
            snprintf(name, sizeof name, "%.*s", (int)(value - *e), *e);
            json_object_set_new(j, name, text_json(value + 1));
        }
    }
    return j;
}

static json_t *facts_json(const md_fact *facts, int n)
{
    json_t *j = json_object();
    for (int i = 0; i < n; i++)
        json_object_set_new(j, facts[i].name, text_json(facts[i].value));
    return j;
}

void md_runlog_run(md_runlog *log, const md_fact *facts, int n_facts, const char *const *hosts,
                   int n_hosts)
{
    if (!log)
        return;
    int n_build;
    const md_fact *build = md_build_facts(&n_build);
    json_t *j = json_object(), *names = json_array();
    for (int i = 0; i < n_hosts; i++)
        json_array_append_new(names, text_json(hosts[i]));
    json_object_set_new(j, "time", time_now());
    json_object_set_new(j, "ranks", json_integer(md_base_size()));
    json_object_set_new(j, "build", facts_json(build, n_build));
    json_object_set_new(j, "run", facts_json(facts, n_facts));
    json_object_set_new(j, "hosts", names);
    json_object_set_new(j, "environment", environment_json());
    replace_json(log, "run.json", j);
}
