/* comm_nccl: see comm_nccl.h.
 *
 * Collectives run on a stream of their own. An event ties it to the stream of the ops on both
 * sides: the collective waits for what was issued before it, and ops issued after a blocking form
 * or a wait wait for the collective. NCCL runs in its non-blocking mode, where a call may return
 * before it has done its part on the host; then it is asked until it has. Whenever the host waits
 * for the GPU, the backend asks this group whether it still works, so that a lost peer ends the
 * wait. The order of a sum is NCCL's: the same for the same group, length and machine. */
#include "mpi/comm_nccl.h"

#include <cuda_runtime.h>
#include <nccl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "kernels/cuda/cuda_backend.h"
#include "mpi/agree.h"
#include "mpi/comm_ops.h"
#include "src/watchdog.h"

#define CONNECT_SECONDS 300.0 /* for all ranks of a group to find each other */
#define LEAVE_SECONDS   30.0

/* A collective under way: its end on the stream. */
typedef struct nccl_work {
    struct nccl_work *next;
    cudaEvent_t done;
} nccl_work;

typedef struct nccl_comm {
    md_comm base;
    md_comm *boot; /* the same ranks on the host */
    bool owns_boot, watches;
    md_backend *be;
    ncclComm_t handle;
    cudaStream_t stream; /* of the collectives */
    cudaEvent_t before, after;
    nccl_work *idle;
} nccl_comm;

static nccl_comm *nccl_of(md_comm *c)
{
    return (nccl_comm *)c;
}

static cudaStream_t ops_stream(const nccl_comm *g)
{
    return (cudaStream_t)md_cuda_stream(g->be);
}

/* ---- failing ---- */

static md_status nccl_ok(ncclResult_t r, const char *what)
{
    if (r == ncclSuccess)
        return MD_OK;
    const char *more = ncclGetLastError(NULL);
    MD_FAIL(MD_ERR_DEVICE, "NCCL: %s: %s%s%s", what, ncclGetErrorString(r),
            more && *more ? ": " : "", more ? more : "");
}

static md_status gpu_ok(cudaError_t err, const char *what)
{
    if (err != cudaSuccess)
        MD_FAIL(MD_ERR_DEVICE, "%s: %s", what, cudaGetErrorString(err));
    return MD_OK;
}

#define GPU_TRY(call) MD_TRY(gpu_ok((call), #call))

/* Ends the job; the kernels that still wait for a lost peer are let go first. */
MD_NORETURN static void die(nccl_comm *g, const char *what)
{
    char why[512];
    snprintf(why, sizeof why, "%s", md_error_text());
    if (g->handle)
        ncclCommAbort(g->handle);
    g->handle = NULL;
    md_comm_die(&g->base, what, why);
}

/* Asks until NCCL has done what it was asked for, at most so many seconds (0: any number). */
static ncclResult_t settle(ncclComm_t handle, ncclResult_t r, double seconds)
{
    const struct timespec pause = {0, 50000};
    const double begun = md_now();
    while (r == ncclInProgress) {
        const ncclResult_t asked = ncclCommGetAsyncError(handle, &r);
        if (asked != ncclSuccess)
            return asked;
        const double waited = md_now() - begun;
        if (r == ncclInProgress && seconds > 0.0 && waited > seconds)
            return ncclInProgress;
        if (r == ncclInProgress && waited > 1e-3)
            nanosleep(&pause, NULL);
    }
    return r;
}

/* Called by the backend while the host waits for the GPU. */
static md_status look(void *context)
{
    nccl_comm *g = context;
    ncclResult_t state = ncclSuccess;
    ncclResult_t r = ncclCommGetAsyncError(g->handle, &state);
    if (r == ncclSuccess && (state == ncclSuccess || state == ncclInProgress))
        return MD_OK;
    nccl_ok(r == ncclSuccess ? state : r, "while the GPU works");
    die(g, "NCCL");
}

/* ---- collectives ---- */

static ncclDataType_t type_of(md_dtype dtype)
{
    static const ncclDataType_t types[] = {
        [MD_F32] = ncclFloat32, [MD_BF16] = ncclBfloat16, [MD_F64] = ncclFloat64,
        [MD_I32] = ncclInt32,   [MD_I64] = ncclInt64,     [MD_U8] = ncclUint8,
        [MD_F16] = ncclFloat16};
    MD_ASSERT((size_t)dtype < MD_COUNT(types), "type %d", (int)dtype);
    return types[dtype];
}

