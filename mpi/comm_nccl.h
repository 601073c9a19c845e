/* comm_nccl: groups carried by NCCL, whose buffers are operands of the cuda backend. Linked in or
 * not (make CUDA=...): whoever calls md_comm_nccl declares it weak. */
#ifndef MD_COMM_NCCL_H
#define MD_COMM_NCCL_H

#include "kernels/backend.h"
#include "mpi/comm.h"

MD_C_BEGIN

/* The ranks of `boot`, for operands of `be`, a cuda backend on a GPU of its own on every rank. No
 * collective blocks the host: it is issued in the order of ops, on a stream of its own, and ops
 * issued after a blocking form or md_comm_wait see its result. `boot` and `be` are kept and must
 * outlive *out. Collective(boot). MD_ERR_CONFIG: versions or GPUs differ; MD_ERR_DEVICE: NCCL
 * cannot connect the ranks; MD_ERR_MEMORY; alike on every rank. */
md_status md_comm_nccl(md_comm *boot, md_backend *be, md_comm **out);

MD_C_END

#endif
