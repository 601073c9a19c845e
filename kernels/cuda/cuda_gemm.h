/* cuda_gemm: plans of matrix products, shared by cuda_gemm.cu (running them), cuda_gemm_plan.cu
 * (making them). */
#ifndef MD_CUDA_GEMM_H
#define MD_CUDA_GEMM_H

#include <cublasLt.h>

#include "kernels/cuda/cuda_state.h"

/* Workspace of a product, for splitting long sums; the stand-in of the tests splits none. */
#ifdef MD_EMU
#define CUDA_GEMM_WORKSPACE 4096u
#else
#define CUDA_GEMM_WORKSPACE (64u << 20)
#endif

/* What a plan is found by. Row-major: y [m, n] = op(a) op(b). No padding: keys are compared as
 * bytes. */
typedef struct cuda_gemm_key {
    int64_t m, n, k;
    uint8_t trans_a, trans_b, accumulate, bias;
    uint8_t in, out; /* md_dtype of a and b, and of y */
    uint8_t align;   /* bytes every operand is aligned to, at most 16 */
    uint8_t unused;
} cuda_gemm_key;

typedef struct cuda_gemm_plan {
    cuda_gemm_key key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, y; /* the library's own first and second operand are b and a */
    cublasLtMatmulAlgo_t algo;
    size_t workspace;
    bool own;   /* the library has no algorithm: the kernel of cuda_gemm.cu */
    bool timed; /* chosen among several for its own number of rows */
} cuda_gemm_plan;

/* Each number of images that drop path leaves (MD_PACKED_COUNTS) makes shapes of its own. */
#define CUDA_GEMM_PLANS 4096

struct cuda_gemm_table {
    cublasLtHandle_t handle;
    cublasLtMatmulPreference_t preference;
    int plans;
    bool tune;
    md_status failed; /* of the plan that was asked for last */
    cuda_gemm_plan plan[CUDA_GEMM_PLANS];
    uint16_t place[2 * CUDA_GEMM_PLANS]; /* by the hash of a key: 1 + its plan; 0: free */
};

/* Finds or makes the plan of a key. MD_ERR_MEMORY when the table is full; MD_ERR_DEVICE. */
md_status cuda_gemm_find(cuda_state *s, const cuda_gemm_key *key, cuda_gemm_plan **out);

/* Adds a plan whose key and choice are known, unless the key has one. Errors as find. */
md_status cuda_gemm_take(cuda_state *s, const cuda_gemm_plan *known);

/* One product by the plan on a stream; scratch holds plan->workspace bytes. */
typedef struct cuda_gemm_operands {
    const void *a, *b, *bias;
    void *y, *scratch;
    cudaStream_t stream;
} cuda_gemm_operands;
md_status cuda_gemm_run(cuda_state *s, const cuda_gemm_plan *p, const cuda_gemm_operands *o);

#endif
