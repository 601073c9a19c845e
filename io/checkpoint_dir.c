/* checkpoint_dir: the names in a folder of checkpoints. "step-%08d.h5" is a checkpoint; behind that
 * name ".partial" is one being written (or what a killed writer left) and ".abandoned" one of a
 * branch of the run that was given up. LATEST names the one written last, for people and scripts;
 * the program looks at the files themselves. */
#include "io/checkpoint_parts.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/publish.h"

#define ABANDONED ".abandoned"

/* Step of a file name whose ending behind ".h5" is `ending`, else -1. */
static int64_t step_of(const char *name, const char *ending)
{
    char again[64];
    long long step = -1;
    if (sscanf(name, "step-%lld", &step) != 1 || step < 0)
        return -1;
    snprintf(again, sizeof again, "step-%08lld.h5%s", step, ending);
    return strcmp(name, again) == 0 ? step : -1;
}

void md_checkpoint_name(char *buf, size_t size, const char *dir, int64_t step)
{
    snprintf(buf, size, "%s/step-%08lld.h5", dir, (long long)step);
}

static int newest_first(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* Calls `visit` with the step of each file of this ending; returns how many there were, or -1 and
 * errno when the folder cannot be read to its end. */
static int for_steps(const char *dir, const char *ending, void (*visit)(void *arg, int64_t step),
                     void *arg)
{
    DIR *d = opendir(dir);
    if (!d)
        return -1;
    int n = 0;
    errno = 0;
    for (struct dirent *e; (e = readdir(d)); errno = 0) {
        int64_t step = step_of(e->d_name, ending);
        if (step < 0)
            continue;
        n++;
        if (visit)
            visit(arg, step);
    }
    int err = errno;
    closedir(d);
    errno = err;
    return err ? -1 : n;
}

typedef struct step_list {
    int64_t *step;
    int n, capacity;
} step_list;

static void append(void *arg, int64_t step)
{
    step_list *l = arg;
    if (l->n < l->capacity) /* a file that came since the count is the next call's */
        l->step[l->n++] = step;
}

/* Steps of the files of this ending, newest first; freed with md_free. */
static md_status list_steps(const char *dir, const char *ending, int64_t **steps, int *n)
{
    step_list l = {.capacity = for_steps(dir, ending, NULL, NULL)};
    if (l.capacity >= 0) {
        MD_NEW(l.step, l.capacity + 1, "checkpoint list");
        if (for_steps(dir, ending, append, &l) < 0)
            l.capacity = -1;
    }
    if (md_fault("ckpt.list")) {
        l.capacity = -1;
        errno = EIO;
    }
    if (l.capacity < 0) {
        md_free(l.step);
        MD_FAIL(errno == ENOENT ? MD_ERR_NOINPUT : MD_ERR_IO, "%s: cannot read the folder: %s", dir,
                strerror(errno));
    }
    qsort(l.step, (size_t)l.n, sizeof *l.step, newest_first);
    *steps = l.step;
    *n = l.n;
    return MD_OK;
}

md_status md_checkpoint_list(const char *dir, int64_t **steps, int *n)
{
    return list_steps(dir, "", steps, n);
}

static void remove_partial(void *dir, int64_t step)
{
    char path[MD_CKPT_PATH], part[MD_CKPT_PATH + 16];
    md_checkpoint_name(path, sizeof path, dir, step);
    snprintf(part, sizeof part, "%s.partial", path);
    unlink(part);
}

void md_ckpt_sweep(const char *dir)
{
    for_steps(dir, ".partial", remove_partial, (void *)(uintptr_t)dir);
}

md_status md_ckpt_rename(const char *part, const char *path)
{
    if (!md_fault("ckpt.rename"))
        return md_publish(part, path);
    unlink(part);
    MD_FAIL(MD_ERR_CREATE, "%s: cannot get its name: injected fault", path);
}

static md_status write_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        MD_FAIL(MD_ERR_CREATE, "%s: cannot create: %s", path, strerror(errno));
    md_status st = md_ckpt_pwrite(fd, path, text, (int64_t)strlen(text), 0);
    if (st == MD_OK && md_fault("ckpt.latest"))
        st = md_error_set(MD_ERR_IO, "%s: cannot write: injected fault", path);
    close(fd);
    return st;
}

md_status md_ckpt_latest(const char *dir, int64_t step)
{
    char part[MD_CKPT_PATH], path[MD_CKPT_PATH], text[64];
    snprintf(part, sizeof part, "%s/LATEST.partial", dir);
    snprintf(path, sizeof path, "%s/LATEST", dir);
    snprintf(text, sizeof text, "step-%08lld.h5\n", (long long)step);
    MD_TRY(write_text(part, text));
    return md_publish(part, path);
}

md_status md_checkpoint_abandon(const char *dir, int64_t step)
{
    int64_t *steps;
    int n;
    MD_TRY(md_checkpoint_list(dir, &steps, &n));
    md_status st = MD_OK;
    for (int i = 0; i < n && steps[i] > step && st == MD_OK; i++) {
        char path[MD_CKPT_PATH], aside[MD_CKPT_PATH + 16];
        md_checkpoint_name(path, sizeof path, dir, steps[i]);
        snprintf(aside, sizeof aside, "%s" ABANDONED, path);
        errno = EIO;
        if (md_fault("ckpt.abandon") || rename(path, aside) != 0)
            st = md_error_set(MD_ERR_IO, "%s: cannot be set aside: %s", path, strerror(errno));
    }
    md_free(steps);
    return st;
}

/* Deletes all files of this ending but the newest `keep` and the multiples of keep_every. */
static md_status prune(const char *dir, const char *ending, int keep, int64_t keep_every,
                       int *removed)
{
    int64_t *steps;
    int n;
    MD_TRY(list_steps(dir, ending, &steps, &n));
    md_status st = MD_OK;
    for (int i = keep; i < n && st == MD_OK; i++) {
        if (keep_every > 0 && steps[i] % keep_every == 0)
            continue;
        char name[MD_CKPT_PATH], path[MD_CKPT_PATH + 16];
        md_checkpoint_name(name, sizeof name, dir, steps[i]);
        snprintf(path, sizeof path, "%s%s", name, ending);
        errno = EIO;
        if (md_fault("ckpt.prune") || unlink(path) != 0)
            st = md_error_set(MD_ERR_IO, "%s: cannot be deleted: %s", path, strerror(errno));
        else
            ++*removed;
    }
    md_free(steps);
    return st;
}

md_status md_checkpoint_prune(const char *dir, int keep, int64_t keep_every, int *removed)
{
    int count = 0;
    MD_ASSERT(keep >= 1, "keep %d", keep);
    md_status st = prune(dir, "", keep, keep_every, &count);
    if (st == MD_OK)
        st = prune(dir, ABANDONED, keep, 0, &count);
    if (removed)
        *removed = count;
    return st;
}
