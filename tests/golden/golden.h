/* golden: what the golden tests share: opening the files of this folder, the values both sides
 * compute, and the measure of agreement. See README.md for what the files hold. */
#ifndef MD_GOLDEN_H
#define MD_GOLDEN_H

#include "io/safetensors.h"
#include "kernels/backend.h"
#include "src/config.h"
#include "src/rng.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define GOLDEN_OUTPUT   1e-5 /* relative errors allowed */
#define GOLDEN_GRADIENT 1e-4

#define GOLDEN_OK(call)                      \
    do {                                     \
        if ((call) != MD_OK)                 \
            fail_msg("%s", md_error_text()); \
    } while (0)

static inline md_safetensors *golden_open(const char *name)
{
    char path[256];
    md_safetensors *st;
    snprintf(path, sizeof path, "tests/golden/%s", name);
    GOLDEN_OK(md_safetensors_open(path, &st));
    return st;
}

/* A tensor of the file; the caller frees data with md_free. */
static inline md_tensor golden_load(const md_safetensors *st, const char *name, md_dtype dtype)
{
    md_tensor t;
    GOLDEN_OK(md_safetensors_load(st, name, dtype, &t));
    return t;
}

static inline double golden_f64(const md_safetensors *st, const char *name)
{
    md_tensor t = golden_load(st, name, MD_F64);
    double v = *(const double *)t.data;
    md_free(t.data);
    return v;
}

static inline const char *golden_text(const md_safetensors *st, const char *key)
{
    const char *text = md_safetensors_metadata(st, key);
    if (!text)
        fail_msg("no \"%s\" in the metadata", key);
    return text;
}

static inline int golden_int(const md_safetensors *st, const char *key)
{
    return (int)strtol(golden_text(st, key), NULL, 10);
}

static inline uint32_t golden_fnv1a(const char *name)
{
    uint32_t h = 0x811C9DC5u;
    for (; *name; name++)
        h = (h ^ (uint8_t)*name) * 0x01000193u;
    return h;
}

/* The closed formula of the weights: offset + scale * (2 u - 1). */
static inline void golden_fill(uint64_t seed, const char *name, const float rule[2], int64_t n,
                               float *out)
{
    md_rng_key key = {.seed = seed, .stream = 0, .step = golden_fnv1a(name)};
    for (int64_t i = 0; i < n; i++) {
        uint32_t word[4];
        key.index = (uint64_t)i;
        md_rng_bits(key, 0, word);
        out[i] = rule[0] + rule[1] * ((float)(word[0] >> 8) * 0x1p-23f - 1.0f);
    }
}

/* max |got - want| over max |want|; element i of want is element i * step of got. NaN counts as
 * infinite. */
static inline double golden_error(const float *got, const float *want, int64_t n, int64_t step)
{
    double worst = 0, scale = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)got[i * step] - (double)want[i]);
        worst = isnan(d) ? INFINITY : fmax(worst, d);
        scale = fmax(scale, fabs((double)want[i]));
    }
    assert_true(scale > 0);
    return worst / scale;
}

/* Fails with the name when got is further than `limit` from the file's tensor `name`. */
static inline void golden_expect(const md_safetensors *st, const char *name, const float *got,
                                 int64_t n, double limit)
{
    md_tensor want = golden_load(st, name, MD_F32);
    if (md_tensor_count(&want) != n)
        fail_msg("%s: %lld values, the file has %lld", name, (long long)n,
                 (long long)md_tensor_count(&want));
    double error = golden_error(got, md_f32(&want), n, 1);
    if (!(error <= limit))
        fail_msg("%s: relative error %.3g, allowed %.3g", name, error, limit);
    md_free(want.data);
}

static inline void golden_expect_number(const char *name, double got, double want, double limit)
{
    if (!(fabs(got - want) <= limit * fabs(want)))
        fail_msg("%s: %.9g, should be %.9g", name, got, want);
}

/* Defaults plus overrides made from printf-style rows; the caller frees c. */
typedef struct golden_overrides {
    char text[32][96];
    char *list[32];
    int n;
} golden_overrides;

static inline void golden_override(golden_overrides *o, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
static inline void golden_override(golden_overrides *o, const char *fmt, ...)
{
    va_list ap;
    assert_true(o->n < (int)MD_COUNT(o->text));
    va_start(ap, fmt);
    vsnprintf(o->text[o->n], sizeof o->text[0], fmt, ap);
    va_end(ap);
    o->list[o->n] = o->text[o->n];
    o->n++;
}

static inline void golden_config(md_config *c, const golden_overrides *o)
{
    GOLDEN_OK(md_config_init(c));
    GOLDEN_OK(md_config_load(c, NULL, o->n, o->list));
}

#endif
