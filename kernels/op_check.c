/* op_check: the shapes of every op as one table, read by one small interpreter, so that no backend
 * repeats shape checks.
 *
 * A rule is "name[?][@input][:dtype] mode dims": ? = optional; @ names the input an output may be
 * the same memory as; dtype f32 when absent; mode '=' exact dimensions, '~' matrix view (all
 * leading dimensions multiplied, then the last), '#' only the number of elements. dims are
 * separated by blanks, each "3", "C", "3C" or "G+1"; a letter gets its value at its first use and
 * must agree afterwards. gemm's transposes swap the dims of a and b. */
#include "kernels/backend.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

typedef struct op_rule {
    const char *in[MD_OP_IN], *out[MD_OP_OUT];
} op_rule;

static const op_rule rules[MD_OP_COUNT] = {
    [MD_OP_gemm] = {{"a ~ M K", "b ~ K N", "bias? # N"}, {"y ~ M N", "pre? ~ M N"}},
    [MD_OP_colsum] = {{"x ~ N C"}, {"y # C"}},
    [MD_OP_act_bwd] = {{"x ~ N C", "dy ~ N C"}, {"dx@dy ~ N C", "dbias? # C"}},
    [MD_OP_layernorm] = {{"x ~ N C", "weight? # C", "bias? # C"},
                         {"y@x ~ N C", "mean? # N", "rstd? # N"}},
    [MD_OP_residual_ln] = {{"x ~ N C", "branch? ~ N C", "gamma? # C", "keep? # B", "weight? # C",
                            "bias? # C"},
                           {"r?@x ~ N C", "y? ~ N C", "mean? # N", "rstd? # N"}},
    [MD_OP_residual_ln_bwd] = {{"r? ~ N C", "branch? ~ N C", "gamma? # C", "keep? # B",
                                "weight? # C", "mean? # N", "rstd? # N", "dr? ~ N C", "dy? ~ N C"},
                               {"dx@dr ~ N C", "dbranch? ~ N C", "dgamma? # C", "dweight? # C",
                                "dbias? # C"}},
    [MD_OP_attention] = {{"qkv = B T 3C", "rel? = H T T"}, {"o = B T C", "lse? = B H T"}},
    [MD_OP_attention_bwd] = {{"qkv = B T 3C", "rel? = H T T", "o = B T C", "lse = B H T",
                              "d_o = B T C"},
                             {"dqkv = B T 3C", "drel? = H T T"}},
    [MD_OP_rel_gather] = {{"table = R H", "index:I32 = T T"}, {"rel = H T T"}},
    [MD_OP_rel_scatter] = {{"drel = H T T", "index:I32 = T T"}, {"dtable = R H"}},
    [MD_OP_patchify] = {{"image:U8 = B S S 3"}, {"patch ~ N 3Q"}},
    [MD_OP_tokens] = {{"patch = B G C", "cls # C", "mask_token? # C", "pos? = G+1 C",
                       "mask?:U8 = B G"},
                      {"tokens = B G+1 C"}},
    [MD_OP_tokens_bwd] = {{"dtokens = B G+1 C", "mask?:U8 = B G"},
                          {"dpatch = B G C", "dcls? # C", "dmask_token? # C", "dpos? = G+1 C"}},
    [MD_OP_gather_rows] = {{"x ~ N C", "index:I32 # R"}, {"y ~ R C"}},
    [MD_OP_scatter_rows] = {{"dy ~ R C", "index:I32 # R"}, {"dx ~ N C"}},
    [MD_OP_loss] = {{"pred ~ N C", "target ~ N C"}, {"loss:F64 # 1", "dpred?@pred ~ N C"}},
    [MD_OP_sumsq] = {{"x # E"}, {"sum:F64 # 1", "nonfinite:F64 # 1"}},
    [MD_OP_adamw] = {{"grad # E"}, {"param # E", "m # E", "v # E"}},
    [MD_OP_fill] = {{NULL}, {"y # E"}},
    [MD_OP_axpy] = {{"x # E"}, {"y@x # E"}},
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

static md_status operand_check(md_op op, const char *rule, const md_tensor *t, bool swap,
                               int64_t letter[26])
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
    const char *colon = memchr(rule, ':', strcspn(rule, " "));
    const char *want = colon ? colon + 1 : "F32";
    const char *have = md_dtype_name((md_dtype)t->dtype);
    char shape[96];
    if (strncmp(want, have, strlen(have)) != 0 || !dims_fit(strpbrk(rule, "~=#"), t, swap, letter))
        MD_FAIL(MD_ERR_BUG, "%s: operand %s is %s but the rule is '%s'", md_op_name(op),
                rule_name(rule), md_tensor_describe(t, shape, sizeof shape), rule);
    return MD_OK;
}

md_status md_op_check(md_op op, const md_operands *a)
{
    int64_t letter[26];
    for (size_t i = 0; i < MD_COUNT(letter); i++)
        letter[i] = -1;
    bool trans[2] = {false, false};
    if (op == MD_OP_gemm) {
        const md_gemm_args *g = (const md_gemm_args *)(const void *)a;
        trans[0] = g->trans_a;
        trans[1] = g->trans_b;
    }
    for (int i = 0; i < MD_OP_IN; i++)
        MD_TRY(operand_check(op, rules[op].in[i], a->in[i], i < 2 && trans[i], letter));
    uint32_t outputs = 0;
    for (int i = 0; i < MD_OP_OUT; i++) {
        MD_TRY(operand_check(op, rules[op].out[i], a->out[i], false, letter));
        outputs |= rules[op].out[i] ? 1u << i : 0u;
    }
    if (a->accumulate & ~outputs)
        MD_FAIL(MD_ERR_BUG, "%s: accumulate is %#x, but the outputs are %#x", md_op_name(op),
                a->accumulate, outputs);
    return MD_OK;
}
