/* cuda_backend: the table of the cuda backend, its device, streams and memory.
 *
 * One stream runs the ops in the order of issue; one op runs half of itself on a side stream, and
 * is done when both are. Another one copies input, tied to the first by events both ways. The host
 * waits in md_backend_sync and feed_wait only, and there it asks again and again instead of
 * blocking inside the driver, so that a lost peer or a failed kernel ends the wait and the watchdog
 * sees what is waited for. */
#include "kernels/cuda/cuda_state.h"
#include "src/watchdog.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

static const md_op_table table = {
#define CUDA_ENTRY(op) cuda_##op,
    MD_OPS(CUDA_ENTRY)
#undef CUDA_ENTRY
};

/* ---- errors ---- */

md_status cuda_ok(cudaError_t err, const char *what)
{
    if (err == cudaSuccess)
        return MD_OK;
    MD_FAIL(err == cudaErrorMemoryAllocation ? MD_ERR_MEMORY : MD_ERR_DEVICE, "%s: %s", what,
            cudaGetErrorString(err));
}

md_status cuda_launched(md_op op)
{
    return cuda_ok(cudaGetLastError(), md_op_name(op));
}

#define CUDA_TRY(call) MD_TRY(cuda_ok((call), #call))

cudaStream_t cuda_stream(const md_backend *be)
{
    return cuda_state_of(be)->stream;
}

void *md_cuda_stream(const md_backend *be)
{
    return cuda_stream(be);
}

md_status cuda_scratch(const md_backend *be, md_op op, size_t need, void **scratch)
{
    if (be->scratch_size < need)
        MD_FAIL(MD_ERR_BUG, "%s needs %zu bytes of scratch but the backend was given %zu",
                md_op_name(op), need, be->scratch_size);
    *scratch = be->scratch;
    return MD_OK;
}

static size_t cuda_scratch_bytes(md_backend *be, md_op op, const md_operands *a)
{
    switch ((int)op) {
#define CUDA_CASE(op) \
    case MD_OP_##op:  \
        return cuda_##op##_scratch(be, (const md_##op##_args *)(const void *)a);
        CUDA_OPS_WITH_SCRATCH(CUDA_CASE)
#undef CUDA_CASE
    default:
        return 0;
    }
}

/* ---- waiting ---- */

static void rest(double waited)
{
    /* Short waits spin: a step ends within microseconds of the last kernel. */
    const struct timespec pause = {0, waited < 1e-2 ? 20000 : 200000};
    if (waited > 2e-4)
        nanosleep(&pause, NULL);
}

/* Asks until the answer is not "not ready", and the watchers whether all is well. */
static md_status wait_for(cuda_state *s, cudaError_t (*ask)(cuda_state *s, int slot), int slot)
{
    /* A GPU whose work waits for other ranks is one more way to wait for them. */
    const char *was = md_phase(s->watchers > 0 ? "comm.gpu" : "cuda.sync");
    const double begun = md_now();
    md_status st = md_fault("cuda.sync")
                       ? md_error_set(MD_ERR_DEVICE, "waiting for the GPU: injected fault")
                       : MD_OK;
    cudaError_t err = cudaErrorNotReady;
    while (st == MD_OK && (err = ask(s, slot)) == cudaErrorNotReady) {
        for (int i = 0; i < s->watchers && st == MD_OK; i++)
            st = s->watcher[i].look(s->watcher[i].context);
        rest(md_now() - begun);
    }
    md_phase(was);
    return st != MD_OK ? st : cuda_ok(err, "waiting for the GPU");
}

static cudaError_t ask_stream(cuda_state *s, int slot)
{
    (void)slot;
    return cudaStreamQuery(s->stream);
}

static cudaError_t ask_fed(cuda_state *s, int slot)
{
    return cudaEventQuery(s->fed[slot]);
}

static md_status cuda_sync(md_backend *be)
{
    return wait_for(cuda_state_of(be), ask_stream, 0);
}

md_status md_cuda_watch(md_backend *be, md_status (*look)(void *context), void *context)
{
    cuda_state *s = cuda_state_of(be);
    MD_ASSERT(s->watchers < CUDA_WATCHERS);
    s->watcher[s->watchers++] = {look, context};
    return MD_OK;
}

void md_cuda_unwatch(md_backend *be, void *context)
{
    cuda_state *s = cuda_state_of(be);
    for (int i = 0; i < s->watchers; i++)
        if (s->watcher[i].context == context)
            s->watcher[i--] = s->watcher[--s->watchers];
}

/* ---- memory ---- */

