/* graph: table, places, walkers. */
#include "src/graph.h"
#include "src/arena.h"
#include "src/watchdog.h"

#include <stdio.h>
#include <string.h>

void md_graph_init(md_graph *g, md_params *params, bool training, md_comm *tp)
{
    *g = (md_graph){.params = params,
                    .training = training,
                    .tp = tp,
                    .tp_rank = tp ? md_comm_rank(tp) : 0,
                    .tp_size = tp ? md_comm_size(tp) : 1};
}

void md_graph_free(md_graph *g)
{
    md_free(g->node);
    md_free(g->slot);
    md_free(g->blocks);
    *g = (md_graph){0};
}

/* Grows *table to hold one more element of `size` bytes. */
static md_status grow(void **table, int count, int *capacity, size_t size)
{
    if (count < *capacity)
        return MD_OK;
    int bigger = *capacity ? 2 * *capacity : 64;
    void *p = md_alloc(size * (size_t)bigger, "graph table");
    if (!p)
        return MD_ERR_MEMORY;
    if (count)
        memcpy(p, *table, size * (size_t)count);
    md_free(*table);
    *table = p;
    *capacity = bigger;
    return MD_OK;
}

static md_slot add_slot(md_graph *g, const char *name, const md_tensor *t, int producer)
{
    if (g->status == MD_OK)
        g->status = grow((void **)&g->slot, g->slots, &g->slot_capacity, sizeof *g->slot);
    if (g->status != MD_OK)
        return MD_NO_SLOT;
    md_slot_row *s = &g->slot[g->slots];
    *s = (md_slot_row){.value = *t,
                       .producer = producer,
                       .first_use = -1,
                       .last_use = -1,
                       .value_block = -1,
                       .recompute_block = -1,
                       .grad_block = -1,
                       .packed_by = MD_NO_SLOT};
    snprintf(s->name, sizeof s->name, "%s", name);
    return g->slots++;
}

md_slot md_graph_input(md_graph *g, const char *name, md_dtype dtype, int rank, const int64_t *dim)
{
    md_tensor t = md_tensor_make(NULL, dtype, rank, dim);
    md_slot s = add_slot(g, name, &t, -1);
    if (s != MD_NO_SLOT)
        g->slot[s].external = true;
    return s;
}

void md_graph_cut_rows(md_graph *g, md_slot s)
{
    if (g->status == MD_OK && g->tp_size > 1)
        g->slot[s].value.place = MD_CUT_ROWS;
}

/* ---- packed images ---- */

md_slot md_graph_packed(md_graph *g, const char *name, int64_t images)
{
    return md_graph_input(g, name, MD_I32, 1, &images);
}

void md_graph_set_packed(md_graph *g, md_slot s, md_slot index)
{
    if (g->status == MD_OK && s != MD_NO_SLOT)
        g->slot[s].packed_by = index;
}

void md_graph_pack(md_graph *g, md_slot index, int64_t images)
{
    MD_ASSERT(images >= 1 && images <= g->slot[index].value.dim[0], "%lld images of %lld",
              (long long)images, (long long)g->slot[index].value.dim[0]);
    for (md_slot s = 0; s < g->slots; s++)
        if (g->slot[s].packed_by == index)
            g->slot[s].value.dim[0] = g->slot[s].grad.dim[0] = images;
}

md_slot md_in_packed(const md_graph *g, const md_node *n, int k)
{
    return n->in[k] == MD_NO_SLOT ? MD_NO_SLOT : g->slot[n->in[k]].packed_by;
}

void md_node_set_packed(md_graph *g, const md_node *n, int k, md_slot index)
{
    md_graph_set_packed(g, n->out[k], index);
}

void md_graph_set_external(md_graph *g, md_slot s)
{
    if (g->status == MD_OK)
        g->slot[s].external = true;
}

void md_graph_recompute(md_graph *g, bool on)
{
    g->segment = on && g->training ? ++g->segments : 0;
}

const md_tensor *md_graph_tensor(const md_graph *g, md_slot s)
{
    static const md_tensor none;
    return s == MD_NO_SLOT || g->status != MD_OK ? &none : &g->slot[s].value;
}

bool md_node_runs_backward(const md_graph *g, const md_node *n)
{
    if (!g->training || !n->kind->bwd)
        return false;
    for (int k = 0; k < MD_NODE_PARAM; k++)
        if (n->param[k] != MD_NO_PARAM)
            return true;
    for (int k = 0; k < MD_NODE_IN; k++)
        if (n->in[k] != MD_NO_SLOT && g->slot[n->in[k]].needs_grad)
            return true;
    return false;
}

