/* targets: the axis method.target.norm: what is done to each target vector before the loss. */
#include "src/method.h"

#include <string.h>

static md_slot build_none(md_method *m, md_graph *g, md_slot x)
{
    (void)m, (void)g;
    return x;
}

/* LayerNorm without affine over the channels of a token (MaskDistill, section 3). */
static md_slot build_layernorm(md_method *m, md_graph *g, md_slot x)
{
    return md_n_layernorm(g, x, NULL, &(md_attr){.eps = (float)m->config->target_eps});
}

/* The same with the unbiased variance (facebookresearch/mae, models_mae.py: norm_pix_loss). */
static md_slot build_patch_norm(md_method *m, md_graph *g, md_slot x)
{
    return md_n_layernorm(g, x, NULL,
                          &(md_attr){.eps = (float)m->config->target_eps, .unbiased = true});
}

static const md_target_row rows[] = {
    {"none", build_none},
    {"layernorm", build_layernorm},
    {"patch_norm", build_patch_norm},
};

const md_target_row *md_target_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(rows); i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    return NULL;
}
