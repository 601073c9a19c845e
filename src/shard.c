/* shard: see shard.h. The set of a span is its registry group and whether its gradient is partial:
 * 2 * group + partial. */
#include "src/shard.h"

static int set_of(const md_graph *g, int param)
{
    bool partial = md_graph_grad_place(g, param) == MD_PARTIAL;
    return 2 * (int)md_param_group_of(&g->params->row[param]) + partial;
}

static bool set_partial(int set)
{
    return set & 1;
}

static bool set_cut(int set)
{
    return set / 2 == MD_GROUP_DECAY_CUT || set / 2 == MD_GROUP_PLAIN_CUT;
}

static bool set_decay(int set)
{
    return set / 2 == MD_GROUP_DECAY_CUT || set / 2 == MD_GROUP_DECAY;
}

md_comm *md_shard_group(const md_topo *topo, int set)
{
    return set_partial(set) ? topo->op_all : topo->op_dp;
}

int64_t md_shard_align(const md_topo *topo, bool zero)
{
    const int64_t shares = 4 * (int64_t)topo->dp_size * topo->tp_size; /* of 16 bytes */
    int64_t align = zero ? shares : MD_PARAM_ALIGN;
    while (align % MD_PARAM_ALIGN != 0)
        align += shares;
    return align;
}

/* Spans of all parameters in backward order. */
static md_status make_buckets(const md_shard_args *a, md_shard *s)
{
    const md_params *p = a->graph->params;
    int *order;
    md_grad_span *span;
    MD_NEW(s->span_of, p->count, "gradient order");
    MD_NEW(order, p->count, "gradient order");
    span = md_alloc((size_t)p->count * sizeof *span, "gradient order");
    md_status st = span ? MD_OK : MD_ERR_MEMORY;
    if (st == MD_OK) {
        int n = md_graph_grad_order(a->graph, order);
        MD_ASSERT(n == p->count, "the graph differentiates %d of %d parameters", n, p->count);
        for (int i = 0; i < n; i++) {
            const md_param *row = &p->row[order[i]];
            span[i] = (md_grad_span){row->offset, row->count, set_of(a->graph, order[i])};
            s->span_of[order[i]] = i;
        }
        st = md_buckets_make(&(md_buckets_args){.span = span,
                                                .spans = n,
                                                .n = p->elements,
                                                .full = a->bucket_bytes / (int64_t)sizeof(float),
                                                .gap = md_shard_align(a->topo, a->zero)},
                             &s->buckets);
    }
    md_free(order);
    md_free(span);
    return st;
}

/* Part `part` of `parts` of a piece that several ranks hold alike. */
static md_piece part_of(const md_piece *p, int64_t part, int64_t parts)
{
    int64_t lo = p->count * part / parts, hi = p->count * (part + 1) / parts;
    md_piece out = *p;
    out.offset += lo;
    out.moment += lo;
    out.count = hi - lo;
    return out;
}

static void own(md_shard *s, md_piece piece)
{
    if (piece.count > 0)
        s->own[s->owns++] = piece;
}

/* Plain: every rank updates all groups; those that hold a group alike share it. */
static void plain_pieces(const md_shard_args *a, md_shard *s)
{
    const md_params *p = a->graph->params;
    const md_topo *t = a->topo;
    const int64_t all_rank = (int64_t)t->dp_rank * t->tp_size + t->tp_rank;
    s->updates = md_params_pieces(p, s->update);
    s->moments = p->elements;
    for (int i = 0; i < s->updates; i++)
        own(s, s->update[i].cut
                   ? part_of(&s->update[i], t->dp_rank, t->dp_size)
                   : part_of(&s->update[i], all_rank, (int64_t)t->dp_size * t->tp_size));
}

/* ZeRO-1: of each bucket this rank's share. One that the ranks of tp have alike is shared once more
 * for what it is answered for. */
static void sharded_pieces(const md_shard_args *a, md_shard *s)
{
    const md_topo *t = a->topo;
    for (int k = 0; k < s->buckets.count; k++) {
        const md_bucket *b = &s->buckets.bucket[k];
        md_comm *c = md_shard_group(t, b->set);
        int64_t size = md_comm_size(c), n = (b->hi - b->lo) / size;
        MD_ASSERT(n * size == b->hi - b->lo, "bucket of %lld elements over %lld ranks",
                  (long long)(b->hi - b->lo), (long long)size);
        md_piece piece = {.offset = b->lo + md_comm_rank(c) * n,
                          .count = n,
                          .moment = s->moments,
                          .decay = set_decay(b->set),
                          .cut = set_cut(b->set),
                          .sharded = size > 1};
        s->share_at[k] = size > 1 ? s->moments : -1;
        s->update[s->updates++] = piece;
        s->moments += n;
        bool alike = !piece.cut && !set_partial(b->set);
        own(s, alike ? part_of(&piece, t->tp_rank, t->tp_size) : piece);
    }
}

md_status md_shard_make(const md_shard_args *args, md_shard *out)
{
    *out = (md_shard){0};
    md_status st = make_buckets(args, out);
    const size_t n = (size_t)MD_MAX(out->buckets.count, (int)MD_GROUPS);
    if (st == MD_OK) {
        out->update = md_alloc(n * sizeof *out->update, "optimizer pieces");
        out->own = md_alloc(n * sizeof *out->own, "optimizer pieces");
        out->share_at = md_alloc(n * sizeof *out->share_at, "optimizer pieces");
        st = out->update && out->own && out->share_at ? MD_OK : MD_ERR_MEMORY;
    }
    if (st != MD_OK) {
        md_shard_free(out);
        return st;
    }
    for (size_t k = 0; k < n; k++)
        out->share_at[k] = -1;
    for (int k = 0; args->zero && k < out->buckets.count; k++)
        out->zero |= md_comm_size(md_shard_group(args->topo, out->buckets.bucket[k].set)) > 1;
    if (out->zero)
        sharded_pieces(args, out);
    else
        plain_pieces(args, out);
    return MD_OK;
}

void md_shard_free(md_shard *s)
{
    md_buckets_free(&s->buckets);
    md_free(s->span_of);
    md_free(s->share_at);
    md_free(s->update);
    md_free(s->own);
    *s = (md_shard){0};
}

int64_t md_shard_find(const md_piece *piece, int n, const md_param *row, int64_t *lo,
                      int64_t *moment)
{
    int64_t found = 0;
    *lo = *moment = 0;
    for (int i = 0; i < n; i++) {
        int64_t first = MD_MAX(piece[i].offset, row->offset);
        int64_t end = MD_MIN(piece[i].offset + piece[i].count, row->offset + row->count);
        if (end <= first)
            continue;
        MD_ASSERT(found == 0, "%s lies in two pieces", row->name);
        found = end - first;
        *lo = first - row->offset;
        *moment = piece[i].moment + first - piece[i].offset;
    }
    return found;
}
