/* step_batch: what one micro-batch brings into the graphs: pictures, masks, rows, drop-path draws.
 * All of it is a function of the global samples and positions, so it does not depend on the process
 * grid. Private to step. */
#ifndef MD_STEP_BATCH_H
#define MD_STEP_BATCH_H

#include "io/prefetch.h"
#include "mpi/topo.h"
#include "src/method.h"

typedef struct md_step_batch {
    md_method *method;
    const md_topo *topo;
    uint64_t seed;
    float *target, *keep;
    int32_t *rel_index, *teacher_rows, *student_rows, *all_rows, *chosen;
    uint8_t *mask, *pixels;
    int64_t *sample;
    double loss; /* the student's, of the last pass */
} md_step_batch;

/* Host bytes that create takes. Local. */
size_t md_step_batch_bytes(const md_method *m);
/* Allocates for zeroed *b, and binds everything but pictures. Local. MD_ERR_MEMORY; free cleans up.
 */
md_status md_step_batch_create(md_method *m, const md_topo *topo, uint64_t seed, md_step_batch *b);
void md_step_batch_free(md_step_batch *b);

/* Takes this rank's images of a pass into the graphs; `batch` must stay until the pass is done.
 * first: position of the pass's first image in the global batch of `step`. Collective(tp): the
 * ranks give each other their pictures where each needs all. */
void md_step_batch_set(md_step_batch *b, const md_batch *batch, int64_t step, int64_t first);

#endif
