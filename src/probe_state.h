/* probe_state: a linear probe on its way, as the newest checkpoint (io/checkpoint.h) of a folder of
 * its own: heads, moments, statistics of batch norm, losses. A probe that was stopped goes on from
 * it, on any number of ranks; the heads of one that is finished are kept there. */
#ifndef MD_PROBE_STATE_H
#define MD_PROBE_STATE_H

#include "io/run_dir.h"
#include "mpi/topo.h"
#include "src/config.h"
#include "src/probe_heads.h"

typedef struct md_probe_state {
    const md_config *config;
    const md_topo *topo;
    const md_probe_rule *rule;
    md_probe_heads *heads;
    int n; /* heads */
    const char *dir;
    const char *encoder; /* which weights the features are made with: md_pretrained_identity */
    uint64_t data;       /* md_dataset_hash of what is learned from */
    double *loss;        /* [n + 1] this rank's sums of the epoch under way: of the heads that it
                            trains, then of the images that were replaced here */
    double *train_loss;  /* [n] of the last whole epoch */
    md_run_lock *lock;   /* set by take */
} md_probe_state;

/* Collective(world). Makes the folder and takes it. The same status on every rank: MD_ERR_CREATE;
 * MD_ERR_PERM: another probe is at work there. */
md_status md_probe_state_take(md_probe_state *s);
/* Local. Any state of it. */
void md_probe_state_release(md_probe_state *s);

/* Collective(world). *step: how many steps the state has; 0, and nothing is changed, where there is
 * none. A state of another probe (recipe, length, batch, rate, feature, encoder, precision, images,
 * seed) is warned about and set aside as ".abandoned". Errors of md_checkpoint_find and
 * md_checkpoint_read, MD_ERR_DEVICE. */
md_status md_probe_state_resume(md_probe_state *s, int64_t *step);
/* Collective(world). Errors of md_checkpoint_write; MD_ERR_DEVICE. The older state then stays. */
md_status md_probe_state_save(md_probe_state *s, int64_t step);

#endif
