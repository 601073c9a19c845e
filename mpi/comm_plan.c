/* comm_plan: a group that carries nothing. comm.c counts what would be sent, which is all that
 * planning asks for. */
#include "mpi/comm_ops.h"

static void plan_free(md_comm *c)
{
    md_free(c);
}

static md_status plan_split(md_comm *c, int colour, int key, md_comm **out)
{
    (void)c, (void)colour, (void)key, (void)out;
    MD_ASSERT(false, "a planned group has no other ranks to make a group of");
    return MD_ERR_BUG;
}

static md_status plan_split_node(md_comm *c, md_comm **out)
{
    return plan_split(c, 0, 0, out);
}

static void plan_barrier(md_comm *c)
{
    (void)c;
}

static void plan_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op)
{
    (void)c, (void)buf, (void)n, (void)dtype, (void)op;
}

static void plan_bcast(md_comm *c, void *buf, int64_t bytes, int root)
{
    (void)c, (void)buf, (void)bytes, (void)root;
}

static void plan_allgather(md_comm *c, const void *send, void *recv, int64_t bytes)
{
    (void)c, (void)send, (void)recv, (void)bytes;
}

static void plan_reduce_scatter(md_comm *c, const void *send, void *recv, int64_t n, md_dtype dtype)
{
    (void)c, (void)send, (void)recv, (void)n, (void)dtype;
}

static void plan_alltoallv(md_comm *c, const void *send, const int64_t *to, void *recv,
                           const int64_t *from, int64_t row)
{
    (void)c, (void)send, (void)to, (void)recv, (void)from, (void)row;
}

static int64_t plan_exscan(md_comm *c, int64_t value)
{
    (void)c, (void)value;
    return 0;
}

static void plan_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                                 md_comm_request *req)
{
    (void)c, (void)buf, (void)n, (void)dtype, (void)op, (void)req;
}

static void plan_allgather_begin(md_comm *c, void *buf, int64_t bytes, md_comm_request *req)
{
    (void)c, (void)buf, (void)bytes, (void)req;
}

static void plan_reduce_scatter_begin(md_comm *c, const void *send, void *recv, int64_t n,
                                      md_dtype dtype, md_comm_request *req)
{
    (void)c, (void)send, (void)recv, (void)n, (void)dtype, (void)req;
}

static md_status plan_reserve(md_comm *c, size_t bytes, int requests)
{
    (void)c, (void)bytes, (void)requests;
    return MD_OK;
}

static bool plan_poll(md_comm *c, md_comm_request *req)
{
    (void)c, (void)req;
    return true;
}

static void plan_wait(md_comm *c, md_comm_request *req)
{
    (void)c, (void)req;
}

static md_status plan_shared(md_comm *c, size_t bytes, void **out)
{
    (void)c, (void)bytes, (void)out;
    MD_ASSERT(false, "a planned group has no memory to share");
    return MD_ERR_BUG;
}

static const md_comm_ops plan_ops = {
    .name = "plan",
    .free = plan_free,
    .split = plan_split,
    .split_node = plan_split_node,
    .barrier = plan_barrier,
    .allreduce = plan_allreduce,
    .bcast = plan_bcast,
    .allgather = plan_allgather,
    .reduce_scatter = plan_reduce_scatter,
    .alltoallv = plan_alltoallv,
    .exscan = plan_exscan,
    .allreduce_begin = plan_allreduce_begin,
    .allgather_begin = plan_allgather_begin,
    .reduce_scatter_begin = plan_reduce_scatter_begin,
    .reserve = plan_reserve,
    .poll = plan_poll,
    .wait = plan_wait,
    .shared = plan_shared,
};

md_status md_comm_plan(int rank, int size, md_comm **out)
{
    MD_ASSERT(rank >= 0 && rank < size, "rank %d of %d", rank, size);
    md_comm *c;
    MD_NEW(c, 1, "communicator");
    *c = (md_comm){.ops = &plan_ops, .rank = rank, .size = size};
    *out = c;
    return MD_OK;
}
