/* convert: images as people keep them -> one image store (io/dataset.h), by all ranks together.
 *
 * What a source may be is decided by content, not by name:
 *   folder   class folders, sorted by name (torchvision's ImageFolder); with train/ val/ test/
 * above them these are splits; a folder of plain images has no labels (-1); a folder of tars or IDX
 * files stands for these tar      the class is the folder above the image; a tar inside is a class
 * by its name, as in ImageNet's train archive IDX      images (3 dimensions, bytes) and the labels
 * file beside them, gzipped or not
 *
 * Every image is read, hashed and really decoded before it is stored; its bytes are stored as they
 * are. What cannot be decoded is left out and listed with the reason in OUT.rejects.txt. The order
 * in the store, and with it every byte of the file, depends on the sources and the seed, not on the
 * number of ranks. The file grows as OUT.partial and gets its name after every byte was read back.
 */
#ifndef MD_CONVERT_H
#define MD_CONVERT_H

#include "mpi/comm.h"

typedef struct md_convert_source {
    const char *path, *split; /* split for what does not name its own */
} md_convert_source;

typedef struct md_convert_args {
    const char *out;
    const md_convert_source *sources;
    int n_sources;
    uint64_t seed;   /* of the stored order */
    bool keep_order; /* store in source order instead of shuffled */
    bool replace;    /* an existing `out` may be replaced */
} md_convert_args;

typedef struct md_convert_summary {
    int64_t images, rejects, bytes; /* bytes of the stored images */
    int classes;
    double seconds;
} md_convert_summary;

/* Collective(c): all ranks get the same status. MD_ERR_NOINPUT: a source is missing; MD_ERR_DATA: a
 * source is of no known kind or damaged, or holds no image that can be decoded; MD_ERR_CREATE: out
 * exists or cannot be created; MD_ERR_IO: reading or writing failed, disk full. On error neither
 * OUT nor OUT.partial is left. */
md_status md_convert(const md_convert_args *a, md_comm *c, md_convert_summary *sum);

/* Reads, hashes and decodes every image of every split of a store. Collective(c). MD_ERR_DATA names
 * the first damaged image of the lowest rank that found one. */
md_status md_convert_verify(const char *path, md_comm *c, md_convert_summary *sum);

#endif
