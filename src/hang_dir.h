/* hang_dir: the folder RUN/hang, through which ranks speak that can no longer speak by MPI.
 *
 *   rank-00003.txt  a rank's record (src/hang.h), and the stack of its main thread
 *   CALL            somebody asks all ranks for their records
 *   JUDGE           a rank is at the verdict
 *   verdict.txt     the end
 *
 * `run` is the run directory. All functions are Local, hold no state and may be called from any
 * thread. What cannot be written is no error here: the caller goes on without. */
#ifndef MD_HANG_DIR_H
#define MD_HANG_DIR_H

#include "src/hang.h"

#define MD_HANG_CALL    "CALL"
#define MD_HANG_JUDGE   "JUDGE"
#define MD_HANG_VERDICT "verdict.txt"

/* Removes the folder and its files. */
void md_hang_clear(const char *run);

/* Opens the folder, so that a network file system asks the server for what is new in it. */
void md_hang_refresh(const char *run);
bool md_hang_has(const char *run, const char *name);
void md_hang_remove(const char *run, const char *name);
/* Writes a file that appears whole; makes the folder. False when it cannot. */
bool md_hang_put(const char *run, const char *name, const char *text);
/* Makes an empty file; false when it is there already, or cannot be made. */
bool md_hang_claim(const char *run, const char *name);

/* Writes a rank's record in place of the one before. Returns the file, open behind the record for
 * the caller to go on and close, or -1. */
int md_hang_record_put(const char *run, const md_hang_record *r);
void md_hang_record_remove(const char *run, int rank);
/* The record of a rank, or r unchanged but for the rank when there is none. */
void md_hang_record_get(const char *run, int rank, md_hang_record *r);
/* Whether no rank below this one has a record. */
bool md_hang_lowest(const char *run, int rank);

#endif
