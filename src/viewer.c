/* viewer: see viewer.h. */
#include "src/viewer.h"
#include "kernels/plan/plan_backend.h"
#include "kernels/scalar_math.h"
#include "src/log.h"

#include <string.h>

struct md_viewer {
    md_viewer_args args;
    md_graph graph;
    md_slot image, rows, cls_rows, rel_index; /* cls_rows: of sight BLOCKS */
    md_slot *out;                             /* [outs], each [images, part] */
    int outs, part;                           /* values of an image in one of them */
    int chosen, width; /* rows of an image that are looked at; values of an image */
    size_t image_bytes, out_bytes, rows_bytes, index_bytes, scratch_size; /* out_bytes: from one
                                                                             output to the next */
    void *region, *scratch, *image_operand, *rows_operand, *index_operand, *out_operand;
    uint8_t *host_image; /* of all ranks of tp */
    char *host_out;      /* in the compute type */
    float *values;       /* [images, width] */
};

/* ---- the graph ---- */

static bool looks_at_cls(const md_viewer *v)
{
    return v->args.sight == MD_SIGHT_CLS ||
           (v->args.sight == MD_SIGHT_LOGITS && v->args.method->chosen_cls);
}

/* One vector an image behind the encoder's end, or its logits. */
static md_slot build_end(const md_viewer *v, md_graph *g, const md_vit_in *in)
{
    const md_method *m = v->args.method;
    md_slot x = md_student_encode(m, g, in);
    x = v->args.sight == MD_SIGHT_CLS ? md_n_mean_rows(g, x) : md_student_pool(m, g, x);
    return v->args.sight == MD_SIGHT_LOGITS ? m->head->build((md_method *)(uintptr_t)m, g, x) : x;
}

/* Two vectors an image behind every block. */
static void build_blocks(md_viewer *v, md_graph *g, const md_vit_in *in)
{
    v->cls_rows = md_graph_input(g, "cls rows", MD_I32, 2, (int64_t[]){v->args.images, 1});
    md_vit_in pooled = *in;
    pooled.pooled = (md_slot[]){v->cls_rows, v->rows};
    md_student_blocks(v->args.method, g, &pooled, v->out);
}

static md_status build(md_viewer *v)
{
    const md_method *m = v->args.method;
    const md_vit_spec *s = &m->student_vit.spec;
    const int64_t n = v->args.images, tokens = md_vit_tokens(s);
    md_graph *g = &v->graph;
    /* Running the graph reads the registry only. */
    md_graph_init(g, (md_params *)(uintptr_t)&m->params, false, v->args.topo->op_tp);
    v->chosen = looks_at_cls(v) ? 1 : md_vit_patches(s);
    v->image = md_graph_input(g, "image", MD_U8, 4, (int64_t[]){n, s->image, s->image, 3});
    v->rows = md_graph_input(g, "rows", MD_I32, 2, (int64_t[]){n, v->chosen});
    v->rel_index = s->rel_pos == MD_REL_NONE
                       ? MD_NO_SLOT
                       : md_graph_input(g, "rel_index", MD_I32, 2, (int64_t[]){tokens, tokens});
    const md_vit_in in = {.images = n,
                          .image = v->image,
                          .mask = MD_NO_SLOT,
                          .mix = MD_NO_SLOT,
                          .index = v->rel_index,
                          .rows = v->rows,
                          .all_rows = v->rows};
    v->cls_rows = MD_NO_SLOT;
    v->outs = v->args.sight == MD_SIGHT_BLOCKS ? 2 * s->layers : 1;
    MD_NEW(v->out, v->outs, "outputs");
    if (v->args.sight == MD_SIGHT_BLOCKS)
        build_blocks(v, g, &in);
    else
        v->out[0] = build_end(v, g, &in);
    for (int i = 0; i < v->outs; i++)
        md_graph_set_external(g, v->out[i]);
    MD_TRY(md_graph_finish(g));
    v->part = (int)md_tensor_cols(md_graph_tensor(g, v->out[0]));
    v->width = v->outs * v->part;
    return MD_OK;
}

/* ---- memory ---- */

