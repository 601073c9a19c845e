/* dialects_table: see dialects_table.h.
 *
 * Sources of the names: OpenAI CLIP clip/model.py; Hugging Face transformers modeling_clip.py,
 * modeling_vit.py and modeling_beit.py (as save_pretrained writes them); timm
 * models/vision_transformer.py (also DINO vision_transformer.py, MAE models_mae.py and SLIP
 * models.py, which use the same names) and models/beit.py; microsoft/unilm
 * beit2/modeling_pretrain.py and beit2/modeling_finetune.py, whose names timm's beit.py kept. */
#include "io/dialects_table.h"

#define BOTH(w, b, name)   \
    {w, {name ".weight"}}, \
    {                      \
        b,                 \
        {                  \
            name ".bias"   \
        }                  \
    }
#define MAYBE(w, b, name)                    \
    {w, {name ".weight"}, .optional = true}, \
    {                                        \
        b, {name ".bias"}, .optional = true  \
    }
#define THREE(w, b, q, k, v)                      \
    {w, {q ".weight", k ".weight", v ".weight"}}, \
    {                                             \
        b,                                        \
        {                                         \
            q ".bias", k ".bias", v ".bias"       \
        }                                         \
    }
#define W(id) MD_WEIGHT_##id##_W
#define B(id) MD_WEIGHT_##id##_B

#define TIMM_BLOCKS                                                                               \
    BOTH(W(NORM1), B(NORM1), "blocks.%d.norm1"), BOTH(W(QKV), B(QKV), "blocks.%d.attn.qkv"),      \
        BOTH(W(OUT), B(OUT), "blocks.%d.attn.proj"), BOTH(W(NORM2), B(NORM2), "blocks.%d.norm2"), \
        BOTH(W(FC1), B(FC1), "blocks.%d.mlp.fc1"), BOTH(W(FC2), B(FC2), "blocks.%d.mlp.fc2"),     \
        BOTH(W(NORM), B(NORM), "norm")

static const md_dialect_rule timm_rules[] = {
    {MD_WEIGHT_CLS, {"cls_token"}},
    {MD_WEIGHT_POS, {"pos_embed"}},
    BOTH(W(PATCH), B(PATCH), "patch_embed.proj"),
    TIMM_BLOCKS,
};

/* timm keeps CLIP's projection as a classifier with a zero bias; any other bias is a real one. */
static const md_dialect_rule timm_clip_rules[] = {
    {MD_WEIGHT_CLS, {"cls_token"}},
    {MD_WEIGHT_POS, {"pos_embed"}},
    {W(PATCH), {"patch_embed.proj.weight"}},
    BOTH(W(PRE), B(PRE), "norm_pre"),
    TIMM_BLOCKS,
    {W(PROJ), {"head.weight"}, .optional = true, .zero = "head.bias"},
};

#define RES "transformer.resblocks.%d."
static const md_dialect_rule openai_rules[] = {
    {MD_WEIGHT_CLS, {"class_embedding"}},
    {MD_WEIGHT_POS, {"positional_embedding"}},
    {W(PATCH), {"conv1.weight"}},
    BOTH(W(PRE), B(PRE), "ln_pre"),
    BOTH(W(NORM1), B(NORM1), RES "ln_1"),
    {W(QKV), {RES "attn.in_proj_weight"}},
    {B(QKV), {RES "attn.in_proj_bias"}},
    BOTH(W(OUT), B(OUT), RES "attn.out_proj"),
    BOTH(W(NORM2), B(NORM2), RES "ln_2"),
    BOTH(W(FC1), B(FC1), RES "mlp.c_fc"),
    BOTH(W(FC2), B(FC2), RES "mlp.c_proj"),
    BOTH(W(NORM), B(NORM), "ln_post"),
    {W(PROJ), {"proj"}, .transposed = true, .optional = true},
};

