/* method: what is learned from what. A method is data: one name per axis (teacher, target, mask,
 * student, head, loss), each axis a table of rows. md_method_resolve looks the names up and checks
 * that what one axis gives is what the next one takes; md_method_build makes the two graphs. Glue
 * (dropping cls, taking the chosen rows) follows from the tags, never from a method's name.
 *
 * Tensor parallelism: a pass has `images` images, the same for all ranks of the tp group, of which
 * each rank owns an equal share (own_images, in rank order). The teacher is never cut: each rank
 * runs it on its own images. The student's blocks are cut; what stands between them runs on all
 * images, or, with `sequence`, on the rank's own (row_images says which). Without `sequence` the
 * targets of all ranks are gathered.
 *
 * Chosen tokens: the M patches of every image the loss is taken on: the masked ones, or all. Both
 * graphs read the same choice through row indices into their own token matrices. */
#ifndef MD_METHOD_H
#define MD_METHOD_H

#include "src/config.h"
#include "src/mask.h"
#include "src/vit.h"

/* What flows between axes. MD_CLASS: distributions over the classes, made from the images' labels
 * on the host; MD_TOKENS_IMAGE: one vector an image. */
typedef enum md_value_kind { MD_FEATURE, MD_PIXEL, MD_CLASS } md_value_kind;
typedef enum md_token_set {
    MD_TOKENS_WITH_CLS,
    MD_TOKENS_PATCHES,
    MD_TOKENS_CHOSEN,
    MD_TOKENS_IMAGE
} md_token_set;
typedef struct md_tag {
    md_value_kind value;
    md_token_set tokens;
    int width;
} md_tag;

/* Where a vit teacher's weights have the norm of stage ln_post: behind the last block; behind the
 * mean of the tokens (a fine-tuned BEiT: it is then applied to each token); nowhere. */
typedef enum md_teacher_norm { MD_NORM_LAST, MD_NORM_MEAN, MD_NORM_NONE } md_teacher_norm;

/* What is known of a vit teacher before its weights are read. */
typedef struct md_teacher_info {
    md_vit_spec spec; /* image is filled in by md_method_resolve */
    int grid;         /* side of the stored position tables */
    int proj_width;   /* of proj.weight; 0 = none */
    md_teacher_norm norm;
    float mean[3], std[3];
} md_teacher_info;

/* How a model is spread over ranks. tp NULL: one rank. */
typedef struct md_method_split {
    md_comm *tp; /* not owned */
    int tp_rank, tp_size;
    bool sequence;
    int64_t align; /* elements that rows of the student's registry are aligned to; 0 = no need */
} md_method_split;

typedef struct md_method md_method;

/* What is trained: the axes that a task fixes; NULL where the config chooses. "features", which the
 * key `task` does not offer, declares a pretrained encoder alone. */
typedef struct md_task_row {
    const char *name, *teacher, *target, *mask, *student, *head, *loss;
} md_task_row;

typedef struct md_teacher_row {
    const char *name;
    bool trained_weights; /* needs method.teacher.weights */
    /* Checks the config, declares m->teacher_params and tells what build gives per token. */
    md_status (*declare)(md_method *m, md_tag *out);
    /* Values [B*M, width] at the chosen tokens, from images u8 [B, S, S, 3]; B the own images.
     * NULL: there is no graph, the targets come with the batch. */
    md_slot (*build)(md_method *m, md_graph *g, md_slot image, md_slot rows);
} md_teacher_row;

typedef struct md_target_row {
    const char *name;
    md_slot (*build)(md_method *m, md_graph *g, md_slot x); /* [B*M, width] -> same */
} md_target_row;

typedef struct md_student_row {
    const char *name;
    md_status (*declare)(md_method *m, md_tag *out);
    /* Encoder output [B*M, C] at the chosen tokens, or [B, C] (MD_TOKENS_IMAGE). */
    md_slot (*build)(md_method *m, md_graph *g);
} md_student_row;

typedef struct md_head_row {
    const char *name;
    md_status (*declare)(md_method *m, const md_tag *in, int width);
    md_slot (*build)(md_method *m, md_graph *g, md_slot x); /* [B*M, C] -> [B*M, width] */
} md_head_row;

typedef struct md_loss_row {
    const char *name;
    md_loss_kind kind;
    md_value_kind value; /* of the targets: MD_CLASS, or (MD_FEATURE) anything else */
    bool per_value;      /* the mean is over rows and channels; else over rows */
    md_slot (*build)(md_graph *g, md_slot pred, md_slot target, const md_attr *attr);
} md_loss_row;

