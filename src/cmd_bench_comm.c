/* cmd_bench_comm: `bench comm`. What a group counted is what the collectives that were really
 * called send by bandwidth-optimal algorithms (md_comm_counted); the prediction knows shapes only
 * (src/volume.h). What the library sends underneath is its own choice. */
#include "mpi/agree.h"
#include "src/cmd_bench.h"
#include "src/volume.h"

#include <stdio.h>

/* Counts of one group, and what is predicted for it. */
typedef struct line {
    const char *group, *what;
    int ranks;
    md_comm_count count; /* of all measured steps */
    double predicted;    /* bytes a step; negative: none is made */
} line;

static void print_line(const line *l, int steps)
{
    const double sent = l->count.sent / steps;
    printf("%-6s %5d  %-44s %9.1f %14.3f", l->group, l->ranks, l->what,
           (double)l->count.calls / steps, 1e-6 * sent);
    if (l->predicted >= 0)
        printf(" %14.3f", 1e-6 * l->predicted);
    if (l->predicted > 0)
        printf(" %7.4f", sent / l->predicted);
    putchar('\n');
}

/* When each bucket of the last step was started, relative to the backward pass; its end is when the
 * last gradient was there, before anything was waited for. */
static void print_buckets(const md_bench *b, const md_step_result *r)
{
    const md_buckets *k = &b->model.shard.buckets;
    const md_grad_reduce *g = md_step_reducer(b->stepper);
    const double end = md_grad_reduce_closed(g);
    int late = 0;
    printf("\nbucket     MiB   started, ms (of %.1f ms of the last backward pass)\n",
           1e3 * (end - r->backward_begin));
    for (int i = 0; i < k->count; i++) {
        double at = md_grad_reduce_begun(g, i);
        late += at > end;
        printf("%6d %7.2f   %.1f\n", i,
               4.0 * (double)(k->bucket[i].hi - k->bucket[i].lo) / 1048576.0,
               1e3 * (at - r->backward_begin));
    }
    printf("%d of %d buckets were started before the last layer's gradients were there\n",
           k->count - late, k->count);
}

/* Of a group, and of the same ranks' group for operands where that is another one. */
static md_comm_count counted(const md_comm *host, const md_comm *operands)
{
    md_comm_count n = md_comm_counted(host);
    if (operands == host)
        return n;
    md_comm_count more = md_comm_counted(operands);
    return (md_comm_count){n.calls + more.calls, n.bytes + more.bytes, n.sent + more.sent};
}

/* Counts since the last call; both ends of the measured steps. */
static void count(const md_bench *b, line *l)
{
    const md_topo *t = &b->topo;
    md_comm *const group[] = {t->tp, t->dp, t->all, t->world};
    md_comm *const operands[] = {t->op_tp, t->op_dp, t->op_all, t->world};
    for (size_t i = 0; i < MD_COUNT(group); i++) {
        md_comm_count now = counted(group[i], operands[i]);
        l[i].ranks = md_comm_size(group[i]);
        l[i].count = (md_comm_count){now.calls - l[i].count.calls, now.bytes - l[i].count.bytes,
                                     now.sent - l[i].count.sent};
    }
}

md_status md_bench_comm(md_bench *b, const md_bench_options *o)
{
    const md_volume v = md_volume_predict(&b->model, &b->layout);
    line l[] = {{"tensor", "activations, targets, pictures", 0, {0}, 0},
                {"data", b->model.shard.zero ? "gradients and parameters" : "gradients", 0, {0}, 0},
                {"all", "the same of whole parameters", 0, {0}, 0},
                {"world", "one small sum a step", 0, {0}, -1}};
    l[0].predicted = v.activations + v.targets + v.pictures;
    l[1].predicted = v.gradients_dp;
    l[2].predicted = v.gradients_all;
    md_step_result last;
    MD_TRY(md_bench_steps(b, o->warmup, false, &last));
    count(b, l);
    MD_TRY(md_bench_steps(b, o->steps, true, &last));
    count(b, l);
    md_comm_barrier(b->world);
    if (md_comm_rank(b->world) != 0)
        return MD_OK;
    printf("%-6s %5s  %-44s %9s %14s %14s %7s\n", "group", "ranks", "", "calls", "MB sent/step",
           "predicted", "ratio");
    for (size_t i = 0; i < MD_COUNT(l); i++)
        print_line(&l[i], o->steps);
    print_buckets(b, &last);
    return MD_OK;
}
