/* probe_norm: see probe_norm.h. */
#include "src/probe_norm.h"

#include <math.h>
#include <string.h>

#define EPS      1e-6
#define MOMENTUM 0.1

md_status md_probe_norm_make(int heads, int width, md_probe_norm *n)
{
    const int64_t all = (int64_t)heads * width;
    *n = (md_probe_norm){.heads = heads, .width = width};
    MD_NEW(n->mean, all, "statistics");
    MD_NEW(n->variance, all, "statistics");
    MD_NEW(n->now_mean, width, "statistics");
    MD_NEW(n->now_variance, width, "statistics");
    MD_NEW(n->scale, width, "statistics");
    for (int64_t i = 0; i < all; i++)
        n->variance[i] = 1.0;
    return MD_OK;
}

void md_probe_norm_free(md_probe_norm *n)
{
    md_free(n->mean);
    md_free(n->variance);
    md_free(n->now_mean);
    md_free(n->now_variance);
    md_free(n->scale);
    *n = (md_probe_norm){0};
}

static void set_scale(md_probe_norm *n)
{
    for (int c = 0; c < n->width; c++)
        n->scale[c] = 1.0 / sqrt(n->now_variance[c] + EPS);
}

/* Columns [from, to) of a head. */
static void learn_columns(md_probe_norm *n, int head, const md_probe_rows *rows, int from, int to)
{
    double *mean = n->now_mean, *variance = n->now_variance;
    for (int c = from; c < to; c++)
        mean[c] = variance[c] = 0;
    for (int64_t i = 0; i < rows->count; i++)
        for (int c = from; c < to; c++)
            mean[c] += (double)rows->first[i * rows->stride + c];
    for (int c = from; c < to; c++)
        mean[c] /= (double)rows->count;
    for (int64_t i = 0; i < rows->count; i++)
        for (int c = from; c < to; c++) {
            const double d = (double)rows->first[i * rows->stride + c] - mean[c];
            variance[c] += d * d;
        }
    for (int c = from; c < to; c++) {
        const int64_t at = (int64_t)head * n->width + c;
        const double unbiased = variance[c] / (double)MD_MAX(rows->count - 1, 1);
        variance[c] /= (double)rows->count;
        n->mean[at] += MOMENTUM * (mean[c] - n->mean[at]);
        n->variance[at] += MOMENTUM * (unbiased - n->variance[at]);
    }
}

void md_probe_norm_learn(md_probe_norm *n, int head, const md_probe_rows *rows, int threads)
{
    const int width = n->width, step = 64;
#pragma omp parallel for num_threads(threads)
    for (int c = 0; c < width; c += step)
        learn_columns(n, head, rows, c, MD_MIN(c + step, width));
    set_scale(n);
}

void md_probe_norm_use(md_probe_norm *n, int head)
{
    const int64_t at = (int64_t)head * n->width;
    memcpy(n->now_mean, n->mean + at, (size_t)n->width * sizeof *n->now_mean);
    memcpy(n->now_variance, n->variance + at, (size_t)n->width * sizeof *n->now_variance);
    set_scale(n);
}

void md_probe_norm_apply(const md_probe_norm *n, const float *from, float *to)
{
    for (int c = 0; c < n->width; c++)
        to[c] = (float)(((double)from[c] - n->now_mean[c]) * n->scale[c]);
}
