/* test_emu: the emulator finds what it is there for, and is right where programs are. Each kernel
 * or program has a right form and one with a typical mistake. */
#include "kernels/cuda/cuda_common.cuh"
#include "tests/emu/emu_runtime.h"

#include <algorithm>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

extern "C" {
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
}

enum { SEEDS = 20 };

/* Of a test's work, unless it has its own. */
static cudaStream_t stream;

/* ---- memory ---- */

template <class T> static T *device(size_t n)
{
    void *p;
    assert_int_equal(cudaMalloc(&p, n * sizeof(T)), cudaSuccess);
    return static_cast<T *>(p);
}

template <class T> static T *device_of(const std::vector<T> &x)
{
    T *p = device<T>(x.size());
    assert_int_equal(
        cudaMemcpyAsync(p, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice, stream),
        cudaSuccess);
    return p;
}

template <class T> static std::vector<T> host_of(const T *p, size_t n)
{
    std::vector<T> x(n);
    assert_int_equal(cudaMemcpyAsync(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost, stream),
                     cudaSuccess);
    assert_int_equal(cudaStreamSynchronize(stream), cudaSuccess);
    return x;
}

/* The process that does this is ended by the emulator or by a sanitizer. */
template <class F> static void assert_dies(F mistake)
{
    fflush(nullptr);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        if (!freopen("/dev/null", "w", stderr))
            _exit(0);
        mistake();
        _exit(0);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) || WEXITSTATUS(status) != 0);
}

/* ---- kernels ---- */

/* Each block turns its part of x round. */
MD_KERNEL(256) reverse(float *x, bool wait)
{
    float *room = reinterpret_cast<float *>(md_smem());
    const unsigned n = blockDim.x, i = threadIdx.x;
    room[i] = x[blockIdx.x * n + i];
    if (wait)
        md_barrier();
    x[blockIdx.x * n + i] = room[n - 1 - i];
}

static bool reversed(bool wait)
{
    std::vector<float> x(2 * 256);
    for (size_t i = 0; i < x.size(); i++)
        x[i] = (float)i;
    float *p = device_of(x);
    MD_LAUNCH(reverse, 2, 256, 256 * sizeof(float), stream, p, wait);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
    const std::vector<float> y = host_of(p, x.size());
    cudaFree(p);
    for (size_t i = 0; i < x.size(); i++)
        if (y[i] != x[i / 256 * 256 + 255 - i % 256])
            return false;
    return true;
}

static void test_missing_barrier(void **)
{
    for (unsigned s = 0; s < SEEDS; s++) {
        emu_random().seed(s);
        assert_true(reversed(true));
        assert_false(reversed(false));
    }
}

/* Sums over the block, one after the other, each with much between it and the next: two in a row
 * need two places. wrong counts the threads that did not read what all warps wrote. */
MD_KERNEL(256) sums_in_a_row(int places, int *wrong)
{
    int *room = reinterpret_cast<int *>(md_smem());
    const int warps = (int)blockDim.x / MD_WARP, warp = (int)threadIdx.x / MD_WARP;
    for (int turn = 0; turn < 16; turn++) {
        int *place = room + turn % places * warps, sum = 0;
        for (int i = 0; i < 20; i++)
            md_shfl(0.0f, 0);
        if (threadIdx.x % MD_WARP == 0)
            place[warp] = turn;
        md_barrier();
        for (int w = 0; w < warps; w++)
            sum += place[w];
        *wrong += sum != turn * warps;
    }
}

static bool adds_up(int places)
{
    std::vector<int> none(1);
    int *wrong = device_of(none);
    MD_LAUNCH(sums_in_a_row, 32, 256, 2 * 256 / MD_WARP * sizeof(int), stream, places, wrong);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
    const bool right = host_of(wrong, 1)[0] == 0;
    cudaFree(wrong);
    return right;
}

static void test_place_used_again_too_early(void **)
{
    for (unsigned s = 0; s < SEEDS / 4; s++) {
        emu_random().seed(s);
        assert_true(adds_up(2));
        assert_false(adds_up(1));
    }
}

MD_KERNEL(32) write_at(unsigned byte)
{
    if (threadIdx.x == 7)
        md_smem()[byte] = 1;
}

static void test_overrun_of_shared_memory(void **)
{
    MD_LAUNCH(write_at, 1, 32, 100, stream, 99u);
    assert_int_equal(cudaStreamSynchronize(stream), cudaSuccess);
    assert_dies([] {
        MD_LAUNCH(write_at, 1, 32, 100, stream, 100u);
        cudaStreamSynchronize(stream);
    });
}

