/* test_ops: every row of MD_OPS against double-precision references: on the cpu and check backends,
 * on a fake device in f32 and bf16, and on the cuda backend in both where it is linked in and finds
 * a GPU.
 *
 * Environment: MD_TEST_BACKEND=cuda runs what concerns that backend only, and it must be there;
 * MD_TEST_LIGHT=N leaves out the cases of more than N thousand elements, 1 those of 400;
 * MD_TEST_ONCE=1 leaves out the repeats on cuda; MD_TEST_OP=NAME runs the cases of that op only. */
#include "tests/ops/fake_device.h"
#include "tests/ops/ops_case.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const op_row *rows;
    const int *count;
} tables[] = {{gemm_rows, &gemm_row_count},           {norm_rows, &norm_row_count},
              {attention_rows, &attention_row_count}, {token_rows, &token_row_count},
              {patch_rows, &patch_row_count},         {vector_rows, &vector_row_count},
              {entropy_rows, &entropy_row_count}};

static const char *describe(const op_row *r, char *buf, size_t size)
{
    snprintf(buf, size, "%s %lld %lld %lld %lld %lld flags %#x", md_op_name(r->op),
             (long long)r->n[0], (long long)r->n[1], (long long)r->n[2], (long long)r->n[3],
             (long long)r->n[4], r->flags);
    return buf;
}

static void for_each_row(void (*visit)(const op_row *row, void *arg), void *arg)
{
    const char *only = getenv("MD_TEST_OP");
    int visited = 0;
    for (size_t t = 0; t < MD_COUNT(tables); t++)
        for (int i = 0; i < *tables[t].count; i++)
            if (!only || strcmp(only, md_op_name(tables[t].rows[i].op)) == 0) {
                visit(&tables[t].rows[i], arg);
                visited++;
            }
    if (visited == 0)
        fail_msg("no case of an op \"%s\"", only);
}

/* A backend and the compute type that its cases are made for. light: without the heavy cases;
 * failed: cases that did. */
typedef struct setup {
    md_backend *be;
    md_dtype compute;
    bool light;
    int failed;
} setup;

static bool is_set(const char *variable, const char *value)
{
    const char *have = getenv(variable);
    return have && strcmp(have, value) == 0;
}

static setup make(const char *name, int threads, md_dtype compute)
{
    setup s = {.compute = compute, .light = getenv("MD_TEST_LIGHT") != NULL};
    const md_backend_args args = {
        .name = name, .threads = threads, .compute = compute, .node_size = 1};
    if (md_backend_make(&args, &s.be) != MD_OK)
        fail_msg("%s", md_error_text());
    return s;
}

static setup make_fake(md_dtype compute)
{
    setup s = {.compute = compute, .light = true};
    assert_int_equal(fake_device_create(2, compute, &s.be), MD_OK);
    return s;
}

static setup make_cuda(md_dtype compute)
{
    return make("cuda", 0, compute);
}

