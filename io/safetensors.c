/* safetensors: see safetensors.h. The JSON is parsed by jansson, which refuses duplicate keys and
 * integers past 63 bits; what it would still let through (reals, signs, literals) is refused by a
 * scan of the header text before. Names point into the parsed header, which stays alive. */
#include "io/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors data is little-endian");

#define FAMILY     "safetensors"
#define INDEX_NAME "model.safetensors.index.json"
#define FILE_NAME  "model.safetensors"
#define MAX_SHARDS 4096
#define MAX_INDEX  ((int64_t)64 << 20)
#define META_KEY   "__metadata__"

typedef struct shard {
    char *path;
    const char *base; /* last component of path */
    int fd;
    int64_t data, size; /* where the data begins, file size */
    json_t *root;
} shard;

struct md_safetensors {
    shard *shards;
    md_st_entry *entries;
    int shard_count, count;
};

static const struct {
    const char *name;
    int bits;
} dtypes[] = {
#define DTYPE_ROW(name, bits) {#name, bits},
    MD_ST_DTYPES(DTYPE_ROW)
#undef DTYPE_ROW
};

/* ---- reading the header ---- */

static md_status path_join(const char *dir, const char *name, char **out)
{
    size_t size = strlen(dir) + strlen(name) + 2;
    MD_NEW(*out, size, FAMILY);
    snprintf(*out, size, "%s%s%s", dir, *dir ? "/" : "", name);
    return MD_OK;
}

static md_status read_at(int fd, const char *path, void *out, int64_t bytes, int64_t offset)
{
    char *p = out;
    if (md_fault("weights.read"))
        MD_FAIL(MD_ERR_IO, "%s: read failed (injected)", path);
    while (bytes > 0) {
        ssize_t n = pread(fd, p, (size_t)MD_MIN(bytes, (int64_t)1 << 30), offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            MD_FAIL(MD_ERR_IO, "%s: read failed: %s", path, strerror(errno));
        if (n == 0)
            MD_FAIL(MD_ERR_DATA, "%s: the file ends early, at byte %lld", path, (long long)offset);
        p += n;
        bytes -= n;
        offset += n;
    }
    return MD_OK;
}

/* Opens a regular file for reading and gives its size. */
static md_status file_open(const char *path, int *fd, int64_t *size)
{
    struct stat sb;
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0)
        MD_FAIL(MD_ERR_NOINPUT, "%s: cannot be opened: %s", path, strerror(errno));
    if (fstat(*fd, &sb) != 0)
        MD_FAIL(MD_ERR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(sb.st_mode))
        MD_FAIL(MD_ERR_DATA, "%s: not a regular file", path);
    *size = sb.st_size;
    return MD_OK;
}

/* Outside strings a header holds punctuation, digits and blanks only: no sign, fraction, exponent,
 * true, false or null can be part of one. Also keeps control bytes out of error messages. */
static md_status header_scan(const char *path, const char *text, size_t n)
{
    bool in_string = false;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        bool blank = c == ' ' || c == '\t' || c == '\n' || c == '\r';
        if (c == '"')
            in_string = !in_string;
        else if (in_string && c == '\\')
            i++;
        else if (in_string ? c < ' ' || c == 0x7f
                           : !blank && (!c || !strchr("{}[]:,0123456789", c)))
            MD_FAIL(MD_ERR_DATA, "%s: byte %zu of the header (0x%02x) is not allowed there", path,
                    i, (unsigned)c);
    }
    return MD_OK;
}

static md_status json_parse(const char *path, const char *text, size_t n, json_t **root)
{
    json_error_t err;
    *root = json_loadb(text, n, JSON_REJECT_DUPLICATES, &err);
    if (!*root)
        MD_FAIL(MD_ERR_DATA, "%s: header is not valid: %.200s", path, err.text);
    if (!json_is_object(*root))
        MD_FAIL(MD_ERR_DATA, "%s: header is not a JSON object", path);
    return MD_OK;
}

static md_status shard_parse(shard *s, char *text, int64_t n)
{
    MD_TRY(read_at(s->fd, s->path, text, n, 8));
    if (text[0] != '{')
        MD_FAIL(MD_ERR_DATA, "%s: not a safetensors file (the header does not begin with '{')",
                s->path);
    while (text[n - 1] == ' ')
        n--;
    if (text[n - 1] != '}')
        MD_FAIL(MD_ERR_DATA, "%s: the header ends with something else than '}' and spaces",
                s->path);
    MD_TRY(header_scan(s->path, text, (size_t)n));
    return json_parse(s->path, text, (size_t)n, &s->root);
}

