/* param: see param.h. */
#include "src/param.h"
#include "src/rng.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#define XXH_INLINE_ALL /* no library to link, compiled for this machine */
#include <xxhash.h>

void md_params_init(md_params *p)
{
    *p = (md_params){0};
}

void md_params_free(md_params *p)
{
    md_free(p->row);
    md_free(p->value);
    md_free(p->grad);
    md_free(p->m);
    md_free(p->v);
    *p = (md_params){0};
}

int md_params_find(const md_params *p, const char *name)
{
    for (int i = 0; i < p->count; i++)
        if (strcmp(p->row[i].name, name) == 0)
            return i;
    return -1;
}

int md_params_add(md_params *p, const md_param *row)
{
    MD_ASSERT(!p->sealed, "%s after seal", row->name);
    MD_ASSERT(md_params_find(p, row->name) < 0, "parameter %s declared twice", row->name);
    if (p->count == p->capacity) {
        int capacity = p->capacity ? 2 * p->capacity : 64;
        md_param *bigger = md_alloc(sizeof *bigger * (size_t)capacity, "parameter table");
        p->incomplete |= !bigger;
        if (!bigger)
            return -1;
        if (p->count)
            memcpy(bigger, p->row, sizeof *bigger * (size_t)p->count);
        md_free(p->row);
        p->row = bigger;
        p->capacity = capacity;
    }
    md_param *r = &p->row[p->count];
    *r = *row;
    r->count = 1;
    for (int d = 0; d < r->rank; d++)
        r->count *= r->global[d];
    return p->count++;
}

static int64_t place_group(md_params *p, bool decay, int64_t at)
{
    for (int i = 0; i < p->count; i++) {
        md_param *r = &p->row[i];
        if (r->decay != decay)
            continue;
        r->offset = at;
        at += (r->count + MD_PARAM_ALIGN - 1) / MD_PARAM_ALIGN * MD_PARAM_ALIGN;
    }
    return at;
}

md_status md_params_seal(md_params *p)
{
    MD_ASSERT(!p->sealed);
    if (p->incomplete)
        return MD_ERR_MEMORY;
    p->decay_end = place_group(p, true, 0);
    p->elements = place_group(p, false, p->decay_end);
    p->sealed = true;
    return MD_OK;
}

int64_t md_params_total(const md_params *p)
{
    int64_t n = 0;
    for (int i = 0; i < p->count; i++)
        n += p->row[i].count;
    return n;
}

size_t md_params_block_bytes(const md_params *p)
{
    return (size_t)p->elements * sizeof(float);
}

md_status md_params_allocate(md_params *p, bool grads, bool moments)
{
    MD_ASSERT(p->sealed && !p->value);
    MD_NEW(p->value, p->elements, "parameters");
    if (grads)
        MD_NEW(p->grad, p->elements, "gradients");
    if (moments) {
        MD_NEW(p->m, p->elements, "first moments");
        MD_NEW(p->v, p->elements, "second moments");
    }
    return MD_OK;
}

static md_tensor row_view(const md_params *p, int i, float *block)
{
    const md_param *r = &p->row[i];
    return md_tensor_make(block ? block + r->offset : NULL, MD_F32, r->rank, r->global);
}

md_tensor md_param_value(const md_params *p, int i)
{
    return row_view(p, i, p->value);
}

md_tensor md_param_grad(const md_params *p, int i)
{
    return row_view(p, i, p->grad);
}

/* erfinv on (-0.99, 0.99): Giles, "Approximating the erfinv function" (GPU Computing Gems 2, 2011),
 * single precision, central branch; exact to 2e-7 there. */
static inline float erfinv_central(float x)
{
    static const float c[] = {2.81022636e-08f,  3.43273939e-07f, -3.5233877e-06f,
                              -4.39150654e-06f, 0.00021858087f,  -0.00125372503f,
                              -0.00417768164f,  0.246640727f,    1.50140941f};
    float w = -logf((1.0f - x) * (1.0f + x)) - 2.5f, y = c[0];
    for (size_t i = 1; i < MD_COUNT(c); i++)
        y = y * w + c[i];
    return y * x;
}

static void draw_row(float *out, const md_param *r, uint64_t seed, int id)
{
    const float edge = 0.68268949f; /* P(|x| < sigma) of a normal */
    const float limit = r->init_value;
    int64_t blocks = (r->count + 3) / 4;
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        uint32_t bits[4];
        md_rng_key key = {seed, MD_RNG_INIT, (uint32_t)id, (uint64_t)b};
        md_rng_bits(key, 0, bits);
        for (int64_t e = 4 * b; e < MD_MIN(4 * b + 4, r->count); e++) {
            float u = edge * (2.0f * ((float)(bits[e & 3] >> 8) + 0.5f) / 16777216.0f - 1.0f);
            float x = erfinv_central(u) * r->init_value * 1.41421356f;
            out[e] = fminf(fmaxf(x, -limit), limit) * r->init_scale;
        }
    }
}

void md_params_initialise(md_params *p, uint64_t seed)
{
    for (int i = 0; i < p->count; i++) {
        const md_param *r = &p->row[i];
        float *out = p->value + r->offset;
        if (r->init == MD_INIT_TRUNC_NORMAL)
            draw_row(out, r, seed, i);
        else
            for (int64_t e = 0; e < r->count; e++)
                out[e] = r->init_value;
    }
}

uint64_t md_params_hash(const md_params *p)
{
    uint64_t h = 0;
    for (int i = 0; i < p->count; i++) {
        const md_param *r = &p->row[i];
        h = XXH3_64bits_withSeed(r->name, strlen(r->name), h);
        h = XXH3_64bits_withSeed(r->global, sizeof r->global[0] * (size_t)r->rank, h);
    }
    return h;
}
