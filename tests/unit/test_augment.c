/* Augmentation: resize, jitter and the whole chain equal to Pillow's bytes for the same draws; what
 * is drawn depends on (seed, epoch, sample) and has the stated distribution. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/augment.h"
#include "tests/golden/image_golden.h"
#include "tests/golden/transforms_golden.h"
#include "tests/unit/picture.h"

static void resize_equals_pillow(void **state)
{
    (void)state;
    md_resizer *r;
    assert_int_equal(md_resizer_create(&r, 8, 8), MD_OK); /* small: has to grow */
    for (size_t i = 0; i < MD_COUNT(golden_resize); i++) {
        const struct golden_resize *g = &golden_resize[i];
        md_image im = picture(g->w, g->h);
        size_t n = (size_t)g->out[0] * (size_t)g->out[1] * 3;
        uint8_t *out = malloc(n);
        md_box box = {g->box[0], g->box[1], g->box[2], g->box[3], false};
        assert_int_equal(md_resize_box(r, &im, box, g->out[0], g->out[1], out), MD_OK);
        if (hash_bytes(out, n) != g->hash)
            fail_msg("case %zu differs from Pillow", i);
        box.mirror = true;
        assert_int_equal(md_resize_box(r, &im, box, g->out[0], g->out[1], out), MD_OK);
        if (hash_bytes(out, n) != g->mirrored)
            fail_msg("mirrored case %zu differs from Pillow", i);
        free(out);
        free(im.pixels);
    }
    md_resizer_free(r);
}

static void jitter_equals_pillow(void **state)
{
    (void)state;
    for (size_t i = 0; i < MD_COUNT(golden_jitter); i++) {
        const struct golden_jitter *g = &golden_jitter[i];
        md_augment_draw d = {.box = {0, 0, 61, 47, false}, .jitter = true};
        for (int k = 0; k < 3; k++) {
            d.order[k] = (md_jitter_op)g->order[k];
            d.factor[k] = (float)g->factor[k];
        }
        md_image im = picture(61, 47), part = picture(61, 47);
        md_augment_jitter(&im, &d);
        uint8_t rgb[61 * 47 * 3];
        for (int p = 0; p < 61 * 47; p++)
            memcpy(rgb + 3 * p, im.pixels + 4 * p, 3);
        if (hash_bytes(rgb, sizeof rgb) != g->hash)
            fail_msg("case %zu differs from Pillow", i);
        /* A box sees the pixels the whole picture would have there. */
        d.box = (md_box){7, 5, 30, 20, false};
        md_augment_jitter(&part, &d);
        for (int y = 5; y < 25; y++)
            for (int x = 7; x < 37; x++)
                assert_memory_equal(part.pixels + 4 * (y * 61 + x), im.pixels + 4 * (y * 61 + x),
                                    3);
        free(im.pixels);
        free(part.pixels);
    }
}

static md_augment_rule rule_of(const struct golden_chain *g)
{
    return (md_augment_rule){.seed = g->seed,
                             .size = g->size,
                             .size2 = g->size2,
                             .crop_min = g->crop_min,
                             .crop_max = g->crop_max,
                             .ratio_min = 0.75,
                             .ratio_max = 4.0 / 3.0,
                             .flip = 0.5,
                             .jitter = g->jitter};
}

static void chain_equals_pillow(void **state)
{
    (void)state;
    md_resizer *r;
    assert_int_equal(md_resizer_create(&r, 500, 224), MD_OK);
    for (size_t i = 0; i < MD_COUNT(golden_chain); i++) {
        const struct golden_chain *g = &golden_chain[i];
        md_augment_rule rule = rule_of(g);
        md_image im = picture(g->w, g->h);
        size_t n = (size_t)g->size * (size_t)g->size * 3;
        size_t n2 = (size_t)g->size2 * (size_t)g->size2 * 3;
        uint8_t *out = malloc(n), *out2 = malloc(n2 + 1);
        md_augment_draw d = md_augment_choose(&rule, g->epoch, g->sample, g->w, g->h);
        assert_int_equal(md_augment_image(&rule, &d, (md_augment_tools){r}, &im, out, out2), MD_OK);
        if (hash_bytes(out, n) != g->hash || (n2 && hash_bytes(out2, n2) != g->hash2))
            fail_msg("chain %zu differs from Pillow", i);
        free(out);
        free(out2);
        free(im.pixels);
    }
    md_resizer_free(r);
}

/* As fine-tuning draws it. */
static md_augment_rule fine_rule(const struct golden_randaugment *g)
{
    return (md_augment_rule){.seed = g->seed,
                             .size = g->size,
                             .size2 = g->size2,
                             .crop_min = 0.08,
                             .crop_max = 1,
                             .ratio_min = 0.75,
                             .ratio_max = 4.0 / 3.0,
                             .flip = 0.5,
                             .randaugment = {.seed = g->seed,
                                             .ops = g->ops,
                                             .probability = 0.5,
                                             .magnitude = 9,
                                             .deviation = 0.5,
                                             .fill = {124, 116, 104}}};
}

