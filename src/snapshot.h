/* snapshot: a run's state as a checkpoint: the registry's parameters and moments at their global
 * shapes, and the counters. */
#ifndef MD_SNAPSHOT_H
#define MD_SNAPSHOT_H

#include "io/checkpoint.h"
#include "src/config.h"
#include "src/param.h"
#include "src/step.h"

typedef struct md_snapshot {
    md_comm *comm;
    const char *dir; /* run directory */
    const md_config *config;
    md_params *params;
    md_train_state *state;
    uint64_t data_hash;
    const char *teacher_hash; /* "" without */
} md_snapshot;

/* Collective(comm). Writes <dir>/checkpoints/step-<step>.h5, every rank its share of the rows; path
 * gets its name. Errors as md_checkpoint_write; older checkpoints stay. */
md_status md_snapshot_write(const md_snapshot *s, char *path, size_t size);

/* Collective(comm). Follows checkpoint.resume: reads the newest valid checkpoint (path gets its
 * name), or leaves the initial state (path ""). An invalid one is named in a warning and skipped.
 * MD_ERR_CONFIG when it holds another model, or was trained on other images or another teacher. */
md_status md_snapshot_resume(const md_snapshot *s, char *path, size_t size);

#endif
