/* Decoding: bytes equal to Pillow's for every coding variant, and damage is refused by name. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/decode.h"
#include "tests/golden/image_golden.h"

static uint64_t hash_rgb(const md_image *im)
{
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < (size_t)im->w * (size_t)im->h; i++)
        for (int c = 0; c < 3; c++)
            h = (h ^ im->pixels[4 * i + (size_t)c]) * 0x100000001B3u;
    return h;
}

static const struct golden_coded *golden(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(golden_coded); i++)
        if (strcmp(golden_coded[i].name, name) == 0)
            return &golden_coded[i];
    fail_msg("no golden picture %s", name);
    return NULL;
}

static md_status decode(md_decoder *d, md_image_kind kind, const uint8_t *bytes, size_t n,
                        md_image *out)
{
    return md_decode_image(d, &(md_coded){kind, bytes, n, 0, 0}, out);
}

static md_decoder *new_decoder(void)
{
    md_decoder *d;
    assert_int_equal(md_decoder_create(&d, 16), MD_OK);
    return d;
}

static void pictures_equal_pillow(void **state)
{
    (void)state;
    md_decoder *d = new_decoder();
    for (size_t i = 0; i < MD_COUNT(golden_coded); i++) {
        const struct golden_coded *g = &golden_coded[i];
        md_image_kind kind = MD_IMAGE_GRAY8;
        int w = 0, h = 0;
        assert_int_equal(md_decode_probe(d, g->bytes, g->n, &kind, &w, &h), MD_OK);
        assert_int_equal(kind, g->kind);
        assert_int_equal(w, g->w);
        assert_int_equal(h, g->h);
        md_image im = {0};
        if (md_decode_image(d, &(md_coded){kind, g->bytes, g->n, w, h}, &im) != MD_OK)
            fail_msg("%s: %s", g->name, md_error_text());
        if (hash_rgb(&im) != g->hash)
            fail_msg("%s: pixels differ from Pillow's", g->name);
        /* The kind may come from a file's name: content decides. */
        assert_int_equal(
            decode(d, g->kind == 0 ? MD_IMAGE_PNG : MD_IMAGE_JPEG, g->bytes, g->n, &im), MD_OK);
        assert_true(hash_rgb(&im) == g->hash);
    }
    md_decoder_free(d);
}

