/* snapshot: a run's state as a checkpoint: the registry's parameters and moments at their global
 * shapes, and the counters. */
#ifndef MD_SNAPSHOT_H
#define MD_SNAPSHOT_H

#include "io/checkpoint.h"
#include "src/config.h"
#include "src/param.h"
#include "src/shard.h"
#include "src/step.h"

typedef struct md_snapshot {
    md_comm *comm;
    const char *dir; /* run directory */
    const md_config *config;
    md_params *params;
    const md_shard *shard;
    md_train_state *state;
    bool *averaged; /* set by resume: the checkpoint had a moving average */
    uint64_t data_hash;
    const char *teacher_hash; /* "" without */
} md_snapshot;

/* Collective(comm). Writes <dir>/checkpoints/step-<step>.h5, every rank its share of the rows; path
 * gets its name. Errors as md_checkpoint_write; older checkpoints stay. */
md_status md_snapshot_write(const md_snapshot *s, char *path, size_t size);

/* Collective(comm). Reads the newest valid checkpoint of the run directory or, where there is none
 * yet, the one that checkpoint.resume names (path gets its name); else leaves the initial state
 * (path ""). An invalid one is named in a warning and skipped. So the same command, run again, goes
 * on from where it was. MD_ERR_CONFIG: checkpoint.resume = none in a run directory with
 * checkpoints; another model; or, in the run directory's own, another experiment (images, teacher
 * or a key that md_config_compare calls one). */
md_status md_snapshot_resume(const md_snapshot *s, char *path, size_t size);

#endif
