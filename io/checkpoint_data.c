/* checkpoint_data: item bytes between memory and file, by plain pwrite and pread at the offsets
 * HDF5 gave. One pass over memory does everything while a block is in the cache: is it finite, what
 * is its hash, write it. */
#include "io/checkpoint_parts.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "mpi/agree.h"

#define WRITE_BYTES (8 * MD_CKPT_BLOCK) /* of one pwrite: half the time of 1 MiB on ext4 */

/* Bytes [lo, hi) of an array, at `data` in memory; `done` bytes of the block lie in front of hi. */
typedef struct piece {
    int64_t lo, hi, done;
    const char *data;
} piece;

md_state_item md_state_item_make(const char *name, const md_tensor *t)
{
    md_state_item item = {.name = name, .dtype = (md_dtype)t->dtype, .rank = t->rank};
    item.data = t->data;
    for (int d = 0; d < t->rank; d++)
        item.global[d] = item.count[d] = t->dim[d];
    return item;
}

/* First of an array's rows that starts at byte `at` or behind. */
static int64_t row_at(int64_t at, int64_t row, int64_t rows)
{
    return MD_MIN((MD_MAX(at, 0) + row - 1) / row, rows);
}

void md_state_items_share(md_state_item *item, int items, int part, int parts)
{
    int64_t total = 0, base = 0;
    for (int i = 0; i < items; i++)
        total += md_ckpt_item_bytes(&item[i]);
    int64_t begin = total * part / parts, end = total * (part + 1) / parts;
    for (int i = 0; i < items; i++) {
        int64_t bytes = md_ckpt_item_bytes(&item[i]), rows = item[i].global[0];
        int64_t row = bytes / MD_MAX(rows, 1);
        if (row == 0)
            continue;
        int64_t lo = row_at(begin - base, row, rows), hi = row_at(end - base, row, rows);
        item[i].start[0] = lo;
        item[i].count[0] = hi - lo;
        item[i].data = (char *)item[i].data + lo * row;
        base += bytes;
    }
}

int64_t md_ckpt_item_bytes(const md_state_item *item)
{
    int64_t bytes = (int64_t)md_dtype_bytes(item->dtype);
    for (int d = 0; d < item->rank; d++)
        bytes *= item->global[d];
    return bytes;
}

int64_t md_ckpt_blocks(int64_t bytes)
{
    return (bytes + MD_CKPT_BLOCK - 1) / MD_CKPT_BLOCK;
}

uint64_t md_ckpt_hash(const uint64_t *block, int64_t blocks)
{
    return XXH3_64bits(block, (size_t)blocks * sizeof *block);
}

/* Dimensions behind the last cut one are whole: their elements and the cut dimension's make one
 * run. */
static int cut_dimension(const md_state_item *item)
{
    int d = item->rank - 1;
    while (d > 0 && item->count[d] == item->global[d])
        d--;
    return d;
}

md_ckpt_runs md_ckpt_runs_of(const md_state_item *item)
{
    md_ckpt_runs r = {0, 0};
    if (item->count[0] == 0)
        return r;
    int cut = cut_dimension(item);
    r = (md_ckpt_runs){1, (int64_t)md_dtype_bytes(item->dtype)};
    for (int d = 0; d < item->rank; d++)
        *(d < cut ? &r.count : &r.bytes) *= item->count[d];
    return r;
}

int64_t md_ckpt_run_offset(const md_state_item *item, int64_t run)
{
    int64_t at = 0, stride = 1;
    int cut = cut_dimension(item);
    for (int d = item->rank - 1; d >= 0; d--) {
        int64_t index = item->start[d];
        if (d < cut) {
            index += run % item->count[d];
            run /= item->count[d];
        }
        at += index * stride;
        stride *= item->global[d];
    }
    return at * (int64_t)md_dtype_bytes(item->dtype);
}

/* Steps to the block's next bytes that neither end a run nor cross a multiple of `unit`; a piece
 * starts as zeros. False behind the last one. */
static bool piece_next(const md_state_item *item, int64_t unit, piece *p)
{
    md_ckpt_runs runs = md_ckpt_runs_of(item);
    if (p->done == runs.count * runs.bytes)
        return false;
    int64_t within = p->done % runs.bytes;
    p->data = (const char *)item->data + p->done;
    p->lo = md_ckpt_run_offset(item, p->done / runs.bytes) + within;
    p->hi = MD_MIN(p->lo + runs.bytes - within, (p->lo / unit + 1) * unit);
    p->done += p->hi - p->lo;
    return true;
}

