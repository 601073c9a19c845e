/* picture: the picture drawn by formula that the golden hashes of transforms are of, and the hash.
 */
#ifndef MD_PICTURE_H
#define MD_PICTURE_H

#include <stdlib.h>

#include "io/decode.h"

static inline uint64_t hash_bytes(const uint8_t *p, size_t n)
{
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * 0x100000001B3u;
    return h;
}

static inline uint8_t wave(int64_t v, int checker)
{
    int64_t t = v % 256 * 3 / 4 + checker;
    return (uint8_t)(t > 255 ? 255 : t);
}

/* The same picture as make_golden_image.py's. The caller frees its pixels. */
static inline md_image picture(int w, int h)
{
    md_image im = {malloc((size_t)w * (size_t)h * 4), w, h};
    for (int64_t y = 0; y < h; y++)
        for (int64_t x = 0; x < w; x++) {
            uint8_t *p = im.pixels + 4 * (y * w + x);
            int checker = (int)((x / 9 + y / 7) % 2) * 60;
            p[0] = wave(x * 7 + y * 3, checker);
            p[1] = wave(x * x / 16 + y * 5, checker);
            p[2] = wave(x * y / 8 + 40, checker);
            p[3] = (uint8_t)(x * 31 + y); /* has no meaning, must have no influence */
        }
    return im;
}

#endif
