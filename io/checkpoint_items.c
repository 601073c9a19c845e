/* checkpoint_items: where a rank's blocks lie in their arrays, and the hashes of items and states.
 * Nothing here touches a file. */
#include "io/checkpoint_parts.h"

#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

static int64_t elements(const md_state_item *item)
{
    int64_t n = 1;
    for (int d = 0; d < item->rank; d++)
        n *= item->global[d];
    return n;
}

int64_t md_ckpt_item_bytes(const md_state_item *item)
{
    return elements(item) * (int64_t)md_dtype_bytes(item->dtype);
}

md_status md_state_list_make(int most, md_state_list *out)
{
    *out = (md_state_list){0};
    MD_NEW(out->item, most, "checkpoint items");
    out->name = md_alloc((size_t)most * sizeof *out->name, "checkpoint items");
    return out->name ? MD_OK : MD_ERR_MEMORY;
}

void md_state_list_free(md_state_list *l)
{
    md_free(l->item);
    md_free(l->name);
    *l = (md_state_list){0};
}

md_state_item md_state_item_make(const char *name, const md_tensor *t)
{
    md_state_item item = {.name = name, .dtype = (md_dtype)t->dtype, .rank = t->rank};
    memcpy(item.global, t->dim, sizeof item.global);
    item.data = t->data;
    item.count = elements(&item);
    item.view = (md_view){0, item.count, item.count, 1};
    return item;
}

static int64_t round_up(int64_t bytes)
{
    return md_ckpt_blocks(bytes) * MD_CKPT_BLOCK;
}

void md_state_items_share(md_state_item *item, int items, int part, int parts)
{
    int64_t total = 0, base = 0;
    for (int i = 0; i < items; i++)
        total += md_ckpt_item_bytes(&item[i]);
    int64_t begin = total * part / parts, end = total * (part + 1) / parts;
    for (int i = 0; i < items; i++) {
        md_state_item *it = &item[i];
        int64_t bytes = md_ckpt_item_bytes(it), width = (int64_t)md_dtype_bytes(it->dtype);
        MD_ASSERT(it->view.runs == 1 && it->lo == 0 && it->count * width == bytes,
                  "%s is not whole", it->name);
        int64_t lo = MD_MIN(round_up(MD_MAX(begin - base, 0)), bytes);
        int64_t hi = MD_MIN(round_up(MD_MAX(end - base, 0)), bytes);
        it->lo = lo / width;
        it->count = (hi - lo) / width;
        it->data = (char *)it->data + lo;
        base += bytes;
    }
}

md_status md_ckpt_item_check(const md_state_item *item)
{
    const md_view *v = &item->view;
    if (item->count == 0)
        return MD_OK;
    bool ok = v->first >= 0 && v->run > 0 && v->runs > 0 && (v->runs == 1 || v->stride >= v->run) &&
              v->first + (v->runs - 1) * v->stride + v->run <= elements(item) && item->lo >= 0 &&
              item->count > 0 && item->lo + item->count <= v->run * v->runs;
    if (!ok)
        MD_FAIL(
            MD_ERR_BUG,
            "checkpoint item %s of %lld elements: [%lld, %lld) of %lld runs of %lld, %lld apart, "
            "from %lld",
            item->name, (long long)elements(item), (long long)item->lo,
            (long long)(item->lo + item->count), (long long)v->runs, (long long)v->run,
            (long long)v->stride, (long long)v->first);
    return MD_OK;
}

/* The view in as few runs as can be: those that meet are one. */
static md_view joined(const md_view *v)
{
    int64_t n = v->run * v->runs;
    return v->stride == v->run ? (md_view){v->first, n, n, 1} : *v;
}

bool md_ckpt_piece_next(const md_state_item *item, int64_t unit, md_ckpt_piece *p)
{
    int64_t width = (int64_t)md_dtype_bytes(item->dtype), left = item->count * width - p->done;
    if (left == 0)
        return false;
    md_view v = joined(&item->view);
    int64_t at = item->lo * width + p->done, run = v.run * width; /* in bytes of the view */
    p->data = (const char *)item->data + p->done;
    p->lo = (v.first + at / run * v.stride) * width + at % run;
    p->hi = p->lo + MD_MIN(left, run - at % run);
    p->hi = MD_MIN(p->hi, (p->lo / unit + 1) * unit);
    p->done += p->hi - p->lo;
    return true;
}

