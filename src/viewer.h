/* viewer: looks at images with a model that is being trained, or was: its logits, or features of an
 * image. The graph runs over the method's own parameters, as they are at that moment,
 * without masks, drop path or mixing; its activations and scratch are its own. */
#ifndef MD_VIEWER_H
#define MD_VIEWER_H

#include "mpi/topo.h"
#include "src/method.h"

/* Logits of a classifier (f32 [K]); or a feature [C]: the mean of the patch tokens, or the cls
 * token, behind the final norm (a classifier's mean behind its fc_norm); or what every block gives,
 * from the first to the last, without a norm [L, 2C]: the cls token and the mean of the patch
 * tokens. */
typedef enum md_sight { MD_SIGHT_LOGITS, MD_SIGHT_MEAN, MD_SIGHT_CLS, MD_SIGHT_BLOCKS } md_sight;

typedef struct md_viewer_args {
    const md_method *method; /* resolved; registry allocated */
    md_backend *backend;
    const md_topo *topo;
    md_sight sight;
    int64_t images; /* of one pass, shared by the ranks of tp, which it divides over */
} md_viewer_args;

typedef struct md_viewer md_viewer;

/* Local. MD_ERR_CONFIG: the model has no such thing to look at; MD_ERR_MEMORY, MD_ERR_DEVICE.
 * Freed by md_viewer_free (NULL is fine), before backend and method. */
md_status md_viewer_create(const md_viewer_args *args, md_viewer **out);
void md_viewer_free(md_viewer *v);
/* Bytes of a viewer, from shapes alone. Local. Errors of md_viewer_create. */
typedef struct md_viewer_bytes {
    size_t operands, host;
} md_viewer_bytes;
md_status md_viewer_plan(const md_viewer_args *args, md_viewer_bytes *out);
/* Values of an image in what run gives. */
int md_viewer_width(const md_viewer *v);

/* Collective(tp). own: this rank's images u8 [images / tp, S, S, 3], in rank order. *out: f32
 * [images, width] on the host, the same on all ranks of tp, until the next run. A rank whose op
 * fails ends the job where others would wait. MD_ERR_DEVICE. */
md_status md_viewer_run(md_viewer *v, const uint8_t *own, const float **out);
/* Image j of the last run, of those of all ranks of tp: u8 [S, S, 3]. Local. */
const uint8_t *md_viewer_image(const md_viewer *v, int64_t j);

#endif
