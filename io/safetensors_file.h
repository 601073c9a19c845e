/* safetensors_file: one file of a set and its parsed header. Only for io/safetensors.c. */
#ifndef MD_SAFETENSORS_FILE_H
#define MD_SAFETENSORS_FILE_H

#include <jansson.h>

#include "io/safetensors.h"

#define MD_ST_META_KEY "__metadata__"

typedef struct md_st_file {
    char *path;
    const char *base; /* last component of path */
    int fd;
    int64_t data, size; /* where the data begins, size of the file */
    json_t *root;       /* the header; names of entries point into it */
} md_st_file;

/* Opens a file and parses its header. f owns path from here on, also after a failure; it is closed
 * with md_st_file_close. Local. */
md_status md_st_file_open(md_st_file *f, char *path);
void md_st_file_close(md_st_file *f);
/* Tensors the header names. */
size_t md_st_file_count(const md_st_file *f);
/* Fills e[0 .. *n), ordered by offset, and checks every entry and that they cover the data exactly.
 * e has room for md_st_file_count entries. Local. MD_ERR_DATA. */
md_status md_st_file_entries(const md_st_file *f, md_st_entry *e, int *n);

/* Bits of one element. */
int md_st_dtype_bits(md_st_dtype t);

/* Opens a regular file for reading and gives its size; *fd is -1 when it cannot be opened. */
md_status md_st_open_regular(const char *path, int *fd, int64_t *size);
/* Reads exactly `bytes` bytes. */
md_status md_st_read_at(int fd, const char *path, void *out, int64_t bytes, int64_t offset);
/* Parses a JSON object without duplicate keys; *root is NULL or the caller's. */
md_status md_st_parse_json(const char *path, const char *text, size_t n, json_t **root);

#endif
