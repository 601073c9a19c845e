/* checkpoint_file: the format. HDF5 lays the file out and reads names, shapes and texts; the END
 * mark and the hashes are plain bytes, checked before HDF5 may look: damaged metadata never reaches
 * it. */
#include <hdf5.h>

#include "io/checkpoint_parts.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "io/h5.h"

#define FORMAT     "md_hpc.checkpoint"
#define VERSION    1
#define MAGIC      0x54504b434850444dULL /* "MDPHCKPT" */
#define MARK_WORDS 512                   /* the user block; the last word hashes the others */
#define MARK_BYTES ((int64_t)(MARK_WORDS * sizeof(uint64_t)))
#define ALIGNMENT  4096
#define TEXT_MAX   ((size_t)65536) /* of an attribute, a limit of the file format */

enum { MARK_MAGIC, MARK_VERSION, MARK_BYTES_ALL, MARK_TABLE, MARK_ITEMS, MARK_REST, MARK_EXTENT };

/* A row of "extent", and what is left out of the hash of the rest. */
typedef struct extent {
    uint64_t offset, bytes, xxh3;
} extent;

static hid_t file_type(int32_t dtype)
{
    switch (dtype) {
    case MD_F32:
        return H5T_IEEE_F32LE;
    case MD_F64:
        return H5T_IEEE_F64LE;
    case MD_I32:
        return H5T_STD_I32LE;
    case MD_I64:
        return H5T_STD_I64LE;
    case MD_U8:
        return H5T_STD_U8LE;
    default:
        return -1;
    }
}

void md_ckpt_clear(md_checkpoint *ck)
{
    md_free(ck->entry);
    md_free(ck->config);
    md_free(ck->text);
    md_free(ck->fact);
}

/* Reserves the file's space, holes included. A full disk, a quota or a limit shows before anything
 * is written, and writers of one file do not queue for the allocation of blocks (2 ranks on ext4:
 * 0.6 s instead of 1.0 s for 1 GiB). A file system that cannot reserve has its say when it is
 * written to. */
static md_status reserve(const char *path, int64_t bytes)
{
    int fd;
    MD_TRY(md_ckpt_fd(path, true, &fd));
    errno = 0;
    bool refused =
        fallocate(fd, 0, 0, bytes) != 0 && (errno == ENOSPC || errno == EDQUOT || errno == EFBIG);
    int err = refused ? errno : ENOSPC;
    close(fd);
    if (refused || md_fault("ckpt.space"))
        MD_FAIL(MD_ERR_IO, "%s: no room for a checkpoint of %lld MiB: %s", path,
                (long long)((bytes + (1 << 20) - 1) >> 20), strerror(err));
    return MD_OK;
}

/* Makes the groups in front of a name's last slash. */
static md_status make_groups(hid_t file, const char *name)
{
    char part[MD_STATE_NAME];
    for (const char *s = strchr(name, '/'); s; s = strchr(s + 1, '/')) {
        snprintf(part, sizeof part, "%.*s", (int)(s - name), name);
        if (md_h5_exists(file, part))
            continue;
        hid_t group;
        MD_TRY(md_h5_group_create(file, part, &group));
        md_h5_release(group);
    }
    return MD_OK;
}

static md_status write_facts(hid_t file, const md_checkpoint_args *args)
{
    MD_TRY(md_h5_attr_write_str(file, "format", FORMAT));
    MD_TRY(md_h5_attr_write_i64(file, "version", VERSION));
    MD_TRY(md_h5_attr_write_i64(file, "step", args->step));
    MD_TRY(md_h5_attr_write_i64(file, "facts", args->facts));
    const char **name;
    MD_NEW(name, args->facts + 1, "checkpoint names");
    md_status st = MD_OK;
    for (int i = 0; i < args->facts && st == MD_OK; i++) {
        name[i] = args->fact[i].name;
        st = md_h5_attr_write_str(file, name[i], args->fact[i].value);
    }
    if (st == MD_OK && args->facts)
        st = md_h5_strings_write(file, "checkpoint/fact", args->facts, name);
    md_free(name);
    return st;
}

