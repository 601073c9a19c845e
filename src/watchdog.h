/* watchdog: finds a rank that has stopped and ends the run, where MPI would wait for ever.
 *
 * The main thread leaves marks: which phase it is in. Two threads of each rank watch them. When the
 * mark has not changed for longer than its limit (src/hang.h), the rank writes a record of what it
 * does, with the stack of its main thread, into RUN/hang/, and calls: the file CALL. Every rank
 * that sees the call writes its own record. After a grace time the lowest rank that has written
 * reads them all. If a rank moved meanwhile, nobody hangs: a warning names the slow one and all go
 * on. Else the verdict is printed once and kept in RUN/hang/verdict.txt and status.json, and every
 * rank ends with MD_ERR_HANG. A rank that was stopped and goes on finds itself moving, or the
 * verdict. Nothing of this needs MPI. When the run directory is not known yet or does not answer,
 * each rank speaks for itself on stderr and ends. */
#ifndef MD_WATCHDOG_H
#define MD_WATCHDOG_H

#include "src/hang.h"

MD_C_BEGIN

/* ---- marks; main thread only; Local, nanoseconds, whether anybody watches or not ---- */

/* This rank is now in the phase of this name (a string that stays), which counts as progress.
 * Phases "comm.*" are waits for other ranks. Returns the mark before, for a nested place to set
 * again. */
const char *md_phase(const char *name);
void md_phase_step(int64_t step);
/* The part of the run that phases belong to from now on; returns the one before. */
md_part md_phase_part(md_part part);

/* ---- watching ---- */

/* Starts the watch with hang.seconds; 0 = no watch. Local, main thread, once. MD_ERR_MEMORY; then
 * nothing is left. */
md_status md_watch_start(int64_t seconds);
/* Ends it. Local; fine when it was not started. */
void md_watch_stop(void);

/* Records go to run/hang from now on. Local; every rank, once, when one has cleared it
 * (md_hang_clear) and all know. */
void md_watch_dir(const char *run);
/* Names of all ranks' hosts, `width` bytes each; copied. Local. */
void md_watch_hosts(const char *hosts, int width);

MD_C_END

#endif