struct md_method {
    const md_config *config;
    const md_task_row *task;
    md_method_split split;
    const md_teacher_row *teacher;
    const md_target_row *target;
    const md_student_row *student;
    const md_head_row *head;
    const md_loss_row *loss;
    md_mask_args mask;
    md_teacher_info info; /* zero for teachers without weights */
    md_vit student_vit, teacher_vit;
    md_params params;         /* the student's and the head's, trainable */
    md_params teacher_params; /* frozen */
    int proj_w;               /* teacher projection, MD_NO_PARAM when not used */
    int fc_norm_w, fc_norm_b; /* MD_NO_PARAM where tokens are not pooled */
    int head_w, head_b;
    int chosen;        /* M */
    bool chosen_cls;   /* the one chosen token is cls, not a patch */
    int outputs;       /* predictions of an image: M, or 1 where the tokens are pooled */
    int target_width;  /* K */
    bool labels;       /* targets come with the batch (MD_CLASS) */
    int teacher_image; /* side of the teacher's own crop; 0: it sees the student's */
    bool teacher_cls;  /* the teacher's token rows begin with cls */

    /* After md_method_build: the graphs, and their slots to bind. */
    int64_t images;     /* of one pass */
    int64_t own_images; /* of them, this rank's share */
    int64_t row_images; /* those on which the student's stream between the cut layers runs */
    md_graph teacher_graph, student_graph;
    md_slot t_image, t_rows, t_target; /* own images; t_target of row_images; without a teacher's
                                          graph MD_NO_SLOT */
    md_slot t_rel_index;               /* as s_rel_index: both see the same grid */
    md_slot s_image, s_mask, s_rows, s_target; /* row_images */
    md_slot s_mix;                             /* i32 [row_images, MD_MIX_WORDS] with labels */
    md_slot s_all_rows, s_rel_index, s_loss;   /* s_all_rows of all images */
    md_slot *s_keep;                           /* [2L] or NULL */
    md_slot *s_packed;     /* [2L] or NULL: drop path computes dropped images too */
    md_slot s_packed_rows; /* s_rows in the last block's attention; may be MD_NO_SLOT */
};

/* Looks up the axes of c (kept by pointer), checks that they fit, declares and seals both
 * registries. info describes the teacher's weights, NULL when they are not known (pixel teacher);
 * split NULL: one rank. Local. MD_ERR_CONFIG names the keys that do not fit. */
md_status md_method_resolve(md_method *m, const md_config *c, const md_teacher_info *info,
                            const md_method_split *split);
/* Whether this config's teacher is read from a weights file. */
bool md_method_needs_weights(const md_config *c);
/* Builds both graphs for `images` images a pass (a multiple of the tp ranks). The loss is scaled so
 * that the sum over the passes and ranks of a step of `step_images` images is the mean over all
 * chosen tokens and channels. */
md_status md_method_build(md_method *m, int64_t images, int64_t step_images);
void md_method_free(md_method *m);

/* For axes: an input of row_images images, in the place that goes with them. */
md_slot md_method_input(const md_method *m, md_graph *g, const char *name, md_dtype dtype, int rank,
                        const int64_t *dim);
/* For axes: whether last blocks run at the chosen tokens only (model.last_block). */
bool md_method_chosen_last(const md_method *m);

/* Where drop path skips: for how many images a branch is run that `kept` of row_images are not
 * dropped for. At least one, and one of at most MD_PACKED_COUNTS counts, because each is a shape
 * that backends prepare themselves for. Local. */
#define MD_PACKED_COUNTS 64
int64_t md_method_packed(const md_method *m, int64_t kept);

/* For axes and viewers: the student's encoder and its final norm, where it has one, at the wanted
 * rows [B, M, C]; colours and chosen_last are filled in. And one vector an image out of that. */
md_slot md_student_encode(const md_method *m, md_graph *g, const md_vit_in *in);
md_slot md_student_pool(const md_method *m, md_graph *g, md_slot x);
/* What every block of it gives, from the first to the last, at all tokens and without a norm:
 * out[L], each [B, T, C]; colours are filled in. */
void md_student_blocks(const md_method *m, md_graph *g, const md_vit_in *in, md_slot *out);

/* Axis tables: find a row by name, NULL when absent. */
const md_task_row *md_task_find(const char *name);
const md_teacher_row *md_teacher_find(const char *name);
const md_target_row *md_target_find(const char *name);
const md_student_row *md_student_find(const char *name);
const md_head_row *md_head_find(const char *name);
const md_loss_row *md_loss_find(const char *name);

#endif
