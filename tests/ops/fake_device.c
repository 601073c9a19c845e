/* fake_device: see fake_device.h. */
#include "tests/ops/fake_device.h"

#include "kernels/cpu/cpu_backend.h"
#include "kernels/scalar_math.h"

#include <string.h>

/* Set in every address given out: no user memory lies there. */
#define FAR ((uintptr_t)1 << 62)

typedef struct fake {
    md_backend *cpu;
    md_tensor tensor[MD_OP_IN + MD_OP_OUT]; /* operands of the call as the cpu takes them */
    void *wide[MD_OP_IN + MD_OP_OUT];       /* bf16 operands in f32 */
} fake;

typedef union any_args {
    md_operands common;
#define FAKE_ARGS(op) md_##op##_args op;
    MD_OPS(FAKE_ARGS)
#undef FAKE_ARGS
} any_args;

void *fake_device_host(void *p)
{
    return (void *)((uintptr_t)p & ~FAR);
}

static void *far_address(void *p)
{
    return p ? (void *)((uintptr_t)p | FAR) : NULL;
}

/* ---- operands ---- */

static md_status widen(fake *f, int i, const md_tensor *t)
{
    const uint16_t *from = fake_device_host(t->data);
    md_tensor *to = &f->tensor[i];
    float *wide;
    MD_NEW(wide, md_tensor_count(t), "a fake device's operand");
    f->wide[i] = wide;
    for (int64_t e = 0; e < md_tensor_count(t); e++)
        wide[e] = md_f32_from_bf16(from[e]);
    to->data = wide;
    to->dtype = MD_F32;
    return MD_OK;
}

static void narrow(const fake *f, int i, const md_tensor *t)
{
    uint16_t *to = fake_device_host(t->data);
    for (int64_t e = 0; e < md_tensor_count(t); e++)
        to[e] = md_bf16_from_f32(((const float *)f->wide[i])[e]);
}

/* The operand as the cpu takes it. adamw's copy is bf16 there too. */
static md_status take(fake *f, md_op op, int i, const md_tensor *t)
{
    f->wide[i] = NULL;
    if (!t)
        return MD_OK;
    if (t->mem != MD_DEVICE)
        MD_FAIL(MD_ERR_BUG, "%s: an operand is not in device memory", md_op_name(op));
    f->tensor[i] = *t;
    f->tensor[i].mem = MD_HOST;
    f->tensor[i].data = fake_device_host(t->data);
    return t->dtype == MD_BF16 && op != MD_OP_adamw ? widen(f, i, t) : MD_OK;
}

static md_status take_all(fake *f, md_op op, md_operands *a)
{
    MD_TRY(md_op_check(op, a));
    for (int i = 0; i < MD_OP_IN; i++) {
        MD_TRY(take(f, op, i, a->in[i]));
        a->in[i] = a->in[i] ? &f->tensor[i] : NULL;
    }
    for (int o = 0; o < MD_OP_OUT; o++) {
        MD_TRY(take(f, op, MD_OP_IN + o, a->out[o]));
        a->out[o] = a->out[o] ? &f->tensor[MD_OP_IN + o] : NULL;
    }
    return MD_OK;
}

/* ---- ops ---- */

static md_status call(md_backend *cpu, md_op op, const any_args *a)
{
    switch ((int)op) {
#define FAKE_CALL(name) \
    case MD_OP_##name:  \
        return cpu->ops->name(cpu, &a->name);
        MD_OPS(FAKE_CALL)
#undef FAKE_CALL
    default:
        return MD_ERR_BUG;
    }
}

