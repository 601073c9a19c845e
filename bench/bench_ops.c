/* bench_ops: time of every op of the cpu backend at the shapes of a training step, as a table.
 *
 *   bench_ops [threads] [pattern]     only ops whose line holds the pattern
 *
 * Two models: ViT-B/16 at 4 images of 224 (T = 197), and width 192 with 3 heads on 128 images of 32
 * with 4-pixel patches (T = 65). Best and median of the repeats; GF/s counts 2 per multiply-add of
 * matrix products, GB/s each operand once. */
#include "kernels/backend.h"
#include "src/rng.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct model {
    const char *name;
    int64_t images, tokens, width, mlp, patch, side;
    int heads;
} model;

static const model models[] = {{.name = "vit_b",
                                .images = 4,
                                .tokens = 197,
                                .width = 768,
                                .mlp = 3072,
                                .patch = 16,
                                .side = 224,
                                .heads = 12},
                               {.name = "tiny",
                                .images = 128,
                                .tokens = 65,
                                .width = 192,
                                .mlp = 768,
                                .patch = 4,
                                .side = 32,
                                .heads = 3}};

typedef struct bench {
    md_backend *be;
    const model *m;
    const char *pattern;
    int64_t rows;
} bench;

#define MOST_BLOCKS 64
static void *blocks[MOST_BLOCKS];
static int block_count;

/* A tensor of small random values; freed after its op. */
static md_tensor *make(md_dtype dtype, int rank, const int64_t *dim)
{
    md_tensor t = md_tensor_make(NULL, dtype, rank, dim), *out;
    out = md_alloc(sizeof *out, "bench");
    t.data = md_alloc(md_tensor_bytes(&t), "bench");
    MD_ASSERT(out && t.data && block_count + 2 <= MOST_BLOCKS, "%s", md_error_text());
    blocks[block_count++] = out;
    blocks[block_count++] = t.data;
    md_rng r = md_rng_at(7, MD_RNG_TEST, 0, (uint64_t)block_count);
    for (int64_t i = 0; dtype == MD_F32 && i < md_tensor_count(&t); i++)
        md_f32(&t)[i] = md_rng_float(&r) - 0.5f;
    *out = t;
    return out;
}
#define T(dtype, ...) \
    make((dtype), (int)MD_COUNT(((int64_t[]){__VA_ARGS__})), (int64_t[]){__VA_ARGS__})
#define F(...) T(MD_F32, __VA_ARGS__)

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double operand_bytes(const md_operands *a)
{
    double bytes = 0.0;
    for (int i = 0; i < MD_OP_IN; i++)
        bytes += a->in[i] ? (double)md_tensor_bytes(a->in[i]) : 0.0;
    for (int o = 0; o < MD_OP_OUT; o++)
        if (a->out[o])
            bytes += (double)md_tensor_bytes(a->out[o]) * (a->accumulate >> o & 1 ? 2.0 : 1.0);
    return bytes;
}

typedef union op_args {
    md_operands common;
#define OP_ARGS(op) md_##op##_args op;
    MD_OPS(OP_ARGS)
#undef OP_ARGS
} op_args;

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

/* Runs one op until half a second or 200 repeats are spent and prints its line. */
static void measure(bench *b, md_op op, const char *what, double flops, op_args a)
{
    enum { MOST = 200 };
    char line[96];
    double t[MOST], spent = 0.0;
    int n = 0;
    snprintf(line, sizeof line, "%-6s %-16s %-14s", b->m->name, md_op_name(op), what);
    if (!b->pattern || strstr(line, b->pattern)) {
        size_t need = b->be->scratch_bytes(b->be, op, &a.common);
        b->be->scratch = md_alloc(need, "bench");
        b->be->scratch_size = need;
        for (int warm = 0; warm < 2; warm++)
            MD_ASSERT(call_op(b->be, op, &a) == MD_OK, "%s", md_error_text());
        while (n < MOST && (spent < 0.5 || n < 5)) {
            double start = md_now();
            call_op(b->be, op, &a);
            t[n] = md_now() - start;
            spent += t[n++];
        }
        md_free(b->be->scratch);
        qsort(t, (size_t)n, sizeof t[0], by_value);
        printf("%s %9.3f %9.3f %9.1f %9.1f\n", line, 1e3 * t[0], 1e3 * t[n / 2],
               1e-9 * flops / t[0], 1e-9 * operand_bytes(&a.common) / t[0]);
    }
    while (block_count > 0)
        md_free(blocks[--block_count]);
}

