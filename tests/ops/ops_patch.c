/* ops_patch: cases of patchify. */
#include "src/rng.h"
#include "tests/ops/ops_case.h"

#include <math.h>

enum { HWC = 1, MIX = 2 };

/* Image by image: as it is; erased; mixed; with a box; all of it. Partners are erased too, and one
 * is the image itself; boxes touch the borders. */
static void fill_mix(md_mix *mix, int64_t images, int64_t side)
{
    const int32_t s = (int32_t)side;
    for (int32_t b = 0; b < images; b++) {
        const int32_t kind = (b + 4) % 5;
        md_mix m = {.partner = (int32_t)(images - 1 - b), .lambda = 1.0f, .key = {77, (uint32_t)b}};
        if (kind != 4) {
            m.erase[0] = b % 2 ? s / 3 : 0, m.erase[1] = s / 4;
            m.erase[2] = s - m.erase[0], m.erase[3] = (s + 1) / 2;
        }
        if (kind == 1 || kind == 3)
            m.lambda = 0.3f;
        if (kind >= 2) {
            m.box[0] = s / 2, m.box[1] = b % 2 ? 0 : s / 2;
            m.box[2] = (s + 2) / 3, m.box[3] = s - m.box[1];
        }
        mix[b] = m;
    }
}

/* n: images, image side, patch side. */
static void build_patchify(op_case *c)
{
    int64_t b = c->row->n[0], s = c->row->n[1], p = c->row->n[2], grid = s / p;
    md_patchify_args *a = &c->args.patchify;
    a->image = TENSOR(c, MD_U8, FILL_BYTES, b, s, s, 3);
    if (c->row->flags & MIX) {
        md_tensor *mix = TENSOR(c, MD_I32, FILL_BITS, b, MD_MIX_WORDS);
        fill_mix(mix->data, b, s);
        a->mix = mix;
    }
    a->patch = ACT(c, b * grid * grid, 3 * p * p);
    a->side = (int)p;
    a->order = c->row->flags & HWC ? MD_PATCH_HWC : MD_PATCH_CHW;
    for (int ch = 0; ch < 3; ch++) {
        a->mean[ch] = 0.4f + 0.05f * (float)ch;
        a->std[ch] = 0.2f + 0.02f * (float)ch;
    }
    c->factor = 1.0;
}

static bool inside(const int32_t box[4], int64_t x, int64_t y)
{
    return x >= box[0] && x < box[0] + box[2] && y >= box[1] && y < box[1] + box[3] && box[2] > 0;
}

/* Box and Muller's formula on the words of the key. */
static double noise(const uint32_t key[2], int64_t element)
{
    uint32_t w[4];
    const md_rng_key k = {.seed = (uint64_t)key[1] << 32 | key[0],
                          .stream = MD_RNG_NOISE,
                          .index = (uint64_t)element};
    md_rng_bits(k, 0, w);
    double turn = ((double)(int32_t)(w[1] << 2) / 4294967296.0 + (double)(w[1] >> 30)) / 4.0;
    return sqrt(-2.0 * log((double)((w[0] >> 8) + 1) / 16777216.0)) * cos(2.0 * acos(-1.0) * turn);
}

/* A number of a normalised image, where it is not erased. */
static double pixel(const op_case *c, int64_t image, int64_t at, bool mutant)
{
    const md_patchify_args *a = &c->args.patchify;
    const md_mix *mix = a->mix ? a->mix->data : NULL;
    int64_t s = c->row->n[1], ch = at % 3, x = at / 3 % s, y = at / 3 / s;
    if (mix && inside(mix[image].erase, x, y))
        return noise(mix[image].key, at);
    double value = X(c, patchify, image)[image * s * s * 3 + at];
    value /= mutant ? 255.0 * (1.0 + c->bend) : 255.0;
    return (value - (double)a->mean[ch]) / (double)a->std[ch];
}

static double mixed(const op_case *c, int64_t image, int64_t at, bool mutant)
{
    const md_mix *mix = c->args.patchify.mix ? c->args.patchify.mix->data : NULL;
    int64_t s = c->row->n[1], x = at / 3 % s, y = at / 3 / s;
    if (!mix)
        return pixel(c, image, at, mutant);
    const md_mix *m = &mix[image];
    if (inside(m->box, x, y))
        return pixel(c, m->partner, at, mutant);
    double lambda = (double)m->lambda;
    return lambda * pixel(c, image, at, false) + (1.0 - lambda) * pixel(c, m->partner, at, mutant);
}

static void ref_patchify(op_case *c, bool mutant)
{
    int64_t b = c->row->n[0], s = c->row->n[1], p = c->row->n[2], grid = s / p;
    for (int64_t i = 0; i < b * s * s * 3; i++) {
        int64_t ch = i % 3, x = i / 3 % s, y = i / 3 / s % s, image = i / 3 / s / s;
        int64_t patch = (image * grid + y / p) * grid + x / p, py = y % p, px = x % p;
        int64_t inner = c->row->flags & HWC ? (py * p + px) * 3 + ch : (ch * p + py) * p + px;
        REF(c, patchify, patch)
        [patch * 3 * p * p + inner] += mixed(c, image, i - image * s * s * 3, mutant);
    }
}

#define PATCHIFY(b, s, p, f)                                             \
    {                                                                    \
        MD_OP_patchify, build_patchify, ref_patchify, {b, s, p}, f, NULL \
    }

const op_row patch_rows[] = {
    PATCHIFY(1, 1, 1, 0),     PATCHIFY(3, 10, 5, HWC),        PATCHIFY(2, 48, 16, 0),
    PATCHIFY(2, 28, 14, HWC), PATCHIFY(2, 28, 14, 0),         PATCHIFY(5, 10, 5, HWC | MIX),
    PATCHIFY(5, 28, 14, MIX), PATCHIFY(4, 28, 14, HWC | MIX), PATCHIFY(6, 48, 16, MIX),
};
const int patch_row_count = (int)MD_COUNT(patch_rows);
