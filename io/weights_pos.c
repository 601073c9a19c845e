/* weights_pos: resizing of position tables, see weights.h. */
#include "io/weights.h"

#include <math.h>
#include <string.h>

#define CUBIC_A (-0.75)

/* Kernel of Keys (1981) within one and within two pixels. */
static double cubic_near(double x)
{
    return ((CUBIC_A + 2.0) * x - (CUBIC_A + 3.0)) * x * x + 1.0;
}

static double cubic_far(double x)
{
    return ((CUBIC_A * x - 5.0 * CUBIC_A) * x + 8.0 * CUBIC_A) * x - 4.0 * CUBIC_A;
}

/* The four taps of one output coordinate and their weights. */
static void taps(int at, double scale, int n, int index[4], float weight[4])
{
    double x = ((double)at + 0.5) / scale - 0.5, left = floor(x), t = x - left;
    const double w[4] = {cubic_far(t + 1.0), cubic_near(t), cubic_near(1.0 - t),
                         cubic_far(2.0 - t)};
    for (int k = 0; k < 4; k++) {
        int i = (int)left - 1 + k;
        index[k] = i < 0 ? 0 : i >= n ? n - 1 : i;
        weight[k] = (float)w[k];
    }
}

void md_pos_resize(const md_pos_resize_args *a)
{
    const size_t w = (size_t)a->width;
    const size_t rows = (size_t)a->g_dst * (size_t)a->g_dst;
    memcpy(a->dst, a->src, w * sizeof *a->dst * (a->g_src == a->g_dst ? rows + 1 : 1));
    if (a->g_src == a->g_dst)
        return;
    double scale = ((double)a->g_dst + (a->rule == MD_POS_BEIT2 ? 0.1 : 0.0)) / (double)a->g_src;
    const float *src = a->src + w;
    float *dst = a->dst + w;
    memset(dst, 0, rows * w * sizeof *dst);
    for (int y = 0; y < a->g_dst; y++) {
        int iy[4], ix[4];
        float wy[4], wx[4];
        taps(y, scale, a->g_src, iy, wy);
        for (int x = 0; x < a->g_dst; x++, dst += w) {
            taps(x, scale, a->g_src, ix, wx);
            for (int k = 0; k < 16; k++) {
                const float f = wy[k / 4] * wx[k % 4];
                const float *from = src + (size_t)(iy[k / 4] * a->g_src + ix[k % 4]) * w;
                for (size_t c = 0; c < w; c++)
                    dst[c] += f * from[c];
            }
        }
    }
}
