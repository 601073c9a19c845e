/* dataset: see dataset.h. The index lives in one block that a node's ranks map; after
 * md_dataset_open nobody writes to it, so readers need no lock. */
#include "io/dataset.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#define XXH_INLINE_ALL /* no library to link, compiled for this machine */
#include <xxhash.h>

#include "io/dataset_survey.h"
#include "io/h5.h"
#include "mpi/agree.h"

#define RETRIES  5
#define RETRY_NS 10000000L /* first pause; each further one is twice as long */

/* Head of the shared block; the arrays follow in the order of index_layout. */
typedef struct shared_head {
    uint64_t hash, max_bytes;
    int64_t max_pixels;
} shared_head;

struct md_dataset {
    char *path, *split;
    int fd;
    hid_t file, data; /* open for the hdf5 reader only */
    md_comm *self, *node;
    dataset_survey at;
    char *class_names;
    shared_head *head;
    uint64_t *offset, *xxh3;
    int32_t *label;
    uint16_t *wh;
    uint8_t *kind;
};

/* --- bytes --------------------------------------------------------------------------------- */

/* One attempt at bytes [at, at + n); 0 or errno. A file that ends early is ENODATA. */
static int read_once(int fd, void *buf, size_t n, int64_t at)
{
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(fd, (char *)buf + done, n - done, at + (int64_t)done);
        if (got < 0 && errno != EINTR)
            return errno;
        if (got == 0)
            return ENODATA;
        if (got > 0)
            done += (size_t)got;
    }
    return 0;
}

