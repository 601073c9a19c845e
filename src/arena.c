/* arena: see arena.h. Quadratic in the number of blocks, which is a few thousand at most. */
#include "src/arena.h"

#include <stdlib.h>

#define ALIGN ((size_t)64)

/* Order: larger first; ties by index so that the plan is the same everywhere. */
static int larger_first(const void *a, const void *b)
{
    const md_arena_block *x = *(md_arena_block *const *)a, *y = *(md_arena_block *const *)b;
    if (x->bytes != y->bytes)
        return x->bytes > y->bytes ? -1 : 1;
    return (x > y) - (x < y);
}

/* Puts block b at the lowest offset that is free among `placed`, which is sorted by offset. */
static size_t lowest_gap(const md_arena_block *b, md_arena_block *const *placed, int n)
{
    size_t at = 0;
    for (int i = 0; i < n; i++) {
        const md_arena_block *p = placed[i];
        if (p->first > b->last || p->last < b->first)
            continue;
        if (at + b->bytes <= p->offset)
            break;
        at = MD_MAX(at, (p->offset + p->bytes + ALIGN - 1) / ALIGN * ALIGN);
    }
    return at;
}

static void insert_sorted(md_arena_block **placed, int n, md_arena_block *b)
{
    int i = n;
    for (; i > 0 && placed[i - 1]->offset > b->offset; i--)
        placed[i] = placed[i - 1];
    placed[i] = b;
}

md_status md_arena_plan(md_arena_block *blocks, int n, size_t *region)
{
    md_arena_block **order, **placed;
    MD_NEW(order, n + 1, "arena plan");
    placed = md_alloc(sizeof *placed * (size_t)(n + 1), "arena plan");
    if (!placed) {
        md_free(order);
        return MD_ERR_MEMORY;
    }
    for (int i = 0; i < n; i++)
        order[i] = &blocks[i];
    qsort(order, (size_t)n, sizeof *order, larger_first);
    *region = 0;
    for (int i = 0; i < n; i++) {
        order[i]->offset = lowest_gap(order[i], placed, i);
        insert_sorted(placed, i, order[i]);
        *region = MD_MAX(*region, (order[i]->offset + order[i]->bytes + ALIGN - 1) / ALIGN * ALIGN);
    }
    md_free(order);
    md_free(placed);
    return MD_OK;
}
