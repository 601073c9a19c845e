/* hang: see hang.h. */
#include "src/hang.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define PATIENT 10  /* times the limit outside of steps, and times the longest seen */
#define NAMED   8   /* ranks a verdict names */
#define GRACE   2.0 /* least seconds for the records, unless hang.seconds is less */

/* ---- patience ---- */

static int phase_find(const md_hang_limits *l, const char *phase, md_part part)
{
    for (int i = 0; i < l->phases; i++)
        if (l->phase[i].part == part && strcmp(l->phase[i].name, phase) == 0)
            return i;
    return -1;
}

double md_hang_limit(const md_hang_limits *l, const char *phase, md_part part)
{
    if (l->seconds == 0)
        return INFINITY;
    int i = phase_find(l, phase, part);
    double least = (double)l->seconds * (part == MD_PART_STEP ? 1 : PATIENT);
    return MD_MAX(least, i < 0 ? 0.0 : PATIENT * l->phase[i].longest);
}

void md_hang_learn(md_hang_limits *l, const char *phase, md_part part, double seconds)
{
    int i = phase_find(l, phase, part);
    if (i < 0 && l->phases == MD_HANG_PHASES)
        return;
    if (i < 0) {
        i = l->phases++;
        l->phase[i].name = phase;
        l->phase[i].part = part;
    }
    l->phase[i].longest = MD_MAX(l->phase[i].longest, seconds);
}

double md_hang_grace(int64_t seconds)
{
    return MD_MAX(MD_MIN(GRACE, (double)seconds), (double)seconds / 10);
}

/* ---- records ---- */

void md_hang_print(const md_hang_record *r, char *text, size_t size)
{
    snprintf(text, size,
             "rank %d\nhost %s\npid %ld\nphase %s\nstep %lld\ncollectives %lld\nseconds %.1f\n"
             "state %s\n",
             r->rank, r->host, r->pid, r->phase, (long long)r->step, (long long)r->collectives,
             r->seconds, r->moves ? "moves" : "stopped");
}

bool md_hang_parse(const char *text, md_hang_record *r)
{
    md_hang_record q = *r;
    char state[8] = "";
    long long step, collectives;
    const char *host = strstr(text, "\nhost "), *pid = strstr(text, "\npid ");
    if (!host || !pid || sscanf(text, "rank %d\n", &q.rank) != 1 ||
        sscanf(pid,
               "\npid %ld\nphase %47s\nstep %lld\ncollectives %lld\nseconds %lf\nstate "
               "%7s\n",
               &q.pid, q.phase, &step, &collectives, &q.seconds, state) != 6)
        return false;
    host += 6;
    if (*host != '\n') /* a host may have no name */
        snprintf(q.host, sizeof q.host, "%.*s", (int)strcspn(host, "\n"), host);
    q.step = step;
    q.collectives = collectives;
    q.answers = true;
    q.moves = strcmp(state, "moves") == 0;
    *r = q;
    return true;
}

/* ---- the verdict ---- */

/* A line that grows to the size there is. */
typedef struct line {
    char *text;
    size_t size, used;
} line;

__attribute__((format(printf, 2, 3))) static void add(line *l, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(l->text + l->used, l->size - l->used, fmt, ap);
    va_end(ap);
    l->used = MD_MIN(l->used + (size_t)MD_MAX(n, 0), l->size - 1);
}

static bool waits(const md_hang_record *r)
{
    return strncmp(r->phase, "comm.", 5) == 0;
}

static void add_rank(line *l, const md_hang_record *r)
{
    add(l, *r->host ? "rank %d (%s)" : "rank %d", r->rank, r->host);
}

static void add_sentence(line *l, const md_hang_record *r)
{
    add_rank(l, r);
    if (!r->answers)
        add(l, " does not answer");
    else if (r->moves)
        add(l, " is slow: in %s at step %lld", r->phase, (long long)r->step);
    else
        add(l, " %s %s at step %lld for %.*f s", waits(r) ? "waits in" : "stopped in", r->phase,
            (long long)r->step, r->seconds < 10 ? 1 : 0, r->seconds);
}

void md_hang_sentence(const md_hang_record *r, char *text, size_t size)
{
    line l = {text, size, 0};
    text[0] = 0;
    add_sentence(&l, r);
}

/* Why a rank is named. */
typedef enum blame { BLAME_MOVES, BLAME_SILENT, BLAME_BUSY, BLAME_BEHIND } blame;

static bool blamed(const md_hang_record *r, blame why, int64_t fewest)
{
    switch (why) {
    case BLAME_MOVES:
        return r->answers && r->moves;
    case BLAME_SILENT:
        return !r->answers;
    case BLAME_BUSY:
        return r->answers && !waits(r);
    default:
        return r->answers && r->collectives == fewest;
    }
}

static int count(const md_hang_record *r, int n, blame why, int64_t fewest)
{
    int hits = 0;
    for (int i = 0; i < n; i++)
        hits += blamed(&r[i], why, fewest);
    return hits;
}

static void add_blamed(line *l, const md_hang_record *r, int n, blame why, int64_t fewest)
{
    int hits = 0;
    for (int i = 0; i < n; i++) {
        if (!blamed(&r[i], why, fewest) || hits++ >= NAMED)
            continue;
        add(l, hits > 1 ? ", " : "");
        add_sentence(l, &r[i]);
        if (why == BLAME_BEHIND)
            add(l, " as number %lld", (long long)fewest);
    }
    if (hits > NAMED)
        add(l, " and %d more", hits - NAMED);
}

/* Who waits where, apart from the blamed: a count for each phase. */
static void add_others(line *l, const md_hang_record *r, int n, blame why, int64_t fewest)
{
    struct {
        const char *phase;
        int ranks;
    } seen[4] = {{0}};
    for (int i = 0; i < n; i++)
        for (size_t k = 0; k < MD_COUNT(seen) && !blamed(&r[i], why, fewest) && waits(&r[i]); k++)
            if (!seen[k].phase || strcmp(seen[k].phase, r[i].phase) == 0) {
                seen[k].phase = r[i].phase;
                seen[k].ranks++;
                break;
            }
    int64_t step = 0;
    for (int i = 0; i < n; i++)
        step = MD_MAX(step, r[i].step);
    for (size_t k = 0; k < MD_COUNT(seen) && seen[k].phase; k++)
        add(l, "%s%d rank%s in %s", k ? ", " : "; ", seen[k].ranks,
            seen[k].ranks > 1 ? "s wait" : " waits", seen[k].phase);
    if (why == BLAME_SILENT) /* the sentences have no step */
        add(l, " at step %lld", (long long)step);
}

bool md_hang_verdict(const md_hang_record *r, int n, char *text, size_t size)
{
    line l = {text, size, 0};
    int64_t fewest = INT64_MAX;
    text[0] = 0;
    for (int i = 0; i < n; i++)
        if (r[i].answers)
            fewest = MD_MIN(fewest, r[i].collectives);
    blame why = BLAME_MOVES;
    while (why < BLAME_BEHIND && count(r, n, why, fewest) == 0)
        why++;
    if (why == BLAME_BEHIND && count(r, n, why, fewest) == n) {
        add(&l,
            "all %d ranks wait in %s at step %lld for %.0f s, nobody is behind: the network or "
            "the MPI library has stopped",
            n, r[0].phase, (long long)r[0].step, r[0].seconds);
        return true;
    }
    add_blamed(&l, r, n, why, fewest);
    add_others(&l, r, n, why, fewest);
    return why != BLAME_MOVES;
}