static md_status plan_scratch(md_viewer *v)
{
    md_backend *plan;
    md_comm *tp, *real = v->graph.tp;
    MD_TRY(md_comm_plan(v->args.topo->tp_rank, v->args.topo->tp_size, &tp));
    md_status st = md_plan_create(v->args.backend, &plan);
    if (st == MD_OK) {
        v->graph.tp = tp;
        st = md_graph_forward(&v->graph, plan);
        v->scratch_size = md_plan_take(plan).scratch;
        v->graph.tp = real;
        plan->destroy(plan);
    }
    md_comm_free(tp);
    return st;
}

/* rows: those that are chosen, then each image's cls. */
static md_status fill_inputs(md_viewer *v, int32_t *rows, size_t bytes, int32_t *index)
{
    md_backend *be = v->args.backend;
    const md_vit_spec *s = &v->args.method->student_vit.spec;
    const int64_t tokens = md_vit_tokens(s);
    const int64_t images = v->args.images;
    for (int64_t j = 0; j < images; j++) {
        for (int i = 0; i < v->chosen; i++)
            rows[j * v->chosen + i] = (int32_t)(j * tokens + (looks_at_cls(v) ? 0 : 1 + i));
        rows[images * v->chosen + j] = (int32_t)(j * tokens);
    }
    MD_TRY(md_backend_upload(be, v->rows_operand, rows, bytes));
    if (v->rel_index != MD_NO_SLOT) {
        md_vit_rel_index(md_vit_side(s), index);
        MD_TRY(md_backend_upload(be, v->index_operand, index,
                                 md_tensor_bytes(md_graph_tensor(&v->graph, v->rel_index))));
    }
    return md_backend_sync(be);
}

static void size_up(md_viewer *v)
{
    const md_graph *g = &v->graph;
    v->image_bytes = md_tensor_bytes(md_graph_tensor(g, v->image));
    v->out_bytes = (md_tensor_bytes(md_graph_tensor(g, v->out[0])) + 63) / 64 * 64;
    v->rows_bytes = 4 * (size_t)(v->args.images * (v->chosen + 1));
    v->index_bytes =
        v->rel_index == MD_NO_SLOT ? 0 : md_tensor_bytes(md_graph_tensor(g, v->rel_index));
}

static md_status allocate(md_viewer *v)
{
    md_backend *be = v->args.backend;
    md_graph *g = &v->graph;
    const size_t chosen = (size_t)(v->args.images * v->chosen);
    const size_t rows = v->rows_bytes, index = v->index_bytes;
    const size_t outs = (size_t)v->outs * v->out_bytes;
    void *p;
    MD_TRY(md_backend_alloc(be, g->region_bytes, "activations", &v->region));
    MD_TRY(md_backend_alloc(be, v->scratch_size, "scratch", &v->scratch));
    MD_TRY(md_backend_alloc(be, v->image_bytes, "images", &v->image_operand));
    MD_TRY(md_backend_alloc(be, rows, "rows", &v->rows_operand));
    MD_TRY(md_backend_alloc(be, index, "relative position index", &v->index_operand));
    MD_TRY(md_backend_alloc(be, outs, "outputs", &v->out_operand));
    MD_TRY(md_backend_pinned(be, v->image_bytes, "images", &p));
    v->host_image = p;
    MD_TRY(md_backend_pinned(be, outs, "outputs", &p));
    v->host_out = p;
    MD_NEW(v->values, v->args.images * v->width, "outputs");
    md_graph_bind_region(g, v->region);
    md_graph_bind(g, v->image, v->image_operand);
    md_graph_bind(g, v->rows, v->rows_operand);
    if (v->cls_rows != MD_NO_SLOT)
        md_graph_bind(g, v->cls_rows, (int32_t *)v->rows_operand + chosen);
    for (int i = 0; i < v->outs; i++)
        md_graph_bind(g, v->out[i], (char *)v->out_operand + (size_t)i * v->out_bytes);
    if (index)
        md_graph_bind(g, v->rel_index, v->index_operand);
    int32_t *host = md_alloc(rows + index, "rows");
    md_status st = host ? fill_inputs(v, host, rows, host + rows / 4) : MD_ERR_MEMORY;
    md_free(host);
    return st;
}

