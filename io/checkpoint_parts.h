/* checkpoint_parts: what the files of the checkpoint room share. checkpoint.c orders the phases,
 * checkpoint_file.c knows the format, checkpoint_data.c moves item bytes, checkpoint_dir.c names.
 */
#ifndef MD_CHECKPOINT_PARTS_H
#define MD_CHECKPOINT_PARTS_H

#include "io/checkpoint.h"

#define MD_CKPT_BLOCK ((int64_t)1 << 20)
#define MD_CKPT_PATH  4096

struct md_checkpoint {
    md_comm *comm;
    char path[MD_CKPT_PATH];
    int64_t step, file_bytes, table_offset;
    md_state_entry *entry;
    int entries;
    char *config;
    char *text; /* all facts: name NUL value NUL ... */
    int64_t text_bytes;
    md_fact *fact; /* into text */
    int facts;
};

/* An item's block as runs of consecutive bytes in its array: run r is the block's bytes
 * [r * bytes, (r + 1) * bytes) and lies at md_ckpt_run_offset in the array. */
typedef struct md_ckpt_runs {
    int64_t count, bytes;
} md_ckpt_runs;
md_ckpt_runs md_ckpt_runs_of(const md_state_item *item);
int64_t md_ckpt_run_offset(const md_state_item *item, int64_t run);

int64_t md_ckpt_item_bytes(const md_state_item *item);
/* 1 MiB blocks of an array of this many bytes, the last one short. */
int64_t md_ckpt_blocks(int64_t bytes);

/* Hash of an item from its blocks' hashes. */
uint64_t md_ckpt_hash(const uint64_t *block, int64_t blocks);

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

/* Local: adds the bytes of this rank's block to what is owned of each 1 MiB block of the array. */
void md_ckpt_owned(const md_state_item *item, int64_t *owned);
/* Local: writes this rank's blocks of all items; memory[b] gets the hash of each file block
 * (numbered through all items) that lies in one of this rank's blocks as a whole. */
md_status md_ckpt_write_blocks(int fd, const md_checkpoint_args *args, const md_checkpoint *ck,
                               uint64_t *memory);
/* Local: reads this rank's blocks back and compares every byte with memory. MD_ERR_IO. */
md_status md_ckpt_compare(int fd, const md_checkpoint_args *args, const md_checkpoint *ck);
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
/* Local, rank 0: removes what killed writers left, sets aside later steps, LATEST. */
void md_ckpt_sweep(const char *dir);
md_status md_ckpt_latest(const char *dir, int64_t step);
md_status md_ckpt_abandon(const char *dir, int64_t step);

#endif
