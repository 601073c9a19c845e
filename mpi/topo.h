/* topo: the process grid, data parallel x tensor parallel.
 *
 * Ranks are put in order by node, nodes by their lowest world rank, then by world rank, and cut
 * into runs of `tensor` ranks: a run shares one copy of the model, and its members hold tp_rank 0,
 * 1, ... So tensor-parallel groups stay on a node whether ranks were placed in blocks or round the
 * nodes, and world rank 0 is (0, 0). Grid rank = dp_rank * tp_size + tp_rank is the place in that
 * order. */
#ifndef MD_TOPO_H
#define MD_TOPO_H

#include "kernels/backend.h"
#include "mpi/comm.h"

typedef struct md_topo {
    md_comm *world; /* as given, not owned; without MPI the same as `all` */
    md_comm *tp;    /* owned: ranks that share one model copy, by tp_rank */
    md_comm *dp;    /* owned: ranks that hold the same shard of it, by dp_rank */
    md_comm *all;   /* owned: all ranks by grid rank, for gradient traffic of its own */
    md_comm *op_tp, *op_dp, *op_all; /* owned: the same groups for operands of a backend; where they
                                        are host memory, the very groups above */
    int tp_rank, tp_size, dp_rank, dp_size;
    int node, nodes;          /* in the order above */
    int node_rank, node_size; /* this rank among the ranks of its node */
} md_topo;

typedef struct md_topo_args {
    int tensor;        /* ranks that share one model copy, at least 1 */
    bool across_nodes; /* they may be on several nodes */
} md_topo_args;

typedef struct md_topo_cell {
    int dp, tp;
    int node, node_rank; /* numbered in grid order */
} md_topo_cell;

/* The grid as a pure function of the nodes: node[r] is any number that tells the node of world rank
 * r from others; cell[ranks] is filled. Local. MD_ERR_CONFIG when `tensor` does not divide the
 * ranks, or those of a node while groups may not cross; MD_ERR_MEMORY. */
md_status md_topo_place(const int *node, int ranks, const md_topo_args *args, md_topo_cell *cell);

/* Finds the nodes, places the ranks and makes the groups. Collective(world). world must outlive
 * *out. Errors as md_topo_place, alike on every rank; *out is then empty. */
md_status md_topo_create(md_comm *world, const md_topo_args *args, md_topo *out);

/* Makes the groups for operands of `be`, carried by `kind` ("auto", "mpi", "nccl"); before,
 * operands are host memory. Collective(world). Errors of md_comm_for_backend, alike on every rank.
 */
md_status md_topo_operands(md_topo *t, md_backend *be, const char *kind);

/* One rank, no MPI. Local. MD_ERR_MEMORY; *out is then empty. */
md_status md_topo_self(md_topo *out);

/* Rank (0, 0) of a grid that only counts (md_comm_plan), all on one node. Local. MD_ERR_CONFIG,
 * MD_ERR_MEMORY; *out is then empty. */
md_status md_topo_plan(int ranks, int tensor, md_topo *out);

/* Collective(world). Frees the groups and leaves *t empty; an empty one is fine. */
void md_topo_free(md_topo *t);

#endif
