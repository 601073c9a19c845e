/* run_dir: see run_dir.h. */
#include "io/run_dir.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

md_status md_run_dir_make(const char *dir)
{
    char path[4096];
    if ((size_t)snprintf(path, sizeof path, "%s", dir) >= sizeof path)
        MD_FAIL(MD_ERR_CREATE, "the path is too long: %s", dir);
    for (char *p = path + 1;; p++) {
        if (*p && *p != '/')
            continue;
        char end = *p;
        *p = 0;
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            MD_FAIL(MD_ERR_CREATE, "cannot make the directory %s: %s", path, strerror(errno));
        if (!end)
            return MD_OK;
        *p = end;
    }
}

struct md_run_lock {
    int fd;
    char path[4096];
    const char *key;
};

typedef struct holder {
    char host[256], job[64];
    long pid;
} holder;

/* Batch job of this process; a requeued job keeps its number. "-" outside of one. */
static const char *job_name(void)
{
    static const char *const name[] = {"SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"};
    for (size_t i = 0; i < MD_COUNT(name); i++)
        if (getenv(name[i]))
            return getenv(name[i]);
    return "-";
}

static holder myself(void)
{
    holder h = {.pid = (long)getpid()};
    if (gethostname(h.host, sizeof h.host - 1) != 0)
        snprintf(h.host, sizeof h.host, "localhost");
    snprintf(h.job, sizeof h.job, "%s", job_name());
    return h;
}

/* False when the file is empty (given back) or torn. */
static bool read_holder(int fd, holder *h)
{
    char text[512];
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    text[MD_MAX(n, 0)] = 0;
    return sscanf(text, "%255s %ld %63s", h->host, &h->pid, h->job) == 3;
}

/* May somebody whose lock we cannot see still be working here? */
static bool may_live(const holder *h, const holder *me, bool locks_work, time_t silent)
{
    if (strcmp(h->host, me->host) == 0) /* a lock of this host would have been seen */
        return !locks_work && kill((pid_t)h->pid, 0) == 0;
    if (strcmp(h->job, "-") != 0 && strcmp(h->job, me->job) == 0)
        return false;
    return silent < MD_RUN_SILENT;
}

static md_status in_use(const md_run_lock *lock, const holder *h, time_t silent)
{
    MD_FAIL(MD_ERR_PERM,
            "%s: the directory is in use by process %ld on %s, last seen %ld s ago; choose another "
            "%s, or delete that file if the process is dead",
            lock->path, h->pid, h->host, (long)silent, lock->key);
}

static md_status take(md_run_lock *lock)
{
    holder h, me = myself();
    struct stat info;
    errno = EIO;
    lock->fd = md_fault("run_dir.lock") ? -1 : open(lock->path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (lock->fd < 0)
        MD_FAIL(MD_ERR_CREATE, "%s: cannot create: %s", lock->path, strerror(errno));
    bool locked = flock(lock->fd, LOCK_EX | LOCK_NB) == 0;
    bool taken = !locked && errno == EWOULDBLOCK;
    time_t silent = fstat(lock->fd, &info) == 0 ? time(NULL) - info.st_mtime : 0;
    bool known = read_holder(lock->fd, &h);
    if (taken && !known) /* it is just being taken */
        MD_FAIL(MD_ERR_PERM, "%s: the directory is in use by another process", lock->path);
    if (taken || (known && may_live(&h, &me, locked, silent)))
        return in_use(lock, &h, MD_MAX(silent, 0));
    if (ftruncate(lock->fd, 0) != 0 ||
        dprintf(lock->fd, "%s %ld %s\n", me.host, me.pid, me.job) < 0)
        MD_FAIL(MD_ERR_CREATE, "%s: cannot write: %s", lock->path, strerror(errno));
    return MD_OK;
}

md_status md_run_lock_take(const char *dir, const char *key, md_run_lock **out)
{
    md_run_lock *lock;
    MD_NEW(lock, 1, "run lock");
    lock->key = key;
    snprintf(lock->path, sizeof lock->path, "%s/LOCK", dir);
    md_status st = take(lock);
    if (st != MD_OK) {
        if (lock->fd >= 0)
            close(lock->fd);
        md_free(lock);
        return st;
    }
    *out = lock;
    return MD_OK;
}

void md_run_lock_touch(md_run_lock *lock)
{
    if (lock)
        futimens(lock->fd, NULL);
}

void md_run_lock_release(md_run_lock *lock)
{
    if (!lock)
        return;
    /* The file stays, empty: deleting it would let two others each lock their own. */
    if (ftruncate(lock->fd, 0) == 0)
        futimens(lock->fd, NULL);
    close(lock->fd);
    md_free(lock);
}
