/* step_batch: see step_batch.h. */
#include "src/step_batch.h"
#include "src/rng.h"

/* Elements of each buffer, by name, so that allocation and planning cannot differ. */
typedef struct sizes {
    size_t target, keep, rel_index, teacher_rows, student_rows, all_rows, chosen, mask, pixels,
        sample;
} sizes;

static sizes layout(const md_method *m)
{
    const md_vit_spec *s = &m->student_vit.spec;
    const size_t images = (size_t)m->images, own = (size_t)m->own_images;
    const size_t rows = (size_t)m->row_images, chosen = (size_t)m->chosen;
    const size_t patches = (size_t)md_vit_patches(s), tokens = patches + 1;
    return (sizes){
        .target = rows * chosen * (size_t)m->target_width,
        .keep = 2 * (size_t)s->layers * rows,
        .rel_index = s->rel_pos == MD_REL_NONE ? 0 : tokens * tokens,
        .teacher_rows = own * chosen,
        .student_rows = rows * chosen,
        .all_rows = rows < images ? images * chosen : 0,
        .chosen = patches,
        .mask = (rows < images ? rows + 1 : rows) * patches, /* one for masks of other ranks */
        .pixels = rows > own ? rows * (size_t)s->image * (size_t)s->image * 3 : 0,
        .sample = images,
    };
}

size_t md_step_batch_bytes(const md_method *m)
{
    sizes n = layout(m);
    return 4 * (n.target + n.keep + n.rel_index + n.teacher_rows + n.student_rows + n.all_rows +
                n.chosen) +
           n.mask + n.pixels + 8 * n.sample;
}

static md_status allocate(md_step_batch *b)
{
    sizes n = layout(b->method);
    MD_NEW(b->target, n.target, "targets");
    MD_NEW(b->keep, n.keep, "drop path");
    MD_NEW(b->rel_index, n.rel_index, "relative position index");
    MD_NEW(b->teacher_rows, n.teacher_rows, "chosen rows");
    MD_NEW(b->student_rows, n.student_rows, "chosen rows");
    if (n.all_rows)
        MD_NEW(b->all_rows, n.all_rows, "chosen rows");
    MD_NEW(b->chosen, n.chosen, "chosen patches");
    MD_NEW(b->mask, n.mask, "masks");
    if (n.pixels)
        MD_NEW(b->pixels, n.pixels, "pictures of the tensor-parallel group");
    MD_NEW(b->sample, n.sample, "samples");
    return MD_OK;
}

static void bind(md_step_batch *b)
{
    md_method *m = b->method;
    md_graph *teacher = &m->teacher_graph, *student = &m->student_graph;
    md_graph_bind(teacher, m->t_rows, b->teacher_rows);
    md_graph_bind(teacher, m->t_target, b->target);
    md_graph_bind(student, m->s_target, b->target);
    md_graph_bind(student, m->s_rows, b->student_rows);
    if (b->all_rows)
        md_graph_bind(student, m->s_all_rows, b->all_rows);
    md_graph_bind(student, m->s_loss, &b->loss);
    if (m->s_mask != MD_NO_SLOT)
        md_graph_bind(student, m->s_mask, b->mask);
    if (m->s_rel_index != MD_NO_SLOT) {
        md_vit_rel_index(md_vit_side(&m->student_vit.spec), b->rel_index);
        md_graph_bind(student, m->s_rel_index, b->rel_index);
    }
    for (int k = 0; m->s_keep && k < 2 * m->student_vit.spec.layers; k++)
        if (m->s_keep[k] != MD_NO_SLOT)
            md_graph_bind(student, m->s_keep[k], b->keep + k * m->row_images);
}

md_status md_step_batch_create(md_method *m, const md_topo *topo, uint64_t seed, md_step_batch *b)
{
    b->method = m;
    b->topo = topo;
    b->seed = seed;
    MD_TRY(allocate(b));
    bind(b);
    return MD_OK;
}

