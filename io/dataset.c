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

#include "io/h5.h"
#include "mpi/agree.h"

#define RETRIES     5
#define RETRY_NS    10000000L /* first pause; each further one is twice as long */
#define MAX_CLASSES (1 << 24)
#define MAX_IMAGES  ((hsize_t)1 << 47) /* that md_permute takes */

/* Head of the shared block; the arrays follow in the order of index_layout. */
typedef struct shared_head {
    uint64_t hash, max_bytes;
    int64_t max_pixels;
} shared_head;

struct md_dataset {
    char *path, *split;
    int fd;
    hid_t file, data; /* for the hdf5 reader */
    md_comm *self, *node;
    int64_t count, bytes, name_bytes;
    int64_t data_at, name_at, name_offset_at; /* in the file */
    int classes;
    char *class_names;
    size_t class_width;
    shared_head *head;
    uint64_t *offset, *xxh3;
    int32_t *label;
    uint16_t *wh;
    uint8_t *kind;
};

/* --- opening ------------------------------------------------------------------------------- */

static md_status check_head(hid_t file, int *classes)
{
    char format[64];
    int64_t version, k;
    if (md_h5_attr_read_str(file, "format", format, sizeof format) != MD_OK ||
        strcmp(format, MD_DATASET_FORMAT) != 0)
        return md_h5_fail(MD_ERR_DATA, file, "not an image store (made by `md_hpc convert`)");
    MD_TRY(md_h5_attr_read_i64(file, "version", &version));
    if (version != MD_DATASET_VERSION)
        return md_h5_fail(MD_ERR_DATA, file,
                          "image store of version %lld; this program reads version %d",
                          (long long)version, MD_DATASET_VERSION);
    MD_TRY(md_h5_attr_read_i64(file, "num_classes", &k));
    if (k < 0 || k > MAX_CLASSES)
        return md_h5_fail(MD_ERR_DATA, file, "num_classes is %lld", (long long)k);
    *classes = (int)k;
    return MD_OK;
}

/* The names of the root's groups without "classes". */
static void list_splits(hid_t file, char *buf, size_t cap)
{
    char all[1024], *save = NULL;
    size_t used = 0;
    md_h5_list(file, all, sizeof all);
    buf[0] = 0;
    for (char *t = strtok_r(all, ", ", &save); t && used < cap; t = strtok_r(NULL, ", ", &save))
        if (strcmp(t, "classes") != 0)
            used += (size_t)snprintf(buf + used, cap - used, "%s%s", used ? ", " : "", t);
}

md_status md_dataset_splits(const char *path, md_comm *c, char *buf, size_t cap)
{
    hid_t file;
    int classes;
    MD_TRY(md_h5_open(path, c, &file));
    md_status st = check_head(file, &classes);
    if (st == MD_OK)
        list_splits(file, buf, cap);
    md_h5_close(&file);
    return c ? md_agree(c, st) : st;
}

static md_status open_group(hid_t file, const char *split, hid_t *group)
{
    char have[256];
    if (!md_h5_exists(file, split)) {
        *group = -1;
        list_splits(file, have, sizeof have);
        return md_h5_fail(MD_ERR_DATA, file, "has no split '%s' (it holds: %s)", split, have);
    }
    return md_h5_group_open(file, split, group);
}

/* One data set of the split: type and extents checked; `at` receives its file offset. */
static md_status locate(hid_t group, const char *name, hid_t type, hsize_t dim[2], int64_t *at)
{
    hid_t set;
    MD_TRY(md_h5_dset_open(group, name, type, dim[1] ? 2 : 1, dim, &set));
    md_status st = md_h5_offset(set, at);
    md_h5_release(set);
    return st;
}

static md_status check_sets(md_dataset *d, hid_t group)
{
    hsize_t offsets[2] = {MD_H5_ANY, 0}, data[2] = {MD_H5_ANY, 0}, names[2] = {MD_H5_ANY, 0};
    int64_t at;
    MD_TRY(locate(group, "offset", H5T_STD_U64LE, offsets, &at));
    if (offsets[0] < 2 || offsets[0] > MAX_IMAGES)
        return md_h5_fail(MD_ERR_DATA, group, "split '%s' holds no images", d->split);
    hsize_t n = offsets[0] - 1, one[2] = {n, 0}, two[2] = {n, 2};
    d->count = (int64_t)n;
    MD_TRY(locate(group, "label", H5T_STD_I32LE, one, &at));
    MD_TRY(locate(group, "xxh3", H5T_STD_U64LE, one, &at));
    MD_TRY(locate(group, "wh", H5T_STD_U16LE, two, &at));
    MD_TRY(locate(group, "kind", H5T_STD_U8LE, one, &at));
    MD_TRY(locate(group, "name_offset", H5T_STD_U64LE, offsets, &d->name_offset_at));
    MD_TRY(locate(group, "name", H5T_STD_U8LE, names, &d->name_at));
    MD_TRY(locate(group, "data", H5T_STD_U8LE, data, &d->data_at));
    d->name_bytes = (int64_t)names[0];
    d->bytes = (int64_t)data[0];
    return md_h5_dset_open(group, "data", H5T_STD_U8LE, 1, data, &d->data);
}

