/* cpu_mm: matrix products of the cpu backend. cpu_mm.c keeps a bounded table of plans; the work is
 * done by one provider, oneDNN (mm_dnnl.c) or any CBLAS (mm_blas.c), whichever the build found.
 *
 * A product is planned once per shape (that allocates) and then run any number of times (that does
 * not). */
#ifndef MD_CPU_MM_H
#define MD_CPU_MM_H

#include "kernels/backend.h"

/* c[m,n] = act(op(a) op(b) + bias) (+ c with accumulate, act NONE only). All row-major with the
 * given row strides: a stored [m,k], or [k,m] with trans_a; b stored [k,n], or [n,k] with trans_b.
 * `batch` products of equal shape whose operands lie step_* elements apart. single: the product
 * runs inside a parallel region, on the calling thread alone. No padding: plans are found by
 * comparing bytes. */
typedef struct cpu_mm_shape {
    int64_t m, n, k;
    int64_t lda, ldb, ldc;
    int64_t batch, step_a, step_b, step_c;
    uint8_t trans_a, trans_b, accumulate, bias, act, single, unused[2];
} cpu_mm_shape;

typedef struct cpu_mm_cache cpu_mm_cache;
typedef struct cpu_mm cpu_mm;

/* The table, for a backend of this many threads. Local. */
md_status cpu_mm_cache_create(int threads, cpu_mm_cache **out);
void cpu_mm_cache_destroy(cpu_mm_cache *cache);

/* Finds or makes the plan of a shape; owned by the table. MD_ERR_MEMORY when the table is full. */
md_status cpu_mm_plan(cpu_mm_cache *cache, const cpu_mm_shape *shape, cpu_mm **out);

/* Scratch bytes one run needs (a single one: per thread), a multiple of 64. */
size_t cpu_mm_scratch(const cpu_mm *mm);

typedef struct cpu_mm_run_args {
    const float *a, *b, *bias;
    float *c;
    void *scratch;
    int thread; /* omp_get_thread_num() of the caller for a single product, else 0 */
} cpu_mm_run_args;

md_status cpu_mm_run(const cpu_mm *mm, const cpu_mm_run_args *r);

/* The provider's side: one mm_provider per backend, one mm_prim per plan. */
typedef struct mm_provider mm_provider;
typedef struct mm_prim mm_prim;

md_status mm_provider_create(int threads, mm_provider **out);
void mm_provider_destroy(mm_provider *p);
md_status mm_prim_create(mm_provider *p, const cpu_mm_shape *s, mm_prim **out, size_t *scratch);
void mm_prim_destroy(mm_prim *prim);
md_status mm_prim_run(const mm_prim *prim, const cpu_mm_run_args *r);

#endif
