/* config_check: rules between keys that need neither data nor ranks to be decided. One line each: a
 * condition that must hold, the two keys it is about, and the sentence. */
#include "src/config_table.h"

#include <math.h>
#include <string.h>

/* Adds the sentence with where its keys come from, so that the line to change is known. */
static void rule(const md_config *c, md_config_errors *e, bool holds, const char *key,
                 const char *other, const char *sentence)
{
    if (holds)
        return;
    char where[2 * MD_ORIGIN_SIZE];
    snprintf(where, sizeof where, "%s, %s", md_config_origin(c, key), md_config_origin(c, other));
    if (strcmp(md_config_origin(c, key), md_config_origin(c, other)) == 0)
        snprintf(where, sizeof where, "%s", md_config_origin(c, key));
    md_errors_add(e, where, "%s", sentence);
}

#define RULE(holds, key, other, ...)                        \
    do {                                                    \
        char sentence_[256];                                \
        snprintf(sentence_, sizeof sentence_, __VA_ARGS__); \
        rule(c, e, (holds), (key), (other), sentence_);     \
    } while (0)
#define LL(x) ((long long)(x))

static void check_shapes(const md_config *c, md_config_errors *e)
{
    RULE(c->model_width % c->model_heads == 0, "model.width", "model.heads",
         "model.heads = %lld must divide model.width = %lld", LL(c->model_heads),
         LL(c->model_width));
    RULE(c->model_heads % c->parallel_tensor == 0, "model.heads", "parallel.tensor",
         "parallel.tensor = %lld must divide model.heads = %lld", LL(c->parallel_tensor),
         LL(c->model_heads));
    const int64_t mlp = c->model_mlp ? c->model_mlp : 4 * c->model_width;
    RULE(mlp % c->parallel_tensor == 0, "model.mlp", "parallel.tensor",
         "parallel.tensor = %lld must divide the MLP's width %lld", LL(c->parallel_tensor),
         LL(mlp));
    RULE(!c->parallel_sequence || c->parallel_tensor > 1, "parallel.sequence", "parallel.tensor",
         "parallel.sequence = true needs parallel.tensor of at least 2");
    RULE(!c->parallel_sequence || strcmp(c->model_drop_path_mode, "skip") != 0,
         "model.drop_path_mode", "parallel.sequence",
         "model.drop_path_mode = \"skip\" does not go with parallel.sequence = true, whose ranks "
         "would have different numbers of images: use \"auto\" or \"mask\"");
    RULE(c->image_size % c->model_patch == 0, "image.size", "model.patch",
         "model.patch = %lld must divide image.size = %lld", LL(c->model_patch), LL(c->image_size));
    RULE(c->evaluate_resize == 0 || c->evaluate_resize >= c->image_size, "evaluate.resize",
         "image.size", "evaluate.resize = %lld must not be less than image.size = %lld",
         LL(c->evaluate_resize), LL(c->image_size));
    RULE(c->augment_crop_min <= c->augment_crop_max, "augment.crop_min", "augment.crop_max",
         "augment.crop_min = %g must not exceed augment.crop_max = %g", c->augment_crop_min,
         c->augment_crop_max);
    RULE(c->augment_randaugment == 0 || c->augment_jitter == 0, "augment.jitter",
         "augment.randaugment",
         "augment.randaugment = %lld takes the place of colour jitter: set augment.jitter = 0",
         LL(c->augment_randaugment));
}

md_dtype md_config_compute(const md_config *c)
{
    const bool automatic = strcmp(c->precision, "auto") == 0;
    const char *precision = automatic && strcmp(c->backend, "cuda") == 0 ? "bf16" : c->precision;
    return strcmp(precision, "bf16") == 0 ? MD_BF16 : MD_F32;
}

static void check_backend(const md_config *c, md_config_errors *e)
{
    const bool cuda = strcmp(c->backend, "cuda") == 0;
    RULE(cuda || md_config_compute(c) == MD_F32, "precision", "backend",
         "precision = \"bf16\" needs backend = \"cuda\": backend \"%s\" computes in fp32",
         c->backend);
    RULE(cuda || !c->cuda_tune, "cuda.tune", "backend",
         "cuda.tune = true needs backend = \"cuda\"");
    RULE(cuda || strcmp(c->parallel_comm, "nccl") != 0, "parallel.comm", "backend",
         "parallel.comm = \"nccl\" needs backend = \"cuda\"");
}

