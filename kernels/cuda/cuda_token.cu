/* cuda_token: patches to tokens, row gathers, means of rows. */
#include "kernels/cuda/cuda_vec.cuh"

namespace
{

/* ---- tokens; a warp has one row ---- */

MD_DEV int64_t md_warp_row()
{
    return (int64_t)blockIdx.x * VEC_WARPS + threadIdx.x / MD_WARP;
}

template <class T> struct md_tokens_pass {
    const T *patch;
    const float *cls, *mask_token, *pos;
    const uint8_t *mask;
    T *out;
    int64_t rows, tokens, cols;
};

template <class T, int W> MD_KERNEL(VEC_BLOCK) md_tokens(md_tokens_pass<T> k)
{
    const int64_t row = md_warp_row();
    if (row >= k.rows)
        return;
    const int64_t image = row / k.tokens, token = row - image * k.tokens;
    const int64_t patch = image * (k.tokens - 1) + token - 1;
    const bool masked = token > 0 && k.mask && k.mask[patch];
    const float *same = token == 0 ? k.cls : masked ? k.mask_token : nullptr;
    for (int64_t c = threadIdx.x % MD_WARP * W; c < k.cols; c += MD_WARP * W) {
        float x[W], pos[W];
        if (same)
            md_get(same + c, x);
        else
            md_get(k.patch + patch * k.cols + c, x);
        if (k.pos) {
            md_get(k.pos + token * k.cols + c, pos);
#pragma unroll
            for (int j = 0; j < W; j++)
                x[j] += pos[j];
        }
        md_put(k.out + row * k.cols + c, x);
    }
}

template <class T> struct md_tokens_bwd_pass {
    const T *dtokens;
    const uint8_t *mask;
    T *dpatch;
    float *dcls, *dpos, *part; /* part [tokens, cols]: sums over masked images, or NULL */
    int64_t images, tokens, cols;
    bool add_patch, add_cls, add_pos;
};

/* Patch gradient of one vector, which becomes zero, or stays, where it is masked. */
template <class T, int W>
MD_DEV void md_put_patch(const md_tokens_bwd_pass<T> &k, int64_t patch, int64_t col, bool masked,
                         float (&x)[W])
{
    T *out = k.dpatch + patch * k.cols + col;
    if (k.add_patch && masked)
        return;
    float old[W] = {};
    if (k.add_patch)
        md_get(out, old);
#pragma unroll
    for (int j = 0; j < W; j++)
        x[j] = masked ? 0.0f : old[j] + x[j];
    md_put(out, x);
}

/* A block has one token position (blockIdx.x) and 32 W columns; its warps take the images in turn.
 */
template <class T, int W> MD_KERNEL(VEC_BLOCK) md_tokens_bwd(md_tokens_bwd_pass<T> k)
{
    enum { U = 4 };
    const int64_t token = blockIdx.x, tile = (int64_t)blockIdx.y * MD_WARP * W;
    const int64_t col = tile + threadIdx.x % MD_WARP * W;
    float *smem = reinterpret_cast<float *>(md_smem());
    float all[W] = {}, hidden[W] = {};
    for (int64_t b = threadIdx.x / MD_WARP; b < k.images && col < k.cols; b += VEC_WARPS * U) {
        float x[U][W];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (b + u * VEC_WARPS < k.images)
                md_get(k.dtokens + ((b + u * VEC_WARPS) * k.tokens + token) * k.cols + col, x[u]);
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (b + u * VEC_WARPS >= k.images)
                continue;
            const int64_t patch = (b + u * VEC_WARPS) * (k.tokens - 1) + token - 1;
            const bool masked = token > 0 && k.mask && k.mask[patch];
#pragma unroll
            for (int j = 0; j < W; j++) {
                all[j] += x[u][j];
                hidden[j] += masked ? x[u][j] : 0.0f;
            }
            if (token > 0)
                md_put_patch(k, patch, col, masked, x[u]);
        }
    }
    if (k.dpos)
        md_add_warps(all, smem, k.dpos + token * k.cols, tile, k.cols, k.add_pos);
    if (k.dcls && token == 0) {
        md_barrier();
        md_add_warps(all, smem, k.dcls, tile, k.cols, k.add_cls);
    }
    if (k.part) {
        md_barrier();
        md_add_warps(hidden, smem, k.part + token * k.cols, tile, k.cols, false);
    }
}

/* ---- rows; a warp has one row ---- */

template <class T> struct md_rows_pass {
    const T *x;
    const int32_t *index;
    T *y;
    int64_t rows, listed, cols; /* rows of y; entries of the index */
    bool add;
};

