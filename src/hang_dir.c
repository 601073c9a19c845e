/* hang_dir: see hang_dir.h. */
#include "src/hang_dir.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_SIZE 4096

static void path_of(char path[PATH_SIZE], const char *run, const char *name)
{
    snprintf(path, PATH_SIZE, "%s/hang%s%s", run, *name ? "/" : "", name);
}

static void rank_name(char name[32], int rank)
{
    snprintf(name, 32, "rank-%05d.txt", rank);
}

void md_hang_clear(const char *run)
{
    char path[PATH_SIZE];
    path_of(path, run, "");
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (!d) {
        if (fd >= 0)
            close(fd);
        return;
    }
    for (const struct dirent *e; (e = readdir(d));)
        unlinkat(fd, e->d_name, 0); /* "." and ".." refuse */
    closedir(d);
    rmdir(path);
}

void md_hang_refresh(const char *run)
{
    char path[PATH_SIZE];
    path_of(path, run, "");
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0)
        close(fd);
}

bool md_hang_has(const char *run, const char *name)
{
    char path[PATH_SIZE];
    struct stat info;
    path_of(path, run, name);
    return stat(path, &info) == 0;
}

void md_hang_remove(const char *run, const char *name)
{
    char path[PATH_SIZE];
    path_of(path, run, name);
    unlink(path);
}

/* Returns the file open, or -1. */
static int put(const char *run, const char *name, const char *text)
{
    char path[PATH_SIZE], part[PATH_SIZE + 8];
    path_of(path, run, "");
    mkdir(path, 0777); /* mostly it exists */
    path_of(path, run, name);
    snprintf(part, sizeof part, "%s.part", path);
    int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return -1;
    size_t n = strlen(text);
    if (write(fd, text, n) == (ssize_t)n && rename(part, path) == 0)
        return fd;
    close(fd);
    unlink(part);
    return -1;
}

bool md_hang_put(const char *run, const char *name, const char *text)
{
    int fd = put(run, name, text);
    if (fd >= 0)
        close(fd);
    return fd >= 0;
}

bool md_hang_claim(const char *run, const char *name)
{
    char path[PATH_SIZE];
    path_of(path, run, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd >= 0)
        close(fd);
    return fd >= 0;
}

int md_hang_record_put(const char *run, const md_hang_record *r)
{
    char name[32], text[512];
    rank_name(name, r->rank);
    md_hang_print(r, text, sizeof text);
    return put(run, name, text);
}

void md_hang_record_remove(const char *run, int rank)
{
    char name[32];
    rank_name(name, rank);
    md_hang_remove(run, name);
}

void md_hang_record_get(const char *run, int rank, md_hang_record *r)
{
    char name[32], path[PATH_SIZE], text[512] = "";
    rank_name(name, rank);
    path_of(path, run, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        ssize_t n = read(fd, text, sizeof text - 1);
        text[n > 0 ? n : 0] = 0;
        close(fd);
    }
    md_hang_parse(text, r);
    r->rank = rank;
}

bool md_hang_lowest(const char *run, int rank)
{
    char name[32];
    for (int i = 0; i < rank; i++) {
        rank_name(name, i);
        if (md_hang_has(run, name))
            return false;
    }
    return true;
}
