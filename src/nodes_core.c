/* nodes_core: the node kinds of an encoder. Shapes use the letters of kernels/backend.h. */
#include "src/nodes.h"

md_slot md_node_append(md_graph *g, const md_node *node)
{
    const md_node *n = md_graph_add(g, node);
    return n ? n->out[0] : MD_NO_SLOT;
}

md_status md_want_cols(const md_tensor *t, int64_t cols, const char *what)
{
    if (md_tensor_cols(t) != cols)
        MD_FAIL(MD_ERR_BUG, "%s has width %lld, expected %lld", what, (long long)md_tensor_cols(t),
                (long long)cols);
    return MD_OK;
}

md_status md_want_count(const md_tensor *t, int64_t count, const char *what)
{
    if (t && md_tensor_count(t) != count)
        MD_FAIL(MD_ERR_BUG, "%s has %lld elements, expected %lld", what,
                (long long)md_tensor_count(t), (long long)count);
    return MD_OK;
}

md_status md_want_packed(const md_graph *g, const md_node *n, int k, md_slot index,
                         const char *what)
{
    if (n->in[k] != MD_NO_SLOT && md_in_packed(g, n, k) != index)
        MD_FAIL(MD_ERR_BUG, "%s is packed by slot %d, not %d", what, md_in_packed(g, n, k), index);
    return MD_OK;
}

/* ---- patchify: in image, mix ---- */

static md_status patchify_infer(md_graph *g, md_node *n)
{
    const md_tensor *image = md_in(g, n, 0);
    int64_t b = image->dim[0], s = image->dim[1], p = n->attr.side;
    if (image->rank != 4 || image->dim[2] != s || image->dim[3] != 3 || s % p != 0)
        MD_FAIL(MD_ERR_BUG, "an image side of %lld does not divide into patches of %lld",
                (long long)s, (long long)p);
    MD_TRY(md_want_count(md_in(g, n, 1), b * MD_MIX_WORDS, "mix"));
    return md_node_output(g, n, 0, MD_COMPUTE(g), 2, (int64_t[]){b * (s / p) * (s / p), 3 * p * p});
}

static md_status patchify_fwd(md_graph *g, const md_node *n)
{
    const md_attr *a = &n->attr;
    return MD_RUN(patchify, .image = md_in(g, n, 0), .mix = md_in(g, n, 1),
                  .patch = md_out(g, n, 0), .side = a->side, .order = a->order,
                  .mean = {a->mean[0], a->mean[1], a->mean[2]},
                  .std = {a->std[0], a->std[1], a->std[2]});
}

static const md_node_kind kind_patchify = {
    .name = "patchify", .infer = patchify_infer, .fwd = patchify_fwd, .by_row = true};

md_slot md_n_patchify(md_graph *g, md_slot image, md_slot mix, const md_attr *attr)
{
    md_node n = MD_NO_NODE;
    n.kind = &kind_patchify;
    n.in[0] = image;
    n.in[1] = mix;
    n.attr = *attr;
    return md_node_append(g, &n);
}

/* Each rank can add what is whole to its rows. The gradient of that is a sum over the ranks, which
 * these nodes do not take. */
static bool adds_whole_to_rows(const md_graph *g, md_place place)
{
    return !g->training && place == MD_CUT_ROWS;
}

/* ---- linear: in x; param w, bias; out y, value before the activation. Or, for qkv with biases of
 * queries and values only: param w, q_bias, v_bias; out y, -, bias.
 * With w whole, y lies where x does. A column-cut w (its outputs, dimension 0) reads the entered x
 * and makes this rank's channels; a row-cut w (its inputs, dimension 1) reads these and makes
 * partial sums, whose bias the first rank alone adds. ---- */

static md_tensor weight_matrix(md_tensor w)
{
    int64_t rows = w.dim[0], cols = md_tensor_count(&w) / rows;
    return MD_TENSOR(w.data, (md_dtype)w.dtype, rows, cols);
}

static bool has_qv_bias(const md_node *n)
{
    return n->param[2] != MD_NO_PARAM;
}

static bool row_cut(const md_graph *g, const md_node *n)
{
    const md_param *w = &g->params->row[n->param[0]];
    return w->cut && w->cut_dim == 1;
}

