/* weights_export: a model of BEiT's architecture as the files that other programs load: one
 * safetensors file, config.json and, for transformers, preprocessor_config.json beside it. */
#ifndef MD_WEIGHTS_EXPORT_H
#define MD_WEIGHTS_EXPORT_H

#include "io/weights_source.h"

/* Whose names and classes. */
typedef enum md_export_names {
    MD_EXPORT_BEIT2, /* microsoft/unilm, beit2 */
    MD_EXPORT_TIMM,  /* timm.models.beit.Beit */
    MD_EXPORT_HF,    /* transformers BeitForImageClassification, -MaskedImageModeling, BeitModel */
    MD_EXPORT_COUNT
} md_export_names;

typedef struct md_weights_export_args {
    const char *output; /* a file ".safetensors", or a folder, made if missing, for
                           model.safetensors */
    md_export_names names;
    md_dtype dtype; /* F32, BF16 or F16: of all tensors, rounded to nearest even */
} md_weights_export_args;

typedef struct md_weights_export_report {
    char path[4096];    /* of the safetensors file */
    const char *model;  /* the class that loads it */
    char left_out[256]; /* parameters that the class has not; "" = none */
    char caveat[256];   /* what the class does otherwise; "" = nothing */
    int tensors;
    int64_t bytes;
} md_weights_export_report;

/* -1 when the word is none of beit2, timm and hf. */
int md_export_names_parse(const char *word);

/* Writes all files; each gets its name when it is whole. Local. MD_ERR_DATA: the model has parts
 * that those names have no place for, or a value that the type cannot hold; MD_ERR_CREATE,
 * MD_ERR_IO, MD_ERR_MEMORY, and the errors of md_weights_source_fill. */
md_status md_weights_export(md_weights_source *source, const md_weights_export_args *args,
                            md_weights_export_report *report);

/* The config files' content as JSON text (freed with free()): config.json, or with `preprocessor`
 * transformers' preprocessor_config.json. NULL: out of memory. Local. */
char *md_export_config(const md_weights_info *info, md_export_names names, md_dtype dtype,
                       bool preprocessor);
/* Name of the class that loads the model. */
const char *md_export_model(const md_weights_info *info, md_export_names names);

#endif