/* Takes ownership of path. */
static md_status shard_open(shard *s, char *path)
{
    uint64_t n;
    s->path = path;
    s->base = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    MD_TRY(file_open(path, &s->fd, &s->size));
    if (s->size < 8)
        MD_FAIL(MD_ERR_DATA, "%s: not a safetensors file (%lld bytes)", path, (long long)s->size);
    MD_TRY(read_at(s->fd, path, &n, 8, 0));
    if (n < 2 || n > (uint64_t)MD_ST_MAX_HEADER || (int64_t)n > s->size - 8)
        MD_FAIL(MD_ERR_DATA,
                "%s: not a safetensors file, or cut short (header of %llu bytes in a file of %lld)",
                path, (unsigned long long)n, (long long)s->size);
    s->data = 8 + (int64_t)n;
    char *text;
    MD_NEW(text, n, FAMILY);
    md_status st = shard_parse(s, text, (int64_t)n);
    md_free(text);
    return st;
}

static md_status metadata_check(const shard *s, json_t *meta)
{
    const char *key;
    json_t *value;
    if (!json_is_object(meta))
        MD_FAIL(MD_ERR_DATA, "%s: " META_KEY " is not an object", s->path);
    json_object_foreach(meta, key, value)
    {
        if (!json_is_string(value))
            MD_FAIL(MD_ERR_DATA, "%s: " META_KEY ": a value is not a string", s->path);
    }
    return MD_OK;
}

static md_status name_check(const shard *s, const char *name)
{
    size_t n = strlen(name);
    if (n > MD_ST_MAX_NAME)
        MD_FAIL(MD_ERR_DATA, "%s: a tensor name of %zu bytes (at most %d)", s->path, n,
                MD_ST_MAX_NAME);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)name[i] < ' ' || name[i] == 0x7f)
            MD_FAIL(MD_ERR_DATA, "%s: a tensor name holds the control byte 0x%02x", s->path,
                    (unsigned)(unsigned char)name[i]);
    return MD_OK;
}

static md_status shape_read(const shard *s, md_st_entry *e, json_t *shape)
{
    size_t rank = json_array_size(shape);
    if (!json_is_array(shape) || rank > MD_ST_MAX_RANK)
        MD_FAIL(MD_ERR_DATA, "%s: tensor '%s': shape is not a list of at most %d numbers", s->path,
                e->name, MD_ST_MAX_RANK);
    e->rank = (uint8_t)rank;
    e->count = 1;
    for (size_t i = 0; i < rank; i++) {
        json_t *d = json_array_get(shape, i);
        if (!json_is_integer(d))
            MD_FAIL(MD_ERR_DATA, "%s: tensor '%s': shape is not a list of numbers", s->path,
                    e->name);
        e->dim[i] = json_integer_value(d);
        if (__builtin_mul_overflow(e->count, e->dim[i], &e->count))
            MD_FAIL(MD_ERR_DATA, "%s: tensor '%s': shape overflows", s->path, e->name);
    }
    return MD_OK;
}

static md_status dtype_read(const shard *s, md_st_entry *e, const char *dtype)
{
    for (int t = 0; dtype && t < MD_ST_DTYPE_COUNT; t++)
        if (strcmp(dtype, dtypes[t].name) == 0) {
            e->dtype = (uint8_t)t;
            return MD_OK;
        }
    MD_FAIL(MD_ERR_DATA, "%s: tensor '%s': unknown dtype '%.32s'", s->path, e->name,
            dtype ? dtype : "");
}

static md_status entry_read(const shard *s, md_st_entry *e, const char *name, json_t *value)
{
    json_t *offsets = json_object_get(value, "data_offsets");
    json_t *lo = json_array_get(offsets, 0), *hi = json_array_get(offsets, 1);
    int64_t bits;
    MD_TRY(name_check(s, name));
    e->name = name;
    if (!json_is_object(value) || json_object_size(value) != 3 || !json_object_get(value, "shape"))
        MD_FAIL(MD_ERR_DATA, "%s: tensor '%s': fields are not dtype, shape and data_offsets",
                s->path, name);
    MD_TRY(dtype_read(s, e, json_string_value(json_object_get(value, "dtype"))));
    MD_TRY(shape_read(s, e, json_object_get(value, "shape")));
    if (json_array_size(offsets) != 2 || !json_is_integer(lo) || !json_is_integer(hi))
        MD_FAIL(MD_ERR_DATA, "%s: tensor '%s': data_offsets are not two numbers", s->path, name);
    int64_t begin = json_integer_value(lo), end = json_integer_value(hi);
    if (begin > end || end > s->size - s->data)
        MD_FAIL(MD_ERR_DATA, "%s: tensor '%s': data [%lld, %lld) lies outside the file", s->path,
                name, (long long)begin, (long long)end);
    if (__builtin_mul_overflow(e->count, (int64_t)dtypes[e->dtype].bits, &bits) || bits % 8 ||
        bits / 8 != end - begin)
        MD_FAIL(MD_ERR_DATA, "%s: tensor '%s': %lld elements of %s do not take %lld bytes", s->path,
                name, (long long)e->count, dtypes[e->dtype].name, (long long)(end - begin));
    e->begin = s->data + begin;
    e->bytes = end - begin;
    return MD_OK;
}

