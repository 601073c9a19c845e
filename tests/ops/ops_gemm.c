/* ops_gemm: cases of gemm, colsum, qv_bias_bwd and act_bwd. */
#include "tests/ops/ops_case.h"

#include <math.h>

enum { TA = 1, TB = 2, BIAS = 4, GELU = 8, QUICK = 16, PRE = 32, ADD = 64, Y_F32 = 128 };

static double act_value(md_act act, double x)
{
    if (act == MD_ACT_GELU)
        return 0.5 * x * erfc(-x * sqrt(0.5));
    return act == MD_ACT_QUICK_GELU ? x / (1.0 + exp(-(double)1.702f * x)) : x;
}

static double act_slope(md_act act, double x)
{
    if (act == MD_ACT_GELU)
        return 0.5 * erfc(-x * sqrt(0.5)) + x * exp(-0.5 * x * x) * 0.3989422804014327;
    double s = 1.0 / (1.0 + exp(-(double)1.702f * x));
    return act == MD_ACT_QUICK_GELU ? s + (double)1.702f * x * s * (1.0 - s) : 1.0;
}

static md_act act_of(unsigned flags)
{
    return flags & GELU ? MD_ACT_GELU : flags & QUICK ? MD_ACT_QUICK_GELU : MD_ACT_NONE;
}

/* n: m, n, k. Y_F32: y is f32 whatever the compute type, as gradients of weights are. */
static void build_gemm(op_case *c)
{
    int64_t m = c->row->n[0], n = c->row->n[1], k = c->row->n[2];
    unsigned f = c->row->flags;
    md_gemm_args *a = &c->args.gemm;
    a->a = f & TA ? ACT(c, k, m) : ACT(c, m, k);
    a->b = f & TB ? ACT(c, n, k) : ACT(c, k, n);
    a->bias = f & BIAS ? ACT(c, n) : NULL;
    a->y = f & Y_F32 ? F32(c, m, n) : ACT(c, m, n);
    a->pre = f & PRE ? ACT(c, m, n) : NULL;
    a->trans_a = (f & TA) != 0;
    a->trans_b = (f & TB) != 0;
    a->act = act_of(f);
    a->accumulate = f & ADD ? 1 : 0;
    c->terms = (double)k;
}

/* The activation may take the value before it as pre holds it, rounded; and a library may round to
 * y's type before it adds the bias, and again before it adds what y held, in either order. */
static void ref_gemm(op_case *c, bool mutant)
{
    int64_t m = c->row->n[0], n = c->row->n[1], k = c->row->n[2];
    unsigned f = c->row->flags;
    const double product = f & (BIAS | ADD) && !(f & Y_F32) ? case_eps(c) : 0.0;
    const double with_bias = f & BIAS && f & ADD ? product : 0.0;
    const double *a = X(c, gemm, a), *b = X(c, gemm, b), *bias = X(c, gemm, bias);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = bias ? bias[j] : 0.0;
            for (int64_t l = 0; l < k - (mutant ? 1 : 0); l++)
                sum +=
                    (f & TA ? a[l * m + i] : a[i * k + l]) * (f & TB ? b[j * k + l] : b[l * n + j]);
            const double first = product * fabs(sum - (bias ? bias[j] : 0.0)) +
                                 with_bias * (fabs(sum) + fabs(REF(c, gemm, y)[i * n + j]));
            const double slope = act_of(f) == MD_ACT_NONE ? 1.0 : act_slope(act_of(f), sum);
            const double again = act_of(f) == MD_ACT_NONE ? 0.0 : case_eps(c) * fabs(sum);
            if (REF(c, gemm, pre)) {
                REF(c, gemm, pre)[i * n + j] += sum;
                SLACK(c, gemm, pre)[i * n + j] = first;
            }
            REF(c, gemm, y)[i * n + j] += act_value(act_of(f), sum);
            SLACK(c, gemm, y)[i * n + j] = (first + again) * fabs(slope);
        }
}

/* n: rows, inputs, outputs. PRE: no dx. */
static void build_linear_bwd(op_case *c)
{
    int64_t rows = c->row->n[0], in = c->row->n[1], out = c->row->n[2];
    const bool dx = !(c->row->flags & PRE);
    md_linear_bwd_args *a = &c->args.linear_bwd;
    a->x = ACT(c, rows, in);
    a->w = dx ? ACT(c, out, in) : NULL;
    a->dy = ACT(c, rows, out);
    a->dw = F32(c, out, in);
    a->dx = dx ? ACT(c, rows, in) : NULL;
    a->accumulate = c->row->flags & ADD ? 1 : 0;
    c->terms = (double)MD_MAX(rows, out);
}

