/* cpu_attn: softmax attention with an additive bias, forward and backward.
 *
 * One (image, head) is one task: its scores [T, T] live in the scratch of the thread that runs it
 * and nowhere else. Products with strided operands are single-thread plans of cpu_mm. The backward
 * pass recomputes the probabilities from lse.
 *
 * The gradient of the bias is a sum over images: images are cut into chunks (shape only), a task is
 * then (chunk, head) with the images of the chunk in order, each chunk has its own partial sum, and
 * the partial sums are added in chunk order. */
#include "kernels/cpu/cpu_internal.h"
#include "kernels/scalar_math.h"

typedef struct attn_dims {
    int64_t images, tokens, width, heads, head_width, ld; /* ld: row stride of a score matrix */
} attn_dims;

static attn_dims dims_of(const md_tensor *qkv, int heads)
{
    attn_dims d = {.images = qkv->dim[0], .tokens = qkv->dim[1], .width = qkv->dim[2] / 3};
    d.heads = heads;
    d.head_width = d.width / heads;
    d.ld = (int64_t)cpu_line((size_t)d.tokens);
    return d;
}

static md_status check_heads(md_op op, const md_tensor *qkv, const md_tensor *rel,
                             const md_tensor *lse, int heads)
{
    if (heads < 1 || qkv->dim[2] / 3 % heads != 0 || (rel && rel->dim[0] != heads) ||
        (lse && lse->dim[1] != heads))
        MD_FAIL(MD_ERR_BUG, "%s: %d heads do not fit width %lld or the other operands",
                md_op_name(op), heads, (long long)(qkv->dim[2] / 3));
    return MD_OK;
}

/* The products of one head: scores, output; gradients of probabilities, q, k, v. Matrices inside
 * qkv and dqkv have row stride 3C, inside o and d_o C. */
typedef enum attn_mm { MM_QK, MM_PV, MM_DP, MM_DQ, MM_DK, MM_DV, MM_COUNT } attn_mm;

static md_status plan_mm(md_backend *be, const attn_dims *d, attn_mm which, cpu_mm **out)
{
    int64_t t = d->tokens, w = d->head_width, row = 3 * d->width, s = d->ld, o = d->width;
    const cpu_mm_shape shape[MM_COUNT] = {
        [MM_QK] = {.m = t, .n = t, .k = w, .lda = row, .ldb = row, .ldc = s, .trans_b = 1},
        [MM_PV] = {.m = t, .n = w, .k = t, .lda = s, .ldb = row, .ldc = o},
        [MM_DP] = {.m = t, .n = t, .k = w, .lda = o, .ldb = row, .ldc = s, .trans_b = 1},
        [MM_DQ] = {.m = t, .n = w, .k = t, .lda = s, .ldb = row, .ldc = row},
        [MM_DK] = {.m = t, .n = w, .k = t, .lda = s, .ldb = row, .ldc = row, .trans_a = 1},
        [MM_DV] = {.m = t, .n = w, .k = t, .lda = s, .ldb = o, .ldc = row, .trans_a = 1}};
    cpu_mm_shape one = shape[which];
    one.batch = 1;
    one.single = 1;
    return cpu_mm_plan(cpu_mm_of(be), &one, out);
}

/* Plans the products of the forward (last = MM_PV) or backward pass (MM_DV); *pad is the largest
 * scratch of one of them. */
static md_status plan_all(md_backend *be, const attn_dims *d, attn_mm last, cpu_mm *mm[MM_COUNT],
                          size_t *pad)
{
    *pad = 0;
    for (int i = MM_QK; i <= (int)last; i++) {
        if (last != MM_PV && i == MM_PV)
            continue; /* backward: the output is known */
        MD_TRY(plan_mm(be, d, (attn_mm)i, &mm[i]));
        *pad = MD_MAX(*pad, cpu_mm_scratch(mm[i]));
    }
    return MD_OK;
}

/* Bytes of scratch of one thread: score matrices, one more row, then the products' own. */
static size_t thread_bytes(const attn_dims *d, int matrices, size_t pad)
{
    return sizeof(float) * (size_t)((matrices * d->tokens + 1) * d->ld) + pad;
}

