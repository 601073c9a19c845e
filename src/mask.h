/* mask: which patches of an image are hidden from the student. One row of md_mask_kind per way of
 * choosing; every way gives exactly `count` patches, so that shapes never depend on the draw.
 *
 * A mask is a pure function of (seed, epoch, global sample): the same on every process grid. */
#ifndef MD_MASK_H
#define MD_MASK_H

#include "src/base.h"
#include "src/config.h"

typedef struct md_mask_kind md_mask_kind;

/* Lives as long as the caller wants; holds no pointers but the constant row `kind`. */
typedef struct md_mask_args {
    const md_mask_kind *kind;
    int grid_h, grid_w; /* patches */
    int count;          /* patches to mask, 0 .. grid_h * grid_w */
    int min_block;      /* least area of a block, patches (block) */
    double
        aspect; /* least height / width of a block, in (0, 1]; the largest is its inverse (block) */
    uint64_t seed;
} md_mask_args;

/* What the block sampler did before the exact-count fix-up. */
typedef struct md_mask_stats {
    int raw_count; /* patches masked by blocks */
    int blocks;    /* blocks placed */
} md_mask_stats;

/* The row of that name ("block", "random", "none"), NULL when there is none. Local. */
const md_mask_kind *md_mask_kind_find(const char *name);

/* Patches to mask on the student's grid: 0 for kind none, method.mask.count where it is set, else
 * method.mask.ratio of the grid rounded to the nearest whole number. Local. */
int64_t md_mask_count(const md_config *c);

/* Fills *a from the config. MD_ERR_CONFIG for an unknown kind, or a count that is 0 (kind none
 * excepted) or more than the grid has. Local. */
md_status md_mask_args_make(const md_config *c, md_mask_args *a);

/* No mask, on the config's grid. Local. */
md_mask_args md_mask_args_none(const md_config *c);

/* Draws the mask of one image: mask u8 [grid_h * grid_w] row-major, 1 = masked; index i32 [count]
 * the masked positions in rising order; stats optional, zero for kinds without blocks. Allocates
 * nothing. Thread-safe. Local. Source of kind block: BEiT v2 (microsoft/unilm,
 * beit2/masking_generator.py), which tops a short mask up to the exact count; of kind random: MAE
 * (arXiv 2111.06377, section 3). */
void md_mask_sample(const md_mask_args *a, uint32_t epoch, int64_t sample, uint8_t *mask,
                    int32_t *index, md_mask_stats *stats);

#endif