MD_KERNEL(64) barrier_of(unsigned threads)
{
    if (threadIdx.x < threads)
        md_barrier();
}

MD_KERNEL(64) mixed_warp(unsigned lane)
{
    if (threadIdx.x % 2)
        md_shfl(1.0f, (int)lane);
    else
        md_warp_barrier();
}

MD_KERNEL(64) half_warp(unsigned threads)
{
    if (threadIdx.x < threads)
        md_warp_barrier();
}

static void test_divergence(void **)
{
    MD_LAUNCH(barrier_of, 1, 64, 0, stream, 64u);
    assert_int_equal(cudaStreamSynchronize(stream), cudaSuccess);
    assert_dies([] {
        MD_LAUNCH(barrier_of, 1, 64, 0, stream, 63u);
        cudaStreamSynchronize(stream);
    });
    assert_dies([] {
        MD_LAUNCH(mixed_warp, 1, 64, 0, stream, 0u);
        cudaStreamSynchronize(stream);
    });
    assert_dies([] {
        MD_LAUNCH(half_warp, 1, 64, 0, stream, 40u);
        cudaStreamSynchronize(stream);
    });
}

/* y = a b of [16, 16] and [16, 8] by one warp; b is stored by rows, or turned by columns. */
MD_KERNEL(32) product(const md_bf16 *a, const md_bf16 *b, bool by_columns, float *y)
{
    md_bf16 *sa = reinterpret_cast<md_bf16 *>(md_smem()), *sb = sa + 16 * 16;
    const int lane = (int)threadIdx.x, row = lane % 8 + lane / 8 % 2 * 8;
    for (int i = lane; i < 16 * 16; i += 32)
        sa[i] = a[i];
    for (int i = lane; i < 16 * 16; i += 32)
        sb[i] = b[i % (16 * 8)]; /* twice: the operation loads four matrices */
    md_barrier();
    uint32_t fa[4], fb[4];
    float d[4] = {};
    md_ldmatrix(fa, sa + row * 16 + lane / 16 * 8);
    if (by_columns)
        md_ldmatrix(fb, sb + lane % 8 * 16 + lane / 8 % 2 * 8);
    else
        md_ldmatrix_trans(fb, sb + row * 8);
    md_mma(d, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; i++)
        y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

static void check_product(bool by_columns)
{
    std::vector<md_bf16> a(16 * 16), b(16 * 8);
    std::vector<float> want(16 * 8, 0.0f);
    for (md_bf16 &x : a)
        x.bits = md_bf16_from_f32((float)(emu_random()() % 17) - 8.0f);
    for (md_bf16 &x : b)
        x.bits = md_bf16_from_f32((float)(emu_random()() % 17) - 8.0f);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++)
            for (int k = 0; k < 16; k++)
                want[(size_t)(i * 8 + j)] +=
                    md_load(&a[(size_t)(i * 16 + k)]) *
                    md_load(&b[(size_t)(by_columns ? j * 16 + k : k * 8 + j)]);
    md_bf16 *pa = device_of(a), *pb = device_of(b);
    float *py = device<float>(want.size());
    MD_LAUNCH(product, 1, 32, 2 * 16 * 16 * sizeof(md_bf16), stream, pa, pb, by_columns, py);
    assert_true(host_of(py, want.size()) == want);
    cudaFree(pa);
    cudaFree(pb);
    cudaFree(py);
}

static void test_tensor_cores(void **)
{
    for (int i = 0; i < SEEDS; i++) {
        check_product(false);
        check_product(true);
    }
}

/* Two groups of copies; the second is waited for only if said so. */
MD_KERNEL(32) copy_two(const float4 *x, float4 *y, bool wait)
{
    float4 *room = reinterpret_cast<float4 *>(md_smem());
    const unsigned i = threadIdx.x;
    md_async_copy16(room + i, x + i, true);
    md_async_commit();
    md_async_copy16(room + 32 + i, x + 32 + i, i != 3);
    md_async_commit();
    if (wait)
        md_async_wait<0>();
    else
        md_async_wait<1>();
    md_barrier();
    y[i] = room[i];
    y[32 + i] = room[32 + i];
}

