/* checkpoint_mixed: blocks made of short pieces. A matrix that is cut by columns leaves each rank
 * with runs of a few KiB, and a file system takes a file's writes one at a time: written run by run
 * 1 GiB takes three times as long. Such blocks are put together in memory first, a chunk on each
 * rank, which writes it and has its hash. */
#include "io/checkpoint_parts.h"

#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "mpi/agree.h"

#define SHORT ((int64_t)64 << 10) /* bytes; gathering costs as much as a write of about 10 KiB */

/* Bytes [lo, hi) of item i, all of mixed blocks; `block` numbers the first one. */
typedef struct chunk {
    int i;
    int64_t lo, hi, block;
} chunk;

void md_ckpt_mark_mixed(const md_state_item *item, uint8_t *mixed)
{
    int64_t bytes = md_ckpt_item_bytes(item);
    for (md_ckpt_piece p = {0}; md_ckpt_piece_next(item, MD_CKPT_BLOCK, &p);) {
        int64_t b = p.lo / MD_CKPT_BLOCK, all = MD_MIN(MD_CKPT_BLOCK, bytes - b * MD_CKPT_BLOCK);
        if (p.hi - p.lo < MD_MIN(SHORT, all))
            mixed[b] = 1;
    }
}

/* Steps to the next chunk; starts as zeros. The same on all ranks. False behind the last one. */
static bool chunk_next(const md_ckpt_writer *w, chunk *c)
{
    int64_t lo = c->hi, block = c->block + md_ckpt_blocks(c->hi - c->lo);
    for (int i = c->i; i < w->ck->entries; i++, lo = 0) {
        int64_t bytes = md_ckpt_item_bytes(&w->args->item[i]);
        for (; lo < bytes && !w->mixed[block]; block++)
            lo += MD_CKPT_BLOCK;
        if (lo >= bytes)
            continue;
        *c = (chunk){i, lo, lo, block};
        for (; c->hi < bytes && c->hi - lo < MD_CKPT_CHUNK && w->mixed[block]; block++)
            c->hi = MD_MIN(c->hi + MD_CKPT_BLOCK, bytes);
        return true;
    }
    return false;
}

/* Number of the first file block of the chunk's item. */
static int64_t item_block(const chunk *c)
{
    return c->block - c->lo / MD_CKPT_BLOCK;
}

/* All ranks' pieces of a chunk, by a sum in which each byte is zero but on one rank. */
static void gather(const md_ckpt_writer *w, const chunk *c, char *buf)
{
    int64_t words = (c->hi - c->lo + 7) / 8;
    memset(buf, 0, (size_t)words * 8);
    md_ckpt_gather(&w->args->item[c->i], c->lo, c->hi, buf);
    md_comm_allreduce(w->args->comm, buf, words, MD_I64, MD_SUM);
}

static md_status write_chunk(const md_ckpt_writer *w, const chunk *c, const char *data)
{
    md_ckpt_piece p = {c->lo, c->hi, 0, data};
    if (md_fault("ckpt.gather"))
        MD_FAIL(MD_ERR_IO, "%s: cannot write: injected fault", w->part);
    return md_ckpt_write_piece(w, &w->ck->entry[c->i], &p, w->hash + item_block(c));
}

/* One round after the other: a chunk is gathered for each rank, then all write theirs. */
static md_status write_rounds(const md_ckpt_writer *w, char *mine, char *other)
{
    md_comm *comm = w->args->comm;
    int size = md_comm_size(comm), rank = md_comm_rank(comm);
    chunk all = {0}, my = {0};
    for (bool more = chunk_next(w, &all); more;) {
        bool have = false;
        for (int s = 0; s < size && more; s++) {
            gather(w, &all, s == rank ? mine : other);
            if (s == rank) {
                my = all;
                have = true;
            }
            more = chunk_next(w, &all);
        }
        MD_TRY(md_agree(comm, have ? write_chunk(w, &my, mine) : MD_OK));
    }
    return MD_OK;
}

md_status md_ckpt_write_mixed(const md_ckpt_writer *w)
{
    chunk first = {0};
    if (!chunk_next(w, &first))
        return MD_OK;
    char *mine = md_alloc((size_t)MD_CKPT_CHUNK, "checkpoint buffer");
    char *other = md_alloc((size_t)MD_CKPT_CHUNK, "checkpoint buffer");
    md_status st = md_agree(w->args->comm, mine && other ? MD_OK : MD_ERR_MEMORY);
    if (st == MD_OK)
        st = write_rounds(w, mine, other);
    md_free(mine);
    md_free(other);
    return st;
}

static md_status compare_chunk(const md_ckpt_writer *w, const chunk *c, char *buf)
{
    const md_state_entry *e = &w->ck->entry[c->i];
    MD_TRY(md_ckpt_pread(w->fd, w->part, buf, c->hi - c->lo, e->offset + c->lo));
    for (int64_t at = c->lo; at < c->hi; at += MD_CKPT_BLOCK) {
        int64_t b = at / MD_CKPT_BLOCK, n = MD_MIN(MD_CKPT_BLOCK, c->hi - at);
        if (XXH3_64bits(buf + (at - c->lo), (size_t)n) != w->hash[item_block(c) + b])
            MD_FAIL(MD_ERR_IO, "%s: block %lld of %s is not what was written", w->part,
                    (long long)b, e->name);
    }
    return MD_OK;
}

md_status md_ckpt_compare_mixed(const md_ckpt_writer *w)
{
    int size = md_comm_size(w->args->comm), rank = md_comm_rank(w->args->comm);
    char *buf = NULL;
    chunk c = {0};
    md_status st = MD_OK;
    for (int64_t n = 0; st == MD_OK && chunk_next(w, &c); n++) {
        if (n % size != rank)
            continue;
        if (!buf)
            buf = md_alloc((size_t)MD_CKPT_CHUNK, "checkpoint buffer");
        st = buf ? compare_chunk(w, &c, buf) : MD_ERR_MEMORY;
    }
    md_free(buf);
    return st;
}
