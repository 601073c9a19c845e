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
    X(colsum)                   \
    X(act_bwd)                  \
    X(residual_ln_bwd)          \
    X(attention)                \
    X(attention_bwd)            \
    X(tokens_bwd)               \
    X(loss)                     \
    X(sumsq)
#define CPU_DECLARE(op) size_t cpu_##op##_scratch(md_backend *be, const md_##op##_args *a);
CPU_OPS_WITH_SCRATCH(CPU_DECLARE)
#undef CPU_DECLARE

#define CPU_CHECK(op, a) MD_TRY(md_op_check(MD_OP_##op, (const md_operands *)(const void *)(a)))

#endif