/* All but memory for operands. */
static md_status make(const md_viewer_args *args, md_viewer **out)
{
    md_viewer *v;
    *out = NULL;
    if (args->sight == MD_SIGHT_LOGITS && !args->method->labels)
        MD_FAIL(MD_ERR_CONFIG, "task = \"%s\" trains no classifier: it has no logits to look at",
                args->method->task->name);
    if (args->sight == MD_SIGHT_CLS && args->method->fc_norm_w != MD_NO_PARAM)
        MD_FAIL(MD_ERR_CONFIG, "a classifier with model.pool = \"mean\" has no norm for its cls "
                               "token: look at the mean of the patch tokens");
    MD_NEW(v, 1, "viewer");
    *out = v;
    v->args = *args;
    MD_TRY(build(v));
    size_up(v);
    return plan_scratch(v);
}

md_status md_viewer_create(const md_viewer_args *args, md_viewer **out)
{
    md_status st = make(args, out);
    if (st == MD_OK)
        st = allocate(*out);
    if (st != MD_OK) {
        md_viewer_free(*out);
        *out = NULL;
    }
    return st;
}

md_status md_viewer_plan(const md_viewer_args *args, md_viewer_bytes *out)
{
    md_viewer *v;
    md_status st = make(args, &v);
    if (st == MD_OK) {
        const size_t outs = (size_t)v->outs * v->out_bytes;
        out->operands = v->graph.region_bytes + v->scratch_size + v->image_bytes + v->rows_bytes +
                        v->index_bytes + outs;
        out->host = v->image_bytes + outs + (size_t)(v->args.images * v->width) * sizeof *v->values;
    }
    md_viewer_free(v);
    return st;
}

void md_viewer_free(md_viewer *v)
{
    if (!v)
        return;
    md_backend *be = v->args.backend;
    void *const operands[] = {v->region,       v->scratch,       v->image_operand,
                              v->rows_operand, v->index_operand, v->out_operand};
    for (size_t i = 0; i < MD_COUNT(operands); i++)
        md_backend_free(be, operands[i]);
    md_backend_pinned_free(be, v->host_image);
    md_backend_pinned_free(be, v->host_out);
    md_graph_free(&v->graph);
    md_free(v->out);
    md_free(v->values);
    md_free(v);
}

int md_viewer_width(const md_viewer *v)
{
    return v->width;
}

/* ---- looking ---- */

static md_status forward(md_viewer *v)
{
    md_backend *be = v->args.backend;
    MD_TRY(md_backend_upload(be, v->image_operand, v->host_image, v->image_bytes));
    const md_scratch was = md_backend_scratch(be, (md_scratch){v->scratch, v->scratch_size});
    md_status st = md_graph_forward(&v->graph, be);
    md_backend_scratch(be, was);
    MD_TRY(st);
    MD_TRY(md_backend_download(be, v->host_out, v->out_operand, (size_t)v->outs * v->out_bytes));
    return md_backend_sync(be);
}

/* The outputs of image j side by side. */
static void place_values(md_viewer *v, int64_t j, md_dtype dtype)
{
    const int64_t n = v->part;
    for (int i = 0; i < v->outs; i++) {
        const char *from = v->host_out + (size_t)i * v->out_bytes;
        float *to = v->values + j * v->width + i * n;
        if (dtype == MD_BF16)
            for (int64_t c = 0; c < n; c++)
                to[c] = md_f32_from_bf16(((const uint16_t *)(const void *)from)[j * n + c]);
        else
            memcpy(to, (const float *)(const void *)from + j * n, (size_t)n * sizeof *to);
    }
}

md_status md_viewer_run(md_viewer *v, const uint8_t *own, const float **out)
{
    const md_topo *topo = v->args.topo;
    md_comm_allgather(topo->tp, own, v->host_image,
                      (int64_t)v->image_bytes / md_comm_size(topo->tp));
    md_status st = forward(v);
    if (st != MD_OK && topo->tp_size > 1) {
        md_log_rank(MD_LOG_ERROR, "%s", md_error_text());
        md_abort(st);
    }
    MD_TRY(st);
    for (int64_t j = 0; j < v->args.images; j++)
        place_values(v, j, md_graph_tensor(&v->graph, v->out[0])->dtype);
    *out = v->values;
    return MD_OK;
}

const uint8_t *md_viewer_image(const md_viewer *v, int64_t j)
{
    return v->host_image + (size_t)j * (v->image_bytes / (size_t)v->args.images);
}
