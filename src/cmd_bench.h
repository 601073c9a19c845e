/* cmd_bench: what the measurements of `bench` share: a model that trains on made-up pictures. */
#ifndef MD_CMD_BENCH_H
#define MD_CMD_BENCH_H

#include "src/setup.h"
#include "src/step.h"

typedef struct md_bench_options {
    const char *what;       /* "step", "ops" or "comm" */
    const char *case_name;  /* row of the case table */
    char *const *case_keys; /* its overrides */
    int n_case_keys;
    char **overrides; /* the user's, behind them */
    int n_overrides;
    int threads, steps, warmup;
    int repeat;                   /* of each op in `bench ops` */
    bool some, only[MD_OP_COUNT]; /* of the ops, these are timed */
} md_bench_options;

/* Everything one run holds; zero-initialised, freed in one place. */
typedef struct md_bench {
    md_config config;
    md_comm *world;
    md_topo topo;
    md_batch_layout layout;
    md_model model;
    md_backend *be;
    md_stepper *stepper;
    md_train_state state;
    md_batch batch; /* the same pictures at every step */
    uint8_t *pixels;
    int64_t *sample;
    double *ms, *loss; /* [steps] */
} md_bench;

/* Collective(world). Runs o->steps more steps, whose milliseconds and losses go to b->ms and
 * b->loss when keep is set; *last is the last one's result. */
md_status md_bench_steps(md_bench *b, int steps, bool keep, md_step_result *last);

/* Collective(world). `bench comm`: bytes sent a step beside the formula, and when buckets started.
 */
md_status md_bench_comm(md_bench *b, const md_bench_options *o);

/* Local; b->be is a timing backend. `bench ops`: time and rates of every op and shape of a step. */
md_status md_bench_ops(md_bench *b, const md_bench_options *o);

#endif
