/* blend: what Pillow's ImageEnhance does to one pixel (python-pillow/Pillow src/libImaging/Blend.c
 * and Convert.c): luma, and a value moved away from or towards a base in single precision without
 * fused multiply-add, truncated and clipped to 8 bits. */
#ifndef MD_BLEND_H
#define MD_BLEND_H

#include <stdint.h>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF /* to the end of the file; gcc keeps them unfused under -std=c11 */
#endif

static inline int md_luma(int red, int green, int blue)
{
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16;
}

/* base + factor * (v - base). */
static inline uint32_t md_blend(int base, int v, float factor)
{
    int t = (int)((float)base + factor * (float)(v - base));
    t = t < 0 ? 0 : t;
    return (uint32_t)(t > 255 ? 255 : t);
}

#endif
