/* viewer: see viewer.h. */
#include "src/viewer.h"
#include "kernels/plan/plan_backend.h"
#include "kernels/scalar_math.h"
#include "src/log.h"

#include <string.h>

struct md_viewer {
    md_viewer_args args;
    md_graph graph;
    md_slot image, rows, rel_index, out;
    int chosen, width; /* rows of an image that are looked at; values of an image */
    size_t image_bytes, out_bytes, scratch_size;
    void *region, *scratch, *image_operand, *rows_operand, *index_operand, *out_operand;
    uint8_t *host_image; /* of all ranks of tp */
    void *host_out;      /* in the compute type */
    float *values;       /* [images, width] */
};

/* ---- the graph ---- */

static bool looks_at_cls(const md_viewer *v)
{
    return v->args.sight == MD_SIGHT_CLS ||
           (v->args.sight == MD_SIGHT_LOGITS && v->args.method->chosen_cls);
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
    md_slot x = md_student_encode(m, g,
                                  &(md_vit_in){.images = n,
                                               .image = v->image,
                                               .mask = MD_NO_SLOT,
                                               .mix = MD_NO_SLOT,
                                               .index = v->rel_index,
                                               .rows = v->rows,
                                               .all_rows = v->rows});
    x = v->args.sight == MD_SIGHT_CLS ? md_n_mean_rows(g, x) : md_student_pool(m, g, x);
    if (v->args.sight == MD_SIGHT_LOGITS)
        x = m->head->build((md_method *)(uintptr_t)m, g, x);
    v->out = x;
    md_graph_set_external(g, x);
    MD_TRY(md_graph_finish(g));
    v->width = (int)md_tensor_cols(md_graph_tensor(g, x));
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

static md_status fill_inputs(md_viewer *v, int32_t *rows, int32_t *index)
{
    md_backend *be = v->args.backend;
    const md_vit_spec *s = &v->args.method->student_vit.spec;
    const int64_t tokens = md_vit_tokens(s);
    for (int64_t j = 0; j < v->args.images; j++)
        for (int i = 0; i < v->chosen; i++)
            rows[j * v->chosen + i] = (int32_t)(j * tokens + (looks_at_cls(v) ? 0 : 1 + i));
    MD_TRY(md_backend_upload(be, v->rows_operand, rows,
                             md_tensor_bytes(md_graph_tensor(&v->graph, v->rows))));
    if (v->rel_index != MD_NO_SLOT) {
        md_vit_rel_index(md_vit_side(s), index);
        MD_TRY(md_backend_upload(be, v->index_operand, index,
                                 md_tensor_bytes(md_graph_tensor(&v->graph, v->rel_index))));
    }
    return md_backend_sync(be);
}

static md_status allocate(md_viewer *v)
{
    md_backend *be = v->args.backend;
    md_graph *g = &v->graph;
    const int64_t tokens = md_vit_tokens(&v->args.method->student_vit.spec);
    const size_t rows = md_tensor_bytes(md_graph_tensor(g, v->rows));
    const size_t index = v->rel_index == MD_NO_SLOT ? 0 : 4 * (size_t)(tokens * tokens);
    void *p;
    v->image_bytes = md_tensor_bytes(md_graph_tensor(g, v->image));
    v->out_bytes = md_tensor_bytes(md_graph_tensor(g, v->out));
    MD_TRY(md_backend_alloc(be, g->region_bytes, "activations", &v->region));
    MD_TRY(md_backend_alloc(be, v->scratch_size, "scratch", &v->scratch));
    MD_TRY(md_backend_alloc(be, v->image_bytes, "images", &v->image_operand));
    MD_TRY(md_backend_alloc(be, rows, "rows", &v->rows_operand));
    MD_TRY(md_backend_alloc(be, index, "relative position index", &v->index_operand));
    MD_TRY(md_backend_alloc(be, v->out_bytes, "outputs", &v->out_operand));
    MD_TRY(md_backend_pinned(be, v->image_bytes, "images", &p));
    v->host_image = p;
    MD_TRY(md_backend_pinned(be, v->out_bytes, "outputs", &v->host_out));
    MD_NEW(v->values, v->args.images * v->width, "outputs");
    md_graph_bind_region(g, v->region);
    md_graph_bind(g, v->image, v->image_operand);
    md_graph_bind(g, v->rows, v->rows_operand);
    md_graph_bind(g, v->out, v->out_operand);
    if (index)
        md_graph_bind(g, v->rel_index, v->index_operand);
    int32_t *host = md_alloc(rows + index, "rows");
    md_status st = host ? fill_inputs(v, host, host + rows / 4) : MD_ERR_MEMORY;
    md_free(host);
    return st;
}

md_status md_viewer_create(const md_viewer_args *args, md_viewer **out)
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
    v->args = *args;
    md_status st = build(v);
    if (st == MD_OK)
        st = plan_scratch(v);
    if (st == MD_OK)
        st = allocate(v);
    if (st != MD_OK) {
        md_viewer_free(v);
        return st;
    }
    *out = v;
    return MD_OK;
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
    void *const scratch = be->scratch;
    const size_t size = be->scratch_size;
    MD_TRY(md_backend_upload(be, v->image_operand, v->host_image, v->image_bytes));
    be->scratch = v->scratch;
    be->scratch_size = v->scratch_size;
    md_status st = md_graph_forward(&v->graph, be);
    be->scratch = scratch;
    be->scratch_size = size;
    MD_TRY(st);
    MD_TRY(md_backend_download(be, v->host_out, v->out_operand, v->out_bytes));
    return md_backend_sync(be);
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
    const int64_t n = v->args.images * v->width;
    if (md_graph_tensor(&v->graph, v->out)->dtype == MD_BF16)
        for (int64_t i = 0; i < n; i++)
            v->values[i] = md_f32_from_bf16(((const uint16_t *)v->host_out)[i]);
    else
        memcpy(v->values, v->host_out, v->out_bytes);
    *out = v->values;
    return MD_OK;
}

const uint8_t *md_viewer_image(const md_viewer *v, int64_t j)
{
    return v->host_image + (size_t)j * (v->image_bytes / (size_t)v->args.images);
}