size_t cpu_attention_scratch(md_backend *be, const md_attention_args *a)
{
    attn_dims d = dims_of(a->qkv, a->heads);
    cpu_mm *mm[MM_COUNT];
    size_t pad;
    if (plan_all(be, &d, MM_PV, mm, &pad) != MD_OK)
        return MD_NO_SCRATCH;
    return (size_t)be->threads * thread_bytes(&d, 1, pad);
}

/* A row of logits in place of a row of scores: s * scale + rel, and beyond the n real columns a
 * value whose exponential vanishes, so that later loops run over whole vectors. rel has no such
 * padding. */
#define NO_LOGIT (-1e30f)

static void logits_row(float *s, const float *rel, float scale, int64_t n)
{
    int64_t whole = n / CPU_LANES * CPU_LANES, left = n - whole;
    if (rel) {
#pragma omp simd
        for (int64_t j = 0; j < whole; j++)
            s[j] = s[j] * scale + rel[j];
    } else {
#pragma omp simd
        for (int64_t j = 0; j < whole; j++)
            s[j] *= scale;
    }
    if (left == 0)
        return;
    s += whole;
    if (rel) {
        rel += whole;
#pragma omp simd
        for (int64_t j = 0; j < CPU_LANES; j++)
            s[j] = j < left ? s[j] * scale + rel[j] : NO_LOGIT;
    } else {
#pragma omp simd
        for (int64_t j = 0; j < CPU_LANES; j++)
            s[j] = j < left ? s[j] * scale : NO_LOGIT;
    }
}

/* s = exp(s - max) over n columns, whole vectors; returns the sum; *max_out is the maximum. */
static float exp_row(float *s, int64_t n, float *max_out)
{
    cpu_vec top = cpu_load(s), sum = {0};
    for (int64_t j = CPU_LANES; j < n; j += CPU_LANES)
        top = cpu_max(top, cpu_load(s + j));
    float max = cpu_max_lanes(top);
    for (int64_t j = 0; j < n; j += CPU_LANES) {
#pragma omp simd
        for (int64_t l = j; l < j + CPU_LANES; l++)
            s[l] = md_expf(s[l] - max);
        sum += cpu_load(s + j);
    }
    *max_out = max;
    return cpu_sum_lanes(sum);
}

typedef struct attn_task {
    const attn_dims *d;
    cpu_mm *const *mm;
    int64_t image, head;
    float scale;
    float *scores; /* this thread's */
    void *pad;
    int thread;
} attn_task;

static md_status attend(const md_attention_args *a, const attn_task *k)
{
    const attn_dims *d = k->d;
    int64_t t = d->tokens, pair = k->image * d->heads + k->head;
    const float *q = md_f32(a->qkv) + k->image * t * 3 * d->width + k->head * d->head_width;
    const float *rel = a->rel ? md_f32(a->rel) + k->head * t * t : NULL;
    float *o = md_f32(a->o) + k->image * t * d->width + k->head * d->head_width;
    float *lse = a->lse ? md_f32(a->lse) + pair * t : NULL;
    float *s = k->scores, *inverse = s + t * d->ld; /* of the sums of the rows */
    MD_TRY(
        cpu_mm_run(k->mm[MM_QK],
                   &(cpu_mm_run_args){
                       .a = q, .b = q + d->width, .c = s, .scratch = k->pad, .thread = k->thread}));
    for (int64_t i = 0; i < t; i++) {
        float max, *row = s + i * d->ld;
        logits_row(row, rel ? rel + i * t : NULL, k->scale, t);
        float sum = exp_row(row, d->ld, &max);
        inverse[i] = 1.0f / sum;
        if (lse)
            lse[i] = max + logf(sum);
    }
    MD_TRY(cpu_mm_run(
        k->mm[MM_PV],
        &(cpu_mm_run_args){
            .a = s, .b = q + 2 * d->width, .c = o, .scratch = k->pad, .thread = k->thread}));
    for (int64_t i = 0; i < t; i++) {
#pragma omp simd
        for (int64_t c = 0; c < d->head_width; c++)
            o[i * d->width + c] *= inverse[i];
    }
    return MD_OK;
}

