/* topo_table: see topo_table.h. */
#include "mpi/topo_table.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "mpi/agree.h"
#include "src/log.h"

#define WIDTH 100 /* of a line, where its first entry leaves room */

/* A text that grows up to its size and then loses what is behind. */
typedef struct text {
    char s[512];
    size_t used;
} text;

__attribute__((format(printf, 2, 3))) static void put(text *t, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(t->s + t->used, sizeof t->s - t->used, fmt, args);
    va_end(args);
    t->used = MD_MIN(t->used + (size_t)MD_MAX(n, 0), sizeof t->s - 1);
}

/* Writes rising numbers as "0-3,8", "0-62:2" while they come; values equal to the last are passed
 * over. */
typedef struct runs {
    text *t;
    int first, last, step, count; /* of the run that is still open */
} runs;

static void runs_close(runs *r)
{
    const char *comma = r->t->used ? "," : "";
    if (r->count == 1 || (r->count == 2 && r->step > 1))
        put(r->t, "%s%d", comma, r->first);
    else if (r->count)
        put(r->t, "%s%d-%d", comma, r->first, r->last);
    if (r->count > 2 && r->step > 1)
        put(r->t, ":%d", r->step);
    if (r->count == 2 && r->step > 1) /* the second may begin a run */
        r->first = r->last, r->count = 1;
    else
        r->count = 0;
}

static void runs_add(runs *r, int v)
{
    if (r->count && v == r->last)
        return;
    if (r->count > 1 && v - r->last != r->step)
        runs_close(r);
    if (r->count == 0)
        r->first = v;
    else
        r->step = v - r->last;
    r->last = v;
    r->count++;
}

static void runs_end(runs *r)
{
    while (r->count)
        runs_close(r);
}

static bool has_core(const cpu_set_t *cores, int i)
{
    return i >= 0 && CPU_ISSET((size_t)i, cores);
}

static text cores_text(const cpu_set_t *cores)
{
    text t = {0};
    runs r = {.t = &t};
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (has_core(cores, i))
            runs_add(&r, i);
    runs_end(&r);
    if (t.used == 0)
        put(&t, "?");
    return t;
}

/* The left columns of one node. */
typedef struct row {
    text ranks, dp, tp;
} row;

static void describe(const md_topo_seat *seat, int n, row *r)
{
    *r = (row){0};
    runs ranks = {.t = &r->ranks}, dp = {.t = &r->dp}, tp = {.t = &r->tp};
    int highest = 0;
    for (int i = 0; i < n; i++) {
        runs_add(&ranks, seat[i].rank);
        runs_add(&dp, seat[i].dp);
        highest = MD_MAX(highest, seat[i].tp);
    }
    for (int v = 0; v <= highest; v++)
        for (int i = 0; i < n; i++)
            if (seat[i].tp == v)
                runs_add(&tp, v);
    runs_end(&ranks);
    runs_end(&dp);
    runs_end(&tp);
}

/* Seats of the node of seat 0. */
static int node_seats(const md_topo_seat *seat, int ranks)
{
    int n = 1;
    while (n < ranks && seat[n].node == seat[0].node)
        n++;
    return n;
}

/* Lines that are broken between entries. */
typedef struct lines {
    text line;
    size_t indent; /* of the lines that follow; where the first entry of a line stands */
    md_topo_emit *emit;
    void *ctx;
} lines;

static void lines_entry(lines *l, const char *separator, const char *entry)
{
    bool first = l->line.used <= l->indent;
    if (!first && l->line.used + strlen(separator) + strlen(entry) > WIDTH) {
        put(&l->line, "%.*s", (int)strcspn(separator, " "), separator);
        l->emit(l->ctx, l->line.s);
        l->line = (text){0};
        put(&l->line, "%*s", (int)l->indent, "");
        first = true;
    }
    put(&l->line, "%s%s", first ? "" : separator, entry);
}

static int lowest_core(const cpu_set_t *cores)
{
    int i = 0;
    while (i < CPU_SETSIZE && !has_core(cores, i))
        i++;
    return i;
}

/* True when every rank's cores are those of the rank before moved up by the same number. */
static bool cores_go_on(const md_topo_seat *seat, int n)
{
    int step = lowest_core(&seat[1].cores) - lowest_core(&seat[0].cores);
    if (step <= 0)
        return false;
    for (int k = 1; k < n; k++)
        for (int i = 0; i < CPU_SETSIZE; i++)
            if (has_core(&seat[k].cores, i) != has_core(&seat[k - 1].cores, i - step))
                return false;
    return true;
}

static void put_cores(lines *l, const md_topo_seat *seat, int n)
{
    const char *lead = "cores ";
    if (n >= 4 && cores_go_on(seat, n)) {
        text a = cores_text(&seat[0].cores), b = cores_text(&seat[1].cores);
        text z = cores_text(&seat[n - 1].cores), t = {0};
        put(&t, "%s%.120s %.120s .. %.120s", lead, a.s, b.s, z.s);
        lines_entry(l, "  ", t.s);
        return;
    }
    for (int i = 0, same; i < n; i += same, lead = "") {
        for (same = 1; i + same < n && CPU_EQUAL(&seat[i].cores, &seat[i + same].cores); same++)
            ;
        text own = cores_text(&seat[i].cores), t = {0};
        put(&t, "%s%.400s", lead, own.s);
        if (same > 1)
            put(&t, " x%d", same);
        lines_entry(l, i ? " " : "  ", t.s);
    }
}

