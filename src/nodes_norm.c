/* nodes_norm: residual steps, normalisations and sums. */
#include "src/nodes.h"

/* ---- residual_ln: in x, branch, keep, from, to; param gamma, weight, bias; out r, y, mean, rstd.
 * Without a branch there is no r: readers use x. ---- */

static bool has_branch(const md_node *n)
{
    return n->in[1] != MD_NO_SLOT;
}

static bool has_norm(const md_node *n)
{
    return n->param[1] != MD_NO_PARAM;
}

static md_status residual_ln_infer(md_graph *g, md_node *n)
{
    const md_tensor *x = md_in(g, n, 0), *branch = md_in(g, n, 1);
    int64_t c = md_tensor_cols(x);
    md_tensor t;
    MD_TRY(md_want_count(branch, md_tensor_count(x), "branch"));
    MD_TRY(md_want_count(md_in(g, n, 2), x->dim[0], "keep"));
    MD_TRY(md_want_packed(g, n, 0, MD_NO_SLOT, "the residual stream"));
    MD_TRY(md_want_packed(g, n, 1, n->in[3], "branch"));
    MD_TRY(md_want_count(MD_PARAM(0, t), c, "layer scale"));
    MD_TRY(md_want_count(MD_PARAM(1, t), c, "norm weight"));
    MD_TRY(md_want_count(MD_PARAM(2, t), c, "norm bias"));
    md_tensor shape = *x;
    if (has_branch(n))
        MD_TRY(md_node_output(g, n, 0, MD_COMPUTE(g), shape.rank, shape.dim));
    if (!has_norm(n))
        return MD_OK;
    MD_TRY(md_node_output(g, n, 1, MD_COMPUTE(g), shape.rank, shape.dim));
    md_node_set_packed(g, n, 1, n->in[4]);
    if (!g->training)
        return MD_OK;
    int64_t rows = md_tensor_rows(&shape);
    MD_TRY(md_node_output(g, n, 2, MD_F32, 1, &rows));
    return md_node_output(g, n, 3, MD_F32, 1, &rows);
}

static md_status residual_ln_fwd(md_graph *g, const md_node *n)
{
    md_tensor gamma, weight, bias;
    return MD_RUN(residual_ln, .x = md_in(g, n, 0), .branch = md_in(g, n, 1),
                  .keep = md_in(g, n, 2), .gamma = MD_PARAM(0, gamma),
                  .weight = MD_PARAM(1, weight), .bias = MD_PARAM(2, bias), .from = md_in(g, n, 3),
                  .to = md_in(g, n, 4), .r = md_out(g, n, 0), .y = md_out(g, n, 1),
                  .mean = md_out(g, n, 2), .rstd = md_out(g, n, 3), .eps = n->attr.eps);
}

int md_branch_bias(const md_graph *g, md_slot branch)
{
    const md_slot_row *row = &g->slot[branch];
    if (row->producer < 0 || row->first_use < 0 || row->first_use != row->last_use)
        return MD_NO_PARAM;
    const md_node *made = &g->node[row->producer], *reader = &g->node[row->last_use];
    const bool takes = made->kind == &md_kind_linear && made->attr.act == MD_ACT_NONE &&
                       made->param[2] == MD_NO_PARAM && row->value.place == MD_REPL;
    return takes && reader->kind == &md_kind_residual_ln && reader->in[1] == branch ? made->param[1]
                                                                                    : MD_NO_PARAM;
}

static md_status residual_ln_bwd(md_graph *g, const md_node *n)
{
    md_tensor gamma, weight, dgamma, dweight, dbias, sum;
    md_tensor *dy = md_out_grad(g, n, 1), *dx = md_in_grad(g, n, 0);
    bool branch = has_branch(n);
    const int behind = branch ? md_branch_bias(g, n->in[1]) : MD_NO_PARAM;
    if (behind != MD_NO_PARAM)
        sum = md_param_grad(g->params, behind);
    const md_tensor *dr = branch ? md_out_grad(g, n, 0) : (n->accumulate_in & 1) ? dx : NULL;
    return MD_RUN(residual_ln_bwd, .r = branch ? md_out(g, n, 0) : md_in(g, n, 0),
                  .branch = md_in(g, n, 1), .keep = md_in(g, n, 2), .gamma = MD_PARAM(0, gamma),
                  .weight = dy ? MD_PARAM(1, weight) : NULL, .mean = md_out(g, n, 2),
                  .rstd = md_out(g, n, 3), .dr = dr, .dy = dy, .from = md_in(g, n, 3),
                  .to = dy ? md_in(g, n, 4) : NULL, .dx = dx, .dbranch = md_in_grad(g, n, 1),
                  .dgamma = MD_PARAM_GRAD(0, dgamma),
                  .dweight = dy ? MD_PARAM_GRAD(1, dweight) : NULL,
                  .dbias = dy ? MD_PARAM_GRAD(2, dbias) : NULL,
                  .dbranch_sum = behind == MD_NO_PARAM ? NULL : &sum,
                  .accumulate = MD_ADD_BIT(2, 0) | (dy ? MD_ADD_BIT(3, 1) | MD_ADD_BIT(4, 2) : 0u) |
                                (g->accumulate && behind != MD_NO_PARAM ? 1u << 5 : 0u));
}

