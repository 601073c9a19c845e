/* RandAugment: every op equal to timm's and Pillow's bytes at several magnitudes and both signs;
 * what is drawn depends on (seed, epoch, sample) and has the stated distribution. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "io/randaugment.h"
#include "tests/golden/transforms_golden.h"
#include "tests/unit/picture.h"

static const uint8_t fill[3] = {124, 116, 104}; /* make_golden_transforms.py's */

/* The same as make_golden_transforms.py's scene. */
static void scene(uint8_t *rgb, int size)
{
    for (int64_t y = 0; y < size; y++)
        for (int64_t x = 0; x < size; x++, rgb += 3) {
            int64_t noise = ((x * 73856093) ^ (y * 19349663)) / 32 % 16;
            int64_t v[3] = {70 + x + noise, 60 + (x + y) / 2 + noise, 40 + y * y / 40 + noise};
            for (int c = 0; c < 3; c++)
                rgb[c] = (uint8_t)(v[c] > 255 ? 255 : v[c]);
        }
}

static void flat(uint8_t *rgb, int size)
{
    for (int i = 0; i < size * size; i++)
        memcpy(rgb + 3 * i, (uint8_t[]){17, 130, 255}, 3);
}

static void checkered(uint8_t *rgb, int size)
{
    md_image im = picture(size, size);
    for (int i = 0; i < size * size; i++)
        memcpy(rgb + 3 * i, im.pixels + 4 * i, 3);
    free(im.pixels);
}

static void ops_equal_pillow(void **state)
{
    (void)state;
    for (size_t i = 0; i < MD_COUNT(golden_op); i++) {
        const struct golden_op *g = &golden_op[i];
        size_t n = (size_t)g->size * (size_t)g->size * 3;
        uint8_t *rgb = malloc(n);
        void *scratch = malloc(md_randaugment_scratch(g->size));
        void (*const draw[])(uint8_t *, int) = {checkered, scene, flat};
        draw[g->picture](rgb, g->size);
        md_randaugment_op op = (md_randaugment_op)g->op;
        md_randaugment_draw d = {.n = 1};
        d.step[0].op = op;
        d.step[0].argument = md_randaugment_argument(op, g->magnitude, g->negative);
        md_randaugment_apply(&d, fill, rgb, g->size, scratch);
        if (hash_bytes(rgb, n) != g->hash)
            fail_msg("op %d at %g (%s) differs from Pillow on picture %d of %d pixels", g->op,
                     g->magnitude, g->negative ? "-" : "+", g->picture, g->size);
        free(scratch);
        free(rgb);
    }
}

static md_randaugment_rule rule_of(uint64_t seed)
{
    return (md_randaugment_rule){
        .seed = seed, .ops = 2, .probability = 0.5, .magnitude = 9, .deviation = 0.5};
}

/* All ops come equally often, half of them applied, either sign half of the time, and magnitudes
 * are N(9, 0.5) cut at 10. */
static void draws(void **state)
{
    (void)state;
    md_randaugment_rule rule = rule_of(4);
    int count[MD_RA_OPS] = {0}, applied = 0, negative = 0, shears = 0, none = 0, cut = 0;
    double sum = 0, squares = 0;
    const int n = 60000;
    for (int i = 0; i < n; i++) {
        md_randaugment_draw d = md_randaugment_choose(&rule, (uint32_t)(i % 3), (uint64_t)(i / 3));
        applied += d.n;
        none += d.n == 0;
        for (int k = 0; k < d.n; k++) {
            count[d.step[k].op]++;
            if (d.step[k].op != MD_RA_SHEAR_X && d.step[k].op != MD_RA_SHEAR_Y)
                continue;
            double magnitude = fabs(d.step[k].argument) / 0.3 * 10;
            assert_true(magnitude <= 10 + 1e-9);
            shears++;
            negative += d.step[k].argument < 0;
            cut += magnitude > 10 - 1e-9;
            sum += magnitude;
            squares += magnitude * magnitude;
        }
    }
    assert_true(fabs(applied / (2.0 * n) - 0.5) < 0.01);
    assert_true(fabs(none / (double)n - 0.25) < 0.01);
    for (int k = 0; k < MD_RA_OPS; k++)
        assert_true(fabs(count[k] / (double)applied - 1.0 / MD_RA_OPS) < 0.004);
    /* A normal variable cut two deviations above its mean: 0.0085 of a deviation less on average.
     */
    double mean = sum / shears, deviation = sqrt(squares / shears - mean * mean);
    assert_true(fabs(negative / (double)shears - 0.5) < 0.025);
    assert_true(fabs(mean - 8.996) < 0.025 && fabs(deviation - 0.49) < 0.02);
    assert_true(fabs(cut / (double)shears - 0.0228) < 0.008);
}

/* Nothing but seed, epoch and sample counts; more ops continue the same draws. */
static void draws_are_functions(void **state)
{
    (void)state;
    md_randaugment_rule rule = rule_of(1), other = rule_of(2), more = rule_of(1);
    rule.probability = other.probability = more.probability = 1;
    more.ops = MD_RANDAUGMENT_MAX;
    int same[4] = {0};
    for (uint64_t i = 0; i < 500; i++) {
        md_randaugment_draw d = md_randaugment_choose(&rule, 3, i), e[4];
        e[0] = md_randaugment_choose(&rule, 3, i);
        e[1] = md_randaugment_choose(&rule, 4, i);
        e[2] = md_randaugment_choose(&rule, 3, i + 1);
        e[3] = md_randaugment_choose(&other, 3, i);
        for (int k = 0; k < 4; k++)
            same[k] += memcmp(&d, &e[k], sizeof d) == 0;
        e[0] = md_randaugment_choose(&more, 3, i);
        assert_int_equal(e[0].n, MD_RANDAUGMENT_MAX);
        assert_memory_equal(d.step, e[0].step, 2 * sizeof *d.step);
    }
    assert_int_equal(same[0], 500);
    for (int k = 1; k < 4; k++)
        assert_true(same[k] < 10); /* ops without an argument may come again */
    rule.probability = 0;
    assert_int_equal(md_randaugment_choose(&rule, 0, 0).n, 0);
    rule.ops = 0;
    assert_int_equal(md_randaugment_choose(&rule, 0, 0).n, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ops_equal_pillow),
        cmocka_unit_test(draws),
        cmocka_unit_test(draws_are_functions),
    };
    return cmocka_run_group_tests_name("randaugment", tests, NULL, NULL);
}
