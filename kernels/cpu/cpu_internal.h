/* cpu_internal: what the files of the cpu backend share.
 *
 * Sums that cross threads are cut into chunks whose number and borders depend on the shape only;
 * each chunk is summed by one thread into its own row of the scratch, and the rows are added in
 * chunk order. So such results are the same bits for any number of threads. */
#ifndef MD_CPU_INTERNAL_H
#define MD_CPU_INTERNAL_H

#include "kernels/backend.h"
#include "kernels/cpu/cpu_mm.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define CPU_CHUNKS 64

/* Sums along a row run in the 16 lanes of a vector (the compiler splits it on machines with shorter
 * registers) and end in a fixed tree: the reduction clause of `omp simd` adds the lanes one by one,
 * which costs more than a short row. */
#define CPU_LANES 16
/* The vectors only cross functions of one file that are inlined: how they would be passed is no
 * matter. */
#pragma GCC diagnostic ignored "-Wpsabi"
typedef float cpu_vec __attribute__((vector_size(64)));
typedef float cpu_half __attribute__((vector_size(32)));

static inline cpu_vec cpu_load(const float *x)
{
    cpu_vec v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline void cpu_store(float *x, cpu_vec v)
{
    memcpy(x, &v, sizeof v);
}

static inline cpu_vec cpu_max(cpu_vec a, cpu_vec b)
{
    typedef int32_t mask __attribute__((vector_size(64)));
    mask first = a > b;
    return (cpu_vec)(((mask)a & first) | ((mask)b & ~first));
}

static inline float cpu_sum_lanes(cpu_vec v)
{
    cpu_half a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    a += __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3);
    a += __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
    return a[0] + a[1];
}

static inline float cpu_max_lanes(cpu_vec v)
{
    v = cpu_max(
        v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = cpu_max(
        v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = cpu_max(
        v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return v[0] > v[1] ? v[0] : v[1];
}

/* Loops shorter than this run on one thread: starting a team costs more. */
#define CPU_SERIAL_BELOW 8192

/* Number of chunks for n items of at least `least` items each, and the first item of chunk i. */
static inline int64_t cpu_chunks(int64_t n, int64_t least)
{
    return MD_MAX(1, MD_MIN(CPU_CHUNKS, n / least));
}

static inline int64_t cpu_chunk_begin(int64_t n, int64_t chunks, int64_t i)
{
    return n * i / chunks;
}

/* out[c] (+)= part[0][c] + part[1][c] + ... in this order. out NULL: nothing. */
void cpu_reduce_chunks(const md_backend *be, const float *part, int64_t chunks, int64_t width,
                       const md_tensor *out, bool accumulate);

/* Fails with MD_ERR_BUG when the scratch set by the planner is smaller than need. */
md_status cpu_scratch(const md_backend *be, md_op op, size_t need, void **scratch);

/* Every index must be in [0, limit). */
md_status cpu_check_index(md_op op, const md_tensor *index, int64_t limit);

static inline cpu_mm_cache *cpu_mm_of(const md_backend *be)
{
    return be->impl;
}

/* Rounds a count of floats up to whole cache lines. */
static inline size_t cpu_line(size_t floats)
{
    return (floats + 15) / 16 * 16;
}

/* One cpu_<op> per row, and cpu_<op>_scratch for the rows that need scratch. */
#define CPU_DECLARE(op) md_status cpu_##op(md_backend *be, const md_##op##_args *a);
MD_OPS(CPU_DECLARE)
#undef CPU_DECLARE

#define CPU_OPS_WITH_SCRATCH(X) \
    X(gemm)                     \
    X(linear_bwd)               \
    X(colsum)                   \
    X(qv_bias_bwd)              \
    X(act_bwd)                  \
    X(residual_ln_bwd)          \
    X(attention)                \
    X(attention_bwd)            \
    X(tokens_bwd)               \
    X(loss)                     \
    X(cross_entropy)            \
    X(sumsq)
#define CPU_DECLARE(op) size_t cpu_##op##_scratch(md_backend *be, const md_##op##_args *a);
CPU_OPS_WITH_SCRATCH(CPU_DECLARE)
#undef CPU_DECLARE

/* md_op_check, and f32 throughout. */
md_status cpu_check(md_op op, const md_operands *a);
#define CPU_CHECK(op, a) MD_TRY(cpu_check(MD_OP_##op, (const md_operands *)(const void *)(a)))

#endif
