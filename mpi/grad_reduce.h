/* grad_reduce: sums one flat gradient block over the data-parallel group while backward goes on.
 *
 * The block is cut into buckets: address ranges that collect neighbouring parameters in the order
 * in which backward completes them, until they hold bucket_bytes. A bucket's all-reduce starts when
 * its last gradient is ready and all earlier buckets have started; the order of starts is thus the
 * same on every rank whatever the order of readiness. Small gaps between parameters (alignment) are
 * summed along. Whether reductions overlap backward changes when they start, never the result's
 * bits.
 *
 * A step: reset, then ready(i) for every span, poll now and then, finish. With accumulation only
 * the last micro-batch does this. Nothing allocates after create. The sum is not divided: the
 * caller scales the loss. */
#ifndef MD_GRAD_REDUCE_H
#define MD_GRAD_REDUCE_H

#include "mpi/comm.h"

/* Buckets under way at once: MPI keeps a copy of each, which must not grow with the model. */
#define MD_GRAD_REDUCE_FLYING 4

typedef struct md_grad_reduce md_grad_reduce;

/* One parameter's gradient: elements [offset, offset + count) of the flat block. */
typedef struct md_grad_span {
    int64_t offset, count;
} md_grad_span;

typedef struct md_grad_reduce_args {
    md_comm *dp; /* kept, not owned; the caller frees it after the reducer */
    float *flat; /* [n] host memory, kept, not owned */
    int64_t n;
    const md_grad_span *span; /* in the order in which backward is expected to complete them */
    int spans;
    int64_t bucket_bytes;
    bool overlap; /* start reductions during backward, else all of them in finish */
} md_grad_reduce_args;

/* Local; all ranks of dp must pass equal spans and bucket size. MD_ERR_MEMORY. Spans that overlap
 * or leave the block are a bug of the caller. */
md_status md_grad_reduce_create(const md_grad_reduce_args *args, md_grad_reduce **out);
void md_grad_reduce_free(md_grad_reduce *g);

/* Number of buckets, and elements [*offset, *offset + *count) of bucket k in starting order. Local.
 */
int md_grad_reduce_buckets(const md_grad_reduce *g);
void md_grad_reduce_bucket(const md_grad_reduce *g, int k, int64_t *offset, int64_t *count);

/* Begins a step. The step before must have been finished. Local. */
void md_grad_reduce_reset(md_grad_reduce *g);
/* The gradient of span i is final on this rank; it must not be touched until finish. Once a step
 * and span, in any order. Starts what can start; does not wait. Collective(dp) in the sense that
 * all ranks reach finish. */
void md_grad_reduce_ready(md_grad_reduce *g, int i);
/* Lets reductions under way advance. Local, microseconds. */
void md_grad_reduce_poll(md_grad_reduce *g);
/* Collective(dp). Waits until the whole block holds sums; returns the seconds this rank waited.
 * Every span must be ready: a missing one is a bug and named. */
double md_grad_reduce_finish(md_grad_reduce *g);

#endif
