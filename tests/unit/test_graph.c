/* test_graph: a tiny model that really runs: gradients, accumulation, and ways to compute the same.
 */
#include "src/arena.h"
#include "src/optim.h"
#include "src/rng.h"
#include "tests/unit/method_config.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

typedef struct tiny {
    md_config c;
    md_method m;
    md_backend *be;
    void *region[2];
    uint8_t image[3 * 8 * 8 * 3], mask[3 * 16];
    int32_t index[17 * 17], rows[3 * 6], patches[3 * 6];
    int32_t packed[6][3], packed_rows[3 * 6];
    float target[3 * 6 * 12], keep[6][3];
    double loss;
} tiny;

/* Which images each branch is dropped for: bit j, image j. Never those of the first block. */
static const unsigned dropped[6] = {0, 0, 2, 1, 5, 7};

/* Drop path by the list above; where it skips, the factor of the one image of a branch that all
 * images are dropped for is 0. */
static void tiny_drop(tiny *t)
{
    md_graph *g = &t->m.student_graph;
    for (int k = 2; k < 6; k++) {
        int n = 0;
        for (int j = 0; j < 3; j++) {
            const bool runs = !(dropped[k] >> j & 1) || (dropped[k] == 7 && j == 0);
            t->keep[k][j] = dropped[k] >> j & 1 ? 0.0f : 1.0f / 0.7f;
            t->packed[k][j] = runs ? n++ : -1;
            for (int i = 0; runs && k == 4 && i < 6; i++)
                t->packed_rows[6 * (n - 1) + i] = t->rows[6 * j + i] + 17 * (n - 1 - j);
        }
        md_graph_bind(g, t->m.s_keep[k], t->keep[k]);
        if (!t->m.s_packed)
            continue;
        md_graph_bind(g, t->m.s_packed[k], t->packed[k]);
        md_graph_pack(g, t->m.s_packed[k], n);
    }
    if (t->m.s_packed_rows != MD_NO_SLOT)
        md_graph_bind(g, t->m.s_packed_rows, t->packed_rows);
}

static void tiny_make(tiny *t, const char *backend, const char *rel_pos, const char *last_block,
                      const char *drop, int recompute)
{
    char rel[64], last[64], mode[64], again[64];
    snprintf(again, sizeof again, "train.recompute=%d", recompute);
    snprintf(mode, sizeof mode, "model.drop_path_mode=%s", drop);
    snprintf(last, sizeof last, "model.last_block=%s", last_block);
    snprintf(rel, sizeof rel, "model.rel_pos=%s", rel_pos);
    CONFIG(&t->c, "method.teacher.kind=pixel", "model.layers=3", "model.width=24", "model.heads=3",
           "image.size=8", "model.patch=2", "method.mask.count=6", "train.batch=3",
           "model.drop_path=0.3", "model.abs_pos=true", "method.mask.min_block=4", rel, last, mode,
           again);
    assert_int_equal(md_method_resolve(&t->m, &t->c, NULL, NULL), MD_OK);
    if (md_method_build(&t->m, 3, 3) != MD_OK)
        fail_msg("%s", md_error_text());
    assert_int_equal(md_params_allocate(&t->m.params, NULL, true), MD_OK);
    assert_int_equal(md_params_allocate_moments(&t->m.params, t->m.params.elements, false), MD_OK);
    assert_int_equal(md_backend_create(backend, 1, &t->be), MD_OK);
    t->be->scratch_size = 64 << 20;
    t->be->scratch = md_alloc(t->be->scratch_size, "test");
    md_rng r = md_rng_at(3, MD_RNG_TEST, 0, 0);
    for (int64_t i = 0; i < t->m.params.elements; i++)
        t->m.params.value[i] = 0.4f * (md_rng_float(&r) - 0.5f);
    for (size_t i = 0; i < sizeof t->image; i++)
        t->image[i] = (uint8_t)md_rng_u32(&r);
    for (int j = 0; j < 3; j++) {
        md_mask_sample(&t->m.mask, 0, j, t->mask + 16 * j, t->patches + 6 * j, NULL);
        for (int i = 0; i < 6; i++) {
            t->rows[6 * j + i] = 17 * j + 1 + t->patches[6 * j + i];
            t->patches[6 * j + i] += 16 * j;
        }
    }
    md_graph *g = &t->m.student_graph, *h = &t->m.teacher_graph;
    t->region[0] = md_alloc(g->region_bytes, "test");
    t->region[1] = md_alloc(h->region_bytes, "test");
    md_graph_bind_region(g, t->region[0]);
    md_graph_bind_region(h, t->region[1]);
    md_graph_bind(h, t->m.t_image, t->image);
    md_graph_bind(h, t->m.t_rows, t->patches);
    md_graph_bind(h, t->m.t_target, t->target);
    md_graph_bind(g, t->m.s_image, t->image);
    md_graph_bind(g, t->m.s_mask, t->mask);
    md_graph_bind(g, t->m.s_rows, t->rows);
    md_graph_bind(g, t->m.s_target, t->target);
    md_graph_bind(g, t->m.s_loss, &t->loss);
    if (t->m.s_rel_index != MD_NO_SLOT) {
        md_vit_rel_index(4, t->index);
        md_graph_bind(g, t->m.s_rel_index, t->index);
    }
    tiny_drop(t);
}

