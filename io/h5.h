/* h5: what every user of HDF5 in this program shares: how files are opened and created, what a data
 * set of ours may look like, and how a failure becomes one sentence.
 *
 * Rules kept here: earliest file format (a flushed file survives its writer), contiguous data sets
 * with early allocation that are never filled and start on 1 MiB borders, no time stamps (the same
 * content gives the same bytes), no filters, no variable-length, external or virtual storage, hard
 * links only. Reads open without file locks. HDF5 is called by the main thread only. Identifiers
 * are plain hid_t; closing a file closes everything that was opened in it, so an error path needs
 * one md_h5_close. Names may be paths ("train/data"); they are relative to the given location. */
#ifndef MD_H5_H
#define MD_H5_H

#include <hdf5.h>

#include "mpi/comm.h"

/* A wildcard for md_h5_dset_open's extents. */
#define MD_H5_ANY      ((hsize_t)-1)
#define MD_H5_MAX_RANK 4

/* "HDF5 1.10.8": the version loaded, and the one compiled with when it is another. Local. */
const char *md_h5_library(void);

/* The border on which data sets of 64 KiB and more start, and bytes left to the caller in front of
 * HDF5's (its user block): 0 or a power of two from 512 that is a multiple of the border. */
typedef struct md_h5_layout {
    hsize_t alignment, user_block;
} md_h5_layout;
/* Creates a file, truncating an older one; layout == NULL: 1 MiB borders, no user block. Local: one
 * rank lays a file out, others write bytes at md_h5_offset. MD_ERR_CREATE. A write that fails is
 * not seen before md_h5_close. */
md_status md_h5_create(const char *path, const md_h5_layout *layout, hid_t *file);
/* Opens for reading. c == NULL: Local, no MPI needed. Else Collective(c), by MPI-IO when the group
 * has more than one rank; all ranks get the same status. MD_ERR_NOINPUT (missing, not permitted),
 * MD_ERR_DATA (not HDF5, truncated), MD_ERR_IO. */
md_status md_h5_open(const char *path, md_comm *c, hid_t *file);
/* Flushes, closes and sets *file to -1; negative is fine. MD_ERR_IO when not all of a created file
 * could be written (disk full). Collective as the opening was, but not agreed. */
md_status md_h5_close(hid_t *file);
/* Drops one group, data set or type identifier; negative is fine. Local. */
void md_h5_release(hid_t id);

/* Fails with st and "FILE: <sentence> (HDF5: <its innermost reason>)". Local; loc may be a file or
 * an object in it. */
md_status md_h5_fail(md_status st, hid_t loc, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* True when loc holds name through hard links only. Local reads; Collective on an MPI-IO file. */
bool md_h5_exists(hid_t loc, const char *name);
md_status md_h5_group_create(hid_t loc, const char *name, hid_t *out);
md_status md_h5_group_open(hid_t loc, const char *name, hid_t *out);

/* Creates a contiguous data set of the file type `type` (H5T_STD_U8LE, ...) and allocates its
 * space; out may be NULL. Collective on an MPI-IO file. MD_ERR_IO. */
md_status md_h5_dset_create(hid_t loc, const char *name, hid_t type, int rank, const hsize_t *dim,
                            hid_t *out);
/* Opens a data set that must have exactly this type, rank and extents (MD_H5_ANY accepts any; the
 * extent found is stored back) and a plain contiguous layout, else MD_ERR_DATA saying what differs.
 */
md_status md_h5_dset_open(hid_t loc, const char *name, hid_t type, int rank, hsize_t *dim,
                          hid_t *out);
/* Byte offset of a data set's first element in the file; 0 for a data set without elements. Local.
 */
md_status md_h5_offset(hid_t dset, int64_t *offset);

/* All of a data set to or from dense memory of type `type` (H5T_NATIVE_FLOAT, ...). MD_ERR_IO. */
md_status md_h5_write_all(hid_t dset, hid_t type, const void *buf);
md_status md_h5_read_all(hid_t dset, hid_t type, void *buf);
/* count elements from start on of a data set with one dimension. MD_ERR_IO. */
md_status md_h5_read_range(hid_t dset, hid_t type, hsize_t start, hsize_t count, void *buf);

/* Scalar attributes of a file, group or data set: fixed-length strings (below 64 KiB, a limit of
 * the file format), signed 64-bit integers, doubles. Writing replaces nothing: a second write of a
 * name fails. Reading accepts any stored integer or float width; a missing one or one of another
 * kind is MD_ERR_DATA. Collective on an MPI-IO file. */
md_status md_h5_attr_write_str(hid_t loc, const char *name, const char *value);
md_status md_h5_attr_write_i64(hid_t loc, const char *name, int64_t value);
md_status md_h5_attr_write_f64(hid_t loc, const char *name, double value);
md_status md_h5_attr_read_str(hid_t loc, const char *name, char *buf, size_t cap);
md_status md_h5_attr_read_i64(hid_t loc, const char *name, int64_t *value);
md_status md_h5_attr_read_f64(hid_t loc, const char *name, double *value);

/* n strings as a data set of fixed-length strings, each field ended by at least one NUL. Reading
 * gives a block of n fields of *width bytes that the caller frees with md_free; another number of
 * strings, or a field without NUL, is MD_ERR_DATA. */
md_status md_h5_strings_write(hid_t loc, const char *name, int64_t n, const char *const *strings);
md_status md_h5_strings_read(hid_t loc, const char *name, int64_t n, char **out, size_t *width);

/* The names in a group as "a, b, c" into buf, cut to cap. */
void md_h5_list(hid_t loc, char *buf, size_t cap);

#endif
