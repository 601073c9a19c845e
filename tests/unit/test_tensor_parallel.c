/* What tensor parallelism and ZeRO work out from ranks and sizes alone, looped over process grids
 * in one process: parts of parameters, places in the graph, pieces of the flat blocks. */
#include "src/drift.h"
#include "src/setup.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void config_make(md_config *c, int tensor, bool sequence, bool zero)
{
    char keys[3][64];
    snprintf(keys[0], 64, "parallel.tensor=%d", tensor);
    snprintf(keys[1], 64, "parallel.sequence=%s", sequence && tensor > 1 ? "true" : "false");
    snprintf(keys[2], 64, "parallel.zero=%d", zero);
    char *list[] = {"method.teacher.kind=pixel",
                    "model.layers=2",
                    "model.width=48",
                    "model.heads=4",
                    "image.size=8",
                    "model.patch=2",
                    "method.mask.count=6",
                    "train.batch=16",
                    "method.mask.min_block=4",
                    "parallel.bucket_mib=1",
                    keys[0],
                    keys[1],
                    keys[2]};
    assert_int_equal(md_config_init(c), MD_OK);
    if (md_config_load(c, NULL, (int)MD_COUNT(list), list) != MD_OK)
        fail_msg("%s", md_error_text());
}

/* Rank (d, t) of a grid, on groups that only count. */
static void topo_make(md_topo *o, int d, int dp, int t, int tp)
{
    *o = (md_topo){.tp_rank = t, .tp_size = tp, .dp_rank = d, .dp_size = dp};
    assert_int_equal(md_comm_plan(t, tp, &o->tp), MD_OK);
    assert_int_equal(md_comm_plan(d, dp, &o->dp), MD_OK);
    assert_int_equal(md_comm_plan(d * tp + t, dp * tp, &o->all), MD_OK);
    o->op_tp = o->tp, o->op_dp = o->dp, o->op_all = o->all;
}

/* One simulated rank. */
typedef struct seat {
    md_config config;
    md_topo topo;
    md_batch_layout layout;
    md_model model;
} seat;

static void seat_make(seat *s, const int at[2], const int grid[2], bool sequence, bool zero)
{
    memset(s, 0, sizeof *s);
    config_make(&s->config, grid[1], sequence, zero);
    topo_make(&s->topo, at[0], grid[0], at[1], grid[1]);
    assert_int_equal(md_batch_layout_make(&s->config, grid[0] * grid[1], &s->layout), MD_OK);
    if (md_model_make(&s->config, NULL, &s->topo, &s->layout, &s->model) != MD_OK)
        fail_msg("%s", md_error_text());
}

static void seat_free(seat *s)
{
    md_model_free(&s->model);
    md_topo_free(&s->topo);
    md_config_free(&s->config);
}

static const int grids[][2] = {{1, 1}, {2, 1}, {3, 1}, {1, 2}, {1, 4},
                               {2, 2}, {4, 2}, {2, 4}, {8, 1}};

/* ---- parameters ---- */

/* The parts of all ranks make the whole, with the values of the uncut registry. */
static void test_parts_make_the_whole(void **state)
{
    (void)state;
    seat whole, part;
    seat_make(&whole, (int[]){0, 0}, (int[]){1, 1}, false, false);
    assert_int_equal(md_model_allocate(&whole.config, NULL, &whole.model), MD_OK);
    const md_params *w = &whole.model.method.params;
    for (int tp = 2; tp <= 4; tp += 2) {
        int64_t cut_elements = 0;
        for (int t = 0; t < tp; t++) {
            seat_make(&part, (int[]){0, t}, (int[]){1, tp}, false, false);
            assert_int_equal(md_model_allocate(&part.config, NULL, &part.model), MD_OK);
            const md_params *p = &part.model.method.params;
            assert_int_equal(p->count, w->count);
            assert_true(md_params_hash(p) == md_params_hash(w));
            assert_int_equal(md_params_total(p), md_params_total(w));
            for (int i = 0; i < p->count; i++) {
                const md_param *row = &p->row[i], *from = &w->row[i];
                cut_elements += row->cut ? row->count : 0;
                assert_int_equal(row->count * (row->cut ? tp : 1), from->count);
                assert_int_equal(row->view.runs * row->view.run, row->count);
                for (int64_t e = 0; e < row->count; e++) {
                    float have = p->value[row->offset + e];
                    float want = w->value[from->offset + md_view_global(&row->view, e)];
                    assert_memory_equal(&have, &want, sizeof have);
                }
            }
            seat_free(&part);
        }
        assert_int_equal(cut_elements, 2 * (3 * 48 * 48 + 2 * 48 + 48 * 48 + 2 * 48 * 192 + 192) +
                                           (7 * 7 + 3) * 4);
    }
    seat_free(&whole);
}

