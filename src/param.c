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

static bool on_device(const md_params *p)
{
    return p->be && md_backend_is_device(p->be);
}

static void free_block(const md_params *p, void *block)
{
    if (p->be)
        md_backend_free(p->be, block);
    else
        md_free(block);
}

void md_params_drop_host(md_params *p)
{
    float *const copy[] = {p->host_value, p->host_m, p->host_v, p->host_ema};
    for (size_t i = 0; on_device(p) && i < MD_COUNT(copy); i++)
        md_backend_pinned_free(p->be, copy[i]);
    p->host_value = p->host_m = p->host_v = p->host_ema = NULL;
}

void md_params_free(md_params *p)
{
    md_free(p->row);
    md_params_drop_host(p);
    float *const block[] = {
        p->value, p->grad, p->m, p->v, p->ema, p->reduced, (float *)(void *)p->rounded};
    for (size_t i = 0; i < MD_COUNT(block); i++)
        free_block(p, block[i]);
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
    p->row[p->count] = *row;
    return p->count++;
}

static int64_t global_count(const md_param *r)
{
    int64_t n = 1;
    for (int d = 0; d < r->rank; d++)
        n *= r->global[d];
    return n;
}

/* This rank's part of a row. */
static md_status cut_row(md_param *r, const md_params_cut *cut)
{
    int64_t n = global_count(r), outer = 1, inner = n;
    memcpy(r->local, r->global, sizeof r->local);
    r->count = n;
    r->view = (md_view){0, n, n, 1};
    r->cut = cut->size > 1 && r->cut_dim >= 0;
    if (!r->cut)
        return MD_OK;
    int64_t along = r->global[r->cut_dim], part = along / r->cut_parts;
    if (part * r->cut_parts != along || part % cut->size != 0)
        MD_FAIL(MD_ERR_CONFIG,
                "%s: %lld rows or columns do not divide over %d tensor-parallel ranks", r->name,
                (long long)part, cut->size);
    for (int d = 0; d <= r->cut_dim; d++)
        inner /= r->global[d];
    for (int d = 0; d < r->cut_dim; d++)
        outer *= r->global[d];
    int64_t run = part / cut->size * inner;
    r->local[r->cut_dim] = along / cut->size;
    r->count = n / cut->size;
    r->view = (md_view){cut->rank * run, run, part * inner, outer * r->cut_parts};
    return MD_OK;
}

md_param_group md_param_group_of(const md_param *row)
{
    return row->decay ? (row->cut ? MD_GROUP_DECAY_CUT : MD_GROUP_DECAY)
                      : (row->cut ? MD_GROUP_PLAIN_CUT : MD_GROUP_PLAIN);
}

static int64_t place_group(md_params *p, md_param_group group, int64_t align, int64_t at)
{
    for (int i = 0; i < p->count; i++) {
        md_param *r = &p->row[i];
        if (md_param_group_of(r) != group)
            continue;
        r->offset = at;
        at += (r->count + align - 1) / align * align;
    }
    return at;
}

md_status md_params_seal(md_params *p, const md_params_cut *cut)
{
    static const md_params_cut alone = {0, 1, MD_PARAM_ALIGN};
    MD_ASSERT(!p->sealed);
    if (p->incomplete)
        return MD_ERR_MEMORY;
    if (!cut)
        cut = &alone;
    MD_ASSERT(cut->align > 0 && cut->align % MD_PARAM_ALIGN == 0);
    for (int i = 0; i < p->count; i++)
        MD_TRY(cut_row(&p->row[i], cut));
    for (md_param_group g = 0; g < MD_GROUPS; g++)
        p->elements = p->end[g] = place_group(p, g, cut->align, p->elements);
    p->sealed = true;
    return MD_OK;
}

int md_params_pieces(const md_params *p, md_piece out[MD_GROUPS])
{
    int n = 0;
    for (md_param_group g = 0; g < MD_GROUPS; g++) {
        int64_t first = g ? p->end[g - 1] : 0;
        if (p->end[g] > first)
            out[n++] = (md_piece){.offset = first,
                                  .count = p->end[g] - first,
                                  .moment = first,
                                  .decay = g == MD_GROUP_DECAY_CUT || g == MD_GROUP_DECAY,
                                  .cut = g == MD_GROUP_DECAY_CUT || g == MD_GROUP_PLAIN_CUT};
    }
    return n;
}

int64_t md_params_total(const md_params *p)
{
    int64_t n = 0;
    for (int i = 0; i < p->count; i++)
        n += global_count(&p->row[i]);
    return n;
}

size_t md_params_block_bytes(const md_params *p)
{
    return (size_t)p->elements * sizeof(float);
}

/* One flat block of operand memory, and the host's way to it. */
static md_status new_block(md_params *p, int64_t n, const char *what, float **block, float **host)
{
    const size_t bytes = (size_t)n * sizeof **block;
    void *memory = NULL;
    if (p->be)
        MD_TRY(md_backend_alloc(p->be, bytes, what, &memory));
    else if (!(memory = md_alloc(bytes, what)))
        return MD_ERR_MEMORY;
    *block = memory;
    if (host && on_device(p)) {
        MD_TRY(md_backend_pinned(p->be, bytes, what, &memory));
        *host = memory;
    } else if (host) {
        *host = *block;
    }
    return MD_OK;
}

