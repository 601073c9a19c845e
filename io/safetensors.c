/* safetensors: sets of files and reading of tensors, see safetensors.h. */
#include "io/safetensors.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/safetensors_file.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors data is little-endian");

#define FAMILY     "safetensors"
#define INDEX_NAME "model.safetensors.index.json"
#define FILE_NAME  "model.safetensors"
#define MAX_SHARDS 4096
#define MAX_INDEX  ((int64_t)64 << 20)

struct md_safetensors {
    md_st_file *shards;
    md_st_entry *entries;
    int shard_count, count;
};

static md_status path_join(const char *dir, const char *name, char **out)
{
    size_t size = strlen(dir) + strlen(name) + 2;
    MD_NEW(*out, size, FAMILY);
    snprintf(*out, size, "%s%s%s", dir, *dir ? "/" : "", name);
    return MD_OK;
}

static int by_name(const void *a, const void *b)
{
    const md_st_entry *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static md_status set_entries(md_safetensors *st)
{
    size_t total = 0;
    for (int k = 0; k < st->shard_count; k++) {
        total += md_st_file_count(&st->shards[k]);
        if (total > MD_ST_MAX_TENSORS)
            MD_FAIL(MD_ERR_DATA, "%s: more than %d tensors", st->shards[k].path, MD_ST_MAX_TENSORS);
    }
    MD_NEW(st->entries, total, FAMILY);
    for (int k = 0; k < st->shard_count; k++) {
        int n;
        MD_TRY(md_st_file_entries(&st->shards[k], st->entries + st->count, &n));
        for (int i = 0; i < n; i++)
            st->entries[st->count + i].shard = k;
        st->count += n;
    }
    qsort(st->entries, (size_t)st->count, sizeof *st->entries, by_name);
    for (int i = 1; i < st->count; i++)
        if (strcmp(st->entries[i - 1].name, st->entries[i].name) == 0)
            MD_FAIL(MD_ERR_DATA, "tensor '%s' is both in %s and in %s", st->entries[i].name,
                    st->shards[st->entries[i - 1].shard].path,
                    st->shards[st->entries[i].shard].path);
    return MD_OK;
}

/* ---- sharded sets ---- */

static md_status index_load(const char *path, json_t **root)
{
    int fd = -1;
    int64_t size = 0;
    char *text = NULL;
    md_status st = md_st_open_regular(path, &fd, &size);
    if (st == MD_OK && size > MAX_INDEX)
        st = md_error_set(MD_ERR_DATA, "%s: larger than 64 MiB", path);
    if (st == MD_OK && !(text = md_alloc((size_t)size, FAMILY)))
        st = MD_ERR_MEMORY;
    if (st == MD_OK)
        st = md_st_read_at(fd, path, text, size, 0);
    if (st == MD_OK)
        st = md_st_parse_json(path, text, (size_t)size, root);
    md_free(text);
    if (fd >= 0)
        close(fd);
    return st;
}

static int shard_find(const md_safetensors *st, const char *base)
{
    for (int k = 0; k < st->shard_count; k++)
        if (strcmp(st->shards[k].base, base) == 0)
            return k;
    return -1;
}

/* Opens every file the index names. They must lie beside it: a name with a folder is refused. */
static md_status index_shards(md_safetensors *st, const char *path, json_t *map)
{
    const char *slash = strrchr(path, '/'), *name;
    char *dir;
    json_t *value;
    if (json_object_size(map) == 0)
        MD_FAIL(MD_ERR_DATA, "%s: has no weight_map", path);
    size_t n = slash ? (size_t)(slash - path) : 0;
    MD_NEW(dir, n + 2, FAMILY);
    memcpy(dir, slash == path ? "/." : path, slash == path ? 2 : n);
    md_status status = MD_OK;
    json_object_foreach(map, name, value)
    {
        const char *base = json_string_value(value);
        char *file;
        if (!base || !*base || *base == '.' || strchr(base, '/'))
            status = md_error_set(MD_ERR_DATA, "%s: weight_map: '%.200s' is not a file name here",
                                  path, base ? base : "");
        else if (shard_find(st, base) >= 0)
            continue;
        else if (st->shard_count == MAX_SHARDS)
            status = md_error_set(MD_ERR_DATA, "%s: more than %d files", path, MAX_SHARDS);
        else if ((status = path_join(dir, base, &file)) == MD_OK)
            status = md_st_file_open(&st->shards[st->shard_count++], file);
        if (status != MD_OK)
            break;
    }
    md_free(dir);
    return status;
}

/* The index and the files must tell the same story in both directions. */
static md_status index_compare(const md_safetensors *st, const char *path, json_t *map)
{
    const char *name;
    json_t *value;
    for (int i = 0; i < st->count; i++) {
        const md_st_entry *e = &st->entries[i];
        const char *base = json_string_value(json_object_get(map, e->name));
        if (!base || strcmp(base, st->shards[e->shard].base) != 0)
            MD_FAIL(MD_ERR_DATA, "%s: tensor '%s' is in %s, but the index says %.200s", path,
                    e->name, st->shards[e->shard].base, base ? base : "nothing");
    }
    json_object_foreach(map, name, value)
    {
        if (md_safetensors_find(st, name) < 0)
            MD_FAIL(MD_ERR_DATA, "%s: tensor '%.200s' is not in %.200s", path, name,
                    json_string_value(value));
    }
    return MD_OK;
}

static md_status set_open_index(md_safetensors *st, const char *path)
{
    json_t *root = NULL;
    md_status status = index_load(path, &root);
    json_t *map = json_object_get(root, "weight_map");
    if (status == MD_OK && !(st->shards = md_alloc(MAX_SHARDS * sizeof(md_st_file), FAMILY)))
        status = MD_ERR_MEMORY;
    if (status == MD_OK)
        status = index_shards(st, path, map);
    if (status == MD_OK)
        status = set_entries(st);
    if (status == MD_OK)
        status = index_compare(st, path, map);
    json_decref(root);
    return status;
}

static md_status set_open_file(md_safetensors *st, const char *path)
{
    char *copy;
    MD_NEW(st->shards, 1, FAMILY);
    MD_TRY(path_join("", path, &copy));
    st->shard_count = 1;
    MD_TRY(md_st_file_open(&st->shards[0], copy));
    return set_entries(st);
}

static md_status set_open(md_safetensors *st, const char *path)
{
    struct stat sb;
    size_t n = strlen(path);
    if (stat(path, &sb) != 0)
        MD_FAIL(MD_ERR_NOINPUT, "%s: cannot be opened: %s", path, strerror(errno));
    if (!S_ISDIR(sb.st_mode))
        return n > 5 && strcmp(path + n - 5, ".json") == 0 ? set_open_index(st, path)
                                                           : set_open_file(st, path);
    static const char *const tries[] = {INDEX_NAME, FILE_NAME};
    for (size_t i = 0; i < MD_COUNT(tries); i++) {
        char *file;
        MD_TRY(path_join(path, tries[i], &file));
        md_status status = MD_OK;
        bool found = access(file, F_OK) == 0;
        if (found)
            status = i == 0 ? set_open_index(st, file) : set_open_file(st, file);
        md_free(file);
        if (found)
            return status;
    }
    MD_FAIL(MD_ERR_NOINPUT, "%s: holds neither " FILE_NAME " nor " INDEX_NAME, path);
}

md_status md_safetensors_open(const char *path, md_safetensors **out)
{
    *out = NULL;
    md_safetensors *st;
    MD_NEW(st, 1, FAMILY);
    md_status status = set_open(st, path);
    if (status != MD_OK)
        md_safetensors_close(st);
    else
        *out = st;
    return status;
}

void md_safetensors_close(md_safetensors *st)
{
    if (!st)
        return;
    for (int k = 0; k < st->shard_count; k++)
        md_st_file_close(&st->shards[k]);
    md_free(st->shards);
    md_free(st->entries);
    md_free(st);
}

/* ---- tensors ---- */

int md_safetensors_count(const md_safetensors *st)
{
    return st->count;
}

const md_st_entry *md_safetensors_at(const md_safetensors *st, int i)
{
    MD_ASSERT(i >= 0 && i < st->count, "tensor %d of %d", i, st->count);
    return &st->entries[i];
}

int md_safetensors_find(const md_safetensors *st, const char *name)
{
    md_st_entry key = {.name = name};
    const md_st_entry *e =
        bsearch(&key, st->entries, (size_t)st->count, sizeof *st->entries, by_name);
    return e ? (int)(e - st->entries) : -1;
}

const char *md_safetensors_metadata(const md_safetensors *st, const char *key)
{
    for (int k = 0; k < st->shard_count; k++) {
        json_t *meta = json_object_get(st->shards[k].root, MD_ST_META_KEY);
        if (json_object_get(meta, key))
            return json_string_value(json_object_get(meta, key));
    }
    return NULL;
}

const char *md_safetensors_file(const md_safetensors *st, int i)
{
    return st->shards[md_safetensors_at(st, i)->shard].path;
}

md_st_dtype md_st_dtype_of(md_dtype t)
{
    static const md_st_dtype of[] = {
        [MD_F32] = MD_ST_F32, [MD_BF16] = MD_ST_BF16, [MD_F64] = MD_ST_F64, [MD_I32] = MD_ST_I32,
        [MD_I64] = MD_ST_I64, [MD_U8] = MD_ST_U8,     [MD_F16] = MD_ST_F16,
    };
    return of[t];
}

static md_status entry_bytes(const md_safetensors *st, const md_st_entry *e, void *out,
                             int64_t from, int64_t bytes)
{
    const md_st_file *s = &st->shards[e->shard];
    md_status status = md_st_read_at(s->fd, s->path, out, bytes, e->begin + from);
    return status == MD_OK ? MD_OK : md_error_prefix(status, "tensor '%s'", e->name);
}

md_status md_safetensors_read(const md_safetensors *st, int i, void *out)
{
    const md_st_entry *e = md_safetensors_at(st, i);
    return entry_bytes(st, e, out, 0, e->bytes);
}

static float f32_from_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static float f32_from_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, frac = h & 1023;
    if (exp == 0) { /* zero or subnormal: frac * 2^-24 is exact in fp32 */
        float f = (float)frac * 0x1p-24f;
        return sign ? -f : f;
    }
    uint32_t wide = exp == 31 ? 255 : exp + 127 - 15;
    return f32_from_bits(sign | wide << 23 | frac << 13);
}

