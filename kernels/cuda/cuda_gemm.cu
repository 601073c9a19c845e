/* cuda_gemm: the ops gemm and linear_bwd, by cuBLASLt, with a kernel of our own for what the
 * library does not take. The activations are the exact ones (erf, and CLIP's sigmoid), which the
 * library's epilogues are not: the product with its bias goes to pre, or to y, and a pass of our
 * own makes y from it. */
#include "kernels/cuda/cuda_gemm.h"

static uint8_t align_of(uint8_t align, const md_tensor *t)
{
    while (t && t->data && align > 1 && (uintptr_t)t->data % align != 0)
        align = (uint8_t)(align / 2);
    return align;
}

static cuda_gemm_key key_of(const md_gemm_args *a)
{
    const md_tensor *y = a->pre ? a->pre : a->y;
    cuda_gemm_key k = {};
    k.m = md_tensor_rows(a->y);
    k.n = md_tensor_cols(a->y);
    k.k = a->trans_a ? md_tensor_rows(a->a) : md_tensor_cols(a->a);
    k.trans_a = a->trans_a;
    k.trans_b = a->trans_b;
    k.accumulate = a->accumulate & 1;
    k.bias = a->bias != NULL;
    k.in = a->a->dtype;
    k.out = y->dtype;
    const md_tensor *const operand[] = {a->a, a->b, a->bias, y};
    k.align = 16;
    for (size_t i = 0; i < MD_COUNT(operand); i++)
        k.align = align_of(k.align, operand[i]);
    return k;
}

/* The library adds a bias of the type of y only. */
static bool fits_library(const cuda_gemm_key *k)
{
    return !k->bias || k->in == k->out;
}

size_t cuda_gemm_scratch(md_backend *be, const md_gemm_args *a)
{
    cuda_state *s = cuda_state_of(be);
    const cuda_gemm_key key = key_of(a);
    cuda_gemm_plan *plan;
    if (key.m == 0 || key.n == 0 || key.k == 0 || !fits_library(&key))
        return 0;
    if (!s->planning && (s->gemm->failed = cuda_gemm_find(s, &key, &plan)) != MD_OK)
        return MD_NO_SCRATCH;
    return CUDA_GEMM_WORKSPACE;
}

/* ---- the kernel for the rest: odd widths and empty sums ---- */

enum { TILE = 16 };

template <class T> struct product {
    const T *a, *b, *bias;
    int64_t m, n, k;
    bool trans_a, trans_b, accumulate;
};

template <class T, class Y> MD_KERNEL(TILE *TILE) gemm_any(product<T> p, Y *y)
{
    float *sa = reinterpret_cast<float *>(md_smem()), *sb = sa + TILE * (TILE + 1);
    const int tx = (int)threadIdx.x % TILE, ty = (int)threadIdx.x / TILE;
    const int64_t row = (int64_t)blockIdx.y * TILE + ty, col = (int64_t)blockIdx.x * TILE + tx;
    float sum = 0.0f;
    for (int64_t k0 = 0; k0 < p.k; k0 += TILE) {
        const int64_t ka = k0 + tx, kb = k0 + ty;
        const bool in_a = row < p.m && ka < p.k, in_b = kb < p.k && col < p.n;
        sa[ty * (TILE + 1) + tx] =
            in_a ? md_load(p.a + (p.trans_a ? ka * p.m + row : row * p.k + ka)) : 0.0f;
        sb[ty * (TILE + 1) + tx] =
            in_b ? md_load(p.b + (p.trans_b ? col * p.k + kb : kb * p.n + col)) : 0.0f;
        md_barrier();
        for (int i = 0; i < TILE; i++)
            sum += sa[ty * (TILE + 1) + i] * sb[i * (TILE + 1) + tx];
        md_barrier();
    }
    if (row >= p.m || col >= p.n)
        return;
    if (p.bias)
        sum += md_load(p.bias + col);
    Y *out = y + row * p.n + col;
    md_store(out, p.accumulate ? md_load(out) + sum : sum);
}

/* Where a product runs, with CUDA_GEMM_WORKSPACE bytes of scratch of its own. */
struct gemm_place {
    md_op op;
    cudaStream_t stream;
    char *scratch;
};

template <class T>
static md_status run_any(const md_gemm_args *a, const cuda_gemm_key *k, const gemm_place &at)
{
    const md_tensor *y = a->pre ? a->pre : a->y;
    product<T> p = {cuda_data<const T>(a->a),
                    cuda_data<const T>(a->b),
                    cuda_data<const T>(a->bias),
                    k->m,
                    k->n,
                    k->k,
                    a->trans_a,
                    a->trans_b,
                    k->accumulate != 0};
    const dim3 grid((unsigned)cuda_ceil(k->n, TILE), (unsigned)cuda_ceil(k->m, TILE));
    const size_t smem = 2 * TILE * (TILE + 1) * sizeof(float);
    if (y->dtype == MD_F32)
        MD_LAUNCH((gemm_any<T, float>), grid, TILE * TILE, smem, at.stream, p, cuda_data<float>(y));
    else
        MD_LAUNCH((gemm_any<T, md_bf16>), grid, TILE * TILE, smem, at.stream, p,
                  cuda_data<md_bf16>(y));
    return cuda_launched(at.op);
}

