/* dialects: which names public programs give to the parameters of a Vision Transformer, and how
 * each becomes one of ours. A dialect is a table; all of them are walked by the same code.
 *
 * Our names are timm's and BEiT's. Letters of a shape: W width, Q 3 W, F width of the MLP, T tokens
 * (side * side + 1), C colours (3), P patch side, O width of the projection, R rows of a relative
 * position table ((2 side - 1)^2 + 3), H heads, K classes, L width of the pretraining head. */
#ifndef MD_DIALECTS_H
#define MD_DIALECTS_H

#include "io/safetensors.h"
#include "kernels/backend.h"

/* Every parameter a weights file can hold: X(id, name, shape, per layer) */
#define MD_WEIGHTS(X)                                                   \
    X(CLS, "cls_token", "W", 0)                                         \
    X(MASK, "mask_token", "W", 0)                                       \
    X(POS, "pos_embed", "TW", 0)                                        \
    X(PATCH_W, "patch_embed.proj.weight", "WCPP", 0)                    \
    X(PATCH_B, "patch_embed.proj.bias", "W", 0)                         \
    X(PRE_W, "norm_pre.weight", "W", 0)                                 \
    X(PRE_B, "norm_pre.bias", "W", 0)                                   \
    X(REL_SHARED, "rel_pos_bias.relative_position_bias_table", "RH", 0) \
    X(NORM1_W, "blocks.%d.norm1.weight", "W", 1)                        \
    X(NORM1_B, "blocks.%d.norm1.bias", "W", 1)                          \
    X(QKV_W, "blocks.%d.attn.qkv.weight", "QW", 1)                      \
    X(QKV_B, "blocks.%d.attn.qkv.bias", "Q", 1)                         \
    X(Q_B, "blocks.%d.attn.q_bias", "W", 1)                             \
    X(V_B, "blocks.%d.attn.v_bias", "W", 1)                             \
    X(REL, "blocks.%d.attn.relative_position_bias_table", "RH", 1)      \
    X(OUT_W, "blocks.%d.attn.proj.weight", "WW", 1)                     \
    X(OUT_B, "blocks.%d.attn.proj.bias", "W", 1)                        \
    X(GAMMA_1, "blocks.%d.gamma_1", "W", 1)                             \
    X(NORM2_W, "blocks.%d.norm2.weight", "W", 1)                        \
    X(NORM2_B, "blocks.%d.norm2.bias", "W", 1)                          \
    X(FC1_W, "blocks.%d.mlp.fc1.weight", "FW", 1)                       \
    X(FC1_B, "blocks.%d.mlp.fc1.bias", "F", 1)                          \
    X(FC2_W, "blocks.%d.mlp.fc2.weight", "WF", 1)                       \
    X(FC2_B, "blocks.%d.mlp.fc2.bias", "W", 1)                          \
    X(GAMMA_2, "blocks.%d.gamma_2", "W", 1)                             \
    X(NORM_W, "norm.weight", "W", 0)                                    \
    X(NORM_B, "norm.bias", "W", 0)                                      \
    X(PROJ_W, "proj.weight", "OW", 0)                                   \
    X(FC_NORM_W, "fc_norm.weight", "W", 0)                              \
    X(FC_NORM_B, "fc_norm.bias", "W", 0)                                \
    X(HEAD_W, "head.weight", "KW", 0)                                   \
    X(HEAD_B, "head.bias", "K", 0)                                      \
    X(LM_HEAD_W, "lm_head.weight", "LW", 0)                             \
    X(LM_HEAD_B, "lm_head.bias", "L", 0)

typedef enum md_weight_id {
#define MD_WEIGHT_ENUM(id, name, shape, layer) MD_WEIGHT_##id,
    MD_WEIGHTS(MD_WEIGHT_ENUM)
#undef MD_WEIGHT_ENUM
        MD_WEIGHT_COUNT
} md_weight_id;

#define MD_WEIGHT_NAME   80
#define MD_DIALECT_PARTS 3

/* What the letters stand for in one model. */
typedef struct md_weight_dims {
    int64_t width, mlp, tokens, patch;
    int64_t proj, rel_rows, heads, classes, lm_width; /* 0 = not there */
    int layers;
} md_weight_dims;

/* Name of a parameter (layer is ignored where it has none) and its shape under dims. Local. */
const char *md_weight_name(md_weight_id id, int layer, char buf[MD_WEIGHT_NAME]);
bool md_weight_per_layer(md_weight_id id);
/* Returns the number of dimensions. */
int md_weight_shape(md_weight_id id, const md_weight_dims *d, int64_t dim[MD_MAX_RANK]);

/* What a dialect says about the model besides names, where no config file says it. */
typedef struct md_dialect_defaults {
    md_act act; /* MD_ACT_NONE: cannot be known */
    double ln_eps;
    bool clip_colours; /* CLIP's channel statistics, else ImageNet's */
} md_dialect_defaults;

/* One of our parameters and the tensors of the set that make it: `parts` pieces, each of
 * shape[0] / parts rows, stored transposed or not. */
typedef struct md_dialect_copy {
    md_weight_id id;
    int layer, parts, tensor[MD_DIALECT_PARTS];
    bool transposed;
} md_dialect_copy;

/* How a set maps to our parameters. */
typedef struct md_dialect_map {
    const char *dialect; /* e.g. "hf-clip" */
    char prefix[64];     /* in front of every name, e.g. "module.visual." */
    md_dialect_defaults defaults;
    md_weight_dims dims;
    md_dialect_copy *copy; /* in the order of MD_WEIGHTS, layer by layer */
    int count, ignored;    /* ignored: tensors of other parts (text tower, heads, decoders) */
} md_dialect_map;

/* Finds the dialect of a set by its names and maps it. wrapper: a prefix the user names, or NULL to
 * try the known ones. Local. MD_ERR_DATA when no dialect or more than one fits, or with the names
 * of missing, unknown and misshapen tensors. Free with md_dialect_map_free, also after a failure.
 */
md_status md_dialect_match(const md_safetensors *st, const char *wrapper, md_dialect_map *map);
void md_dialect_map_free(md_dialect_map *map);

#define MD_DIALECT_NAME 160

/* The names under which a dialect (one without transposed parameters) stores a parameter of ours:
 * as many as it has parts, 0 when it has no place for it. inside: of several places the last, which
 * is within the encoder, else the first. Local. */
int md_dialect_names(const char *dialect, md_weight_id id, int layer, bool inside,
                     char name[MD_DIALECT_PARTS][MD_DIALECT_NAME]);

#endif