void md_ckpt_owned(const md_state_item *item, int64_t *owned)
{
    for (piece p = {0}; piece_next(item, MD_CKPT_BLOCK, &p);)
        owned[p.lo / MD_CKPT_BLOCK] += p.hi - p.lo;
}

md_status md_ckpt_fd(const char *path, bool write, int *fd)
{
    *fd = open(path, (write ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (*fd < 0)
        MD_FAIL(errno == ENOENT ? MD_ERR_NOINPUT : MD_ERR_IO, "%s: cannot open: %s", path,
                strerror(errno));
    return MD_OK;
}

md_status md_ckpt_pread(int fd, const char *path, void *buf, int64_t bytes, int64_t at)
{
    for (int64_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (char *)buf + done, (size_t)(bytes - done), at + done);
        if (n == 0)
            MD_FAIL(MD_ERR_DATA, "%s: the file ends at byte %lld", path, (long long)(at + done));
        if (n < 0 && errno != EINTR)
            MD_FAIL(MD_ERR_IO, "%s: cannot read: %s", path, strerror(errno));
        done += MD_MAX(n, 0);
    }
    return MD_OK;
}

md_status md_ckpt_pwrite(int fd, const char *path, const void *buf, int64_t bytes, int64_t at)
{
    for (int64_t done = 0; done < bytes;) {
        ssize_t n = pwrite(fd, (const char *)buf + done, (size_t)(bytes - done), at + done);
        if (n < 0 && errno != EINTR)
            MD_FAIL(MD_ERR_IO, "%s: cannot write: %s", path, strerror(errno));
        done += MD_MAX(n, 0);
    }
    return MD_OK;
}

md_status md_ckpt_sync(int fd, const char *path)
{
    if (fsync(fd) != 0)
        MD_FAIL(MD_ERR_IO, "%s: cannot sync: %s", path, strerror(errno));
    return MD_OK;
}

/* A value is not finite when all its exponent bits are set. The loops have no exit, so that they
 * vectorise. */
static bool all_finite(const void *data, int64_t bytes, md_dtype dtype)
{
    uint64_t bad = 0;
    if (dtype == MD_F32) {
        const uint32_t *x = data;
        for (int64_t i = 0; i < bytes / 4; i++)
            bad |= (x[i] & 0x7f800000u) == 0x7f800000u;
    } else if (dtype == MD_F64) {
        const uint64_t *x = data;
        for (int64_t i = 0; i < bytes / 8; i++)
            bad |= (x[i] & 0x7ff0000000000000u) == 0x7ff0000000000000u;
    }
    return !bad;
}

/* Bytes [lo, hi) of entry e's array, which lie at `data`: each block's values are checked and, when
 * the block is all there, hashed; then all is written at once. */
static md_status write_piece(int fd, const char *path, const md_state_entry *e, const piece *p,
                             uint64_t *memory)
{
    for (int64_t lo = p->lo; lo < p->hi;) {
        int64_t hi = MD_MIN(p->hi, (lo / MD_CKPT_BLOCK + 1) * MD_CKPT_BLOCK);
        const char *data = p->data + (lo - p->lo);
        if (!all_finite(data, hi - lo, (md_dtype)e->dtype))
            MD_FAIL(MD_ERR_NUMERICS, "%s: %s has a value that is not finite", path, e->name);
        if (lo % MD_CKPT_BLOCK == 0 && (hi - lo == MD_CKPT_BLOCK || hi == e->bytes))
            memory[lo / MD_CKPT_BLOCK] = XXH3_64bits(data, (size_t)(hi - lo));
        lo = hi;
    }
    return md_ckpt_pwrite(fd, path, p->data, p->hi - p->lo, e->offset + p->lo);
}

static md_status write_item(int fd, const char *path, const md_state_entry *e,
                            const md_state_item *item, uint64_t *memory)
{
    for (piece p = {0}; piece_next(item, WRITE_BYTES, &p);)
        MD_TRY(write_piece(fd, path, e, &p, memory));
    return MD_OK;
}

/* Damages the middle one of this rank's bytes in the file, as a bad disk would. */
static md_status flip_byte(int fd, const char *path, const md_state_entry *e,
                           const md_state_item *item)
{
    md_ckpt_runs runs = md_ckpt_runs_of(item);
    piece p = {.done = runs.count * runs.bytes / 2};
    if (!piece_next(item, 1, &p))
        return MD_OK;
    char flipped = (char)~*p.data;
    return md_ckpt_pwrite(fd, path, &flipped, 1, e->offset + p.lo);
}

md_status md_ckpt_write_blocks(int fd, const md_checkpoint_args *args, const md_checkpoint *ck,
                               uint64_t *memory)
{
    for (int i = 0; i < args->items; i++) {
        MD_TRY(write_item(fd, ck->path, &ck->entry[i], &args->item[i], memory));
        if (md_fault("ckpt.flip"))
            MD_TRY(flip_byte(fd, ck->path, &ck->entry[i], &args->item[i]));
        memory += md_ckpt_blocks(ck->entry[i].bytes);
    }
    if (md_fault("ckpt.write"))
        MD_FAIL(MD_ERR_IO, "%s: cannot write: %s", ck->path, strerror(ENOSPC));
    return MD_OK;
}

static md_status compare_item(int fd, const char *path, const md_state_entry *e,
                              const md_state_item *item, char *buf)
{
    for (piece p = {0}; piece_next(item, MD_CKPT_BLOCK, &p);) {
        MD_TRY(md_ckpt_pread(fd, path, buf, p.hi - p.lo, e->offset + p.lo));
        if (memcmp(buf, p.data, (size_t)(p.hi - p.lo)) != 0)
            MD_FAIL(MD_ERR_IO, "%s: block %lld of %s is not what was written", path,
                    (long long)(p.lo / MD_CKPT_BLOCK), e->name);
    }
    return MD_OK;
}

md_status md_ckpt_compare(int fd, const md_checkpoint_args *args, const md_checkpoint *ck)
{
    char *buf;
    MD_NEW(buf, MD_CKPT_BLOCK, "checkpoint buffer");
    md_status st = MD_OK;
    for (int i = 0; i < args->items && st == MD_OK; i++)
        st = compare_item(fd, ck->path, &ck->entry[i], &args->item[i], buf);
    md_free(buf);
    return st;
}

/* Hashes the file's blocks [first, last) of those that have no hash yet. */
static md_status hash_blocks(const md_checkpoint *ck, int fd, int64_t first, int64_t last,
                             uint64_t *hash)
{
    char *buf;
    MD_NEW(buf, MD_CKPT_BLOCK, "checkpoint buffer");
    md_status st = MD_OK;
    int64_t unknown = 0, rank = md_comm_rank(ck->comm);
    for (int i = 0; i < ck->entries && st == MD_OK; i++) {
        const md_state_entry *e = &ck->entry[i];
        for (int64_t at = 0; at < e->bytes && st == MD_OK; at += MD_CKPT_BLOCK, hash++) {
            if (*hash) {
                *hash = rank == 0 ? *hash : 0; /* all ranks know it, the sum needs it once */
                continue;
            }
            if (unknown++ < first || unknown > last)
                continue;
            int64_t n = MD_MIN(MD_CKPT_BLOCK, e->bytes - at);
            st = md_ckpt_pread(fd, ck->path, buf, n, e->offset + at);
            *hash = XXH3_64bits(buf, (size_t)n);
        }
    }
    md_free(buf);
    return st;
}

md_status md_ckpt_hash_file(const md_checkpoint *ck, int fd, uint64_t *hash)
{
    int64_t blocks = 0, unknown = 0, rank = md_comm_rank(ck->comm), size = md_comm_size(ck->comm);
    for (int i = 0; i < ck->entries; i++)
        blocks += md_ckpt_blocks(ck->entry[i].bytes);
    for (int64_t b = 0; b < blocks; b++)
        unknown += hash[b] == 0;
    int64_t first = unknown * rank / size, last = unknown * (rank + 1) / size;
    MD_TRY(md_agree(ck->comm, hash_blocks(ck, fd, first, last, hash)));
    md_comm_allreduce(ck->comm, hash, blocks, MD_I64, MD_SUM);
    return MD_OK;
}
