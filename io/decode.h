/* decode: the bytes of one picture -> 8-bit pixels, equal byte for byte to what Pillow's
 * Image.open(...).convert("RGB") gives (libjpeg: integer DCT, fancy upsampling; libpng: 16 bit to
 * the high byte, palette and alpha resolved; tests/unit/test_decode.c holds the hashes).
 *
 * What a picture is is read from its content; a name or a store's kind only tells raw from coded.
 * EXIF orientation and colour profiles are ignored, as torchvision's loader does. A decoder belongs
 * to one thread; its buffer is reused, so a picture lives until the next decode. */
#ifndef MD_DECODE_H
#define MD_DECODE_H

#include "src/base.h"

/* The numbers are those of `kind` in an image store. RGB8 is packed height x width x 3. */
typedef enum md_image_kind {
    MD_IMAGE_JPEG = 0,
    MD_IMAGE_PNG = 1,
    MD_IMAGE_RGB8 = 2,
    MD_IMAGE_GRAY8 = 3
} md_image_kind;

/* Largest picture (Pillow's warning level for decompression bombs; a store keeps sides in 16 bits)
 * and most scans of a progressive JPEG that are decoded; beyond them the picture counts as damaged.
 */
#define MD_IMAGE_MAX_SIDE   65535
#define MD_IMAGE_MAX_PIXELS ((int64_t)89478485)
#define MD_IMAGE_MAX_SCANS  100

/* Pixels [h, w, 4], rows without gaps: red, green, blue and one byte without meaning, which keeps a
 * pixel in one 32-bit lane. Owned by the decoder. */
typedef struct md_image {
    uint8_t *pixels;
    int w, h;
} md_image;

typedef struct md_decoder md_decoder;

/* A decoder whose buffer holds max_pixels from the start and grows (counted) when a larger picture
 * comes; beyond 4 Mpx the growth lasts until the next smaller picture. MD_ERR_MEMORY. Local; free
 * with md_decoder_free (NULL is fine). */
md_status md_decoder_create(md_decoder **out, int64_t max_pixels);
void md_decoder_free(md_decoder *d);
/* Bytes md_decoder_create(max_pixels) takes, without what libjpeg and libpng hold while decoding.
 */
size_t md_decoder_bytes(int64_t max_pixels);

/* Kind, width and height of a coded picture from its first bytes. MD_ERR_DATA with the reason when
 * it is neither JPEG nor PNG, or its header is damaged or too large. Local. */
md_status md_decode_probe(md_decoder *d, const uint8_t *bytes, size_t n, md_image_kind *kind,
                          int *w, int *h);

/* A coded picture: its bytes, and the size it should have, which raw kinds need (0 = unknown). */
typedef struct md_coded {
    md_image_kind kind;
    const uint8_t *bytes;
    size_t n;
    int w, h;
} md_coded;

/* MD_ERR_DATA with the reason when the bytes are damaged or end early (what Pillow would patch up
 * with grey is refused), the size differs or a limit is passed; `out` is then unset. Local. */
md_status md_decode_image(md_decoder *d, const md_coded *in, md_image *out);

#endif
