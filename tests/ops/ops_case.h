/* ops_case: one conformance case of an op: operands made from a shape and a seed, a
 * double-precision reference, and the tolerance between them. The same table of cases runs on every
 * backend, on host or device memory, in f32 or bf16.
 *
 * A room (ops_gemm.c, ops_norm.c ...) exports a table of rows. build() makes operands and
 * arguments; ref() adds the right answer to ref[] (which begins as the old output where the op
 * accumulates, else as zero), and with mutant drops one term, which the comparison must notice;
 * objective(), for ops that return gradients, is the scalar whose gradient output o is. */
#ifndef MD_OPS_CASE_H
#define MD_OPS_CASE_H

#include "kernels/backend.h"

#include <stddef.h>

typedef struct op_case op_case;

typedef struct op_row {
    md_op op;
    void (*build)(op_case *c);
    void (*ref)(op_case *c, bool mutant);
    int64_t n[5];   /* the shape, as build() reads it */
    unsigned flags; /* options, as build() reads them */
    /* Value of the objective with the variable that output o is the gradient of changed by h at i;
     * NULL for ops that return no gradient. A NaN: output o is no gradient. */
    double (*objective)(const op_case *c, int o, int64_t i, double h);
} op_row;

typedef union op_args {
    md_operands common;
#define OP_ARGS(op) md_##op##_args op;
    MD_OPS(OP_ARGS)
#undef OP_ARGS
} op_args;

#define CASE_BLOCKS 64
struct op_case {
    const op_row *row;
    md_dtype compute; /* type of the operands that ACT makes */
    op_args args;
    double *x[MD_OP_IN];    /* inputs before the call, in double, as their type holds them */
    double *ref[MD_OP_OUT]; /* the right answer */
    /* Tolerance of one element:
     *   |y - ref| <= eps_f32 * sqrt(terms) * factor * max |ref|   sums and formulas in f32
     *              + slack                                       roundings to bf16 inside the op
     *              + 2^-8 * |ref|                                of an output of bf16: its own
     * Rounding errors of a sum of `terms` grow like a random walk; factor counts the roundings of a
     * term and the spread of the extreme over all elements (4 sigma). Inputs are rounded to their
     * type before the reference sees them, so they add nothing. slack is what the reference adds
     * up, an absolute bound that is zero in f32. factor 0: no arithmetic, the output is the
     * reference rounded to its type, bit for bit. */
    double terms, factor;
    double *slack[MD_OP_OUT];
    /* By how much a mutant bends what it does not drop: several tolerances of the compute type. */
    double bend;
    /* Bytes by which tensors of f32 miss the alignment that memory has; set before they are made.
     */
    size_t shift;
    uint64_t seed;
    int tensors, blocks;
    md_tensor tensor[MD_OP_IN + MD_OP_OUT];
    void *block[CASE_BLOCKS];
};

typedef enum case_fill { FILL_UNIT, FILL_POSITIVE, FILL_WIDE, FILL_BITS, FILL_BYTES } case_fill;

/* A tensor filled at random between guard bytes: UNIT (-1, 1), POSITIVE (0.1, 1), WIDE (-8, 8),
 * BITS 0 or 1, BYTES 0..255. Outputs are filled too: what an op must overwrite or add to. */
md_tensor *case_tensor(op_case *c, md_dtype dtype, case_fill fill, int rank, const int64_t *dim);
#define TENSOR(c, dtype, fill, ...)                                              \
    case_tensor((c), (dtype), (fill), (int)MD_COUNT(((int64_t[]){__VA_ARGS__})), \
                (int64_t[]){__VA_ARGS__})
#define F32(c, ...) TENSOR(c, MD_F32, FILL_UNIT, __VA_ARGS__)
/* An operand of the compute type. */
#define ACT(c, ...) TENSOR(c, (c)->compute, FILL_UNIT, __VA_ARGS__)

/* Element i of a tensor on the host, of any type. */
double case_load(const md_tensor *t, int64_t i);
void case_store(const md_tensor *t, int64_t i, double value);
/* Largest relative error of a rounding to bf16 inside an op; 0 in f32, whose roundings are the
 * business of terms and factor. */
double case_eps(const op_case *c);

/* A zeroed array for references, freed with the case. */
double *case_array(op_case *c, int64_t n);

/* Operand `name` of op in double: X(c, gemm, a); its reference: REF(c, gemm, y). NULL when absent.
 */
#define X(c, op, name) ((c)->x[offsetof(md_##op##_args, name) / sizeof(void *)])
#define REF(c, op, name) \
    ((c)->ref[(offsetof(md_##op##_args, name) - offsetof(md_operands, out)) / sizeof(void *)])
#define SLACK(c, op, name) \
    ((c)->slack[(offsetof(md_##op##_args, name) - offsetof(md_operands, out)) / sizeof(void *)])
#define OUT_INDEX(op, name) \
    ((int)((offsetof(md_##op##_args, name) - offsetof(md_operands, out)) / sizeof(void *)))

/* Makes and frees a case of a row; the same row and type give the same numbers every time. */
void case_begin(op_case *c, const op_row *row, md_dtype compute);
void case_end(op_case *c);

/* Some operand has no elements. */
bool case_is_empty(const op_case *c);
/* True for a case that takes long where every thread of a GPU is a fiber. */
bool case_is_heavy(const op_case *c);

/* Runs the case on a backend, in its memory, with scratch that the call provides; the outputs end
 * in the host's tensors. Nothing around the operands and the scratch may change, and no input. */
void case_run(op_case *c, md_backend *be);

/* Largest error of any output over its tolerance; <= 1 is right. */
double case_error(const op_case *c);

/* The tables. */
extern const op_row gemm_rows[], norm_rows[], attention_rows[], token_rows[], patch_rows[],
    vector_rows[], entropy_rows[];
extern const int gemm_row_count, norm_row_count, attention_row_count, token_row_count,
    patch_row_count, vector_row_count, entropy_row_count;

#endif
