/* tensor: see tensor.h. */
#include "src/tensor.h"

#include <stdio.h>

static const struct {
    const char *name;
    size_t bytes;
} dtypes[] = {
#define MD_DTYPE_ROW(name, bytes) {#name, bytes},
    MD_DTYPES(MD_DTYPE_ROW)
#undef MD_DTYPE_ROW
};

size_t md_dtype_bytes(md_dtype t)
{
    return dtypes[t].bytes;
}

const char *md_dtype_name(md_dtype t)
{
    return dtypes[t].name;
}

const char *md_place_name(md_place p)
{
    static const char *const names[] = {"replicated", "entered", "cut by rows", "cut by columns",
                                        "partial"};
    return names[p];
}

int64_t md_tensor_count(const md_tensor *t)
{
    int64_t n = 1;
    for (int i = 0; i < t->rank; i++)
        n *= t->dim[i];
    return n;
}

size_t md_tensor_bytes(const md_tensor *t)
{
    return (size_t)md_tensor_count(t) * md_dtype_bytes((md_dtype)t->dtype);
}

int64_t md_tensor_cols(const md_tensor *t)
{
    return t->rank ? t->dim[t->rank - 1] : 1;
}

int64_t md_tensor_rows(const md_tensor *t)
{
    int64_t n = 1;
    for (int i = 0; i + 1 < t->rank; i++)
        n *= t->dim[i];
    return n;
}

bool md_tensor_same_shape(const md_tensor *a, const md_tensor *b)
{
    if (a->rank != b->rank)
        return false;
    for (int i = 0; i < a->rank; i++)
        if (a->dim[i] != b->dim[i])
            return false;
    return true;
}

const char *md_tensor_describe(const md_tensor *t, char *buf, size_t size)
{
    size_t used = (size_t)snprintf(buf, size, "[");
    for (int i = 0; i < t->rank && used < size; i++)
        used += (size_t)snprintf(buf + used, size - used, "%s%lld", i ? ", " : "",
                                 (long long)t->dim[i]);
    if (used < size)
        snprintf(buf + used, size - used, "] %s", md_dtype_name((md_dtype)t->dtype));
    return buf;
}

md_tensor md_tensor_make(void *data, md_dtype dtype, int rank, const int64_t *dim)
{
    MD_ASSERT(rank >= 0 && rank <= MD_MAX_RANK, "rank %d", rank);
    md_tensor t = {.data = data, .rank = (uint8_t)rank, .dtype = (uint8_t)dtype};
    for (int i = 0; i < rank; i++)
        t.dim[i] = dim[i];
    return t;
}
