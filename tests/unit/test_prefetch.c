/* The loader: every layout sees the same pictures, damage is replaced and counted alike, limits
 * stop the run, and it can be shut down at any moment. Pictures are raw and made up, no file is
 * needed. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/convert.h"
#include "src/log.h"
#include "tests/golden/image_golden.h"
#include "tests/unit/fake_source.h"

/* What a step holds, by the definition. */
typedef struct step_data {
    int64_t sample[BATCH], bad;
    int32_t label[BATCH];
    uint8_t crop[BATCH][SIDE * SIDE * 3], crop2[BATCH][SIDE2 * SIDE2 * 3];
} step_data;

static void expect_step(const md_loader_args *a, int64_t step, step_data *s)
{
    md_order order = {a->rule.seed, N, BATCH};
    const fake *f = a->source.ctx;
    md_decoder *d;
    md_resizer *r;
    assert_int_equal(md_decoder_create(&d, W * H), MD_OK);
    assert_int_equal(md_resizer_create(&r, W, SIDE), MD_OK);
    md_augment_tools tools = {r, malloc(md_augment_scratch(&a->rule) + 1)};
    s->bad = 0;
    for (int b = 0; b < BATCH; b++) {
        md_position at = md_position_at(&order, step, b);
        int64_t sample = at.sample, k = 0;
        for (; is_bad(f, sample); k++)
            sample = md_permute(order.seed, at.epoch, N, (at.place + N / 2 + k) % N);
        s->bad += k > 0;
        uint8_t bytes[W * H * 3];
        size_t n;
        fake good = {0};
        md_image im;
        md_image_kind kind;
        int w, h;
        assert_int_equal(fake_read(&good, sample, bytes, sizeof bytes, &n), MD_OK);
        fake_describe(NULL, sample, &kind, &w, &h, &s->label[b]);
        assert_int_equal(md_decode_image(d, &(md_coded){kind, bytes, n, w, h}, &im), MD_OK);
        md_augment_draw draw = md_augment_choose(&a->rule, at.epoch, (uint64_t)sample, w, h);
        assert_int_equal(md_augment_image(&a->rule, &draw, tools, &im, s->crop[b], s->crop2[b]),
                         MD_OK);
        s->sample[b] = sample;
    }
    free(tools.scratch);
    md_decoder_free(d);
    md_resizer_free(r);
}

/* Runs `steps` steps on every rank of a layout and compares with the definition. */
static void check_layout(md_loader_args a, int ranks, int64_t micro_batch, int64_t start, int steps)
{
    static step_data want[32];
    int64_t got_bad[32] = {0};
    for (int s = 0; s < steps; s++)
        expect_step(&a, start + s, &want[s]);
    a.dp_size = ranks;
    a.micro_batch = micro_batch;
    a.start_step = start;
    int64_t micros = BATCH / ranks / micro_batch;
    for (a.dp_rank = 0; a.dp_rank < ranks; a.dp_rank++) {
        md_loader *l;
        assert_int_equal(md_loader_create(&l, &a), MD_OK);
        for (int64_t q = 0; q < steps * micros; q++) {
            const step_data *w = &want[q / micros];
            int64_t first = a.dp_rank * BATCH / ranks + q % micros * micro_batch;
            const md_batch *b;
            double wait = 1;
            assert_int_equal(md_loader_take(l, start + q / micros, q % micros, &b, &wait), MD_OK);
            assert_true(wait >= 1 && b->image.dim[0] == micro_batch && b->image2.dim[1] == SIDE2);
            assert_int_equal(b->epoch, (start + q / micros) / (N / BATCH));
            size_t m = (size_t)micro_batch;
            assert_memory_equal(b->sample, w->sample + first, m * sizeof *b->sample);
            assert_memory_equal(b->label, w->label + first, m * sizeof *b->label);
            assert_memory_equal(b->image.data, w->crop[first], m * sizeof *w->crop);
            assert_memory_equal(b->image2.data, w->crop2[first], m * sizeof *w->crop2);
            got_bad[q / micros] += b->bad;
            md_loader_release(l, b);
        }
        md_loader_destroy(l);
    }
    for (int s = 0; s < steps; s++)
        assert_int_equal(got_bad[s], want[s].bad);
}

static void layouts_agree(void **state)
{
    (void)state;
    fake f = {0};
    md_loader_args a = args_of(&f);
    check_layout(a, 1, 12, 0, 20); /* more than two epochs */
    check_layout(a, 1, 4, 0, 20);
    check_layout(a, 2, 3, 5, 9);
    check_layout(a, 4, 1, 7, 3);
    check_layout(a, 12, 1, 0, 2);
    a.workers = 1;
    a.depth = 1;
    check_layout(a, 1, 6, 0, 10);
    a.sync = true;
    check_layout(a, 2, 2, 0, 10);
    a.rule.randaugment = (md_randaugment_rule){
        .seed = 5, .ops = 3, .probability = 0.7, .magnitude = 9, .deviation = 0.5};
    check_layout(a, 4, 3, 0, 10);
    a.source.main_thread = true;
    check_layout(a, 3, 2, 0, 10);
}

