/* resize: see resize.h. The horizontal pass makes one row of 4-byte pixels at a time into a ring
 * that holds just the rows one output row needs, so the working set stays in the cache. Sums are
 * integers: their order is free, which is what lets mirrored weights stand for a mirrored picture.
 */
#include "io/resize.h"

#include <math.h>
#include <string.h>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF /* gcc keeps products unfused under -std=c11 */
#endif

#define WEIGHT_BITS 22
#define HALF        (1 << (WEIGHT_BITS - 1))
#define LANES       8
#define ROWS        4 /* rows that go across together: 4 pixels of 4 bytes are 2 * LANES */

typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

/* Weights of one axis: output i = sum over t < count[i] of weight[i * taps + t] * in[first[i] + t].
 */
typedef struct axis {
    int32_t *weight;
    int *first, *count;
    int taps;
} axis;

struct md_resizer {
    void *block; /* everything below */
    int max_in, max_out;
    axis x, y;
    double *raw;          /* weights of one sample before rounding */
    uint8_t *ring;        /* y.taps + ROWS rows after the horizontal pass */
    const uint8_t **rows; /* those of one output row */
    uint32_t *wide;       /* ROWS rows of the box or of the result, interleaved */
    int32_t *sum;
    uint8_t *line; /* one output row */
};

static double cubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0)
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0)
        return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static int taps_of(int in, int out)
{
    double scale = (double)in / out;
    return (int)ceil(2.0 * MD_MAX(scale, 1.0)) * 2 + 1;
}

/* `n` of `out` samples, from `from` on. */
typedef struct span {
    int out, from, n;
} span;

/* Weights that map `in` samples to a span. The order of the floating-point operations is Pillow's.
 */
static void axis_fill(axis *a, double *raw, int in, span to, bool mirror)
{
    double scale = (double)in / to.out, filter_scale = MD_MAX(scale, 1.0);
    double support = 2.0 * filter_scale, inverse = 1.0 / filter_scale;
    a->taps = taps_of(in, to.out);
    for (int i = 0; i < to.n; i++) {
        double center = (to.from + i + 0.5) * scale, sum = 0.0;
        int first = MD_MAX((int)(center - support + 0.5), 0);
        int count = MD_MIN((int)(center + support + 0.5), in) - first;
        for (int t = 0; t < count; t++) {
            raw[t] = cubic((t + first - center + 0.5) * inverse);
            sum += raw[t];
        }
        int32_t *weight = a->weight + (size_t)i * (size_t)a->taps;
        for (int t = 0; t < count; t++) {
            double v = (sum != 0.0 ? raw[t] / sum : raw[t]) * (1 << WEIGHT_BITS);
            weight[mirror ? count - 1 - t : t] = (int32_t)(v < 0 ? v - 0.5 : v + 0.5);
        }
        a->first[i] = mirror ? in - first - count : first;
        a->count[i] = count;
    }
}

/* Eight bytes widened to eight lanes; by reference, as not every target passes such vectors. */
static inline void widen(lanes *to, const uint8_t *p)
{
    for (int i = 0; i < LANES; i++)
        (*to)[i] = p[i];
}

/* Sums of weighted bytes, rounded and clipped. */
static void round_clip(const int32_t *restrict sum, size_t n, uint8_t *restrict to)
{
    for (size_t i = 0; i < n; i++) {
        int32_t v = (sum[i] + HALF) >> WEIGHT_BITS;
        v = v < 0 ? 0 : v;
        to[i] = (uint8_t)(v > 255 ? 255 : v);
    }
}

/* ROWS rows of n pixels side by side: to[x] holds pixel x of every row. */
static void interleave(const uint32_t *const in[ROWS], size_t n, uint32_t *restrict to)
{
    const uint32_t *a = in[0], *b = in[1], *c = in[2], *d = in[3];
    for (size_t x = 0; x < n; x++) {
        to[4 * x] = a[x];
        to[4 * x + 1] = b[x];
        to[4 * x + 2] = c[x];
        to[4 * x + 3] = d[x];
    }
}

