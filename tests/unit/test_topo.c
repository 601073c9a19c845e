/* The process grid as a pure function: many shapes of jobs in one process; and its table. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "mpi/topo_table.h"

enum { MAX_RANKS = 160, MAX_NODES = 16 };

typedef enum order { BLOCK, CYCLIC, BACKWARDS, SCATTERED } order;

/* Nodes of `count[k]` ranks; the numbers that name them are in no order. Returns the ranks. */
static int lay_out(const int *count, int nodes, order how, int *node)
{
    int left[MAX_NODES], ranks = 0, k = 0;
    for (int i = 0; i < nodes; i++)
        ranks += left[i] = count[i];
    assert_true(ranks <= MAX_RANKS);
    for (int n = 0; n < ranks; n++) {
        int wish[] = {0, k + 1, nodes - 1, n * (n + 5)}, step = how == BACKWARDS ? nodes - 1 : 1;
        for (k = wish[how] % nodes; left[k] == 0;)
            k = (k + step) % nodes;
        left[k]--;
        node[n] = (k * 7 + 3) % 31;
    }
    return ranks;
}

/* What must hold for every grid: each cell once, ranks of a group on one node and ascending, nodes
 * in the order of their lowest ranks. */
static void check_cells(const int *node, int ranks, const md_topo_args *a, const md_topo_cell *cell)
{
    int at[MAX_RANKS], last_first = -1;
    memset(at, -1, sizeof at);
    for (int r = 0; r < ranks; r++) {
        assert_true(cell[r].tp >= 0 && cell[r].tp < a->tensor);
        assert_true(cell[r].dp >= 0 && cell[r].dp < ranks / a->tensor);
        assert_int_equal(at[cell[r].dp * a->tensor + cell[r].tp], -1);
        at[cell[r].dp * a->tensor + cell[r].tp] = r;
    }
    assert_int_equal(at[0], 0);
    for (int g = 0; g < ranks; g++) {
        const md_topo_cell *c = &cell[at[g]];
        bool begins = g == 0 || node[at[g]] != node[at[g - 1]];
        if (begins) {
            for (int r = 0; r < at[g]; r++) /* the lowest of its node, and later than the last */
                assert_int_not_equal(node[r], node[at[g]]);
            assert_true(at[g] > last_first);
            last_first = at[g];
        } else {
            assert_true(at[g] > at[g - 1]);
        }
        assert_int_equal(c->node_rank, begins ? 0 : cell[at[g - 1]].node_rank + 1);
        assert_int_equal(c->node, g == 0 ? 0 : cell[at[g - 1]].node + begins);
        if (!a->across_nodes && c->tp > 0)
            assert_false(begins);
    }
}

/* Every group size up to one that is too large, allowed to cross and not. Returns the grids. */
static int check_layout(const int *count, int nodes, order how)
{
    int node[MAX_RANKS], grids = 0;
    md_topo_cell cell[MAX_RANKS];
    int ranks = lay_out(count, nodes, how, node);
    for (int tensor = 1; tensor <= ranks + 1; tensor++)
        for (int across = 0; across < 2; across++) {
            md_topo_args a = {tensor, across != 0};
            bool fits = ranks % tensor == 0;
            for (int k = 0; k < nodes; k++)
                fits = fits && (across || count[k] % tensor == 0);
            md_status st = md_topo_place(node, ranks, &a, cell);
            assert_int_equal(st, fits ? MD_OK : MD_ERR_CONFIG);
            if (fits)
                check_cells(node, ranks, &a, cell);
            grids += fits;
        }
    return grids;
}

static void test_place(void **state)
{
    (void)state;
    static const struct {
        int nodes, count[MAX_NODES];
    } jobs[] = {
        {1, {1}},
        {1, {2}},
        {1, {7}},
        {1, {64}},
        {2, {1, 1}},
        {2, {4, 4}},
        {3, {8, 8, 8}},
        {3, {4, 8, 12}},
        {3, {2, 3, 5}},
        {5, {6, 2, 4, 2, 8}},
        {4, {13, 13, 13, 13}},
        {16, {4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4}},
        {8, {16, 16, 16, 16, 16, 16, 16, 48}},
        {6, {1, 1, 1, 1, 1, 1}},
        {2, {97, 3}},
    };
    size_t before = md_alloc_now();
    for (size_t j = 0; j < MD_COUNT(jobs); j++)
        for (order how = BLOCK; how <= SCATTERED; how++)
            assert_true(check_layout(jobs[j].count, jobs[j].nodes, how) >= 2);
    assert_int_equal(md_alloc_now(), before);
}

