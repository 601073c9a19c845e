/* Bucketed sums against one big sum, whole and sharded: random spans, sets, bucket sizes and orders
 * of readiness. */
#include "tests/par/par_main.h"

#include "mpi/grad_reduce.h"

enum { MAX_SPANS = 60, MAX_N = 20000 };

typedef struct layout {
    int64_t n;
    int spans;
    md_grad_span span[MAX_SPANS];
    int order[MAX_SPANS]; /* readiness */
} layout;

static uint32_t draw_state;
static int draw(int below)
{
    draw_state = draw_state * 1664525u + 1013904223u;
    return (int)((draw_state >> 8) % (uint32_t)below);
}

/* Two groups of parameters with alignment gaps, both completed from the top down as backward does,
 * interleaved at random; with `shuffle` in any order at all. */
static void make_layout(layout *l, uint32_t seed, bool shuffle, int align)
{
    draw_state = seed;
    md_grad_span part[2][MAX_SPANS];
    int count[2], taken[2] = {0, 0};
    int64_t at = align > 1 ? 0 : draw(100);
    for (int g = 0; g < 2; g++) {
        count[g] = 1 + draw(MAX_SPANS / 2);
        for (int i = 0; i < count[g]; i++) {
            int64_t n = 1 + draw(g ? 40 : 300);
            part[g][i] = (md_grad_span){at, n, draw(4) == 0};
            at += align > 1 ? (n + align - 1) / align * align : n + draw(3) * draw(40);
        }
    }
    l->n = align > 1 ? at : at + draw(200);
    assert_true(l->n <= MAX_N);
    l->spans = count[0] + count[1];
    for (int i = 0; i < l->spans; i++) {
        int g = taken[0] == count[0] ? 1 : taken[1] == count[1] ? 0 : draw(2);
        l->span[i] = part[g][count[g] - 1 - taken[g]++];
        l->order[i] = i;
    }
    for (int i = l->spans - 1; shuffle && i > 0; i--) {
        int j = draw(i + 1), t = l->order[i];
        l->order[i] = l->order[j];
        l->order[j] = t;
    }
}

static void fill(float *x, const layout *l, int rank)
{
    for (int64_t i = 0; i < l->n; i++)
        x[i] = -1.0f; /* what is outside of all spans may or may not be summed */
    for (int s = 0; s < l->spans; s++)
        for (int64_t i = 0; i < l->span[s].count; i++)
            x[l->span[s].offset + i] = (float)((l->span[s].offset + i) % 97 + rank * 1000);
}

/* One step on one reducer; gradients that are not ready yet hold a value that must never be summed.
 */
static void run_step(md_grad_reduce *g, const layout *l, float *x, const float *mine)
{
    for (int64_t i = 0; i < l->n; i++)
        x[i] = 1e9f;
    md_grad_reduce_reset(g);
    for (int i = 0; i < l->spans; i++) {
        const md_grad_span *s = &l->span[l->order[i]];
        memcpy(x + s->offset, mine + s->offset, (size_t)s->count * sizeof *x);
        md_grad_reduce_ready(g, l->order[i]);
        if (draw(2))
            md_grad_reduce_poll(g);
    }
    assert_true(md_grad_reduce_finish(g) >= 0);
}

enum { GAP = 64 };

static void check_buckets(const md_buckets *b, const layout *l, int64_t bytes)
{
    static int seen[MAX_N];
    memset(seen, 0, sizeof seen);
    for (int k = 0; k < b->count; k++) {
        int64_t at = b->bucket[k].lo, n = b->bucket[k].hi - at;
        assert_true(at >= 0 && n > 0 && at + n <= l->n);
        assert_true((n - 300 - GAP) * (int64_t)sizeof(float) < bytes);
        for (int64_t i = at; i < at + n; i++)
            assert_int_equal(seen[i]++, 0);
    }
    for (int s = 0; s < l->spans; s++) {
        assert_int_equal(b->bucket[b->of_span[s]].set, l->span[s].set);
        for (int64_t i = 0; i < l->span[s].count; i++)
            assert_int_equal(seen[l->span[s].offset + i], 1);
    }
}

