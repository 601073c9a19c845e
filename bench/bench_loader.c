/* bench_loader: what an image costs on the way from its file to a training crop.
 *
 *   bench_loader [key=value ...] STORE.h5 | FILE...
 *
 *   size=224 size2=0   sides of the crops        images=2000   images a measurement takes
 *   workers=1          loader threads            micro=16      images of a micro-batch
 *   randaugment=0      ops of RandAugment, instead of jitter
 *   compute=0          milliseconds in which OpenMP threads keep every core busy between two
 * batches
 *
 * Times of the stages are CPU time of one thread, so that a shared machine does not disturb them;
 * images/s/core is their inverse. The last lines are the loader end to end: wall time, CPU time of
 * the whole process less the pretended compute, and the share of the time spent waiting for data.
 */
#include "io/prefetch.h"

#include <fcntl.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef struct options {
    int size, size2, workers, micro, images, randaugment;
    double compute;
} options;

static double cpu_seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double thread_seconds(void)
{
    return cpu_seconds(CLOCK_THREAD_CPUTIME_ID);
}

static int fail(md_status st)
{
    fprintf(stderr, "bench_loader: %s\n", md_error_text());
    return (int)st;
}

/* ---- image files as a source ---- */

typedef struct file_list {
    char **path;
} file_list;

