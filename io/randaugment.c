/* randaugment: see randaugment.h. Ops that look at one channel of one pixel are tables of 256
 * entries; the geometric ones are one bicubic resampling, in double precision like Pillow's and in
 * its order of operations, with the channels of a pixel as lanes. */
#include "io/randaugment.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/blend.h"
#include "src/rng.h"

#define LEVELS 10.0 /* magnitudes run from 0 to this */
#define PI     3.14159265358979323846
#define EDGE   2 /* pixels by which the resampling looks beyond the border */

typedef uint8_t table[3][256];
typedef int32_t int_lanes __attribute__((vector_size(16)));
typedef double lanes __attribute__((vector_size(32)));

/* ---- draws ---- */

/* Box and Muller's transform; 1 - u is never 0. */
static double normal(md_rng *r, double mean, double deviation)
{
    double radius = sqrt(-2.0 * log(1.0 - md_rng_double(r)));
    return mean + deviation * (radius * cos(2.0 * PI * md_rng_double(r)));
}

double md_randaugment_argument(md_randaugment_op op, double magnitude, bool negative)
{
    double level = magnitude / LEVELS, sign = negative ? -1.0 : 1.0;
    switch (op) {
    case MD_RA_ROTATE:
        return sign * (level * 30.0);
    case MD_RA_POSTERIZE:
        return 4 - (int)(level * 4);
    case MD_RA_SOLARIZE:
        return 256 - MD_MIN(256, (int)(level * 256));
    case MD_RA_SOLARIZE_ADD:
        return MD_MIN(128, (int)(level * 110));
    case MD_RA_COLOR:
    case MD_RA_CONTRAST:
    case MD_RA_BRIGHTNESS:
    case MD_RA_SHARPNESS:
        return MD_MAX(0.1, 1.0 + sign * (level * 0.9));
    case MD_RA_SHEAR_X:
    case MD_RA_SHEAR_Y:
        return sign * (level * 0.3);
    case MD_RA_TRANSLATE_X:
    case MD_RA_TRANSLATE_Y:
        return sign * (level * 0.45);
    default:
        return 0.0;
    }
}

/* Every op takes the same number of random words, applied or not, so that the draws of one do not
 * hang on those before it. */
md_randaugment_draw md_randaugment_choose(const md_randaugment_rule *rule, uint32_t epoch,
                                          uint64_t sample)
{
    md_randaugment_draw d = {0};
    MD_ASSERT(rule->ops <= MD_RANDAUGMENT_MAX, "%d ops", rule->ops);
    md_rng r = md_rng_at(rule->seed, MD_RNG_RANDAUGMENT, epoch, sample);
    for (int i = 0; i < rule->ops; i++) {
        md_randaugment_op op = (md_randaugment_op)md_rng_below(&r, MD_RA_OPS);
        bool apply = md_rng_double(&r) < rule->probability;
        double magnitude = normal(&r, rule->magnitude, rule->deviation);
        bool negative = md_rng_double(&r) < 0.5;
        magnitude = MD_MAX(0.0, MD_MIN(magnitude, LEVELS));
        if (!apply)
            continue;
        d.step[d.n].op = op;
        d.step[d.n++].argument = md_randaugment_argument(op, magnitude, negative);
    }
    return d;
}

/* ---- tables ---- */

static uint8_t clip(int v)
{
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

static void count_values(const uint8_t *rgb, size_t pixels, uint32_t count[3][256])
{
    memset(count, 0, sizeof(uint32_t[3][256]));
    for (size_t i = 0; i < pixels; i++)
        for (int c = 0; c < 3; c++)
            count[c][rgb[3 * i + (size_t)c]]++;
}

/* Stretches a channel from its least and largest value to 0 .. 255. */
static void auto_contrast_table(const uint32_t count[256], uint8_t to[256])
{
    int low = 0, high = 255;
    while (low < 255 && !count[low])
        low++;
    while (high > 0 && !count[high])
        high--;
    double scale = high > low ? 255.0 / (high - low) : 1.0;
    double offset = high > low ? -low * scale : 0.0;
    for (int v = 0; v < 256; v++)
        to[v] = clip((int)(v * scale + offset));
}

static void equalize_table(const uint32_t count[256], uint8_t to[256])
{
    uint32_t sum = 0, last = 0;
    for (int v = 0; v < 256; v++) {
        sum += count[v];
        last = count[v] ? count[v] : last;
    }
    uint32_t step = (sum - last) / 255, n = step / 2;
    for (int v = 0; v < 256; v++) {
        to[v] = clip(step ? (int)(n / step) : v);
        n += count[v];
    }
}

static void histogram_tables(md_randaugment_op op, const uint8_t *rgb, size_t pixels, table t)
{
    uint32_t count[3][256];
    count_values(rgb, pixels, count);
    for (int c = 0; c < 3; c++) {
        if (op == MD_RA_EQUALIZE)
            equalize_table(count[c], t[c]);
        else
            auto_contrast_table(count[c], t[c]);
    }
}

/* The mean luma, rounded. */
static int mean_luma(const uint8_t *rgb, size_t pixels)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < pixels; i++, rgb += 3)
        sum += (uint32_t)md_luma(rgb[0], rgb[1], rgb[2]);
    return (int)((double)sum / (double)pixels + 0.5);
}

