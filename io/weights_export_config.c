/* weights_export_config: what other programs want to know of an exported model besides its tensors,
 * see weights_export.h. The keys are those of transformers' BeitConfig and BeitImageProcessor, of
 * timm's config.json on the hub (timm/models/_hub.py, save_config_for_hf) and of the constructors
 * of timm/models/beit.py and microsoft/unilm, beit2/modeling_pretrain.py, modeling_finetune.py. */
#include "io/weights_export.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *md_export_model(const md_weights_info *info, md_export_names names)
{
    if (names == MD_EXPORT_TIMM)
        return "timm.models.beit.Beit";
    if (names == MD_EXPORT_BEIT2)
        return info->lm_width ? "VisionTransformerForMaskedImageModeling" : "VisionTransformer";
    return info->classes    ? "BeitForImageClassification"
           : info->lm_width ? "BeitForMaskedImageModeling"
                            : "BeitModel";
}

static json_t *triple(const double v[3])
{
    return json_pack("[f, f, f]", v[0], v[1], v[2]);
}

static int side_of(const md_weights_info *info)
{
    return info->grid * info->patch;
}

/* The classes make int(width * ratio) of it, which must be the MLP's width. */
static double mlp_ratio(const md_weights_info *info)
{
    double ratio = (double)info->mlp / info->width;
    return (int)(info->width * ratio) < info->mlp ? nextafter(ratio, INFINITY) : ratio;
}

/* Initial values of layer scale do not matter to a trained model; only that there is one. */
#define SCALE(info) ((info)->layer_scale ? 0.1 : 0.0)

static json_t *hf_config(const md_weights_info *i, md_dtype dtype)
{
    static const char *const types[] = {
        [MD_F32] = "float32", [MD_BF16] = "bfloat16", [MD_F16] = "float16"};
    const bool pools_cls = !i->fc_norm && (i->classes || !i->lm_width);
    json_t *root =
        json_pack("{s:[s], s:s, s:i, s:i, s:i, s:i, s:s, s:f, s:i, s:i, s:i}", "architectures",
                  md_export_model(i, MD_EXPORT_HF), "model_type", "beit", "hidden_size", i->width,
                  "num_hidden_layers", i->layers, "num_attention_heads", i->heads,
                  "intermediate_size", i->mlp, "hidden_act", md_act_name(i->act), "layer_norm_eps",
                  i->ln_eps, "image_size", side_of(i), "patch_size", i->patch, "num_channels", 3);
    json_t *more = json_pack(
        "{s:b, s:b, s:b, s:b, s:b, s:f, s:f, s:s}", "use_mask_token", i->mask_token,
        "use_absolute_position_embeddings", i->abs_pos, "use_relative_position_bias",
        i->rel_pos == MD_WEIGHTS_REL_PER_LAYER, "use_shared_relative_position_bias",
        i->rel_pos == MD_WEIGHTS_REL_SHARED, "use_mean_pooling", !pools_cls,
        "layer_scale_init_value", SCALE(i), "drop_path_rate", 0.0, "torch_dtype", types[dtype]);
    json_object_update(root, more);
    json_decref(more);
    if (i->lm_width)
        json_object_set_new(root, "vocab_size", json_integer(i->lm_width));
    json_t *names = json_object();
    for (int k = 0; k < i->classes; k++) {
        char key[16], label[24];
        snprintf(key, sizeof key, "%d", k);
        snprintf(label, sizeof label, "LABEL_%d", k);
        json_object_set_new(names, key, json_string(label));
    }
    if (i->classes)
        json_object_set(root, "id2label", names);
    json_decref(names);
    return root;
}

static json_t *hf_preprocessor(const md_weights_info *i)
{
    const int side = side_of(i);
    return json_pack("{s:s, s:b, s:{s:i, s:i}, s:i, s:b, s:b, s:f, s:b, s:o, s:o}",
                     "image_processor_type", "BeitImageProcessor", "do_resize", 1, "size", "height",
                     side, "width", side, "resample", 3, "do_center_crop", 0, "do_rescale", 1,
                     "rescale_factor", 1.0 / 255.0, "do_normalize", 1, "image_mean",
                     triple(i->mean), "image_std", triple(i->std));
}

