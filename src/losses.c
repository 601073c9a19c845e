/* losses: the axis method.loss.kind; the formulas are those of the op (kernels/backend.h). */
#include "src/method.h"

#include <string.h>

static const md_loss_row rows[] = {
    {"smooth_l1", MD_LOSS_SMOOTH_L1},
    {"l1", MD_LOSS_L1},
    {"l2", MD_LOSS_L2},
};

const md_loss_row *md_loss_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(rows); i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    return NULL;
}