md_status md_node_output(md_graph *g, md_node *n, int k, md_dtype dtype, int rank,
                         const int64_t *dim)
{
    md_tensor t = md_tensor_make(NULL, dtype, rank, dim);
    if (n->kind->by_row)
        t.place = (uint8_t)md_in_place(g, n, 0);
    char name[32];
    snprintf(name, sizeof name, "%s%d.%d", n->kind->name, g->nodes, k);
    md_slot s = add_slot(g, name, &t, g->nodes);
    n->out[k] = s;
    if (s == MD_NO_SLOT)
        return g->status;
    g->slot[s].needs_grad = md_node_runs_backward(g, n) && (dtype == MD_F32 || dtype == MD_BF16);
    g->slot[s].packed_by = md_in_packed(g, n, 0);
    return MD_OK;
}

void md_node_grad_f32(md_graph *g, const md_node *n, int k)
{
    if (g->status == MD_OK && n->out[k] != MD_NO_SLOT)
        g->slot[n->out[k]].grad_f32 = true;
}

/* ---- places ---- */

md_place md_in_place(const md_graph *g, const md_node *n, int k)
{
    return n->in[k] == MD_NO_SLOT ? MD_REPL : (md_place)g->slot[n->in[k]].value.place;
}

void md_node_set_place(md_graph *g, const md_node *n, int k, md_place place)
{
    if (g->status == MD_OK && n->out[k] != MD_NO_SLOT)
        g->slot[n->out[k]].value.place = (uint8_t)place;
}

md_status md_want_place(const md_graph *g, const md_node *n, int k, uint32_t places)
{
    md_place have = md_in_place(g, n, k);
    if (n->in[k] == MD_NO_SLOT || (places >> have & 1))
        return MD_OK;
    md_place want = MD_REPL;
    while (!(places >> want & 1))
        want++;
    MD_FAIL(MD_ERR_BUG,
            "input %d (%s) is %s over the tensor-parallel ranks but has to be %s: a node that "
            "enters or leaves the cut region is missing",
            k, g->slot[n->in[k]].name, md_place_name(have), md_place_name(want));
}

/* Rows do not meet: all inputs lie alike, whole or cut by rows. */
static md_status check_rows(const md_graph *g, const md_node *n)
{
    MD_TRY(md_want_place(g, n, 0, MD_PLACE_BIT(MD_REPL) | MD_PLACE_BIT(MD_CUT_ROWS)));
    for (int k = 1; k < MD_NODE_IN; k++)
        MD_TRY(md_want_place(g, n, k, MD_PLACE_BIT(md_in_place(g, n, 0))));
    return MD_OK;
}

static md_place out_place(const md_graph *g, const md_node *n)
{
    for (int k = 0; k < MD_NODE_OUT; k++)
        if (n->out[k] != MD_NO_SLOT)
            return (md_place)g->slot[n->out[k]].value.place;
    return MD_REPL;
}

/* Each rank's gradient of parameter p of node n. */
static md_place param_place(const md_graph *g, const md_node *n, int p)
{
    md_place out = out_place(g, n);
    if (g->params->row[p].cut)
        return MD_CUT_COLS;
    return out == MD_CUT_ROWS || (out == MD_PARTIAL && n->attr.scattered) ? MD_PARTIAL : MD_REPL;
}

/* A whole parameter that makes channels of which each rank has its own would get another gradient
 * on each rank. */
static md_status check_params(const md_graph *g, const md_node *n)
{
    md_place out = out_place(g, n);
    for (int k = 0; k < MD_NODE_PARAM; k++)
        if (n->param[k] != MD_NO_PARAM && !g->params->row[n->param[k]].cut &&
            (out == MD_CUT_COLS || out == MD_ENTERED))
            MD_FAIL(MD_ERR_BUG, "parameter %s is whole but the output is %s",
                    g->params->row[n->param[k]].name, md_place_name(out));
    return MD_OK;
}

md_place md_graph_grad_place(const md_graph *g, int param)
{
    for (int i = 0; i < g->nodes; i++)
        for (int k = 0; k < MD_NODE_PARAM; k++)
            if (g->node[i].param[k] == param)
                return param_place(g, &g->node[i], param);
    return MD_REPL;
}

/* ---- building ---- */

static md_status infer(md_graph *g, md_node *n)
{
    if (n->kind->by_row)
        MD_TRY(check_rows(g, n));
    MD_TRY(n->kind->infer(g, n));
    return check_params(g, n);
}

