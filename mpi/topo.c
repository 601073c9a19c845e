/* topo: see topo.h. */
#include "mpi/topo.h"

#include <stdio.h>
#include <stdlib.h>

#include "mpi/agree.h"
#include "mpi/comm_device.h"

#define LIST_SIZE 200 /* of the divisors named in a message */

typedef struct spot {
    int node, rank;
    int first; /* lowest rank of the node */
} spot;

static int by_node(const void *a, const void *b)
{
    const spot *x = a, *y = b;
    if (x->node != y->node)
        return x->node < y->node ? -1 : 1;
    return x->rank - y->rank;
}

static int by_first(const void *a, const void *b)
{
    const spot *x = a, *y = b;
    return x->first != y->first ? x->first - y->first : x->rank - y->rank;
}

static int common_divisor(int a, int b)
{
    return b ? common_divisor(b, a % b) : a;
}

/* "1, 2, 4": what divides n, as far as the text holds. */
static const char *divisors(int n, char *text)
{
    size_t used = 0;
    text[0] = 0;
    for (int d = 1; d <= n && used < LIST_SIZE - 16; d++)
        if (n % d == 0)
            used += (size_t)snprintf(text + used, LIST_SIZE - used, "%s%d", used ? ", " : "", d);
    return text;
}

static md_status check_divides(int ranks, int tensor)
{
    char list[LIST_SIZE];
    MD_ASSERT(ranks > 0 && tensor > 0, "%d ranks, tensor %d", ranks, tensor);
    if (ranks % tensor != 0)
        MD_FAIL(MD_ERR_CONFIG,
                "parallel.tensor = %d does not divide the %d ranks: start a multiple of %d, or set "
                "parallel.tensor to one of %s",
                tensor, ranks, tensor, divisors(ranks, list));
    return MD_OK;
}

/* Groups stay on their nodes exactly when `tensor` divides the ranks of each. */
static md_status check_nodes(const spot *order, int ranks, int tensor)
{
    int common = 0, odd = -1;
    for (int i = 0, n; i < ranks; i += n) {
        for (n = 1; i + n < ranks && order[i + n].first == order[i].first; n++)
            ;
        common = common_divisor(n, common);
        if (odd < 0 && n % tensor != 0)
            odd = n;
    }
    if (odd < 0)
        return MD_OK;
    char list[LIST_SIZE];
    MD_FAIL(MD_ERR_CONFIG,
            "parallel.tensor = %d does not divide the %d ranks of a node, so that a group would "
            "cross to the next one: start a multiple of %d ranks on every node, set "
            "parallel.tensor to one of %s, or allow it by parallel.tensor_across_nodes",
            tensor, odd, tensor, divisors(common, list));
}

static void sort_spots(spot *order, int ranks)
{
    qsort(order, (size_t)ranks, sizeof *order, by_node);
    for (int i = 0; i < ranks; i++) {
        bool same = i > 0 && order[i].node == order[i - 1].node;
        order[i].first = same ? order[i - 1].first : order[i].rank;
    }
    qsort(order, (size_t)ranks, sizeof *order, by_first);
}

md_status md_topo_place(const int *node, int ranks, const md_topo_args *args, md_topo_cell *cell)
{
    MD_TRY(check_divides(ranks, args->tensor));
    spot *order;
    MD_NEW(order, ranks, "process grid");
    for (int r = 0; r < ranks; r++)
        order[r] = (spot){.node = node[r], .rank = r};
    sort_spots(order, ranks);
    md_status st = args->across_nodes ? MD_OK : check_nodes(order, ranks, args->tensor);
    for (int i = 0, k = -1, start = 0; st == MD_OK && i < ranks; i++) {
        if (i == 0 || order[i].first != order[i - 1].first)
            k++, start = i;
        cell[order[i].rank] = (md_topo_cell){i / args->tensor, i % args->tensor, k, i - start};
    }
    md_free(order);
    return st;
}

/* Collective(world). The lowest world rank of this rank's node names the node. */
static md_status find_node(md_comm *world, int *node)
{
    md_comm *mates;
    MD_TRY(md_comm_split_node(world, &mates));
    *node = md_comm_rank(world);
    md_comm_bcast(mates, node, sizeof *node, 0);
    md_comm_free(mates);
    return MD_OK;
}

