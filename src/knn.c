/* knn: see knn.h. */
#include "src/knn.h"
#include "mpi/agree.h"
#include "src/watchdog.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256  /* test images compared at a time */
#define TILE  4096 /* with so many training images */

/* The features this rank has seen, of unit length. */
typedef struct shelf {
    int width;
    int64_t count, room;
    float *feature; /* [room, width] */
    int64_t *index; /* [room] in the split */
    int32_t *label;
} shelf;

typedef struct neighbour {
    double cosine;
    int64_t index, label;
} neighbour;

typedef struct search {
    const md_knn_args *args;
    shelf train, test;
    int k, classes;
    float *query; /* [BLOCK, width] of the rank whose turn it is */
    void *operands, *scratch;
    size_t scratch_size;
    float *d_query, *d_train,
        *d_cosine;      /* operands: [BLOCK, width], [TILE, width], [BLOCK, TILE] */
    float *cosine;      /* [BLOCK, TILE] on the host */
    neighbour *nearest; /* [BLOCK, k] of this rank, nearest first */
    int *found;         /* [BLOCK] of them */
    neighbour *all;     /* [ranks, BLOCK, k] */
    double *votes;      /* [classes] */
} search;

/* ---- features ---- */

static void shelf_free(shelf *s)
{
    md_free(s->feature);
    md_free(s->index);
    md_free(s->label);
}

/* Room for what one of `ranks` ranks sees of n images in passes of `images`. */
static md_status shelf_make(shelf *s, int width, int64_t room)
{
    s->width = width;
    s->room = room;
    MD_NEW(s->feature, MD_MAX(room, 1) * width, "features");
    MD_NEW(s->index, MD_MAX(room, 1), "features");
    MD_NEW(s->label, MD_MAX(room, 1), "features");
    return MD_OK;
}

static void keep(void *context, const md_seen *seen)
{
    shelf *s = context;
    const float *values = seen->values;
    MD_ASSERT(s->count < s->room, "%lld features", (long long)s->count);
    double squares = 0;
    for (int i = 0; i < s->width; i++)
        squares += (double)values[i] * (double)values[i];
    const float scale = squares > 0 ? (float)(1.0 / sqrt(squares)) : 0.0f;
    float *f = s->feature + s->count * s->width;
    for (int i = 0; i < s->width; i++)
        f[i] = values[i] * scale;
    s->index[s->count] = seen->index;
    s->label[s->count++] = seen->label;
}

/* Collective(world). */
static md_status collect(const md_knn_args *a, md_evaluator *e, shelf *s)
{
    md_comm *world = a->topo->world;
    MD_TRY(md_agree(world, shelf_make(s, md_evaluator_width(e), md_evaluator_share(e))));
    return md_evaluator_run(e, keep, s);
}

/* ---- comparison ---- */

static md_gemm_args product(const md_tensor *q, const md_tensor *t, md_tensor *y)
{
    return (md_gemm_args){.a = q, .b = t, .y = y, .trans_b = true};
}

static md_status allocate(search *s)
{
    md_backend *be = s->args->backend;
    const size_t width = (size_t)s->train.width;
    const size_t query = BLOCK * width, train = TILE * width, cosine = (size_t)BLOCK * TILE;
    void *p;
    MD_TRY(md_backend_alloc(be, 4 * (query + train + cosine), "features", &s->operands));
    s->d_query = s->operands;
    s->d_train = s->d_query + query;
    s->d_cosine = s->d_train + train;
    MD_TRY(md_backend_pinned(be, 4 * cosine, "cosines", &p));
    s->cosine = p;
    md_tensor q = MD_TENSOR(s->d_query, MD_F32, BLOCK, s->train.width);
    md_tensor t = MD_TENSOR(s->d_train, MD_F32, TILE, s->train.width);
    md_tensor y = MD_TENSOR(s->d_cosine, MD_F32, BLOCK, TILE);
    md_gemm_args g = product(&q, &t, &y);
    if (be->scratch_bytes)
        s->scratch_size = be->scratch_bytes(be, MD_OP_gemm, (const md_operands *)&g);
    if (s->scratch_size == MD_NO_SCRATCH)
        return MD_ERR_MEMORY;
    MD_TRY(md_backend_alloc(be, s->scratch_size, "scratch", &s->scratch));
    MD_NEW(s->query, query, "features");
    MD_NEW(s->nearest, BLOCK * s->k, "neighbours");
    MD_NEW(s->found, BLOCK, "neighbours");
    MD_NEW(s->all, (int64_t)md_comm_size(s->args->topo->dp) * BLOCK * s->k, "neighbours");
    MD_NEW(s->votes, s->classes, "votes");
    return MD_OK;
}

