/* watchdog: see watchdog.h. Two threads: the timer reads marks and clock and touches no file, so
 * that a dead file system cannot stop it; the clerk does all that needs files. Neither calls MPI,
 * and both block all signals. */
#include "src/watchdog.h"
#include "src/hang_dir.h"
#include "src/log.h"

#include <errno.h>
#include <execinfo.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PATH_SIZE    4096
#define VERDICT_SIZE 2048
#define FRAMES       64
#define STACK_SIGNAL (SIGRTMIN + 1)

/* Written by the main thread alone; so a load and a store make an increment. */
static struct {
    _Atomic(const char *) phase;
    _Atomic uint64_t marks; /* changes with every mark */
    _Atomic int64_t step, collectives;
    _Atomic int part;
} mark = {.phase = "start"};

static struct {
    pthread_t main, timer, clerk;
    bool on;
    pthread_mutex_t lock; /* of the two flags */
    pthread_cond_t wake;
    bool stop_timer, stop_clerk;
    char dir[PATH_SIZE - 64];
    _Atomic(const char *) run; /* dir, once it is known */
    char host[64];
    int hosts_width;
    _Atomic(char *) hosts; /* [size][hosts_width], or NULL */
    int64_t seconds;       /* hang.seconds; set before the threads start */
    _Atomic double idle;   /* seconds since the last mark */
    atomic_bool breach;    /* longer than the limit */
    atomic_bool forgiven;  /* the clerk to the timer: give it one limit more */
    atomic_int stack_fd;   /* where the main thread is to write its stack; -1 = nowhere */
    atomic_bool stack_done;
} watch = {.lock = PTHREAD_MUTEX_INITIALIZER, .stack_fd = -1};

/* ---- marks ---- */

const char *md_phase(const char *name)
{
    const char *was = atomic_load_explicit(&mark.phase, memory_order_relaxed);
    uint64_t marks = atomic_load_explicit(&mark.marks, memory_order_relaxed);
    /* A collective is entered once, whatever it calls; waits for buckets come as they come. */
    if (strncmp(name, "comm.", 5) == 0 && strncmp(was, "comm.", 5) != 0 &&
        strcmp(name, "comm.wait") != 0) {
        int64_t n = atomic_load_explicit(&mark.collectives, memory_order_relaxed);
        atomic_store_explicit(&mark.collectives, n + 1, memory_order_relaxed);
    }
    atomic_store_explicit(&mark.phase, name, memory_order_relaxed);
    atomic_store_explicit(&mark.marks, marks + 1, memory_order_relaxed);
    return was;
}

void md_phase_step(int64_t step)
{
    atomic_store_explicit(&mark.step, step, memory_order_relaxed);
}

md_part md_phase_part(md_part part)
{
    return (md_part)atomic_exchange(&mark.part, (int)part);
}

static uint64_t marks_now(void)
{
    return atomic_load_explicit(&mark.marks, memory_order_relaxed);
}

static md_hang_record record_now(bool moves)
{
    md_hang_record r = {.answers = true,
                        .moves = moves,
                        .rank = md_base_rank(),
                        .pid = (long)getpid(),
                        .step = atomic_load(&mark.step),
                        .collectives = atomic_load(&mark.collectives),
                        .seconds = atomic_load(&watch.idle)};
    snprintf(r.host, sizeof r.host, "%s", watch.host);
    snprintf(r.phase, sizeof r.phase, "%s", atomic_load(&mark.phase));
    return r;
}

/* ---- time ---- */

static double tick(void)
{
    return MD_MIN(1.0, (double)watch.seconds / 20);
}

static double grace(void)
{
    return md_hang_grace(watch.seconds);
}

/* Sleeps a tick. Returns false when *stop (of the lock) is set. */
static bool nap(const bool *stop)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    long ns = until.tv_nsec + (long)(1e9 * tick());
    until.tv_sec += ns / 1000000000;
    until.tv_nsec = ns % 1000000000;
    pthread_mutex_lock(&watch.lock);
    int rc = 0;
    while (!*stop && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&watch.wake, &watch.lock, &until);
    bool go_on = !*stop;
    pthread_mutex_unlock(&watch.lock);
    return go_on;
}

/* One line on stderr in one write. */
static void say(const char *level, const char *text)
{
    char line[VERDICT_SIZE + 64];
    int n = snprintf(line, sizeof line - 1, "md_hpc: %s: %s\n", level, text);
    ssize_t done = write(STDERR_FILENO, line, (size_t)MD_MIN(n, (int)sizeof line - 2));
    (void)done; /* there is nobody left to tell */
}

/* ---- stacks ---- */

static void on_stack_signal(int number)
{
    (void)number;
    void *frame[FRAMES];
    int saved = errno, fd = atomic_exchange(&watch.stack_fd, -1);
    if (fd < 0)
        return;
    backtrace_symbols_fd(frame, backtrace(frame, FRAMES), fd);
    atomic_store(&watch.stack_done, true);
    errno = saved;
}

