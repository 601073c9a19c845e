/* prefetch: the loader. Worker threads read, decode and augment images into a ring of micro-batches
 * ahead of the training step; one image is one work item, so a slow picture delays nobody else.
 * What a batch holds is a pure function of (seed, step, layout-independent position), never of the
 * number of ranks, workers or micro-batches: image b of global step s is md_position_at(s, b), and
 * data-parallel rank r of R with micro-batches of m images takes b = r * batch / R + micro * m + j,
 * of which each of the ranks that share its model takes its equal part of the j, in rank order.
 *
 * An image that cannot be read or decoded is replaced by the one half an epoch later in the epoch's
 * order (then the one after that, up to MD_LOADER_TRIES), which gives the same picture on every
 * layout; it is counted and noted: how many are too many is the trainer's to say.
 *
 * For evaluation (sequential) there is no order and no replacement: image b of step s is number
 * s * batch + b of the store, and past its end come blanks: sample and label -1, all pixels 0.
 *
 * Workers call neither MPI nor HDF5 and run at a lower priority than the compute threads: when
 * compute has to wait for data, its cores are free. Everything is allocated by md_loader_create,
 * but for pictures larger than MD_LOADER_PIXELS, which borrow memory while they are decoded. */
#ifndef MD_PREFETCH_H
#define MD_PREFETCH_H

#include "io/augment.h"
#include "io/dataset.h"
#include "src/config.h"
#include "src/tensor.h"

#define MD_LOADER_TRIES  64
#define MD_LOADER_PIXELS ((int64_t)4 << 20)

/* Where images come from. read and describe are called by many threads at once unless
 * main_thread is set; then md_loader_take itself loads every batch, without workers. */
typedef struct md_source {
    void *ctx;
    int64_t count;
    size_t max_bytes;   /* of an encoded image */
    int64_t max_pixels; /* of a decoded one */
    bool main_thread;
    md_status (*read)(void *ctx, int64_t i, void *buf, size_t cap, size_t *len);
    void (*describe)(void *ctx, int64_t i, md_image_kind *kind, int *w, int *h, int32_t *label);
} md_source;

/* The images of an open store, which must outlive the loader. hdf5: by H5Dread on the main thread.
 */
md_source md_dataset_source(md_dataset *d, bool hdf5);

typedef struct md_loader_args {
    md_source source;
    md_augment_rule rule; /* its seed also gives the order */
    int64_t batch;        /* images of a step, over all ranks */
    int dp_rank, dp_size;
    int tp_rank, tp_size; /* 0, 0: one rank */
    int64_t micro_batch;  /* images of a pass, over the tp ranks; divides batch / dp_size */
    int64_t start_step;
    int workers;     /* threads; 0 = one for every compute thread, at most 8 */
    int depth;       /* micro-batches loaded ahead, >= 1 */
    bool sync;       /* load a batch only when it is asked for */
    bool sequential; /* stored order, each image once: for evaluation */
} md_loader_args;

/* Fills rule, batch, workers, depth and sync from the config, for training; size2 = side of the
 * teacher's crop, 0 = none. The rest is the caller's. */
void md_loader_configure(md_loader_args *a, const md_config *c, int size2);

/* This rank's m images of a micro-batch, owned by the loader until it is released. */
typedef struct md_batch {
    md_tensor image;  /* u8 [m, S, S, 3] */
    md_tensor image2; /* u8 [m, S2, S2, 3]; data NULL when there is no second crop */
    int64_t *sample;  /* [m] index in the store of the image that is shown, -1 = blank */
    int32_t *label;   /* [m], -1 = none */
    uint32_t epoch;
    int64_t bad; /* images that had to be replaced */
} md_batch;

/* An image that was replaced, and why. */
typedef struct md_bad_image {
    int64_t sample;
    uint32_t epoch;
    md_status status;
    char reason[192];
} md_bad_image;

typedef struct md_loader md_loader;

/* Starts loading from start_step on. MD_ERR_CONFIG: fewer images than a batch (not when
 * sequential), or sizes that do not divide, each naming the numbers; MD_ERR_MEMORY. Local. */
md_status md_loader_create(md_loader **out, const md_loader_args *a);
/* Ends the workers, whatever they are at, and frees everything. NULL is fine. */
void md_loader_destroy(md_loader *l);
/* Host bytes md_loader_create takes for these arguments. */
size_t md_loader_bytes(const md_loader_args *a);

/* Waits for micro-batch `micro` of step `step`; they come in this order from start_step on,
 * anything else is a bug. Adds the seconds waited to *wait (NULL is fine). At most `depth` batches
 * may be held at a time; give each back with md_loader_release. MD_ERR_DATA: no replacement
 * for a bad image was found or, when sequential, an image is bad; MD_ERR_MEMORY. Local; the calling
 * thread is always the same. */
md_status md_loader_take(md_loader *l, int64_t step, int64_t micro, const md_batch **out,
                         double *wait);
void md_loader_release(md_loader *l, const md_batch *b);

/* The next note on a bad image among the batches taken so far; false when there is none. Beyond 16
 * in a micro-batch or 256 unread, images are counted but not noted. Local. */
bool md_loader_next_bad(md_loader *l, md_bad_image *out);

#endif
