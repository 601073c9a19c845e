/* footprint: see footprint.h. */
#include "src/footprint.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

/* What a rank holds before it has allocated anything: MPI, HDF5, oneDNN, thread stacks. Measured
 * with Open MPI 4.1 and HDF5 1.10 on Debian 12. */
#define BASE_BYTES (40.0 * 1048576.0)

/* What a GPU holds before anything is allocated on it: its context, kernels, cuBLASLt. An estimate;
 * with several ranks, NCCL's buffers come on top. */
#define DEVICE_BASE_BYTES (600.0 * 1048576.0)
#define NCCL_BYTES        (400.0 * 1048576.0)

/* Keeps the largest values seen, falling. */
static void keep_largest(double *most, int n, double value)
{
    for (int i = 0; i < n; i++)
        if (value > most[i]) {
            double smaller = most[i];
            most[i] = value;
            value = smaller;
        }
}

/* What is under way in non-blocking collectives: Open MPI keeps a copy of a bucket that is
 * all-reduced, a reduce-scatter works in memory that was reserved for it, and takes half as much
 * again. And what the transport's fragments take, up to 20 MiB for either kind of traffic: a fit to
 * peaks that were measured with Open MPI 4.1 on one node. */
static double mpi_copies(const md_footprint_args *a)
{
    enum { FLYING = MD_GRAD_REDUCE_FLYING };
    const double most_fragments = 20.0 * 1048576.0;
    const md_shard *s = &a->model->shard;
    const md_method *m = &a->model->method;
    double flying[FLYING] = {0}, whole[FLYING] = {0}, reserved[2] = {0}, copies = 0, under_way = 0;
    for (int k = 0; k < s->buckets.count; k++) {
        const md_bucket *b = &s->buckets.bucket[k];
        const md_comm *c = md_shard_group(a->topo, b->set);
        const double bytes = 4.0 * (double)(b->hi - b->lo);
        if (md_comm_size(c) == 1)
            continue;
        double *kept = &reserved[c == a->topo->op_all];
        keep_largest(flying, FLYING, bytes);
        if (s->share_at[k] < 0)
            keep_largest(whole, FLYING, bytes);
        else
            *kept = MD_MAX(*kept, 1.5 * FLYING * bytes);
    }
    for (int i = 0; i < FLYING; i++) {
        copies += whole[i];
        under_way += flying[i];
    }
    const double sum =
        4.0 * (double)m->images * md_vit_tokens(&m->student_vit.spec) * m->student_vit.spec.width;
    copies += reserved[0] + reserved[1] + MD_MIN(most_fragments, under_way / 2.0);
    return copies + (a->topo->tp_size > 1 ? MD_MIN(most_fragments, 8.0 * sum) : 0.0);
}

static void add(md_memory_map *m, const char *name, double bytes)
{
    MD_ASSERT(m->families < MD_FAMILIES);
    m->family[m->families++] = (md_family){name, bytes};
    m->total += bytes;
}

static void add_operands(const md_footprint_args *a, md_memory_map *m)
{
    const md_method *method = &a->model->method;
    const double rounded = method->params.dtype == MD_BF16 ? 0.5 : 0.0;
    const double block = (double)md_params_block_bytes(&method->params);
    const double shard = 4.0 * (double)a->model->shard.moments;
    const double teacher = (double)md_params_block_bytes(&method->teacher_params);
    add(m, "parameters", (1.0 + rounded) * block);
    add(m, "gradients", block + (a->model->shard.zero ? shard : 0.0));
    add(m, "Adam moments", 2 * shard);
    if (a->model->method.config->optim_ema > 0)
        add(m, "moving average", shard);
    add(m, "teacher", (1.0 + rounded) * teacher);
    add(m, "activations", (double)a->step->activations);
    if (a->evaluation)
        add(m, "evaluation", (double)a->evaluation->operands);
}

/* What the host keeps of a device's blocks: checkpoints are written from there. */
static double host_copies(const md_footprint_args *a)
{
    return (double)md_params_block_bytes(&a->model->method.params) +
           (a->model->method.config->optim_ema > 0 ? 12.0 : 8.0) * (double)a->model->shard.moments;
}

