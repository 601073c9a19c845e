/* graph_plan: when each node runs, from when to when each value and gradient is needed, and so
 * where in the region it lies. Time counts the nodes that run: forward, then backward in reverse,
 * each recomputed segment once more before its own. A block lives from the first to the last
 * time anything touches it. */
#include "src/arena.h"
#include "src/graph.h"

/* ---- times ---- */

int md_graph_segment_first(const md_graph *g, int last)
{
    const int segment = g->node[last].segment;
    if (segment == 0 || (last + 1 < g->nodes && g->node[last + 1].segment == segment))
        return -1;
    while (last > 0 && g->node[last - 1].segment == segment)
        last--;
    return last;
}

static void plan_times(md_graph *g)
{
    int now = g->nodes;
    for (int i = g->nodes - 1; i >= 0; i--) {
        const int first = md_graph_segment_first(g, i);
        for (int k = first; first >= 0 && k <= i; k++)
            g->node[k].recompute_at = now++;
        g->node[i].backward_at = now++;
    }
}

static bool is_input(const md_node *n, md_slot s)
{
    for (int k = 0; k < MD_NODE_IN; k++)
        if (n->in[k] == s)
            return true;
    return false;
}

/* Whether the backward pass of a node reads the value of slot s. */
static bool reads_backward(const md_graph *g, const md_node *n, md_slot s)
{
    bool reads = false;
    for (int k = 0; k < MD_NODE_IN; k++)
        reads |= n->in[k] == s && (n->kind->keep_in >> k & 1);
    for (int k = 0; k < MD_NODE_OUT; k++)
        reads |= n->out[k] == s && (n->kind->keep_out >> k & 1);
    return reads && md_node_runs_backward(g, n);
}

/* Which nodes are asked, as seen from the segment of the one that makes a value; what belongs to no
 * segment counts as one. */
typedef enum scope { ANYWHERE, INSIDE, OUTSIDE } scope;

/* Last time that the backward pass, or a node that is recomputed, reads the value of slot s, which
 * a node makes; -1: never. */
static int last_read(const md_graph *g, md_slot s, scope where)
{
    const md_slot_row *row = &g->slot[s];
    const int segment = g->node[row->producer].segment;
    int last = -1;
    for (int i = row->producer; i <= MD_MAX(row->last_use, row->producer); i++) {
        const md_node *n = &g->node[i];
        if (where != ANYWHERE && (n->segment == segment) != (where == INSIDE))
            continue;
        if (reads_backward(g, n, s))
            last = MD_MAX(last, n->backward_at);
        if (n->recomputed && is_input(n, s))
            last = MD_MAX(last, n->recompute_at);
    }
    return last;
}

/* Whether a value stays where it is until the backward pass: its node is in no segment, others read
 * it there, or it is not ours to drop. */
static bool stays(const md_graph *g, md_slot s)
{
    const md_slot_row *row = &g->slot[s];
    return g->node[row->producer].segment == 0 || row->external || last_read(g, s, OUTSIDE) >= 0;
}

/* Which nodes make something that was dropped and is needed. Later segments come first, for they
 * may read what earlier ones make, and so do later nodes of a segment. */
static void plan_recomputed(md_graph *g)
{
    for (int i = g->nodes - 1; i >= 0; i--) {
        md_node *n = &g->node[i];
        for (int k = 0; n->segment != 0 && k < MD_NODE_OUT; k++)
            if (n->out[k] != MD_NO_SLOT && !stays(g, n->out[k]) &&
                last_read(g, n->out[k], INSIDE) >= 0)
                n->recomputed = true;
    }
}

/* ---- lifetimes ---- */

static int new_block(md_graph *g, size_t bytes, int first, int last)
{
    g->blocks[g->n_blocks] = (md_arena_block){.bytes = bytes, .first = first, .last = last};
    return g->n_blocks++;
}

/* Last time the value of slot s, which a node makes, is touched where the forward pass put it, or,
 * `again`, where it is recomputed. A node that is recomputed may put it in its first place once
 * more, the same as it was. */
static int value_end(const md_graph *g, md_slot s, bool again)
{
    const md_slot_row *row = &g->slot[s];
    const md_node *n = &g->node[row->producer];
    const int end = MD_MAX(row->producer, row->last_use);
    if (!again && (!g->training || !stays(g, s)))
        return end;
    const int late = last_read(g, s, again ? INSIDE : ANYWHERE);
    return MD_MAX(n->recomputed ? MD_MAX(end, n->recompute_at) : end, late);
}

