/* ops_vector: cases of loss, sumsq, adamw, qv_bias, axpy and cast. */
#include "tests/ops/ops_case.h"

#include <math.h>

enum { L1 = 1, L2 = 2, DPRED = 4, ADD = 8, IN_PLACE = 16, COPY = 32 };

static md_loss_kind kind_of(const op_case *c)
{
    return c->row->flags & L1 ? MD_LOSS_L1 : c->row->flags & L2 ? MD_LOSS_L2 : MD_LOSS_SMOOTH_L1;
}

static double loss_value(md_loss_kind kind, double d, double beta)
{
    if (kind == MD_LOSS_L1)
        return fabs(d);
    if (kind == MD_LOSS_L2)
        return d * d;
    return fabs(d) < beta ? 0.5 * d * d / beta : fabs(d) - 0.5 * beta;
}

static double loss_slope(md_loss_kind kind, double d, double beta)
{
    if (kind == MD_LOSS_L2)
        return 2.0 * d;
    if (kind == MD_LOSS_L1 || fabs(d) >= beta)
        return d > 0.0 ? 1.0 : d < 0.0 ? -1.0 : 0.0;
    return d / beta;
}

/* n: rows, cols. */
static void build_loss(op_case *c)
{
    int64_t rows = c->row->n[0], cols = c->row->n[1];
    md_loss_args *a = &c->args.loss;
    md_tensor *pred = TENSOR(c, c->compute, FILL_WIDE, rows, cols);
    a->pred = pred;
    a->target = ACT(c, rows, cols);
    a->loss = TENSOR(c, MD_F64, FILL_UNIT, 1);
    a->dpred = c->row->flags & IN_PLACE ? pred : c->row->flags & DPRED ? ACT(c, rows, cols) : NULL;
    a->accumulate = c->row->flags & ADD ? 1 : 0;
    a->kind = kind_of(c);
    a->beta = 2.0f;
    a->scale = 1.0f / (float)(rows * cols);
    c->factor = 4.0; /* the terms are rounded to float, their sum is not */
}

static void ref_loss(op_case *c, bool mutant)
{
    const md_loss_args *a = &c->args.loss;
    double beta = (double)a->beta, scale = (double)a->scale;
    int64_t n = c->row->n[0] * c->row->n[1];
    for (int64_t i = 0; i < n; i++) {
        double d = X(c, loss, pred)[i] - X(c, loss, target)[i];
        if (mutant && i == n - 1)
            d *= 0.5;
        REF(c, loss, loss)[0] += scale * loss_value(a->kind, d, beta);
        if (REF(c, loss, dpred))
            REF(c, loss, dpred)[i] += scale * loss_slope(a->kind, d, beta);
    }
}

static double objective_loss(const op_case *c, int o, int64_t i, double h)
{
    if (o != OUT_INDEX(loss, dpred))
        return NAN;
    const md_loss_args *a = &c->args.loss;
    double d = X(c, loss, pred)[i] - X(c, loss, target)[i] + h;
    return (double)a->scale * loss_value(a->kind, d, (double)a->beta);
}

/* n: elements. */
static void build_sumsq(op_case *c)
{
    c->args.sumsq.x = TENSOR(c, MD_F32, FILL_WIDE, c->row->n[0]);
    c->args.sumsq.sum = TENSOR(c, MD_F64, FILL_UNIT, 1);
    c->args.sumsq.nonfinite = TENSOR(c, MD_F64, FILL_BYTES, 1);
    c->args.sumsq.accumulate = c->row->flags & ADD ? 3 : 0;
    c->factor = 1e-6; /* f64 throughout */
}

static void ref_sumsq(op_case *c, bool mutant)
{
    const double *x = X(c, sumsq, x);
    for (int64_t i = mutant ? 1 : 0; i < c->row->n[0]; i++)
        REF(c, sumsq, sum)[0] += x[i] * x[i];
}

/* n: elements, step. */
static void build_adamw(op_case *c)
{
    int64_t n = c->row->n[0];
    md_adamw_args *a = &c->args.adamw;
    a->grad = F32(c, n);
    a->param = F32(c, n);
    a->m = F32(c, n);
    a->v = TENSOR(c, MD_F32, FILL_POSITIVE, n);
    if (c->row->flags & COPY)
        a->copy = TENSOR(c, MD_BF16, FILL_UNIT, n);
    a->accumulate = 7;
    a->lr = 1e-2, a->beta1 = 0.9, a->beta2 = 0.98, a->eps = 1e-6;
    a->weight_decay = 0.05, a->grad_scale = 0.5;
    a->step = c->row->n[1];
    c->factor = 8.0;
}

