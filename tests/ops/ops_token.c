/* ops_token: cases of rel_gather, rel_scatter, tokens, tokens_bwd, gather_rows, scatter_rows,
 * mean_rows and mean_rows_bwd. */
#include "tests/ops/ops_case.h"

#include <math.h>

enum { ADD = 1, POS = 2, MASK = 4, CLS = 8 };

/* Index [T, T] into R rows, with repeats, every row of the table possible. */
static md_tensor *relative_index(op_case *c, int64_t tokens, int64_t rows)
{
    md_tensor *t = TENSOR(c, MD_I32, FILL_BYTES, tokens, tokens);
    for (int64_t i = 0; i < tokens * tokens; i++)
        md_i32(t)[i] = (int32_t)((7 * i + md_i32(t)[i]) % rows);
    return t;
}

/* n: tokens, table rows, heads. */
static void build_rel_gather(op_case *c)
{
    int64_t t = c->row->n[0], r = c->row->n[1], h = c->row->n[2];
    c->args.rel_gather.table = F32(c, r, h);
    c->args.rel_gather.index = relative_index(c, t, r);
    c->args.rel_gather.rel = ACT(c, h, t, t);
    c->factor = 0.0;
}

static void ref_rel_gather(op_case *c, bool mutant)
{
    int64_t t = c->row->n[0], heads = c->row->n[2];
    const double *table = X(c, rel_gather, table), *index = X(c, rel_gather, index);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < t * t; i++)
            REF(c, rel_gather, rel)
    [h * t * t + i] += mutant && i == 0 ? 9.0 : table[(int64_t)index[i] * heads + h];
}

static void build_rel_scatter(op_case *c)
{
    int64_t t = c->row->n[0], r = c->row->n[1], h = c->row->n[2];
    c->args.rel_scatter.drel = F32(c, h, t, t);
    c->args.rel_scatter.index = relative_index(c, t, r);
    c->args.rel_scatter.dtable = F32(c, r, h);
    c->args.rel_scatter.accumulate = c->row->flags & ADD ? 1 : 0;
    c->terms = (double)(t * t);
}

static void ref_rel_scatter(op_case *c, bool mutant)
{
    int64_t t = c->row->n[0], heads = c->row->n[2];
    const double *index = X(c, rel_scatter, index);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = mutant ? 1 : 0; i < t * t; i++)
            REF(c, rel_scatter, dtable)
    [(int64_t)index[i] * heads + h] += X(c, rel_scatter, drel)[h * t * t + i];
}

/* <drel, table[index]> is linear in the table: the change alone is exact. */
static double objective_rel_scatter(const op_case *c, int o, int64_t i, double h)
{
    (void)o;
    int64_t t = c->row->n[0], heads = c->row->n[2];
    const double *index = X(c, rel_scatter, index);
    double sum = 0.0;
    for (int64_t p = 0; p < t * t; p++)
        if ((int64_t)index[p] == i / heads)
            sum += h * X(c, rel_scatter, drel)[i % heads * t * t + p];
    return sum;
}

/* n: images, patches of an image, width. */
static void build_tokens(op_case *c)
{
    int64_t b = c->row->n[0], g = c->row->n[1], w = c->row->n[2];
    md_tokens_args *a = &c->args.tokens;
    a->patch = ACT(c, b, g, w);
    a->cls = F32(c, w);
    a->mask_token = c->row->flags & MASK ? F32(c, w) : NULL;
    a->pos = c->row->flags & POS ? F32(c, g + 1, w) : NULL;
    a->mask = c->row->flags & MASK ? TENSOR(c, MD_U8, FILL_BITS, b, g) : NULL;
    a->tokens = ACT(c, b, g + 1, w);
    c->factor = 1.0;
}

