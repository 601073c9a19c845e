/* comm_mpi: see comm_mpi.h. MPI works on host memory only: a system MPI is usually built without
 * device support. Errors never come back as values: one error handler, inherited by every group,
 * ends the job. */
#include "mpi/comm_mpi.h"

#include <stdio.h>
#include <string.h>

#include "mpi/agree.h"
#include "mpi/comm_ops.h"

typedef struct mpi_window {
    struct mpi_window *next;
    MPI_Win win;
} mpi_window;

typedef struct mpi_comm {
    md_comm base;
    MPI_Comm handle;
    mpi_window *windows;
} mpi_comm;

static int64_t slice_elements = (int64_t)1 << 28;
static MPI_Errhandler error_handler = MPI_ERRHANDLER_NULL;

static MPI_Comm handle_of(const md_comm *c)
{
    return ((const mpi_comm *)c)->handle;
}

static MPI_Datatype type_of(md_dtype dtype)
{
    switch (dtype) {
    case MD_F32:
        return MPI_FLOAT;
    case MD_F64:
        return MPI_DOUBLE;
    case MD_I32:
        return MPI_INT32_T;
    case MD_I64:
        return MPI_INT64_T;
    case MD_U8:
        return MPI_UINT8_T;
    default:
        MD_ASSERT(false, "no reduction on %s", md_dtype_name(dtype));
        return MPI_DATATYPE_NULL;
    }
}

static MPI_Op op_of(md_reduce op)
{
    return op == MD_SUM ? MPI_SUM : op == MD_MAX_OP ? MPI_MAX : MPI_MIN;
}

static void on_error(MPI_Comm *comm, int *code, ...)
{
    (void)comm;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;
    MPI_Error_string(*code, text, &length);
    md_comm_die(NULL, "MPI", text);
}

static void mpi_abort(int code)
{
    MPI_Abort(MPI_COMM_WORLD, code);
}

static void mpi_free(md_comm *c)
{
    mpi_comm *m = (mpi_comm *)c;
    while (m->windows) {
        mpi_window *w = m->windows;
        m->windows = w->next;
        MPI_Win_unlock_all(w->win);
        MPI_Win_free(&w->win);
        md_free(w);
    }
    MPI_Comm_free(&m->handle);
    md_free(m);
}

static md_status wrap(md_comm *parent, MPI_Comm handle, md_comm **out);

static md_status mpi_split(md_comm *c, int colour, int key, md_comm **out)
{
    MPI_Comm sub;
    MPI_Comm_split(handle_of(c), colour, key, &sub);
    return wrap(c, sub, out);
}

static md_status mpi_split_node(md_comm *c, md_comm **out)
{
    MPI_Comm sub;
    MPI_Comm_split_type(handle_of(c), MPI_COMM_TYPE_SHARED, c->rank, MPI_INFO_NULL, &sub);
    return wrap(c, sub, out);
}

static void mpi_barrier(md_comm *c)
{
    MPI_Barrier(handle_of(c));
}

static void mpi_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op)
{
    size_t width = md_dtype_bytes(dtype);
    for (int64_t at = 0; at < n; at += slice_elements)
        MPI_Allreduce(MPI_IN_PLACE, (char *)buf + (size_t)at * width,
                      (int)MD_MIN(slice_elements, n - at), type_of(dtype), op_of(op), handle_of(c));
}

static void mpi_bcast(md_comm *c, void *buf, int64_t bytes, int root)
{
    for (int64_t at = 0; at < bytes; at += slice_elements)
        MPI_Bcast((char *)buf + at, (int)MD_MIN(slice_elements, bytes - at), MPI_BYTE, root,
                  handle_of(c));
}

/* A slice of every rank's part lands `bytes` apart: a type with that extent says so. */
static void mpi_allgather(md_comm *c, const void *send, void *recv, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += slice_elements) {
        int n = (int)MD_MIN(slice_elements, bytes - at);
        MPI_Datatype run, spaced;
        MPI_Type_contiguous(n, MPI_BYTE, &run);
        MPI_Type_create_resized(run, 0, (MPI_Aint)bytes, &spaced);
        MPI_Type_commit(&spaced);
        MPI_Allgather((const char *)send + at, n, MPI_BYTE, (char *)recv + at, 1, spaced,
                      handle_of(c));
        MPI_Type_free(&spaced);
        MPI_Type_free(&run);
    }
}