static void randaugment_equals_timm(void **state)
{
    (void)state;
    md_resizer *r;
    assert_int_equal(md_resizer_create(&r, 500, 224), MD_OK);
    for (size_t i = 0; i < MD_COUNT(golden_randaugment); i++) {
        const struct golden_randaugment *g = &golden_randaugment[i];
        md_augment_rule rule = fine_rule(g);
        md_image im = picture(g->w, g->h);
        size_t n = (size_t)g->size * (size_t)g->size * 3;
        size_t n2 = (size_t)g->size2 * (size_t)g->size2 * 3;
        uint8_t *out = malloc(n), *out2 = malloc(n2 + 1);
        md_augment_tools tools = {r, malloc(md_augment_scratch(&rule))};
        md_augment_draw d = md_augment_choose(&rule, g->epoch, g->sample, g->w, g->h);
        assert_int_equal(md_augment_image(&rule, &d, tools, &im, out, out2), MD_OK);
        if (hash_bytes(out, n) != g->hash || (n2 && hash_bytes(out2, n2) != g->hash2))
            fail_msg("crop %zu differs from timm's", i);
        free(tools.scratch);
        free(out);
        free(out2);
        free(im.pixels);
    }
    md_resizer_free(r);
}

static void evaluation_equals_torchvision(void **state)
{
    (void)state;
    md_resizer *r;
    assert_int_equal(md_resizer_create(&r, 8, 8), MD_OK); /* small: has to grow */
    for (size_t i = 0; i < MD_COUNT(golden_evaluation); i++) {
        const struct golden_evaluation *g = &golden_evaluation[i];
        md_augment_rule rule = {.seed = i, .size = g->size, .eval_resize = g->resize};
        rule.flip = rule.jitter = 1; /* must have no influence */
        rule.randaugment.ops = 2;
        assert_int_equal(md_augment_scratch(&rule), 0);
        md_image im = picture(g->w, g->h);
        size_t n = (size_t)g->size * (size_t)g->size * 3;
        uint8_t *out = malloc(n);
        md_augment_draw d = md_augment_choose(&rule, 3, i, g->w, g->h);
        assert_int_equal(md_augment_image(&rule, &d, (md_augment_tools){r}, &im, out, NULL), MD_OK);
        if (hash_bytes(out, n) != g->hash)
            fail_msg("evaluation %zu differs from torchvision", i);
        if (g->w == g->size && g->h == g->size && g->resize == g->size)
            for (size_t p = 0; p < n / 3; p++)
                assert_memory_equal(out + 3 * p, im.pixels + 4 * p, 3);
        free(out);
        free(im.pixels);
    }
    md_resizer_free(r);
}

/* A part of a result is that part of the whole result, mirrored or not. */
static void parts_of_resizes(void **state)
{
    (void)state;
    enum { W = 61, H = 47, N = 40 };
    static uint8_t whole[N * N * 3], part[N * N * 3];
    md_resizer *r;
    md_image im = picture(W, H);
    assert_int_equal(md_resizer_create(&r, W, N), MD_OK);
    for (int i = 0; i < 200; i++) {
        md_box box = {i % 20, i % 13, W - i % 20 - i % 7, H - i % 13 - i % 5, i % 2};
        md_box p = {i % 11, i % 17, N - i % 11 - i % 23, N - i % 17 - i % 19, false};
        assert_int_equal(md_resize_box(r, &im, box, N, N, whole), MD_OK);
        assert_int_equal(md_resize_box_part(r, &im, box, &(md_resize_part){N, N, p}, part), MD_OK);
        for (int y = 0; y < p.h; y++)
            assert_memory_equal(part + y * p.w * 3, whole + ((p.y + y) * N + p.x) * 3,
                                (size_t)p.w * 3);
    }
    md_resizer_free(r);
    free(im.pixels);
}

/* Boxes lie inside, areas and ratios in their ranges, mirrors come half of the time, all six orders
 * come, and another epoch, sample or seed draws anew. */
