/* nodes_loss: the ends of a training graph. */
#include "src/nodes.h"

/* ---- loss: in pred, target; out f64 [1] ---- */

static md_status loss_infer(md_graph *g, md_node *n)
{
    const md_tensor *pred = md_in(g, n, 0);
    MD_TRY(md_want_count(md_in(g, n, 1), md_tensor_count(pred), "target"));
    MD_TRY(md_node_output(g, n, 0, MD_F64, 1, (int64_t[]){1}));
    if (md_in_place(g, n, 0) == MD_CUT_ROWS) /* each rank has the sum over its own rows */
        md_node_set_place(g, n, 0, MD_PARTIAL);
    return MD_OK;
}

static md_status loss_run(md_graph *g, const md_node *n, md_tensor *dpred)
{
    return MD_RUN(loss, .pred = md_in(g, n, 0), .target = md_in(g, n, 1), .loss = md_out(g, n, 0),
                  .dpred = dpred, .kind = n->attr.loss, .beta = n->attr.beta,
                  .scale = n->attr.scale);
}

static md_status loss_fwd(md_graph *g, const md_node *n)
{
    return loss_run(g, n, NULL);
}

/* The loss is the root: its own gradient is 1, so the op gives the gradient of pred directly. */
static md_status loss_bwd(md_graph *g, const md_node *n)
{
    return loss_run(g, n, md_in_grad(g, n, 0));
}

static const md_node_kind kind_loss = {.name = "loss",
                                       .infer = loss_infer,
                                       .fwd = loss_fwd,
                                       .bwd = loss_bwd,
                                       .keep_in = 3u,
                                       .by_row = true};

static md_slot append_loss(md_graph *g, const md_node_kind *kind, const md_slot in[2],
                           const md_attr *attr)
{
    md_node n = MD_NO_NODE;
    n.kind = kind;
    n.in[0] = in[0];
    n.in[1] = in[1];
    n.attr = *attr;
    md_slot s = md_node_append(g, &n);
    md_graph_set_external(g, s);
    return s;
}

md_slot md_n_loss(md_graph *g, md_slot pred, md_slot target, const md_attr *attr)
{
    return append_loss(g, &kind_loss, (md_slot[]){pred, target}, attr);
}

/* ---- cross_entropy: in logits, target; out f64 [1] ---- */

static md_status cross_entropy_run(md_graph *g, const md_node *n, md_tensor *dlogits)
{
    return MD_RUN(cross_entropy, .logits = md_in(g, n, 0), .target = md_in(g, n, 1),
                  .loss = md_out(g, n, 0), .dlogits = dlogits, .scale = n->attr.scale);
}

static md_status cross_entropy_fwd(md_graph *g, const md_node *n)
{
    return cross_entropy_run(g, n, NULL);
}

static md_status cross_entropy_bwd(md_graph *g, const md_node *n)
{
    return cross_entropy_run(g, n, md_in_grad(g, n, 0));
}

static const md_node_kind kind_cross_entropy = {.name = "cross_entropy",
                                                .infer = loss_infer,
                                                .fwd = cross_entropy_fwd,
                                                .bwd = cross_entropy_bwd,
                                                .keep_in = 3u,
                                                .by_row = true};

md_slot md_n_cross_entropy(md_graph *g, md_slot logits, md_slot target, const md_attr *attr)
{
    return append_loss(g, &kind_cross_entropy, (md_slot[]){logits, target}, attr);
}