static const int64_t sizes[] = {1, 400, 4000, 1 << 20};

static void plan(const layout *l, uint32_t seed, md_buckets *out)
{
    const int64_t bytes = sizes[seed % 4];
    assert_ok(md_buckets_make(&(md_buckets_args){.span = l->span,
                                                 .spans = l->spans,
                                                 .n = l->n,
                                                 .full = bytes / (int64_t)sizeof(float),
                                                 .gap = GAP},
                              out));
    check_buckets(out, l, bytes);
}

/* Readiness may differ between ranks: the starts must not. */
static void shuffle_layout(layout *l, uint32_t seed, int rank, int align)
{
    make_layout(l, seed, true, align);
    for (int r = 0; r <= rank; r++) {
        int t = l->order[0], j = draw(l->spans);
        l->order[0] = l->order[j];
        l->order[j] = t;
    }
}

static void check_case(md_comm *dp, uint32_t seed, bool shuffle, bool overlap)
{
    static float x[MAX_N], mine[MAX_N], want[MAX_N];
    layout l;
    md_buckets buckets;
    make_layout(&l, seed, false, 1);
    fill(mine, &l, md_comm_rank(dp));
    memcpy(want, mine, sizeof want);
    md_comm_allreduce(dp, want, l.n, MD_F32, MD_SUM);
    plan(&l, seed, &buckets);
    md_grad_reduce *g;
    assert_ok(md_grad_reduce_create(
        &(md_grad_reduce_args){
            .buckets = &buckets, .group = {dp, dp}, .flat = x, .overlap = overlap},
        &g));
    for (int step = 0; step < 2; step++) {
        if (shuffle)
            shuffle_layout(&l, seed, md_comm_rank(dp), 1);
        run_step(g, &l, x, mine);
        for (int s = 0; s < l.spans; s++)
            assert_memory_equal(x + l.span[s].offset, want + l.span[s].offset,
                                (size_t)l.span[s].count * sizeof *x);
    }
    md_grad_reduce_free(g);
    md_buckets_free(&buckets);
}

/* Set 0 is sharded over `dp`, set 1 too unless `half`: every rank gets its share of the sums; then
 * shares of values travel back. */
static void check_sharded(md_comm *dp, uint32_t seed, bool half)
{
    static float x[MAX_N], mine[MAX_N], want[MAX_N], share[MAX_N], value[MAX_N];
    static int64_t at[2 * MAX_SPANS];
    const int size = md_comm_size(dp), rank = md_comm_rank(dp);
    layout l;
    md_buckets buckets;
    make_layout(&l, seed, false, 12);
    fill(mine, &l, rank);
    memcpy(want, mine, sizeof want);
    md_comm_allreduce(dp, want, l.n, MD_F32, MD_SUM);
    plan(&l, seed, &buckets);
    int64_t used = 0;
    for (int k = 0; k < buckets.count; k++) {
        const md_bucket *b = &buckets.bucket[k];
        at[k] = half && b->set == 1 ? -1 : used;
        used += at[k] < 0 ? 0 : (b->hi - b->lo) / size;
    }
    md_grad_reduce *g;
    assert_ok(md_grad_reduce_create(&(md_grad_reduce_args){.buckets = &buckets,
                                                           .group = {dp, dp},
                                                           .flat = x,
                                                           .share = share,
                                                           .share_at = at,
                                                           .overlap = seed & 1},
                                    &g));
    for (int step = 0; step < 2; step++) {
        shuffle_layout(&l, seed, rank, 12);
        run_step(g, &l, x, mine);
        for (int64_t i = 0; i < l.n; i++)
            value[i] = -7.0f;
        for (int k = 0; k < buckets.count; k++) {
            const md_bucket *b = &buckets.bucket[k];
            int64_t n = (b->hi - b->lo) / size, first = b->lo + rank * n;
            const float *sum = at[k] < 0 ? x + first : share + at[k];
            memcpy(value + first, sum, (size_t)n * sizeof *value);
        }
        md_grad_reduce_gather(g, value);
        for (int i = draw(4); i > 0; i--)
            md_grad_reduce_poll(g);
        assert_true(md_grad_reduce_gather_finish(g) >= 0);
        assert_true(md_grad_reduce_gather_finish(g) == 0); /* nothing is under way */
        for (int s = 0; s < l.spans; s++) {
            const md_grad_span *p = &l.span[s];
            if (!(half && p->set == 1))
                assert_memory_equal(value + p->offset, want + p->offset,
                                    (size_t)p->count * sizeof *value);
        }
    }
    md_grad_reduce_free(g);
    md_buckets_free(&buckets);
}