static md_status run_product(md_backend *be, const md_gemm_args *a, const gemm_place &at)
{
    cuda_state *s = cuda_state_of(be);
    cuda_gemm_plan *plan = NULL;
    const cuda_gemm_key k = key_of(a);
    if (k.m == 0 || k.n == 0)
        return MD_OK;
    if (k.k > 0 && fits_library(&k))
        MD_TRY(cuda_gemm_find(s, &k, &plan));
    if (!plan || plan->own)
        return k.in == MD_BF16 ? run_any<md_bf16>(a, &k, at) : run_any<float>(a, &k, at);
    const cuda_gemm_operands o = {
        a->a->data, a->b->data, a->bias ? a->bias->data : NULL, a->pre ? a->pre->data : a->y->data,
        at.scratch, at.stream};
    return cuda_gemm_run(s, plan, &o);
}

/* cuda_scratch, or the error that made the plan fail. */
static md_status gemm_scratch(const md_backend *be, md_op op, size_t need, void **scratch)
{
    if (need == MD_NO_SCRATCH)
        return md_error_prefix(cuda_state_of(be)->gemm->failed, "%s", md_op_name(op));
    return cuda_scratch(be, op, need, scratch);
}

md_status cuda_gemm(md_backend *be, const md_gemm_args *a)
{
    CUDA_CHECK(gemm, a);
    if (a->act != MD_ACT_NONE && a->accumulate)
        MD_FAIL(MD_ERR_BUG, "gemm: accumulation with an activation");
    if (a->pre && a->act == MD_ACT_NONE)
        MD_FAIL(MD_ERR_BUG, "gemm: pre without an activation");
    void *scratch;
    MD_TRY(gemm_scratch(be, MD_OP_gemm, cuda_gemm_scratch(be, a), &scratch));
    MD_TRY(run_product(be, a, {MD_OP_gemm, cuda_stream(be), static_cast<char *>(scratch)}));
    if (a->act == MD_ACT_NONE || md_tensor_count(a->y) == 0)
        return MD_OK;
    return cuda_act_forward(be, MD_OP_gemm, a->pre ? a->pre : a->y, a->y, a->act);
}

/* ---- both products of a linear layer's backward pass ---- */

struct linear_products {
    md_gemm_args weights, inputs;
};

static linear_products products_of(const md_linear_bwd_args *a)
{
    linear_products p = {};
    p.weights.a = p.inputs.a = a->dy;
    p.weights.b = a->x;
    p.weights.y = a->dw;
    p.weights.trans_a = true;
    p.weights.accumulate = a->accumulate & 1;
    p.inputs.b = a->w;
    p.inputs.y = a->dx;
    return p;
}

size_t cuda_linear_bwd_scratch(md_backend *be, const md_linear_bwd_args *a)
{
    const linear_products p = products_of(a);
    const size_t weights = cuda_gemm_scratch(be, &p.weights);
    const size_t inputs = a->dx && a->w ? cuda_gemm_scratch(be, &p.inputs) : 0;
    if (weights == MD_NO_SCRATCH || inputs == MD_NO_SCRATCH)
        return MD_NO_SCRATCH;
    return inputs ? CUDA_GEMM_WORKSPACE + inputs : weights;
}

/* The gradient of the weights has few large tiles, which leave multiprocessors idle in their last
 * round: the other product starts there, on the second stream. */
md_status cuda_linear_bwd(md_backend *be, const md_linear_bwd_args *a)
{
    CUDA_CHECK(linear_bwd, a);
    if ((a->dx && !a->w) || a->accumulate & 2)
        MD_FAIL(MD_ERR_BUG, "linear_bwd: dx needs w and does not accumulate");
    cuda_state *s = cuda_state_of(be);
    const linear_products p = products_of(a);
    void *scratch;
    MD_TRY(gemm_scratch(be, MD_OP_linear_bwd, cuda_linear_bwd_scratch(be, a), &scratch));
    char *room = static_cast<char *>(scratch);
    if (!a->dx)
        return run_product(be, &p.weights, {MD_OP_linear_bwd, s->stream, room});
    MD_TRY(cuda_ok(cudaEventRecord(s->fork, s->stream), "cudaEventRecord"));
    MD_TRY(run_product(be, &p.weights, {MD_OP_linear_bwd, s->stream, room}));
    MD_TRY(cuda_ok(cudaStreamWaitEvent(s->side, s->fork, 0), "cudaStreamWaitEvent"));
    const md_status st =
        run_product(be, &p.inputs, {MD_OP_linear_bwd, s->side, room + CUDA_GEMM_WORKSPACE});
    cudaError_t joined = cudaEventRecord(s->join, s->side); /* also after a failure */
    if (joined == cudaSuccess)
        joined = cudaStreamWaitEvent(s->stream, s->join, 0);
    return st != MD_OK ? st : cuda_ok(joined, "joining two products");
}
