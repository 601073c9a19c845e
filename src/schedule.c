/* schedule: warm-up and cosine. */
#include "src/schedule.h"

#include <math.h>

md_schedule md_schedule_make(const md_config *c, int64_t steps_per_epoch)
{
    return (md_schedule){
        .peak = c->optim_lr,
        .min = c->optim_min_lr,
        .warmup = llround(c->optim_warmup_epochs * (double)steps_per_epoch),
        .total = llround(c->train_epochs * (double)steps_per_epoch),
    };
}

double md_schedule_lr(const md_schedule *s, int64_t step)
{
    if (step < s->warmup)
        return s->warmup == 1 ? 0 : s->peak * (double)step / (double)(s->warmup - 1);
    if (step >= s->total)
        return s->min;
    double done = (double)(step - s->warmup) / (double)(s->total - s->warmup);
    return s->min + 0.5 * (s->peak - s->min) * (1 + cos(acos(-1.0) * done));
}
