/* rng: Philox4x32-10, the only source of randomness (host and device inline).
 *
 * A draw is a pure function of (seed, stream, step, index, block): nothing to save, nothing that
 * depends on rank or thread. stream says the purpose (md_rng_stream), step the epoch or optimizer
 * step, index the global sample or element; block counts draws inside one such key.
 * Algorithm: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). */
#ifndef MD_RNG_H
#define MD_RNG_H

#include <math.h>
#include <stdint.h>

#ifndef MD_HD
#ifdef __CUDACC__
#define MD_HD __host__ __device__ inline
#else
#define MD_HD static inline
#endif
#endif

typedef enum md_rng_stream {
    MD_RNG_INIT = 1,    /* index = global element index, step = parameter id */
    MD_RNG_SHUFFLE,     /* epoch permutation: step = epoch */
    MD_RNG_CROP,        /* step = epoch, index = global sample */
    MD_RNG_FLIP,        /* step = epoch, index = global sample */
    MD_RNG_JITTER,      /* step = epoch, index = global sample */
    MD_RNG_MASK,        /* step = epoch, index = global sample */
    MD_RNG_DROP_PATH,   /* step = optimizer step, index = position in batch * 2 * layers + branch */
    MD_RNG_STORE_ORDER, /* order of images at conversion */
    MD_RNG_TEST,
    MD_RNG_NOISE,       /* seed = md_mix's key, index = element of the image */
    MD_RNG_MIX,         /* step = optimizer step, index = group of images in the batch */
    MD_RNG_ERASE,       /* step = epoch, index = global sample */
    MD_RNG_RANDAUGMENT, /* step = epoch, index = global sample */
    MD_RNG_PROBE        /* first weights of a probe: step = head, index = element */
} md_rng_stream;

typedef struct md_rng_key {
    uint64_t seed;
    uint32_t stream, step;
    uint64_t index; /* < 2^48 */
} md_rng_key;

/* Four 32-bit words of block number `block` of the key. */
MD_HD void md_rng_bits(md_rng_key k, uint32_t block, uint32_t out[4])
{
    uint32_t c0 = block, c1 = (uint32_t)k.index;
    uint32_t c2 = (uint32_t)(k.index >> 32) | (k.stream << 16), c3 = k.step;
    uint32_t k0 = (uint32_t)k.seed, k1 = (uint32_t)(k.seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* Standard normal number of two random words (Box and Muller 1958), the same within a few ulp on
 * every device, also near zero: the angle is a whole number of quarter turns, exactly, and at most
 * an eighth of a turn more or less, where the polynomials (of Cephes' sinf and cosf) hold. */
MD_HD float md_normal_of(uint32_t w0, uint32_t w1)
{
    float r = sqrtf(-2.0f * logf((float)((w0 >> 8) + 1) * (1.0f / 16777216.0f)));
    float t = (float)(int32_t)(w1 << 2) * (float)(1.5707963267948966 / 4294967296.0);
    float z = t * t;
    float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * t + t;
    float c =
        ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
        0.5f * z + 1.0f;
    uint32_t quarter = w1 >> 30; /* cosine of t and so many quarters */
    float x = quarter & 1 ? s : c;
    return r * (quarter == 1 || quarter == 2 ? -x : x);
}

/* Standard normal number of one element under a key. */
MD_HD float md_rng_normal(const uint32_t key[2], uint32_t element)
{
    md_rng_key k;
    uint32_t word[4];
    k.seed = (uint64_t)key[1] << 32 | key[0];
    k.stream = MD_RNG_NOISE, k.step = 0, k.index = element;
    md_rng_bits(k, 0, word);
    return md_normal_of(word[0], word[1]);
}

/* A cursor over the words of one key, for code that draws a varying number of values. */
typedef struct md_rng {
    md_rng_key key;
    uint32_t block, used, word[4];
} md_rng;

MD_HD md_rng md_rng_at(uint64_t seed, md_rng_stream stream, uint32_t step, uint64_t index)
{
    md_rng r;
    r.key.seed = seed, r.key.stream = (uint32_t)stream, r.key.step = step, r.key.index = index;
    r.block = 0, r.used = 4;
    return r;
}

MD_HD uint32_t md_rng_u32(md_rng *r)
{
    if (r->used == 4) {
        md_rng_bits(r->key, r->block++, r->word);
        r->used = 0;
    }
    return r->word[r->used++];
}

/* [0, 1) with 24 bits: exact in float. */
MD_HD float md_rng_float(md_rng *r)
{
    return (float)(md_rng_u32(r) >> 8) * (1.0f / 16777216.0f);
}

/* [0, 1) with 53 bits. */
MD_HD double md_rng_double(md_rng *r)
{
    uint64_t hi = md_rng_u32(r) >> 5, lo = md_rng_u32(r) >> 6;
    return ((double)hi * 67108864.0 + (double)lo) * (1.0 / 9007199254740992.0);
}

/* Uniform integer in [0, n), n >= 1; multiply-shift of 64 random bits, bias below n / 2^64. */
MD_HD uint32_t md_rng_below(md_rng *r, uint32_t n)
{
    uint64_t hi = md_rng_u32(r), lo = md_rng_u32(r);
    return (uint32_t)((hi * n + ((lo * n) >> 32)) >> 32);
}

#endif