/* A stale handle (the server restarted) needs a fresh one; other threads keep using d->fd. */
static int read_again(const md_dataset *d, void *buf, size_t n, int64_t at)
{
    int fd = open(d->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int err = read_once(fd, buf, n, at);
    close(fd);
    return err;
}

/* Repeats an attempt that ended with err while that may pass. */
static int read_on(const md_dataset *d, int err, void *buf, size_t n, int64_t at)
{
    for (int i = 0; i < RETRIES && (err == EIO || err == ESTALE); i++) {
        struct timespec pause = {0, RETRY_NS << i};
        nanosleep(&pause, NULL);
        err = read_again(d, buf, n, at);
    }
    return err;
}

/* --- opening ------------------------------------------------------------------------------- */

/* Rank 0 asks HDF5, so that nobody else waits in it when something is wrong. */
static md_status survey_all(md_dataset *d, md_comm *c)
{
    bool asks = md_comm_rank(c) == 0;
    MD_TRY(md_agree(c, asks ? dataset_survey_read(d->path, d->split, &d->at, &d->class_names)
                            : MD_OK));
    md_comm_bcast(c, &d->at, sizeof d->at, 0);
    int64_t bytes = d->at.classes * d->at.class_width;
    if (!asks)
        d->class_names = md_alloc((size_t)bytes, "dataset");
    MD_TRY(md_agree(c, d->class_names ? MD_OK : MD_ERR_MEMORY));
    if (bytes > 0)
        md_comm_bcast(c, d->class_names, bytes, 0);
    return MD_OK;
}

/* HDF5 compares the file's length with its own notes; pread needs the bytes to be there as well. */
static md_status open_bytes(md_dataset *d)
{
    struct stat s;
    errno = EIO;
    d->fd = md_fault("dataset.open") ? -1 : open(d->path, O_RDONLY | O_CLOEXEC);
    if (d->fd < 0 || fstat(d->fd, &s) != 0)
        MD_FAIL(MD_ERR_NOINPUT, "%s: cannot open: %s", d->path, strerror(errno));
    if (s.st_size - d->at.data_at < d->at.bytes)
        MD_FAIL(MD_ERR_DATA, "%s: file is cut: %lld bytes, split '%s' ends at %lld", d->path,
                (long long)s.st_size, d->split, (long long)(d->at.data_at + d->at.bytes));
    return MD_OK;
}

md_status md_dataset_splits(const char *path, md_comm *c, char *buf, size_t cap)
{
    md_status st = !c || md_comm_rank(c) == 0 ? dataset_survey_splits(path, buf, cap) : MD_OK;
    if (!c)
        return st;
    MD_TRY(md_agree(c, st));
    md_comm_bcast(c, buf, (int64_t)cap, 0);
    return MD_OK;
}

/* --- the index ----------------------------------------------------------------------------- */

size_t md_dataset_index_bytes(int64_t n)
{
    return sizeof(shared_head) + (size_t)(n + 1) * sizeof(uint64_t) +
           (size_t)n * (sizeof(uint64_t) + sizeof(int32_t) + 2 * sizeof(uint16_t) + 1);
}

/* Widest elements first, so that all are aligned. */
static void index_layout(md_dataset *d, void *block)
{
    d->head = block;
    d->offset = (uint64_t *)(void *)(d->head + 1);
    d->xxh3 = d->offset + d->at.count + 1;
    d->label = (int32_t *)(void *)(d->xxh3 + d->at.count);
    d->wh = (uint16_t *)(void *)(d->label + d->at.count);
    d->kind = (uint8_t *)(void *)(d->wh + 2 * d->at.count);
}

static md_status read_column(const md_dataset *d, int64_t at, size_t bytes, void *out)
{
    int err = md_fault("dataset.index")
                  ? EIO
                  : read_on(d, read_once(d->fd, out, bytes, at), out, bytes, at);
    if (err != 0)
        MD_FAIL(MD_ERR_IO, "%s: cannot read the index of split '%s': %s", d->path, d->split,
                strerror(err));
    return MD_OK;
}

/* The columns are stored as they lie in memory: contiguous and little-endian. */
static md_status read_index(md_dataset *d)
{
    size_t n = (size_t)d->at.count;
    MD_TRY(read_column(d, d->at.offset_at, (n + 1) * sizeof *d->offset, d->offset));
    MD_TRY(read_column(d, d->at.xxh3_at, n * sizeof *d->xxh3, d->xxh3));
    MD_TRY(read_column(d, d->at.label_at, n * sizeof *d->label, d->label));
    MD_TRY(read_column(d, d->at.wh_at, 2 * n * sizeof *d->wh, d->wh));
    return read_column(d, d->at.kind_at, n, d->kind);
}

/* What is wrong with image i's row, or NULL. */
static const char *row_fault(const md_dataset *d, int64_t i)
{
    uint64_t from = d->offset[i], to = d->offset[i + 1];
    uint64_t pixels = (uint64_t)d->wh[2 * i] * d->wh[2 * i + 1];
    if (to <= from || to > (uint64_t)d->at.bytes)
        return "its offsets are out of order";
    if (d->label[i] < -1 || d->label[i] >= d->at.classes)
        return "its label is no class";
    if (d->kind[i] > MD_IMAGE_GRAY8)
        return "its kind is unknown";
    if (pixels == 0 || pixels > (uint64_t)MD_IMAGE_MAX_PIXELS)
        return "its width and height are out of range";
    if ((d->kind[i] == MD_IMAGE_GRAY8 && to - from != pixels) ||
        (d->kind[i] == MD_IMAGE_RGB8 && to - from != 3 * pixels))
        return "its length is not width x height";
    return NULL;
}

static md_status check_index(md_dataset *d)
{
    if (d->offset[0] != 0 || d->offset[d->at.count] != (uint64_t)d->at.bytes)
        MD_FAIL(MD_ERR_DATA, "%s: split '%s': offsets do not cover the %lld bytes of data", d->path,
                d->split, (long long)d->at.bytes);
    for (int64_t i = 0; i < d->at.count; i++) {
        const char *fault = row_fault(d, i);
        if (fault)
            MD_FAIL(MD_ERR_DATA, "%s: image %lld of split '%s': %s", d->path, (long long)i,
                    d->split, fault);
        int64_t pixels = (int64_t)d->wh[2 * i] * d->wh[2 * i + 1];
        uint64_t bytes = d->offset[i + 1] - d->offset[i];
        d->head->max_bytes = MD_MAX(d->head->max_bytes, bytes);
        d->head->max_pixels = MD_MAX(d->head->max_pixels, pixels);
    }
    size_t n = (size_t)d->at.count;
    uint64_t h = XXH3_64bits_withSeed(d->xxh3, n * sizeof *d->xxh3, MD_DATASET_VERSION);
    h = XXH3_64bits_withSeed(d->label, n * sizeof *d->label, h);
    h = XXH3_64bits_withSeed(d->wh, 2 * n * sizeof *d->wh, h);
    d->head->hash = XXH3_64bits_withSeed(d->kind, n, h);
    return MD_OK;
}

static md_status fill_index(md_dataset *d)
{
    MD_TRY(read_index(d));
    return check_index(d);
}

static md_status load_index(md_dataset *d, md_comm *c)
{
    void *block;
    MD_TRY(md_agree(c, md_comm_split_node(c, &d->node)));
    MD_TRY(md_agree(c, md_comm_shared(d->node, md_dataset_index_bytes(d->at.count), &block)));
    index_layout(d, block);
    return md_agree(c, md_comm_rank(d->node) == 0 ? fill_index(d) : MD_OK);
}

static char *copy_text(const char *s)
{
    size_t n = strlen(s) + 1;
    char *p = md_alloc(n, "dataset");
    return p ? memcpy(p, s, n) : NULL;
}

static md_status open_all(md_dataset *d, const char *path, const char *split, md_comm *c)
{
    d->path = copy_text(path);
    d->split = copy_text(split);
    MD_TRY(md_agree(c, d->path && d->split ? MD_OK : MD_ERR_MEMORY));
    MD_TRY(survey_all(d, c));
    MD_TRY(md_agree(c, open_bytes(d)));
    return load_index(d, c);
}

md_status md_dataset_open(const char *path, const char *split, md_comm *c, md_dataset **out)
{
    md_dataset *d;
    *out = NULL;
    d = md_alloc(sizeof *d, "dataset");
    md_status st = d ? MD_OK : MD_ERR_MEMORY;
    if (d)
        d->fd = -1, d->file = d->data = -1;
    if (st == MD_OK && !c)
        st = md_comm_self(&d->self);
    if (c)
        st = md_agree(c, st);
    if (st == MD_OK)
        st = open_all(d, path, split, c ? c : d->self);
    if (st == MD_OK)
        *out = d;
    else
        md_dataset_close(d);
    return st;
}

md_status md_dataset_use_hdf5(md_dataset *d, md_comm *c)
{
    char name[256];
    hsize_t bytes = (hsize_t)d->at.bytes;
    snprintf(name, sizeof name, "%s/data", d->split);
    MD_TRY(md_h5_open(d->path, c, &d->file));
    md_status st = md_h5_dset_open(d->file, name, H5T_STD_U8LE, 1, &bytes, &d->data);
    return c ? md_agree(c, st) : st;
}

void md_dataset_close(md_dataset *d)
{
    if (!d)
        return;
    md_h5_release(d->data);
    md_h5_close(&d->file);
    if (d->fd >= 0)
        close(d->fd);
    md_comm_free(d->node);
    md_comm_free(d->self);
    md_free(d->class_names);
    md_free(d->path);
    md_free(d->split);
    md_free(d);
}

/* --- what is in it ------------------------------------------------------------------------- */

int64_t md_dataset_count(const md_dataset *d)
{
    return d->at.count;
}

int md_dataset_classes(const md_dataset *d)
{
    return (int)d->at.classes;
}

const char *md_dataset_class_name(const md_dataset *d, int k)
{
    MD_ASSERT(k >= 0 && k < d->at.classes, "class %d of %lld", k, (long long)d->at.classes);
    return d->class_names + (int64_t)k * d->at.class_width;
}

static void check_row(const md_dataset *d, int64_t i)
{
    MD_ASSERT(i >= 0 && i < d->at.count, "image %lld of %lld", (long long)i,
              (long long)d->at.count);
}

int32_t md_dataset_label(const md_dataset *d, int64_t i)
{
    check_row(d, i);
    return d->label[i];
}

md_image_kind md_dataset_kind(const md_dataset *d, int64_t i)
{
    check_row(d, i);
    return (md_image_kind)d->kind[i];
}

void md_dataset_size(const md_dataset *d, int64_t i, int *w, int *h)
{
    check_row(d, i);
    *w = d->wh[2 * i];
    *h = d->wh[2 * i + 1];
}

size_t md_dataset_bytes(const md_dataset *d, int64_t i)
{
    check_row(d, i);
    return (size_t)(d->offset[i + 1] - d->offset[i]);
}

size_t md_dataset_max_bytes(const md_dataset *d)
{
    return (size_t)d->head->max_bytes;
}

int64_t md_dataset_max_pixels(const md_dataset *d)
{
    return d->head->max_pixels;
}

uint64_t md_dataset_hash(const md_dataset *d)
{
    return d->head->hash;
}

/* --- reading ------------------------------------------------------------------------------- */

const char *md_dataset_name(const md_dataset *d, int64_t i, char *buf, size_t cap)
{
    uint64_t range[2];
    check_row(d, i);
    snprintf(buf, cap, "?");
    if (read_once(d->fd, range, sizeof range, d->at.name_offset_at + i * (int64_t)sizeof *range) !=
            0 ||
        range[0] > range[1] || range[1] > (uint64_t)d->at.name_bytes)
        return buf;
    size_t n = MD_MIN((size_t)(range[1] - range[0]), cap - 1);
    if (read_once(d->fd, buf, n, d->at.name_at + (int64_t)range[0]) != 0)
        n = 0;
    buf[n] = 0;
    return buf;
}

static md_status check_hash(const md_dataset *d, int64_t i, const void *buf, size_t n)
{
    char name[256];
    if (XXH3_64bits(buf, n) != d->xxh3[i])
        MD_FAIL(MD_ERR_DATA, "%s: image %lld of split '%s' (%s): bytes differ from what was stored",
                d->path, (long long)i, d->split, md_dataset_name(d, i, name, sizeof name));
    return MD_OK;
}

md_status md_dataset_read(const md_dataset *d, int64_t i, void *buf, size_t cap, size_t *len)
{
    size_t n = md_dataset_bytes(d, i);
    MD_ASSERT(n <= cap, "image %lld has %zu bytes, room for %zu", (long long)i, n, cap);
    *len = n;
    int64_t at = d->at.data_at + (int64_t)d->offset[i];
    bool lost = md_fault("io.read"), stumbles = !lost && md_fault("io.read.transient");
    int err = lost || stumbles ? EIO : read_once(d->fd, buf, n, at);
    if (!lost)
        err = read_on(d, err, buf, n, at);
    if (err != 0)
        MD_FAIL(MD_ERR_IO, "%s: image %lld of split '%s': cannot read: %s", d->path, (long long)i,
                d->split, strerror(err));
    return check_hash(d, i, buf, n);
}

md_status md_dataset_read_hdf5(const md_dataset *d, int64_t i, void *buf, size_t cap, size_t *len)
{
    size_t n = md_dataset_bytes(d, i);
    MD_ASSERT(d->data >= 0, "md_dataset_use_hdf5 was not called");
    MD_ASSERT(n <= cap, "image %lld has %zu bytes, room for %zu", (long long)i, n, cap);
    *len = n;
    if (md_fault("io.read"))
        MD_FAIL(MD_ERR_IO, "%s: image %lld of split '%s': cannot read: %s", d->path, (long long)i,
                d->split, strerror(EIO));
    MD_TRY(md_h5_read_range(d->data, H5T_NATIVE_UINT8, d->offset[i], n, buf));
    return check_hash(d, i, buf, n);
}
