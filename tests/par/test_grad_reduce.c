/* Bucketed sums against one big sum: random spans, bucket sizes and orders of readiness. */
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
static void make_layout(layout *l, uint32_t seed, bool shuffle)
{
    draw_state = seed;
    md_grad_span part[2][MAX_SPANS];
    int count[2], taken[2] = {0, 0};
    int64_t at = draw(100);
    for (int g = 0; g < 2; g++) {
        count[g] = 1 + draw(MAX_SPANS / 2);
        for (int i = 0; i < count[g]; i++) {
            int64_t n = 1 + draw(g ? 40 : 300);
            part[g][i] = (md_grad_span){at, n};
            at += n + draw(3) * draw(40);
        }
    }
    l->n = at + draw(200);
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

static void check_buckets(const md_grad_reduce *g, const layout *l, int64_t bytes)
{
    static int seen[MAX_N];
    memset(seen, 0, sizeof seen);
    for (int k = 0; k < md_grad_reduce_buckets(g); k++) {
        int64_t at, n;
        md_grad_reduce_bucket(g, k, &at, &n);
        assert_true(at >= 0 && n > 0 && at + n <= l->n);
        assert_true((n - 300 - 64) * (int64_t)sizeof(float) < bytes);
        for (int64_t i = at; i < at + n; i++)
            assert_int_equal(seen[i]++, 0);
    }
    for (int s = 0; s < l->spans; s++)
        for (int64_t i = 0; i < l->span[s].count; i++)
            assert_int_equal(seen[l->span[s].offset + i], 1);
}

static void check_case(md_comm *dp, uint32_t seed, bool shuffle, bool overlap)
{
    static float x[MAX_N], mine[MAX_N], want[MAX_N];
    layout l;
    make_layout(&l, seed, false);
    fill(mine, &l, md_comm_rank(dp));
    memcpy(want, mine, sizeof want);
    md_comm_allreduce(dp, want, l.n, MD_F32, MD_SUM);
    int64_t bytes = (int64_t[]){1, 400, 4000, 1 << 20}[seed % 4];
    md_grad_reduce *g;
    assert_ok(md_grad_reduce_create(&(md_grad_reduce_args){.dp = dp,
                                                           .flat = x,
                                                           .n = l.n,
                                                           .span = l.span,
                                                           .spans = l.spans,
                                                           .bucket_bytes = bytes,
                                                           .overlap = overlap},
                                    &g));
    check_buckets(g, &l, bytes);
    for (int step = 0; step < 2; step++) {
        /* Readiness may differ between ranks: the starts must not. */
        if (shuffle)
            make_layout(&l, seed, true);
        for (int r = 0; shuffle && r <= md_comm_rank(dp); r++) {
            int t = l.order[0], j = draw(l.spans);
            l.order[0] = l.order[j];
            l.order[j] = t;
        }
        run_step(g, &l, x, mine);
        for (int s = 0; s < l.spans; s++)
            assert_memory_equal(x + l.span[s].offset, want + l.span[s].offset,
                                (size_t)l.span[s].count * sizeof *x);
    }
    md_grad_reduce_free(g);
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

/* Inexact values: starting early or late must not change a bit. */
static void test_overlap_keeps_bits(void **state)
{
    (void)state;
    enum { N = 5000, S = 10 };
    static float early[N], late[N];
    md_grad_span span[S];
    for (int i = 0; i < S; i++)
        span[i] = (md_grad_span){(S - 1 - i) * (N / S), N / S};
    float *flat[2] = {early, late};
    for (int k = 0; k < 2; k++) {
        md_grad_reduce *g;
        md_grad_reduce_args a = {.dp = par_world,
                                 .flat = flat[k],
                                 .n = N,
                                 .span = span,
                                 .spans = S,
                                 .bucket_bytes = 4000,
                                 .overlap = k == 0};
        assert_ok(md_grad_reduce_create(&a, &g));
        assert_int_equal(md_grad_reduce_buckets(g), 5);
        for (int i = 0; i < N; i++)
            flat[k][i] = 1.0f / (float)(i + 3 + 7 * md_comm_rank(par_world));
        md_grad_reduce_reset(g);
        for (int i = 0; i < S; i++)
            md_grad_reduce_ready(g, i);
        md_grad_reduce_finish(g);
        md_grad_reduce_free(g);
    }
    assert_memory_equal(early, late, sizeof early);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_equals_one_sum),
    cmocka_unit_test(test_overlap_keeps_bits),
};

PAR_MAIN(tests)