static ncclRedOp_t op_of(md_reduce op)
{
    return op == MD_SUM ? ncclSum : op == MD_MAX_OP ? ncclMax : ncclMin;
}

static void must_gpu(nccl_comm *g, cudaError_t err, const char *what)
{
    if (gpu_ok(err, what) != MD_OK)
        die(g, what);
}

/* What follows on the collectives' stream waits for the ops issued so far. */
static void enter(nccl_comm *g)
{
    must_gpu(g, cudaEventRecord(g->before, ops_stream(g)), "cudaEventRecord");
    must_gpu(g, cudaStreamWaitEvent(g->stream, g->before, 0), "cudaStreamWaitEvent");
}

/* The collective has been issued, or r says why not. */
static void issued(nccl_comm *g, ncclResult_t r, const char *what)
{
    if (nccl_ok(settle(g->handle, r, 0.0), what) != MD_OK)
        die(g, what);
}

/* Ops issued from now on wait for the collectives issued so far. */
static void leave(nccl_comm *g)
{
    must_gpu(g, cudaEventRecord(g->after, g->stream), "cudaEventRecord");
    must_gpu(g, cudaStreamWaitEvent(ops_stream(g), g->after, 0), "cudaStreamWaitEvent");
}

/* Each is issued behind the ops so far; what comes then makes it blocking or begun. */
static void sum(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op)
{
    nccl_comm *g = nccl_of(c);
    enter(g);
    issued(g, ncclAllReduce(buf, buf, (size_t)n, type_of(dtype), op_of(op), g->handle, g->stream),
           "all-reduce");
}

static void gather(md_comm *c, const void *send, void *recv, int64_t bytes)
{
    nccl_comm *g = nccl_of(c);
    enter(g);
    issued(g, ncclAllGather(send, recv, (size_t)bytes, ncclUint8, g->handle, g->stream),
           "all-gather");
}

static void scatter(md_comm *c, const void *send, void *recv, int64_t n, md_dtype dtype)
{
    nccl_comm *g = nccl_of(c);
    const size_t part = (size_t)(n / c->size);
    enter(g);
    issued(g, ncclReduceScatter(send, recv, part, type_of(dtype), ncclSum, g->handle, g->stream),
           "reduce-scatter");
}

static void nccl_bcast(md_comm *c, void *buf, int64_t bytes, int root)
{
    nccl_comm *g = nccl_of(c);
    enter(g);
    issued(g, ncclBroadcast(buf, buf, (size_t)bytes, ncclUint8, root, g->handle, g->stream),
           "broadcast");
    leave(g);
}

static void nccl_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op)
{
    sum(c, buf, n, dtype, op);
    leave(nccl_of(c));
}

static void nccl_allgather(md_comm *c, const void *send, void *recv, int64_t bytes)
{
    gather(c, send, recv, bytes);
    leave(nccl_of(c));
}

static void nccl_reduce_scatter(md_comm *c, const void *send, void *recv, int64_t n, md_dtype dtype)
{
    scatter(c, send, recv, n, dtype);
    leave(nccl_of(c));
}

/* ---- collectives under way ---- */

static md_status work_make(nccl_comm *g)
{
    nccl_work *w;
    MD_NEW(w, 1, "collective");
    md_status st = gpu_ok(cudaEventCreateWithFlags(&w->done, cudaEventDisableTiming),
                          "cudaEventCreateWithFlags");
    if (st != MD_OK) {
        md_free(w);
        return st;
    }
    w->next = g->idle;
    g->idle = w;
    return MD_OK;
}

static md_status nccl_reserve(md_comm *c, size_t bytes, int requests)
{
    nccl_comm *g = nccl_of(c);
    int have = 0;
    (void)bytes;
    for (const nccl_work *w = g->idle; w; w = w->next)
        have++;
    for (; have < requests; have++)
        MD_TRY(work_make(g));
    return MD_OK;
}

static void begun(nccl_comm *g, md_comm_request *req)
{
    if (!g->idle && work_make(g) != MD_OK)
        die(g, "a collective");
    nccl_work *w = g->idle;
    g->idle = w->next;
    must_gpu(g, cudaEventRecord(w->done, g->stream), "cudaEventRecord");
    req->work = w;
}

static void nccl_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                                 md_comm_request *req)
{
    sum(c, buf, n, dtype, op);
    begun(nccl_of(c), req);
}

