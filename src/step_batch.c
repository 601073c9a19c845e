/* step_batch: see step_batch.h. */
#include "src/step_batch.h"
#include "src/rng.h"

#include <string.h>

/* Where each array begins in a block, in bytes. */
typedef struct layout {
    size_t keep, packed, packed_rows, teacher_rows, student_rows, all_rows, mask, mix, target,
        image, image2, bytes;
} layout;

static size_t take(size_t *at, size_t bytes)
{
    size_t here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

static size_t target_bytes(const md_method *m)
{
    return md_tensor_bytes(md_graph_tensor(&m->student_graph, m->s_target));
}

static size_t picture_bytes(int64_t images, int64_t side)
{
    return (size_t)(images * side * side * 3);
}

/* On host memory pictures are read where the loader put them, but for those of other ranks. */
static layout layout_of(const md_method *m, bool device)
{
    const md_vit_spec *s = &m->student_vit.spec;
    const size_t rows = (size_t)m->row_images, chosen = (size_t)m->chosen;
    const bool gathers = m->row_images > m->own_images;
    layout l = {0};
    size_t at = 0;
    l.keep = take(&at, 4 * 2 * (size_t)s->layers * rows);
    l.packed = take(&at, m->s_packed ? 4 * 2 * (size_t)s->layers * rows : 0);
    l.packed_rows = take(&at, m->s_packed_rows != MD_NO_SLOT ? 4 * rows * chosen : 0);
    l.teacher_rows = take(&at, m->labels ? 0 : 4 * (size_t)m->own_images * chosen);
    l.student_rows = take(&at, 4 * rows * chosen);
    l.all_rows = take(&at, m->row_images < m->images ? 4 * (size_t)m->images * chosen : 0);
    l.mask = take(&at, rows * (size_t)md_vit_patches(s));
    l.mix = take(&at, m->labels ? rows * sizeof(md_mix) : 0);
    l.target = take(&at, m->labels ? target_bytes(m) : 0);
    l.image = take(&at, device || gathers ? picture_bytes(m->row_images, s->image) : 0);
    l.image2 =
        take(&at, device && !m->labels && (m->teacher_image || gathers)
                      ? picture_bytes(m->own_images, m->teacher_image ? m->teacher_image : s->image)
                      : 0);
    l.bytes = at;
    return l;
}

/* Of the operand that the teacher writes; those made of labels are part of a block. */
static size_t teacher_target_bytes(const md_method *m)
{
    return m->labels ? 0 : target_bytes(m);
}

/* One index serves both: teacher and student have the same grid. */
static size_t rel_index_bytes(const md_method *m)
{
    if (m->s_rel_index != MD_NO_SLOT)
        return md_tensor_bytes(md_graph_tensor(&m->student_graph, m->s_rel_index));
    return m->t_rel_index == MD_NO_SLOT
               ? 0
               : md_tensor_bytes(md_graph_tensor(&m->teacher_graph, m->t_rel_index));
}

void md_step_batch_bytes(const md_method *m, bool device, size_t *operands, size_t *host)
{
    const size_t block = layout_of(m, device).bytes;
    const size_t patches = (size_t)md_vit_patches(&m->student_vit.spec);
    const size_t slots = device ? MD_FEED_SLOTS : 1;
    *operands = slots * block + teacher_target_bytes(m) + rel_index_bytes(m) + sizeof(double);
    *host = (device ? slots * block + rel_index_bytes(m) : 0) + 4 * patches + patches +
            (sizeof(int64_t) + (m->labels ? sizeof(int32_t) : 0)) * (size_t)m->images;
}

static md_status operand(md_step_batch *b, size_t bytes, const char *what, void **out)
{
    return md_backend_alloc(b->be, bytes, what, out);
}

static md_status allocate(md_step_batch *b)
{
    const md_method *m = b->method;
    const bool device = md_backend_is_device(b->be);
    const size_t bytes = layout_of(m, device).bytes;
    const int64_t patches = md_vit_patches(&m->student_vit.spec);
    void *p;
    b->slots = device ? MD_FEED_SLOTS : 1;
    for (int i = 0; i < b->slots; i++) {
        MD_TRY(operand(b, bytes, "batch", &p));
        b->host[i] = b->operands[i] = p;
        if (device) {
            b->host[i] = NULL;
            MD_TRY(md_backend_pinned(b->be, bytes, "batch", &p));
            b->host[i] = p;
        }
    }
    MD_TRY(operand(b, teacher_target_bytes(m), "targets", &b->target));
    MD_TRY(operand(b, rel_index_bytes(m), "relative position index", &b->rel_index));
    MD_TRY(operand(b, sizeof *b->loss, "loss", &p));
    b->loss = p;
    MD_NEW(b->chosen, patches, "chosen patches");
    MD_NEW(b->other_mask, patches, "masks");
    MD_NEW(b->sample, m->images, "samples");
    if (m->labels)
        MD_NEW(b->label, m->images, "labels");
    return MD_OK;
}

static md_status fill_rel_index(md_step_batch *b)
{
    const md_vit_spec *s = &b->method->student_vit.spec;
    const size_t bytes = rel_index_bytes(b->method);
    if (bytes == 0)
        return MD_OK;
    int32_t *index = md_alloc(bytes, "relative position index");
    if (!index)
        return MD_ERR_MEMORY;
    md_vit_rel_index(md_vit_side(s), index);
    md_status st = md_backend_upload(b->be, b->rel_index, index, bytes);
    if (st == MD_OK)
        st = md_backend_sync(b->be);
    md_free(index);
    return st;
}

static void bind_drop_path(md_method *m, char *block, const layout *l)
{
    md_graph *g = &m->student_graph;
    for (int k = 0; m->s_keep && k < 2 * m->student_vit.spec.layers; k++) {
        if (m->s_keep[k] == MD_NO_SLOT)
            continue;
        md_graph_bind(g, m->s_keep[k], (float *)(block + l->keep) + k * m->row_images);
        if (m->s_packed)
            md_graph_bind(g, m->s_packed[k], (int32_t *)(block + l->packed) + k * m->row_images);
    }
    if (m->s_packed_rows != MD_NO_SLOT)
        md_graph_bind(g, m->s_packed_rows, block + l->packed_rows);
}

/* The present block, and what no pass changes. */
static void bind(md_step_batch *b, const layout *l)
{
    md_method *m = b->method;
    md_graph *teacher = &m->teacher_graph, *student = &m->student_graph;
    char *block = b->operands[b->slot];
    if (m->labels) {
        md_graph_bind(student, m->s_target, block + l->target);
        md_graph_bind(student, m->s_mix, block + l->mix);
    } else {
        md_graph_bind(teacher, m->t_rows, block + l->teacher_rows);
        md_graph_bind(teacher, m->t_target, b->target);
        md_graph_bind(student, m->s_target, b->target);
    }
    md_graph_bind(student, m->s_rows, block + l->student_rows);
    if (m->row_images < m->images)
        md_graph_bind(student, m->s_all_rows, block + l->all_rows);
    md_graph_bind(student, m->s_loss, b->loss);
    if (m->s_mask != MD_NO_SLOT)
        md_graph_bind(student, m->s_mask, block + l->mask);
    if (m->s_rel_index != MD_NO_SLOT)
        md_graph_bind(student, m->s_rel_index, b->rel_index);
    if (m->t_rel_index != MD_NO_SLOT)
        md_graph_bind(teacher, m->t_rel_index, b->rel_index);
    bind_drop_path(m, block, l);
}

md_status md_step_batch_create(md_method *m, const md_topo *topo, md_backend *be, uint64_t seed,
                               md_step_batch *b)
{
    b->method = m;
    b->topo = topo;
    b->be = be;
    b->seed = seed;
    b->mix = md_mix_rule_make(m->config);
    MD_TRY(allocate(b));
    return fill_rel_index(b);
}

void md_step_batch_free(md_step_batch *b)
{
    for (int i = 0; i < b->slots; i++) {
        if (b->host[i] != b->operands[i])
            md_backend_pinned_free(b->be, b->host[i]);
        md_backend_free(b->be, b->operands[i]);
    }
    if (b->be) {
        md_backend_free(b->be, b->target);
        md_backend_free(b->be, b->rel_index);
        md_backend_free(b->be, b->loss);
    }
    md_free(b->chosen);
    md_free(b->other_mask);
    md_free(b->sample);
    md_free(b->label);
    *b = (md_step_batch){0};
}

/* ---- one pass ---- */

/* First of the images on which the student's stream runs here. */
static int64_t first_row_image(const md_step_batch *b)
{
    const md_method *m = b->method;
    return m->row_images < m->images ? b->topo->tp_rank * m->own_images : 0;
}

/* Row of patch `patch` (-1: cls) of image j in a token matrix. */
static int32_t row_of(int64_t j, int patch, int patches, bool cls)
{
    return (int32_t)(cls ? j * (patches + 1) + 1 + patch : j * patches + patch);
}

/* Host side of the block being filled. */
typedef struct filling {
    md_step_batch *b;
    float *keep;
    int32_t *packed, *packed_rows, *teacher_rows, *student_rows, *all_rows;
    uint8_t *mask;
    md_mix *mix;
    float *target;
} filling;

/* The mask of image j of the pass, and its chosen patches as rows of each token matrix that it
 * stands in: the student's, the teacher's, and that of all images. */
static void draw_mask(const filling *f, uint32_t epoch, int64_t j)
{
    md_step_batch *b = f->b;
    const md_method *m = b->method;
    const int patches = md_vit_patches(&m->student_vit.spec), chosen = m->chosen;
    const bool all = chosen == patches;
    const int64_t own = j - b->topo->tp_rank * m->own_images, row = j - first_row_image(b);
    const bool is_own = own >= 0 && own < m->own_images, is_row = row >= 0 && row < m->row_images;
    uint8_t *mask = is_row ? f->mask + row * patches : b->other_mask;
    md_mask_sample(&m->mask, epoch, b->sample[j], mask, b->chosen, NULL);
    for (int i = 0; i < chosen; i++) {
        int patch = m->chosen_cls ? -1 : all ? i : b->chosen[i];
        if (is_row)
            f->student_rows[row * chosen + i] = row_of(row, patch, patches, true);
        if (m->row_images < m->images)
            f->all_rows[j * chosen + i] = row_of(j, patch, patches, true);
        if (is_own && !m->labels)
            f->teacher_rows[own * chosen + i] = row_of(own, patch, patches, m->teacher_cls);
    }
}

/* The images that a branch with these factors is run for: those it is not dropped for, and as many
 * others, whose factor is 0, as md_method_packed asks for. Returns how many. */
static int64_t pack(const md_method *m, const float *keep, int32_t *packed)
{
    int64_t kept = 0, others, n = 0;
    for (int64_t j = 0; j < m->row_images; j++)
        kept += keep[j] > 0;
    others = md_method_packed(m, kept) - kept;
    for (int64_t j = 0; j < m->row_images; j++)
        packed[j] = keep[j] > 0 || others-- > 0 ? (int32_t)n++ : -1;
    return n;
}

/* The chosen rows of the packed images of the last block's attention. */
static void pack_rows(const filling *f)
{
    const md_method *m = f->b->method;
    const int32_t *packed = f->packed + 2 * (m->student_vit.spec.layers - 1) * m->row_images;
    const int32_t tokens = md_vit_tokens(&m->student_vit.spec);
    for (int64_t j = 0; j < m->row_images; j++)
        for (int i = 0; packed[j] >= 0 && i < m->chosen; i++)
            f->packed_rows[packed[j] * m->chosen + i] =
                f->student_rows[j * m->chosen + i] + (packed[j] - (int32_t)j) * tokens;
}

/* Factors of both branches of every block: 0, or what keeps the mean. */
static void draw_keep(const filling *f, int64_t step, int64_t first)
{
    const md_step_batch *b = f->b;
    const md_method *m = b->method;
    const md_vit_spec *s = &m->student_vit.spec;
    first += first_row_image(b);
    for (int k = 0; m->s_keep && k < 2 * s->layers; k++) {
        float rate = md_vit_drop_rate(s, k / 2);
        for (int64_t j = 0; j < m->row_images; j++) {
            uint64_t index = (uint64_t)(first + j) * 2 * (uint64_t)s->layers + (uint64_t)k;
            md_rng r = md_rng_at(b->seed, MD_RNG_DROP_PATH, (uint32_t)step, index);
            f->keep[k * m->row_images + j] = md_rng_float(&r) >= rate ? 1.0f / (1.0f - rate) : 0.0f;
        }
        if (m->s_packed && m->s_packed[k] != MD_NO_SLOT)
            md_graph_pack(&b->method->student_graph, m->s_packed[k],
                          pack(m, f->keep + k * m->row_images, f->packed + k * m->row_images));
    }
    if (m->s_packed_rows != MD_NO_SLOT)
        pack_rows(f);
}

/* How each image is erased and mixed, and its target: its own class and its partner's. `first` is
 * the position of the pass in the batch, a multiple of the group. */
static void draw_mix(const filling *f, uint32_t epoch, int64_t step, int64_t first)
{
    const md_step_batch *b = f->b;
    const md_method *m = b->method;
    const int64_t begin = first_row_image(b);
    memset(f->target, 0, target_bytes(m));
    for (int64_t row = 0; row < m->row_images; row++) {
        const int64_t j = begin + row;
        md_mix r = md_mix_record(&b->mix, step, first + j, epoch, b->sample[j]);
        const double own = md_mix_weight(&b->mix, step, first + j);
        float *target = f->target + row * m->target_width;
        md_mix_target(&b->mix, own, b->label[j], m->target_width, target);
        if (own < 1.0)
            md_mix_target(&b->mix, 1.0 - own, b->label[j + r.partner], m->target_width, target);
        r.partner += (int32_t)row;
        f->mix[row] = r;
    }
}

/* Binds the pictures, in the block where they are there, else where the loader put them. */
static void place_pictures(md_step_batch *b, const md_batch *batch, const layout *l)
{
    md_method *m = b->method;
    char *host = b->host[b->slot], *block = b->operands[b->slot];
    const md_tensor *seen = m->teacher_image ? &batch->image2 : &batch->image;
    const bool device = md_backend_is_device(b->be), gathers = m->row_images > m->own_images;
    void *student = batch->image.data, *teacher = seen->data;
    if (gathers)
        md_comm_allgather(b->topo->tp, batch->image.data, host + l->image,
                          (int64_t)md_tensor_bytes(&batch->image));
    else if (device)
        memcpy(host + l->image, batch->image.data, md_tensor_bytes(&batch->image));
    if (gathers || device)
        student = block + l->image;
    if (device)
        teacher = student;
    if (device && l->image2 != l->bytes) {
        memcpy(host + l->image2, seen->data, md_tensor_bytes(seen));
        teacher = block + l->image2;
    }
    if (!m->labels)
        md_graph_bind(&m->teacher_graph, m->t_image, teacher);
    md_graph_bind(&m->student_graph, m->s_image, student);
}

md_status md_step_batch_set(md_step_batch *b, const md_batch *batch, int64_t step, int64_t first)
{
    const md_method *m = b->method;
    const layout l = layout_of(m, md_backend_is_device(b->be));
    b->slot = (b->slot + 1) % b->slots;
    MD_TRY(md_backend_feed_wait(b->be, b->slot));
    char *host = b->host[b->slot];
    const filling f = {.b = b,
                       .keep = (float *)(host + l.keep),
                       .packed = (int32_t *)(host + l.packed),
                       .packed_rows = (int32_t *)(host + l.packed_rows),
                       .teacher_rows = (int32_t *)(host + l.teacher_rows),
                       .student_rows = (int32_t *)(host + l.student_rows),
                       .all_rows = (int32_t *)(host + l.all_rows),
                       .mask = (uint8_t *)(host + l.mask),
                       .mix = (md_mix *)(void *)(host + l.mix),
                       .target = (float *)(host + l.target)};
    md_comm_allgather(b->topo->tp, batch->sample, b->sample,
                      m->own_images * (int64_t)sizeof *b->sample);
    for (int64_t j = 0; j < m->images; j++)
        draw_mask(&f, batch->epoch, j);
    draw_keep(&f, step, first);
    if (m->labels) {
        md_comm_allgather(b->topo->tp, batch->label, b->label,
                          m->own_images * (int64_t)sizeof *b->label);
        draw_mix(&f, batch->epoch, step, first);
    }
    bind(b, &l);
    place_pictures(b, batch, &l);
    return md_backend_feed(b->be, b->slot, b->operands[b->slot], host, l.bytes);
}

md_status md_step_batch_used(md_step_batch *b)
{
    return md_backend_feed_used(b->be, b->slot);
}
