/* ops_case: see ops_case.h. */
#include "tests/ops/ops_case.h"

#include "kernels/scalar_math.h"
#include "src/rng.h"
#include "tests/ops/fake_device.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, bytes)   ((void)(p), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(p, bytes) ((void)(p), (void)(bytes))
#endif

#define GUARD      256
#define GUARD_BYTE 0xA7
#define EPS_BF16   0x1p-8 /* largest relative error of a rounding to bf16 */

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

void case_store(const md_tensor *t, int64_t i, double value)
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

double case_load(const md_tensor *t, int64_t i)
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

static size_t shift_of(const op_case *c, const md_tensor *t)
{
    return t->dtype == MD_F32 ? c->shift : 0;
}

md_tensor *case_tensor(op_case *c, md_dtype dtype, case_fill fill, int rank, const int64_t *dim)
{
    md_tensor *t = &c->tensor[c->tensors++];
    *t = md_tensor_make(NULL, dtype, rank, dim);
    size_t bytes = md_tensor_bytes(t), shift = shift_of(c, t);
    unsigned char *raw = (unsigned char *)case_block(c, shift + bytes + 2 * GUARD) + shift;
    memset(raw, GUARD_BYTE, bytes + 2 * GUARD);
    t->data = raw + GUARD;
    md_rng r = md_rng_at(c->seed, MD_RNG_TEST, 0, (uint64_t)c->tensors);
    for (int64_t i = 0; i < md_tensor_count(t); i++)
        case_store(t, i, draw(&r, fill));
    return t;
}

static double *to_double(op_case *c, const md_tensor *t)
{
    double *x = case_array(c, md_tensor_count(t));
    for (int64_t i = 0; i < md_tensor_count(t); i++)
        x[i] = case_load(t, i);
    return x;
}

double case_eps(const op_case *c)
{
    return c->compute == MD_BF16 ? EPS_BF16 : 0.0;
}

void case_begin(op_case *c, const op_row *row, md_dtype compute)
{
    *c = (op_case){.row = row,
                   .compute = compute,
                   .terms = 1.0,
                   .factor = 4.0,
                   .bend = compute == MD_BF16 ? 0.03 : 1e-3,
                   .seed = 1 + (uint64_t)row->op};
    row->build(c);
    for (int i = 0; i < MD_OP_IN; i++)
        if (c->args.common.in[i])
            c->x[i] = to_double(c, c->args.common.in[i]);
    for (int o = 0; o < MD_OP_OUT; o++) {
        const md_tensor *t = c->args.common.out[o];
        if (!t)
            continue;
        c->ref[o] = c->args.common.accumulate >> o & 1 ? to_double(c, t)
                                                       : case_array(c, md_tensor_count(t));
        c->slack[o] = case_array(c, md_tensor_count(t));
    }
}

bool case_is_empty(const op_case *c)
{
    for (int i = 0; i < c->tensors; i++)
        if (md_tensor_count(&c->tensor[i]) == 0)
            return true;
    return false;
}

