/* graph: the model, described once: a list of nodes over single-assignment slots whose shapes are
 * known when the list is built. No branches and no dynamic shapes, so lifetimes fall out of the
 * list, memory is planned once, and the same list serves every backend and every process grid.
 *
 * Building: md_n_* calls (nodes_*.c) append nodes; the first error is kept and later calls do
 * nothing, so that a builder checks once, in md_graph_finish. Slots are small integers; MD_NO_SLOT
 * is "absent".
 *
 * Over a tensor-parallel group every rank builds the same list on its own shapes. Each slot carries
 * its place (src/tensor.h), found from its node's inputs and parameters; only the nodes of
 * nodes_tp.c communicate. A node whose inputs are in the wrong place is refused while building.
 *
 * Packed slots hold some images of a pass only, as many as an index input says (md_graph_packed):
 * memory is planned for all images, and before a pass md_graph_pack tells how many there are. What
 * a node makes of a packed input is packed alike; only residual_ln packs and unpacks.
 *
 * A segment of the list may be recomputed (md_graph_recompute): between its passes only what others
 * read of it is kept.
 *
 * Running: md_graph_forward walks the nodes, md_graph_backward walks them in reverse. Every
 * parameter belongs to one node, so its gradient is complete when that node's backward has run:
 * then the hook is called. A slot read by several nodes gets its gradient summed in reverse node
 * order. */
#ifndef MD_GRAPH_H
#define MD_GRAPH_H

#include "kernels/backend.h"
#include "mpi/comm.h"
#include "src/param.h"

typedef int md_slot;
#define MD_NO_SLOT  (-1)
#define MD_NO_PARAM (-1)

#define MD_NODE_IN    5
#define MD_NODE_OUT   4
#define MD_NODE_PARAM 4

/* Attributes of a node; each kind reads the few it names. */
typedef struct md_attr {
    md_act act;
    int heads, side;
    float eps, scale, beta;
    bool unbiased;
    md_patch_order order;
    md_loss_kind loss;
    float mean[3], std[3];
    bool scattered; /* found by sp_scatter: the rows of this node's sum are spread over the ranks */
} md_attr;

typedef struct md_graph md_graph;
typedef struct md_node md_node;

/* One row per kind of node. infer checks the inputs and declares the outputs (md_node_output). bwd
 * is NULL for kinds that pass no gradient. keep_in, keep_out: bit k set when bwd reads the value of
 * input or output k. alias_fwd: output 0 may take input 0's memory when nothing reads that later;
 * alias_bwd: the gradient of input 0 may take the memory of the gradient of output 0. accumulates:
 * bit k set when bwd can add to the gradient of input k. by_row: rows do not meet, so that the node
 * takes replicated or row-cut inputs, all alike, and leaves its outputs in the same place; other
 * kinds look after places in infer. */
typedef struct md_node_kind {
    const char *name;
    md_status (*infer)(md_graph *g, md_node *n);
    md_status (*fwd)(md_graph *g, const md_node *n);
    md_status (*bwd)(md_graph *g, const md_node *n);
    uint32_t keep_in, keep_out, accumulates;
    bool alias_fwd, alias_bwd, by_row;
} md_node_kind;

struct md_node {
    const md_node_kind *kind;
    md_slot in[MD_NODE_IN], out[MD_NODE_OUT];
    int param[MD_NODE_PARAM];
    uint32_t
        accumulate_in; /* bit k: this node adds to the gradient of input k instead of writing it */
    md_attr attr;
    int segment;                   /* that it belongs to (md_graph_recompute); 0: none */
    bool recomputed;               /* runs once more before its segment's backward pass */
    int recompute_at, backward_at; /* times; that of the forward pass is the node's number */
};

typedef struct md_slot_row {
    char name[32];
    md_tensor value, grad; /* data NULL until bound */
    bool external, needs_grad;
    bool grad_f32;               /* a parameter in disguise: its gradient is f32 */
    int producer;                /* node, -1 for inputs */
    int first_use, last_use;     /* nodes that read the value in the forward pass; -1 none */
    int value_block, grad_block; /* arena blocks, -1 none */
    int recompute_block;         /* of the value when it is recomputed; -1: where it was */
    md_slot packed_by;           /* the index of the images it holds; MD_NO_SLOT: all of them */
} md_slot_row;

/* Called on the walking thread when the gradient of parameter `param` is complete. */
typedef void (*md_grad_ready)(void *context, int param);

struct md_graph {
    md_params *params;
    md_backend *be;
    md_comm *tp; /* not owned; NULL: one rank */
    int tp_rank, tp_size;
    md_node *node;
    int nodes, node_capacity;
    md_slot_row *slot;
    int slots, slot_capacity;
    bool training;   /* a backward pass will run */
    bool accumulate; /* this backward adds to the parameter gradients */
    md_status status;
    void (*between)(void *context); /* called between the nodes of a forward pass; may be NULL */
    void *between_context;
    int segment, segments; /* being added to, and how many there are */
    bool recomputes; /* off: a backward pass on the plan backend counts without recomputation */
    size_t region_bytes;
    char *region;
    struct md_arena_block *blocks;
    int n_blocks;
};