md_node *md_graph_add(md_graph *g, const md_node *node)
{
    if (g->status == MD_OK)
        g->status = grow((void **)&g->node, g->nodes, &g->node_capacity, sizeof *g->node);
    if (g->status != MD_OK)
        return NULL;
    md_node *n = &g->node[g->nodes];
    *n = *node;
    n->segment = g->segment;
    for (int k = 0; k < MD_NODE_OUT; k++)
        n->out[k] = MD_NO_SLOT;
    for (int k = 0; k < MD_NODE_IN; k++) {
        md_slot s = n->in[k];
        if (s == MD_NO_SLOT)
            continue;
        if (g->slot[s].first_use < 0)
            g->slot[s].first_use = g->nodes;
        g->slot[s].last_use = g->nodes;
    }
    md_status st = infer(g, n);
    if (st != MD_OK) {
        g->status = md_error_prefix(st, "model graph, node %d (%s)", g->nodes, n->kind->name);
        return NULL;
    }
    g->nodes++;
    return n;
}

void md_graph_bind(md_graph *g, md_slot s, void *data)
{
    MD_ASSERT(g->slot[s].external, "slot %s is planned", g->slot[s].name);
    g->slot[s].value.data = data;
}

/* ---- walkers ---- */

static md_status forward_node(md_graph *g, int i, const char *what)
{
    const md_node *n = &g->node[i];
    md_status st = n->kind->fwd(g, n);
    return st == MD_OK ? st : md_error_prefix(st, "%s of node %d (%s)", what, i, n->kind->name);
}

md_status md_graph_forward(md_graph *g, md_backend *be)
{
    g->be = be;
    md_graph_place(g, 0, g->nodes, false);
    for (int i = 0; i < g->nodes; i++) {
        md_phase("forward");
        MD_TRY(forward_node(g, i, "forward"));
        if (g->between)
            g->between(g->between_context);
    }
    return MD_OK;
}

/* Where the backward pass comes to the last node of a segment, what was dropped there is made
 * again.
 */
static md_status recompute(md_graph *g, int last)
{
    const int first = md_graph_segment_first(g, last);
    if (first < 0 || !g->recomputes)
        return MD_OK;
    md_graph_place(g, first, last + 1, true);
    for (int i = first; i <= last; i++)
        if (g->node[i].recomputed)
            MD_TRY(forward_node(g, i, "recomputation"));
    return MD_OK;
}

md_status md_graph_backward(md_graph *g, md_backend *be, bool accumulate, md_grad_ready hook,
                            void *context)
{
    MD_ASSERT(g->training);
    g->be = be;
    g->accumulate = accumulate;
    for (int i = g->nodes - 1; i >= 0; i--) {
        const md_node *n = &g->node[i];
        md_phase("backward");
        MD_TRY(recompute(g, i));
        if (!md_node_runs_backward(g, n))
            continue;
        md_status st = n->kind->bwd(g, n);
        if (st != MD_OK)
            return md_error_prefix(st, "backward of node %d (%s)", i, n->kind->name);
        for (int k = MD_NODE_PARAM - 1; hook && k >= 0; k--)
            if (n->param[k] != MD_NO_PARAM)
                hook(context, n->param[k]);
    }
    return MD_OK;
}

int md_graph_grad_order(const md_graph *g, int *order)
{
    int count = 0;
    for (int i = g->nodes - 1; i >= 0; i--)
        for (int k = MD_NODE_PARAM - 1; md_node_runs_backward(g, &g->node[i]) && k >= 0; k--)
            if (g->node[i].param[k] != MD_NO_PARAM)
                order[count++] = g->node[i].param[k];
    return count;
}

/* ---- operands ---- */

md_tensor *md_in(md_graph *g, const md_node *n, int k)
{
    return n->in[k] == MD_NO_SLOT ? NULL : &g->slot[n->in[k]].value;
}

md_tensor *md_out(md_graph *g, const md_node *n, int k)
{
    return n->out[k] == MD_NO_SLOT ? NULL : &g->slot[n->out[k]].value;
}

md_tensor *md_in_grad(md_graph *g, const md_node *n, int k)
{
    md_slot s = n->in[k];
    return s == MD_NO_SLOT || g->slot[s].grad_block < 0 ? NULL : &g->slot[s].grad;
}

md_tensor *md_out_grad(md_graph *g, const md_node *n, int k)
{
    md_slot s = n->out[k];
    return s == MD_NO_SLOT || g->slot[s].grad_block < 0 ? NULL : &g->slot[s].grad;
}
