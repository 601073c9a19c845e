/* cuda_common: what the kernels share, and the whole vocabulary they may use. The same .cu files
 * are compiled by nvcc for a GPU and by g++ for the emulator of tests/emu, which runs every thread
 * of a block as a fiber; so a kernel touches the hardware through this header only:
 *
 *   MD_LAUNCH(kernel, grid, block, smem bytes, stream, arguments...) and never <<<>>>
 *   md_smem()                the block's dynamic shared memory; no __shared__ variables
 *   md_barrier()             __syncthreads
 *   md_shfl, md_shfl_xor     exchange within a warp, all 32 lanes taking part
 *   md_warp_barrier()        __syncwarp
 *   md_async_*               copies from device to shared memory that end later (cp.async)
 *   md_ldmatrix*, md_mma     tensor cores, bf16 in, f32 sums
 *   md_pack, md_unpack       two bf16 in a word
 *   md_load16, md_store16    16 aligned bytes of memory
 *   md_exp2, md_exp, md_rcp  fast exponentials and 1/x
 *
 * No float atomics: every sum has one order. Blocks are one-dimensional and a multiple of 32. */
#ifndef MD_CUDA_COMMON_CUH
#define MD_CUDA_COMMON_CUH

#include <cuda_runtime.h>

#include "kernels/scalar_math.h"

#define MD_WARP 32

/* A bf16 number in memory. */
struct md_bf16 {
    uint16_t bits;
};

#ifdef MD_EMU
#include "tests/emu/emu_device.h"
#else

#define MD_DEV                  __device__ __forceinline__
#define MD_KERNEL(n)            __global__ void __launch_bounds__(n)
/* A kernel of which at least so many blocks are to fit on a multiprocessor. */
#define MD_KERNEL_OF(n, blocks) __global__ void __launch_bounds__(n, blocks)

/* The error of a launch stays in cudaGetLastError, which cuda_launched() reads. */
#define MD_LAUNCH(kernel, grid, block, smem, stream, ...) \
    kernel<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)

/* Lets a kernel use more than 48 KiB of dynamic shared memory; once per kernel, at setup. */
#define MD_ALLOW_SMEM(kernel, bytes) \
    cudaFuncSetAttribute((kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes))

MD_DEV unsigned char *md_smem()
{
    extern __shared__ __align__(128) unsigned char md_dynamic_smem[];
    return md_dynamic_smem;
}

MD_DEV void md_barrier()
{
    __syncthreads();
}

MD_DEV void md_warp_barrier()
{
    __syncwarp();
}

/* Lane `lane`'s value, and that of the lane whose number differs in the bits of mask. */
template <class T> MD_DEV T md_shfl(T value, int lane)
{
    return __shfl_sync(0xffffffffu, value, lane);
}

template <class T> MD_DEV T md_shfl_xor(T value, int mask)
{
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

MD_DEV float md_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* bf16 of lo in the low half and of hi in the high half, rounded to nearest even. */
MD_DEV uint32_t md_pack(float lo, float hi)
{
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
    return word;
}

MD_DEV unsigned md_smem_address(const void *p)
{
    return (unsigned)__cvta_generic_to_shared(p);
}

/* Copies 16 bytes from device to shared memory, both 16-byte aligned, or writes zeros there when
 * !there (src is then not read). Groups: commit closes one; wait<N> returns when at most the N
 * newest groups of this thread are still under way. Other threads see the bytes after wait and a
 * barrier. */
MD_DEV void md_async_copy16(void *smem, const void *src, bool there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(md_smem_address(smem)),
                 "l"(src), "r"(there ? 16 : 0)
                 : "memory");
}

/* The same of 8 bytes. */
MD_DEV void md_async_copy8(void *smem, const void *src, bool there)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(md_smem_address(smem)),
                 "l"(src), "r"(there ? 8 : 0)
                 : "memory");
}

MD_DEV void md_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> MD_DEV void md_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Asks for the 32 bytes of global memory around an address to come near (into L2). */
MD_DEV void md_prefetch(const void *src)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(src));
}

/* Loads four 8x8 matrices of bf16; lane l gives the address of row l % 8 (16 bytes, aligned) of
 * matrix l / 8. r[i] of lane l then holds elements 2*(l%4), 2*(l%4)+1 of row l/4 of matrix i.
 * The transposed form gives the same of the transposed matrices. All 32 lanes. */
