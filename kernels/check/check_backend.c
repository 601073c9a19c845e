/* check_backend: see check_backend.h. It works through md_operands and the rows of MD_OPS, so it
 * knows no op by name. */
#include "kernels/check/check_backend.h"
#include "kernels/scalar_math.h"

#include <math.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* A quiet NaN with a payload no arithmetic makes. As f64 it is a NaN too. */
#define POISON 0x7ff5a5a5u

typedef struct watch {
    md_op op;
    const md_operands *a;
    bool shared_in[MD_OP_IN], shared_out[MD_OP_OUT]; /* overlaps an operand of the other side */
    XXH64_hash_t hash[MD_OP_IN];
} watch;

static bool overlap(const md_tensor *a, const md_tensor *b)
{
    const char *x = a->data, *y = b->data;
    return x < y + md_tensor_bytes(b) && y < x + md_tensor_bytes(a);
}

static bool is_floating(const md_tensor *t)
{
    return t->dtype == MD_F32 || t->dtype == MD_BF16 || t->dtype == MD_F64;
}

static void poison(const md_tensor *t)
{
    uint16_t *half = t->data;
    for (size_t i = 0; i < md_tensor_bytes(t) / sizeof *half; i++)
        half[i] = (uint16_t)(t->dtype == MD_BF16 || i % 2 == 1 ? POISON >> 16 : POISON & 0xffff);
}

static md_status check_memory(md_op op, const md_tensor *t, const char *name)
{
    if (t && (!t->data || t->mem == MD_DEVICE))
        MD_FAIL(MD_ERR_BUG, "%s: operand %s has no host memory", md_op_name(op), name);
    if (t && (uintptr_t)t->data % md_dtype_bytes((md_dtype)t->dtype) != 0)
        MD_FAIL(MD_ERR_BUG, "%s: operand %s is not aligned to its type", md_op_name(op), name);
    return MD_OK;
}

static md_status watch_begin(watch *w)
{
    const md_operands *a = w->a;
    MD_TRY(md_op_check(w->op, a));
    for (int i = 0; i < MD_OP_IN; i++)
        MD_TRY(check_memory(w->op, a->in[i], md_op_in_name(w->op, i)));
    for (int o = 0; o < MD_OP_OUT; o++) {
        MD_TRY(check_memory(w->op, a->out[o], md_op_out_name(w->op, o)));
        for (int i = 0; a->out[o] && i < MD_OP_IN; i++)
            if (a->in[i] && overlap(a->out[o], a->in[i])) {
                if (a->out[o]->data != a->in[i]->data || !md_op_may_share(w->op, i, o))
                    MD_FAIL(MD_ERR_BUG, "%s: output %d (%s) shares memory with input %d (%s)",
                            md_op_name(w->op), o, md_op_out_name(w->op, o), i,
                            md_op_in_name(w->op, i));
                w->shared_in[i] = w->shared_out[o] = true;
            }
        for (int p = 0; a->out[o] && p < o; p++)
            if (a->out[p] && overlap(a->out[o], a->out[p]))
                MD_FAIL(MD_ERR_BUG, "%s: outputs %d and %d share memory", md_op_name(w->op), p, o);
    }
    for (int i = 0; i < MD_OP_IN; i++)
        if (a->in[i] && !w->shared_in[i])
            w->hash[i] = XXH3_64bits(a->in[i]->data, md_tensor_bytes(a->in[i]));
    for (int o = 0; o < MD_OP_OUT; o++)
        if (a->out[o] && is_floating(a->out[o]) && !w->shared_out[o] && !(a->accumulate >> o & 1))
            poison(a->out[o]);
    return MD_OK;
}

static md_status check_output(md_op op, int o, const md_tensor *t)
{
    int64_t n = md_tensor_count(t), unwritten = 0, bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t word = 0;
        double value;
        if (t->dtype == MD_F32) {
            memcpy(&word, (const float *)t->data + i, sizeof word);
            value = (double)((const float *)t->data)[i];
        } else if (t->dtype == MD_BF16) {
            uint16_t half = ((const uint16_t *)t->data)[i];
            value = (double)md_f32_from_bf16(half);
            word = half == POISON >> 16 ? POISON : 0;
        } else {
            memcpy(&word, (const double *)t->data + i, sizeof word);
            value = ((const double *)t->data)[i];
        }
        unwritten += isnan(value) && word == POISON;
        bad += !isfinite(value);
    }
    if (unwritten)
        MD_FAIL(MD_ERR_BUG, "%s: output %d (%s) has %lld elements that were never written",
                md_op_name(op), o, md_op_out_name(op, o), (long long)unwritten);
    if (bad)
        MD_FAIL(MD_ERR_BUG, "%s: output %d (%s) has %lld non-finite elements", md_op_name(op), o,
                md_op_out_name(op, o), (long long)bad);
    return MD_OK;
}

static md_status watch_end(const watch *w)
{
    const md_operands *a = w->a;
    for (int i = 0; i < MD_OP_IN; i++)
        if (a->in[i] && !w->shared_in[i] &&
            w->hash[i] != XXH3_64bits(a->in[i]->data, md_tensor_bytes(a->in[i])))
            MD_FAIL(MD_ERR_BUG, "%s: input %d (%s) was changed", md_op_name(w->op), i,
                    md_op_in_name(w->op, i));
    for (int o = 0; o < MD_OP_OUT; o++)
        if (a->out[o] && is_floating(a->out[o]))
            MD_TRY(check_output(w->op, o, a->out[o]));
    return MD_OK;
}

#define CHECK_OP(op_name)                                                             \
    static md_status check_##op_name(md_backend *be, const md_##op_name##_args *a)    \
    {                                                                                 \
        md_backend *inner = be->impl;                                                 \
        watch w = {.op = MD_OP_##op_name, .a = (const md_operands *)(const void *)a}; \
        inner->scratch = be->scratch;                                                 \
        inner->scratch_size = be->scratch_size;                                       \
        MD_TRY(watch_begin(&w));                                                      \
        MD_TRY(inner->ops->op_name(inner, a));                                        \
        return watch_end(&w);                                                         \
    }
MD_OPS(CHECK_OP)
#undef CHECK_OP

static const md_op_table table = {
#define CHECK_ENTRY(op) .op = check_##op,
    MD_OPS(CHECK_ENTRY)
#undef CHECK_ENTRY
};

static size_t check_scratch_bytes(md_backend *be, md_op op, const md_operands *a)
{
    md_backend *inner = be->impl;
    return inner->scratch_bytes ? inner->scratch_bytes(inner, op, a) : 0;
}

static void check_destroy(md_backend *be)
{
    md_backend_destroy(be->impl);
    md_free(be);
}

md_status md_check_create(md_backend *inner, md_backend **out)
{
    md_backend *be;
    MD_NEW(be, 1, "check backend");
    *be = (md_backend){.name = "check",
                       .ops = &table,
                       .scratch_bytes = check_scratch_bytes,
                       .destroy = check_destroy,
                       .threads = inner->threads,
                       .impl = inner};
    *out = be;
    return MD_OK;
}
