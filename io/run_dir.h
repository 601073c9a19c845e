/* run_dir: one run directory belongs to one job at a time.
 *
 * The file LOCK in it holds "host pid job" and stays locked (flock) while the holder lives, so that
 * a killed run on this host leaves nothing that stands in the way. On shared file systems a lock
 * may not be seen by other hosts: there the holder shows that it lives by touching the file, and is
 * believed dead when it has not for MD_RUN_SILENT seconds, or when it was an earlier run of our own
 * batch job. */
#ifndef MD_RUN_DIR_H
#define MD_RUN_DIR_H

#include "src/base.h"

#define MD_RUN_SILENT 300

/* Makes a directory and those above it; one that is there is fine. Local. MD_ERR_CREATE. */
md_status md_run_dir_make(const char *dir);

typedef struct md_run_lock md_run_lock;

/* Takes an existing directory; one rank of a job does. Local. MD_ERR_PERM: in use, naming the
 * holder; MD_ERR_CREATE: the directory cannot be written. key: of the config, by which another one
 * is chosen; a constant. */
md_status md_run_lock_take(const char *dir, const char *key, md_run_lock **out);
/* Shows that the holder lives; at least every MD_RUN_SILENT / 2 seconds. Local, microseconds. */
void md_run_lock_touch(md_run_lock *lock);
/* Gives the directory back. NULL is fine. A process that just ends gives it back too. Local. */
void md_run_lock_release(md_run_lock *lock);

#endif
