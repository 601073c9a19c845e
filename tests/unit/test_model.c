/* test_model: registry, arena and graph on tiny shapes. */
#include "src/arena.h"
#include "src/optim.h"
#include "src/rng.h"
#include "tests/unit/method_config.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void expect_count(int64_t want, const char *const *overrides)
{
    md_config c;
    md_method m;
    md_teacher_info t = clip_l14();
    int n = 0;
    while (overrides[n])
        n++;
    config_with(&c, n, overrides);
    if (md_method_resolve(&m, &c, &t, NULL) != MD_OK)
        fail_msg("%s", md_error_text());
    assert_int_equal(md_params_total(&m.params), want);
    md_method_free(&m);
    md_config_free(&c);
}

/* Parameter counts of BEiT-style students with a shared table and a head to CLIP L/14's width. */
static void test_parameter_counts(void **state)
{
    (void)state;
    expect_count(86453584, (const char *[]){"method.mask.count=75", NULL});
    expect_count(304186816, (const char *[]){"model.width=1024", "model.layers=24",
                                             "model.heads=16", "model.layer_scale=1e-5", NULL});
    expect_count(631805248, (const char *[]){"model.width=1280", "model.layers=32",
                                             "model.heads=16", "model.patch=14", NULL});
}

static void test_decay_groups(void **state)
{
    (void)state;
    md_config c;
    md_method m;
    CONFIG(&c, "method.teacher.kind=pixel", "model.abs_pos=true", "model.layers=2");
    assert_int_equal(md_method_resolve(&m, &c, NULL, NULL), MD_OK);
    static const struct {
        const char *name;
        bool decay;
    } rows[] = {{"cls_token", false},
                {"pos_embed", false},
                {"mask_token", true},
                {"rel_pos_bias.relative_position_bias_table", true},
                {"patch_embed.proj.weight", true},
                {"patch_embed.proj.bias", false},
                {"blocks.1.attn.q_bias", false},
                {"blocks.1.gamma_2", false},
                {"blocks.0.norm1.weight", false},
                {"blocks.0.mlp.fc2.weight", true},
                {"lm_head.weight", true},
                {"lm_head.bias", false}};
    for (size_t i = 0; i < MD_COUNT(rows); i++) {
        int k = md_params_find(&m.params, rows[i].name);
        assert_true(k >= 0);
        assert_int_equal(m.params.row[k].decay, rows[i].decay);
        assert_int_equal(m.params.row[k].offset < m.params.end[MD_GROUP_DECAY], rows[i].decay);
    }
    md_method_free(&m);
    md_config_free(&c);
}

/* Blocks alive together never share bytes, for random lifetimes. */
static void test_arena(void **state)
{
    (void)state;
    enum { N = 200 };
    md_arena_block b[N];
    md_rng r = md_rng_at(1, MD_RNG_TEST, 0, 0);
    size_t region, live = 0, sum = 0;
    for (int i = 0; i < N; i++) {
        int first = (int)md_rng_below(&r, 100);
        b[i] = (md_arena_block){.bytes = 1 + md_rng_below(&r, 5000),
                                .first = first,
                                .last = first + (int)md_rng_below(&r, 30)};
        sum += b[i].bytes;
    }
    assert_int_equal(md_arena_plan(b, N, &region), MD_OK);
    for (int i = 0; i < N; i++) {
        assert_int_equal(b[i].offset % 64, 0);
        assert_true(b[i].offset + b[i].bytes <= region);
        for (int j = 0; j < i; j++)
            if (b[i].first <= b[j].last && b[j].first <= b[i].last)
                assert_true(b[i].offset >= b[j].offset + b[j].bytes ||
                            b[j].offset >= b[i].offset + b[i].bytes);
    }
    for (int t = 0; t < 130; t++) {
        size_t now = 0;
        for (int i = 0; i < N; i++)
            now += b[i].first <= t && t <= b[i].last ? b[i].bytes : 0;
        live = MD_MAX(live, now);
    }
    assert_true(region < sum);
    assert_true((double)region < 1.3 * (double)live);
}

/* The matrix of a 2 x 2 grid as BEiT's code builds it. */
static void test_relative_index(void **state)
{
    (void)state;
    static const int32_t want[25] = {11, 9, 9,  9, 9, 10, 4, 3,  1, 0, 10, 5, 4,
                                     2,  1, 10, 7, 6, 4,  3, 10, 8, 7, 5,  4};
    int32_t small[25], *big = md_alloc(197 * 197 * sizeof *big, "test");
    md_vit_rel_index(2, small);
    assert_memory_equal(small, want, sizeof want);
    md_vit_rel_index(14, big);
    assert_int_equal(big[1 * 197 + 1], 364);
    assert_int_equal(big[1 * 197 + 196], 0);
    assert_int_equal(big[196 * 197 + 1], 728);
    assert_int_equal(big[1], 729);
    assert_int_equal(big[197], 730);
    assert_int_equal(big[0], 731);
    md_free(big);
}

