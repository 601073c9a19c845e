/* safetensors_file: one file's header, see safetensors_file.h. The JSON is parsed by jansson, which
 * refuses duplicate keys and integers past 63 bits; what it would still let through (reals, signs,
 * literals) is refused by a scan of the header text before. */
#include "io/safetensors_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FAMILY   "safetensors"
#define META_KEY MD_ST_META_KEY

static const struct {
    const char *name;
    int bits;
} dtypes[] = {
#define DTYPE_ROW(name, bits) {#name, bits},
    MD_ST_DTYPES(DTYPE_ROW)
#undef DTYPE_ROW
};

const char *md_st_dtype_name(md_st_dtype t)
{
    return dtypes[t].name;
}

int md_st_dtype_bits(md_st_dtype t)
{
    return dtypes[t].bits;
}

md_status md_st_read_at(int fd, const char *path, void *out, int64_t bytes, int64_t offset)
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

md_status md_st_open_regular(const char *path, int *fd, int64_t *size)
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

md_status md_st_parse_json(const char *path, const char *text, size_t n, json_t **root)
{
    json_error_t err;
    *root = json_loadb(text, n, JSON_REJECT_DUPLICATES, &err);
    if (!*root)
        MD_FAIL(MD_ERR_DATA, "%s: header is not valid: %.200s", path, err.text);
    if (!json_is_object(*root))
        MD_FAIL(MD_ERR_DATA, "%s: header is not a JSON object", path);
    return MD_OK;
}

static md_status shard_parse(md_st_file *s, char *text, int64_t n)
{
    MD_TRY(md_st_read_at(s->fd, s->path, text, n, 8));
    if (text[0] != '{')
        MD_FAIL(MD_ERR_DATA, "%s: not a safetensors file (the header does not begin with '{')",
                s->path);
    while (text[n - 1] == ' ')
        n--;
    if (text[n - 1] != '}')
        MD_FAIL(MD_ERR_DATA, "%s: the header ends with something else than '}' and spaces",
                s->path);
    MD_TRY(header_scan(s->path, text, (size_t)n));
    return md_st_parse_json(s->path, text, (size_t)n, &s->root);
}

md_status md_st_file_open(md_st_file *s, char *path)
{
    uint64_t n;
    s->path = path;
    s->base = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    MD_TRY(md_st_open_regular(path, &s->fd, &s->size));
    if (s->size < 8)
        MD_FAIL(MD_ERR_DATA, "%s: not a safetensors file (%lld bytes)", path, (long long)s->size);
    MD_TRY(md_st_read_at(s->fd, path, &n, 8, 0));
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

static md_status metadata_check(const md_st_file *s, json_t *meta)
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

static md_status name_check(const md_st_file *s, const char *name)
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

static md_status shape_read(const md_st_file *s, md_st_entry *e, json_t *shape)
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

static md_status dtype_read(const md_st_file *s, md_st_entry *e, const char *dtype)
{
    for (int t = 0; dtype && t < MD_ST_DTYPE_COUNT; t++)
        if (strcmp(dtype, dtypes[t].name) == 0) {
            e->dtype = (uint8_t)t;
            return MD_OK;
        }
    MD_FAIL(MD_ERR_DATA, "%s: tensor '%s': unknown dtype '%.32s'", s->path, e->name,
            dtype ? dtype : "");
}

static md_status entry_read(const md_st_file *s, md_st_entry *e, const char *name, json_t *value)
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

size_t md_st_file_count(const md_st_file *f)
{
    return json_object_size(f->root) - (json_object_get(f->root, META_KEY) ? 1 : 0);
}

md_status md_st_file_entries(const md_st_file *s, md_st_entry *e, int *n)
{
    const char *name;
    json_t *value;
    *n = 0;
    json_object_foreach(s->root, name, value)
    {
        if (strcmp(name, META_KEY) == 0) {
            MD_TRY(metadata_check(s, value));
            continue;
        }
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

void md_st_file_close(md_st_file *f)
{
    json_decref(f->root);
    if (f->fd >= 0)
        close(f->fd);
    md_free(f->path);
}
