/* test_model: registry and arena on tiny shapes. */
#include "src/arena.h"
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parameter_counts),
        cmocka_unit_test(test_decay_groups),
        cmocka_unit_test(test_arena),
        cmocka_unit_test(test_relative_index),
        cmocka_unit_test(test_initialisation),
        cmocka_unit_test(test_packed_counts),
    };
    return cmocka_run_group_tests_name("model", tests, NULL, NULL);
}
