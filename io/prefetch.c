/* prefetch: see prefetch.h. One mutex guards the ring; it is taken twice an image. Batches are
 * numbered from start_step on: batch q lives in slot q % slots. A worker takes the next image of
 * the youngest batch that has been begun; a batch is begun when its slot is free. What a worker
 * writes reaches the taker through the mutex. */
#include "io/prefetch.h"

#include <errno.h>
#include <omp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#include "src/watchdog.h"

#define MAX_WORKERS   256
#define NOTES_A_BATCH 16
#define NOTES         256
#define NICE          4 /* not more: on a busy node the ring must still fill */

typedef enum slot_state { SLOT_FREE, SLOT_BEGUN, SLOT_TAKEN } slot_state;

typedef struct slot {
    md_batch batch; /* first, so that a batch is its slot */
    slot_state state;
    int64_t done; /* images finished */
    int noted;    /* of batch.bad */
    md_bad_image note[NOTES_A_BATCH];
    md_status status; /* of the first image that has no picture at all */
    char reason[256];
} slot;

/* What one thread needs to make an image. */
typedef struct bench {
    md_loader *loader;
    md_decoder *decoder;
    md_augment_tools tools;
    uint8_t *bytes;
    pthread_t thread;
    bool running;
} bench;

struct md_loader {
    md_loader_args a;
    md_order order;
    int64_t micros; /* batches of a step on this rank */
    int n_slots, n_benches;
    slot *slot;
    bench *bench;
    void *pixels;       /* of all slots */
    void *ids;          /* samples and labels of all slots */
    int64_t wanted;     /* number of the batch to take next */
    md_bad_image *note; /* ring of notes[], main thread only */
    int64_t note_first, note_next;

    pthread_mutex_t lock;
    pthread_cond_t work, ready;
    int64_t next_batch, next_image; /* next work item */
    bool stop;
};

/* ---- one image ---- */

static void note_bad(md_loader *l, slot *s, int64_t sample, md_status st)
{
    pthread_mutex_lock(&l->lock);
    if (s->noted < NOTES_A_BATCH) {
        md_bad_image *n = &s->note[s->noted++];
        n->sample = sample;
        n->epoch = s->batch.epoch;
        n->status = st;
        snprintf(n->reason, sizeof n->reason, "%s", md_error_text());
    }
    pthread_mutex_unlock(&l->lock);
}

/* An image as it will be shown. */
typedef struct shot {
    md_image picture;
    int64_t sample;
    int32_t label;
    bool bad; /* it stands for another one */
} shot;

/* Reads and decodes one image of the store. */
static md_status load_picture(bench *w, shot *sh)
{
    const md_source *src = &w->loader->a.source;
    md_coded in = {.bytes = w->bytes};
    src->describe(src->ctx, sh->sample, &in.kind, &in.w, &in.h, &sh->label);
    MD_TRY(src->read(src->ctx, sh->sample, w->bytes, src->max_bytes, &in.n));
    if (md_fault("loader.decode"))
        MD_FAIL(MD_ERR_DATA, "injected fault loader.decode");
    return md_decode_image(w->decoder, &in, &sh->picture);
}

/* The image at a position or, in training, what replaces it. */
static md_status find_picture(bench *w, slot *s, md_position at, shot *sh)
{
    const md_order *o = &w->loader->order;
    *sh = (shot){.sample = at.sample};
    if (w->loader->a.sequential) {
        md_status st = load_picture(w, sh);
        if (st == MD_OK || st == MD_ERR_MEMORY)
            return st;
        return md_error_prefix(MD_ERR_DATA, "image %lld", (long long)at.sample);
    }
    for (int64_t k = 0; k < MD_LOADER_TRIES; k++) {
        if (k > 0)
            sh->sample = md_permute(o->seed, at.epoch, o->n, (at.place + o->n / 2 + k - 1) % o->n);
        md_status st = load_picture(w, sh);
        if (st == MD_OK || st == MD_ERR_MEMORY)
            return st;
        sh->bad = true;
        note_bad(w->loader, s, sh->sample, st);
    }
    return md_error_prefix(MD_ERR_DATA, "image %lld and the %d after it have no usable picture",
                           (long long)at.sample, MD_LOADER_TRIES - 1);
}

/* Images of a micro-batch that are taken here. */
static int64_t own_images(const md_loader_args *a)
{
    return a->micro_batch / MD_MAX(a->tp_size, 1);
}