static md_status write_config(hid_t file, const char *text)
{
    hsize_t n = text ? strlen(text) : 0;
    if (n == 0)
        return MD_OK;
    hid_t set;
    MD_TRY(md_h5_dset_create(file, "checkpoint/config", H5T_STD_U8LE, 1, &n, &set));
    md_status st = md_h5_write_all(set, H5T_NATIVE_UINT8, text);
    md_h5_release(set);
    return st;
}

static md_status write_names(hid_t file, const md_checkpoint_args *args)
{
    const char **name;
    MD_NEW(name, args->items, "checkpoint names");
    for (int i = 0; i < args->items; i++)
        name[i] = args->item[i].name;
    md_status st = md_h5_strings_write(file, "checkpoint/item", args->items, name);
    md_free(name);
    return st;
}

static md_status create_item(hid_t file, const md_state_item *item, md_state_entry *e)
{
    hid_t type = file_type((int32_t)item->dtype), set;
    MD_ASSERT(strlen(item->name) < sizeof e->name && type >= 0 && item->rank >= 1 &&
                  item->rank <= MD_MAX_RANK && md_ckpt_item_bytes(item) > 0,
              "item %s of type %s", item->name, md_dtype_name(item->dtype));
    snprintf(e->name, sizeof e->name, "%s", item->name);
    e->dtype = (int32_t)item->dtype;
    e->rank = item->rank;
    e->bytes = md_ckpt_item_bytes(item);
    hsize_t dim[MD_MAX_RANK];
    for (int d = 0; d < item->rank; d++)
        dim[d] = (hsize_t)(e->global[d] = item->global[d]);
    MD_TRY(make_groups(file, item->name));
    MD_TRY(md_h5_dset_create(file, item->name, type, item->rank, dim, &set));
    md_status st = md_h5_offset(set, &e->offset);
    md_h5_release(set);
    return st;
}

static md_status create_all(hid_t file, const md_checkpoint_args *args, md_checkpoint *ck)
{
    MD_TRY(make_groups(file, "checkpoint/"));
    MD_TRY(write_facts(file, args));
    MD_TRY(write_config(file, args->config));
    MD_TRY(write_names(file, args));
    hid_t set;
    hsize_t dim[2] = {(hsize_t)args->items, 3};
    MD_TRY(md_h5_dset_create(file, "checkpoint/extent", H5T_STD_U64LE, 2, dim, &set));
    md_status st = md_h5_offset(set, &ck->table_offset);
    md_h5_release(set);
    for (int i = 0; i < args->items && st == MD_OK; i++)
        st = create_item(file, &args->item[i], &ck->entry[i]);
    return st;
}

md_status md_ckpt_create(const md_checkpoint_args *args, const char *path, md_checkpoint *ck)
{
    MD_ASSERT(args->items > 0, "a checkpoint of nothing");
    if (md_fault("ckpt.create"))
        MD_FAIL(MD_ERR_CREATE, "%s: cannot create: injected fault", path);
    md_h5_layout layout = {.alignment = ALIGNMENT, .user_block = MARK_BYTES};
    hid_t file;
    MD_TRY(md_h5_create(path, &layout, &file));
    md_status st = create_all(file, args, ck), closed = md_h5_close(&file);
    MD_TRY(st != MD_OK ? st : closed);
    struct stat info;
    if (stat(path, &info) != 0)
        MD_FAIL(MD_ERR_IO, "%s: is gone", path);
    ck->file_bytes = info.st_size;
    return reserve(path, ck->file_bytes);
}

static int by_offset(const void *a, const void *b)
{
    uint64_t x = ((const extent *)a)->offset, y = ((const extent *)b)->offset;
    return (x > y) - (x < y);
}

static md_status hash_range(int fd, const char *path, int64_t lo, int64_t hi, XXH3_state_t *state)
{
    char buf[16384];
    while (lo < hi) {
        int64_t n = MD_MIN((int64_t)sizeof buf, hi - lo);
        MD_TRY(md_ckpt_pread(fd, path, buf, n, lo));
        XXH3_64bits_update(state, buf, (size_t)n);
        lo += n;
    }
    return MD_OK;
}