static void tiny_free(tiny *t)
{
    md_free(t->region[0]);
    md_free(t->region[1]);
    md_free(t->be->scratch);
    t->be->scratch = NULL;
    md_backend_destroy(t->be);
    md_method_free(&t->m);
    md_config_free(&t->c);
}

static double tiny_forward(tiny *t)
{
    md_status st = md_graph_forward(&t->m.teacher_graph, t->be);
    if (st == MD_OK)
        st = md_graph_forward(&t->m.student_graph, t->be);
    if (st != MD_OK)
        fail_msg("%s", md_error_text());
    return t->loss;
}

static int ready_count[512];
static void count_ready(void *context, int param)
{
    (void)context;
    ready_count[param]++;
}

/* Along a random direction of every parameter, the analytic derivative equals the central
 * difference. The check backend also proves that no op changes its inputs or leaves outputs
 * unwritten. */
static void gradients_match(const char *rel_pos, const char *last_block, const char *drop,
                            int recompute)
{
    tiny *t = test_calloc(1, sizeof *t);
    tiny_make(t, "check", rel_pos, last_block, drop, recompute);
    md_params *p = &t->m.params;
    tiny_forward(t);
    memset(ready_count, 0, sizeof ready_count);
    if (md_graph_backward(&t->m.student_graph, t->be, false, count_ready, NULL) != MD_OK)
        fail_msg("%s", md_error_text());
    for (int i = 0; i < p->count; i++) {
        const md_param *row = &p->row[i];
        float *v = p->value + row->offset, *g = p->grad + row->offset;
        float saved[4096];
        assert_int_equal(ready_count[i], 1);
        assert_true(row->count <= (int64_t)MD_COUNT(saved));
        memcpy(saved, v, (size_t)row->count * sizeof *v);
        md_rng r = md_rng_at(5, MD_RNG_TEST, (uint32_t)i, 0);
        double want = 0, norm = 0, h = 4e-3, side[2];
        float direction[4096];
        for (int64_t e = 0; e < row->count; e++) {
            direction[e] = md_rng_float(&r) - 0.5f;
            norm += (double)direction[e] * direction[e];
        }
        for (int64_t e = 0; e < row->count; e++) {
            direction[e] = (float)(direction[e] / sqrt(norm));
            want += (double)g[e] * direction[e];
        }
        for (int k = 0; k < 2; k++) {
            for (int64_t e = 0; e < row->count; e++)
                v[e] = saved[e] + (float)((k ? -h : h) * direction[e]);
            side[k] = tiny_forward(t);
        }
        memcpy(v, saved, (size_t)row->count * sizeof *v);
        double got = (side[0] - side[1]) / (2 * h);
        if (fabs(got - want) > 2e-5 + 5e-3 * fabs(want))
            fail_msg("%s: derivative %g, difference quotient %g", row->name, want, got);
    }
    tiny_free(t);
    test_free(t);
}

static void test_gradients(void **state)
{
    (void)state;
    gradients_match("shared", "chosen", "skip", 0);
    gradients_match("per_layer", "all", "skip", 2);
    gradients_match("none", "chosen", "mask", 3);
}