static void ref_tokens(op_case *c, bool mutant)
{
    int64_t b = c->row->n[0], g = c->row->n[1], w = c->row->n[2], t = g + 1;
    const double *mask = X(c, tokens, mask), *pos = X(c, tokens, pos);
    for (int64_t i = 0; i < b * t * w; i++) {
        int64_t ch = i % w, token = i / w % t, image = i / w / t, patch = image * g + token - 1;
        double value = token == 0                ? X(c, tokens, cls)[ch]
                       : mask && mask[patch] > 0 ? X(c, tokens, mask_token)[ch]
                                                 : X(c, tokens, patch)[patch * w + ch];
        REF(c, tokens, tokens)[i] += value + (pos ? pos[token * w + ch] : 0.0);
        if (mutant && token == t - 1)
            REF(c, tokens, tokens)[i] += c->bend;
    }
}

static void build_tokens_bwd(op_case *c)
{
    int64_t b = c->row->n[0], g = c->row->n[1], w = c->row->n[2];
    unsigned f = c->row->flags;
    md_tokens_bwd_args *a = &c->args.tokens_bwd;
    a->dtokens = ACT(c, b, g + 1, w);
    a->mask = f & MASK ? TENSOR(c, MD_U8, FILL_BITS, b, g) : NULL;
    a->dpatch = ACT(c, b, g, w);
    a->dcls = f & CLS ? F32(c, w) : NULL;
    a->dmask_token = f & MASK ? F32(c, w) : NULL;
    a->dpos = f & POS ? F32(c, g + 1, w) : NULL;
    if (f & ADD)
        a->accumulate = 1u | (a->dcls ? 2u : 0u) | (a->dmask_token ? 4u : 0u) | (a->dpos ? 8u : 0u);
    c->terms = (double)(b * g);
}

static void ref_tokens_bwd(op_case *c, bool mutant)
{
    int64_t b = c->row->n[0], g = c->row->n[1], w = c->row->n[2], t = g + 1;
    const double *mask = X(c, tokens_bwd, mask);
    for (int64_t i = 0; i < b * t * w; i++) {
        int64_t ch = i % w, token = i / w % t, image = i / w / t, patch = image * g + token - 1;
        double value = X(c, tokens_bwd, dtokens)[i];
        if (mutant && image == b - 1)
            value *= 1.0 + c->bend;
        if (REF(c, tokens_bwd, dpos))
            REF(c, tokens_bwd, dpos)[token * w + ch] += value;
        if (token == 0 && REF(c, tokens_bwd, dcls))
            REF(c, tokens_bwd, dcls)[ch] += value;
        if (token > 0 && mask && mask[patch] > 0)
            REF(c, tokens_bwd, dmask_token)[ch] += value;
        else if (token > 0)
            REF(c, tokens_bwd, dpatch)[patch * w + ch] += value;
    }
}

/* <dtokens, tokens>, linear in every variable: only the moved one is summed. */
static double objective_tokens_bwd(const op_case *c, int o, int64_t i, double h)
{
    int64_t b = c->row->n[0], g = c->row->n[1], w = c->row->n[2], t = g + 1;
    const double *mask = X(c, tokens_bwd, mask);
    double sum = 0.0;
    for (int64_t j = 0; j < b * t * w; j++) {
        int64_t ch = j % w, token = j / w % t, image = j / w / t, patch = image * g + token - 1;
        bool masked = token > 0 && mask && mask[patch] > 0, moves = false;
        if (o == OUT_INDEX(tokens_bwd, dpatch))
            moves = token > 0 && !masked && patch * w + ch == i;
        else if (o == OUT_INDEX(tokens_bwd, dcls))
            moves = token == 0 && ch == i;
        else if (o == OUT_INDEX(tokens_bwd, dmask_token))
            moves = masked && ch == i;
        else
            moves = token * w + ch == i;
        sum += moves ? h * X(c, tokens_bwd, dtokens)[j] : 0.0;
    }
    return sum;
}

/* R rising row numbers out of N, the last row sometimes among them. */
static md_tensor *rising_index(op_case *c, int64_t rows, int64_t all)
{
    md_tensor *t = TENSOR(c, MD_I32, FILL_BITS, rows);
    for (int64_t r = 0; r < rows; r++)
        md_i32(t)[r] = (int32_t)((r + 1) * all / rows - 1);
    return t;
}

