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

/* Whenever the host waits for the GPU it also calls look(context), which says whether what the GPU
 * waits for still lives; another status than MD_OK ends the wait with it. Local. */
md_status md_cuda_watch(md_backend *be, md_status (*look)(void *context), void *context);
void md_cuda_unwatch(md_backend *be, void *context);

/* The stream of the ops, a cudaStream_t. Local. */
void *md_cuda_stream(const md_backend *be);

MD_C_END

#endif
