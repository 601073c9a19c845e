/* convert_idx: Yann LeCun's IDX format (MNIST and its like): 0 0 TYPE RANK, then RANK sizes of 32
 * bits, big-endian, then the elements; TYPE 8 is unsigned bytes. */
#include "io/convert_parts.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static int64_t big32(const uint8_t *p)
{
    return (int64_t)p[0] << 24 | p[1] << 16 | p[2] << 8 | p[3];
}

bool idx_is_header(const uint8_t *bytes, size_t n, int rank)
{
    return n >= 4 && bytes[0] == 0 && bytes[1] == 0 && bytes[2] == 8 && bytes[3] == rank;
}

/* The sizes of an IDX file, which must hold exactly its elements. */
static md_status read_sizes(convert_reader *r, const char *path, int rank, int64_t *dim)
{
    uint8_t head[16], last;
    size_t want = 4 + 4 * (size_t)rank, got, one, past;
    MD_TRY(convert_read(r, path, 0, head, want, &got));
    if (got < want || !idx_is_header(head, got, rank))
        MD_FAIL(MD_ERR_DATA, "%s: not an IDX file of bytes with %d dimensions", path, rank);
    int64_t bytes = 1;
    for (int i = 0; i < rank; i++) {
        dim[i] = big32(head + 4 + 4 * i);
        if (dim[i] < 1 || (i > 0 && dim[i] > UINT16_MAX))
            MD_FAIL(MD_ERR_DATA, "%s: IDX dimension %d is %lld", path, i, (long long)dim[i]);
        bytes *= dim[i];
        if (bytes > INT64_MAX >> 17) /* a further factor is below 2^16 */
            MD_FAIL(MD_ERR_DATA, "%s: IDX file of impossible size", path);
    }
    int64_t end = (int64_t)want + bytes;
    MD_TRY(convert_read(r, path, end - 1, &last, 1, &one));
    MD_TRY(convert_read(r, path, end, &last, 1, &past));
    if (one != 1 || past != 0)
        MD_FAIL(MD_ERR_DATA, "%s: IDX file is %s than the %lld bytes its header says", path,
                past ? "longer" : "shorter", (long long)end);
    return MD_OK;
}

md_status idx_open(convert_reader *r, idx_pair *pair)
{
    int64_t dim[3] = {0}, labels[1] = {0};
    MD_TRY(read_sizes(r, pair->images, 3, dim));
    MD_TRY(read_sizes(r, pair->labels, 1, labels));
    if (labels[0] != dim[0])
        MD_FAIL(MD_ERR_DATA, "%s: %lld labels for the %lld images of %s", pair->labels,
                (long long)labels[0], (long long)dim[0], pair->images);
    pair->n = dim[0];
    pair->h = dim[1];
    pair->w = dim[2];
    pair->first = 16;
    return MD_OK;
}

md_status idx_label(convert_reader *r, const idx_pair *pair, int64_t i, int *label)
{
    uint8_t byte;
    size_t got;
    MD_TRY(convert_read(r, pair->labels, 8 + i, &byte, 1, &got));
    if (got != 1)
        MD_FAIL(MD_ERR_DATA, "%s: became shorter", pair->labels);
    *label = byte;
    return MD_OK;
}

bool idx_find_labels(const char *images, char *labels, size_t size)
{
    const char *slash = strrchr(images, '/');
    size_t base = slash ? (size_t)(slash + 1 - images) : 0, n = strlen(images);
    struct stat s;
    if (n + 4 > size)
        return false;
    memcpy(labels, images, n + 1);
    char *p = strstr(labels + base, "images");
    if (!p)
        return false;
    memcpy(p, "labels", 6);
    if ((p = strstr(labels + base, "idx3")))
        p[3] = '1';
    if (stat(labels, &s) == 0)
        return true;
    if (n > 3 && strcmp(labels + n - 3, ".gz") == 0)
        labels[n - 3] = 0;
    else
        memcpy(labels + n, ".gz", 4);
    return stat(labels, &s) == 0;
}
