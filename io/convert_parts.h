/* convert_parts: what the files of the converter share; not for others.
 *
 * A group is what one rank scans at a time (a class folder, a tar, a tar inside a tar, an IDX
 * pair); an item is one candidate image in it. Both live in a table without pointers: texts are
 * offsets into an arena, so that a table can be sent to other ranks as it is. */
#ifndef MD_CONVERT_PARTS_H
#define MD_CONVERT_PARTS_H

#include "io/convert.h"
#include "io/decode.h"

/* Larger images are rejects; this bounds the buffer of a rank. */
#define CONVERT_MAX_IMAGE  ((int64_t)256 << 20)
#define CONVERT_MAX_SPLITS 8
#define CONVERT_SPLIT_NAME 32

typedef enum convert_kind { CONVERT_FOLDER, CONVERT_TAR, CONVERT_IDX } convert_kind;

typedef int64_t text_at; /* offset of a NUL-terminated text in a table's arena; 0 is "" */

typedef struct convert_group {
    text_at path;      /* the folder, or the file that holds the images */
    text_at labels;    /* IDX: the labels file */
    text_at prefix;    /* in front of the names of its images */
    text_at class;     /* class of images that name none; "" = no label */
    int64_t at, bytes; /* TAR: range of the archive in the (decompressed) file */
    int32_t kind, split;
    int32_t scanned; /* its items are in the table already */
} convert_group;

typedef struct convert_item {
    text_at name;      /* as stored */
    int64_t at, bytes; /* range in the group's (decompressed) file; a folder's files are whole */
    int32_t group, split;
    int32_t label;     /* class of the table, -1 = none */
    int32_t file_from; /* FOLDER: the file is <group's path>/<name + file_from> */
    int32_t w, h;      /* IDX; 0 for coded images */
} convert_item;

/* A growing array of rows of `width` bytes. */
typedef struct convert_list {
    void *at;
    int64_t n, cap;
    size_t width;
} convert_list;

typedef struct convert_table {
    convert_list groups, items, text, classes; /* convert_group, convert_item, char, text_at */
    int32_t *slots;                            /* hash table: class or -1 */
    int64_t n_slots;
    int32_t last_class;
    char splits[CONVERT_MAX_SPLITS][CONVERT_SPLIT_NAME];
    int n_splits;
    int64_t skipped; /* files beside class folders, which are no candidates */
} convert_table;

/* --- convert_table.c: Local unless it says Collective. MD_ERR_MEMORY. --- */

