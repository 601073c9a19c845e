/* weights_rel: resizing of relative position bias tables, see weights.h. The same as the original
 * (microsoft/unilm, beit2/run_class_finetuning.py), which has scipy's interp2d(kind="cubic") build
 * the spline: FITPACK's interpolating one (P. Dierckx, Curve and Surface Fitting with Splines,
 * 1993), whose knots are all grid points but the second and the last but one. Along one axis it is
 * linear in the values, so that one matrix for both axes and all heads is found once. */
#include "io/weights.h"

#include <math.h>
#include <string.h>

#define FAMILY "position tables"
/* Rows behind the grid: cls to patch, patch to cls, cls to cls. */
#define EXTRA 3

static int side_of(int grid)
{
    return 2 * grid - 1;
}

double md_rel_pos_ratio(int g_src, int g_dst)
{
    double left = 1.01, right = 1.5, q = left;
    const int n = side_of(g_src) / 2, reach = side_of(g_dst) / 2;
    while (right - left > 1e-6) {
        q = (left + right) / 2.0;
        if ((1.0 - pow(q, n)) / (1.0 - q) > reach)
            right = q;
        else
            left = q;
    }
    return q;
}

/* Where the n entries of one axis of the source lie. */
static void knots_place(double q, int n, double *x)
{
    double at = 1.0;
    const int middle = n / 2;
    x[middle] = 0.0;
    for (int i = 1; i <= middle; i++) {
        x[middle + i] = at;
        x[middle - i] = -at;
        at += pow(q, i);
    }
}

/* Row i of the equations for the second derivatives m of the spline at x: low m[i-1] + mid m[i] +
 * high m[i+1] = 6 (slope behind - slope before). The rows next to the ends have m[0] and m[n-1]
 * put in, which the third derivative's continuity at x[1] and x[n-2] gives. */
static void equation(const double *x, int n, int i, double row[3])
{
    const double a = x[i] - x[i - 1], b = x[i + 1] - x[i];
    row[0] = a;
    row[1] = 2.0 * (a + b);
    row[2] = b;
    if (n == 3) { /* the parabola: m is the same everywhere */
        row[1] = 3.0 * (a + b);
    } else if (i == 1) {
        row[1] += a * (a + b) / b;
        row[2] -= a * a / b;
    } else if (i == n - 2) {
        row[1] += b * (a + b) / a;
        row[0] -= b * b / a;
    }
}

/* y += f x, n elements. */
static void add_scaled(double *y, double f, const double *x, int n)
{
    for (int k = 0; k < n; k++)
        y[k] += f * x[k];
}

/* The second derivatives at the ends, from those beside them. */
static void ends_fill(const double *x, int n, double *m)
{
    for (int end = 0; end < 2; end++) {
        const int at = end ? n - 1 : 0, near = end ? n - 2 : 1, far = end ? n - 3 : 2;
        const double ratio = (x[at] - x[near]) / (x[near] - x[far]);
        double *row = m + (size_t)at * (size_t)n;
        add_scaled(row, n == 3 ? 1.0 : 1.0 + ratio, m + (size_t)near * (size_t)n, n);
        if (n > 3)
            add_scaled(row, -ratio, m + (size_t)far * (size_t)n, n);
    }
}

/* m [n, n], zeros before: row i holds what the second derivative at x[i] is made of, a factor for
 * each of the n values. Elimination without pivoting: the equations are diagonally dominant. `work`
 * holds n elements. */
static void derivatives_find(const double *x, int n, double *m, double *work)
{
    const size_t w = (size_t)n;
    if (n < 3)
        return;
    for (int i = 1; i < n - 1; i++) {
        double row[3], *own = m + (size_t)i * w;
        const double a = 6.0 / (x[i] - x[i - 1]), b = 6.0 / (x[i + 1] - x[i]);
        equation(x, n, i, row);
        own[i - 1] = a;
        own[i] = -a - b;
        own[i + 1] = b;
        if (i > 1) {
            row[1] -= row[0] * work[i - 1];
            add_scaled(own, -row[0], own - w, n);
        }
        work[i] = row[2] / row[1];
        for (int k = 0; k < n; k++)
            own[k] /= row[1];
    }
    for (int i = n - 3; i > 0; i--)
        add_scaled(m + (size_t)i * w, -work[i], m + (size_t)(i + 1) * w, n);
    ends_fill(x, n, m);
}

