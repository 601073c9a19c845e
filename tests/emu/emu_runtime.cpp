/* emu_runtime: CUDA's runtime on the CPU, for tests. Streams are lazy: what is put on them runs
 * when the host waits or asks, and which stream goes on is drawn at random, so that a wait that was
 * left out gives wrong results. Memory of the device is the heap's, filled with 0xff (NaNs), of
 * exact size, so that AddressSanitizer sees what goes beyond it. Copies from pinned memory read
 * their source when they run; the destination of a download is spoiled until then. */
#include "tests/emu/emu_runtime.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <vector>

struct emu_graph {
    std::vector<emu_work> work;
};

/* A stream that waits for an event of a recording is recorded too, until that ends; it must have
 * been waited for by then. */
struct emu_stream {
    std::deque<emu_work> work;
    emu_graph *recording;
    bool joined_in;
    uint64_t queued, awaited; /* work, and how much of it was waited for */
};

struct emu_event {
    emu_stream *stream;
    emu_graph *graph;           /* whose recording the last record is part of, */
    uint64_t behind;            /* and how much of its stream's work it is behind */
    uint64_t recorded, reached; /* times */
    double when;                /* of the last one reached, in seconds */
};

namespace
{

std::vector<emu_stream *> streams;
std::map<char *, size_t> device_memory, pinned_memory;
size_t in_use;

size_t memory_limit()
{
    return (size_t)emu_environment("MD_EMU_MEMORY", 8l << 30);
}

double seconds()
{
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(now).count();
}

bool within(const std::map<char *, size_t> &blocks, const void *p)
{
    auto block = blocks.upper_bound(static_cast<char *>(const_cast<void *>(p)));
    if (block == blocks.begin())
        return false;
    --block;
    return p < block->first + block->second;
}

/* While a stream records, CUDA takes no call that waits or allocates. */
bool records(const emu_stream *one)
{
    bool any = one && one->recording;
    for (const emu_stream *s : streams)
        any |= !one && s->recording;
    return any;
}

/* Asks `done` between steps; where nothing is left to run it has to hold. */
template <class F> void run_until(F done)
{
    while (!done())
        if (!emu_step()) {
            std::fprintf(stderr, "emulated CUDA: waits for what nobody will do\n");
            std::abort();
        }
}

} // namespace

void emu_queue(cudaStream_t stream, emu_work work)
{
    stream->queued++;
    if (stream->recording)
        stream->recording->work.push_back(std::move(work));
    else
        stream->work.push_back(std::move(work));
}

bool emu_step()
{
    std::vector<emu_stream *> ready;
    for (emu_stream *s : streams)
        if (!s->work.empty())
            ready.push_back(s);
    if (ready.empty())
        return false;
    emu_stream *s = ready[emu_random()() % ready.size()];
    for (unsigned burst = 1 + emu_random()() % 8; burst > 0 && !s->work.empty(); burst--) {
        emu_work work = s->work.front(); /* it may put more on the stream */
        if (!work())
            break;
        s->work.pop_front();
    }
    return true;
}

/* ---- memory ---- */

cudaError_t cudaMemGetInfo(size_t *left, size_t *total)
{
    *total = memory_limit();
    *left = *total - in_use;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    *out = nullptr;
    if (records(nullptr))
        return emu_fail(cudaErrorStreamCaptureUnsupported);
    if (in_use + bytes > memory_limit() || emu_fails("malloc") ||
        posix_memalign(out, 256, bytes) != 0)
        return emu_fail(cudaErrorMemoryAllocation);
    std::memset(*out, 0xff, bytes);
    device_memory[static_cast<char *>(*out)] = bytes;
    in_use += bytes;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    if (records(nullptr))
        return emu_fail(cudaErrorStreamCaptureUnsupported);
    const auto block = device_memory.find(static_cast<char *>(p));
    if (!p)
        return cudaSuccess;
    if (block == device_memory.end())
        return emu_fail(cudaErrorInvalidValue);
    while (emu_step())
        ;
    in_use -= block->second;
    device_memory.erase(block);
    std::free(p);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **out, size_t bytes)
{
    if (emu_fails("pinned") || posix_memalign(out, 256, bytes) != 0)
        return emu_fail(cudaErrorMemoryAllocation);
    pinned_memory[static_cast<char *>(*out)] = bytes;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p)
{
    if (p && !pinned_memory.erase(static_cast<char *>(p)))
        return emu_fail(cudaErrorInvalidValue);
    while (emu_step())
        ;
    std::free(p);
    return cudaSuccess;
}

