/* plan_backend: runs a graph without memory. Every op adds its floating-point operations and the
 * bytes of its operands to a total, and asks the target backend how much scratch the same call
 * would need there. */
#ifndef MD_PLAN_BACKEND_H
#define MD_PLAN_BACKEND_H

#include "kernels/backend.h"

typedef struct md_plan_total {
    double flops;     /* 2 per multiply-add of matrix products and attention */
    double bytes;     /* operands read and written */
    size_t scratch;   /* largest scratch of one op */
    int64_t launches; /* ops run */
} md_plan_total;

/* Wraps `target` (not owned; may be NULL). Local. */
md_status md_plan_create(md_backend *target, md_backend **out);
/* Totals since the last call; starts again from zero. Local. */
md_plan_total md_plan_take(md_backend *plan);

/* Useful FLOP of one op (products and attention), and bytes when every operand moves once. Local.
 */
double md_plan_op_flops(md_op op, const md_operands *a);
double md_plan_op_bytes(const md_operands *a);

#endif
