/* comm_mpi_coll: the collectives of the MPI carrier.
 *
 * MPI's own reduce-scatters are not used. Open MPI sums all of the data on one rank and hands the
 * parts out, or halves vectors that leave the cache; both send more than is needed and differ with
 * the length. Here every rank gets its part from every other one directly, (size - 1) / size of the
 * data in all, and adds them up in an order of its own: itself, the rank below it, the one below
 * that, round the circle. */
#include "mpi/comm_mpi_ops.h"

#include <string.h>

#define PIECE_BYTES ((size_t)1 << 18)  /* small enough to be still in the cache when it is added */
#define LONG_PART   ((int64_t)1 << 15) /* bytes of a part from which sums go in two phases */

/* A reduce-scatter under way, and the memory it keeps between two. */
struct mpi_work {
    mpi_work *next;
    char *block; /* [bytes]: the part of every rank */
    size_t bytes;
    void *recv;
    int64_t part; /* elements */
    md_dtype dtype;
};

/* The same elements of every part. */
typedef struct piece {
    int n;          /* elements */
    int64_t stride; /* bytes from part to part */
    md_dtype dtype;
} piece;

static int64_t slice_elements = (int64_t)1 << 28;

static MPI_Datatype type_of(md_dtype dtype)
{
    switch (dtype) {
    case MD_F32:
        return MPI_FLOAT;
    case MD_F64:
        return MPI_DOUBLE;
    case MD_I32:
        return MPI_INT32_T;
    case MD_I64:
        return MPI_INT64_T;
    case MD_U8:
        return MPI_UINT8_T;
    case MD_BF16:
        return MPI_UINT16_T;
    default:
        MD_ASSERT(false, "no reduction on %s", md_dtype_name(dtype));
        return MPI_DATATYPE_NULL;
    }
}

static MPI_Op op_of(md_dtype dtype, md_reduce op)
{
    if (dtype == MD_BF16)
        return md_mpi_bf16_op(op);
    return op == MD_SUM ? MPI_SUM : op == MD_MAX_OP ? MPI_MAX : MPI_MIN;
}

void md_mpi_barrier(md_comm *c)
{
    MPI_Barrier(mpi_handle(c));
}

void md_mpi_bcast(md_comm *c, void *buf, int64_t bytes, int root)
{
    for (int64_t at = 0; at < bytes; at += slice_elements)
        MPI_Bcast((char *)buf + at, (int)MD_MIN(slice_elements, bytes - at), MPI_BYTE, root,
                  mpi_handle(c));
}

/* Of a slice of every rank's part: n elements that lie `stride` elements apart. */
static MPI_Datatype spaced(MPI_Datatype of, int n, int64_t stride)
{
    MPI_Datatype run, type;
    int width;
    MPI_Type_size(of, &width);
    MPI_Type_contiguous(n, of, &run);
    MPI_Type_create_resized(run, 0, (MPI_Aint)(stride * width), &type);
    MPI_Type_commit(&type);
    MPI_Type_free(&run);
    return type;
}

/* Bytes [at, at + slice) of every rank's part; in place when send is NULL, non-blocking when r is
 * not. */
static void gather_slice(md_comm *c, const char *send, char *recv, int64_t bytes, int64_t at,
                         MPI_Request *r)
{
    int n = (int)MD_MIN(slice_elements, bytes - at);
    bool whole = n == bytes;
    const void *from = send ? send + at : MPI_IN_PLACE;
    MPI_Datatype type = whole ? MPI_BYTE : spaced(MPI_BYTE, n, bytes);
    if (r)
        MPI_Iallgather(from, n, MPI_BYTE, recv + at, whole ? n : 1, type, mpi_handle(c), r);
    else
        MPI_Allgather(from, n, MPI_BYTE, recv + at, whole ? n : 1, type, mpi_handle(c));
    if (!whole)
        MPI_Type_free(&type);
}

void md_mpi_allgather(md_comm *c, const void *send, void *recv, int64_t bytes)
{
    if (send == (char *)recv + c->rank * bytes)
        send = NULL;
    for (int64_t at = 0; at < bytes; at += slice_elements)
        gather_slice(c, send, recv, bytes, at, NULL);
}

