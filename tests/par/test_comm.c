/* Blocking collectives on small integers, which floats add exactly in any order: bit equality on
 * every group. */
#include "kernels/scalar_math.h"
#include "tests/par/groups.h"

#define CHECK_ALLREDUCE(type, dtype)                                       \
    do {                                                                   \
        type buf[N];                                                       \
        for (int i = 0; i < N; i++)                                        \
            buf[i] = (type)value(i, md_comm_rank(c));                      \
        md_comm_allreduce(c, buf, 0, dtype, op);                           \
        for (int i = 0; i < N; i++)                                        \
            assert_true(buf[i] == (type)value(i, md_comm_rank(c)));        \
        md_comm_allreduce(c, buf, N, dtype, op);                           \
        for (int i = 0; i < N; i++)                                        \
            assert_true(buf[i] == (type)expected(i, md_comm_size(c), op)); \
    } while (0)

/* Small enough that every sum is a bf16 number. */
static float small(int64_t i, int r)
{
    return (float)((i + 3 * r) % 31 - 15);
}

static float small_expected(int64_t i, int size, md_reduce op)
{
    float v = small(i, 0);
    for (int r = 1; r < size; r++) {
        float x = small(i, r);
        v = op == MD_SUM ? v + x : op == MD_MAX_OP ? MD_MAX(v, x) : MD_MIN(v, x);
    }
    return v;
}

static void check_bf16(md_comm *c)
{
    enum { PART = 33 };
    int size = md_comm_size(c), rank = md_comm_rank(c);
    uint16_t buf[N], send[MAX_RANKS * PART], recv[PART];
    for (md_reduce op = MD_SUM; op <= MD_MIN_OP; op++) {
        for (int i = 0; i < N; i++)
            buf[i] = md_bf16_from_f32(small(i, rank));
        md_comm_allreduce(c, buf, N, MD_BF16, op);
        for (int i = 0; i < N; i++)
            assert_true(md_f32_from_bf16(buf[i]) == small_expected(i, size, op));
    }
    for (int i = 0; i < size * PART; i++)
        send[i] = md_bf16_from_f32(small(i, rank));
    md_comm_reduce_scatter(c, send, recv, size * PART, MD_BF16);
    for (int i = 0; i < PART; i++)
        assert_true(md_f32_from_bf16(recv[i]) == small_expected(rank * PART + i, size, MD_SUM));
}

/* Each addition is exact in f32 and rounded once, to nearest even. */
static void test_bf16_rounds(void **state)
{
    (void)state;
    uint16_t x = md_bf16_from_f32(md_comm_rank(par_world) == 0 ? 256.0f : 1.0f);
    md_comm_allreduce(par_world, &x, 1, MD_BF16, MD_SUM);
    if (md_comm_size(par_world) == 2)
        assert_int_equal(x, md_bf16_from_f32(256.0f));
    x = md_bf16_from_f32(md_comm_rank(par_world) == 0 ? 256.0f : 3.0f);
    md_comm_allreduce(par_world, &x, 1, MD_BF16, MD_SUM);
    if (md_comm_size(par_world) == 2)
        assert_int_equal(x, md_bf16_from_f32(260.0f));
}

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
    char text[777];
    for (int root = 0; root < size; root++) {
        memset(text, rank == root ? 'a' + root : 0, sizeof text);
        md_comm_bcast(c, text, 0, root);
        assert_int_equal(text[0], rank == root ? 'a' + root : 0);
        md_comm_bcast(c, text, sizeof text, root);
        for (size_t i = 0; i < sizeof text; i++)
            assert_int_equal(text[i], 'a' + root);
    }
    int64_t before = 0;
    for (int r = 0; r < rank; r++)
        before += r * r + 1;
    assert_int_equal(md_comm_exscan(c, rank * rank + 1), before);
    md_comm_barrier(c);
}

static void check_gathered(md_comm *c, const char *all)
{
    for (int r = 0; r < md_comm_size(c); r++)
        for (int i = 0; i < 11; i++)
            assert_int_equal(all[r * 11 + i], 'A' + r + i);
}

static void check_allgather(md_comm *c)
{
    char all[MAX_RANKS * 11 + 1] = "", mine[11], *own = all + md_comm_rank(c) * 11;
    all[md_comm_size(c) * 11] = '!';
    for (int i = 0; i < 11; i++)
        mine[i] = (char)('A' + md_comm_rank(c) + i);
    md_comm_allgather(c, mine, all, 0);
    assert_int_equal(all[0], 0);
    md_comm_allgather(c, mine, all, sizeof mine);
    check_gathered(c, all);
    memset(all, 0, (size_t)md_comm_size(c) * 11);
    memcpy(own, mine, sizeof mine);
    md_comm_allgather(c, own, all, sizeof mine);
    check_gathered(c, all);
    assert_int_equal(all[md_comm_size(c) * 11], '!');
}

/* Rank s sends (2 s + r) % 3 rows to rank r, which are not as many as come back, and none where it
 * is the last. */
static int64_t rows_between(int s, int r, int size)
{
    return size > 1 && s == size - 1 ? 0 : (2 * s + r) % 3;
}

static void check_alltoallv(md_comm *c)
{
    enum { ROW = 5, ROWS = 2 * MAX_RANKS };
    const int size = md_comm_size(c), rank = md_comm_rank(c);
    int64_t to[MAX_RANKS], from[MAX_RANKS];
    char send[ROWS * ROW], recv[ROWS * ROW + 1], *at = send;
    for (int r = 0; r < size; r++) {
        to[r] = rows_between(rank, r, size);
        from[r] = rows_between(r, rank, size);
        for (int64_t i = 0; i < to[r] * ROW; i++)
            *at++ = (char)(16 * rank + r + i);
    }
    memset(recv, '!', sizeof recv);
    md_comm_alltoallv(c, send, to, recv, from, ROW);
    at = recv;
    for (int r = 0; r < size; r++)
        for (int64_t i = 0; i < from[r] * ROW; i++)
            assert_int_equal(*at++, (char)(16 * r + rank + i));
    assert_int_equal(*at, '!');
}

