/* comm_staged: collectives on operands of a backend, carried by a group that works on host memory.
 *
 * What goes in is downloaded into pinned memory, the inner group moves it, and what comes out is
 * uploaded. The host waits for the backend once a collective, when it begins; uploads are in the
 * order of ops and nobody waits for them. A piece of pinned memory is used again as soon as its
 * upload is issued: the wait at the beginning of the next use is also a wait for that. */
#include "mpi/agree.h"
#include "mpi/comm_device.h"
#include "mpi/comm_ops.h"

/* One collective under way, and the memory it keeps between two. */
typedef struct staged_work {
    struct staged_work *next;
    char *block; /* pinned, [room] */
    size_t room;
    md_comm_request inner;
    void *to;         /* operands that receive ... */
    const char *from; /* ... this part of block ... */
    size_t bytes;     /* ... of so many bytes */
} staged_work;

typedef struct staged_comm {
    md_comm base;
    md_comm *inner;
    bool owns_inner;
    md_backend *be;
    staged_work *idle;
} staged_comm;

static staged_comm *staged_of(md_comm *c)
{
    return (staged_comm *)c;
}

/* An operand cannot be given back half changed. */
static void must(const md_comm *c, md_status st)
{
    if (st != MD_OK)
        md_comm_die(c, "a copy between host and device", md_error_text());
}

/* ---- pinned memory ---- */

static void work_free(staged_comm *s, staged_work *w)
{
    if (w)
        md_backend_pinned_free(s->be, w->block);
    md_free(w);
}

/* Takes an idle piece with so much room, else the newest one. NULL: none is idle. */
static staged_work *work_take(staged_comm *s, size_t bytes)
{
    staged_work **best = &s->idle;
    for (staged_work **w = &s->idle; *w; w = &(*w)->next)
        if ((*w)->room >= bytes) {
            best = w;
            break;
        }
    staged_work *w = *best;
    if (w)
        *best = w->next;
    return w;
}

static void work_give(staged_comm *s, staged_work *w)
{
    w->next = s->idle;
    s->idle = w;
}

/* Gives w, which may be NULL, room for so many bytes; room grows at least twofold, so that a group
 * soon stops to allocate. On failure w is gone. */
static md_status work_grow(staged_comm *s, staged_work *w, size_t bytes, staged_work **out)
{
    *out = w;
    if (w && w->room >= bytes)
        return MD_OK;
    const size_t room = MD_MAX(bytes, w ? 2 * w->room : 0);
    md_status st = w ? md_backend_sync(s->be) : MD_OK; /* its last upload may still read it */
    work_free(s, w);
    *out = NULL;
    MD_TRY(st);
    MD_NEW(w, 1, "staging");
    st = md_backend_pinned(s->be, room, "memory to pass operands on", (void **)&w->block);
    if (st != MD_OK) {
        md_free(w);
        return st;
    }
    w->room = room;
    *out = w;
    return MD_OK;
}

static md_status staged_reserve(md_comm *c, size_t bytes, int requests)
{
    staged_comm *s = staged_of(c);
    staged_work *taken = NULL;
    const size_t room = bytes + (bytes + (size_t)c->size - 1) / (size_t)c->size;
    md_status st = MD_OK;
    for (int i = 0; i < requests && st == MD_OK; i++) {
        staged_work *w;
        st = work_grow(s, work_take(s, room), room, &w);
        if (st == MD_OK) {
            w->next = taken;
            taken = w;
        }
    }
    while (taken) {
        staged_work *w = taken;
        taken = w->next;
        work_give(s, w);
    }
    return st == MD_OK ? md_comm_reserve(s->inner, (int64_t)bytes, requests) : st;
}

/* Pinned memory that holds `bytes` bytes of operands from `at` on and that the host may use now. */
static staged_work *stage(md_comm *c, size_t room, const void *from, size_t at, size_t bytes)
{
    staged_comm *s = staged_of(c);
    staged_work *w;
    must(c, work_grow(s, work_take(s, room), room, &w));
    if (bytes > 0)
        must(c, md_backend_download(s->be, w->block + at, from, bytes));
    must(c, md_backend_sync(s->be));
    return w;
}