/* Copies what the block and the array's bytes [lo, hi) at buf have in common, from or to the block.
 */
static void copy(const md_state_item *item, int64_t lo, int64_t hi, char *buf, bool to_block)
{
    if (item->count == 0)
        return;
    int64_t width = (int64_t)md_dtype_bytes(item->dtype), end = item->lo + item->count;
    md_view v = joined(&item->view);
    int64_t first = lo / width - v.first - v.run; /* runs up to here end in front of lo */
    int64_t k = MD_MAX(first < 0 ? 0 : first / v.stride + 1, item->lo / v.run);
    for (; k * v.run < end && (v.first + k * v.stride) * width < hi; k++) {
        int64_t from = MD_MAX(k * v.run, item->lo), to = MD_MIN((k + 1) * v.run, end);
        int64_t at = (v.first + k * v.stride + from - k * v.run) * width;
        int64_t a = MD_MAX(at, lo), b = MD_MIN(at + (to - from) * width, hi);
        if (a >= b)
            continue;
        char *here = (char *)item->data + (from - item->lo) * width + (a - at);
        char *there = buf + (a - lo);
        memcpy(to_block ? here : there, to_block ? there : here, (size_t)(b - a));
    }
}

void md_ckpt_scatter(const md_state_item *item, int64_t lo, int64_t hi, char *buf)
{
    copy(item, lo, hi, buf, true);
}

void md_ckpt_gather(const md_state_item *item, int64_t lo, int64_t hi, char *buf)
{
    copy(item, lo, hi, buf, false);
}

static int64_t ends(int64_t lo, int64_t hi)
{
    return (int64_t)(XXH3_64bits(&hi, sizeof hi) - XXH3_64bits(&lo, sizeof lo)) &
           MD_CKPT_COVER_MASK;
}

md_ckpt_cover md_ckpt_cover_block(const md_state_item *item)
{
    md_ckpt_cover c = {0, 0};
    for (md_ckpt_piece p = {0}; md_ckpt_piece_next(item, INT64_MAX, &p);) {
        c.bytes += p.hi - p.lo;
        c.ends = (c.ends + ends(p.lo, p.hi)) & MD_CKPT_COVER_MASK;
    }
    return c;
}

md_ckpt_cover md_ckpt_cover_whole(const md_state_item *item)
{
    int64_t bytes = md_ckpt_item_bytes(item);
    return (md_ckpt_cover){bytes, ends(0, bytes)};
}

int64_t md_ckpt_blocks(int64_t bytes)
{
    return (bytes + MD_CKPT_BLOCK - 1) / MD_CKPT_BLOCK;
}

uint64_t md_ckpt_hash(const uint64_t *block, int64_t blocks)
{
    return XXH3_64bits(block, (size_t)blocks * sizeof *block);
}

static int by_name(const void *a, const void *b)
{
    const md_state_entry *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

md_status md_ckpt_hash_state(const md_state_entry *entry, int entries, uint64_t *hash)
{
    const md_state_entry **sorted;
    MD_NEW(sorted, entries, "checkpoint entries");
    for (int i = 0; i < entries; i++)
        sorted[i] = &entry[i];
    qsort(sorted, (size_t)entries, sizeof *sorted, by_name);
    XXH3_state_t state;
    XXH3_64bits_reset(&state);
    for (int i = 0; i < entries; i++) {
        const md_state_entry *e = sorted[i];
        const char *type = md_dtype_name((md_dtype)e->dtype);
        int64_t word[2 + MD_MAX_RANK] = {e->rank};
        memcpy(word + 1, e->global, sizeof e->global);
        memcpy(word + 1 + MD_MAX_RANK, &e->xxh3, sizeof e->xxh3);
        XXH3_64bits_update(&state, e->name, strlen(e->name) + 1);
        XXH3_64bits_update(&state, type, strlen(type) + 1);
        XXH3_64bits_update(&state, word, sizeof word);
    }
    *hash = XXH3_64bits_digest(&state);
    md_free(sorted);
    return MD_OK;
}