/* MPI_Reduce_scatter_block may hold the total count in an int, so a long one is cut by target rank.
 */
static void mpi_reduce_scatter(md_comm *c, const float *send, float *recv, int64_t n)
{
    int64_t part = n / c->size;
    if (n <= slice_elements) {
        MPI_Reduce_scatter_block(send, recv, (int)part, MPI_FLOAT, MPI_SUM, handle_of(c));
        return;
    }
    for (int root = 0; root < c->size; root++)
        for (int64_t at = 0; at < part; at += slice_elements)
            MPI_Reduce(send + root * part + at, recv + at, (int)MD_MIN(slice_elements, part - at),
                       MPI_FLOAT, MPI_SUM, root, handle_of(c));
}

static int64_t mpi_exscan(md_comm *c, int64_t value)
{
    int64_t before = 0;
    MPI_Exscan(&value, &before, 1, MPI_INT64_T, MPI_SUM, handle_of(c));
    return c->rank == 0 ? 0 : before;
}

/* All slices start at once: ranks must start non-blocking collectives in the same order, so none
 * may be left to a later poll. impl[i] holds slice i's MPI_Request, all zero bits when idle. */
static MPI_Request request_get(const md_comm_request *req, size_t i)
{
    MPI_Request r = MPI_REQUEST_NULL;
    if (req->impl[i])
        memcpy(&r, &req->impl[i], sizeof r);
    return r;
}

static void request_set(md_comm_request *req, size_t i, MPI_Request r)
{
    _Static_assert(sizeof r <= sizeof req->impl[0], "an MPI_Request fits a pointer");
    req->impl[i] = NULL;
    if (r != MPI_REQUEST_NULL)
        memcpy(&req->impl[i], &r, sizeof r);
}

static void mpi_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                                md_comm_request *req)
{
    size_t width = md_dtype_bytes(dtype), slices = MD_COUNT(req->impl);
    MD_ASSERT(n <= (int64_t)slices * slice_elements, "%lld elements in one request", (long long)n);
    for (size_t i = 0; i < slices && (int64_t)i * slice_elements < n; i++) {
        int64_t at = (int64_t)i * slice_elements;
        MPI_Request r;
        MPI_Iallreduce(MPI_IN_PLACE, (char *)buf + (size_t)at * width,
                       (int)MD_MIN(slice_elements, n - at), type_of(dtype), op_of(op), handle_of(c),
                       &r);
        request_set(req, i, r);
    }
}

static bool mpi_poll(md_comm *c, md_comm_request *req)
{
    (void)c;
    bool all = true;
    for (size_t i = 0; i < MD_COUNT(req->impl); i++) {
        if (!req->impl[i])
            continue;
        MPI_Request r = request_get(req, i);
        int done;
        MPI_Test(&r, &done, MPI_STATUS_IGNORE);
        request_set(req, i, r);
        all &= done != 0;
    }
    return all;
}

static void mpi_wait(md_comm *c, md_comm_request *req)
{
    (void)c;
    for (size_t i = 0; i < MD_COUNT(req->impl); i++) {
        if (!req->impl[i])
            continue;
        MPI_Request r = request_get(req, i);
        MPI_Wait(&r, MPI_STATUS_IGNORE);
        req->impl[i] = NULL;
    }
}

/* Lack of memory is the one MPI error a caller can answer, so here, and only here, errors return.
 */
static md_status window_open(mpi_comm *m, size_t bytes, mpi_window *w, void **out)
{
    void *mine;
    MPI_Comm_set_errhandler(m->handle, MPI_ERRORS_RETURN);
    int failed = MPI_Win_allocate_shared(m->base.rank == 0 ? (MPI_Aint)bytes : 0, 1, MPI_INFO_NULL,
                                         m->handle, &mine, &w->win);
    MPI_Comm_set_errhandler(m->handle, error_handler);
    if (failed)
        MD_FAIL(MD_ERR_MEMORY, "no %zu bytes of memory shared by the node's ranks", bytes);
    MPI_Aint size;
    int unit;
    MPI_Win_shared_query(w->win, 0, &size, &unit, out);
    MPI_Win_lock_all(MPI_MODE_NOCHECK,
                     w->win); /* the epoch in which plain loads and stores are legal */
    return MD_OK;
}

