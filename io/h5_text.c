/* h5_text: the small things of h5.h: attributes, string tables, listings. */
#include "io/h5.h"

#include <stdio.h>
#include <string.h>

#define MAX_FIELD ((size_t)4096)

static md_status attr_write(hid_t loc, const char *name, hid_t file_type, const void *value)
{
    hid_t space = H5Screate(H5S_SCALAR);
    hid_t a = H5Acreate2(loc, name, file_type, space, H5P_DEFAULT, H5P_DEFAULT);
    md_status st = MD_OK;
    if (a < 0 || H5Awrite(a, file_type, value) < 0)
        st = md_h5_fail(MD_ERR_IO, loc, "cannot write attribute %s", name);
    md_h5_release(a);
    md_h5_release(space);
    return st;
}

/* A fixed-length string type of `size` bytes, the last one NUL. */
static hid_t string_type(size_t size)
{
    hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, size);
    H5Tset_cset(type, H5T_CSET_UTF8);
    return type;
}

md_status md_h5_attr_write_str(hid_t loc, const char *name, const char *value)
{
    hid_t type = string_type(strlen(value) + 1);
    md_status st = attr_write(loc, name, type, value);
    md_h5_release(type);
    return st;
}

md_status md_h5_attr_write_i64(hid_t loc, const char *name, int64_t value)
{
    return attr_write(loc, name, H5T_STD_I64LE, &value);
}

md_status md_h5_attr_write_f64(hid_t loc, const char *name, double value)
{
    return attr_write(loc, name, H5T_IEEE_F64LE, &value);
}

/* Opens a scalar attribute whose type is of the given class; *type is the stored type. */
static md_status attr_open(hid_t loc, const char *name, H5T_class_t class, hid_t *attr, hid_t *type)
{
    *attr = *type = -1;
    if (H5Aexists(loc, name) <= 0)
        return md_h5_fail(MD_ERR_DATA, loc, "has no attribute %s", name);
    hid_t a = H5Aopen(loc, name, H5P_DEFAULT);
    hid_t t = H5Aget_type(a), space = H5Aget_space(a);
    bool ok = H5Tget_class(t) == class && H5Sget_simple_extent_npoints(space) == 1;
    if (ok && class == H5T_STRING)
        ok = H5Tis_variable_str(t) == 0;
    md_h5_release(space);
    if (!ok) {
        md_h5_release(t);
        md_h5_release(a);
        return md_h5_fail(MD_ERR_DATA, loc, "attribute %s is not one plain %s", name,
                          class == H5T_STRING ? "fixed-length string" : "number");
    }
    *attr = a;
    *type = t;
    return MD_OK;
}

static md_status attr_read_number(hid_t loc, const char *name, H5T_class_t class, hid_t mem,
                                  void *value)
{
    hid_t a, t;
    MD_TRY(attr_open(loc, name, class, &a, &t));
    md_status st = MD_OK;
    if (H5Aread(a, mem, value) < 0)
        st = md_h5_fail(MD_ERR_DATA, loc, "cannot read attribute %s", name);
    md_h5_release(t);
    md_h5_release(a);
    return st;
}

md_status md_h5_attr_read_i64(hid_t loc, const char *name, int64_t *value)
{
    return attr_read_number(loc, name, H5T_INTEGER, H5T_NATIVE_INT64, value);
}

md_status md_h5_attr_read_f64(hid_t loc, const char *name, double *value)
{
    return attr_read_number(loc, name, H5T_FLOAT, H5T_NATIVE_DOUBLE, value);
}

md_status md_h5_attr_read_str(hid_t loc, const char *name, char *buf, size_t cap)
{
    hid_t a, t;
    MD_TRY(attr_open(loc, name, H5T_STRING, &a, &t));
    md_status st = MD_OK;
    size_t size = H5Tget_size(t);
    /* A stored string may fill its field without a NUL. */
    if (size >= cap)
        st = md_h5_fail(MD_ERR_DATA, loc, "attribute %s is too long (%zu bytes, at most %zu)", name,
                        size, cap - 1);
    else if (H5Aread(a, t, buf) < 0)
        st = md_h5_fail(MD_ERR_DATA, loc, "cannot read attribute %s", name);
    else
        buf[size] = 0;
    md_h5_release(t);
    md_h5_release(a);
    return st;
}

md_status md_h5_strings_write(hid_t loc, const char *name, int64_t n, const char *const *strings)
{
    size_t width = 2;
    for (int64_t i = 0; i < n; i++)
        width = MD_MAX(width, strlen(strings[i]) + 1);
    char *block;
    MD_NEW(block, (size_t)n * width, "h5");
    for (int64_t i = 0; i < n; i++)
        memcpy(block + (size_t)i * width, strings[i], strlen(strings[i]));
    hid_t type = string_type(width), set = -1;
    hsize_t dim = (hsize_t)n;
    md_status st = md_h5_dset_create(loc, name, type, 1, &dim, &set);
    if (st == MD_OK)
        st = md_h5_write_all(set, type, block);
    md_h5_release(set);
    md_h5_release(type);
    md_free(block);
    return st;
}

/* The stored type of data set `name` when it is a table of fixed-length strings, else -1. */
static hid_t field_type(hid_t loc, const char *name, size_t *width)
{
    if (!md_h5_exists(loc, name))
        return -1;
    hid_t set = H5Dopen2(loc, name, H5P_DEFAULT), type = H5Dget_type(set);
    *width = H5Tget_size(type);
    bool ok = H5Tget_class(type) == H5T_STRING && H5Tis_variable_str(type) == 0 && *width >= 1 &&
              *width <= MAX_FIELD;
    md_h5_release(set);
    if (ok)
        return type;
    md_h5_release(type);
    return -1;
}

md_status md_h5_strings_read(hid_t loc, const char *name, int64_t n, char **out, size_t *width)
{
    *out = NULL;
    hid_t set = -1, type = field_type(loc, name, width);
    if (type < 0)
        return md_h5_fail(MD_ERR_DATA, loc, "has no table of fixed-length strings %s", name);
    hsize_t dim = (hsize_t)n;
    md_status st = md_h5_dset_open(loc, name, type, 1, &dim, &set);
    char *block = st == MD_OK ? md_alloc((size_t)n * *width, "h5") : NULL;
    if (st == MD_OK && !block)
        st = MD_ERR_MEMORY;
    if (st == MD_OK)
        st = md_h5_read_all(set, type, block);
    for (int64_t i = 0; st == MD_OK && i < n; i++)
        if (!memchr(block + (size_t)i * *width, 0, *width))
            st = md_h5_fail(MD_ERR_DATA, loc, "entry %lld of %s has no end", (long long)i, name);
    md_h5_release(set);
    md_h5_release(type);
    if (st == MD_OK)
        *out = block;
    else
        md_free(block);
    return st;
}

void md_h5_list(hid_t loc, char *buf, size_t cap)
{
    size_t used = 0;
    buf[0] = 0;
    for (hsize_t i = 0; used < cap; i++) {
        char name[64];
        if (H5Lget_name_by_idx(loc, ".", H5_INDEX_NAME, H5_ITER_INC, i, name, sizeof name,
                               H5P_DEFAULT) < 0)
            break;
        used += (size_t)snprintf(buf + used, cap - used, "%s%s", i ? ", " : "", name);
    }
    H5Eclear2(H5E_DEFAULT);
}
