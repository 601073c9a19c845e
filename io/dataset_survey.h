/* dataset_survey: what HDF5 says about one split of an image store: how much there is of everything
 * and where in the file it lies. One process asks; for dataset.c alone. */
#ifndef MD_DATASET_SURVEY_H
#define MD_DATASET_SURVEY_H

#include "src/base.h"

typedef struct dataset_survey {
    int64_t count, bytes, name_bytes; /* images; bytes of `data` and of `name` */
    int64_t offset_at, xxh3_at, label_at, wh_at, kind_at, name_offset_at, name_at,
        data_at; /* file */
    int64_t classes, class_width;
} dataset_survey;

/* Local, without MPI. *class_names: `classes` fields of `class_width` bytes, to be freed by the
 * caller (md_free) also on error. Errors of md_dataset_open. */
md_status dataset_survey_read(const char *path, const char *split, dataset_survey *s,
                              char **class_names);
/* "test, train". */
md_status dataset_survey_splits(const char *path, char *buf, size_t cap);

#endif