md_status cpu_attention(md_backend *be, const md_attention_args *a)
{
    CPU_CHECK(attention, a);
    MD_TRY(check_heads(MD_OP_attention, a->qkv, a->rel, a->lse, a->heads));
    if (a->accumulate)
        MD_FAIL(MD_ERR_BUG, "attention: it does not accumulate");
    attn_dims d = dims_of(a->qkv, a->heads);
    cpu_mm *mm[MM_COUNT];
    size_t pad;
    void *scratch;
    MD_TRY(plan_all(be, &d, MM_PV, mm, &pad));
    size_t each = thread_bytes(&d, 1, pad);
    MD_TRY(cpu_scratch(be, MD_OP_attention, (size_t)be->threads * each, &scratch));
    md_status failed = MD_OK;
#pragma omp parallel for num_threads(be->threads) schedule(static)
    for (int64_t i = 0; i < d.images * d.heads; i++) {
        int thread = omp_get_thread_num();
        char *mine = (char *)scratch + (size_t)thread * each;
        attn_task k = {.d = &d,
                       .mm = mm,
                       .image = i / d.heads,
                       .head = i % d.heads,
                       .scale = a->scale,
                       .scores = (float *)(void *)mine,
                       .pad = mine + each - pad,
                       .thread = thread};
        md_status st = attend(a, &k);
        if (st != MD_OK) {
#pragma omp atomic write
            failed = st;
        }
    }
    if (failed != MD_OK)
        MD_FAIL(failed, "attention: a matrix product failed");
    return MD_OK;
}

/* Chunks of images of the backward pass; without drel every image is its own. */
static int64_t image_chunks(const attn_dims *d, bool drel)
{
    return drel ? MD_MIN(d->images, (CPU_CHUNKS + d->heads - 1) / d->heads) : d->images;
}

static size_t partial_bytes(const attn_dims *d, bool drel)
{
    int64_t floats = image_chunks(d, drel) * d->heads * d->tokens * d->ld;
    return drel ? sizeof(float) * cpu_line((size_t)floats) : 0;
}

size_t cpu_attention_bwd_scratch(md_backend *be, const md_attention_bwd_args *a)
{
    attn_dims d = dims_of(a->qkv, a->heads);
    cpu_mm *mm[MM_COUNT];
    size_t pad;
    if (plan_all(be, &d, MM_DV, mm, &pad) != MD_OK)
        return MD_NO_SCRATCH;
    return (size_t)be->threads * thread_bytes(&d, 2, pad) + partial_bytes(&d, a->drel != NULL);
}

/* Probabilities p = exp(s - lse) in place of logits, and the gradients of the logits in place of
 * those of the probabilities: ds = p * (dp - sum p dp), kept times scale; drel (optional) collects
 * ds unscaled. n columns, whole vectors; beyond the tokens p is 0 and dp 0. */
typedef struct grad_row {
    float *s, *dp, *drel;
    float scale, lse;
} grad_row;

static void score_grad_row(grad_row g, int64_t n)
{
    float *s = g.s, *dp = g.dp, *drel = g.drel;
    cpu_vec sum = {0};
    for (int64_t j = 0; j < n; j += CPU_LANES) {
#pragma omp simd
        for (int64_t l = j; l < j + CPU_LANES; l++)
            s[l] = md_expf(s[l] - g.lse);
        sum += cpu_load(s + j) * cpu_load(dp + j);
    }
    float delta = cpu_sum_lanes(sum);
    if (drel) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            float ds = s[j] * (dp[j] - delta);
            drel[j] += ds;
            dp[j] = ds * g.scale;
        }
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            dp[j] = s[j] * (dp[j] - delta) * g.scale;
    }
}

