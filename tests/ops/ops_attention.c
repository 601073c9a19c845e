/* ops_attention: cases of attention and attention_bwd. */
#include "tests/ops/ops_case.h"

#include <math.h>

enum { REL = 1, LSE = 2, DREL = 4, ADD = 8 };

typedef struct dims {
    int64_t images, tokens, heads, width;
} dims;

/* n: images, tokens, heads, head width. */
static dims dims_of(const op_case *c)
{
    return (dims){c->row->n[0], c->row->n[1], c->row->n[2], c->row->n[3]};
}

/* Offset of part 0 q, 1 k, 2 v of one token and head in qkv. */
static int64_t at(dims d, int64_t image, int64_t token, int part, int64_t head)
{
    return (((image * d.tokens + token) * 3 + part) * d.heads + head) * d.width;
}

/* Probabilities of one query into p; returns the log of the denominator. */
static double probabilities(dims d, const double *qkv, const double *rel, double scale,
                            const int64_t ihq[3], double *p)
{
    double max = -INFINITY, sum = 0.0;
    const double *q = qkv + at(d, ihq[0], ihq[2], 0, ihq[1]);
    for (int64_t j = 0; j < d.tokens; j++) {
        const double *k = qkv + at(d, ihq[0], j, 1, ihq[1]);
        p[j] = rel ? rel[(ihq[1] * d.tokens + ihq[2]) * d.tokens + j] : 0.0;
        for (int64_t x = 0; x < d.width; x++)
            p[j] += scale * q[x] * k[x];
        max = fmax(max, p[j]);
    }
    for (int64_t j = 0; j < d.tokens; j++)
        sum += exp(p[j] - max);
    for (int64_t j = 0; j < d.tokens; j++)
        p[j] = exp(p[j] - max) / sum;
    return max + log(sum);
}

/* o [B,T,H,D] and lse [B,H,T]; either may be NULL. keys: those attended, all or (mutant) one less.
 * absolute: sums of |p v| beside o, or NULL. */
typedef struct attended {
    double *o, *lse;
    int64_t keys;
    double *absolute;
} attended;

static void forward(dims d, const double *qkv, const double *rel, double scale, attended out)
{
    double *p = md_alloc(sizeof *p * (size_t)d.tokens, "reference");
    for (int64_t b = 0; b < d.images; b++)
        for (int64_t h = 0; h < d.heads; h++)
            for (int64_t i = 0; i < d.tokens; i++) {
                double l = probabilities(d, qkv, rel, scale, (int64_t[]){b, h, i}, p);
                if (out.lse)
                    out.lse[(b * d.heads + h) * d.tokens + i] = l;
                int64_t row = ((b * d.tokens + i) * d.heads + h) * d.width;
                for (int64_t j = 0; out.o && j < out.keys; j++)
                    for (int64_t x = 0; x < d.width; x++) {
                        double add = p[j] * qkv[at(d, b, j, 2, h) + x];
                        out.o[row + x] += add;
                        if (out.absolute)
                            out.absolute[row + x] += fabs(add);
                    }
            }
    md_free(p);
}

static void build_attention(op_case *c)
{
    dims d = dims_of(c);
    md_attention_args *a = &c->args.attention;
    a->qkv = ACT(c, d.images, d.tokens, 3 * d.heads * d.width);
    a->rel = c->row->flags & REL ? ACT(c, d.heads, d.tokens, d.tokens) : NULL;
    a->o = ACT(c, d.images, d.tokens, d.heads * d.width);
    a->lse = c->row->flags & LSE ? F32(c, d.images, d.heads, d.tokens) : NULL;
    a->heads = (int)d.heads;
    a->scale = 1.0f / sqrtf((float)d.width);
    c->terms = (double)(d.tokens + d.width);
}

/* Tensor cores take the probabilities in bf16, each rounded by up to 2^-8 of itself. */
static void ref_attention(op_case *c, bool mutant)
{
    const dims d = dims_of(c);
    double *slack = SLACK(c, attention, o);
    forward(d, X(c, attention, qkv), X(c, attention, rel), (double)c->args.attention.scale,
            (attended){REF(c, attention, o), REF(c, attention, lse), d.tokens - mutant, slack});
    for (int64_t i = 0; i < md_tensor_count(c->args.attention.o); i++)
        slack[i] *= case_eps(c);
}