static uint8_t map_value(md_randaugment_op op, int v, double argument, int base)
{
    int number = (int)argument;
    switch (op) {
    case MD_RA_INVERT:
        return (uint8_t)(255 - v);
    case MD_RA_POSTERIZE:
        return (uint8_t)(v & ~((1 << (8 - number)) - 1));
    case MD_RA_SOLARIZE:
        return (uint8_t)(v < number ? v : 255 - v);
    case MD_RA_SOLARIZE_ADD:
        return clip(v < 128 ? v + number : v);
    default: /* contrast, brightness */
        return (uint8_t)md_blend(base, v, (float)argument);
    }
}

static void apply_table(uint8_t *rgb, size_t pixels, const table t)
{
    for (size_t i = 0; i < pixels; i++, rgb += 3) {
        rgb[0] = t[0][rgb[0]];
        rgb[1] = t[1][rgb[1]];
        rgb[2] = t[2][rgb[2]];
    }
}

static void apply_values(const struct md_randaugment_step *s, uint8_t *rgb, size_t pixels)
{
    table t;
    if (s->op == MD_RA_AUTO_CONTRAST || s->op == MD_RA_EQUALIZE) {
        histogram_tables(s->op, rgb, pixels, t);
    } else {
        int base = s->op == MD_RA_CONTRAST ? mean_luma(rgb, pixels) : 0;
        for (int v = 0; v < 256; v++)
            t[0][v] = t[1][v] = t[2][v] = map_value(s->op, v, s->argument, base);
    }
    apply_table(rgb, pixels, t);
}

/* ---- colour and sharpness ---- */

static void apply_color(uint8_t *rgb, size_t pixels, float factor)
{
    for (size_t i = 0; i < pixels; i++, rgb += 3) {
        int base = md_luma(rgb[0], rgb[1], rgb[2]);
        for (int c = 0; c < 3; c++)
            rgb[c] = (uint8_t)md_blend(base, rgb[c], factor);
    }
}

/* A row blended with its smoothed self: weights 1, and 5 in the middle, of 13. Pillow sums in
 * single precision and adds a half; the sum is never so near a whole number that this would matter.
 */
static void sharpen_row(const uint8_t *restrict above, const uint8_t *restrict in,
                        const uint8_t *restrict below, int n, float factor, uint8_t *restrict out)
{
    for (int i = 3; i < n - 3; i++) {
        int sum = above[i - 3] + above[i] + above[i + 3] + in[i - 3] + 5 * in[i] + in[i + 3] +
                  below[i - 3] + below[i] + below[i + 3];
        out[i] = (uint8_t)md_blend((2 * sum + 13) / 26, in[i], factor);
    }
}

/* The outermost pixels stay as they are. */
static void apply_sharpness(uint8_t *rgb, int size, float factor, uint8_t *copy)
{
    size_t row = (size_t)size * 3;
    memcpy(copy, rgb, row * (size_t)size);
    for (int y = 1; y < size - 1; y++) {
        const uint8_t *in = copy + (size_t)y * row;
        sharpen_row(in - row, in, in + row, (int)row, factor, rgb + (size_t)y * row);
    }
}

/* ---- geometry ---- */

/* Where a pixel comes from: x' = m[0] x + m[1] y + m[2], y' = m[3] x + m[4] y + m[5]. */
typedef struct affine {
    double m[6];
} affine;

/* Python's round(v, 15). */
static double round15(double v)
{
    char text[64];
    snprintf(text, sizeof text, "%.15f", v);
    return strtod(text, NULL);
}

/* Image.rotate's: about the middle, counter-clockwise. */
static affine rotation(double degrees, int size)
{
    double turn = fmod(degrees, 360.0), center = size / 2.0;
    if (turn < 0)
        turn += 360.0;
    double angle = -(turn * (PI / 180.0));
    double cosine = round15(cos(angle)), sine = round15(sin(angle));
    affine a = {{cosine, sine, 0, round15(-sin(angle)), cosine, 0}};
    a.m[2] = a.m[0] * -center + a.m[1] * -center + 0.0 + center;
    a.m[5] = a.m[3] * -center + a.m[4] * -center + 0.0 + center;
    return a;
}