/* Lets the main thread write its stack to fd; it has a second. False: it may still be writing, and
 * fd must stay open. */
static bool write_stack(int fd)
{
    static const char none[] = "the main thread does not answer\n";
    atomic_store(&watch.stack_done, false);
    atomic_store(&watch.stack_fd, fd);
    bool sent = pthread_kill(watch.main, STACK_SIGNAL) == 0;
    struct timespec ms = {0, 10000000};
    for (int i = 0; sent && i < 100 && !atomic_load(&watch.stack_done); i++)
        nanosleep(&ms, NULL);
    if (atomic_exchange(&watch.stack_fd, -1) != fd)
        return atomic_load(&watch.stack_done);
    ssize_t done = write(fd, none, sizeof none - 1);
    (void)done;
    return true;
}

/* ---- speaking for the rank; clerk only ---- */

/* This rank's record, a call to the others if it is the first, and behind the record the stack
 * unless the rank moves. */
static bool record_write(const char *run, bool moves, bool caller)
{
    md_hang_record r = record_now(moves);
    int fd = md_hang_record_put(run, &r);
    if (fd < 0)
        return false;
    if (caller)
        md_hang_put(run, MD_HANG_CALL, "");
    if (moves || write_stack(fd))
        close(fd);
    return true;
}

static md_hang_record record_read(const char *run, int rank)
{
    md_hang_record r = {0};
    const char *hosts = atomic_load(&watch.hosts);
    if (hosts)
        snprintf(r.host, sizeof r.host, "%.*s", watch.hosts_width,
                 hosts + (size_t)rank * (size_t)watch.hosts_width);
    md_hang_record_get(run, rank, &r);
    return r;
}

/* Keeps the verdict and tells it. The file appears last: who sees it ends, and the launcher then
 * ends the rest, this rank among them. */
_Noreturn static void convict(const char *run, int64_t step, const char *text)
{
    char line[VERDICT_SIZE + 2];
    say("error", text);
    md_runlog_failed(run, step, MD_ERR_HANG, text);
    snprintf(line, sizeof line, "%s\n", text);
    md_hang_put(run, MD_HANG_VERDICT, line);
    md_exit_now(MD_ERR_HANG);
}

/* Reads all records. Somebody moves: the call is taken back. Else, if no other rank is at it, the
 * end. */
static void judge(const char *run)
{
    int n = md_base_size();
    char text[VERDICT_SIZE];
    md_hang_record own = record_now(false), *r = md_alloc((size_t)n * sizeof *r, "hang records");
    for (int i = 0; r && i < n; i++)
        r[i] = record_read(run, i);
    bool stopped = md_hang_verdict(r ? r : &own, r ? n : 1, text, sizeof text);
    md_free(r);
    if (stopped && md_hang_claim(run, MD_HANG_JUDGE))
        convict(run, own.step, text);
    if (!stopped) {
        say("warning", text);
        md_hang_remove(run, MD_HANG_CALL);
    }
}

/* Without files: after the same grace, this rank speaks for itself. */
static void alone(void)
{
    const uint64_t marks = marks_now();
    double start = md_now();
    while (md_now() - start < grace())
        if (!nap(&watch.stop_clerk) || marks_now() != marks)
            return;
    char text[VERDICT_SIZE];
    md_hang_record r = record_now(false);
    md_hang_sentence(&r, text, sizeof text);
    say("error", text);
    write_stack(STDERR_FILENO);
    md_exit_now(MD_ERR_HANG);
}

/* Watches the main thread until it moves, or has stood for half a grace. */
static bool main_moves(void)
{
    const uint64_t marks = marks_now();
    double start = md_now(), half = grace() / 2;
    while (marks_now() == marks && md_now() - start < half && atomic_load(&watch.idle) < half)
        if (!nap(&watch.stop_clerk))
            return true;
    return marks_now() != marks;
}

/* From this rank's call, or from another's, to the verdict or until the call is taken back. */
static void inquest(const char *run, bool caller)
{
    const uint64_t marks = marks_now();
    double start = md_now();
    bool moves = !caller && main_moves();
    if (md_hang_has(run, MD_HANG_VERDICT)) /* this rank was stopped until now */
        md_exit_now(MD_ERR_HANG);
    if (!record_write(run, moves, caller)) {
        if (caller)
            alone();
        return;
    }
    while (nap(&watch.stop_clerk)) {
        md_hang_refresh(run);
        if (md_hang_has(run, MD_HANG_VERDICT))
            md_exit_now(MD_ERR_HANG);
        if (!md_hang_has(run, MD_HANG_CALL))
            break;
        if (!moves && marks_now() != marks)
            moves = record_write(run, true, false);
        double waited = md_now() - start;
        if (waited > 4 * grace() || (waited > 2 * grace() && md_hang_lowest(run, md_base_rank())))
            judge(run);
    }
    if (caller)
        md_hang_remove(run, MD_HANG_CALL);
    md_hang_record_remove(run, md_base_rank());
    atomic_store(&watch.forgiven, true);
}