/* One row of y (+)= x, or zeros where x is NULL. */
template <int W, class T> MD_DEV void md_put_row(const T *x, T *y, int64_t cols, bool add)
{
    for (int64_t c = threadIdx.x % MD_WARP * W; c < cols; c += MD_WARP * W) {
        float v[W] = {}, old[W];
        if (x)
            md_get(x + c, v);
        if (add) {
            md_get(y + c, old);
#pragma unroll
            for (int j = 0; j < W; j++)
                v[j] += old[j];
        }
        md_put(y + c, v);
    }
}

template <class T, int W> MD_KERNEL(VEC_BLOCK) md_gather(md_rows_pass<T> k)
{
    const int64_t row = md_warp_row();
    if (row < k.rows)
        md_put_row<W>(k.x + k.index[row] * k.cols, k.y + row * k.cols, k.cols, k.add);
}

template <class T, int W> MD_KERNEL(VEC_BLOCK) md_scatter_add(md_rows_pass<T> k)
{
    const int64_t entry = md_warp_row();
    if (entry < k.listed)
        md_put_row<W>(k.x + entry * k.cols, k.y + k.index[entry] * k.cols, k.cols, true);
}

/* The number of entries of a rising index below value: 32 places of the rest are looked at in one
 * step. All lanes of a warp, with the same value. */
MD_DEV int64_t md_entries_below(const int32_t *index, int64_t n, int64_t value)
{
    int64_t from = 0; /* the answer is in [from, from + n] */
    while (n > 0) {
        const int64_t part = (n + MD_WARP - 1) / MD_WARP;
        const int64_t last = ((int64_t)threadIdx.x % MD_WARP + 1) * part - 1;
        const bool below = last < n && index[from + last] < value;
        const int64_t parts = (int64_t)md_warp_sum(below ? 1.0f : 0.0f);
        from += parts * part;
        n = part - 1 < n - parts * part ? part - 1 : n - parts * part;
    }
    return from;
}

/* Every row is written once: with its entry of the list, or with zeros. */
template <class T, int W> MD_KERNEL(VEC_BLOCK) md_scatter(md_rows_pass<T> k)
{
    const int64_t row = md_warp_row();
    if (row >= k.rows)
        return;
    const int64_t entry = md_entries_below(k.index, k.listed, row);
    const bool there = entry < k.listed && k.index[entry] == row;
    md_put_row<W>(there ? k.x + entry * k.cols : nullptr, k.y + row * k.cols, k.cols, false);
}

/* ---- means of rows ---- */

template <class T> struct md_mean_pass {
    const T *x;
    T *y;
    int64_t rows, cols, all; /* rows of an image, and of all */
};

/* A block has one image (blockIdx.x) and 32 W columns; its warps take the rows in turn. */
template <class T, int W> MD_KERNEL(VEC_BLOCK) md_mean(md_mean_pass<T> k)
{
    enum { U = 4, COLS = MD_WARP * W };
    const int64_t tile = (int64_t)blockIdx.y * COLS, col = tile + threadIdx.x % MD_WARP * W;
    const T *x = k.x + blockIdx.x * k.rows * k.cols + col;
    float *smem = reinterpret_cast<float *>(md_smem());
    float sum[W] = {};
    for (int64_t m = threadIdx.x / MD_WARP; m < k.rows && col < k.cols; m += VEC_WARPS * U) {
        float v[U][W] = {};
#pragma unroll
        for (int u = 0; u < U; u++)
            if (m + u * VEC_WARPS < k.rows)
                md_get(x + (m + u * VEC_WARPS) * k.cols, v[u]);
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int j = 0; j < W; j++)
                sum[j] += v[u][j];
    }
    md_put(smem + (int)threadIdx.x * W, sum);
    md_barrier();
    for (int c = (int)threadIdx.x; c < COLS && tile + c < k.cols; c += VEC_BLOCK) {
        float total = smem[c];
#pragma unroll
        for (int w = 1; w < VEC_WARPS; w++)
            total += smem[w * COLS + c];
        md_store(k.y + blockIdx.x * k.cols + tile + c, total / (float)k.rows);
    }
}

template <class T, int W> MD_KERNEL(VEC_BLOCK) md_mean_bwd(md_mean_pass<T> k)
{
    const int64_t row = md_warp_row();
    if (row >= k.all)
        return;
    const T *x = k.x + row / k.rows * k.cols;
    for (int64_t c = threadIdx.x % MD_WARP * W; c < k.cols; c += MD_WARP * W) {
        float v[W];
        md_get(x + c, v);
#pragma unroll
        for (int j = 0; j < W; j++)
            v[j] /= (float)k.rows;
        md_put(k.y + row * k.cols + c, v);
    }
}

/* ---- host ---- */

