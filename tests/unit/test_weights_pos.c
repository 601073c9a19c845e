/* Position tables are resized as torch does, relative ones as BEiT does with scipy. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "io/weights.h"

static void resizes_positions_as_torch(void **state)
{
    (void)state;
    static const struct {
        int from, to;
        const char *rule;
    } cases[] = {{16, 14, "beit2"}, {16, 14, "exact"}, {5, 8, "beit2"}, {5, 8, "exact"},
                 {7, 3, "beit2"},   {7, 3, "exact"},   {4, 9, "beit2"}, {4, 9, "exact"}};
    md_safetensors *st;
    assert_int_equal(md_safetensors_open("tests/golden/positions.safetensors", &st), MD_OK);
    for (size_t i = 0; i < MD_COUNT(cases); i++) {
        char name[32];
        md_tensor src, ref;
        static float got[257 * 3];
        snprintf(name, sizeof name, "%d", cases[i].from);
        assert_int_equal(md_safetensors_load(st, name, MD_F32, &src), MD_OK);
        snprintf(name, sizeof name, "%d_%d_%s", cases[i].from, cases[i].to, cases[i].rule);
        assert_int_equal(md_safetensors_load(st, name, MD_F32, &ref), MD_OK);
        md_pos_resize(
            &(md_pos_resize_args){.src = md_f32(&src),
                                  .dst = got,
                                  .g_src = cases[i].from,
                                  .g_dst = cases[i].to,
                                  .width = 3,
                                  .rule = *cases[i].rule == 'b' ? MD_POS_BEIT2 : MD_POS_EXACT});
        for (int64_t k = 0; k < md_tensor_count(&ref); k++) /* values are about 1 */
            if (!(fabsf(got[k] - md_f32(&ref)[k]) <= 2e-6f))
                fail_msg("%s element %lld: %.8g, torch %.8g", name, (long long)k, (double)got[k],
                         (double)md_f32(&ref)[k]);
        md_free(src.data);
        md_free(ref.data);
    }
    md_safetensors_close(st);
}

/* Taps of the 16 -> 14 resize, by resizing one hot pixel of each row. */
static void positions_have_the_known_taps(void **state)
{
    (void)state;
    static const struct {
        int dst, from;
        float weight[4];
    } taps[] = {{0, -1, {-.04395f, .99017f, .05696f, -.00318f}},
                {1, 0, {-.09651f, .91840f, .20256f, -.02445f}},
                {13, 13, {-.02009f, .17731f, .93380f, -.09101f}}};
    static float src[257], dst[197];
    for (size_t i = 0; i < MD_COUNT(taps); i++)
        for (int x = 0; x < 16; x++) {
            float expected = 0;
            for (int k = 0; k < 4; k++)
                if (MD_MIN(MD_MAX(taps[i].from + k, 0), 15) == x)
                    expected += taps[i].weight[k];
            src[0] = 7;
            for (int p = 0; p < 256; p++)
                src[p + 1] = p % 16 == x ? 1.0f : 0.0f;
            md_pos_resize(&(md_pos_resize_args){.src = src,
                                                .dst = dst,
                                                .g_src = 16,
                                                .g_dst = 14,
                                                .width = 1,
                                                .rule = MD_POS_BEIT2});
            assert_true(dst[0] == 7);
            assert_true(fabsf(dst[1 + 5 * 14 + taps[i].dst] - expected) < 2e-5f);
        }
    static float same[257];
    md_pos_resize(&(md_pos_resize_args){
        .src = src, .dst = same, .g_src = 16, .g_dst = 16, .width = 1, .rule = MD_POS_BEIT2});
    assert_memory_equal(src, same, sizeof src);
}

