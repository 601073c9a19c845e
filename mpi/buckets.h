/* buckets: which parameters' gradients travel together. Planned from sizes alone, the same on every
 * rank, so that a plan without MPI and the reduction itself cannot differ.
 *
 * A bucket is an address range of the flat block that collects neighbouring spans of one set in the
 * order in which backward completes them, until it holds `full` elements. Gaps between spans
 * smaller than `gap` (alignment) belong to the span before them, so that neighbours touch. Buckets
 * are numbered by the span that completes them: the order in which they can start. */
#ifndef MD_BUCKETS_H
#define MD_BUCKETS_H

#include "src/base.h"

/* One parameter's gradient: elements [offset, offset + count) of the flat block. Only spans of one
 * set (one group of ranks, one kind of update) share a bucket. */
typedef struct md_grad_span {
    int64_t offset, count;
    int set;
} md_grad_span;

typedef struct md_bucket {
    int64_t lo, hi; /* elements [lo, hi) of the flat block */
    int set, spans;
} md_bucket;

typedef struct md_buckets {
    md_bucket *bucket; /* [count] in starting order */
    int *of_span;      /* [spans] */
    int count, spans;
} md_buckets;

typedef struct md_buckets_args {
    const md_grad_span *span; /* in the order in which backward completes them */
    int spans;
    int64_t n;    /* elements of the flat block */
    int64_t full; /* elements from which on a bucket takes no more spans */
    int64_t gap;
} md_buckets_args;

/* Local. MD_ERR_MEMORY. Spans that overlap or leave the block are a bug of the caller. */
md_status md_buckets_make(const md_buckets_args *args, md_buckets *out);
void md_buckets_free(md_buckets *b);

#endif