static affine affine_of(const struct md_randaugment_step *s, int size)
{
    affine a = {{1, 0, 0, 0, 1, 0}};
    if (s->op == MD_RA_ROTATE && s->argument != 0)
        return rotation(s->argument, size);
    if (s->op == MD_RA_SHEAR_X)
        a.m[1] = s->argument;
    if (s->op == MD_RA_SHEAR_Y)
        a.m[3] = s->argument;
    if (s->op == MD_RA_TRANSLATE_X)
        a.m[2] = s->argument * size;
    if (s->op == MD_RA_TRANSLATE_Y)
        a.m[5] = s->argument * size;
    return a;
}

/* The picture as four lanes a pixel, with EDGE pixels more on every side that repeat the border. */
static void widen_border(const uint8_t *rgb, int size, int_lanes *to)
{
    size_t side = (size_t)size + 2 * EDGE;
    for (size_t y = 0; y < side; y++) {
        int from = MD_MIN(MD_MAX((int)y - EDGE, 0), size - 1);
        const uint8_t *p = rgb + (size_t)from * (size_t)size * 3;
        int_lanes *row = to + y * side;
        for (size_t x = 0; x < (size_t)size; x++, p += 3)
            row[x + EDGE] = (int_lanes){p[0], p[1], p[2], 0};
        for (size_t x = 0; x < EDGE; x++) {
            row[x] = row[EDGE];
            row[side - 1 - x] = row[side - 1 - EDGE];
        }
    }
}

/* The cubic through four samples at t in [0, 1) from the second (a = -1); the sums of the first
 * pass are whole numbers. By reference, as not every target passes such vectors. */
static inline void across(const int_lanes *p, double t, lanes *out)
{
    int_lanes p2 = p[2] - p[0], p3 = 2 * (p[0] - p[1]) + p[2] - p[3],
              p4 = p[1] - p[0] - p[2] + p[3];
    *out = __builtin_convertvector(p[1], lanes);
    if (t != 0)
        *out +=
            t * (__builtin_convertvector(p2, lanes) +
                 t * (__builtin_convertvector(p3, lanes) + t * __builtin_convertvector(p4, lanes)));
}

static inline void down(const lanes v[4], double t, lanes *out)
{
    lanes p2 = v[2] - v[0], p3 = 2.0 * (v[0] - v[1]) + v[2] - v[3], p4 = v[1] - v[0] - v[2] + v[3];
    *out = v[1] + t * (p2 + t * (p3 + t * p4));
}

/* The value at (x, y), in pixels from the corner of the picture. */
static inline void sample(const int_lanes *wide, size_t side, double x, double y, uint8_t *out)
{
    lanes v[4], sum;
    double left = floor(x - 0.5), top = floor(y - 0.5), dx = x - 0.5 - left, dy = y - 0.5 - top;
    const int_lanes *p =
        wide + (size_t)((int)top - 1 + EDGE) * side + (size_t)((int)left - 1 + EDGE);
    if (dy == 0) {
        across(p + side, dx, &sum);
    } else {
        for (int i = 0; i < 4; i++)
            across(p + (size_t)i * side, dx, &v[i]);
        down(v, dy, &sum);
    }
    for (int c = 0; c < 3; c++)
        out[c] = (uint8_t)(int)MD_MIN(MD_MAX(sum[c], 0.0), 255.0);
}

/* Pixels that come from outside the picture get the fill. */
static void apply_affine(const affine *a, const uint8_t fill[3], uint8_t *rgb, int size,
                         int_lanes *wide)
{
    const double *m = a->m;
    widen_border(rgb, size, wide);
    for (int y = 0; y < size; y++)
        for (int x = 0; x < size; x++, rgb += 3) {
            double from_x = m[0] * (x + 0.5) + m[1] * (y + 0.5) + m[2];
            double from_y = m[3] * (x + 0.5) + m[4] * (y + 0.5) + m[5];
            if (from_x < 0.0 || from_x >= size || from_y < 0.0 || from_y >= size)
                memcpy(rgb, fill, 3);
            else
                sample(wide, (size_t)size + 2 * EDGE, from_x, from_y, rgb);
        }
}

/* ---- public ---- */

size_t md_randaugment_scratch(int size)
{
    size_t side = (size_t)size + 2 * EDGE;
    return side * side * sizeof(int_lanes);
}

void md_randaugment_apply(const md_randaugment_draw *draw, const uint8_t fill[3], uint8_t *rgb,
                          int size, void *scratch)
{
    size_t pixels = (size_t)size * (size_t)size;
    for (int i = 0; i < draw->n; i++) {
        const struct md_randaugment_step *s = &draw->step[i];
        if (s->op == MD_RA_ROTATE || s->op >= MD_RA_SHEAR_X) {
            affine a = affine_of(s, size);
            apply_affine(&a, fill, rgb, size, scratch);
        } else if (s->op == MD_RA_COLOR) {
            apply_color(rgb, pixels, (float)s->argument);
        } else if (s->op == MD_RA_SHARPNESS) {
            apply_sharpness(rgb, size, (float)s->argument, scratch);
        } else {
            apply_values(s, rgb, pixels);
        }
    }
}
