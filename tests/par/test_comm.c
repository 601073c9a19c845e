/* Collectives on small integers, which floats add exactly in any order: bit equality on every
 * group. */
#include "tests/par/par_main.h"

#include "mpi/agree.h"

/* Runs check on: the world, its halves, the node, every rank alone (by MPI), every rank alone
 * (self). */
static void on_every_group(void (*check)(md_comm *c))
{
    md_comm *halves, *node, *single, *self;
    int rank = md_comm_rank(par_world);
    assert_ok(md_comm_split(par_world, rank % 2, -rank, &halves));
    assert_ok(md_comm_split_node(par_world, &node));
    assert_ok(md_comm_split(par_world, rank, 0, &single));
    assert_ok(md_comm_self(&self));
    assert_int_equal(md_comm_size(single), 1);
    md_comm *groups[] = {par_world, halves, node, single, self};
    for (size_t i = 0; i < MD_COUNT(groups); i++)
        check(groups[i]);
    for (size_t i = 1; i < MD_COUNT(groups); i++)
        md_comm_free(groups[i]);
}

/* Element i of rank r's input; sums stay below 2^24. */
static int value(int64_t i, int r)
{
    return (int)((i * 7 + r * 13) % 101) - (r % 2 ? 50 : 0);
}

static int expected(int64_t i, int size, md_reduce op)
{
    int v = value(i, 0);
    for (int r = 1; r < size; r++) {
        int x = value(i, r);
        v = op == MD_SUM ? v + x : op == MD_MAX_OP ? MD_MAX(v, x) : MD_MIN(v, x);
    }
    return v;
}

enum { N = 1000, MAX_RANKS = 8 };

#define CHECK_ALLREDUCE(type, dtype)                                       \
    do {                                                                   \
        type buf[N];                                                       \
        for (int i = 0; i < N; i++)                                        \
            buf[i] = (type)value(i, md_comm_rank(c));                      \
        md_comm_allreduce(c, buf, N, dtype, op);                           \
        for (int i = 0; i < N; i++)                                        \
            assert_true(buf[i] == (type)expected(i, md_comm_size(c), op)); \
    } while (0)

static void check_allreduce(md_comm *c)
{
    for (md_reduce op = MD_SUM; op <= MD_MIN_OP; op++) {
        CHECK_ALLREDUCE(float, MD_F32);
        CHECK_ALLREDUCE(double, MD_F64);
        CHECK_ALLREDUCE(int32_t, MD_I32);
        CHECK_ALLREDUCE(int64_t, MD_I64);
    }
    uint8_t u[5];
    for (int i = 0; i < 5; i++)
        u[i] = (uint8_t)(i + md_comm_rank(c));
    md_comm_allreduce(c, u, 5, MD_U8, MD_MAX_OP);
    for (int i = 0; i < 5; i++)
        assert_int_equal(u[i], i + md_comm_size(c) - 1);
}

static void check_moves(md_comm *c)
{
    int size = md_comm_size(c), rank = md_comm_rank(c);
    char text[777], all[MAX_RANKS * 11], mine[11];
    for (int root = 0; root < size; root++) {
        memset(text, rank == root ? 'a' + root : 0, sizeof text);
        md_comm_bcast(c, text, sizeof text, root);
        for (size_t i = 0; i < sizeof text; i++)
            assert_int_equal(text[i], 'a' + root);
    }
    memset(mine, 'A' + rank, sizeof mine);
    md_comm_allgather(c, mine, all, sizeof mine);
    for (int r = 0; r < size; r++)
        for (int i = 0; i < 11; i++)
            assert_int_equal(all[r * 11 + i], 'A' + r);
    int64_t before = 0;
    for (int r = 0; r < rank; r++)
        before += r * r + 1;
    assert_int_equal(md_comm_exscan(c, rank * rank + 1), before);
    md_comm_barrier(c);
}

