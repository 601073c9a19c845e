/* cuda_gemm_plan: which algorithm of cuBLASLt makes a product. The library proposes; by default its
 * first proposal is taken, which is the same for the same library and GPU. With tuning the
 * proposals are timed when the plan is made, before training, and the fastest is taken: another run
 * may then choose another one, and its sums round otherwise. What is fastest at a number of rows is
 * taken down to half as many rows, of which drop path leaves many numbers. Splitting a long sum
 * over blocks adds in a fixed order, so that a plan gives the same bits every time. */
#include "kernels/cuda/cuda_gemm.h"

#include <stdio.h>
#include <string.h>

/* Splits are added up by a second kernel in f32, never by atomics, never rounded to bf16 before. */
#define REDUCTIONS CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE

static md_status lt_ok(cublasStatus_t st, const char *what)
{
    if (st != CUBLAS_STATUS_SUCCESS)
        MD_FAIL(st == CUBLAS_STATUS_ALLOC_FAILED ? MD_ERR_MEMORY : MD_ERR_DEVICE,
                "cuBLASLt: %s: status %d", what, (int)st);
    return MD_OK;
}

#define LT_TRY(call) MD_TRY(lt_ok((call), #call))

md_status cuda_gemm_open(cuda_state *s)
{
    cuda_gemm_table *t = static_cast<cuda_gemm_table *>(md_alloc(sizeof *t, "matrix products"));
    if (!t)
        return MD_ERR_MEMORY;
    s->gemm = t;
    LT_TRY(cublasLtCreate(&t->handle));
    LT_TRY(cublasLtMatmulPreferenceCreate(&t->preference));
    const size_t workspace = CUDA_GEMM_WORKSPACE;
    const uint32_t reductions = REDUCTIONS;
    LT_TRY(cublasLtMatmulPreferenceSetAttribute(
        t->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace));
    LT_TRY(cublasLtMatmulPreferenceSetAttribute(
        t->preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions));
    return MD_OK;
}

static void plan_free(cuda_gemm_plan *p)
{
    if (p->desc)
        cublasLtMatmulDescDestroy(p->desc);
    cublasLtMatrixLayout_t *const layout[] = {&p->a, &p->b, &p->y};
    for (size_t i = 0; i < MD_COUNT(layout); i++)
        if (*layout[i])
            cublasLtMatrixLayoutDestroy(*layout[i]);
}

void cuda_gemm_close(cuda_state *s)
{
    cuda_gemm_table *t = s->gemm;
    if (!t)
        return;
    for (int i = 0; i < t->plans; i++)
        plan_free(&t->plan[i]);
    if (t->preference)
        cublasLtMatmulPreferenceDestroy(t->preference);
    if (t->handle)
        cublasLtDestroy(t->handle);
    md_free(t);
    s->gemm = NULL;
}

static cudaDataType_t type_of(uint8_t dtype)
{
    return dtype == MD_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

/* The library counts by columns: a row-major matrix is its transpose there, so it is asked for
 * y^T = op(b)^T op(a)^T, with the operands in the other order. */
static md_status describe(cuda_gemm_plan *p)
{
    const cuda_gemm_key *k = &p->key;
    const cublasOperation_t n = CUBLAS_OP_N, t = CUBLAS_OP_T;
    const uint64_t um = (uint64_t)k->m, un = (uint64_t)k->n, uk = (uint64_t)k->k;
    LT_TRY(cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    LT_TRY(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA,
                                          k->trans_b ? &t : &n, sizeof n));
    LT_TRY(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSB,
                                          k->trans_a ? &t : &n, sizeof n));
    if (k->bias) {
        const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
        LT_TRY(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                              sizeof epilogue));
    }
    LT_TRY(cublasLtMatrixLayoutCreate(&p->b, type_of(k->in), k->trans_b ? uk : un,
                                      k->trans_b ? un : uk, k->trans_b ? k->k : k->n));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->a, type_of(k->in), k->trans_a ? um : uk,
                                      k->trans_a ? uk : um, k->trans_a ? k->m : k->k));
    LT_TRY(cublasLtMatrixLayoutCreate(&p->y, type_of(k->out), un, um, k->n));
    return MD_OK;
}

