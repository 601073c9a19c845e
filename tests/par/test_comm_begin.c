/* Non-blocking collectives, several under way at once on one group and on several; and what is
 * counted, which a planned group must count alike. */
#include "tests/par/groups.h"

enum { PART = 120, MIXED = 3 };

/* One collective of each kind under way together, with room for any group. */
typedef struct flight {
    md_comm *c;
    md_comm_request req[MIXED];
    float sums[N];
    double send[MAX_RANKS * PART], part[PART];
    int32_t all[MAX_RANKS * PART];
} flight;

/* `salt` tells the inputs of flights apart. */
static void flight_begin(flight *f, md_comm *c, int salt)
{
    int rank = md_comm_rank(c), size = md_comm_size(c);
    f->c = c;
    for (int i = 0; i < N; i++)
        f->sums[i] = (float)value(i + salt, rank);
    for (int i = 0; i < size * PART; i++) {
        f->send[i] = value(i + 3 * salt, rank);
        f->all[i] = i / PART == rank ? value(i, salt) : -1;
    }
    md_comm_allreduce_begin(c, f->sums, N, MD_F32, MD_SUM, &f->req[0]);
    md_comm_reduce_scatter_begin(c, f->send, f->part, size * PART, MD_F64, &f->req[1]);
    md_comm_allgather_begin(c, f->all, PART * sizeof *f->all, &f->req[2]);
}

static void flight_check(const flight *f, int salt)
{
    int rank = md_comm_rank(f->c), size = md_comm_size(f->c);
    for (int i = 0; i < N; i++)
        assert_true(f->sums[i] == (float)expected(i + salt, size, MD_SUM));
    for (int i = 0; i < PART; i++)
        assert_true(f->part[i] == expected(rank * PART + i + 3 * salt, size, MD_SUM));
    for (int i = 0; i < size * PART; i++)
        assert_int_equal(f->all[i], value(i, salt));
}

/* Several flights on one group, finished out of order, with and without polling; requests and the
 * memory behind them are used again. */
static void check_nonblocking(md_comm *c)
{
    static flight f[3];
    for (int round = 0; round < 3; round++) {
        for (int k = 0; k < 3; k++)
            flight_begin(&f[k], c, k + round);
        for (int k = 0; round == 0 && k < 3; k++)
            while (!md_comm_poll(c, f[k].req, MIXED))
                ;
        for (int k = 2; k >= 0; k--)
            for (int i = 0; i < MIXED; i++)
                md_comm_wait(c, &f[k].req[(i + round) % MIXED]);
        for (int k = 0; k < 3; k++)
            flight_check(&f[k], k + round);
    }
    md_comm_wait(c, &f[0].req[0]);
}

static void check_empty(md_comm *c)
{
    md_comm_request req[MIXED] = {0};
    float x[2] = {3, 4};
    md_comm_allreduce_begin(c, x, 0, MD_F32, MD_SUM, &req[0]);
    md_comm_reduce_scatter_begin(c, x, x + 1, 0, MD_F32, &req[1]);
    md_comm_allgather_begin(c, x, 0, &req[2]);
    assert_true(md_comm_poll(c, req, MIXED));
    for (int i = 0; i < MIXED; i++)
        md_comm_wait(c, &req[i]);
    assert_true(x[0] == 3 && x[1] == 4);
}

static void test_nonblocking(void **state)
{
    (void)state;
    on_every_group(check_nonblocking);
    on_every_group(check_empty);
    md_mpi_set_slice(300); /* four slices: N is more than three */
    on_every_group(check_nonblocking);
    md_mpi_set_slice((int64_t)1 << 28);
}