static void damage_is_replaced_alike(void **state)
{
    (void)state;
    fake f = {.bad_every = 10};
    md_loader_args a = args_of(&f);
    check_layout(a, 1, 12, 0, 16);
    check_layout(a, 3, 2, 0, 16);
    a.source.main_thread = true;
    check_layout(a, 2, 6, 3, 5);
}

/* An epoch shows an image once at most, and every image in some epoch. */
static void epochs_are_permutations(void **state)
{
    (void)state;
    fake f = {0};
    md_loader_args a = args_of(&f);
    md_loader *l;
    assert_int_equal(md_loader_create(&l, &a), MD_OK);
    int seen[N] = {0};
    for (int64_t s = 0; s < 3 * (N / BATCH); s++) {
        const md_batch *b;
        assert_int_equal(md_loader_take(l, s, 0, &b, NULL), MD_OK);
        for (int j = 0; j < BATCH; j++)
            seen[b->sample[j]]++;
        md_loader_release(l, b);
        int epochs = (int)(s / (N / BATCH)) + 1;
        for (int i = 0; i < N; i++)
            assert_true(seen[i] <= epochs);
    }
    for (int i = 0; i < N; i++)
        assert_true(seen[i] > 0);
    md_loader_destroy(l);
}

static void counts_and_notes(void **state)
{
    (void)state;
    fake f = {.bad_every = 10};
    md_loader_args a = args_of(&f);
    md_loader *l;
    assert_int_equal(md_loader_create(&l, &a), MD_OK);
    int64_t bad = 0, notes = 0;
    md_status st = MD_OK;
    for (int64_t s = 0; s < 8 && st == MD_OK; s++) { /* one epoch: about 10 bad of 96 */
        const md_batch *b;
        st = md_loader_take(l, s, 0, &b, NULL);
        if (st == MD_OK) {
            bad += b->bad;
            md_loader_release(l, b);
        }
    }
    md_bad_image n;
    while (md_loader_next_bad(l, &n)) {
        assert_int_equal(n.sample % 10, 3);
        assert_int_equal(n.status, MD_ERR_DATA);
        assert_non_null(strstr(n.reason, "hash of image"));
        notes++;
    }
    assert_true(bad > 3 && notes >= bad);
    md_loader_destroy(l);
}

static void nothing_usable_ends(void **state)
{
    (void)state;
    fake f = {.bad_every = 1};
    md_loader_args a = args_of(&f);
    for (int k = 0; k < 2; k++) {
        a.source.main_thread = k == 1;
        md_loader *l;
        const md_batch *b;
        assert_int_equal(md_loader_create(&l, &a), MD_OK);
        assert_int_equal(md_loader_take(l, 0, 0, &b, NULL), MD_ERR_DATA);
        assert_non_null(strstr(md_error_text(), "no usable picture"));
        md_loader_destroy(l);
    }
}

static void bad_arguments(void **state)
{
    (void)state;
    fake f = {0};
    md_loader_args a = args_of(&f);
    md_loader *l;
    a.batch = N + 1;
    assert_int_equal(md_loader_create(&l, &a), MD_ERR_CONFIG);
    assert_non_null(strstr(md_error_text(), "103"));
    a = args_of(&f);
    a.dp_size = 5;
    assert_int_equal(md_loader_create(&l, &a), MD_ERR_CONFIG);
    a.dp_size = 2;
    a.micro_batch = 4;
    assert_int_equal(md_loader_create(&l, &a), MD_ERR_CONFIG);
    assert_null(l);
}

/* Ends at any moment, and gives all memory back; the plan is what is held. */
static void shutdown_and_memory(void **state)
{
    (void)state;
    fake f = {.slow = true};
    md_loader_args a = args_of(&f);
    size_t before = md_alloc_now();
    for (int k = 0; k < 24; k++) {
        md_loader *l;
        const md_batch *b;
        a.depth = 1 + k % 3;
        a.rule.randaugment.ops = k % 2;
        assert_int_equal(md_loader_create(&l, &a), MD_OK);
        double held = (double)(md_alloc_now() - before), planned = (double)md_loader_bytes(&a);
        assert_true(held >= planned && held < planned * 1.05 + 65536);
        for (int s = 0; s < k % 4; s++) {
            assert_int_equal(md_loader_take(l, s, 0, &b, NULL), MD_OK);
            if (s < k % 4 - 1)
                md_loader_release(l, b); /* the last one stays out */
        }
        nanosleep(&(struct timespec){.tv_nsec = 300000 * k}, NULL);
        md_loader_destroy(l);
        assert_int_equal(md_alloc_now(), before);
    }
}

/* depth batches are made ahead and no more; sync makes none. */
static void loads_ahead(void **state)
{
    (void)state;
    for (int k = 0; k < 2; k++) {
        fake f = {0};
        md_loader_args a = args_of(&f);
        a.sync = k == 1;
        md_loader *l;
        const md_batch *b;
        assert_int_equal(md_loader_create(&l, &a), MD_OK);
        assert_int_equal(md_loader_take(l, 0, 0, &b, NULL), MD_OK);
        int want = k == 1 ? BATCH : BATCH * (a.depth + 1);
        for (int t = 0; t < 2000 && atomic_load(&f.reads) < want; t++)
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
        assert_int_equal(atomic_load(&f.reads), want);
        md_loader_destroy(l);
    }
}

