/* probe_heads: linear classifiers on frozen features, trained by a recipe (src/probe_rule.h). A
 * head sees `width` values of an image and answers with its logits; several heads learn from the
 * same images, each from values of its own.
 *
 * A step takes the features of the whole global batch on every rank, and each head is trained by
 * one rank alone, so that every sum has the same order on any number of ranks. The price is that
 * every rank receives them all, 335 MB a step for 1024 images and the 32 blocks of ViT-H: a probe
 * is for a few ranks, whose own images take longer than that.
 * Arithmetic is f32 on the backend; statistics of batch norm are f64 on the host. */
#ifndef MD_PROBE_HEADS_H
#define MD_PROBE_HEADS_H

#include "kernels/backend.h"
#include "mpi/comm.h"
#include "src/probe_rule.h"

typedef struct md_probe_heads_args {
    md_backend *backend;
    md_probe_rule rule;
    int heads, width, classes;
    int rank, ranks; /* head h is trained by rank h % ranks */
    uint64_t seed;   /* of the first weights: normal, deviation 0.01; biases are 0 */
} md_probe_heads_args;

typedef struct md_probe_heads md_probe_heads;

#define MD_PROBE_TILE 256 /* images that answer together */

/* Local. MD_ERR_MEMORY, MD_ERR_DEVICE. Freed by md_probe_heads_free (NULL is fine), before the
 * backend. */
md_status md_probe_heads_create(const md_probe_heads_args *args, md_probe_heads **out);
void md_probe_heads_free(md_probe_heads *h);

/* One step of this rank's heads: feature f32 [rule.batch, heads, width] and label [rule.batch] of
 * the global batch, the same on every rank. Local. MD_ERR_DEVICE. */
md_status md_probe_heads_step(md_probe_heads *h, const float *feature, const int32_t *label,
                              double lr);
/* Mean cross entropy of each head in the last step; 0 of those that others train. Local. */
const double *md_probe_heads_loss(const md_probe_heads *h);

/* Gives all heads to all ranks of c, which are those of the args. Collective(c). MD_ERR_DEVICE. */
md_status md_probe_heads_share(md_probe_heads *h, md_comm *c);

/* Logits f32 [n, classes] of head `head` for n <= MD_PROBE_TILE images, feature f32 [n, heads,
 * width]; batch norm takes its running statistics. The same for an image whatever stands beside it.
 * *out: on the host, until the next call. Local. MD_ERR_DEVICE. */
md_status md_probe_heads_logits(md_probe_heads *h, int head, const float *feature, int n,
                                const float **out);

/* The values of a head: weight f32 [classes, width] and bias f32 [classes] into host memory. Local.
 * MD_ERR_DEVICE. */
md_status md_probe_heads_read(md_probe_heads *h, int head, float *weight, float *bias);

#endif
