/* checkpoint: the order of things. Each phase of a write is local, then agreed: a rank that fails
 * takes all ranks to the same exit, where rank 0 removes the temporary file. */
#include "io/checkpoint_parts.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mpi/agree.h"
#include "src/watchdog.h"

static md_status ckpt_new(md_comm *c, md_checkpoint **out)
{
    md_checkpoint *ck;
    MD_NEW(ck, 1, "checkpoint");
    ck->comm = c;
    *out = ck;
    return MD_OK;
}

void md_checkpoint_close(md_checkpoint *ck)
{
    if (!ck)
        return;
    md_ckpt_clear(ck);
    md_free(ck);
}

/* ---- writing ---- */

/* Lays the file out on rank 0 and tells all where the items lie. */
static md_status phase_create(md_ckpt_writer *w)
{
    const md_checkpoint_args *a = w->args;
    md_checkpoint *ck = w->ck;
    bool first = md_comm_rank(a->comm) == 0;
    md_phase("ckpt.create");
    MD_TRY(md_agree(a->comm, first ? md_ckpt_create(a, w->part, ck) : MD_OK));
    md_comm_bcast(a->comm, ck->entry, (int64_t)sizeof *ck->entry * ck->entries, 0);
    return md_agree(a->comm, md_ckpt_fd(w->part, true, &w->fd));
}

/* Every element must have exactly one writer. */
static md_status check_cover(const md_ckpt_writer *w)
{
    const md_checkpoint_args *a = w->args;
    for (int i = 0; i < a->items; i++)
        w->cover[i] = md_ckpt_cover_block(&a->item[i]);
    md_comm_allreduce(a->comm, w->cover, 2 * (int64_t)a->items, MD_I64, MD_SUM);
    for (int i = 0; i < a->items; i++) {
        md_ckpt_cover have = w->cover[i], want = md_ckpt_cover_whole(&a->item[i]);
        if (have.bytes != want.bytes)
            MD_FAIL(MD_ERR_BUG, "checkpoint item %s: the ranks own %lld of %lld bytes",
                    a->item[i].name, (long long)have.bytes, (long long)want.bytes);
        if ((have.ends & MD_CKPT_COVER_MASK) != want.ends)
            MD_FAIL(MD_ERR_BUG, "checkpoint item %s: some bytes have no owner and others several",
                    a->item[i].name);
    }
    return MD_OK;
}

/* Who writes what: each rank its own, but for blocks in which some rank has short pieces. */
static md_status phase_plan(const md_ckpt_writer *w)
{
    const md_checkpoint_args *a = w->args;
    uint8_t *mixed = w->mixed;
    MD_TRY(check_cover(w));
    for (int i = 0; i < a->items; i++) {
        md_ckpt_mark_mixed(&a->item[i], mixed);
        mixed += md_ckpt_blocks(md_ckpt_item_bytes(&a->item[i]));
    }
    md_comm_allreduce(a->comm, w->mixed, w->blocks, MD_U8, MD_MAX_OP);
    return MD_OK;
}

static md_status phase_write(const md_ckpt_writer *w)
{
    md_comm *c = w->args->comm;
    MD_TRY(md_agree(c, md_ckpt_write_blocks(w)));
    MD_TRY(md_ckpt_write_mixed(w));
    MD_TRY(md_agree(c, md_ckpt_flip(w)));
    md_comm_allreduce(c, w->hash, w->blocks, MD_I64, MD_SUM);
    return MD_OK;
}

static void *sync_main(void *arg)
{
    md_ckpt_writer *w = arg;
    w->sync_error = fsync(w->fd) == 0 ? 0 : errno;
    return NULL;
}

/* Each rank syncs the file and compares every byte of its own with memory; while a thread waits for
 * the disk, this one reads. Nobody reads what another rank wrote before all have synced and closed
 * the file: some file systems promise no more than that. */
static md_status phase_sync_and_compare(md_ckpt_writer *w)
{
    pthread_t thread;
    bool apart = pthread_create(&thread, NULL, sync_main, w) == 0;
    md_status st = md_ckpt_compare(w);
    md_phase("ckpt.sync");
    if (apart)
        pthread_join(thread, NULL);
    else
        sync_main(w);
    if (md_fault("ckpt.fsync"))
        w->sync_error = EIO;
    if (st == MD_OK && w->sync_error)
        st = md_error_set(MD_ERR_IO, "%s: cannot sync: %s", w->part, strerror(w->sync_error));
    close(w->fd);
    w->fd = -1;
    return md_agree(w->args->comm, st);
}