static md_status set_alignment(cuda_gemm_table *t, uint32_t align)
{
    static const cublasLtMatmulPreferenceAttributes_t which[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (size_t i = 0; i < MD_COUNT(which); i++)
        LT_TRY(cublasLtMatmulPreferenceSetAttribute(t->preference, which[i], &align, sizeof align));
    return MD_OK;
}

/* ---- tuning ---- */

enum { PROPOSALS = 16, TIMED = 5 };

static size_t operand_bytes(int64_t rows, int64_t cols, uint8_t dtype)
{
    return (size_t)(rows * cols) * md_dtype_bytes((md_dtype)dtype);
}

/* Memory of the product's shape, with numbers that are neither zero nor denormal: products of zeros
 * run faster. */
typedef struct trial {
    void *block[4]; /* a, b, y with bias behind it, scratch */
    cudaEvent_t begin, end;
} trial;

static void trial_close(trial *t)
{
    for (size_t i = 0; i < MD_COUNT(t->block); i++)
        if (t->block[i])
            cudaFree(t->block[i]);
    if (t->begin)
        cudaEventDestroy(t->begin);
    if (t->end)
        cudaEventDestroy(t->end);
}

/* Bytes 0x3c..: as bf16 and as f32 small positive numbers of varying size. */
MD_KERNEL(256) trial_fill(uint32_t *p, int64_t n)
{
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        const uint32_t x = (uint32_t)i * 2654435761u;
        p[i] = 0x3c003c00u ^ (x & 0x80ff80ffu);
    }
}

static md_status trial_open(cuda_state *s, const cuda_gemm_key *k, trial *t)
{
    const size_t bytes[4] = {operand_bytes(k->m, k->k, k->in), operand_bytes(k->k, k->n, k->in),
                             operand_bytes(k->m + 1, k->n, k->out), CUDA_GEMM_WORKSPACE};
    for (int i = 0; i < 4; i++) {
        MD_TRY(cuda_ok(cudaMalloc(&t->block[i], bytes[i] + 64), "memory for tuning"));
        MD_LAUNCH(trial_fill, 1024, 256, 0, s->stream, static_cast<uint32_t *>(t->block[i]),
                  (int64_t)(bytes[i] / 4));
    }
    MD_TRY(cuda_launched(MD_OP_gemm));
    MD_TRY(cuda_ok(cudaEventCreateWithFlags(&t->begin, 0), "cudaEventCreate"));
    return cuda_ok(cudaEventCreateWithFlags(&t->end, 0), "cudaEventCreate");
}

static float trial_time(cuda_state *s, cuda_gemm_plan *p, const trial *t)
{
    const size_t y = operand_bytes(p->key.m, p->key.n, p->key.out);
    const cuda_gemm_operands o = {t->block[0], t->block[1], static_cast<char *>(t->block[2]) + y,
                                  t->block[2], t->block[3], s->stream};
    float ms = INFINITY;
    if (cuda_gemm_run(s, p, &o) != MD_OK)
        return ms;
    cudaEventRecord(t->begin, s->stream);
    for (int i = 0; i < TIMED; i++)
        cuda_gemm_run(s, p, &o);
    cudaEventRecord(t->end, s->stream);
    if (cudaEventSynchronize(t->end) == cudaSuccess)
        cudaEventElapsedTime(&ms, t->begin, t->end);
    return ms / TIMED;
}

/* Of the proposals the fastest on made-up operands. Where there is no memory for them the first
 * stays. */
static void tune(cuda_state *s, cuda_gemm_plan *p, const cublasLtMatmulHeuristicResult_t *found,
                 int n)
{
    trial t = {};
    float best = INFINITY;
    int choice = 0;
    md_status st = trial_open(s, &p->key, &t);
    for (int i = 0; i < n && st == MD_OK; i++) {
        if (found[i].state != CUBLAS_STATUS_SUCCESS)
            continue;
        p->algo = found[i].algo;
        p->workspace = found[i].workspaceSize;
        const float ms = trial_time(s, p, &t);
        if (ms < best)
            best = ms, choice = i;
    }
    cudaStreamSynchronize(s->stream);
    cudaGetLastError();
    trial_close(&t);
    p->algo = found[choice].algo;
    p->workspace = found[choice].workspaceSize;
}

/* ---- choosing ---- */

/* Rows of activations of a product: the length of its sums where both operands have them. */
static int64_t key_rows(const cuda_gemm_key *k)
{
    return k->trans_a ? k->k : k->m;
}

static bool same_but_rows(const cuda_gemm_key *a, const cuda_gemm_key *b)
{
    cuda_gemm_key k = *a;
    (a->trans_a ? k.k : k.m) = key_rows(b);
    return memcmp(&k, b, sizeof k) == 0;
}