/* Where image b of a step is; a sample past the end is a blank. */
static md_position locate(const md_loader *l, int64_t step, int64_t b)
{
    if (l->a.sequential)
        return (md_position){.sample = step * l->a.batch + b};
    return md_position_at(&l->order, step, b);
}

/* Crop number j of a tensor of them; NULL where there is none. */
static uint8_t *crop_of(const md_tensor *t, int64_t j)
{
    size_t bytes = (size_t)(t->dim[1] * t->dim[2] * t->dim[3]);
    return t->data ? (uint8_t *)t->data + (size_t)j * bytes : NULL;
}

static void make_blank(const md_batch *b, int64_t j)
{
    b->sample[j] = -1;
    b->label[j] = -1;
    memset(crop_of(&b->image, j), 0, (size_t)(b->image.dim[1] * b->image.dim[2] * 3));
    if (b->image2.data)
        memset(crop_of(&b->image2, j), 0, (size_t)(b->image2.dim[1] * b->image2.dim[2] * 3));
}

static md_status make_image(bench *w, slot *s, int64_t q, int64_t j, bool *bad)
{
    const md_loader *l = w->loader;
    const md_loader_args *a = &l->a;
    const md_batch *out = &s->batch;
    int64_t step = a->start_step + q / l->micros, micro = q % l->micros;
    int64_t b = a->dp_rank * (a->batch / a->dp_size) + micro * a->micro_batch +
                a->tp_rank * own_images(a) + j;
    md_position at = locate(l, step, b);
    if (at.sample >= a->source.count) {
        make_blank(out, j);
        return MD_OK;
    }
    shot sh;
    md_status st = find_picture(w, s, at, &sh);
    *bad = sh.bad;
    if (st != MD_OK)
        return st;
    out->sample[j] = sh.sample;
    out->label[j] = sh.label;
    md_augment_draw draw =
        md_augment_choose(&a->rule, at.epoch, (uint64_t)sh.sample, sh.picture.w, sh.picture.h);
    return md_augment_image(&a->rule, &draw, w->tools, &sh.picture, crop_of(&out->image, j),
                            crop_of(&out->image2, j));
}

/* ---- the ring; all with the lock held unless said otherwise ---- */

static void begin_batch(md_loader *l, int64_t q)
{
    slot *s = &l->slot[q % l->n_slots];
    int64_t step = l->a.start_step + q / l->micros;
    s->state = SLOT_BEGUN;
    s->done = 0;
    s->noted = 0;
    s->status = MD_OK;
    s->batch.bad = 0;
    s->batch.epoch = locate(l, step, 0).epoch;
}

static bool work_waits(const md_loader *l)
{
    if (l->next_image > 0)
        return true;
    return l->slot[l->next_batch % l->n_slots].state == SLOT_FREE &&
           (!l->a.sync || l->next_batch <= l->wanted);
}

/* Makes the next image; lets the lock go meanwhile. */
static void run_item(bench *w)
{
    md_loader *l = w->loader;
    int64_t q = l->next_batch, j = l->next_image;
    slot *s = &l->slot[q % l->n_slots];
    if (j == 0)
        begin_batch(l, q);
    if (++l->next_image == own_images(&l->a)) {
        l->next_image = 0;
        l->next_batch++;
    }
    pthread_mutex_unlock(&l->lock);
    bool bad = false;
    md_status st = make_image(w, s, q, j, &bad);
    pthread_mutex_lock(&l->lock);
    s->batch.bad += bad;
    if (st != MD_OK && s->status == MD_OK) {
        s->status = st;
        snprintf(s->reason, sizeof s->reason, "%s", md_error_text());
    }
    if (++s->done == own_images(&l->a))
        pthread_cond_signal(&l->ready);
}