/* HDF5 compares the file's length with its own notes; pread needs the bytes to be there as well. */
static md_status open_bytes(md_dataset *d)
{
    struct stat s;
    d->fd = open(d->path, O_RDONLY | O_CLOEXEC);
    if (d->fd < 0 || fstat(d->fd, &s) != 0)
        MD_FAIL(MD_ERR_NOINPUT, "%s: cannot open: %s", d->path, strerror(errno));
    if (s.st_size - d->data_at < d->bytes)
        MD_FAIL(MD_ERR_DATA, "%s: file is cut: %lld bytes, split '%s' ends at %lld", d->path,
                (long long)s.st_size, d->split, (long long)(d->data_at + d->bytes));
    return MD_OK;
}

static md_status open_file(md_dataset *d, hid_t *group)
{
    MD_TRY(check_head(d->file, &d->classes));
    MD_TRY(
        md_h5_strings_read(d->file, "classes/name", d->classes, &d->class_names, &d->class_width));
    MD_TRY(open_group(d->file, d->split, group));
    MD_TRY(check_sets(d, *group));
    return open_bytes(d);
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
    d->xxh3 = d->offset + d->count + 1;
    d->label = (int32_t *)(void *)(d->xxh3 + d->count);
    d->wh = (uint16_t *)(void *)(d->label + d->count);
    d->kind = (uint8_t *)(void *)(d->wh + 2 * d->count);
}

static md_status read_column(hid_t group, const char *name, hid_t type, hsize_t rows, void *out)
{
    hsize_t dim[2] = {rows, 2};
    hid_t set;
    MD_TRY(md_h5_dset_open(group, name, type, strcmp(name, "wh") == 0 ? 2 : 1, dim, &set));
    md_status st = md_h5_read_all(set, type, out);
    md_h5_release(set);
    return st;
}

static md_status read_index(md_dataset *d, hid_t group)
{
    hsize_t n = (hsize_t)d->count;
    MD_TRY(read_column(group, "offset", H5T_STD_U64LE, n + 1, d->offset));
    MD_TRY(read_column(group, "xxh3", H5T_STD_U64LE, n, d->xxh3));
    MD_TRY(read_column(group, "label", H5T_STD_I32LE, n, d->label));
    MD_TRY(read_column(group, "wh", H5T_STD_U16LE, n, d->wh));
    return read_column(group, "kind", H5T_STD_U8LE, n, d->kind);
}

/* What is wrong with image i's row, or NULL. */
static const char *row_fault(const md_dataset *d, int64_t i)
{
    uint64_t from = d->offset[i], to = d->offset[i + 1];
    uint64_t pixels = (uint64_t)d->wh[2 * i] * d->wh[2 * i + 1];
    if (to <= from || to > (uint64_t)d->bytes)
        return "its offsets are out of order";
    if (d->label[i] < -1 || d->label[i] >= d->classes)
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
    if (d->offset[0] != 0 || d->offset[d->count] != (uint64_t)d->bytes)
        MD_FAIL(MD_ERR_DATA, "%s: split '%s': offsets do not cover the %lld bytes of data", d->path,
                d->split, (long long)d->bytes);
    for (int64_t i = 0; i < d->count; i++) {
        const char *fault = row_fault(d, i);
        if (fault)
            MD_FAIL(MD_ERR_DATA, "%s: image %lld of split '%s': %s", d->path, (long long)i,
                    d->split, fault);
        int64_t pixels = (int64_t)d->wh[2 * i] * d->wh[2 * i + 1];
        uint64_t bytes = d->offset[i + 1] - d->offset[i];
        d->head->max_bytes = MD_MAX(d->head->max_bytes, bytes);
        d->head->max_pixels = MD_MAX(d->head->max_pixels, pixels);
    }
    size_t n = (size_t)d->count;
    uint64_t h = XXH3_64bits_withSeed(d->xxh3, n * sizeof *d->xxh3, MD_DATASET_VERSION);
    h = XXH3_64bits_withSeed(d->label, n * sizeof *d->label, h);
    h = XXH3_64bits_withSeed(d->wh, 2 * n * sizeof *d->wh, h);
    d->head->hash = XXH3_64bits_withSeed(d->kind, n, h);
    return MD_OK;
}