static void widen(md_st_dtype t, const void *in, float *out, int64_t n)
{
    if (t == MD_ST_F64)
        for (int64_t i = 0; i < n; i++)
            out[i] = (float)((const double *)in)[i];
    else if (t == MD_ST_F16)
        for (int64_t i = 0; i < n; i++)
            out[i] = f32_from_f16(((const uint16_t *)in)[i]);
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = f32_from_bits((uint32_t)((const uint16_t *)in)[i] << 16);
}

md_status md_safetensors_read_f32(const md_safetensors *st, int i, float *out)
{
    const md_st_entry *e = md_safetensors_at(st, i);
    md_st_dtype t = (md_st_dtype)e->dtype;
    if (t == MD_ST_F32)
        return entry_bytes(st, e, out, 0, e->bytes);
    if (t != MD_ST_F64 && t != MD_ST_F16 && t != MD_ST_BF16)
        MD_FAIL(MD_ERR_DATA, "%s: tensor '%s' holds %s, not floating point numbers",
                md_safetensors_file(st, i), e->name, md_st_dtype_name(t));
    double slice[2048];
    int64_t size = md_st_dtype_bits(t) / 8, most = (int64_t)sizeof slice / size;
    for (int64_t at = 0; at < e->count; at += most) {
        int64_t n = MD_MIN(most, e->count - at);
        MD_TRY(entry_bytes(st, e, slice, at * size, n * size));
        widen(t, slice, out + at, n);
    }
    return MD_OK;
}