static void test_asynchronous_copies(void **)
{
    std::vector<float> x(256), want;
    for (size_t i = 0; i < x.size(); i++)
        x[i] = (float)i + 1.0f;
    want = x;
    std::fill(&want[4 * 35], &want[4 * 36], 0.0f);
    float *from = device_of(x), *to = device<float>(x.size());
    for (const bool wait : {true, false}) {
        MD_LAUNCH(copy_two, 1, 32, 1024, stream, reinterpret_cast<float4 *>(from),
                  reinterpret_cast<float4 *>(to), wait);
        const std::vector<float> y = host_of(to, x.size());
        assert_int_equal(y == want, wait);
        assert_memory_equal(y.data(), want.data(), 128 * sizeof(float));
    }
    cudaFree(from);
    cudaFree(to);
}

static void test_bad_launches(void **)
{
    float *p = device<float>(1);
    const struct {
        dim3 grid, block;
        size_t smem;
        cudaError_t err;
    } bad[] = {{0, 32, 0, cudaErrorInvalidConfiguration},
               {dim3(1, 0), 32, 0, cudaErrorInvalidConfiguration},
               {1, 1056, 0, cudaErrorInvalidConfiguration},
               {1, 33, 0, cudaErrorInvalidConfiguration},
               {1, 32, (48 << 10) + 1, cudaErrorInvalidValue}};
    for (const auto &b : bad) {
        MD_LAUNCH(reverse, b.grid, b.block, b.smem, stream, p, true);
        assert_int_equal(cudaGetLastError(), b.err);
        assert_int_equal(cudaGetLastError(), cudaSuccess);
    }
    assert_int_equal(MD_ALLOW_SMEM(write_at, (227 << 10) + 1), cudaErrorInvalidValue);
    cudaGetLastError();
    assert_int_equal(MD_ALLOW_SMEM(write_at, 64 << 10), cudaSuccess);
    MD_LAUNCH(write_at, 1, 32, 64 << 10, stream, 5u);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
    cudaFree(p);
}

/* ---- streams ---- */

MD_KERNEL(32) increment(float *x)
{
    x[threadIdx.x] = x[threadIdx.x] * 2.0f + 1.0f;
}

/* One stream writes what the other goes on with. */
static bool two_streams(bool wait)
{
    cudaStream_t first, second;
    cudaEvent_t written;
    std::vector<float> y(32);
    float *p = device<float>(32);
    cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&written, cudaEventDisableTiming);
    assert_int_equal(cudaMemsetAsync(p, 0, 32 * sizeof(float), first), cudaSuccess);
    for (int i = 0; i < 5; i++)
        MD_LAUNCH(increment, 1, 32, 0, first, p);
    cudaEventRecord(written, first);
    if (wait)
        cudaStreamWaitEvent(second, written, 0);
    cudaMemcpyAsync(y.data(), p, 32 * sizeof(float), cudaMemcpyDeviceToHost, second);
    assert_true(y[0] != y[0]); /* nothing has run yet */
    assert_int_equal(cudaEventQuery(written) & ~cudaErrorNotReady, cudaSuccess);
    assert_int_equal(cudaStreamSynchronize(second), cudaSuccess);
    cudaEventDestroy(written);
    cudaStreamDestroy(first);
    cudaStreamDestroy(second);
    cudaFree(p);
    return y == std::vector<float>(32, 31.0f);
}

static void test_missing_wait(void **)
{
    int right = 0;
    for (unsigned s = 0; s < SEEDS; s++) {
        emu_random().seed(s);
        assert_true(two_streams(true));
        right += two_streams(false);
    }
    assert_true(right < SEEDS);
}

/* Pinned memory is read when the copy runs, pageable memory at the call. */
static void test_memory_changed_too_early(void **)
{
    void *pinned;
    float pageable = 1.0f, *p = device<float>(2);
    assert_int_equal(cudaMallocHost(&pinned, sizeof(float)), cudaSuccess);
    *static_cast<float *>(pinned) = 1.0f;
    cudaMemcpyAsync(p, pinned, sizeof(float), cudaMemcpyHostToDevice, stream);
    cudaMemcpyAsync(p + 1, &pageable, sizeof(float), cudaMemcpyHostToDevice, stream);
    *static_cast<float *>(pinned) = pageable = 2.0f;
    const std::vector<float> y = host_of(p, 2);
    assert_true(y[0] == 2.0f && y[1] == 1.0f);
    cudaFreeHost(pinned);
    cudaFree(p);
}