static md_status fill_index(md_dataset *d, hid_t group)
{
    MD_TRY(read_index(d, group));
    return check_index(d);
}

static md_status load_index(md_dataset *d, hid_t group, md_comm *c)
{
    void *block;
    MD_TRY(md_agree(c, md_comm_split_node(c, &d->node)));
    MD_TRY(md_agree(c, md_comm_shared(d->node, md_dataset_index_bytes(d->count), &block)));
    index_layout(d, block);
    md_status st = md_comm_rank(d->node) == 0 ? fill_index(d, group) : MD_OK;
    return md_agree(c, st);
}

static char *copy_text(const char *s)
{
    size_t n = strlen(s) + 1;
    char *p = md_alloc(n, "dataset");
    return p ? memcpy(p, s, n) : NULL;
}

static md_status open_all(md_dataset *d, const char *path, const char *split, md_comm *c)
{
    hid_t group = -1;
    d->path = copy_text(path);
    d->split = copy_text(split);
    MD_TRY(md_agree(c, d->path && d->split ? MD_OK : MD_ERR_MEMORY));
    MD_TRY(md_h5_open(path, c, &d->file));
    md_status st = md_agree(c, open_file(d, &group));
    if (st == MD_OK)
        st = load_index(d, group, c);
    md_h5_release(group);
    return st;
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

void md_dataset_close(md_dataset *d)
{
    if (!d)
        return;
    md_h5_release(d->data);
    md_h5_close(&d->file); /* nothing was written: a failure changes nothing */
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
    return d->count;
}

int md_dataset_classes(const md_dataset *d)
{
    return d->classes;
}

const char *md_dataset_class_name(const md_dataset *d, int k)
{
    MD_ASSERT(k >= 0 && k < d->classes, "class %d of %d", k, d->classes);
    return d->class_names + (size_t)k * d->class_width;
}

static void check_row(const md_dataset *d, int64_t i)
{
    MD_ASSERT(i >= 0 && i < d->count, "image %lld of %lld", (long long)i, (long long)d->count);
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

static int read_bytes(const md_dataset *d, void *buf, size_t n, int64_t at)
{
    if (md_fault("io.read"))
        return EIO;
    int err = md_fault("io.read.transient") ? EIO : read_once(d->fd, buf, n, at);
    for (int i = 0; i < RETRIES && (err == EIO || err == ESTALE); i++) {
        struct timespec pause = {0, RETRY_NS << i};
        nanosleep(&pause, NULL);
        err = read_again(d, buf, n, at);
    }
    return err;
}

const char *md_dataset_name(const md_dataset *d, int64_t i, char *buf, size_t cap)
{
    uint64_t range[2];
    check_row(d, i);
    snprintf(buf, cap, "?");
    if (read_once(d->fd, range, sizeof range, d->name_offset_at + i * (int64_t)sizeof *range) !=
            0 ||
        range[0] > range[1] || range[1] > (uint64_t)d->name_bytes)
        return buf;
    size_t n = MD_MIN((size_t)(range[1] - range[0]), cap - 1);
    if (read_once(d->fd, buf, n, d->name_at + (int64_t)range[0]) != 0)
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
    int err = read_bytes(d, buf, n, d->data_at + (int64_t)d->offset[i]);
    if (err != 0)
        MD_FAIL(MD_ERR_IO, "%s: image %lld of split '%s': cannot read: %s", d->path, (long long)i,
                d->split, strerror(err));
    return check_hash(d, i, buf, n);
}

md_status md_dataset_read_hdf5(const md_dataset *d, int64_t i, void *buf, size_t cap, size_t *len)
{
    size_t n = md_dataset_bytes(d, i);
    MD_ASSERT(n <= cap, "image %lld has %zu bytes, room for %zu", (long long)i, n, cap);
    *len = n;
    if (md_fault("io.read"))
        MD_FAIL(MD_ERR_IO, "%s: image %lld of split '%s': cannot read: %s", d->path, (long long)i,
                d->split, strerror(EIO));
    MD_TRY(md_h5_read_range(d->data, H5T_NATIVE_UINT8, d->offset[i], n, buf));
    return check_hash(d, i, buf, n);
}