/* Hash of the file's bytes outside of the user block and of n sorted extents, which are checked to
 * lie in the file without overlap. */
static md_status hash_rest(int fd, const char *path, int64_t bytes, const extent *x, int n,
                           uint64_t *out)
{
    XXH3_state_t state;
    XXH3_64bits_reset(&state);
    int64_t at = MARK_BYTES;
    for (int i = 0; i <= n; i++) {
        int64_t lo = i < n ? (int64_t)x[i].offset : bytes;
        int64_t size = i < n ? (int64_t)x[i].bytes : 0;
        if (lo < at || lo > bytes || size < 0 || size > bytes - lo)
            MD_FAIL(MD_ERR_DATA, "%s: damaged: its table of extents is not possible", path);
        MD_TRY(hash_range(fd, path, at, lo, &state));
        at = lo + size;
    }
    *out = XXH3_64bits_digest(&state);
    return MD_OK;
}

/* hash_rest for the items in `table`, n of them, and the table itself at table_offset. */
static md_status hash_skeleton(int fd, const md_checkpoint *ck, const extent *table, int n,
                               uint64_t *out)
{
    extent *sorted;
    MD_NEW(sorted, n + 1, "checkpoint extents");
    memcpy(sorted, table, (size_t)n * sizeof *table);
    sorted[n] = (extent){(uint64_t)ck->table_offset, (uint64_t)n * sizeof *table, 0};
    qsort(sorted, (size_t)n + 1, sizeof *sorted, by_offset);
    md_status st = hash_rest(fd, ck->path, ck->file_bytes, sorted, n + 1, out);
    md_free(sorted);
    return st;
}

static md_status seal(int fd, const md_checkpoint *ck, const extent *table)
{
    int64_t table_bytes = (int64_t)sizeof *table * ck->entries;
    uint64_t mark[MARK_WORDS] = {[MARK_MAGIC] = MAGIC,
                                 [MARK_VERSION] = VERSION,
                                 [MARK_BYTES_ALL] = (uint64_t)ck->file_bytes,
                                 [MARK_TABLE] = (uint64_t)ck->table_offset,
                                 [MARK_ITEMS] = (uint64_t)ck->entries,
                                 [MARK_EXTENT] = XXH3_64bits(table, (size_t)table_bytes)};
    MD_TRY(hash_skeleton(fd, ck, table, ck->entries, &mark[MARK_REST]));
    mark[MARK_WORDS - 1] = XXH3_64bits(mark, sizeof mark - sizeof *mark);
    MD_TRY(md_ckpt_pwrite(fd, ck->path, table, table_bytes, ck->table_offset));
    MD_TRY(md_ckpt_sync(fd, ck->path)); /* all that the mark vouches for is on disk before it */
    if (md_fault("ckpt.seal"))
        MD_FAIL(MD_ERR_IO, "%s: cannot write the END mark: injected fault", ck->path);
    MD_TRY(md_ckpt_pwrite(fd, ck->path, mark, sizeof mark, 0));
    return md_ckpt_sync(fd, ck->path);
}

md_status md_ckpt_seal(const md_checkpoint *ck)
{
    extent *table;
    MD_NEW(table, ck->entries, "checkpoint extents");
    for (int i = 0; i < ck->entries; i++)
        table[i] = (extent){(uint64_t)ck->entry[i].offset, (uint64_t)ck->entry[i].bytes,
                            ck->entry[i].xxh3};
    int fd;
    md_status st = md_ckpt_fd(ck->path, true, &fd);
    if (st == MD_OK) {
        st = seal(fd, ck, table);
        close(fd);
    }
    md_free(table);
    return st;
}

