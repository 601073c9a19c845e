/* checkpoint_read: verifying a file and filling blocks of any layout from it. Every byte is read
 * once, by one rank, and broadcast: a thousand ranks that all want all parameters do not read the
 * file a thousand times. */
#include "io/checkpoint_parts.h"

#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "mpi/agree.h"

typedef struct reader {
    md_checkpoint *ck;
    int fd;
    const md_state_item *item;
    const md_state_entry **entry; /* [items] of the file */
    int items;
    char *mine, *other; /* [MD_CKPT_CHUNK] */
    uint64_t *hash;     /* [blocks] of the wanted items */
    int64_t chunks, blocks;
} reader;

/* Chunk number c of all items' chunks: bytes [lo, hi) of item i; `block` numbers its first block.
 */
typedef struct chunk {
    int i;
    int64_t lo, hi, block;
} chunk;

static int64_t chunks_of(int64_t bytes)
{
    return (bytes + MD_CKPT_CHUNK - 1) / MD_CKPT_CHUNK;
}

/* Steps to the next chunk; chunks are visited in order. */
static void chunk_next(const reader *r, chunk *c)
{
    int64_t bytes = r->entry[c->i]->bytes;
    c->block += md_ckpt_blocks(c->hi - c->lo);
    c->lo = c->hi;
    if (c->lo == bytes) {
        c->i++;
        c->lo = 0;
    }
    if (c->i < r->items)
        c->hi = MD_MIN(r->entry[c->i]->bytes, c->lo + MD_CKPT_CHUNK);
}

static md_status chunk_read(reader *r, const chunk *c)
{
    const md_state_entry *e = r->entry[c->i];
    if (md_fault("ckpt.read"))
        MD_FAIL(MD_ERR_IO, "%s: cannot read: injected fault", r->ck->path);
    MD_TRY(md_ckpt_pread(r->fd, r->ck->path, r->mine, c->hi - c->lo, e->offset + c->lo));
    for (int64_t at = c->lo; at < c->hi; at += MD_CKPT_BLOCK)
        r->hash[c->block + (at - c->lo) / MD_CKPT_BLOCK] =
            XXH3_64bits(r->mine + (at - c->lo), (size_t)MD_MIN(MD_CKPT_BLOCK, c->hi - at));
    return MD_OK;
}

/* One round: each rank reads its chunk, then each in turn hands it to all. */
static md_status read_round(reader *r, chunk *next)
{
    md_comm *c = r->ck->comm;
    int size = md_comm_size(c), rank = md_comm_rank(c);
    chunk all = *next, my = *next;
    md_status st = MD_OK;
    for (int s = 0; s < rank && my.i < r->items; s++)
        chunk_next(r, &my);
    if (my.i < r->items)
        st = chunk_read(r, &my);
    MD_TRY(md_agree(c, st));
    for (int s = 0; s < size && all.i < r->items; s++) {
        char *buf = s == rank ? r->mine : r->other;
        md_comm_bcast(c, buf, all.hi - all.lo, s);
        md_ckpt_scatter(&r->item[all.i], all.lo, all.hi, buf);
        chunk_next(r, &all);
    }
    *next = all;
    return MD_OK;
}

static md_status check_hashes(const reader *r)
{
    const uint64_t *hash = r->hash;
    for (int i = 0; i < r->items; i++) {
        int64_t blocks = md_ckpt_blocks(r->entry[i]->bytes);
        if (md_ckpt_hash(hash, blocks) != r->entry[i]->xxh3)
            MD_FAIL(MD_ERR_DATA, "%s: %s is damaged: its hash differs", r->ck->path,
                    r->entry[i]->name);
        hash += blocks;
    }
    return MD_OK;
}