static void nccl_allgather_begin(md_comm *c, void *buf, int64_t bytes, md_comm_request *req)
{
    gather(c, (const char *)buf + c->rank * bytes, buf, bytes);
    begun(nccl_of(c), req);
}

static void nccl_reduce_scatter_begin(md_comm *c, const void *send, void *recv, int64_t n,
                                      md_dtype dtype, md_comm_request *req)
{
    scatter(c, send, recv, n, dtype);
    begun(nccl_of(c), req);
}

static bool nccl_poll(md_comm *c, md_comm_request *req)
{
    nccl_comm *g = nccl_of(c);
    const nccl_work *w = req->work;
    if (!w)
        return true;
    const cudaError_t err = cudaEventQuery(w->done);
    if (err != cudaErrorNotReady)
        must_gpu(g, err, "a collective");
    else
        look(g);
    return err == cudaSuccess;
}

static void nccl_wait(md_comm *c, md_comm_request *req)
{
    nccl_comm *g = nccl_of(c);
    nccl_work *w = req->work;
    if (!w)
        return;
    must_gpu(g, cudaStreamWaitEvent(ops_stream(g), w->done, 0), "cudaStreamWaitEvent");
    w->next = g->idle;
    g->idle = w;
    req->work = NULL;
}

/* ---- what goes over the host ---- */

static void nccl_barrier(md_comm *c)
{
    nccl_comm *g = nccl_of(c);
    if (md_backend_sync(g->be) != MD_OK)
        die(g, "barrier");
    g->boot->ops->barrier(g->boot);
}

static int64_t nccl_exscan(md_comm *c, int64_t value)
{
    return nccl_of(c)->boot->ops->exscan(nccl_of(c)->boot, value);
}

static md_status nccl_shared(md_comm *c, size_t bytes, void **out)
{
    (void)c, (void)bytes, (void)out;
    MD_ASSERT(false, "operands of a backend are not shared");
    return MD_ERR_BUG;
}

/* ---- making and freeing ---- */

/* Local part of freeing; what was never made is NULL. */
static void release(nccl_comm *g)
{
    if (g->watches)
        md_cuda_unwatch(g->be, g);
    while (g->idle) {
        nccl_work *w = g->idle;
        g->idle = w->next;
        cudaEventDestroy(w->done);
        md_free(w);
    }
    if (g->before)
        cudaEventDestroy(g->before);
    if (g->after)
        cudaEventDestroy(g->after);
    if (g->stream)
        cudaStreamDestroy(g->stream);
    if (g->owns_boot)
        md_comm_free(g->boot);
    md_free(g);
}

static void nccl_free(md_comm *c)
{
    nccl_comm *g = nccl_of(c);
    ncclResult_t r = settle(g->handle, ncclCommFinalize(g->handle), LEAVE_SECONDS);
    if (r == ncclSuccess)
        ncclCommDestroy(g->handle);
    else
        ncclCommAbort(g->handle);
    release(g);
}

static md_status nccl_split(md_comm *c, int colour, int key, md_comm **out);
static md_status nccl_split_node(md_comm *c, md_comm **out);

static const md_comm_ops nccl_ops = {
    .name = "nccl",
    .free = nccl_free,
    .split = nccl_split,
    .split_node = nccl_split_node,
    .barrier = nccl_barrier,
    .allreduce = nccl_allreduce,
    .bcast = nccl_bcast,
    .allgather = nccl_allgather,
    .reduce_scatter = nccl_reduce_scatter,
    .exscan = nccl_exscan,
    .allreduce_begin = nccl_allreduce_begin,
    .allgather_begin = nccl_allgather_begin,
    .reduce_scatter_begin = nccl_reduce_scatter_begin,
    .reserve = nccl_reserve,
    .poll = nccl_poll,
    .wait = nccl_wait,
    .shared = nccl_shared,
};

/* Local: all of a group but its connection. Collectives go first where both could run: others wait
 * for them. */
static md_status make(md_comm *boot, md_backend *be, nccl_comm **out)
{
    int least, most;
    nccl_comm *g;
    MD_NEW(g, 1, "communicator");
    g->base = (md_comm){.ops = &nccl_ops, .rank = boot->rank, .size = boot->size};
    g->boot = boot;
    g->be = be;
    *out = g;
    GPU_TRY(cudaDeviceGetStreamPriorityRange(&least, &most));
    GPU_TRY(cudaStreamCreateWithPriority(&g->stream, cudaStreamNonBlocking, most));
    GPU_TRY(cudaEventCreateWithFlags(&g->before, cudaEventDisableTiming));
    GPU_TRY(cudaEventCreateWithFlags(&g->after, cudaEventDisableTiming));
    return MD_OK;
}