/* n: rows of x, rows gathered, width. The gather repeats a row. */
static void build_gather_rows(op_case *c)
{
    int64_t all = c->row->n[0], rows = c->row->n[1], w = c->row->n[2];
    c->args.gather_rows.x = ACT(c, all, w);
    md_tensor *index = rising_index(c, rows, all);
    if (rows > 2)
        md_i32(index)[rows / 2] = md_i32(index)[0];
    c->args.gather_rows.index = index;
    c->args.gather_rows.y = ACT(c, rows, w);
    c->args.gather_rows.accumulate = c->row->flags & ADD ? 1 : 0;
    c->factor = 1.0;
}

static void ref_gather_rows(op_case *c, bool mutant)
{
    int64_t rows = c->row->n[1], w = c->row->n[2];
    for (int64_t i = 0; i < rows * w; i++) {
        int64_t from = (int64_t)X(c, gather_rows, index)[i / w];
        REF(c, gather_rows, y)
        [i] += X(c, gather_rows, x)[from * w + i % w] + (mutant && i == rows * w - 1 ? 0.1 : 0.0);
    }
}

static void build_scatter_rows(op_case *c)
{
    int64_t all = c->row->n[0], rows = c->row->n[1], w = c->row->n[2];
    c->args.scatter_rows.dy = ACT(c, rows, w);
    c->args.scatter_rows.index = rising_index(c, rows, all);
    c->args.scatter_rows.dx = ACT(c, all, w);
    c->args.scatter_rows.accumulate = c->row->flags & ADD ? 1 : 0;
    c->factor = 1.0;
}

static void ref_scatter_rows(op_case *c, bool mutant)
{
    int64_t rows = c->row->n[1], w = c->row->n[2];
    for (int64_t i = mutant ? 1 : 0; i < rows * w; i++)
        REF(c, scatter_rows, dx)
    [(int64_t)X(c, scatter_rows, index)[i / w] * w + i % w] += X(c, scatter_rows, dy)[i];
}

static double objective_scatter_rows(const op_case *c, int o, int64_t i, double h)
{
    (void)o;
    int64_t rows = c->row->n[1], w = c->row->n[2];
    double sum = 0.0;
    for (int64_t r = 0; r < rows; r++)
        if ((int64_t)X(c, scatter_rows, index)[r] == i / w)
            sum += h * X(c, scatter_rows, dy)[r * w + i % w];
    return sum;
}

/* n: images, rows of an image, width. */
static void build_mean_rows(op_case *c)
{
    const int64_t *n = c->row->n;
    c->args.mean_rows.x = ACT(c, n[0], n[1], n[2]);
    c->args.mean_rows.y = ACT(c, n[0], n[2]);
    c->terms = (double)n[1];
}

static void ref_mean_rows(op_case *c, bool mutant)
{
    const int64_t *n = c->row->n;
    for (int64_t i = 0; i < n[0] * n[1] * n[2]; i++) {
        double value = X(c, mean_rows, x)[i] / (double)n[1];
        if (mutant && i / n[2] % n[1] == n[1] - 1)
            value += c->bend;
        REF(c, mean_rows, y)[i / n[2] / n[1] * n[2] + i % n[2]] += value;
    }
}

static void build_mean_rows_bwd(op_case *c)
{
    const int64_t *n = c->row->n;
    c->args.mean_rows_bwd.dy = ACT(c, n[0], n[2]);
    c->args.mean_rows_bwd.dx = ACT(c, n[0], n[1], n[2]);
}

static void ref_mean_rows_bwd(op_case *c, bool mutant)
{
    const int64_t *n = c->row->n;
    for (int64_t i = mutant ? 1 : 0; i < n[0] * n[1] * n[2]; i++)
        REF(c, mean_rows_bwd, dx)
    [i] += X(c, mean_rows_bwd, dy)[i / n[2] / n[1] * n[2] + i % n[2]] / (double)n[1];
}

