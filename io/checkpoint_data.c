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
#include "src/watchdog.h"

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
    md_phase("ckpt.read");
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
    md_phase("ckpt.write");
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
    md_phase("ckpt.sync");
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

md_status md_ckpt_write_piece(const md_ckpt_writer *w, const md_state_entry *e,
                              const md_ckpt_piece *p, uint64_t *hash)
{
    for (int64_t lo = p->lo; lo < p->hi;) {
        int64_t hi = MD_MIN(p->hi, (lo / MD_CKPT_BLOCK + 1) * MD_CKPT_BLOCK);
        const char *data = p->data + (lo - p->lo);
        if (!all_finite(data, hi - lo, (md_dtype)e->dtype))
            MD_FAIL(MD_ERR_NUMERICS, "%s: %s has a value that is not finite", w->part, e->name);
        if (lo % MD_CKPT_BLOCK == 0 && (hi - lo == MD_CKPT_BLOCK || hi == e->bytes))
            hash[lo / MD_CKPT_BLOCK] = XXH3_64bits(data, (size_t)(hi - lo));
        lo = hi;
    }
    return md_ckpt_pwrite(w->fd, w->part, p->data, p->hi - p->lo, e->offset + p->lo);
}

/* md_ckpt_piece_next without what lies in mixed blocks: only a run's first and last block can be
 * such, the others are all its own. A piece may be left empty. */
static bool own_next(const md_state_item *item, const uint8_t *mixed, int64_t unit,
                     md_ckpt_piece *own, md_ckpt_piece *p)
{
    if (!md_ckpt_piece_next(item, unit, p))
        return false;
    *own = *p;
    if (mixed[own->lo / MD_CKPT_BLOCK])
        own->lo = MD_MIN(own->hi, (own->lo / MD_CKPT_BLOCK + 1) * MD_CKPT_BLOCK);
    if (own->lo < own->hi && mixed[(own->hi - 1) / MD_CKPT_BLOCK])
        own->hi = (own->hi - 1) / MD_CKPT_BLOCK * MD_CKPT_BLOCK;
    own->data += own->lo - p->lo;
    return true;
}

md_status md_ckpt_write_blocks(const md_ckpt_writer *w)
{
    int64_t block = 0;
    for (int i = 0; i < w->args->items; i++) {
        const md_state_entry *e = &w->ck->entry[i];
        md_ckpt_piece own, p = {0};
        while (own_next(&w->args->item[i], w->mixed + block, MD_CKPT_CHUNK, &own, &p))
            if (own.lo < own.hi)
                MD_TRY(md_ckpt_write_piece(w, e, &own, w->hash + block));
        block += md_ckpt_blocks(e->bytes);
    }
    if (md_fault("ckpt.write"))
        MD_FAIL(MD_ERR_IO, "%s: cannot write: %s", w->part, strerror(ENOSPC));
    return MD_OK;
}

/* The middle one of this rank's bytes, as a bad disk would. */
static md_status flip_byte(const md_ckpt_writer *w, const md_state_entry *e,
                           const md_state_item *item)
{
    int64_t bytes = item->count * (int64_t)md_dtype_bytes(item->dtype);
    md_ckpt_piece p = {.done = bytes / 2};
    if (!md_ckpt_piece_next(item, 1, &p))
        return MD_OK;
    char flipped = (char)~*p.data;
    return md_ckpt_pwrite(w->fd, w->part, &flipped, 1, e->offset + p.lo);
}

md_status md_ckpt_flip(const md_ckpt_writer *w)
{
    for (int i = 0; i < w->args->items; i++)
        if (md_fault("ckpt.flip"))
            MD_TRY(flip_byte(w, &w->ck->entry[i], &w->args->item[i]));
    return MD_OK;
}

static md_status compare_piece(const md_ckpt_writer *w, const md_state_entry *e,
                               const md_ckpt_piece *p, char *buf)
{
    MD_TRY(md_ckpt_pread(w->fd, w->part, buf, p->hi - p->lo, e->offset + p->lo));
    if (memcmp(buf, p->data, (size_t)(p->hi - p->lo)) != 0)
        MD_FAIL(MD_ERR_IO, "%s: block %lld of %s is not what was written", w->part,
                (long long)(p->lo / MD_CKPT_BLOCK), e->name);
    return MD_OK;
}

static md_status compare_blocks(const md_ckpt_writer *w, char *buf)
{
    int64_t block = 0;
    for (int i = 0; i < w->args->items; i++) {
        const md_state_entry *e = &w->ck->entry[i];
        md_ckpt_piece own, p = {0};
        while (own_next(&w->args->item[i], w->mixed + block, MD_CKPT_BLOCK, &own, &p))
            if (own.lo < own.hi)
                MD_TRY(compare_piece(w, e, &own, buf));
        block += md_ckpt_blocks(e->bytes);
    }
    return MD_OK;
}

md_status md_ckpt_compare(const md_ckpt_writer *w)
{
    char *buf;
    MD_NEW(buf, MD_CKPT_BLOCK, "checkpoint buffer");
    md_status st = compare_blocks(w, buf);
    md_free(buf);
    return st == MD_OK ? md_ckpt_compare_mixed(w) : st;
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