/* mpirun --map-by node: ranks 0, 2, ... on one node, 1, 3, ... on the other. */
static void test_cyclic_by_hand(void **state)
{
    (void)state;
    const int node[8] = {5, 2, 5, 2, 5, 2, 5, 2};
    const int dp[8] = {0, 2, 0, 2, 1, 3, 1, 3}, tp[8] = {0, 0, 1, 1, 0, 0, 1, 1};
    md_topo_cell cell[8];
    assert_int_equal(md_topo_place(node, 8, &(md_topo_args){.tensor = 2}, cell), MD_OK);
    for (int r = 0; r < 8; r++) {
        assert_int_equal(cell[r].dp, dp[r]);
        assert_int_equal(cell[r].tp, tp[r]);
        assert_int_equal(cell[r].node, r % 2);
        assert_int_equal(cell[r].node_rank, r / 2);
    }
}

static void test_errors(void **state)
{
    (void)state;
    const int node[12] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1};
    md_topo_cell cell[12];
    assert_int_equal(md_topo_place(node, 12, &(md_topo_args){.tensor = 5}, cell), MD_ERR_CONFIG);
    assert_string_equal(md_error_text(),
                        "parallel.tensor = 5 does not divide the 12 ranks: start a multiple of 5, "
                        "or set parallel.tensor to one of 1, 2, 3, 4, 6, 12");
    assert_int_equal(md_topo_place(node, 12, &(md_topo_args){.tensor = 6}, cell), MD_ERR_CONFIG);
    assert_string_equal(
        md_error_text(),
        "parallel.tensor = 6 does not divide the 8 ranks of a node, so that a group would cross "
        "to the next one: start a multiple of 6 ranks on every node, set parallel.tensor to one of "
        "1, 2, 4, or allow it by parallel.tensor_across_nodes");
}

static void test_without_mpi(void **state)
{
    (void)state;
    size_t before = md_alloc_now();
    md_topo t;
    assert_int_equal(md_topo_self(&t), MD_OK);
    assert_ptr_equal(t.world, t.all);
    assert_int_equal(t.tp_size * t.dp_size * t.nodes * t.node_size, 1);
    assert_int_equal(md_comm_size(t.tp) * md_comm_size(t.dp) * md_comm_size(t.all), 1);
    md_topo_free(&t);
    assert_null(t.tp);
    md_topo_free(&t);
    assert_int_equal(md_topo_plan(64, 4, &t), MD_OK);
    assert_int_equal(md_comm_size(t.tp), 4);
    assert_int_equal(md_comm_size(t.dp), 16);
    assert_int_equal(md_comm_size(t.all), 64);
    assert_ptr_equal(t.world, t.all);
    assert_int_equal(t.tp_size, 4);
    assert_int_equal(t.dp_size, 16);
    assert_int_equal(t.tp_rank + t.dp_rank, 0);
    md_topo_free(&t);
    assert_int_equal(md_topo_plan(6, 4, &t), MD_ERR_CONFIG);
    assert_null(t.all);
    assert_int_equal(md_alloc_now(), before);
}

/* ---- table ---- */

static char table[8192];
static int table_lines;

static void take_line(void *ctx, const char *line)
{
    (void)ctx;
    assert_true(strlen(line) < 200);
    size_t n = strlen(table);
    snprintf(table + n, sizeof table - n, "%s\n", line);
    table_lines++;
}

static void show(const md_topo_seat *seat, int ranks)
{
    table[0] = 0;
    table_lines = 0;
    md_topo_lines(seat, ranks, take_line, NULL);
}

static void set_cores(cpu_set_t *set, int from, int to, int step)
{
    CPU_ZERO(set);
    for (int i = from; i <= to; i += step)
        CPU_SET((size_t)i, set);
}

/* `nodes` nodes in blocks, groups of `tensor`; rank i of a node has `width` cores of its own. */
static int seats(md_topo_seat *s, int nodes, int a_node, int tensor, int width)
{
    for (int g = 0; g < nodes * a_node; g++) {
        s[g] = (md_topo_seat){.device = "-",
                              .online = a_node * width,
                              .rank = g,
                              .dp = g / tensor,
                              .tp = g % tensor,
                              .node = g / a_node};
        snprintf(s[g].host, sizeof s[g].host, "cn%03d", g / a_node + 1);
        int i = g % a_node;
        set_cores(&s[g].cores, i * width, (i + 1) * width - 1, 1);
    }
    return nodes * a_node;
}