static md_status linear_place(md_graph *g, const md_node *n, md_place *out)
{
    const md_param *w = &g->params->row[n->param[0]];
    const bool columns = w->cut && w->cut_dim == 0, rows = row_cut(g, n);
    MD_TRY(md_want_place(g, n, 0,
                         columns ? MD_PLACE_BIT(MD_ENTERED)
                         : rows  ? MD_PLACE_BIT(MD_CUT_COLS)
                                 : MD_PLACE_BIT(MD_REPL) | MD_PLACE_BIT(MD_CUT_ROWS)));
    *out = columns ? MD_CUT_COLS : rows ? MD_PARTIAL : md_in_place(g, n, 0);
    for (int k = 1; k <= 2; k++)
        if (n->param[k] != MD_NO_PARAM && g->params->row[n->param[k]].cut != columns)
            MD_FAIL(MD_ERR_BUG, "%s and %s are not cut alike", w->name,
                    g->params->row[n->param[k]].name);
    if (rows && n->attr.act != MD_ACT_NONE)
        MD_FAIL(MD_ERR_BUG, "an activation cannot come before the sum of %s", w->name);
    return MD_OK;
}

static md_status linear_infer(md_graph *g, md_node *n)
{
    md_place place;
    MD_TRY(linear_place(g, n, &place));
    const md_tensor *x = md_in(g, n, 0);
    md_tensor w = weight_matrix(md_param_value(g->params, n->param[0])), b;
    MD_TRY(md_want_cols(x, w.dim[1], "input"));
    const int64_t biases = has_qv_bias(n) ? w.dim[0] / 3 : w.dim[0];
    MD_TRY(md_want_count(MD_PARAM(1, b), biases, "bias"));
    MD_TRY(md_want_count(MD_PARAM(2, b), biases, "v_bias"));
    int64_t dim[MD_MAX_RANK];
    int rank = x->rank;
    for (int i = 0; i < rank; i++)
        dim[i] = x->dim[i];
    dim[rank - 1] = w.dim[0];
    MD_TRY(md_node_output(g, n, 0, MD_COMPUTE(g), rank, dim));
    if (n->attr.act != MD_ACT_NONE && g->training)
        MD_TRY(md_node_output(g, n, 1, MD_COMPUTE(g), rank, dim));
    if (has_qv_bias(n))
        MD_TRY(md_node_output(g, n, 2, MD_COMPUTE(g), 1, &w.dim[0]));
    md_node_set_place(g, n, 0, place);
    md_node_set_place(g, n, 1, place);
    md_node_set_place(g, n, 2, place == MD_CUT_COLS ? MD_CUT_COLS : MD_REPL);
    md_node_set_packed(g, n, 2, MD_NO_SLOT);
    return MD_OK;
}

static md_status linear_fwd(md_graph *g, const md_node *n)
{
    md_tensor w = weight_matrix(md_param_value(g->params, n->param[0])), b;
    const md_tensor *bias = has_qv_bias(n) ? md_out(g, n, 2) : MD_PARAM_ROUNDED(1, b);
    if (has_qv_bias(n)) {
        md_tensor v;
        MD_TRY(MD_RUN(qv_bias, .q = MD_PARAM_ROUNDED(1, b), .v = MD_PARAM_ROUNDED(2, v),
                      .y = md_out(g, n, 2)));
    }
    if (row_cut(g, n) && g->tp_rank != 0)
        bias = NULL;
    return MD_RUN(gemm, .a = md_in(g, n, 0), .b = &w, .bias = bias, .y = md_out(g, n, 0),
                  .pre = md_out(g, n, 1), .trans_b = true, .act = n->attr.act);
}

/* The rows that are this rank's after the sum. */
static md_tensor own_rows(const md_graph *g, const md_tensor *t)
{
    int64_t rows = md_tensor_rows(t) / g->tp_size, cols = md_tensor_cols(t);
    return MD_TENSOR(md_tensor_from(t, g->tp_rank * rows * cols), (md_dtype)t->dtype, rows, cols);
}

/* Gradients of the biases from dy, which becomes that of what is before the activation. */
static md_status bias_bwd(md_graph *g, const md_node *n, md_tensor *dy)
{
    md_tensor db, dv, own = n->attr.scattered ? own_rows(g, dy) : *dy;
    md_tensor *dbias = MD_PARAM_GRAD(1, db);
    if (has_qv_bias(n))
        return MD_RUN(qv_bias_bwd, .x = &own, .dq = dbias, .dv = MD_PARAM_GRAD(2, dv),
                      .accumulate = g->accumulate ? 3u : 0u);
    if (n->attr.act != MD_ACT_NONE)
        return MD_RUN(act_bwd, .x = md_out(g, n, 1), .dy = dy, .dx = dy, .dbias = dbias,
                      .act = n->attr.act, .accumulate = dbias && g->accumulate ? 2u : 0u);
    if (!dbias || md_branch_bias(g, n->out[0]) != MD_NO_PARAM)
        return MD_OK;
    return MD_RUN(colsum, .x = &own, .y = dbias, .accumulate = g->accumulate);
}

