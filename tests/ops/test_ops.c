/* test_ops: every row of MD_OPS against double-precision references, on the cpu and check backends.
 */
#include "tests/ops/ops_case.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const op_row *rows;
    const int *count;
} tables[] = {{gemm_rows, &gemm_row_count},
              {norm_rows, &norm_row_count},
              {attention_rows, &attention_row_count},
              {token_rows, &token_row_count},
              {vector_rows, &vector_row_count}};

static const char *describe(const op_row *r, char *buf, size_t size)
{
    snprintf(buf, size, "%s %lld %lld %lld %lld %lld flags %#x", md_op_name(r->op),
             (long long)r->n[0], (long long)r->n[1], (long long)r->n[2], (long long)r->n[3],
             (long long)r->n[4], r->flags);
    return buf;
}

static void for_each_row(void (*visit)(const op_row *row, void *arg), void *arg)
{
    for (size_t t = 0; t < MD_COUNT(tables); t++)
        for (int i = 0; i < *tables[t].count; i++)
            visit(&tables[t].rows[i], arg);
}

static md_backend *make(const char *name, int threads)
{
    md_backend *be;
    if (md_backend_create(name, threads, &be) != MD_OK)
        fail_msg("%s", md_error_text());
    return be;
}

static void mark_op(const op_row *row, void *arg)
{
    ((int *)arg)[row->op]++;
}

static void test_every_op_has_a_case(void **state)
{
    (void)state;
    int seen[MD_OP_COUNT] = {0};
    for_each_row(mark_op, seen);
#define HAS_CASE(op)       \
    if (!seen[MD_OP_##op]) \
        fail_msg("no case for op %s", #op);
    MD_OPS(HAS_CASE)
#undef HAS_CASE
}

/* The answer is right, and the wrong answer of the mutant is seen to be wrong. */
static void check_row(const op_row *row, void *arg)
{
    char name[128];
    op_case c;
    case_begin(&c, row);
    row->ref(&c, false);
    case_run(&c, arg);
    double error = case_error(&c);
    if (!(error <= 1.0))
        fail_msg("%s on %s: error is %.2f tolerances", describe(row, name, sizeof name),
                 ((md_backend *)arg)->name, error);
    case_end(&c);
    case_begin(&c, row);
    row->ref(&c, true);
    case_run(&c, arg);
    error = case_error(&c);
    if (!(error > 1.0))
        fail_msg("%s: the mutant passes (%.2f tolerances)", describe(row, name, sizeof name),
                 error);
    case_end(&c);
}

static void conform(const char *backend, int threads)
{
    md_backend *be = make(backend, threads);
    for_each_row(check_row, be);
    md_backend_destroy(be);
}

static void test_cpu(void **state)
{
    (void)state;
    conform("cpu", 2);
}

static void test_check(void **state)
{
    (void)state;
    conform("check", 1);
}

static void check_same_bits(const op_row *row, void *arg)
{
    md_backend **be = arg;
    op_case one, two;
    char name[128];
    case_begin(&one, row);
    case_begin(&two, row);
    case_run(&one, be[0]);
    case_run(&two, be[1]);
    for (int o = 0; o < MD_OP_OUT; o++) {
        const md_tensor *a = one.args.common.out[o], *b = two.args.common.out[o];
        if (a && memcmp(a->data, b->data, md_tensor_bytes(a)) != 0)
            fail_msg("%s: output %d differs in bits", describe(row, name, sizeof name), o);
    }
    case_end(&one);
    case_end(&two);
}

static void test_repeat_gives_the_same_bits(void **state)
{
    (void)state;
    md_backend *be = make("cpu", 2);
    for_each_row(check_same_bits, (md_backend *[]){be, be});
    md_backend_destroy(be);
}

/* A product may be cut differently for other thread counts; everything else may not. */
static void check_same_bits_but_gemm(const op_row *row, void *arg)
{
    if (row->op != MD_OP_gemm)
        check_same_bits(row, arg);
}

static void test_threads_give_the_same_bits(void **state)
{
    (void)state;
    md_backend *one = make("cpu", 1), *three = make("cpu", 3);
    for_each_row(check_same_bits_but_gemm, (md_backend *[]){one, three});
    md_backend_destroy(one);
    md_backend_destroy(three);
}

/* Central differences of the objective, in double, against the gradients of the reference. */
static void check_gradient(const op_row *row, void *arg)
{
    (void)arg;
    if (!row->objective)
        return;
    char name[128];
    op_case c;
    case_begin(&c, row);
    double *old[MD_OP_OUT] = {NULL};
    for (int o = 0; o < MD_OP_OUT; o++)
        if (c.ref[o]) {
            int64_t n = md_tensor_count(c.args.common.out[o]);
            old[o] = case_array(&c, n);
            memcpy(old[o], c.ref[o], sizeof(double) * (size_t)n);
        }
    row->ref(&c, false);
    const double h = 1e-5;
    for (int o = 0; o < MD_OP_OUT; o++) {
        int64_t n = c.ref[o] ? md_tensor_count(c.args.common.out[o]) : 0;
        for (int64_t i = 0; i < n; i += 1 + n / 13) {
            double slope = (row->objective(&c, o, i, h) - row->objective(&c, o, i, -h)) / (2.0 * h);
            double gradient = c.ref[o][i] - old[o][i];
            if (!isnan(slope) && fabs(slope - gradient) > 1e-6 * (1.0 + fabs(slope)))
                fail_msg("%s output %d element %lld: gradient %.9g, difference quotient %.9g",
                         describe(row, name, sizeof name), o, (long long)i, gradient, slope);
        }
    }
    case_end(&c);
}

static void test_gradients(void **state)
{
    (void)state;
    for_each_row(check_gradient, NULL);
}

/* Non-finite elements are counted wherever they are, and a finite range has none. */
static void test_sumsq_counts_nonfinite(void **state)
{
    (void)state;
    md_backend *be = make("cpu", 2);
    enum { N = 20011 };
    static float x[N];
    static unsigned char scratch[1 << 16];
    double sum, bad;
    md_tensor tx = MD_TENSOR(x, MD_F32, N), ts = MD_TENSOR(&sum, MD_F64, 1);
    md_tensor tb = MD_TENSOR(&bad, MD_F64, 1);
    be->scratch = scratch;
    be->scratch_size = sizeof scratch;
    for (int i = 0; i < N; i++)
        x[i] = 1e30f;
    assert_int_equal(MD_OP(be, sumsq, .x = &tx, .sum = &ts, .nonfinite = &tb), MD_OK);
    assert_true(bad == 0.0 && fabs(sum / (1e60 * N) - 1.0) < 1e-6);
    x[0] = NAN;
    x[7777] = INFINITY;
    x[N - 1] = -INFINITY;
    assert_int_equal(MD_OP(be, sumsq, .x = &tx, .sum = &ts, .nonfinite = &tb), MD_OK);
    assert_true(bad == 3.0);
    md_backend_destroy(be);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_op_has_a_case),
        cmocka_unit_test(test_cpu),
        cmocka_unit_test(test_check),
        cmocka_unit_test(test_repeat_gives_the_same_bits),
        cmocka_unit_test(test_threads_give_the_same_bits),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_sumsq_counts_nonfinite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
