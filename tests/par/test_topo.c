/* The process grid on real ranks: every factorisation, its groups and their order. */
#include "tests/par/par_main.h"

#include "mpi/topo_table.h"

static void check_group(md_comm *c, int rank, int size, int64_t sum)
{
    assert_int_equal(md_comm_rank(c), rank);
    assert_int_equal(md_comm_size(c), size);
    int64_t v = md_comm_rank(par_world);
    md_comm_allreduce(c, &v, 1, MD_I64, MD_SUM);
    assert_int_equal(v, sum);
}

/* On one node the order is that of the world. */
static void check_grid(const md_topo *t, int tensor)
{
    int rank = md_comm_rank(par_world), size = md_comm_size(par_world);
    assert_ptr_equal(t->world, par_world);
    assert_int_equal(t->tp_size, tensor);
    assert_int_equal(t->dp_size, size / tensor);
    assert_int_equal(t->tp_rank, rank % tensor);
    assert_int_equal(t->dp_rank, rank / tensor);
    assert_int_equal(t->nodes, 1);
    assert_int_equal(t->node, 0);
    assert_int_equal(t->node_rank, rank);
    assert_int_equal(t->node_size, size);
    int64_t tp = 0, dp = 0;
    for (int i = 0; i < tensor; i++)
        tp += t->dp_rank * tensor + i;
    for (int i = 0; i < t->dp_size; i++)
        dp += i * tensor + t->tp_rank;
    check_group(t->tp, t->tp_rank, tensor, tp);
    check_group(t->dp, t->dp_rank, t->dp_size, dp);
    check_group(t->all, rank, size, size * (size - 1) / 2);
}

static void test_every_grid(void **state)
{
    (void)state;
    int size = md_comm_size(par_world);
    size_t before = md_alloc_now();
    for (int tensor = 1; tensor <= size + 1; tensor++) {
        md_topo t;
        md_status st = md_topo_create(par_world, &(md_topo_args){.tensor = tensor}, &t);
        if (size % tensor == 0) {
            assert_ok(st);
            check_grid(&t, tensor);
        } else {
            assert_int_equal(st, MD_ERR_CONFIG);
            assert_non_null(strstr(md_error_text(), "does not divide"));
            assert_null(t.all);
        }
        md_topo_free(&t);
        assert_int_equal(md_alloc_now(), before);
    }
}

/* A world whose ranks run the other way: the grid follows it. */
static void test_reversed_world(void **state)
{
    (void)state;
    int rank = md_comm_rank(par_world), size = md_comm_size(par_world);
    md_comm *reversed;
    md_topo t;
    assert_ok(md_comm_split(par_world, 0, -rank, &reversed));
    assert_ok(md_topo_create(reversed, &(md_topo_args){.tensor = size}, &t));
    assert_int_equal(t.tp_rank, size - 1 - rank);
    assert_int_equal(md_comm_rank(t.all), size - 1 - rank);
    md_topo_free(&t);
    md_comm_free(reversed);
}

static void test_table(void **state)
{
    (void)state;
    md_topo t;
    int tensor = md_comm_size(par_world) % 2 ? 1 : 2;
    assert_ok(md_topo_create(par_world, &(md_topo_args){.tensor = tensor}, &t));
    assert_ok(md_topo_table(&t, "-"));
    md_topo_free(&t);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_every_grid),
    cmocka_unit_test(test_reversed_world),
    cmocka_unit_test(test_table),
};

PAR_MAIN(tests)
