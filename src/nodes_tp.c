/* nodes_tp: the nodes that communicate over the tensor-parallel group, in conjugate pairs: what one
 * does forward its partner does backward (Megatron-LM, core/tensor_parallel/mappings.py;
 * Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
 * section 4.2).
 *
 *   kind        from      to        forward          backward
 *   tp_enter    REPL      ENTERED   -                all-reduce
 *   tp_exit     PARTIAL   REPL      all-reduce       -
 *   sp_gather   CUT_ROWS  ENTERED   all-gather       reduce-scatter
 *   sp_scatter  PARTIAL   CUT_ROWS  reduce-scatter   all-gather
 *   all_rows    CUT_ROWS  REPL      all-gather       (none)
 *
 * Rows are cut at image borders: 257 tokens never divide, images do. The group moves operands where
 * they are; ops issued after a node see what it received. A group of the plan carrier counts only.
 */
#include "src/nodes.h"

/* The same values in other memory, unless the plan let them stay. */
static md_status pass_on(md_graph *g, const md_tensor *from, md_tensor *to)
{
    if (from->data == to->data && from->data)
        return MD_OK;
    md_tensor x = *from;
    return MD_RUN(axpy, .x = &x, .y = to, .alpha = 1.0f);
}

/* The site of each collective lets a test leave it out on all ranks: the losses must then differ.
 */
static void sum(md_graph *g, const char *site, md_tensor *t)
{
    if (!md_fault(site))
        md_comm_allreduce(g->tp, t->data, md_tensor_count(t), (md_dtype)t->dtype, MD_SUM);
}

static void gather(md_graph *g, const char *site, const md_tensor *part, md_tensor *whole)
{
    if (!md_fault(site))
        md_comm_allgather(g->tp, part->data, whole->data, (int64_t)md_tensor_bytes(part));
}

static void scatter(md_graph *g, const char *site, const md_tensor *whole, md_tensor *part)
{
    if (!md_fault(site))
        md_comm_reduce_scatter(g->tp, whole->data, part->data, md_tensor_count(whole),
                               (md_dtype)whole->dtype);
}

/* Output 0 as input 0 with `numerator / denominator` of its images, in place `to`. */
static md_status images_infer(md_graph *g, md_node *n, int numerator, int denominator, md_place to)
{
    md_tensor x = *md_in(g, n, 0);
    if (numerator != denominator)
        MD_TRY(md_want_packed(g, n, 0, MD_NO_SLOT, "what is cut by rows"));
    if (x.dim[0] * numerator % denominator != 0)
        MD_FAIL(MD_ERR_BUG, "%lld images do not divide over %d tensor-parallel ranks",
                (long long)x.dim[0], denominator);
    x.dim[0] = x.dim[0] * numerator / denominator;
    MD_TRY(md_node_output(g, n, 0, MD_COMPUTE(g), x.rank, x.dim));
    md_node_set_place(g, n, 0, to);
    return MD_OK;
}

static md_slot append(md_graph *g, const md_node_kind *kind, md_slot x)
{
    md_node n = MD_NO_NODE;
    n.kind = kind;
    n.in[0] = x;
    return md_node_append(g, &n);
}

/* ---- tp_enter, tp_exit ---- */

static md_status tp_enter_infer(md_graph *g, md_node *n)
{
    MD_TRY(md_want_place(g, n, 0, MD_PLACE_BIT(MD_REPL)));
    return images_infer(g, n, 1, 1, MD_ENTERED);
}

static md_status pass_fwd(md_graph *g, const md_node *n)
{
    return pass_on(g, md_in(g, n, 0), md_out(g, n, 0));
}

static md_status sum_bwd(md_graph *g, const md_node *n)
{
    md_tensor *dx = md_in_grad(g, n, 0);
    MD_TRY(pass_on(g, md_out_grad(g, n, 0), dx));
    sum(g, "tp_enter.bwd", dx);
    return MD_OK;
}

static const md_node_kind kind_tp_enter = {.name = "tp_enter",
                                           .infer = tp_enter_infer,
                                           .fwd = pass_fwd,
                                           .bwd = sum_bwd,
                                           .alias_fwd = true,
                                           .alias_bwd = true};