static void ref_linear_bwd(op_case *c, bool mutant)
{
    int64_t rows = c->row->n[0], in = c->row->n[1], out = c->row->n[2];
    const double *x = X(c, linear_bwd, x), *w = X(c, linear_bwd, w), *dy = X(c, linear_bwd, dy);
    double *dw = REF(c, linear_bwd, dw), *dx = REF(c, linear_bwd, dx);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = mutant && r == 0 ? 1 : 0; o < out; o++)
            for (int64_t i = 0; i < in; i++) {
                dw[o * in + i] += dy[r * out + o] * x[r * in + i];
                if (dx)
                    dx[r * in + i] += dy[r * out + o] * w[o * in + i];
            }
}

/* <dy, x w^T>, but for what does not change. */
static double objective_linear_bwd(const op_case *c, int o, int64_t i, double h)
{
    int64_t rows = c->row->n[0], in = c->row->n[1], out = c->row->n[2];
    const double *x = X(c, linear_bwd, x), *w = X(c, linear_bwd, w), *dy = X(c, linear_bwd, dy);
    double sum = 0.0;
    if (o == OUT_INDEX(linear_bwd, dw))
        for (int64_t r = 0; r < rows; r++)
            sum += h * dy[r * out + i / in] * x[r * in + i % in];
    else
        for (int64_t k = 0; k < out; k++)
            sum += h * dy[i / in * out + k] * w[k * in + i % in];
    return sum;
}

/* n: rows, cols. */
static void build_colsum(op_case *c)
{
    c->args.colsum.x = ACT(c, c->row->n[0], c->row->n[1]);
    c->args.colsum.y = F32(c, c->row->n[1]);
    c->args.colsum.accumulate = c->row->flags & ADD ? 1 : 0;
    c->terms = (double)c->row->n[0];
}

static void ref_colsum(op_case *c, bool mutant)
{
    int64_t rows = c->row->n[0], cols = c->row->n[1];
    for (int64_t i = 0; i < rows - (mutant ? 1 : 0); i++)
        for (int64_t j = 0; j < cols; j++)
            REF(c, colsum, y)[j] += X(c, colsum, x)[i * cols + j];
}

/* n: rows, a third of the columns. */
static void build_qv_bias_bwd(op_case *c)
{
    c->args.qv_bias_bwd.x = ACT(c, c->row->n[0], 3 * c->row->n[1]);
    c->args.qv_bias_bwd.dq = F32(c, c->row->n[1]);
    c->args.qv_bias_bwd.dv = F32(c, c->row->n[1]);
    c->args.qv_bias_bwd.accumulate = c->row->flags & ADD ? 3 : 0;
    c->terms = (double)c->row->n[0];
}

static void ref_qv_bias_bwd(op_case *c, bool mutant)
{
    const int64_t rows = c->row->n[0], cols = c->row->n[1];
    const double *x = X(c, qv_bias_bwd, x);
    for (int64_t i = 0; i < rows - (mutant ? 1 : 0); i++)
        for (int64_t j = 0; j < cols; j++) {
            REF(c, qv_bias_bwd, dq)[j] += x[i * 3 * cols + j];
            REF(c, qv_bias_bwd, dv)[j] += x[(i * 3 + 2) * cols + j];
        }
}

/* n: rows, cols. PRE: dx is dy. */
static void build_act_bwd(op_case *c)
{
    int64_t rows = c->row->n[0], cols = c->row->n[1];
    md_act_bwd_args *a = &c->args.act_bwd;
    a->x = TENSOR(c, c->compute, FILL_WIDE, rows, cols);
    md_tensor *dy = ACT(c, rows, cols);
    a->dy = dy;
    a->dx = c->row->flags & PRE ? dy : ACT(c, rows, cols);
    a->dbias = c->row->flags & BIAS ? F32(c, cols) : NULL;
    a->accumulate = c->row->flags & ADD ? 2 : 0;
    a->act = act_of(c->row->flags);
    c->terms = (double)rows;
    c->factor = 8.0; /* the slope of gelu is good to a few roundings of its own */
}

/* dbias may add up dx before or after it is rounded. */
static void ref_act_bwd(op_case *c, bool mutant)
{
    int64_t rows = c->row->n[0], cols = c->row->n[1];
    const double *x = X(c, act_bwd, x), *dy = X(c, act_bwd, dy);
    double *dx = REF(c, act_bwd, dx), *dbias = REF(c, act_bwd, dbias);
    for (int64_t i = 0; i < rows * cols; i++) {
        dx[i] = (mutant ? 1.0 + c->bend : 1.0) * dy[i] * act_slope(act_of(c->row->flags), x[i]);
        if (dbias) {
            dbias[i % cols] += dx[i];
            SLACK(c, act_bwd, dbias)[i % cols] += case_eps(c) * fabs(dx[i]);
        }
    }
}