/* From one slice of a request in use to all four, the last one whole or not. */
static void test_all_slices(void **state)
{
    (void)state;
    static double send[MAX_RANKS * PART], part[PART];
    static char all[MAX_RANKS * PART];
    int size = md_comm_size(par_world), rank = md_comm_rank(par_world), n = size * PART;
    for (int i = 0; i < n; i++)
        send[i] = value(i, rank);
    for (int slice = PART / 4; slice <= n; slice += 7) {
        md_comm_request req[2] = {0};
        md_mpi_set_slice(slice);
        memset(part, 0, sizeof part);
        for (int i = 0; i < n; i++)
            all[i] = (char)(i / PART == rank ? value(i, 5) : -1);
        md_comm_allgather_begin(par_world, all, PART, &req[0]);
        if (n <= 4 * slice)
            md_comm_reduce_scatter_begin(par_world, send, part, n, MD_F64, &req[1]);
        md_comm_wait(par_world, &req[1]);
        md_comm_wait(par_world, &req[0]);
        for (int i = 0; n <= 4 * slice && i < PART; i++)
            assert_true(part[i] == expected(rank * PART + i, size, MD_SUM));
        for (int i = 0; i < n; i++)
            assert_int_equal(all[i], (char)value(i, 5));
    }
    md_mpi_set_slice((int64_t)1 << 28);
}

/* Flights on all groups of a process grid at once, and blocking collectives between them. */
static void fly_on_grid(int tensor)
{
    static flight f[4];
    md_topo t;
    assert_ok(
        md_topo_create(par_world, &(md_topo_args){.tensor = tensor, .across_nodes = true}, &t));
    md_comm *group[] = {t.tp, t.dp, t.all, t.world};
    for (int round = 0; round < 2; round++) {
        for (int k = 0; k < 4; k++)
            flight_begin(&f[k], group[k], 10 * k + round);
        int64_t one = 1;
        md_comm_allreduce(t.tp, &one, 1, MD_I64, MD_SUM);
        assert_int_equal(one, t.tp_size);
        md_comm_allreduce(t.all, &one, 1, MD_I64, MD_SUM);
        assert_int_equal(one, t.tp_size * t.tp_size * t.dp_size);
        for (int k = 3; k >= 0; k--) {
            md_comm_poll(group[k], f[k].req, MIXED);
            for (int i = MIXED - 1; i >= 0; i--)
                md_comm_wait(group[k], &f[k].req[i]);
        }
        for (int k = 0; k < 4; k++)
            flight_check(&f[k], 10 * k + round);
    }
    md_topo_free(&t);
}

static void test_several_groups(void **state)
{
    (void)state;
    for (int tensor = 1; tensor <= md_comm_size(par_world); tensor++)
        if (md_comm_size(par_world) % tensor == 0)
            fly_on_grid(tensor);
}

/* Inexact values: both forms add in the same order, whatever the slices. */
static void check_same_bits(md_comm *c)
{
    static float send[MAX_RANKS * PART], now[PART], later[PART];
    md_comm_request req = {0};
    int n = md_comm_size(c) * PART;
    for (int i = 0; i < n; i++)
        send[i] = 1.0f / (float)(i + 3 + 7 * md_comm_rank(c));
    md_comm_reduce_scatter(c, send, now, n, MD_F32);
    for (int64_t slice = 500; slice <= (int64_t)1 << 28; slice <<= 19) {
        memset(later, 0, sizeof later);
        md_mpi_set_slice(slice);
        md_comm_reduce_scatter_begin(c, send, later, n, MD_F32, &req);
        md_comm_wait(c, &req);
        md_mpi_set_slice((int64_t)1 << 28);
        assert_memory_equal(now, later, sizeof now);
    }
}

static void test_same_bits(void **state)
{
    (void)state;
    on_every_group(check_same_bits);
}

/* After a reserve nothing is allocated; all of it goes with the group. */
static void check_reserve(md_comm *c)
{
    static float send[2][MAX_RANKS * PART], part[2][PART];
    md_comm_request req[2] = {0};
    int n = md_comm_size(c) * PART;
    assert_ok(md_comm_reserve(c, n * (int64_t)sizeof(float), 2));
    size_t held = md_alloc_now();
    for (int round = 0; round < 3; round++) {
        for (int k = 0; k < 2; k++)
            md_comm_reduce_scatter_begin(c, send[k], part[k], n, MD_F32, &req[k]);
        for (int k = 0; k < 2; k++)
            md_comm_wait(c, &req[k]);
        assert_int_equal(md_alloc_now(), held);
    }
}

