/* features: what a model sees in every image of a split, as a safetensors file for other programs.
 */
#ifndef MD_FEATURES_H
#define MD_FEATURES_H

#include "src/evaluate.h"

/* Beyond so many images the file holds no pictures. */
#define MD_FEATURES_PICTURES 1024

/* Writes `path`: features f32 [N, C] (name: "features", or "logits"), label i64 [N] and, of at most
 * MD_FEATURES_PICTURES images, image u8 [N, S, S, 3] as the model saw it before its normalisation;
 * metadata mean and std are those of this. In stored order. Every rank needs memory for all of it
 * for a moment. Collective(world). The same status on every rank: errors of md_evaluator_run and
 * md_safetensors_write, MD_ERR_MEMORY. */
md_status md_features_write(md_evaluator *e, const md_topo *topo, const md_config *c,
                            const char *name, const char *path);

#endif
