/* vit: declares the parameters of a Vision Transformer and builds its encoder nodes. The student
 * (BEiT: relative position bias, layer scale, no key bias) and the frozen teachers (CLIP, DINO,
 * MAE, timm: absolute positions, full qkv bias) are the same code under two specs. */
#ifndef MD_VIT_H
#define MD_VIT_H

#include "src/graph.h"

/* In the order of the key model.rel_pos. */
typedef enum md_rel_pos { MD_REL_SHARED, MD_REL_PER_LAYER, MD_REL_NONE } md_rel_pos;

typedef struct md_vit_spec {
    int image, patch, width, layers, heads, mlp;
    md_rel_pos rel_pos;
    bool abs_pos; /* pos_embed [G+1, C] */
    bool mask_token;
    bool qv_bias; /* q_bias and v_bias, no key bias (BEiT); else one bias [3C] */
    bool patch_bias;
    bool pre_norm;   /* LayerNorm before the first block (CLIP) */
    bool final_norm; /* declare norm.weight, norm.bias */
    md_act act;
    float ln_eps;
    float layer_scale; /* initial value; 0 = none */
    float drop_path;   /* of the last block; inputs keep[] are made when > 0 */
    float init_std;
    int recompute; /* the first so many blocks are run again in the backward pass, not the last */
} md_vit_spec;

/* Registry rows of one block; MD_NO_PARAM where the spec has none. */
typedef struct md_vit_block {
    int gamma_1, norm1_w, norm1_b, qkv_w, qkv_b, q_b, v_b, rel, proj_w, proj_b;
    int gamma_2, norm2_w, norm2_b, fc1_w, fc1_b, fc2_w, fc2_b;
} md_vit_block;

typedef struct md_vit {
    md_vit_spec spec;
    int patch_w, patch_b, cls, mask_token, pos, rel, pre_w, pre_b, norm_w, norm_b;
    md_vit_block *block;
} md_vit;

/* Patches along a side, in all, and tokens with cls. Local. */
static inline int md_vit_side(const md_vit_spec *s)
{
    return s->image / s->patch;
}
static inline int md_vit_patches(const md_vit_spec *s)
{
    return md_vit_side(s) * md_vit_side(s);
}
static inline int md_vit_tokens(const md_vit_spec *s)
{
    return md_vit_patches(s) + 1;
}
/* Blocks that are run again in the backward pass. That of the last block comes at once: nothing
 * would be gained. Local. */
static inline int md_vit_recomputed(const md_vit_spec *s)
{
    return MD_MIN(s->recompute, s->layers - 1);
}
/* Rows of a relative position table: (2g - 1)^2 + 3 (BEiT; 3 = cls to token, token to cls, cls). */
static inline int md_vit_rel_rows(const md_vit_spec *s)
{
    int side = 2 * md_vit_side(s) - 1;
    return side * side + 3;
}

/* Adds all rows in forward order, with BEiT's names and initialisation: normals cut at one sigma,
 * attn.proj and mlp.fc2 of block k divided by sqrt(2 (k + 1)) (microsoft/unilm,
 * beit2/modeling_pretrain.py). Local. */
md_status md_vit_declare(md_vit *v, const md_vit_spec *spec, md_params *params);
void md_vit_free(md_vit *v);

/* Fills index i32 [T, T] of a g x g grid with cls first (microsoft/unilm,
 * beit/modeling_finetune.py: RelativePositionBias). Local. */
void md_vit_rel_index(int g, int32_t *index);

/* Drop-path rate of block k: linear from 0 at the first to spec.drop_path at the last. */
float md_vit_drop_rate(const md_vit_spec *s, int k);

typedef struct md_vit_in {
    int64_t images;      /* B; of this rank where the stream is cut by rows */
    md_slot image;       /* u8 [B, S, S, 3] */
    md_slot mask;        /* u8 [B, G], MD_NO_SLOT: none */
    md_slot mix;         /* i32 [B, MD_MIX_WORDS] (kernels/backend.h), MD_NO_SLOT: none */
    md_slot index;       /* i32 [T, T] when rel_pos */
    const md_slot *keep; /* [2L] slots f32 [B] when drop_path > 0, else NULL */
    /* [2L] indices (md_graph_packed): the images that branch k is run for; NULL: all. And of the
     * last block's attention the wanted rows of these images, i32 [B, M], when chosen_last. */
    const md_slot *packed;
    md_slot packed_rows;
    const float *mean, *std;
    md_slot rows; /* i32 [B, M]: the rows, of all B*T tokens, that are wanted; MD_NO_SLOT: all */
    md_slot all_rows; /* the same for the images of all tensor-parallel ranks; else equal to rows */
    /* Two sets of rows i32 [B, M] whose means are wanted instead, each [B, C]; NULL: not so. */
    const md_slot *pooled;
    bool chosen_last; /* run what follows the last block's attention at `rows` only; not for all */
    int last;         /* how many of the last block outputs to give */
} md_vit_in;

/* Builds patch embedding, tokens and blocks. out[0 .. in->last) receives the outputs of the last
 * blocks at the wanted rows [B, M, C] (all: [B, T, C]), oldest first; with `pooled` two for each
 * block. No final norm. Errors stay in the graph. */
void md_vit_build(const md_vit *v, md_graph *g, const md_vit_in *in, md_slot *out);

#endif