/* Pinned memory that copies to the device, issued and not run yet, will read. */
static std::list<std::pair<const char *, size_t>> uploads;

static bool awaited(const void *p, size_t bytes)
{
    const char *first = static_cast<const char *>(p);
    for (const auto &u : uploads)
        if (first < u.first + u.second && u.first < first + bytes)
            return true;
    return false;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    const bool up = kind == cudaMemcpyHostToDevice, down = kind == cudaMemcpyDeviceToHost;
    if (bytes == 0)
        return cudaSuccess;
    if (within(device_memory, src) == up || within(device_memory, dst) == down ||
        emu_fails("memcpy"))
        return emu_fail(cudaErrorInvalidValue);
    if (up && !within(pinned_memory, src)) {
        const char *from = static_cast<const char *>(src);
        const std::vector<char> now(from, from + bytes);
        emu_queue(stream, [=] {
            std::memcpy(dst, now.data(), bytes);
            return true;
        });
        return cudaSuccess;
    }
    /* What a download brings is there when it has run, not before; but what an upload issued
     * earlier still has to read stays. */
    if (down && !awaited(dst, bytes))
        std::memset(dst, 0xff, bytes);
    if (up)
        uploads.push_back({static_cast<const char *>(src), bytes});
    emu_queue(stream, [=] {
        std::memcpy(dst, src, bytes);
        if (up)
            uploads.erase(std::find(uploads.begin(), uploads.end(),
                                    std::make_pair(static_cast<const char *>(src), bytes)));
        return true;
    });
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *dst, int value, size_t bytes, cudaStream_t stream)
{
    emu_queue(stream, [=] {
        std::memset(dst, value, bytes);
        return true;
    });
    return cudaSuccess;
}

/* ---- streams and events ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned)
{
    *out = new emu_stream{};
    streams.push_back(*out);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most)
{
    *least = *most = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int)
{
    return cudaStreamCreateWithFlags(out, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    run_until([=] { return stream->work.empty(); });
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i] == stream)
            streams.erase(streams.begin() + (long)i);
    delete stream;
    return cudaSuccess;
}

/* Who asks gets ahead a good deal, for between two questions the host may sleep. */
static void go_ahead()
{
    for (int i = 0; i < 64 && emu_step(); i++)
        ;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    if (records(stream))
        return emu_fail(cudaErrorStreamCaptureUnsupported);
    go_ahead();
    return stream->work.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    if (records(stream))
        return emu_fail(cudaErrorStreamCaptureUnsupported);
    run_until([=] { return stream->work.empty(); });
    return cudaSuccess;
}

/* For the record that was the last one when this was called, as CUDA has it. */
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    const uint64_t record = event->recorded;
    for (const emu_stream *s : streams) {
        if (!event->graph || s->recording != event->graph)
            continue;
        stream->joined_in |= !stream->recording;
        stream->recording = event->graph;
        event->stream->awaited = event->behind;
        break;
    }
    emu_queue(stream, [=] { return event->reached >= record; });
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned)
{
    *out = new emu_event{};
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    while (emu_step())
        ;
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    const uint64_t record = ++event->recorded;
    event->graph = stream->recording;
    event->stream = stream;
    emu_queue(stream, [=] {
        event->reached = record;
        event->when = seconds();
        return true;
    });
    event->behind = stream->queued;
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    go_ahead();
    return event->reached >= event->recorded ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    run_until([=] { return event->reached >= event->recorded; });
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end)
{
    *ms = (float)(1e3 * (end->when - begin->when));
    return cudaSuccess;
}

/* ---- recordings ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode)
{
    if (stream->recording)
        return emu_fail(cudaErrorInvalidValue);
    stream->recording = new emu_graph;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out)
{
    if (!stream->recording || stream->joined_in)
        return emu_fail(cudaErrorInvalidValue);
    bool left = false;
    for (emu_stream *s : streams)
        if (s->joined_in && s->recording == stream->recording) {
            left |= s->awaited != s->queued;
            s->recording = nullptr;
            s->joined_in = false;
        }
    *out = stream->recording;
    stream->recording = nullptr;
    return left ? emu_fail(cudaErrorInvalidValue) : cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long)
{
    *out = new emu_graph(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    for (const emu_work &work : exec->work)
        emu_queue(stream, work);
    return cudaSuccess;
}
