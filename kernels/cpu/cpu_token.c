/* cpu_token: patches to tokens, row gathers, means of rows, relative position tables. */
#include "kernels/cpu/cpu_internal.h"

md_status cpu_rel_gather(md_backend *be, const md_rel_gather_args *a)
{
    CPU_CHECK(rel_gather, a);
    const float *table = md_f32(a->table);
    const int32_t *index = md_i32(a->index);
    float *rel = md_f32(a->rel);
    int64_t heads = a->table->dim[1], area = md_tensor_count(a->index);
    MD_TRY(cpu_check_index(MD_OP_rel_gather, a->index, a->table->dim[0]));
    if (a->accumulate)
        MD_FAIL(MD_ERR_BUG, "rel_gather: it does not accumulate");
#pragma omp parallel for num_threads(be->threads) if (heads * area > CPU_SERIAL_BELOW)
    for (int64_t h = 0; h < heads; h++) {
#pragma omp simd
        for (int64_t i = 0; i < area; i++)
            rel[h * area + i] = table[index[i] * heads + h];
    }
    return MD_OK;
}

/* Indices repeat: one head is one thread's, in the order of the pairs. */
md_status cpu_rel_scatter(md_backend *be, const md_rel_scatter_args *a)
{
    CPU_CHECK(rel_scatter, a);
    const float *drel = md_f32(a->drel);
    const int32_t *index = md_i32(a->index);
    float *dtable = md_f32(a->dtable);
    int64_t rows = a->dtable->dim[0], heads = a->dtable->dim[1], area = md_tensor_count(a->index);
    MD_TRY(cpu_check_index(MD_OP_rel_scatter, a->index, rows));
    if (!(a->accumulate & 1))
        memset(dtable, 0, md_tensor_bytes(a->dtable));
#pragma omp parallel for num_threads(be->threads) if (heads * area > CPU_SERIAL_BELOW)
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < area; i++)
            dtable[index[i] * heads + h] += drel[h * area + i];
    return MD_OK;
}

static void add_rows(const float *x, const float *y, float *out, int64_t n)
{
    if (!y) {
        memcpy(out, x, sizeof *out * (size_t)n);
        return;
    }
#pragma omp simd
    for (int64_t c = 0; c < n; c++)
        out[c] = x[c] + y[c];
}

md_status cpu_tokens(md_backend *be, const md_tokens_args *a)
{
    CPU_CHECK(tokens, a);
    if ((a->mask && !a->mask_token) || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "tokens: a mask needs a mask token, and nothing accumulates");
    int64_t images = a->patch->dim[0], grid = a->patch->dim[1], width = a->patch->dim[2];
    int64_t tokens = grid + 1;
    const float *patch = md_f32(a->patch), *pos = a->pos ? md_f32(a->pos) : NULL;
    const uint8_t *mask = a->mask ? a->mask->data : NULL;
    float *out = md_f32(a->tokens);
#pragma omp parallel for num_threads(be->threads) if (images * grid * width > CPU_SERIAL_BELOW)
    for (int64_t row = 0; row < images * tokens; row++) {
        int64_t b = row / tokens, t = row % tokens;
        const float *from = t == 0 ? md_f32(a->cls) : patch + (b * grid + t - 1) * width;
        if (t > 0 && mask && mask[b * grid + t - 1])
            from = md_f32(a->mask_token);
        add_rows(from, pos ? pos + t * width : NULL, out + row * width, width);
    }
    return MD_OK;
}

/* Backward of tokens. Scratch: per chunk of token positions its sum over masked tokens [C]. */
#define POSITIONS_LEAST 4

size_t cpu_tokens_bwd_scratch(md_backend *be, const md_tokens_bwd_args *a)
{
    (void)be;
    int64_t tokens = a->dtokens->dim[1], width = a->dtokens->dim[2];
    return sizeof(float) * (size_t)(cpu_chunks(tokens, POSITIONS_LEAST) * width);
}

