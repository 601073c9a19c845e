/* emu_device: the device side of kernels/cuda/cuda_common.cuh for the CPU. A block's threads are
 * fibers of one thread (emu_fiber.cpp); whatever exchanges values between threads goes through
 * emu_warp, which lets a lane go on when all 32 have come with the same operation. */
#ifndef MD_EMU_DEVICE_H
#define MD_EMU_DEVICE_H

#include "tests/emu/emu_fiber.h"

#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__         inline
#define MD_DEV                  inline
#define MD_KERNEL(n)            inline void
#define MD_KERNEL_OF(n, blocks) inline void

#define threadIdx (emu_self()->thread)
#define blockIdx  (emu_self()->block)
#define blockDim  (emu_self()->block_dim)
#define gridDim   (emu_self()->grid_dim)

#define MD_LAUNCH(kernel, grid, block, smem, stream, ...) \
    emu_launch_kernel({#kernel, (grid), (block), (size_t)(smem), (stream)}, kernel, __VA_ARGS__)
#define MD_ALLOW_SMEM(kernel, bytes) \
    emu_allow_smem(reinterpret_cast<const void *>(kernel), (size_t)(bytes))

/* Arguments are taken at the launch, the kernel runs when its stream comes to it. */
template <class... P, class... A>
void emu_launch_kernel(const emu_launch &how, void (*kernel)(P...), A &&...args)
{
    std::tuple<P...> taken(std::forward<A>(args)...);
    emu_launch_blocks(how, reinterpret_cast<const void *>(kernel),
                      [kernel, taken] { std::apply(kernel, taken); });
}

MD_DEV unsigned char *md_smem()
{
    return emu_smem();
}

MD_DEV void md_barrier()
{
    emu_barrier();
}

MD_DEV void md_warp_barrier()
{
    const char none = 0;
    emu_warp(EMU_BARRIER, &none, 1);
}

template <class T> MD_DEV T md_shfl(T value, int lane)
{
    T out;
    std::memcpy(&out, emu_warp(EMU_SHUFFLE, &value, sizeof value) + (lane & 31) * EMU_LANE_BYTES,
                sizeof out);
    return out;
}

template <class T> MD_DEV T md_shfl_xor(T value, int mask)
{
    const int lane = (int)threadIdx.x % 32;
    T out;
    std::memcpy(&out,
                emu_warp(EMU_SHUFFLE_XOR, &value, sizeof value) +
                    ((lane ^ mask) & 31) * EMU_LANE_BYTES,
                sizeof out);
    return out;
}

MD_DEV float md_exp2(float x)
{
    return exp2f(x);
}

MD_DEV uint32_t md_pack(float lo, float hi)
{
    return (uint32_t)md_bf16_from_f32(lo) | (uint32_t)md_bf16_from_f32(hi) << 16;
}

MD_DEV void md_async_copy16(void *smem, const void *src, bool there)
{
    emu_async_copy(smem, src, 16, there);
}

MD_DEV void md_async_copy8(void *smem, const void *src, bool there)
{
    emu_async_copy(smem, src, 8, there);
}

MD_DEV void md_async_commit()
{
    emu_async_commit();
}

template <int N> MD_DEV void md_async_wait()
{
    emu_async_wait(N);
}

MD_DEV void md_prefetch(const void *src)
{
    (void)src;
}

struct emu_row {
    uint16_t value[8];
};

/* Element (r, c) of matrix i, from the rows that the lanes brought. */
inline uint16_t emu_matrix_at(const unsigned char *rows, int i, int r, int c)
{
    emu_row row;
    std::memcpy(&row, rows + (8 * i + r) * EMU_LANE_BYTES, sizeof row);
    return row.value[c];
}

inline void emu_load_matrices(uint32_t (&out)[4], const void *address, bool transposed)
{
    emu_row mine;
    emu_want_aligned(address, 16);
    std::memcpy(&mine, address, sizeof mine);
    const unsigned char *rows =
        emu_warp(transposed ? EMU_LDMATRIX_TRANS : EMU_LDMATRIX, &mine, sizeof mine);
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        uint32_t word = 0;
        for (int e = 0; e < 2; e++) {
            const int r = transposed ? 2 * t + e : g, c = transposed ? g : 2 * t + e;
            word |= (uint32_t)emu_matrix_at(rows, i, r, c) << (16 * e);
        }
        out[i] = word;
    }
}

MD_DEV void md_ldmatrix(uint32_t (&r)[4], const void *row)
{
    emu_load_matrices(r, row, false);
}

MD_DEV void md_ldmatrix_trans(uint32_t (&r)[4], const void *row)
{
    emu_load_matrices(r, row, true);
}

struct emu_fragment {
    uint32_t a[4], b[2];
};

inline float emu_half(uint32_t word, int high)
{
    return md_f32_from_bf16((uint16_t)(high ? word >> 16 : word));
}

MD_DEV void md_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    const emu_fragment mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const unsigned char *all = emu_warp(EMU_MMA, &mine, sizeof mine);
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    for (int e = 0; e < 4; e++) {
        const int row = g + e / 2 * 8, col = 2 * t + e % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; k++) {
            emu_fragment fa, fb;
            std::memcpy(&fa, all + (row % 8 * 4 + k % 8 / 2) * EMU_LANE_BYTES, sizeof fa);
            std::memcpy(&fb, all + (col * 4 + k % 8 / 2) * EMU_LANE_BYTES, sizeof fb);
            sum += emu_half(fa.a[row / 8 + k / 8 * 2], k % 2) * emu_half(fb.b[k / 8], k % 2);
        }
        d[e] += sum;
    }
}

#endif