#define LAYERS "encoder.layers.%d."
static const md_dialect_rule hf_clip_rules[] = {
    {MD_WEIGHT_CLS, {"embeddings.class_embedding"}},
    {MD_WEIGHT_POS, {"embeddings.position_embedding.weight"}},
    {W(PATCH), {"embeddings.patch_embedding.weight"}},
    BOTH(W(PRE), B(PRE), "pre_layrnorm"), /* spelt so there */
    BOTH(W(NORM1), B(NORM1), LAYERS "layer_norm1"),
    THREE(W(QKV), B(QKV), LAYERS "self_attn.q_proj", LAYERS "self_attn.k_proj",
          LAYERS "self_attn.v_proj"),
    BOTH(W(OUT), B(OUT), LAYERS "self_attn.out_proj"),
    BOTH(W(NORM2), B(NORM2), LAYERS "layer_norm2"),
    BOTH(W(FC1), B(FC1), LAYERS "mlp.fc1"),
    BOTH(W(FC2), B(FC2), LAYERS "mlp.fc2"),
    BOTH(W(NORM), B(NORM), "post_layernorm"),
    {W(PROJ), {"/visual_projection.weight"}, .optional = true},
};

#define LAYER     "encoder.layer.%d."
#define ATTENTION LAYER "attention.attention."
static const md_dialect_rule hf_vit_rules[] = {
    {MD_WEIGHT_CLS, {"embeddings.cls_token"}},
    {MD_WEIGHT_POS, {"embeddings.position_embeddings"}},
    BOTH(W(PATCH), B(PATCH), "embeddings.patch_embeddings.projection"),
    BOTH(W(NORM1), B(NORM1), LAYER "layernorm_before"),
    THREE(W(QKV), B(QKV), LAYER "attention.attention.query", LAYER "attention.attention.key",
          LAYER "attention.attention.value"),
    BOTH(W(OUT), B(OUT), LAYER "attention.output.dense"),
    BOTH(W(NORM2), B(NORM2), LAYER "layernorm_after"),
    BOTH(W(FC1), B(FC1), LAYER "intermediate.dense"),
    BOTH(W(FC2), B(FC2), LAYER "output.dense"),
    BOTH(W(NORM), B(NORM), "layernorm"),
};

/* Shared by microsoft/unilm and timm; a pretraining model ends in norm and lm_head, a fine-tuned
 * one in fc_norm (mean pooling) or norm (class token), and head. */
static const md_dialect_rule beit_rules[] = {
    {MD_WEIGHT_CLS, {"cls_token"}},
    {MD_WEIGHT_MASK, {"mask_token"}, .optional = true},
    {MD_WEIGHT_POS, {"pos_embed"}, .optional = true},
    BOTH(W(PATCH), B(PATCH), "patch_embed.proj"),
    {MD_WEIGHT_REL_SHARED, {"rel_pos_bias.relative_position_bias_table"}, .optional = true},
    BOTH(W(NORM1), B(NORM1), "blocks.%d.norm1"),
    {W(QKV), {"blocks.%d.attn.qkv.weight"}},
    {B(Q), {"blocks.%d.attn.q_bias"}},
    {B(V), {"blocks.%d.attn.v_bias"}},
    {MD_WEIGHT_REL, {"blocks.%d.attn.relative_position_bias_table"}, .optional = true},
    BOTH(W(OUT), B(OUT), "blocks.%d.attn.proj"),
    {MD_WEIGHT_GAMMA_1, {"blocks.%d.gamma_1"}, .optional = true},
    BOTH(W(NORM2), B(NORM2), "blocks.%d.norm2"),
    BOTH(W(FC1), B(FC1), "blocks.%d.mlp.fc1"),
    BOTH(W(FC2), B(FC2), "blocks.%d.mlp.fc2"),
    {MD_WEIGHT_GAMMA_2, {"blocks.%d.gamma_2"}, .optional = true},
    MAYBE(W(NORM), B(NORM), "norm"),
    MAYBE(W(FC_NORM), B(FC_NORM), "fc_norm"),
    MAYBE(W(HEAD), B(HEAD), "head"),
    MAYBE(W(LM_HEAD), B(LM_HEAD), "lm_head"),
};

/* The final norm of a pretraining model stands beside the encoder, that of a model which pools the
 * class token inside. */