static md_status linear_bwd(md_graph *g, const md_node *n)
{
    md_tensor *dy = md_out_grad(g, n, 0), *dx = md_in_grad(g, n, 0);
    md_tensor w = weight_matrix(md_param_value(g->params, n->param[0]));
    md_tensor dw = weight_matrix(md_param_grad(g->params, n->param[0]));
    MD_TRY(bias_bwd(g, n, dy));
    return MD_RUN(linear_bwd, .x = md_in(g, n, 0), .w = dx ? &w : NULL, .dy = dy, .dw = &dw,
                  .dx = dx, .accumulate = g->accumulate);
}

const md_node_kind md_kind_linear = {.name = "linear",
                                     .infer = linear_infer,
                                     .fwd = linear_fwd,
                                     .bwd = linear_bwd,
                                     .keep_in = 1u << 0,
                                     .keep_out = 1u << 1};

md_slot md_n_linear(md_graph *g, md_slot x, int w, int bias, md_act act)
{
    md_node n = MD_NO_NODE;
    n.kind = &md_kind_linear;
    n.in[0] = x;
    n.param[0] = w;
    n.param[1] = bias;
    n.attr.act = act;
    return md_node_append(g, &n);
}

md_slot md_n_linear_qv(md_graph *g, md_slot x, int w, int q_bias, int v_bias)
{
    md_node n = MD_NO_NODE;
    n.kind = &md_kind_linear;
    n.in[0] = x;
    n.param[0] = w;
    n.param[1] = q_bias;
    n.param[2] = v_bias;
    return md_node_append(g, &n);
}

/* ---- tokens: in patch, mask; param cls, mask_token, pos ---- */

static md_status tokens_infer(md_graph *g, md_node *n)
{
    const md_tensor *patch = md_in(g, n, 0);
    int64_t b = n->attr.side, rows = md_tensor_rows(patch), c = md_tensor_cols(patch);
    md_tensor t;
    if (rows % b != 0)
        MD_FAIL(MD_ERR_BUG, "%lld patches do not divide over %lld images", (long long)rows,
                (long long)b);
    MD_TRY(md_want_count(MD_PARAM(0, t), c, "cls_token"));
    MD_TRY(md_want_count(MD_PARAM(1, t), c, "mask_token"));
    MD_TRY(md_want_count(MD_PARAM(2, t), (rows / b + 1) * c, "pos_embed"));
    MD_TRY(md_want_count(md_in(g, n, 1), rows, "mask"));
    return md_node_output(g, n, 0, MD_COMPUTE(g), 3, (int64_t[]){b, rows / b + 1, c});
}

static md_tensor as_matrix(const md_tensor *t)
{
    return MD_TENSOR(t->data, (md_dtype)t->dtype, md_tensor_rows(t), md_tensor_cols(t));
}

static md_tensor as_vector(const md_tensor *t)
{
    return MD_TENSOR(t->data, (md_dtype)t->dtype, md_tensor_count(t));
}

/* Parameters keep BEiT's leading dimensions of one; ops do not. NULL stays NULL. */
static md_tensor *drop_ones(md_tensor *t, bool matrix)
{
    if (t)
        *t = matrix ? as_matrix(t) : as_vector(t);
    return t;
}

/* [B*G, C] seen as [B, G, C]. */
static md_tensor by_image(const md_tensor *patch, const md_tensor *tokens)
{
    return MD_TENSOR(patch->data, (md_dtype)patch->dtype, tokens->dim[0], tokens->dim[1] - 1,
                     tokens->dim[2]);
}

static md_status tokens_fwd(md_graph *g, const md_node *n)
{
    md_tensor *out = md_out(g, n, 0), cls, mask_token, pos;
    md_tensor patch = by_image(md_in(g, n, 0), out);
    return MD_RUN(tokens, .patch = &patch, .cls = drop_ones(MD_PARAM(0, cls), false),
                  .mask_token = drop_ones(MD_PARAM(1, mask_token), false),
                  .pos = drop_ones(MD_PARAM(2, pos), true), .mask = md_in(g, n, 1), .tokens = out);
}

