/* vit: see vit.h. */
#include "src/vit.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

/* What runs from block to block: the residual stream x, and y, its LayerNorm for the next branch.
 */
typedef struct md_vit_stream {
    md_slot x, y;
} md_vit_stream;

/* What varies between the rows of a declaration. */
typedef struct row_spec {
    md_init init;
    float value, scale;
    int layer_id;
    bool no_decay; /* besides vectors, which are never decayed */
} row_spec;

static int add(md_params *p, const row_spec *r, int rank, const int64_t *dim, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));
static int add(md_params *p, const row_spec *r, int rank, const int64_t *dim, const char *fmt, ...)
{
    md_param row = {.rank = rank,
                    .cut_dim = -1,
                    .cut_parts = 1,
                    .init = r->init,
                    .init_value = r->value,
                    .init_scale = r->scale,
                    .layer_id = r->layer_id,
                    .decay = rank > 1 && !r->no_decay};
    for (int d = 0; d < rank; d++)
        row.global[d] = dim[d];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(row.name, sizeof row.name, fmt, ap);
    va_end(ap);
    return md_params_add(p, &row);
}

#define DIMS(...)                                          \
    (int)MD_COUNT(((int64_t[]){__VA_ARGS__})), (int64_t[]) \
    {                                                      \
        __VA_ARGS__                                        \
    }

/* Where tensor parallelism cuts a block: the outputs of qkv and fc1, that is heads and hidden
 * channels, and the inputs of proj and fc2. */
static void cut_block(md_params *p, const md_vit_block *b)
{
    const struct {
        int row, dim, parts;
    } cuts[] = {{b->qkv_w, 0, 3}, {b->qkv_b, 0, 3}, {b->q_b, 0, 1},
                {b->v_b, 0, 1},   {b->rel, 1, 1},   {b->proj_w, 1, 1},
                {b->fc1_w, 0, 1}, {b->fc1_b, 0, 1}, {b->fc2_w, 1, 1}};
    for (size_t i = 0; i < MD_COUNT(cuts); i++)
        if (cuts[i].row >= 0) {
            p->row[cuts[i].row].cut_dim = cuts[i].dim;
            p->row[cuts[i].row].cut_parts = cuts[i].parts;
        }
}

static void declare_block(md_vit *v, md_params *p, int k)
{
    const md_vit_spec *s = &v->spec;
    md_vit_block *b = &v->block[k];
    const int64_t c = s->width, f = s->mlp;
    const row_spec normal = {MD_INIT_TRUNC_NORMAL, s->init_std, 1.0f, k + 1, false};
    const row_spec rescaled = {MD_INIT_TRUNC_NORMAL, s->init_std,
                               1.0f / sqrtf(2.0f * (float)(k + 1)), k + 1, false};
    const row_spec zero = {MD_INIT_CONST, 0.0f, 1.0f, k + 1, false};
    const row_spec one = {MD_INIT_CONST, 1.0f, 1.0f, k + 1, false};
    const row_spec gamma = {MD_INIT_CONST, s->layer_scale, 1.0f, k + 1, false};
    bool scaled = s->layer_scale > 0;
    b->norm1_w = add(p, &one, DIMS(c), "blocks.%d.norm1.weight", k);
    b->norm1_b = add(p, &zero, DIMS(c), "blocks.%d.norm1.bias", k);
    b->q_b = s->qv_bias ? add(p, &zero, DIMS(c), "blocks.%d.attn.q_bias", k) : MD_NO_PARAM;
    b->v_b = s->qv_bias ? add(p, &zero, DIMS(c), "blocks.%d.attn.v_bias", k) : MD_NO_PARAM;
    b->qkv_w = add(p, &normal, DIMS(3 * c, c), "blocks.%d.attn.qkv.weight", k);
    b->qkv_b = s->qv_bias ? MD_NO_PARAM : add(p, &zero, DIMS(3 * c), "blocks.%d.attn.qkv.bias", k);
    b->rel = s->rel_pos != MD_REL_PER_LAYER ? MD_NO_PARAM
                                            : add(p, &zero, DIMS(md_vit_rel_rows(s), s->heads),
                                                  "blocks.%d.attn.relative_position_bias_table", k);
    b->proj_w = add(p, &rescaled, DIMS(c, c), "blocks.%d.attn.proj.weight", k);
    b->proj_b = add(p, &zero, DIMS(c), "blocks.%d.attn.proj.bias", k);
    b->gamma_1 = scaled ? add(p, &gamma, DIMS(c), "blocks.%d.gamma_1", k) : MD_NO_PARAM;
    b->norm2_w = add(p, &one, DIMS(c), "blocks.%d.norm2.weight", k);
    b->norm2_b = add(p, &zero, DIMS(c), "blocks.%d.norm2.bias", k);
    b->fc1_w = add(p, &normal, DIMS(f, c), "blocks.%d.mlp.fc1.weight", k);
    b->fc1_b = add(p, &zero, DIMS(f), "blocks.%d.mlp.fc1.bias", k);
    b->fc2_w = add(p, &rescaled, DIMS(c, f), "blocks.%d.mlp.fc2.weight", k);
    b->fc2_b = add(p, &zero, DIMS(c), "blocks.%d.mlp.fc2.bias", k);
    b->gamma_2 = scaled ? add(p, &gamma, DIMS(c), "blocks.%d.gamma_2", k) : MD_NO_PARAM;
    cut_block(p, b);
}

