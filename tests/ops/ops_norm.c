/* ops_norm: cases of layernorm, residual_ln and residual_ln_bwd. */
#include "tests/ops/ops_case.h"

#include <math.h>

enum {
    AFFINE = 1,
    STATS = 2,
    UNBIASED = 4,
    IN_PLACE = 8,
    BRANCH = 16,
    GAMMA = 32,
    KEEP = 64,
    NO_Y = 128,
    NO_R = 256,
    DR = 512,
    DY = 1024,
    DBRANCH = 2048,
    SUMS = 4096,
    ADD = 8192,
    FROM = 16384,
    TO = 32768,
    UNALIGNED = 65536
};

typedef struct stats {
    double mean, rstd;
} stats;

static stats stats_of(const double *x, int64_t n, double eps, bool unbiased)
{
    double mean = 0.0, var = 0.0;
    for (int64_t c = 0; c < n; c++)
        mean += x[c] / (double)n;
    for (int64_t c = 0; c < n; c++)
        var += (x[c] - mean) * (x[c] - mean);
    var /= (double)(unbiased && n > 1 ? n - 1 : n);
    return (stats){mean, 1.0 / sqrt(var + eps)};
}

/* One row of y = LN(x) weight + bias with its statistics; targets may be NULL. */
static void ln_row(const double *x, const double *weight, const double *bias, stats s, double *y,
                   int64_t n)
{
    for (int64_t c = 0; c < n; c++)
        y[c] += (x[c] - s.mean) * s.rstd * (weight ? weight[c] : 1.0) + (bias ? bias[c] : 0.0);
}

/* n: rows, cols. */
static void build_layernorm(op_case *c)
{
    int64_t rows = c->row->n[0], cols = c->row->n[1];
    unsigned f = c->row->flags;
    md_layernorm_args *a = &c->args.layernorm;
    md_tensor *x = TENSOR(c, c->compute, FILL_WIDE, rows, cols);
    a->x = x;
    if (f & AFFINE) {
        a->weight = F32(c, cols);
        a->bias = F32(c, cols);
    }
    a->y = f & IN_PLACE ? x : ACT(c, rows, cols);
    if (f & STATS) {
        a->mean = F32(c, rows);
        a->rstd = F32(c, rows);
    }
    a->eps = 1e-6f;
    a->unbiased = (f & UNBIASED) != 0;
    c->terms = (double)cols;
}

static void ref_layernorm(op_case *c, bool mutant)
{
    int64_t rows = c->row->n[0], cols = c->row->n[1];
    for (int64_t r = 0; r < rows; r++) {
        const double *x = X(c, layernorm, x) + r * cols;
        stats s = stats_of(x, cols, (double)c->args.layernorm.eps, c->args.layernorm.unbiased);
        if (mutant)
            s.rstd *= 1.0 + c->bend, s.mean += c->bend;
        ln_row(x, X(c, layernorm, weight), X(c, layernorm, bias), s,
               REF(c, layernorm, y) + r * cols, cols);
        if (REF(c, layernorm, mean)) {
            REF(c, layernorm, mean)[r] += s.mean;
            REF(c, layernorm, rstd)[r] += s.rstd;
        }
    }
}

/* Which image of a packed operand each image is; NULL without the flag. left_out: bit i % 4 of
 * image i, but the last one is always there. *images: how many the operand holds. */
static md_tensor *packed_index(op_case *c, unsigned flag, unsigned left_out, int64_t *images)
{
    const int64_t b = c->row->n[0];
    *images = b;
    if (!(c->row->flags & flag))
        return NULL;
    md_tensor *index = TENSOR(c, MD_I32, FILL_BYTES, b);
    *images = 0;
    for (int64_t i = 0; i < b; i++)
        md_i32(index)[i] = left_out >> i % 4 & 1 && i + 1 < b ? -1 : (int32_t)(*images)++;
    return index;
}

/* Row `row` in an operand packed by index; -1: not there. */
static int64_t packed_row(const double *index, int64_t row, int64_t tokens)
{
    if (!index)
        return row;
    const int64_t image = (int64_t)index[row / tokens];
    return image < 0 ? -1 : image * tokens + row % tokens;
}

