/* cpu_patch: images to patches, mixed on the way where that is asked for. Compiled without fused
 * multiply-adds: what is mixed is rounded as md_blend says. */
#include "kernels/cpu/cpu_internal.h"
#include "kernels/scalar_math.h"
#include "src/rng.h"

_Static_assert(sizeof(md_mix) == MD_MIX_WORDS * sizeof(int32_t), "md_mix has no gaps");

typedef struct patch_geometry {
    const uint8_t *image;
    const md_mix *mix; /* NULL: as they are */
    float *patch;
    int64_t image_side, patch_side, grid; /* grid: patches along one side */
    md_patch_order order;
    float table[3][256]; /* the normalised value of every byte of every channel */
} patch_geometry;

/* The patch whose first byte is at corner. */
static void cut_patch(const patch_geometry *g, const uint8_t *corner, float *out)
{
    int64_t p = g->patch_side;
    for (int64_t y = 0; y < p; y++) {
        const uint8_t *row = corner + y * g->image_side * 3;
        if (g->order == MD_PATCH_HWC) {
            for (int64_t i = 0; i < 3 * p; i++)
                out[y * 3 * p + i] = g->table[i % 3][row[i]];
        } else {
            for (int ch = 0; ch < 3; ch++)
                for (int64_t x = 0; x < p; x++)
                    out[(ch * p + y) * p + x] = g->table[ch][row[3 * x + ch]];
        }
    }
}

/* One pixel of image b, erased or not. */
static void erased_pixel(const patch_geometry *g, int64_t b, int64_t y, int64_t x, float v[3])
{
    const md_mix *m = &g->mix[b];
    int64_t at = (y * g->image_side + x) * 3;
    const uint8_t *byte = g->image + b * g->image_side * g->image_side * 3 + at;
    bool erased = md_in_box(m->erase, (int32_t)x, (int32_t)y);
    for (int ch = 0; ch < 3; ch++)
        v[ch] = erased ? md_rng_normal(m->key, (uint32_t)(at + ch)) : g->table[ch][byte[ch]];
}

static void mixed_pixel(const patch_geometry *g, int64_t b, int64_t y, int64_t x, float v[3])
{
    const md_mix *m = &g->mix[b];
    float other[3];
    if (md_in_box(m->box, (int32_t)x, (int32_t)y)) {
        erased_pixel(g, m->partner, y, x, v);
        return;
    }
    erased_pixel(g, b, y, x, v);
    if (m->lambda == 1.0f)
        return;
    erased_pixel(g, m->partner, y, x, other);
    for (int ch = 0; ch < 3; ch++)
        v[ch] = md_blend(m->lambda, v[ch], other[ch]);
}

/* The patch of image b whose first pixel is x0, y0. */
static void mix_patch(const patch_geometry *g, int64_t b, int64_t y0, int64_t x0, float *out)
{
    int64_t p = g->patch_side;
    for (int64_t y = 0; y < p; y++)
        for (int64_t x = 0; x < p; x++) {
            float v[3];
            mixed_pixel(g, b, y0 + y, x0 + x, v);
            for (int ch = 0; ch < 3; ch++)
                out[g->order == MD_PATCH_HWC ? (y * p + x) * 3 + ch : (ch * p + y) * p + x] = v[ch];
        }
}

/* The patches of one strip of image b, patch_side rows of pixels. */
static void cut_strip(const patch_geometry *g, int64_t b, int64_t gy)
{
    int64_t p = g->patch_side, s = g->image_side;
    for (int64_t gx = 0; gx < g->grid; gx++) {
        float *out = g->patch + ((b * g->grid + gy) * g->grid + gx) * 3 * p * p;
        if (g->mix)
            mix_patch(g, b, gy * p, gx * p, out);
        else
            cut_patch(g, g->image + ((b * s + gy * p) * s + gx * p) * 3, out);
    }
}

static md_status check_mix(const md_mix *mix, int64_t images)
{
    for (int64_t b = 0; mix && b < images; b++)
        if (mix[b].partner < 0 || mix[b].partner >= images)
            MD_FAIL(MD_ERR_BUG, "patchify: image %lld of %lld is mixed with image %d", (long long)b,
                    (long long)images, (int)mix[b].partner);
    return MD_OK;
}

md_status cpu_patchify(md_backend *be, const md_patchify_args *a)
{
    CPU_CHECK(patchify, a);
    int64_t images = a->image->dim[0], s = a->image->dim[1], p = a->side;
    patch_geometry g = {.image = a->image->data,
                        .mix = a->mix ? a->mix->data : NULL,
                        .patch = md_f32(a->patch),
                        .image_side = s,
                        .patch_side = p,
                        .grid = p > 0 ? s / p : 0,
                        .order = a->order};
    if (p < 1 || s % p != 0 || md_tensor_rows(a->patch) != images * g.grid * g.grid ||
        md_tensor_cols(a->patch) != 3 * p * p || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "patchify: patches of side %d do not tile images of side %lld", a->side,
                (long long)s);
    MD_TRY(check_mix(g.mix, images));
    for (int ch = 0; ch < 3; ch++)
        for (int v = 0; v < 256; v++)
            g.table[ch][v] =
                (float)(((double)v / 255.0 - (double)a->mean[ch]) / (double)a->std[ch]);
#pragma omp parallel for num_threads(be->threads)
    for (int64_t row = 0; row < images * g.grid; row++)
        cut_strip(&g, row / g.grid, row % g.grid);
    return MD_OK;
}