static md_status attend_bwd(const md_attention_bwd_args *a, const attn_task *k, float *drel)
{
    const attn_dims *d = k->d;
    int64_t t = d->tokens, w = d->width, in = k->image * t * 3 * w + k->head * d->head_width;
    int64_t out = k->image * t * w + k->head * d->head_width;
    const float *q = md_f32(a->qkv) + in, *g = md_f32(a->d_o) + out;
    const float *rel = a->rel ? md_f32(a->rel) + k->head * t * t : NULL;
    const float *lse = md_f32(a->lse) + (k->image * d->heads + k->head) * t;
    float *dq = md_f32(a->dqkv) + in, *p = k->scores, *ds = p + t * d->ld;
    cpu_mm_run_args r = {.scratch = k->pad, .thread = k->thread};
    r.a = q, r.b = q + w, r.c = p;
    MD_TRY(cpu_mm_run(k->mm[MM_QK], &r));
    r.a = g, r.b = q + 2 * w, r.c = ds;
    MD_TRY(cpu_mm_run(k->mm[MM_DP], &r));
    for (int64_t i = 0; i < t; i++) {
        float *dp = ds + i * d->ld;
        for (int64_t j = t; j < d->ld; j++)
            dp[j] = 0.0f;
        logits_row(p + i * d->ld, rel ? rel + i * t : NULL, k->scale, t);
        score_grad_row((grad_row){.s = p + i * d->ld,
                                  .dp = dp,
                                  .drel = drel ? drel + i * d->ld : NULL,
                                  .scale = k->scale,
                                  .lse = lse[i]},
                       d->ld);
    }
    r.a = ds, r.b = q + w, r.c = dq;
    MD_TRY(cpu_mm_run(k->mm[MM_DQ], &r));
    r.a = ds, r.b = q, r.c = dq + w;
    MD_TRY(cpu_mm_run(k->mm[MM_DK], &r));
    r.a = p, r.b = g, r.c = dq + 2 * w;
    return cpu_mm_run(k->mm[MM_DV], &r);
}

/* drel (+)= the partial sums [chunks, H, T, ld] in chunk order. */
static void reduce_drel(const md_backend *be, const attn_dims *d, const float *part, int64_t chunks,
                        const md_attention_bwd_args *a)
{
    int64_t rows = d->heads * d->tokens;
    bool add = a->accumulate >> 1 & 1;
#pragma omp parallel for num_threads(be->threads)
    for (int64_t r = 0; r < rows; r++) {
        float *out = md_f32(a->drel) + r * d->tokens;
        for (int64_t i = 0; i < chunks; i++) {
            const float *from = part + (i * rows + r) * d->ld;
#pragma omp simd
            for (int64_t j = 0; j < d->tokens; j++)
                out[j] = add || i > 0 ? out[j] + from[j] : from[j];
        }
    }
}

md_status cpu_attention_bwd(md_backend *be, const md_attention_bwd_args *a)
{
    CPU_CHECK(attention_bwd, a);
    MD_TRY(check_heads(MD_OP_attention_bwd, a->qkv, a->rel, a->lse, a->heads));
    if (a->accumulate & 1 || (a->drel && !a->rel))
        MD_FAIL(MD_ERR_BUG, "attention_bwd: dqkv does not accumulate, and drel needs rel");
    attn_dims d = dims_of(a->qkv, a->heads);
    cpu_mm *mm[MM_COUNT];
    size_t pad, area = (size_t)(d.tokens * d.ld);
    void *scratch;
    MD_TRY(plan_all(be, &d, MM_DV, mm, &pad));
    size_t each = thread_bytes(&d, 2, pad), partial = partial_bytes(&d, a->drel != NULL);
    MD_TRY(cpu_scratch(be, MD_OP_attention_bwd, (size_t)be->threads * each + partial, &scratch));
    int64_t chunks = image_chunks(&d, a->drel != NULL);
    float *part = a->drel ? scratch : NULL;
    md_status failed = MD_OK;
#pragma omp parallel for num_threads(be->threads) schedule(static)
    for (int64_t i = 0; i < chunks * d.heads; i++) {
        int thread = omp_get_thread_num();
        char *mine = (char *)scratch + partial + (size_t)thread * each;
        attn_task k = {.d = &d,
                       .mm = mm,
                       .head = i % d.heads,
                       .scale = a->scale,
                       .scores = (float *)(void *)mine,
                       .pad = mine + each - pad,
                       .thread = thread};
        float *drel = part ? part + (size_t)i * area : NULL;
        if (drel)
            memset(drel, 0, sizeof *drel * area);
        int64_t chunk = i / d.heads, end = cpu_chunk_begin(d.images, chunks, chunk + 1);
        for (k.image = cpu_chunk_begin(d.images, chunks, chunk); k.image < end; k.image++) {
            md_status st = attend_bwd(a, &k, drel);
            if (st != MD_OK) {
#pragma omp atomic write
                failed = st;
            }
        }
    }
    if (failed != MD_OK)
        MD_FAIL(failed, "attention_bwd: a matrix product failed");
    if (part)
        reduce_drel(be, &d, part, chunks, a);
    return MD_OK;
}