static md_status tp_exit_infer(md_graph *g, md_node *n)
{
    MD_TRY(md_want_place(g, n, 0, MD_PLACE_BIT(MD_PARTIAL)));
    return images_infer(g, n, 1, 1, MD_REPL);
}

static md_status sum_fwd(md_graph *g, const md_node *n)
{
    MD_TRY(pass_on(g, md_in(g, n, 0), md_out(g, n, 0)));
    sum(g, "tp_exit.fwd", md_out(g, n, 0));
    return MD_OK;
}

static md_status pass_bwd(md_graph *g, const md_node *n)
{
    return pass_on(g, md_out_grad(g, n, 0), md_in_grad(g, n, 0));
}

static const md_node_kind kind_tp_exit = {.name = "tp_exit",
                                          .infer = tp_exit_infer,
                                          .fwd = sum_fwd,
                                          .bwd = pass_bwd,
                                          .alias_fwd = true,
                                          .alias_bwd = true};

/* ---- sp_gather, sp_scatter, all_rows ---- */

static md_status sp_gather_infer(md_graph *g, md_node *n)
{
    MD_TRY(md_want_place(g, n, 0, MD_PLACE_BIT(MD_CUT_ROWS)));
    return images_infer(g, n, g->tp_size, 1, MD_ENTERED);
}

static md_status gather_fwd(md_graph *g, const md_node *n)
{
    gather(g, "sp_gather.fwd", md_in(g, n, 0), md_out(g, n, 0));
    return MD_OK;
}

static md_status scatter_bwd(md_graph *g, const md_node *n)
{
    scatter(g, "sp_gather.bwd", md_out_grad(g, n, 0), md_in_grad(g, n, 0));
    return MD_OK;
}

static const md_node_kind kind_sp_gather = {
    .name = "sp_gather", .infer = sp_gather_infer, .fwd = gather_fwd, .bwd = scatter_bwd};

static md_status sp_scatter_infer(md_graph *g, md_node *n)
{
    MD_TRY(md_want_place(g, n, 0, MD_PLACE_BIT(MD_PARTIAL)));
    g->node[g->slot[n->in[0]].producer].attr.scattered = true;
    return images_infer(g, n, 1, g->tp_size, MD_CUT_ROWS);
}

static md_status scatter_fwd(md_graph *g, const md_node *n)
{
    scatter(g, "sp_scatter.fwd", md_in(g, n, 0), md_out(g, n, 0));
    return MD_OK;
}

static md_status gather_bwd(md_graph *g, const md_node *n)
{
    gather(g, "sp_scatter.bwd", md_out_grad(g, n, 0), md_in_grad(g, n, 0));
    return MD_OK;
}

static const md_node_kind kind_sp_scatter = {
    .name = "sp_scatter", .infer = sp_scatter_infer, .fwd = scatter_fwd, .bwd = gather_bwd};

static md_status all_rows_infer(md_graph *g, md_node *n)
{
    MD_TRY(md_want_place(g, n, 0, MD_PLACE_BIT(MD_CUT_ROWS)));
    return images_infer(g, n, g->tp_size, 1, MD_REPL);
}

static md_status all_rows_fwd(md_graph *g, const md_node *n)
{
    gather(g, "all_rows.fwd", md_in(g, n, 0), md_out(g, n, 0));
    return MD_OK;
}

static const md_node_kind kind_all_rows = {
    .name = "all_rows", .infer = all_rows_infer, .fwd = all_rows_fwd};

/* ---- builders ---- */

md_slot md_n_enter(md_graph *g, md_slot x, int w)
{
    if (g->status != MD_OK || !g->params->row[w].cut)
        return x;
    bool rows = g->slot[x].value.place == MD_CUT_ROWS;
    return append(g, rows ? &kind_sp_gather : &kind_tp_enter, x);
}

md_slot md_n_exit(md_graph *g, md_slot y, md_slot like)
{
    if (g->status != MD_OK || g->slot[y].value.place != MD_PARTIAL)
        return y;
    bool rows = g->slot[like].value.place == MD_CUT_ROWS;
    return append(g, rows ? &kind_sp_scatter : &kind_tp_exit, y);
}

md_slot md_n_all_rows(md_graph *g, md_slot x)
{
    if (g->status != MD_OK || g->tp_size == 1)
        return x;
    return append(g, &kind_all_rows, x);
}
