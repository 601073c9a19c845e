/* weights: pretrained weights of a Vision Transformer as one HDF5 file, "md_hpc.weights", and how
 * they are made from safetensors.
 *
 * The file: one contiguous fp32 data set per parameter under its name (dialects.h), each with the
 * attribute xxh3 (16 hex digits of its bytes); root attributes format, version, kind = "vit",
 * width, layers, heads, patch, grid, mlp, proj_width, pre_norm, patch_bias, act, ln_eps, mean[3],
 * std[3], dialect, source, params, hash (XXH3 over attributes, names and hashes). Any h5py reads
 * it. Version 1 holds a model with absolute positions, one bias for q, k and v, and a final norm.
 * Any other (BEiT) is version 2, with the attributes rel_pos (0 none, 1 shared, 2 in every block),
 * abs_pos, layer_scale, qv_bias, mask_token, final_norm, fc_norm, classes and lm_width. */
#ifndef MD_WEIGHTS_H
#define MD_WEIGHTS_H

#include "io/dialects.h"
#include "mpi/comm.h"

/* Relative position tables. */
typedef enum md_weights_rel {
    MD_WEIGHTS_REL_NONE,
    MD_WEIGHTS_REL_SHARED,
    MD_WEIGHTS_REL_PER_LAYER
} md_weights_rel;

typedef struct md_weights_info {
    int width, layers, heads, patch, mlp;
    int grid;       /* side of the position tables */
    int proj_width; /* 0 = no projection after the final norm */
    int pre_norm;   /* 1: LayerNorm before the first block (CLIP) */
    int patch_bias; /* 1: the patch embedding has a bias */
    int rel_pos;    /* md_weights_rel */
    /* 0 or 1: absolute positions; layer scale; biases of q and v alone, else one of q, k and v; a
     * mask token; norm behind the last block; fc_norm behind the mean of the tokens. */
    int abs_pos, layer_scale, qv_bias, mask_token, final_norm, fc_norm;
    int classes;  /* of the classifier; 0 = none */
    int lm_width; /* of the pretraining head; 0 = none */
    md_act act;
    double ln_eps;
    double mean[3], std[3]; /* of the input's channels, pixels in [0, 1] */
    int64_t params;
    char dialect[32], source[256];
    char hash[24]; /* of the content */
} md_weights_info;

/* "gelu" or "quick_gelu". */
const char *md_act_name(md_act act);
/* MD_ACT_NONE when the name is none of these. */
md_act md_act_parse(const char *name);

/* True when the model has the parameter. Local. */
bool md_weights_has(const md_weights_info *info, md_weight_id id);
void md_weights_dims(const md_weights_info *info, md_weight_dims *dims);

/* Reads what a file holds without its tensors and without MPI. Local.
 * MD_ERR_NOINPUT missing, MD_ERR_DATA not ours, damaged, or a value out of range. */
md_status md_weights_info_read(const char *path, md_weights_info *info);

typedef struct md_weights md_weights;

/* Opens a file on rank 0 of the group, which alone reads it; checks that every parameter is there
 * with its shape. The file stays open until md_weights_close (Local).
 * Collective(c); c == NULL: Local. Errors as md_weights_info_read, the same on every rank. */
md_status md_weights_open(md_comm *c, const char *path, md_weights **out);
void md_weights_close(md_weights *w);
const md_weights_info *md_weights_get_info(const md_weights *w);

/* Reads one parameter into dst (fp32, host memory, the stored shape; leading extents of one do not
 * count) on every rank, after its hash was verified. Collective over the group of md_weights_open.
 * MD_ERR_DATA: no such parameter, another shape, damaged. MD_ERR_IO. */
md_status md_weights_load(md_weights *w, const char *name, md_tensor *dst);

/* Gives the values of one parameter to md_weights_write: `out` has its whole shape. */
typedef md_status (*md_weights_fill)(void *arg, md_weight_id id, int layer, float *out);

/* Writes a file; info->params and info->hash are set here. Local.
 * MD_ERR_CREATE, MD_ERR_IO, MD_ERR_MEMORY, or what fill returns. */
md_status md_weights_write(const char *path, md_weights_info *info, md_weights_fill fill,
                           void *arg);

/* What `md_hpc weights import` was told; zero or NULL leaves a value to the config files beside the
 * input (config.json, open_clip_config.json, preprocessor_config.json) and then to the dialect. */
typedef struct md_weights_import_args {
    const char *input;  /* as md_safetensors_open */
    const char *output; /* the HDF5 file to make */
    const char *prefix; /* wrapper prefix, see md_dialect_match */
    md_act act;
    int heads;
    const double *mean, *std; /* [3] each */
} md_weights_import_args;

/* What was made, and where each value that is not in the tensors came from. */
typedef struct md_weights_import_report {
    md_weights_info info;
    int ignored;
    char stored[32]; /* dtype of the tensors read, "mixed" when they differ */
    const char *act_from, *heads_from, *eps_from, *colours_from;
} md_weights_import_report;

/* Number of heads where nothing says it: 64 channels each, but 16 heads at the widths 1280, 1408
 * and 1664 of the published H, g and G models. */
int md_weights_default_heads(int64_t width);

/* Converts a safetensors file or set. Local. Errors of md_safetensors_open, md_dialect_match and
 * md_weights_write; MD_ERR_DATA when a value cannot be known or does not fit. */
md_status md_weights_import(const md_weights_import_args *args, md_weights_import_report *report);

/* How positions of the source and the resized table correspond; in the order of the key
 * method.teacher.pos_interpolation. */
typedef enum md_pos_rule {
    MD_POS_BEIT2, /* scale (g_dst + 0.1) / g_src (microsoft/unilm, beit2/vqkd_teacher/clip/model.py)
                   */
    MD_POS_EXACT  /* scale g_dst / g_src (Hugging Face transformers, interpolate_pos_encoding) */
} md_pos_rule;

typedef struct md_pos_resize_args {
    const float *src; /* [g_src * g_src + 1, width], cls first */
    float *dst;       /* [g_dst * g_dst + 1, width] */
    int g_src, g_dst, width;
    md_pos_rule rule;
} md_pos_resize_args;

/* Resizes a position table: bicubic (a = -0.75), half-pixel centres, borders repeated, no
 * antialiasing, as torch.nn.functional.interpolate(mode="bicubic"). The cls row is copied; equal
 * sides copy everything. Local. */
void md_pos_resize(const md_pos_resize_args *a);

typedef struct md_rel_pos_resize_args {
    const float *src;        /* [(2 g_src - 1)^2 + 3, heads], the rows of the class token last */
    float *dst;              /* [(2 g_dst - 1)^2 + 3, heads] */
    int g_src, g_dst, heads; /* sides of the windows, in patches */
} md_rel_pos_resize_args;

/* Resizes a relative position bias table as BEiT does when the window changes (microsoft/unilm,
 * beit2/run_class_finetuning.py). The source's offsets 0, 1, 2, ... go to the distances 0, 1,
 * 1 + q, 1 + q + q^2, ..., which leaves neighbours where they are and spreads the far ones to the
 * target's edge; a bicubic spline through them (of lower degree where a side has 3 entries) gives
 * the target's offsets. The last 3 rows are copied; equal sides copy everything. Local.
 * MD_ERR_MEMORY. */
md_status md_rel_pos_resize(const md_rel_pos_resize_args *a);
/* That q, in [1.01, 1.5]: a target that is not larger has the least. Local. */
double md_rel_pos_ratio(int g_src, int g_dst);

#endif
