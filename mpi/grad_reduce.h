/* grad_reduce: sums one flat gradient block over groups of ranks while backward goes on, bucket by
 * bucket (mpi/buckets.h).
 *
 * A bucket's reduction starts when its last gradient is ready and all earlier buckets have started;
 * the order of starts is thus the same on every rank whatever the order of readiness. Whether
 * reductions overlap backward changes when they start, never the result's bits.
 *
 * Plain: every rank of the bucket's group gets the whole sum, in place. Sharded (ZeRO-1): each rank
 * gets the sum of its share, the rank-th of equal parts of the bucket; after the update the shares
 * of the parameters are gathered, bucket by bucket, while other work goes on.
 *
 * A step: reset, then ready(i) for every span, poll now and then, finish; sharded: later gather,
 * poll now and then, gather_finish. With accumulation only the last micro-batch does this. Nothing
 * allocates after create. The sum is not divided: the caller scales the loss. */
#ifndef MD_GRAD_REDUCE_H
#define MD_GRAD_REDUCE_H

#include "mpi/buckets.h"
#include "mpi/comm.h"

/* Buckets under way at once: MPI keeps a copy of each, which must not grow with the model. */
#define MD_GRAD_REDUCE_FLYING 4
#define MD_GRAD_SETS          8 /* numbers of span sets are below */

typedef struct md_grad_reduce md_grad_reduce;

typedef struct md_grad_reduce_args {
    const md_buckets *buckets;    /* kept, not owned */
    md_comm *group[MD_GRAD_SETS]; /* of each set that occurs; used by nothing else meanwhile */
    float *flat;                  /* gradients, host memory, kept, not owned */
    float *share;                 /* sharded: this rank's sums, else NULL */
    const int64_t *share_at;      /* [buckets] a bucket's first element in share; -1: not sharded,
                                     its sum stays in flat. Kept, not owned */
    bool overlap;                 /* start during backward, else all of them in finish */
} md_grad_reduce_args;

/* Local; all ranks of a group must pass equal buckets. A sharded bucket's length is a multiple of
 * its group's size. MD_ERR_MEMORY. */
md_status md_grad_reduce_create(const md_grad_reduce_args *args, md_grad_reduce **out);
void md_grad_reduce_free(md_grad_reduce *g);

/* Begins a step. The step before must have been finished. Local. */
void md_grad_reduce_reset(md_grad_reduce *g);
/* The gradient of span i is final on this rank; it must not be touched until finish. Once a step
 * and span, in any order. Starts what can start; the last span of all starts every bucket that is
 * left, and waits for earlier ones if too many are under way. Collective(groups) in the sense that
 * all ranks reach finish. */
void md_grad_reduce_ready(md_grad_reduce *g, int i);
/* Lets what is under way advance, for at most a fiftieth of the time since the last call. Local. */
void md_grad_reduce_poll(md_grad_reduce *g);
/* Collective(groups). Waits until all sums are there; returns the seconds this rank has waited
 * since reset. Every span must be ready: a missing one is a bug and named. */
double md_grad_reduce_finish(md_grad_reduce *g);

/* Sharded only. Begins to gather the shares of `value`, a flat block like that of the gradients, in
 * place; it must not be touched before gather_finish. Collective(groups). */
void md_grad_reduce_gather(md_grad_reduce *g, float *value);
/* Collective(groups). Waits until every rank has all of it; returns the seconds waited. Fine when
 * nothing is under way. */
double md_grad_reduce_gather_finish(md_grad_reduce *g);

/* When the reduction of bucket k was started last, as md_now() has it. Local, for traces. */
double md_grad_reduce_begun(const md_grad_reduce *g, int k);
/* When the last span of all became ready, before anything was waited for. Local, for traces. */
double md_grad_reduce_closed(const md_grad_reduce *g);

#endif