/* Between host buffers alone. */
static void test_alltoallv(void **state)
{
    (void)state;
    md_comm *halves, *self;
    assert_ok(
        md_comm_split(par_world, md_comm_rank(par_world) % 2, -md_comm_rank(par_world), &halves));
    assert_ok(md_comm_self(&self));
    md_comm *const groups[] = {par_world, halves, self};
    for (size_t i = 0; i < MD_COUNT(groups); i++)
        check_alltoallv(groups[i]);
    md_comm_free(halves);
    md_comm_free(self);
}

#define CHECK_REDUCE_SCATTER(type, dtype)                                        \
    do {                                                                         \
        type send[MAX_RANKS * 33], recv[34] = {0};                               \
        recv[33] = 77;                                                           \
        for (int i = 0; i < size * 33; i++)                                      \
            send[i] = (type)value(i, rank);                                      \
        md_comm_reduce_scatter(c, send, recv, 0, dtype);                         \
        assert_true(recv[0] == 0);                                               \
        md_comm_reduce_scatter(c, send, recv, size * 33, dtype);                 \
        for (int i = 0; i < 33; i++)                                             \
            assert_true(recv[i] == (type)expected(rank * 33 + i, size, MD_SUM)); \
        for (int i = 0; i < size * 33; i++)                                      \
            assert_true(send[i] == (type)value(i, rank));                        \
        assert_true(recv[33] == 77);                                             \
    } while (0)

static void check_reduce_scatter(md_comm *c)
{
    int size = md_comm_size(c), rank = md_comm_rank(c);
    CHECK_REDUCE_SCATTER(float, MD_F32);
    CHECK_REDUCE_SCATTER(double, MD_F64);
    CHECK_REDUCE_SCATTER(int32_t, MD_I32);
    CHECK_REDUCE_SCATTER(int64_t, MD_I64);
}

static void test_collectives(void **state)
{
    (void)state;
    on_every_group(check_allreduce);
    on_every_group(check_moves);
    on_every_group(check_allgather);
    on_every_group(check_reduce_scatter);
    on_every_group(check_bf16);
}

/* The same with every collective cut into slices that do not divide its length. */
static void test_sliced(void **state)
{
    (void)state;
    md_mpi_set_slice(7);
    on_every_group(check_moves);
    on_every_group(check_allgather);
    on_every_group(check_reduce_scatter);
    on_every_group(check_bf16);
    md_mpi_set_slice(47);
    on_every_group(check_allreduce);
    md_mpi_set_slice((int64_t)1 << 28);
}

/* Parts that do not fit the memory of one exchange; a group of one may work in place. */
static void test_long_reduce_scatter(void **state)
{
    (void)state;
    int size = md_comm_size(par_world), rank = md_comm_rank(par_world);
    int64_t part = 150001, n = size * part;
    float *send = md_alloc((size_t)n * sizeof *send, "test");
    float *recv = md_alloc((size_t)part * sizeof *recv, "test");
    for (int64_t i = 0; i < n; i++)
        send[i] = (float)value(i, rank);
    md_comm_reduce_scatter(par_world, send, recv, n, MD_F32);
    for (int64_t i = 0; i < part; i++)
        assert_true(recv[i] == (float)expected(rank * part + i, size, MD_SUM));
    if (size == 1) {
        md_comm_reduce_scatter(par_world, send, send, n, MD_F32);
        assert_memory_equal(send, recv, (size_t)n * sizeof *send);
    }
    md_free(send);
    md_free(recv);
}

/* Sums so long that they go in two phases, with elements that do not divide; and that every rank
 * gets the same bits where sums are not exact. */
static void check_long_sum(md_comm *c)
{
    enum { LONG = 100003 };
    static float x[LONG];
    static int64_t n[LONG];
    for (int64_t i = 0; i < LONG; i++) {
        x[i] = (float)value(i, md_comm_rank(c));
        n[i] = value(i, md_comm_rank(c));
    }
    md_comm_allreduce(c, x, LONG, MD_F32, MD_SUM);
    md_comm_allreduce(c, n, LONG, MD_I64, MD_SUM);
    for (int64_t i = 0; i < LONG; i++)
        assert_true(x[i] == (float)expected(i, md_comm_size(c), MD_SUM) &&
                    n[i] == expected(i, md_comm_size(c), MD_SUM));
    for (int64_t i = 0; i < LONG; i++)
        x[i] = 1.0f / (float)(i + 3 + 7 * md_comm_rank(c));
    md_comm_allreduce(c, x, LONG, MD_F32, MD_SUM);
    static float first[LONG];
    memcpy(first, x, sizeof first);
    md_comm_bcast(c, first, sizeof first, 0);
    assert_memory_equal(x, first, sizeof first);
}

static void test_long_sum(void **state)
{
    (void)state;
    on_every_group(check_long_sum);
    md_mpi_set_slice(9973);
    check_long_sum(par_world);
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

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_collectives),         cmocka_unit_test(test_sliced),
    cmocka_unit_test(test_long_reduce_scatter), cmocka_unit_test(test_long_sum),
    cmocka_unit_test(test_split_order),         cmocka_unit_test(test_shared),
    cmocka_unit_test(test_bf16_rounds),         cmocka_unit_test(test_alltoallv),
};

PAR_MAIN(tests)
