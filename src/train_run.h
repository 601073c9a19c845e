/* train_run: a whole run, as train_setup.c makes it and train.c runs it. Everything it holds is in
 * one struct, zero at first, so that tear_down can end it from any point of set_up. Private to
 * them. */
#ifndef MD_TRAIN_RUN_H
#define MD_TRAIN_RUN_H

#include "io/run_dir.h"
#include "src/bad_images.h"
#include "src/drift.h"
#include "src/evaluate.h"
#include "src/progress.h"
#include "src/setup.h"
#include "src/snapshot.h"

typedef struct md_run {
    md_config config;
    char dir[MD_CONFIG_STR];
    md_comm *world;
    md_topo topo;
    md_batch_layout layout;
    md_model model;
    char teacher_hash[17];
    md_backend *be;
    md_dataset *data;
    md_loader *loader;
    md_stepper *stepper;
    md_evaluator *evaluator; /* NULL: the run evaluates nothing */
    md_drift drift;
    md_bad_images *bad;
    md_run_lock *lock;
    md_runlog *log;
    md_train_state state;
    md_progress progress;
    bool averaged; /* the moving average came from a checkpoint */
    int64_t steps_per_epoch, total_steps, saved_step;
    char checkpoint[1024]; /* path of the last one written or read */
} md_run;

/* Collective(world). Every step is either local and agreed upon, or collective by itself. */
md_status md_run_set_up(md_run *r, int argc, char **argv);
/* Collective(world). Frees all but the world group, from any point of set_up. */
void md_run_tear_down(md_run *r);

/* The state as a checkpoint takes it. Local. */
md_snapshot md_run_snapshot(md_run *r);

#endif
