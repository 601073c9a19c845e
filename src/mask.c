/* mask: the kinds of masks and the exact-count top-up they share.
 *
 * Invariant: a kind only ever adds patches and never exceeds args.count, so topping up is the only
 * correction needed. */
#include "src/mask.h"

#include "src/rng.h"

#include <math.h>
#include <string.h>

#define BLOCK_TRIES 10

struct md_mask_kind {
    const char *name;
    /* Adds to the zeroed mask, at most a->count patches. */
    void (*draw)(const md_mask_args *a, md_rng *rng, uint8_t *mask, md_mask_stats *stats);
};

typedef struct rect {
    int top, left, h, w;
} rect;

static int window_count(const md_mask_args *a, const uint8_t *mask, rect r)
{
    int n = 0;
    for (int y = r.top; y < r.top + r.h; y++)
        for (int x = r.left; x < r.left + r.w; x++)
            n += mask[y * a->grid_w + x];
    return n;
}

/* Tries to place one block of at most `cap` new patches. Returns how many it added; 0 = no try
 * fitted. The area is drawn between min_block and cap even when cap is the smaller, as Python's
 * uniform does. */
static int place_block(const md_mask_args *a, md_rng *rng, uint8_t *mask, int cap)
{
    double log_aspect = log(a->aspect);
    for (int i = 0; i < BLOCK_TRIES; i++) {
        double area = a->min_block + (cap - a->min_block) * md_rng_double(rng);
        double ratio = exp(log_aspect * (1 - 2 * md_rng_double(rng)));
        double h = rint(sqrt(area * ratio)), w = rint(sqrt(area / ratio)); /* half to even */
        if (!(h < a->grid_h && w < a->grid_w))
            continue;
        rect r = {.h = (int)h, .w = (int)w};
        r.top = (int)md_rng_below(rng, (uint32_t)(a->grid_h - r.h + 1));
        r.left = (int)md_rng_below(rng, (uint32_t)(a->grid_w - r.w + 1));
        int fresh = r.h * r.w - window_count(a, mask, r);
        if (fresh <= 0 || fresh > cap)
            continue;
        for (int y = r.top; y < r.top + r.h; y++)
            memset(mask + y * a->grid_w + r.left, 1, (size_t)r.w);
        return fresh;
    }
    return 0;
}

static void draw_block(const md_mask_args *a, md_rng *rng, uint8_t *mask, md_mask_stats *stats)
{
    while (stats->raw_count < a->count) {
        int added = place_block(a, rng, mask, a->count - stats->raw_count);
        if (added == 0)
            break;
        stats->raw_count += added;
        stats->blocks++;
    }
}

/* kind random: the top-up alone, every subset equally likely. */
static void draw_nothing(const md_mask_args *a, md_rng *rng, uint8_t *mask, md_mask_stats *stats)
{
    (void)a, (void)rng, (void)mask, (void)stats;
}

static const md_mask_kind kinds[] = {
    {"block", draw_block},
    {"random", draw_nothing},
    {"none", draw_nothing},
};

/* Masks `missing` of the `visible` unmasked patches, every choice equally likely: selection
 * sampling (Knuth, TAOCP volume 2, algorithm 3.4.2 S), which needs no scratch. */
static void top_up(const md_mask_args *a, md_rng *rng, uint8_t *mask, int missing, int visible)
{
    for (int i = 0; missing > 0; i++) {
        MD_ASSERT(i < a->grid_h * a->grid_w, "%d patches still missing", missing);
        if (mask[i])
            continue;
        if (md_rng_below(rng, (uint32_t)visible) < (uint32_t)missing) {
            mask[i] = 1;
            missing--;
        }
        visible--;
    }
}

const md_mask_kind *md_mask_kind_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(kinds); i++)
        if (strcmp(kinds[i].name, name) == 0)
            return &kinds[i];
    return NULL;
}

int64_t md_mask_count(const md_config *c)
{
    if (strcmp(c->mask_kind, "none") == 0)
        return 0;
    if (c->mask_count > 0)
        return c->mask_count;
    int64_t side = c->image_size / c->model_patch;
    return llround(c->mask_ratio * (double)(side * side));
}

md_status md_mask_args_make(const md_config *c, md_mask_args *a)
{
    int64_t side = c->image_size / c->model_patch, count = md_mask_count(c);
    const md_mask_kind *kind = md_mask_kind_find(c->mask_kind);
    if (!kind)
        MD_FAIL(MD_ERR_CONFIG, "method.mask.kind: there is no mask kind \"%s\"", c->mask_kind);
    if (count > side * side)
        MD_FAIL(MD_ERR_CONFIG,
                "method.mask.count: %lld patches to mask, but the %lld x %lld grid has %lld",
                (long long)count, (long long)side, (long long)side, (long long)(side * side));
    if (count == 0 && strcmp(c->mask_kind, "none") != 0)
        MD_FAIL(MD_ERR_CONFIG,
                "method.mask.ratio: %g of %lld patches masks none of them; set method.mask.kind = "
                "\"none\" if that is meant",
                c->mask_ratio, (long long)(side * side));
    *a = (md_mask_args){
        .kind = kind,
        .grid_h = (int)side,
        .grid_w = (int)side,
        .count = (int)count,
        .min_block = (int)c->mask_min_block,
        .aspect = c->mask_aspect,
        .seed = (uint64_t)c->run_seed,
    };
    return MD_OK;
}

md_mask_args md_mask_args_none(const md_config *c)
{
    const int side = (int)(c->image_size / c->model_patch);
    return (md_mask_args){.kind = md_mask_kind_find("none"), .grid_h = side, .grid_w = side};
}

void md_mask_sample(const md_mask_args *a, uint32_t epoch, int64_t sample, uint8_t *mask,
                    int32_t *index, md_mask_stats *stats)
{
    int patches = a->grid_h * a->grid_w;
    MD_ASSERT(a->count >= 0 && a->count <= patches, "count %d of %d patches", a->count, patches);
    md_rng rng = md_rng_at(a->seed, MD_RNG_MASK, epoch, (uint64_t)sample);
    md_mask_stats done = {0, 0};
    memset(mask, 0, (size_t)patches);
    a->kind->draw(a, &rng, mask, &done);
    top_up(a, &rng, mask, a->count - done.raw_count, patches - done.raw_count);
    for (int i = 0, n = 0; i < patches; i++)
        if (mask[i])
            index[n++] = i;
    if (stats)
        *stats = done;
}
