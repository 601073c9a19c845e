/* ops_entropy: cases of cross_entropy. */
#include "tests/ops/ops_case.h"

#include <math.h>

enum { DLOGITS = 1, IN_PLACE = 2, ADD = 4, LARGE = 8 };

/* n: rows, classes. Rows of the target sum to about 1. LARGE: logits of thousands. */
static void build_cross_entropy(op_case *c)
{
    int64_t rows = c->row->n[0], k = c->row->n[1];
    unsigned f = c->row->flags;
    md_cross_entropy_args *a = &c->args.cross_entropy;
    md_tensor *logits = TENSOR(c, c->compute, FILL_WIDE, rows, k);
    md_tensor *target = TENSOR(c, MD_F32, FILL_POSITIVE, rows, k);
    for (int64_t i = 0; i < rows * k; i++) {
        if (f & LARGE)
            case_store(logits, i, 1000.0 * case_load(logits, i));
        md_f32(target)[i] *= 1.8f / (float)k;
    }
    a->logits = logits;
    a->target = target;
    a->loss = TENSOR(c, MD_F64, FILL_UNIT, 1);
    a->dlogits = f & IN_PLACE ? logits : f & DLOGITS ? ACT(c, rows, k) : NULL;
    a->accumulate = f & ADD ? 1 : 0;
    a->scale = 1.0f / (float)rows;
    c->factor = 8.0; /* the terms are rounded to float, their sum is not */
}

/* log of the sum of e^logit of a row, logit i of it moved by h, and of nothing else. */
static double log_sum(const double *x, int64_t k, int64_t i, double h)
{
    double most = -INFINITY, sum = 0.0;
    for (int64_t j = 0; j < k; j++)
        most = fmax(most, x[j]);
    for (int64_t j = 0; j < k; j++)
        sum += exp(x[j] + (j == i ? h : 0.0) - most);
    return most + log(sum);
}

static void ref_cross_entropy(op_case *c, bool mutant)
{
    int64_t rows = c->row->n[0], k = c->row->n[1];
    double scale = (double)c->args.cross_entropy.scale;
    for (int64_t b = 0; b < rows; b++) {
        const double *x = X(c, cross_entropy, logits) + b * k;
        const double *target = X(c, cross_entropy, target) + b * k;
        double norm = log_sum(x, k, 0, 0.0), all = 0.0;
        for (int64_t i = 0; i < k; i++) {
            double t = mutant && i == 0 ? 0.0 : target[i];
            all += t;
            REF(c, cross_entropy, loss)[0] += scale * t * (norm - x[i]);
        }
        for (int64_t i = 0; i < k && c->args.cross_entropy.dlogits; i++)
            REF(c, cross_entropy, dlogits)
        [b * k + i] += scale * (exp(x[i] - norm) * all - target[i]);
    }
}

static double objective_cross_entropy(const op_case *c, int o, int64_t i, double h)
{
    if (o != OUT_INDEX(cross_entropy, dlogits))
        return NAN;
    int64_t k = c->row->n[1], at = i % k;
    const double *x = X(c, cross_entropy, logits) + i - at;
    const double *target = X(c, cross_entropy, target) + i - at;
    double all = 0.0;
    for (int64_t j = 0; j < k; j++)
        all += target[j];
    return (double)c->args.cross_entropy.scale *
           (all * log_sum(x, k, at, h) - target[at] * (x[at] + h));
}

#define CROSS_ENTROPY(b, k, f)                                                  \
    {                                                                           \
        MD_OP_cross_entropy, build_cross_entropy, ref_cross_entropy, {b, k}, f, \
            objective_cross_entropy                                             \
    }

const op_row entropy_rows[] = {
    CROSS_ENTROPY(1, 2, DLOGITS),
    CROSS_ENTROPY(3, 17, 0),
    CROSS_ENTROPY(5, 1000, DLOGITS),
    CROSS_ENTROPY(65, 1000, IN_PLACE | ADD),
    CROSS_ENTROPY(7, 129, IN_PLACE | LARGE),
    CROSS_ENTROPY(3, 64, LARGE | ADD),
    CROSS_ENTROPY(2, 21841, DLOGITS),
};
const int entropy_row_count = (int)MD_COUNT(entropy_rows);
