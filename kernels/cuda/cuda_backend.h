/* cuda_backend: the ops on one NVIDIA GPU. Linked in or not (make CUDA=...): whoever calls
 * md_cuda_create declares it weak. */
#ifndef MD_CUDA_BACKEND_H
#define MD_CUDA_BACKEND_H

#include "kernels/backend.h"

MD_C_BEGIN

/* MD_ERR_CONFIG: no driver, no GPU, one too old (compute capability below 8.0), or fewer GPUs than
 * ranks on the node and more than one of them visible. With args->planning nothing of CUDA is
 * called. Local. */
md_status md_cuda_create(const md_backend_args *args, md_backend **out);

/* Which GPU: "GPU-8a6f... NVIDIA H100 80GB HBM3", the same text for the same device. Local. */
const char *md_cuda_device(const md_backend *be);

MD_C_END

#endif