md_status md_safetensors_load(const md_safetensors *st, const char *name, md_dtype want,
                              md_tensor *out)
{
    int i = md_safetensors_find(st, name);
    if (i < 0)
        MD_FAIL(MD_ERR_DATA, "%s: has no tensor '%s'", st->shards[0].path, name);
    const md_st_entry *e = md_safetensors_at(st, i);
    if (e->rank > MD_MAX_RANK)
        MD_FAIL(MD_ERR_DATA, "%s: tensor '%s' has %d dimensions (at most %d)",
                md_safetensors_file(st, i), name, e->rank, MD_MAX_RANK);
    if (want != MD_F32 && e->dtype != md_st_dtype_of(want))
        MD_FAIL(MD_ERR_DATA, "%s: tensor '%s' holds %s, not %s", md_safetensors_file(st, i), name,
                md_st_dtype_name((md_st_dtype)e->dtype), md_dtype_name(want));
    *out = md_tensor_make(NULL, want, e->rank, e->dim);
    char *data;
    MD_NEW(data, md_tensor_bytes(out), FAMILY);
    md_status status = want == MD_F32 ? md_safetensors_read_f32(st, i, (float *)(void *)data)
                                      : md_safetensors_read(st, i, data);
    if (status != MD_OK)
        md_free(data);
    else
        out->data = data;
    return status;
}
