/* emu_nccl: a stand-in for NCCL between MPI's ranks, each with an emulated GPU.
 *
 * A collective is work of its stream. When it is that work's turn, each rank's input is gathered on
 * all ranks by a non-blocking collective of MPI, and when that is done, what this rank is due is
 * made of it. Those of one communicator begin in the order of issue, on a communicator of MPI of
 * their own; those of several do not wait for each other. Sums of bf16 are made in f32.
 *
 * Streams move only while the host asks or waits. A host that waits for other ranks inside MPI
 * would leave them without its share of a collective that they wait for, so calls of MPI that wait
 * first run this rank's collectives to their end.
 *
 * MD_EMU_FAIL=nccl#3: from the third collective on nothing comes, and the communicator says so.
 * Main thread only. */
#include "kernels/scalar_math.h"
#include "tests/emu/emu_runtime.h"

#include <mpi.h>
#include <nccl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace
{

enum { FIRST_TAG = 1000, POLLS = 3 };

/* What an id says: where the ranks meet. */
struct meeting {
    int root, tag;
};

struct seat {
    int world, device;
};

struct collective {
    std::vector<unsigned char> in, all;
    MPI_Request request = MPI_REQUEST_NULL;
    bool begun = false, done = false;
};

} // namespace

struct emu_nccl {
    int rank, ranks;
    meeting at;
    MPI_Comm parent = MPI_COMM_NULL; /* of a split */
    int colour = 0, key = 0;
    int polls = 0; /* until it is ready */
    bool aborted = false;
    MPI_Comm handle = MPI_COMM_NULL;
    ncclResult_t state = ncclInProgress;
    cudaStream_t stream = nullptr;  /* of the last collective */
    unsigned issued = 0, begun = 0; /* collectives */
    unsigned ended = 0;
};

