/* bad_images: what the loaders of all ranks had to replace, told by rank 0. */
#ifndef MD_BAD_IMAGES_H
#define MD_BAD_IMAGES_H

#include "io/prefetch.h"
#include "src/log.h"

typedef struct md_bad_images md_bad_images;

/* Local. The three others must live longer. MD_ERR_MEMORY. */
md_status md_bad_images_create(md_comm *c, const md_dataset *data, md_loader *loader,
                               md_bad_images **out);
void md_bad_images_free(md_bad_images *b);

/* Collective(c), after a step in which images were replaced on any rank: rank 0 warns of each and
 * notes it in log (NULL elsewhere), in the order of the ranks, at most 4 of a rank at a time. */
void md_bad_images_tell(md_bad_images *b, int64_t step, md_runlog *log);

#endif
