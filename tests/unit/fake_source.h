/* fake_source: N raw pictures made up by formula, some of them bad, and a loader's arguments. */
#ifndef MD_FAKE_SOURCE_H
#define MD_FAKE_SOURCE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

#include <cmocka.h>

#include "io/prefetch.h"

#define N     103
#define BATCH 12
#define W     13
#define H     11
#define SIDE  8
#define SIDE2 6

/* Images i with i % bad_every == 3 are bad; 0 = none, 1 = all. */
typedef struct fake {
    int bad_every;
    bool slow;
    atomic_int reads;
} fake;

static inline bool is_bad(const fake *f, int64_t i)
{
    return f->bad_every == 1 || (f->bad_every && i % f->bad_every == 3);
}

static inline md_status fake_read(void *ctx, int64_t i, void *buf, size_t cap, size_t *len)
{
    fake *f = ctx;
    atomic_fetch_add(&f->reads, 1);
    if (f->slow)
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    if (is_bad(f, i))
        MD_FAIL(MD_ERR_DATA, "hash of image %d", (int)i);
    assert_true(cap >= W * H * 3);
    uint8_t *p = buf;
    for (int k = 0; k < W * H * 3; k++)
        p[k] = (uint8_t)(k * (int)(i + 3) + (int)i * i % 251);
    *len = W * H * 3;
    return MD_OK;
}

static inline void fake_describe(void *ctx, int64_t i, md_image_kind *kind, int *w, int *h,
                                 int32_t *label)
{
    (void)ctx;
    *kind = MD_IMAGE_RGB8;
    *w = W;
    *h = H;
    *label = (int32_t)(i * 7 % 5);
}

static inline md_loader_args args_of(fake *f)
{
    return (md_loader_args){
        .source = {.ctx = f,
                   .count = N,
                   .max_bytes = W * H * 3,
                   .max_pixels = W * H,
                   .read = fake_read,
                   .describe = fake_describe},
        .rule = {.seed = 5,
                 .size = SIDE,
                 .size2 = SIDE2,
                 .crop_min = 0.2,
                 .crop_max = 1,
                 .ratio_min = 0.75,
                 .ratio_max = 4.0 / 3,
                 .flip = 0.5,
                 .jitter = 0.4},
        .batch = BATCH,
        .dp_size = 1,
        .micro_batch = BATCH,
        .workers = 3,
        .depth = 2,
    };
}

#endif
