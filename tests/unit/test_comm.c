/* The group of one rank must work without MPI: plan, help and serial tools never start it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "mpi/agree.h"

static void test_identity(void **state)
{
    (void)state;
    md_comm *c, *sub, *node;
    assert_int_equal(md_comm_self(&c), MD_OK);
    assert_int_equal(md_comm_rank(c), 0);
    assert_int_equal(md_comm_size(c), 1);
    assert_int_equal(md_comm_split(c, 3, 1, &sub), MD_OK);
    assert_int_equal(md_comm_split_node(c, &node), MD_OK);
    float x[3] = {1, 2, 3}, y[3] = {0};
    md_comm_request req = {0};
    md_comm_allreduce(sub, x, 3, MD_F32, MD_SUM);
    md_comm_bcast(sub, x, sizeof x, 0);
    md_comm_allreduce_begin(sub, x, 3, MD_F32, MD_SUM, &req);
    assert_true(md_comm_poll(sub, &req, 1));
    md_comm_wait(sub, &req);
    md_comm_barrier(sub);
    md_comm_allgather(sub, x, y, sizeof x);
    assert_memory_equal(x, y, sizeof x);
    memset(y, 0, sizeof y);
    md_comm_reduce_scatter(sub, x, y, 3, MD_F32);
    assert_memory_equal(x, y, sizeof x);
    memset(y, 0, sizeof y);
    md_comm_reduce_scatter_begin(sub, x, y, 3, MD_F32, &req);
    md_comm_wait(sub, &req);
    assert_memory_equal(x, y, sizeof x);
    md_comm_allgather_begin(sub, y, sizeof y, &req);
    md_comm_wait(sub, &req);
    assert_memory_equal(x, y, sizeof x);
    assert_int_equal(md_comm_exscan(sub, 42), 0);
    md_comm_count count = md_comm_counted(sub);
    assert_int_equal(count.calls, 9);
    assert_int_equal(count.bytes, 7 * 12 + 8);
    assert_true(count.sent == 0);
    md_comm_free(sub);
    md_comm_free(node);
    md_comm_free(c);
    md_comm_free(NULL);
}

/* A planned group of many ranks, without any: it counts, agrees with itself and moves nothing. */
static void test_plan(void **state)
{
    (void)state;
    md_comm *c;
    size_t before = md_alloc_now();
    assert_int_equal(md_comm_plan(3, 8, &c), MD_OK);
    assert_int_equal(md_comm_rank(c), 3);
    assert_int_equal(md_comm_size(c), 8);
    float x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    md_comm_request req = {0};
    md_comm_allreduce(c, x, 8, MD_F32, MD_SUM);
    assert_true(md_comm_counted(c).sent == 2 * 32 * 7 / 8);
    md_comm_reduce_scatter(c, NULL, NULL, 1 << 30, MD_F32);
    assert_true(md_comm_counted(c).sent == 56 + 7 * 0x1p29);
    md_comm_reduce_scatter_begin(c, NULL, NULL, 800, MD_F32, &req);
    assert_true(md_comm_poll(c, &req, 1));
    md_comm_wait(c, &req);
    md_comm_allgather_begin(c, NULL, 400, &req);
    md_comm_wait(c, &req);
    assert_true(md_comm_counted(c).sent == 56 + 7 * 0x1p29 + 2 * 2800);
    md_comm_bcast(c, NULL, 16, 7);
    assert_int_equal(md_comm_exscan(c, 9), 0);
    md_comm_barrier(c);
    assert_int_equal(md_comm_reserve(c, 1 << 30, 1000), MD_OK);
    assert_int_equal(md_comm_counted(c).calls, 7);
    assert_true(x[0] == 1 && x[7] == 8);
    assert_int_equal(md_agree(c, MD_OK), MD_OK);
    assert_int_equal(md_agree_same(c, "seed", 7), MD_OK);
    md_comm_free(c);
    assert_int_equal(md_alloc_now(), before);
}

static void test_shared_is_freed_with_the_group(void **state)
{
    (void)state;
    md_comm *c;
    void *p, *q;
    size_t before = md_alloc_now();
    assert_int_equal(md_comm_self(&c), MD_OK);
    assert_int_equal(md_comm_shared(c, 1 << 20, &p), MD_OK);
    assert_int_equal(md_comm_shared(c, 100, &q), MD_OK);
    assert_int_equal(((char *)p)[1000], 0);
    memset(p, 1, 1 << 20);
    md_comm_free(c);
    assert_int_equal(md_alloc_now(), before);
}

static md_status disk_full(void)
{
    MD_FAIL(MD_ERR_IO, "disk full");
}

static void test_agree_keeps_a_lone_rank_s_text(void **state)
{
    (void)state;
    md_comm *c;
    assert_int_equal(md_comm_self(&c), MD_OK);
    assert_int_equal(md_agree(c, MD_OK), MD_OK);
    assert_int_equal(md_agree(c, disk_full()), MD_ERR_IO);
    assert_string_equal(md_error_text(), "disk full");
    assert_int_equal(md_agree_same(c, "seed", 9), MD_OK);
    md_comm_free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_identity),
        cmocka_unit_test(test_plan),
        cmocka_unit_test(test_shared_is_freed_with_the_group),
        cmocka_unit_test(test_agree_keeps_a_lone_rank_s_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
