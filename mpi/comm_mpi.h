/* comm_mpi: starting and stopping MPI, and groups carried by it. The one header that shows an MPI
 * type; only mpi/ and io/ (which hands the communicator to HDF5) include it.
 *
 * A job lives and dies as one. An MPI error on any rank prints its text and ends every rank with
 * MD_ERR_DEVICE; so do md_abort and MD_ASSERT, with their own code. A rank that is killed or leaves
 * early ends the others through the launcher: mpirun always, srun only with --kill-on-bad-exit
 * (-K1). A rank that is alive but stuck is not seen by MPI. */
#ifndef MD_COMM_MPI_H
#define MD_COMM_MPI_H

#include <mpi.h>

#include "mpi/comm.h"

/* Collective(job). Starts MPI (MPI_THREAD_FUNNELED: only the calling thread may use md_comm), sets
 * md_base_rank and the abort hook, and returns the group of all ranks. Works without a launcher:
 * one rank. Call once; argc and argv may be NULL. */
md_status md_mpi_start(int *argc, char ***argv, md_comm **world);

/* Collective(job). Frees `world` and ends MPI; groups split from it must be gone. */
void md_mpi_stop(md_comm *world);

/* The MPI communicator behind a group, MPI_COMM_SELF for a group of md_comm_self. Local; the group
 * keeps it. MPI must be running: HDF5's MPI-IO needs that even for one rank. */
MPI_Comm md_comm_mpi_handle(const md_comm *c);

/* Elements per MPI call (counts are int, and messages of 2 GiB upset some transports): longer
 * collectives are cut. Same value on every rank. Local; tests make it small. */
void md_mpi_set_slice(int64_t elements);

#endif