/* tp: the tensor-parallel group over which the graph runs and `params` are cut, NULL for one rank;
 * kept, not owned. */
void md_graph_init(md_graph *g, md_params *params, bool training, md_comm *tp);
void md_graph_free(md_graph *g);

/* A tensor that comes from outside, bound before each run. Not differentiated. */
md_slot md_graph_input(md_graph *g, const char *name, md_dtype dtype, int rank, const int64_t *dim);
/* Says that an input holds this rank's images only. Nothing happens on one rank. */
void md_graph_cut_rows(md_graph *g, md_slot s);
/* Declares an index of packed images, i32 [B]: the place of each of B images in the slots that are
 * packed by it, or -1. Values are as residual_ln's from and to (kernels/backend.h). */
md_slot md_graph_packed(md_graph *g, const char *name, int64_t images);
/* Says that an input holds the images of an index only. MD_NO_SLOT: all, nothing happens. */
void md_graph_set_packed(md_graph *g, md_slot s, md_slot index);
/* From now on `images` images, at least one, are in the slots packed by index. */
void md_graph_pack(md_graph *g, md_slot index, int64_t images);
/* Takes a node's output out of the planned region: the caller binds memory of its own. */
void md_graph_set_external(md_graph *g, md_slot s);
/* From now on nodes form a segment that is recomputed (on), or are kept as usual (off): the values
 * that only nodes of the segment read are dropped after the forward pass and made again before its
 * backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). Nodes that
 * make nothing which is needed are left out. Each call begins another segment. Nothing happens in a
 * graph that does not train. */
void md_graph_recompute(md_graph *g, bool on);
/* Shape of a slot. */
const md_tensor *md_graph_tensor(const md_graph *g, md_slot s);

/* For node kinds: appends a node; returns it, or NULL after an earlier error. in and param hold
 * MD_NODE_IN and MD_NODE_PARAM entries. infer has run on return. */
md_node *md_graph_add(md_graph *g, const md_node *node);
/* For infer: declares output k of node n. needs_grad is derived. */
md_status md_node_output(md_graph *g, md_node *n, int k, md_dtype dtype, int rank,
                         const int64_t *dim);

/* For infer: the index by which input k is packed, and that by which output k is. Outputs are
 * packed as input 0 unless said otherwise. */
md_slot md_in_packed(const md_graph *g, const md_node *n, int k);
void md_node_set_packed(md_graph *g, const md_node *n, int k, md_slot index);

/* For infer: output k stands for parameters, so its gradient is f32 whatever its type. */
void md_node_grad_f32(md_graph *g, const md_node *n, int k);

/* Ends building: returns the first error, finds lifetimes and plans the region. Local. */
md_status md_graph_finish(md_graph *g);
/* Gives the planned slots their memory: region must hold g->region_bytes, 64-byte aligned. */
void md_graph_bind_region(md_graph *g, void *region);
/* Binds an external slot. */
void md_graph_bind(md_graph *g, md_slot s, void *data);

/* Runs the nodes on backend be. backward: accumulate adds to parameter gradients instead of writing
 * them; hook may be NULL. Collective(tp): a rank on which an op fails leaves the others waiting, so
 * the caller has to end the job then. Errors name the node. */
md_status md_graph_forward(md_graph *g, md_backend *be);
md_status md_graph_backward(md_graph *g, md_backend *be, bool accumulate, md_grad_ready hook,
                            void *context);

/* For node kinds: operands by position; NULL when absent or (gradients) not wanted. */
md_tensor *md_in(md_graph *g, const md_node *n, int k);
md_tensor *md_out(md_graph *g, const md_node *n, int k);
md_tensor *md_in_grad(md_graph *g, const md_node *n, int k);
md_tensor *md_out_grad(md_graph *g, const md_node *n, int k);

/* Order in which backward completes the parameter gradients: fills order[params->count] and returns
 * how many rows the graph differentiates. */
int md_graph_grad_order(const md_graph *g, int *order);

/* What each rank's gradient of a parameter is, of those the graph differentiates: MD_CUT_COLS for a
 * cut one (its part, complete), MD_REPL (the same on all ranks of tp), MD_PARTIAL (to be summed
 * over tp). */
md_place md_graph_grad_place(const md_graph *g, int param);

/* For node kinds: the place of input k, MD_REPL when absent; and fails with MD_ERR_BUG, naming what
 * may be missing, unless it is one of the places whose bits are set. */
md_place md_in_place(const md_graph *g, const md_node *n, int k);
md_status md_want_place(const md_graph *g, const md_node *n, int k, uint32_t places);
/* For infer: sets the place of output k. */
void md_node_set_place(md_graph *g, const md_node *n, int k, md_place place);
#define MD_PLACE_BIT(place) (1u << (place))

