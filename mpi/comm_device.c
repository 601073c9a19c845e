/* comm_device: see comm_device.h. */
#include "mpi/comm_device.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "mpi/agree.h"
#include "mpi/comm_nccl.h"

/* The rest of the program does not depend on whether NCCL was linked in. */
#pragma weak md_comm_nccl

#define REMEDY "start fewer ranks on a node, or set parallel.comm = \"mpi\""

/* Where a rank of the job computes. */
typedef struct card {
    char where[2][64]; /* host and device, zero-filled: equal ones have equal bytes */
    int32_t rank;
} card;

/* Appends the ranks that share a device with another rank, a few of them. */
static void list_shared(const card *cards, int n, char *text, size_t size)
{
    enum { MOST = 16 };
    int shown = 0, shared = 0;
    size_t used = strlen(text);
    for (int i = 0; i < n; i++) {
        bool alone = true;
        for (int k = 0; k < n && alone; k++)
            alone = k == i || memcmp(cards[i].where, cards[k].where, sizeof cards[i].where) != 0;
        if (alone)
            continue;
        if (++shared <= MOST && used < size)
            used += (size_t)snprintf(text + used, size - used, "\n  rank %-4d %-16s %s",
                                     cards[i].rank, cards[i].where[0], cards[i].where[1]);
        shown = MD_MIN(shared, MOST);
    }
    if (shared > shown && used < size)
        snprintf(text + used, size - used, "\n  and %d more", shared - shown);
}

static md_status judge(const card *cards, int n)
{
    char text[2048] = "";
    list_shared(cards, n, text, sizeof text);
    if (*text)
        MD_FAIL(MD_ERR_CONFIG,
                "NCCL needs a GPU for every rank, and these share one; " REMEDY ":%s", text);
    return MD_OK;
}

md_status md_comm_own_devices(md_comm *host, const md_backend *be)
{
    const int n = md_comm_size(host);
    card *cards = md_alloc(sizeof *cards * (size_t)n, "table of devices");
    md_status st = md_agree(host, cards ? MD_OK : MD_ERR_MEMORY);
    if (st == MD_OK) {
        card *own = &cards[md_comm_rank(host)];
        gethostname(own->where[0], sizeof own->where[0] - 1);
        snprintf(own->where[1], sizeof own->where[1], "%s", be->device);
        own->rank = md_base_rank();
        md_comm_allgather(host, own, cards, sizeof *cards);
        st = judge(cards, n);
    }
    md_free(cards);
    return st;
}

/* A group of one sends nothing: copies between its own operands are all that is left. */
md_status md_comm_for_backend(md_comm *host, md_backend *be, const char *kind, md_comm **out)
{
    const bool linked = md_comm_nccl != NULL, must = strcmp(kind, "nccl") == 0;
    *out = host;
    if (!md_backend_is_device(be))
        return MD_OK;
    if (strcmp(kind, "mpi") == 0 || md_comm_size(host) == 1)
        return md_comm_staged(host, be, out);
    if (must && !linked)
        MD_FAIL(MD_ERR_CONFIG, "parallel.comm = \"nccl\": NCCL is not in this program; "
                               "parallel.comm = \"mpi\" passes through host memory");
    if (!linked)
        return md_comm_staged(host, be, out);
    md_status st = md_comm_own_devices(host, be);
    if (st == MD_OK)
        return md_comm_nccl(host, be, out);
    return must || st != MD_ERR_CONFIG ? st : md_comm_staged(host, be, out);
}