static void draws(void **state)
{
    (void)state;
    md_augment_rule rule = rule_of(&golden_chain[0]);
    int mirrored = 0, orders[27] = {0}, same = 0;
    double area = 0, brightness = 0;
    const int n = 20000, w = 500, h = 375;
    md_augment_draw last = {0};
    for (int i = 0; i < n; i++) {
        md_augment_draw d = md_augment_choose(&rule, (uint32_t)(i % 3), (uint64_t)(i / 3), w, h);
        assert_true(d.box.x >= 0 && d.box.y >= 0 && d.box.x + d.box.w <= w &&
                    d.box.y + d.box.h <= h);
        double ratio = (double)d.box.w / d.box.h, share = (double)d.box.w * d.box.h / (w * h);
        assert_true(ratio > 0.74 && ratio < 1.35 && share > 0.19 && share < 1.005);
        area += share / n;
        brightness += (double)d.factor[MD_BRIGHTNESS] / n;
        mirrored += d.box.mirror;
        orders[d.order[0] * 9 + d.order[1] * 3 + d.order[2]]++;
        same += memcmp(&d.box, &last.box, sizeof d.box) == 0;
        last = d;
        for (int k = 0; k < MD_JITTER_OPS; k++)
            assert_true(d.factor[k] >= 0.6f && d.factor[k] <= 1.4f);
    }
    assert_true(fabs(mirrored / (double)n - 0.5) < 0.02);
    assert_true(fabs(brightness - 1.0) < 0.01);
    assert_true(fabs(area - 0.495) < 0.01); /* 0.6 less what does not fit */
    assert_true(same < 5);
    const int order[6] = {5, 7, 11, 15, 19, 21};
    for (int i = 0; i < 6; i++)
        assert_true(fabs(orders[order[i]] / (double)n - 1.0 / 6) < 0.02);
}

static md_status read_photo(const char *file, md_decoder *d, md_image *im)
{
    static uint8_t bytes[1 << 20];
    const char *data = getenv("MD_TEST_DATA");
    char path[512];
    snprintf(path, sizeof path, "%s/imagenet-samples/%s", data ? data : "../shared/data", file);
    FILE *f = fopen(path, "rb");
    if (!f)
        return MD_ERR_NOINPUT;
    size_t n = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    return md_decode_image(d, &(md_coded){.bytes = bytes, .n = n}, im);
}

static uint8_t photo_out[2][224 * 224 * 3];

/* The crops of a photo into photo_out; 0 where there is no such photo. */
static int crop_photo(const char *file, md_decoder *d, md_augment_rule rule, uint64_t sample)
{
    md_image im;
    md_resizer *r;
    md_status st = read_photo(file, d, &im);
    if (st == MD_ERR_NOINPUT)
        return 0;
    assert_int_equal(st, MD_OK);
    assert_int_equal(md_resizer_create(&r, 500, 224), MD_OK);
    md_augment_tools tools = {r, malloc(md_augment_scratch(&rule) + 1)};
    md_augment_draw draw = md_augment_choose(&rule, 2, sample, im.w, im.h);
    assert_int_equal(md_augment_image(&rule, &draw, tools, &im, photo_out[0], photo_out[1]), MD_OK);
    free(tools.scratch);
    md_resizer_free(r);
    return 1;
}

/* From a real file to its crops, where the photos are. */
static void photos(void **state)
{
    (void)state;
    struct golden_chain g = {.seed = 1, .size = 224, .size2 = 196, .jitter = 0.4};
    g.crop_min = 0.2, g.crop_max = 1;
    struct golden_randaugment fine = {.seed = 1, .size = 224, .ops = 4};
    md_augment_rule evaluation = {.size = 224, .eval_resize = 256};
    md_decoder *d;
    int found = 0;
    assert_int_equal(md_decoder_create(&d, 0), MD_OK);
    for (size_t i = 0; i < MD_COUNT(golden_photo); i++) {
        const char *file = golden_photo[i].file;
        const struct golden_transformed *t = &golden_transformed[i];
        if (!crop_photo(file, d, rule_of(&g), i))
            continue;
        found++;
        if (hash_bytes(photo_out[0], 224 * 224 * 3) != golden_photo[i].crop ||
            hash_bytes(photo_out[1], 196 * 196 * 3) != golden_photo[i].crop2)
            fail_msg("%s differs from Pillow", file);
        crop_photo(t->file, d, fine_rule(&fine), i);
        if (hash_bytes(photo_out[0], 224 * 224 * 3) != t->crop)
            fail_msg("%s differs from timm", file);
        crop_photo(t->file, d, evaluation, i);
        if (hash_bytes(photo_out[0], 224 * 224 * 3) != t->evaluation)
            fail_msg("%s differs from torchvision", file);
    }
    md_decoder_free(d);
    if (found == 0)
        skip();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resize_equals_pillow),
        cmocka_unit_test(jitter_equals_pillow),
        cmocka_unit_test(chain_equals_pillow),
        cmocka_unit_test(randaugment_equals_timm),
        cmocka_unit_test(evaluation_equals_torchvision),
        cmocka_unit_test(parts_of_resizes),
        cmocka_unit_test(draws),
        cmocka_unit_test(photos),
    };
    return cmocka_run_group_tests_name("augment", tests, NULL, NULL);
}
