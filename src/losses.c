/* losses: the axis method.loss.kind; the formulas are those of the op (kernels/backend.h). */
#include "src/method.h"

#include <string.h>

static const md_loss_row rows[] = {
    {"smooth_l1", MD_LOSS_SMOOTH_L1, MD_FEATURE, true, md_n_loss},
    {"l1", MD_LOSS_L1, MD_FEATURE, true, md_n_loss},
    {"l2", MD_LOSS_L2, MD_FEATURE, true, md_n_loss},
    {"cross_entropy", MD_LOSS_L2, MD_CLASS, false, md_n_cross_entropy},
};

const md_loss_row *md_loss_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(rows); i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    return NULL;
}
