/* checkpoint_state: what the tests of checkpoints share: a folder, and a state whose arrays any
 * number of ranks hold in parts of every kind: whole, cut along any dimension, in interleaved
 * parts, and ranges of such a part that start and end anywhere. */
#ifndef MD_CHECKPOINT_STATE_H
#define MD_CHECKPOINT_STATE_H

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/checkpoint.h"

#ifndef assert_ok
#define assert_ok(expr)                                                          \
    do {                                                                         \
        md_status ok_ = (expr);                                                  \
        if (ok_ != MD_OK)                                                        \
            fail_msg("%s: %s: %s", #expr, md_status_name(ok_), md_error_text()); \
    } while (0)
#endif

/* ---- the folder ---- */

static char dir[256];

static inline bool make_dir(void)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/md-ckpt-XXXXXX", tmp ? tmp : "/tmp");
    return mkdtemp(dir) != NULL;
}

static inline void empty_dir(void)
{
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        char path[600];
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        if (e->d_name[0] != '.')
            assert_int_equal(remove(path), 0);
    }
    closedir(d);
}

/* How many names in the folder end so. */
static inline int files(const char *ending)
{
    int n = 0;
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        size_t a = strlen(e->d_name), b = strlen(ending);
        n += a >= b && strcmp(e->d_name + a - b, ending) == 0;
    }
    closedir(d);
    return n;
}

/* ---- the state ---- */

enum { BIG = 3, PROJ = 7, ITEMS = 8 };

static const struct {
    const char *name;
    md_dtype dtype;
    int rank;
    int64_t dim[MD_MAX_RANK];
} shape[ITEMS] = {
    {"param/patch.weight", MD_F32, 4, {12, 3, 4, 4}},
    {"param/blocks.0.attn.qkv.weight", MD_F32, 2, {768, 513}}, /* 1.5 MiB: two 1 MiB blocks */
    {"param/blocks.0.attn.q_bias", MD_F32, 1, {37}},
    {"m/big", MD_F32, 1, {700001}},
    {"v/cube", MD_F64, 3, {5, 7, 11}},
    {"counter", MD_I64, 1, {1}},
    {"bytes", MD_U8, 2, {9, 13}},
    {"param/blocks.0.attn.proj.weight", MD_F32, 2, {96, 4099}}, /* cut by columns: runs of KiB */
};

static inline int64_t product(const int64_t *dim, int n)
{
    int64_t p = 1;
    for (int d = 0; d < n; d++)
        p *= dim[d];
    return p;
}

/* The value of element e of item i, as bytes. */
static inline void value_of(int i, int64_t e, unsigned char *out)
{
    int64_t v = (e * 31 + i * 7) % 8191;
    float f = (float)v;
    double g = (double)v;
    uint8_t b = (uint8_t)v;
    const void *from = shape[i].dtype == MD_F32   ? (void *)&f
                       : shape[i].dtype == MD_F64 ? (void *)&g
                       : shape[i].dtype == MD_I64 ? (void *)&v
                                                  : (void *)&b;
    memcpy(out, from, md_dtype_bytes(shape[i].dtype));
}

/* Item i as a whole, without memory. */
static inline md_state_item whole_item(int i)
{
    md_tensor t = md_tensor_make(NULL, shape[i].dtype, shape[i].rank, shape[i].dim);
    return md_state_item_make(shape[i].name, &t);
}

/* Part `part` of `of` of item i, cut along dimension d in `parts` interleaved parts (1 when they do
 * not divide it). */
static inline md_view cut_view(int i, int d, int parts, int part, int of)
{
    const int64_t *dim = shape[i].dim;
    int64_t p = dim[d] % parts == 0 ? parts : 1, n = dim[d] / p;
    int64_t inner = product(dim + d + 1, shape[i].rank - d - 1), lo = n * part / of;
    return (md_view){lo * inner, (n * (part + 1) / of - lo) * inner, n * inner,
                     product(dim, d) * p};
}

/* Rounds of cuts; each item has another one in each round. In the last ones all matrices are cut by
 * rows or by columns. */
enum { ROUNDS = 15, ROWS = ROUNDS, COLUMNS };

/* Rank `rank` of `size` holds a range of a cut part: the ranks are `size / cut` owners of each of
 * `cut` parts. */
static inline void cut_item(md_state_item *it, int i, int round, int rank, int size)
{
    int k = i + round, cut = k % 3 == 0 ? 1 : k % 3 == 1 && size % 2 == 0 ? 2 : size;
    int d = k % shape[i].rank, parts = round % 2 ? 3 : 1;
    if (round >= ROWS) {
        cut = size;
        d = round == COLUMNS ? shape[i].rank - 1 : 0;
        parts = 1;
    }
    int owners = size / cut, owner = rank / cut;
    *it = whole_item(i);
    it->view = cut_view(i, d, parts, rank % cut, cut);
    int64_t n = it->view.run * it->view.runs;
    it->lo = n * owner / owners;
    it->count = n * (owner + 1) / owners - it->lo;
}

/* The rank's block of item i in this round, with memory of its own. In every fifth case the last
 * rank has it all, or, for reading, every rank. */
static inline void make_item(md_state_item *it, int i, int round, int rank, int size, bool reading)
{
    if (round < ROWS && (i + round) % 5 == 4) {
        *it = whole_item(i);
        if (rank < size - 1 && !reading)
            it->count = 0;
    } else {
        cut_item(it, i, round, rank, size);
    }
    it->data = md_alloc((size_t)it->count * md_dtype_bytes(it->dtype), "test");
    assert_non_null(it->data);
}

static inline void make_items(md_state_item *it, int round, int rank, int size, bool reading)
{
    for (int i = 0; i < ITEMS; i++)
        make_item(&it[i], i, round, rank, size, reading);
}

static inline void free_items(md_state_item *it)
{
    for (int i = 0; i < ITEMS; i++)
        md_free(it[i].data);
}

static inline void put_values(md_state_item *it)
{
    for (int i = 0; i < ITEMS; i++)
        for (int64_t k = 0; k < it[i].count; k++)
            value_of(i, md_view_global(&it[i].view, it[i].lo + k),
                     (unsigned char *)it[i].data + (size_t)k * md_dtype_bytes(it[i].dtype));
}

static inline void check_values(const md_state_item *it)
{
    for (int i = 0; i < ITEMS; i++) {
        size_t width = md_dtype_bytes(it[i].dtype);
        for (int64_t k = 0; k < it[i].count; k++) {
            unsigned char want[8];
            int64_t e = md_view_global(&it[i].view, it[i].lo + k);
            value_of(i, e, want);
            if (memcmp((char *)it[i].data + (size_t)k * width, want, width) != 0)
                fail_msg("element %lld of %s", (long long)e, it[i].name);
        }
    }
}

#endif
