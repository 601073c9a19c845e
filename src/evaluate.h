/* evaluate: how well a model does on a split whose labels are known. Every image of the split is
 * looked at once, whatever the number of ranks; counts are whole numbers, summed over the ranks. */
#ifndef MD_EVALUATE_H
#define MD_EVALUATE_H

#include "io/prefetch.h"
#include "io/run_dir.h"
#include "mpi/topo.h"
#include "src/method.h"
#include "src/viewer.h"

/* Local. MD_ERR_DATA names the first image of the open split that has no class. */
md_status md_labels_check(const md_dataset *d, const char *path, const char *split);

typedef struct md_evaluator_args {
    const md_config *config;
    const md_method *method;
    md_backend *backend;
    const md_topo *topo;
    const char *data, *split; /* the image store, and the split of it */
    md_sight sight;
    int64_t images; /* of one pass of the ranks of tp, which it divides over */
    int64_t limit;  /* only the first so many images of the split; 0: all */
} md_evaluator_args;
/* The next number of images that does. Local. */
int64_t md_evaluator_images(const md_topo *topo, int64_t images);
/* The evaluation of a run while it trains (evaluate.every), in passes of evaluate.batch or of
 * `micro` images. Local. */
md_evaluator_args md_evaluator_of_run(const md_config *c, const md_method *m, md_backend *be,
                                      const md_topo *topo, int64_t micro);
/* Bytes of an evaluator of these images, loader included, from shapes alone. Local. Errors of
 * md_viewer_plan. */
md_status md_evaluator_plan(const md_evaluator_args *args, const md_source *images,
                            md_viewer_bytes *out);

typedef struct md_evaluator md_evaluator;

/* Opens the split. Collective(world). Errors of md_dataset_open and md_viewer_create; MD_ERR_DATA:
 * an image has no label, or one beyond the model's classes. Freed by md_evaluator_free
 * (Collective(world), NULL is fine). */
md_status md_evaluator_create(const md_evaluator_args *args, md_evaluator **out);
void md_evaluator_free(md_evaluator *e);
const md_dataset *md_evaluator_data(const md_evaluator *e);
/* MD_ERR_CONFIG: the images to learn from and those that are judged have not as many classes.
 * Local. */
md_status md_evaluator_same_classes(const md_evaluator *train, const md_evaluator *test);
/* For who looks at the images in another order or size: where they come from, and the viewer.
 * Local. */
md_source md_evaluator_source(const md_evaluator *e);
md_viewer *md_evaluator_viewer(const md_evaluator *e);
/* Images that run looks at. Local. */
int64_t md_evaluator_count(const md_evaluator *e);
/* Most images that run shows one rank. Local. */
int64_t md_evaluator_share(const md_evaluator *e);
int md_evaluator_width(const md_evaluator *e);
/* Run shows at every pass that the holder of a directory lives (NULL: of none). Local. */
void md_evaluator_hold(md_evaluator *e, md_run_lock *lock);

/* What was seen of one image: its index in the split, its label, the viewer's values, and the
 * picture u8 [S, S, 3] itself. */
typedef struct md_seen {
    int64_t index;
    int32_t label;
    const float *values;
    const uint8_t *image;
} md_seen;
/* Called for every image, on one rank of those that share a model. */
typedef void (*md_evaluator_see)(void *context, const md_seen *seen);
/* Looks at all images, each on one data-parallel rank. Collective(world). The same status on every
 * rank: MD_ERR_DATA for a picture that cannot be decoded, MD_ERR_IO. */
md_status md_evaluator_run(md_evaluator *e, md_evaluator_see see, void *context);

/* Of one class, or of all. */
typedef struct md_hits {
    int64_t images, top1, top5;
} md_hits;

/* The classes that answers are taken from. NULL classes: all of the model's. Else label i of the
 * store means class class[i] of the model. */
typedef struct md_class_subset {
    const int *class;
    int classes;
} md_class_subset;

/* The row of that name in evaluate.classes; NULL for "all". Local. */
const md_class_subset *md_class_subset_find(const char *name);

typedef struct md_accuracy {
    md_hits all;
    md_hits *by_class; /* [classes] owned; classes as the store counts them */
    int classes;
    double loss; /* mean cross entropy with the labels as they are; a rank's sum while it counts */
} md_accuracy;

/* Of no images yet. Local. MD_ERR_MEMORY. Freed by md_accuracy_free. */
md_status md_accuracy_make(int classes, md_accuracy *out);
/* Counts one image by its logits, of subset's classes (NULL: all); of equal ones the class with the
 * lower index comes first. Local. */
void md_accuracy_count(md_accuracy *a, const md_class_subset *subset, int32_t label,
                       const float *logits);

/* Top-1 and top-5 of a classifier. Collective(world). *out is freed by md_accuracy_free. Errors of
 * md_evaluator_run; MD_ERR_CONFIG: the store's classes are not those that are answered;
 * MD_ERR_MEMORY. */
md_status md_evaluate_accuracy(md_evaluator *e, const md_class_subset *subset, md_accuracy *out);
void md_accuracy_free(md_accuracy *a);
/* Collective(c). Sums by_class over the ranks, and `all` over the classes; takes the mean loss. */
void md_accuracy_sum(md_comm *c, md_accuracy *a);
/* 83.21 of 100; 0 of no images. */
double md_percent(int64_t hits, int64_t images);

#endif