static void build_attention_bwd(op_case *c)
{
    dims d = dims_of(c);
    int64_t n = d.images * d.tokens * d.heads * d.width;
    md_attention_bwd_args *a = &c->args.attention_bwd;
    a->qkv = ACT(c, d.images, d.tokens, 3 * d.heads * d.width);
    a->rel = c->row->flags & REL ? ACT(c, d.heads, d.tokens, d.tokens) : NULL;
    md_tensor *o = ACT(c, d.images, d.tokens, d.heads * d.width);
    md_tensor *lse = F32(c, d.images, d.heads, d.tokens);
    a->o = o;
    a->lse = lse;
    a->d_o = ACT(c, d.images, d.tokens, d.heads * d.width);
    a->dqkv = ACT(c, d.images, d.tokens, 3 * d.heads * d.width);
    a->drel = c->row->flags & DREL ? F32(c, d.heads, d.tokens, d.tokens) : NULL;
    a->accumulate = c->row->flags & ADD ? 2 : 0;
    a->heads = (int)d.heads;
    a->scale = 1.0f / sqrtf((float)d.width);
    c->terms = (double)(d.tokens + d.width);
    /* o and lse of these inputs, rounded as the forward op leaves them. */
    double *qkv = case_array(c, 3 * n), *o64 = case_array(c, n);
    double *rel = case_array(c, d.heads * d.tokens * d.tokens);
    double *lse64 = case_array(c, d.images * d.heads * d.tokens);
    for (int64_t i = 0; i < 3 * n; i++)
        qkv[i] = case_load(a->qkv, i);
    for (int64_t i = 0; a->rel && i < md_tensor_count(a->rel); i++)
        rel[i] = case_load(a->rel, i);
    forward(d, qkv, rel, (double)a->scale, (attended){o64, lse64, d.tokens, NULL});
    for (int64_t i = 0; i < n; i++)
        case_store(o, i, o64[i]);
    for (int64_t i = 0; i < d.images * d.heads * d.tokens; i++)
        case_store(lse, i, lse64[i]);
}

/* Gradients of one query; p and dp are rows of scratch. In bf16 tensor cores take p and dlogits
 * rounded, and delta = <d_o, o> is that of the o that is stored, rounded too. */
static void query_bwd(op_case *c, const int64_t ihq[3], double *p, double *dp, bool mutant)
{
    dims d = dims_of(c);
    double scale = (double)c->args.attention_bwd.scale, delta = 0.0, spread = 0.0;
    const double *qkv = X(c, attention_bwd, qkv), eps = case_eps(c);
    double *dqkv = REF(c, attention_bwd, dqkv), *drel = REF(c, attention_bwd, drel);
    double *slack = SLACK(c, attention_bwd, dqkv);
    int64_t b = ihq[0], h = ihq[1], i = ihq[2], q = at(d, b, i, 0, h);
    const int64_t row = ((b * d.tokens + i) * d.heads + h) * d.width;
    const double *g = X(c, attention_bwd, d_o) + row, *o = X(c, attention_bwd, o) + row;
    probabilities(d, qkv, X(c, attention_bwd, rel), scale, ihq, p);
    for (int64_t x = 0; x < d.width; x++)
        spread += eps * fabs(g[x] * o[x]);
    for (int64_t j = 0; j < d.tokens; j++) {
        int64_t v = at(d, b, j, 2, h);
        dp[j] = 0.0;
        for (int64_t x = 0; x < d.width; x++) {
            dp[j] += g[x] * qkv[v + x];
            dqkv[v + x] += p[j] * g[x];
            slack[v + x] += eps * fabs(p[j] * g[x]);
        }
        delta += p[j] * dp[j];
    }
    for (int64_t j = 0; j < d.tokens; j++) {
        double ds = p[j] * (dp[j] - (mutant ? 0.0 : delta)), off = eps * fabs(ds) + p[j] * spread;
        int64_t k = at(d, b, j, 1, h), ij = (h * d.tokens + i) * d.tokens + j;
        for (int64_t x = 0; x < d.width; x++) {
            dqkv[q + x] += scale * ds * qkv[k + x];
            dqkv[k + x] += scale * ds * qkv[q + x];
            slack[q + x] += scale * off * fabs(qkv[k + x]);
            slack[k + x] += scale * off * fabs(qkv[q + x]);
        }
        if (drel) {
            drel[ij] += ds;
            SLACK(c, attention_bwd, drel)[ij] += off;
        }
    }
}