void md_footprint_make(const md_footprint_args *a, md_footprint *out)
{
    *out = (md_footprint){.device = md_backend_is_device(a->be)};
    md_memory_map *operands = out->device ? &out->operands : &out->host, *host = &out->host;
    double buffers = (double)(a->step->scratch + a->step->batch);
    add_operands(a, operands);
    if (out->device) {
        const int ranks = md_comm_size(a->topo->all);
        add(operands, "op scratch and batch buffers", buffers);
        add(operands, "context and libraries", DEVICE_BASE_BYTES + (ranks > 1 ? NCCL_BYTES : 0.0));
        add(host, "copies for checkpoints", host_copies(a));
        buffers = 0;
    }
    add(host, out->device ? "batch buffers" : "op scratch and batch buffers",
        buffers + (double)a->step->host_batch);
    add(host, "loader", (double)md_loader_bytes(a->loader));
    if (a->evaluation)
        add(host, "evaluation, on the host", (double)a->evaluation->host);
    add(host, "image index (one a node)", (double)a->index_bytes);
    if (!out->device)
        add(host, "messages under way", mpi_copies(a));
    add(host, "program and libraries", BASE_BYTES);
}

void md_memory_map_print(const md_memory_map *m, const char *title, char *buf, size_t size)
{
    size_t used = (size_t)snprintf(buf, size, "%s\n", title);
    for (int i = 0; i <= m->families && used < size; i++) {
        const bool last = i == m->families;
        used += (size_t)snprintf(buf + used, size - used, "  %-34s %12.3f GiB\n",
                                 last ? "peak" : m->family[i].name,
                                 (last ? m->total : m->family[i].bytes) / 1073741824.0);
    }
}

/* ---- advice ---- */

/* The operands' map of a changed config on a planned grid; false where it is no valid config. */
static bool plan(const md_config *c, const md_teacher_info *info, int ranks, md_memory_map *out)
{
    md_batch_layout layout;
    md_topo topo = {0};
    md_model model = {0};
    md_backend *be = NULL;
    md_stepper_bytes step;
    md_viewer_bytes evaluation = {0};
    const md_loader_args loader = {
        .source = {.count = 1}, .dp_size = 1, .tp_size = 1, .micro_batch = 1};
    md_status st = md_batch_layout_make(c, ranks, &layout);
    if (st == MD_OK)
        st = md_topo_plan(ranks, layout.tp, &topo);
    if (st == MD_OK)
        st = md_model_make(c, info, &topo, &layout, &model);
    if (st == MD_OK)
        st = md_backend_make(&(md_backend_args){.name = c->backend,
                                                .compute = md_config_compute(c),
                                                .planning = true},
                             &be);
    if (st == MD_OK)
        st = md_stepper_plan(&model.method, be, &step);
    if (st == MD_OK && c->evaluate_every > 0) {
        const md_evaluator_args args =
            md_evaluator_of_run(c, &model.method, be, &topo, layout.micro);
        st = md_evaluator_plan(&args, &loader.source, &evaluation);
    }
    if (st == MD_OK) {
        md_footprint f;
        md_footprint_make(
            &(md_footprint_args){.model = &model,
                                 .topo = &topo,
                                 .be = be,
                                 .step = &step,
                                 .loader = &loader,
                                 .evaluation = c->evaluate_every > 0 ? &evaluation : NULL},
            &f);
        *out = f.operands;
    }
    md_model_free(&model);
    md_topo_free(&topo);
    md_backend_destroy(be);
    return st == MD_OK;
}

/* What the changes begin from: a valid config, and what its memory is to fit into, 0 where that is
 * not known. */
typedef struct start {
    const md_config *config;
    const md_teacher_info *info;
    int ranks;
    double limit;
} start;

/* A whole number of the config, as an offset in it; and what another value costs in speed. */
typedef struct change {
    const char *key;
    size_t field;
    const char *cost;
} change;
#define CHANGE(key, field, cost)              \
    {                                         \
        key, offsetof(md_config, field), cost \
    }

