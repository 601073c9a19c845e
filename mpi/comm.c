/* comm: see comm.h. Checks and counts here, transport in the carrier's row of functions. */
#include "mpi/comm_ops.h"

#include <stdio.h>

_Noreturn void md_comm_die(const md_comm *c, const char *what, const char *why)
{
    fprintf(stderr, "md_hpc: rank %d: %s failed in a group of %d ranks: %s\n", md_base_rank(), what,
            c ? c->size : md_base_size(), why);
    md_abort(MD_ERR_DEVICE);
}

/* Counts a collective and passes its fault site. Returns false when there is nothing to move. */
static bool comm_enter(md_comm *c, const char *site, int64_t bytes)
{
    MD_ASSERT(bytes >= 0, "%s: %lld bytes", site, (long long)bytes);
    if (md_fault(site))
        md_comm_die(c, site, "injected fault");
    c->bytes += bytes;
    return bytes > 0;
}

static int64_t elements_bytes(int64_t n, md_dtype dtype)
{
    return n * (int64_t)md_dtype_bytes(dtype);
}

void md_comm_free(md_comm *c)
{
    if (c)
        c->ops->free(c);
}

int md_comm_rank(const md_comm *c)
{
    return c->rank;
}

int md_comm_size(const md_comm *c)
{
    return c->size;
}

md_status md_comm_split(md_comm *c, int colour, int key, md_comm **out)
{
    return c->ops->split(c, colour, key, out);
}

md_status md_comm_split_node(md_comm *c, md_comm **out)
{
    return c->ops->split_node(c, out);
}

void md_comm_barrier(md_comm *c)
{
    comm_enter(c, "comm.barrier", 0);
    c->ops->barrier(c);
}

void md_comm_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op)
{
    if (comm_enter(c, "comm.allreduce", elements_bytes(n, dtype)))
        c->ops->allreduce(c, buf, n, dtype, op);
}

void md_comm_bcast(md_comm *c, void *buf, int64_t bytes, int root)
{
    MD_ASSERT(root >= 0 && root < c->size, "root %d of %d ranks", root, c->size);
    if (comm_enter(c, "comm.bcast", bytes))
        c->ops->bcast(c, buf, bytes, root);
}

void md_comm_allgather(md_comm *c, const void *send, void *recv, int64_t bytes)
{
    if (comm_enter(c, "comm.allgather", bytes))
        c->ops->allgather(c, send, recv, bytes);
}

void md_comm_reduce_scatter(md_comm *c, const float *send, float *recv, int64_t n)
{
    MD_ASSERT(n % c->size == 0, "%lld elements over %d ranks", (long long)n, c->size);
    if (comm_enter(c, "comm.reduce_scatter", elements_bytes(n, MD_F32)))
        c->ops->reduce_scatter(c, send, recv, n);
}

int64_t md_comm_exscan(md_comm *c, int64_t value)
{
    comm_enter(c, "comm.exscan", (int64_t)sizeof value);
    return c->ops->exscan(c, value);
}

void md_comm_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                             md_comm_request *req)
{
    for (size_t i = 0; i < MD_COUNT(req->impl); i++)
        MD_ASSERT(!req->impl[i], "the request still carries a collective");
    if (comm_enter(c, "comm.allreduce_begin", elements_bytes(n, dtype)))
        c->ops->allreduce_begin(c, buf, n, dtype, op, req);
}

bool md_comm_poll(md_comm *c, md_comm_request *req, int n)
{
    bool done = true;
    for (int i = 0; i < n; i++)
        done &= c->ops->poll(c, &req[i]);
    return done;
}

void md_comm_wait(md_comm *c, md_comm_request *req)
{
    comm_enter(c, "comm.wait", 0);
    c->ops->wait(c, req);
}

int64_t md_comm_bytes(const md_comm *c)
{
    return c->bytes;
}

md_status md_comm_shared(md_comm *c, size_t bytes, void **out)
{
    return c->ops->shared(c, bytes, out);
}