static const md_dialect_rule hf_beit_rules[] = {
    {MD_WEIGHT_CLS, {"embeddings.cls_token"}},
    {MD_WEIGHT_MASK, {"embeddings.mask_token"}, .optional = true},
    {MD_WEIGHT_POS, {"embeddings.position_embeddings"}, .optional = true},
    BOTH(W(PATCH), B(PATCH), "embeddings.patch_embeddings.projection"),
    {MD_WEIGHT_REL_SHARED,
     {"encoder.relative_position_bias.relative_position_bias_table"},
     .optional = true},
    BOTH(W(NORM1), B(NORM1), LAYER "layernorm_before"),
    {W(QKV), {ATTENTION "query.weight", ATTENTION "key.weight", ATTENTION "value.weight"}},
    {B(Q), {ATTENTION "query.bias"}},
    {B(V), {ATTENTION "value.bias"}},
    {MD_WEIGHT_REL,
     {ATTENTION "relative_position_bias.relative_position_bias_table"},
     .optional = true},
    BOTH(W(OUT), B(OUT), LAYER "attention.output.dense"),
    {MD_WEIGHT_GAMMA_1, {LAYER "lambda_1"}, .optional = true},
    BOTH(W(NORM2), B(NORM2), LAYER "layernorm_after"),
    BOTH(W(FC1), B(FC1), LAYER "intermediate.dense"),
    BOTH(W(FC2), B(FC2), LAYER "output.dense"),
    {MD_WEIGHT_GAMMA_2, {LAYER "lambda_2"}, .optional = true},
    MAYBE(W(NORM), B(NORM), "/layernorm"),
    MAYBE(W(NORM), B(NORM), "layernorm"),
    MAYBE(W(FC_NORM), B(FC_NORM), "pooler.layernorm"),
    MAYBE(W(HEAD), B(HEAD), "/classifier"),
    MAYBE(W(LM_HEAD), B(LM_HEAD), "/lm_head"),
};

#define RULES(table) .rules = table, .count = (int)MD_COUNT(table)
/* QuickGELU and GELU leave no trace in the tensors. The published CLIP files use QuickGELU; timm
 * has both, so there a config file or the user must say it. */
const md_dialect md_dialects[] = {
    {"openai-clip",
     "conv1.weight",
     {"blocks.0.norm1.weight"},
     {"visual.", ""},
     {"attn_mask"},
     {MD_ACT_QUICK_GELU, 1e-5, true},
     RULES(openai_rules)},
    {"hf-clip",
     "embeddings.class_embedding",
     {NULL},
     {"vision_model.", ""},
     {"embeddings.position_ids", "visual_projection.", "text_", "logit_scale"},
     {MD_ACT_QUICK_GELU, 1e-5, true},
     RULES(hf_clip_rules)},
    {"timm-clip",
     "norm_pre.weight",
     {NULL},
     {"", "visual.", "visual.trunk."},
     {"head."},
     {MD_ACT_NONE, 1e-5, true},
     RULES(timm_clip_rules)},
    {"timm",
     "blocks.0.attn.qkv.weight",
     {"norm_pre.weight", "blocks.0.attn.q_bias"},
     {"", "visual.", "visual.trunk."},
     {"head.", "mask_token", "decoder_", "head_dist.", "pre_logits."},
     {MD_ACT_GELU, 1e-6, false},
     RULES(timm_rules)},
    {"hf-vit",
     "encoder.layer.0.attention.attention.key.bias",
     {NULL},
     {"vit.", ""},
     {"pooler.", "classifier.", "embeddings.mask_token", "decoder."},
     {MD_ACT_GELU, 1e-12, false},
     RULES(hf_vit_rules)},
    {"beit",
     "blocks.0.attn.q_bias",
     {"norm_pre.weight"},
     {""},
     {"*relative_position_index", "cls_pt_layers."},
     {MD_ACT_GELU, 1e-6, false},
     RULES(beit_rules)},
    {"hf-beit",
     "embeddings.patch_embeddings.projection.weight",
     {"encoder.layer.0.attention.attention.key.bias"},
     {"beit.", ""},
     {"*relative_position_index"},
     {MD_ACT_GELU, 1e-12, false},
     RULES(hf_beit_rules)},
};

const int md_dialect_count = (int)MD_COUNT(md_dialects);
