/* ops_case: see ops_case.h. */
#include "tests/ops/ops_case.h"

#include "kernels/scalar_math.h"
#include "src/rng.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#include <float.h>
#include <math.h>
#include <string.h>

#define GUARD      256
#define GUARD_BYTE 0xA7

static void *case_block(op_case *c, size_t bytes)
{
    assert_true(c->blocks < CASE_BLOCKS);
    void *p = md_alloc(bytes, "op case");
    assert_non_null(p);
    return c->block[c->blocks++] = p;
}

double *case_array(op_case *c, int64_t n)
{
    return case_block(c, sizeof(double) * (size_t)n);
}

static double draw(md_rng *r, case_fill fill)
{
    double u = (double)md_rng_float(r);
    switch (fill) {
    case FILL_UNIT:
        return 2.0 * u - 1.0;
    case FILL_POSITIVE:
        return 0.1 + 0.9 * u;
    case FILL_WIDE:
        return 16.0 * u - 8.0;
    case FILL_BITS:
        return u < 0.4 ? 1.0 : 0.0;
    case FILL_BYTES:
        return floor(256.0 * u);
    }
    return 0.0;
}

static void store(const md_tensor *t, int64_t i, double value)
{
    switch (t->dtype) {
    case MD_F32:
        ((float *)t->data)[i] = (float)value;
        break;
    case MD_F64:
        ((double *)t->data)[i] = value;
        break;
    case MD_BF16:
        ((uint16_t *)t->data)[i] = md_bf16_from_f32((float)value);
        break;
    case MD_I32:
        ((int32_t *)t->data)[i] = (int32_t)value;
        break;
    default:
        ((uint8_t *)t->data)[i] = (uint8_t)value;
    }
}

static double load(const md_tensor *t, int64_t i)
{
    switch (t->dtype) {
    case MD_F32:
        return (double)((const float *)t->data)[i];
    case MD_F64:
        return ((const double *)t->data)[i];
    case MD_BF16:
        return (double)md_f32_from_bf16(((const uint16_t *)t->data)[i]);
    case MD_I32:
        return (double)((const int32_t *)t->data)[i];
    default:
        return (double)((const uint8_t *)t->data)[i];
    }
}

md_tensor *case_tensor(op_case *c, md_dtype dtype, case_fill fill, int rank, const int64_t *dim)
{
    md_tensor *t = &c->tensor[c->tensors++];
    *t = md_tensor_make(NULL, dtype, rank, dim);
    size_t bytes = md_tensor_bytes(t);
    unsigned char *raw = case_block(c, bytes + 2 * GUARD);
    memset(raw, GUARD_BYTE, bytes + 2 * GUARD);
    t->data = raw + GUARD;
    md_rng r = md_rng_at(c->seed, MD_RNG_TEST, 0, (uint64_t)c->tensors);
    for (int64_t i = 0; i < md_tensor_count(t); i++)
        store(t, i, draw(&r, fill));
    return t;
}

static double *to_double(op_case *c, const md_tensor *t)
{
    double *x = case_array(c, md_tensor_count(t));
    for (int64_t i = 0; i < md_tensor_count(t); i++)
        x[i] = load(t, i);
    return x;
}

void case_begin(op_case *c, const op_row *row)
{
    *c = (op_case){.row = row, .terms = 1.0, .factor = 4.0, .seed = 1 + (uint64_t)row->op};
    row->build(c);
    for (int i = 0; i < MD_OP_IN; i++)
        if (c->args.common.in[i])
            c->x[i] = to_double(c, c->args.common.in[i]);
    for (int o = 0; o < MD_OP_OUT; o++) {
        const md_tensor *t = c->args.common.out[o];
        if (t)
            c->ref[o] = c->args.common.accumulate >> o & 1 ? to_double(c, t)
                                                           : case_array(c, md_tensor_count(t));
    }
}

void case_end(op_case *c)
{
    for (int i = 0; i < c->blocks; i++)
        md_free(c->block[i]);
}

static md_status call_op(md_backend *be, md_op op, const op_args *a)
{
    switch (op) {
#define CALL_OP(name)  \
    case MD_OP_##name: \
        return be->ops->name(be, &a->name);
        MD_OPS(CALL_OP)
#undef CALL_OP
    default:
        return MD_ERR_BUG;
    }
}

static void check_guards(const op_case *c)
{
    for (int i = 0; i < c->tensors; i++) {
        const unsigned char *data = c->tensor[i].data;
        size_t bytes = md_tensor_bytes(&c->tensor[i]);
        for (size_t g = 0; g < GUARD; g++)
            if (data[-1 - (int)g] != GUARD_BYTE || data[bytes + g] != GUARD_BYTE)
                fail_msg("%s wrote outside tensor %d", md_op_name(c->row->op), i);
    }
}

void case_run(op_case *c, md_backend *be)
{
    size_t need = be->scratch_bytes(be, c->row->op, &c->args.common);
    unsigned char *scratch = md_alloc(need + GUARD, "op scratch");
    assert_non_null(scratch);
    memset(scratch, GUARD_BYTE, need + GUARD);
    be->scratch = scratch;
    be->scratch_size = need;
    md_status st = call_op(be, c->row->op, &c->args);
    if (st != MD_OK)
        fail_msg("%s on %s: %s", md_op_name(c->row->op), be->name, md_error_text());
    for (size_t g = 0; g < GUARD; g++)
        if (scratch[need + g] != GUARD_BYTE)
            fail_msg("%s on %s wrote beyond its scratch", md_op_name(c->row->op), be->name);
    md_free(scratch);
    be->scratch = NULL;
    be->scratch_size = 0;
    check_guards(c);
}

double case_error(const op_case *c)
{
    double worst = 0.0;
    for (int o = 0; o < MD_OP_OUT; o++) {
        const md_tensor *t = c->args.common.out[o];
        if (!t)
            continue;
        double scale = 0.0, error = 0.0;
        for (int64_t i = 0; i < md_tensor_count(t); i++) {
            double e = fabs(load(t, i) - c->ref[o][i]);
            scale = fmax(scale, fabs(c->ref[o][i]));
            error = e > error || isnan(e) ? e : error;
        }
        double eps = t->dtype == MD_BF16 ? 0x1p-8 : (double)FLT_EPSILON;
        double tolerance = eps * sqrt(c->terms) * c->factor * scale;
        if (isnan(error) || (error > 0.0 && tolerance == 0.0))
            return INFINITY;
        worst = error > 0.0 ? fmax(worst, error / tolerance) : worst;
    }
    return worst;
}
