/* Base, tensors and random numbers: what everything else stands on. */
#include "src/base.h"
#include "src/rng.h"
#include "src/tensor.h"

#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

/* ---- errors ---- */

static md_status fails(void)
{
    MD_FAIL(MD_ERR_DATA, "row %d is bad", 7);
}

static md_status passes_on(void)
{
    MD_TRY(MD_OK);
    MD_TRY(fails());
    return MD_OK;
}

static void errors_carry_code_and_sentence(void **state)
{
    (void)state;
    assert_int_equal(passes_on(), MD_ERR_DATA);
    assert_string_equal(md_error_text(), "row 7 is bad");
    assert_int_equal(md_error_prefix(MD_ERR_DATA, "file %s", "a.h5"), MD_ERR_DATA);
    assert_string_equal(md_error_text(), "file a.h5: row 7 is bad");
    assert_int_equal(md_error_set(MD_ERR_IO, "again: %s", md_error_text()), MD_ERR_IO);
    assert_string_equal(md_error_text(), "again: file a.h5: row 7 is bad");
    char longer[9000];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    md_error_set(MD_ERR_IO, "%s", longer);
    size_t n = strlen(md_error_text());
    assert_in_range(n, 1000, sizeof longer - 2);
    md_error_prefix(MD_ERR_IO, "front");
    assert_int_equal(strncmp(md_error_text(), "front: xxx", 10), 0);
    assert_in_range(strlen(md_error_text()), 1000, n);
}

static void *other_thread(void *seen)
{
    strcpy(seen, md_error_text());
    md_error_set(MD_ERR_BUG, "of the other thread");
    return NULL;
}

static void each_thread_has_its_own_sentence(void **state)
{
    (void)state;
    char seen[64] = "x";
    pthread_t t;
    md_error_set(MD_ERR_IO, "mine");
    assert_int_equal(pthread_create(&t, NULL, other_thread, seen), 0);
    pthread_join(t, NULL);
    assert_string_equal(seen, "");
    assert_string_equal(md_error_text(), "mine");
}

static void statuses_have_names_and_distinct_codes(void **state)
{
    (void)state;
#define CHECK(name, code, text)                                    \
    assert_string_equal(md_status_name((md_status)(code)), #name); \
    assert_string_equal(md_status_text((md_status)(code)), text);  \
    assert_in_range(code, 0, 125);
    MD_STATUSES(CHECK)
#undef CHECK
    assert_string_equal(md_status_name((md_status)1), "unknown");
    assert_int_equal(MD_STOPPED, 75);
    assert_int_equal(MD_ERR_CONFIG, 78);
}

/* Runs `body` in a child; returns its exit code and what it wrote to stderr. */
static int in_child(void (*body)(void), char *text, size_t size)
{
    int fd[2], status;
    assert_int_equal(pipe(fd), 0);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fd[1], 2);
        close(fd[0]);
        body();
        _exit(0);
    }
    close(fd[1]);
    ssize_t n, used = 0;
    while ((n = read(fd[0], text + used, size - 1 - (size_t)used)) > 0)
        used += n;
    text[used] = 0;
    close(fd[0]);
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void assert_body(void)
{
    int rows = 3;
    md_base_set_rank(5, 8);
    MD_ASSERT(rows == 4, "rows %d", rows);
}

static void hook(int code)
{
    _exit(code + 1);
}

static void hook_body(void)
{
    md_base_set_abort_hook(hook);
    MD_ASSERT(1 == 1);
    MD_ASSERT(1 == 2);
}

static void asserts_report_and_end_the_program(void **state)
{
    (void)state;
    char text[512];
    assert_int_equal(in_child(assert_body, text, sizeof text), MD_ERR_BUG);
    assert_non_null(strstr(text, "md_hpc: rank 5: internal error at "));
    assert_non_null(strstr(text, "rows == 4: rows 3\n"));
    assert_int_equal(in_child(hook_body, text, sizeof text), MD_ERR_BUG + 1);
    assert_non_null(strstr(text, "1 == 2\n"));
}

/* ---- memory ---- */

static void memory_is_aligned_zeroed_and_counted(void **state)
{
    (void)state;
    size_t before = md_alloc_now();
    static const size_t sizes[] = {0, 1, 63, 64, 65, 1000, (4 << 20) - 1, 4 << 20, 9 << 20};
    for (size_t i = 0; i < MD_COUNT(sizes); i++) {
        unsigned char *p = md_alloc(sizes[i], "test");
        assert_non_null(p);
        size_t align = sizes[i] >= 4 << 20 ? 2 << 20 : 64;
        assert_int_equal((uintptr_t)p % align, 0);
        assert_true(md_alloc_now() >= before + sizes[i]);
        for (size_t j = 0; j < sizes[i]; j++)
            assert_int_equal(p[j], 0);
        memset(p, 0xAA, sizes[i]);
        md_free(p);
        assert_int_equal(md_alloc_now(), before);
    }
    assert_true(md_alloc_peak() >= 9 << 20);
    md_free(NULL);
}