static double objective_act_bwd(const op_case *c, int o, int64_t i, double h)
{
    if (o != OUT_INDEX(act_bwd, dx))
        return NAN;
    md_act act = act_of(c->row->flags);
    double x = X(c, act_bwd, x)[i];
    return X(c, act_bwd, dy)[i] * (act_value(act, x + h) - act_value(act, x));
}

#define GEMM(m, n, k, f)                                     \
    {                                                        \
        MD_OP_gemm, build_gemm, ref_gemm, {m, n, k}, f, NULL \
    }
#define GEMM_FLAGS(m, n, k)                                                           \
    GEMM(m, n, k, 0), GEMM(m, n, k, TA), GEMM(m, n, k, TB), GEMM(m, n, k, TA | TB),   \
        GEMM(m, n, k, TB | BIAS), GEMM(m, n, k, TA | ADD), GEMM(m, n, k, BIAS | ADD), \
        GEMM(m, n, k, TB | BIAS | GELU), GEMM(m, n, k, TB | BIAS | QUICK),            \
        GEMM(m, n, k, TB | BIAS | GELU | PRE), GEMM(m, n, k, BIAS | QUICK | PRE),     \
        GEMM(m, n, k, BIAS), GEMM(m, n, k, GELU), GEMM(m, n, k, TB | GELU)
#define LINEAR_BWD(r, i, o, f)                                                                 \
    {                                                                                          \
        MD_OP_linear_bwd, build_linear_bwd, ref_linear_bwd, {r, i, o}, f, objective_linear_bwd \
    }
#define COLSUM(r, c, f)                                         \
    {                                                           \
        MD_OP_colsum, build_colsum, ref_colsum, {r, c}, f, NULL \
    }
#define QV_BIAS_BWD(r, c, f)                                                   \
    {                                                                          \
        MD_OP_qv_bias_bwd, build_qv_bias_bwd, ref_qv_bias_bwd, {r, c}, f, NULL \
    }
#define ACT_BWD(r, c, f)                                                        \
    {                                                                           \
        MD_OP_act_bwd, build_act_bwd, ref_act_bwd, {r, c}, f, objective_act_bwd \
    }

const op_row gemm_rows[] = {
    GEMM_FLAGS(1, 1, 1),
    GEMM_FLAGS(3, 17, 5),
    GEMM_FLAGS(17, 1, 65),
    GEMM_FLAGS(65, 3, 1),
    GEMM_FLAGS(197, 65, 48),
    GEMM_FLAGS(257, 96, 80),
    GEMM_FLAGS(64, 192, 768),
    GEMM(1, 1, 1, TA | ADD | Y_F32),
    GEMM(17, 33, 65, TA | ADD | Y_F32),
    GEMM(96, 80, 257, TA | ADD | Y_F32),
    GEMM(65, 64, 197, Y_F32),
    LINEAR_BWD(1, 1, 1, 0),
    LINEAR_BWD(3, 17, 5, ADD),
    LINEAR_BWD(65, 33, 48, PRE | ADD),
    LINEAR_BWD(197, 64, 80, 0),
    LINEAR_BWD(257, 80, 96, ADD),
    LINEAR_BWD(64, 192, 256, PRE),
    COLSUM(1, 1, 0),
    COLSUM(3, 17, ADD),
    COLSUM(257, 1, 0),
    COLSUM(197, 259, ADD),
    COLSUM(1030, 64, 0),
    QV_BIAS_BWD(1, 1, 0),
    QV_BIAS_BWD(3, 17, ADD),
    QV_BIAS_BWD(197, 65, 0),
    QV_BIAS_BWD(257, 1, ADD),
    QV_BIAS_BWD(197, 264, 0),
    QV_BIAS_BWD(1030, 64, 0),
    ACT_BWD(1, 1, GELU),
    ACT_BWD(3, 17, GELU | BIAS),
    ACT_BWD(65, 257, QUICK | BIAS | ADD),
    ACT_BWD(197, 64, GELU | BIAS | PRE),
    ACT_BWD(197, 64, QUICK | PRE),
    ACT_BWD(17, 33, BIAS),
    ACT_BWD(17, 33, BIAS | PRE | ADD),
};
const int gemm_row_count = (int)MD_COUNT(gemm_rows);