template <class T> md_status tokens_run(md_backend *be, const md_tokens_args *a)
{
    md_tokens_pass<T> k;
    k.patch = cuda_data<T>(a->patch);
    k.cls = cuda_data<float>(a->cls);
    k.mask_token = cuda_data<float>(a->mask_token);
    k.pos = cuda_data<float>(a->pos);
    k.mask = cuda_data<uint8_t>(a->mask);
    k.out = cuda_data<T>(a->tokens);
    k.tokens = a->tokens->dim[1];
    k.cols = a->tokens->dim[2];
    k.rows = a->tokens->dim[0] * k.tokens;
    if (k.rows == 0)
        return MD_OK;
    enum { W = md_vec<T>::N };
    const bool aligned = cuda_aligned(k.patch, k.cls, k.mask_token, k.pos, k.out);
    const auto kernel = vec_width<T>(k.cols, aligned) == W ? md_tokens<T, W> : md_tokens<T, 1>;
    MD_LAUNCH(kernel, cuda_blocks(k.rows, VEC_WARPS), VEC_BLOCK, 0, cuda_stream(be), k);
    return cuda_launched(MD_OP_tokens);
}

template <class T>
md_status tokens_bwd_run(md_backend *be, const md_tokens_bwd_args *a, float *part)
{
    md_tokens_bwd_pass<T> k;
    k.dtokens = cuda_data<T>(a->dtokens);
    k.mask = cuda_data<uint8_t>(a->mask);
    k.dpatch = cuda_data<T>(a->dpatch);
    k.dcls = cuda_data<float>(a->dcls);
    k.dpos = cuda_data<float>(a->dpos);
    k.part = part;
    k.images = a->dtokens->dim[0];
    k.tokens = a->dtokens->dim[1];
    k.cols = a->dtokens->dim[2];
    k.add_patch = a->accumulate & 1;
    k.add_cls = a->accumulate >> 1 & 1;
    k.add_pos = a->accumulate >> 3 & 1;
    if (k.cols == 0)
        return MD_OK;
    enum { W = md_vec<T>::N };
    const int width = vec_width<T>(k.cols, cuda_aligned(k.dtokens, k.dpatch));
    const auto kernel = width == W ? md_tokens_bwd<T, W> : md_tokens_bwd<T, 1>;
    const dim3 grid((unsigned)k.tokens, cuda_blocks(k.cols, MD_WARP * width));
    MD_LAUNCH(kernel, grid, VEC_BLOCK, VEC_BLOCK * width * sizeof(float), cuda_stream(be), k);
    MD_TRY(cuda_launched(MD_OP_tokens_bwd));
    const cuda_sums sums = {part,
                            k.tokens,
                            k.cols,
                            {cuda_data<float>(a->dmask_token)},
                            {(a->accumulate >> 2 & 1) != 0}};
    return cuda_reduce_sums(be, MD_OP_tokens_bwd, &sums);
}

template <class T> md_status gather_run(md_backend *be, const md_gather_rows_args *a)
{
    md_rows_pass<T> k;
    k.x = cuda_data<T>(a->x);
    k.index = cuda_data<int32_t>(a->index);
    k.y = cuda_data<T>(a->y);
    k.rows = k.listed = md_tensor_count(a->index);
    k.cols = md_tensor_cols(a->x);
    k.add = a->accumulate & 1;
    if (k.rows == 0)
        return MD_OK;
    enum { W = md_vec<T>::N };
    const auto kernel =
        vec_width<T>(k.cols, cuda_aligned(k.x, k.y)) == W ? md_gather<T, W> : md_gather<T, 1>;
    MD_LAUNCH(kernel, cuda_blocks(k.rows, VEC_WARPS), VEC_BLOCK, 0, cuda_stream(be), k);
    return cuda_launched(MD_OP_gather_rows);
}

template <class T> md_status scatter_run(md_backend *be, const md_scatter_rows_args *a)
{
    md_rows_pass<T> k;
    k.x = cuda_data<T>(a->dy);
    k.index = cuda_data<int32_t>(a->index);
    k.y = cuda_data<T>(a->dx);
    k.rows = md_tensor_rows(a->dx);
    k.listed = md_tensor_count(a->index);
    k.cols = md_tensor_cols(a->dx);
    k.add = a->accumulate & 1;
    const int64_t warps = k.add ? k.listed : k.rows;
    if (warps == 0)
        return MD_OK;
    enum { W = md_vec<T>::N };
    const bool wide = vec_width<T>(k.cols, cuda_aligned(k.x, k.y)) == W;
    const auto add = wide ? md_scatter_add<T, W> : md_scatter_add<T, 1>;
    const auto write = wide ? md_scatter<T, W> : md_scatter<T, 1>;
    MD_LAUNCH((k.add ? add : write), cuda_blocks(warps, VEC_WARPS), VEC_BLOCK, 0, cuda_stream(be),
              k);
    return cuda_launched(MD_OP_scatter_rows);
}