static void impossible_requests_fail_with_a_sentence(void **state)
{
    (void)state;
    static const size_t sizes[] = {SIZE_MAX, SIZE_MAX - 64, SIZE_MAX - (2 << 20), (size_t)1 << 62};
    for (size_t i = 0; i < MD_COUNT(sizes); i++) {
        assert_null(md_alloc(sizes[i], "the moon"));
        assert_non_null(strstr(md_error_text(), "for the moon"));
    }
}

static md_status make_three(double **p)
{
    MD_NEW(*p, 3, "test");
    return MD_OK;
}

static void md_new_allocates_elements(void **state)
{
    (void)state;
    double *p = NULL;
    assert_int_equal(make_three(&p), MD_OK);
    assert_true(p[0] == 0 && p[2] == 0);
    md_free(p);
}

/* ---- fault sites: MD_FAULT is set in main ---- */

static void stop_body(void)
{
    md_base_set_rank(0, 1);
    md_fault("test.kill");
}

static void fault_sites_fail_where_they_are_told(void **state)
{
    (void)state;
    char text[16];
    md_base_set_rank(0, 4);
    assert_false(md_fault("test.none"));
    assert_true(md_fault("test.always"));
    assert_true(md_fault("test.always"));
    assert_false(md_fault("test.third"));
    assert_false(md_fault("test.third"));
    assert_true(md_fault("test.third"));
    assert_false(md_fault("test.third"));
    assert_false(md_fault("test.rank"));
    md_base_set_rank(1, 4);
    assert_true(md_fault("test.rank"));
    assert_false(md_fault("test.ran"));
    md_base_set_rank(0, 1);
    bool failed = false;
    for (int i = 0; i < 20 && !failed; i++) {
        void *p = md_alloc(8, "failing");
        failed = !p;
        md_free(p);
    }
    assert_true(failed);
    assert_int_equal(in_child(stop_body, text, sizeof text), 128 + SIGKILL);
}

/* ---- random numbers ---- */