static int by_offset(const void *a, const void *b)
{
    const md_st_entry *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static int by_name(const void *a, const void *b)
{
    const md_st_entry *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* Fills e with the tensors of shard k and checks that they cover its data exactly. */
static md_status shard_entries(md_safetensors *st, int k, md_st_entry *e, int *n)
{
    const shard *s = &st->shards[k];
    const char *name;
    json_t *value;
    *n = 0;
    json_object_foreach(s->root, name, value)
    {
        if (strcmp(name, META_KEY) == 0) {
            MD_TRY(metadata_check(s, value));
            continue;
        }
        e[*n].shard = k;
        MD_TRY(entry_read(s, &e[(*n)++], name, value));
    }
    qsort(e, (size_t)*n, sizeof *e, by_offset);
    int64_t at = s->data;
    for (int i = 0; i < *n; i++) {
        if (e[i].begin != at)
            MD_FAIL(MD_ERR_DATA, "%s: tensor '%s': data begins at %lld, expected %lld (%s)",
                    s->path, e[i].name, (long long)(e[i].begin - s->data),
                    (long long)(at - s->data), e[i].begin > at ? "a gap" : "an overlap");
        at += e[i].bytes;
    }
    if (at != s->size)
        MD_FAIL(MD_ERR_DATA, "%s: %lld bytes follow the last tensor", s->path,
                (long long)(s->size - at));
    return MD_OK;
}

static md_status set_entries(md_safetensors *st)
{
    size_t total = 0;
    for (int k = 0; k < st->shard_count; k++) {
        json_t *root = st->shards[k].root;
        total += json_object_size(root) - (json_object_get(root, META_KEY) ? 1 : 0);
        if (total > MD_ST_MAX_TENSORS)
            MD_FAIL(MD_ERR_DATA, "%s: more than %d tensors", st->shards[k].path, MD_ST_MAX_TENSORS);
    }
    MD_NEW(st->entries, total, FAMILY);
    for (int k = 0; k < st->shard_count; k++) {
        int n;
        MD_TRY(shard_entries(st, k, st->entries + st->count, &n));
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
    md_status st = file_open(path, &fd, &size);
    if (st == MD_OK && size > MAX_INDEX)
        st = md_error_set(MD_ERR_DATA, "%s: larger than 64 MiB", path);
    if (st == MD_OK && !(text = md_alloc((size_t)size, FAMILY)))
        st = MD_ERR_MEMORY;
    if (st == MD_OK)
        st = read_at(fd, path, text, size, 0);
    if (st == MD_OK)
        st = json_parse(path, text, (size_t)size, root);
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
            status = shard_open(&st->shards[st->shard_count++], file);
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
    if (status == MD_OK && !(st->shards = md_alloc(MAX_SHARDS * sizeof(shard), FAMILY)))
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
    MD_TRY(shard_open(&st->shards[0], copy));
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
    for (int k = 0; k < st->shard_count; k++) {
        shard *s = &st->shards[k];
        json_decref(s->root);
        if (s->fd >= 0)
            close(s->fd);
        md_free(s->path);
    }
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
        json_t *meta = json_object_get(st->shards[k].root, META_KEY);
        if (json_object_get(meta, key))
            return json_string_value(json_object_get(meta, key));
    }
    return NULL;
}

const char *md_safetensors_file(const md_safetensors *st, int i)
{
    return st->shards[md_safetensors_at(st, i)->shard].path;
}

const char *md_st_dtype_name(md_st_dtype t)
{
    return dtypes[t].name;
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
    const shard *s = &st->shards[e->shard];
    md_status status = read_at(s->fd, s->path, out, bytes, e->begin + from);
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
                md_safetensors_file(st, i), e->name, dtypes[t].name);
    double slice[2048];
    int64_t size = dtypes[t].bits / 8, most = (int64_t)sizeof slice / size;
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
                dtypes[e->dtype].name, md_dtype_name(want));
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