static md_status tokens_bwd(md_graph *g, const md_node *n)
{
    md_tensor *dtokens = md_out_grad(g, n, 0), cls, mask_token, pos;
    md_tensor dpatch = by_image(md_in_grad(g, n, 0), dtokens);
    return MD_RUN(tokens_bwd, .dtokens = dtokens, .mask = md_in(g, n, 1), .dpatch = &dpatch,
                  .dcls = drop_ones(MD_PARAM_GRAD(0, cls), false),
                  .dmask_token = drop_ones(MD_PARAM_GRAD(1, mask_token), false),
                  .dpos = drop_ones(MD_PARAM_GRAD(2, pos), true),
                  .accumulate = MD_ADD_BIT(1, 0) | MD_ADD_BIT(2, 1) | MD_ADD_BIT(3, 2));
}

static const md_node_kind kind_tokens = {.name = "tokens",
                                         .infer = tokens_infer,
                                         .fwd = tokens_fwd,
                                         .bwd = tokens_bwd,
                                         .keep_in = 1u << 1,
                                         .by_row = true};

md_slot md_n_tokens(md_graph *g, md_slot patch, md_slot mask, int64_t images, const int params[3])
{
    md_node n = MD_NO_NODE;
    n.kind = &kind_tokens;
    n.in[0] = patch;
    n.in[1] = mask;
    n.attr.side = (int)images;
    for (int k = 0; k < 3; k++)
        n.param[k] = params[k];
    return md_node_append(g, &n);
}

/* ---- relative position bias: in index; param table ---- */

static md_status rel_bias_infer(md_graph *g, md_node *n)
{
    const md_tensor *index = md_in(g, n, 0);
    md_tensor table = md_param_value(g->params, n->param[0]);
    int64_t t = index->dim[0];
    MD_TRY(md_want_place(g, n, 0, MD_PLACE_BIT(MD_REPL)));
    MD_TRY(md_node_output(g, n, 0, MD_COMPUTE(g), 3, (int64_t[]){table.dim[1], t, t}));
    md_node_grad_f32(g, n, 0);
    md_node_set_place(g, n, 0, g->params->row[n->param[0]].cut ? MD_CUT_COLS : MD_REPL);
    return MD_OK;
}

static md_status rel_bias_fwd(md_graph *g, const md_node *n)
{
    md_tensor table;
    return MD_RUN(rel_gather, .table = MD_PARAM(0, table), .index = md_in(g, n, 0),
                  .rel = md_out(g, n, 0));
}

static md_status rel_bias_bwd(md_graph *g, const md_node *n)
{
    md_tensor dtable;
    return MD_RUN(rel_scatter, .drel = md_out_grad(g, n, 0), .index = md_in(g, n, 0),
                  .dtable = MD_PARAM_GRAD(0, dtable), .accumulate = g->accumulate);
}

static const md_node_kind kind_rel_bias = {.name = "rel_bias",
                                           .infer = rel_bias_infer,
                                           .fwd = rel_bias_fwd,
                                           .bwd = rel_bias_bwd,
                                           .keep_in = 1u << 0};

md_slot md_n_rel_bias(md_graph *g, md_slot index, int table)
{
    md_node n = MD_NO_NODE;
    n.kind = &kind_rel_bias;
    n.in[0] = index;
    n.param[0] = table;
    return md_node_append(g, &n);
}

/* ---- attention: in qkv, rel; out o, lse ---- */

static md_status attention_infer(md_graph *g, md_node *n)
{
    const md_tensor *qkv = md_in(g, n, 0), *rel = md_in(g, n, 1);
    const md_place place = md_in_place(g, n, 0);
    MD_TRY(md_want_place(
        g, n, 0, MD_PLACE_BIT(MD_REPL) | MD_PLACE_BIT(MD_CUT_ROWS) | MD_PLACE_BIT(MD_CUT_COLS)));
    MD_TRY(md_want_place(g, n, 1, MD_PLACE_BIT(adds_whole_to_rows(g, place) ? MD_REPL : place)));
    if (place == MD_CUT_COLS)
        n->attr.heads /= g->tp_size;
    int64_t b = qkv->dim[0], t = qkv->dim[1], c = qkv->dim[2] / 3, h = n->attr.heads;
    if (qkv->rank != 3 || qkv->dim[2] % 3 != 0 || c % h != 0)
        MD_FAIL(MD_ERR_BUG, "width %lld does not divide into %lld heads", (long long)c,
                (long long)h);
    MD_TRY(md_want_count(rel, h * t * t, "relative position bias"));
    n->attr.scale = 1.0f / __builtin_sqrtf((float)(c / h));
    MD_TRY(md_node_output(g, n, 0, MD_COMPUTE(g), 3, (int64_t[]){b, t, c}));
    if (g->training)
        MD_TRY(md_node_output(g, n, 1, MD_F32, 3, (int64_t[]){b, h, t}));
    md_node_set_place(g, n, 0, place);
    md_node_set_place(g, n, 1, place);
    return MD_OK;
}

