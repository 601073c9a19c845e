/* cuda_vec: what the kernels share whose speed is that of memory: several numbers in one access,
 * sums over a block, and the pass over a flat array. Every thread keeps at least 32 bytes of reads
 * under way, which with the threads that fit on a multiprocessor covers the latency of memory. */
#ifndef MD_CUDA_VEC_CUH
#define MD_CUDA_VEC_CUH

#include "kernels/cuda/cuda_internal.h"

/* Threads of a block, and its warps, where a kernel does not say otherwise. */
#define VEC_BLOCK 256
#define VEC_WARPS (VEC_BLOCK / MD_WARP)

/* x = W consecutive numbers: one number, or W aligned to 16 bytes or to W numbers. */
template <int W> MD_DEV void md_get(const float *p, float (&x)[W])
{
    if constexpr (W == 1) {
        x[0] = *p;
    } else {
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            const float4 v = *reinterpret_cast<const float4 *>(p + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    }
}

template <int W> MD_DEV void md_get(const md_bf16 *p, float (&x)[W])
{
    if constexpr (W == 1) {
        x[0] = md_load(p);
    } else if constexpr (W == 4) {
        const uint2 v = *reinterpret_cast<const uint2 *>(p);
        x[0] = md_unpack_lo(v.x), x[1] = md_unpack_hi(v.x);
        x[2] = md_unpack_lo(v.y), x[3] = md_unpack_hi(v.y);
    } else {
        md_vec<md_bf16>::load(p, x);
    }
}

template <int W> MD_DEV void md_put(float *p, const float (&x)[W])
{
    if constexpr (W == 1) {
        *p = x[0];
    } else {
#pragma unroll
        for (int i = 0; i < W; i += 4)
            md_store16(p + i, make_uint4(md_f32_to_bits(x[i]), md_f32_to_bits(x[i + 1]),
                                         md_f32_to_bits(x[i + 2]), md_f32_to_bits(x[i + 3])));
    }
}

template <int W> MD_DEV void md_put(md_bf16 *p, const float (&x)[W])
{
    if constexpr (W == 1)
        md_store(p, x[0]);
    else if constexpr (W == 4)
        *reinterpret_cast<uint2 *>(p) = make_uint2(md_pack(x[0], x[1]), md_pack(x[2], x[3]));
    else
        md_vec<md_bf16>::store(p, x);
}

/* The same element by element: for arrays that begin anywhere, where the thread that adds an
 * element must not depend on the address. */
template <bool ALIGNED, int W, class T> MD_DEV void md_get_any(const T *p, float (&x)[W])
{
    if constexpr (ALIGNED) {
        md_get(p, x);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++)
            x[i] = md_load(p + i);
    }
}

template <bool ALIGNED, int W, class T> MD_DEV void md_put_any(T *p, const float (&x)[W])
{
    if constexpr (ALIGNED) {
        md_put(p, x);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++)
            md_store(p + i, x[i]);
    }
}

/* 16 bytes as memory has them: eight bf16 that wait cost half the registers of eight floats. */
template <class T> struct md_raw;

template <> struct md_raw<float> {
    static MD_DEV void unpack(uint4 v, float (&x)[4])
    {
        x[0] = md_bits_to_f32(v.x), x[1] = md_bits_to_f32(v.y);
        x[2] = md_bits_to_f32(v.z), x[3] = md_bits_to_f32(v.w);
    }
    static MD_DEV uint4 pack(const float (&x)[4])
    {
        return make_uint4(md_f32_to_bits(x[0]), md_f32_to_bits(x[1]), md_f32_to_bits(x[2]),
                          md_f32_to_bits(x[3]));
    }
};

template <> struct md_raw<md_bf16> {
    static MD_DEV void unpack(uint4 v, float (&x)[8])
    {
        x[0] = md_unpack_lo(v.x), x[1] = md_unpack_hi(v.x);
        x[2] = md_unpack_lo(v.y), x[3] = md_unpack_hi(v.y);
        x[4] = md_unpack_lo(v.z), x[5] = md_unpack_hi(v.z);
        x[6] = md_unpack_lo(v.w), x[7] = md_unpack_hi(v.w);
    }
    static MD_DEV uint4 pack(const float (&x)[8])
    {
        return make_uint4(md_pack(x[0], x[1]), md_pack(x[2], x[3]), md_pack(x[4], x[5]),
                          md_pack(x[6], x[7]));
    }
};