/* sum[n] += x[n] */
static void add(void *sum, const void *x, int64_t n, md_dtype dtype)
{
    size_t width = md_dtype_bytes(dtype);
    for (int64_t at = 0; at < n; at += slice_elements)
        MPI_Reduce_local((const char *)x + (size_t)at * width, (char *)sum + (size_t)at * width,
                         (int)MD_MIN(slice_elements, n - at), type_of(dtype), op_of(dtype, MD_SUM));
}

/* Of elements [0, n) of every part of `stride` elements: what is this rank's, added up. The sum of
 * the first two begins in recv itself, unless recv is this rank's part of send. */
static void exchange_piece(md_comm *c, const char *send, char *recv, piece p)
{
    static _Alignas(64) char taken[PIECE_BYTES];
    const char *own = send + c->rank * p.stride;
    MPI_Datatype type = type_of(p.dtype);
    for (int k = 1; k < c->size; k++) {
        int to = (c->rank + k) % c->size, from = (c->rank - k + c->size) % c->size;
        bool direct = k == 1 && recv != own;
        MPI_Sendrecv(send + to * p.stride, p.n, type, to, 0, direct ? recv : taken, p.n, type, from,
                     0, mpi_handle(c), MPI_STATUS_IGNORE);
        add(recv, direct ? own : taken, p.n, p.dtype);
    }
}

void md_mpi_reduce_scatter(md_comm *c, const void *send, void *recv, int64_t n, md_dtype dtype)
{
    int64_t part = n / c->size, width = (int64_t)md_dtype_bytes(dtype);
    int64_t most = MD_MIN((int64_t)PIECE_BYTES / width, slice_elements);
    if (c->size == 1)
        memmove(recv, send, (size_t)(n * width));
    else
        for (int64_t at = 0; at < part; at += most)
            exchange_piece(c, (const char *)send + at * width, (char *)recv + at * width,
                           (piece){(int)MD_MIN(most, part - at), part * width, dtype});
}

/* A long sum over more than two ranks as a reduce-scatter and an all-gather, which send least; the
 * library's own choice sends up to twice as much. Elements that do not divide are left to it. */
static int64_t sum_in_two(md_comm *c, char *buf, int64_t n, md_dtype dtype)
{
    const int64_t width = (int64_t)md_dtype_bytes(dtype), part = n / c->size;
    if (c->size <= 2 || part * width < LONG_PART)
        return 0;
    char *own = buf + c->rank * part * width;
    md_mpi_reduce_scatter(c, buf, own, part * c->size, dtype);
    md_mpi_allgather(c, own, buf, part * width);
    return part * c->size;
}

void md_mpi_allreduce(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op)
{
    size_t width = md_dtype_bytes(dtype);
    bool sums = op == MD_SUM && dtype != MD_U8;
    for (int64_t at = sums ? sum_in_two(c, buf, n, dtype) : 0; at < n; at += slice_elements)
        MPI_Allreduce(MPI_IN_PLACE, (char *)buf + (size_t)at * width,
                      (int)MD_MIN(slice_elements, n - at), type_of(dtype), op_of(dtype, op),
                      mpi_handle(c));
}

/* Counts and displacements as MPI takes them. */
static void to_ints(const int64_t *rows, int size, int *count, int *at)
{
    int64_t sum = 0;
    for (int r = 0; r < size; r++) {
        at[r] = (int)sum;
        count[r] = (int)rows[r];
        sum += rows[r];
    }
    MD_ASSERT(sum <= INT32_MAX, "%lld rows in one alltoallv", (long long)sum);
}

