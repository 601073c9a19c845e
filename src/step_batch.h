/* step_batch: what one micro-batch brings into the graphs: pictures, masks, rows, drop-path draws,
 * and with labels how pictures are mixed and the targets. All of it is a function of the global
 * samples and positions, so it does not depend on the process grid. Private to step.
 *
 * What changes from pass to pass stands in one block, filled on the host and fed to the backend as
 * one. A device has MD_FEED_SLOTS of them, used in turn, so that one is filled and copied while the
 * pass before still reads another. */
#ifndef MD_STEP_BATCH_H
#define MD_STEP_BATCH_H

#include "io/prefetch.h"
#include "mpi/topo.h"
#include "src/method.h"
#include "src/mix.h"

typedef struct md_step_batch {
    md_method *method;
    const md_topo *topo;
    md_backend *be;
    uint64_t seed;
    md_mix_rule mix;
    int slot, slots;
    char *host[MD_FEED_SLOTS]; /* blocks; on host memory the operands themselves */
    char *operands[MD_FEED_SLOTS];
    void *target, *rel_index; /* operands */
    double *loss;             /* operand: the student's, of the last pass */
    int32_t *chosen;
    uint8_t *other_mask; /* masks of other ranks' images */
    int64_t *sample;
    int32_t *label; /* of the pass's images, where targets come from them */
} md_step_batch;

/* Bytes that create takes of operand memory and of the host's (the same memory counts once, as
 * operands). Local. */
void md_step_batch_bytes(const md_method *m, bool device, size_t *operands, size_t *host);
/* Allocates for zeroed *b. Local. MD_ERR_MEMORY; free cleans up. */
md_status md_step_batch_create(md_method *m, const md_topo *topo, md_backend *be, uint64_t seed,
                               md_step_batch *b);
void md_step_batch_free(md_step_batch *b);

/* Takes this rank's images of a pass into the graphs; `batch` must stay until the pass is done.
 * first: position of the pass's first image in the global batch of `step`. Collective(tp): the
 * ranks give each other their pictures where each needs all. MD_ERR_DEVICE. */
md_status md_step_batch_set(md_step_batch *b, const md_batch *batch, int64_t step, int64_t first);
/* The ops of the pass have been issued. MD_ERR_DEVICE. */
md_status md_step_batch_used(md_step_batch *b);

#endif