/* One sigma cut: effective deviation 0.01079 at sigma 0.02, and the rescaled projections. */
static void test_initialisation(void **state)
{
    (void)state;
    md_config c;
    md_method m;
    CONFIG(&c, "method.teacher.kind=pixel", "model.layers=2", "model.width=384", "model.heads=6");
    assert_int_equal(md_method_resolve(&m, &c, NULL, NULL), MD_OK);
    assert_int_equal(md_params_allocate(&m.params, NULL, false), MD_OK);
    md_params_initialise(&m.params, 7);
    static const struct {
        const char *name;
        double divide;
    } rows[] = {{"blocks.1.mlp.fc1.weight", 1.0},
                {"blocks.1.mlp.fc2.weight", 2.0},
                {"blocks.0.attn.proj.weight", 1.4142135}};
    for (size_t i = 0; i < MD_COUNT(rows); i++) {
        md_tensor t = md_param_value(&m.params, md_params_find(&m.params, rows[i].name));
        double sum = 0, square = 0, most = 0;
        int64_t n = md_tensor_count(&t);
        for (int64_t e = 0; e < n; e++) {
            double x = md_f32(&t)[e] * rows[i].divide;
            sum += x, square += x * x, most = fmax(most, fabs(x));
        }
        assert_true(fabs(sum / (double)n) < 2e-4);
        assert_true(fabs(sqrt(square / (double)n) - 0.01079) < 1e-4);
        assert_true(most <= 0.02 * 1.000001 && most > 0.0199);
    }
    md_method_free(&m);
    md_config_free(&c);
}

/* ---- a tiny model that really runs ---- */

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
                      const char *drop)
{
    char rel[64], last[64], mode[64];
    snprintf(mode, sizeof mode, "model.drop_path_mode=%s", drop);
    snprintf(last, sizeof last, "model.last_block=%s", last_block);
    snprintf(rel, sizeof rel, "model.rel_pos=%s", rel_pos);
    CONFIG(&t->c, "method.teacher.kind=pixel", "model.layers=3", "model.width=24", "model.heads=3",
           "image.size=8", "model.patch=2", "method.mask.count=6", "train.batch=3",
           "model.drop_path=0.3", "model.abs_pos=true", "method.mask.min_block=4", rel, last, mode);
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
static void gradients_match(const char *rel_pos, const char *last_block, const char *drop)
{
    tiny *t = test_calloc(1, sizeof *t);
    tiny_make(t, "check", rel_pos, last_block, drop);
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
    gradients_match("shared", "chosen", "skip");
    gradients_match("per_layer", "all", "skip");
    gradients_match("none", "chosen", "mask");
}

/* Two accumulated passes give the sum, and repeated passes give the same bits. */
static void test_accumulation(void **state)
{
    (void)state;
    tiny *t = test_calloc(1, sizeof *t);
    tiny_make(t, "cpu", "shared", "chosen", "auto");
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

/* Two ways to compute the same give the same loss and gradients. */
static void same_results(const char *const one[2], const char *const other[2])
{
    tiny *a = test_calloc(1, sizeof *a), *b = test_calloc(1, sizeof *b);
    tiny_make(a, "cpu", "shared", one[0], one[1]);
    tiny_make(b, "cpu", "shared", other[0], other[1]);
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

/* The numbers of images that branches are run for: enough, never more than there are, and few. */
static void test_packed_counts(void **state)
{
    (void)state;
    for (int64_t images = 1; images <= 300; images++) {
        const md_method m = {.row_images = images};
        int counts = 0;
        int64_t before = 0;
        for (int64_t kept = 0; kept <= images; kept++) {
            const int64_t n = md_method_packed(&m, kept);
            assert_true(n >= MD_MAX(kept, 1) && n <= images && n >= before);
            assert_true(n - kept < (images + MD_PACKED_COUNTS - 1) / MD_PACKED_COUNTS || kept == 0);
            counts += n != before;
            before = n;
        }
        assert_int_equal(before, images);
        assert_in_range(counts, 1, MD_PACKED_COUNTS);
    }
}

/* AdamW lowers the loss on one batch, and the clip factor is PyTorch's. */
static void test_update(void **state)
{
    (void)state;
    tiny *t = test_calloc(1, sizeof *t);
    tiny_make(t, "cpu", "shared", "chosen", "auto");
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
        cmocka_unit_test(test_parameter_counts),
        cmocka_unit_test(test_decay_groups),
        cmocka_unit_test(test_arena),
        cmocka_unit_test(test_relative_index),
        cmocka_unit_test(test_initialisation),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_accumulation),
        cmocka_unit_test(test_last_block),
        cmocka_unit_test(test_drop_path_modes),
        cmocka_unit_test(test_packed_counts),
        cmocka_unit_test(test_update),
    };
    return cmocka_run_group_tests_name("model", tests, NULL, NULL);
}
