/* comm_device: groups whose buffers are operands of a backend. Sums, gathers and broadcasts take
 * operands; md_comm_exscan and md_comm_barrier work as ever, the latter also waits for the backend;
 * there is no shared memory. md_agree is for the group of the host. */
#ifndef MD_COMM_DEVICE_H
#define MD_COMM_DEVICE_H

#include "kernels/backend.h"
#include "mpi/comm.h"

MD_C_BEGIN

/* The ranks of `host`, for operands of `be`. kind: "mpi" through host memory, "nccl", or "auto":
 * NCCL where it is linked in and every rank has a GPU of its own, else MPI. On host memory *out is
 * `host` itself. `host` and `be` are kept and must outlive *out. Collective(host). MD_ERR_CONFIG,
 * alike on every rank. */
md_status md_comm_for_backend(md_comm *host, md_backend *be, const char *kind, md_comm **out);

/* The ranks of `inner`, which works on host memory, for operands of `be`: what a collective moves
 * passes through pinned memory, made by md_comm_reserve or at its first use. Both are kept and must
 * outlive *out. Collective(inner). MD_ERR_MEMORY, alike on every rank. */
md_status md_comm_staged(md_comm *inner, md_backend *be, md_comm **out);

/* MD_ERR_CONFIG, with a list of them, when ranks of the group share a device; MD_ERR_MEMORY. Alike
 * on every rank. Collective(host). */
md_status md_comm_own_devices(md_comm *host, const md_backend *be);

MD_C_END

#endif
