/* backend: the backends of this binary, by name. */
#include "kernels/backend.h"

#include <stdio.h>
#include <string.h>

/* X(name, compiled in, what to do when it is not) */
#define MD_BACKENDS(X) \
    X(cpu, 1, "")      \
    X(check, 1, "")

#define MD_BACKEND_DECLARE(name, have, remedy) \
    md_status name##_backend_create(int threads, md_backend **out);
MD_BACKENDS(MD_BACKEND_DECLARE)
#undef MD_BACKEND_DECLARE

static const struct {
    const char *name, *remedy;
    md_status (*create)(int threads, md_backend **out);
} backends[] = {
#define MD_BACKEND_ROW(name, have, remedy) {#name, remedy, (have) ? name##_backend_create : NULL},
    MD_BACKENDS(MD_BACKEND_ROW)
#undef MD_BACKEND_ROW
};

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

md_status md_backend_create(const char *name, int threads, md_backend **out)
{
    *out = NULL;
    for (size_t i = 0; i < MD_COUNT(backends); i++) {
        if (strcmp(name, backends[i].name) != 0)
            continue;
        if (!backends[i].create)
            MD_FAIL(MD_ERR_CONFIG, "backend %s is not compiled in: %s (compiled in: %s)", name,
                    backends[i].remedy, md_backend_list());
        md_backend *be;
        MD_TRY(backends[i].create(threads, &be));
        md_status st = check_complete(be);
        if (st != MD_OK) {
            md_backend_destroy(be);
            return st;
        }
        *out = be;
        return MD_OK;
    }
    MD_FAIL(MD_ERR_CONFIG, "unknown backend '%s' (compiled in: %s)", name, md_backend_list());
}

void md_backend_destroy(md_backend *be)
{
    if (be)
        be->destroy(be);
}