/* Takes the choice for at most twice as many rows, where there is one that can do p's. */
static bool choose_as_larger(cuda_gemm_table *t, cuda_gemm_plan *p)
{
    const int64_t rows = key_rows(&p->key);
    const cuda_gemm_plan *near = NULL;
    for (int i = 0; i < t->plans; i++) {
        const cuda_gemm_plan *q = &t->plan[i];
        const int64_t more = key_rows(&q->key);
        if (q->timed && !q->own && more > rows && more <= 2 * rows &&
            same_but_rows(&q->key, &p->key) && (!near || more < key_rows(&near->key)))
            near = q;
    }
    cublasLtMatmulHeuristicResult_t checked;
    if (!near || cublasLtMatmulAlgoCheck(t->handle, p->desc, p->b, p->a, p->y, p->y, &near->algo,
                                         &checked) != CUBLAS_STATUS_SUCCESS)
        return false;
    if (checked.state != CUBLAS_STATUS_SUCCESS || checked.workspaceSize > CUDA_GEMM_WORKSPACE)
        return false;
    p->algo = near->algo;
    p->workspace = checked.workspaceSize;
    return true;
}

static md_status choose(cuda_state *s, cuda_gemm_plan *p)
{
    cuda_gemm_table *t = s->gemm;
    cublasLtMatmulHeuristicResult_t found[PROPOSALS];
    int n = 0;
    if (t->tune && choose_as_larger(t, p))
        return MD_OK;
    MD_TRY(set_alignment(t, p->key.align));
    cublasStatus_t st =
        cublasLtMatmulAlgoGetHeuristic(t->handle, p->desc, p->b, p->a, p->y, p->y, t->preference,
                                       t->tune ? PROPOSALS : 1, found, &n);
    /* Matrices of odd widths in bf16 are not the library's. */
    p->own = st == CUBLAS_STATUS_NOT_SUPPORTED || n == 0 ||
             (st == CUBLAS_STATUS_SUCCESS && found[0].state != CUBLAS_STATUS_SUCCESS);
    if (p->own)
        return MD_OK;
    LT_TRY(st);
    p->algo = found[0].algo;
    p->workspace = found[0].workspaceSize;
    if (t->tune && n > 1)
        tune(s, p, found, n);
    p->timed = t->tune;
    return MD_OK;
}

/* Where the key's plan is named, or could be. */
static uint16_t *place_of(cuda_gemm_table *t, const cuda_gemm_key *key)
{
    uint64_t word[sizeof *key / 8], hash = 0;
    memcpy(word, key, sizeof word);
    for (size_t i = 0; i < MD_COUNT(word); i++)
        hash = (hash ^ word[i] ^ hash >> 29) * 0x9E3779B97F4A7C15u;
    for (uint64_t i = hash >> 40;; i++) {
        uint16_t *place = &t->place[i % MD_COUNT(t->place)];
        if (!*place || memcmp(&t->plan[*place - 1].key, key, sizeof *key) == 0)
            return place;
    }
}

/* A plan for a key that has none. choice NULL: it is to be made. */
static md_status add(cuda_state *s, const cuda_gemm_key *key, const cuda_gemm_plan *choice)
{
    cuda_gemm_table *t = s->gemm;
    if (t->plans == CUDA_GEMM_PLANS)
        MD_FAIL(MD_ERR_MEMORY, "more than %d shapes of matrix products", CUDA_GEMM_PLANS);
    cuda_gemm_plan p = {};
    p.key = *key;
    md_status st = describe(&p);
    if (st == MD_OK && !choice)
        st = choose(s, &p);
    if (st != MD_OK) {
        plan_free(&p);
        return st;
    }
    if (choice) {
        p.algo = choice->algo;
        p.workspace = choice->workspace;
        p.own = choice->own;
    }
    uint16_t *place = place_of(t, key);
    t->plan[t->plans++] = p;
    *place = (uint16_t)t->plans;
    return MD_OK;
}

md_status cuda_gemm_find(cuda_state *s, const cuda_gemm_key *key, cuda_gemm_plan **out)
{
    cuda_gemm_table *t = s->gemm;
    if (!*place_of(t, key))
        MD_TRY(add(s, key, NULL));
    *out = &t->plan[*place_of(t, key) - 1];
    return MD_OK;
}

md_status cuda_gemm_take(cuda_state *s, const cuda_gemm_plan *known)
{
    return *place_of(s->gemm, &known->key) ? MD_OK : add(s, &known->key, known);
}

void cuda_gemm_tune(md_backend *be)
{
    cuda_state_of(be)->gemm->tune = true;
}

md_status cuda_gemm_run(cuda_state *s, const cuda_gemm_plan *p, const cuda_gemm_operands *o)
{
    const float alpha = 1.0f, beta = p->key.accumulate ? 1.0f : 0.0f;
    if (p->key.bias)
        LT_TRY(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &o->bias,
                                              sizeof o->bias));
    LT_TRY(cublasLtMatmul(s->gemm->handle, p->desc, &alpha, o->b, p->b, o->a, p->a, &beta, o->y,
                          p->y, o->y, p->y, &p->algo, o->scratch, p->workspace, o->stream));
    return MD_OK;
}