static std::vector<float> steps(bool recorded)
{
    enum { STEPS = 4 };
    cudaStream_t own;
    cudaGraph_t graph;
    cudaGraphExec_t exec = nullptr;
    std::vector<float> y(32);
    float *p = device<float>(32);
    cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
    cudaMemsetAsync(p, 0, 32 * sizeof(float), own);
    if (recorded)
        assert_int_equal(cudaStreamBeginCapture(own, cudaStreamCaptureModeThreadLocal),
                         cudaSuccess);
    for (int i = 0; i < (recorded ? 1 : STEPS); i++)
        MD_LAUNCH(increment, 1, 32, 0, own, p);
    if (recorded) {
        assert_int_equal(cudaStreamSynchronize(own), cudaErrorStreamCaptureUnsupported);
        assert_int_equal(cudaStreamEndCapture(own, &graph), cudaSuccess);
        assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
        cudaGraphDestroy(graph);
        for (int i = 0; i < STEPS; i++)
            assert_int_equal(cudaGraphLaunch(exec, own), cudaSuccess);
        cudaGraphExecDestroy(exec);
        cudaGetLastError();
    }
    cudaMemcpyAsync(y.data(), p, 32 * sizeof(float), cudaMemcpyDeviceToHost, own);
    cudaStreamDestroy(own);
    cudaFree(p);
    return y;
}

static void test_recording(void **)
{
    const std::vector<float> direct = steps(false);
    assert_true(direct[0] == 15.0f);
    assert_true(steps(true) == direct);
}

static void test_settings(void **)
{
    void *p;
    int n;
    setenv("MD_EMU_MEMORY", "1000", 1);
    assert_int_equal(cudaMalloc(&p, 1001), cudaErrorMemoryAllocation);
    unsetenv("MD_EMU_MEMORY");
    setenv("MD_EMU_DEVICES", "0", 1);
    assert_int_equal(cudaGetDeviceCount(&n), cudaErrorNoDevice);
    setenv("MD_EMU_DEVICES", "-1", 1);
    assert_int_equal(cudaDriverGetVersion(&n), cudaSuccess);
    assert_int_equal(n, 0);
    unsetenv("MD_EMU_DEVICES");
    setenv("MD_EMU_FAIL", "malloc#2", 1);
    assert_int_equal(cudaMalloc(&p, 8), cudaSuccess);
    assert_int_equal(cudaFree(p), cudaSuccess);
    assert_int_equal(cudaMalloc(&p, 8), cudaErrorMemoryAllocation);
    unsetenv("MD_EMU_FAIL");
    cudaGetLastError();
}

/* A stream that joins a recording has to be waited for before it ends. */
static cudaError_t record_two(bool join, bool more)
{
    cudaStream_t one, two;
    cudaEvent_t fork, joined;
    cudaGraph_t graph = nullptr;
    void *block;
    assert_int_equal(cudaMalloc(&block, 64), cudaSuccess);
    assert_int_equal(cudaStreamCreateWithFlags(&one, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaStreamCreateWithFlags(&two, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming), cudaSuccess);
    assert_int_equal(cudaEventCreateWithFlags(&joined, cudaEventDisableTiming), cudaSuccess);
    cudaStreamBeginCapture(one, cudaStreamCaptureModeThreadLocal);
    cudaEventRecord(fork, one);
    cudaStreamWaitEvent(two, fork, 0);
    cudaMemsetAsync(block, 0, 64, two);
    if (join) {
        cudaEventRecord(joined, two);
        cudaStreamWaitEvent(one, joined, 0);
    }
    if (more)
        cudaMemsetAsync(block, 0, 64, two);
    const cudaError_t err = cudaStreamEndCapture(one, &graph);
    cudaGetLastError();
    cudaGraphDestroy(graph);
    cudaEventDestroy(fork);
    cudaEventDestroy(joined);
    cudaStreamDestroy(two);
    cudaStreamDestroy(one);
    cudaFree(block);
    return err;
}

static void test_recordings_of_two_streams(void **)
{
    assert_int_equal(record_two(true, false), cudaSuccess);
    assert_int_not_equal(record_two(false, false), cudaSuccess);
    assert_int_not_equal(record_two(true, true), cudaSuccess);
}

int main()
{
    if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_missing_barrier),
        cmocka_unit_test(test_place_used_again_too_early),
        cmocka_unit_test(test_overrun_of_shared_memory),
        cmocka_unit_test(test_divergence),
        cmocka_unit_test(test_tensor_cores),
        cmocka_unit_test(test_asynchronous_copies),
        cmocka_unit_test(test_bad_launches),
        cmocka_unit_test(test_missing_wait),
        cmocka_unit_test(test_memory_changed_too_early),
        cmocka_unit_test(test_recordings_of_two_streams),
        cmocka_unit_test(test_recording),
        cmocka_unit_test(test_settings),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}