static void test_equals_one_sum(void **state)
{
    (void)state;
    md_comm *self;
    assert_ok(md_comm_self(&self));
    size_t before = md_alloc_now();
    for (uint32_t seed = 0; seed < 40; seed++) {
        check_case(par_world, seed, seed & 4, true);
        check_case(par_world, seed, seed & 4, false);
        check_case(self, seed, true, true);
    }
    assert_int_equal(md_alloc_now(), before);
    md_comm_free(self);
}

static void test_sharded(void **state)
{
    (void)state;
    md_comm *self;
    assert_ok(md_comm_self(&self));
    check_sharded(par_world, 3, false); /* the groups keep memory of what is under way */
    assert_ok(md_comm_reserve(par_world, MAX_N * sizeof(float), MD_GRAD_REDUCE_FLYING));
    size_t before = md_alloc_now();
    for (uint32_t seed = 0; seed < 40; seed++) {
        check_sharded(par_world, seed, seed & 4);
        check_sharded(self, seed, seed & 4);
    }
    assert_int_equal(md_alloc_now(), before);
    md_comm_free(self);
}

/* Inexact values: starting early or late must not change a bit. */
static void test_overlap_keeps_bits(void **state)
{
    (void)state;
    enum { N = 5000, S = 10 };
    static float early[N], late[N];
    md_grad_span span[S];
    for (int i = 0; i < S; i++)
        span[i] = (md_grad_span){(S - 1 - i) * (N / S), N / S, 0};
    float *flat[2] = {early, late};
    md_buckets buckets;
    assert_ok(md_buckets_make(&(md_buckets_args){span, S, N, 1000, GAP}, &buckets));
    assert_int_equal(buckets.count, 5);
    for (int k = 0; k < 2; k++) {
        md_grad_reduce *g;
        md_grad_reduce_args a = {
            .buckets = &buckets, .group = {par_world}, .flat = flat[k], .overlap = k == 0};
        assert_ok(md_grad_reduce_create(&a, &g));
        for (int i = 0; i < N; i++)
            flat[k][i] = 1.0f / (float)(i + 3 + 7 * md_comm_rank(par_world));
        md_grad_reduce_reset(g);
        double start = md_now();
        for (int i = 0; i < S; i++)
            md_grad_reduce_ready(g, i);
        double ready = md_now();
        md_grad_reduce_finish(g);
        for (int b = 0; b < buckets.count; b++) { /* all have started with the last gradient */
            double begun = md_grad_reduce_begun(g, b);
            assert_true(begun >= start && (begun <= ready) == (k == 0));
        }
        md_grad_reduce_free(g);
    }
    md_buckets_free(&buckets);
    assert_memory_equal(early, late, sizeof early);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_equals_one_sum),
    cmocka_unit_test(test_sharded),
    cmocka_unit_test(test_overlap_keeps_bits),
};

PAR_MAIN(tests)
