/* op_check: the shapes of every op as one table, read by one small interpreter, so that no backend
 * repeats shape checks.
 *
 * A rule is "name[?][@input][:dtype] mode dims": ? = optional; @ names the input an output may be
 * the same memory as; dtype the compute type (f32 or bf16, in one call all alike) when absent,
 * FLOAT either of the two for itself; mode '=' exact dimensions, '~' matrix view (all leading
 * dimensions multiplied, then the last), '#' only the number of elements. dims are separated by
 * blanks, each "3", "C", "3C" or "G+1"; a letter gets its value at its first use and must agree
 * afterwards. gemm's transposes swap the dims of a and b. */
#include "kernels/backend.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

typedef struct op_rule {
    const char *in[MD_OP_IN], *out[MD_OP_OUT];
} op_rule;

static const op_rule rules[MD_OP_COUNT] = {
    [MD_OP_gemm] = {{"a ~ M K", "b ~ K N", "bias? # N"}, {"y:FLOAT ~ M N", "pre? ~ M N"}},
    [MD_OP_linear_bwd] = {{"x ~ N I", "w? ~ O I", "dy ~ N O"}, {"dw:F32 ~ O I", "dx? ~ N I"}},
    [MD_OP_colsum] = {{"x ~ N C"}, {"y:F32 # C"}},
    [MD_OP_qv_bias] = {{"q # C", "v # C"}, {"y # 3C"}},
    [MD_OP_qv_bias_bwd] = {{"x ~ N 3C"}, {"dq:F32 # C", "dv:F32 # C"}},
    [MD_OP_act_bwd] = {{"x ~ N C", "dy ~ N C"}, {"dx@dy ~ N C", "dbias?:F32 # C"}},
    [MD_OP_layernorm] = {{"x ~ N C", "weight?:F32 # C", "bias?:F32 # C"},
                         {"y@x ~ N C", "mean?:F32 # N", "rstd?:F32 # N"}},
    [MD_OP_residual_ln] = {{"x ~ N C", "branch? ~ P C", "gamma?:F32 # C", "keep?:F32 # B",
                            "weight?:F32 # C", "bias?:F32 # C", "from?:I32 # B", "to?:I32 # B"},
                           {"r?@x ~ N C", "y? ~ Q C", "mean?:F32 # N", "rstd?:F32 # N"}},
    [MD_OP_residual_ln_bwd] = {{"r? ~ N C", "branch? ~ P C", "gamma?:F32 # C", "keep?:F32 # B",
                                "weight?:F32 # C", "mean?:F32 # N", "rstd?:F32 # N", "dr? ~ N C",
                                "dy? ~ Q C", "from?:I32 # B", "to?:I32 # B"},
                               {"dx@dr ~ N C", "dbranch? ~ P C", "dgamma?:F32 # C",
                                "dweight?:F32 # C", "dbias?:F32 # C", "dbranch_sum?:F32 # C"}},
    [MD_OP_attention] = {{"qkv = B T 3C", "rel? = H T T"}, {"o = B T C", "lse?:F32 = B H T"}},
    [MD_OP_attention_bwd] = {{"qkv = B T 3C", "rel? = H T T", "o = B T C", "lse:F32 = B H T",
                              "d_o = B T C"},
                             {"dqkv = B T 3C", "drel?:F32 = H T T"}},
    [MD_OP_rel_gather] = {{"table:F32 = R H", "index:I32 = T T"}, {"rel = H T T"}},
    [MD_OP_rel_scatter] = {{"drel:F32 = H T T", "index:I32 = T T"}, {"dtable:F32 = R H"}},
    [MD_OP_patchify] = {{"image:U8 = B S S 3", "mix?:I32 = B 12"}, {"patch ~ N 3Q"}},
    [MD_OP_tokens] = {{"patch = B G C", "cls:F32 # C", "mask_token?:F32 # C", "pos?:F32 = G+1 C",
                       "mask?:U8 = B G"},
                      {"tokens = B G+1 C"}},
    [MD_OP_tokens_bwd] = {{"dtokens = B G+1 C", "mask?:U8 = B G"},
                          {"dpatch = B G C", "dcls?:F32 # C", "dmask_token?:F32 # C",
                           "dpos?:F32 = G+1 C"}},
    [MD_OP_gather_rows] = {{"x ~ N C", "index:I32 # R"}, {"y ~ R C"}},
    [MD_OP_scatter_rows] = {{"dy ~ R C", "index:I32 # R"}, {"dx ~ N C"}},
    [MD_OP_mean_rows] = {{"x = B M C"}, {"y ~ B C"}},
    [MD_OP_mean_rows_bwd] = {{"dy ~ B C"}, {"dx = B M C"}},
    [MD_OP_loss] = {{"pred ~ N C", "target ~ N C"}, {"loss:F64 # 1", "dpred?@pred ~ N C"}},
    [MD_OP_cross_entropy] = {{"logits ~ B K", "target:F32 ~ B K"},
                             {"loss:F64 # 1", "dlogits?@logits ~ B K"}},
    [MD_OP_sumsq] = {{"x:F32 # E"}, {"sum:F64 # 1", "nonfinite:F64 # 1"}},
    [MD_OP_adamw] = {{"grad:F32 # E"},
                     {"param:F32 # E", "m:F32 # E", "v:F32 # E", "copy?:BF16 # E"}},
    [MD_OP_axpy] = {{"x # E"}, {"y@x # E"}},
    [MD_OP_cast] = {{"x:FLOAT # E"}, {"y:FLOAT # E"}},
};