/* n: images, tokens, width. */
static void build_residual_ln(op_case *c)
{
    int64_t b = c->row->n[0], t = c->row->n[1], w = c->row->n[2];
    unsigned f = c->row->flags;
    md_residual_ln_args *a = &c->args.residual_ln;
    int64_t from, to;
    c->shift = f & UNALIGNED ? sizeof(float) : 0;
    a->from = packed_index(c, FROM, 3, &from);
    a->to = packed_index(c, TO, 5, &to);
    md_tensor *x = ACT(c, b, t, w);
    a->x = x;
    a->branch = f & BRANCH ? ACT(c, from, t, w) : NULL;
    a->gamma = f & GAMMA ? F32(c, w) : NULL;
    a->keep = f & KEEP ? TENSOR(c, MD_F32, FILL_BITS, b) : NULL;
    a->weight = f & AFFINE ? F32(c, w) : NULL;
    a->bias = f & AFFINE ? F32(c, w) : NULL;
    a->r = f & NO_R ? NULL : f & IN_PLACE ? x : ACT(c, b, t, w);
    a->y = f & NO_Y ? NULL : ACT(c, to, t, w);
    a->mean = f & STATS ? F32(c, b * t) : NULL;
    a->rstd = f & STATS ? F32(c, b * t) : NULL;
    a->eps = 1e-5f;
    c->terms = (double)w;
}

/* In bf16 y and the statistics may be those of r before or after it is rounded for its output:
 * every element of a row may be off by 2^-8 of itself, all in the worst direction. */
static void slack_residual_ln(op_case *c, int64_t i, const double *row, stats s)
{
    const int64_t w = c->row->n[2], at = packed_row(X(c, residual_ln, to), i, c->row->n[1]);
    const double *weight = X(c, residual_ln, weight);
    double mean = 0.0, rstd = 0.0;
    for (int64_t j = 0; j < w; j++) {
        double off = case_eps(c) * fabs(row[j]);
        mean += off / (double)w;
        rstd += pow(s.rstd, 3.0) * (fabs(row[j] - s.mean) + off) * off / (double)w;
    }
    for (int64_t j = 0; j < w && REF(c, residual_ln, y) && at >= 0; j++) {
        double off = (mean + case_eps(c) * fabs(row[j])) * s.rstd + fabs(row[j] - s.mean) * rstd;
        SLACK(c, residual_ln, y)[at * w + j] = fabs(weight ? weight[j] : 1.0) * off;
    }
    if (REF(c, residual_ln, mean)) {
        SLACK(c, residual_ln, mean)[i] = mean;
        SLACK(c, residual_ln, rstd)[i] = rstd;
    }
}

static void ref_residual_ln(op_case *c, bool mutant)
{
    int64_t b = c->row->n[0], t = c->row->n[1], w = c->row->n[2];
    const double *gamma = X(c, residual_ln, gamma), *keep = X(c, residual_ln, keep);
    const double *branch = X(c, residual_ln, branch);
    double *row = case_array(c, w);
    for (int64_t i = 0; i < b * t; i++) {
        const int64_t from = packed_row(X(c, residual_ln, from), i, t);
        const int64_t to = packed_row(X(c, residual_ln, to), i, t);
        for (int64_t j = 0; j < w; j++) {
            double add = branch && from >= 0 ? branch[from * w + j] : 0.0;
            add *= (gamma ? gamma[j] : 1.0) * (keep ? keep[i / t] : 1.0);
            row[j] = X(c, residual_ln, x)[i * w + j] + add + (mutant && j == 0 ? c->bend : 0.0);
            if (REF(c, residual_ln, r))
                REF(c, residual_ln, r)[i * w + j] += row[j];
        }
        stats s = stats_of(row, w, (double)c->args.residual_ln.eps, false);
        if (REF(c, residual_ln, y) && to >= 0)
            ln_row(row, X(c, residual_ln, weight), X(c, residual_ln, bias), s,
                   REF(c, residual_ln, y) + to * w, w);
        if (REF(c, residual_ln, mean)) {
            REF(c, residual_ln, mean)[i] += s.mean;
            REF(c, residual_ln, rstd)[i] += s.rstd;
        }
        if (branch)
            slack_residual_ln(c, i, row, s);
    }
}

