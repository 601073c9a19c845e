/* prefetch_source: what a loader reads and how, from an open store and from the config; see
 * prefetch.h. */
#include "io/prefetch.h"

#include <math.h>

static md_status dataset_read(void *ctx, int64_t i, void *buf, size_t cap, size_t *len)
{
    return md_dataset_read(ctx, i, buf, cap, len);
}

static md_status dataset_read_hdf5(void *ctx, int64_t i, void *buf, size_t cap, size_t *len)
{
    return md_dataset_read_hdf5(ctx, i, buf, cap, len);
}

static void dataset_describe(void *ctx, int64_t i, md_image_kind *kind, int *w, int *h,
                             int32_t *label)
{
    *kind = md_dataset_kind(ctx, i);
    md_dataset_size(ctx, i, w, h);
    *label = md_dataset_label(ctx, i);
}

md_source md_dataset_source(md_dataset *d, bool hdf5)
{
    return (md_source){.ctx = d,
                       .count = md_dataset_count(d),
                       .max_bytes = md_dataset_max_bytes(d),
                       .max_pixels = md_dataset_max_pixels(d),
                       .main_thread = hdf5,
                       .read = hdf5 ? dataset_read_hdf5 : dataset_read,
                       .describe = dataset_describe};
}

void md_loader_configure(md_loader_args *a, const md_config *c, int size2)
{
    a->rule = (md_augment_rule){.seed = (uint64_t)c->run_seed,
                                .size = (int)c->image_size,
                                .size2 = size2,
                                .crop_min = c->augment_crop_min,
                                .crop_max = c->augment_crop_max,
                                .ratio_min = c->augment_ratio_min,
                                .ratio_max = c->augment_ratio_max,
                                .flip = c->augment_flip,
                                .jitter = c->augment_jitter};
    md_randaugment_rule *ra = &a->rule.randaugment;
    *ra = (md_randaugment_rule){.seed = (uint64_t)c->run_seed,
                                .ops = (int)c->augment_randaugment,
                                .probability = c->augment_randaugment_probability,
                                .magnitude = c->augment_randaugment_magnitude,
                                .deviation = c->augment_randaugment_deviation};
    for (int k = 0; k < 3; k++) /* the mean becomes 0 in the model's eyes */
        ra->fill[k] = (uint8_t)rint(255.0 * c->image_mean[k]);
    a->batch = c->train_batch;
    a->workers = (int)c->data_workers;
    a->depth = (int)c->data_prefetch;
    a->sync = c->data_sync;
}
