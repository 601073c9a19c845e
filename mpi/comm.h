/* comm: collectives on one group of ranks. Nothing above mpi/ knows what carries them: one rank
 * alone (comm_self), MPI on host buffers (comm_mpi), nothing at all (comm_plan), and for buffers
 * that are operands of a backend NCCL (comm_nccl) or MPI through host memory (comm_staged).
 *
 * Every function is Collective over the group of `c` unless it says Local; all ranks must call in
 * the same order with the same count, type and operation. Only the thread that started MPI calls.
 * Sums are reduced in an order that depends on the group's size only, so the same layout gives the
 * same bits. Errors inside a collective are not recoverable: they are reported and end the job
 * (MD_ERR_DEVICE). */
#ifndef MD_COMM_H
#define MD_COMM_H

#include "src/tensor.h"

MD_C_BEGIN

typedef struct md_comm md_comm;

typedef enum md_reduce { MD_SUM, MD_MAX_OP, MD_MIN_OP } md_reduce;

/* A collective under way. Zero-initialise; one request carries one collective at a time. */
typedef struct md_comm_request {
    void *impl[4];
    void *work; /* the carrier's memory for it */
} md_comm_request;

/* What this rank has handed to the collectives of one group. */
typedef struct md_comm_count {
    int64_t calls;
    int64_t bytes; /* of the buffers; an all-gather's is the rank's own part */
    double sent;   /* bytes this rank sends by the algorithms that send least; see comm.c */
} md_comm_count;

/* "Open MPI v4.1.4": the MPI library loaded. Local; also before MPI is started. */
const char *md_comm_library(void);

/* A group of one rank: every collective is the identity. Local. */
md_status md_comm_self(md_comm **out);
/* Rank `rank` of a group of `size` that carries nothing and only counts, for planning without MPI.
 * Collectives leave the buffers alone, which may be NULL; md_comm_exscan gives 0. Splitting it or
 * sharing memory in it is a bug. Local. MD_ERR_MEMORY. */
md_status md_comm_plan(int rank, int size, md_comm **out);
/* Frees a group made by md_comm_self, md_comm_plan or md_comm_split*, with its shared blocks; the
 * world group goes with md_mpi_stop. NULL is fine. */
void md_comm_free(md_comm *c);

/* Rank in the group and its size. Local. */
int md_comm_rank(const md_comm *c);
int md_comm_size(const md_comm *c);

/* Sub-group of the ranks with the same colour, ordered by key. */
md_status md_comm_split(md_comm *c, int colour, int key, md_comm **out);
/* Sub-group of the ranks that share this rank's node (memory). */
md_status md_comm_split_node(md_comm *c, md_comm **out);

void md_comm_barrier(md_comm *c);
/* In place: n elements of dtype F32, BF16, F64, I32, I64 or U8. Over MPI a sum of bf16 is rounded
 * after each of its size - 1 additions, which are made in f32. */
void md_comm_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op);
void md_comm_bcast(md_comm *c, void *buf, int64_t bytes, int root);
/* Gathers `bytes` bytes of every rank into recv[size * bytes] in rank order. In place when send is
 * recv + rank * bytes; else the two may not overlap. */
void md_comm_allgather(md_comm *c, const void *send, void *recv, int64_t bytes);
/* recv gets this rank's 1/size part of the sum of all send[n]; n divides by size. F32, BF16,
 * F64, I32 or I64. recv may not overlap send, except in a group of one. */
void md_comm_reduce_scatter(md_comm *c, const void *send, void *recv, int64_t n, md_dtype dtype);
/* Hands out rows of `row` bytes: the first to[0] rows of send go to rank 0, the next to[1] to rank
 * 1 and so on; recv gets from[0] rows of rank 0, then from[1] of rank 1. to and from hold a number,
 * below 2^31 in all, for every rank. Buffers in host memory only: not over comm_nccl and
 * comm_staged. */
void md_comm_alltoallv(md_comm *c, const void *send, const int64_t *to, void *recv,
                       const int64_t *from, int64_t row);
/* Exclusive prefix sum of one int64; rank 0 gets 0. */
int64_t md_comm_exscan(md_comm *c, int64_t value);

/* Non-blocking forms: the buffers must stay untouched until md_comm_wait; at most 2^30 elements,
 * in an all-gather 2^30 bytes a rank. md_comm_poll lets n pending collectives advance without
 * blocking (Local, microseconds; it also adds up a reduce-scatter whose parts have all come) and
 * returns true when all are done; md_comm_wait is still due and then returns at once. Waiting on an
 * idle request is fine. A reduce-scatter gives the same bits in both forms. */
void md_comm_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                             md_comm_request *req);
/* In place: buf holds size parts of `bytes` bytes, of which part `rank` is this rank's. */
void md_comm_allgather_begin(md_comm *c, void *buf, int64_t bytes, md_comm_request *req);
void md_comm_reduce_scatter_begin(md_comm *c, const void *send, void *recv, int64_t n,
                                  md_dtype dtype, md_comm_request *req);
bool md_comm_poll(md_comm *c, md_comm_request *req, int n);
void md_comm_wait(md_comm *c, md_comm_request *req);

/* A reduce-scatter under way keeps the parts of all ranks, n elements, in memory that later ones
 * use again. Sees to it that `requests` of up to `bytes` bytes can be under way without begin
 * having to allocate. Local. MD_ERR_MEMORY: what was made stays. */
md_status md_comm_reserve(md_comm *c, int64_t bytes, int requests);

/* What this rank has handed to collectives of this group so far. Local. */
md_comm_count md_comm_counted(const md_comm *c);

/* One block of memory that all ranks of a node map: `bytes` zeroed bytes allocated on group rank 0.
 * c must come from md_comm_split_node (or be a self group). Freed with the group. */
md_status md_comm_shared(md_comm *c, size_t bytes, void **out);

MD_C_END

#endif
