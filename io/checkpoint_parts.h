/* checkpoint_parts: what the files of the checkpoint room share. checkpoint.c orders the phases,
 * checkpoint_file.c knows the format, checkpoint_items.c where a rank's blocks lie in their arrays,
 * checkpoint_data.c and checkpoint_mixed.c write their bytes, checkpoint_read.c reads them,
 * checkpoint_dir.c names. */
#ifndef MD_CHECKPOINT_PARTS_H
#define MD_CHECKPOINT_PARTS_H

#include "io/checkpoint.h"

#define MD_CKPT_BLOCK ((int64_t)1 << 20)
#define MD_CKPT_CHUNK (8 * MD_CKPT_BLOCK) /* of one read or write: 1 MiB takes twice the time */
#define MD_CKPT_PATH  4096

struct md_checkpoint {
    md_comm *comm;
    char path[MD_CKPT_PATH];
    int64_t step, file_bytes, table_offset;
    uint64_t state_hash;
    md_state_entry *entry;
    int entries;
    char *config;
    char *text; /* all facts: name NUL value NUL ... */
    int64_t text_bytes;
    md_fact *fact; /* into text */
    int facts;
};

int64_t md_ckpt_item_bytes(const md_state_item *item);
/* Local: MD_ERR_BUG when the item's block is not inside of its view, or that not of its array. */
md_status md_ckpt_item_check(const md_state_item *item);

/* Bytes [lo, hi) of an array, at `data` in memory; `done` bytes of the block lie in front of hi. */
typedef struct md_ckpt_piece {
    int64_t lo, hi, done;
    const char *data;
} md_ckpt_piece;
/* Steps to the block's next bytes that neither end a run nor cross a multiple of `unit`; a piece
 * starts as zeros. False behind the last one. Local. */
bool md_ckpt_piece_next(const md_state_item *item, int64_t unit, md_ckpt_piece *p);

/* Copies what the block has of the array's bytes [lo, hi), which lie at buf, into it, or from it.
 * Local. */
void md_ckpt_scatter(const md_state_item *item, int64_t lo, int64_t hi, char *buf);
void md_ckpt_gather(const md_state_item *item, int64_t lo, int64_t hi, char *buf);

/* What of an array is covered by blocks. `bytes` are how many, once for each block that has them.
 * `ends` is a sum over the blocks' runs [lo, hi) of h(hi) - h(lo), h a hash of the offset: where
 * runs meet it cancels, so that by all odds the sum is that of the whole array only if each byte is
 * covered once. It is taken modulo 2^48: the sums of 2^15 ranks add without overflow. */
typedef struct md_ckpt_cover {
    int64_t bytes, ends;
} md_ckpt_cover;
#define MD_CKPT_COVER_MASK (((int64_t)1 << 48) - 1)
/* Cover by one item's block, and by the whole array. Local. */
md_ckpt_cover md_ckpt_cover_block(const md_state_item *item);
md_ckpt_cover md_ckpt_cover_whole(const md_state_item *item);

/* 1 MiB blocks of an array of this many bytes, the last one short. */
int64_t md_ckpt_blocks(int64_t bytes);

/* Hash of an item from its blocks' hashes. */
uint64_t md_ckpt_hash(const uint64_t *block, int64_t blocks);
/* Hash of a state from its entries (checkpoint.h). Local. MD_ERR_MEMORY. */
md_status md_ckpt_hash_state(const md_state_entry *entry, int entries, uint64_t *hash);

/* Local, rank 0: lays the file out (everything but item bytes, "extent" and the END mark) and fills
 * ck with entries and offsets. */
md_status md_ckpt_create(const md_checkpoint_args *args, const char *path, md_checkpoint *ck);
/* Local, rank 0: writes "extent" and the END mark, and syncs. The entries have their hashes. */
md_status md_ckpt_seal(const md_checkpoint *ck);
/* Local: checks END mark, size, "extent" and the rest's hash, then reads entries, facts and config.
 */
md_status md_ckpt_load(const char *path, md_checkpoint *ck);
/* Frees what ck holds, not ck. */
void md_ckpt_clear(md_checkpoint *ck);

/* A checkpoint that is being written. File blocks are the 1 MiB blocks of all items, numbered
 * through. */
typedef struct md_ckpt_writer {
    const md_checkpoint_args *args;
    const char *part; /* the temporary file */
    md_checkpoint *ck;
    md_ckpt_cover *cover; /* [items] by all ranks */
    uint8_t *mixed;       /* [blocks] 1: made of short pieces, the same on all ranks */
    uint64_t *hash;       /* [blocks] 0: not known yet */
    int64_t blocks;
    int fd, sync_error;
} md_ckpt_writer;

/* Local: checks that the values of bytes [lo, hi) of an entry's array are finite, hashes each block
 * that is there as a whole into hash[] (the entry's blocks), and writes them. */
md_status md_ckpt_write_piece(const md_ckpt_writer *w, const md_state_entry *e,
                              const md_ckpt_piece *p, uint64_t *hash);
/* Local: writes this rank's blocks of all items but for what lies in mixed file blocks. */
md_status md_ckpt_write_blocks(const md_ckpt_writer *w);
/* Local: damages one byte of each item of this rank in the file where a fault asks for it. */
md_status md_ckpt_flip(const md_ckpt_writer *w);
/* Local: reads what this rank wrote back and compares every byte with memory, or with the hash of
 * what was gathered. MD_ERR_IO. */
md_status md_ckpt_compare(const md_ckpt_writer *w);

/* Local: marks the blocks of the item's array in which this rank has a short piece. */
void md_ckpt_mark_mixed(const md_state_item *item, uint8_t *mixed);
/* Collective: gathers the mixed file blocks, each on one rank, which writes and hashes them. */
md_status md_ckpt_write_mixed(const md_ckpt_writer *w);
/* Local: md_ckpt_compare for the mixed blocks that this rank wrote. */
md_status md_ckpt_compare_mixed(const md_ckpt_writer *w);

/* Collective: replaces each 0 by the block's hash as the file has it, read by one rank. `hash` is
 * the same on all ranks, before and after. */
md_status md_ckpt_hash_file(const md_checkpoint *ck, int fd, uint64_t *hash);

/* pread and pwrite of all bytes, or MD_ERR_IO (a short file: MD_ERR_DATA) naming the path. */
md_status md_ckpt_pread(int fd, const char *path, void *buf, int64_t bytes, int64_t at);
md_status md_ckpt_pwrite(int fd, const char *path, const void *buf, int64_t bytes, int64_t at);
md_status md_ckpt_sync(int fd, const char *path);
/* Opens an existing file; *fd is -1 on failure. */
md_status md_ckpt_fd(const char *path, bool write, int *fd);

/* Local, rank 0: gives the finished file its name and makes that durable, or removes it. */
md_status md_ckpt_rename(const char *part, const char *path);
/* Local, rank 0: removes what killed writers left; LATEST. */
void md_ckpt_sweep(const char *dir);
md_status md_ckpt_latest(const char *dir, int64_t step);

#endif