static md_status cuda_alloc(md_backend *be, size_t bytes, void **out)
{
    cuda_state *s = cuda_state_of(be);
    const size_t size = bytes ? bytes : 16;
    cudaError_t err = md_fault("cuda.alloc") ? cudaErrorMemoryAllocation : cudaMalloc(out, size);
    if (err == cudaErrorMemoryAllocation) {
        size_t left = 0, total = 0;
        cudaGetLastError(); /* the error is told here */
        cudaMemGetInfo(&left, &total);
        MD_FAIL(MD_ERR_MEMORY, "%.3f GiB do not fit on %s, which has %.2f of %.2f GiB left",
                (double)bytes / 1073741824.0, be->device, (double)left / 1073741824.0,
                (double)total / 1073741824.0);
    }
    MD_TRY(cuda_ok(err, "cudaMalloc"));
    CUDA_TRY(cudaMemsetAsync(*out, 0, size, s->stream));
    return MD_OK;
}

static void cuda_free(md_backend *be, void *p)
{
    (void)be;
    cudaFree(p);
}

static md_status cuda_pinned(md_backend *be, size_t bytes, void **out)
{
    (void)be;
    CUDA_TRY(cudaMallocHost(out, bytes ? bytes : 16));
    memset(*out, 0, bytes);
    return MD_OK;
}

static void cuda_pinned_free(md_backend *be, void *p)
{
    (void)be;
    cudaFreeHost(p);
}

static md_status cuda_upload(md_backend *be, void *dst, const void *src, size_t bytes)
{
    CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, cuda_stream(be)));
    return MD_OK;
}

static md_status cuda_download(md_backend *be, void *dst, const void *src, size_t bytes)
{
    CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, cuda_stream(be)));
    return MD_OK;
}

static md_status cuda_feed_wait(md_backend *be, int slot)
{
    cuda_state *s = cuda_state_of(be);
    return s->was_fed[slot] ? wait_for(s, ask_fed, slot) : MD_OK;
}

static md_status cuda_feed(md_backend *be, int slot, void *dst, const void *src, size_t bytes)
{
    cuda_state *s = cuda_state_of(be);
    if (!s->was_used[slot]) /* dst was zeroed on the other stream */
        CUDA_TRY(cudaEventRecord(s->used[slot], s->stream));
    CUDA_TRY(cudaStreamWaitEvent(s->copy, s->used[slot], 0));
    CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, s->copy));
    CUDA_TRY(cudaEventRecord(s->fed[slot], s->copy));
    s->was_fed[slot] = true;
    CUDA_TRY(cudaStreamWaitEvent(s->stream, s->fed[slot], 0));
    return MD_OK;
}

static md_status cuda_feed_used(md_backend *be, int slot)
{
    cuda_state *s = cuda_state_of(be);
    CUDA_TRY(cudaEventRecord(s->used[slot], s->stream));
    s->was_used[slot] = true;
    return MD_OK;
}

/* ---- recordings ---- */

struct md_recording {
    cudaGraphExec_t exec;
};

static md_status cuda_record_begin(md_backend *be)
{
    CUDA_TRY(cudaStreamBeginCapture(cuda_stream(be), cudaStreamCaptureModeThreadLocal));
    return MD_OK;
}

static void cuda_record_free(md_backend *be, md_recording *r)
{
    (void)be;
    if (r->exec)
        cudaGraphExecDestroy(r->exec);
    md_free(r);
}

static md_status cuda_record_end(md_backend *be, md_recording **out)
{
    cudaGraph_t graph;
    CUDA_TRY(cudaStreamEndCapture(cuda_stream(be), &graph));
    md_recording *r = static_cast<md_recording *>(md_alloc(sizeof *r, "recording"));
    md_status st = r ? cuda_ok(cudaGraphInstantiate(&r->exec, graph, 0), "cudaGraphInstantiate")
                     : MD_ERR_MEMORY;
    cudaGraphDestroy(graph);
    if (st != MD_OK && r)
        md_free(r);
    MD_TRY(st);
    *out = r;
    return MD_OK;
}

static md_status cuda_replay(md_backend *be, md_recording *r)
{
    CUDA_TRY(cudaGraphLaunch(r->exec, cuda_stream(be)));
    return MD_OK;
}

static const md_memory_ops memory = {
    cuda_alloc,        cuda_free,       cuda_pinned,    cuda_pinned_free, cuda_upload,
    cuda_download,     cuda_feed,       cuda_feed_wait, cuda_feed_used,   cuda_sync,
    cuda_record_begin, cuda_record_end, cuda_replay,    cuda_record_free};

static const md_tuning_ops tuning = {cuda_gemm_tune, cuda_gemm_write, cuda_gemm_read};

/* ---- the device ---- */

/* Multiprocessors of an H100 SXM, for which plans are made. */
#define PLANNED_SMS 132

int cuda_sms(const md_backend *be)
{
    return cuda_state_of(be)->sms;
}

#define REMEDY "; backend = \"cpu\" runs without a GPU"

/* With several GPUs in sight the ranks of a node take one each; with one, this rank was given it,
 * alone or to share. */
