/* h5: see h5.h. */
#include "io/h5.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "mpi/agree.h"
#include "mpi/comm_mpi.h"

#define ALIGNMENT   ((hsize_t)1 << 20)
#define ALIGN_FROM  ((hsize_t)64 << 10) /* smaller objects are packed */
#define SLICE_BYTES ((hsize_t)1 << 30)
#define REASON_SIZE 256
#define NAME_SIZE   512

const char *md_h5_library(void)
{
    static char text[96];
    unsigned major = 0, minor = 0, release = 0;
    H5get_libversion(&major, &minor, &release);
    int n = snprintf(text, sizeof text, "HDF5 %u.%u.%u", major, minor, release);
    if (major != H5_VERS_MAJOR || minor != H5_VERS_MINOR || release != H5_VERS_RELEASE)
        snprintf(text + n, sizeof text - (size_t)n, " (compiled with %s)", H5_VERS_INFO);
    return text;
}

/* The walk runs from the function we called down to where it went wrong: the last entry is the
 * reason. */
static herr_t keep_reason(unsigned n, const H5E_error2_t *e, void *reason)
{
    (void)n;
    snprintf(reason, REASON_SIZE, "%s", e->desc ? e->desc : "");
    return 0;
}

/* Takes the reason off HDF5's stack, which the next call into it would clear. */
static void take_reason(char reason[REASON_SIZE])
{
    *reason = 0;
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_DOWNWARD, keep_reason, reason);
    H5Eclear2(H5E_DEFAULT);
}

static md_status say(md_status st, const char *path, const char *reason, const char *what)
{
    if (*reason)
        MD_FAIL(st, "%s: %s (HDF5: %s)", path, what, reason);
    MD_FAIL(st, "%s: %s", path, what);
}

static md_status fail_path(md_status st, const char *path, const char *what)
{
    char reason[REASON_SIZE];
    take_reason(reason);
    return say(st, path, reason, what);
}

md_status md_h5_fail(md_status st, hid_t loc, const char *fmt, ...)
{
    char reason[REASON_SIZE], what[512], path[NAME_SIZE];
    take_reason(reason);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    if (H5Fget_name(loc, path, sizeof path) < 0)
        snprintf(path, sizeof path, "HDF5 file");
    H5Eclear2(H5E_DEFAULT);
    return say(st, path, reason, what);
}

static hid_t access_plist(md_comm *c, bool write, hsize_t alignment)
{
    hid_t fapl = H5Pcreate(H5P_FILE_ACCESS);
    bool ok = fapl >= 0 && H5Pset_libver_bounds(fapl, H5F_LIBVER_EARLIEST, H5F_LIBVER_V18) >= 0 &&
              H5Pset_alignment(fapl, ALIGN_FROM, alignment) >= 0 &&
              H5Pset_fclose_degree(fapl, H5F_CLOSE_STRONG) >= 0;
    if (ok && !write)
        ok = H5Pset_file_locking(fapl, false, true) >= 0;
    if (ok && c && md_comm_size(c) > 1)
        ok = H5Pset_fapl_mpio(fapl, md_comm_mpi_handle(c), MPI_INFO_NULL) >= 0;
    if (!ok && fapl >= 0) {
        H5Pclose(fapl);
        return -1;
    }
    return fapl;
}

static md_status agree(md_comm *c, md_status st)
{
    return c ? md_agree(c, st) : st;
}

md_status md_h5_create(const char *path, md_comm *c, hid_t *file)
{
    return md_h5_create_as(path, c, &(md_h5_layout){.alignment = ALIGNMENT}, file);
}

md_status md_h5_create_as(const char *path, md_comm *c, const md_h5_layout *layout, hid_t *file)
{
    *file = -1;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    md_status st = MD_OK;
    /* The system's reason ("Permission denied") is found without HDF5, by one rank. */
    if (!c || md_comm_rank(c) == 0) {
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (fd < 0)
            st = md_error_set(MD_ERR_CREATE, "%s: cannot create: %s", path, strerror(errno));
        else
            close(fd);
    }
    MD_TRY(agree(c, st));
    hid_t fapl = access_plist(c, true, layout->alignment), fcpl = H5Pcreate(H5P_FILE_CREATE);
    if (H5Pset_userblock(fcpl, layout->user_block) >= 0)
        *file = H5Fcreate(path, H5F_ACC_TRUNC, fcpl, fapl);
    if (*file < 0) /* the name is good, so it is the writing */
        st = fail_path(MD_ERR_IO, path, "cannot write");
    md_h5_release(fcpl);
    md_h5_release(fapl);
    st = agree(c, st);
    if (st != MD_OK && *file >= 0) {
        H5Fclose(*file);
        *file = -1;
    }
    return st;
}