/* n: images, tokens, width. IN_PLACE: dx is dr. mean and rstd are those of r. */
static void build_residual_ln_bwd(op_case *c)
{
    int64_t b = c->row->n[0], t = c->row->n[1], w = c->row->n[2];
    unsigned f = c->row->flags;
    md_residual_ln_bwd_args *a = &c->args.residual_ln_bwd;
    int64_t from, to;
    c->shift = f & UNALIGNED ? sizeof(float) : 0;
    a->from = packed_index(c, FROM, 3, &from);
    a->to = packed_index(c, TO, 5, &to);
    a->r = f & DY ? ACT(c, b, t, w) : NULL;
    a->branch = f & BRANCH ? ACT(c, from, t, w) : NULL;
    a->gamma = f & GAMMA ? F32(c, w) : NULL;
    a->keep = f & KEEP ? TENSOR(c, MD_F32, FILL_BITS, b) : NULL;
    a->weight = f & AFFINE ? F32(c, w) : NULL;
    md_tensor *mean = F32(c, b * t), *rstd = F32(c, b * t), *dr = ACT(c, b, t, w);
    a->dr = f & DR ? dr : NULL;
    a->dx = f & IN_PLACE ? dr : ACT(c, b, t, w);
    a->dbranch = f & DBRANCH ? ACT(c, from, t, w) : NULL;
    if (f & DY) {
        double *row = case_array(c, w);
        for (int64_t i = 0; i < b * t; i++) {
            for (int64_t j = 0; j < w; j++)
                row[j] = case_load(a->r, i * w + j);
            stats s = stats_of(row, w, 1e-6, false);
            md_f32(mean)[i] = (float)s.mean;
            md_f32(rstd)[i] = (float)s.rstd;
        }
        a->mean = mean;
        a->rstd = rstd;
        a->dy = ACT(c, to, t, w);
        a->dweight = f & SUMS && f & AFFINE ? F32(c, w) : NULL;
        a->dbias = f & SUMS && f & AFFINE ? F32(c, w) : NULL;
    }
    a->dgamma = f & SUMS && f & GAMMA ? F32(c, w) : NULL;
    a->dbranch_sum = f & SUMS && f & DBRANCH ? F32(c, w) : NULL;
    for (int o = 2; f & ADD && o < MD_OP_OUT; o++)
        a->accumulate |= a->out[o] ? 1u << o : 0u;
    c->terms = (double)MD_MAX(w, b * t);
    c->factor = 16.0; /* dgamma sums products of differences that nearly cancel */
}

static void ref_residual_ln_bwd(op_case *c, bool mutant)
{
    int64_t b = c->row->n[0], t = c->row->n[1], w = c->row->n[2];
    const double *weight = X(c, residual_ln_bwd, weight), *gamma = X(c, residual_ln_bwd, gamma);
    const double *keep = X(c, residual_ln_bwd, keep), *branch = X(c, residual_ln_bwd, branch);
    const double *dr = X(c, residual_ln_bwd, dr), *all_dy = X(c, residual_ln_bwd, dy);
    for (int64_t i = 0; i < b * t; i++) {
        const int64_t from = packed_row(X(c, residual_ln_bwd, from), i, t);
        const int64_t to = packed_row(X(c, residual_ln_bwd, to), i, t);
        const double *dy = all_dy && to >= 0 ? all_dy + to * w : NULL;
        const double *r = dy ? X(c, residual_ln_bwd, r) + i * w : NULL;
        stats s = dy ? (stats){X(c, residual_ln_bwd, mean)[i], X(c, residual_ln_bwd, rstd)[i]}
                     : (stats){0.0, 0.0};
        double s1 = 0.0, s2 = 0.0;
        for (int64_t j = 0; dy && j < w; j++) {
            double g = dy[j] * (weight ? weight[j] : 1.0);
            s1 += g / (double)w;
            s2 += g * (r[j] - s.mean) * s.rstd / (double)w;
        }
        for (int64_t j = 0; j < w; j++) {
            double g = dr ? dr[i * w + j] : 0.0, k = keep ? keep[i / t] : 1.0;
            if (dy) {
                double xhat = (r[j] - s.mean) * s.rstd;
                g += s.rstd * (dy[j] * (weight ? weight[j] : 1.0) - s1 - xhat * s2);
                if (REF(c, residual_ln_bwd, dweight)) {
                    REF(c, residual_ln_bwd, dweight)[j] += dy[j] * xhat;
                    REF(c, residual_ln_bwd, dbias)[j] += dy[j];
                }
            }
            REF(c, residual_ln_bwd, dx)[i * w + j] += (mutant ? 1.0 - c->bend : 1.0) * g;
            if (REF(c, residual_ln_bwd, dbranch) && from >= 0)
                REF(c, residual_ln_bwd, dbranch)[from * w + j] += k * (gamma ? gamma[j] : 1.0) * g;
            if (REF(c, residual_ln_bwd, dbranch_sum) && from >= 0)
                REF(c, residual_ln_bwd, dbranch_sum)[j] += k * (gamma ? gamma[j] : 1.0) * g;
            if (REF(c, residual_ln_bwd, dgamma) && from >= 0)
                REF(c, residual_ln_bwd, dgamma)[j] += k * branch[from * w + j] * g;
        }
    }
}

