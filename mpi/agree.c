/* agree: see agree.h. One small all-reduce when all is well; when not, a broadcast and another. */
#include "mpi/agree.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

#define TEXT_SIZE 4096 /* a whole error sentence: a config may have many errors */

/* Length of the front "rank 12: " that an earlier md_agree has given a sentence, else 0. */
static size_t front_length(const char *text)
{
    if (strncmp(text, "rank ", 5) != 0 || !isdigit((unsigned char)text[5]))
        return 0;
    size_t n = 5 + strspn(text + 5, "0123456789");
    return strncmp(text + n, ": ", 2) == 0 ? n + 2 : 0;
}

md_status md_agree(md_comm *c, md_status st)
{
    if (md_comm_size(c) == 1)
        return st;
    /* The lowest failing rank wins; its status rides in the low bits. */
    int64_t first = st == MD_OK ? INT64_MAX : (int64_t)md_comm_rank(c) << 16 | (int64_t)st;
    md_comm_allreduce(c, &first, 1, MD_I64, MD_MIN_OP);
    if (first == INT64_MAX)
        return MD_OK;
    int root = (int)(first >> 16);
    char text[TEXT_SIZE] = "";
    if (root == md_comm_rank(c)) {
        if (!front_length(md_error_text()))
            md_error_prefix(st, "rank %d", md_base_rank());
        snprintf(text, sizeof text, "%s", md_error_text());
    }
    md_comm_bcast(c, text, sizeof text, root);
    /* A sentence that all ranks have, such as one about the config, is no single rank's. */
    const char *plain = text + front_length(text);
    int64_t differs = root != md_comm_rank(c) &&
                      (st == MD_OK || strncmp(md_error_text(), plain, strlen(plain)) != 0);
    md_comm_allreduce(c, &differs, 1, MD_I64, MD_MAX_OP);
    return md_error_set((md_status)(first & 0xffff), "%s", differs ? text : plain);
}

md_status md_agree_same(md_comm *c, const char *what, int64_t value)
{
    int64_t v[2] = {value, ~value}; /* ~ turns the order round: one minimum finds both ends */
    md_comm_allreduce(c, v, 2, MD_I64, MD_MIN_OP);
    if (v[0] != ~v[1])
        MD_FAIL(MD_ERR_CONFIG, "%s differs between ranks: from %lld to %lld", what, (long long)v[0],
                (long long)~v[1]);
    return MD_OK;
}
