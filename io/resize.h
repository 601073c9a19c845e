/* resize: antialiased bicubic resampling of a box of a picture, equal byte for byte to Pillow's
 * image.crop(box).resize((w, h), BICUBIC) (python-pillow/Pillow src/libImaging/Resample.c: cubic
 * with a = -0.5, support 2 * max(1, scale), horizontal then vertical pass, weights rounded to 22
 * fractional bits, each pass rounded and clipped to 8 bits). Since
 * 12.2 Pillow swaps the passes of tall boxes (pull requests 9524, 9549); the order here is that of
 * the versions published results were made with. A mirrored result costs nothing extra. */
#ifndef MD_RESIZE_H
#define MD_RESIZE_H

#include "io/decode.h"

typedef struct md_box {
    int x, y, w, h; /* pixels; inside the picture */
    bool mirror;    /* read right to left */
} md_box;

/* Scratch memory of one thread: weights and a window of rows, not a picture. */
typedef struct md_resizer md_resizer;

/* Scratch for boxes up to max_in pixels a side and results up to max_out; it grows (counted) when a
 * larger one comes. MD_ERR_MEMORY. Local; free with md_resizer_free (NULL is fine). */
md_status md_resizer_create(md_resizer **out, int max_in, int max_out);
void md_resizer_free(md_resizer *r);
size_t md_resizer_bytes(int max_in, int max_out);

/* Writes the box of `im`, resized to w x h, to out[h][w][3]. MD_ERR_MEMORY when scratch cannot
 * grow. Local. */
md_status md_resize_box(md_resizer *r, const md_image *im, md_box box, int w, int h, uint8_t *out);

/* The same, but only the pixels of `part` of the result, to out[part.h][part.w][3]; nothing is
 * computed or kept for the others. Local. */
typedef struct md_resize_part {
    int w, h;    /* of the whole result */
    md_box part; /* not mirrored */
} md_resize_part;
md_status md_resize_box_part(md_resizer *r, const md_image *im, md_box box,
                             const md_resize_part *to, uint8_t *out);

#endif