/* ---- a real store: the golden pictures, packed ---- */

#define GOLDEN ((int)MD_COUNT(golden_coded))

static void pack_store(const char *dir, const char *store, md_comm *c)
{
    char path[256];
    for (int i = 0; i < GOLDEN; i++) {
        snprintf(path, sizeof path, "%s/%s.jpg", dir, golden_coded[i].name);
        FILE *f = fopen(path, "wb");
        assert_non_null(f);
        assert_int_equal(fwrite(golden_coded[i].bytes, 1, golden_coded[i].n, f), golden_coded[i].n);
        fclose(f);
    }
    md_convert_source source = {dir, "train"};
    md_convert_summary sum;
    md_convert_args a = {.out = store, .sources = &source, .n_sources = 1};
    if (md_convert(&a, c, &sum) != MD_OK)
        fail_msg("%s", md_error_text());
    for (int i = 0; i < GOLDEN; i++) {
        snprintf(path, sizeof path, "%s/%s.jpg", dir, golden_coded[i].name);
        unlink(path);
    }
    rmdir(dir);
}

/* One epoch of the store as one batch; returns the images replaced. */
static int64_t load_store(const char *store, bool hdf5, uint8_t *crop, md_bad_image *note)
{
    fake none = {0};
    md_loader_args a = args_of(&none);
    md_dataset *d;
    md_loader *l;
    const md_batch *b;
    assert_int_equal(md_dataset_open(store, "train", NULL, &d), MD_OK);
    assert_int_equal(md_dataset_count(d), GOLDEN);
    if (hdf5)
        assert_int_equal(md_dataset_use_hdf5(d, NULL), MD_OK);
    a.source = md_dataset_source(d, hdf5);
    a.batch = a.micro_batch = GOLDEN;
    assert_int_equal(md_loader_create(&l, &a), MD_OK);
    if (md_loader_take(l, 0, 0, &b, NULL) != MD_OK)
        fail_msg("%s", md_error_text());
    memcpy(crop, b->image.data, md_tensor_bytes(&b->image));
    int64_t bad = b->bad;
    assert_int_equal(md_loader_next_bad(l, note), bad > 0);
    md_loader_destroy(l);
    md_dataset_close(d);
    return bad;
}

static void flip_byte(const char *store, const uint8_t *bytes, size_t n)
{
    FILE *f = fopen(store, "r+b");
    assert_non_null(f);
    static uint8_t all[1 << 20];
    size_t size = fread(all, 1, sizeof all, f);
    const uint8_t *p = memmem(all, size, bytes, n);
    assert_non_null(p);
    assert_int_equal(fseek(f, (long)(p - all) + (long)n / 2, SEEK_SET), 0);
    fputc(p[n / 2] ^ 1, f);
    fclose(f);
}

static void stores(void **state)
{
    (void)state;
    char dir[64] = "/tmp/md_prefetch_XXXXXX", store[128];
    static uint8_t crop[3][GOLDEN * SIDE * SIDE * 3];
    md_bad_image note;
    md_comm *c;
    assert_non_null(mkdtemp(dir));
    snprintf(store, sizeof store, "%s.h5", dir);
    assert_int_equal(md_comm_self(&c), MD_OK);
    pack_store(dir, store, c);
    assert_int_equal(load_store(store, false, crop[0], &note), 0);
    assert_int_equal(load_store(store, true, crop[1], &note), 0);
    assert_memory_equal(crop[0], crop[1], sizeof crop[0]);

    /* one bit of one picture turns: its hash tells, another stands for it */
    flip_byte(store, golden_coded[0].bytes, golden_coded[0].n);
    assert_int_equal(load_store(store, false, crop[2], &note), 1);
    assert_int_equal(note.status, MD_ERR_DATA);
    int differ = 0;
    for (int i = 0; i < GOLDEN; i++)
        differ += memcmp(crop[0] + i * SIDE * SIDE * 3, crop[2] + i * SIDE * SIDE * 3,
                         SIDE * SIDE * 3) != 0;
    assert_int_equal(differ, 1);
    unlink(store);
    md_comm_free(c);
}

int main(void)
{
    md_log_set(MD_LOG_ERROR);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layouts_agree),
        cmocka_unit_test(damage_is_replaced_alike),
        cmocka_unit_test(epochs_are_permutations),
        cmocka_unit_test(counts_and_notes),
        cmocka_unit_test(nothing_usable_ends),
        cmocka_unit_test(bad_arguments),
        cmocka_unit_test(shutdown_and_memory),
        cmocka_unit_test(loads_ahead),
        cmocka_unit_test(stores),
    };
    return cmocka_run_group_tests_name("prefetch", tests, NULL, NULL);
}