/* <dy, mean of x>, of which only the moved element is summed. */
static double objective_mean_rows_bwd(const op_case *c, int o, int64_t i, double h)
{
    (void)o;
    const int64_t *n = c->row->n;
    return h / (double)n[1] * X(c, mean_rows_bwd, dy)[i / n[2] / n[1] * n[2] + i % n[2]];
}

#define REL_GATHER(t, r, h)                                                    \
    {                                                                          \
        MD_OP_rel_gather, build_rel_gather, ref_rel_gather, {t, r, h}, 0, NULL \
    }
#define REL_SCATTER(t, r, h, f)                                                                    \
    {                                                                                              \
        MD_OP_rel_scatter, build_rel_scatter, ref_rel_scatter, {t, r, h}, f, objective_rel_scatter \
    }
#define TOKENS(b, g, w, f)                                         \
    {                                                              \
        MD_OP_tokens, build_tokens, ref_tokens, {b, g, w}, f, NULL \
    }
#define TOKENS_BWD(b, g, w, f)                                                                 \
    {                                                                                          \
        MD_OP_tokens_bwd, build_tokens_bwd, ref_tokens_bwd, {b, g, w}, f, objective_tokens_bwd \
    }
#define GATHER(n, r, w, f)                                                        \
    {                                                                             \
        MD_OP_gather_rows, build_gather_rows, ref_gather_rows, {n, r, w}, f, NULL \
    }
#define SCATTER(n, r, w, f)                                                     \
    {                                                                           \
        MD_OP_scatter_rows, build_scatter_rows, ref_scatter_rows, {n, r, w}, f, \
            objective_scatter_rows                                              \
    }
#define MEAN_ROWS(b, m, w)                                                  \
    {                                                                       \
        MD_OP_mean_rows, build_mean_rows, ref_mean_rows, {b, m, w}, 0, NULL \
    }
#define MEAN_ROWS_BWD(b, m, w)                                                     \
    {                                                                              \
        MD_OP_mean_rows_bwd, build_mean_rows_bwd, ref_mean_rows_bwd, {b, m, w}, 0, \
            objective_mean_rows_bwd                                                \
    }

const op_row token_rows[] = {
    REL_GATHER(1, 4, 1),
    REL_GATHER(17, 52, 3),
    REL_GATHER(65, 228, 12),
    REL_SCATTER(1, 4, 1, 0),
    REL_SCATTER(17, 52, 3, ADD),
    REL_SCATTER(65, 228, 12, 0),
    TOKENS(1, 1, 1, 0),
    TOKENS(3, 16, 17, POS),
    TOKENS(3, 64, 192, MASK),
    TOKENS(2, 196, 64, MASK | POS),
    TOKENS_BWD(1, 1, 1, CLS),
    TOKENS_BWD(3, 16, 17, CLS | MASK),
    TOKENS_BWD(3, 64, 192, CLS | MASK | POS | ADD),
    TOKENS_BWD(2, 196, 64, CLS | POS),
    TOKENS_BWD(2, 17, 65, MASK | ADD),
    GATHER(1, 1, 1, 0),
    GATHER(17, 5, 3, ADD),
    GATHER(197, 65, 257, 0),
    SCATTER(1, 1, 1, 0),
    SCATTER(17, 5, 3, ADD),
    SCATTER(197, 65, 257, 0),
    SCATTER(65, 65, 17, 0),
    MEAN_ROWS(1, 1, 1),
    MEAN_ROWS(3, 16, 17),
    MEAN_ROWS(2, 196, 64),
    MEAN_ROWS(5, 65, 328),
    MEAN_ROWS_BWD(1, 1, 1),
    MEAN_ROWS_BWD(3, 16, 17),
    MEAN_ROWS_BWD(2, 196, 64),
    MEAN_ROWS_BWD(5, 65, 328),
};
const int token_row_count = (int)MD_COUNT(token_rows);
