/* knn: accuracy of nearest neighbours: a test image takes the class for which the k training images
 * with the most similar features vote most, each with exp(cosine / temperature) (Wu et al. 2018;
 * facebookresearch/dino, eval_knn.py). */
#ifndef MD_KNN_H
#define MD_KNN_H

#include "src/evaluate.h"

typedef struct md_knn_args {
    md_evaluator *train, *test; /* viewers of features */
    md_backend *backend;
    const md_topo *topo;
    int k; /* more than there are training images: all of them vote */
    double temperature;
} md_knn_args;

/* Collective(world). The features of both splits are spread over the ranks, which compare a block
 * of test images at a time with their own training images. Of equal cosines the image that stands
 * first in the store is nearer; of equal votes the class with the lower index wins. top5 counts the
 * five classes with most votes. out->loss is 0. Errors of md_evaluator_run; MD_ERR_CONFIG: the
 * stores' classes differ in number; MD_ERR_MEMORY, MD_ERR_DEVICE. */
md_status md_knn_accuracy(const md_knn_args *args, md_accuracy *out);

#endif
