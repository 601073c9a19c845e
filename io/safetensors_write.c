/* safetensors writer: see safetensors.h. */
#include "io/safetensors.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/publish.h"

#define FAMILY "safetensors"

static int by_dtype_and_name(const void *a, const void *b)
{
    const md_st_tensor *x = *(const md_st_tensor *const *)a, *y = *(const md_st_tensor *const *)b;
    int dx = (int)md_st_dtype_of((md_dtype)x->t.dtype);
    int dy = (int)md_st_dtype_of((md_dtype)y->t.dtype);
    return dx != dy ? dy - dx : strcmp(x->name, y->name);
}

/* {dtype, shape, data_offsets} of one tensor; NULL when jansson found no memory. */
static json_t *entry_json(const md_tensor *t, int64_t at)
{
    json_t *shape = json_array();
    for (int i = 0; i < t->rank; i++)
        json_array_append_new(shape, json_integer(t->dim[i]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype",
                     md_st_dtype_name(md_st_dtype_of((md_dtype)t->dtype)), "shape", shape,
                     "data_offsets", (json_int_t)at,
                     (json_int_t)(at + (int64_t)md_tensor_bytes(t)));
}

static md_status header_make(const md_st_tensor *const *list, int n, const md_st_meta *meta, int m,
                             json_t *root)
{
    json_t *pairs = m ? json_object() : NULL;
    if (pairs && json_object_set_new(root, "__metadata__", pairs) != 0)
        MD_FAIL(MD_ERR_MEMORY, "out of memory for a safetensors header");
    for (int i = 0; i < m; i++)
        if (json_object_set_new(pairs, meta[i].key, json_string(meta[i].value)) != 0)
            MD_FAIL(MD_ERR_BUG, "metadata '%s' is not valid UTF-8", meta[i].key);
    int64_t at = 0;
    for (int i = 0; i < n; i++) {
        if (json_object_get(root, list[i]->name))
            MD_FAIL(MD_ERR_BUG, "tensor '%s' given twice", list[i]->name);
        if (json_object_set_new(root, list[i]->name, entry_json(&list[i]->t, at)) != 0)
            MD_FAIL(MD_ERR_BUG, "tensor name '%s' is not valid UTF-8", list[i]->name);
        at += (int64_t)md_tensor_bytes(&list[i]->t);
    }
    return MD_OK;
}

static md_status file_put(FILE *f, const char *path, const void *data, size_t bytes)
{
    if (md_fault("weights.write") || fwrite(data, 1, bytes, f) != bytes)
        MD_FAIL(MD_ERR_IO, "%s: write failed: %s", path, strerror(errno));
    return MD_OK;
}

static md_status file_fill(FILE *f, const char *path, const char *header,
                           const md_st_tensor *const *list, int n)
{
    uint64_t used = strlen(header), size = (used + 7) / 8 * 8;
    MD_TRY(file_put(f, path, &size, sizeof size));
    MD_TRY(file_put(f, path, header, used));
    MD_TRY(file_put(f, path, "       ", size - used));
    for (int i = 0; i < n; i++)
        MD_TRY(file_put(f, path, list[i]->t.data, md_tensor_bytes(&list[i]->t)));
    return MD_OK;
}

static md_status file_publish(const char *path, const char *header, const md_st_tensor *const *list,
                              int n)
{
    char *part;
    MD_TRY(md_publish_part(path, &part));
    md_status st = MD_OK;
    FILE *f = fopen(part, "wbe");
    if (!f)
        st = md_error_set(MD_ERR_CREATE, "%s: cannot be created: %s", part, strerror(errno));
    if (f) {
        st = file_fill(f, part, header, list, n);
        if (fclose(f) != 0 && st == MD_OK)
            st = md_error_set(MD_ERR_IO, "%s: write failed: %s", part, strerror(errno));
        if (st == MD_OK)
            st = md_publish(part, path);
        else
            unlink(part);
    }
    md_free(part);
    return st;
}

md_status md_safetensors_write(const char *path, const md_st_tensor *list, int n,
                               const md_st_meta *meta, int m)
{
    const md_st_tensor **order;
    MD_NEW(order, n, FAMILY);
    for (int i = 0; i < n; i++)
        order[i] = &list[i];
    qsort(order, (size_t)n, sizeof *order, by_dtype_and_name);
    json_t *root = json_object();
    md_status st = header_make(order, n, meta, m, root);
    char *header = st == MD_OK ? json_dumps(root, JSON_COMPACT) : NULL;
    if (st == MD_OK && !header)
        st = md_error_set(MD_ERR_MEMORY, "%s: out of memory for the header", path);
    if (st == MD_OK)
        st = file_publish(path, header, order, n);
    free(header); /* jansson's own allocation */
    json_decref(root);
    md_free(order);
    return st;
}
