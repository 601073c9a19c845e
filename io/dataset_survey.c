/* dataset_survey: see dataset_survey.h. Checks every data set's type, extents and layout. */
#include "io/dataset_survey.h"

#include <stdio.h>
#include <string.h>

#include "io/dataset.h"
#include "io/h5.h"

#define MAX_CLASSES (1 << 24)
#define MAX_IMAGES  ((hsize_t)1 << 47) /* that md_permute takes */

static md_status check_head(hid_t file, int64_t *classes)
{
    char format[64];
    int64_t version;
    if (md_h5_attr_read_str(file, "format", format, sizeof format) != MD_OK ||
        strcmp(format, MD_DATASET_FORMAT) != 0)
        return md_h5_fail(MD_ERR_DATA, file, "not an image store (made by `md_hpc convert`)");
    MD_TRY(md_h5_attr_read_i64(file, "version", &version));
    if (version != MD_DATASET_VERSION)
        return md_h5_fail(MD_ERR_DATA, file,
                          "image store of version %lld; this program reads version %d",
                          (long long)version, MD_DATASET_VERSION);
    MD_TRY(md_h5_attr_read_i64(file, "num_classes", classes));
    if (*classes < 0 || *classes > MAX_CLASSES)
        return md_h5_fail(MD_ERR_DATA, file, "num_classes is %lld", (long long)*classes);
    return MD_OK;
}

/* The names of the root's groups without "classes". */
static void list_splits(hid_t file, char *buf, size_t cap)
{
    char all[1024], *save = NULL;
    size_t used = 0;
    md_h5_list(file, all, sizeof all);
    buf[0] = 0;
    for (char *t = strtok_r(all, ", ", &save); t && used < cap; t = strtok_r(NULL, ", ", &save))
        if (strcmp(t, "classes") != 0)
            used += (size_t)snprintf(buf + used, cap - used, "%s%s", used ? ", " : "", t);
}

md_status dataset_survey_splits(const char *path, char *buf, size_t cap)
{
    hid_t file;
    int64_t classes;
    MD_TRY(md_h5_open(path, NULL, &file));
    md_status st = check_head(file, &classes);
    if (st == MD_OK)
        list_splits(file, buf, cap);
    md_h5_close(&file);
    return st;
}

static md_status open_group(hid_t file, const char *split, hid_t *group)
{
    char have[256];
    if (!md_h5_exists(file, split)) {
        *group = -1;
        list_splits(file, have, sizeof have);
        return md_h5_fail(MD_ERR_DATA, file, "has no split '%s' (it holds: %s)", split, have);
    }
    return md_h5_group_open(file, split, group);
}

/* One data set of the split: type and extents checked; `at` receives its file offset. */
static md_status locate(hid_t group, const char *name, hid_t type, hsize_t dim[2], int64_t *at)
{
    hid_t set;
    MD_TRY(md_h5_dset_open(group, name, type, dim[1] ? 2 : 1, dim, &set));
    md_status st = md_h5_offset(set, at);
    md_h5_release(set);
    return st;
}

static md_status survey_sets(dataset_survey *s, const char *split, hid_t group)
{
    hsize_t offsets[2] = {MD_H5_ANY, 0}, data[2] = {MD_H5_ANY, 0}, names[2] = {MD_H5_ANY, 0};
    MD_TRY(locate(group, "offset", H5T_STD_U64LE, offsets, &s->offset_at));
    if (offsets[0] < 2 || offsets[0] > MAX_IMAGES)
        return md_h5_fail(MD_ERR_DATA, group, "split '%s' holds no images", split);
    hsize_t n = offsets[0] - 1, one[2] = {n, 0}, two[2] = {n, 2};
    MD_TRY(locate(group, "label", H5T_STD_I32LE, one, &s->label_at));
    MD_TRY(locate(group, "xxh3", H5T_STD_U64LE, one, &s->xxh3_at));
    MD_TRY(locate(group, "wh", H5T_STD_U16LE, two, &s->wh_at));
    MD_TRY(locate(group, "kind", H5T_STD_U8LE, one, &s->kind_at));
    MD_TRY(locate(group, "name_offset", H5T_STD_U64LE, offsets, &s->name_offset_at));
    MD_TRY(locate(group, "name", H5T_STD_U8LE, names, &s->name_at));
    MD_TRY(locate(group, "data", H5T_STD_U8LE, data, &s->data_at));
    s->count = (int64_t)n;
    s->name_bytes = (int64_t)names[0];
    s->bytes = (int64_t)data[0];
    return MD_OK;
}

static md_status survey_file(hid_t file, const char *split, dataset_survey *s, char **class_names)
{
    size_t width;
    hid_t group;
    MD_TRY(check_head(file, &s->classes));
    MD_TRY(md_h5_strings_read(file, "classes/name", s->classes, class_names, &width));
    s->class_width = (int64_t)width;
    MD_TRY(open_group(file, split, &group));
    md_status st = survey_sets(s, split, group);
    md_h5_release(group);
    return st;
}

md_status dataset_survey_read(const char *path, const char *split, dataset_survey *s,
                              char **class_names)
{
    hid_t file;
    *class_names = NULL;
    MD_TRY(md_h5_open(path, NULL, &file));
    md_status st = survey_file(file, split, s, class_names);
    md_h5_close(&file); /* nothing was written: a failure changes nothing */
    return st;
}