md_status md_vit_declare(md_vit *v, const md_vit_spec *spec, md_params *p)
{
    *v = (md_vit){.spec = *spec};
    const md_vit_spec *s = &v->spec;
    MD_NEW(v->block, s->layers, "block table");
    const int64_t c = s->width, side = s->patch;
    const row_spec normal = {MD_INIT_TRUNC_NORMAL, s->init_std, 1.0f, 0, false};
    const row_spec token = {MD_INIT_TRUNC_NORMAL, s->init_std, 1.0f, 0, true};
    const row_spec zero = {MD_INIT_CONST, 0.0f, 1.0f, 0, false};
    const row_spec one = {MD_INIT_CONST, 1.0f, 1.0f, 0, false};
    const row_spec table = {MD_INIT_CONST, 0.0f, 1.0f, s->layers + 1, false};
    const row_spec last_one = {MD_INIT_CONST, 1.0f, 1.0f, s->layers + 1, false};
    const row_spec last_zero = {MD_INIT_CONST, 0.0f, 1.0f, s->layers + 1, false};
    v->patch_w = add(p, &normal, DIMS(c, 3, side, side), "patch_embed.proj.weight");
    v->patch_b = s->patch_bias ? add(p, &zero, DIMS(c), "patch_embed.proj.bias") : MD_NO_PARAM;
    v->cls = add(p, &token, DIMS(1, 1, c), "cls_token");
    v->mask_token = s->mask_token ? add(p, &normal, DIMS(1, 1, c), "mask_token") : MD_NO_PARAM;
    v->pos = s->abs_pos ? add(p, &token, DIMS(1, md_vit_tokens(s), c), "pos_embed") : MD_NO_PARAM;
    v->pre_w = s->pre_norm ? add(p, &one, DIMS(c), "norm_pre.weight") : MD_NO_PARAM;
    v->pre_b = s->pre_norm ? add(p, &zero, DIMS(c), "norm_pre.bias") : MD_NO_PARAM;
    v->rel = s->rel_pos == MD_REL_SHARED ? add(p, &table, DIMS(md_vit_rel_rows(s), s->heads),
                                               "rel_pos_bias.relative_position_bias_table")
                                         : MD_NO_PARAM;
    if (v->rel >= 0)
        p->row[v->rel].cut_dim = 1; /* heads */
    for (int k = 0; k < s->layers; k++)
        declare_block(v, p, k);
    v->norm_w = s->final_norm ? add(p, &last_one, DIMS(c), "norm.weight") : MD_NO_PARAM;
    v->norm_b = s->final_norm ? add(p, &last_zero, DIMS(c), "norm.bias") : MD_NO_PARAM;
    return MD_OK;
}

void md_vit_free(md_vit *v)
{
    md_free(v->block);
    *v = (md_vit){0};
}

void md_vit_rel_index(int g, int32_t *index)
{
    const int t = g * g + 1, rows = (2 * g - 1) * (2 * g - 1) + 3;
    for (int i = 1; i < t; i++)
        for (int j = 1; j < t; j++) {
            int dy = (i - 1) / g - (j - 1) / g + g - 1, dx = (i - 1) % g - (j - 1) % g + g - 1;
            index[i * t + j] = dy * (2 * g - 1) + dx;
        }
    for (int j = 0; j < t; j++)
        index[j] = rows - 3;
    for (int i = 0; i < t; i++)
        index[i * t] = rows - 2;
    index[0] = rows - 1;
}

float md_vit_drop_rate(const md_vit_spec *s, int k)
{
    return s->layers > 1 ? s->drop_path * (float)k / (float)(s->layers - 1) : 0.0f;
}

/* Entry of branch `branch` in an optional list; MD_NO_SLOT beyond the last one. */
static md_slot of_branch(const md_vit *v, const md_slot *list, int branch)
{
    return list && branch < 2 * v->spec.layers ? list[branch] : MD_NO_SLOT;
}

/* Before the residual step whose norm block k begins with: what the block keeps is what that step
 * reads, the stream and the branch before it. */
static void begin_block(const md_vit *v, md_graph *g, int k)
{
    md_graph_recompute(g, k < md_vit_recomputed(&v->spec));
}