/* full: the tensor [B, M, C] of the two. */
template <class T>
md_mean_pass<T> mean_pass(const md_tensor *x, const md_tensor *y, const md_tensor *full)
{
    md_mean_pass<T> k;
    k.x = cuda_data<T>(x);
    k.y = cuda_data<T>(y);
    k.rows = full->dim[1];
    k.cols = full->dim[2];
    k.all = full->dim[0] * full->dim[1];
    return k;
}

template <class T> md_status mean_run(md_backend *be, const md_mean_rows_args *a)
{
    const md_mean_pass<T> k = mean_pass<T>(a->x, a->y, a->x);
    if (k.all == 0 || k.cols == 0)
        return MD_OK;
    enum { W = md_vec<T>::N };
    const int width = vec_width<T>(k.cols, cuda_aligned(k.x));
    const auto kernel = width == W ? md_mean<T, W> : md_mean<T, 1>;
    const dim3 grid((unsigned)a->x->dim[0], cuda_blocks(k.cols, MD_WARP * width));
    MD_LAUNCH(kernel, grid, VEC_BLOCK, VEC_BLOCK * width * sizeof(float), cuda_stream(be), k);
    return cuda_launched(MD_OP_mean_rows);
}

template <class T> md_status mean_bwd_run(md_backend *be, const md_mean_rows_bwd_args *a)
{
    const md_mean_pass<T> k = mean_pass<T>(a->dy, a->dx, a->dx);
    if (k.all == 0)
        return MD_OK;
    enum { W = md_vec<T>::N };
    const auto kernel =
        vec_width<T>(k.cols, cuda_aligned(k.x, k.y)) == W ? md_mean_bwd<T, W> : md_mean_bwd<T, 1>;
    MD_LAUNCH(kernel, cuda_blocks(k.all, VEC_WARPS), VEC_BLOCK, 0, cuda_stream(be), k);
    return cuda_launched(MD_OP_mean_rows_bwd);
}

} // namespace

md_status cuda_tokens(md_backend *be, const md_tokens_args *a)
{
    CUDA_CHECK(tokens, a);
    if ((a->mask && !a->mask_token) || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "tokens: a mask needs a mask token, and nothing accumulates");
    return cuda_is_bf16(a->patch) ? tokens_run<md_bf16>(be, a) : tokens_run<float>(be, a);
}

size_t cuda_tokens_bwd_scratch(md_backend *be, const md_tokens_bwd_args *a)
{
    (void)be;
    return a->dmask_token ? sizeof(float) * (size_t)(a->dtokens->dim[1] * a->dtokens->dim[2]) : 0;
}

md_status cuda_tokens_bwd(md_backend *be, const md_tokens_bwd_args *a)
{
    CUDA_CHECK(tokens_bwd, a);
    void *scratch;
    MD_TRY(cuda_scratch(be, MD_OP_tokens_bwd, cuda_tokens_bwd_scratch(be, a), &scratch));
    float *part = a->dmask_token ? static_cast<float *>(scratch) : nullptr;
    return cuda_is_bf16(a->dtokens) ? tokens_bwd_run<md_bf16>(be, a, part)
                                    : tokens_bwd_run<float>(be, a, part);
}

md_status cuda_gather_rows(md_backend *be, const md_gather_rows_args *a)
{
    CUDA_CHECK(gather_rows, a);
    return cuda_is_bf16(a->x) ? gather_run<md_bf16>(be, a) : gather_run<float>(be, a);
}

md_status cuda_scatter_rows(md_backend *be, const md_scatter_rows_args *a)
{
    CUDA_CHECK(scatter_rows, a);
    return cuda_is_bf16(a->dx) ? scatter_run<md_bf16>(be, a) : scatter_run<float>(be, a);
}

md_status cuda_mean_rows(md_backend *be, const md_mean_rows_args *a)
{
    CUDA_CHECK(mean_rows, a);
    if (a->x->dim[1] < 1 || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "mean_rows: a mean of %lld rows, accumulate %u",
                (long long)a->x->dim[1], a->accumulate);
    return cuda_is_bf16(a->x) ? mean_run<md_bf16>(be, a) : mean_run<float>(be, a);
}

md_status cuda_mean_rows_bwd(md_backend *be, const md_mean_rows_bwd_args *a)
{
    CUDA_CHECK(mean_rows_bwd, a);
    if (a->dx->dim[1] < 1 || a->accumulate)
        MD_FAIL(MD_ERR_BUG, "mean_rows_bwd: a mean of %lld rows, accumulate %u",
                (long long)a->dx->dim[1], a->accumulate);
    return cuda_is_bf16(a->dy) ? mean_bwd_run<md_bf16>(be, a) : mean_bwd_run<float>(be, a);
}
