/* h5: see h5.h. */
#include "io/h5.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "io/h5_driver.h"
#include "mpi/agree.h"
#include "mpi/comm_mpi.h"

#define ALIGNMENT   ((hsize_t)1 << 20)
#define ALIGN_FROM  ((hsize_t)64 << 10) /* smaller objects are packed */
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

static md_status agree(md_comm *c, md_status st)
{
    return c ? md_agree(c, st) : st;
}

/* Access properties of a file that is created, by the driver that survives a full disk. */
static hid_t create_access(hsize_t alignment)
{
    hid_t fapl = H5Pcreate(H5P_FILE_ACCESS);
    if (fapl >= 0 && H5Pset_libver_bounds(fapl, H5F_LIBVER_EARLIEST, H5F_LIBVER_V18) >= 0 &&
        H5Pset_alignment(fapl, ALIGN_FROM, alignment) >= 0 &&
        H5Pset_fclose_degree(fapl, H5F_CLOSE_STRONG) >= 0 && md_h5_driver_use(fapl) >= 0)
        return fapl;
    md_h5_release(fapl);
    return -1;
}

static hid_t read_access(md_comm *c)
{
    hid_t fapl = H5Pcreate(H5P_FILE_ACCESS);
    if (fapl >= 0 && H5Pset_fclose_degree(fapl, H5F_CLOSE_STRONG) >= 0 &&
        H5Pset_file_locking(fapl, false, true) >= 0 &&
        (!c || md_comm_size(c) == 1 ||
         H5Pset_fapl_mpio(fapl, md_comm_mpi_handle(c), MPI_INFO_NULL) >= 0))
        return fapl;
    md_h5_release(fapl);
    return -1;
}

md_status md_h5_create(const char *path, const md_h5_layout *layout, hid_t *file)
{
    static const md_h5_layout usual = {.alignment = ALIGNMENT};
    layout = layout ? layout : &usual;
    *file = -1;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    /* The system's reason ("Permission denied") is found without HDF5. */
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        MD_FAIL(MD_ERR_CREATE, "%s: cannot create: %s", path, strerror(errno));
    close(fd);
    hid_t fapl = create_access(layout->alignment), fcpl = H5Pcreate(H5P_FILE_CREATE);
    if (H5Pset_userblock(fcpl, layout->user_block) >= 0)
        *file = H5Fcreate(path, H5F_ACC_TRUNC, fcpl, fapl);
    md_status st = *file < 0 ? fail_path(MD_ERR_CREATE, path, "cannot create") : MD_OK;
    md_h5_release(fcpl);
    md_h5_release(fapl);
    return st;
}

static md_status check_openable(const char *path)
{
    errno = EIO;
    int fd = md_fault("h5.open") ? -1 : open(path, O_RDONLY | O_CLOEXEC);
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

md_status md_h5_open(const char *path, md_comm *c, hid_t *file)
{
    *file = -1;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    MD_TRY(agree(c, check_openable(path)));
    hid_t fapl = read_access(c);
    *file = H5Fopen(path, H5F_ACC_RDONLY, fapl);
    md_status st = *file < 0 ? fail_path(MD_ERR_DATA, path, "damaged or cut HDF5 file") : MD_OK;
    md_h5_release(fapl);
    st = agree(c, st);
    if (st != MD_OK && *file >= 0) {
        H5Fclose(*file);
        *file = -1;
    }
    return st;
}

/* True when the file was opened by md_h5_create. */
static bool is_created(hid_t file)
{
    unsigned how = 0;
    return H5Fget_intent(file, &how) >= 0 && (how & H5F_ACC_RDWR);
}

md_status md_h5_close(hid_t *file)
{
    hid_t f = *file;
    *file = -1;
    if (f < 0)
        return MD_OK;
    char path[NAME_SIZE] = "HDF5 file";
    H5Fget_name(f, path, sizeof path);
    bool created = is_created(f);
    if (H5Fclose(f) < 0)
        return fail_path(MD_ERR_IO, path, "cannot close");
    if (created && md_h5_driver_error() != 0)
        MD_FAIL(MD_ERR_IO, "%s: cannot write: %s", path, strerror(md_h5_driver_error()));
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

md_status md_h5_write_all(hid_t dset, hid_t type, const void *buf)
{
    if (H5Dwrite(dset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, buf) < 0)
        return md_h5_fail(MD_ERR_IO, dset, "cannot write a data set");
    return MD_OK;
}

md_status md_h5_read_all(hid_t dset, hid_t type, void *buf)
{
    if (H5Dread(dset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, buf) < 0)
        return md_h5_fail(MD_ERR_IO, dset, "cannot read a data set");
    return MD_OK;
}

md_status md_h5_read_range(hid_t dset, hid_t type, hsize_t start, hsize_t count, void *buf)
{
    hid_t file = H5Dget_space(dset), mem = H5Screate_simple(1, &count, NULL);
    md_status st = MD_OK;
    if (H5Sselect_hyperslab(file, H5S_SELECT_SET, &start, NULL, &count, NULL) < 0 ||
        H5Dread(dset, type, mem, file, H5P_DEFAULT, buf) < 0)
        st = md_h5_fail(MD_ERR_IO, dset, "cannot read a data set");
    md_h5_release(mem);
    md_h5_release(file);
    return st;
}
