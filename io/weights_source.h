/* weights_source: one model, parameter by parameter, wherever it is kept: in a file of
 * `md_hpc weights import` or in a checkpoint of a training run. */
#ifndef MD_WEIGHTS_SOURCE_H
#define MD_WEIGHTS_SOURCE_H

#include "io/weights.h"

typedef struct md_weights_source md_weights_source;

/* Opens a weights file, a checkpoint, or the newest valid checkpoint of a folder or run directory
 * (damaged ones are named in warnings). ema: the averaged parameters, items "ema/<name>" of a
 * checkpoint, instead of "param/<name>". Of a checkpoint, sizes are read from the shapes, and
 * heads, epsilon and channel statistics (and the grid of a model without position tables) from the
 * config in it. *out is NULL on
 * failure. Local. Errors of md_pretrained_open; MD_ERR_DATA when a checkpoint
 * has no averaged parameters, or parameters that are not those of a BEiT. */
md_status md_weights_source_open(const char *path, bool ema, md_weights_source **out);
void md_weights_source_close(md_weights_source *s);

const md_weights_info *md_weights_source_info(const md_weights_source *s);
/* The file it is read from. */
const char *md_weights_source_path(const md_weights_source *s);
/* A md_weights_fill with a source as its argument: reads a parameter and checks its hash. */
md_status md_weights_source_fill(void *source, md_weight_id id, int layer, float *out);

#endif
