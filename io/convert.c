/* convert: the phases, in order: scan the sources, check every image, lay the store out, create it,
 * write the images, read them back, publish. Each phase ends in an agreement, so that all ranks go
 * on or stop together; tables are alike on all ranks, work is cut into contiguous ranges of them.
 */
#include "io/convert.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#define XXH_INLINE_ALL /* no library to link, compiled for this machine */
#include <xxhash.h>

#include "io/convert_parts.h"
#include "io/dataset.h"
#include "mpi/agree.h"
#include "src/log.h"

#define PATH_SIZE 4096

typedef struct job {
    const md_convert_args *a;
    md_comm *c;
    int rank, size;
    convert_table table;
    convert_result *result; /* [items] */
    int64_t *cut;           /* [size + 1] first item of each rank */
    int64_t lo, hi;         /* this rank's items */
    int64_t rejects;        /* of all ranks */
    convert_list reasons;   /* "NAME\tREASON\n" of this rank, then on rank 0 of all */
    convert_store store;
    bool created; /* rank 0: there is a partial file of ours */
    char partial[PATH_SIZE], listing[PATH_SIZE];
} job;

/* --- scan ---------------------------------------------------------------------------------- */

static md_status check_out(job *j)
{
    int n = snprintf(j->partial, sizeof j->partial, "%s.partial", j->a->out);
    snprintf(j->listing, sizeof j->listing, "%s.rejects.txt", j->a->out);
    if (n >= (int)sizeof j->partial - 8)
        MD_FAIL(MD_ERR_CREATE, "%.80s...: path is too long", j->a->out);
    if (j->rank != 0)
        return MD_OK;
    if (!j->a->replace && access(j->a->out, F_OK) == 0)
        MD_FAIL(MD_ERR_CREATE, "%s: exists; choose another name or say --force", j->a->out);
    int fd = open(j->partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        MD_FAIL(MD_ERR_CREATE, "%s: cannot create: %s", j->partial, strerror(errno));
    close(fd);
    j->created = true;
    return MD_OK;
}

static md_status scan_groups(job *j, convert_table *mine)
{
    int64_t turn = 0;
    for (int32_t g = 0; g < j->table.groups.n; g++)
        if (!convert_group_of(&j->table, g)->scanned && turn++ % j->size == j->rank)
            MD_TRY(convert_scan(&j->table, g, mine));
    return MD_OK;
}

static md_status scan(job *j)
{
    md_status st = convert_table_init(&j->table);
    if (st == MD_OK && j->rank == 0)
        st = convert_plan(&j->table, j->a->sources, j->a->n_sources);
    MD_TRY(md_agree(j->c, st));
    MD_TRY(convert_table_bcast(&j->table, j->c));
    convert_table mine;
    st = convert_table_init(&mine);
    if (st == MD_OK)
        st = scan_groups(j, &mine);
    st = md_agree(j->c, st);
    if (st == MD_OK)
        st = convert_table_merge(&j->table, &mine, j->c);
    convert_table_free(&mine);
    if (st == MD_OK && j->table.items.n == 0)
        MD_FAIL(MD_ERR_DATA, "no images in %s%s", j->a->sources[0].path,
                j->a->n_sources > 1 ? " and the other sources" : "");
    return st;
}

/* --- check --------------------------------------------------------------------------------- */

/* Rank r gets the items cut[r] .. cut[r + 1] - 1: nearly equal numbers of bytes each. */
static md_status cut_items(job *j)
{
    MD_NEW(j->cut, j->size + 1, "convert");
    double total = 0, before = 0;
    for (int64_t i = 0; i < j->table.items.n; i++)
        total += (double)convert_item_of(&j->table, i)->bytes + 1;
    int r = 1;
    for (int64_t i = 0; i < j->table.items.n; i++) {
        for (; r < j->size && before >= total * r / j->size; r++)
            j->cut[r] = i;
        before += (double)convert_item_of(&j->table, i)->bytes + 1;
    }
    for (; r <= j->size; r++)
        j->cut[r] = j->table.items.n;
    j->lo = j->cut[j->rank];
    j->hi = j->cut[j->rank + 1];
    return MD_OK;
}

typedef struct checker {
    const convert_table *table;
    convert_reader *reader;
    md_decoder *decoder;
} checker;

/* *bad: the image is a reject, its reason in md_error_text. Other statuses stop the conversion. */
static md_status check_bytes(checker *k, const convert_item *it, convert_result *res, bool *bad)
{
    const uint8_t *bytes;
    int w = it->w, h = it->h;
    md_image_kind kind = MD_IMAGE_GRAY8;
    md_image image;
    bool own_file = convert_group_of(k->table, it->group)->kind == CONVERT_FOLDER;
    md_status st = convert_read_item(k->reader, k->table, it, &bytes);
    *bad = own_file && (st == MD_ERR_DATA || st == MD_ERR_NOINPUT);
    MD_TRY(st);
    if (w == 0)
        st = md_decode_probe(k->decoder, bytes, (size_t)it->bytes, &kind, &w, &h);
    if (st == MD_OK && (w > UINT16_MAX || h > UINT16_MAX))
        st = md_error_set(MD_ERR_DATA, "%d x %d pixels; at most 65535 on a side", w, h);
    if (st == MD_OK)
        st = md_decode_image(k->decoder, &(md_coded){kind, bytes, (size_t)it->bytes, w, h}, &image);
    *bad = st == MD_ERR_DATA;
    MD_TRY(st);
    *res = (convert_result){.xxh3 = XXH3_64bits(bytes, (size_t)it->bytes),
                            .w = (uint16_t)w,
                            .h = (uint16_t)h,
                            .kind = (uint8_t)kind,
                            .good = 1};
    return MD_OK;
}

static md_status check_item(checker *k, const convert_item *it, convert_result *res, bool *bad)
{
    *bad = true;
    if (it->bytes == 0)
        MD_FAIL(MD_ERR_DATA, "empty file");
    if (it->bytes > CONVERT_MAX_IMAGE)
        MD_FAIL(MD_ERR_DATA, "%lld bytes; at most %lld", (long long)it->bytes,
                (long long)CONVERT_MAX_IMAGE);
    *bad = false;
    return check_bytes(k, it, res, bad);
}

/* One line of the listing; bytes that would break it are shown as '?'. */
static md_status keep_reason(job *j, const convert_item *it)
{
    char line[2 * PATH_SIZE];
    const char *name = convert_text_of(&j->table, it->name);
    int n = snprintf(line, sizeof line - 1, "%s\t%s", name, md_error_text());
    n = MD_MIN(n, (int)sizeof line - 2);
    for (int i = 0; i < n; i++)
        if ((unsigned char)line[i] < ' ' && i != (int)strlen(name))
            line[i] = '?';
    line[n] = '\n';
    return convert_list_push(&j->reasons, line, n + 1);
}

static md_status check_range(job *j, checker *k)
{
    convert_progress p = {.doing = "checking", .ranks = j->size, .start = md_now()};
    p.told = p.start;
    for (int64_t i = j->lo; i < j->hi; i++)
        p.total += convert_item_of(&j->table, i)->bytes;
    for (int64_t i = j->lo; i < j->hi; i++) {
        const convert_item *it = convert_item_of(&j->table, i);
        bool bad;
        md_status st = check_item(k, it, &j->result[i], &bad);
        if (bad) {
            MD_TRY(keep_reason(j, it));
            j->rejects++;
        } else {
            MD_TRY(st);
        }
        convert_tell(&p, it->bytes);
    }
    return MD_OK;
}

static md_status check_mine(job *j)
{
    checker k = {.table = &j->table};
    j->reasons.width = 1;
    MD_TRY(cut_items(j));
    MD_NEW(j->result, j->table.items.n, "convert");
    MD_TRY(convert_reader_create(&k.reader));
    md_status st = md_decoder_create(&k.decoder, 0);
    if (st == MD_OK) {
        st = check_range(j, &k);
        md_decoder_free(k.decoder);
    }
    convert_reader_free(k.reader);
    return st;
}

/* Rank 0 collects the lists of rejects in rank order, which is source order. */
static md_status collect_reasons(job *j)
{
    for (int r = 1; r < j->size; r++) {
        int64_t n = j->rank == r ? j->reasons.n : 0;
        md_comm_bcast(j->c, &n, sizeof n, r);
        if (n == 0)
            continue;
        char *text = j->rank == r ? j->reasons.at : md_alloc((size_t)n, "convert");
        md_status st = md_agree(j->c, text ? MD_OK : MD_ERR_MEMORY);
        if (st == MD_OK) {
            md_comm_bcast(j->c, text, n, r);
            st = j->rank == 0 ? convert_list_push(&j->reasons, text, n) : MD_OK;
            st = md_agree(j->c, st);
        }
        if (j->rank != r)
            md_free(text);
        MD_TRY(st);
    }
    return MD_OK;
}

static md_status check(job *j)
{
    MD_TRY(md_agree(j->c, check_mine(j)));
    for (int r = 0; r < j->size; r++) {
        int64_t n = j->cut[r + 1] - j->cut[r];
        if (n > 0)
            md_comm_bcast(j->c, j->result + j->cut[r], n * (int64_t)sizeof *j->result, r);
    }
    md_comm_allreduce(j->c, &j->rejects, 1, MD_I64, MD_SUM);
    MD_TRY(collect_reasons(j));
    md_status st = MD_OK;
    if (j->rejects == j->table.items.n && j->rank == 0) {
        const char *first = j->reasons.at;
        st = md_error_set(MD_ERR_DATA, "none of %lld candidates is an image; the first: %.*s",
                          (long long)j->rejects, (int)strcspn(first, "\n"), first);
    }
    return md_agree(j->c, st);
}

/* --- lay out and write --------------------------------------------------------------------- */

static md_status lay_out_split(job *j, int split, int64_t *found)
{
    convert_column *col = &j->store.column[split];
    for (int64_t i = 0; i < j->table.items.n; i++)
        if (j->result[i].good && convert_item_of(&j->table, i)->split == split)
            found[col->n++] = i;
    MD_NEW(col->item, col->n, "convert");
    MD_NEW(col->offset, col->n + 1, "convert");
    for (int64_t q = 0; q < col->n; q++) {
        col->item[q] = found[j->a->keep_order ? q : md_store_order(j->a->seed, col->n, q)];
        col->offset[q + 1] = col->offset[q] + convert_item_of(&j->table, col->item[q])->bytes;
    }
    return MD_OK;
}

static md_status lay_out(job *j)
{
    convert_store *s = &j->store;
    int64_t *found;
    s->path = j->partial;
    s->table = &j->table;
    s->result = j->result;
    if (j->a->keep_order)
        snprintf(s->order, sizeof s->order, "source");
    else
        snprintf(s->order, sizeof s->order, "shuffled seed=%llu", (unsigned long long)j->a->seed);
    /* Base names: the same sources give the same file wherever they lie. */
    for (int i = 0; i < j->a->n_sources; i++) {
        const char *path = j->a->sources[i].path;
        size_t n = strlen(path), used = strlen(s->source);
        while (n > 1 && path[n - 1] == '/')
            n--;
        size_t from = n;
        while (from > 0 && path[from - 1] != '/')
            from--;
        snprintf(s->source + used, sizeof s->source - used, "%s%.*s", i ? ", " : "",
                 (int)(n - from), path + from);
    }
    MD_NEW(found, j->table.items.n, "convert");
    md_status st = MD_OK;
    for (int i = 0; st == MD_OK && i < j->table.n_splits; i++)
        st = lay_out_split(j, i, found);
    md_free(found);
    return st;
}

static md_status write_all(job *j)
{
    convert_progress p = {.doing = "writing ", .ranks = j->size, .start = md_now()};
    p.told = p.start;
    for (int64_t i = j->lo; i < j->hi; i++)
        p.total += j->result[i].good ? convert_item_of(&j->table, i)->bytes : 0;
    MD_TRY(md_agree(j->c, j->rank == 0 ? convert_create(&j->store) : MD_OK));
    for (int i = 0; i < j->table.n_splits; i++)
        md_comm_bcast(j->c, &j->store.column[i].data_at, sizeof(int64_t), 0);
    return md_agree(j->c, convert_write_items(&j->store, j->lo, j->hi, &p));
}

/* --- verify -------------------------------------------------------------------------------- */

/* Reads this rank's part of an open split; decoder != NULL: decodes it too. */
static md_status verify_part(const md_dataset *d, md_comm *c, md_decoder *decoder)
{
    int64_t n = md_dataset_count(d), r = md_comm_rank(c), size = md_comm_size(c);
    convert_progress p = {.doing = "reading ", .ranks = (int)size, .start = md_now()};
    size_t cap = md_dataset_max_bytes(d), len;
    uint8_t *buf;
    md_status st = MD_OK;
    p.told = p.start;
    for (int64_t i = n * r / size; i < n * (r + 1) / size; i++)
        p.total += (int64_t)md_dataset_bytes(d, i);
    MD_NEW(buf, cap, "convert");
    for (int64_t i = n * r / size; st == MD_OK && i < n * (r + 1) / size; i++) {
        md_image image;
        char name[256];
        int w, h;
        st = md_dataset_read(d, i, buf, cap, &len);
        md_dataset_size(d, i, &w, &h);
        if (st == MD_OK && decoder) {
            st = md_decode_image(decoder, &(md_coded){md_dataset_kind(d, i), buf, len, w, h},
                                 &image);
            if (st != MD_OK)
                md_error_prefix(st, "image %lld (%s)", (long long)i,
                                md_dataset_name(d, i, name, sizeof name));
        }
        convert_tell(&p, (int64_t)len);
    }
    md_free(buf);
    return st;
}

static md_status verify_split(const char *path, const char *split, md_comm *c, bool decode,
                              md_convert_summary *sum)
{
    md_dataset *d;
    md_decoder *decoder = NULL;
    MD_TRY(md_dataset_open(path, split, c, &d));
    md_status st = decode ? md_decoder_create(&decoder, md_dataset_max_pixels(d)) : MD_OK;
    if (st == MD_OK)
        st = verify_part(d, c, decoder);
    st = md_agree(c, st);
    sum->classes = md_dataset_classes(d);
    sum->images += md_dataset_count(d);
    for (int64_t i = 0; i < md_dataset_count(d); i++)
        sum->bytes += (int64_t)md_dataset_bytes(d, i);
    md_decoder_free(decoder);
    md_dataset_close(d);
    return st;
}

md_status md_convert_verify(const char *path, md_comm *c, md_convert_summary *sum)
{
    char splits[512], *save = NULL;
    double start = md_now();
    *sum = (md_convert_summary){0};
    MD_TRY(md_dataset_splits(path, c, splits, sizeof splits));
    for (char *s = strtok_r(splits, ", ", &save); s; s = strtok_r(NULL, ", ", &save))
        MD_TRY(verify_split(path, s, c, true, sum));
    sum->seconds = md_now() - start;
    return MD_OK;
}

/* --- publish ------------------------------------------------------------------------------- */

static md_status write_listing(const job *j)
{
    if (j->rejects == 0) {
        unlink(j->listing); /* an older one would be about another file */
        return MD_OK;
    }
    FILE *f = fopen(j->listing, "w");
    bool ok = f && fwrite(j->reasons.at, 1, (size_t)j->reasons.n, f) == (size_t)j->reasons.n;
    if ((f && fclose(f) != 0) || !ok)
        MD_FAIL(MD_ERR_IO, "%s: cannot write: %s", j->listing, strerror(errno));
    return MD_OK;
}

/* The new name reaches the disk with the folder that holds it. */
static void sync_folder(const char *path)
{
    char folder[PATH_SIZE];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash)
        slash[slash == folder] = 0;
    int fd = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return; /* some file systems do not open folders */
    fsync(fd);
    close(fd);
}