/* What has come goes to the operands. */
static void unstage(md_comm *c, staged_work *w)
{
    staged_comm *s = staged_of(c);
    if (w->bytes > 0)
        must(c, md_backend_upload(s->be, w->to, w->from, w->bytes));
    work_give(s, w);
}

static void receive(staged_work *w, void *to, size_t at, size_t bytes)
{
    w->to = to;
    w->from = w->block + at;
    w->bytes = bytes;
}

/* ---- the three kinds, staged: a group of one leaves operands in place alone ---- */

static staged_work *stage_sum(md_comm *c, void *buf, int64_t n, md_dtype dtype)
{
    const size_t bytes = (size_t)n * md_dtype_bytes(dtype);
    staged_work *w = stage(c, bytes, buf, 0, bytes);
    receive(w, buf, 0, bytes);
    return w;
}

static staged_work *stage_gather(md_comm *c, const void *send, void *recv, int64_t bytes)
{
    const size_t part = (size_t)bytes, all = part * (size_t)c->size;
    staged_work *w = stage(c, all, send, part * (size_t)c->rank, part);
    receive(w, recv, 0, all);
    return w;
}

static staged_work *stage_scatter(md_comm *c, const void *send, void *recv, int64_t n,
                                  md_dtype dtype)
{
    const size_t all = (size_t)n * md_dtype_bytes(dtype), part = all / (size_t)c->size;
    staged_work *w = stage(c, all + part, send, 0, all);
    receive(w, recv, all, part);
    return w;
}

static char *part_of(staged_work *w, const md_comm *c, int64_t bytes)
{
    return w->block + c->rank * bytes;
}

static void staged_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op)
{
    md_comm *inner = staged_of(c)->inner;
    if (c->size == 1)
        return;
    staged_work *w = stage_sum(c, buf, n, dtype);
    inner->ops->allreduce(inner, w->block, n, dtype, op);
    unstage(c, w);
}

static void staged_bcast(md_comm *c, void *buf, int64_t bytes, int root)
{
    md_comm *inner = staged_of(c)->inner;
    const bool mine = c->rank == root;
    if (c->size == 1)
        return;
    staged_work *w = stage(c, (size_t)bytes, buf, 0, mine ? (size_t)bytes : 0);
    inner->ops->bcast(inner, w->block, bytes, root);
    receive(w, buf, 0, mine ? 0 : (size_t)bytes);
    unstage(c, w);
}

static void staged_allgather(md_comm *c, const void *send, void *recv, int64_t bytes)
{
    md_comm *inner = staged_of(c)->inner;
    if (c->size == 1 && send == recv)
        return;
    staged_work *w = stage_gather(c, send, recv, bytes);
    inner->ops->allgather(inner, part_of(w, c, bytes), w->block, bytes);
    unstage(c, w);
}

static void staged_reduce_scatter(md_comm *c, const void *send, void *recv, int64_t n,
                                  md_dtype dtype)
{
    md_comm *inner = staged_of(c)->inner;
    if (c->size == 1 && send == recv)
        return;
    staged_work *w = stage_scatter(c, send, recv, n, dtype);
    inner->ops->reduce_scatter(inner, w->block, (void *)w->from, n, dtype);
    unstage(c, w);
}

static void staged_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                                   md_comm_request *req)
{
    md_comm *inner = staged_of(c)->inner;
    if (c->size == 1)
        return;
    staged_work *w = req->work = stage_sum(c, buf, n, dtype);
    inner->ops->allreduce_begin(inner, w->block, n, dtype, op, &w->inner);
}

static void staged_allgather_begin(md_comm *c, void *buf, int64_t bytes, md_comm_request *req)
{
    md_comm *inner = staged_of(c)->inner;
    if (c->size == 1)
        return;
    staged_work *w = stage_gather(c, (char *)buf + c->rank * bytes, buf, bytes);
    req->work = w;
    inner->ops->allgather_begin(inner, w->block, bytes, &w->inner);
}

