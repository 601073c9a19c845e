/* publish: see publish.h. */
#include "io/publish.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

md_status md_publish_part(const char *path, char **part)
{
    size_t size = strlen(path) + sizeof ".partial";
    MD_NEW(*part, size, "file name");
    snprintf(*part, size, "%s.partial", path);
    return MD_OK;
}

static md_status file_sync(const char *path)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        MD_FAIL(MD_ERR_IO, "%s: cannot be opened again: %s", path, strerror(errno));
    int failed = fsync(fd) != 0 || md_fault("publish.sync");
    int err = errno;
    close(fd);
    if (failed)
        MD_FAIL(MD_ERR_IO, "%s: write failed: %s", path, strerror(err));
    return MD_OK;
}

/* Makes the rename itself durable. A file system that cannot sync a folder keeps the file's data
 * anyway, so its refusal is no error. */
static void folder_sync(const char *path)
{
    char dir[4096];
    const char *slash = strrchr(path, '/');
    snprintf(dir, sizeof dir, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

md_status md_publish(const char *part, const char *path)
{
    md_status st = file_sync(part);
    if (st == MD_OK && rename(part, path) != 0)
        st = md_error_set(MD_ERR_CREATE, "%s: cannot be created: %s", path, strerror(errno));
    if (st == MD_OK)
        folder_sync(path);
    else
        unlink(part);
    return st;
}
