/* convert_table: see convert_parts.h. */
#include "io/convert_parts.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL /* no library to link, compiled for this machine */
#include <xxhash.h>

#include "mpi/agree.h"

#define MAX_TEXT 8192

static const char *const known_splits[] = {"train", "val", "test"};

/* --- lists --------------------------------------------------------------------------------- */

static md_status list_reserve(convert_list *l, int64_t n)
{
    if (l->n + n <= l->cap)
        return MD_OK;
    int64_t cap = MD_MAX(l->n + n, MD_MAX(2 * l->cap, 64));
    void *grown = md_alloc((size_t)cap * l->width, "convert");
    if (!grown)
        return MD_ERR_MEMORY;
    if (l->n > 0)
        memcpy(grown, l->at, (size_t)l->n * l->width);
    md_free(l->at);
    l->at = grown;
    l->cap = cap;
    return MD_OK;
}

md_status convert_list_push(convert_list *l, const void *rows, int64_t n)
{
    MD_TRY(list_reserve(l, n));
    if (n > 0)
        memcpy((char *)l->at + (size_t)l->n * l->width, rows, (size_t)n * l->width);
    l->n += n;
    return MD_OK;
}

/* --- one table ----------------------------------------------------------------------------- */

md_status convert_table_init(convert_table *t)
{
    *t = (convert_table){.groups.width = sizeof(convert_group),
                         .items.width = sizeof(convert_item),
                         .text.width = 1,
                         .classes.width = sizeof(text_at)};
    for (size_t i = 0; i < MD_COUNT(known_splits); i++)
        snprintf(t->splits[i], CONVERT_SPLIT_NAME, "%s", known_splits[i]);
    t->n_splits = (int)MD_COUNT(known_splits);
    return convert_list_push(&t->text, "", 1);
}

void convert_table_free(convert_table *t)
{
    md_free(t->groups.at);
    md_free(t->items.at);
    md_free(t->text.at);
    md_free(t->classes.at);
    md_free(t->slots);
    *t = (convert_table){0};
}

md_status convert_text(convert_table *t, text_at *at, const char *fmt, ...)
{
    char buf[MAX_TEXT];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(buf, sizeof buf, fmt, ap);
    va_end(ap);
    if (n < 0 || n >= MAX_TEXT)
        MD_FAIL(MD_ERR_DATA, "a name is longer than %d bytes: %.60s...", MAX_TEXT - 1, buf);
    *at = t->text.n;
    return convert_list_push(&t->text, buf, n + 1);
}

const char *convert_text_of(const convert_table *t, text_at at)
{
    return (const char *)t->text.at + at;
}

convert_group *convert_group_of(const convert_table *t, int64_t g)
{
    return (convert_group *)t->groups.at + g;
}

convert_item *convert_item_of(const convert_table *t, int64_t i)
{
    return (convert_item *)t->items.at + i;
}

const char *convert_class_name(const convert_table *t, int64_t k)
{
    return convert_text_of(t, ((const text_at *)t->classes.at)[k]);
}

/* The slot of a class, or the free one where it belongs. */
static int32_t *class_slot(const convert_table *t, const char *name)
{
    uint64_t mask = (uint64_t)t->n_slots - 1, s = XXH3_64bits(name, strlen(name)) & mask;
    while (t->slots[s] >= 0 && strcmp(convert_class_name(t, t->slots[s]), name) != 0)
        s = (s + 1) & mask;
    return &t->slots[s];
}

/* At most half of the slots are taken. */
static md_status grow_slots(convert_table *t)
{
    if (2 * (t->classes.n + 1) <= t->n_slots)
        return MD_OK;
    md_free(t->slots);
    t->n_slots = MD_MAX(4 * t->n_slots, 256);
    t->slots = md_alloc((size_t)t->n_slots * sizeof *t->slots, "convert");
    if (!t->slots)
        return MD_ERR_MEMORY;
    memset(t->slots, 0xff, (size_t)t->n_slots * sizeof *t->slots);
    for (int32_t k = 0; k < t->classes.n; k++)
        *class_slot(t, convert_class_name(t, k)) = k;
    return MD_OK;
}

