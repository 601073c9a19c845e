/* convert_write: the store's file. One rank creates it with HDF5 in full but for the image bytes;
 * then all ranks put these at their offsets in the reserved space. */
#include "io/convert_parts.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>
#define XXH_INLINE_ALL /* no library to link, compiled for this machine */
#include <xxhash.h>

#include "io/dataset.h"
#include "io/h5.h"
#include "src/log.h"

#define TELL_SECONDS 5.0

void convert_tell(convert_progress *p, int64_t bytes)
{
    double now = md_now();
    p->images++;
    p->done += bytes;
    if (md_base_rank() != 0 || now - p->told < TELL_SECONDS)
        return;
    p->told = now;
    double s = now - p->start;
    md_log_info("%s %3.0f%%  about %.0f images/s, %.1f MB/s", p->doing,
                100.0 * (double)p->done / (double)MD_MAX(p->total, 1),
                (double)p->images * p->ranks / s, (double)p->done * 1e-6 * p->ranks / s);
}

/* --- the index ----------------------------------------------------------------------------- */

static md_status put(hid_t group, const char *name, hid_t type, int rank, int64_t rows,
                     const void *buf)
{
    hsize_t dim[2] = {(hsize_t)rows, 2};
    hid_t set;
    MD_TRY(md_h5_dset_create(group, name, type, rank, dim, &set));
    md_status st = md_h5_write_all(set, type, buf);
    md_h5_release(set);
    return st;
}

/* One value of every image of a column into buf, in stored order. */
static md_status put_values(const convert_store *s, const convert_column *col, hid_t group,
                            void *buf)
{
    uint64_t *xxh3 = buf;
    int32_t *label = buf;
    uint16_t *wh = buf;
    uint8_t *kind = buf;
    for (int64_t q = 0; q < col->n; q++)
        xxh3[q] = s->result[col->item[q]].xxh3;
    MD_TRY(put(group, "xxh3", H5T_STD_U64LE, 1, col->n, buf));
    for (int64_t q = 0; q < col->n; q++)
        label[q] = convert_item_of(s->table, col->item[q])->label;
    MD_TRY(put(group, "label", H5T_STD_I32LE, 1, col->n, buf));
    for (int64_t q = 0; q < col->n; q++) {
        wh[2 * q] = s->result[col->item[q]].w;
        wh[2 * q + 1] = s->result[col->item[q]].h;
    }
    MD_TRY(put(group, "wh", H5T_STD_U16LE, 2, col->n, buf));
    for (int64_t q = 0; q < col->n; q++)
        kind[q] = s->result[col->item[q]].kind;
    return put(group, "kind", H5T_STD_U8LE, 1, col->n, buf);
}

static const char *item_name(const convert_store *s, const convert_column *col, int64_t q)
{
    return convert_text_of(s->table, convert_item_of(s->table, col->item[q])->name);
}

static md_status put_names(const convert_store *s, const convert_column *col, hid_t group,
                           uint64_t *offset)
{
    offset[0] = 0;
    for (int64_t q = 0; q < col->n; q++)
        offset[q + 1] = offset[q] + strlen(item_name(s, col, q));
    char *names;
    MD_NEW(names, offset[col->n], "convert");
    for (int64_t q = 0; q < col->n; q++)
        memcpy(names + offset[q], item_name(s, col, q), offset[q + 1] - offset[q]);
    md_status st = put(group, "name_offset", H5T_STD_U64LE, 1, col->n + 1, offset);
    if (st == MD_OK)
        st = put(group, "name", H5T_STD_U8LE, 1, (int64_t)offset[col->n], names);
    md_free(names);
    return st;
}

static md_status put_data(convert_column *col, hid_t group)
{
    hsize_t bytes = (hsize_t)col->offset[col->n];
    hid_t set;
    MD_TRY(md_h5_dset_create(group, "data", H5T_STD_U8LE, 1, &bytes, &set));
    md_status st = md_h5_offset(set, &col->data_at);
    md_h5_release(set);
    return st;
}

static md_status put_split(convert_store *s, hid_t file, int split)
{
    convert_column *col = &s->column[split];
    hid_t group;
    uint64_t *buf;
    MD_TRY(md_h5_group_create(file, s->table->splits[split], &group));
    MD_NEW(buf, col->n + 1, "convert");
    md_status st = put(group, "offset", H5T_STD_U64LE, 1, col->n + 1, col->offset);
    if (st == MD_OK)
        st = put_values(s, col, group, buf);
    if (st == MD_OK)
        st = put_names(s, col, group, buf);
    if (st == MD_OK)
        st = put_data(col, group);
    md_free(buf);
    md_h5_release(group);
    return st;
}

static md_status put_classes(const convert_store *s, hid_t file)
{
    int64_t n = s->table->classes.n;
    const char **name;
    hid_t group;
    MD_TRY(md_h5_group_create(file, "classes", &group));
    MD_NEW(name, n, "convert");
    for (int64_t k = 0; k < n; k++)
        name[k] = convert_class_name(s->table, k);
    md_status st = md_h5_strings_write(group, "name", n, name);
    md_free(name);
    md_h5_release(group);
    return st;
}