static md_status attention_fwd(md_graph *g, const md_node *n)
{
    return MD_RUN(attention, .qkv = md_in(g, n, 0), .rel = md_in(g, n, 1), .o = md_out(g, n, 0),
                  .lse = md_out(g, n, 1), .heads = n->attr.heads, .scale = n->attr.scale);
}

static md_status attention_bwd(md_graph *g, const md_node *n)
{
    return MD_RUN(attention_bwd, .qkv = md_in(g, n, 0), .rel = md_in(g, n, 1), .o = md_out(g, n, 0),
                  .lse = md_out(g, n, 1), .d_o = md_out_grad(g, n, 0), .dqkv = md_in_grad(g, n, 0),
                  .drel = md_in_grad(g, n, 1), .heads = n->attr.heads, .scale = n->attr.scale,
                  .accumulate = n->accumulate_in);
}

static const md_node_kind kind_attention = {.name = "attention",
                                            .infer = attention_infer,
                                            .fwd = attention_fwd,
                                            .bwd = attention_bwd,
                                            .keep_in = 3u,
                                            .keep_out = 3u,
                                            .accumulates = 1u << 1};

md_slot md_n_attention(md_graph *g, md_slot qkv, md_slot rel, int heads)
{
    md_node n = MD_NO_NODE;
    n.kind = &kind_attention;
    n.in[0] = qkv;
    n.in[1] = rel;
    n.attr.heads = heads;
    return md_node_append(g, &n);
}

/* ---- gather_rows: in x, index ---- */

static md_status gather_rows_infer(md_graph *g, md_node *n)
{
    const md_tensor *x = md_in(g, n, 0), *index = md_in(g, n, 1);
    const md_place place = md_in_place(g, n, 0);
    MD_TRY(md_want_place(
        g, n, 0, MD_PLACE_BIT(MD_REPL) | MD_PLACE_BIT(MD_CUT_ROWS) | MD_PLACE_BIT(MD_CUT_COLS)));
    MD_TRY(md_want_place(g, n, 1, MD_PLACE_BIT(place == MD_CUT_COLS ? MD_REPL : place)));
    MD_TRY(md_want_packed(g, n, 1, md_in_packed(g, n, 0), "index"));
    MD_TRY(md_node_output(g, n, 0, MD_COMPUTE(g), 3,
                          (int64_t[]){index->dim[0], index->dim[1], md_tensor_cols(x)}));
    md_node_set_place(g, n, 0, place);
    return MD_OK;
}

static md_status gather_rows_fwd(md_graph *g, const md_node *n)
{
    md_tensor x = as_matrix(md_in(g, n, 0)), y = as_matrix(md_out(g, n, 0));
    md_tensor index = as_vector(md_in(g, n, 1));
    return MD_RUN(gather_rows, .x = &x, .index = &index, .y = &y);
}

static md_status gather_rows_bwd(md_graph *g, const md_node *n)
{
    md_tensor dx = as_matrix(md_in_grad(g, n, 0)), dy = as_matrix(md_out_grad(g, n, 0));
    md_tensor index = as_vector(md_in(g, n, 1));
    return MD_RUN(scatter_rows, .dy = &dy, .index = &index, .dx = &dx);
}

static const md_node_kind kind_gather_rows = {.name = "gather_rows",
                                              .infer = gather_rows_infer,
                                              .fwd = gather_rows_fwd,
                                              .bwd = gather_rows_bwd,
                                              .keep_in = 1u << 1};

md_slot md_n_gather_rows(md_graph *g, md_slot x, md_slot index)
{
    md_node n = MD_NO_NODE;
    n.kind = &kind_gather_rows;
    n.in[0] = x;
    n.in[1] = index;
    return md_node_append(g, &n);
}