void md_step_batch_free(md_step_batch *b)
{
    md_free(b->target);
    md_free(b->keep);
    md_free(b->rel_index);
    md_free(b->teacher_rows);
    md_free(b->student_rows);
    md_free(b->all_rows);
    md_free(b->chosen);
    md_free(b->mask);
    md_free(b->pixels);
    md_free(b->sample);
    *b = (md_step_batch){0};
}

/* ---- one pass ---- */

/* First of the images on which the student's stream runs here. */
static int64_t first_row_image(const md_step_batch *b)
{
    const md_method *m = b->method;
    return m->row_images < m->images ? b->topo->tp_rank * m->own_images : 0;
}

/* Row of patch `patch` of image j in a token matrix. */
static int32_t row_of(int64_t j, int patch, int patches, bool cls)
{
    return (int32_t)(cls ? j * (patches + 1) + 1 + patch : j * patches + patch);
}

/* The mask of image j of the pass, and its chosen patches as rows of each token matrix that it
 * stands in: the student's, the teacher's, and that of all images. */
static void draw_mask(md_step_batch *b, uint32_t epoch, int64_t j)
{
    const md_method *m = b->method;
    const int patches = md_vit_patches(&m->student_vit.spec), chosen = m->chosen;
    const bool all = chosen == patches;
    const int64_t own = j - b->topo->tp_rank * m->own_images, row = j - first_row_image(b);
    const bool is_own = own >= 0 && own < m->own_images, is_row = row >= 0 && row < m->row_images;
    uint8_t *mask = b->mask + (is_row ? row : m->row_images) * patches;
    md_mask_sample(&m->mask, epoch, b->sample[j], mask, b->chosen, NULL);
    for (int i = 0; i < chosen; i++) {
        int patch = all ? i : b->chosen[i];
        if (is_row)
            b->student_rows[row * chosen + i] = row_of(row, patch, patches, true);
        if (b->all_rows)
            b->all_rows[j * chosen + i] = row_of(j, patch, patches, true);
        if (is_own)
            b->teacher_rows[own * chosen + i] = row_of(own, patch, patches, m->teacher_cls);
    }
}

/* Factors of both branches of every block: 0, or what keeps the mean. */
static void draw_keep(md_step_batch *b, int64_t step, int64_t first)
{
    const md_method *m = b->method;
    const md_vit_spec *s = &m->student_vit.spec;
    first += first_row_image(b);
    for (int k = 0; m->s_keep && k < 2 * s->layers; k++) {
        float rate = md_vit_drop_rate(s, k / 2);
        for (int64_t j = 0; j < m->row_images; j++) {
            uint64_t index = (uint64_t)(first + j) * 2 * (uint64_t)s->layers + (uint64_t)k;
            md_rng r = md_rng_at(b->seed, MD_RNG_DROP_PATH, (uint32_t)step, index);
            b->keep[k * m->row_images + j] = md_rng_float(&r) >= rate ? 1.0f / (1.0f - rate) : 0.0f;
        }
    }
}

void md_step_batch_set(md_step_batch *b, const md_batch *batch, int64_t step, int64_t first)
{
    md_method *m = b->method;
    md_comm *tp = b->topo->tp;
    const int64_t own = m->own_images;
    md_comm_allgather(tp, batch->sample, b->sample, own * (int64_t)sizeof *b->sample);
    if (b->pixels)
        md_comm_allgather(tp, batch->image.data, b->pixels,
                          (int64_t)md_tensor_bytes(&batch->image));
    for (int64_t j = 0; j < m->images; j++)
        draw_mask(b, batch->epoch, j);
    draw_keep(b, step, first);
    md_graph_bind(&m->teacher_graph, m->t_image,
                  m->teacher_image ? batch->image2.data : batch->image.data);
    md_graph_bind(&m->student_graph, m->s_image, b->pixels ? b->pixels : batch->image.data);
}
