/* comm_mpi_bf16: reductions of bf16 numbers, a type that MPI does not know: they travel as 16-bit
 * words. An addition is made in f32 and rounded to nearest even at once, so a sum of R ranks is
 * rounded R - 1 times. */
#include "kernels/scalar_math.h"
#include "mpi/comm_mpi_ops.h"

static MPI_Op bf16_ops[3] = {MPI_OP_NULL, MPI_OP_NULL, MPI_OP_NULL}; /* by md_reduce */

#define BF16_OP(name, expr)                                             \
    static void name(void *in, void *inout, int *n, MPI_Datatype *type) \
    {                                                                   \
        const uint16_t *x = in;                                         \
        uint16_t *y = inout;                                            \
        (void)type;                                                     \
        for (int i = 0; i < *n; i++) {                                  \
            const float a = md_f32_from_bf16(x[i]);                     \
            const float b = md_f32_from_bf16(y[i]);                     \
            y[i] = md_bf16_from_f32(expr);                              \
        }                                                               \
    }
BF16_OP(bf16_sum, a + b)
BF16_OP(bf16_max, MD_MAX(a, b))
BF16_OP(bf16_min, MD_MIN(a, b))

void md_mpi_bf16_start(void)
{
    MPI_Op_create(bf16_sum, 1, &bf16_ops[MD_SUM]);
    MPI_Op_create(bf16_max, 1, &bf16_ops[MD_MAX_OP]);
    MPI_Op_create(bf16_min, 1, &bf16_ops[MD_MIN_OP]);
}

void md_mpi_bf16_stop(void)
{
    for (size_t i = 0; i < MD_COUNT(bf16_ops); i++)
        if (bf16_ops[i] != MPI_OP_NULL)
            MPI_Op_free(&bf16_ops[i]);
}

MPI_Op md_mpi_bf16_op(md_reduce op)
{
    return bf16_ops[op];
}