static void ref_adamw(op_case *c, bool mutant)
{
    const md_adamw_args *a = &c->args.adamw;
    double b1 = a->beta1, b2 = a->beta2, lr = a->lr;
    double c1 = 1.0 - pow(b1, (double)a->step), c2 = 1.0 - pow(b2, (double)a->step);
    for (int64_t i = 0; i < c->row->n[0]; i++) {
        double *p = REF(c, adamw, param), *m = REF(c, adamw, m), *v = REF(c, adamw, v);
        double g = X(c, adamw, grad)[i] * a->grad_scale;
        m[i] = b1 * m[i] + (1.0 - b1) * g;
        v[i] = b2 * v[i] + (1.0 - b2) * g * g;
        p[i] -= mutant ? 0.0 : lr * a->weight_decay * p[i];
        p[i] -= lr * (m[i] / c1) / (sqrt(v[i] / c2) + a->eps);
        if (a->copy)
            REF(c, adamw, copy)[i] = p[i];
    }
}

/* n: a third. */
static void build_qv_bias(op_case *c)
{
    const int64_t n = c->row->n[0];
    c->args.qv_bias.q = ACT(c, n);
    c->args.qv_bias.v = ACT(c, n);
    c->args.qv_bias.y = ACT(c, 3 * n);
    c->factor = 0.0;
}

static void ref_qv_bias(op_case *c, bool mutant)
{
    const int64_t n = c->row->n[0];
    for (int64_t i = 0; i < n; i++) {
        REF(c, qv_bias, y)[i] = X(c, qv_bias, q)[i];
        REF(c, qv_bias, y)[2 * n + i] = X(c, qv_bias, v)[mutant ? n - 1 - i : i];
    }
    if (mutant)
        REF(c, qv_bias, y)[n] = 1.0;
}

static void build_axpy(op_case *c)
{
    md_tensor *x = ACT(c, c->row->n[0]);
    c->args.axpy.x = x;
    c->args.axpy.y = c->row->flags & IN_PLACE ? x : ACT(c, c->row->n[0]);
    c->args.axpy.alpha = 0.3f;
    c->args.axpy.accumulate = c->row->flags & ADD ? 1 : 0;
    c->factor = 2.0;
}

static void ref_axpy(op_case *c, bool mutant)
{
    for (int64_t i = mutant ? 1 : 0; i < c->row->n[0]; i++)
        REF(c, axpy, y)[i] += (double)0.3f * X(c, axpy, x)[i];
}

/* n: elements, type of x, type of y. */
static void build_cast(op_case *c)
{
    const int64_t *n = c->row->n;
    c->args.cast.x = TENSOR(c, (md_dtype)n[1], FILL_WIDE, n[0]);
    c->args.cast.y = TENSOR(c, (md_dtype)n[2], FILL_UNIT, n[0]);
    c->factor = 0.0;
}

static void ref_cast(op_case *c, bool mutant)
{
    for (int64_t i = mutant ? 1 : 0; i < c->row->n[0]; i++)
        REF(c, cast, y)[i] = X(c, cast, x)[i];
}

#define LOSS(r, k, f)                                               \
    {                                                               \
        MD_OP_loss, build_loss, ref_loss, {r, k}, f, objective_loss \
    }
#define SUMSQ(n, f)                                       \
    {                                                     \
        MD_OP_sumsq, build_sumsq, ref_sumsq, {n}, f, NULL \
    }
#define ADAMW(n, t, f)                                       \
    {                                                        \
        MD_OP_adamw, build_adamw, ref_adamw, {n, t}, f, NULL \
    }
#define CAST(n, x, y)                                        \
    {                                                        \
        MD_OP_cast, build_cast, ref_cast, {n, x, y}, 0, NULL \
    }
#define QV_BIAS(n)                                              \
    {                                                           \
        MD_OP_qv_bias, build_qv_bias, ref_qv_bias, {n}, 0, NULL \
    }
#define AXPY(n, f)                                     \
    {                                                  \
        MD_OP_axpy, build_axpy, ref_axpy, {n}, f, NULL \
    }

const op_row vector_rows[] = {
    LOSS(1, 1, DPRED),
    LOSS(3, 17, 0),
    LOSS(65, 257, DPRED),
    LOSS(65, 257, IN_PLACE | ADD),
    LOSS(17, 65, L1),
    LOSS(17, 65, L1 | DPRED | ADD),
    LOSS(197, 64, L2),
    LOSS(197, 64, L2 | IN_PLACE),
    SUMSQ(1, 0),
    SUMSQ(17, ADD),
    SUMSQ(257 * 65, 0),
    ADAMW(1, 1, 0),
    ADAMW(17, 2, COPY),
    ADAMW(12289, 1000, COPY),
    QV_BIAS(1),
    QV_BIAS(17),
    QV_BIAS(1280),
    AXPY(1, 0),
    AXPY(17, ADD),
    AXPY(12289, IN_PLACE),
    AXPY(12289, ADD),
    CAST(1, MD_F32, MD_BF16),
    CAST(12289, MD_F32, MD_BF16),
    CAST(17, MD_BF16, MD_F32),
    CAST(257, MD_BF16, MD_BF16),
    CAST(257, MD_F32, MD_F32),
};
const int vector_row_count = (int)MD_COUNT(vector_rows);