typedef struct tokens_bwd {
    const float *dtokens;
    const uint8_t *mask;
    float *dpatch, *dcls, *dpos;
    int64_t images, tokens, width;
    bool add_patch, add_cls, add_pos;
} tokens_bwd;

static void add_to(float *sum, const float *x, int64_t n)
{
#pragma omp simd
    for (int64_t c = 0; c < n; c++)
        sum[c] += x[c];
}

/* Everything of one token position, images in order. */
static void tokens_bwd_position(const tokens_bwd *k, int64_t t, float *dmask)
{
    int64_t n = k->width;
    size_t bytes = sizeof(float) * (size_t)n;
    float *dpos = k->dpos ? k->dpos + t * n : NULL;
    if (dpos && !k->add_pos)
        memset(dpos, 0, bytes);
    if (t == 0 && k->dcls && !k->add_cls)
        memset(k->dcls, 0, bytes);
    for (int64_t b = 0; b < k->images; b++) {
        const float *g = k->dtokens + (b * k->tokens + t) * n;
        if (dpos)
            add_to(dpos, g, n);
        if (t == 0) {
            if (k->dcls)
                add_to(k->dcls, g, n);
            continue;
        }
        int64_t patch = b * (k->tokens - 1) + t - 1;
        float *dpatch = k->dpatch + patch * n;
        if (k->mask && k->mask[patch]) {
            add_to(dmask, g, n);
            if (!k->add_patch)
                memset(dpatch, 0, bytes);
        } else if (k->add_patch) {
            add_to(dpatch, g, n);
        } else {
            memcpy(dpatch, g, bytes);
        }
    }
}

md_status cpu_tokens_bwd(md_backend *be, const md_tokens_bwd_args *a)
{
    CPU_CHECK(tokens_bwd, a);
    void *scratch;
    MD_TRY(cpu_scratch(be, MD_OP_tokens_bwd, cpu_tokens_bwd_scratch(be, a), &scratch));
    tokens_bwd k = {.dtokens = md_f32(a->dtokens),
                    .mask = a->mask ? a->mask->data : NULL,
                    .dpatch = md_f32(a->dpatch),
                    .dcls = a->dcls ? md_f32(a->dcls) : NULL,
                    .dpos = a->dpos ? md_f32(a->dpos) : NULL,
                    .images = a->dtokens->dim[0],
                    .tokens = a->dtokens->dim[1],
                    .width = a->dtokens->dim[2],
                    .add_patch = a->accumulate & 1,
                    .add_cls = a->accumulate >> 1 & 1,
                    .add_pos = a->accumulate >> 3 & 1};
    int64_t chunks = cpu_chunks(k.tokens, POSITIONS_LEAST);
    float *part = scratch;
#pragma omp parallel for num_threads(be->threads) if (md_tensor_count(a->dtokens) > \
                                                      CPU_SERIAL_BELOW)
    for (int64_t i = 0; i < chunks; i++) {
        float *dmask = part + i * k.width;
        memset(dmask, 0, sizeof *dmask * (size_t)k.width);
        int64_t end = cpu_chunk_begin(k.tokens, chunks, i + 1);
        for (int64_t t = cpu_chunk_begin(k.tokens, chunks, i); t < end; t++)
            tokens_bwd_position(&k, t, dmask);
    }
    cpu_reduce_chunks(be, part, chunks, k.width, a->dmask_token, a->accumulate >> 2 & 1);
    return MD_OK;
}

md_status cpu_gather_rows(md_backend *be, const md_gather_rows_args *a)
{
    CPU_CHECK(gather_rows, a);
    MD_TRY(cpu_check_index(MD_OP_gather_rows, a->index, md_tensor_rows(a->x)));
    const float *x = md_f32(a->x);
    const int32_t *index = md_i32(a->index);
    float *y = md_f32(a->y);
    int64_t rows = md_tensor_count(a->index), width = md_tensor_cols(a->x);
    bool add = a->accumulate & 1;
#pragma omp parallel for num_threads(be->threads) if (rows * width > CPU_SERIAL_BELOW)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + index[r] * width;
        if (add)
            add_to(y + r * width, from, width);
        else
            memcpy(y + r * width, from, sizeof *y * (size_t)width);
    }
    return MD_OK;
}

