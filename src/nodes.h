/* nodes: what the nodes_*.c files share. Not for builders. */
#ifndef MD_NODES_H
#define MD_NODES_H

#include "src/graph.h"

/* A node without inputs and parameters. */
#define MD_NO_NODE ((md_node){.in = {-1, -1, -1, -1, -1}, .param = {-1, -1, -1, -1}})

/* Runs one op on the graph's backend. */
#define MD_RUN(op, ...) g->be->ops->op(g->be, &(md_##op##_args){__VA_ARGS__})

/* The compute type: of activations, and of what matrix products read. */
#define MD_COMPUTE(g) ((g)->params->dtype)

/* Value (in f32, and in the compute type) and gradient of parameter k of node n, through the tensor
 * variable t; NULL when absent. */
#define MD_PARAM(k, t) \
    (n->param[k] == MD_NO_PARAM ? NULL : ((t) = md_param_f32(g->params, n->param[k]), &(t)))
#define MD_PARAM_ROUNDED(k, t) \
    (n->param[k] == MD_NO_PARAM ? NULL : ((t) = md_param_value(g->params, n->param[k]), &(t)))
#define MD_PARAM_GRAD(k, t) \
    (n->param[k] == MD_NO_PARAM ? NULL : ((t) = md_param_grad(g->params, n->param[k]), &(t)))

/* Bit for output k of an op that writes the gradient of parameter p: set when this backward adds to
 * parameter gradients and the node has the parameter. */
#define MD_ADD_BIT(k, p) (g->accumulate && n->param[p] != MD_NO_PARAM ? 1u << (k) : 0u)

/* Where a slot is made by a linear layer without activation, is no sum over tensor-parallel ranks,
 * and is read by one residual step only, as its branch: the layer's bias, whose gradient is the
 * column sums of the branch's, and which that step's backward pass makes. Else MD_NO_PARAM: the
 * layer makes it. */
int md_branch_bias(const md_graph *g, md_slot branch);

/* Kinds that md_branch_bias looks for. */
extern const md_node_kind md_kind_linear, md_kind_residual_ln;

/* Appends the node and returns its output 0. */
md_slot md_node_append(md_graph *g, const md_node *node);

/* MD_ERR_BUG naming `what` unless input k is packed by index. */
md_status md_want_packed(const md_graph *g, const md_node *n, int k, md_slot index,
                         const char *what);

/* MD_ERR_BUG naming `what` unless t has this width, or (t may be NULL) this many elements. */
md_status md_want_cols(const md_tensor *t, int64_t cols, const char *what);
md_status md_want_count(const md_tensor *t, int64_t count, const char *what);

#endif
