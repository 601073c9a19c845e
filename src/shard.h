/* shard: which elements of the flat blocks this rank updates and which it answers for; and the
 * buckets in which gradients travel. Found from sizes and ranks alone, so that a plan without MPI
 * and a run cannot differ.
 *
 * A parameter's gradient is summed over the ranks that hold the same of it and saw other images: dp
 * for a cut row and for one whose gradient is the same on all ranks of tp; all ranks where each
 * rank's gradient is a part of the sum over tp (MD_PARTIAL). With ZeRO-1 (Rajbhandari et al. 2020)
 * these ranks also divide the bucket's elements: each keeps moments for its share, updates it, and
 * the shares of the values are gathered.
 *
 * Every element is answered for (counted in the norm, written to checkpoints) by exactly one rank
 * of those that hold it. */
#ifndef MD_SHARD_H
#define MD_SHARD_H

#include "mpi/buckets.h"
#include "mpi/topo.h"
#include "src/graph.h"

typedef struct md_shard {
    md_buckets buckets;
    int *span_of;      /* [params] span of each parameter */
    int64_t *share_at; /* [buckets] see md_grad_reduce_args */
    md_piece *update;  /* [updates] what this rank updates */
    md_piece *own;     /* [owns] what it answers for: of `update`, a part that no other rank has */
    int updates, owns;
    int64_t moments; /* elements of m and v on this rank */
    bool zero;       /* some bucket is sharded */
} md_shard;

typedef struct md_shard_args {
    const md_graph *graph; /* the finished training graph; its registry is sealed */
    const md_topo *topo;
    bool zero;
    int64_t bucket_bytes;
} md_shard_args;

/* Elements that registry rows are aligned to, so that every bucket divides over its group. */
int64_t md_shard_align(const md_topo *topo, bool zero);

/* Local. MD_ERR_MEMORY. A parameter that the graph does not differentiate is a bug. */
md_status md_shard_make(const md_shard_args *args, md_shard *out);
void md_shard_free(md_shard *s);

/* The ranks over which the gradients of a bucket's set are summed, and shared under ZeRO. Local. */
md_comm *md_shard_group(const md_topo *topo, int set);

/* Elements [*lo, *lo + count) of row `row` that lie in one of the n pieces; returns count, 0 when
 * none does. *moment is where the first of them lies in m and v. A row meets one piece at most. */
int64_t md_shard_find(const md_piece *piece, int n, const md_param *row, int64_t *lo,
                      int64_t *moment);

#endif