/* Reads the END mark and checks it against the file's size. */
static md_status load_mark(int fd, md_checkpoint *ck, uint64_t mark[MARK_WORDS])
{
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
        MD_FAIL(MD_ERR_NOINPUT, "%s: not a file", ck->path);
    if (info.st_size < MARK_BYTES)
        MD_FAIL(MD_ERR_DATA, "%s: not a checkpoint, or cut", ck->path);
    MD_TRY(md_ckpt_pread(fd, ck->path, mark, MARK_BYTES, 0));
    if (mark[MARK_MAGIC] == 0)
        MD_FAIL(MD_ERR_DATA, "%s: unfinished: it has no END mark", ck->path);
    if (mark[MARK_MAGIC] != MAGIC)
        MD_FAIL(MD_ERR_DATA, "%s: not a checkpoint of this program", ck->path);
    if (mark[MARK_WORDS - 1] != XXH3_64bits(mark, (MARK_WORDS - 1) * sizeof *mark))
        MD_FAIL(MD_ERR_DATA, "%s: damaged: the END mark's hash differs", ck->path);
    if (mark[MARK_VERSION] != VERSION)
        MD_FAIL(MD_ERR_DATA, "%s: format version %llu, this program reads version %d", ck->path,
                (unsigned long long)mark[MARK_VERSION], VERSION);
    if (mark[MARK_BYTES_ALL] != (uint64_t)info.st_size)
        MD_FAIL(MD_ERR_DATA, "%s: cut or grown: %lld bytes instead of %llu", ck->path,
                (long long)info.st_size, (unsigned long long)mark[MARK_BYTES_ALL]);
    ck->file_bytes = info.st_size;
    ck->table_offset = (int64_t)mark[MARK_TABLE];
    ck->entries = (int)mark[MARK_ITEMS];
    return MD_OK;
}

/* Reads "extent" and checks its hash and that of everything that is neither it nor an item. */
static md_status load_extents(int fd, md_checkpoint *ck, const uint64_t *mark)
{
    extent *table;
    MD_NEW(table, ck->entries, "checkpoint extents");
    size_t bytes = (size_t)ck->entries * sizeof *table;
    uint64_t rest = 0;
    md_status st = md_ckpt_pread(fd, ck->path, table, (int64_t)bytes, ck->table_offset);
    if (st == MD_OK && XXH3_64bits(table, bytes) != mark[MARK_EXTENT])
        st = md_error_set(MD_ERR_DATA, "%s: damaged: the hash of its table of extents differs",
                          ck->path);
    if (st == MD_OK)
        st = hash_skeleton(fd, ck, table, ck->entries, &rest);
    if (st == MD_OK && rest != mark[MARK_REST])
        st =
            md_error_set(MD_ERR_DATA, "%s: damaged: the hash of names and texts differs", ck->path);
    for (int i = 0; i < ck->entries && st == MD_OK; i++) {
        ck->entry[i].offset = (int64_t)table[i].offset;
        ck->entry[i].bytes = (int64_t)table[i].bytes;
        ck->entry[i].xxh3 = table[i].xxh3;
    }
    md_free(table);
    return st;
}

static int32_t dtype_of(hid_t set)
{
    static const int32_t known[] = {MD_F32, MD_F64, MD_I32, MD_I64, MD_U8};
    hid_t type = H5Dget_type(set);
    int32_t found = -1;
    for (size_t i = 0; i < MD_COUNT(known); i++)
        if (H5Tequal(type, file_type(known[i])) > 0)
            found = known[i];
    md_h5_release(type);
    return found;
}

/* Type and shape of an item; its place must be the one that was hashed. */
static md_status load_item(hid_t file, const char *name, md_state_entry *e)
{
    hid_t set = md_h5_exists(file, name) ? H5Dopen2(file, name, H5P_DEFAULT) : -1;
    hid_t space = H5Dget_space(set);
    hsize_t dim[MD_MAX_RANK] = {0};
    int64_t offset = -1;
    e->dtype = dtype_of(set);
    e->rank = H5Sget_simple_extent_ndims(space);
    bool ok = strlen(name) < sizeof e->name && e->dtype >= 0 && e->rank >= 1 &&
              e->rank <= MD_MAX_RANK && H5Sget_simple_extent_dims(space, dim, NULL) >= 0 &&
              md_h5_offset(set, &offset) == MD_OK && offset == e->offset;
    int64_t bytes = ok ? (int64_t)md_dtype_bytes((md_dtype)e->dtype) : 0;
    for (int d = 0; ok && d < e->rank; d++)
        bytes *= e->global[d] = (int64_t)dim[d];
    md_h5_release(space);
    md_h5_release(set);
    if (!ok || bytes != e->bytes)
        return md_h5_fail(MD_ERR_DATA, file, "item %s is not as written", name);
    snprintf(e->name, sizeof e->name, "%s", name);
    return MD_OK;
}

