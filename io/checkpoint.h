/* checkpoint: training state as one HDF5 file that any number of ranks writes and any other number
 * reads, that is either whole or not there, and in which every changed bit is found.
 *
 * The file "md_hpc.checkpoint" version 1, readable by any HDF5: one contiguous data set per item
 * under its name at its global shape, root attributes (format, version, step, the caller's facts),
 * the data set "config" (text) and "extent" u64[items][3]: where each item's bytes lie, how many,
 * and their hash. The HDF5 user block, the file's first 4096 bytes, starts with the END mark, eight
 * little-endian u64: magic "MDPHCKPT", version, bytes of the file, offset of "extent", items,
 * XXH3-64 of all bytes outside of items, "extent" and the user block, XXH3-64 of "extent", XXH3-64
 * of these seven. It is written last. An item's hash is XXH3-64 over the XXH3-64 of its 1 MiB
 * blocks, so it does not depend on who wrote it. All of this is checked with plain reads before
 * HDF5 sees a byte. The state hash is XXH3-64 over all items in the order of their names: name,
 * NUL, type's name, NUL, rank, dimensions (4, those behind the rank are 0) and hash as i64.
 *
 * HDF5 lays the file out (rank 0); the ranks write and read item bytes themselves at their offsets.
 */
#ifndef MD_CHECKPOINT_H
#define MD_CHECKPOINT_H

#include "mpi/comm.h"
#include "src/log.h"

#define MD_STATE_NAME 128 /* bytes of an item's name, the NUL included */

/* One array of the state and this rank's block of it: a stretch of its part of the array. For
 * writing, the blocks of all ranks are disjoint and cover the array; for reading, any block, also
 * the same on several ranks. */
typedef struct md_state_item {
    const char *name; /* a path: "param/blocks.0.attn.qkv.weight" */
    md_dtype dtype;   /* F32, F64, I32, I64 or U8 */
    int rank;         /* 1..4 */
    int64_t global[MD_MAX_RANK];
    md_view view;      /* this rank's part of the array */
    int64_t lo, count; /* elements [lo, lo + count) of the part are the block; a count of 0 owns
                          nothing, lo and view are then ignored */
    void *data;        /* the block, dense, element lo first; host memory, the caller's */
} md_state_item;

/* Items that are made one by one, with memory for their names. */
typedef struct md_state_list {
    md_state_item *item;
    char (*name)[MD_STATE_NAME];
    int count;
} md_state_list;

/* Room for `most` of them. Local. MD_ERR_MEMORY. Freed by md_state_list_free, which takes any part.
 */
md_status md_state_list_make(int most, md_state_list *out);
void md_state_list_free(md_state_list *l);

/* A whole array as an item. */
md_state_item md_state_item_make(const char *name, const md_tensor *t);
/* Narrows whole arrays (others are a bug) to part `part` of `parts` of all their bytes in this
 * order: spreads replicated arrays over the ranks that write them. A part is one stretch of the
 * file, so that few arrays are cut, however many parts there are; cuts lie between the 1 MiB blocks
 * that are hashed, so that each is hashed in memory by the one rank that has it. Local. */
void md_state_items_share(md_state_item *item, int items, int part, int parts);

typedef struct md_checkpoint_args {
    md_comm *comm;
    const char *dir; /* existing folder of this run's checkpoints */
    int64_t step;
    const md_state_item *item; /* same names, types, shapes and order on every rank */
    int items;
    const char *config;  /* text kept along, may be NULL; rank 0's counts */
    const md_fact *fact; /* string attributes; rank 0's count */
    int facts;
    int keep;           /* newest checkpoints kept, at least 1 */
    int64_t keep_every; /* and those at multiples of this step; 0 = none */
} md_checkpoint_args;

/* Collective(comm). Writes dir/step-%08d.h5: to a temporary name, synced by every rank while it
 * compares every byte it wrote with memory, hashed, sealed, reopened,
 * renamed; then LATEST names it (for people and scripts; the program looks at the files themselves)
 * and older ones go. A killed or failed write leaves the older checkpoints as they were and no file
 * that looks like one. Checkpoints of later steps belong to a branch of the run that was given up:
 * they get ".abandoned" behind their names, and the newest `keep` of those stay. What fails behind
 * the rename is a warning. MD_ERR_CREATE, MD_ERR_IO (disk full too), MD_ERR_MEMORY, MD_ERR_NUMERICS
 * (a value is not finite): the same on every rank, training can go on. */
