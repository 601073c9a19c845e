/* probe_heads: linear classifiers on frozen features, trained by a recipe (src/probe_rule.h). A
 * head sees `width` values of an image and answers with its logits; several heads learn from the
 * same images, each from values of its own.
 *
 * Each head is trained by one rank alone, from the features of the whole global batch, so that
 * every sum has the same order on any number of ranks. Arithmetic is f32 on the backend; statistics
 * of batch norm are f64 on the host. */
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

/* How many heads this rank trains: rank, rank + ranks, ... Local. */
int md_probe_heads_own(const md_probe_heads *h);
/* One step of them: feature f32 [rule.batch, own, width] and label [rule.batch] of the global
 * batch. Local. MD_ERR_DEVICE. */
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

/* An array of a head while it is trained: "param", a moment ("adam_m", "adam_v" or "momentum"), or
 * a statistic of "batch_norm". */
typedef struct md_probe_array {
    const char *group, *name; /* "adam_m", "weight" */
    md_tensor value;          /* in host memory; no data where another rank trains the head */
} md_probe_array;

/* Arrays a head has, the same for all. Local. */
int md_probe_heads_arrays(const md_probe_heads *h);
md_probe_array md_probe_heads_array(const md_probe_heads *h, int head, int i);
/* Brings the arrays' memory up to date, or takes it over after so many steps; of this rank's heads.
 * Local. MD_ERR_DEVICE. */
md_status md_probe_heads_fetch(md_probe_heads *h);
md_status md_probe_heads_store(md_probe_heads *h, int64_t updates);

#endif