static md_status reopen(md_ckpt_writer *w)
{
    MD_TRY(md_ckpt_fd(w->part, false, &w->fd));
    if (md_fault("ckpt.verify"))
        MD_FAIL(MD_ERR_IO, "%s: cannot be read back: injected fault", w->part);
    return MD_OK;
}

/* The items' hashes. A block of one writer, or gathered on one, has the hash of memory, which the
 * file was compared with; one of several writers, which nobody could hash in memory, gets it from
 * the file. */
static md_status phase_hash(md_ckpt_writer *w)
{
    md_checkpoint *ck = w->ck;
    MD_TRY(md_agree(ck->comm, reopen(w)));
    MD_TRY(md_ckpt_hash_file(ck, w->fd, w->hash));
    const uint64_t *hash = w->hash;
    for (int i = 0; i < ck->entries; i++) {
        int64_t n = md_ckpt_blocks(ck->entry[i].bytes);
        ck->entry[i].xxh3 = md_ckpt_hash(hash, n);
        hash += n;
    }
    return MD_OK;
}

/* Rank 0 seals the file and opens it as a reader would. */
static md_status seal_and_check(md_ckpt_writer *w)
{
    md_checkpoint again = {0};
    MD_TRY(md_ckpt_seal(w->ck));
    md_status st = md_ckpt_load(w->part, &again);
    if (st == MD_OK && again.entries != w->ck->entries)
        st = md_error_set(MD_ERR_IO, "%s: reopened, it is another file", w->part);
    for (int i = 0; i < w->ck->entries && st == MD_OK; i++)
        if (memcmp(&again.entry[i], &w->ck->entry[i], sizeof again.entry[i]) != 0)
            st = md_error_set(MD_ERR_IO, "%s: reopened, %s differs", w->part, w->ck->entry[i].name);
    md_ckpt_clear(&again);
    return st;
}

static md_status run_phases(md_ckpt_writer *w)
{
    md_comm *c = w->args->comm;
    MD_TRY(phase_plan(w));
    MD_TRY(phase_create(w));
    MD_TRY(phase_write(w));
    MD_TRY(phase_sync_and_compare(w));
    MD_TRY(phase_hash(w));
    return md_agree(c, md_comm_rank(c) == 0 ? seal_and_check(w) : MD_OK);
}

static md_status writer_open(md_ckpt_writer *w, const char *part)
{
    const md_checkpoint_args *a = w->args;
    MD_TRY(ckpt_new(a->comm, &w->ck));
    snprintf(w->ck->path, sizeof w->ck->path, "%s", part);
    w->ck->entries = a->items;
    for (int i = 0; i < a->items; i++) {
        MD_TRY(md_ckpt_item_check(&a->item[i]));
        w->blocks += md_ckpt_blocks(md_ckpt_item_bytes(&a->item[i]));
    }
    MD_NEW(w->ck->entry, a->items, "checkpoint entries");
    MD_NEW(w->cover, a->items, "checkpoint entries");
    MD_NEW(w->mixed, w->blocks, "checkpoint hashes");
    MD_NEW(w->hash, w->blocks, "checkpoint hashes");
    return MD_OK;
}

/* Writes, verifies and seals `part`; removes it on failure. */
static md_status write_part(const md_checkpoint_args *args, const char *part)
{
    md_ckpt_writer w = {.args = args, .part = part, .fd = -1};
    md_status st = md_agree(args->comm, writer_open(&w, part));
    if (st == MD_OK)
        st = run_phases(&w);
    if (w.fd >= 0)
        close(w.fd);
    md_comm_barrier(args->comm); /* nobody has it open when it goes or gets its name */
    if (st != MD_OK && md_comm_rank(args->comm) == 0)
        unlink(part);
    md_free(w.cover);
    md_free(w.mixed);
    md_free(w.hash);
    md_checkpoint_close(w.ck);
    return st;
}

md_status md_checkpoint_write_file(const md_checkpoint_args *args, const char *path)
{
    char part[MD_CKPT_PATH];
    if (snprintf(part, sizeof part, "%s.partial", path) >= (int)sizeof part)
        MD_FAIL(MD_ERR_CREATE, "%s: the name is too long", path);
    MD_TRY(write_part(args, part));
    bool first = md_comm_rank(args->comm) == 0;
    return md_agree(args->comm, first ? md_ckpt_rename(part, path) : MD_OK);
}

