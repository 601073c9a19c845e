/* safetensors: strict reader and writer of the safetensors file format, and of sharded sets
 * (model.safetensors.index.json beside its shards).
 *
 * Format: 8 bytes little-endian header length, JSON header name -> {dtype, shape, data_offsets},
 * then the data (https://github.com/huggingface/safetensors, README.md "Format"). The reader trusts
 * nothing: before open returns, every tensor lies inside the file, the tensors cover the data
 * without gap or overlap, and no name appears twice. It is stricter than the published reader
 * where that one is lenient: duplicate names, unknown fields, numbers that are not plain unsigned
 * integers, control bytes in names, headers above 16 MiB and more than 65,536 tensors are refused.
 * Data is read by pread, so that a file cut short under us is an error and not a signal. */
#ifndef MD_SAFETENSORS_H
#define MD_SAFETENSORS_H

#include "src/tensor.h"

#define MD_ST_MAX_RANK    8
#define MD_ST_MAX_NAME    512
#define MD_ST_MAX_HEADER  ((int64_t)16 << 20)
#define MD_ST_MAX_TENSORS 65536

/* X(name, bits of one element), in the order the published writer sorts by (it stores the last of
 * these first). */
// clang-format off
#define MD_ST_DTYPES(X)                                                                          \
    X(BOOL, 8) X(F4, 4) X(F6_E2M3, 6) X(F6_E3M2, 6) X(U8, 8) X(I8, 8) X(F8_E5M2, 8)              \
    X(F8_E4M3, 8) X(F8_E8M0, 8) X(F8_E4M3FNUZ, 8) X(F8_E5M2FNUZ, 8) X(I16, 16) X(U16, 16)        \
    X(F16, 16) X(BF16, 16) X(I32, 32) X(U32, 32) X(F32, 32) X(C64, 64) X(F64, 64) X(I64, 64)     \
    X(U64, 64)
// clang-format on

typedef enum md_st_dtype {
#define MD_ST_ENUM(name, bits) MD_ST_##name,
    MD_ST_DTYPES(MD_ST_ENUM)
#undef MD_ST_ENUM
        MD_ST_DTYPE_COUNT
} md_st_dtype;

typedef struct md_safetensors md_safetensors;

/* One tensor of an open set. */
typedef struct md_st_entry {
    const char *name; /* lives as long as the set */
    int64_t dim[MD_ST_MAX_RANK];
    int64_t count, bytes;
    int64_t begin; /* of the data in its file, from the start of the file */
    int32_t shard; /* which file of the set */
    uint8_t rank, dtype;
} md_st_entry;

/* Opens a .safetensors file, an *.index.json, or a directory that holds model.safetensors or
 * model.safetensors.index.json, and checks every header. *out is NULL on failure.
 * Local. MD_ERR_NOINPUT missing, MD_ERR_DATA damaged or refused, MD_ERR_IO, MD_ERR_MEMORY. */
md_status md_safetensors_open(const char *path, md_safetensors **out);
void md_safetensors_close(md_safetensors *st);

/* Tensors in the set, ordered by name (byte order). Local. */
int md_safetensors_count(const md_safetensors *st);
const md_st_entry *md_safetensors_at(const md_safetensors *st, int i);
/* Index of a tensor, or -1. */
int md_safetensors_find(const md_safetensors *st, const char *name);
/* Value of a key of __metadata__ (of the first file that has it), or NULL. */
const char *md_safetensors_metadata(const md_safetensors *st, const char *key);
/* The file tensor i lies in. */
const char *md_safetensors_file(const md_safetensors *st, int i);
const char *md_st_dtype_name(md_st_dtype t);
/* How a tensor of ours is stored. */
md_st_dtype md_st_dtype_of(md_dtype t);

/* Reads tensor i as stored: entry->bytes bytes into out. Local. MD_ERR_IO, MD_ERR_DATA. */
md_status md_safetensors_read(const md_safetensors *st, int i, void *out);
/* Reads tensor i as entry->count floats. F32, F16 and BF16 are exact, F64 is rounded to nearest;
 * another dtype is MD_ERR_DATA. Local. */
md_status md_safetensors_read_f32(const md_safetensors *st, int i, float *out);
/* Looks up `name`, allocates and reads it. want MD_F32 converts as md_safetensors_read_f32; any
 * other `want` must be what is stored. The caller frees out->data with md_free. Local.
 * MD_ERR_DATA: no such tensor, another dtype, or more than MD_MAX_RANK dimensions. */
md_status md_safetensors_load(const md_safetensors *st, const char *name, md_dtype want,
                              md_tensor *out);

typedef struct md_st_tensor {
    const char *name;
    md_tensor t; /* host memory */
} md_st_tensor;

typedef struct md_st_meta {
    const char *key, *value;
} md_st_meta;

/* Writes n tensors and m metadata pairs as one file, byte for byte as the published writer would:
 * larger dtypes first, then by name, header padded with spaces to 8. Written to "<path>.partial",
 * synced and renamed, so that no half file ever has the name. Local.
 * MD_ERR_CREATE, MD_ERR_IO, MD_ERR_MEMORY; MD_ERR_BUG for a name given twice. */
md_status md_safetensors_write(const char *path, const md_st_tensor *list, int n,
                               const md_st_meta *meta, int m);

#endif