/* Whether the backward pass of a node does anything. Local. */
bool md_node_runs_backward(const md_graph *g, const md_node *n);

/* ---- graph_plan.c, for the walkers ---- */

/* First node of the segment whose last node is `last`; -1: none ends there. */
int md_graph_segment_first(const md_graph *g, int last);
/* Points the dropped values of nodes [from, to) at their memory, that of the forward pass or that
 * in which they are recomputed: what they point at is right within one pass only, and each pass
 * begins with this. Nothing happens before there is memory. */
void md_graph_place(md_graph *g, int from, int to, bool again);

/* ---- nodes_core.c ---- */

/* Patch vectors of u8 images [B, S, S, 3] -> [B*G, 3*P*P], normalised; erased and mixed as mix (i32
 * [B, MD_MIX_WORDS], optional) says. */
md_slot md_n_patchify(md_graph *g, md_slot image, md_slot mix, const md_attr *attr);
/* y = act(x w^T + b): x [.., I], w [O, I], -> [.., O]. bias: a parameter, MD_NO_PARAM for none. */
md_slot md_n_linear(md_graph *g, md_slot x, int w, int bias, md_act act);
/* The same with the bias [q_bias, 0, v_bias] of BEiT's attention, which has no key bias: w [3C, I],
 * -> [.., 3C]. */
md_slot md_n_linear_qv(md_graph *g, md_slot x, int w, int q_bias, int v_bias);
/* Token sequence: cls first, masked patches replaced. patch [B*G, C] -> [B, G+1, C]. mask (u8 [B,
 * G]) and mask_token go together; pos [G+1, C] optional. */
md_slot md_n_tokens(md_graph *g, md_slot patch, md_slot mask, int64_t images, const int params[3]);
/* Relative position bias of a square grid: table [R, H] -> [H, T, T]; index i32 [T, T]. */
md_slot md_n_rel_bias(md_graph *g, md_slot index, int table);
/* Attention output [B, T, C] from qkv [B, T, 3C] and rel (optional). heads: of the whole model;
 * where qkv is cut, each rank has its share of them. */
md_slot md_n_attention(md_graph *g, md_slot qkv, md_slot rel, int heads);

typedef struct md_residual_in {
    md_slot x, branch, keep; /* branch and keep (f32 [B]) optional */
    md_slot from;            /* the index by which branch is packed; MD_NO_SLOT: all images */
    md_slot to;              /* the one by which y is to be */
    int gamma;               /* layer scale [C], optional */
    int weight, bias;        /* LayerNorm, both MD_NO_PARAM: residual only */
    float eps;
} md_residual_in;
/* r = x + keep * gamma * branch, y = LN(r). *r is x itself without a branch; *y is MD_NO_SLOT
 * without a norm. */
void md_n_residual_ln(md_graph *g, const md_residual_in *in, md_slot *r, md_slot *y);
/* LayerNorm over the last axis without affine parameters, or with (weight, bias). No gradient. */
md_slot md_n_layernorm(md_graph *g, md_slot x, const int params[2], const md_attr *attr);
/* Rows of x (matrix view [N, C]) chosen by index i32 [B, M] -> [B, M, C]. */
md_slot md_n_gather_rows(md_graph *g, md_slot x, md_slot index);
/* Mean over the rows of each image: x [B, M, C] -> [B, C]. */
md_slot md_n_mean_rows(md_graph *g, md_slot x);
/* sum (optional) + scale * x. No gradient. */
md_slot md_n_add_scaled(md_graph *g, md_slot sum, md_slot x, float scale);

/* ---- nodes_tp.c: the conjugate pairs (Megatron-LM, core/tensor_parallel/mappings.py) ---- */

/* x as the column-cut parameter w must read it: replicated, with a gradient that is summed over tp
 * (tp_enter), or gathered from the ranks' rows, with a gradient that is summed and spread
 * (sp_gather). x itself when w is not cut. */
md_slot md_n_enter(md_graph *g, md_slot x, int w);
/* The partial sums y as the stream `like` has them: summed (tp_exit), or summed and spread over the
 * ranks' rows (sp_scatter). y itself when it is no partial sum. */
md_slot md_n_exit(md_graph *g, md_slot y, md_slot like);
/* All ranks' rows of x, which is cut by rows; x itself on one rank. No gradient. */
md_slot md_n_all_rows(md_graph *g, md_slot x);

/* ---- nodes_loss.c ---- */

/* scale * sum of loss(pred - target) -> f64 [1]. The end of a training graph. */
md_slot md_n_loss(md_graph *g, md_slot pred, md_slot target, const md_attr *attr);
/* scale * sum over rows of the cross entropy of logits [B, K] with the distributions target (f32
 * [B, K]) -> f64 [1]. */
md_slot md_n_cross_entropy(md_graph *g, md_slot logits, md_slot target, const md_attr *attr);

#endif
