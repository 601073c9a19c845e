/* setup: what `train`, `evaluate` and `plan` work out alike from a config. */
#ifndef MD_SETUP_H
#define MD_SETUP_H

#include "mpi/comm.h"
#include "src/method.h"
#include "src/shard.h"

/* run.dir, or runs/<name of the config file without .cfg>. Local. */
void md_setup_run_dir(const md_config *c, char dir[MD_CONFIG_STR]);
/* Collective(world). MD_ERR_CONFIG where ranks have other values: they would exchange other numbers
 * of bytes. */
md_status md_setup_same_config(md_comm *world, const md_config *c);

/* How a global batch is spread: batch = dp * accumulation * micro, ranks = dp * tp. */
typedef struct md_batch_layout {
    int64_t batch, micro;
    int ranks, dp, tp, accumulation;
} md_batch_layout;

/* From train.batch, train.micro_batch, parallel.tensor and the number of ranks. MD_ERR_CONFIG names
 * the keys that do not divide and what would. Local. */
md_status md_batch_layout_make(const md_config *c, int ranks, md_batch_layout *out);

/* What a rank trains with: the method on its place in the grid, its pieces, and memory for both
 * registries. Zero-initialise; md_model_free undoes any part. */
typedef struct md_model {
    md_method method;
    md_shard shard;
} md_model;

/* Resolves and builds the method for this rank and finds its shard. info as for md_method_resolve.
 * Allocates no parameters. Local. */
md_status md_model_make(const md_config *c, const md_teacher_info *info, const md_topo *topo,
                        const md_batch_layout *layout, md_model *out);
/* Allocates parameters, gradients and moments on the backend, which must outlive them, and draws
 * the initial values. Local. MD_ERR_MEMORY, MD_ERR_DEVICE. */
md_status md_model_allocate(const md_config *c, md_backend *be, md_model *m);
/* The backend that a config asks for, on this rank's device. Local. Errors of md_backend_make. */
md_status md_model_backend(const md_config *c, const md_topo *topo, md_backend **out);
void md_model_free(md_model *m);

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