static md_status match(reader *r)
{
    for (int i = 0; i < r->items; i++) {
        const md_state_item *want = &r->item[i];
        MD_TRY(md_ckpt_item_check(want));
        const md_state_entry *e = md_checkpoint_entry(r->ck, want->name);
        if (!e)
            MD_FAIL(MD_ERR_DATA, "%s: has no %s", r->ck->path, want->name);
        bool same = e->dtype == (int32_t)want->dtype && e->rank == want->rank;
        for (int d = 0; same && d < e->rank; d++)
            same = e->global[d] == want->global[d];
        if (!same) {
            md_tensor have = md_tensor_make(NULL, (md_dtype)e->dtype, e->rank, e->global);
            md_tensor need = md_tensor_make(NULL, want->dtype, want->rank, want->global);
            char a[128], b[128];
            MD_FAIL(MD_ERR_DATA, "%s: %s is %s, expected %s", r->ck->path, want->name,
                    md_tensor_describe(&have, a, sizeof a), md_tensor_describe(&need, b, sizeof b));
        }
        r->entry[i] = e;
        r->blocks += md_ckpt_blocks(e->bytes);
        r->chunks += chunks_of(e->bytes);
    }
    return MD_OK;
}

static md_status reader_open(reader *r)
{
    MD_NEW(r->entry, r->items + 1, "checkpoint buffer");
    MD_TRY(match(r));
    MD_NEW(r->mine, MD_CKPT_CHUNK, "checkpoint buffer");
    MD_NEW(r->other, MD_CKPT_CHUNK, "checkpoint buffer");
    MD_NEW(r->hash, r->blocks + 1, "checkpoint buffer");
    return md_ckpt_fd(r->ck->path, false, &r->fd);
}

static md_status read_items(reader *r)
{
    md_comm *c = r->ck->comm;
    chunk next = {0};
    if (r->items > 0)
        next.hi = MD_MIN(MD_CKPT_CHUNK, r->entry[0]->bytes);
    while (next.i < r->items)
        MD_TRY(read_round(r, &next));
    md_comm_allreduce(c, r->hash, r->blocks, MD_I64, MD_SUM);
    return check_hashes(r);
}

md_status md_checkpoint_read(md_checkpoint *ck, const md_state_item *item, int items)
{
    reader r = {.ck = ck, .fd = -1, .item = item, .items = items};
    md_status st = md_agree(ck->comm, reader_open(&r));
    if (st == MD_OK)
        st = read_items(&r);
    if (r.fd >= 0)
        close(r.fd);
    md_free(r.entry);
    md_free(r.mine);
    md_free(r.other);
    md_free(r.hash);
    return st;
}

static md_status verify_open(const md_checkpoint *ck, int *fd)
{
    MD_TRY(md_ckpt_fd(ck->path, false, fd));
    if (md_fault("ckpt.hash"))
        MD_FAIL(MD_ERR_IO, "%s: cannot be read and hashed: injected fault", ck->path);
    return MD_OK;
}

static md_status verify(md_checkpoint *ck, int fd, uint64_t *hash)
{
    MD_TRY(md_ckpt_hash_file(ck, fd, hash));
    for (int i = 0; i < ck->entries; i++) {
        int64_t blocks = md_ckpt_blocks(ck->entry[i].bytes);
        if (md_ckpt_hash(hash, blocks) != ck->entry[i].xxh3)
            MD_FAIL(MD_ERR_DATA, "%s: %s is damaged: its hash differs", ck->path,
                    ck->entry[i].name);
        hash += blocks;
    }
    return MD_OK;
}

md_status md_checkpoint_verify(md_checkpoint *ck)
{
    int64_t blocks = 1;
    for (int i = 0; i < ck->entries; i++)
        blocks += md_ckpt_blocks(ck->entry[i].bytes);
    uint64_t *hash = md_alloc((size_t)blocks * sizeof *hash, "checkpoint hashes");
    int fd = -1;
    md_status st = hash ? verify_open(ck, &fd) : MD_ERR_MEMORY;
    st = md_agree(ck->comm, st);
    if (st == MD_OK)
        st = verify(ck, fd, hash);
    if (fd >= 0)
        close(fd);
    md_free(hash);
    return st;
}