/* `out` interleaved groups of ROWS pixels -> their sums, 4 * ROWS a group. */
static void pass_across(const axis *a, const uint8_t *restrict in, int out, int32_t *restrict sum)
{
    const int32_t *weight = a->weight;
    for (int i = 0; i < out; i++, weight += a->taps, sum += 2 * LANES) {
        const uint8_t *p = in + (size_t)a->first[i] * 2 * LANES;
        lanes low = {0}, high = {0}, v;
        for (int t = 0; t < a->count[i]; t++, p += 2 * LANES) {
            widen(&v, p);
            low += weight[t] * v;
            widen(&v, p + LANES);
            high += weight[t] * v;
        }
        memcpy(sum, &low, sizeof low);
        memcpy(sum + LANES, &high, sizeof high);
    }
}

/* Sums of `count` rows, `bytes` long (a multiple of 4 * LANES). */
static void pass_down(const int32_t *weight, const uint8_t *const *rows, int count, size_t bytes,
                      int32_t *restrict sum)
{
    for (size_t x = 0; x < bytes; x += 4 * LANES) {
        lanes s[4] = {0}, v;
        for (int t = 0; t < count; t++)
            for (int k = 0; k < 4; k++) {
                widen(&v, rows[t] + x + (size_t)k * LANES);
                s[k] += weight[t] * v;
            }
        memcpy(sum + x, s, sizeof s);
    }
}

/* Drops the fourth byte of w pixels. */
static void pack_row(const uint8_t *restrict in, int w, uint8_t *restrict out)
{
    for (int x = 0; x < w; x++)
        for (int c = 0; c < 3; c++)
            out[3 * (size_t)x + (size_t)c] = in[4 * (size_t)x + (size_t)c];
}

/* ---- scratch ---- */

typedef struct scratch_plan {
    size_t weight, index, raw, rows, ring, wide, sum, line, total;
} scratch_plan;

static size_t row_bytes(int w)
{
    return ((size_t)w * 4 + 4 * LANES - 1) / (4 * LANES) * (4 * LANES);
}

/* Enough for every box up to `in` and every result up to `out`: with taps <= 4 * max(1, in/out) +
 * 3, out * taps <= 4 * in + 7 * out and taps * row_bytes(out) <= 140 * in + 28 * out + 217. */
static scratch_plan plan_scratch(int in, int out)
{
    size_t i = (size_t)in, o = (size_t)out;
    scratch_plan p = {
        .weight = (4 * i + 7 * o) * sizeof(int32_t),
        .index = o * sizeof(int),
        .raw = (4 * i + 7) * sizeof(double),
        .rows = (4 * i + 7) * sizeof(uint8_t *),
        .ring = 140 * i + 44 * o + 341,
        .wide = MD_MAX(i, o) * ROWS * sizeof(uint32_t),
        .sum = o * ROWS * 4 * sizeof(int32_t) + row_bytes(out) * sizeof(int32_t),
        .line = row_bytes(out),
    };
    size_t *part[] = {&p.weight, &p.index, &p.raw, &p.rows, &p.ring, &p.wide, &p.sum, &p.line};
    for (size_t k = 0; k < MD_COUNT(part); k++)
        *part[k] = (*part[k] + 63) / 64 * 64;
    p.total = 2 * p.weight + 4 * p.index + p.raw + p.rows + p.ring + p.wide + p.sum + p.line;
    return p;
}

static void *cut(uint8_t **next, size_t bytes)
{
    void *p = *next;
    *next += bytes;
    return p;
}

static md_status reserve(md_resizer *r, int in, int out)
{
    if (in <= r->max_in && out <= r->max_out)
        return MD_OK;
    in = MD_MAX(in, r->max_in);
    out = MD_MAX(out, r->max_out);
    scratch_plan p = plan_scratch(in, out);
    md_free(r->block);
    r->max_in = r->max_out = 0;
    r->block = md_alloc(p.total, "decode");
    if (!r->block)
        return MD_ERR_MEMORY;
    uint8_t *next = r->block;
    for (int k = 0; k < 2; k++) {
        axis *a = k ? &r->y : &r->x;
        a->weight = cut(&next, p.weight);
        a->first = cut(&next, p.index);
        a->count = cut(&next, p.index);
    }
    r->raw = cut(&next, p.raw);
    r->rows = cut(&next, p.rows);
    r->ring = cut(&next, p.ring);
    r->wide = cut(&next, p.wide);
    r->sum = cut(&next, p.sum);
    r->line = cut(&next, p.line);
    r->max_in = in;
    r->max_out = out;
    return MD_OK;
}