static md_status put_all(convert_store *s, hid_t file)
{
    MD_TRY(md_h5_attr_write_str(file, "format", MD_DATASET_FORMAT));
    MD_TRY(md_h5_attr_write_i64(file, "version", MD_DATASET_VERSION));
    MD_TRY(md_h5_attr_write_i64(file, "num_classes", s->table->classes.n));
    MD_TRY(md_h5_attr_write_str(file, "source", s->source));
    MD_TRY(md_h5_attr_write_str(file, "order", s->order));
    MD_TRY(put_classes(s, file));
    for (int i = 0; i < s->table->n_splits; i++)
        if (s->column[i].n > 0)
            MD_TRY(put_split(s, file, i));
    return MD_OK;
}

/* --- the images ---------------------------------------------------------------------------- */

/* A full disk shows here, before hours of copying; a file system that cannot reserve says so and
 * then fails at the write. */
static md_status reserve(const convert_store *s, int fd)
{
    for (int i = 0; i < s->table->n_splits; i++) {
        const convert_column *col = &s->column[i];
        if (col->n == 0)
            continue;
        int64_t bytes = col->offset[col->n];
        if (fallocate(fd, 0, col->data_at, bytes) != 0 && errno != EOPNOTSUPP && errno != ENOSYS)
            MD_FAIL(MD_ERR_IO, "%s: cannot reserve %lld bytes for the images: %s", s->path,
                    (long long)bytes, strerror(errno));
    }
    return MD_OK;
}

static md_status open_for_images(const convert_store *s, int *fd)
{
    *fd = open(s->path, O_WRONLY | O_CLOEXEC);
    if (*fd < 0)
        MD_FAIL(MD_ERR_IO, "%s: cannot open for writing: %s", s->path, strerror(errno));
    return MD_OK;
}

md_status convert_create(convert_store *s)
{
    hid_t file;
    MD_TRY(md_h5_create(s->path, NULL, &file));
    md_status st = put_all(s, file), closed = md_h5_close(&file);
    MD_TRY(st != MD_OK ? st : closed);
    int fd;
    MD_TRY(open_for_images(s, &fd));
    st = reserve(s, fd);
    close(fd);
    return st;
}

static md_status write_at(const convert_store *s, int fd, const uint8_t *bytes, int64_t n,
                          int64_t at)
{
    for (int64_t done = 0; done < n;) {
        ssize_t k = md_fault("convert.write")
                        ? -1
                        : pwrite(fd, bytes + done, (size_t)(n - done), at + done);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            MD_FAIL(MD_ERR_IO, "%s: cannot write: %s", s->path, strerror(errno ? errno : EIO));
        done += k;
    }
    return MD_OK;
}

/* Where the items lo .. hi - 1 go in the file; -1: nowhere. */
static void find_places(const convert_store *s, int64_t lo, int64_t hi, int64_t *at)
{
    for (int64_t i = lo; i < hi; i++)
        at[i - lo] = -1;
    for (int k = 0; k < s->table->n_splits; k++) {
        const convert_column *col = &s->column[k];
        for (int64_t q = 0; q < col->n; q++)
            if (col->item[q] >= lo && col->item[q] < hi)
                at[col->item[q] - lo] = col->data_at + col->offset[q];
    }
}

static md_status copy_item(const convert_store *s, convert_reader *r, int fd, int64_t i, int64_t at)
{
    const convert_item *it = convert_item_of(s->table, i);
    const uint8_t *bytes;
    MD_TRY(convert_read_item(r, s->table, it, &bytes));
    if (XXH3_64bits(bytes, (size_t)it->bytes) != s->result[i].xxh3)
        MD_FAIL(MD_ERR_DATA, "%s: changed while it was being converted",
                convert_text_of(s->table, it->name));
    return write_at(s, fd, bytes, it->bytes, at);
}

static md_status copy_items(const convert_store *s, convert_reader *r, int fd,
                            const int64_t range[2], const int64_t *at, convert_progress *p)
{
    for (int64_t i = range[0]; i < range[1]; i++) {
        if (at[i - range[0]] < 0)
            continue;
        MD_TRY(copy_item(s, r, fd, i, at[i - range[0]]));
        convert_tell(p, convert_item_of(s->table, i)->bytes);
    }
    if (fsync(fd) != 0)
        MD_FAIL(MD_ERR_IO, "%s: cannot write to the disk: %s", s->path, strerror(errno));
    return MD_OK;
}

md_status convert_write_items(const convert_store *s, int64_t lo, int64_t hi, convert_progress *p)
{
    convert_reader *r = NULL;
    int64_t *at;
    int fd;
    MD_TRY(open_for_images(s, &fd));
    at = md_alloc((size_t)(hi - lo) * sizeof *at, "convert");
    md_status st = at ? convert_reader_create(&r) : MD_ERR_MEMORY;
    if (st == MD_OK) {
        find_places(s, lo, hi, at);
        st = copy_items(s, r, fd, (int64_t[]){lo, hi}, at, p);
    }
    convert_reader_free(r);
    md_free(at);
    if (close(fd) != 0 && st == MD_OK)
        st = md_error_set(MD_ERR_IO, "%s: cannot close: %s", s->path, strerror(errno));
    return st;
}