static void relative_ratios_are_beits(void **state)
{
    (void)state;
    static const struct {
        int from, to;
        double q;
    } cases[] = {{14, 24, 1.090307}, {14, 20, 1.060968}, {14, 32, 1.134918},
                 {14, 40, 1.168504}, {16, 32, 1.096891}, {7, 4, 1.010000}};
    for (size_t i = 0; i < MD_COUNT(cases); i++) {
        double q = md_rel_pos_ratio(cases[i].from, cases[i].to);
        if (!(fabs(q - cases[i].q) < 1e-6))
            fail_msg("%d to %d: %.7f instead of %.6f", cases[i].from, cases[i].to, q, cases[i].q);
    }
}

static void resize_rel(const float *src, float *dst, int from, int to, int heads)
{
    assert_int_equal(md_rel_pos_resize(&(md_rel_pos_resize_args){
                         .src = src, .dst = dst, .g_src = from, .g_dst = to, .heads = heads}),
                     MD_OK);
}

static void resizes_relative_positions_as_scipy(void **state)
{
    (void)state;
    static const int cases[][2] = {{14, 24}, {16, 32}, {7, 4}, {3, 5}};
    md_safetensors *st;
    assert_int_equal(md_safetensors_open("tests/golden/rel_positions.safetensors", &st), MD_OK);
    for (size_t i = 0; i < MD_COUNT(cases); i++) {
        const int from = cases[i][0], to = cases[i][1];
        char name[32];
        md_tensor src, ref;
        static float got[(63 * 63 + 3) * 2];
        snprintf(name, sizeof name, "%d", from);
        assert_int_equal(md_safetensors_load(st, name, MD_F32, &src), MD_OK);
        snprintf(name, sizeof name, "%d_%d", from, to);
        assert_int_equal(md_safetensors_load(st, name, MD_F32, &ref), MD_OK);
        resize_rel(md_f32(&src), got, from, to, 2);
        for (int64_t k = 0; k < md_tensor_count(&ref); k++) /* values are about 1, at most 5 */
            if (!(fabsf(got[k] - md_f32(&ref)[k]) <= 1e-6f))
                fail_msg("%s element %lld: %.8g, scipy %.8g", name, (long long)k, (double)got[k],
                         (double)md_f32(&ref)[k]);
        resize_rel(md_f32(&src), got, from, from, 2);
        assert_memory_equal(got, src.data, md_tensor_bytes(&src));
        md_free(src.data);
        md_free(ref.data);
    }
    md_safetensors_close(st);
}

/* Sides too short for a cubic: a parabola through three entries, and the one value everywhere. */
static void short_relative_tables_are_resized(void **state)
{
    (void)state;
    float src[9 + 3], dst[49 + 3];
    const double reach = 1.0; /* where the source's edge lies */
    for (int k = 0; k < 12; k++) {
        const float y = (float)(k / 3 - 1), x = (float)(k % 3 - 1);
        src[k] = k < 9 ? 1 + 2 * y - x + 3 * x * y + x * x : (float)k;
    }
    resize_rel(src, dst, 2, 4, 1);
    for (int k = 0; k < 49; k++) {
        const double y = fmin(fmax(k / 7 - 3, -reach), reach);
        const double x = fmin(fmax(k % 7 - 3, -reach), reach);
        assert_true(fabs((double)dst[k] - (1 + 2 * y - x + 3 * x * y + x * x)) < 1e-6);
    }
    assert_memory_equal(dst + 49, src + 9, 3 * sizeof *src);
    resize_rel(src, dst, 1, 3, 1);
    for (int k = 0; k < 25; k++)
        assert_true(dst[k] == src[0]);
    assert_memory_equal(dst + 25, src + 1, 3 * sizeof *src);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resizes_positions_as_torch),
        cmocka_unit_test(positions_have_the_known_taps),
        cmocka_unit_test(relative_ratios_are_beits),
        cmocka_unit_test(resizes_relative_positions_as_scipy),
        cmocka_unit_test(short_relative_tables_are_resized),
    };
    return cmocka_run_group_tests_name("weights_pos", tests, NULL, NULL);
}
