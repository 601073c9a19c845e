/* pretrained: parameters of an earlier run by their names, as values to start from. They are in a
 * checkpoint of ours (io/checkpoint.h), in the newest whole one of a run directory, or in a weights
 * file (io/weights.h), which is what imported models are. */
#ifndef MD_PRETRAINED_H
#define MD_PRETRAINED_H

#include "io/weights.h"

typedef struct md_pretrained md_pretrained;

/* Collective(c). Opens a checkpoint, a run directory (or its folder "checkpoints") or a weights
 * file; damaged checkpoints of a directory are warned about and skipped. `ema`: the moving averages
 * of the parameters ("ema/NAME" in a checkpoint) instead of the parameters ("param/NAME"). The same
 * status on every rank: MD_ERR_NOINPUT nothing is there; MD_ERR_DATA damaged, of another kind, or
 * without moving averages; MD_ERR_IO, MD_ERR_MEMORY. */
md_status md_pretrained_open(md_comm *c, const char *path, bool ema, md_pretrained **out);
void md_pretrained_close(md_pretrained *p); /* NULL is fine. Local */
/* Whether a path looks like a checkpoint or a folder of them, not like a file or folder of another
 * program. Local. */
bool md_pretrained_is_run(const char *path);

/* Whether there is a parameter of this name. Local, the same on every rank. */
bool md_pretrained_has(const md_pretrained *p, const char *name);
/* Its number of dimensions, and these (0 behind the last one); 0 when there is none. A weights file
 * has its tokens without leading extents of one: "cls_token" is [W] there, not [1, 1, W]. Local. */
int md_pretrained_shape(const md_pretrained *p, const char *name, int64_t dim[MD_MAX_RANK]);
/* Reads the whole array on every rank, after its hash was verified. Collective. The same status on
 * every rank, with a sentence that names file and parameter: MD_ERR_DATA no such parameter, not
 * fp32, or damaged (`whole` is then undefined); MD_ERR_IO, MD_ERR_MEMORY. */
md_status md_pretrained_load(md_pretrained *p, const char *name, float *whole);

/* How many parameters a checkpoint has; 0 for a weights file. Local. */
int md_pretrained_count(const md_pretrained *p);
/* What a weights file says of its model; NULL for a checkpoint. Local. */
const md_weights_info *md_pretrained_weights(const md_pretrained *p);
/* The file itself. Local. */
const char *md_pretrained_path(const md_pretrained *p);
/* "checkpoint PATH at step N" (and ", moving averages") or "weights PATH (DIALECT)". Local. */
const char *md_pretrained_describe(const md_pretrained *p);
/* A hash of all that is in it, and "ema" for moving averages: other weights have another one. At
 * most MD_PRETRAINED_IDENTITY bytes, the NUL included. Local. */
#define MD_PRETRAINED_IDENTITY 32
const char *md_pretrained_identity(const md_pretrained *p);
/* The configuration that a checkpoint was written with; "" when there is none. Local. */
const char *md_pretrained_config(const md_pretrained *p);

#endif
