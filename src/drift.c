/* drift: see drift.h. */
#include "src/drift.h"
#include "mpi/agree.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL /* no library to link, compiled for this machine */
#include <xxhash.h>

static uint64_t hash_piece(const md_params *p, const md_piece *piece, bool moments, uint64_t h)
{
    const size_t bytes = (size_t)piece->count * sizeof(float);
    h = XXH3_64bits_withSeed(p->host_value + piece->offset, bytes, h);
    if (!moments)
        return h;
    h = XXH3_64bits_withSeed(p->host_m + piece->moment, bytes, h);
    return XXH3_64bits_withSeed(p->host_v + piece->moment, bytes, h);
}

static md_drift_row own_row(const md_topo *topo, const md_model *model)
{
    const md_params *p = &model->method.params;
    md_piece piece[MD_GROUPS];
    md_drift_row row = {.tp_rank = topo->tp_rank, .rank = md_comm_rank(topo->world)};
    const int n = md_params_pieces(p, piece);
    for (int i = 0; i < n; i++) {
        uint64_t *h = piece[i].cut ? &row.cut : &row.whole;
        *h = hash_piece(p, &piece[i], !model->shard.zero, *h);
    }
    gethostname(row.host, sizeof row.host - 1);
    if (md_fault("check.drift"))
        row.whole ^= 1;
    return row;
}

/* Of the rows of one kind (whole: all; else those of tp rank `tp`), how many agree with row i. */
static int agreeing(const md_drift_row *row, int n, int i, bool whole)
{
    int same = 0;
    for (int k = 0; k < n; k++)
        same += whole ? row[k].whole == row[i].whole
                      : row[k].tp_rank == row[i].tp_rank && row[k].cut == row[i].cut;
    return same;
}

static int replicas(const md_drift_row *row, int n, int i, bool whole)
{
    int same = 0;
    for (int k = 0; k < n; k++)
        same += whole || row[k].tp_rank == row[i].tp_rank;
    return same;
}

/* Whether row i is one to name: it does not agree with more than half of its replicas, and some
 * replica differs from it. */
static bool odd(const md_drift_row *row, int n, int i, bool whole)
{
    int all = replicas(row, n, i, whole), same = agreeing(row, n, i, whole);
    return same < all && 2 * same <= all;
}

void md_drift_judge(const md_drift_row *row, int n, char *buf, size_t size)
{
    enum { NAMED = 8 };
    size_t used = 0;
    int named = 0;
    buf[0] = 0;
    for (int i = 0; i < n; i++) {
        if (!odd(row, n, i, true) && !odd(row, n, i, false))
            continue;
        if (named++ < NAMED && used < size)
            used += (size_t)snprintf(buf + used, size - used, "%srank %d (%s, tensor rank %d)",
                                     used ? ", " : "", row[i].rank, row[i].host, row[i].tp_rank);
    }
    if (named > NAMED && used < size)
        snprintf(buf + used, size - used, " and %d more", named - NAMED);
}

md_status md_drift_make(int ranks, md_drift *d)
{
    MD_NEW(d->row, ranks, "drift check");
    return MD_OK;
}

void md_drift_free(md_drift *d)
{
    md_free(d->row);
    d->row = NULL;
}

md_status md_drift_check(md_drift *d, const md_topo *topo, md_model *model, int64_t step)
{
    char who[1024];
    MD_TRY(md_agree(topo->world, md_params_fetch(&model->method.params)));
    md_drift_row mine = own_row(topo, model);
    md_comm_allgather(topo->world, &mine, d->row, (int64_t)sizeof mine);
    md_drift_judge(d->row, md_comm_size(topo->world), who, sizeof who);
    if (*who)
        MD_FAIL(MD_ERR_DEVICE,
                "at step %lld the parameters of %s differ from their replicas' (check.every): the "
                "run is wrong from somewhere after the last check on; a device or memory may be "
                "faulty",
                (long long)step, who);
    return MD_OK;
}