static const char *const op_names[] = {
#define MD_OP_NAME(op) #op,
    MD_OPS(MD_OP_NAME)
#undef MD_OP_NAME
};

const char *md_op_name(md_op op)
{
    return (unsigned)op < MD_OP_COUNT ? op_names[op] : "unknown";
}

/* Per-thread copies, because a rule holds more than the name; a handful are alive at once. */
static const char *rule_name(const char *rule)
{
    static _Thread_local char names[8][24];
    static _Thread_local unsigned turn;
    if (!rule)
        return NULL;
    char *out = names[turn++ % MD_COUNT(names)];
    size_t n = strcspn(rule, "?@: ");
    memcpy(out, rule, MD_MIN(n, sizeof names[0] - 1));
    out[MD_MIN(n, sizeof names[0] - 1)] = '\0';
    return out;
}

const char *md_op_in_name(md_op op, int i)
{
    return i >= 0 && i < MD_OP_IN ? rule_name(rules[op].in[i]) : NULL;
}

const char *md_op_out_name(md_op op, int i)
{
    return i >= 0 && i < MD_OP_OUT ? rule_name(rules[op].out[i]) : NULL;
}

bool md_op_may_share(md_op op, int in, int out)
{
    const char *rule = rules[op].out[out], *input = rules[op].in[in];
    const char *at = rule ? memchr(rule, '@', strcspn(rule, " ")) : NULL;
    size_t n = input ? strcspn(input, "?@: ") : 0;
    return at && n > 0 && strncmp(at + 1, input, n) == 0 && strchr(": ", at[1 + n]);
}

/* The dimensions of t as the mode of its rule sees them; returns how many. */
static int dims_of(char mode, const md_tensor *t, int64_t dim[MD_MAX_RANK])
{
    if (mode == '~') {
        dim[0] = md_tensor_rows(t);
        dim[1] = md_tensor_cols(t);
        return 2;
    }
    if (mode == '#') {
        dim[0] = md_tensor_count(t);
        return 1;
    }
    memcpy(dim, t->dim, sizeof t->dim);
    return t->rank;
}

/* One dimension expression against a value; binds its letter when new. */
static bool dim_fits(const char *e, int64_t value, int64_t letter[26])
{
    char *rest;
    int64_t factor = strtol(e, &rest, 10);
    if (rest == e)
        factor = 1;
    if (!isupper((unsigned char)*rest))
        return value == factor;
    int64_t *bound = &letter[*rest - 'A'];
    int64_t plus = rest[1] == '+' ? strtol(rest + 2, NULL, 10) : 0;
    if (*bound < 0)
        *bound = (value - plus) / factor;
    return value >= 0 && *bound >= 0 && value == *bound * factor + plus;
}

static bool dims_fit(const char *dims, const md_tensor *t, bool swap, int64_t letter[26])
{
    int64_t have[MD_MAX_RANK];
    int n = dims_of(*dims, t, have), i = 0;
    if (swap) {
        int64_t first = have[0];
        have[0] = have[1];
        have[1] = first;
    }
    for (const char *e = strchr(dims, ' '); e; e = strchr(e, ' '), i++)
        if (i >= n || !dim_fits(++e, have[i], letter))
            return false;
    return i == n;
}

/* What a call has bound so far: its letters and its compute type (-1: none yet). */
typedef struct bindings {
    int64_t letter[26];
    int compute;
} bindings;