const md_node_kind md_kind_residual_ln = {.name = "residual_ln",
                                          .infer = residual_ln_infer,
                                          .fwd = residual_ln_fwd,
                                          .bwd = residual_ln_bwd,
                                          .keep_in = 1u << 1 | 1u << 2 | 1u << 3 | 1u << 4,
                                          .keep_out = 1u << 0 | 1u << 2 | 1u << 3,
                                          .alias_fwd = true,
                                          .alias_bwd = true,
                                          .by_row = true};

/* Without a branch the input itself is what the backward reads, and since later nodes read it too,
 * its gradient is added to. */
static const md_node_kind kind_affine_ln = {.name = "affine_ln",
                                            .infer = residual_ln_infer,
                                            .fwd = residual_ln_fwd,
                                            .bwd = residual_ln_bwd,
                                            .keep_in = 1u << 0,
                                            .keep_out = 1u << 2 | 1u << 3,
                                            .accumulates = 1u << 0,
                                            .by_row = true};

void md_n_residual_ln(md_graph *g, const md_residual_in *in, md_slot *r, md_slot *y)
{
    md_node n = MD_NO_NODE;
    n.kind = in->branch == MD_NO_SLOT ? &kind_affine_ln : &md_kind_residual_ln;
    n.in[0] = in->x;
    n.in[1] = in->branch;
    n.in[2] = in->keep;
    n.in[3] = in->from;
    n.in[4] = in->to;
    n.param[0] = in->gamma;
    n.param[1] = in->weight;
    n.param[2] = in->bias;
    n.attr.eps = in->eps;
    const md_node *made = md_graph_add(g, &n);
    *r = !made ? MD_NO_SLOT : has_branch(made) ? made->out[0] : in->x;
    *y = made ? made->out[1] : MD_NO_SLOT;
}

/* ---- layernorm: in x; param weight, bias (both or none); no gradient ---- */

static md_status same_shape_infer(md_graph *g, md_node *n)
{
    md_tensor shape = *md_in(g, n, 0);
    return md_node_output(g, n, 0, MD_COMPUTE(g), shape.rank, shape.dim);
}

static md_status layernorm_fwd(md_graph *g, const md_node *n)
{
    md_tensor weight, bias;
    return MD_RUN(layernorm, .x = md_in(g, n, 0), .weight = MD_PARAM(0, weight),
                  .bias = MD_PARAM(1, bias), .y = md_out(g, n, 0), .eps = n->attr.eps,
                  .unbiased = n->attr.unbiased);
}

static const md_node_kind kind_layernorm = {.name = "layernorm",
                                            .infer = same_shape_infer,
                                            .fwd = layernorm_fwd,
                                            .alias_fwd = true,
                                            .by_row = true};

md_slot md_n_layernorm(md_graph *g, md_slot x, const int params[2], const md_attr *attr)
{
    md_node n = MD_NO_NODE;
    n.kind = &kind_layernorm;
    n.in[0] = x;
    n.param[0] = params ? params[0] : MD_NO_PARAM;
    n.param[1] = params ? params[1] : MD_NO_PARAM;
    n.attr = *attr;
    return md_node_append(g, &n);
}

/* ---- mean_rows: in x [B, M, C]; out [B, C] ---- */

static md_status mean_rows_infer(md_graph *g, md_node *n)
{
    const md_tensor *x = md_in(g, n, 0);
    if (x->rank != 3)
        MD_FAIL(MD_ERR_BUG, "rows of images expected, not rank %d", x->rank);
    return md_node_output(g, n, 0, MD_COMPUTE(g), 2, (int64_t[]){x->dim[0], x->dim[2]});
}

static md_status mean_rows_fwd(md_graph *g, const md_node *n)
{
    return MD_RUN(mean_rows, .x = md_in(g, n, 0), .y = md_out(g, n, 0));
}

static md_status mean_rows_bwd(md_graph *g, const md_node *n)
{
    return MD_RUN(mean_rows_bwd, .dy = md_out_grad(g, n, 0), .dx = md_in_grad(g, n, 0));
}

static const md_node_kind kind_mean_rows = {.name = "mean_rows",
                                            .infer = mean_rows_infer,
                                            .fwd = mean_rows_fwd,
                                            .bwd = mean_rows_bwd,
                                            .by_row = true};

md_slot md_n_mean_rows(md_graph *g, md_slot x)
{
    md_node n = MD_NO_NODE;
    n.kind = &kind_mean_rows;
    n.in[0] = x;
    return md_node_append(g, &n);
}

/* ---- add_scaled: in x, sum; out sum + scale * x; no gradient ---- */

static md_status add_scaled_fwd(md_graph *g, const md_node *n)
{
    md_tensor *out = md_out(g, n, 0);
    if (n->in[1] != MD_NO_SLOT)
        MD_TRY(MD_RUN(axpy, .x = md_in(g, n, 1), .y = out, .alpha = 1.0f));
    return MD_RUN(axpy, .x = md_in(g, n, 0), .y = out, .alpha = n->attr.scale,
                  .accumulate = n->in[1] != MD_NO_SLOT);
}

static const md_node_kind kind_add_scaled = {
    .name = "add_scaled", .infer = same_shape_infer, .fwd = add_scaled_fwd, .by_row = true};

md_slot md_n_add_scaled(md_graph *g, md_slot sum, md_slot x, float scale)
{
    md_node n = MD_NO_NODE;
    n.kind = &kind_add_scaled;
    n.in[0] = x;
    n.in[1] = sum;
    n.attr.scale = scale;
    return md_node_append(g, &n);
}
