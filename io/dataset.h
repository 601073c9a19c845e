/* dataset: one split of an image store (format "md_hpc.images", version 1) and the order in which
 * its images are visited.
 *
 * The store is an HDF5 file of plain contiguous data sets (any h5py reads it): root attributes
 * format, version, num_classes, source, order; /classes/name, fixed-length strings [K]; and per
 * split
 *
 *   data u8 [bytes]      the encoded images back to back
 *   offset u64 [N + 1]   image i is data[offset[i] .. offset[i + 1])
 *   label i32 [N]        class, -1 = none
 *   xxh3 u64 [N]         XXH3-64 of the image's bytes
 *   wh u16 [N, 2]        width and height in pixels
 *   kind u8 [N]          md_image_kind
 *   name u8 [bytes], name_offset u64 [N + 1]   where image i came from, UTF-8
 *
 * The index (all but names) is read once per node into shared memory; image bytes come by pread at
 * the file offset of `data`, so worker threads read without HDF5. Every read is hashed. */
#ifndef MD_DATASET_H
#define MD_DATASET_H

#include "io/decode.h"
#include "mpi/comm.h"

#define MD_DATASET_FORMAT  "md_hpc.images"
#define MD_DATASET_VERSION 1

typedef struct md_dataset md_dataset;

/* Opens split `split` of the store and checks its whole index. Collective(c); c == NULL: Local. All
 * ranks get the same status: MD_ERR_NOINPUT (no such file), MD_ERR_DATA (another format or version,
 * damaged, no such split, index inconsistent), each naming the file and what is wrong. The caller
 * frees with md_dataset_close (Collective(c), NULL is fine), before c. */
md_status md_dataset_open(const char *path, const char *split, md_comm *c, md_dataset **out);
void md_dataset_close(md_dataset *d);

/* The names of a store's splits as "test, train" into buf; fails as md_dataset_open does.
 * Collective(c); c == NULL: Local. */
md_status md_dataset_splits(const char *path, md_comm *c, char *buf, size_t cap);

/* Local and thread-safe, as all that follow unless they say otherwise; i is 0 .. count - 1. */
int64_t md_dataset_count(const md_dataset *d);
int md_dataset_classes(const md_dataset *d);
const char *md_dataset_class_name(const md_dataset *d, int k);
int32_t md_dataset_label(const md_dataset *d, int64_t i);
md_image_kind md_dataset_kind(const md_dataset *d, int64_t i);
void md_dataset_size(const md_dataset *d, int64_t i, int *w, int *h);
size_t md_dataset_bytes(const md_dataset *d, int64_t i);
/* Largest md_dataset_bytes, and largest w * h, of all images. */
size_t md_dataset_max_bytes(const md_dataset *d);
int64_t md_dataset_max_pixels(const md_dataset *d);
/* Bytes of the index of n images, held once per node. */
size_t md_dataset_index_bytes(int64_t n);
/* Identity of the split: XXH3-64 over every image's hash, label, kind and size, in stored order. */
uint64_t md_dataset_hash(const md_dataset *d);
/* The name of image i into buf (cut to cap), read from the file; "?" when that fails. */
const char *md_dataset_name(const md_dataset *d, int64_t i, char *buf, size_t cap);

/* Reads image i's encoded bytes into buf[cap] and checks their hash; *len = their number. Transient
 * errors (EIO, ESTALE) are retried five times over a third of a second. MD_ERR_IO: could not read;
 * MD_ERR_DATA: the bytes are not those that were stored. cap below md_dataset_bytes is a bug. */
md_status md_dataset_read(const md_dataset *d, int64_t i, void *buf, size_t cap, size_t *len);
/* The same through H5Dread: the reference. md_dataset_use_hdf5 opens the file for it, by MPI-IO on
 * several ranks; Collective(c), c as in md_dataset_open. Main thread only. */
md_status md_dataset_use_hdf5(md_dataset *d, md_comm *c);
md_status md_dataset_read_hdf5(const md_dataset *d, int64_t i, void *buf, size_t cap, size_t *len);

/* Element p of permutation number `epoch` of 0 .. n - 1 under `seed`; 1 <= n <= 2^47, 0 <= p < n. A
 * Feistel network over Philox on the smallest power of two >= n, walked until it falls inside
 * (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): a bijection in O(1)
 * memory, the same on every rank and after every restart. */
int64_t md_permute(uint64_t seed, uint32_t epoch, int64_t n, int64_t p);

/* Which image in source order is stored at place p of n: the same construction on another stream.
 */
int64_t md_store_order(uint64_t seed, int64_t n, int64_t p);

/* Whole batches in an epoch of n images: the n % batch images left over differ from epoch to epoch.
 */
int64_t md_epoch_steps(int64_t n, int64_t batch);

/* Where image b (0 .. batch - 1) of global step `step` is: positions of a step are consecutive in
 * its epoch's permutation, so a step holds the same images however they are spread over ranks. */
typedef struct md_position {
    uint32_t epoch;
    int64_t place;  /* in the epoch's order */
    int64_t sample; /* index of the image in the store */
} md_position;
typedef struct md_order {
    uint64_t seed;
    int64_t n, batch; /* n >= batch >= 1 */
} md_order;
md_position md_position_at(const md_order *o, int64_t step, int64_t b);

#endif