void md_mpi_alltoallv(md_comm *c, const void *send, const int64_t *to, void *recv,
                      const int64_t *from, int64_t row)
{
    const int size = c->size;
    int *n = md_alloc(4 * (size_t)size * sizeof *n, "alltoallv");
    MPI_Datatype type;
    if (!n)
        md_comm_die(c, "comm.alltoallv", md_error_text());
    to_ints(to, size, n, n + size);
    to_ints(from, size, n + 2 * (size_t)size, n + 3 * (size_t)size);
    MD_ASSERT(row <= INT32_MAX, "rows of %lld bytes in one alltoallv", (long long)row);
    MPI_Type_contiguous((int)row, MPI_BYTE, &type);
    MPI_Type_commit(&type);
    MPI_Alltoallv(send, n, n + size, type, recv, n + 2 * (size_t)size, n + 3 * (size_t)size, type,
                  mpi_handle(c));
    MPI_Type_free(&type);
    md_free(n);
}

int64_t md_mpi_exscan(md_comm *c, int64_t value)
{
    int64_t before = 0;
    MPI_Exscan(&value, &before, 1, MPI_INT64_T, MPI_SUM, mpi_handle(c));
    return c->rank == 0 ? 0 : before;
}

/* All slices start at once: ranks must start non-blocking collectives in the same order, so none
 * may be left to a later poll. impl[i] holds slice i's MPI_Request, all zero bits when idle. */
static MPI_Request request_get(const md_comm_request *req, size_t i)
{
    MPI_Request r = MPI_REQUEST_NULL;
    if (req->impl[i])
        memcpy(&r, &req->impl[i], sizeof r);
    return r;
}

static void request_set(md_comm_request *req, size_t i, MPI_Request r)
{
    _Static_assert(sizeof r <= sizeof req->impl[0], "an MPI_Request fits a pointer");
    req->impl[i] = NULL;
    if (r != MPI_REQUEST_NULL)
        memcpy(&req->impl[i], &r, sizeof r);
}

/* Takes memory of an earlier reduce-scatter, rather one that is large enough. NULL: none is left.
 */
static mpi_work *work_take(mpi_comm *m, size_t bytes)
{
    mpi_work **best = &m->idle;
    for (mpi_work **w = &m->idle; *w; w = &(*w)->next)
        if ((*w)->bytes >= bytes) {
            best = w;
            break;
        }
    mpi_work *w = *best;
    if (w)
        *best = w->next;
    return w;
}

static void work_give(mpi_comm *m, mpi_work *w)
{
    w->next = m->idle;
    m->idle = w;
}

static void work_free(mpi_work *w)
{
    if (w)
        md_free(w->block);
    md_free(w);
}

/* An idle one if there is one, with room for that many bytes. NULL: no memory. */
static mpi_work *work_make(mpi_work *w, size_t bytes)
{
    if (w && w->bytes >= bytes)
        return w;
    work_free(w);
    w = md_alloc(sizeof *w, "reduce-scatter");
    if (!w)
        return NULL;
    w->block = md_alloc(bytes, "reduce-scatter");
    w->bytes = bytes;
    if (w->block)
        return w;
    work_free(w);
    return NULL;
}

void md_mpi_works_free(mpi_comm *m)
{
    while (m->idle)
        work_free(work_take(m, 0));
}

md_status md_mpi_reserve(md_comm *c, size_t bytes, int requests)
{
    mpi_comm *m = (mpi_comm *)c;
    mpi_work *taken = NULL;
    md_status st = MD_OK;
    for (int i = 0; c->size > 1 && i < requests && st == MD_OK; i++) {
        mpi_work *w = work_make(work_take(m, bytes), bytes);
        if (w) {
            w->next = taken;
            taken = w;
        } else {
            st = MD_ERR_MEMORY;
        }
    }
    while (taken) {
        mpi_work *w = taken;
        taken = w->next;
        work_give(m, w);
    }
    return st;
}

/* All parts have come: adds them up in the order of md_mpi_reduce_scatter. */
static void work_finish(md_comm *c, mpi_work *w)
{
    size_t stride = (size_t)w->part * md_dtype_bytes(w->dtype);
    memcpy(w->recv, w->block + (size_t)c->rank * stride, stride);
    for (int k = 1; k < c->size; k++) {
        int from = (c->rank - k + c->size) % c->size;
        add(w->recv, w->block + (size_t)from * stride, w->part, w->dtype);
    }
    work_give((mpi_comm *)c, w);
}