bool case_is_heavy(const op_case *c)
{
    const char *light = getenv("MD_TEST_LIGHT");
    const long thousand = light ? strtol(light, NULL, 10) : 0;
    const int64_t limit = 1000 * (thousand > 1 ? thousand : 400);
    int64_t elements = 0;
    for (int i = 0; i < c->tensors; i++)
        elements += md_tensor_count(&c->tensor[i]);
    return elements > limit;
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

/* ---- a run ---- */

/* An operand in the memory of the backend, between guards: raw, a shift behind the block. */
typedef struct placed {
    unsigned char *block, *raw;
    md_tensor tensor;
    bool is_output;
} placed;

typedef struct run {
    op_case *c;
    md_backend *be;
    op_args args; /* the case's, on the operands that are placed */
    placed operand[MD_OP_IN + MD_OP_OUT];
} run;

static void must(const run *r, md_status st)
{
    if (st != MD_OK)
        fail_msg("%s on %s: %s", md_op_name(r->c->row->op), r->be->name, md_error_text());
}

static unsigned char *host_raw(const md_tensor *t)
{
    return (unsigned char *)t->data - GUARD;
}

/* A block of the backend's memory with a copy of `bytes` from its byte `shift` on. */
static unsigned char *device_copy(const run *r, const void *from, size_t bytes, size_t shift)
{
    void *block;
    must(r, md_backend_alloc(r->be, shift + bytes, "an operand", &block));
    must(r, md_backend_upload(r->be, (unsigned char *)block + shift, from, bytes));
    must(r, md_backend_sync(r->be));
    return block;
}

/* The operand's twin; operands that are one tensor stay one. */
static md_tensor *twin(run *r, const md_tensor *t)
{
    return t ? &r->operand[t - r->c->tensor].tensor : NULL;
}

static void place(run *r)
{
    op_case *c = r->c;
    for (int i = 0; i < c->tensors; i++) {
        placed *p = &r->operand[i];
        p->tensor = c->tensor[i];
        const size_t bytes = md_tensor_bytes(&p->tensor), shift = shift_of(c, &p->tensor);
        p->block = device_copy(r, host_raw(&c->tensor[i]), bytes + 2 * GUARD, shift);
        p->raw = p->block + shift;
        p->tensor.data = p->raw + GUARD;
        p->tensor.mem = md_backend_is_device(r->be) ? MD_DEVICE : MD_HOST;
    }
    r->args = c->args;
    for (int i = 0; i < MD_OP_IN; i++)
        r->args.common.in[i] = twin(r, c->args.common.in[i]);
    for (int o = 0; o < MD_OP_OUT; o++) {
        r->args.common.out[o] = twin(r, c->args.common.out[o]);
        if (c->args.common.out[o])
            r->operand[c->args.common.out[o] - c->tensor].is_output = true;
    }
}

static void check_guards(const run *r, const unsigned char *raw, size_t bytes, const char *what)
{
    for (size_t g = 0; g < GUARD; g++)
        if (raw[g] != GUARD_BYTE || raw[GUARD + bytes + g] != GUARD_BYTE)
            fail_msg("%s on %s wrote outside %s", md_op_name(r->c->row->op), r->be->name, what);
}

/* Brings one operand back, into the case if it is an output. */
static void collect(run *r, int i)
{
    placed *p = &r->operand[i];
    size_t bytes = md_tensor_bytes(&p->tensor);
    unsigned char *back = md_alloc(bytes + 2 * GUARD, "op case");
    assert_non_null(back);
    must(r, md_backend_download(r->be, back, p->raw, bytes + 2 * GUARD));
    must(r, md_backend_sync(r->be));
    char name[24];
    snprintf(name, sizeof name, "tensor %d", i);
    check_guards(r, back, bytes, name);
    if (p->is_output)
        memcpy(r->c->tensor[i].data, back + GUARD, bytes);
    else if (memcmp(r->c->tensor[i].data, back + GUARD, bytes) != 0)
        fail_msg("%s on %s changed %s, an input", md_op_name(r->c->row->op), r->be->name, name);
    md_free(back);
    md_backend_free(r->be, p->block);
}

/* Scratch starts as NaN in every type, between guards. */
static unsigned char *scratch_begin(run *r)
{
    md_backend *be = r->be;
    size_t need = be->scratch_bytes ? be->scratch_bytes(be, r->c->row->op, &r->args.common) : 0;
    if (need == MD_NO_SCRATCH)
        must(r, MD_ERR_MEMORY);
    unsigned char *fill = md_alloc(need + 2 * GUARD, "op scratch");
    assert_non_null(fill);
    memset(fill, GUARD_BYTE, need + 2 * GUARD);
    memset(fill + GUARD, 0xff, need);
    unsigned char *raw = device_copy(r, fill, need + 2 * GUARD, 0);
    md_free(fill);
    be->scratch = raw + GUARD;
    be->scratch_size = need;
    return raw;
}

static void scratch_end(run *r, unsigned char *raw)
{
    size_t bytes = r->be->scratch_size;
    unsigned char *back = md_alloc(bytes + 2 * GUARD, "op scratch");
    assert_non_null(back);
    must(r, md_backend_download(r->be, back, raw, bytes + 2 * GUARD));
    must(r, md_backend_sync(r->be));
    check_guards(r, back, bytes, "its scratch");
    md_free(back);
    md_backend_free(r->be, raw);
    r->be->scratch = NULL;
    r->be->scratch_size = 0;
}

/* AddressSanitizer finds what is read outside, too, where the host reaches the memory: of a GPU's
 * it only takes note. */
static void forbid(unsigned char *raw, size_t bytes)
{
    ASAN_POISON_MEMORY_REGION(fake_device_host(raw), GUARD);
    ASAN_POISON_MEMORY_REGION(fake_device_host(raw + GUARD + bytes), GUARD);
}

static void allow(unsigned char *raw, size_t bytes)
{
    ASAN_UNPOISON_MEMORY_REGION(fake_device_host(raw), bytes + 2 * GUARD);
}

/* change: forbid or allow, for the guards of all operands and of the scratch. */
static void guards(const run *r, unsigned char *scratch, void (*change)(unsigned char *, size_t))
{
    change(scratch, r->be->scratch_size);
    for (int i = 0; i < r->c->tensors; i++)
        change(r->operand[i].raw, md_tensor_bytes(&r->operand[i].tensor));
}

void case_run(op_case *c, md_backend *be)
{
    run r = {.c = c, .be = be};
    place(&r);
    unsigned char *scratch = scratch_begin(&r);
    guards(&r, scratch, forbid);
    must(&r, call_op(be, c->row->op, &r.args));
    must(&r, md_backend_sync(be));
    guards(&r, scratch, allow);
    scratch_end(&r, scratch);
    for (int i = 0; i < c->tensors; i++)
        collect(&r, i);
}

/* ---- the comparison ---- */

static double rounded(const md_tensor *t, double value)
{
    if (t->dtype == MD_BF16)
        return (double)md_f32_from_bf16(md_bf16_from_f32((float)value));
    return t->dtype == MD_F32 ? (double)(float)value : value;
}

/* Largest error of an output over its tolerance. */
static double output_error(const op_case *c, int o)
{
    const md_tensor *t = c->args.common.out[o];
    const double *ref = c->ref[o];
    double scale = 0.0, worst = 0.0;
    for (int64_t i = 0; i < md_tensor_count(t); i++)
        scale = fmax(scale, fabs(ref[i]));
    double common = (double)FLT_EPSILON * sqrt(c->terms) * c->factor * scale;
    for (int64_t i = 0; i < md_tensor_count(t); i++) {
        double right = c->factor > 0.0 ? ref[i] : rounded(t, ref[i]);
        double error = fabs(case_load(t, i) - right), tolerance = common + c->slack[o][i];
        if (t->dtype == MD_BF16 && c->factor > 0.0)
            tolerance += EPS_BF16 * fabs(ref[i]);
        if (isnan(error) || (error > 0.0 && tolerance == 0.0))
            return INFINITY;
        worst = error > 0.0 ? fmax(worst, error / tolerance) : worst;
    }
    return worst;
}

double case_error(const op_case *c)
{
    double worst = 0.0;
    for (int o = 0; o < MD_OP_OUT; o++)
        if (c->args.common.out[o])
            worst = fmax(worst, output_error(c, o));
    return worst;
}
