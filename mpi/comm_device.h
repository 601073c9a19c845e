/* comm_device: groups whose buffers are operands of a backend. */
#ifndef MD_COMM_DEVICE_H
#define MD_COMM_DEVICE_H

#include "kernels/backend.h"
#include "mpi/comm.h"

MD_C_BEGIN

/* The ranks of `host`, for operands of `be`. kind: "mpi" through host memory, "nccl", or "auto":
 * NCCL where it is linked in and every rank has a GPU of its own, else MPI. `host` and `be` are
 * kept and must outlive *out. Collective(host). MD_ERR_CONFIG, alike on every rank. */
md_status md_comm_for_backend(md_comm *host, md_backend *be, const char *kind, md_comm **out);

MD_C_END

#endif
