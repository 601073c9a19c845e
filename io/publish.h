/* publish: giving a finished file its name. Output is written to "<path>.partial" and becomes
 * visible by one rename, so that no half file ever has the name. */
#ifndef MD_PUBLISH_H
#define MD_PUBLISH_H

#include "src/base.h"

/* "<path>.partial" in memory of the caller's, freed with md_free. Local. MD_ERR_MEMORY. */
md_status md_publish_part(const char *path, char **part);

/* Syncs the closed file `part`, renames it to `path` and syncs the folder. On failure `part` is
 * removed and an older `path` stays. Local. MD_ERR_CREATE, MD_ERR_IO. */
md_status md_publish(const char *part, const char *path);

#endif