static md_status check_openable(const char *path, bool write)
{
    int fd = open(path, (write ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (fd < 0)
        MD_FAIL(MD_ERR_NOINPUT, "%s: cannot open: %s", path, strerror(errno));
    static const unsigned char magic[8] = {0x89, 'H', 'D', 'F', '\r', '\n', 0x1a, '\n'};
    unsigned char head[8];
    ssize_t n = sizeof head;
    bool found = false;
    /* HDF5's part starts at 0 or behind a user block. */
    for (off_t at = 0; !found && n == (ssize_t)sizeof head; at = at ? 2 * at : 512) {
        n = pread(fd, head, sizeof head, at);
        found = n == (ssize_t)sizeof head && memcmp(head, magic, sizeof magic) == 0;
    }
    int err = errno;
    close(fd);
    if (n < 0)
        MD_FAIL(err == EISDIR ? MD_ERR_NOINPUT : MD_ERR_IO, "%s: cannot read: %s", path,
                strerror(err));
    if (!found)
        MD_FAIL(MD_ERR_DATA, "%s: not an HDF5 file", path);
    return MD_OK;
}

md_status md_h5_open(const char *path, md_comm *c, bool write, hid_t *file)
{
    *file = -1;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    MD_TRY(agree(c, check_openable(path, write)));
    hid_t fapl = access_plist(c, write, ALIGNMENT);
    *file = H5Fopen(path, write ? H5F_ACC_RDWR : H5F_ACC_RDONLY, fapl);
    md_status st = MD_OK;
    if (*file < 0)
        st = fail_path(MD_ERR_DATA, path, "damaged or cut HDF5 file");
    md_h5_release(fapl);
    st = agree(c, st);
    if (st != MD_OK && *file >= 0) {
        H5Fclose(*file);
        *file = -1;
    }
    return st;
}

md_status md_h5_close(hid_t *file)
{
    hid_t f = *file;
    *file = -1;
    if (f < 0)
        return MD_OK;
    char path[NAME_SIZE] = "HDF5 file";
    H5Fget_name(f, path, sizeof path);
    if (H5Fclose(f) < 0)
        return fail_path(MD_ERR_IO, path, "cannot write the last bytes at closing");
    return MD_OK;
}

void md_h5_release(hid_t id)
{
    if (id >= 0)
        H5Idec_ref(id);
}

bool md_h5_exists(hid_t loc, const char *name)
{
    char part[NAME_SIZE];
    size_t n = strlen(name);
    if (n >= sizeof part)
        return false;
    for (size_t i = 1; i <= n; i++) {
        if (name[i] != '/' && name[i] != 0)
            continue;
        memcpy(part, name, i);
        part[i] = 0;
        H5L_info_t info;
        if (H5Lexists(loc, part, H5P_DEFAULT) <= 0 ||
            H5Lget_info(loc, part, &info, H5P_DEFAULT) < 0 || info.type != H5L_TYPE_HARD) {
            H5Eclear2(H5E_DEFAULT);
            return false;
        }
    }
    return n > 0;
}

md_status md_h5_group_create(hid_t loc, const char *name, hid_t *out)
{
    *out = H5Gcreate2(loc, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    return *out < 0 ? md_h5_fail(MD_ERR_IO, loc, "cannot create group /%s", name) : MD_OK;
}

md_status md_h5_group_open(hid_t loc, const char *name, hid_t *out)
{
    *out = -1;
    if (!md_h5_exists(loc, name))
        return md_h5_fail(MD_ERR_DATA, loc, "has no group /%s", name);
    *out = H5Gopen2(loc, name, H5P_DEFAULT);
    return *out < 0 ? md_h5_fail(MD_ERR_DATA, loc, "cannot open group /%s", name) : MD_OK;
}

md_status md_h5_dset_create(hid_t loc, const char *name, hid_t type, int rank, const hsize_t *dim,
                            hid_t *out)
{
    hid_t space = H5Screate_simple(rank, dim, NULL), dcpl = H5Pcreate(H5P_DATASET_CREATE), d = -1;
    if (space >= 0 && dcpl >= 0 && H5Pset_layout(dcpl, H5D_CONTIGUOUS) >= 0 &&
        H5Pset_alloc_time(dcpl, H5D_ALLOC_TIME_EARLY) >= 0 &&
        H5Pset_fill_time(dcpl, H5D_FILL_TIME_NEVER) >= 0 &&
        H5Pset_obj_track_times(dcpl, false) >= 0)
        d = H5Dcreate2(loc, name, type, space, H5P_DEFAULT, dcpl, H5P_DEFAULT);
    md_status st = MD_OK;
    if (d < 0)
        st = md_h5_fail(MD_ERR_IO, loc, "cannot create data set %s", name);
    md_h5_release(dcpl);
    md_h5_release(space);
    if (out)
        *out = d;
    else
        md_h5_release(d);
    return st;
}

static const char *layout_fault(hid_t dcpl)
{
    if (dcpl < 0)
        return "has no readable properties";
    if (H5Pget_nfilters(dcpl) != 0)
        return "is compressed or filtered";
    switch (H5Pget_layout(dcpl)) {
    case H5D_CONTIGUOUS:
        return H5Pget_external_count(dcpl) != 0 ? "is stored in external files" : NULL;
    case H5D_VIRTUAL:
        return "is virtual";
    default:
        return "is not stored contiguously";
    }
}

/* What is wrong with an open data set, or NULL. dim receives the extents found for MD_H5_ANY. */
static const char *shape_fault(hid_t d, hid_t type, int rank, hsize_t *dim, char *buf, size_t size)
{
    hid_t stored = H5Dget_type(d), space = H5Dget_space(d), dcpl = H5Dget_create_plist(d);
    const char *fault = layout_fault(dcpl);
    hsize_t found[MD_H5_MAX_RANK];
    if (!fault && H5Tequal(stored, type) <= 0)
        fault = "has another element type than expected";
    if (!fault && (H5Sget_simple_extent_ndims(space) != rank ||
                   H5Sget_simple_extent_dims(space, found, NULL) < 0))
        fault = "has another number of dimensions than expected";
    for (int i = 0; !fault && i < rank; i++) {
        if (dim[i] != MD_H5_ANY && dim[i] != found[i]) {
            snprintf(buf, size, "has %llu elements in dimension %d, expected %llu",
                     (unsigned long long)found[i], i, (unsigned long long)dim[i]);
            fault = buf;
        }
        dim[i] = found[i];
    }
    md_h5_release(dcpl);
    md_h5_release(space);
    md_h5_release(stored);
    return fault;
}

md_status md_h5_dset_open(hid_t loc, const char *name, hid_t type, int rank, hsize_t *dim,
                          hid_t *out)
{
    *out = -1;
    MD_ASSERT(rank >= 1 && rank <= MD_H5_MAX_RANK, "rank %d", rank);
    if (!md_h5_exists(loc, name))
        return md_h5_fail(MD_ERR_DATA, loc, "has no data set %s", name);
    hid_t d = H5Dopen2(loc, name, H5P_DEFAULT);
    if (d < 0)
        return md_h5_fail(MD_ERR_DATA, loc, "cannot open data set %s", name);
    char buf[128];
    const char *fault = shape_fault(d, type, rank, dim, buf, sizeof buf);
    if (fault) {
        H5Eclear2(H5E_DEFAULT);
        md_h5_release(d);
        return md_h5_fail(MD_ERR_DATA, loc, "data set %s %s", name, fault);
    }
    *out = d;
    return MD_OK;
}

md_status md_h5_offset(hid_t dset, int64_t *offset)
{
    *offset = 0;
    if (H5Dget_storage_size(dset) == 0)
        return MD_OK;
    haddr_t at = H5Dget_offset(dset);
    if (at == HADDR_UNDEF)
        return md_h5_fail(MD_ERR_DATA, dset, "a data set has no space in the file");
    *offset = (int64_t)at;
    return MD_OK;
}

/* Moves the rows [first, first + rows) of the slab; rows == 0 selects nothing. */
static bool move_rows(const md_h5_slab *s, hid_t dxpl, hsize_t first, hsize_t rows, void *buf,
                      bool write)
{
    hsize_t start[MD_H5_MAX_RANK], count[MD_H5_MAX_RANK];
    for (int i = 0; i < s->rank; i++) {
        start[i] = s->start[i] + (i == 0 ? first : 0);
        count[i] = rows == 0 ? 1 : i == 0 ? rows : s->count[i];
    }
    hid_t file = H5Dget_space(s->dset), mem = H5Screate_simple(s->rank, count, NULL);
    if (rows == 0) {
        H5Sselect_none(file);
        H5Sselect_none(mem);
    } else {
        H5Sselect_hyperslab(file, H5S_SELECT_SET, start, NULL, count, NULL);
    }
    herr_t err = write ? H5Dwrite(s->dset, s->type, mem, file, dxpl, buf)
                       : H5Dread(s->dset, s->type, mem, file, dxpl, buf);
    /* The reason must outlive the releases below: they would clear it. */
    if (err < 0)
        md_h5_fail(MD_ERR_IO, s->dset,
                   write ? "cannot write a data set" : "cannot read a data set");
    md_h5_release(mem);
    md_h5_release(file);
    return err >= 0;
}

/* A block outside the data set would fail on this rank alone, inside the collective transfer. */
static md_status check_slab(const md_h5_slab *s)
{
    hsize_t dim[MD_H5_MAX_RANK];
    hid_t space = H5Dget_space(s->dset);
    bool ok = H5Sget_simple_extent_ndims(space) == s->rank &&
              H5Sget_simple_extent_dims(space, dim, NULL) >= 0;
    for (int i = 0; ok && i < s->rank; i++)
        ok = s->count[i] <= dim[i] && s->start[i] <= dim[i] - s->count[i];
    md_h5_release(space);
    return ok ? MD_OK : md_h5_fail(MD_ERR_BUG, s->dset, "a block lies outside its data set");
}

static md_status transfer(const md_h5_slab *s, void *buf, bool write)
{
    bool collective = s->c && md_comm_size(s->c) > 1;
    md_status st = check_slab(s);
    if (collective)
        st = md_agree(s->c, st);
    MD_TRY(st);
    hsize_t row = H5Tget_size(s->type), rows = s->count[0];
    for (int i = 1; i < s->rank; i++) {
        row *= s->count[i];
        rows = s->count[i] == 0 ? 0 : rows;
    }
    hsize_t step = row < SLICE_BYTES && row > 0 ? SLICE_BYTES / row : 1;
    int64_t turns = (int64_t)((rows + step - 1) / step);
    if (collective)
        md_comm_allreduce(s->c, &turns, 1, MD_I64, MD_MAX_OP);
    hid_t dxpl = H5Pcreate(H5P_DATASET_XFER);
    if (collective)
        H5Pset_dxpl_mpio(dxpl, H5FD_MPIO_COLLECTIVE);
    bool ok = true;
    for (int64_t t = 0; t < turns; t++) {
        hsize_t first = MD_MIN((hsize_t)t * step, rows), n = MD_MIN(step, rows - first);
        ok = move_rows(s, dxpl, first, n, (char *)buf + first * row, write) && ok;
    }
    md_h5_release(dxpl);
    st = ok ? MD_OK : MD_ERR_IO;
    return collective ? md_agree(s->c, st) : st;
}

md_status md_h5_write(const md_h5_slab *s, const void *buf)
{
    /* H5Dwrite takes const; one loop serves both directions. */
    return transfer(s, (void *)(uintptr_t)buf, true);
}

md_status md_h5_read(const md_h5_slab *s, void *buf)
{
    return transfer(s, buf, false);
}

static md_status move_all(hid_t dset, hid_t type, void *buf, bool write)
{
    hsize_t start[MD_H5_MAX_RANK] = {0}, count[MD_H5_MAX_RANK];
    hid_t space = H5Dget_space(dset);
    int rank = H5Sget_simple_extent_ndims(space);
    if (rank >= 1 && rank <= MD_H5_MAX_RANK)
        H5Sget_simple_extent_dims(space, count, NULL);
    md_h5_release(space);
    if (rank < 1 || rank > MD_H5_MAX_RANK)
        return md_h5_fail(MD_ERR_DATA, dset, "a data set has %d dimensions", rank);
    return transfer(&(md_h5_slab){dset, type, rank, start, count, NULL}, buf, write);
}

md_status md_h5_write_all(hid_t dset, hid_t type, const void *buf)
{
    return move_all(dset, type, (void *)(uintptr_t)buf, true);
}

md_status md_h5_read_all(hid_t dset, hid_t type, void *buf)
{
    return move_all(dset, type, buf, false);
}
