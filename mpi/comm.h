/* comm: collectives on one group of ranks. Nothing above mpi/ knows what carries them: one rank
 * alone (comm_self), MPI on host buffers (comm_mpi), later NCCL.
 *
 * Every function is Collective over the group of `c` unless it says Local; all ranks must call in
 * the same order with the same count, type and operation. Only the thread that started MPI calls.
 * Sums are reduced in an order that depends on the group's size only, so the same layout gives the
 * same bits. Errors inside a collective are not recoverable: they are reported and end the job
 * (MD_ERR_DEVICE). */
#ifndef MD_COMM_H
#define MD_COMM_H

#include "src/tensor.h"

typedef struct md_comm md_comm;

typedef enum md_reduce { MD_SUM, MD_MAX_OP, MD_MIN_OP } md_reduce;

/* A collective under way. Zero-initialise; one request carries one collective at a time. */
typedef struct md_comm_request {
    void *impl[4];
} md_comm_request;

/* "Open MPI v4.1.4": the MPI library loaded. Local; also before MPI is started. */
const char *md_comm_library(void);

/* A group of one rank: every collective is the identity. Local. */
md_status md_comm_self(md_comm **out);
/* Frees a group made by md_comm_self or md_comm_split*, with its shared blocks; the world group
 * goes with md_mpi_stop. NULL is fine. */
void md_comm_free(md_comm *c);

/* Rank in the group and its size. Local. */
int md_comm_rank(const md_comm *c);
int md_comm_size(const md_comm *c);

/* Sub-group of the ranks with the same colour, ordered by key. */
md_status md_comm_split(md_comm *c, int colour, int key, md_comm **out);
/* Sub-group of the ranks that share this rank's node (memory). */
md_status md_comm_split_node(md_comm *c, md_comm **out);

void md_comm_barrier(md_comm *c);
/* In place on host memory: n elements of dtype F32, F64, I32, I64 or U8. */
void md_comm_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op);
void md_comm_bcast(md_comm *c, void *buf, int64_t bytes, int root);
/* Gathers `bytes` bytes of every rank into recv[size * bytes] in rank order. */
void md_comm_allgather(md_comm *c, const void *send, void *recv, int64_t bytes);
/* recv gets this rank's 1/size part of the sum of all send[n]; n divides by size. */
void md_comm_reduce_scatter(md_comm *c, const float *send, float *recv, int64_t n);
/* Exclusive prefix sum of one int64; rank 0 gets 0. */
int64_t md_comm_exscan(md_comm *c, int64_t value);

/* Non-blocking forms: buf must stay untouched until md_comm_wait; at most 2^30 elements.
 * md_comm_poll lets n pending collectives advance without blocking (Local, microseconds) and
 * returns true when all are done; md_comm_wait is still due and then returns at once. Waiting on an
 * idle request is fine. */
void md_comm_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                             md_comm_request *req);
bool md_comm_poll(md_comm *c, md_comm_request *req, int n);
void md_comm_wait(md_comm *c, md_comm_request *req);

/* Bytes this rank has handed to collectives of this group so far. Local. */
int64_t md_comm_bytes(const md_comm *c);

/* One block of memory that all ranks of a node map: `bytes` zeroed bytes allocated on group rank 0.
 * c must come from md_comm_split_node (or be a self group). Freed with the group. */
md_status md_comm_shared(md_comm *c, size_t bytes, void **out);

#endif