/* ---- public ---- */

size_t md_resizer_bytes(int max_in, int max_out)
{
    return sizeof(md_resizer) + plan_scratch(max_in, max_out).total;
}

md_status md_resizer_create(md_resizer **out, int max_in, int max_out)
{
    *out = NULL;
    md_resizer *r = md_alloc(sizeof *r, "decode");
    if (!r)
        return MD_ERR_MEMORY;
    if (reserve(r, MD_MAX(max_in, 1), MD_MAX(max_out, 1)) != MD_OK) {
        md_free(r);
        return MD_ERR_MEMORY;
    }
    *out = r;
    return MD_OK;
}

void md_resizer_free(md_resizer *r)
{
    if (r)
        md_free(r->block);
    md_free(r);
}

/* The ring's place for a row of the box. */
static uint8_t *ring_row(md_resizer *r, int row, int w)
{
    return r->ring + (size_t)(row % (r->y.taps + ROWS)) * row_bytes(w);
}

/* Rows y .. y + ROWS - 1 of the box, as far as it goes, into the ring; returns their number. */
static int rows_across(md_resizer *r, const md_image *im, md_box box, int y, int w)
{
    const uint32_t *in[ROWS];
    int rows = MD_MIN(ROWS, box.h - y);
    for (int k = 0; k < ROWS; k++)
        in[k] = (const uint32_t *)(const void *)im->pixels +
                (size_t)(box.y + y + MD_MIN(k, rows - 1)) * (size_t)im->w + (size_t)box.x;
    interleave(in, (size_t)box.w, r->wide);
    pass_across(&r->x, (const uint8_t *)r->wide, w, r->sum);
    round_clip(r->sum, (size_t)w * 2 * LANES, (uint8_t *)r->wide);
    for (int k = 0; k < rows; k++) {
        uint32_t *to = (uint32_t *)(void *)ring_row(r, y + k, w);
        for (int x = 0; x < w; x++)
            to[x] = r->wide[(size_t)x * ROWS + (size_t)k];
    }
    return rows;
}

md_status md_resize_box_part(md_resizer *r, const md_image *im, md_box box,
                             const md_resize_part *to, uint8_t *out)
{
    const md_box part = to->part;
    MD_ASSERT(box.x >= 0 && box.y >= 0 && box.w > 0 && box.h > 0 && box.x + box.w <= im->w &&
                  box.y + box.h <= im->h,
              "box %d,%d %dx%d of %dx%d", box.x, box.y, box.w, box.h, im->w, im->h);
    MD_ASSERT(part.x >= 0 && part.y >= 0 && part.x + part.w <= to->w && part.y + part.h <= to->h,
              "part %d,%d %dx%d of %dx%d", part.x, part.y, part.w, part.h, to->w, to->h);
    MD_TRY(reserve(r, MD_MAX(box.w, box.h), MD_MAX(part.w, part.h)));
    axis_fill(&r->x, r->raw, box.w, (span){to->w, part.x, part.w}, box.mirror);
    axis_fill(&r->y, r->raw, box.h, (span){to->h, part.y, part.h}, false);
    size_t stride = row_bytes(part.w);
    int ready = r->y.first[0]; /* rows of the box before it went through the horizontal pass */
    for (int y = 0; y < part.h; y++) {
        int first = r->y.first[y], count = r->y.count[y];
        while (ready < first + count)
            ready += rows_across(r, im, box, ready, part.w);
        for (int t = 0; t < count; t++)
            r->rows[t] = ring_row(r, first + t, part.w);
        pass_down(r->y.weight + (size_t)y * (size_t)r->y.taps, r->rows, count, stride, r->sum);
        round_clip(r->sum, stride, r->line);
        pack_row(r->line, part.w, out + (size_t)y * (size_t)part.w * 3);
    }
    return MD_OK;
}

md_status md_resize_box(md_resizer *r, const md_image *im, md_box box, int w, int h, uint8_t *out)
{
    return md_resize_box_part(r, im, box, &(md_resize_part){w, h, {0, 0, w, h, false}}, out);
}