static void raw_kinds(void **state)
{
    (void)state;
    md_decoder *d = new_decoder();
    md_image im;
    const uint8_t rgb[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, gray[3] = {9, 8, 7};
    assert_int_equal(md_decode_image(d, &(md_coded){MD_IMAGE_RGB8, rgb, 12, 2, 2}, &im), MD_OK);
    assert_int_equal(im.pixels[4 * 3 + 2], 12);
    assert_int_equal(im.pixels[4 * 2], 7);
    assert_int_equal(md_decode_image(d, &(md_coded){MD_IMAGE_GRAY8, gray, 3, 3, 1}, &im), MD_OK);
    assert_int_equal(im.pixels[4], 8);
    assert_int_equal(im.pixels[6], 8);
    assert_int_equal(md_decode_image(d, &(md_coded){MD_IMAGE_RGB8, rgb, 11, 2, 2}, &im),
                     MD_ERR_DATA);
    assert_int_equal(decode(d, MD_IMAGE_GRAY8, gray, 3, &im), MD_ERR_DATA);
    md_decoder_free(d);
}

/* Every cut of every picture is refused, except where only bytes after the last pixel are missing;
 * then the pixels are right. Never a crash, never grey filling. */
static void cut_files(void **state)
{
    (void)state;
    md_decoder *d = new_decoder();
    for (size_t i = 0; i < MD_COUNT(golden_coded); i++) {
        const struct golden_coded *g = &golden_coded[i];
        for (size_t n = 0; n < g->n; n++) {
            uint8_t *copy = malloc(n ? n : 1); /* so that a sanitizer sees an overrun */
            memcpy(copy, g->bytes, n);
            md_image im;
            md_status st = decode(d, MD_IMAGE_JPEG, copy, n, &im);
            if (st == MD_OK) {
                assert_true(g->kind == 0 && n + 2 >= g->n);
                assert_true(hash_rgb(&im) == g->hash);
            } else {
                assert_int_equal(st, MD_ERR_DATA);
                assert_true(strlen(md_error_text()) > 5);
            }
            free(copy);
        }
    }
    md_decoder_free(d);
}

/* One flipped byte at a time: decoded or refused, no other end; a good picture decodes after it. */
static void damaged_bytes(void **state)
{
    (void)state;
    md_decoder *d = new_decoder();
    int refused_png = 0, png_bytes = 0;
    for (size_t i = 0; i < MD_COUNT(golden_coded); i++) {
        const struct golden_coded *g = &golden_coded[i];
        uint8_t *copy = malloc(g->n);
        for (size_t n = 0; n < g->n; n++) {
            memcpy(copy, g->bytes, g->n);
            copy[n] ^= (uint8_t)(0x11 + n);
            if (copy[n] == g->bytes[n])
                continue;
            md_image im;
            md_status st = decode(d, MD_IMAGE_PNG, copy, g->n, &im);
            assert_true(st == MD_OK || st == MD_ERR_DATA);
            png_bytes += g->kind == 1;
            refused_png += g->kind == 1 && st != MD_OK;
        }
        free(copy);
    }
    assert_true(refused_png > png_bytes / 2); /* checksums */
    md_image im;
    const struct golden_coded *g = golden("jpeg_420");
    assert_int_equal(
        md_decode_image(d, &(md_coded){MD_IMAGE_JPEG, g->bytes, g->n, g->w, g->h}, &im), MD_OK);
    assert_true(hash_rgb(&im) == g->hash);
    md_decoder_free(d);
}

static void limits(void **state)
{
    (void)state;
    md_decoder *d = new_decoder();
    md_image im;
    const struct golden_coded *g = golden("jpeg_420");
    assert_int_equal(
        md_decode_image(d, &(md_coded){MD_IMAGE_JPEG, g->bytes, g->n, g->w + 1, g->h}, &im),
        MD_ERR_DATA);
    assert_non_null(strstr(md_error_text(), "expected"));
    assert_int_equal(decode(d, MD_IMAGE_JPEG, (const uint8_t *)"GIF89a..", 8, &im), MD_ERR_DATA);
    assert_non_null(strstr(md_error_text(), "neither"));

    /* a frame header that claims 65500 x 65500 */
    uint8_t *big = malloc(g->n);
    memcpy(big, g->bytes, g->n);
    size_t sof = 0;
    while (!(big[sof] == 0xff && big[sof + 1] == 0xc0))
        sof++;
    big[sof + 5] = big[sof + 7] = 0xff;
    assert_int_equal(decode(d, MD_IMAGE_JPEG, big, g->n, &im), MD_ERR_DATA);
    assert_non_null(strstr(md_error_text(), "limit"));
    free(big);

    /* a progressive file whose last scan comes back 200 times */
    g = golden("jpeg_420_progressive");
    size_t scan = g->n - 2;
    while (!(g->bytes[scan] == 0xff && g->bytes[scan + 1] == 0xda))
        scan--;
    size_t len = g->n - 2 - scan, total = g->n + 200 * len;
    uint8_t *bomb = malloc(total);
    memcpy(bomb, g->bytes, scan);
    for (size_t i = 0; i < 201; i++)
        memcpy(bomb + scan + i * len, g->bytes + scan, len);
    memcpy(bomb + total - 2, "\xff\xd9", 2);
    assert_int_equal(decode(d, MD_IMAGE_JPEG, bomb, total, &im), MD_ERR_DATA);
    free(bomb);
    md_decoder_free(d);
}

/* Real photos, where they are: all decode. */
static void photos(void **state)
{
    (void)state;
    const char *dir = getenv("MD_TEST_DATA");
    char pattern[512];
    snprintf(pattern, sizeof pattern, "%s/imagenet-samples/*/*", dir ? dir : "../shared/data");
    glob_t g = {0};
    if (glob(pattern, 0, NULL, &g) != 0)
        skip();
    md_decoder *d = new_decoder();
    for (size_t i = 0; i < g.gl_pathc; i++) {
        static uint8_t bytes[1 << 23];
        FILE *f = fopen(g.gl_pathv[i], "rb");
        assert_non_null(f);
        size_t n = fread(bytes, 1, sizeof bytes, f);
        fclose(f);
        md_image im;
        if (decode(d, MD_IMAGE_JPEG, bytes, n, &im) != MD_OK)
            fail_msg("%s: %s", g.gl_pathv[i], md_error_text());
    }
    md_decoder_free(d);
    globfree(&g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pictures_equal_pillow),
        cmocka_unit_test(raw_kinds),
        cmocka_unit_test(cut_files),
        cmocka_unit_test(damaged_bytes),
        cmocka_unit_test(limits),
        cmocka_unit_test(photos),
    };
    return cmocka_run_group_tests_name("decode", tests, NULL, NULL);
}
