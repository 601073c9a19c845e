/* weights_info: which parameters a model has and of which sizes, see weights.h. */
#include "io/weights.h"

#include <string.h>

static const char *const act_names[] = {
    [MD_ACT_NONE] = "none", [MD_ACT_GELU] = "gelu", [MD_ACT_QUICK_GELU] = "quick_gelu"};

const char *md_act_name(md_act act)
{
    return act_names[act];
}

md_act md_act_parse(const char *name)
{
    for (int a = MD_ACT_GELU; a < (int)MD_COUNT(act_names); a++)
        if (strcmp(name, act_names[a]) == 0)
            return (md_act)a;
    return MD_ACT_NONE;
}

bool md_weights_has(const md_weights_info *info, md_weight_id id)
{
    switch (id) {
    case MD_WEIGHT_PATCH_B:
        return info->patch_bias;
    case MD_WEIGHT_PRE_W:
    case MD_WEIGHT_PRE_B:
        return info->pre_norm;
    case MD_WEIGHT_PROJ_W:
        return info->proj_width > 0;
    case MD_WEIGHT_MASK:
        return info->mask_token;
    case MD_WEIGHT_POS:
        return info->abs_pos;
    case MD_WEIGHT_REL_SHARED:
        return info->rel_pos == MD_WEIGHTS_REL_SHARED;
    case MD_WEIGHT_REL:
        return info->rel_pos == MD_WEIGHTS_REL_PER_LAYER;
    case MD_WEIGHT_QKV_B:
        return !info->qv_bias;
    case MD_WEIGHT_Q_B:
    case MD_WEIGHT_V_B:
        return info->qv_bias;
    case MD_WEIGHT_GAMMA_1:
    case MD_WEIGHT_GAMMA_2:
        return info->layer_scale;
    case MD_WEIGHT_NORM_W:
    case MD_WEIGHT_NORM_B:
        return info->final_norm;
    case MD_WEIGHT_FC_NORM_W:
    case MD_WEIGHT_FC_NORM_B:
        return info->fc_norm;
    case MD_WEIGHT_HEAD_W:
    case MD_WEIGHT_HEAD_B:
        return info->classes > 0;
    case MD_WEIGHT_LM_HEAD_W:
    case MD_WEIGHT_LM_HEAD_B:
        return info->lm_width > 0;
    default:
        return true;
    }
}

void md_weights_dims(const md_weights_info *info, md_weight_dims *dims)
{
    const int64_t reach = 2 * info->grid - 1;
    *dims = (md_weight_dims){.width = info->width,
                             .mlp = info->mlp,
                             .tokens = (int64_t)info->grid * info->grid + 1,
                             .patch = info->patch,
                             .proj = info->proj_width,
                             .rel_rows = reach * reach + 3,
                             .heads = info->heads,
                             .classes = info->classes,
                             .lm_width = info->lm_width,
                             .layers = info->layers};
}
