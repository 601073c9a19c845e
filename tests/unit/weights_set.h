/* Sets of tensors made on the spot for the tests of weights: a scratch folder, models with W 8, F
 * 12, P 2, four patches and two layers, and checks of what came out. */
#ifndef WEIGHTS_SET_H
#define WEIGHTS_SET_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/weights.h"

#define GOLDEN "tests/golden/"

static char folder[64], in_path[128], out_path[128];

static inline int make_folder(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/md_weights.XXXXXX");
    if (!mkdtemp(folder))
        return -1;
    snprintf(in_path, sizeof in_path, "%s/in.safetensors", folder);
    snprintf(out_path, sizeof out_path, "%s/out.h5", folder);
    return 0;
}

static inline int drop_folder(void **state)
{
    (void)state;
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -r %s", folder);
    return system(cmd);
}

static inline void want(md_status got, md_status expected, const char *word)
{
    const char *text = got == MD_OK ? "" : md_error_text();
    if (got != expected || (got != MD_OK && !strstr(text, word)))
        fail_msg("status %d, text '%s'; expected %d, '%s'", got, text, expected, word);
}

/* The sizes; what the model has beyond them is added to a copy. */
static const md_weights_info tiny = {
    .width = 8, .mlp = 12, .grid = 2, .patch = 2, .layers = 2, .heads = 2};

/* A pretraining model and a fine-tuned one. */
static inline md_weights_info pretraining(void)
{
    md_weights_info info = tiny;
    info.patch_bias = info.layer_scale = info.qv_bias = info.mask_token = info.final_norm = 1;
    info.rel_pos = MD_WEIGHTS_REL_SHARED;
    info.lm_width = 6;
    return info;
}

static inline md_weights_info fine_tuned(void)
{
    md_weights_info info = tiny;
    info.patch_bias = info.layer_scale = info.qv_bias = info.fc_norm = 1;
    info.rel_pos = MD_WEIGHTS_REL_PER_LAYER;
    info.classes = 5;
    return info;
}

typedef struct set {
    md_st_tensor t[96];
    char name[96][MD_DIALECT_NAME];
    int n;
} set;

static float pool[8192];

/* Appends a tensor; its values are a stretch of the pool that no other tensor has. */
static inline void add(set *s, const char *name, int rank, const int64_t *dim)
{
    for (int i = 0; i < (int)MD_COUNT(pool); i++)
        pool[i] = (float)i * 0.25f;
    snprintf(s->name[s->n], sizeof s->name[0], "%s", name);
    s->t[s->n] = (md_st_tensor){s->name[s->n], md_tensor_make(pool + 64 * s->n, MD_F32, rank, dim)};
    s->n++;
}

/* All parameters of a model under our own names. */
static inline void add_model(set *s, const char *prefix, const md_weights_info *info)
{
    md_weight_dims dims;
    md_weights_dims(info, &dims);
    for (int id = 0; id < MD_WEIGHT_COUNT; id++) {
        int copies = md_weight_per_layer((md_weight_id)id) ? info->layers : 1;
        for (int layer = 0; layer < copies && md_weights_has(info, (md_weight_id)id); layer++) {
            char own[MD_WEIGHT_NAME], name[MD_DIALECT_NAME];
            int64_t dim[MD_MAX_RANK];
            int rank = md_weight_shape((md_weight_id)id, &dims, dim);
            snprintf(name, sizeof name, "%s%s", prefix,
                     md_weight_name((md_weight_id)id, layer, own));
            add(s, name, rank, dim);
        }
    }
}

static inline int place_of(const set *s, const char *name)
{
    for (int i = 0; i < s->n; i++)
        if (strcmp(s->name[i], name) == 0)
            return i;
    fail_msg("no tensor %s", name);
    return -1;
}

static inline void drop(set *s, const char *name)
{
    int i = place_of(s, name);
    s->n--;
    memmove(s->name[i], s->name[s->n], sizeof s->name[0]);
    s->t[i].t = s->t[s->n].t;
}

static inline md_status import_set(const set *s, md_weights_import_args args,
                                   md_weights_import_report *report)
{
    assert_int_equal(md_safetensors_write(in_path, s->t, s->n, NULL, 0), MD_OK);
    args.input = in_path;
    args.output = out_path;
    return md_weights_import(&args, report);
}

static inline void put_text(const char *name, const char *text)
{
    char path[160];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!text) {
        unlink(path);
        return;
    }
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* The open file's parameter holds exactly these values. */
static inline void want_values(md_weights *w, const char *name, const float *values,
                               md_tensor shape)
{
    float *data = md_alloc(md_tensor_bytes(&shape), "test");
    assert_non_null(data);
    shape.data = data;
    want(md_weights_load(w, name, &shape), MD_OK, "");
    assert_memory_equal(data, values, md_tensor_bytes(&shape));
    md_free(data);
}

#endif