md_status convert_class(convert_table *t, const char *name, int32_t *number)
{
    *number = -1;
    if (!*name)
        return MD_OK;
    /* Images of a class come together: look at the last one first. */
    if (t->classes.n > 0 && strcmp(convert_class_name(t, t->last_class), name) == 0) {
        *number = t->last_class;
        return MD_OK;
    }
    MD_TRY(grow_slots(t));
    int32_t *slot = class_slot(t, name);
    if (*slot < 0) {
        text_at at;
        MD_TRY(convert_text(t, &at, "%s", name));
        MD_TRY(convert_list_push(&t->classes, &at, 1));
        *slot = (int32_t)t->classes.n - 1;
    }
    *number = t->last_class = *slot;
    return MD_OK;
}

md_status convert_split(convert_table *t, const char *name, int32_t *number)
{
    for (int i = 0; i < t->n_splits; i++)
        if (strcmp(t->splits[i], name) == 0) {
            *number = i;
            return MD_OK;
        }
    size_t n = strlen(name);
    if (n == 0 || n >= CONVERT_SPLIT_NAME || strcmp(name, "classes") == 0 ||
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") != n)
        MD_FAIL(MD_ERR_USAGE, "'%s' cannot be the name of a split (letters, digits, _ and -)",
                name);
    if (t->n_splits == CONVERT_MAX_SPLITS)
        MD_FAIL(MD_ERR_USAGE, "more than %d splits", CONVERT_MAX_SPLITS);
    memcpy(t->splits[t->n_splits], name, n + 1);
    *number = t->n_splits++;
    return MD_OK;
}

int32_t convert_split_word(const char *word, size_t n)
{
    for (size_t i = 0; i < MD_COUNT(known_splits); i++)
        if (strlen(known_splits[i]) == n && memcmp(known_splits[i], word, n) == 0)
            return (int32_t)i;
    return n == 10 && memcmp(word, "validation", n) == 0 ? 1 : -1;
}

/* --- between ranks ------------------------------------------------------------------------- */

static md_status list_bcast(convert_list *l, md_comm *c, int root)
{
    int64_t n = l->n;
    md_comm_bcast(c, &n, sizeof n, root);
    if (md_comm_rank(c) != root)
        l->n = 0;
    MD_TRY(md_agree(c, list_reserve(l, n - l->n)));
    l->n = n;
    if (n > 0)
        md_comm_bcast(c, l->at, n * (int64_t)l->width, root);
    return MD_OK;
}

md_status convert_table_bcast(convert_table *t, md_comm *c)
{
    MD_TRY(list_bcast(&t->groups, c, 0));
    MD_TRY(list_bcast(&t->items, c, 0));
    MD_TRY(list_bcast(&t->text, c, 0));
    MD_TRY(list_bcast(&t->classes, c, 0));
    md_comm_bcast(c, t->splits, sizeof t->splits, 0);
    md_comm_bcast(c, &t->n_splits, sizeof t->n_splits, 0);
    md_comm_bcast(c, &t->skipped, sizeof t->skipped, 0);
    /* Rank 0's slots fit its classes; the others' are made from them. */
    md_free(t->slots);
    t->slots = NULL;
    t->n_slots = MD_MAX(t->n_slots, 4 * t->classes.n);
    t->last_class = 0;
    return md_agree(c, grow_slots(t));
}

/* Appends the rows of `from` with their texts and classes moved to t. */
static md_status append_items(convert_table *t, const convert_table *from)
{
    text_at shift = t->text.n;
    MD_TRY(convert_list_push(&t->text, from->text.at, from->text.n));
    int32_t *number;
    MD_NEW(number, from->classes.n, "convert");
    md_status st = MD_OK;
    for (int64_t k = 0; st == MD_OK && k < from->classes.n; k++)
        st = convert_class(t, convert_class_name(from, k), &number[k]);
    int64_t first = t->items.n;
    if (st == MD_OK)
        st = convert_list_push(&t->items, from->items.at, from->items.n);
    for (int64_t i = first; st == MD_OK && i < t->items.n; i++) {
        convert_item *it = convert_item_of(t, i);
        it->name += shift;
        it->label = it->label < 0 ? -1 : number[it->label];
    }
    md_free(number);
    return st;
}

/* Stable: items of a group keep the order in which they were found. */
static md_status sort_by_group(convert_table *t)
{
    int64_t *start;
    convert_item *sorted;
    MD_NEW(start, t->groups.n + 1, "convert");
    sorted = md_alloc((size_t)t->items.n * sizeof *sorted, "convert");
    if (!sorted) {
        md_free(start);
        return MD_ERR_MEMORY;
    }
    for (int64_t i = 0; i < t->items.n; i++)
        start[convert_item_of(t, i)->group + 1]++;
    for (int64_t g = 0; g < t->groups.n; g++)
        start[g + 1] += start[g];
    for (int64_t i = 0; i < t->items.n; i++)
        sorted[start[convert_item_of(t, i)->group]++] = *convert_item_of(t, i);
    md_free(t->items.at);
    t->items.at = sorted;
    t->items.cap = t->items.n;
    md_free(start);
    return MD_OK;
}

typedef struct class_row {
    const char *name;
    int64_t number;
} class_row;

static int by_name(const void *a, const void *b)
{
    return strcmp(((const class_row *)a)->name, ((const class_row *)b)->name);
}

/* Decimal numbers without leading zeros. */
static int by_number(const void *a, const void *b)
{
    size_t x = strlen(((const class_row *)a)->name), y = strlen(((const class_row *)b)->name);
    return x != y ? (x > y) - (x < y) : by_name(a, b);
}

static md_status sort_classes(convert_table *t)
{
    class_row *row;
    int64_t n = t->classes.n;
    bool numbers = true;
    for (int64_t g = 0; g < t->groups.n; g++)
        numbers = numbers && convert_group_of(t, g)->kind == CONVERT_IDX;
    MD_NEW(row, n, "convert");
    int32_t *becomes = md_alloc((size_t)n * sizeof *becomes, "convert");
    if (!becomes) {
        md_free(row);
        return MD_ERR_MEMORY;
    }
    text_at *class = t->classes.at;
    for (int64_t k = 0; k < n; k++)
        row[k] = (class_row){convert_class_name(t, k), k};
    if (n > 0)
        qsort(row, (size_t)n, sizeof *row, numbers ? by_number : by_name);
    for (int64_t k = 0; k < n; k++) {
        becomes[row[k].number] = (int32_t)k;
        class[k] = row[k].name - (const char *)t->text.at;
    }
    for (int64_t i = 0; i < t->items.n; i++) {
        convert_item *it = convert_item_of(t, i);
        it->label = it->label < 0 ? -1 : becomes[it->label];
    }
    md_free(becomes);
    md_free(row);
    return MD_OK;
}

md_status convert_table_merge(convert_table *t, const convert_table *mine, md_comm *c)
{
    for (int r = 0; r < md_comm_size(c); r++) {
        convert_table part;
        md_status st = convert_table_init(&part);
        if (st == MD_OK && r == md_comm_rank(c)) {
            part.text.n = 0;
            st = convert_list_push(&part.text, mine->text.at, mine->text.n);
            if (st == MD_OK)
                st = convert_list_push(&part.classes, mine->classes.at, mine->classes.n);
            if (st == MD_OK)
                st = convert_list_push(&part.items, mine->items.at, mine->items.n);
        }
        st = md_agree(c, st);
        if (st == MD_OK)
            st = list_bcast(&part.text, c, r);
        if (st == MD_OK)
            st = list_bcast(&part.classes, c, r);
        if (st == MD_OK)
            st = list_bcast(&part.items, c, r);
        if (st == MD_OK)
            st = md_agree(c, append_items(t, &part));
        convert_table_free(&part);
        MD_TRY(st);
    }
    md_status st = sort_by_group(t);
    return md_agree(c, st == MD_OK ? sort_classes(t) : st);
}
