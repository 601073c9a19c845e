/* h5_driver: see h5_driver.h. Plain pread and pwrite on one descriptor, addresses are file offsets.
 * The callbacks are those of H5FD_class_t; structure after the library's own H5FDsec2.c. */
#include "io/h5_driver.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/base.h"

#define MAX_ADDRESS ((haddr_t)INT64_MAX)

typedef struct driver_file {
    H5FD_t head; /* HDF5's part comes first */
    int fd, error;
    haddr_t eoa, eof; /* end of what HDF5 has allocated; of what the file holds */
    dev_t device;
    ino_t inode;
} driver_file;

static int last_error;

static H5FD_t *driver_open(const char *name, unsigned flags, hid_t fapl, haddr_t max)
{
    int how = (flags & H5F_ACC_RDWR ? O_RDWR : O_RDONLY) | (flags & H5F_ACC_CREAT ? O_CREAT : 0) |
              (flags & H5F_ACC_TRUNC ? O_TRUNC : 0) | (flags & H5F_ACC_EXCL ? O_EXCL : 0);
    struct stat s;
    (void)fapl;
    (void)max;
    driver_file *f = md_alloc(sizeof *f, "h5");
    if (!f)
        return NULL;
    f->fd = open(name, how | O_CLOEXEC, 0666);
    if (f->fd < 0 || fstat(f->fd, &s) != 0) {
        if (f->fd >= 0)
            close(f->fd);
        md_free(f);
        return NULL;
    }
    f->eof = (haddr_t)s.st_size;
    f->device = s.st_dev;
    f->inode = s.st_ino;
    return &f->head;
}

static herr_t driver_close(H5FD_t *file)
{
    driver_file *f = (driver_file *)file;
    last_error = f->error;
    if (close(f->fd) != 0 && last_error == 0)
        last_error = errno;
    md_free(f);
    return 0;
}

/* HDF5 asks whether two open files are one. */
static int driver_cmp(const H5FD_t *a, const H5FD_t *b)
{
    const driver_file *x = (const driver_file *)a, *y = (const driver_file *)b;
    if (x->device != y->device)
        return x->device < y->device ? -1 : 1;
    return (x->inode > y->inode) - (x->inode < y->inode);
}

static herr_t driver_query(const H5FD_t *file, unsigned long *flags)
{
    (void)file;
    *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE |
             H5FD_FEAT_AGGREGATE_SMALLDATA | H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
    return 0;
}

static haddr_t driver_get_eoa(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return ((const driver_file *)file)->eoa;
}

static herr_t driver_set_eoa(H5FD_t *file, H5FD_mem_t type, haddr_t address)
{
    (void)type;
    ((driver_file *)file)->eoa = address;
    return 0;
}

static haddr_t driver_get_eof(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return ((const driver_file *)file)->eof;
}

/* Bytes behind the end read as zeros, as HDF5 expects. */
static herr_t driver_read(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t address, size_t size,
                          void *buf)
{
    driver_file *f = (driver_file *)file;
    (void)type;
    (void)dxpl;
    memset(buf, 0, size);
    for (size_t done = 0; done < size;) {
        ssize_t n = pread(f->fd, (char *)buf + done, size - done, (off_t)(address + done));
        if (n < 0 && errno != EINTR)
            return -1;
        if (n == 0)
            break;
        if (n > 0)
            done += (size_t)n;
    }
    return 0;
}

static void keep_error(driver_file *f, int error)
{
    if (f->error == 0)
        f->error = error ? error : EIO;
}

static herr_t driver_write(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t address, size_t size,
                           const void *buf)
{
    driver_file *f = (driver_file *)file;
    (void)type;
    (void)dxpl;
    for (size_t done = 0; done < size && f->error == 0;) {
        ssize_t n = pwrite(f->fd, (const char *)buf + done, size - done, (off_t)(address + done));
        if (n > 0)
            done += (size_t)n;
        else if (n == 0 || errno != EINTR)
            keep_error(f, n < 0 ? errno : ENOSPC);
    }
    f->eof = MD_MAX(f->eof, address + size);
    return 0;
}

/* Makes the file as long as what is allocated: space of early-allocated data sets. */
static herr_t driver_truncate(H5FD_t *file, hid_t dxpl, hbool_t closing)
{
    driver_file *f = (driver_file *)file;
    (void)dxpl;
    (void)closing;
    if (f->eoa != f->eof && f->error == 0 && ftruncate(f->fd, (off_t)f->eoa) != 0)
        keep_error(f, errno);
    f->eof = f->eoa;
    return 0;
}

static const H5FD_class_t driver_class = {
#if H5_VERSION_GE(1, 13, 2)
    .version = H5FD_CLASS_VERSION,
    .value = (H5FD_class_value_t)510, /* of the range for private use */
#endif
    .name = "md_hpc",
    .maxaddr = MAX_ADDRESS,
    .fc_degree = H5F_CLOSE_STRONG,
    .open = driver_open,
    .close = driver_close,
    .cmp = driver_cmp,
    .query = driver_query,
    .get_eoa = driver_get_eoa,
    .set_eoa = driver_set_eoa,
    .get_eof = driver_get_eof,
    .read = driver_read,
    .write = driver_write,
    .truncate = driver_truncate,
    .fl_map = H5FD_FLMAP_DICHOTOMY,
};

herr_t md_h5_driver_use(hid_t fapl)
{
    static hid_t driver = -1;
    if (driver < 0)
        driver = H5FDregister(&driver_class);
    return H5Pset_driver(fapl, driver, NULL);
}

int md_h5_driver_error(void)
{
    return last_error;
}
