/* cpu_backend: the ops on host memory: matrix products from oneDNN or a BLAS, everything else
 * OpenMP loops. */
#ifndef MD_CPU_BACKEND_H
#define MD_CPU_BACKEND_H

#include "kernels/backend.h"

/* threads 0 = all this process may use; also sets OpenMP's default for the calling thread, which
 * oneDNN and the BLAS go by. Local. MD_ERR_CONFIG, MD_ERR_MEMORY. */
md_status md_cpu_create(int threads, md_backend **out);

#endif
