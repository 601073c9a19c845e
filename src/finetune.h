/* finetune: parameters by their names from an earlier run: where a classifier starts, or what is
 * evaluated. */
#ifndef MD_FINETUNE_H
#define MD_FINETUNE_H

#include "io/pretrained.h"
#include "src/method.h"

typedef struct md_start_args {
    const char *key, *path; /* of the config, and what it says: as md_pretrained_open takes it */
    bool whole;             /* every parameter of the model has to be there */
    bool ema;               /* the moving averages instead */
    char *identity;         /* [MD_PRETRAINED_IDENTITY] gets md_pretrained_identity; or NULL */
} md_start_args;

/* Collective(world). Fills the allocated registry of m and tells on the terminal what it took.
 * Parameters go by name; a shared relative position table becomes the table of every block; tables
 * of positions are resized to the model's grid. Unless `whole`, head.* and fc_norm.* may stay at
 * their initial values; parameters of the source that the model has not (mask_token, lm_head, norm)
 * do not matter (microsoft/unilm, beit2/run_class_finetuning.py). MD_ERR_CONFIG: a parameter is
 * missing or has another shape; errors of md_pretrained_open; MD_ERR_DEVICE. */
md_status md_finetune_load(md_comm *world, const md_start_args *args, md_method *m);

#endif
