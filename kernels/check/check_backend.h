/* check_backend: wraps a backend and watches every call, so that a broken access rule of an op
 * shows on the CPU. Before a call: operands have host memory, alignment and the shapes of the op's
 * rule; outputs do not overlap each other; those that neither accumulate nor share memory with an
 * input are filled with a NaN pattern. After it: inputs are unchanged, and no floating output
 * element kept the pattern or is non-finite. Any breach is MD_ERR_BUG naming op and operand. */
#ifndef MD_CHECK_BACKEND_H
#define MD_CHECK_BACKEND_H

#include "kernels/backend.h"

/* Watches `inner`, which must work on host memory; from success on it is owned and destroyed with
 * *out. Local. MD_ERR_MEMORY. */
md_status md_check_create(md_backend *inner, md_backend **out);

#endif