static void release(search *s)
{
    md_backend *be = s->args->backend;
    shelf_free(&s->train);
    shelf_free(&s->test);
    md_backend_free(be, s->operands);
    md_backend_free(be, s->scratch);
    md_backend_pinned_free(be, s->cosine);
    md_free(s->query);
    md_free(s->nearest);
    md_free(s->found);
    md_free(s->all);
    md_free(s->votes);
}

static bool nearer(const neighbour *a, const neighbour *b)
{
    return a->cosine > b->cosine || (a->cosine == b->cosine && a->index < b->index);
}

/* Puts one into a sorted list of at most k. */
static void insert(neighbour *list, int *found, int k, const neighbour *n)
{
    if (*found == k && !nearer(n, &list[k - 1]))
        return;
    int i = *found < k ? (*found)++ : k - 1;
    for (; i > 0 && nearer(n, &list[i - 1]); i--)
        list[i] = list[i - 1];
    list[i] = *n;
}

/* Takes training images [first, first + n) of this rank into the lists of all queries. */
static void scan(search *s, int64_t first, int64_t n)
{
    const shelf *t = &s->train;
#pragma omp parallel for num_threads(s->args->backend->threads)
    for (int q = 0; q < BLOCK; q++) {
        const float *row = s->cosine + (int64_t)q * TILE;
        neighbour *list = s->nearest + (int64_t)q * s->k;
        for (int64_t i = 0; i < n; i++) {
            if (s->found[q] == s->k && (double)row[i] < list[s->k - 1].cosine)
                continue;
            insert(list, &s->found[q], s->k,
                   &(neighbour){(double)row[i], t->index[first + i], t->label[first + i]});
        }
    }
}

/* This rank's nearest of the present queries. */
static md_status compare(search *s)
{
    md_backend *be = s->args->backend;
    const int width = s->train.width;
    md_tensor q = MD_TENSOR(s->d_query, MD_F32, BLOCK, width);
    md_tensor t = MD_TENSOR(s->d_train, MD_F32, TILE, width);
    md_tensor y = MD_TENSOR(s->d_cosine, MD_F32, BLOCK, TILE);
    const md_gemm_args g = product(&q, &t, &y);
    memset(s->found, 0, BLOCK * sizeof *s->found);
    MD_TRY(md_backend_upload(be, s->d_query, s->query, md_tensor_bytes(&q)));
    for (int64_t first = 0; first < s->train.count; first += TILE) {
        const int64_t n = MD_MIN(TILE, s->train.count - first);
        MD_TRY(md_backend_upload(be, s->d_train, s->train.feature + first * width,
                                 (size_t)(n * width) * 4));
        MD_TRY(be->ops->gemm(be, &g));
        MD_TRY(md_backend_download(be, s->cosine, s->d_cosine, md_tensor_bytes(&y)));
        MD_TRY(md_backend_sync(be));
        scan(s, first, n);
    }
    return MD_OK;
}

/* ---- votes ---- */

/* Class of place `place` by votes; those before it have been struck out. */
static int most_votes(const search *s)
{
    int best = 0;
    for (int c = 1; c < s->classes; c++)
        if (s->votes[c] > s->votes[best])
            best = c;
    return best;
}

