/* scalar_math: the formulas that the cpu and cuda kernels share, so that a test on the CPU covers
 * both. Everything is branch-free (selects only) and inlines into `omp simd` loops. */
#ifndef MD_SCALAR_MATH_H
#define MD_SCALAR_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef MD_HD
#ifdef __CUDACC__
#define MD_HD __host__ __device__ inline
#else
#define MD_HD static inline
#endif
#endif

MD_HD float md_bits_to_f32(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

MD_HD uint32_t md_f32_to_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

/* NaN or Inf. Looks at the bits: true under any floating point flags. */
MD_HD int md_nonfinite(float x)
{
    return (md_f32_to_bits(x) & 0x7f800000u) == 0x7f800000u;
}

/* bf16 is the upper half of an f32; rounding is to nearest even, a NaN stays a quiet NaN. */
MD_HD uint16_t md_bf16_from_f32(float f)
{
    uint32_t u = md_f32_to_bits(f);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    uint32_t nan = (u >> 16) | 0x40u;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

MD_HD float md_f32_from_bf16(uint16_t h)
{
    return md_bits_to_f32((uint32_t)h << 16);
}

/* e^x within 1.5e-7 relative for x in [-87, 88]; clamped outside (1.2e-38 .. 1.6e38); NaN stays
 * NaN. x = n ln2 + r with |r| <= ln2 / 2; adding 1.5 * 2^23 rounds to the integer n, and n then
 * sits in the low bits of the sum. The polynomial is a weighted least squares (Lawson) minimax fit.
 */
MD_HD float md_expf(float x)
{
    x = x > 88.02f ? 88.02f : x;
    x = x < -87.33f ? -87.33f : x;
    float z = x * 1.44269504f + 12582912.0f;
    float n = z - 12582912.0f;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float q = 1.381314236e-3f;
    q = q * r + 8.369419043e-3f;
    q = q * r + 4.166845683e-2f;
    q = q * r + 1.666651479e-1f;
    q = q * r + 4.999999305e-1f;
    float p = (q * r) * r + r + 1.0f;
    return p * md_bits_to_f32((md_f32_to_bits(z) + 127u) << 23);
}

/* Standard normal distribution function at x, given e = exp(-x^2/2), within 1e-6 relative also far
 * in the left tail: Phi(-|x|) = e/2 * erfcx(|x|/sqrt 2), erfcx as a polynomial in k = 1/(1 + 0.43
 * t), the form of Abramowitz and Stegun 7.1.26 with eight refitted terms (8.4e-8). */
MD_HD float md_normal_cdf(float x, float e)
{
    float t = (x < 0.0f ? -x : x) * 0.707106781f;
    float k = 1.0f / (1.0f + 0.43f * t);
    float p = 7.371188208e-2f;
    p = p * k - 3.103908807e-1f;
    p = p * k + 3.837378967e-1f;
    p = p * k - 8.575759334e-2f;
    p = p * k + 2.468626627e-1f;
    p = p * k + 2.049450855e-1f;
    p = p * k + 2.443764988e-1f;
    p = p * k + 2.425145322e-1f;
    float tail = 0.5f * e * p * k;
    return x < 0.0f ? tail : 1.0f - tail;
}

/* GELU with erf (not the tanh form) and its derivative; Hendrycks and Gimpel 2016. */
MD_HD float md_gelu(float x)
{
    return x * md_normal_cdf(x, md_expf(-0.5f * x * x));
}

MD_HD float md_gelu_grad(float x)
{
    float e = md_expf(-0.5f * x * x);
    return md_normal_cdf(x, e) + x * 0.398942280f * e;
}

MD_HD float md_sigmoid(float x)
{
    return 1.0f / (1.0f + md_expf(-x));
}

/* CLIP's QuickGELU x * sigmoid(1.702 x) and its derivative. */
MD_HD float md_quick_gelu(float x)
{
    return x * md_sigmoid(1.702f * x);
}

MD_HD float md_quick_gelu_grad(float x)
{
    float s = md_sigmoid(1.702f * x);
    return s + 1.702f * x * s * (1.0f - s);
}

/* Loss of one difference d and its derivative; beta > 0 (PyTorch's smooth_l1_loss). */
MD_HD float md_smooth_l1(float d, float beta)
{
    float a = d < 0.0f ? -d : d;
    return a < beta ? 0.5f * d * d / beta : a - 0.5f * beta;
}

MD_HD float md_smooth_l1_grad(float d, float beta)
{
    float g = d / beta;
    g = g > 1.0f ? 1.0f : g;
    return g < -1.0f ? -1.0f : g;
}

/* Whether a pixel is in the box x, y, width, height; none is in one of width 0. */
MD_HD int md_in_box(const int32_t box[4], int32_t x, int32_t y)
{
    return ((uint32_t)(x - box[0]) < (uint32_t)box[2]) &
           ((uint32_t)(y - box[1]) < (uint32_t)box[3]);
}

/* lambda * a + (1 - lambda) * b with both products rounded. On the host that is up to the flags of
 * the file: no -ffp-contract=fast. */
MD_HD float md_blend(float lambda, float a, float b)
{
#ifdef __CUDA_ARCH__
    return __fadd_rn(__fmul_rn(lambda, a), __fmul_rn(1.0f - lambda, b));
#else
    return lambda * a + (1.0f - lambda) * b;
#endif
}

/* What a step of AdamW needs beyond the element, computed once per call in double. */
typedef struct md_adamw_coef {
    float decay;        /* 1 - lr * weight_decay */
    float rest1;        /* 1 - beta1 */
    float beta2, rest2; /* rest2 = 1 - beta2, of the unrounded beta2 */
    float step_size;    /* lr / (1 - beta1^t) */
    float root;         /* 1 / sqrt(1 - beta2^t) */
    float eps, grad_scale;
} md_adamw_coef;

MD_HD void md_adamw_one(const md_adamw_coef *k, float grad, float *p, float *m, float *v)
{
    float g = grad * k->grad_scale;
    float m1 = *m + k->rest1 * (g - *m);
    float v1 = k->beta2 * *v + k->rest2 * g * g;
    *m = m1;
    *v = v1;
    *p = *p * k->decay - k->step_size * m1 / (sqrtf(v1) * k->root + k->eps);
}

#endif
