/* cuda_state: what the cuda backend holds. Private to cuda_backend.cu and cuda_gemm*.cu. */
#ifndef MD_CUDA_STATE_H
#define MD_CUDA_STATE_H

#include "kernels/cuda/cuda_internal.h"

typedef struct cuda_gemm_table cuda_gemm_table;

#define CUDA_WATCHERS 8

typedef struct cuda_state {
    md_backend base;                 /* first */
    int device, sms;                 /* and its multiprocessors, or the number that plans assume */
    bool planning;                   /* no device: shapes and scratch sizes only */
    cudaStream_t stream, side, copy; /* side: between fork and join only */
    cudaEvent_t fork, join;
    cudaEvent_t fed[MD_FEED_SLOTS], used[MD_FEED_SLOTS];
    bool was_fed[MD_FEED_SLOTS], was_used[MD_FEED_SLOTS];
    cuda_gemm_table *gemm;
    struct {
        md_status (*look)(void *context);
        void *context;
    } watcher[CUDA_WATCHERS];
    int watchers;
} cuda_state;

static inline cuda_state *cuda_state_of(const md_backend *be)
{
    return (cuda_state *)be;
}

/* Rows of md_tuning_ops. */
void cuda_gemm_tune(md_backend *be);
md_status cuda_gemm_write(md_backend *be, char **out);
md_status cuda_gemm_read(md_backend *be, const char *text);

/* The library's handle and the table of plans; close also ends what open left half done. */
md_status cuda_gemm_open(cuda_state *s);
void cuda_gemm_close(cuda_state *s);

#endif