/* One row of the axis' matrix: the spline at t as a sum over the n values. */
static void spline_at(const double *x, int n, const double *m, double t, double *row)
{
    int i = 0;
    if (n == 1) {
        row[0] = 1.0;
        return;
    }
    t = fmin(fmax(t, x[0]), x[n - 1]); /* as FITPACK's bispev does */
    while (i < n - 2 && t > x[i + 1])
        i++;
    const double h = x[i + 1] - x[i], b = (t - x[i]) / h, a = 1.0 - b;
    row[i] += a;
    row[i + 1] += b;
    add_scaled(row, (a * a * a - a) * h * h / 6.0, m + (size_t)i * (size_t)n, n);
    add_scaled(row, (b * b * b - b) * h * h / 6.0, m + (size_t)(i + 1) * (size_t)n, n);
}

/* All memory of one resize: s is the source's side, u the target's. */
typedef struct buffers {
    int s, u;
    double *x, *work; /* [s] */
    double *m;        /* [s, s]; the derivatives' matrix, then one head's values */
    double *axis;     /* [u, s] */
    double *half;     /* [u, s]: one head resized along its first axis */
} buffers;

static md_status buffers_new(const md_rel_pos_resize_args *a, buffers *b)
{
    const size_t s = (size_t)side_of(a->g_src), u = (size_t)side_of(a->g_dst);
    *b = (buffers){.s = (int)s, .u = (int)u};
    MD_NEW(b->x, s * (2 + s + 2 * u), FAMILY);
    b->work = b->x + s;
    b->m = b->work + s;
    b->axis = b->m + s * s;
    b->half = b->axis + u * s;
    return MD_OK;
}

static void head_resize(const md_rel_pos_resize_args *a, const buffers *b, int head)
{
    const size_t s = (size_t)b->s, u = (size_t)b->u, heads = (size_t)a->heads;
    for (size_t k = 0; k < s * s; k++)
        b->m[k] = (double)a->src[k * heads + (size_t)head];
    memset(b->half, 0, u * s * sizeof *b->half);
    for (size_t y = 0; y < u; y++) {
        double *half = b->half + y * s;
        for (size_t k = 0; k < s; k++)
            add_scaled(half, b->axis[y * s + k], b->m + k * s, b->s);
        for (size_t x = 0; x < u; x++) {
            double sum = 0.0;
            for (size_t k = 0; k < s; k++)
                sum += half[k] * b->axis[x * s + k];
            a->dst[(y * u + x) * heads + (size_t)head] = (float)sum;
        }
    }
}

md_status md_rel_pos_resize(const md_rel_pos_resize_args *a)
{
    buffers b;
    const size_t s = (size_t)side_of(a->g_src), u = (size_t)side_of(a->g_dst);
    const size_t row = (size_t)a->heads;
    if (a->g_src == a->g_dst) {
        memcpy(a->dst, a->src, (s * s + EXTRA) * row * sizeof *a->dst);
        return MD_OK;
    }
    MD_TRY(buffers_new(a, &b));
    knots_place(md_rel_pos_ratio(a->g_src, a->g_dst), b.s, b.x);
    derivatives_find(b.x, b.s, b.m, b.work);
    for (int t = 0; t < b.u; t++)
        spline_at(b.x, b.s, b.m, (double)(t - b.u / 2), b.axis + (size_t)t * s);
    for (int head = 0; head < a->heads; head++)
        head_resize(a, &b, head);
    memcpy(a->dst + u * u * row, a->src + s * s * row, EXTRA * row * sizeof *a->dst);
    md_free(b.x);
    return MD_OK;
}
