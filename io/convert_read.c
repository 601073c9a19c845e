/* convert_read: bytes of source files, one open at a time, plain by pread or gzip by zlib. */
#include "io/convert_parts.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

/* Decompressed bytes kept behind and read ahead: a tar walk steps back a block now and then, and
 * zlib could only do that by starting over. */
#define WINDOW_HALF ((size_t)64 << 10)

struct convert_reader {
    char path[4096];   /* "" = none open */
    int fd;            /* plain file */
    gzFile gz;         /* or compressed one, of which the window holds */
    int64_t window_at; /* the decompressed bytes from here on */
    size_t window_n;
    uint8_t *window; /* [2 * WINDOW_HALF] */
    uint8_t *buf;    /* of convert_read_item */
    int64_t cap;
};

md_status convert_reader_create(convert_reader **out)
{
    MD_NEW(*out, 1, "convert");
    (*out)->fd = -1;
    return MD_OK;
}

static void close_file(convert_reader *r)
{
    if (r->gz)
        gzclose_r(r->gz);
    if (r->fd >= 0)
        close(r->fd);
    r->gz = NULL;
    r->fd = -1;
    r->path[0] = 0;
}

void convert_reader_free(convert_reader *r)
{
    if (!r)
        return;
    close_file(r);
    md_free(r->window);
    md_free(r->buf);
    md_free(r);
}

/* zlib takes the descriptor over when the file begins as gzip does. */
static md_status open_file(convert_reader *r, const char *path)
{
    if (strcmp(r->path, path) == 0)
        return MD_OK;
    close_file(r);
    if (strlen(path) >= sizeof r->path)
        MD_FAIL(MD_ERR_NOINPUT, "%.80s...: path is too long", path);
    r->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (r->fd < 0)
        MD_FAIL(MD_ERR_NOINPUT, "%s: cannot open: %s", path, strerror(errno));
    uint8_t magic[2] = {0};
    if (pread(r->fd, magic, sizeof magic, 0) < 0)
        MD_FAIL(MD_ERR_IO, "%s: cannot read: %s", path, strerror(errno));
    if (magic[0] == 0x1f && magic[1] == 0x8b) {
        r->gz = gzdopen(r->fd, "rb");
        if (!r->gz)
            MD_FAIL(MD_ERR_MEMORY, "%s: no memory to decompress", path);
        r->fd = -1;
        r->window_at = 0;
        r->window_n = 0;
        if (!r->window)
            MD_NEW(r->window, 2 * WINDOW_HALF, "convert");
    }
    snprintf(r->path, sizeof r->path, "%s", path);
    return MD_OK;
}

static md_status gzip_fault(const convert_reader *r)
{
    int code;
    const char *text = gzerror(r->gz, &code);
    if (code == Z_ERRNO)
        MD_FAIL(MD_ERR_IO, "%s: cannot read: %s", r->path, strerror(errno));
    if (code != Z_OK && code != Z_STREAM_END)
        MD_FAIL(MD_ERR_DATA, "%s: damaged or cut gzip file (%s)", r->path, text);
    return MD_OK;
}

/* Moves the window on by up to half its length; *end when nothing follows. */
static md_status gzip_advance(convert_reader *r, bool *end)
{
    if (r->window_n == 2 * WINDOW_HALF) {
        memcpy(r->window, r->window + WINDOW_HALF, WINDOW_HALF);
        r->window_at += (int64_t)WINDOW_HALF;
        r->window_n = WINDOW_HALF;
    }
    size_t room = MD_MIN(WINDOW_HALF, 2 * WINDOW_HALF - r->window_n);
    int k = gzread(r->gz, r->window + r->window_n, (unsigned)room);
    *end = k <= 0;
    if (k > 0)
        r->window_n += (size_t)k;
    return *end ? gzip_fault(r) : MD_OK;
}

static md_status read_gzip(convert_reader *r, int64_t at, void *buf, size_t n, size_t *got)
{
    if (at < r->window_at) {
        gzrewind(r->gz);
        r->window_at = 0;
        r->window_n = 0;
    }
    while (*got < n) {
        int64_t from = at + (int64_t)*got - r->window_at;
        if (from < (int64_t)r->window_n) {
            size_t k = MD_MIN(n - *got, r->window_n - (size_t)from);
            memcpy((char *)buf + *got, r->window + from, k);
            *got += k;
            continue;
        }
        bool end;
        MD_TRY(gzip_advance(r, &end));
        if (end)
            break;
    }
    return MD_OK;
}

md_status convert_file_bytes(convert_reader *r, const char *path, int64_t *bytes)
{
    struct stat s;
    *bytes = -1;
    MD_TRY(open_file(r, path));
    if (r->gz)
        return MD_OK;
    if (fstat(r->fd, &s) != 0)
        MD_FAIL(MD_ERR_IO, "%s: cannot read: %s", path, strerror(errno));
    *bytes = s.st_size;
    return MD_OK;
}

md_status convert_read(convert_reader *r, const char *path, int64_t at, void *buf, size_t n,
                       size_t *got)
{
    *got = 0;
    MD_TRY(open_file(r, path));
    if (md_fault("convert.read"))
        MD_FAIL(MD_ERR_IO, "%s: cannot read: %s", path, strerror(EIO));
    if (r->gz)
        return read_gzip(r, at, buf, n, got);
    while (*got < n) {
        ssize_t k = pread(r->fd, (char *)buf + *got, n - *got, at + (int64_t)*got);
        if (k < 0 && errno != EINTR)
            MD_FAIL(MD_ERR_IO, "%s: cannot read: %s", path, strerror(errno));
        if (k == 0)
            break;
        if (k > 0)
            *got += (size_t)k;
    }
    return MD_OK;
}

md_status convert_read_item(convert_reader *r, const convert_table *t, const convert_item *it,
                            const uint8_t **bytes)
{
    char file[8192];
    const convert_group *g = convert_group_of(t, it->group);
    const char *path = convert_text_of(t, g->path);
    MD_ASSERT(it->bytes <= CONVERT_MAX_IMAGE, "%lld bytes", (long long)it->bytes);
    if (g->kind == CONVERT_FOLDER) {
        snprintf(file, sizeof file, "%s/%s", path, convert_text_of(t, it->name) + it->file_from);
        path = file;
    }
    if (it->bytes > r->cap) {
        md_free(r->buf);
        r->cap = 0;
        MD_NEW(r->buf, 2 * it->bytes, "convert");
        r->cap = 2 * it->bytes;
    }
    size_t got;
    MD_TRY(convert_read(r, path, it->at, r->buf, (size_t)it->bytes, &got));
    if ((int64_t)got < it->bytes)
        MD_FAIL(MD_ERR_DATA, "%s: ends before %s does", path, convert_text_of(t, it->name));
    *bytes = r->buf;
    return MD_OK;
}