static void warn_untidy(const md_checkpoint_args *args, md_status st)
{
    if (st != MD_OK)
        md_log_warn("checkpoint of step %lld is written, but: %s", (long long)args->step,
                    md_error_text());
}

/* The new file is whole and has its name: a failure from here on loses nothing, so it is told and
 * the write has succeeded. */
static void tidy(const md_checkpoint_args *args)
{
    warn_untidy(args, md_ckpt_latest(args->dir, args->step));
    md_status st = md_checkpoint_abandon(args->dir, args->step);
    warn_untidy(args, st);
    if (st == MD_OK) /* else later steps would stay in place of this one */
        warn_untidy(args, md_checkpoint_prune(args->dir, args->keep, args->keep_every, NULL));
}

md_status md_checkpoint_write(const md_checkpoint_args *args)
{
    char path[MD_CKPT_PATH];
    bool first = md_comm_rank(args->comm) == 0;
    md_checkpoint_name(path, sizeof path, args->dir, args->step);
    if (first)
        md_ckpt_sweep(args->dir);
    MD_TRY(md_checkpoint_write_file(args, path));
    if (first)
        tidy(args);
    md_comm_barrier(args->comm); /* every rank finds the folder as it will stay */
    return MD_OK;
}

/* ---- opening ---- */

/* Rank 0's scalars; what they count follows. */
typedef struct header {
    int64_t step, file_bytes, table_offset, text_bytes, config_bytes;
    uint64_t state_hash;
    int32_t entries, facts;
} header;

static md_status share_alloc(md_checkpoint *ck, const header *h)
{
    ck->step = h->step;
    ck->file_bytes = h->file_bytes;
    ck->table_offset = h->table_offset;
    ck->state_hash = h->state_hash;
    ck->text_bytes = h->text_bytes;
    ck->entries = h->entries;
    ck->facts = h->facts;
    if (md_comm_rank(ck->comm) > 0) {
        MD_NEW(ck->entry, h->entries, "checkpoint entries");
        MD_NEW(ck->text, h->text_bytes, "checkpoint facts");
        MD_NEW(ck->config, h->config_bytes, "checkpoint config");
    }
    MD_NEW(ck->fact, h->facts, "checkpoint facts");
    return MD_OK;
}

/* Gives all ranks what rank 0 has loaded. */
static md_status share(md_checkpoint *ck)
{
    md_comm *c = ck->comm;
    header h = {.step = ck->step,
                .file_bytes = ck->file_bytes,
                .table_offset = ck->table_offset,
                .text_bytes = ck->text_bytes,
                .config_bytes = ck->config ? (int64_t)strlen(ck->config) + 1 : 0,
                .state_hash = ck->state_hash,
                .entries = ck->entries,
                .facts = ck->facts};
    md_comm_bcast(c, &h, sizeof h, 0);
    MD_TRY(md_agree(c, share_alloc(ck, &h)));
    md_comm_bcast(c, ck->entry, (int64_t)sizeof *ck->entry * h.entries, 0);
    md_comm_bcast(c, ck->text, h.text_bytes, 0);
    md_comm_bcast(c, ck->config, h.config_bytes, 0);
    const char *text = ck->text;
    for (int i = 0; i < ck->facts; i++) {
        ck->fact[i].name = text;
        text += strlen(text) + 1;
        ck->fact[i].value = text;
        text += strlen(text) + 1;
    }
    return MD_OK;
}

/* Rank 0 loads what all will share. */
static md_status load(const char *path, md_checkpoint *ck)
{
    if (md_fault("ckpt.open"))
        MD_FAIL(MD_ERR_IO, "%s: cannot open: injected fault", path);
    MD_TRY(md_ckpt_load(path, ck));
    return md_ckpt_hash_state(ck->entry, ck->entries, &ck->state_hash);
}

md_status md_checkpoint_open(md_comm *c, const char *path, md_checkpoint **out)
{
    md_checkpoint *ck = NULL;
    md_status st = md_agree(c, ckpt_new(c, &ck));
    if (st == MD_OK) {
        snprintf(ck->path, sizeof ck->path, "%s", path);
        st = md_agree(c, md_comm_rank(c) == 0 ? load(path, ck) : MD_OK);
    }
    if (st == MD_OK)
        st = share(ck);
    if (st != MD_OK) {
        md_checkpoint_close(ck);
        return st;
    }
    *out = ck;
    return MD_OK;
}

