/* comm_mpi: see comm_mpi.h. MPI works on host memory only: a system MPI is usually built without
 * device support. Errors never come back as values: one error handler, inherited by every group,
 * ends the job. */
#include "mpi/comm_mpi.h"

#include <stdio.h>
#include <string.h>

#include "mpi/agree.h"
#include "mpi/comm_mpi_ops.h"

struct mpi_window {
    mpi_window *next;
    MPI_Win win;
};

static MPI_Errhandler error_handler = MPI_ERRHANDLER_NULL;

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
    md_mpi_works_free(m);
    MPI_Comm_free(&m->handle);
    md_free(m);
}

static md_status wrap(md_comm *parent, MPI_Comm handle, md_comm **out);

static md_status mpi_split(md_comm *c, int colour, int key, md_comm **out)
{
    MPI_Comm sub;
    MPI_Comm_split(mpi_handle(c), colour, key, &sub);
    return wrap(c, sub, out);
}

static md_status mpi_split_node(md_comm *c, md_comm **out)
{
    MPI_Comm sub;
    MPI_Comm_split_type(mpi_handle(c), MPI_COMM_TYPE_SHARED, c->rank, MPI_INFO_NULL, &sub);
    return wrap(c, sub, out);
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
    .barrier = md_mpi_barrier,
    .allreduce = md_mpi_allreduce,
    .bcast = md_mpi_bcast,
    .allgather = md_mpi_allgather,
    .reduce_scatter = md_mpi_reduce_scatter,
    .alltoallv = md_mpi_alltoallv,
    .exscan = md_mpi_exscan,
    .allreduce_begin = md_mpi_allreduce_begin,
    .allgather_begin = md_mpi_allgather_begin,
    .reduce_scatter_begin = md_mpi_reduce_scatter_begin,
    .reserve = md_mpi_reserve,
    .poll = md_mpi_poll,
    .wait = md_mpi_wait,
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
    md_mpi_bf16_start();
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
    md_mpi_bf16_stop();
    MPI_Finalize();
    return st != MD_OK ? st : md_error_set(MD_ERR_MEMORY, "another rank has no memory to start");
}

void md_mpi_stop(md_comm *world)
{
    md_comm_free(world);
    md_mpi_bf16_stop();
    MPI_Errhandler_free(&error_handler);
    md_base_set_abort_hook(NULL);
    MPI_Finalize();
}

MPI_Comm md_comm_mpi_handle(const md_comm *c)
{
    return c->ops == &mpi_ops ? mpi_handle(c) : MPI_COMM_SELF;
}