static void staged_reduce_scatter_begin(md_comm *c, const void *send, void *recv, int64_t n,
                                        md_dtype dtype, md_comm_request *req)
{
    md_comm *inner = staged_of(c)->inner;
    if (c->size == 1 && send == recv)
        return;
    staged_work *w = req->work = stage_scatter(c, send, recv, n, dtype);
    inner->ops->reduce_scatter_begin(inner, w->block, (void *)w->from, n, dtype, &w->inner);
}

static bool staged_poll(md_comm *c, md_comm_request *req)
{
    md_comm *inner = staged_of(c)->inner;
    staged_work *w = req->work;
    return !w || inner->ops->poll(inner, &w->inner);
}

static void staged_wait(md_comm *c, md_comm_request *req)
{
    md_comm *inner = staged_of(c)->inner;
    staged_work *w = req->work;
    if (!w)
        return;
    inner->ops->wait(inner, &w->inner);
    req->work = NULL;
    unstage(c, w);
}

/* ---- the rest ---- */

static void staged_barrier(md_comm *c)
{
    must(c, md_backend_sync(staged_of(c)->be));
    staged_of(c)->inner->ops->barrier(staged_of(c)->inner);
}

static int64_t staged_exscan(md_comm *c, int64_t value)
{
    return staged_of(c)->inner->ops->exscan(staged_of(c)->inner, value);
}

static md_status staged_shared(md_comm *c, size_t bytes, void **out)
{
    (void)c, (void)bytes, (void)out;
    MD_ASSERT(false, "operands of a backend are not shared");
    return MD_ERR_BUG;
}

static void staged_free(md_comm *c)
{
    staged_comm *s = staged_of(c);
    if (s->idle)
        must(c, md_backend_sync(s->be));
    while (s->idle)
        work_free(s, work_take(s, 0));
    if (s->owns_inner)
        md_comm_free(s->inner);
    md_free(s);
}

/* Takes over sub, also on failure. */
static md_status staged_over(md_comm *c, md_status st, md_comm *sub, md_comm **out)
{
    MD_TRY(st);
    st = md_comm_staged(sub, staged_of(c)->be, out);
    if (st == MD_OK)
        staged_of(*out)->owns_inner = true;
    else
        md_comm_free(sub);
    return st;
}

static md_status staged_split(md_comm *c, int colour, int key, md_comm **out)
{
    md_comm *sub = NULL;
    md_status st = md_comm_split(staged_of(c)->inner, colour, key, &sub);
    return staged_over(c, st, sub, out);
}

static md_status staged_split_node(md_comm *c, md_comm **out)
{
    md_comm *sub = NULL;
    md_status st = md_comm_split_node(staged_of(c)->inner, &sub);
    return staged_over(c, st, sub, out);
}

static const md_comm_ops staged_ops = {
    .name = "staged",
    .free = staged_free,
    .split = staged_split,
    .split_node = staged_split_node,
    .barrier = staged_barrier,
    .allreduce = staged_allreduce,
    .bcast = staged_bcast,
    .allgather = staged_allgather,
    .reduce_scatter = staged_reduce_scatter,
    .exscan = staged_exscan,
    .allreduce_begin = staged_allreduce_begin,
    .allgather_begin = staged_allgather_begin,
    .reduce_scatter_begin = staged_reduce_scatter_begin,
    .reserve = staged_reserve,
    .poll = staged_poll,
    .wait = staged_wait,
    .shared = staged_shared,
};

md_status md_comm_staged(md_comm *inner, md_backend *be, md_comm **out)
{
    staged_comm *s = md_alloc(sizeof *s, "communicator");
    md_status st = md_agree(inner, s ? MD_OK : MD_ERR_MEMORY);
    if (st != MD_OK) {
        md_free(s);
        return st;
    }
    s->base = (md_comm){.ops = &staged_ops, .rank = inner->rank, .size = inner->size};
    s->inner = inner;
    s->be = be;
    *out = &s->base;
    return MD_OK;
}