/* Two accumulated passes give the sum, and repeated passes give the same bits. */
static void test_accumulation(void **state)
{
    (void)state;
    tiny *t = test_calloc(1, sizeof *t);
    tiny_make(t, "cpu", "shared", "chosen", "auto", 0);
    md_params *p = &t->m.params;
    float *once = md_alloc(md_params_block_bytes(p), "test");
    double loss = tiny_forward(t);
    assert_int_equal(md_graph_backward(&t->m.student_graph, t->be, false, NULL, NULL), MD_OK);
    memcpy(once, p->grad, md_params_block_bytes(p));
    assert_true(tiny_forward(t) == loss);
    if (md_graph_backward(&t->m.student_graph, t->be, true, NULL, NULL) != MD_OK)
        fail_msg("%s", md_error_text());
    for (int64_t i = 0; i < p->elements; i++)
        assert_true(fabsf(p->grad[i] - 2 * once[i]) <= 1e-6f + 1e-5f * fabsf(once[i]));
    tiny_forward(t);
    assert_int_equal(md_graph_backward(&t->m.student_graph, t->be, false, NULL, NULL), MD_OK);
    assert_memory_equal(p->grad, once, md_params_block_bytes(p));
    md_free(once);
    tiny_free(t);
    test_free(t);
}

static int colsums;
static const md_op_table *below;
static md_status counted_colsum(md_backend *be, const md_colsum_args *a)
{
    colsums++;
    return below->colsum(be, a);
}

/* Of the biases, those of the patches and the head are summed by themselves; proj's and fc2's come
 * with the residual steps, fc1's with the activation. */
static void test_column_sums(void **state)
{
    (void)state;
    tiny *t = test_calloc(1, sizeof *t);
    tiny_make(t, "cpu", "shared", "chosen", "skip", 0);
    md_op_table counting = *t->be->ops;
    below = t->be->ops;
    counting.colsum = counted_colsum;
    t->be->ops = &counting;
    colsums = 0;
    tiny_forward(t);
    assert_int_equal(md_graph_backward(&t->m.student_graph, t->be, false, NULL, NULL), MD_OK);
    assert_int_equal(colsums, 2);
    tiny_free(t);
    test_free(t);
}

/* Two ways to compute the same give the same loss and gradients. */
static void same_results(const char *const one[2], const char *const other[2])
{
    tiny *a = test_calloc(1, sizeof *a), *b = test_calloc(1, sizeof *b);
    tiny_make(a, "cpu", "shared", one[0], one[1], 0);
    tiny_make(b, "cpu", "shared", other[0], other[1], 0);
    assert_true(fabs(tiny_forward(a) - tiny_forward(b)) < 1e-7);
    assert_int_equal(md_graph_backward(&a->m.student_graph, a->be, false, NULL, NULL), MD_OK);
    assert_int_equal(md_graph_backward(&b->m.student_graph, b->be, false, NULL, NULL), MD_OK);
    double worst = 0, most = 0;
    for (int64_t i = 0; i < a->m.params.elements; i++) {
        worst = fmax(worst, fabs(a->m.params.grad[i] - b->m.params.grad[i]));
        most = fmax(most, fabs(a->m.params.grad[i]));
    }
    assert_true(most > 1e-3 && worst < 1e-6 * most);
    tiny_free(a);
    tiny_free(b);
    test_free(a);
    test_free(b);
}

/* Leaving out the tokens nobody looks at. */
static void test_last_block(void **state)
{
    (void)state;
    same_results((const char *const[]){"chosen", "mask"}, (const char *const[]){"all", "mask"});
}

/* Leaving out the images that a branch is dropped for. */
static void test_drop_path_modes(void **state)
{
    (void)state;
    same_results((const char *const[]){"chosen", "skip"}, (const char *const[]){"chosen", "mask"});
    same_results((const char *const[]){"all", "skip"}, (const char *const[]){"all", "mask"});
}

