/* cuda_rel: relative position tables. */
#include "kernels/cuda/cuda_vec.cuh"

namespace
{

template <class T> struct md_rel_gather_pass {
    const float *table;
    const int32_t *index;
    T *rel;
    int64_t area; /* pairs of tokens */
    int heads;
};

template <class T> MD_KERNEL(VEC_BLOCK) md_rel_gather(md_rel_gather_pass<T> k)
{
    const int64_t pair = (int64_t)blockIdx.x * VEC_BLOCK + threadIdx.x;
    if (pair >= k.area)
        return;
    const float *row = k.table + (int64_t)k.index[pair] * k.heads;
    for (int h = 0; h < k.heads; h++)
        md_store(&k.rel[h * k.area + pair], row[h]);
}

/* Heads and pairs that a thread of md_rel_scatter has at once. */
#define REL_HEADS 16
#define REL_PAIRS 8

struct md_rel_scatter_pass {
    const float *drel;
    const int32_t *index;
    float *dtable;
    int64_t area;
    int heads;
    bool accumulate;
};

/* A block has one row of the table and REL_HEADS heads: it looks through the index for the pairs of
 * its row, each thread at every VEC_BLOCK-th. So there are no atomics and the order is fixed, and
 * the price is that every row reads the whole index: 732 rows x 258 KiB for 257 tokens, from the
 * second-level cache (at most 190 MB, near 40 us; less where the blocks of a multiprocessor share
 * it), while the gradients themselves are read once. */
MD_KERNEL(VEC_BLOCK) md_rel_scatter(md_rel_scatter_pass k)
{
    const int row = (int)blockIdx.x, first = (int)blockIdx.y * REL_HEADS;
    const float *drel = k.drel + first * k.area;
    float sum[REL_HEADS] = {};
    for (int64_t pair = threadIdx.x; pair < k.area; pair += VEC_BLOCK * REL_PAIRS) {
        unsigned mine = 0; /* bit u: pair + u * VEC_BLOCK is of this row */
#pragma unroll
        for (int u = 0; u < REL_PAIRS; u++)
            if (pair + u * VEC_BLOCK < k.area)
                mine |= (unsigned)(k.index[pair + u * VEC_BLOCK] == row) << u;
        for (int64_t at = pair; mine != 0; at += VEC_BLOCK, mine >>= 1) {
            if (!(mine & 1))
                continue;
#pragma unroll
            for (int h = 0; h < REL_HEADS; h++)
                if (first + h < k.heads)
                    sum[h] += drel[h * k.area + at];
        }
    }
    md_block_sums(sum, reinterpret_cast<float *>(md_smem()));
    if (threadIdx.x != 0)
        return;
#pragma unroll
    for (int h = 0; h < REL_HEADS; h++) {
        float *out = k.dtable + (int64_t)row * k.heads + first + h;
        if (first + h < k.heads)
            *out = (k.accumulate ? *out : 0.0f) + sum[h];
    }
}

template <class T> md_status rel_gather_run(md_backend *be, const md_rel_gather_args *a)
{
    md_rel_gather_pass<T> k;
    k.table = cuda_data<float>(a->table);
    k.index = cuda_data<int32_t>(a->index);
    k.rel = cuda_data<T>(a->rel);
    k.area = md_tensor_count(a->index);
    k.heads = (int)a->table->dim[1];
    if (k.area == 0)
        return MD_OK;
    MD_LAUNCH(md_rel_gather<T>, cuda_blocks(k.area, VEC_BLOCK), VEC_BLOCK, 0, cuda_stream(be), k);
    return cuda_launched(MD_OP_rel_gather);
}

} // namespace

md_status cuda_rel_gather(md_backend *be, const md_rel_gather_args *a)
{
    CUDA_CHECK(rel_gather, a);
    if (a->accumulate)
        MD_FAIL(MD_ERR_BUG, "rel_gather: it does not accumulate");
    return cuda_is_bf16(a->rel) ? rel_gather_run<md_bf16>(be, a) : rel_gather_run<float>(be, a);
}

md_status cuda_rel_scatter(md_backend *be, const md_rel_scatter_args *a)
{
    CUDA_CHECK(rel_scatter, a);
    md_rel_scatter_pass k;
    k.drel = cuda_data<float>(a->drel);
    k.index = cuda_data<int32_t>(a->index);
    k.dtable = cuda_data<float>(a->dtable);
    k.area = md_tensor_count(a->index);
    k.heads = (int)a->dtable->dim[1];
    k.accumulate = a->accumulate & 1;
    const int64_t rows = a->dtable->dim[0];
    if (rows == 0 || k.heads == 0)
        return MD_OK;
    const dim3 grid((unsigned)rows, cuda_blocks(k.heads, REL_HEADS));
    MD_LAUNCH(md_rel_scatter, grid, VEC_BLOCK, REL_HEADS * VEC_WARPS * sizeof(float),
              cuda_stream(be), k);
    return cuda_launched(MD_OP_rel_scatter);
}