static void ref_attention_bwd(op_case *c, bool mutant)
{
    dims d = dims_of(c);
    double *p = case_array(c, d.tokens), *dp = case_array(c, d.tokens);
    for (int64_t b = 0; b < d.images; b++)
        for (int64_t h = 0; h < d.heads; h++)
            for (int64_t i = 0; i < d.tokens; i++)
                query_bwd(c, (int64_t[]){b, h, i}, p, dp, mutant);
}

/* <d_o, o(qkv, rel)> */
static double objective_attention_bwd(const op_case *c, int o, int64_t i, double h)
{
    dims d = dims_of(c);
    int64_t n = d.images * d.tokens * d.heads * d.width;
    double *moved =
        o == OUT_INDEX(attention_bwd, dqkv) ? X(c, attention_bwd, qkv) : X(c, attention_bwd, rel);
    double *out = md_alloc(sizeof *out * (size_t)n, "reference"), sum = 0.0, old = moved[i];
    moved[i] += h;
    forward(d, X(c, attention_bwd, qkv), X(c, attention_bwd, rel),
            (double)c->args.attention_bwd.scale, (attended){out, NULL, d.tokens, NULL});
    moved[i] = old;
    for (int64_t j = 0; j < n; j++)
        sum += out[j] * X(c, attention_bwd, d_o)[j];
    md_free(out);
    return sum;
}

#define ATT(b, t, h, w, f)                                                     \
    {                                                                          \
        MD_OP_attention, build_attention, ref_attention, {b, t, h, w}, f, NULL \
    }
#define ATT_BWD(b, t, h, w, f)                                                        \
    {                                                                                 \
        MD_OP_attention_bwd, build_attention_bwd, ref_attention_bwd, {b, t, h, w}, f, \
            objective_attention_bwd                                                   \
    }

const op_row attention_rows[] = {
    ATT(1, 1, 1, 4, REL | LSE),
    ATT(1, 3, 1, 4, REL | LSE),
    ATT(3, 17, 3, 16, LSE),
    ATT(2, 65, 3, 64, REL | LSE),
    ATT(1, 197, 2, 64, REL),
    ATT(1, 197, 1, 64, 0),
    ATT(1, 257, 2, 80, REL | LSE),
    ATT(1, 257, 1, 64, LSE),
    ATT(2, 64, 1, 80, REL | LSE),
    ATT(1, 128, 1, 64, REL | LSE),
    ATT(1, 197, 1, 80, REL | LSE),
    ATT(3, 257, 3, 80, REL | LSE),
    ATT(1, 384, 1, 80, REL | LSE),
    ATT(1, 530, 1, 16, REL | LSE),
    ATT(1, 33, 2, 128, REL | LSE),
    ATT_BWD(1, 1, 2, 4, 0),
    ATT_BWD(1, 3, 1, 4, REL | DREL),
    ATT_BWD(3, 17, 3, 16, REL | DREL | ADD),
    ATT_BWD(3, 17, 1, 8, 0),
    ATT_BWD(2, 33, 2, 12, REL),
    ATT_BWD(70, 5, 1, 4, REL | DREL),
    ATT_BWD(2, 65, 3, 64, REL | DREL),
    ATT_BWD(1, 197, 1, 64, REL | DREL | ADD),
    ATT_BWD(1, 257, 1, 80, REL | DREL),
    ATT_BWD(2, 64, 1, 80, REL | DREL),
    ATT_BWD(1, 128, 1, 64, 0),
    ATT_BWD(1, 197, 1, 80, REL | DREL),
    ATT_BWD(2, 257, 2, 64, REL | DREL | ADD),
    ATT_BWD(2, 257, 2, 80, REL | DREL),
    ATT_BWD(1, 384, 1, 80, 0),
    ATT_BWD(1, 530, 1, 16, REL | DREL),
    ATT_BWD(1, 33, 2, 128, REL | DREL),
};
const int attention_row_count = (int)MD_COUNT(attention_rows);