/* A block for the value of slot s, or that of the node's input 0 where it may take it. */
static int value_block(md_graph *g, md_slot s, bool again)
{
    const md_slot_row *row = &g->slot[s];
    const md_node *n = &g->node[row->producer];
    const md_slot x = n->in[0];
    const int made = again ? n->recompute_at : row->producer, end = value_end(g, s, again);
    const size_t bytes = md_tensor_bytes(&row->value);
    if (n->kind->alias_fwd && n->out[0] == s && x != MD_NO_SLOT) {
        const int block = again ? g->slot[x].recompute_block : g->slot[x].value_block;
        if (block >= 0 && value_end(g, x, again) == made &&
            md_tensor_bytes(&g->slot[x].value) == bytes) {
            g->blocks[block].last = MD_MAX(g->blocks[block].last, end);
            return block;
        }
    }
    return new_block(g, bytes, made, end);
}

static void plan_value(md_graph *g, md_slot s)
{
    md_slot_row *row = &g->slot[s];
    if (row->external || row->producer < 0)
        return;
    row->value_block = value_block(g, s, false);
    if (g->node[row->producer].recomputed && !stays(g, s))
        row->recompute_block = value_block(g, s, true);
}

/* The gradient of slot s is written first by its last reader and read by its producer's backward.
 */
static void plan_grad(md_graph *g, md_slot s)
{
    md_slot_row *row = &g->slot[s];
    if (!row->needs_grad || row->last_use < 0)
        return;
    row->grad = row->value;
    if (row->grad_f32)
        row->grad.dtype = MD_F32;
    const int begin = g->node[row->last_use].backward_at, end = g->node[row->producer].backward_at;
    const md_node *reader = &g->node[row->last_use];
    md_slot y = reader->out[0];
    if (reader->kind->alias_bwd && reader->in[0] == s && row->first_use == row->last_use &&
        y != MD_NO_SLOT && g->slot[y].grad_block >= 0 &&
        md_tensor_bytes(&g->slot[y].grad) == md_tensor_bytes(&row->grad)) {
        row->grad_block = g->slot[y].grad_block;
        md_arena_block *b = &g->blocks[row->grad_block];
        b->last = MD_MAX(b->last, end);
        return;
    }
    row->grad_block = new_block(g, md_tensor_bytes(&row->grad), begin, end);
}

/* Where several nodes feed the gradient of one slot, all but the first in backward order add. */
static md_status plan_accumulation(md_graph *g)
{
    for (int i = 0; i < g->nodes; i++) {
        md_node *n = &g->node[i];
        for (int k = 0; k < MD_NODE_IN; k++) {
            md_slot s = n->in[k];
            if (s == MD_NO_SLOT || !g->slot[s].needs_grad || g->slot[s].last_use == i)
                continue;
            if (!(n->kind->accumulates >> k & 1))
                MD_FAIL(MD_ERR_BUG,
                        "node %d (%s) cannot add to the gradient of %s, which node %d "
                        "reads too",
                        i, n->kind->name, g->slot[s].name, g->slot[s].last_use);
            n->accumulate_in |= 1u << k;
        }
    }
    return MD_OK;
}

md_status md_graph_finish(md_graph *g)
{
    MD_TRY(g->status);
    g->recomputes = true;
    MD_NEW(g->blocks, 3 * g->slots + 1, "arena plan");
    if (g->training) {
        plan_times(g);
        plan_recomputed(g);
    }
    for (md_slot s = 0; s < g->slots; s++)
        plan_value(g, s);
    if (g->training) {
        MD_TRY(plan_accumulation(g));
        for (md_slot s = g->slots - 1; s >= 0; s--)
            plan_grad(g, s);
    }
    return md_arena_plan(g->blocks, g->n_blocks, &g->region_bytes);
}

void md_graph_place(md_graph *g, int from, int to, bool again)
{
    for (int i = from; g->region && i < to; i++)
        for (int k = 0; k < MD_NODE_OUT; k++) {
            md_slot_row *row = g->node[i].out[k] < 0 ? NULL : &g->slot[g->node[i].out[k]];
            if (row && row->recompute_block >= 0)
                row->value.data =
                    g->region + g->blocks[again ? row->recompute_block : row->value_block].offset;
        }
}

void md_graph_bind_region(md_graph *g, void *region)
{
    g->region = region;
    for (md_slot s = 0; s < g->slots; s++) {
        md_slot_row *row = &g->slot[s];
        if (row->value_block >= 0)
            row->value.data = g->region + g->blocks[row->value_block].offset;
        if (row->grad_block >= 0)
            row->grad.data = g->region + g->blocks[row->grad_block].offset;
    }
}