static md_status choose_device(const md_backend_args *args, int *device)
{
    int count = 0, driver = 0, runtime = 0;
    cudaRuntimeGetVersion(&runtime);
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        MD_FAIL(MD_ERR_CONFIG, "backend \"cuda\": no NVIDIA driver is loaded on this host" REMEDY);
    cudaError_t err = cudaGetDeviceCount(&count);
    if (err != cudaSuccess || count == 0)
        MD_FAIL(
            MD_ERR_CONFIG,
            "backend \"cuda\": no GPU can be used (%s; driver for CUDA %d.%d, program made with "
            "%d.%d)" REMEDY,
            cudaGetErrorString(err), driver / 1000, driver % 1000 / 10, runtime / 1000,
            runtime % 1000 / 10);
    if (count > 1 && args->node_rank >= count)
        MD_FAIL(MD_ERR_CONFIG,
                "backend \"cuda\": rank %d of the node's %d finds %d GPUs: start at most that many "
                "ranks on a node, or show each rank its own (CUDA_VISIBLE_DEVICES)" REMEDY,
                args->node_rank, args->node_size, count);
    *device = count > 1 ? args->node_rank : 0;
    return cuda_ok(cudaSetDevice(*device), "cudaSetDevice");
}

static md_status describe_device(md_backend *be, int device)
{
    cudaDeviceProp prop;
    char pci[32];
    CUDA_TRY(cudaGetDeviceProperties(&prop, device));
    CUDA_TRY(cudaDeviceGetPCIBusId(pci, (int)sizeof pci, device));
    const char *name = strncmp(prop.name, "NVIDIA ", 7) == 0 ? prop.name + 7 : prop.name;
    snprintf(be->device, sizeof be->device, "%.40s %.20s", name, pci);
    if (prop.major < 8)
        MD_FAIL(MD_ERR_CONFIG,
                "backend \"cuda\": %s has compute capability %d.%d, and 8.0 is needed" REMEDY,
                be->device, prop.major, prop.minor);
    return MD_OK;
}

static md_status open_device(md_backend *be, cuda_state *s, const md_backend_args *args)
{
    MD_TRY(choose_device(args, &s->device));
    MD_TRY(describe_device(be, s->device));
    CUDA_TRY(cudaDeviceGetAttribute(&s->sms, cudaDevAttrMultiProcessorCount, s->device));
    CUDA_TRY(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    CUDA_TRY(cudaStreamCreateWithFlags(&s->side, cudaStreamNonBlocking));
    CUDA_TRY(cudaStreamCreateWithFlags(&s->copy, cudaStreamNonBlocking));
    int count;
    size_t left, total;
    CUDA_TRY(cudaGetDeviceCount(&count));
    CUDA_TRY(cudaMemGetInfo(&left, &total));
    be->device_bytes = count > 1 || args->node_size <= 1 ? left : 0;
    CUDA_TRY(cudaEventCreateWithFlags(&s->fork, cudaEventDisableTiming));
    CUDA_TRY(cudaEventCreateWithFlags(&s->join, cudaEventDisableTiming));
    for (int i = 0; i < MD_FEED_SLOTS; i++) {
        CUDA_TRY(cudaEventCreateWithFlags(&s->fed[i], cudaEventDisableTiming));
        CUDA_TRY(cudaEventCreateWithFlags(&s->used[i], cudaEventDisableTiming));
    }
    MD_TRY(cuda_attn_setup());
    MD_TRY(cuda_norm_setup());
    return cuda_gemm_open(s);
}

static void cuda_destroy(md_backend *be)
{
    cuda_state *s = cuda_state_of(be);
    if (s->stream)
        cudaStreamSynchronize(s->stream);
    if (s->side)
        cudaStreamSynchronize(s->side);
    cuda_gemm_close(s);
    for (int i = 0; i < MD_FEED_SLOTS; i++) {
        if (s->fed[i])
            cudaEventDestroy(s->fed[i]);
        if (s->used[i])
            cudaEventDestroy(s->used[i]);
    }
    cudaEvent_t const tie[] = {s->fork, s->join};
    for (size_t i = 0; i < MD_COUNT(tie); i++)
        if (tie[i])
            cudaEventDestroy(tie[i]);
    cudaStream_t const stream[] = {s->copy, s->side, s->stream};
    for (size_t i = 0; i < MD_COUNT(stream); i++)
        if (stream[i])
            cudaStreamDestroy(stream[i]);
    md_free(s);
}

md_status md_cuda_create(const md_backend_args *args, md_backend **out)
{
    cuda_state *s = static_cast<cuda_state *>(md_alloc(sizeof *s, "cuda backend"));
    if (!s)
        return MD_ERR_MEMORY;
    md_backend *be = &s->base;
    be->name = "cuda";
    be->ops = &table;
    be->memory = &memory;
    be->scratch_bytes = cuda_scratch_bytes;
    be->destroy = cuda_destroy;
    be->threads = args->threads;
    be->tuning = args->planning ? NULL : &tuning;
    s->planning = args->planning;
    s->sms = PLANNED_SMS;
    md_status st = args->planning ? MD_OK : open_device(be, s, args);
    if (st != MD_OK) {
        cuda_destroy(be);
        return st;
    }
    *out = be;
    return MD_OK;
}