static md_status file_read(void *ctx, int64_t i, void *buf, size_t cap, size_t *len)
{
    const file_list *f = ctx;
    int fd = open(f->path[i], O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : pread(fd, buf, cap, 0);
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        MD_FAIL(MD_ERR_NOINPUT, "cannot read %s", f->path[i]);
    *len = (size_t)n;
    return MD_OK;
}

static void file_describe(void *ctx, int64_t i, md_image_kind *kind, int *w, int *h, int32_t *label)
{
    (void)ctx;
    (void)i;
    *kind = MD_IMAGE_JPEG; /* the content decides */
    *w = *h = 0;
    *label = -1;
}

static md_source files_source(file_list *f, int n)
{
    md_source s = {
        .ctx = f, .count = n, .max_pixels = 1 << 20, .read = file_read, .describe = file_describe};
    for (int i = 0; i < n; i++) {
        struct stat st;
        if (stat(f->path[i], &st) == 0 && (size_t)st.st_size > s.max_bytes)
            s.max_bytes = (size_t)st.st_size;
    }
    return s;
}

/* ---- measurements ---- */

static md_augment_rule rule_of(const options *o)
{
    return (md_augment_rule){.seed = 1,
                             .size = o->size,
                             .size2 = o->size2,
                             .crop_min = 0.2,
                             .crop_max = 1,
                             .ratio_min = 0.75,
                             .ratio_max = 4.0 / 3,
                             .flip = 0.5,
                             .jitter = o->randaugment > 0 ? 0 : 0.4,
                             .randaugment = {.seed = 1,
                                             .ops = o->randaugment,
                                             .probability = 0.5,
                                             .magnitude = 9,
                                             .deviation = 0.5,
                                             .fill = {124, 116, 104}}};
}

enum { READ, DECODE, JITTER, RESIZE, RESIZE2, RANDAUGMENT, STAGES };

typedef struct tools {
    md_decoder *decoder;
    md_resizer *resizer;
    uint8_t *bytes, *crop;
    void *scratch;
} tools;

static md_status one_image(const md_source *s, const md_augment_rule *rule, tools *t, int64_t k,
                           double seconds[STAGES])
{
    md_coded in = {.bytes = t->bytes};
    md_image im;
    int32_t label;
    int64_t i = md_permute(1, (uint32_t)(k / s->count), s->count, k % s->count);
    double at = thread_seconds(), now;
#define LAP(stage) (now = thread_seconds(), seconds[stage] += now - at, at = now)
    s->describe(s->ctx, i, &in.kind, &in.w, &in.h, &label);
    MD_TRY(s->read(s->ctx, i, t->bytes, s->max_bytes, &in.n));
    LAP(READ);
    MD_TRY(md_decode_image(t->decoder, &in, &im));
    LAP(DECODE);
    md_augment_draw draw =
        md_augment_choose(rule, (uint32_t)(k / s->count), (uint64_t)i, im.w, im.h);
    if (draw.jitter)
        md_augment_jitter(&im, &draw);
    LAP(JITTER);
    MD_TRY(md_resize_box(t->resizer, &im, draw.box, rule->size, rule->size, t->crop));
    LAP(RESIZE);
    if (rule->size2)
        MD_TRY(md_resize_box(t->resizer, &im, draw.box, rule->size2, rule->size2, t->crop));
    LAP(RESIZE2);
    int last = rule->size2 ? rule->size2 : rule->size;
    md_randaugment_apply(&draw.randaugment, rule->randaugment.fill, t->crop, last, t->scratch);
    LAP(RANDAUGMENT);
#undef LAP
    return MD_OK;
}

static md_status stages(const md_source *s, const options *o)
{
    static const char *const name[STAGES] = {"read",   "decode",  "jitter",
                                             "resize", "resize2", "randaugment"};
    md_augment_rule rule = rule_of(o);
    size_t side = (size_t)MD_MAX(o->size, o->size2);
    tools t;
    double seconds[STAGES] = {0}, warm[STAGES], total = 0;
    MD_TRY(md_decoder_create(&t.decoder, 0));
    MD_TRY(md_resizer_create(&t.resizer, 512, (int)side));
    MD_NEW(t.bytes, s->max_bytes, "bench");
    MD_NEW(t.crop, side * side * 3, "bench");
    t.scratch = md_alloc(md_augment_scratch(&rule), "bench");
    if (!t.scratch)
        return MD_ERR_MEMORY;
    for (int64_t k = 0; k < MD_MIN(o->images, s->count); k++)
        MD_TRY(one_image(s, &rule, &t, k, warm));
    for (int64_t k = 0; k < o->images; k++)
        MD_TRY(one_image(s, &rule, &t, k, seconds));
    printf("%-11s %10s\n", "stage", "ms/image");
    for (int i = 0; i < STAGES; i++) {
        printf("%-11s %10.4f\n", name[i], seconds[i] / o->images * 1e3);
        total += seconds[i];
    }
    printf("%-11s %10.4f   %.0f images/s/core\n", "all", total / o->images * 1e3,
           o->images / total);
    md_decoder_free(t.decoder);
    md_resizer_free(t.resizer);
    md_free(t.bytes);
    md_free(t.crop);
    md_free(t.scratch);
    return MD_OK;
}

/* The store's checked read against bare pread calls of the same lengths in the same file. */
static md_status reads(md_dataset *d, const char *path, const options *o)
{
    int64_t n = md_dataset_count(d), *start;
    size_t cap = md_dataset_max_bytes(d), len, total = 0;
    uint8_t *buf;
    double best[2] = {1e30, 1e30};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    MD_NEW(buf, cap, "bench");
    MD_NEW(start, n, "bench");
    for (int64_t i = 1; i < n; i++)
        start[i] = start[i - 1] + (int64_t)md_dataset_bytes(d, i - 1);
    for (int round = 0; round < 10; round++) {
        double at = thread_seconds();
        for (int64_t k = 0; k < o->images; k++) {
            int64_t i = md_permute(1, 0, n, k % n);
            MD_TRY(md_dataset_read(d, i, buf, cap, &len));
        }
        double mid = thread_seconds();
        for (int64_t k = 0; k < o->images; k++) {
            int64_t i = md_permute(1, 0, n, k % n);
            total += (size_t)pread(fd, buf, md_dataset_bytes(d, i), start[i]);
        }
        best[0] = MD_MIN(best[0], mid - at);
        best[1] = MD_MIN(best[1], thread_seconds() - mid);
    }
    printf("read       %10.4f   bare pread %.4f ms/image, ratio %.2f, %.0f bytes/image\n",
           best[0] / o->images * 1e3, best[1] / o->images * 1e3, best[0] / best[1],
           (double)total / 10 / o->images);
    close(fd);
    md_free(buf);
    md_free(start);
    return MD_OK;
}

/* Keeps all cores busy for `seconds` of wall time; returns the CPU time that took. */
static double pretend(double seconds)
{
    double used = 0;
#pragma omp parallel reduction(+ : used)
    {
        double end = md_now() + seconds, at = thread_seconds();
        while (md_now() < end)
            ;
        used += thread_seconds() - at;
    }
    return used;
}

static md_status whole(const md_source *s, const options *o)
{
    md_loader_args a = {
        .source = *s,
        .rule = rule_of(o),
        .batch = o->micro,
        .dp_size = 1,
        .micro_batch = o->micro,
        .workers = o->workers,
        .depth = 2,
    };
    md_loader *l;
    const md_batch *b;
    MD_TRY(md_loader_create(&l, &a));
    int64_t steps = MD_MAX(o->images / o->micro, 4), bad = 0;
    double waited = 0, begin = 0, cpu = 0, busy = 0;
    for (int64_t k = 0; k < steps + 2; k++) {
        if (k == 2) { /* the ring is full for the first time */
            begin = md_now();
            cpu = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID);
            waited = busy = 0;
        }
        MD_TRY(md_loader_take(l, k, 0, &b, &waited));
        bad += b->bad;
        md_loader_release(l, b);
        if (o->compute > 0)
            busy += pretend(o->compute * 1e-3);
    }
    double wall = md_now() - begin, images = (double)(steps * o->micro);
    cpu = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu - busy;
    printf("loader     %10.4f   %.0f images/s/core by CPU time; %.0f images/s on %d workers\n",
           cpu / images * 1e3, images / cpu, images / wall, o->workers);
    printf("data wait  %9.2f%%   of %.2f s in %lld batches of %d; %lld bad; %.1f MiB held\n",
           waited / wall * 100, wall, (long long)steps, o->micro, (long long)bad,
           (double)md_loader_bytes(&a) / 1048576);
    md_loader_destroy(l);
    return MD_OK;
}

