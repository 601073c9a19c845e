/* volume: what a rank sends in one step, by formula from the model's shapes and the process grid,
 * for bandwidth-optimal collectives: an all-reduce of S bytes over n ranks sends 2 (n - 1) / n S, a
 * reduce-scatter or all-gather half of that (Thakur et al. 2005, "Optimization of Collective
 * Communication Operations in MPICH"). */
#ifndef MD_VOLUME_H
#define MD_VOLUME_H

#include "src/setup.h"

typedef struct md_volume {
    double gradients_dp;  /* over dp: gradients, and under ZeRO parameters in their place */
    double gradients_all; /* the same over all ranks: whole parameters under parallel.sequence */
    double activations;   /* over tp: four sums a block, forward and backward together */
    double targets, pictures; /* over tp, without parallel.sequence */
} md_volume;

/* Bytes a rank sends in one step. Local. */
md_volume md_volume_predict(const md_model *model, const md_batch_layout *layout);

#endif