/* Spoils all memory that holds nothing which the backward pass is to find there. */
static void spoil_dropped(tiny *t)
{
    const md_graph *g = &t->m.student_graph;
    for (md_slot s = 0; s < g->slots; s++)
        if (g->slot[s].value_block >= 0) /* the forward pass wrote where it was planned to */
            assert_ptr_equal(g->slot[s].value.data,
                             (char *)t->region[0] + g->blocks[g->slot[s].value_block].offset);
    uint8_t *kept = md_alloc(g->region_bytes, "test");
    memset(kept, 0, g->region_bytes);
    for (int i = 0; i < g->n_blocks; i++)
        if (g->blocks[i].first < g->nodes && g->blocks[i].last >= g->nodes)
            memset(kept + g->blocks[i].offset, 1, g->blocks[i].bytes);
    for (size_t i = 0; i < g->region_bytes; i++)
        if (!kept[i])
            ((uint8_t *)t->region[0])[i] = 0xff;
    md_free(kept);
}

/* Blocks that are run again before their backward pass: the same bits from less memory. */
static void recomputes(const char *rel_pos, const char *last_block, const char *drop)
{
    tiny *kept = test_calloc(1, sizeof *kept);
    tiny_make(kept, "check", rel_pos, last_block, drop, 0);
    tiny_forward(kept);
    assert_int_equal(md_graph_backward(&kept->m.student_graph, kept->be, false, NULL, NULL), MD_OK);
    size_t before = kept->m.student_graph.region_bytes;
    for (int blocks = 1; blocks <= 3; blocks++) {
        tiny *t = test_calloc(1, sizeof *t);
        tiny_make(t, "check", rel_pos, last_block, drop, blocks);
        const md_graph *g = &t->m.student_graph;
        assert_true(blocks == 3 ? g->region_bytes == before : g->region_bytes < before);
        before = g->region_bytes;
        for (int pass = 0; pass < 2; pass++) {
            assert_true(tiny_forward(t) == kept->loss);
            spoil_dropped(t);
            if (md_graph_backward(&t->m.student_graph, t->be, false, NULL, NULL) != MD_OK)
                fail_msg("%s", md_error_text());
            assert_memory_equal(t->m.params.grad, kept->m.params.grad,
                                md_params_block_bytes(&t->m.params));
        }
        tiny_free(t);
        test_free(t);
    }
    tiny_free(kept);
    test_free(kept);
}

static void test_recompute(void **state)
{
    (void)state;
    recomputes("shared", "chosen", "skip");
    recomputes("per_layer", "all", "mask");
    recomputes("none", "all", "skip");
}

/* AdamW lowers the loss on one batch, and the clip factor is PyTorch's. */
static void test_update(void **state)
{
    (void)state;
    tiny *t = test_calloc(1, sizeof *t);
    tiny_make(t, "cpu", "shared", "chosen", "auto", 0);
    double first = tiny_forward(t);
    md_piece piece[MD_GROUPS];
    int n = md_params_pieces(&t->m.params, piece);
    assert_int_equal(n, 2);
    for (int64_t update = 1; update <= 30; update++) {
        md_grad_stats s;
        assert_int_equal(md_graph_backward(&t->m.student_graph, t->be, false, NULL, NULL), MD_OK);
        assert_int_equal(md_optim_grad_stats(t->be, &t->m.params, piece, n, &s), MD_OK);
        assert_true(isfinite(s.squares) && s.nonfinite == 0);
        md_optim_args a = {&t->c, 3e-3, md_optim_clip(sqrt(s.squares), 3.0), update};
        assert_int_equal(md_optim_update(t->be, &t->m.params, piece, n, &a), MD_OK);
        tiny_forward(t);
    }
    assert_true(t->loss < 0.8 * first);
    assert_true(fabs(md_optim_clip(6.0, 3.0) - 3.0 / (6.0 + 1e-6)) < 1e-15);
    assert_true(md_optim_clip(2.0, 3.0) == 1.0 && md_optim_clip(1e9, 0) == 1.0);
    tiny_free(t);
    test_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradients),       cmocka_unit_test(test_accumulation),
        cmocka_unit_test(test_column_sums),     cmocka_unit_test(test_last_block),
        cmocka_unit_test(test_drop_path_modes), cmocka_unit_test(test_recompute),
        cmocka_unit_test(test_update),
    };
    return cmocka_run_group_tests_name("graph", tests, NULL, NULL);
}