#define MEASURE(b, op, what, flops, ...) \
    measure((b), MD_OP_##op, (what), (flops), (op_args){.op = {__VA_ARGS__}})

/* One linear layer [n, c] -> [n, k]: forward, gradient of the input, gradient of the weight. */
static void bench_linear(bench *b, const char *name, int64_t c, int64_t k, md_act act)
{
    char what[32];
    int64_t n = b->rows;
    double flops = 2.0 * (double)n * (double)c * (double)k;
    snprintf(what, sizeof what, "%s fwd", name);
    MEASURE(b, gemm, what, flops, .a = F(n, c), .b = F(k, c), .bias = F(k), .y = F(n, k),
            .trans_b = true);
    if (act != MD_ACT_NONE) {
        snprintf(what, sizeof what, "%s act", name);
        MEASURE(b, gemm, what, flops, .a = F(n, c), .b = F(k, c), .bias = F(k), .y = F(n, k),
                .trans_b = true, .act = act);
        snprintf(what, sizeof what, "%s act+pre", name);
        MEASURE(b, gemm, what, flops, .a = F(n, c), .b = F(k, c), .bias = F(k), .y = F(n, k),
                .pre = F(n, k), .trans_b = true, .act = act);
    }
    snprintf(what, sizeof what, "%s dx", name);
    MEASURE(b, gemm, what, flops, .a = F(n, k), .b = F(k, c), .y = F(n, c));
    snprintf(what, sizeof what, "%s dw", name);
    MEASURE(b, gemm, what, flops, .a = F(n, k), .b = F(n, c), .y = F(k, c), .trans_a = true);
    snprintf(what, sizeof what, "%s dw+=", name);
    MEASURE(b, gemm, what, flops, .a = F(n, k), .b = F(n, c), .y = F(k, c), .trans_a = true,
            .accumulate = 1);
}

static void bench_gemm(bench *b)
{
    const model *m = b->m;
    bench_linear(b, "qkv", m->width, 3 * m->width, MD_ACT_NONE);
    bench_linear(b, "proj", m->width, m->width, MD_ACT_NONE);
    bench_linear(b, "fc1", m->width, m->mlp, MD_ACT_GELU);
    bench_linear(b, "fc2", m->mlp, m->width, MD_ACT_NONE);
}

static void bench_attention(bench *b)
{
    const model *m = b->m;
    int64_t i = m->images, t = m->tokens, c = m->width, h = m->heads;
    double flops = 4.0 * (double)i * (double)t * (double)t * (double)c;
    float scale = 0.125f;
    MEASURE(b, attention, "", flops, .qkv = F(i, t, 3 * c), .rel = F(h, t, t), .o = F(i, t, c),
            .lse = F(i, h, t), .heads = m->heads, .scale = scale);
    MEASURE(b, attention, "no bias", flops, .qkv = F(i, t, 3 * c), .o = F(i, t, c),
            .heads = m->heads, .scale = scale);
    MEASURE(b, attention_bwd, "", 2.5 * flops, .qkv = F(i, t, 3 * c), .rel = F(h, t, t),
            .o = F(i, t, c), .lse = F(i, h, t), .d_o = F(i, t, c), .dqkv = F(i, t, 3 * c),
            .drel = F(h, t, t), .heads = m->heads, .scale = scale);
    MEASURE(b, attention_bwd, "no bias", 2.5 * flops, .qkv = F(i, t, 3 * c), .o = F(i, t, c),
            .lse = F(i, h, t), .d_o = F(i, t, c), .dqkv = F(i, t, 3 * c), .heads = m->heads,
            .scale = scale);
    MEASURE(b, rel_gather, "", 0.0, .table = F(t * 4, h), .index = T(MD_I32, t, t),
            .rel = F(h, t, t));
    MEASURE(b, rel_scatter, "", 0.0, .drel = F(h, t, t), .index = T(MD_I32, t, t),
            .dtable = F(t * 4, h));
}

static void bench_rows(bench *b)
{
    const model *m = b->m;
    int64_t n = b->rows, c = m->width, f = m->mlp;
    MEASURE(b, colsum, "qkv", 0.0, .x = F(n, 3 * c), .y = F(3 * c));
    MEASURE(b, act_bwd, "gelu", 0.0, .x = F(n, f), .dy = F(n, f), .dx = F(n, f), .dbias = F(f),
            .act = MD_ACT_GELU);
    MEASURE(b, act_bwd, "quick gelu", 0.0, .x = F(n, f), .dy = F(n, f), .dx = F(n, f),
            .dbias = F(f), .act = MD_ACT_QUICK_GELU);
    MEASURE(b, layernorm, "", 0.0, .x = F(n, c), .weight = F(c), .bias = F(c), .y = F(n, c));
    MEASURE(b, residual_ln, "", 0.0, .x = F(n, c), .branch = F(n, c), .gamma = F(c),
            .keep = F(m->images), .weight = F(c), .bias = F(c), .r = F(n, c), .y = F(n, c),
            .mean = F(n), .rstd = F(n), .eps = 1e-6f);
    MEASURE(b, residual_ln_bwd, "", 0.0, .r = F(n, c), .branch = F(n, c), .gamma = F(c),
            .keep = F(m->images), .weight = F(c), .mean = F(n), .rstd = F(n), .dr = F(n, c),
            .dy = F(n, c), .dx = F(n, c), .dbranch = F(n, c), .dgamma = F(c), .dweight = F(c),
            .dbias = F(c));
}

static md_tensor *every_second(int64_t rows)
{
    md_tensor *index = T(MD_I32, rows);
    for (int64_t r = 0; r < rows; r++)
        md_i32(index)[r] = (int32_t)(2 * r);
    return index;
}

static void bench_tokens(bench *b)
{
    const model *m = b->m;
    int64_t i = m->images, s = m->side, g = m->tokens - 1, c = m->width, n = b->rows;
    MEASURE(b, patchify, "", 0.0, .image = T(MD_U8, i, s, s, 3),
            .patch = F(i * g, 3 * m->patch * m->patch), .side = (int)m->patch, .std = {1, 1, 1});
    MEASURE(b, patchify, "mixed", 0.0, .image = T(MD_U8, i, s, s, 3), .mix = T(MD_I32, i, 12),
            .patch = F(i * g, 3 * m->patch * m->patch), .side = (int)m->patch, .std = {1, 1, 1});
    MEASURE(b, tokens, "", 0.0, .patch = F(i, g, c), .cls = F(c), .mask_token = F(c),
            .pos = F(g + 1, c), .mask = T(MD_U8, i, g), .tokens = F(i, g + 1, c));
    MEASURE(b, tokens_bwd, "", 0.0, .dtokens = F(i, g + 1, c), .mask = T(MD_U8, i, g),
            .dpatch = F(i, g, c), .dcls = F(c), .dmask_token = F(c), .dpos = F(g + 1, c));
    MEASURE(b, gather_rows, "", 0.0, .x = F(n, c), .index = every_second(n / 2), .y = F(n / 2, c));
    MEASURE(b, scatter_rows, "", 0.0, .dy = F(n / 2, c), .index = every_second(n / 2),
            .dx = F(n, c));
    MEASURE(b, mean_rows, "", 0.0, .x = F(i, g, c), .y = F(i, c));
    MEASURE(b, mean_rows_bwd, "", 0.0, .dy = F(i, c), .dx = F(i, g, c));
    MEASURE(b, cross_entropy, "1000 classes", 0.0, .logits = F(i, 1000), .target = F(i, 1000),
            .loss = T(MD_F64, 1), .dlogits = F(i, 1000), .scale = 1.0f);
    MEASURE(b, loss, "smooth l1", 0.0, .pred = F(n / 2, c), .target = F(n / 2, c),
            .loss = T(MD_F64, 1), .dpred = F(n / 2, c), .beta = 2.0f, .scale = 1.0f);
}

static void bench_parameters(bench *b)
{
    const model *m = b->m;
    int64_t e = 12 * m->width * m->width;
    MEASURE(b, sumsq, "one block", 0.0, .x = F(e), .sum = T(MD_F64, 1), .nonfinite = T(MD_F64, 1));
    MEASURE(b, adamw, "one block", 0.0, .grad = F(e), .param = F(e), .m = F(e), .v = F(e),
            .accumulate = 7, .lr = 1e-3f, .beta1 = 0.9f, .beta2 = 0.98f, .eps = 1e-8f,
            .grad_scale = 1.0f, .step = 10);
    MEASURE(b, fill, "one block", 0.0, .y = F(e));
    MEASURE(b, axpy, "one block", 0.0, .x = F(e), .y = F(e), .alpha = 0.5f, .accumulate = 1);
}

int main(int argc, char **argv)
{
    md_backend *be;
    if (md_backend_create("cpu", argc > 1 ? (int)strtol(argv[1], NULL, 10) : 0, &be) != MD_OK) {
        fprintf(stderr, "%s\n", md_error_text());
        return MD_ERR_CONFIG;
    }
    printf("%d threads\n%-6s %-16s %-14s %9s %9s %9s %9s\n", be->threads, "model", "op", "what",
           "best ms", "median", "GF/s", "GB/s");
    for (size_t i = 0; i < MD_COUNT(models); i++) {
        bench b = {.be = be,
                   .m = &models[i],
                   .pattern = argc > 2 ? argv[2] : NULL,
                   .rows = models[i].images * models[i].tokens};
        bench_gemm(&b);
        bench_attention(&b);
        bench_rows(&b);
        bench_tokens(&b);
        bench_parameters(&b);
    }
    md_backend_destroy(be);
    return 0;
}
