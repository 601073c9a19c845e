/* hang: what the watchdog knows and concludes: how long a phase may take, a rank's record as text,
 * and the verdict from all records. Pure functions; src/watchdog.c has the clock, the threads and
 * the files. */
#ifndef MD_HANG_H
#define MD_HANG_H

#include "src/base.h"

/* Which part of a run a phase is in: setting up and checkpoints get ten times the patience. */
typedef enum md_part { MD_PART_SETUP, MD_PART_STEP, MD_PART_CHECKPOINT } md_part;

/* ---- patience ---- */

#define MD_HANG_PHASES 64 /* phases whose longest time is remembered; a run has some thirty */

typedef struct md_hang_limits {
    int64_t seconds; /* hang.seconds; 0 = nothing is ever too long */
    int phases;
    struct {
        const char *name; /* kept, not owned */
        md_part part;
        double longest;
    } phase[MD_HANG_PHASES];
} md_hang_limits;

/* Seconds after which a phase is too long: hang.seconds, ten times that outside of steps, and at
 * least ten times the longest that the phase has taken so far. Local. */
double md_hang_limit(const md_hang_limits *l, const char *phase, md_part part);
/* The phase took this long. Local. */
void md_hang_learn(md_hang_limits *l, const char *phase, md_part part, double seconds);
/* Seconds that the ranks have to write their records. Local. */
double md_hang_grace(int64_t seconds);

/* ---- records ---- */

/* What one rank tells of itself. Zero-initialised, it is a rank that tells nothing. */
typedef struct md_hang_record {
    bool answers; /* it has written a record */
    bool moves;   /* its main thread has gone on since the others began to ask */
    int rank;
    long pid;
    char host[64];             /* also known of ranks that do not answer; may be "" */
    char phase[48];            /* "comm.*": it waits for others */
    int64_t step, collectives; /* collectives: entered so far */
    double seconds;            /* since when it is in its phase */
} md_hang_record;

/* A record as lines of text, and back. md_hang_parse leaves what the text lacks as it is and
 * returns false when it is no record. Local. */
void md_hang_print(const md_hang_record *r, char *text, size_t size);
bool md_hang_parse(const char *text, md_hang_record *r);

/* "rank 37 (nid0123) stopped in data.wait at step 1841 for 312 s". Local. */
void md_hang_sentence(const md_hang_record *r, char *text, size_t size);

/* Who holds the others up, in one line: the ranks that do not answer; else those that answer and
 * wait for nobody; else, as all wait, those that have entered the fewest collectives. Returns false
 * when a rank moves: then nobody hangs, and the line says who is slow. r[n] in the order of ranks.
 * Local. */
bool md_hang_verdict(const md_hang_record *r, int n, char *text, size_t size);

#endif