static md_status run_op(md_backend *be, md_op op, const void *args, size_t size)
{
    fake *f = be->impl;
    any_args a;
    const md_operands *given = args;
    memcpy(&a, args, size);
    f->cpu->scratch = be->scratch ? fake_device_host(be->scratch) : NULL;
    f->cpu->scratch_size = be->scratch_size;
    memset(f->wide, 0, sizeof f->wide);
    md_status st = take_all(f, op, &a.common);
    if (st == MD_OK)
        st = call(f->cpu, op, &a);
    for (int o = 0; st == MD_OK && o < MD_OP_OUT; o++)
        if (f->wide[MD_OP_IN + o])
            narrow(f, MD_OP_IN + o, given->out[o]);
    for (int i = 0; i < MD_OP_IN + MD_OP_OUT; i++)
        md_free(f->wide[i]);
    return st;
}

#define FAKE_OP(op)                                                     \
    static md_status fake_##op(md_backend *be, const md_##op##_args *a) \
    {                                                                   \
        return run_op(be, MD_OP_##op, a, sizeof *a);                    \
    }
MD_OPS(FAKE_OP)
#undef FAKE_OP

static const md_op_table table = {
#define FAKE_ENTRY(op) .op = fake_##op,
    MD_OPS(FAKE_ENTRY)
#undef FAKE_ENTRY
};

static size_t fake_scratch_bytes(md_backend *be, md_op op, const md_operands *a)
{
    fake *f = be->impl;
    return f->cpu->scratch_bytes(f->cpu, op, a);
}

/* ---- memory ---- */

static md_status fake_alloc(md_backend *be, size_t bytes, void **out)
{
    (void)be;
    *out = far_address(md_alloc(bytes, "fake device memory"));
    return *out ? MD_OK : MD_ERR_MEMORY;
}

static void fake_free(md_backend *be, void *p)
{
    (void)be;
    md_free(fake_device_host(p));
}

static md_status fake_pinned(md_backend *be, size_t bytes, void **out)
{
    (void)be;
    *out = md_alloc(bytes, "pinned memory");
    return *out ? MD_OK : MD_ERR_MEMORY;
}

static void fake_pinned_free(md_backend *be, void *p)
{
    (void)be;
    md_free(p);
}

static md_status fake_upload(md_backend *be, void *dst, const void *src, size_t bytes)
{
    (void)be;
    memcpy(fake_device_host(dst), src, bytes);
    return MD_OK;
}

static md_status fake_download(md_backend *be, void *dst, const void *src, size_t bytes)
{
    (void)be;
    memcpy(dst, (const void *)((uintptr_t)src & ~FAR), bytes);
    return MD_OK;
}

static md_status fake_feed(md_backend *be, int slot, void *dst, const void *src, size_t bytes)
{
    (void)slot;
    return fake_upload(be, dst, src, bytes);
}

static md_status fake_nothing(md_backend *be, int slot)
{
    (void)be, (void)slot;
    return MD_OK;
}

static md_status fake_sync(md_backend *be)
{
    (void)be;
    return MD_OK;
}

static const md_memory_ops memory = {.alloc = fake_alloc,
                                     .free = fake_free,
                                     .pinned = fake_pinned,
                                     .pinned_free = fake_pinned_free,
                                     .upload = fake_upload,
                                     .download = fake_download,
                                     .feed = fake_feed,
                                     .feed_wait = fake_nothing,
                                     .feed_used = fake_nothing,
                                     .sync = fake_sync};

static void fake_destroy(md_backend *be)
{
    fake *f = be->impl;
    md_backend_destroy(f->cpu);
    md_free(f);
    md_free(be);
}

md_status fake_device_create(int threads, md_dtype compute, md_backend **out)
{
    fake *f;
    md_backend *be;
    MD_NEW(f, 1, "fake device");
    MD_NEW(be, 1, "fake device");
    MD_TRY(md_cpu_create(threads, &f->cpu));
    *be = (md_backend){.name = compute == MD_BF16 ? "fake device in bf16" : "fake device",
                       .ops = &table,
                       .memory = &memory,
                       .scratch_bytes = fake_scratch_bytes,
                       .destroy = fake_destroy,
                       .threads = threads,
                       .impl = f};
    *out = be;
    return MD_OK;
}