static void put_devices(lines *l, const md_topo_seat *seat, int n)
{
    for (int i = 0, same; i < n; i += same) {
        for (same = 1; i + same < n && strcmp(seat[i].device, seat[i + same].device) == 0; same++)
            ;
        text t = {0};
        put(&t, "%s%s", i ? "" : "device ", seat[i].device);
        if (same > 1)
            put(&t, " x%d", same);
        lines_entry(l, i ? ", " : "  ", t.s);
    }
}

void md_topo_lines(const md_topo_seat *seat, int ranks, md_topo_emit *emit, void *ctx)
{
    size_t host = 0, in_ranks = 0, in_dp = 0, in_tp = 0;
    row r;
    for (int i = 0, n; i < ranks; i += n) {
        n = node_seats(seat + i, ranks - i);
        describe(seat + i, n, &r);
        host = MD_MAX(host, strlen(seat[i].host));
        in_ranks = MD_MAX(in_ranks, r.ranks.used);
        in_dp = MD_MAX(in_dp, r.dp.used);
        in_tp = MD_MAX(in_tp, r.tp.used);
    }
    int digits = snprintf(NULL, 0, "%d", seat[ranks - 1].node);
    for (int i = 0, n; i < ranks; i += n) {
        n = node_seats(seat + i, ranks - i);
        describe(seat + i, n, &r);
        lines l = {.emit = emit, .ctx = ctx};
        put(&l.line, "node %*d  %-*s  ranks %-*s  dp %-*s  tp %-*s", digits, seat[i].node,
            (int)host, seat[i].host, (int)in_ranks, r.ranks.s, (int)in_dp, r.dp.s, (int)in_tp,
            r.tp.s);
        l.indent = MD_MIN(l.line.used, WIDTH / 2) + 2;
        put(&l.line, "  ");
        put_cores(&l, seat + i, n);
        put_devices(&l, seat + i, n);
        emit(ctx, l.line.s);
    }
}

static int ranks_with(const md_topo_seat *seat, int n, const cpu_set_t *cores)
{
    int count = 0;
    for (int i = 0; i < n; i++)
        count += CPU_EQUAL(&seat[i].cores, cores) != 0;
    return count;
}

static bool clash(const md_topo_seat *seat, int n, int a, int b)
{
    const cpu_set_t *x = &seat[a].cores, *y = &seat[b].cores;
    cpu_set_t both;
    CPU_AND(&both, x, y);
    if (CPU_COUNT(&both) == 0)
        return false;
    if (CPU_EQUAL(x, y))
        return CPU_COUNT(x) < seat[a].online && CPU_COUNT(x) < ranks_with(seat, n, x);
    return true;
}

/* The first two ranks of a node that clash. */
static bool find_clash(const md_topo_seat *seat, int n, int *a, int *b)
{
    for (*a = 0; *a < n; ++*a)
        for (*b = *a + 1; *b < n; ++*b)
            if (clash(seat, n, *a, *b))
                return true;
    return false;
}

bool md_topo_overlap(const md_topo_seat *seat, int ranks, char *text_out, size_t size)
{
    int nodes = 0;
    for (int i = 0, n, a, b; i < ranks; i += n) {
        n = node_seats(seat + i, ranks - i);
        if (!find_clash(seat + i, n, &a, &b) || nodes++)
            continue;
        text x = cores_text(&seat[i + a].cores), y = cores_text(&seat[i + b].cores);
        snprintf(text_out, size,
                 "ranks %d and %d on %s are bound to the same cores (%.100s and %.100s): bind each "
                 "rank to its own, or none (mpirun --bind-to none, srun --cpu-bind=none)",
                 seat[i + a].rank, seat[i + b].rank, seat[i].host, x.s, y.s);
    }
    return nodes > 0;
}

static void take_seat(const md_topo *t, const char *device, md_topo_seat *s)
{
    *s = (md_topo_seat){.online = (int)sysconf(_SC_NPROCESSORS_ONLN),
                        .rank = md_comm_rank(t->world),
                        .dp = t->dp_rank,
                        .tp = t->tp_rank,
                        .node = t->node};
    if (gethostname(s->host, sizeof s->host - 1) != 0)
        snprintf(s->host, sizeof s->host, "?");
    snprintf(s->device, sizeof s->device, "%s", device);
    if (sched_getaffinity(0, sizeof s->cores, &s->cores) != 0)
        CPU_ZERO(&s->cores);
}

static void show(void *ctx, const char *line)
{
    (void)ctx;
    md_log_info("%s", line);
}

md_status md_topo_table(const md_topo *t, const char *device)
{
    int ranks = md_comm_size(t->all);
    md_topo_seat own, *seat = md_alloc(sizeof *seat * (size_t)ranks, "process table");
    md_status st = md_agree(t->world, seat ? MD_OK : MD_ERR_MEMORY);
    if (st == MD_OK) {
        take_seat(t, device, &own);
        md_comm_allgather(t->all, &own, seat, sizeof own);
    }
    if (st == MD_OK && md_comm_rank(t->world) == 0) {
        char warning[512];
        md_log_info("process grid: %d rank%s on %d node%s, %d data parallel x %d tensor parallel",
                    ranks, ranks > 1 ? "s" : "", t->nodes, t->nodes > 1 ? "s" : "", t->dp_size,
                    t->tp_size);
        md_topo_lines(seat, ranks, show, NULL);
        if (md_topo_overlap(seat, ranks, warning, sizeof warning))
            md_log_warn("%s", warning);
    }
    md_free(seat);
    return st;
}