static md_status publish(const job *j)
{
    if (j->rank != 0)
        return MD_OK;
    MD_TRY(write_listing(j));
    if (md_fault("convert.publish") || rename(j->partial, j->a->out) != 0)
        MD_FAIL(MD_ERR_IO, "%s: cannot rename to %s: %s", j->partial, j->a->out, strerror(errno));
    sync_folder(j->a->out);
    return MD_OK;
}

static md_status run(job *j, md_convert_summary *sum)
{
    MD_TRY(md_agree(j->c, check_out(j)));
    MD_TRY(scan(j));
    MD_TRY(check(j));
    MD_TRY(md_agree(j->c, lay_out(j)));
    MD_TRY(write_all(j));
    for (int i = 0; i < j->table.n_splits; i++)
        if (j->store.column[i].n > 0)
            MD_TRY(verify_split(j->partial, j->table.splits[i], j->c, false, sum));
    MD_TRY(md_agree(j->c, publish(j)));
    sum->rejects = j->rejects;
    return MD_OK;
}

md_status md_convert(const md_convert_args *a, md_comm *c, md_convert_summary *sum)
{
    double start = md_now();
    *sum = (md_convert_summary){0};
    job j = {.a = a, .c = c, .rank = md_comm_rank(c), .size = md_comm_size(c)};
    md_status st = run(&j, sum);
    if (st != MD_OK && j.created)
        unlink(j.partial);
    if (st == MD_OK && j.table.skipped > 0)
        md_log_warn("%lld files beside class folders, tars or IDX files were left out",
                    (long long)j.table.skipped);
    for (int i = 0; i < CONVERT_MAX_SPLITS; i++) {
        md_free(j.store.column[i].item);
        md_free(j.store.column[i].offset);
    }
    md_free(j.reasons.at);
    md_free(j.result);
    md_free(j.cut);
    convert_table_free(&j.table);
    sum->seconds = md_now() - start;
    return st;
}