static void test_table(void **state)
{
    (void)state;
    static md_topo_seat s[64];
    char text[400];
    int n = seats(s, 2, 2, 2, 8);
    show(s, n);
    assert_string_equal(table,
                        "node 0  cn001  ranks 0-1  dp 0  tp 0-1  cores 0-7 8-15  device - x2\n"
                        "node 1  cn002  ranks 2-3  dp 1  tp 0-1  cores 0-7 8-15  device - x2\n");
    n = seats(s, 16, 4, 2, 16);
    show(s, n);
    assert_int_equal(table_lines, 16);
    assert_non_null(strstr(table, "node  0  cn001  ranks 0-3    dp 0-1    tp 0-1  cores 0-15 16-31 "
                                  ".. 48-63  device - x4\n"));
    assert_non_null(strstr(table, "node 15  cn016  ranks 60-63  dp 30-31  tp 0-1  cores"));
    assert_false(md_topo_overlap(s, n, text, sizeof text));
    n = seats(s, 1, 64, 4, 2);
    show(s, n);
    assert_string_equal(table, "node 0  cn001  ranks 0-63  dp 0-15  tp 0-3  cores 0-1 2-3 .. "
                               "126-127  device - x64\n");
}

/* Cyclic ranks, uneven masks, several devices: nothing is left out, lines stay short. */
static void test_irregular_table(void **state)
{
    (void)state;
    static md_topo_seat s[64];
    char text[400];
    int n = seats(s, 1, 4, 1, 4);
    for (int i = 0; i < n; i++) {
        s[i].rank = 3 * i;
        snprintf(s[i].device, sizeof s[i].device, "GPU %d", i);
    }
    CPU_SET(9, &s[0].cores);
    set_cores(&s[2].cores, 0, 62, 2);
    s[3].cores = s[2].cores;
    show(s, n);
    assert_string_equal(table,
                        "node 0  cn001  ranks 0-9:3  dp 0-3  tp 0  cores 0-3,9 4-7 0-62:2 x2  "
                        "device GPU 0, GPU 1, GPU 2,\n"
                        "                                          GPU 3\n");
    n = seats(s, 1, 64, 1, 2);
    for (int i = 0; i < n; i += 2)
        set_cores(&s[i].cores, 2 * i, 2 * i, 1);
    CPU_ZERO(&s[1].cores);
    show(s, n);
    assert_true(table_lines <= 10);
    for (int i = 0; i < n; i += 2) {
        snprintf(text, sizeof text, " %d ", 2 * i);
        for (char *p = table; (p = strchr(p, '\n')); *p = ' ')
            ;
        assert_non_null(strstr(table, text));
    }
    assert_non_null(strstr(table, "cores 0 ? 4 6-7 8"));
}

static void test_overlap(void **state)
{
    (void)state;
    static md_topo_seat s[16];
    char text[400] = "";
    int n = seats(s, 2, 4, 1, 4);
    assert_false(md_topo_overlap(s, n, text, sizeof text));
    for (int i = 0; i < n; i++) /* not bound */
        set_cores(&s[i].cores, 0, 15, 1);
    assert_false(md_topo_overlap(s, n, text, sizeof text));
    for (int i = 0; i < n; i++) /* bound to sockets */
        set_cores(&s[i].cores, i % 4 / 2 * 8, i % 4 / 2 * 8 + 7, 1);
    assert_false(md_topo_overlap(s, n, text, sizeof text));
    for (int i = 0; i < n; i++) /* all on one core; the same core of another node is another one */
        set_cores(&s[i].cores, i < 4 ? i : 0, i < 4 ? i : 0, 1);
    assert_true(md_topo_overlap(s, n, text, sizeof text));
    assert_string_equal(text, "ranks 4 and 5 on cn002 are bound to the same cores (0 and 0): bind "
                              "each rank to its own, or none (mpirun --bind-to none, srun "
                              "--cpu-bind=none)");
    n = seats(s, 1, 4, 1, 4);
    set_cores(&s[2].cores, 7, 11, 1); /* one core of rank 1 */
    assert_true(md_topo_overlap(s, n, text, sizeof text));
    assert_non_null(
        strstr(text, "ranks 1 and 2 on cn001 are bound to the same cores (4-7 and 7-11"));
    set_cores(&s[2].cores, 0, 15, 1); /* one rank was not bound */
    assert_true(md_topo_overlap(s, n, text, sizeof text));
    CPU_ZERO(&s[2].cores); /* not known */
    assert_false(md_topo_overlap(s, n, text, sizeof text));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_place),   cmocka_unit_test(test_cyclic_by_hand),
        cmocka_unit_test(test_errors),  cmocka_unit_test(test_without_mpi),
        cmocka_unit_test(test_table),   cmocka_unit_test(test_irregular_table),
        cmocka_unit_test(test_overlap),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
