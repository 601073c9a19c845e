/* buckets: see buckets.h. */
#include "mpi/buckets.h"

#include <stdlib.h>

typedef struct range {
    int64_t lo, hi; /* elements [lo, hi) of the flat block */
    int span;
} range;

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
static void find_ranges(const md_buckets_args *a, range *r)
{
    for (int i = 0; i < a->spans; i++)
        r[i] = (range){a->span[i].offset, a->span[i].offset + a->span[i].count, i};
    qsort(r, (size_t)a->spans, sizeof *r, by_address);
    for (int i = 0; i < a->spans; i++) {
        int64_t next = i + 1 < a->spans ? r[i + 1].lo : a->n;
        MD_ASSERT(r[i].lo >= 0 && r[i].hi > r[i].lo && r[i].hi <= next,
                  "span %d, elements [%lld, %lld), is empty or meets its neighbour at %lld",
                  r[i].span, (long long)r[i].lo, (long long)r[i].hi, (long long)next);
        if (next - r[i].hi < a->gap)
            r[i].hi = next;
    }
    qsort(r, (size_t)a->spans, sizeof *r, by_span);
}

static bool takes(const md_bucket *b, const range *r, int set, int64_t full)
{
    return b->set == set && b->hi - b->lo < full && (b->lo == r->hi || b->hi == r->lo);
}

/* Greedy: a range joins the newest bucket of its set that it touches and that is not full yet, else
 * opens one. Few buckets are open at once, one per run of falling or rising addresses. Numbers are
 * those of opening. */
static void fill(const md_buckets_args *a, const range *r, md_buckets *out)
{
    for (int i = 0; i < a->spans; i++) {
        int k = out->count - 1;
        while (k >= 0 && !takes(&out->bucket[k], &r[i], a->span[i].set, a->full))
            k--;
        if (k < 0) {
            k = out->count++;
            out->bucket[k] = (md_bucket){r[i].lo, r[i].hi, a->span[i].set, 0};
        }
        md_bucket *b = &out->bucket[k];
        *b = (md_bucket){MD_MIN(b->lo, r[i].lo), MD_MAX(b->hi, r[i].hi), b->set, b->spans + 1};
        out->of_span[i] = k;
    }
}

/* Renumbers the buckets by the span that completes them. */
static void order(md_buckets *out, md_bucket *opened, int *place)
{
    for (int k = 0; k < out->count; k++) {
        opened[k] = out->bucket[k];
        place[k] = -1;
    }
    int next = out->count;
    for (int i = out->spans - 1; i >= 0; i--) {
        int k = out->of_span[i];
        if (place[k] < 0) {
            place[k] = --next;
            out->bucket[next] = opened[k];
        }
        out->of_span[i] = place[k];
    }
}

md_status md_buckets_make(const md_buckets_args *args, md_buckets *out)
{
    size_t n = (size_t)MD_MAX(args->spans, 1); /* there are no more buckets than spans */
    range *r = md_alloc(n * sizeof *r, "gradient buckets");
    md_bucket *opened = md_alloc(n * sizeof *opened, "gradient buckets");
    int *place = md_alloc(n * sizeof *place, "gradient buckets");
    *out = (md_buckets){.spans = args->spans};
    out->bucket = md_alloc(n * sizeof *out->bucket, "gradient buckets");
    out->of_span = md_alloc(n * sizeof *out->of_span, "gradient buckets");
    md_status st = r && opened && place && out->bucket && out->of_span ? MD_OK : MD_ERR_MEMORY;
    if (st == MD_OK) {
        find_ranges(args, r);
        fill(args, r, out);
        order(out, opened, place);
    } else {
        md_buckets_free(out);
    }
    md_free(r);
    md_free(opened);
    md_free(place);
    return st;
}

void md_buckets_free(md_buckets *b)
{
    md_free(b->bucket);
    md_free(b->of_span);
    *b = (md_buckets){0};
}
