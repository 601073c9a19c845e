/* drift: what several ranks hold must be the same bits on all of them. */
#ifndef MD_DRIFT_H
#define MD_DRIFT_H

#include "src/setup.h"

/* One rank's hashes and where it stands. */
typedef struct md_drift_row {
    uint64_t whole, cut;
    int32_t tp_rank, rank;
    char host[48];
} md_drift_row;

/* Memory of the checks: a row for each rank. Zero-initialise; md_drift_free undoes it. */
typedef struct md_drift {
    md_drift_row *row;
} md_drift;
/* Local. MD_ERR_MEMORY. */
md_status md_drift_make(int ranks, md_drift *d);
void md_drift_free(md_drift *d);

/* Collective(world). Compares hashes: parameters that are whole over all ranks, cut ones over the
 * ranks of dp, and, without ZeRO, the moments of both. MD_ERR_DEVICE on every rank names the ranks
 * that differ from most of their replicas, or all of them when no value has most. */
md_status md_drift_check(md_drift *d, const md_topo *topo, md_model *model, int64_t step);

/* The verdict over n rows as a sentence in buf, "" when all agree. Local, pure. */
void md_drift_judge(const md_drift_row *row, int n, char *buf, size_t size);

#endif
