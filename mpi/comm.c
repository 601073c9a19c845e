/* comm: see comm.h. Checks and counts here, transport in the carrier's row of functions. */
#include "mpi/comm_ops.h"
#include "src/watchdog.h"

#include <stdio.h>

_Noreturn void md_comm_die(const md_comm *c, const char *what, const char *why)
{
    fprintf(stderr, "md_hpc: rank %d: %s failed in a group of %d ranks: %s\n", md_base_rank(), what,
            c ? c->size : md_base_size(), why);
    md_abort(MD_ERR_DEVICE);
}

/* Counts a collective and passes its fault site. Returns false when there is nothing to move. */
static bool comm_enter(md_comm *c, const char *site, int64_t bytes, double sent)
{
    MD_ASSERT(bytes >= 0, "%s: %lld bytes", site, (long long)bytes);
    if (md_fault(site))
        md_comm_die(c, site, "injected fault");
    c->count.calls++;
    c->count.bytes += bytes;
    c->count.sent += sent;
    return bytes > 0;
}

/* A call that waits for other ranks, marked as such for the watchdog. */
#define WAITING(site, call)                \
    do {                                   \
        const char *was_ = md_phase(site); \
        call;                              \
        md_phase(was_);                    \
    } while (0)

/* What a rank sends of a buffer of so many bytes by the algorithms that send least: every rank
 * passes on all parts but one. An all-reduce does it twice; of a broadcast it is the mean. */
static double one_pass(const md_comm *c, int64_t bytes)
{
    return (double)bytes * (c->size - 1) / c->size;
}

static double gathered(const md_comm *c, int64_t bytes)
{
    return one_pass(c, c->size * bytes);
}

static void check_idle(const md_comm_request *req)
{
    MD_ASSERT(!req->work, "the request still carries a collective");
    for (size_t i = 0; i < MD_COUNT(req->impl); i++)
        MD_ASSERT(!req->impl[i], "the request still carries a collective");
}

static void check_parts(const md_comm *c, int64_t n, md_dtype dtype)
{
    MD_ASSERT(n % c->size == 0, "%lld elements over %d ranks", (long long)n, c->size);
    MD_ASSERT(dtype == MD_F32 || dtype == MD_BF16 || dtype == MD_F64 || dtype == MD_I32 ||
                  dtype == MD_I64,
              "no reduce-scatter of %s", md_dtype_name(dtype));
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

/* A fault site of what is no collective on data and is not counted. */
static void pass_site(md_comm *c, const char *site)
{
    if (md_fault(site))
        md_comm_die(c, site, "injected fault");
}

md_status md_comm_split(md_comm *c, int colour, int key, md_comm **out)
{
    md_status st;
    pass_site(c, "comm.split");
    WAITING("comm.split", st = c->ops->split(c, colour, key, out));
    return st;
}

md_status md_comm_split_node(md_comm *c, md_comm **out)
{
    md_status st;
    pass_site(c, "comm.split");
    WAITING("comm.split", st = c->ops->split_node(c, out));
    return st;
}

void md_comm_barrier(md_comm *c)
{
    comm_enter(c, "comm.barrier", 0, 0);
    WAITING("comm.barrier", c->ops->barrier(c));
}

void md_comm_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op)
{
    int64_t bytes = elements_bytes(n, dtype);
    if (comm_enter(c, "comm.allreduce", bytes, 2 * one_pass(c, bytes)))
        WAITING("comm.allreduce", c->ops->allreduce(c, buf, n, dtype, op));
}

void md_comm_bcast(md_comm *c, void *buf, int64_t bytes, int root)
{
    MD_ASSERT(root >= 0 && root < c->size, "root %d of %d ranks", root, c->size);
    if (comm_enter(c, "comm.bcast", bytes, one_pass(c, bytes)))
        WAITING("comm.bcast", c->ops->bcast(c, buf, bytes, root));
}

void md_comm_allgather(md_comm *c, const void *send, void *recv, int64_t bytes)
{
    if (comm_enter(c, "comm.allgather", bytes, gathered(c, bytes)))
        WAITING("comm.allgather", c->ops->allgather(c, send, recv, bytes));
}

void md_comm_reduce_scatter(md_comm *c, const void *send, void *recv, int64_t n, md_dtype dtype)
{
    int64_t bytes = elements_bytes(n, dtype);
    check_parts(c, n, dtype);
    if (comm_enter(c, "comm.reduce_scatter", bytes, one_pass(c, bytes)))
        WAITING("comm.reduce_scatter", c->ops->reduce_scatter(c, send, recv, n, dtype));
}

void md_comm_alltoallv(md_comm *c, const void *send, const int64_t *to, void *recv,
                       const int64_t *from, int64_t row)
{
    int64_t rows = 0;
    for (int r = 0; r < c->size; r++)
        rows += to[r];
    MD_ASSERT(c->ops->alltoallv, "no alltoallv over %s", c->ops->name);
    /* Who sends nothing may still receive. */
    if (comm_enter(c, "comm.alltoallv", rows * row, (double)((rows - to[c->rank]) * row)) ||
        c->size > 1)
        WAITING("comm.alltoallv", c->ops->alltoallv(c, send, to, recv, from, row));
}

int64_t md_comm_exscan(md_comm *c, int64_t value)
{
    comm_enter(c, "comm.exscan", (int64_t)sizeof value, c->size > 1 ? sizeof value : 0);
    WAITING("comm.exscan", value = c->ops->exscan(c, value));
    return value;
}

void md_comm_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                             md_comm_request *req)
{
    int64_t bytes = elements_bytes(n, dtype);
    check_idle(req);
    if (comm_enter(c, "comm.allreduce_begin", bytes, 2 * one_pass(c, bytes)))
        WAITING("comm.allreduce_begin", c->ops->allreduce_begin(c, buf, n, dtype, op, req));
}

void md_comm_allgather_begin(md_comm *c, void *buf, int64_t bytes, md_comm_request *req)
{
    check_idle(req);
    if (comm_enter(c, "comm.allgather_begin", bytes, gathered(c, bytes)))
        WAITING("comm.allgather_begin", c->ops->allgather_begin(c, buf, bytes, req));
}

void md_comm_reduce_scatter_begin(md_comm *c, const void *send, void *recv, int64_t n,
                                  md_dtype dtype, md_comm_request *req)
{
    int64_t bytes = elements_bytes(n, dtype);
    check_idle(req);
    check_parts(c, n, dtype);
    if (comm_enter(c, "comm.reduce_scatter_begin", bytes, one_pass(c, bytes)))
        WAITING("comm.reduce_scatter_begin",
                c->ops->reduce_scatter_begin(c, send, recv, n, dtype, req));
}

md_status md_comm_reserve(md_comm *c, int64_t bytes, int requests)
{
    return c->ops->reserve(c, (size_t)bytes, requests);
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
    pass_site(c, "comm.wait");
    WAITING("comm.wait", c->ops->wait(c, req));
}

md_comm_count md_comm_counted(const md_comm *c)
{
    return c->count;
}

md_status md_comm_shared(md_comm *c, size_t bytes, void **out)
{
    md_status st;
    pass_site(c, "comm.shared");
    WAITING("comm.shared", st = c->ops->shared(c, bytes, out));
    return st;
}