/* Collective(boot): the ranks agree on whether all are connected. */
static md_status finish(nccl_comm *g, md_status st, md_comm **out)
{
    st = md_agree(g->boot, st);
    if (st == MD_OK && (st = md_cuda_watch(g->be, look, g)) == MD_OK) {
        g->watches = true;
        *out = &g->base;
        return MD_OK;
    }
    if (g->handle)
        ncclCommAbort(g->handle);
    release(g);
    return st;
}

static md_status connected(ncclResult_t r, const char *what)
{
    if (r == ncclInProgress)
        MD_FAIL(MD_ERR_DEVICE, "NCCL: %s: not all ranks answered within %.0f s", what,
                CONNECT_SECONDS);
    return nccl_ok(r, what);
}

/* Takes over boot, also on failure. Collective(c). */
static md_status split_over(md_comm *c, md_comm *boot, int colour, int key, md_comm **out)
{
    nccl_comm *parent = nccl_of(c), *g = NULL;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    md_status st = md_agree(parent->boot, make(boot, parent->be, &g));
    if (st != MD_OK) {
        if (g)
            release(g);
        md_comm_free(boot);
        return st;
    }
    g->owns_boot = true;
    config.blocking = 0;
    ncclResult_t r = ncclCommSplit(parent->handle, colour, key, &g->handle, &config);
    r = settle(parent->handle, r, CONNECT_SECONDS);
    if (r == ncclSuccess && g->handle)
        r = settle(g->handle, ncclInProgress, CONNECT_SECONDS);
    return finish(g, connected(r, "splitting a group"), out);
}

static md_status nccl_split(md_comm *c, int colour, int key, md_comm **out)
{
    md_comm *boot;
    MD_TRY(md_comm_split(nccl_of(c)->boot, colour, key, &boot));
    return split_over(c, boot, colour, key, out);
}

static md_status nccl_split_node(md_comm *c, md_comm **out)
{
    md_comm *boot;
    int64_t first = c->rank; /* of the ranks of this node */
    MD_TRY(md_comm_split_node(nccl_of(c)->boot, &boot));
    md_comm_allreduce(boot, &first, 1, MD_I64, MD_MIN_OP);
    return split_over(c, boot, (int)first, c->rank, out);
}

static md_status look_up(int *nccl, int *runtime, int *capability)
{
    int device, major, minor;
    MD_TRY(nccl_ok(ncclGetVersion(nccl), "ncclGetVersion"));
    GPU_TRY(cudaRuntimeGetVersion(runtime));
    GPU_TRY(cudaGetDevice(&device));
    GPU_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    GPU_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    *capability = 10 * major + minor;
    return MD_OK;
}

static md_status same_everywhere(md_comm *boot)
{
    int nccl = 0, runtime = 0, capability = 0;
    MD_TRY(md_agree(boot, look_up(&nccl, &runtime, &capability)));
    MD_TRY(md_agree_same(boot, "NCCL's version", nccl));
    MD_TRY(md_agree_same(boot, "the version of CUDA's runtime", runtime));
    return md_agree_same(boot, "ten times the GPU's compute capability", capability);
}

md_status md_comm_nccl(md_comm *boot, md_backend *be, md_comm **out)
{
    nccl_comm *g = NULL;
    ncclUniqueId id;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    MD_TRY(same_everywhere(boot));
    memset(&id, 0, sizeof id);
    config.blocking = 0;
    md_status st = make(boot, be, &g);
    if (st == MD_OK && boot->rank == 0)
        st = nccl_ok(ncclGetUniqueId(&id), "ncclGetUniqueId");
    st = md_agree(boot, st);
    if (st != MD_OK) {
        if (g)
            release(g);
        return st;
    }
    md_comm_bcast(boot, &id, sizeof id, 0);
    const char *was = md_phase("comm.connect");
    ncclResult_t r = ncclCommInitRankConfig(&g->handle, boot->size, id, boot->rank, &config);
    r = settle(g->handle, r, CONNECT_SECONDS);
    md_phase(was);
    return finish(g, connected(r, "connecting the ranks"), out);
}
