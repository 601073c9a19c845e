/* comm_mpi_ops: the MPI carrier's own struct, shared by its two halves: comm_mpi.c starts MPI and
 * makes groups, comm_mpi_coll.c moves data. Private to them. */
#ifndef MD_COMM_MPI_OPS_H
#define MD_COMM_MPI_OPS_H

#include "mpi/comm_mpi.h"
#include "mpi/comm_ops.h"

typedef struct mpi_window mpi_window;
typedef struct mpi_work mpi_work;

typedef struct mpi_comm {
    md_comm base;
    MPI_Comm handle;
    mpi_window *windows;
    mpi_work *idle; /* memory for reduce-scatters to come */
} mpi_comm;

static inline MPI_Comm mpi_handle(const md_comm *c)
{
    return ((const mpi_comm *)c)->handle;
}

/* The rows of md_comm_ops of these names. */
void md_mpi_barrier(md_comm *c);
void md_mpi_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op);
void md_mpi_bcast(md_comm *c, void *buf, int64_t bytes, int root);
void md_mpi_allgather(md_comm *c, const void *send, void *recv, int64_t bytes);
void md_mpi_reduce_scatter(md_comm *c, const void *send, void *recv, int64_t n, md_dtype dtype);
void md_mpi_alltoallv(md_comm *c, const void *send, const int64_t *to, void *recv,
                      const int64_t *from, int64_t row);
int64_t md_mpi_exscan(md_comm *c, int64_t value);
void md_mpi_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                            md_comm_request *req);
void md_mpi_allgather_begin(md_comm *c, void *buf, int64_t bytes, md_comm_request *req);
void md_mpi_reduce_scatter_begin(md_comm *c, const void *send, void *recv, int64_t n,
                                 md_dtype dtype, md_comm_request *req);
md_status md_mpi_reserve(md_comm *c, size_t bytes, int requests);
bool md_mpi_poll(md_comm *c, md_comm_request *req);
void md_mpi_wait(md_comm *c, md_comm_request *req);

/* Sums, maxima and minima of bf16, which MPI takes for MPI_UINT16_T: made after MPI has started,
 * and freed before it ends. */
void md_mpi_bf16_start(void);
void md_mpi_bf16_stop(void);
MPI_Op md_mpi_bf16_op(md_reduce op);

/* Frees what md_mpi_reserve and reduce-scatters have made; none may be under way. */
void md_mpi_works_free(mpi_comm *m);

#endif
