/* comm_ops: what stands behind md_comm. One row of functions per carrier: self (comm_self.c), MPI
 * (comm_mpi.c), plan (comm_plan.c), staged (comm_staged.c), NCCL (comm_nccl.c); a further carrier
 * is a further row. comm.c is the only caller, beside carriers that stand on another one: it
 * counts, passes the fault sites and skips empty calls, so a row holds nothing but the transport.
 * Private to mpi/. */
#ifndef MD_COMM_OPS_H
#define MD_COMM_OPS_H

#include "mpi/comm.h"

MD_C_BEGIN

typedef struct md_comm_ops {
    const char *name;
    void (*free)(md_comm *c);
    md_status (*split)(md_comm *c, int colour, int key, md_comm **out);
    md_status (*split_node)(md_comm *c, md_comm **out);
    void (*barrier)(md_comm *c);
    void (*allreduce)(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op);
    void (*bcast)(md_comm *c, void *buf, int64_t bytes, int root);
    void (*allgather)(md_comm *c, const void *send, void *recv, int64_t bytes);
    void (*reduce_scatter)(md_comm *c, const void *send, void *recv, int64_t n, md_dtype dtype);
    /* NULL where buffers are operands. */
    void (*alltoallv)(md_comm *c, const void *send, const int64_t *to, void *recv,
                      const int64_t *from, int64_t row);
    int64_t (*exscan)(md_comm *c, int64_t value);
    void (*allreduce_begin)(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                            md_comm_request *req);
    void (*allgather_begin)(md_comm *c, void *buf, int64_t bytes, md_comm_request *req);
    void (*reduce_scatter_begin)(md_comm *c, const void *send, void *recv, int64_t n,
                                 md_dtype dtype, md_comm_request *req);
    md_status (*reserve)(md_comm *c, size_t bytes, int requests);
    bool (*poll)(md_comm *c, md_comm_request *req);
    void (*wait)(md_comm *c, md_comm_request *req);
    md_status (*shared)(md_comm *c, size_t bytes, void **out);
} md_comm_ops;

/* First member of every carrier's own struct. */
struct md_comm {
    const md_comm_ops *ops;
    int rank, size;
    md_comm_count count;
};

/* Reports a dead collective on stderr and ends the job with MD_ERR_DEVICE. */
MD_NORETURN void md_comm_die(const md_comm *c, const char *what, const char *why);

MD_C_END

#endif