/* Vectors of Random123's kat_vectors for philox4x32, 10 rounds. */
static void philox_gives_the_known_answers(void **state)
{
    (void)state;
    static const struct {
        md_rng_key key;
        uint32_t block, want[4];
    } cases[] = {
        {{0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{.seed = UINT64_MAX, .stream = 0xffff, .step = UINT32_MAX, .index = 0xffffffffffff},
         UINT32_MAX,
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{.seed = 0x299f31d0a4093822,
          .stream = 0x1319,
          .step = 0x03707344,
          .index = 0x8a2e85a308d3},
         0x243f6a88,
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < MD_COUNT(cases); i++) {
        uint32_t got[4];
        md_rng_bits(cases[i].key, cases[i].block, got);
        assert_memory_equal(got, cases[i].want, sizeof got);
    }
}

static void cursor_walks_the_blocks(void **state)
{
    (void)state;
    md_rng r = md_rng_at(42, MD_RNG_MASK, 3, 1000);
    for (uint32_t block = 0; block < 5; block++) {
        uint32_t want[4];
        md_rng_bits(r.key, block, want);
        for (int i = 0; i < 4; i++)
            assert_int_equal(md_rng_u32(&r), want[i]);
    }
    md_rng a = md_rng_at(42, MD_RNG_MASK, 3, 1000), b = md_rng_at(42, MD_RNG_CROP, 3, 1000);
    md_rng c = md_rng_at(42, MD_RNG_MASK, 4, 1000), d = md_rng_at(42, MD_RNG_MASK, 3, 1001);
    uint32_t first = md_rng_u32(&a);
    assert_int_not_equal(first, md_rng_u32(&b));
    assert_int_not_equal(first, md_rng_u32(&c));
    assert_int_not_equal(first, md_rng_u32(&d));
}

/* Means within 5 standard deviations; a bin of 10 too, so that a lost low or high word shows. */
static void draws_are_uniform(void **state)
{
    (void)state;
    enum { DRAWS = 100000 };
    md_rng r = md_rng_at(7, MD_RNG_TEST, 0, 0);
    double sum_f = 0, sum_d = 0;
    int bins[10] = {0};
    for (int i = 0; i < DRAWS; i++) {
        float f = md_rng_float(&r);
        double d = md_rng_double(&r);
        assert_true(f >= 0 && f < 1 && d >= 0 && d < 1);
        sum_f += (double)f;
        sum_d += d;
        uint32_t n = md_rng_below(&r, 10);
        assert_in_range(n, 0, 9);
        bins[n]++;
        assert_int_equal(md_rng_below(&r, 1), 0);
    }
    double five_sigma = 5 * 0.2887 / 316.2; /* sqrt(1/12) / sqrt(DRAWS) */
    assert_true(sum_f / DRAWS > 0.5 - five_sigma && sum_f / DRAWS < 0.5 + five_sigma);
    assert_true(sum_d / DRAWS > 0.5 - five_sigma && sum_d / DRAWS < 0.5 + five_sigma);
    for (int i = 0; i < 10; i++)
        assert_in_range(bins[i], DRAWS / 10 - 475, DRAWS / 10 + 475); /* 5 * sqrt(9000) */
}

/* The first four moments are within 5 standard deviations, neighbours do not go together, and every
 * quarter of the circle gives what Box and Muller say in double. */
static void noise_is_normal(void **state)
{
    (void)state;
    enum { DRAWS = 200000 };
    const uint32_t key[2] = {11, 5}, other[2] = {11, 6};
    double moment[4] = {0}, lag = 0, keys = 0, last = 0;
    for (uint32_t i = 0; i < DRAWS; i++) {
        double x = (double)md_rng_normal(key, i), power = 1;
        for (int m = 0; m < 4; m++)
            moment[m] += (power *= x) / DRAWS;
        lag += last * x / DRAWS;
        keys += x * (double)md_rng_normal(other, i) / DRAWS;
        last = x;
    }
    const double want[4] = {0, 1, 0, 3}, sigma[4] = {1, 1.4142, 3.873, 9.798};
    for (int m = 0; m < 4; m++)
        assert_true(fabs(moment[m] - want[m]) < 5 * sigma[m] / sqrt(DRAWS));
    assert_true(fabs(lag) < 5 / sqrt(DRAWS) && fabs(keys) < 5 / sqrt(DRAWS));
    md_rng r = md_rng_at(9, MD_RNG_TEST, 0, 0);
    for (int i = 0; i < DRAWS; i++) {
        uint32_t a = md_rng_u32(&r) >> (i % 3 * 8), b = md_rng_u32(&r);
        double turn = ((double)(int32_t)(b << 2) / 4294967296.0 + (double)(b >> 30)) / 4.0;
        double u = (double)((a >> 8) + 1) / 16777216.0;
        double x = sqrt(-2.0 * log(u)) * cos(2.0 * acos(-1.0) * turn);
        assert_true(fabs((double)md_normal_of(a, b) - x) < 4e-7 * fabs(x) + 1e-12);
    }
}

/* ---- tensors ---- */

static void tensors_know_their_shape(void **state)
{
    (void)state;
    float data[24];
    char text[64];
    md_tensor t = MD_TENSOR(data, MD_F32, 2, 3, 4);
    assert_int_equal(md_tensor_count(&t), 24);
    assert_int_equal(md_tensor_bytes(&t), 96);
    assert_int_equal(md_tensor_rows(&t), 6);
    assert_int_equal(md_tensor_cols(&t), 4);
    assert_string_equal(md_tensor_describe(&t, text, sizeof text), "[2, 3, 4] F32");
    assert_string_equal(md_tensor_describe(&t, text, 6), "[2, 3");
    md_tensor same = MD_TENSOR(NULL, MD_BF16, 2, 3, 4), flat = MD_TENSOR(NULL, MD_F32, 24);
    md_tensor other = MD_TENSOR(NULL, MD_F32, 2, 3, 5),
              scalar = md_tensor_make(NULL, MD_F64, 0, NULL);
    assert_true(md_tensor_same_shape(&t, &same));
    assert_false(md_tensor_same_shape(&t, &flat));
    assert_false(md_tensor_same_shape(&t, &other));
    assert_int_equal(md_tensor_bytes(&same), 48);
    assert_int_equal(md_tensor_count(&scalar), 1);
    assert_int_equal(md_tensor_rows(&scalar), 1);
    assert_int_equal(md_tensor_cols(&scalar), 1);
    assert_int_equal(md_tensor_bytes(&scalar), 8);
    assert_true(t.place == MD_REPL && t.mem == MD_HOST);
    md_tensor big = MD_TENSOR(NULL, MD_U8, 100000, 100000);
    assert_true(md_tensor_bytes(&big) == 10000000000u);
}

int main(void)
{
    setenv("MD_FAULT",
           "test.always,test.third#3,test.rank@rank1,test.kill:kill,base.alloc@rank0#20", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(errors_carry_code_and_sentence),
        cmocka_unit_test(each_thread_has_its_own_sentence),
        cmocka_unit_test(statuses_have_names_and_distinct_codes),
        cmocka_unit_test(asserts_report_and_end_the_program),
        cmocka_unit_test(memory_is_aligned_zeroed_and_counted),
        cmocka_unit_test(impossible_requests_fail_with_a_sentence),
        cmocka_unit_test(md_new_allocates_elements),
        cmocka_unit_test(fault_sites_fail_where_they_are_told),
        cmocka_unit_test(philox_gives_the_known_answers),
        cmocka_unit_test(cursor_walks_the_blocks),
        cmocka_unit_test(draws_are_uniform),
        cmocka_unit_test(noise_is_normal),
        cmocka_unit_test(tensors_know_their_shape),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
