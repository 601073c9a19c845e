/* timing_backend: another backend with a clock around every op, for benchmarks: a row per op and
 * shape with its time, and the FLOP and bytes that its operands stand for. */
#ifndef MD_TIMING_BACKEND_H
#define MD_TIMING_BACKEND_H

#include "kernels/backend.h"

typedef struct md_timing {
    md_op op;
    char shape[64];      /* of the operands that tell most */
    int64_t calls;       /* times `repeat` */
    double seconds;      /* of all of them */
    double flops, bytes; /* of all of them: useful work, and every operand moved once */
} md_timing;

/* Wraps `inner`, which it owns from then on. Each op is issued `repeat` times between two waits for
 * the backend, so that the wait weighs little; with repeat above 1 results are meaningless, times
 * are not. only [MD_OP_COUNT]: ops that are not among them are passed on and no more; NULL: all are
 * timed. MD_ERR_MEMORY. Local. */
md_status md_timing_create(md_backend *inner, int repeat, const bool *only, md_backend **out);

/* The rows so far, longest time first; *n is their number. They live until the next call. Local. */
const md_timing *md_timing_rows(md_backend *be, int *n);
/* Forgets them. */
void md_timing_reset(md_backend *be);

#endif
