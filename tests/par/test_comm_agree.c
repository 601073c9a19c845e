/* Agreement: one status and one sentence on every rank, whoever failed. */
#include "tests/par/par_main.h"

#include "mpi/agree.h"

static md_status fail_here(int rank)
{
    MD_FAIL(rank % 2 ? MD_ERR_IO : MD_ERR_DATA, "file %d is short", rank);
}

/* Every set of failing ranks: the lowest decides, and its sentence is everybody's. */
static void test_agree(void **state)
{
    (void)state;
    int rank = md_comm_rank(par_world), size = md_comm_size(par_world);
    assert_int_equal(md_agree(par_world, MD_OK), MD_OK);
    for (int set = 1; set < 1 << size; set++) {
        md_status got = md_agree(par_world, set >> rank & 1 ? fail_here(rank) : MD_OK);
        int first = __builtin_ctz((unsigned)set);
        char want[64];
        if (size > 1)
            snprintf(want, sizeof want, "rank %d: file %d is short", first, first);
        else
            snprintf(want, sizeof want, "file 0 is short");
        assert_int_equal(got, first % 2 ? MD_ERR_IO : MD_ERR_DATA);
        assert_string_equal(md_error_text(), want);
        assert_int_equal(md_agree(par_world, got), got); /* agreed once, agreed for good */
        assert_string_equal(md_error_text(), want);
    }
}

/* What all ranks say alike is said once, without a rank in front. */
static void test_agree_on_one_sentence(void **state)
{
    (void)state;
    md_status st = md_error_set(MD_ERR_CONFIG, "no such key");
    for (int i = 0; i < 2; i++) {
        st = md_agree(par_world, st);
        assert_int_equal(st, MD_ERR_CONFIG);
        assert_string_equal(md_error_text(), "no such key");
    }
    char list[3900]; /* as long as a list of config errors may be */
    memset(list, 'x', sizeof list - 1);
    list[sizeof list - 1] = 0;
    st = md_agree(par_world, md_error_set(MD_ERR_CONFIG, "%s", list));
    assert_int_equal(st, MD_ERR_CONFIG);
    assert_string_equal(md_error_text(), list);
}

static void test_agree_same(void **state)
{
    (void)state;
    int rank = md_comm_rank(par_world), size = md_comm_size(par_world);
    assert_ok(md_agree_same(par_world, "seed", -5));
    assert_ok(md_agree_same(par_world, "seed", INT64_MIN));
    md_status st = md_agree_same(par_world, "batch size", 7 + rank);
    if (size == 1) {
        assert_int_equal(st, MD_OK);
        return;
    }
    char want[80];
    snprintf(want, sizeof want, "batch size differs between ranks: from 7 to %d", 6 + size);
    assert_int_equal(st, MD_ERR_CONFIG);
    assert_string_equal(md_error_text(), want);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_agree),
    cmocka_unit_test(test_agree_on_one_sentence),
    cmocka_unit_test(test_agree_same),
};

PAR_MAIN(tests)