static void fill(md_topo *t, const md_topo_cell *cell, int ranks, int tensor)
{
    const md_topo_cell *own = &cell[md_comm_rank(t->world)];
    t->tp_rank = own->tp, t->tp_size = tensor;
    t->dp_rank = own->dp, t->dp_size = ranks / tensor;
    t->node = own->node, t->node_rank = own->node_rank;
    for (int r = 0; r < ranks; r++) {
        t->nodes = MD_MAX(t->nodes, cell[r].node + 1);
        t->node_size += cell[r].node == own->node;
    }
}

static void operands_on_host(md_topo *t)
{
    t->op_tp = t->tp, t->op_dp = t->dp, t->op_all = t->all;
}

/* Collective(world), with agreed statuses. Groups made before a failure are left to the caller. */
static md_status make_groups(md_topo *t)
{
    MD_TRY(md_comm_split(t->world, t->dp_rank, t->tp_rank, &t->tp));
    MD_TRY(md_comm_split(t->world, t->tp_rank, t->dp_rank, &t->dp));
    return md_comm_split(t->world, 0, t->dp_rank * t->tp_size + t->tp_rank, &t->all);
}

md_status md_topo_create(md_comm *world, const md_topo_args *args, md_topo *out)
{
    int ranks = md_comm_size(world), mine;
    md_topo t = {.world = world};
    *out = (md_topo){0};
    MD_TRY(find_node(world, &mine));
    int *node = md_alloc(sizeof *node * (size_t)ranks, "process grid");
    md_topo_cell *cell = md_alloc(sizeof *cell * (size_t)ranks, "process grid");
    md_status st = md_agree(world, node && cell ? MD_OK : MD_ERR_MEMORY);
    if (st == MD_OK) {
        md_comm_allgather(world, &mine, node, sizeof mine);
        st = md_agree(world, md_topo_place(node, ranks, args, cell));
    }
    if (st == MD_OK) {
        fill(&t, cell, ranks, args->tensor);
        st = make_groups(&t);
    }
    md_free(node);
    md_free(cell);
    operands_on_host(&t);
    if (st == MD_OK)
        *out = t;
    else
        md_topo_free(&t);
    return st;
}

static md_status finish_local(md_status st, md_topo *t)
{
    if (st != MD_OK)
        md_topo_free(t);
    else
        t->world = t->all;
    operands_on_host(t);
    return st;
}

static md_status self_groups(md_topo *t)
{
    MD_TRY(md_comm_self(&t->tp));
    MD_TRY(md_comm_self(&t->dp));
    return md_comm_self(&t->all);
}

md_status md_topo_self(md_topo *out)
{
    *out = (md_topo){.tp_size = 1, .dp_size = 1, .nodes = 1, .node_size = 1};
    return finish_local(self_groups(out), out);
}

static md_status plan_groups(md_topo *t)
{
    MD_TRY(md_comm_plan(0, t->tp_size, &t->tp));
    MD_TRY(md_comm_plan(0, t->dp_size, &t->dp));
    return md_comm_plan(0, t->tp_size * t->dp_size, &t->all);
}

md_status md_topo_plan(int ranks, int tensor, md_topo *out)
{
    *out = (md_topo){0};
    MD_TRY(check_divides(ranks, tensor));
    *out = (md_topo){.tp_size = tensor, .dp_size = ranks / tensor, .nodes = 1, .node_size = ranks};
    return finish_local(plan_groups(out), out);
}

md_status md_topo_operands(md_topo *t, md_backend *be, const char *kind)
{
    if (!md_backend_is_device(be))
        return MD_OK;
    md_comm *const host[] = {t->tp, t->dp, t->all};
    md_comm **const op[] = {&t->op_tp, &t->op_dp, &t->op_all};
    for (size_t i = 0; i < MD_COUNT(host); i++) /* what fails in one group may not in its sisters */
        MD_TRY(md_agree(t->world, md_comm_for_backend(host[i], be, kind, op[i])));
    return MD_OK;
}

void md_topo_free(md_topo *t)
{
    md_comm *const group[] = {t->tp, t->dp, t->all}, *const op[] = {t->op_tp, t->op_dp, t->op_all};
    for (size_t i = 0; i < MD_COUNT(op); i++)
        if (op[i] != group[i])
            md_comm_free(op[i]);
    md_comm_free(t->all);
    md_comm_free(t->dp);
    md_comm_free(t->tp);
    *t = (md_topo){0};
}
