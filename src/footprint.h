/* footprint: the memory a rank needs, by what it is for, from shapes alone; and, where it does not
 * fit, the cheapest changes with what each would leave. */
#ifndef MD_FOOTPRINT_H
#define MD_FOOTPRINT_H

#include "io/prefetch.h"
#include "src/evaluate.h"
#include "src/setup.h"
#include "src/step.h"

typedef struct md_family {
    const char *name;
    double bytes;
} md_family;

enum { MD_FAMILIES = 14 };

/* A table of memory. */
typedef struct md_memory_map {
    md_family family[MD_FAMILIES];
    int families;
    double total;
} md_memory_map;

/* Operands of the backend, and the host's; on a backend that works on host memory all of it stands
 * in `host`. */
typedef struct md_footprint {
    md_memory_map operands, host;
    bool device;
} md_footprint;

typedef struct md_footprint_args {
    const md_model *model; /* built; needs no memory */
    const md_topo *topo;
    const md_backend *be;
    const md_stepper_bytes *step;
    const md_loader_args *loader;
    size_t index_bytes;
    const md_viewer_bytes *evaluation; /* NULL: the run does not evaluate while it trains */
} md_footprint_args;

/* Local. */
void md_footprint_make(const md_footprint_args *a, md_footprint *out);
/* A line a family and the total. */
void md_memory_map_print(const md_memory_map *m, const char *title, char *buf, size_t size);

/* Changes of micro-batch, ZeRO, recomputation and tensor parallelism that lessen what a run of
 * `ranks` ranks keeps on a device, each with what it would leave and whether that fits into `limit`
 * bytes (0: not known); cheapest first. "" where c is no valid config for so many ranks. info as
 * for md_model_make. Local. */
void md_footprint_changes(const md_config *c, const md_teacher_info *info, int ranks, double limit,
                          char *buf, size_t size);
/* What to say when the operands do not fit on a device of which so many bytes were free behind its
 * context (0: not known): the map, and these changes. Local. */
void md_footprint_advice(const md_config *c, const md_teacher_info *info, int ranks, double left,
                         char *buf, size_t size);

#endif
