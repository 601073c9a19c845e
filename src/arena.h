/* arena: gives blocks with known lifetimes offsets in one region, so that blocks that are never
 * alive together share memory. Planned once at setup; nothing is allocated during a step. */
#ifndef MD_ARENA_H
#define MD_ARENA_H

#include "src/base.h"

typedef struct md_arena_block {
    size_t bytes;
    int first, last; /* inclusive time steps during which the block holds a live value */
    size_t offset;   /* result; multiple of 64 */
} md_arena_block;

/* Sets every block's offset and returns the bytes of the region. Largest block first, each into the
 * lowest gap between the blocks it overlaps in time (greedy by size). Local. MD_ERR_MEMORY only. */
md_status md_arena_plan(md_arena_block *blocks, int n, size_t *region);

#endif