/* <dr, r> + <dy, LN(r) weight + bias>; r moves with x, with the branch and with gamma. */
static double objective_residual_ln_bwd(const op_case *c, int o, int64_t i, double h)
{
    int64_t b = c->row->n[0], t = c->row->n[1], w = c->row->n[2];
    const double *gamma = X(c, residual_ln_bwd, gamma), *keep = X(c, residual_ln_bwd, keep);
    const double *dr = X(c, residual_ln_bwd, dr), *dy = X(c, residual_ln_bwd, dy);
    const double *weight = X(c, residual_ln_bwd, weight), *branch = X(c, residual_ln_bwd, branch);
    bool moves_weight = o == OUT_INDEX(residual_ln_bwd, dweight);
    bool moves_bias = o == OUT_INDEX(residual_ln_bwd, dbias);
    bool moves_gamma = o == OUT_INDEX(residual_ln_bwd, dgamma);
    bool moves_branch = o == OUT_INDEX(residual_ln_bwd, dbranch);
    bool moves_bias_of_branch = o == OUT_INDEX(residual_ln_bwd, dbranch_sum);
    double *r = md_alloc(sizeof *r * (size_t)w, "reference"), sum = 0.0;
    for (int64_t row = 0; row < b * t; row++) {
        const double k = keep ? keep[row / t] : 1.0;
        const int64_t from = packed_row(X(c, residual_ln_bwd, from), row, t);
        const int64_t to = packed_row(X(c, residual_ln_bwd, to), row, t);
        const int64_t moved = moves_branch ? from : row;
        for (int64_t j = 0; j < w; j++) {
            double move =
                moved >= 0 && moved * w + j == i && !moves_weight && !moves_bias ? h : 0.0;
            if (moves_branch)
                move *= k * (gamma ? gamma[j] : 1.0);
            if (moves_gamma)
                move = j == i && from >= 0 ? h * k * branch[from * w + j] : 0.0;
            if (moves_bias_of_branch)
                move = j == i && from >= 0 ? h * k * (gamma ? gamma[j] : 1.0) : 0.0;
            r[j] = (X(c, residual_ln_bwd, r) ? X(c, residual_ln_bwd, r)[row * w + j] : 0.0) + move;
            sum += dr ? dr[row * w + j] * r[j] : 0.0;
        }
        stats s = stats_of(r, w, 1e-6, false);
        for (int64_t j = 0; dy && to >= 0 && j < w; j++) {
            double gain = (weight ? weight[j] : 1.0) + (moves_weight && j == i ? h : 0.0);
            sum += dy[to * w + j] *
                   ((r[j] - s.mean) * s.rstd * gain + (moves_bias && j == i ? h : 0.0));
        }
    }
    md_free(r);
    return sum;
}

#define LN(r, c, f)                                                      \
    {                                                                    \
        MD_OP_layernorm, build_layernorm, ref_layernorm, {r, c}, f, NULL \
    }
#define RLN(b, t, w, f)                                                           \
    {                                                                             \
        MD_OP_residual_ln, build_residual_ln, ref_residual_ln, {b, t, w}, f, NULL \
    }
#define RLN_BWD(b, t, w, f)                                                              \
    {                                                                                    \
        MD_OP_residual_ln_bwd, build_residual_ln_bwd, ref_residual_ln_bwd, {b, t, w}, f, \
            objective_residual_ln_bwd                                                    \
    }