/* The answer to query q of the block, from all ranks' lists. */
static void vote(search *s, int q, int32_t label, md_hits *hits)
{
    const int ranks = md_comm_size(s->args->topo->dp);
    neighbour *list = s->nearest + (int64_t)q * s->k;
    int found = 0;
    for (int r = 0; r < ranks; r++)
        for (int i = 0; i < s->k; i++) {
            const neighbour *n = &s->all[((int64_t)r * BLOCK + q) * s->k + i];
            if (n->index >= 0)
                insert(list, &found, s->k, n);
        }
    memset(s->votes, 0, (size_t)s->classes * sizeof *s->votes);
    for (int i = 0; i < found; i++)
        s->votes[list[i].label] += exp(list[i].cosine / s->args->temperature);
    hits->images++;
    for (int place = 0; place < 5 && place < s->classes; place++) {
        const int c = most_votes(s);
        hits->top1 += c == label && place == 0;
        hits->top5 += c == label;
        s->votes[c] = -1.0;
    }
}

/* Collective(dp). Up to BLOCK test images of rank `root`, from its number `first` on. */
static md_status block(search *s, int root, int64_t first, int64_t n, md_accuracy *out)
{
    md_comm *dp = s->args->topo->dp;
    const int width = s->test.width;
    const bool mine = md_comm_rank(dp) == root;
    memset(s->query, 0, (size_t)BLOCK * (size_t)width * sizeof *s->query);
    if (mine)
        memcpy(s->query, s->test.feature + first * width, (size_t)(n * width) * sizeof *s->query);
    md_comm_bcast(dp, s->query, (int64_t)BLOCK * width * (int64_t)sizeof *s->query, root);
    MD_TRY(md_agree(dp, compare(s)));
    for (int q = 0; q < BLOCK; q++)
        for (int i = s->found[q]; i < s->k; i++)
            s->nearest[(int64_t)q * s->k + i].index = -1;
    md_comm_allgather(dp, s->nearest, s->all, (int64_t)BLOCK * s->k * (int64_t)sizeof *s->nearest);
    for (int q = 0; mine && q < n; q++) {
        const int32_t label = s->test.label[first + q];
        vote(s, q, label, &out->by_class[label]);
    }
    return MD_OK;
}

/* Collective(dp). All ranks' test images in turn. */
static md_status all_blocks(search *s, md_accuracy *out)
{
    md_comm *dp = s->args->topo->dp;
    for (int root = 0; root < md_comm_size(dp); root++) {
        int64_t count = s->test.count;
        md_comm_bcast(dp, &count, sizeof count, root);
        for (int64_t first = 0; first < count; first += BLOCK) {
            md_phase("neighbours");
            MD_TRY(block(s, root, first, MD_MIN(BLOCK, count - first), out));
        }
    }
    return MD_OK;
}

/* Scratch of the backend is this search's own meanwhile. Only one rank of those that share a model
 * has features; the others take no part. */
static md_status judge(search *s, md_accuracy *out)
{
    md_backend *be = s->args->backend;
    md_status st = md_agree(s->args->topo->world, allocate(s));
    const md_scratch was = md_backend_scratch(be, (md_scratch){s->scratch, s->scratch_size});
    if (st == MD_OK && s->args->topo->tp_rank == 0)
        st = all_blocks(s, out);
    md_backend_scratch(be, was);
    return md_agree(s->args->topo->world, st);
}

md_status md_knn_accuracy(const md_knn_args *a, md_accuracy *out)
{
    md_comm *world = a->topo->world;
    MD_TRY(md_agree(world, md_evaluator_same_classes(a->train, a->test)));
    search s = {.args = a, .classes = md_dataset_classes(md_evaluator_data(a->train))};
    s.k = (int)MD_MIN(a->k, md_evaluator_count(a->train));
    md_status st = md_agree(world, md_accuracy_make(s.classes, out));
    if (st == MD_OK)
        st = collect(a, a->train, &s.train);
    if (st == MD_OK)
        st = collect(a, a->test, &s.test);
    if (st == MD_OK)
        st = judge(&s, out);
    release(&s);
    if (st == MD_OK)
        md_accuracy_sum(world, out);
    else
        md_accuracy_free(out);
    return st;
}