static void test_reserve(void **state)
{
    (void)state;
    md_comm *c;
    size_t before = md_alloc_now();
    assert_ok(md_comm_split(par_world, 0, md_comm_rank(par_world), &c));
    check_reserve(c);
    md_comm_free(c);
    assert_int_equal(md_alloc_now(), before);
    md_backend *be;
    assert_ok(md_backend_create("cpu", 1, &be));
    before = md_alloc_now();
    assert_ok(md_comm_split(par_world, 0, md_comm_rank(par_world), &c));
    md_comm *staged;
    assert_ok(md_comm_staged(c, be, &staged));
    check_reserve(staged);
    md_comm_free(staged);
    md_comm_free(c);
    assert_int_equal(md_alloc_now(), before);
    md_backend_destroy(be);
}

/* Every collective once, some twice; buffers may be NULL for a planned group. */
static void call_each(md_comm *c, float *x, float *y)
{
    md_comm_request req[MIXED] = {0};
    int size = md_comm_size(c);
    md_comm_barrier(c);
    md_comm_allreduce(c, x, 10, MD_F32, MD_SUM);
    md_comm_allreduce(c, x, 0, MD_F32, MD_SUM);
    md_comm_bcast(c, x, 7, size - 1);
    md_comm_allgather(c, x, y, 12);
    md_comm_reduce_scatter(c, x, y, size * 3, MD_F64);
    md_comm_exscan(c, 5);
    md_comm_allreduce_begin(c, x, 9, MD_I32, MD_MAX_OP, &req[0]);
    md_comm_wait(c, &req[0]);
    md_comm_allgather_begin(c, x, 8, &req[1]);
    md_comm_wait(c, &req[1]);
    md_comm_reduce_scatter_begin(c, x, y, size * 5, MD_F32, &req[2]);
    md_comm_poll(c, &req[2], 1);
    md_comm_wait(c, &req[2]);
}

static void check_counts(md_comm *c)
{
    static float x[MAX_RANKS * 8], y[MAX_RANKS * 8];
    md_comm *plan;
    int size = md_comm_size(c);
    md_comm_count before = md_comm_counted(c);
    call_each(c, x, y);
    md_comm_count after = md_comm_counted(c);
    assert_int_equal(after.calls - before.calls, 10);
    assert_int_equal(after.bytes - before.bytes, 40 + 7 + 12 + size * 24 + 8 + 36 + 8 + size * 20);
    double passed = 2 * 40 + 7 + size * 12 + size * 24 + 2 * 36 + size * 8 + size * 20;
    double sent = passed * (size - 1) / size + (size > 1 ? 8 : 0);
    assert_true(after.sent - before.sent > sent - 1e-6 && after.sent - before.sent < sent + 1e-6);
    assert_ok(md_comm_plan(md_comm_rank(c), size, &plan));
    call_each(plan, NULL, NULL);
    md_comm_count planned = md_comm_counted(plan);
    assert_int_equal(planned.calls, after.calls - before.calls);
    assert_int_equal(planned.bytes, after.bytes - before.bytes);
    assert_true(planned.sent > sent - 1e-6 && planned.sent < sent + 1e-6);
    md_comm_free(plan);
}

static void test_counts(void **state)
{
    (void)state;
    on_every_group(check_counts);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_nonblocking),    cmocka_unit_test(test_all_slices),
    cmocka_unit_test(test_several_groups), cmocka_unit_test(test_same_bits),
    cmocka_unit_test(test_reserve),        cmocka_unit_test(test_counts),
};

PAR_MAIN(tests)
