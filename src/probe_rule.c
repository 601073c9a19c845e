/* probe_rule: see probe_rule.h. */
#include "src/probe_rule.h"

#include <math.h>

/* In the order of the key evaluate.probe_recipe. */
static const struct recipe {
    md_probe_rule rule;
    int64_t images; /* the rate is meant for so many; 0: for any batch */
} recipes[] = {
    {{.blocks = true,
      .by_epoch = true,
      .lr = 4e-3,
      .weight_decay = 1e-4,
      .epochs = 100,
      .batch = 1024},
     0},
    {{.norm = true, .lars = true, .lr = 0.1, .warmup = 10, .epochs = 90, .batch = 16384}, 256},
};

md_probe_rule md_probe_rule_make(const md_config *c)
{
    const struct recipe *row =
        &recipes[md_config_choice("evaluate.probe_recipe", c->evaluate_probe_recipe)];
    md_probe_rule r = row->rule;
    if (c->evaluate_probe_epochs) {
        r.epochs = c->evaluate_probe_epochs;
        r.warmup *= (double)r.epochs / (double)row->rule.epochs;
    }
    if (c->evaluate_probe_batch)
        r.batch = c->evaluate_probe_batch;
    if (c->evaluate_probe_lr > 0)
        r.lr = c->evaluate_probe_lr;
    else if (row->images)
        r.lr *= (double)r.batch / (double)row->images;
    return r;
}

double md_probe_lr(const md_probe_rule *r, int64_t step, int64_t steps)
{
    const double epoch = r->by_epoch ? (double)(step / steps) : (double)step / (double)steps;
    if (epoch < r->warmup)
        return r->lr * epoch / r->warmup;
    const double done = (epoch - r->warmup) / ((double)r->epochs - r->warmup);
    return r->lr * 0.5 * (1.0 + cos(acos(-1.0) * done));
}