/* Index entry r owns the rows up to the next entry: they are zeroed by the thread that writes it.
 */
md_status cpu_scatter_rows(md_backend *be, const md_scatter_rows_args *a)
{
    CPU_CHECK(scatter_rows, a);
    int64_t rows = md_tensor_count(a->index), width = md_tensor_cols(a->dx);
    int64_t all = md_tensor_rows(a->dx), falls = 0;
    const float *dy = md_f32(a->dy);
    const int32_t *index = md_i32(a->index);
    float *dx = md_f32(a->dx);
    bool add = a->accumulate & 1;
    MD_TRY(cpu_check_index(MD_OP_scatter_rows, a->index, all));
    for (int64_t r = 1; r < rows; r++)
        falls += index[r] <= index[r - 1];
    if (falls)
        MD_FAIL(MD_ERR_BUG, "scatter_rows: the index does not rise at %lld places",
                (long long)falls);
    int64_t head = rows ? index[0] : all;
    if (!add)
        memset(dx, 0, sizeof *dx * (size_t)(head * width));
#pragma omp parallel for num_threads(be->threads) if (all * width > CPU_SERIAL_BELOW)
    for (int64_t r = 0; r < rows; r++) {
        int64_t row = index[r], next = r + 1 < rows ? index[r + 1] : all;
        if (add) {
            add_to(dx + row * width, dy + r * width, width);
            continue;
        }
        memcpy(dx + row * width, dy + r * width, sizeof *dx * (size_t)width);
        memset(dx + (row + 1) * width, 0, sizeof *dx * (size_t)((next - row - 1) * width));
    }
    return MD_OK;
}

/* Columns of one image's rows that a thread adds up. */
#define MEAN_COLS 256

static void mean_of(const float *x, int64_t rows, int64_t width, int64_t cols, float *y)
{
    float sum[MEAN_COLS] = {0};
    for (int64_t m = 0; m < rows; m++)
        add_to(sum, x + m * width, cols);
#pragma omp simd
    for (int64_t c = 0; c < cols; c++)
        y[c] = sum[c] / (float)rows;
}

md_status cpu_mean_rows(md_backend *be, const md_mean_rows_args *a)
{
    CPU_CHECK(mean_rows, a);
    int64_t images = a->x->dim[0], rows = a->x->dim[1], width = a->x->dim[2];
    if (rows < 1 || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "mean_rows: a mean of %lld rows, accumulate %u", (long long)rows,
                a->accumulate);
    const float *x = md_f32(a->x);
    float *y = md_f32(a->y);
#pragma omp parallel for collapse(2) \
    num_threads(be->threads) if (md_tensor_count(a->x) > CPU_SERIAL_BELOW)
    for (int64_t b = 0; b < images; b++)
        for (int64_t c = 0; c < width; c += MEAN_COLS)
            mean_of(x + b * rows * width + c, rows, width, MD_MIN(MEAN_COLS, width - c),
                    y + b * width + c);
    return MD_OK;
}

md_status cpu_mean_rows_bwd(md_backend *be, const md_mean_rows_bwd_args *a)
{
    CPU_CHECK(mean_rows_bwd, a);
    int64_t images = a->dx->dim[0], rows = a->dx->dim[1], width = a->dx->dim[2];
    if (rows < 1 || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "mean_rows_bwd: a mean of %lld rows, accumulate %u", (long long)rows,
                a->accumulate);
    const float *dy = md_f32(a->dy);
    float *dx = md_f32(a->dx);
#pragma omp parallel for num_threads(be->threads) if (md_tensor_count(a->dx) > CPU_SERIAL_BELOW)
    for (int64_t r = 0; r < images * rows; r++) {
        const float *from = dy + r / rows * width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++)
            dx[r * width + c] = from[c] / (float)rows;
    }
    return MD_OK;
}