md_status convert_list_push(convert_list *l, const void *rows, int64_t n);
/* An empty table with the splits train, val, test. */
md_status convert_table_init(convert_table *t);
void convert_table_free(convert_table *t);
md_status convert_text(convert_table *t, text_at *at, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
const char *convert_text_of(const convert_table *t, text_at at);
convert_group *convert_group_of(const convert_table *t, int64_t g);
convert_item *convert_item_of(const convert_table *t, int64_t i);
const char *convert_class_name(const convert_table *t, int64_t k);
/* Number of a class, which is added when new; -1 for "". */
md_status convert_class(convert_table *t, const char *name, int32_t *number);
/* Number of a split, which is added when new (MD_ERR_USAGE: a name that cannot be one). */
md_status convert_split(convert_table *t, const char *name, int32_t *number);
/* train, val (also validation) or test by a folder's name, else -1. */
int32_t convert_split_word(const char *word, size_t n);
/* Collective(c): every rank gets rank 0's table. */
md_status convert_table_bcast(convert_table *t, md_comm *c);
/* Collective(c): t, alike on all ranks, gets the items of every rank's `mine` in the order of their
 * groups, and its classes sorted: by name, or by number when all come from IDX files. */
md_status convert_table_merge(convert_table *t, const convert_table *mine, md_comm *c);

/* --- convert_read.c: Local --- */

typedef struct convert_reader convert_reader;
md_status convert_reader_create(convert_reader **out);
void convert_reader_free(convert_reader *r);
/* Up to n bytes at `at` of a file, through gzip where it is compressed (offsets count decompressed
 * bytes; cheap in ascending order only); *got < n at its end. The file stays open until another one
 * is asked for. MD_ERR_NOINPUT, MD_ERR_IO, MD_ERR_DATA (damaged gzip). */
md_status convert_read(convert_reader *r, const char *path, int64_t at, void *buf, size_t n,
                       size_t *got);
/* Length of a plain file, -1 for a compressed one. */
md_status convert_file_bytes(convert_reader *r, const char *path, int64_t *bytes);
/* All bytes of an item; *bytes stays valid until the next call. MD_ERR_DATA: its file is shorter.
 */
md_status convert_read_item(convert_reader *r, const convert_table *t, const convert_item *it,
                            const uint8_t **bytes);

/* --- convert_tar.c: Local --- */

typedef struct tar_walk {
    convert_reader *reader;
    const char *path;  /* the file */
    int64_t next, end; /* next header; end of the archive, -1 = unknown (gzip) */
    char name[4096];   /* of the current member */
    int64_t at, bytes; /* its contents in the file */
    uint8_t head[512]; /* its first bytes, or what follows a shorter member */
    size_t head_bytes;
} tar_walk;
/* True when the bytes begin with a tar header. */
bool tar_is_header(const uint8_t *bytes, size_t n);
/* Goes to the next regular file; *more = false at the end. MD_ERR_DATA: damaged or cut. */
md_status tar_next(tar_walk *w, bool *more);

/* --- convert_idx.c: Local --- */

typedef struct idx_pair {
    const char *images, *labels; /* the files; the caller sets these, idx_open the rest */
    int64_t n, w, h, first;      /* first: offset of image 0 in its file */
} idx_pair;
/* True when the bytes begin an IDX file of unsigned bytes with `rank` dimensions. */
bool idx_is_header(const uint8_t *bytes, size_t n, int rank);
/* The file of "train-labels-idx1-ubyte" that belongs to "train-images-idx3-ubyte.gz", with or
 * without .gz; false when neither is there, `labels` then being the last one tried. */
bool idx_find_labels(const char *images, char *labels, size_t size);
/* Checks both files in full: MD_ERR_DATA. */
md_status idx_open(convert_reader *r, idx_pair *pair);
md_status idx_label(convert_reader *r, const idx_pair *pair, int64_t i, int *label);

/* --- convert_scan.c: Local --- */

/* Fills the groups of t from the sources, and the items of tars read on the way. */
md_status convert_plan(convert_table *t, const md_convert_source *sources, int n);
/* Adds the items of group g of t to `mine`. */
md_status convert_scan(const convert_table *t, int32_t g, convert_table *mine);

/* --- convert_write.c: Local --- */

/* What checking found about an item. */
typedef struct convert_result {
    uint64_t xxh3;
    uint16_t w, h;
    uint8_t kind;
    uint8_t good; /* 0: a reject */
} convert_result;

/* The good items of a split in stored order. */
typedef struct convert_column {
    int64_t n, data_at; /* data_at: of /<split>/data in the file */
    int64_t *item;      /* [n] */
    int64_t *offset;    /* [n + 1] */
} convert_column;

typedef struct convert_store {
    const char *path; /* of the file under work */
    const convert_table *table;
    const convert_result *result;
    convert_column column[CONVERT_MAX_SPLITS];
    char order[64], source[256];
} convert_store;

/* Rank 0 tells now and then how far its own part of a pass is. */
typedef struct convert_progress {
    const char *doing;
    int64_t images, done, total; /* done, total: bytes */
    int ranks;
    double start, told;
} convert_progress;
void convert_tell(convert_progress *p, int64_t bytes);

/* Creates the file with all but the image bytes, whose space it reserves; sets data_at.
 * MD_ERR_CREATE, MD_ERR_IO (disk full). */
md_status convert_create(convert_store *s);
/* Writes the good ones of the items lo .. hi - 1 where they belong and forces them to the disk.
 * MD_ERR_IO, MD_ERR_DATA (a source changed since it was checked). */
md_status convert_write_items(const convert_store *s, int64_t lo, int64_t hi, convert_progress *p);

#endif