MD_DEV void md_ldmatrix(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(md_smem_address(row))
                 : "memory");
}

MD_DEV void md_ldmatrix_trans(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(md_smem_address(row))
                 : "memory");
}

/* d += a b with a [16, 16] by rows, b [16, 8] by columns, d [16, 8] in f32 (PTX mma.m16n8k16). With
 * g = lane / 4, t = lane % 4: a[0] row g, columns 2t, 2t+1; a[1] row g+8; a[2] row g, columns 2t+8,
 * 2t+9; a[3] row g+8 of these. b[0] rows 2t, 2t+1 of column g; b[1] rows 2t+8, 2t+9. d[0], d[1] row
 * g, columns 2t, 2t+1; d[2], d[3] row g+8. All 32 lanes. */
MD_DEV void md_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

/* ---- the same on both sides ---- */

MD_DEV float md_unpack_lo(uint32_t word)
{
    return md_bits_to_f32(word << 16);
}

MD_DEV float md_unpack_hi(uint32_t word)
{
    return md_bits_to_f32(word & 0xffff0000u);
}

/* e^x and log2(e) for kernels that keep logits in base 2. */
#define MD_LOG2E 1.44269504f
MD_DEV float md_exp(float x)
{
    return md_exp2(x * MD_LOG2E);
}

/* 1/x within 1 ulp; 0 for an infinite x, and results below 1.2e-38 are 0. */
MD_DEV float md_rcp(float x)
{
#ifdef MD_EMU
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/* Loads 16 aligned bytes. */
MD_DEV uint4 md_load16(const void *p)
{
    return *static_cast<const uint4 *>(p);
}

/* One store of 16 aligned bytes, to device or shared memory: an assignment may end as four. */
MD_DEV void md_store16(void *p, uint4 v)
{
#ifdef MD_EMU
    *static_cast<uint4 *>(p) = v;
#else
    asm volatile("st.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#endif
}

MD_DEV float md_load(const float *p)
{
    return *p;
}

MD_DEV float md_load(const md_bf16 *p)
{
    return md_f32_from_bf16(p->bits);
}

MD_DEV void md_store(float *p, float value)
{
    *p = value;
}

MD_DEV void md_store(md_bf16 *p, float value)
{
    p->bits = (uint16_t)md_pack(value, 0.0f);
}

/* 16 bytes of memory as numbers: 4 floats or 8 bf16. Aligned. */
template <class T> struct md_vec;

template <> struct md_vec<float> {
    enum { N = 4 };
    static MD_DEV void load(const float *p, float (&x)[N])
    {
        float4 v = *reinterpret_cast<const float4 *>(p);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    }
    static MD_DEV void store(float *p, const float (&x)[N])
    {
        md_store16(p, make_uint4(md_f32_to_bits(x[0]), md_f32_to_bits(x[1]), md_f32_to_bits(x[2]),
                                 md_f32_to_bits(x[3])));
    }
};

template <> struct md_vec<md_bf16> {
    enum { N = 8 };
    static MD_DEV void load(const md_bf16 *p, float (&x)[N])
    {
        uint4 v = md_load16(p);
        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
        for (int i = 0; i < 4; i++) {
            x[2 * i] = md_unpack_lo(word[i]);
            x[2 * i + 1] = md_unpack_hi(word[i]);
        }
    }
    static MD_DEV void store(md_bf16 *p, const float (&x)[N])
    {
        md_store16(p, make_uint4(md_pack(x[0], x[1]), md_pack(x[2], x[3]), md_pack(x[4], x[5]),
                                 md_pack(x[6], x[7])));
    }
};

/* Sums and maxima over a warp, the same on every lane. */
MD_DEV float md_warp_sum(float x)
{
    for (int mask = MD_WARP / 2; mask > 0; mask /= 2)
        x += md_shfl_xor(x, mask);
    return x;
}

MD_DEV double md_warp_sum(double x)
{
    for (int mask = MD_WARP / 2; mask > 0; mask /= 2)
        x += md_shfl_xor(x, mask);
    return x;
}

MD_DEV float md_warp_max(float x)
{
    for (int mask = MD_WARP / 2; mask > 0; mask /= 2)
        x = fmaxf(x, md_shfl_xor(x, mask));
    return x;
}

#endif
