/* probe_norm: batch norm without parameters in front of a head, in f64 on the host (torch's
 * BatchNorm1d with affine=False, eps 1e-6, momentum 0.1). */
#ifndef MD_PROBE_NORM_H
#define MD_PROBE_NORM_H

#include "src/base.h"

typedef struct md_probe_norm {
    int heads, width;
    double *mean, *variance;                 /* [heads, width] running ones */
    double *now_mean, *now_variance, *scale; /* [width] by which rows are normalised */
} md_probe_norm;

/* Running means 0 and variances 1. Local. MD_ERR_MEMORY. Freed by md_probe_norm_free, which takes
 * any part. */
md_status md_probe_norm_make(int heads, int width, md_probe_norm *n);
void md_probe_norm_free(md_probe_norm *n);

/* `count` rows of width values, `stride` values from one to the next. */
typedef struct md_probe_rows {
    const float *first;
    int64_t stride, count;
} md_probe_rows;

/* Takes the statistics of rows that a head learns from, normalises by them from now on, and moves
 * the running ones, which take the unbiased variance. Local. */
void md_probe_norm_learn(md_probe_norm *n, int head, const md_probe_rows *rows, int threads);
/* Normalises by the running statistics of a head from now on. Local. */
void md_probe_norm_use(md_probe_norm *n, int head);
/* One row. Local, any thread. */
void md_probe_norm_apply(const md_probe_norm *n, const float *from, float *to);

#endif