/* One block: takes the stream with y = LN1(x), leaves the next one. */
static void build_block(const md_vit *v, md_graph *g, const md_vit_in *in, int k, md_slot rel,
                        md_vit_stream *r)
{
    const md_vit_spec *s = &v->spec;
    const md_vit_block *b = &v->block[k];
    bool last = k + 1 == s->layers;
    md_slot y = md_n_enter(g, r->y, b->qkv_w);
    md_slot qkv = s->qv_bias ? md_n_linear_qv(g, y, b->qkv_w, b->q_b, b->v_b)
                             : md_n_linear(g, y, b->qkv_w, b->qkv_b, MD_ACT_NONE);
    if (s->rel_pos == MD_REL_PER_LAYER)
        rel = md_n_rel_bias(g, in->index, b->rel);
    md_slot attn = md_n_attention(g, qkv, rel, s->heads);
    if (last && in->chosen_last) {
        const bool packed = of_branch(v, in->packed, 2 * k) != MD_NO_SLOT;
        attn = md_n_gather_rows(g, attn, packed ? in->packed_rows : in->all_rows);
        r->x = md_n_gather_rows(g, r->x, in->rows);
    }
    attn = md_n_exit(g, md_n_linear(g, attn, b->proj_w, b->proj_b, MD_ACT_NONE), r->x);
    md_n_residual_ln(g,
                     &(md_residual_in){.x = r->x,
                                       .branch = attn,
                                       .keep = of_branch(v, in->keep, 2 * k),
                                       .from = of_branch(v, in->packed, 2 * k),
                                       .to = of_branch(v, in->packed, 2 * k + 1),
                                       .gamma = b->gamma_1,
                                       .weight = b->norm2_w,
                                       .bias = b->norm2_b,
                                       .eps = s->ln_eps},
                     &r->x, &r->y);
    md_slot hidden = md_n_linear(g, md_n_enter(g, r->y, b->fc1_w), b->fc1_w, b->fc1_b, s->act);
    hidden = md_n_exit(g, md_n_linear(g, hidden, b->fc2_w, b->fc2_b, MD_ACT_NONE), r->x);
    begin_block(v, g, k + 1);
    md_n_residual_ln(g,
                     &(md_residual_in){.x = r->x,
                                       .branch = hidden,
                                       .keep = of_branch(v, in->keep, 2 * k + 1),
                                       .from = of_branch(v, in->packed, 2 * k + 1),
                                       .to = of_branch(v, in->packed, 2 * k + 2),
                                       .gamma = b->gamma_2,
                                       .weight = last ? MD_NO_PARAM : v->block[k + 1].norm1_w,
                                       .bias = last ? MD_NO_PARAM : v->block[k + 1].norm1_b,
                                       .eps = s->ln_eps},
                     &r->x, &r->y);
}

void md_vit_build(const md_vit *v, md_graph *g, const md_vit_in *in, md_slot *out)
{
    const md_vit_spec *s = &v->spec;
    md_attr patches = {.side = s->patch, .order = MD_PATCH_CHW};
    for (int c = 0; c < 3; c++) {
        patches.mean[c] = in->mean[c];
        patches.std[c] = in->std[c];
    }
    md_slot x = md_n_patchify(g, in->image, in->mix, &patches);
    x = md_n_linear(g, x, v->patch_w, v->patch_b, MD_ACT_NONE);
    bool masked = in->mask != MD_NO_SLOT;
    x = md_n_tokens(g, x, in->mask, in->images,
                    (int[]){v->cls, masked ? v->mask_token : MD_NO_PARAM, v->pos});
    if (s->pre_norm)
        x = md_n_layernorm(g, x, (int[]){v->pre_w, v->pre_b}, &(md_attr){.eps = s->ln_eps});
    md_slot rel = s->rel_pos == MD_REL_SHARED ? md_n_rel_bias(g, in->index, v->rel) : MD_NO_SLOT;
    md_vit_stream r = {.x = x};
    md_slot unused;
    begin_block(v, g, 0);
    md_n_residual_ln(g,
                     &(md_residual_in){.x = x,
                                       .branch = MD_NO_SLOT,
                                       .keep = MD_NO_SLOT,
                                       .from = MD_NO_SLOT,
                                       .to = MD_NO_SLOT, /* the first block drops nothing */
                                       .gamma = MD_NO_PARAM,
                                       .weight = v->block[0].norm1_w,
                                       .bias = v->block[0].norm1_b,
                                       .eps = s->ln_eps},
                     &unused, &r.y);
    for (int k = 0; k < s->layers; k++) {
        build_block(v, g, in, k, rel, &r);
        int place = k - (s->layers - in->last);
        if (place < 0)
            continue;
        bool whole = in->rows == MD_NO_SLOT || (in->chosen_last && k + 1 == s->layers);
        if (in->pooled)
            for (int i = 0; i < 2; i++)
                out[2 * place + i] = md_n_mean_rows(g, md_n_gather_rows(g, r.x, in->pooled[i]));
        else
            out[place] = whole ? r.x : md_n_gather_rows(g, r.x, in->rows);
    }
}
