/* topo_table: where every rank runs, as a compact table for people. A node is one line where its
 * ranks are alike:
 *
 *     process grid: 64 ranks on 16 nodes, 32 data parallel x 2 tensor parallel
 *     node  0  cn001  ranks 0-3    dp 0-1    tp 0-1  cores 0-15 16-31 .. 48-63  device - x4
 *
 * Ranks are world ranks. Cores and devices are those of each rank in turn: "0-7 x4" are four ranks
 * with the same, "0 1 .. 63" goes on evenly. "0-62:2" are the even numbers up to 62. */
#ifndef MD_TOPO_TABLE_H
#define MD_TOPO_TABLE_H

#include <sched.h>

#include "mpi/topo.h"

/* One rank, as the others see it. */
typedef struct md_topo_seat {
    char host[64], device[64];
    cpu_set_t cores; /* it may run on; empty when the system does not tell */
    int online;      /* cores of its node */
    int rank, dp, tp, node;
} md_topo_seat;

/* Collective(world). Rank 0 prints the table through md_log_info, and one warning when ranks of a
 * node are bound to the same cores. device names what this rank computes on, "-" for the CPU. Not
 * for a planned grid. MD_ERR_MEMORY. */
md_status md_topo_table(const md_topo *t, const char *device);

/* Takes one line of the table. */
typedef void md_topo_emit(void *ctx, const char *line);

/* The node lines for seats in grid order. Local. */
void md_topo_lines(const md_topo_seat *seat, int ranks, md_topo_emit *emit, void *ctx);

/* True when ranks of one node are bound to the same cores, with a sentence that names two of them.
 * Ranks that share all cores of a node, or a set of at least as many cores as ranks (a socket), are
 * fine. Seats in grid order. Local. */
bool md_topo_overlap(const md_topo_seat *seat, int ranks, char *text, size_t size);

#endif