/* ---- the threads ---- */

static void *clerk_main(void *arg)
{
    double looked = 0;
    while (nap(&watch.stop_clerk)) {
        const char *run = atomic_load(&watch.run);
        bool breach = atomic_load(&watch.breach);
        if (breach && !run)
            alone();
        else if (breach)
            inquest(run, true);
        else if (run && md_now() - looked > grace() / 4) {
            looked = md_now();
            md_hang_refresh(run);
            if (md_hang_has(run, MD_HANG_CALL))
                inquest(run, false);
        }
    }
    return arg;
}

/* The clerk has not come to an end: its files do not answer. */
_Noreturn static void last_resort(void)
{
    char text[VERDICT_SIZE], front[512];
    md_hang_record r = record_now(false);
    md_hang_sentence(&r, front, sizeof front);
    snprintf(text, sizeof text, "%s; no verdict came: does the run directory answer?", front);
    say("error", text);
    md_exit_now(MD_ERR_HANG);
}

static void *timer_main(void *arg)
{
    md_hang_limits limits = {.seconds = watch.seconds};
    const char *phase = "start";
    md_part part = MD_PART_SETUP;
    uint64_t seen = 0;
    double last = md_now(), idle = 0, forgiven = 0, since = 0;
    while (nap(&watch.stop_timer)) {
        /* A longer pause is one of the whole process (SIGSTOP): it was not the phase's. */
        double now = md_now(), passed = MD_MIN(now - last, 2 * tick() + 0.2);
        uint64_t marks = marks_now();
        last = now;
        if (marks != seen) {
            md_hang_learn(&limits, phase, part, idle);
            seen = marks;
            phase = atomic_load(&mark.phase);
            part = (md_part)atomic_load(&mark.part);
            idle = forgiven = 0;
        } else {
            idle += passed;
        }
        if (atomic_exchange(&watch.forgiven, false))
            forgiven = idle;
        atomic_store(&watch.idle, idle);
        bool breach = idle - forgiven > md_hang_limit(&limits, phase, part);
        atomic_store(&watch.breach, breach);
        since = breach ? since + passed : 0;
        if (since > 6 * grace() + 5)
            last_resort();
    }
    return arg;
}

/* ---- start and end ---- */

static void catch_stack_signal(void)
{
    void *frame[1];
    struct sigaction a = {.sa_handler = on_stack_signal, .sa_flags = SA_RESTART};
    backtrace(frame, 1); /* the first call loads a library, which a handler must not do */
    sigaction(STACK_SIGNAL, &a, NULL);
}

static void make_wake(void)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&watch.wake, &attr);
    pthread_condattr_destroy(&attr);
}

static void stop_thread(bool *stop, pthread_t thread)
{
    pthread_mutex_lock(&watch.lock);
    *stop = true;
    pthread_cond_broadcast(&watch.wake);
    pthread_mutex_unlock(&watch.lock);
    pthread_join(thread, NULL);
}

md_status md_watch_start(int64_t seconds)
{
    sigset_t all, old;
    watch.seconds = seconds;
    if (seconds == 0)
        return MD_OK;
    watch.main = pthread_self();
    watch.stop_timer = watch.stop_clerk = false;
    if (gethostname(watch.host, sizeof watch.host - 1) != 0)
        watch.host[0] = 0;
    catch_stack_signal();
    make_wake();
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int err =
        md_fault("watchdog.thread") ? EAGAIN : pthread_create(&watch.timer, NULL, timer_main, NULL);
    if (err == 0 && (err = pthread_create(&watch.clerk, NULL, clerk_main, NULL)) != 0)
        stop_thread(&watch.stop_timer, watch.timer);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    watch.on = err == 0;
    if (err)
        MD_FAIL(MD_ERR_MEMORY, "cannot start the watchdog's threads: %s", strerror(err));
    return MD_OK;
}

/* The clerk first: should its files not answer, the timer still watches. */
void md_watch_stop(void)
{
    if (!watch.on)
        return;
    stop_thread(&watch.stop_clerk, watch.clerk);
    stop_thread(&watch.stop_timer, watch.timer);
    watch.on = false;
    atomic_store(&watch.run, NULL);
    md_free(atomic_exchange(&watch.hosts, NULL));
}

void md_watch_dir(const char *run)
{
    snprintf(watch.dir, sizeof watch.dir, "%s", run);
    atomic_store(&watch.run, watch.dir);
}

void md_watch_hosts(const char *hosts, int width)
{
    size_t bytes = (size_t)md_base_size() * (size_t)width;
    bool wanted = watch.on && !atomic_load(&watch.hosts);
    char *copy = wanted ? md_alloc(bytes, "host names") : NULL;
    if (!copy) /* verdicts then go without */
        return;
    memcpy(copy, hosts, bytes);
    watch.hosts_width = width;
    atomic_store(&watch.hosts, copy);
}