static md_status mpi_shared(md_comm *c, size_t bytes, void **out)
{
    mpi_comm *m = (mpi_comm *)c;
    mpi_window *w = md_alloc(sizeof *w, "shared window");
    if (md_agree(c, w ? MD_OK : MD_ERR_MEMORY) != MD_OK) {
        md_free(w);
        return MD_ERR_MEMORY;
    }
    md_status st = md_agree(c, window_open(m, bytes, w, out));
    if (st != MD_OK) {
        md_free(w);
        return st;
    }
    w->next = m->windows;
    m->windows = w;
    if (c->rank == 0)
        memset(*out, 0, bytes);
    MPI_Win_sync(w->win);
    MPI_Barrier(m->handle);
    MPI_Win_sync(w->win);
    return MD_OK;
}

static const md_comm_ops mpi_ops = {
    .name = "mpi",
    .free = mpi_free,
    .split = mpi_split,
    .split_node = mpi_split_node,
    .barrier = mpi_barrier,
    .allreduce = mpi_allreduce,
    .bcast = mpi_bcast,
    .allgather = mpi_allgather,
    .reduce_scatter = mpi_reduce_scatter,
    .exscan = mpi_exscan,
    .allreduce_begin = mpi_allreduce_begin,
    .poll = mpi_poll,
    .wait = mpi_wait,
    .shared = mpi_shared,
};

/* Takes over `handle`, also on failure; the new group's ranks agree on whether all have their
 * struct. */
static md_status wrap(md_comm *parent, MPI_Comm handle, md_comm **out)
{
    mpi_comm *m = md_alloc(sizeof *m, "communicator");
    md_status st = m ? MD_OK : MD_ERR_MEMORY;
    if (parent && (st = md_agree(parent, st)) != MD_OK) {
        MPI_Comm_free(&handle);
        md_free(m);
        return st;
    }
    if (!m) {
        MPI_Comm_free(&handle);
        return MD_ERR_MEMORY;
    }
    m->base.ops = &mpi_ops;
    m->handle = handle;
    MPI_Comm_rank(handle, &m->base.rank);
    MPI_Comm_size(handle, &m->base.size);
    *out = &m->base;
    return MD_OK;
}

const char *md_comm_library(void)
{
    static char text[MPI_MAX_LIBRARY_VERSION_STRING];
    int n;
    MPI_Get_library_version(text, &n);
    text[strcspn(text, ",\n")] = 0; /* the build host and date that follow tell nothing here */
    return text;
}

md_status md_mpi_start(int *argc, char ***argv, md_comm **world)
{
    int provided, rank, size;
    if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS)
        MD_FAIL(MD_ERR_DEVICE, "MPI cannot start");
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    md_base_set_rank(rank, size);
    md_base_set_abort_hook(mpi_abort);
    MPI_Comm_create_errhandler(on_error, &error_handler);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, error_handler);
    MPI_Comm_set_errhandler(MPI_COMM_SELF, error_handler);
    if (provided < MPI_THREAD_FUNNELED)
        MD_FAIL(MD_ERR_DEVICE, "this MPI library supports no threads beside the one that calls it");
    MPI_Comm handle; /* own context: messages of other libraries cannot be mistaken for ours */
    MPI_Comm_dup(MPI_COMM_WORLD, &handle);
    md_status st = wrap(NULL, handle, world);
    int failed = st != MD_OK;
    MPI_Allreduce(MPI_IN_PLACE, &failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    if (!failed)
        return MD_OK;
    if (st == MD_OK)
        md_comm_free(*world);
    md_base_set_abort_hook(NULL);
    MPI_Finalize();
    return st != MD_OK ? st : md_error_set(MD_ERR_MEMORY, "another rank has no memory to start");
}

void md_mpi_stop(md_comm *world)
{
    md_comm_free(world);
    MPI_Errhandler_free(&error_handler);
    md_base_set_abort_hook(NULL);
    MPI_Finalize();
}

MPI_Comm md_comm_mpi_handle(const md_comm *c)
{
    return c->ops == &mpi_ops ? handle_of(c) : MPI_COMM_SELF;
}

void md_mpi_set_slice(int64_t elements)
{
    MD_ASSERT(elements > 0 && elements <= (int64_t)1 << 28, "%lld elements", (long long)elements);
    slice_elements = elements;
}