/* Heads of a fused qkv are cut in each of its three parts. */
static void test_qkv_is_cut_by_heads(void **state)
{
    (void)state;
    seat s;
    seat_make(&s, (int[]){0, 1}, (int[]){1, 2}, false, false);
    const md_params *p = &s.model.method.params;
    const md_param *row = &p->row[md_params_find(p, "blocks.1.attn.qkv.weight")];
    assert_int_equal(row->local[0], 72);
    for (int k = 0; k < 3; k++)
        for (int r = 0; r < 24; r++)
            assert_int_equal(md_view_global(&row->view, (k * 24 + r) * 48), (k * 48 + 24 + r) * 48);
    seat_free(&s);
}

static void test_refuses_what_does_not_divide(void **state)
{
    (void)state;
    static const struct {
        int tensor, ranks;
        const char *key, *says;
    } cases[] = {{3, 3, "model.heads=4", "parallel.tensor = 3 must divide model.heads = 4"},
                 {2, 2, "model.mlp=193", "must divide the MLP's width 193"},
                 {2, 3, "model.heads=4", "parallel.tensor = 2 does not divide the 3 ranks"},
                 {4, 8, "train.micro_batch=2", "do not divide over parallel.tensor = 4"}};
    for (size_t i = 0; i < MD_COUNT(cases); i++) {
        char tensor[64];
        snprintf(tensor, sizeof tensor, "parallel.tensor=%d", cases[i].tensor);
        char *keys[] = {"method.teacher.kind=pixel",
                        "model.width=48",
                        "model.heads=4",
                        "train.batch=16",
                        tensor,
                        (char *)cases[i].key};
        md_config c;
        md_batch_layout layout;
        assert_int_equal(md_config_init(&c), MD_OK);
        md_status st = md_config_load(&c, NULL, (int)MD_COUNT(keys), keys);
        if (st == MD_OK)
            st = md_batch_layout_make(&c, cases[i].ranks, &layout);
        assert_int_equal(st, MD_ERR_CONFIG);
        if (!strstr(md_error_text(), cases[i].says))
            fail_msg("%s", md_error_text());
        md_config_free(&c);
    }
}

/* ---- places ---- */

static void test_grad_places(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        md_place plain, sequence;
    } want[] = {{"patch_embed.proj.weight", MD_REPL, MD_PARTIAL},
                {"cls_token", MD_REPL, MD_PARTIAL},
                {"rel_pos_bias.relative_position_bias_table", MD_CUT_COLS, MD_CUT_COLS},
                {"blocks.0.norm1.weight", MD_REPL, MD_PARTIAL},
                {"blocks.1.attn.qkv.weight", MD_CUT_COLS, MD_CUT_COLS},
                {"blocks.1.attn.v_bias", MD_CUT_COLS, MD_CUT_COLS},
                {"blocks.1.attn.proj.weight", MD_CUT_COLS, MD_CUT_COLS},
                {"blocks.1.attn.proj.bias", MD_REPL, MD_PARTIAL},
                {"blocks.1.gamma_2", MD_REPL, MD_PARTIAL},
                {"blocks.1.mlp.fc1.bias", MD_CUT_COLS, MD_CUT_COLS},
                {"norm.bias", MD_REPL, MD_PARTIAL},
                {"lm_head.weight", MD_REPL, MD_PARTIAL}};
    for (int sequence = 0; sequence < 2; sequence++) {
        seat s;
        seat_make(&s, (int[]){0, 1}, (int[]){1, 2}, sequence, false);
        const md_graph *g = &s.model.method.student_graph;
        for (size_t i = 0; i < MD_COUNT(want); i++) {
            int row = md_params_find(g->params, want[i].name);
            assert_true(row >= 0);
            assert_int_equal(md_graph_grad_place(g, row),
                             sequence ? want[i].sequence : want[i].plain);
        }
        assert_int_equal(md_graph_tensor(g, s.model.method.s_loss)->place,
                         sequence ? MD_PARTIAL : MD_REPL);
        seat_free(&s);
    }
}

