/* test_scalar_math: the formulas shared by the backends, against double precision over whole ranges
 * of floats. */
#include "kernels/scalar_math.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <float.h>
#include <math.h>

/* Largest |f - ref| / scale over `steps` values from lo to hi. */
typedef struct sweep {
    double lo, hi;
    int steps;
} sweep;

static double worst(float (*f)(float), double (*ref)(double), double (*scale)(double), sweep s)
{
    double most = 0.0;
    for (int i = 0; i <= s.steps; i++) {
        float x = (float)(s.lo + (s.hi - s.lo) * (double)i / (double)s.steps);
        double e = fabs((double)f(x) - ref((double)x)) / scale((double)x);
        most = e > most || isnan(e) ? e : most;
    }
    return most;
}

static double one(double x)
{
    (void)x;
    return 1.0;
}

static double phi(double x)
{
    return 0.5 * erfc(-x * sqrt(0.5));
}

static double gelu(double x)
{
    return x * phi(x);
}

static double gelu_size(double x)
{
    return fabs(gelu(x)) + 1e-37;
}

static double gelu_grad(double x)
{
    return phi(x) + x * exp(-0.5 * x * x) / sqrt(2.0 * acos(-1.0));
}

static double quick(double x)
{
    return x / (1.0 + exp(-1.702 * x));
}

static double quick_grad(double x)
{
    double s = 1.0 / (1.0 + exp(-1.702 * x));
    return s + 1.702 * x * s * (1.0 - s);
}

static double sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

static void test_exp(void **state)
{
    (void)state;
    assert_true(worst(md_expf, exp, exp, (sweep){-87.0, 88.0, 4000000}) < 2e-7);
    assert_true(md_expf(0.0f) == 1.0f);
    assert_true(md_expf(-1e30f) <= 2 * FLT_MIN && md_expf(-INFINITY) <= 2 * FLT_MIN);
    assert_true(md_expf(1e30f) > 1e38f && isfinite(md_expf(INFINITY)));
    assert_true(isnan(md_expf(NAN)));
}

/* Relative to the value itself down to where it leaves float, so also in the far left tail. */
static void test_gelu(void **state)
{
    (void)state;
    assert_true(worst(md_gelu, gelu, gelu_size, (sweep){-6.0, 20.0, 2000000}) < 2e-6);
    assert_true(worst(md_gelu, gelu, gelu_size, (sweep){-12.5, -6.0, 500000}) < 1e-5);
    assert_true(worst(md_gelu, gelu, one, (sweep){-1e4, -12.0, 10000}) < 1e-30);
    assert_true(md_gelu(0.0f) == 0.0f && md_gelu(1e30f) == 1e30f && isnan(md_gelu(NAN)));
    assert_true(worst(md_gelu_grad, gelu_grad, one, (sweep){-15.0, 15.0, 2000000}) < 5e-7);
    assert_true(md_gelu_grad(1e4f) == 1.0f && fabsf(md_gelu_grad(-1e4f)) < 1e-30f);
    assert_true(isnan(md_gelu_grad(NAN)));
}

static void test_quick_gelu(void **state)
{
    (void)state;
    assert_true(worst(md_quick_gelu, quick, one, (sweep){-40.0, 3.0, 1000000}) < 1e-6);
    assert_true(worst(md_quick_gelu_grad, quick_grad, one, (sweep){-40.0, 40.0, 1000000}) < 1e-6);
    assert_true(worst(md_sigmoid, sigmoid, sigmoid, (sweep){-80.0, 80.0, 1000000}) < 5e-7);
    assert_true(isnan(md_quick_gelu(NAN)) && isnan(md_quick_gelu_grad(NAN)));
}

static void test_smooth_l1(void **state)
{
    (void)state;
    /* PyTorch's values: beta 2 at .5 1 1.5 2 3, beta 1 at 2. */
    const float d[] = {0.5f, 1.0f, 1.5f, 2.0f, 3.0f},
                want[] = {0.0625f, 0.25f, 0.5625f, 1.0f, 2.0f};
    for (int i = 0; i < 5; i++) {
        assert_true(md_smooth_l1(d[i], 2.0f) == want[i] && md_smooth_l1(-d[i], 2.0f) == want[i]);
        assert_true(md_smooth_l1_grad(-d[i], 2.0f) == -fminf(d[i] / 2.0f, 1.0f));
    }
    assert_true(md_smooth_l1(2.0f, 1.0f) == 1.5f && md_smooth_l1_grad(2.0f, 1.0f) == 1.0f);
    assert_true(isnan(md_smooth_l1(NAN, 2.0f)) && isnan(md_smooth_l1_grad(NAN, 2.0f)));
}

/* Every float pattern of the upper half with three lower halves: up, down and the tie. */
static void test_bf16(void **state)
{
    (void)state;
    for (uint32_t top = 0; top < 0x10000u; top++) {
        float exact = md_bits_to_f32(top << 16);
        if (isnan(exact)) {
            assert_true(isnan(md_f32_from_bf16(md_bf16_from_f32(exact))));
            continue;
        }
        assert_int_equal(md_bf16_from_f32(exact), top);
        assert_true(md_f32_to_bits(md_f32_from_bf16((uint16_t)top)) == top << 16);
        if (isinf(exact))
            continue;
        assert_int_equal(md_bf16_from_f32(md_bits_to_f32(top << 16 | 0x7fffu)), top);
        assert_int_equal(md_bf16_from_f32(md_bits_to_f32(top << 16 | 0x8001u)), top + 1);
        assert_int_equal(md_bf16_from_f32(md_bits_to_f32(top << 16 | 0x8000u)), top + (top & 1u));
    }
    assert_true(isnan(md_f32_from_bf16(md_bf16_from_f32(md_bits_to_f32(0x7f800001u)))));
}

static void test_nonfinite(void **state)
{
    (void)state;
    assert_true(md_nonfinite(NAN) && md_nonfinite(INFINITY) && md_nonfinite(-INFINITY));
    assert_false(md_nonfinite(0.0f) || md_nonfinite(FLT_MAX) || md_nonfinite(-FLT_MIN));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp),        cmocka_unit_test(test_gelu),
        cmocka_unit_test(test_quick_gelu), cmocka_unit_test(test_smooth_l1),
        cmocka_unit_test(test_bf16),       cmocka_unit_test(test_nonfinite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