static bool type_fits(const char *rule, uint8_t have, bindings *b)
{
    const char *colon = memchr(rule, ':', strcspn(rule, " "));
    const bool floating = have == MD_F32 || have == MD_BF16;
    if (colon && strncmp(colon, ":FLOAT ", 7) == 0)
        return floating;
    if (colon) {
        const char *name = md_dtype_name((md_dtype)have);
        return strncmp(colon + 1, name, strlen(name)) == 0 && colon[1 + strlen(name)] == ' ';
    }
    if (b->compute < 0 && floating)
        b->compute = have;
    return have == b->compute;
}

static md_status operand_check(md_op op, const char *rule, const md_tensor *t, bool swap,
                               bindings *b)
{
    if (!rule) {
        if (t)
            MD_FAIL(MD_ERR_BUG, "%s: an operand beyond the last one is set", md_op_name(op));
        return MD_OK;
    }
    size_t name = strcspn(rule, "?@: ");
    if (!t) {
        if (rule[name] != '?')
            MD_FAIL(MD_ERR_BUG, "%s: operand %s is missing", md_op_name(op), rule_name(rule));
        return MD_OK;
    }
    char shape[96];
    if (!type_fits(rule, t->dtype, b) || !dims_fit(strpbrk(rule, "~=#"), t, swap, b->letter))
        MD_FAIL(MD_ERR_BUG, "%s: operand %s is %s but the rule is '%s'", md_op_name(op),
                rule_name(rule), md_tensor_describe(t, shape, sizeof shape), rule);
    return MD_OK;
}

/* Images whose rows follow each other, and operands of some of them only: x, dx of all. */
typedef struct packing {
    const md_tensor *x, *branch, *y, *keep, *from, *to;
} packing;

static md_status packing_check(md_op op, const packing *p)
{
    const int64_t rows = md_tensor_rows(p->x);
    const md_tensor *images = p->keep ? p->keep : p->from ? p->from : p->to;
    if (images && rows > 0 && (md_tensor_count(images) == 0 || rows % md_tensor_count(images) != 0))
        MD_FAIL(MD_ERR_BUG, "%s: %lld rows are not whole images", md_op_name(op), (long long)rows);
    const int64_t tokens = images && rows ? rows / md_tensor_count(images) : 1;
    const struct {
        const md_tensor *packed, *index;
        const char *name;
    } part[2] = {{p->branch, p->from, "branch"}, {p->y, p->to, "y"}};
    for (size_t i = 0; i < MD_COUNT(part); i++) {
        const int64_t have = part[i].packed ? md_tensor_rows(part[i].packed) : 0;
        if (part[i].packed && (part[i].index ? have > rows || have % tokens != 0 : have != rows))
            MD_FAIL(MD_ERR_BUG, "%s: %s has %lld rows of %lld", md_op_name(op), part[i].name,
                    (long long)have, (long long)rows);
        if (part[i].index && !part[i].packed)
            MD_FAIL(MD_ERR_BUG, "%s: images of %s, which is not there", md_op_name(op),
                    part[i].name);
    }
    return MD_OK;
}

/* What a shape table cannot say. */
static md_status images_check(md_op op, const md_operands *operands)
{
    const void *args = operands;
    if (op == MD_OP_residual_ln) {
        const md_residual_ln_args *a = args;
        return packing_check(op, &(packing){a->x, a->branch, a->y, a->keep, a->from, a->to});
    }
    if (op == MD_OP_residual_ln_bwd) {
        const md_residual_ln_bwd_args *a = args;
        const md_tensor *branch = a->branch ? a->branch : a->dbranch;
        return packing_check(op, &(packing){a->dx, branch, a->dy, a->keep, a->from, a->to});
    }
    return MD_OK;
}

md_status md_op_check(md_op op, const md_operands *a)
{
    bindings b = {.compute = -1};
    for (size_t i = 0; i < MD_COUNT(b.letter); i++)
        b.letter[i] = -1;
    bool trans[2] = {false, false};
    if (op == MD_OP_gemm) {
        const md_gemm_args *g = (const md_gemm_args *)(const void *)a;
        trans[0] = g->trans_a;
        trans[1] = g->trans_b;
    }
    for (int i = 0; i < MD_OP_IN; i++)
        MD_TRY(operand_check(op, rules[op].in[i], a->in[i], i < 2 && trans[i], &b));
    uint32_t outputs = 0;
    for (int i = 0; i < MD_OP_OUT; i++) {
        MD_TRY(operand_check(op, rules[op].out[i], a->out[i], false, &b));
        outputs |= rules[op].out[i] ? 1u << i : 0u;
    }
    if (a->accumulate & ~outputs)
        MD_FAIL(MD_ERR_BUG, "%s: accumulate is %#x, but the outputs are %#x", md_op_name(op),
                a->accumulate, outputs);
    return images_check(op, a);
}
