/* groups: every shape of group a job can have, and inputs whose sums are exact in any order: small
 * integers, also as floats, so that results are compared bit by bit. */
#ifndef MD_GROUPS_H
#define MD_GROUPS_H

#include "tests/par/par_main.h"

#include "kernels/backend.h"
#include "mpi/comm_device.h"
#include "mpi/topo.h"

enum { N = 1000, MAX_RANKS = 8 };

/* Element i of rank r's input; sums stay below 2^24. */
static inline int value(int64_t i, int r)
{
    return (int)((i * 7 + r * 13) % 101) - (r % 2 ? 50 : 0);
}

/* The same element reduced over `size` ranks. */
static inline int expected(int64_t i, int size, md_reduce op)
{
    int v = value(i, 0);
    for (int r = 1; r < size; r++) {
        int x = value(i, r);
        v = op == MD_SUM ? v + x : op == MD_MAX_OP ? MD_MAX(v, x) : MD_MIN(v, x);
    }
    return v;
}

/* The same groups again, for operands of a backend; here they are host memory. */
static inline void on_staged(md_comm *const *groups, size_t n, void (*check)(md_comm *c))
{
    md_backend *be;
    md_comm *world, *halves;
    assert_ok(md_backend_create("cpu", 1, &be));
    for (size_t i = 0; i < n; i++) {
        md_comm *c;
        assert_ok(md_comm_staged(groups[i], be, &c));
        check(c);
        md_comm_free(c);
    }
    assert_ok(md_comm_staged(par_world, be, &world));
    assert_ok(md_comm_split(world, md_comm_rank(world) % 2, md_comm_rank(world), &halves));
    check(halves);
    md_comm_free(halves);
    md_comm_free(world);
    md_backend_destroy(be);
}

/* Runs check on: the world, its halves, the node, every rank alone (by MPI), every rank alone
 * (self), all of these staged, and the groups of every process grid. */
static inline void on_every_group(void (*check)(md_comm *c))
{
    md_comm *halves, *node, *single, *self;
    int rank = md_comm_rank(par_world), size = md_comm_size(par_world);
    assert_ok(md_comm_split(par_world, rank % 2, -rank, &halves));
    assert_ok(md_comm_split_node(par_world, &node));
    assert_ok(md_comm_split(par_world, rank, 0, &single));
    assert_ok(md_comm_self(&self));
    assert_int_equal(md_comm_size(single), 1);
    md_comm *groups[] = {par_world, halves, node, single, self};
    for (size_t i = 0; i < MD_COUNT(groups); i++)
        check(groups[i]);
    on_staged(groups, MD_COUNT(groups), check);
    for (size_t i = 1; i < MD_COUNT(groups); i++)
        md_comm_free(groups[i]);
    for (int tensor = 1; tensor <= size; tensor++) {
        md_topo t;
        if (size % tensor)
            continue;
        md_topo_args args = {.tensor = tensor, .across_nodes = true};
        assert_ok(md_topo_create(par_world, &args, &t));
        check(t.tp);
        check(t.dp);
        check(t.all);
        md_topo_free(&t);
    }
}

#endif
