/* base: see base.h. The counters are atomics because loader threads allocate at setup. */
#include "src/base.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

#define TEXT_SIZE 4096
static _Thread_local char error_text[TEXT_SIZE];
static int base_rank, base_size = 1;
static void (*abort_hook)(int code);

static const struct {
    md_status code;
    const char *name, *text;
} statuses[] = {
#define MD_STATUS_ROW(name, code, text) {name, #name, text},
    MD_STATUSES(MD_STATUS_ROW)
#undef MD_STATUS_ROW
};

const char *md_status_name(md_status st)
{
    for (size_t i = 0; i < MD_COUNT(statuses); i++)
        if (statuses[i].code == st)
            return statuses[i].name;
    return "unknown";
}

const char *md_status_text(md_status st)
{
    for (size_t i = 0; i < MD_COUNT(statuses); i++)
        if (statuses[i].code == st)
            return statuses[i].text;
    return "unknown";
}

const char *md_error_text(void)
{
    return error_text;
}

md_status md_error_set(md_status st, const char *fmt, ...)
{
    char text[TEXT_SIZE]; /* the old sentence may be among the arguments */
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    memcpy(error_text, text, sizeof error_text);
    return st;
}

md_status md_error_prefix(md_status st, const char *fmt, ...)
{
    char front[TEXT_SIZE / 2], old[TEXT_SIZE];
    memcpy(old, error_text, sizeof old);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(front, sizeof front, fmt, ap);
    va_end(ap);
    size_t n = strlen(front);
    memcpy(error_text, front, n);
    snprintf(error_text + n, TEXT_SIZE - n, ": %.*s", (int)(TEXT_SIZE - n - 3), old);
    return st;
}

void md_base_set_rank(int rank, int size)
{
    base_rank = rank;
    base_size = size;
}

int md_base_rank(void)
{
    return base_rank;
}

int md_base_size(void)
{
    return base_size;
}

void md_base_set_abort_hook(void (*hook)(int code))
{
    abort_hook = hook;
}

_Noreturn void md_abort(int code)
{
    fflush(NULL);
    if (abort_hook)
        abort_hook(code);
    _exit(code);
}

_Noreturn void md_exit_now(md_status code)
{
    _exit(code);
}

_Noreturn void md_assert_fail(const char *file, int line, const char *cond, const char *fmt, ...)
{
    fprintf(stderr, "md_hpc: rank %d: internal error at %s:%d: %s", base_rank, file, line, cond);
    va_list ap;
    va_start(ap, fmt);
    if (fmt[2]) /* MD_ASSERT puts ": " in front, so that a format is never empty */
        vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    md_abort(MD_ERR_BUG);
}

/* Each block carries its size in the aligned space in front of it. */
#define ALIGN_SMALL ((size_t)64)
#define ALIGN_HUGE  ((size_t)2 << 20)
#define HUGE_FROM   ((size_t)4 << 20)
static atomic_size_t bytes_now, bytes_peak;

void *md_alloc(size_t bytes, const char *family)
{
    size_t align = bytes >= HUGE_FROM ? ALIGN_HUGE : ALIGN_SMALL;
    size_t total = align + (bytes + align - 1) / align * align;
    char *raw = NULL;
    if (total >= bytes && !md_fault("base.alloc"))
        raw = aligned_alloc(align, total);
    if (!raw) {
        md_error_set(MD_ERR_MEMORY, "out of memory: %zu bytes for %s (%zu bytes held so far)",
                     bytes, family, md_alloc_now());
        return NULL;
    }
    if (align == ALIGN_HUGE)
        madvise(raw, total, MADV_HUGEPAGE); /* advice only: a refusal costs speed, nothing else */
    memset(raw + align, 0, total - align);
    char *p = raw + align;
    ((size_t *)(void *)p)[-1] = total;
    ((size_t *)(void *)p)[-2] = align;
    size_t now = atomic_fetch_add(&bytes_now, total) + total;
    size_t peak = atomic_load(&bytes_peak);
    while (now > peak && !atomic_compare_exchange_weak(&bytes_peak, &peak, now))
        ;
    return p;
}

void md_free(void *p)
{
    if (!p)
        return;
    size_t total = ((size_t *)p)[-1], align = ((size_t *)p)[-2];
    atomic_fetch_sub(&bytes_now, total);
    free((char *)p - align);
}

size_t md_alloc_now(void)
{
    return atomic_load(&bytes_now);
}

size_t md_alloc_peak(void)
{
    return atomic_load(&bytes_peak);
}

/* One parsed entry of MD_FAULT. */
typedef struct fault {
    char site[48];
    int rank, action; /* rank -1 = every rank; action: 0 fail, else a signal number */
    long slow;        /* milliseconds to sleep instead; 0 = none */
    long pass;        /* 0 = every pass */
    atomic_long seen;
} fault;

#define MAX_FAULTS 16
static fault faults[MAX_FAULTS];
static int fault_count;
static once_flag fault_once = ONCE_FLAG_INIT; /* loader threads pass sites too */

static void fault_parse_one(const char *text)
{
    fault *f = &faults[fault_count];
    *f = (fault){.rank = -1};
    size_t n = strcspn(text, "@#:");
    snprintf(f->site, sizeof f->site, "%.*s", (int)n, text);
    const char *p;
    if ((p = strstr(text, "@rank")))
        f->rank = (int)strtol(p + 5, NULL, 10);
    if ((p = strchr(text, '#')))
        f->pass = strtol(p + 1, NULL, 10);
    if (strstr(text, ":kill"))
        f->action = SIGKILL;
    else if (strstr(text, ":stop"))
        f->action = SIGSTOP;
    else if ((p = strstr(text, ":slow=")))
        f->slow = strtol(p + 6, NULL, 10);
    fault_count++;
}

static void fault_parse(void)
{
    const char *env = getenv("MD_FAULT");
    char list[1024];
    if (!env || !*env)
        return;
    snprintf(list, sizeof list, "%s", env);
    char *save = NULL;
    for (char *t = strtok_r(list, ",", &save); t && fault_count < MAX_FAULTS;
         t = strtok_r(NULL, ",", &save))
        fault_parse_one(t);
}

static void sleep_ms(long ms)
{
    struct timespec left = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
}

bool md_fault(const char *site)
{
    bool fails = false;
    call_once(&fault_once, fault_parse);
    for (int i = 0; i < fault_count; i++) {
        fault *f = &faults[i];
        if (strcmp(f->site, site) != 0 || (f->rank >= 0 && f->rank != base_rank))
            continue;
        long pass = atomic_fetch_add(&f->seen, 1) + 1;
        if (f->pass && pass != f->pass)
            continue;
        if (f->action)
            raise(f->action);
        else if (f->slow)
            sleep_ms(f->slow);
        else
            fails = true;
    }
    return fails;
}

double md_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