/* A small cut MLP, in whose graph one node at a time is left out. */
enum { NOTHING, ENTER, EXIT, BIAS, ACTIVATION, RESIDUAL };
static md_status build_mlp(int left_out, bool sequence)
{
    md_params p;
    md_graph g;
    md_comm *tp;
    md_params_init(&p);
    md_param row[] = {{.name = "fc1", .rank = 2, .global = {32, 8}, .cut_dim = 0, .cut_parts = 1},
                      {.name = "b1", .rank = 1, .global = {32}, .cut_dim = 0, .cut_parts = 1},
                      {.name = "fc2", .rank = 2, .global = {8, 32}, .cut_dim = 1, .cut_parts = 1},
                      {.name = "b2", .rank = 1, .global = {8}, .cut_dim = -1, .cut_parts = 1},
                      {.name = "w", .rank = 1, .global = {8}, .cut_dim = -1, .cut_parts = 1},
                      {.name = "b", .rank = 1, .global = {8}, .cut_dim = -1, .cut_parts = 1},
                      {.name = "in", .rank = 2, .global = {8, 8}, .cut_dim = -1, .cut_parts = 1},
                      {.name = "last_w", .rank = 1, .global = {8}, .cut_dim = -1, .cut_parts = 1},
                      {.name = "last_b", .rank = 1, .global = {8}, .cut_dim = -1, .cut_parts = 1}};
    for (int i = 0; i < (int)MD_COUNT(row); i++)
        assert_int_equal(md_params_add(&p, &row[i]), i);
    assert_int_equal(md_params_seal(&p, &(md_params_cut){1, 2, MD_PARAM_ALIGN}), MD_OK);
    assert_int_equal(md_comm_plan(1, 2, &tp), MD_OK);
    md_graph_init(&g, &p, true, tp);
    md_slot x = md_graph_input(&g, "x", MD_F32, 2, (int64_t[]){sequence ? 2 : 4, 8}), y, r, unused;
    if (sequence)
        md_graph_cut_rows(&g, x);
    x = md_n_linear(&g, x, 6, MD_NO_PARAM, MD_ACT_NONE);
    const md_residual_in norm = {x,           MD_NO_SLOT, MD_NO_SLOT, MD_NO_SLOT, MD_NO_SLOT,
                                 MD_NO_PARAM, 4,          5,          1e-6f};
    md_n_residual_ln(&g, &norm, &unused, &y);
    md_slot h = left_out == ENTER ? y : md_n_enter(&g, y, 0);
    h = md_n_linear(&g, h, 0, left_out == BIAS ? 3 : 1, MD_ACT_GELU);
    h = md_n_linear(&g, h, 2, 3, left_out == ACTIVATION ? MD_ACT_GELU : MD_ACT_NONE);
    y = left_out == EXIT ? h : md_n_exit(&g, h, x);
    md_slot z = left_out == RESIDUAL ? md_n_exit(&g, h, h) : y;
    const md_residual_in last = {x,           z, MD_NO_SLOT, MD_NO_SLOT, MD_NO_SLOT,
                                 MD_NO_PARAM, 7, 8,          1e-6f};
    md_n_residual_ln(&g, &last, &r, &unused);
    md_status st = md_graph_finish(&g);
    md_graph_free(&g);
    md_params_free(&p);
    md_comm_free(tp);
    return st;
}

static void test_left_out_nodes_are_refused(void **state)
{
    (void)state;
    static const struct {
        int what;
        const char *plain, *sequence;
    } cases[] = {
        {ENTER, "is replicated over the tensor-parallel ranks but has to be entered",
         "is cut by rows over the tensor-parallel ranks but has to be entered"},
        {EXIT, "is partial over the tensor-parallel ranks but has to be replicated",
         "is partial over the tensor-parallel ranks but has to be cut by rows"},
        {BIAS, "fc1 and b2 are not cut alike", "fc1 and b2 are not cut alike"},
        {ACTIVATION, "an activation cannot come before the sum of fc2",
         "an activation cannot come before the sum of fc2"},
        {RESIDUAL, NULL, "is replicated over the tensor-parallel ranks but has to be cut by rows"}};
    for (int sequence = 0; sequence < 2; sequence++) {
        if (build_mlp(NOTHING, sequence) != MD_OK)
            fail_msg("%s", md_error_text());
        for (size_t i = 0; i < MD_COUNT(cases); i++) {
            const char *says = sequence ? cases[i].sequence : cases[i].plain;
            if (!says)
                continue;
            assert_int_equal(build_mlp(cases[i].what, sequence), MD_ERR_BUG);
            if (!strstr(md_error_text(), says))
                fail_msg("%s", md_error_text());
        }
    }
}

/* ---- pieces ---- */

/* Marks the elements of the global arrays that the pieces of one rank hold. */
static void mark(const md_params *p, const md_piece *piece, int n, int *const *seen)
{
    for (int i = 0; i < p->count; i++) {
        const md_param *row = &p->row[i];
        int64_t lo, moment, found = md_shard_find(piece, n, row, &lo, &moment);
        for (int64_t e = lo; e < lo + found; e++)
            seen[i][md_view_global(&row->view, e)]++;
    }
}