namespace
{

typedef std::shared_ptr<emu_nccl> link;

/* All communicators that live. */
std::vector<link> links;

link find(ncclComm_t comm)
{
    for (const link &l : links)
        if (l.get() == comm)
            return l;
    return nullptr;
}

void forget(ncclComm_t comm)
{
    links.erase(std::remove(links.begin(), links.end(), find(comm)), links.end());
}

/* ---- meeting ---- */

/* The root is told by all who they are, and tells all. */
std::vector<seat> meet(const emu_nccl *c)
{
    std::vector<seat> all((size_t)c->ranks);
    seat own;
    PMPI_Comm_rank(MPI_COMM_WORLD, &own.world);
    cudaGetDevice(&own.device);
    const int bytes = (int)(all.size() * sizeof own);
    if (c->rank != 0) {
        int mine[3] = {c->rank, own.world, own.device};
        PMPI_Send(mine, 3, MPI_INT, c->at.root, c->at.tag, MPI_COMM_WORLD);
        PMPI_Recv(all.data(), bytes, MPI_BYTE, c->at.root, c->at.tag, MPI_COMM_WORLD,
                  MPI_STATUS_IGNORE);
        return all;
    }
    all[0] = own;
    for (int i = 1; i < c->ranks; i++) {
        int theirs[3];
        PMPI_Recv(theirs, 3, MPI_INT, MPI_ANY_SOURCE, c->at.tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        all[(size_t)theirs[0]] = {theirs[1], theirs[2]};
    }
    for (int i = 1; i < c->ranks; i++)
        PMPI_Send(all.data(), bytes, MPI_BYTE, all[(size_t)i].world, c->at.tag, MPI_COMM_WORLD);
    return all;
}

/* As NCCL, two ranks on one GPU are refused. */
ncclResult_t open(emu_nccl *c)
{
    if (c->parent != MPI_COMM_NULL) {
        PMPI_Comm_split(c->parent, c->colour, c->key, &c->handle);
        PMPI_Comm_rank(c->handle, &c->rank);
        PMPI_Comm_size(c->handle, &c->ranks);
        return ncclSuccess;
    }
    const std::vector<seat> all = meet(c);
    std::vector<int> world, device;
    for (const seat &s : all) {
        world.push_back(s.world);
        device.push_back(s.device);
    }
    std::sort(device.begin(), device.end());
    if (std::adjacent_find(device.begin(), device.end()) != device.end())
        return ncclInvalidUsage;
    MPI_Group everyone, group;
    PMPI_Comm_group(MPI_COMM_WORLD, &everyone);
    PMPI_Group_incl(everyone, c->ranks, world.data(), &group);
    PMPI_Comm_create_group(MPI_COMM_WORLD, group, c->at.tag, &c->handle);
    PMPI_Group_free(&group);
    PMPI_Group_free(&everyone);
    return ncclSuccess;
}

/* ---- collectives ---- */

size_t width(ncclDataType_t type)
{
    switch (type) {
    case ncclUint8:
        return 1;
    case ncclFloat16:
    case ncclBfloat16:
        return 2;
    case ncclInt32:
    case ncclFloat32:
        return 4;
    default:
        return 8;
    }
}

template <class T> T combined(T a, T b, ncclRedOp_t op)
{
    return op == ncclSum ? (T)(a + b) : op == ncclMax ? std::max(a, b) : std::min(a, b);
}

/* Elements [first, first + n) of the ranks' `count` each, in rank order; `load` widens, `store`
 * narrows. */
struct range {
    size_t first, n, count;
    int ranks;
    ncclRedOp_t op;
};

template <class T, class Load, class Store>
void reduce_as(const void *all, void *out, const range &r, Load load, Store store)
{
    const T *x = static_cast<const T *>(all);
    for (size_t i = 0; i < r.n; i++) {
        auto sum = load(x[r.first + i]);
        for (int k = 1; k < r.ranks; k++)
            sum = combined(sum, load(x[(size_t)k * r.count + r.first + i]), r.op);
        static_cast<T *>(out)[i] = store(sum);
    }
}

template <class T> void reduce_plain(const void *all, void *out, const range &r)
{
    const auto same = [](T v) { return v; };
    reduce_as<T>(all, out, r, same, same);
}

void reduce(ncclDataType_t type, const void *all, void *out, const range &r)
{
    switch (type) {
    case ncclUint8:
        return reduce_plain<uint8_t>(all, out, r);
    case ncclInt32:
        return reduce_plain<int32_t>(all, out, r);
    case ncclInt64:
        return reduce_plain<int64_t>(all, out, r);
    case ncclFloat32:
        return reduce_plain<float>(all, out, r);
    case ncclFloat64:
        return reduce_plain<double>(all, out, r);
    case ncclFloat16: /* no number of this type is summed */
        return;
    case ncclBfloat16:
        return reduce_as<uint16_t>(all, out, r, md_f32_from_bf16, md_bf16_from_f32);
    }
}

/* Begins when all before it have begun; true when the gathered inputs are there. A communicator
 * that has failed leaves it waiting until it is given up. */
bool advance(const link &c, collective *o, unsigned turn, const void *send)
{
    if (c->aborted || o->done)
        return true;
    if (c->state != ncclSuccess || c->begun < turn)
        return false;
    if (!o->begun) {
        memcpy(o->in.data(), send, o->in.size());
        PMPI_Iallgather(o->in.data(), (int)o->in.size(), MPI_BYTE, o->all.data(), (int)o->in.size(),
                        MPI_BYTE, c->handle, &o->request);
        o->begun = true;
        c->begun++;
    }
    int done;
    PMPI_Test(&o->request, &done, MPI_STATUS_IGNORE);
    return o->done = done;
}

/* Queues a collective of `bytes` bytes a rank; finish(all) makes of all ranks' bytes what this rank
 * is due. */
ncclResult_t issue(ncclComm_t comm, cudaStream_t stream, const void *send, size_t bytes,
                   std::function<void(const unsigned char *all)> finish)
{
    const link c = find(comm);
    if (!c)
        return ncclInvalidArgument;
    if (c->state != ncclSuccess)
        return c->state == ncclInProgress ? ncclInvalidUsage : c->state;
    if (emu_fails("nccl"))
        c->state = ncclRemoteError;
    const auto o = std::make_shared<collective>();
    const unsigned turn = c->issued++;
    o->in.resize(bytes);
    o->all.resize(bytes * (size_t)c->ranks);
    c->stream = stream;
    emu_queue(stream, [=] {
        if (!advance(c, o.get(), turn, send))
            return false;
        if (o->done)
            finish(o->all.data());
        o->in = {}, o->all = {};
        c->ended++;
        return true;
    });
    return ncclSuccess;
}

bool busy(const emu_nccl *c)
{
    return c->state == ncclSuccess && !c->aborted && c->ended < c->issued;
}

/* Runs this rank's collectives to their end, as far as no communicator has failed. */
void run_dry()
{
    for (size_t i = 0; i < links.size(); i++)
        while (busy(links[i].get()))
            cudaStreamQuery(links[i]->stream);
}

} // namespace

extern "C" {

ncclResult_t ncclGetVersion(int *version)
{
    *version = 22800;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result)
{
    static const char *const text[] = {
        "no error",
        "unhandled cuda error",
        "unhandled system error",
        "internal error",
        "invalid argument",
        "invalid usage",
        "remote process exited or there was a network error",
        "NCCL operation in progress",
    };
    return (size_t)result < sizeof text / sizeof *text ? text[result] : "unknown result code";
}

/* ---- communicators ---- */

ncclResult_t ncclGetUniqueId(ncclUniqueId *out)
{
    static int ids;
    meeting m;
    PMPI_Comm_rank(MPI_COMM_WORLD, &m.root);
    m.tag = FIRST_TAG + ids++;
    memset(out, 0, sizeof *out);
    memcpy(out->internal, &m, sizeof m);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t *config)
{
    if (config->blocking != 0 || rank < 0 || rank >= ranks)
        return ncclInvalidArgument;
    const link c = std::make_shared<emu_nccl>();
    c->rank = rank;
    c->ranks = ranks;
    memcpy(&c->at, id.internal, sizeof c->at);
    links.push_back(c);
    *out = c.get();
    return ncclInProgress;
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int colour, int key, ncclComm_t *out,
                           ncclConfig_t *config)
{
    const link from = find(comm);
    if (!from || from->state != ncclSuccess || config->blocking != 0)
        return ncclInvalidArgument;
    const link c = std::make_shared<emu_nccl>();
    c->parent = from->handle;
    c->colour = colour;
    c->key = key;
    links.push_back(c);
    *out = c.get();
    return ncclInProgress;
}

const char *ncclGetLastError(ncclComm_t comm)
{
    (void)comm;
    return "";
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *out)
{
    const link c = find(comm);
    if (!c)
        return ncclInvalidArgument;
    if (c->handle == MPI_COMM_NULL && c->state == ncclInProgress && ++c->polls > POLLS)
        c->state = open(c.get());
    *out = c->state;
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    const link c = find(comm);
    if (!c)
        return ncclInvalidArgument;
    while (busy(c.get()))
        cudaStreamQuery(c->stream);
    return c->state;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    const link c = find(comm);
    if (!c || busy(c.get()))
        return ncclInvalidArgument;
    if (c->handle != MPI_COMM_NULL)
        PMPI_Comm_free(&c->handle);
    forget(comm);
    return ncclSuccess;
}

/* What was under way is left as it is. */
ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    const link c = find(comm);
    if (!c)
        return ncclInvalidArgument;
    c->aborted = true;
    forget(comm);
    return ncclSuccess;
}

/* ---- collectives ---- */

ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
{
    const range r = {0, count, count, comm->ranks, op};
    return issue(comm, stream, send, count * width(type),
                 [=](const unsigned char *all) { reduce(type, all, recv, r); });
}

ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t recv_count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
{
    const size_t count = recv_count * (size_t)comm->ranks;
    const range r = {recv_count * (size_t)comm->rank, recv_count, count, comm->ranks, op};
    return issue(comm, stream, send, count * width(type),
                 [=](const unsigned char *all) { reduce(type, all, recv, r); });
}

ncclResult_t ncclAllGather(const void *send, void *recv, size_t send_count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream)
{
    const size_t bytes = send_count * width(type), all_bytes = bytes * (size_t)comm->ranks;
    return issue(comm, stream, send, bytes,
                 [=](const unsigned char *all) { memcpy(recv, all, all_bytes); });
}

ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, cudaStream_t stream)
{
    const size_t bytes = count * width(type), at = bytes * (size_t)root;
    return issue(comm, stream, send, bytes,
                 [=](const unsigned char *all) { memcpy(recv, all + at, bytes); });
}