md_status md_params_allocate(md_params *p, md_backend *be, bool grads)
{
    MD_ASSERT(p->sealed && !p->value);
    p->be = be;
    MD_TRY(new_block(p, p->elements, "parameters", &p->value, &p->host_value));
    if (grads)
        MD_TRY(new_block(p, p->elements, "gradients", &p->grad, NULL));
    if (p->dtype == MD_BF16) {
        void *memory;
        MD_ASSERT(be, "bf16 needs a backend");
        MD_TRY(md_backend_alloc(be, (size_t)p->elements * sizeof *p->rounded, "bf16 parameters",
                                &memory));
        p->rounded = memory;
    }
    return MD_OK;
}

md_status md_params_allocate_moments(md_params *p, int64_t n, bool reduced)
{
    MD_ASSERT(p->sealed && !p->m);
    p->moments = n;
    MD_TRY(new_block(p, n, "first moments", &p->m, &p->host_m));
    MD_TRY(new_block(p, n, "second moments", &p->v, &p->host_v));
    if (reduced)
        MD_TRY(new_block(p, n, "reduced gradients", &p->reduced, NULL));
    return MD_OK;
}

md_status md_params_allocate_ema(md_params *p)
{
    return new_block(p, p->moments, "moving average", &p->ema, &p->host_ema);
}

typedef struct mirror {
    float *block, *host;
    int64_t count;
} mirror;

enum { MIRRORS = 4 };
static void mirrors_of(const md_params *p, mirror m[MIRRORS])
{
    m[0] = (mirror){p->value, p->host_value, p->elements};
    m[1] = (mirror){p->m, p->host_m, p->moments};
    m[2] = (mirror){p->v, p->host_v, p->moments};
    m[3] = (mirror){p->ema, p->host_ema, p->moments};
}

md_status md_params_fetch(md_params *p)
{
    mirror m[MIRRORS];
    mirrors_of(p, m);
    if (!on_device(p))
        return MD_OK;
    for (int i = 0; i < MIRRORS; i++)
        if (m[i].host)
            MD_TRY(md_backend_download(p->be, m[i].host, m[i].block,
                                       (size_t)m[i].count * sizeof(float)));
    return md_backend_sync(p->be);
}

md_status md_params_store(md_params *p)
{
    mirror m[MIRRORS];
    mirrors_of(p, m);
    for (int i = 0; on_device(p) && i < MIRRORS; i++)
        if (m[i].host)
            MD_TRY(md_backend_upload(p->be, m[i].block, m[i].host,
                                     (size_t)m[i].count * sizeof(float)));
    MD_TRY(md_params_round(p));
    return p->be ? md_backend_sync(p->be) : MD_OK;
}

md_status md_params_round(md_params *p)
{
    if (!p->rounded)
        return MD_OK;
    md_tensor x = MD_TENSOR(p->value, MD_F32, p->elements);
    md_tensor y = MD_TENSOR(p->rounded, MD_BF16, p->elements);
    return MD_OP(p->be, cast, .x = &x, .y = &y);
}

static md_tensor row_view(const md_params *p, int i, float *block)
{
    const md_param *r = &p->row[i];
    return md_tensor_make(block ? block + r->offset : NULL, MD_F32, r->rank, r->local);
}

md_tensor md_param_value(const md_params *p, int i)
{
    const md_param *r = &p->row[i];
    if (p->dtype == MD_F32)
        return row_view(p, i, p->value);
    return md_tensor_make(p->rounded ? p->rounded + r->offset : NULL, MD_BF16, r->rank, r->local);
}

md_tensor md_param_f32(const md_params *p, int i)
{
    return row_view(p, i, p->value);
}

md_tensor md_param_host(const md_params *p, int i)
{
    return row_view(p, i, p->host_value);
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

/* Elements [lo, hi) of a row's part. */
static void draw_range(float *out, const md_param *r, md_rng_key key, int64_t lo, int64_t hi)
{
    const float edge = 0.68268949f; /* P(|x| < sigma) of a normal */
    const float limit = r->init_value;
    int64_t at = md_view_global(&r->view, lo), left = r->view.run - lo % r->view.run;
    int64_t block = -1;
    uint32_t bits[4] = {0};
    for (int64_t e = lo; e < hi; e++, at++) {
        if (at / 4 != block) { /* four elements of the global array share a draw */
            block = at / 4;
            key.index = (uint64_t)block;
            md_rng_bits(key, 0, bits);
        }
        float u = edge * (2.0f * ((float)(bits[at & 3] >> 8) + 0.5f) / 16777216.0f - 1.0f);
        float x = erfinv_central(u) * r->init_value * 1.41421356f;
        out[e] = fminf(fmaxf(x, -limit), limit) * r->init_scale;
        if (--left == 0) {
            at += r->view.stride - r->view.run;
            left = r->view.run;
        }
    }
}

static void draw_row(float *out, const md_param *r, uint64_t seed, int id)
{
    enum { CHUNK = 4096 };
    int64_t chunks = (r->count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks; c++)
        draw_range(out, r, (md_rng_key){seed, MD_RNG_INIT, (uint32_t)id, 0}, c * CHUNK,
                   MD_MIN((c + 1) * CHUNK, r->count));
}

void md_params_initialise(md_params *p, uint64_t seed)
{
    for (int i = 0; i < p->count; i++) {
        const md_param *r = &p->row[i];
        float *out = p->host_value + r->offset;
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
