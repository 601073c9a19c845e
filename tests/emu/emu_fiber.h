/* emu_fiber: runs the blocks of a kernel on the CPU, one fiber a thread. Fibers are resumed in an
 * order that is shuffled again and again, and each runs until it waits, so that threads which do
 * not wait for each other read what others have not yet written: shared memory holds NaNs until
 * then. Misuse (a barrier that not all reach, lanes in different operations, addresses that are not
 * aligned) ends the program with a sentence. */
#ifndef MD_EMU_FIBER_H
#define MD_EMU_FIBER_H

#include <cuda_runtime.h>
#include <functional>

struct emu_thread {
    dim3 thread, block, block_dim, grid_dim;
};

struct emu_launch {
    const char *name;
    dim3 grid, block;
    size_t smem;
    cudaStream_t stream;
};

/* What the lanes of a warp do together. */
enum emu_together {
    EMU_BARRIER,
    EMU_SHUFFLE,
    EMU_SHUFFLE_XOR,
    EMU_LDMATRIX,
    EMU_LDMATRIX_TRANS,
    EMU_MMA
};

#define EMU_LANE_BYTES 32

/* The thread that runs. */
const emu_thread *emu_self();
unsigned char *emu_smem();
void emu_barrier();
/* Gives this lane's value and returns those of all, EMU_LANE_BYTES apart, until the next call. */
const unsigned char *emu_warp(emu_together what, const void *mine, size_t bytes);
void emu_async_copy(void *smem, const void *src, size_t bytes, bool there);
void emu_async_commit();
void emu_async_wait(int under_way);
void emu_want_aligned(const void *p, size_t bytes);

/* Checks a launch as CUDA does and puts it on its stream. */
void emu_launch_blocks(const emu_launch &how, const void *kernel, std::function<void()> body);
cudaError_t emu_allow_smem(const void *kernel, size_t bytes);

/* Runs all blocks now. */
void emu_run_blocks(const emu_launch &how, const std::function<void()> &body);

#endif