/* What the constructors of timm and of unilm have in common. */
static json_t *constructor(const md_weights_info *i)
{
    return json_pack("{s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:b, s:f, s:b, s:b, s:b}", "img_size",
                     side_of(i), "patch_size", i->patch, "in_chans", 3, "embed_dim", i->width,
                     "depth", i->layers, "num_heads", i->heads, "mlp_ratio", mlp_ratio(i),
                     "qkv_bias", i->qv_bias, "init_values", SCALE(i), "use_abs_pos_emb", i->abs_pos,
                     "use_rel_pos_bias", i->rel_pos == MD_WEIGHTS_REL_PER_LAYER,
                     "use_shared_rel_pos_bias", i->rel_pos == MD_WEIGHTS_REL_SHARED);
}

/* Any registered name of the class will do, since all its arguments are given. A model that was not
 * fine-tuned gives the mean of its normalised tokens. */
static json_t *timm_config(const md_weights_info *i)
{
    const char *pool = i->classes && !i->fc_norm ? "token" : "avg";
    json_t *args = constructor(i);
    json_object_set_new(args, "num_classes", json_integer(i->classes));
    json_object_set_new(args, "global_pool", json_string(pool));
    json_object_set_new(args, "use_fc_norm", json_boolean(i->fc_norm));
    const int side = side_of(i);
    json_t *cfg =
        json_pack("{s:[i, i, i], s:i, s:s, s:f, s:s, s:s, s:b, s:o, s:o}", "input_size", 3, side,
                  side, "num_classes", i->classes, "interpolation", "bicubic", "crop_pct", 0.875,
                  "first_conv", "patch_embed.proj", "classifier", "head", "fixed_input_size", 1,
                  "mean", triple(i->mean), "std", triple(i->std));
    return json_pack("{s:s, s:i, s:i, s:s, s:f, s:o, s:o}", "architecture",
                     "beitv2_base_patch16_224", "num_classes", i->classes, "num_features", i->width,
                     "global_pool", pool, "layer_norm_eps", i->ln_eps, "model_args", args,
                     "pretrained_cfg", cfg);
}

static json_t *beit2_config(const md_weights_info *i)
{
    json_t *args = constructor(i);
    if (i->lm_width) {
        json_object_set_new(args, "vocab_size", json_integer(i->lm_width));
    } else {
        json_object_set_new(args, "num_classes", json_integer(i->classes));
        json_object_set_new(args, "use_mean_pooling", json_boolean(i->fc_norm));
    }
    return json_pack("{s:s, s:f, s:o, s:{s:o, s:o}}", "class", md_export_model(i, MD_EXPORT_BEIT2),
                     "layer_norm_eps", i->ln_eps, "model_args", args, "pretrained_cfg", "mean",
                     triple(i->mean), "std", triple(i->std));
}

/* Digits that every real number of the files needs to be read back the same. */
static size_t digits_of(const md_weights_info *i)
{
    const double v[] = {i->mean[0], i->mean[1], i->mean[2], i->std[0],    i->std[1],
                        i->std[2],  i->ln_eps,  1.0 / 255,  mlp_ratio(i), 0.875};
    size_t digits = 15;
    for (size_t k = 0; k < MD_COUNT(v); k++) {
        char text[40];
        while (snprintf(text, sizeof text, "%.*g", (int)digits, v[k]),
               digits < 17 && strtod(text, NULL) != v[k])
            digits++;
    }
    return digits;
}

char *md_export_config(const md_weights_info *info, md_export_names names, md_dtype dtype,
                       bool preprocessor)
{
    json_t *root = preprocessor              ? hf_preprocessor(info)
                   : names == MD_EXPORT_HF   ? hf_config(info, dtype)
                   : names == MD_EXPORT_TIMM ? timm_config(info)
                                             : beit2_config(info);
    char *text =
        root ? json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(digits_of(info))) : NULL;
    json_decref(root);
    return text;
}