static void *worker(void *arg)
{
    bench *w = arg;
    md_loader *l = w->loader;
    if (getpriority(PRIO_PROCESS, 0) < NICE) /* 0: on Linux the calling thread alone */
        setpriority(PRIO_PROCESS, 0, NICE);
    pthread_mutex_lock(&l->lock);
    while (!l->stop) {
        if (work_waits(l))
            run_item(w);
        else
            pthread_cond_wait(&l->work, &l->lock);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

/* ---- setup ---- */

static int worker_count(const md_loader_args *a)
{
    if (a->source.main_thread)
        return 0;
    int n = a->workers > 0 ? a->workers : MD_MIN(omp_get_max_threads(), 8);
    return MD_MIN(MD_MAX(n, 1), MAX_WORKERS);
}

typedef struct plan {
    int slots, benches, max_side;
    int64_t max_pixels;
    size_t crop, crop2, slot_pixels,
        ids; /* bytes: of a batch's crops, of a slot, of a batch's ids */
} plan;

static plan make_plan(const md_loader_args *a)
{
    size_t m = (size_t)own_images(a), s = (size_t)a->rule.size, s2 = (size_t)a->rule.size2;
    plan p = {.slots = a->depth + 1, .benches = MD_MAX(worker_count(a), 1)};
    p.crop = (m * s * s * 3 + 63) / 64 * 64;
    p.slot_pixels = p.crop + (m * s2 * s2 * 3 + 63) / 64 * 64;
    p.ids = m * (sizeof(int64_t) + sizeof(int32_t));
    p.max_pixels = MD_MIN(a->source.max_pixels, MD_LOADER_PIXELS);
    for (p.max_side = 64; (int64_t)p.max_side * p.max_side < 2 * p.max_pixels;)
        p.max_side *= 2;
    return p;
}

size_t md_loader_bytes(const md_loader_args *a)
{
    plan p = make_plan(a);
    int size = MD_MAX(a->rule.size, a->rule.size2);
    size_t thread = sizeof(bench) + a->source.max_bytes + md_decoder_bytes(p.max_pixels) +
                    md_resizer_bytes(p.max_side, size) + md_augment_scratch(&a->rule);
    return sizeof(md_loader) + (size_t)p.slots * (sizeof(slot) + p.slot_pixels + p.ids) +
           (size_t)p.benches * thread + NOTES * sizeof(md_bad_image);
}

static md_status check_args(const md_loader_args *a)
{
    int64_t n = a->source.count;
    if (n < a->batch && !a->sequential)
        MD_FAIL(MD_ERR_CONFIG, "the data set has %lld images, fewer than one batch of %lld",
                (long long)n, (long long)a->batch);
    const int tp = MD_MAX(a->tp_size, 1);
    if (a->batch % a->dp_size || a->batch / a->dp_size % a->micro_batch || a->micro_batch % tp)
        MD_FAIL(MD_ERR_CONFIG,
                "batch %lld does not divide into %d data-parallel ranks of micro-batches of %lld "
                "images over %d ranks each",
                (long long)a->batch, a->dp_size, (long long)a->micro_batch, tp);
    return MD_OK;
}

static md_status fill_slots(md_loader *l, const plan *p)
{
    int64_t m = own_images(&l->a), s = l->a.rule.size, s2 = l->a.rule.size2;
    uint8_t *pixels, *ids;
    MD_NEW(l->slot, p->slots, "loader");
    MD_NEW(pixels, (size_t)p->slots * p->slot_pixels, "loader");
    l->pixels = pixels;
    MD_NEW(ids, (size_t)p->slots * p->ids, "loader");
    l->ids = ids;
    MD_NEW(l->note, NOTES, "loader");
    int64_t *sample = l->ids;
    int32_t *label = (int32_t *)(void *)(sample + (int64_t)p->slots * m);
    for (int i = 0; i < p->slots; i++, pixels += p->slot_pixels) {
        md_batch *b = &l->slot[i].batch;
        b->image = MD_TENSOR(pixels, MD_U8, m, s, s, 3);
        b->image2 = MD_TENSOR(s2 > 0 ? pixels + p->crop : NULL, MD_U8, m, s2, s2, 3);
        b->sample = sample + i * m;
        b->label = label + i * m;
    }
    return MD_OK;
}

static md_status fill_benches(md_loader *l, const plan *p)
{
    MD_NEW(l->bench, p->benches, "loader");
    l->n_benches = p->benches;
    for (int i = 0; i < p->benches; i++) {
        bench *w = &l->bench[i];
        w->loader = l;
        MD_TRY(md_decoder_create(&w->decoder, p->max_pixels));
        MD_TRY(md_resizer_create(&w->tools.resizer, p->max_side,
                                 MD_MAX(l->a.rule.size, l->a.rule.size2)));
        MD_NEW(w->bytes, l->a.source.max_bytes, "loader");
        w->tools.scratch = md_alloc(md_augment_scratch(&l->a.rule), "loader");
        if (!w->tools.scratch)
            return MD_ERR_MEMORY;
    }
    return MD_OK;
}

/* Signals stay with the main thread. */
static md_status start_workers(md_loader *l)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int n = worker_count(&l->a), err = 0;
    for (int i = 0; i < n && err == 0; i++) {
        err = md_fault("loader.thread")
                  ? EAGAIN
                  : pthread_create(&l->bench[i].thread, NULL, worker, &l->bench[i]);
        l->bench[i].running = err == 0;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (err)
        MD_FAIL(MD_ERR_MEMORY, "cannot start a loader thread (data.workers = %d): %s", n,
                strerror(err));
    return MD_OK;
}

md_status md_loader_create(md_loader **out, const md_loader_args *a)
{
    *out = NULL;
    MD_TRY(check_args(a));
    plan p = make_plan(a);
    md_loader *l;
    MD_NEW(l, 1, "loader");
    l->a = *a;
    l->order = (md_order){.seed = a->rule.seed, .n = a->source.count, .batch = a->batch};
    l->micros = a->batch / a->dp_size / a->micro_batch;
    l->n_slots = p.slots;
    l->wanted = -1;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->work, NULL);
    pthread_cond_init(&l->ready, NULL);
    md_status st = fill_slots(l, &p);
    if (st == MD_OK)
        st = fill_benches(l, &p);
    if (st == MD_OK)
        st = start_workers(l);
    if (st != MD_OK) {
        md_loader_destroy(l);
        return st;
    }
    *out = l;
    return MD_OK;
}

void md_loader_destroy(md_loader *l)
{
    if (!l)
        return;
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_cond_broadcast(&l->work);
    pthread_mutex_unlock(&l->lock);
    for (int i = 0; i < l->n_benches; i++) {
        bench *w = &l->bench[i];
        if (w->running)
            pthread_join(w->thread, NULL);
        md_decoder_free(w->decoder);
        md_resizer_free(w->tools.resizer);
        md_free(w->bytes);
        md_free(w->tools.scratch);
    }
    pthread_mutex_destroy(&l->lock);
    pthread_cond_destroy(&l->work);
    pthread_cond_destroy(&l->ready);
    md_free(l->bench);
    md_free(l->slot);
    md_free(l->pixels);
    md_free(l->ids);
    md_free(l->note);
    md_free(l);
}

/* ---- taking ---- */

static void keep_notes(md_loader *l, const slot *s)
{
    for (int i = 0; i < s->noted && l->note_next - l->note_first < NOTES; i++)
        l->note[l->note_next++ % NOTES] = s->note[i];
}

md_status md_loader_take(md_loader *l, int64_t step, int64_t micro, const md_batch **out,
                         double *wait)
{
    double start = md_now();
    const char *was = md_phase("data.wait");
    int64_t q = (step - l->a.start_step) * l->micros + micro;
    slot *s = &l->slot[q % l->n_slots];
    pthread_mutex_lock(&l->lock);
    MD_ASSERT(q == l->wanted + 1 && micro < l->micros, "batch %lld of step %lld out of order",
              (long long)micro, (long long)step);
    MD_ASSERT(s->state != SLOT_TAKEN, "batch %lld was not released", (long long)(q - l->n_slots));
    l->wanted = q;
    if (l->a.sync)
        pthread_cond_broadcast(&l->work);
    while (!(s->state == SLOT_BEGUN && l->next_batch > q && s->done == own_images(&l->a))) {
        md_phase("data.wait"); /* an image more, when this thread makes them */
        if (l->a.source.main_thread)
            run_item(&l->bench[0]);
        else
            pthread_cond_wait(&l->ready, &l->lock);
    }
    s->state = SLOT_TAKEN;
    pthread_mutex_unlock(&l->lock);
    md_phase(was);
    if (wait)
        *wait += md_now() - start;
    keep_notes(l, s);
    if (s->status != MD_OK)
        MD_FAIL(s->status, "%s", s->reason);
    *out = &s->batch;
    return MD_OK;
}

void md_loader_release(md_loader *l, const md_batch *b)
{
    slot *s = (slot *)(uintptr_t)b;
    pthread_mutex_lock(&l->lock);
    MD_ASSERT(s->state == SLOT_TAKEN, "batch released twice");
    s->state = SLOT_FREE;
    pthread_cond_broadcast(&l->work);
    pthread_mutex_unlock(&l->lock);
}

bool md_loader_next_bad(md_loader *l, md_bad_image *out)
{
    if (l->note_first == l->note_next)
        return false;
    *out = l->note[l->note_first++ % NOTES];
    return true;
}
