/* grad_reduce: see grad_reduce.h. */
#include "mpi/grad_reduce.h"

#include <stdlib.h>

/* Alignment gaps of fewer elements belong to the span before them, so that neighbours touch. */
#define MAX_GAP 64

typedef struct range {
    int64_t lo, hi; /* elements [lo, hi) of the flat block */
    int span;
} range;

typedef struct bucket {
    int64_t lo, hi;
    int spans, waiting; /* spans in it, and those not ready in this step */
} bucket;

struct md_grad_reduce {
    md_comm *dp;
    float *flat;
    bool overlap;
    int spans, buckets;
    bucket *bucket;           /* in starting order */
    md_comm_request *request; /* one per bucket */
    int *bucket_of;           /* [spans] */
    bool *ready;              /* [spans] */
    int begun, done;          /* buckets [0, begun) are started, [0, done) known to be complete */
};

static int by_address(const void *a, const void *b)
{
    int64_t x = ((const range *)a)->lo, y = ((const range *)b)->lo;
    return (x > y) - (x < y);
}

static int by_span(const void *a, const void *b)
{
    return ((const range *)a)->span - ((const range *)b)->span;
}

/* The spans as ranges that include the gap behind them, in the caller's order. */
static void find_ranges(const md_grad_reduce_args *a, range *r)
{
    for (int i = 0; i < a->spans; i++)
        r[i] = (range){a->span[i].offset, a->span[i].offset + a->span[i].count, i};
    qsort(r, (size_t)a->spans, sizeof *r, by_address);
    for (int i = 0; i < a->spans; i++) {
        int64_t next = i + 1 < a->spans ? r[i + 1].lo : a->n;
        MD_ASSERT(r[i].lo >= 0 && r[i].hi > r[i].lo && r[i].hi <= next,
                  "span %d, elements [%lld, %lld), is empty or meets its neighbour at %lld",
                  r[i].span, (long long)r[i].lo, (long long)r[i].hi, (long long)next);
        if (next - r[i].hi < MAX_GAP)
            r[i].hi = next;
    }
    qsort(r, (size_t)a->spans, sizeof *r, by_span);
}

/* Greedy: a range joins the newest bucket it touches that is not full yet, else opens one. Few
 * buckets are open at once, one per run of falling or rising addresses. Numbers are those of
 * opening. */
static void fill_buckets(md_grad_reduce *g, const range *r, int64_t full)
{
    for (int i = 0; i < g->spans; i++) {
        int k = g->buckets - 1;
        while (k >= 0 && (g->bucket[k].hi - g->bucket[k].lo >= full ||
                          (g->bucket[k].lo != r[i].hi && g->bucket[k].hi != r[i].lo)))
            k--;
        if (k < 0) {
            k = g->buckets++;
            g->bucket[k] = (bucket){r[i].lo, r[i].hi, 0, 0};
        }
        bucket *b = &g->bucket[k];
        *b = (bucket){MD_MIN(b->lo, r[i].lo), MD_MAX(b->hi, r[i].hi), b->spans + 1, 0};
        g->bucket_of[i] = k;
    }
}

/* Renumbers the buckets by the span that completes them: the order in which they can start. */
static void order_buckets(md_grad_reduce *g, bucket *sorted, int *place)
{
    for (int k = 0; k < g->buckets; k++)
        place[k] = -1;
    int next = g->buckets;
    for (int i = g->spans - 1; i >= 0; i--) {
        int k = g->bucket_of[i];
        if (place[k] < 0) {
            place[k] = --next;
            sorted[next] = g->bucket[k];
        }
        g->bucket_of[i] = place[k];
    }
}

static md_status allocate(md_grad_reduce *g, range **ranges, bucket **sorted, int **place)
{
    int n = MD_MAX(g->spans, 1); /* there are no more buckets than spans */
    MD_NEW(g->bucket, n, "gradient buckets");
    MD_NEW(g->request, n, "gradient buckets");
    MD_NEW(g->bucket_of, n, "gradient buckets");
    MD_NEW(g->ready, n, "gradient buckets");
    MD_NEW(*ranges, n, "gradient buckets");
    MD_NEW(*sorted, n, "gradient buckets");
    MD_NEW(*place, n, "gradient buckets");
    return MD_OK;
}

