/* cpu_mm: the table of planned products, open addressing by shape (see cpu_mm.h). */
#include "kernels/cpu/cpu_mm.h"

#include <string.h>

#define MM_SLOTS 8192 /* power of two */
#define MM_MOST  6144 /* probing stays short */

struct cpu_mm {
    cpu_mm_shape shape;
    mm_prim *prim;
    size_t scratch;
};

struct cpu_mm_cache {
    mm_provider *provider;
    int count;
    cpu_mm slot[MM_SLOTS];
};

_Static_assert(sizeof(cpu_mm_shape) == 10 * sizeof(int64_t) + 8, "plans are compared by bytes");

md_status cpu_mm_cache_create(int threads, cpu_mm_cache **out)
{
    MD_NEW(*out, 1, "cpu matmul plans");
    return mm_provider_create(threads, &(*out)->provider);
}

void cpu_mm_cache_destroy(cpu_mm_cache *cache)
{
    if (!cache)
        return;
    for (int i = 0; i < MM_SLOTS; i++)
        mm_prim_destroy(cache->slot[i].prim);
    mm_provider_destroy(cache->provider);
    md_free(cache);
}

static uint64_t shape_hash(const cpu_mm_shape *s)
{
    uint64_t word[sizeof *s / 8], hash = 0;
    memcpy(word, s, sizeof word);
    for (size_t i = 0; i < MD_COUNT(word); i++)
        hash = (hash ^ word[i] ^ hash >> 29) * 0x9E3779B97F4A7C15u;
    return hash >> 40;
}

md_status cpu_mm_plan(cpu_mm_cache *cache, const cpu_mm_shape *shape, cpu_mm **out)
{
    for (uint64_t i = shape_hash(shape);; i++) {
        cpu_mm *mm = &cache->slot[i % MM_SLOTS];
        if (mm->prim && memcmp(&mm->shape, shape, sizeof *shape) == 0) {
            *out = mm;
            return MD_OK;
        }
        if (mm->prim)
            continue;
        if (cache->count >= MM_MOST)
            MD_FAIL(MD_ERR_MEMORY, "more than %d different matrix product shapes", MM_MOST);
        MD_TRY(mm_prim_create(cache->provider, shape, &mm->prim, &mm->scratch));
        mm->shape = *shape;
        mm->scratch = (mm->scratch + 63) / 64 * 64;
        cache->count++;
        *out = mm;
        return MD_OK;
    }
}

size_t cpu_mm_scratch(const cpu_mm *mm)
{
    return mm->scratch;
}

md_status cpu_mm_run(const cpu_mm *mm, const cpu_mm_run_args *r)
{
    return mm_prim_run(mm->prim, r);
}