static bool parse_option(options *o, const char *arg)
{
    const struct {
        const char *key;
        int *value;
    } keys[] = {{"size=", &o->size},   {"size2=", &o->size2},   {"workers=", &o->workers},
                {"micro=", &o->micro}, {"images=", &o->images}, {"randaugment=", &o->randaugment}};
    if (strncmp(arg, "compute=", 8) == 0) {
        o->compute = strtod(arg + 8, NULL);
        return true;
    }
    for (size_t i = 0; i < MD_COUNT(keys); i++)
        if (strncmp(arg, keys[i].key, strlen(keys[i].key)) == 0) {
            *keys[i].value = (int)strtol(arg + strlen(keys[i].key), NULL, 10);
            return true;
        }
    return false;
}

static md_status measure(const options *o, int n, char **paths)
{
    file_list files = {paths};
    md_dataset *d = NULL;
    md_source s;
    size_t len = strlen(paths[0]);
    bool store = n == 1 && len > 3 && strcmp(paths[0] + len - 3, ".h5") == 0;
    if (store) {
        MD_TRY(md_dataset_open(paths[0], "train", NULL, &d));
        s = md_dataset_source(d, false);
    } else {
        s = files_source(&files, n);
    }
    MD_TRY(stages(&s, o));
    if (store)
        MD_TRY(reads(d, paths[0], o));
    MD_TRY(whole(&s, o));
    md_dataset_close(d);
    return MD_OK;
}

int main(int argc, char **argv)
{
    options o = {.size = 224, .workers = 1, .micro = 16, .images = 2000};
    int first = 1;
    while (first < argc && parse_option(&o, argv[first]))
        first++;
    if (first == argc || o.size < 1 || o.micro < 1 || o.images < 1 || o.workers < 1 ||
        o.randaugment < 0 || o.randaugment > MD_RANDAUGMENT_MAX) {
        fprintf(stderr, "usage: bench_loader [size=224] [size2=0] [workers=1] [micro=16] "
                        "[images=2000] [randaugment=0] [compute=0] STORE.h5 | FILE...\n");
        return MD_ERR_USAGE;
    }
    md_status st = measure(&o, argc - first, argv + first);
    return st == MD_OK ? 0 : fail(st);
}