static md_status load_items(hid_t file, md_checkpoint *ck)
{
    char *names;
    size_t width;
    MD_TRY(md_h5_strings_read(file, "checkpoint/item", ck->entries, &names, &width));
    md_status st = MD_OK;
    for (int i = 0; i < ck->entries && st == MD_OK; i++)
        st = load_item(file, names + (size_t)i * width, &ck->entry[i]);
    md_free(names);
    return st;
}

static md_status load_config(hid_t file, md_checkpoint *ck)
{
    hsize_t n = MD_H5_ANY;
    hid_t set = -1;
    bool have = md_h5_exists(file, "checkpoint/config");
    if (have)
        MD_TRY(md_h5_dset_open(file, "checkpoint/config", H5T_STD_U8LE, 1, &n, &set));
    ck->config = md_alloc(have ? (size_t)n + 1 : 1, "checkpoint config");
    md_status st = ck->config ? MD_OK : MD_ERR_MEMORY;
    if (st == MD_OK && have)
        st = md_h5_read_all(set, H5T_NATIVE_UINT8, ck->config);
    md_h5_release(set);
    return st;
}

/* The facts' names and values, one after the other, into ck->text. */
static md_status load_fact_texts(hid_t file, md_checkpoint *ck, const char *names, size_t width)
{
    MD_NEW(ck->text, (size_t)ck->facts * (width + TEXT_MAX) + 1, "checkpoint facts");
    for (int i = 0; i < ck->facts; i++) {
        const char *name = names + (size_t)i * width;
        char *end = ck->text + ck->text_bytes;
        size_t n = strlen(name) + 1;
        memcpy(end, name, n);
        MD_TRY(md_h5_attr_read_str(file, name, end + n, TEXT_MAX));
        ck->text_bytes += (int64_t)(n + strlen(end + n) + 1);
    }
    return MD_OK;
}

static md_status load_facts(hid_t file, md_checkpoint *ck)
{
    char format[sizeof FORMAT + 1];
    int64_t facts;
    MD_TRY(md_h5_attr_read_str(file, "format", format, sizeof format));
    if (strcmp(format, FORMAT) != 0)
        return md_h5_fail(MD_ERR_DATA, file, "format is \"%s\", not \"%s\"", format, FORMAT);
    MD_TRY(md_h5_attr_read_i64(file, "step", &ck->step));
    MD_TRY(md_h5_attr_read_i64(file, "facts", &facts));
    ck->facts = (int)facts;
    if (facts == 0)
        return MD_OK;
    char *names;
    size_t width;
    MD_TRY(md_h5_strings_read(file, "checkpoint/fact", facts, &names, &width));
    md_status st = load_fact_texts(file, ck, names, width);
    md_free(names);
    return st;
}

static md_status load_plain(md_checkpoint *ck)
{
    uint64_t mark[MARK_WORDS];
    int fd;
    MD_TRY(md_ckpt_fd(ck->path, false, &fd));
    md_status st = load_mark(fd, ck, mark);
    if (st == MD_OK)
        ck->entry = md_alloc((size_t)ck->entries * sizeof *ck->entry, "checkpoint entries");
    if (st == MD_OK)
        st = ck->entry ? load_extents(fd, ck, mark) : MD_ERR_MEMORY;
    close(fd);
    return st;
}

md_status md_ckpt_load(const char *path, md_checkpoint *ck)
{
    hid_t file;
    snprintf(ck->path, sizeof ck->path, "%s", path);
    MD_TRY(load_plain(ck));
    MD_TRY(md_h5_open(path, NULL, &file));
    md_status st = load_facts(file, ck);
    if (st == MD_OK)
        st = load_config(file, ck);
    if (st == MD_OK)
        st = load_items(file, ck);
    md_status closed = md_h5_close(&file);
    return st != MD_OK ? st : closed;
}
