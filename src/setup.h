/* setup: what `train` and `plan` work out alike from a config. */
#ifndef MD_SETUP_H
#define MD_SETUP_H

#include "mpi/comm.h"
#include "src/method.h"

/* How a global batch is spread: batch = ranks * accumulation * micro. */
typedef struct md_batch_layout {
    int64_t batch, micro;
    int ranks, accumulation;
} md_batch_layout;

/* From train.batch, train.micro_batch and the data-parallel ranks. MD_ERR_CONFIG names the keys
 * that do not divide and what would. Local. */
md_status md_batch_layout_make(const md_config *c, int ranks, md_batch_layout *out);

/* What md_method_resolve needs to know of the teacher, from its weights file, and the hash of the
 * file's content ("" without one). planning: method.teacher.arch will do where there is no file.
 * Local. MD_ERR_CONFIG, or what reading the file gives. */
md_status md_teacher_info_get(const md_config *c, bool planning, md_teacher_info *out,
                              char hash[17]);

/* Collective(world). Fills the allocated teacher registry from method.teacher.weights; positions
 * are resized to the student's grid. Errors of md_weights_open and md_weights_load. */
md_status md_teacher_load(md_comm *world, const md_config *c, md_method *m);

/* Total optimizer steps of a config: train.epochs, cut by train.max_steps. Local. */
int64_t md_total_steps(const md_config *c, int64_t steps_per_epoch);

#endif
