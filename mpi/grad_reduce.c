/* grad_reduce: see grad_reduce.h. Reductions and gathers go through one queue: buckets [0, done)
 * are complete, [done, begun) under way. */
#include "mpi/grad_reduce.h"

/* A message in shared memory moves by fragments, a few at each test, so that a bucket needs many
 * tests; one when there is nothing to move is a waste. A poll tests for at most this part of the
 * time since the last one. */
#define POLL_SHARE 0.02

struct md_grad_reduce {
    md_grad_reduce_args args;
    md_comm_request *request; /* [buckets] */
    int *waiting;             /* [buckets] spans not ready in this step */
    double *begun_at;         /* [buckets] */
    bool *ready;              /* [spans] */
    int left;                 /* spans not ready */
    int begun, done;
    float *value;                  /* block that is gathered; NULL: gradients are reduced */
    double waited, polled, closed; /* seconds; when the last poll ended, the last span was ready */
};

static md_comm *group_of(const md_grad_reduce *g, int k)
{
    return g->args.group[g->args.buckets->bucket[k].set];
}

static bool sharded(const md_grad_reduce *g, int k)
{
    return g->args.share && g->args.share_at[k] >= 0;
}

/* Memory of reduce-scatters under way, so that none is allocated during a step. */
static md_status reserve(md_grad_reduce *g)
{
    const md_buckets *b = g->args.buckets;
    for (int k = 0; k < b->count; k++) {
        int64_t n = b->bucket[k].hi - b->bucket[k].lo;
        if (!sharded(g, k))
            continue;
        MD_ASSERT(n % md_comm_size(group_of(g, k)) == 0, "%lld elements over %d ranks",
                  (long long)n, md_comm_size(group_of(g, k)));
        MD_TRY(md_comm_reserve(group_of(g, k), n * (int64_t)sizeof(float), MD_GRAD_REDUCE_FLYING));
    }
    return MD_OK;
}

md_status md_grad_reduce_create(const md_grad_reduce_args *args, md_grad_reduce **out)
{
    const md_buckets *b = args->buckets;
    const int n = MD_MAX(b->count, 1);
    md_grad_reduce *g;
    MD_NEW(g, 1, "gradient reduction");
    g->args = *args;
    g->begun = g->done = b->count; /* as after a finish */
    g->request = md_alloc((size_t)n * sizeof *g->request, "gradient reduction");
    g->waiting = md_alloc((size_t)n * sizeof *g->waiting, "gradient reduction");
    g->begun_at = md_alloc((size_t)n * sizeof *g->begun_at, "gradient reduction");
    g->ready = md_alloc((size_t)MD_MAX(b->spans, 1) * sizeof *g->ready, "gradient reduction");
    if (!g->request || !g->waiting || !g->begun_at || !g->ready) {
        md_grad_reduce_free(g);
        return MD_ERR_MEMORY;
    }
    for (int k = 0; k < b->count; k++)
        MD_ASSERT(group_of(g, k), "set %d has no group", b->bucket[k].set);
    md_status st = reserve(g);
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
    md_free(g->request);
    md_free(g->waiting);
    md_free(g->begun_at);
    md_free(g->ready);
    md_free(g);
}

double md_grad_reduce_begun(const md_grad_reduce *g, int k)
{
    return g->begun_at[k];
}

double md_grad_reduce_closed(const md_grad_reduce *g)
{
    return g->closed;
}

void md_grad_reduce_reset(md_grad_reduce *g)
{
    const md_buckets *b = g->args.buckets;
    MD_ASSERT(g->done == b->count && !g->value, "%d of %d buckets are still under way",
              b->count - g->done, b->count);
    for (int k = 0; k < b->count; k++)
        g->waiting[k] = b->bucket[k].spans;
    for (int i = 0; i < b->spans; i++)
        g->ready[i] = false;
    g->left = b->spans;
    g->begun = g->done = 0;
    g->waited = 0;
}

static void begin(md_grad_reduce *g, int k)
{
    const md_bucket *b = &g->args.buckets->bucket[k];
    const int64_t n = b->hi - b->lo;
    md_comm *c = group_of(g, k);
    md_comm_request *r = &g->request[k];
    if (!g->value)
        g->begun_at[k] = md_now();
    if (g->value && sharded(g, k))
        md_comm_allgather_begin(c, g->value + b->lo, n / md_comm_size(c) * (int64_t)sizeof(float),
                                r);
    else if (!g->value && sharded(g, k))
        md_comm_reduce_scatter_begin(c, g->args.flat + b->lo, g->args.share + g->args.share_at[k],
                                     n, MD_F32, r);
    else if (!g->value)
        md_comm_allreduce_begin(c, g->args.flat + b->lo, n, MD_F32, MD_SUM, r);
}

/* Starts the next buckets that are complete, as far as few enough are under way. */
static void begin_complete(md_grad_reduce *g)
{
    for (; g->begun < g->args.buckets->count && g->waiting[g->begun] == 0 &&
           g->begun - g->done < MD_GRAD_REDUCE_FLYING;
         g->begun++)
        begin(g, g->begun);
}

static void wait_oldest(md_grad_reduce *g)
{
    double start = md_now();
    md_comm_wait(group_of(g, g->done), &g->request[g->done]);
    g->done++;
    g->waited += md_now() - start;
}

void md_grad_reduce_ready(md_grad_reduce *g, int i)
{
    MD_ASSERT(i >= 0 && i < g->args.buckets->spans && !g->ready[i], "span %d of %d", i,
              g->args.buckets->spans);
    g->ready[i] = true;
    if (--g->left == 0)
        g->closed = md_now();
    g->waiting[g->args.buckets->of_span[i]]--;
    if (!g->args.overlap)
        return;
    md_grad_reduce_poll(g);
    while (g->left == 0 && g->begun < g->args.buckets->count) {
        wait_oldest(g);
        begin_complete(g);
    }
}

void md_grad_reduce_poll(md_grad_reduce *g)
{
    enum { TESTS = 16 }; /* between looks at the clock */
    const bool more = g->args.overlap || g->value;
    const double start = md_now(), end = start + POLL_SHARE * MD_MIN(start - g->polled, 1.0);
    do {
        for (int i = 0; i < TESTS && g->done < g->begun; i++) {
            if (!md_comm_poll(group_of(g, g->done), &g->request[g->done], 1))
                continue;
            md_comm_wait(group_of(g, g->done), &g->request[g->done]);
            g->done++;
            if (more)
                begin_complete(g);
        }
    } while (g->done < g->begun && md_now() < end);
    if (more)
        begin_complete(g);
    g->polled = md_now();
}

static void finish(md_grad_reduce *g)
{
    while (g->done < g->args.buckets->count) {
        begin_complete(g);
        wait_oldest(g);
    }
}

double md_grad_reduce_finish(md_grad_reduce *g)
{
    for (int i = 0; i < g->args.buckets->spans; i++)
        MD_ASSERT(g->ready[i], "no gradient came for span %d of %d", i, g->args.buckets->spans);
    finish(g);
    return g->waited;
}

void md_grad_reduce_gather(md_grad_reduce *g, float *value)
{
    MD_ASSERT(g->done == g->args.buckets->count && !g->value, "gradients are still under way");
    g->value = value;
    g->begun = g->done = 0; /* every bucket is complete: none waits for a span */
    g->waited = 0;
    begin_complete(g);
}

double md_grad_reduce_gather_finish(md_grad_reduce *g)
{
    if (!g->value)
        return 0;
    finish(g);
    g->value = NULL;
    return g->waited;
}