static void check_mask(const md_config *c, md_config_errors *e)
{
    if (strcmp(c->task, "pretrain") != 0)
        return;
    bool none = strcmp(c->mask_kind, "none") == 0;
    RULE(!none || strcmp(c->loss_on, "masked") != 0, "method.loss.on", "method.mask.kind",
         "method.loss.on = \"masked\" needs a mask: set method.mask.kind, or method.loss.on = "
         "\"all\"");
    RULE(!none || c->mask_count == 0, "method.mask.count", "method.mask.kind",
         "method.mask.count = %lld has no meaning without a mask (method.mask.kind = \"none\")",
         LL(c->mask_count));
    if (none || c->image_size % c->model_patch != 0)
        return;
    int64_t side = c->image_size / c->model_patch, patches = side * side;
    const char *key = c->mask_count ? "method.mask.count" : "method.mask.ratio";
    int64_t count = c->mask_count ? c->mask_count : llround(c->mask_ratio * (double)patches);
    RULE(count >= 1 && count < patches, key, "model.patch",
         "%s masks %lld of %lld patches; it must be at least 1 and leave at least 1 (no mask: "
         "method.mask.kind = \"none\")",
         key, LL(count), LL(patches));
    RULE(strcmp(c->mask_kind, "block") != 0 || c->mask_min_block <= MD_MAX(count, 1),
         "method.mask.min_block", key,
         "method.mask.min_block = %lld must not exceed the %lld masked patches: no block would fit",
         LL(c->mask_min_block), LL(count));
}

/* What only one task knows. */
static void check_task(const md_config *c, md_config_errors *e)
{
    const bool labels = strcmp(c->task, "finetune") == 0;
    const struct {
        const char *key;
        bool set;
    } keys[] = {{"augment.mixup", c->augment_mixup > 0},
                {"augment.cutmix", c->augment_cutmix > 0},
                {"augment.erasing", c->augment_erasing > 0},
                {"finetune.from", *c->finetune_from != 0},
                {"evaluate.every", c->evaluate_every > 0}};
    for (size_t i = 0; i < MD_COUNT(keys); i++)
        RULE(labels || !keys[i].set, keys[i].key, "task", "%s needs task = \"finetune\"",
             keys[i].key);
    RULE(c->evaluate_every == 0 || !c->evaluate_ema || c->optim_ema > 0, "evaluate.ema",
         "optim.ema", "evaluate.ema while training needs a moving average: set optim.ema");
    if (!labels || (c->augment_mixup <= 0 && c->augment_cutmix <= 0))
        return;
    RULE(c->train_batch % c->augment_mix_group == 0, "augment.mix_group", "train.batch",
         "augment.mix_group = %lld must divide train.batch = %lld", LL(c->augment_mix_group),
         LL(c->train_batch));
}

static void check_schedule(const md_config *c, md_config_errors *e)
{
    RULE(c->optim_warmup_epochs == 0 || c->optim_warmup_epochs < c->train_epochs,
         "optim.warmup_epochs", "train.epochs",
         "optim.warmup_epochs = %g must be less than train.epochs = %g", c->optim_warmup_epochs,
         c->train_epochs);
    RULE(c->optim_min_lr <= c->optim_lr, "optim.min_lr", "optim.lr",
         "optim.min_lr = %g must not exceed optim.lr = %g", c->optim_min_lr, c->optim_lr);
    RULE(c->train_micro_batch == 0 || c->train_batch % c->train_micro_batch == 0, "train.batch",
         "train.micro_batch", "train.micro_batch = %lld must divide train.batch = %lld",
         LL(c->train_micro_batch), LL(c->train_batch));
    RULE(c->train_recompute <= c->model_layers, "train.recompute", "model.layers",
         "train.recompute = %lld must not exceed the model's %lld blocks", LL(c->train_recompute),
         LL(c->model_layers));
    RULE(
        c->checkpoint_every == 0 || c->checkpoint_keep_every % c->checkpoint_every == 0,
        "checkpoint.keep_every", "checkpoint.every",
        "checkpoint.keep_every = %lld must be a multiple of checkpoint.every = %lld: no checkpoint "
        "is written at other steps",
        LL(c->checkpoint_keep_every), LL(c->checkpoint_every));
}

md_status md_config_check(const md_config *c)
{
    md_config_errors e = {0};
    check_shapes(c, &e);
    check_task(c, &e);
    check_mask(c, &e);
    check_backend(c, &e);
    check_schedule(c, &e);
    return md_errors_finish(&e);
}