/* ---- MPI, where it waits for other ranks ---- */

int MPI_Barrier(MPI_Comm comm)
{
    run_dry();
    return PMPI_Barrier(comm);
}

int MPI_Bcast(void *buf, int n, MPI_Datatype type, int root, MPI_Comm comm)
{
    run_dry();
    return PMPI_Bcast(buf, n, type, root, comm);
}

int MPI_Allreduce(const void *send, void *recv, int n, MPI_Datatype type, MPI_Op op, MPI_Comm comm)
{
    run_dry();
    return PMPI_Allreduce(send, recv, n, type, op, comm);
}

int MPI_Allgather(const void *send, int n, MPI_Datatype type, void *recv, int recv_n,
                  MPI_Datatype recv_type, MPI_Comm comm)
{
    run_dry();
    return PMPI_Allgather(send, n, type, recv, recv_n, recv_type, comm);
}

int MPI_Exscan(const void *send, void *recv, int n, MPI_Datatype type, MPI_Op op, MPI_Comm comm)
{
    run_dry();
    return PMPI_Exscan(send, recv, n, type, op, comm);
}

int MPI_Sendrecv(const void *send, int n, MPI_Datatype type, int to, int tag, void *recv,
                 int recv_n, MPI_Datatype recv_type, int from, int recv_tag, MPI_Comm comm,
                 MPI_Status *status)
{
    run_dry();
    return PMPI_Sendrecv(send, n, type, to, tag, recv, recv_n, recv_type, from, recv_tag, comm,
                         status);
}

int MPI_Wait(MPI_Request *request, MPI_Status *status)
{
    run_dry();
    return PMPI_Wait(request, status);
}

int MPI_Comm_split(MPI_Comm comm, int colour, int key, MPI_Comm *out)
{
    run_dry();
    return PMPI_Comm_split(comm, colour, key, out);
}

} // extern "C"
