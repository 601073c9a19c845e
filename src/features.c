/* features: see features.h. */
#include "src/features.h"
#include "io/safetensors.h"
#include "mpi/agree.h"

#include <stdio.h>
#include <string.h>

/* What one rank has seen, or all: a record an image, without gaps. */
typedef struct record_layout {
    int width;
    size_t picture, bytes; /* of a picture (0: not kept), of a record */
} record_layout;

/* index i64, label i64, values f32 [width], picture. */
typedef struct gathering {
    record_layout l;
    int64_t count, room;
    char *record;
} gathering;

static void put(void *context, const md_seen *seen)
{
    gathering *g = context;
    MD_ASSERT(g->count < g->room, "%lld records", (long long)g->count);
    char *r = g->record + (size_t)g->count++ * g->l.bytes;
    const int64_t label = seen->label;
    memcpy(r, &seen->index, 8);
    memcpy(r + 8, &label, 8);
    memcpy(r + 16, seen->values, 4 * (size_t)g->l.width);
    memcpy(r + 16 + 4 * (size_t)g->l.width, seen->image, g->l.picture);
}

/* The file's tensors, in stored order. */
typedef struct table {
    int64_t n, *label;
    float *values;
    uint8_t *picture;
} table;

static md_status table_make(table *t, const record_layout *l, int64_t n)
{
    t->n = n;
    MD_NEW(t->label, n, "features");
    MD_NEW(t->values, n * l->width, "features");
    if (l->picture)
        MD_NEW(t->picture, (size_t)n * l->picture, "features");
    return MD_OK;
}

static void table_fill(table *t, const record_layout *l, const char *record, int64_t records)
{
    for (int64_t i = 0; i < records; i++) {
        const char *r = record + (size_t)i * l->bytes;
        int64_t index;
        memcpy(&index, r, 8);
        if (index < 0)
            continue;
        memcpy(&t->label[index], r + 8, 8);
        memcpy(t->values + index * l->width, r + 16, 4 * (size_t)l->width);
        if (l->picture)
            memcpy(t->picture + (size_t)index * l->picture, r + 16 + 4 * (size_t)l->width,
                   l->picture);
    }
}

static md_status write_table(const table *t, const record_layout *l, const md_config *c,
                             const char *name, const char *path)
{
    char mean[96], std[96];
    const int64_t side = c->image_size;
    snprintf(mean, sizeof mean, "%.17g %.17g %.17g", c->image_mean[0], c->image_mean[1],
             c->image_mean[2]);
    snprintf(std, sizeof std, "%.17g %.17g %.17g", c->image_std[0], c->image_std[1],
             c->image_std[2]);
    const md_st_tensor list[] = {{name, MD_TENSOR(t->values, MD_F32, t->n, l->width)},
                                 {"label", MD_TENSOR(t->label, MD_I64, t->n)},
                                 {"image", MD_TENSOR(t->picture, MD_U8, t->n, side, side, 3)}};
    const md_st_meta meta[] = {{"mean", mean}, {"std", std}};
    return md_safetensors_write(path, list, t->picture ? 3 : 2, meta, 2);
}

/* Collective(world). Rank 0 writes what all have seen. */
static md_status gather(const gathering *g, md_evaluator *e, const md_topo *topo,
                        const md_config *c, const char *name, const char *path)
{
    md_comm *world = topo->world;
    const int64_t all = g->room * md_comm_size(world);
    const bool first = md_comm_rank(world) == 0;
    char *records = md_alloc((size_t)all * g->l.bytes, "features");
    table t = {0};
    md_status st = records ? MD_OK : MD_ERR_MEMORY;
    if (st == MD_OK && first)
        st = table_make(&t, &g->l, md_evaluator_count(e));
    st = md_agree(world, st);
    if (st == MD_OK) {
        md_comm_allgather(world, g->record, records, g->room * (int64_t)g->l.bytes);
        if (first) {
            table_fill(&t, &g->l, records, all);
            st = write_table(&t, &g->l, c, name, path);
        }
        st = md_agree(world, st);
    }
    md_free(records);
    md_free(t.label);
    md_free(t.values);
    md_free(t.picture);
    return st;
}

md_status md_features_write(md_evaluator *e, const md_topo *topo, const md_config *c,
                            const char *name, const char *path)
{
    const bool pictures = md_evaluator_count(e) <= MD_FEATURES_PICTURES;
    const size_t picture = (size_t)(c->image_size * c->image_size * 3);
    gathering g = {.l = {.width = md_evaluator_width(e), .picture = pictures ? picture : 0},
                   .room = MD_MAX(md_evaluator_share(e), 1)};
    g.l.bytes = 16 + 4 * (size_t)g.l.width + g.l.picture;
    g.record = md_alloc((size_t)g.room * g.l.bytes, "features");
    md_status st = md_agree(topo->world, g.record ? MD_OK : MD_ERR_MEMORY);
    if (st == MD_OK) {
        const int64_t none = -1;
        for (int64_t i = 0; i < g.room; i++)
            memcpy(g.record + (size_t)i * g.l.bytes, &none, 8);
        st = md_evaluator_run(e, put, &g);
    }
    if (st == MD_OK)
        st = gather(&g, e, topo, c, name, path);
    md_free(g.record);
    return st;
}