static void check_counts(const md_params *p, int *const *seen, bool exactly_one)
{
    for (int i = 0; i < p->count; i++) {
        int64_t n = p->row[i].cut ? p->row[i].view.stride * p->row[i].view.runs : p->row[i].count;
        for (int64_t e = 0; e < n; e++)
            if (exactly_one ? seen[i][e] != 1 : seen[i][e] < 1)
                fail_msg("%s: element %lld of %lld is there %d times", p->row[i].name, (long long)e,
                         (long long)n, seen[i][e]);
    }
}

static void check_grid(const int grid[2], bool sequence, bool zero)
{
    enum { ROWS = 64, ELEMENTS = 16384 };
    static int own_count[ROWS][ELEMENTS], update_count[ROWS][ELEMENTS];
    int *own[ROWS], *update[ROWS];
    memset(own_count, 0, sizeof own_count);
    memset(update_count, 0, sizeof update_count);
    for (int i = 0; i < ROWS; i++) {
        own[i] = own_count[i];
        update[i] = update_count[i];
    }
    seat s;
    int64_t moments = -1;
    for (int d = 0; d < grid[0]; d++)
        for (int t = 0; t < grid[1]; t++) {
            seat_make(&s, (int[]){d, t}, grid, sequence, zero);
            const md_params *p = &s.model.method.params;
            const md_shard *h = &s.model.shard;
            assert_true(p->count <= ROWS);
            assert_true(moments < 0 || moments == h->moments); /* the same load on all */
            moments = h->moments;
            assert_true(h->zero == (zero && (grid[0] > 1 || (sequence && grid[1] > 1))));
            mark(p, h->own, h->owns, own);
            mark(p, h->update, h->updates, update);
            if (h->zero) /* the pieces fill the moments without a gap */
                for (int i = 0; i < h->updates; i++)
                    assert_true(h->update[i].moment + h->update[i].count ==
                                (i + 1 < h->updates ? h->update[i + 1].moment : h->moments));
            if (d + 1 < grid[0] || t + 1 < grid[1])
                seat_free(&s);
        }
    check_counts(&s.model.method.params, own, true);
    check_counts(&s.model.method.params, update, false);
    if (zero && !sequence)
        assert_true(moments * grid[0] == s.model.method.params.elements);
    seat_free(&s);
}

static void test_every_element_has_one_owner(void **state)
{
    (void)state;
    for (size_t i = 0; i < MD_COUNT(grids); i++)
        for (int k = 0; k < 4; k++)
            if (16 % grids[i][0] == 0 && (!(k & 1) || grids[i][1] > 1))
                check_grid(grids[i], k & 1, k & 2);
}

/* ---- drift ---- */

static void test_drift_names_the_minority(void **state)
{
    (void)state;
    char text[1024];
    md_drift_row row[24];
    memset(row, 0, sizeof row);
    for (int i = 0; i < 24; i++) {
        row[i] =
            (md_drift_row){.whole = 7, .cut = 100 + (uint64_t)(i % 2), .tp_rank = i % 2, .rank = i};
        snprintf(row[i].host, sizeof row[i].host, "node%d", i / 4);
    }
    md_drift_judge(row, 24, text, sizeof text);
    assert_string_equal(text, "");
    row[5].cut = 9;
    md_drift_judge(row, 24, text, sizeof text);
    assert_string_equal(text, "rank 5 (node1, tensor rank 1)");
    row[8].whole = 9;
    md_drift_judge(row, 24, text, sizeof text);
    assert_string_equal(text, "rank 5 (node1, tensor rank 1), rank 8 (node2, tensor rank 0)");
    row[0].whole = 1; /* two ranks that differ: nobody has most */
    md_drift_judge(row, 2, text, sizeof text);
    assert_string_equal(text, "rank 0 (node0, tensor rank 0), rank 1 (node0, tensor rank 1)");
    for (int i = 0; i < 24; i++)
        row[i].whole = (uint64_t)i;
    md_drift_judge(row, 24, text, sizeof text);
    assert_non_null(strstr(text, "rank 7 (node1, tensor rank 1) and 16 more"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parts_make_the_whole),
        cmocka_unit_test(test_qkv_is_cut_by_heads),
        cmocka_unit_test(test_refuses_what_does_not_divide),
        cmocka_unit_test(test_grad_places),
        cmocka_unit_test(test_left_out_nodes_are_refused),
        cmocka_unit_test(test_every_element_has_one_owner),
        cmocka_unit_test(test_drift_names_the_minority),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