/* Sums of R numbers over the block, the same on every thread. smem: R numbers per warp; of two
 * calls in a row each needs its own. All threads. */
template <int R, class S> MD_DEV void md_block_sums(S (&v)[R], S *smem)
{
    const int warp = (int)threadIdx.x / MD_WARP, warps = (int)blockDim.x / MD_WARP;
#pragma unroll
    for (int i = 0; i < R; i++)
        v[i] = md_warp_sum(v[i]);
    if (threadIdx.x % MD_WARP == 0) {
#pragma unroll
        for (int i = 0; i < R; i++)
            smem[warp * R + i] = v[i];
    }
    md_barrier();
#pragma unroll
    for (int i = 0; i < R; i++)
        v[i] = smem[i];
    for (int w = 1; w < warps; w++) {
#pragma unroll
        for (int i = 0; i < R; i++)
            v[i] += smem[w * R + i];
    }
}

/* Column sums: lane l of every warp holds its part of columns first + l * W ...; the warps are
 * added in order and out[column] is written, or added to, below cols. smem: VEC_BLOCK * W floats,
 * not in use; a barrier must come before its next use. All threads. */
template <int W>
MD_DEV void md_add_warps(const float (&sum)[W], float *smem, float *out, int64_t first,
                         int64_t cols, bool accumulate)
{
    enum { COLS = MD_WARP * W };
    md_put(smem + (int)threadIdx.x * W, sum);
    md_barrier();
    for (int c = (int)threadIdx.x; c < COLS && first + c < cols; c += VEC_BLOCK) {
        float total = smem[c];
#pragma unroll
        for (int w = 1; w < VEC_WARPS; w++)
            total += smem[w * COLS + c];
        out[first + c] = accumulate ? out[first + c] + total : total;
    }
}

/* A pass over n elements. Op is a struct with pointers; Op::data<W> holds what op.load(data, i)
 * reads of the elements [i, i + W) and op.store(data, i) works on and writes back. Each thread has
 * the reads of U groups of W elements under way; the last n % W elements go one by one. */
template <class Op, int W, int U> MD_KERNEL(VEC_BLOCK) md_each(Op op, int64_t n)
{
    typename Op::template data<W> d[U];
    const int64_t first = ((int64_t)blockIdx.x * VEC_BLOCK * U + threadIdx.x) * W;
#pragma unroll
    for (int u = 0; u < U; u++)
        if (first + u * VEC_BLOCK * W + W <= n)
            op.load(d[u], first + u * VEC_BLOCK * W);
#pragma unroll
    for (int u = 0; u < U; u++)
        if (first + u * VEC_BLOCK * W + W <= n)
            op.store(d[u], first + u * VEC_BLOCK * W);
    if (W > 1 && blockIdx.x == 0 && threadIdx.x < n % W) {
        typename Op::template data<1> rest;
        const int64_t i = n - n % W + threadIdx.x;
        op.load(rest, i);
        op.store(rest, i);
    }
}

/* All pointers at multiples of 16 bytes (NULL is). */
template <class... P> static inline bool cuda_aligned(P... p)
{
    return ((reinterpret_cast<uintptr_t>(p) | ...) & 15) == 0;
}

/* Numbers of one access for rows of cols: 1 where they are not whole aligned vectors. */
template <class T> static inline int vec_width(int64_t cols, bool aligned)
{
    return aligned && cols % md_vec<T>::N == 0 ? md_vec<T>::N : 1;
}

static inline unsigned cuda_blocks(int64_t n, int64_t per_block)
{
    return (unsigned)cuda_ceil(n, per_block);
}

/* Runs op over n elements, W at a time where aligned. */
template <int W, class Op>
static md_status cuda_each(md_backend *be, md_op op, const Op &k, int64_t n, bool aligned)
{
    enum { U = 2 };
    if (n == 0)
        return MD_OK;
    const auto kernel = aligned ? md_each<Op, W, U> : md_each<Op, 1, U>;
    const unsigned blocks = cuda_blocks(n, VEC_BLOCK * U * (aligned ? W : 1));
    MD_LAUNCH(kernel, blocks, VEC_BLOCK, 0, cuda_stream(be), k, n);
    return cuda_launched(op);
}

#endif