void md_mpi_allreduce_begin(md_comm *c, void *buf, int64_t n, md_dtype dtype, md_reduce op,
                            md_comm_request *req)
{
    size_t width = md_dtype_bytes(dtype), slices = MD_COUNT(req->impl);
    MD_ASSERT(n <= (int64_t)slices * slice_elements, "%lld elements in one request", (long long)n);
    for (size_t i = 0; i < slices && (int64_t)i * slice_elements < n; i++) {
        int64_t at = (int64_t)i * slice_elements;
        MPI_Request r;
        MPI_Iallreduce(MPI_IN_PLACE, (char *)buf + (size_t)at * width,
                       (int)MD_MIN(slice_elements, n - at), type_of(dtype), op_of(dtype, op),
                       mpi_handle(c), &r);
        request_set(req, i, r);
    }
}

void md_mpi_allgather_begin(md_comm *c, void *buf, int64_t bytes, md_comm_request *req)
{
    int64_t slices = MD_COUNT(req->impl);
    MD_ASSERT(bytes <= slices * slice_elements, "%lld bytes in one request", (long long)bytes);
    for (int64_t i = 0; c->size > 1 && i * slice_elements < bytes; i++) {
        MPI_Request r;
        gather_slice(c, NULL, buf, bytes, i * slice_elements, &r);
        request_set(req, (size_t)i, r);
    }
}

void md_mpi_reduce_scatter_begin(md_comm *c, const void *send, void *recv, int64_t n,
                                 md_dtype dtype, md_comm_request *req)
{
    mpi_comm *m = (mpi_comm *)c;
    int64_t part = n / c->size, width = (int64_t)md_dtype_bytes(dtype);
    int64_t slices = MD_COUNT(req->impl), most = (slice_elements + c->size - 1) / c->size;
    MD_ASSERT(n <= slices * slice_elements, "%lld elements in one request", (long long)n);
    if (c->size == 1) {
        memmove(recv, send, (size_t)(n * width));
        return;
    }
    size_t bytes = (size_t)(n * width);
    mpi_work *w = work_make(work_take(m, bytes), bytes);
    if (!w)
        md_comm_die(c, "reduce-scatter", md_error_text());
    w->recv = recv, w->part = part, w->dtype = dtype;
    req->work = w;
    for (int64_t i = 0; i * most < part; i++) {
        int count = (int)MD_MIN(most, part - i * most);
        bool whole = count == part;
        MPI_Datatype type = whole ? type_of(dtype) : spaced(type_of(dtype), count, part);
        size_t at = (size_t)(i * most * width);
        MPI_Request r;
        MPI_Ialltoall((const char *)send + at, whole ? count : 1, type, w->block + at,
                      whole ? count : 1, type, mpi_handle(c), &r);
        request_set(req, (size_t)i, r);
        if (!whole)
            MPI_Type_free(&type);
    }
}

bool md_mpi_poll(md_comm *c, md_comm_request *req)
{
    bool all = true;
    for (size_t i = 0; i < MD_COUNT(req->impl); i++) {
        if (!req->impl[i])
            continue;
        MPI_Request r = request_get(req, i);
        int done;
        MPI_Test(&r, &done, MPI_STATUS_IGNORE);
        request_set(req, i, r);
        all &= done != 0;
    }
    if (all && req->work) {
        work_finish(c, req->work);
        req->work = NULL;
    }
    return all;
}

void md_mpi_wait(md_comm *c, md_comm_request *req)
{
    for (size_t i = 0; i < MD_COUNT(req->impl); i++) {
        if (!req->impl[i])
            continue;
        MPI_Request r = request_get(req, i);
        MPI_Wait(&r, MPI_STATUS_IGNORE);
        req->impl[i] = NULL;
    }
    if (req->work)
        work_finish(c, req->work);
    req->work = NULL;
}

void md_mpi_set_slice(int64_t elements)
{
    MD_ASSERT(elements > 0 && elements <= (int64_t)1 << 28, "%lld elements", (long long)elements);
    slice_elements = elements;
}
