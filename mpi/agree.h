/* agree: turning a local failure into one that all ranks see alike. */
#ifndef MD_AGREE_H
#define MD_AGREE_H

#include "mpi/comm.h"

/* Collective(c). Every rank passes its local status; all return the same one: MD_OK if all did,
 * else the status of the lowest failing rank, whose error sentence becomes every rank's
 * md_error_text(), with its rank in front unless all ranks say the same. A Collective function
 * calls it after its local part and before its first collective, on every path. */
md_status md_agree(md_comm *c, md_status st);

/* Collective(c). Fails with MD_ERR_CONFIG on every rank when `value` differs between ranks; `what`
 * names it in the message. */
md_status md_agree_same(md_comm *c, const char *what, int64_t value);

#endif