/* In the order in which they are told: the cheapest first. */
enum { ZERO, MICRO, RECOMPUTE, TENSOR, CHANGES };
static const change changes[CHANGES] = {
    [ZERO] = CHANGE("parallel.zero", parallel_zero, "the same traffic"),
    [MICRO] = CHANGE("train.micro_batch", train_micro_batch, "more passes, smaller products"),
    [RECOMPUTE] =
        CHANGE("train.recompute", train_recompute, "most of these blocks' forward pass again"),
    [TENSOR] = CHANGE("parallel.tensor", parallel_tensor, "sums of activations between GPUs"),
};

/* Bytes with another value; false where that is no valid config. */
static bool bytes_with(const start *from, const change *h, int64_t value, double *out)
{
    md_config changed = *from->config;
    md_memory_map m;
    memcpy((char *)&changed + h->field, &value, sizeof value);
    if (!plan(&changed, from->info, from->ranks, &m))
        return false;
    *out = m.total;
    return true;
}

static bool fits_with(const start *from, const change *h, int64_t value)
{
    double bytes;
    return bytes_with(from, h, value, &bytes) && bytes <= from->limit;
}

/* The largest smaller one that divides a rank's images and fits, or, where none does, just the
 * largest; 0: there is none. */
static int64_t smaller_micro(const start *from, const md_batch_layout *l)
{
    double bytes;
    int64_t largest = 0;
    for (int64_t less = l->micro - 1; less >= 1; less--)
        if (l->accumulation * l->micro % less == 0 &&
            bytes_with(from, &changes[MICRO], less, &bytes)) {
            if (bytes <= from->limit)
                return less;
            largest = MD_MAX(largest, less);
        }
    return largest;
}

/* So many blocks that it fits, not many more than needed: each drops what it keeps, but the region
 * is packed anew and need not shrink by as much. All blocks, where these are not enough. */
static int64_t more_recomputed(const start *from)
{
    int64_t below = from->config->train_recompute, enough = from->config->model_layers - 1;
    if (!fits_with(from, &changes[RECOMPUTE], enough))
        return enough;
    while (enough - below > 1) {
        const int64_t middle = (below + enough) / 2;
        *(fits_with(from, &changes[RECOMPUTE], middle) ? &enough : &below) = middle;
    }
    return enough;
}

void md_footprint_changes(const md_config *c, const md_teacher_info *info, int ranks, double limit,
                          char *buf, size_t size)
{
    md_memory_map now;
    md_batch_layout l;
    buf[0] = 0;
    if (md_batch_layout_make(c, ranks, &l) != MD_OK || !plan(c, info, ranks, &now))
        return;
    /* What should fit by the plan and did not says nothing of what else would. */
    const start from = {c, info, ranks, now.total > limit ? limit : 0};
    const int64_t value[CHANGES] = {[ZERO] = 1,
                                    [MICRO] = smaller_micro(&from, &l),
                                    [RECOMPUTE] = more_recomputed(&from),
                                    [TENSOR] = 2 * l.tp};
    size_t used = (size_t)snprintf(buf, size, "what would lessen it\n"), none = used;
    for (int i = 0; i < CHANGES; i++) {
        double bytes;
        if (bytes_with(&from, &changes[i], value[i], &bytes) && bytes < now.total && used < size)
            used += (size_t)snprintf(buf + used, size - used, "  %s = %lld: %.2f GiB%s (%s)\n",
                                     changes[i].key, (long long)value[i], bytes / 1073741824.0,
                                     bytes <= from.limit ? ", fits" : "", changes[i].cost);
    }
    if (used == none)
        snprintf(buf + used, size - used,
                 "  none of train.micro_batch, train.recompute, "
                 "parallel.zero and parallel.tensor\n");
}

void md_footprint_advice(const md_config *c, const md_teacher_info *info, int ranks, double left,
                         char *buf, size_t size)
{
    md_memory_map now;
    buf[0] = 0;
    if (!plan(c, info, ranks, &now))
        return;
    md_memory_map_print(&now, "what a GPU has to hold", buf, size);
    const size_t used = strlen(buf);
    md_footprint_changes(c, info, ranks, left > 0 ? left + DEVICE_BASE_BYTES : 0, buf + used,
                         size - used);
}