static void check_reduce_scatter(md_comm *c)
{
    int size = md_comm_size(c), rank = md_comm_rank(c);
    float send[MAX_RANKS * 33], recv[33];
    for (int i = 0; i < size * 33; i++)
        send[i] = (float)value(i, rank);
    md_comm_reduce_scatter(c, send, recv, size * 33);
    for (int i = 0; i < 33; i++)
        assert_true(recv[i] == (float)expected(rank * 33 + i, size, MD_SUM));
}

/* Several requests under way at once, finished out of order, with and without polling. */
static void check_nonblocking(md_comm *c)
{
    static float buf[4][N];
    md_comm_request req[4] = {0};
    for (int round = 0; round < 2; round++) {
        for (int k = 0; k < 4; k++) {
            for (int i = 0; i < N; i++)
                buf[k][i] = (float)value(i + k, md_comm_rank(c));
            md_comm_allreduce_begin(c, buf[k], N - k, MD_F32, MD_SUM, &req[k]);
        }
        while (round == 0 && !md_comm_poll(c, req, 4))
            ;
        for (int k = 3; k >= 0; k--)
            md_comm_wait(c, &req[k]);
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < N - k; i++)
                assert_true(buf[k][i] == (float)expected(i + k, md_comm_size(c), MD_SUM));
    }
    md_comm_wait(c, &req[0]);
}

static void check_bytes(md_comm *c)
{
    int64_t before = md_comm_bytes(c);
    float x[10] = {0};
    md_comm_allreduce(c, x, 10, MD_F32, MD_SUM);
    md_comm_allreduce(c, x, 0, MD_F32, MD_SUM);
    md_comm_bcast(c, x, 7, 0);
    assert_int_equal(md_comm_bytes(c) - before, 47);
}

static void test_collectives(void **state)
{
    (void)state;
    on_every_group(check_allreduce);
    on_every_group(check_moves);
    on_every_group(check_reduce_scatter);
    on_every_group(check_nonblocking);
    on_every_group(check_bytes);
}

/* The same with every collective cut into slices that do not divide its length. */
static void test_sliced(void **state)
{
    (void)state;
    md_mpi_set_slice(7);
    on_every_group(check_moves);
    on_every_group(check_reduce_scatter);
    on_every_group(check_allreduce);
    md_mpi_set_slice(300);
    on_every_group(check_nonblocking);
    md_mpi_set_slice((int64_t)1 << 28);
}

static void test_split_order(void **state)
{
    (void)state;
    int rank = md_comm_rank(par_world), size = md_comm_size(par_world);
    md_comm *reversed;
    assert_ok(md_comm_split(par_world, 0, -rank, &reversed));
    assert_int_equal(md_comm_size(reversed), size);
    assert_int_equal(md_comm_rank(reversed), size - 1 - rank);
    md_comm_free(reversed);
}

static void check_shared(md_comm *node)
{
    void *block, *second;
    assert_ok(md_comm_shared(node, 1000 * sizeof(int32_t), &block));
    assert_ok(md_comm_shared(node, 64, &second));
    int32_t *p = block;
    for (int i = 0; i < 1000; i++)
        assert_int_equal(p[i], 0);
    md_comm_barrier(node);
    p[md_comm_rank(node)] = md_comm_rank(node) + 1;
    md_comm_barrier(node);
    for (int r = 0; r < md_comm_size(node); r++)
        assert_int_equal(p[r], r + 1);
    md_comm_barrier(node);
}

static void test_shared(void **state)
{
    (void)state;
    md_comm *node, *self;
    assert_ok(md_comm_split_node(par_world, &node));
    assert_ok(md_comm_self(&self));
    check_shared(node);
    check_shared(self);
    md_comm_free(node);
    md_comm_free(self);
}

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
    cmocka_unit_test(test_collectives), cmocka_unit_test(test_sliced),
    cmocka_unit_test(test_split_order), cmocka_unit_test(test_shared),
    cmocka_unit_test(test_agree),       cmocka_unit_test(test_agree_on_one_sentence),
    cmocka_unit_test(test_agree_same),
};

PAR_MAIN(tests)