/* The cuda backend is linked in and finds a GPU. */
static bool has_gpu(void)
{
    const md_backend_args args = {.name = "cuda", .compute = MD_F32, .node_size = 1};
    md_backend *probe;
    if (md_backend_make(&args, &probe) != MD_OK)
        return false;
    md_backend_destroy(probe);
    return true;
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
    if (getenv("MD_TEST_OP"))
        skip();
#define HAS_CASE(op)       \
    if (!seen[MD_OP_##op]) \
        fail_msg("no case for op %s", #op);
    MD_OPS(HAS_CASE)
#undef HAS_CASE
}

/* Runs a case and returns its error; negative: it is too heavy for this run. */
static double run_row(const op_row *row, const setup *s, bool mutant)
{
    op_case c;
    double error = -1.0;
    case_begin(&c, row, s->compute);
    if (mutant && case_is_empty(&c)) {
        error = INFINITY; /* nothing that it could bend */
    } else if (!s->light || !case_is_heavy(&c)) {
        row->ref(&c, mutant);
        case_run(&c, s->be);
        error = case_error(&c);
    }
    case_end(&c);
    return error;
}

/* The answer is right, and the wrong answer of the mutant is seen to be wrong. */
static void check_row(const op_row *row, void *arg)
{
    setup *s = arg;
    char name[128];
    double error = run_row(row, s, false);
    bool right = error <= 1.0, mutant = error >= 0.0 && right;
    if (mutant)
        error = run_row(row, s, true);
    if (right && (!mutant || error > 1.0))
        return;
    print_message("%s on %s: %s %.2f tolerances\n", describe(row, name, sizeof name), s->be->name,
                  mutant ? "the mutant passes, its error is" : "error is", error);
    s->failed++;
}

static void conform(setup s)
{
    for_each_row(check_row, &s);
    md_backend_destroy(s.be);
    if (s.failed)
        fail_msg("%d cases", s.failed);
}

static void test_cpu(void **state)
{
    (void)state;
    conform(make("cpu", 2, MD_F32));
}

static void test_check(void **state)
{
    (void)state;
    setup s = make("check", 1, MD_F32);
    s.light = true;
    conform(s);
}

static void test_device_memory(void **state)
{
    (void)state;
    conform(make_fake(MD_F32));
}

static void test_device_memory_bf16(void **state)
{
    (void)state;
    conform(make_fake(MD_BF16));
}

static void test_cuda(void **state)
{
    (void)state;
    conform(make_cuda(MD_F32));
}

static void test_cuda_bf16(void **state)
{
    (void)state;
    conform(make_cuda(MD_BF16));
}

static void check_same_bits(const op_row *row, void *arg)
{
    const setup *s = arg;
    op_case one, two;
    char name[128];
    case_begin(&one, row, s[0].compute);
    case_begin(&two, row, s[1].compute);
    bool run = !s->light || !case_is_heavy(&one);
    if (run) {
        case_run(&one, s[0].be);
        case_run(&two, s[1].be);
    }
    for (int o = 0; run && o < MD_OP_OUT; o++) {
        const md_tensor *a = one.args.common.out[o], *b = two.args.common.out[o];
        if (a && memcmp(a->data, b->data, md_tensor_bytes(a)) != 0)
            fail_msg("%s: output %d differs in bits", describe(row, name, sizeof name), o);
    }
    case_end(&one);
    case_end(&two);
}

static void repeats(setup s)
{
    for_each_row(check_same_bits, (setup[]){s, s});
    md_backend_destroy(s.be);
}

static void test_repeat_gives_the_same_bits(void **state)
{
    (void)state;
    repeats(make("cpu", 2, MD_F32));
}

static void test_repeat_on_cuda(void **state)
{
    (void)state;
    repeats(make_cuda(MD_F32));
}

static void test_repeat_on_cuda_bf16(void **state)
{
    (void)state;
    repeats(make_cuda(MD_BF16));
}

/* A product may be cut differently for other thread counts; everything else may not. */
static void check_same_bits_but_gemm(const op_row *row, void *arg)
{
    if (row->op != MD_OP_gemm && row->op != MD_OP_linear_bwd)
        check_same_bits(row, arg);
}

static void test_threads_give_the_same_bits(void **state)
{
    (void)state;
    setup s[] = {make("cpu", 1, MD_F32), make("cpu", 3, MD_F32)};
    for_each_row(check_same_bits_but_gemm, s);
    md_backend_destroy(s[0].be);
    md_backend_destroy(s[1].be);
}

/* Central differences of the objective, in double, against the gradients of the reference. */
static void check_gradient(const op_row *row, void *arg)
{
    (void)arg;
    if (!row->objective)
        return;
    char name[128];
    op_case c;
    case_begin(&c, row, MD_F32);
    if (case_is_heavy(&c)) {
        case_end(&c);
        return;
    }
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

/* sumsq of x[n] by way of the backend's own memory. */
static void sumsq_of(md_backend *be, const float *x, int64_t n, double out[2])
{
    void *memory, *scratch;
    const size_t bytes = sizeof *x * (size_t)n;
    assert_int_equal(md_backend_alloc(be, bytes + 64, "operands", &memory), MD_OK);
    char *result = (char *)memory + bytes - bytes % 8 + 8;
    md_tensor tx = MD_TENSOR(memory, MD_F32, n), ts = MD_TENSOR(result, MD_F64, 1);
    md_tensor tb = MD_TENSOR(result + sizeof(double), MD_F64, 1);
    tx.mem = ts.mem = tb.mem = md_backend_is_device(be) ? MD_DEVICE : MD_HOST;
    const md_sumsq_args a = {.x = &tx, .sum = &ts, .nonfinite = &tb};
    be->scratch_size = be->scratch_bytes(be, MD_OP_sumsq, (const md_operands *)(const void *)&a);
    assert_int_equal(md_backend_alloc(be, be->scratch_size + 64, "scratch", &scratch), MD_OK);
    be->scratch = scratch;
    assert_int_equal(md_backend_upload(be, memory, x, bytes), MD_OK);
    assert_int_equal(be->ops->sumsq(be, &a), MD_OK);
    assert_int_equal(md_backend_download(be, out, result, 2 * sizeof *out), MD_OK);
    assert_int_equal(md_backend_sync(be), MD_OK);
    md_backend_free(be, scratch);
    md_backend_free(be, memory);
}

/* Non-finite elements are counted wherever they are, and a finite range has none. */
static void counts_nonfinite(setup s)
{
    enum { N = 20011 };
    static float x[N];
    double sum[2];
    for (int i = 0; i < N; i++)
        x[i] = 1e30f;
    sumsq_of(s.be, x, N, sum);
    assert_true(sum[1] == 0.0 && fabs(sum[0] / (1e60 * N) - 1.0) < 1e-6);
    x[0] = NAN;
    x[7777] = INFINITY;
    x[N - 1] = -INFINITY;
    sumsq_of(s.be, x, N, sum);
    assert_true(sum[1] == 3.0);
    md_backend_destroy(s.be);
}

static void test_sumsq_counts_nonfinite(void **state)
{
    (void)state;
    counts_nonfinite(make("cpu", 2, MD_F32));
}

static void test_sumsq_counts_nonfinite_on_cuda(void **state)
{
    (void)state;
    counts_nonfinite(make_cuda(MD_F32));
}

int main(void)
{
    const struct CMUnitTest host[] = {
        cmocka_unit_test(test_every_op_has_a_case),
        cmocka_unit_test(test_cpu),
        cmocka_unit_test(test_check),
        cmocka_unit_test(test_device_memory),
        cmocka_unit_test(test_device_memory_bf16),
        cmocka_unit_test(test_repeat_gives_the_same_bits),
        cmocka_unit_test(test_threads_give_the_same_bits),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_sumsq_counts_nonfinite),
    };
    const struct CMUnitTest cuda[] = {
        cmocka_unit_test(test_cuda),
        cmocka_unit_test(test_cuda_bf16),
        cmocka_unit_test(test_repeat_on_cuda),
        cmocka_unit_test(test_repeat_on_cuda_bf16),
        cmocka_unit_test(test_sumsq_counts_nonfinite_on_cuda),
    };
    int failed = 0;
    /* Repeats find what the order of threads changes; a sanitizer finds nothing more in them. */
    const struct CMUnitTest once[] = {cmocka_unit_test(test_cuda),
                                      cmocka_unit_test(test_cuda_bf16)};
    bool only_cuda = is_set("MD_TEST_BACKEND", "cuda");
    if (!only_cuda)
        failed += cmocka_run_group_tests(host, NULL, NULL);
    if (is_set("MD_TEST_ONCE", "1"))
        failed += cmocka_run_group_tests(once, NULL, NULL);
    else if (only_cuda || has_gpu())
        failed += cmocka_run_group_tests(cuda, NULL, NULL);
    return failed;
}