md_status md_checkpoint_write(const md_checkpoint_args *args);
/* Collective(comm). The same to one path; `dir` and what is kept do not matter. */
md_status md_checkpoint_write_file(const md_checkpoint_args *args, const char *path);

typedef struct md_checkpoint md_checkpoint;

/* Collective(c). Opens one file and checks all of it but the items' bytes. The file is closed again
 * when this returns. MD_ERR_NOINPUT: missing; MD_ERR_DATA: damaged, unfinished or not ours;
 * MD_ERR_IO. */
md_status md_checkpoint_open(md_comm *c, const char *path, md_checkpoint **out);
void md_checkpoint_close(md_checkpoint *ck);
/* Collective. Reads and hashes every item's bytes, each by one rank. MD_ERR_DATA names the item. */
md_status md_checkpoint_verify(md_checkpoint *ck);
/* Collective. Fills the blocks of these items (same list on every rank) and checks the hashes of
 * what it reads: each byte is read by one rank and broadcast. MD_ERR_DATA: an item is missing, has
 * another type or shape, or is damaged; the blocks are then undefined. The file's other items do
 * not matter. */
md_status md_checkpoint_read(md_checkpoint *ck, const md_state_item *item, int items);

/* Called on every rank for each damaged file that was skipped, newest first. */
typedef void (*md_checkpoint_skip)(void *arg, const char *path, const char *reason);
/* One that warns in the log. */
void md_checkpoint_warn_skipped(void *arg, const char *path, const char *reason);
/* Collective(c). Opens the newest checkpoint of a folder that verifies, or the file `path` itself.
 * Only damaged or unfinished files are skipped (MD_ERR_DATA): one that cannot be read, say for lack
 * of permission or memory, may be whole, and resuming an older one would give up its steps.
 * MD_ERR_NOINPUT: there is none; MD_ERR_DATA: there are some, but none is whole; MD_ERR_IO,
 * MD_ERR_MEMORY. */
md_status md_checkpoint_find(md_comm *c, const char *path, md_checkpoint_skip skip, void *arg,
                             md_checkpoint **out);

/* What an open checkpoint says. All Local; the checkpoint keeps the memory. */
typedef struct md_state_entry {
    char name[MD_STATE_NAME];
    int32_t dtype, rank;
    int64_t global[MD_MAX_RANK];
    int64_t offset, bytes; /* in the file */
    uint64_t xxh3;
} md_state_entry;

const char *md_checkpoint_path(const md_checkpoint *ck);
int64_t md_checkpoint_step(const md_checkpoint *ck);
int64_t md_checkpoint_bytes(const md_checkpoint *ck);
const char *md_checkpoint_config(const md_checkpoint *ck);                 /* "" when none */
const char *md_checkpoint_fact(const md_checkpoint *ck, const char *name); /* NULL when absent */
const md_fact *md_checkpoint_facts(const md_checkpoint *ck, int *n);
const md_state_entry *md_checkpoint_entries(const md_checkpoint *ck, int *n); /* file order */
const md_state_entry *md_checkpoint_entry(const md_checkpoint *ck, const char *name);
/* One hash of names, types, shapes and values of all items, whatever their order in the file and
 * whoever wrote them: equal states have equal hashes. Taken from the items' recorded hashes, which
 * md_checkpoint_verify checks. */
uint64_t md_checkpoint_state_hash(const md_checkpoint *ck);

/* Steps of the checkpoints in a folder, newest first, whole or not; *steps is freed with md_free.
 * Local. MD_ERR_NOINPUT, MD_ERR_IO. */
md_status md_checkpoint_list(const char *dir, int64_t **steps, int *n);
/* Path of a step's file. Local. */
void md_checkpoint_name(char *buf, size_t size, const char *dir, int64_t step);
/* Gives the checkpoints beyond a step (-1: all) ".abandoned" behind their names. Local. MD_ERR_IO.
 */
md_status md_checkpoint_abandon(const char *dir, int64_t step);
/* Deletes all but the newest `keep` and the multiples of keep_every (0: none), and of the abandoned
 * ones all but the `keep` of the highest steps. Local. *removed may be NULL. MD_ERR_IO. */
md_status md_checkpoint_prune(const char *dir, int keep, int64_t keep_every, int *removed);

#endif
