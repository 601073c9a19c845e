/* timing_backend: see timing_backend.h. Like `check` it knows no op by name. */
#include "kernels/timing/timing_backend.h"
#include "kernels/plan/plan_backend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 256

typedef struct timing {
    md_backend base;
    md_backend *inner;
    int repeat, rows;
    bool untimed[MD_OP_COUNT];
    md_timing row[ROWS];
} timing;

/* The first output, and what else a product needs to be known. */
static void describe(md_op op, const md_operands *a, char *text, size_t size)
{
    char shape[48];
    const md_tensor *t = NULL;
    for (int i = 0; i < MD_OP_OUT && !t; i++)
        t = a->out[i];
    for (int i = 0; i < MD_OP_IN && !t; i++)
        t = a->in[i];
    md_tensor_describe(t, shape, sizeof shape);
    const md_gemm_args *g = (const md_gemm_args *)(const void *)a;
    if (op == MD_OP_gemm)
        snprintf(text, size, "%s k %lld %c%c%s", shape,
                 (long long)(g->trans_a ? md_tensor_rows(g->a) : md_tensor_cols(g->a)),
                 g->trans_a ? 't' : 'n', g->trans_b ? 't' : 'n', g->act ? " act" : "");
    else if (op == MD_OP_linear_bwd) {
        const md_linear_bwd_args *l = (const md_linear_bwd_args *)(const void *)a;
        snprintf(text, size, "%s k %lld%s", shape, (long long)md_tensor_rows(l->dy),
                 l->dx ? " dx" : "");
    } else
        snprintf(text, size, "%s", shape);
}

/* The row of this op and shape; the last row takes what finds no room. */
static md_timing *find(timing *t, md_op op, const md_operands *a)
{
    md_timing key = {.op = op};
    describe(op, a, key.shape, sizeof key.shape);
    for (int i = 0; i < t->rows; i++)
        if (t->row[i].op == op && strcmp(t->row[i].shape, key.shape) == 0)
            return &t->row[i];
    if (t->rows == ROWS)
        return &t->row[ROWS - 1];
    if (t->rows == ROWS - 1)
        snprintf(key.shape, sizeof key.shape, "and all that found no row");
    t->row[t->rows] = key;
    return &t->row[t->rows++];
}

static md_status note(timing *t, md_op op, const void *args, double begun)
{
    MD_TRY(md_backend_sync(t->inner));
    md_timing *row = find(t, op, args);
    row->seconds += md_now() - begun;
    row->calls += t->repeat;
    row->flops += t->repeat * md_plan_op_flops(op, args);
    row->bytes += t->repeat * md_plan_op_bytes(args);
    return MD_OK;
}

#define TIME_OP(op_name)                                                          \
    static md_status time_##op_name(md_backend *be, const md_##op_name##_args *a) \
    {                                                                             \
        timing *t = (timing *)be;                                                 \
        t->inner->scratch = be->scratch;                                          \
        t->inner->scratch_size = be->scratch_size;                                \
        if (t->untimed[MD_OP_##op_name])                                          \
            return t->inner->ops->op_name(t->inner, a);                           \
        MD_TRY(md_backend_sync(t->inner));                                        \
        double begun = md_now();                                                  \
        for (int i = 0; i < t->repeat; i++)                                       \
            MD_TRY(t->inner->ops->op_name(t->inner, a));                          \
        return note(t, MD_OP_##op_name, a, begun);                                \
    }
MD_OPS(TIME_OP)
#undef TIME_OP

static const md_op_table table = {
#define TIME_ENTRY(op) .op = time_##op,
    MD_OPS(TIME_ENTRY)
#undef TIME_ENTRY
};

static md_backend *inner_of(md_backend *be)
{
    return ((timing *)be)->inner;
}

static size_t time_scratch_bytes(md_backend *be, md_op op, const md_operands *a)
{
    md_backend *inner = inner_of(be);
    return inner->scratch_bytes ? inner->scratch_bytes(inner, op, a) : 0;
}

static void time_destroy(md_backend *be)
{
    md_backend_destroy(inner_of(be));
    md_free(be);
}

/* ---- memory: the inner backend's; nothing is recorded, for every op is waited for ---- */

static md_status time_alloc(md_backend *be, size_t bytes, void **out)
{
    return inner_of(be)->memory->alloc(inner_of(be), bytes, out);
}

static void time_free(md_backend *be, void *p)
{
    inner_of(be)->memory->free(inner_of(be), p);
}

static md_status time_pinned(md_backend *be, size_t bytes, void **out)
{
    return inner_of(be)->memory->pinned(inner_of(be), bytes, out);
}

static void time_pinned_free(md_backend *be, void *p)
{
    inner_of(be)->memory->pinned_free(inner_of(be), p);
}

static md_status time_upload(md_backend *be, void *dst, const void *src, size_t bytes)
{
    return inner_of(be)->memory->upload(inner_of(be), dst, src, bytes);
}

static md_status time_download(md_backend *be, void *dst, const void *src, size_t bytes)
{
    return inner_of(be)->memory->download(inner_of(be), dst, src, bytes);
}

static md_status time_feed(md_backend *be, int slot, void *dst, const void *src, size_t bytes)
{
    return inner_of(be)->memory->feed(inner_of(be), slot, dst, src, bytes);
}

static md_status time_feed_wait(md_backend *be, int slot)
{
    return inner_of(be)->memory->feed_wait(inner_of(be), slot);
}

static md_status time_feed_used(md_backend *be, int slot)
{
    return inner_of(be)->memory->feed_used(inner_of(be), slot);
}

static md_status time_sync(md_backend *be)
{
    return inner_of(be)->memory->sync(inner_of(be));
}

static const md_memory_ops memory = {.alloc = time_alloc,
                                     .free = time_free,
                                     .pinned = time_pinned,
                                     .pinned_free = time_pinned_free,
                                     .upload = time_upload,
                                     .download = time_download,
                                     .feed = time_feed,
                                     .feed_wait = time_feed_wait,
                                     .feed_used = time_feed_used,
                                     .sync = time_sync};

/* ---- public ---- */

md_status md_timing_create(md_backend *inner, int repeat, const bool *only, md_backend **out)
{
    timing *t;
    MD_NEW(t, 1, "timing backend");
    t->base = (md_backend){.name = inner->name,
                           .ops = &table,
                           .memory = inner->memory ? &memory : NULL,
                           .scratch_bytes = time_scratch_bytes,
                           .destroy = time_destroy,
                           .threads = inner->threads};
    memcpy(t->base.device, inner->device, sizeof t->base.device);
    t->inner = inner;
    t->repeat = repeat;
    for (int op = 0; op < MD_OP_COUNT; op++)
        t->untimed[op] = only && !only[op];
    *out = &t->base;
    return MD_OK;
}

static int by_time(const void *a, const void *b)
{
    double x = ((const md_timing *)a)->seconds, y = ((const md_timing *)b)->seconds;
    return (x < y) - (x > y);
}

const md_timing *md_timing_rows(md_backend *be, int *n)
{
    timing *t = (timing *)be;
    qsort(t->row, (size_t)t->rows, sizeof *t->row, by_time);
    *n = t->rows;
    return t->row;
}

void md_timing_reset(md_backend *be)
{
    ((timing *)be)->rows = 0;
}