#define ALL_RLN(b, t, w)                                                                          \
    RLN(b, t, w, AFFINE | STATS), RLN(b, t, w, NO_R | AFFINE), RLN(b, t, w, 0),                   \
        RLN(b, t, w, BRANCH | GAMMA | KEEP | AFFINE | STATS),                                     \
        RLN(b, t, w, BRANCH | KEEP | AFFINE | STATS), RLN(b, t, w, BRANCH | AFFINE | IN_PLACE),   \
        RLN(b, t, w, BRANCH | GAMMA | NO_Y), RLN(b, t, w, BRANCH | GAMMA | NO_Y | IN_PLACE),      \
        RLN(b, t, w, BRANCH | STATS),                                                             \
        RLN(b, t, w, BRANCH | GAMMA | KEEP | AFFINE | STATS | FROM | TO),                         \
        RLN(b, t, w, BRANCH | GAMMA | IN_PLACE | NO_Y | FROM), RLN(b, t, w, AFFINE | STATS | TO), \
        RLN(b, t, w, AFFINE | UNALIGNED), RLN(b, t, w, BRANCH | GAMMA | STATS | UNALIGNED)
#define ALL_RLN_BWD(b, t, w)                                                                     \
    RLN_BWD(b, t, w, BRANCH | GAMMA | KEEP | AFFINE | DR | DY | DBRANCH | SUMS),                 \
        RLN_BWD(b, t, w, BRANCH | GAMMA | AFFINE | DR | DY | DBRANCH | SUMS | ADD),              \
        RLN_BWD(b, t, w, AFFINE | DR | DY | DBRANCH | SUMS | IN_PLACE),                          \
        RLN_BWD(b, t, w, AFFINE | DY | SUMS), RLN_BWD(b, t, w, DY | DR),                         \
        RLN_BWD(b, t, w, KEEP | DY | DBRANCH),                                                   \
        RLN_BWD(b, t, w, BRANCH | GAMMA | KEEP | DR | DBRANCH | SUMS),                           \
        RLN_BWD(b, t, w, BRANCH | GAMMA | DR | DBRANCH | SUMS | IN_PLACE | ADD),                 \
        RLN_BWD(b, t, w, BRANCH | GAMMA | KEEP | AFFINE | DR | DY | DBRANCH | SUMS | FROM | TO), \
        RLN_BWD(b, t, w, BRANCH | GAMMA | DR | DY | DBRANCH | SUMS | ADD | FROM),                \
        RLN_BWD(b, t, w, AFFINE | DY | SUMS | IN_PLACE | TO),                                    \
        RLN_BWD(b, t, w, AFFINE | DR | DY | UNALIGNED),                                          \
        RLN_BWD(b, t, w, BRANCH | GAMMA | DR | DBRANCH | SUMS | UNALIGNED)

const op_row norm_rows[] = {
    LN(1, 3, AFFINE | STATS), LN(3, 17, 0),
    LN(197, 65, AFFINE),      LN(65, 257, STATS | UNBIASED),
    LN(65, 257, IN_PLACE),    LN(257, 192, AFFINE | STATS | UNBIASED),
    LN(17, 768, UNBIASED),    ALL_RLN(1, 3, 17),
    ALL_RLN(3, 65, 33),       ALL_RLN(2, 197, 64),
    ALL_RLN(4, 9, 64),        ALL_RLN(5, 3, 1280),
    ALL_RLN(3, 7, 264),       ALL_RLN_BWD(1, 1, 3),
    ALL_RLN_BWD(3, 17, 33),   ALL_RLN_BWD(4, 65, 64),
    ALL_RLN_BWD(2, 257, 80),  ALL_RLN_BWD(5, 3, 1280),
    ALL_RLN_BWD(3, 7, 264),   ALL_RLN_BWD(1, 5, 1600),
    ALL_RLN_BWD(2, 3, 768),   ALL_RLN_BWD(2, 13, 1280),
    ALL_RLN_BWD(2, 13, 1600), ALL_RLN_BWD(1, 3, 4096),
    ALL_RLN_BWD(2, 0, 64),
};
const int norm_row_count = (int)MD_COUNT(norm_rows);
