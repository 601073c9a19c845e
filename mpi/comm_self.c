/* comm_self: the group of one rank. Every collective is the identity, so a run without mpirun needs
 * no MPI call at all. Blocks handed out by md_comm_shared are chained and freed with the group. */
#include "mpi/comm_ops.h"

#include <string.h>

typedef struct self_block {
    struct self_block *next;
    void *data;
} self_block;

typedef struct self_comm {
    md_comm base;
    self_block *blocks;
} self_comm;

static void self_free(md_comm *c)
{
    self_comm *s = (self_comm *)c;
    while (s->blocks) {
        self_block *b = s->blocks;
        s->blocks = b->next;
        md_free(b->data);
        md_free(b);
    }
    md_free(s);
}

static md_status self_split(md_comm *c, int colour, int key, md_comm **out)
{
    (void)c, (void)colour, (void)key;
    return md_comm_self(out);
}

static md_status self_split_node(md_comm *c, md_comm **out)
{
    (void)c;
    return md_comm_self(out);
}

static void self_barrier(md_comm *c)
{
    (void)c;
}

static void self_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op)
{
    (void)c, (void)buf, (void)n, (void)dtype, (void)op;
}

static void self_bcast(md_comm *c, void *buf, int64_t bytes, int root)
{
    (void)c, (void)buf, (void)bytes, (void)root;
}

static void self_allgather(md_comm *c, const void *send, void *recv, int64_t bytes)
{
    (void)c;
    memmove(recv, send, (size_t)bytes);
}

static void self_reduce_scatter(md_comm *c, const void *send, void *recv, int64_t n, md_dtype dtype)
{
    (void)c;
    memmove(recv, send, (size_t)n * md_dtype_bytes(dtype));
}

static void self_alltoallv(md_comm *c, const void *send, const int64_t *to, void *recv,
                           const int64_t *from, int64_t row)
{
    (void)c, (void)from;
    memmove(recv, send, (size_t)(to[0] * row));
}

static int64_t self_exscan(md_comm *c, int64_t value)
{
    (void)c, (void)value;
    return 0;
}

static void self_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                                 md_comm_request *req)
{
    (void)c, (void)buf, (void)n, (void)dtype, (void)op, (void)req;
}

static void self_allgather_begin(md_comm *c, void *buf, int64_t bytes, md_comm_request *req)
{
    (void)c, (void)buf, (void)bytes, (void)req;
}

static void self_reduce_scatter_begin(md_comm *c, const void *send, void *recv, int64_t n,
                                      md_dtype dtype, md_comm_request *req)
{
    (void)req;
    self_reduce_scatter(c, send, recv, n, dtype);
}

static md_status self_reserve(md_comm *c, size_t bytes, int requests)
{
    (void)c, (void)bytes, (void)requests;
    return MD_OK;
}

static bool self_poll(md_comm *c, md_comm_request *req)
{
    (void)c, (void)req;
    return true;
}

static void self_wait(md_comm *c, md_comm_request *req)
{
    (void)c, (void)req;
}

static md_status self_shared(md_comm *c, size_t bytes, void **out)
{
    self_comm *s = (self_comm *)c;
    self_block *b;
    MD_NEW(b, 1, "shared block");
    b->data = md_alloc(bytes, "shared block");
    if (!b->data) {
        md_free(b);
        return MD_ERR_MEMORY;
    }
    b->next = s->blocks;
    s->blocks = b;
    *out = b->data;
    return MD_OK;
}

static const md_comm_ops self_ops = {
    .name = "self",
    .free = self_free,
    .split = self_split,
    .split_node = self_split_node,
    .barrier = self_barrier,
    .allreduce = self_allreduce,
    .bcast = self_bcast,
    .allgather = self_allgather,
    .reduce_scatter = self_reduce_scatter,
    .alltoallv = self_alltoallv,
    .exscan = self_exscan,
    .allreduce_begin = self_allreduce_begin,
    .allgather_begin = self_allgather_begin,
    .reduce_scatter_begin = self_reduce_scatter_begin,
    .reserve = self_reserve,
    .poll = self_poll,
    .wait = self_wait,
    .shared = self_shared,
};

md_status md_comm_self(md_comm **out)
{
    self_comm *s;
    MD_NEW(s, 1, "communicator");
    s->base = (md_comm){.ops = &self_ops, .rank = 0, .size = 1};
    *out = &s->base;
    return MD_OK;
}