md_status md_grad_reduce_create(const md_grad_reduce_args *args, md_grad_reduce **out)
{
    range *ranges = NULL;
    bucket *sorted = NULL;
    int *place = NULL;
    md_grad_reduce *g;
    MD_NEW(g, 1, "gradient buckets");
    *g = (md_grad_reduce){
        .dp = args->dp, .flat = args->flat, .overlap = args->overlap, .spans = args->spans};
    md_status st = allocate(g, &ranges, &sorted, &place);
    if (st == MD_OK) {
        find_ranges(args, ranges);
        fill_buckets(g, ranges, args->bucket_bytes / (int64_t)sizeof(float));
        order_buckets(g, sorted, place);
        bucket *opened = g->bucket;
        g->bucket = sorted;
        sorted = opened;
        g->begun = g->done = g->buckets; /* as after a finish */
    }
    md_free(ranges);
    md_free(sorted);
    md_free(place);
    if (st != MD_OK) {
        md_grad_reduce_free(g);
        return st;
    }
    *out = g;
    return MD_OK;
}

void md_grad_reduce_free(md_grad_reduce *g)
{
    if (!g)
        return;
    md_free(g->bucket);
    md_free(g->request);
    md_free(g->bucket_of);
    md_free(g->ready);
    md_free(g);
}

int md_grad_reduce_buckets(const md_grad_reduce *g)
{
    return g->buckets;
}

void md_grad_reduce_bucket(const md_grad_reduce *g, int k, int64_t *offset, int64_t *count)
{
    *offset = g->bucket[k].lo;
    *count = g->bucket[k].hi - g->bucket[k].lo;
}

void md_grad_reduce_reset(md_grad_reduce *g)
{
    MD_ASSERT(g->done == g->buckets, "%d of %d buckets of the last step are not finished",
              g->buckets - g->done, g->buckets);
    for (int k = 0; k < g->buckets; k++)
        g->bucket[k].waiting = g->bucket[k].spans;
    for (int i = 0; i < g->spans; i++)
        g->ready[i] = false;
    g->begun = g->done = 0;
}

/* Starts the next buckets that are complete, as far as few enough are under way. */
static void begin_complete(md_grad_reduce *g)
{
    for (; g->begun < g->buckets && g->bucket[g->begun].waiting == 0 &&
           g->begun - g->done < MD_GRAD_REDUCE_FLYING;
         g->begun++) {
        const bucket *b = &g->bucket[g->begun];
        md_comm_allreduce_begin(g->dp, g->flat + b->lo, b->hi - b->lo, MD_F32, MD_SUM,
                                &g->request[g->begun]);
    }
}

void md_grad_reduce_ready(md_grad_reduce *g, int i)
{
    MD_ASSERT(i >= 0 && i < g->spans && !g->ready[i], "span %d of %d", i, g->spans);
    g->ready[i] = true;
    g->bucket[g->bucket_of[i]].waiting--;
    if (!g->overlap)
        return;
    md_grad_reduce_poll(g);
}

void md_grad_reduce_poll(md_grad_reduce *g)
{
    while (g->done < g->begun && md_comm_poll(g->dp, &g->request[g->done], 1))
        md_comm_wait(g->dp, &g->request[g->done++]);
    if (g->overlap)
        begin_complete(g);
}

double md_grad_reduce_finish(md_grad_reduce *g)
{
    for (int i = 0; i < g->spans; i++)
        MD_ASSERT(g->ready[i], "no gradient came for span %d of %d", i, g->spans);
    double start = md_now();
    while (g->done < g->buckets) {
        begin_complete(g);
        md_comm_wait(g->dp, &g->request[g->done++]);
    }
    return md_now() - start;
}
