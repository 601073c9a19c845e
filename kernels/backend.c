/* backend: the backends of this binary, by name. */
#include "kernels/backend.h"
#include "kernels/check/check_backend.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"

#include <stdio.h>
#include <string.h>

/* The rest of the program does not depend on whether the cuda backend was linked in. */
#pragma weak md_cuda_create

static md_status cpu_backend_create(const md_backend_args *args, md_backend **out)
{
    if (args->compute != MD_F32)
        MD_FAIL(MD_ERR_CONFIG, "backend 'cpu' computes in fp32 only");
    return md_cpu_create(args->threads, out);
}

static md_status check_backend_create(const md_backend_args *args, md_backend **out)
{
    md_backend *inner;
    MD_TRY(cpu_backend_create(args, &inner));
    md_status st = md_check_create(inner, out);
    if (st != MD_OK)
        md_backend_destroy(inner);
    return st;
}

static const struct {
    const char *name;
    md_status (*create)(const md_backend_args *args, md_backend **out);
} backends[] = {{"cpu", cpu_backend_create},
                {"check", check_backend_create},
                {"cuda", md_cuda_create}}; /* NULL where it is not linked in */

const char *md_backend_list(void)
{
    static char list[64];
    size_t used = 0;
    for (size_t i = 0; i < MD_COUNT(backends); i++)
        if (backends[i].create && used < sizeof list)
            used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", used ? ", " : "",
                                     backends[i].name);
    return list;
}

/* A row of MD_OPS that a backend left out is a NULL here: say which at start, not at its first use.
 */
static md_status check_complete(const md_backend *be)
{
#define MD_OP_PRESENT(op) \
    if (!be->ops->op)     \
        MD_FAIL(MD_ERR_BUG, "backend %s has no %s", be->name, #op);
    MD_OPS(MD_OP_PRESENT)
#undef MD_OP_PRESENT
    return MD_OK;
}

md_status md_backend_make(const md_backend_args *args, md_backend **out)
{
    *out = NULL;
    for (size_t i = 0; i < MD_COUNT(backends); i++) {
        if (!backends[i].create || strcmp(args->name, backends[i].name) != 0)
            continue;
        md_backend *be;
        MD_TRY(backends[i].create(args, &be));
        md_status st = check_complete(be);
        if (st != MD_OK) {
            md_backend_destroy(be);
            return st;
        }
        *out = be;
        return MD_OK;
    }
    MD_FAIL(MD_ERR_CONFIG, "backend '%s' is not in this program, which has: %s", args->name,
            md_backend_list());
}

md_status md_backend_create(const char *name, int threads, md_backend **out)
{
    return md_backend_make(&(md_backend_args){.name = name, .threads = threads, .node_size = 1},
                           out);
}

void md_backend_destroy(md_backend *be)
{
    if (be)
        be->destroy(be);
}