static md_status open_whole(md_comm *c, const char *path, md_checkpoint **out)
{
    MD_TRY(md_checkpoint_open(c, path, out));
    md_status st = md_checkpoint_verify(*out);
    if (st != MD_OK) {
        md_checkpoint_close(*out);
        *out = NULL;
    }
    return st;
}

/* Rank 0's view of a path: its steps when it is a folder, else *n = -1. */
static md_status look(const char *path, int64_t **steps, int *n)
{
    struct stat info;
    *n = -1;
    if (stat(path, &info) != 0) {
        if (errno == ENOENT)
            MD_FAIL(MD_ERR_NOINPUT, "%s: there is no such checkpoint or folder", path);
        MD_FAIL(MD_ERR_IO, "%s: cannot be looked at: %s", path, strerror(errno));
    }
    return S_ISDIR(info.st_mode) ? md_checkpoint_list(path, steps, n) : MD_OK;
}

static md_status share_steps(md_comm *c, int64_t **steps, int n)
{
    md_status st = MD_OK;
    if (md_comm_rank(c) > 0) {
        *steps = md_alloc(sizeof **steps * (size_t)n, "checkpoint list");
        st = *steps ? MD_OK : MD_ERR_MEMORY;
    }
    MD_TRY(md_agree(c, st));
    md_comm_bcast(c, *steps, (int64_t)sizeof **steps * n, 0);
    return MD_OK;
}

void md_checkpoint_warn_skipped(void *arg, const char *path, const char *reason)
{
    (void)arg;
    bool named = strstr(reason, path) != NULL;
    md_log_warn("checkpoint skipped: %s%s%s", named ? "" : path, named ? "" : ": ", reason);
}

md_status md_checkpoint_find(md_comm *c, const char *path, md_checkpoint_skip skip, void *arg,
                             md_checkpoint **out)
{
    int64_t *steps = NULL;
    int n = -1;
    MD_TRY(md_agree(c, md_comm_rank(c) == 0 ? look(path, &steps, &n) : MD_OK));
    md_comm_bcast(c, &n, sizeof n, 0);
    if (n < 0)
        return open_whole(c, path, out);
    md_status st = share_steps(c, &steps, n);
    bool found = false;
    for (int i = 0; i < n && st == MD_OK && !found; i++) {
        char file[MD_CKPT_PATH];
        md_checkpoint_name(file, sizeof file, path, steps[i]);
        st = open_whole(c, file, out);
        found = st == MD_OK;
        if (st == MD_ERR_NOINPUT) /* the folder has its name, so this is not "none" */
            st = md_error_set(MD_ERR_IO, "%s", md_error_text());
        if (st != MD_ERR_DATA) /* other errors say nothing about the file */
            continue;
        if (skip)
            skip(arg, file, md_error_text());
        st = MD_OK;
    }
    md_free(steps);
    if (st != MD_OK || found)
        return st;
    if (n == 0)
        MD_FAIL(MD_ERR_NOINPUT, "%s: there is no checkpoint", path);
    MD_FAIL(MD_ERR_DATA, "%s: none of %d checkpoints is whole", path, n);
}

const char *md_checkpoint_path(const md_checkpoint *ck)
{
    return ck->path;
}

int64_t md_checkpoint_step(const md_checkpoint *ck)
{
    return ck->step;
}

int64_t md_checkpoint_bytes(const md_checkpoint *ck)
{
    return ck->file_bytes;
}

uint64_t md_checkpoint_state_hash(const md_checkpoint *ck)
{
    return ck->state_hash;
}

const char *md_checkpoint_config(const md_checkpoint *ck)
{
    return ck->config;
}

const md_fact *md_checkpoint_facts(const md_checkpoint *ck, int *n)
{
    *n = ck->facts;
    return ck->fact;
}

const char *md_checkpoint_fact(const md_checkpoint *ck, const char *name)
{
    for (int i = 0; i < ck->facts; i++)
        if (strcmp(ck->fact[i].name, name) == 0)
            return ck->fact[i].value;
    return NULL;
}

const md_state_entry *md_checkpoint_entries(const md_checkpoint *ck, int *n)
{
    *n = ck->entries;
    return ck->entry;
}

const md_state_entry *md_checkpoint_entry(const md_checkpoint *ck, const char *name)
{
    for (int i = 0; i < ck->entries; i++)
        if (strcmp(ck->entry[i].name, name) == 0)
            return &ck->entry[i];
    return NULL;
}
