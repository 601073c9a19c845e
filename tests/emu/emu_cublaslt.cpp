/* emu_cublaslt: products of small matrices on the CPU in the way of cuBLASLt: by columns, sums in
 * f32. It refuses what the library refuses, as far as this program could ask for it. */
#include "kernels/scalar_math.h"
#include "tests/emu/emu_runtime.h"

#include <cublasLt.h>

#include <cstring>
#include <vector>

struct emu_lt {
    int unused;
};

struct emu_lt_desc {
    cublasOperation_t trans_a, trans_b;
    cublasLtEpilogue_t epilogue;
    const void *bias;
};

struct emu_lt_layout {
    cudaDataType_t type;
    int64_t rows, cols, ld;
};

struct emu_lt_preference {
    uint32_t align[4];
};

namespace
{

constexpr size_t WORKSPACE = 256;

size_t size_of(cudaDataType_t type)
{
    return type == CUDA_R_16BF ? 2 : 4;
}

float get(const void *p, cudaDataType_t type, int64_t i)
{
    return type == CUDA_R_16BF ? md_f32_from_bf16(static_cast<const uint16_t *>(p)[i])
                               : static_cast<const float *>(p)[i];
}

void put(void *p, cudaDataType_t type, int64_t i, float x)
{
    if (type == CUDA_R_16BF)
        static_cast<uint16_t *>(p)[i] = md_bf16_from_f32(x);
    else
        static_cast<float *>(p)[i] = x;
}

/* op(x) [rows, cols] by rows. */
std::vector<float> by_rows(const void *x, const emu_lt_layout &l, bool trans)
{
    const int64_t rows = trans ? l.cols : l.rows, cols = trans ? l.rows : l.cols;
    std::vector<float> out((size_t)(rows * cols));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
            out[(size_t)(r * cols + c)] = get(x, l.type, trans ? c + r * l.ld : r + c * l.ld);
    return out;
}

struct product {
    emu_lt_desc desc;
    emu_lt_layout la, lb, ld;
    const void *a, *b;
    void *d;
    float alpha, beta;
};

void multiply(const product &p)
{
    const int64_t m = p.ld.rows, n = p.ld.cols;
    const int64_t k = p.desc.trans_a == CUBLAS_OP_T ? p.la.rows : p.la.cols;
    const std::vector<float> a = by_rows(p.a, p.la, p.desc.trans_a == CUBLAS_OP_N); /* [k, m] */
    const std::vector<float> b = by_rows(p.b, p.lb, p.desc.trans_b == CUBLAS_OP_N); /* [n, k] */
    std::vector<float> sum((size_t)m);
    for (int64_t j = 0; j < n; j++) {
        sum.assign((size_t)m, 0.0f);
        for (int64_t l = 0; l < k; l++) {
            const float x = b[(size_t)(j * k + l)];
            const float *row = &a[(size_t)(l * m)];
            for (int64_t i = 0; i < m; i++)
                sum[(size_t)i] += row[i] * x;
        }
        for (int64_t i = 0; i < m; i++) {
            const int64_t at = i + j * p.ld.ld;
            float y = p.alpha * sum[(size_t)i];
            if (p.beta != 0.0f)
                y += p.beta * get(p.d, p.ld.type, at);
            if (p.desc.epilogue == CUBLASLT_EPILOGUE_BIAS)
                y += get(p.desc.bias, p.ld.type, i);
            put(p.d, p.ld.type, at, y);
        }
    }
}

bool aligned(const void *p)
{
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

} // namespace

size_t cublasLtGetVersion(void)
{
    return 130000;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *out)
{
    *out = new emu_lt{};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t lt)
{
    delete lt;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute,
                                        cudaDataType_t scale)
{
    (void)compute, (void)scale;
    *out = new emu_lt_desc{};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc)
{
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t which,
                                              const void *value, size_t bytes)
{
    void *const field[] = {&desc->trans_a, &desc->trans_b, &desc->epilogue, &desc->bias};
    std::memcpy(field[which], value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType_t type,
                                          uint64_t rows, uint64_t cols, int64_t ld)
{
    if (ld < (int64_t)rows)
        return CUBLAS_STATUS_INVALID_VALUE;
    *out = new emu_lt_layout{type, (int64_t)rows, (int64_t)cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out)
{
    *out = new emu_lt_preference{{256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t which,
                                                    const void *value, size_t bytes)
{
    if (which >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES)
        std::memcpy(&preference->align[which - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value,
                    bytes);
    return CUBLAS_STATUS_SUCCESS;
}

/* Two proposals that give the same; none for bf16 in rows or at addresses that are not 16 bytes
 * apart, so that the program's own kernel is tried too. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t lt, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int asked,
                                              cublasLtMatmulHeuristicResult_t *results, int *found)
{
    (void)lt, (void)desc, (void)c;
    const emu_lt_layout *const layout[] = {a, b, d};
    const int align_of[] = {0, 1, 3};
    *found = 0;
    for (int i = 0; i < 3; i++)
        if (layout[i]->type == CUDA_R_16BF &&
            (layout[i]->ld % 8 != 0 || preference->align[align_of[i]] < 16))
            return CUBLAS_STATUS_NOT_SUPPORTED;
    for (; *found < asked && *found < 2; ++*found)
        results[*found] = {{{(uint64_t)*found + 1}}, WORKSPACE, CUBLAS_STATUS_SUCCESS};
    return CUBLAS_STATUS_SUCCESS;
}

/* What is proposed can be used for the same product of other sizes. */
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t lt, cublasLtMatmulDesc_t desc,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t *algo,
                                       cublasLtMatmulHeuristicResult_t *result)
{
    (void)lt, (void)desc, (void)a, (void)b, (void)c, (void)d;
    if (algo->data[0] == 0)
        return CUBLAS_STATUS_INVALID_VALUE;
    *result = {*algo, WORKSPACE, CUBLAS_STATUS_SUCCESS};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t lt, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t la, const void *b,
                              cublasLtMatrixLayout_t lb, const void *beta, const void *c,
                              cublasLtMatrixLayout_t lc, void *d, cublasLtMatrixLayout_t ld,
                              const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspace_bytes, cudaStream_t stream)
{
    (void)lt, (void)lc;
    const bool half = size_of(la->type) == 2;
    if (c != d || algo->data[0] == 0 || !workspace || workspace_bytes < WORKSPACE ||
        (half && !(aligned(a) && aligned(b) && aligned(d))))
        return CUBLAS_STATUS_INVALID_VALUE;
    const product p = {*desc,
                       *la,
                       *lb,
                       *ld,
                       a,
                       b,
                       d,
                       *static_cast<const float *>(alpha),
                       *static_cast<const float *>(beta)};
    /* A product keeps something in its workspace while it runs, which no other may spoil. */
    uint64_t *const kept = static_cast<uint64_t *>(workspace);
    static uint64_t products;
    const uint64_t mark = ++products;
    emu_queue(stream, [=] {
        *kept = mark;
        return true;
    });
    emu_queue(stream, [=] {
        if (*kept != mark)
            emu_fail(cudaErrorLaunchFailure);
        else
            multiply(p);
        return true;
    });
    return CUBLAS_STATUS_SUCCESS;
}
