/* The image store: what is read back, what is refused, and the order of images. Serial, no MPI. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define XXH_INLINE_ALL /* no library to link, compiled for this machine */
#include <xxhash.h>

#include "io/dataset.h"
#include "io/h5.h"
#include "src/rng.h"

#define N 7

static char dir[64], path[128];

/* A small store of random grey images; fields are spoilt one at a time by the refusal table. */
typedef struct store {
    uint64_t offset[N + 1], xxh3[N], name_offset[N + 1];
    int32_t label[N];
    uint16_t wh[N][2];
    uint8_t kind[N], data[4096], name[N * 8];
    int64_t version;
    const char *format;
    const char *split;
    hsize_t labels; /* rows written of label */
    hid_t xxh3_type;
    bool chunked;
    long cut; /* bytes taken off the file's end */
} store;

static void store_fill(store *s)
{
    *s = (store){.version = 1, .format = MD_DATASET_FORMAT, .split = "train", .labels = N};
    s->xxh3_type = H5T_STD_U64LE;
    md_rng r = md_rng_at(1, MD_RNG_TEST, 0, 0);
    for (int i = 0; i < N; i++) {
        s->wh[i][0] = (uint16_t)(3 + i), s->wh[i][1] = (uint16_t)(20 - i);
        uint64_t bytes = (uint64_t)s->wh[i][0] * s->wh[i][1];
        s->offset[i + 1] = s->offset[i] + bytes;
        for (uint64_t k = s->offset[i]; k < s->offset[i + 1]; k++)
            s->data[k] = (uint8_t)md_rng_u32(&r);
        s->xxh3[i] = XXH3_64bits(s->data + s->offset[i], bytes);
        s->label[i] = i % 3 - 1;
        s->kind[i] = MD_IMAGE_GRAY8;
        s->name_offset[i + 1] =
            s->name_offset[i] + (uint64_t)sprintf((char *)s->name + s->name_offset[i], "a/%d", i);
    }
}

static void put(hid_t g, const char *name, hid_t type, int rank, hsize_t rows, const void *buf)
{
    hsize_t dim[2] = {rows, 2};
    hid_t d;
    assert_int_equal(md_h5_dset_create(g, name, type, rank, dim, &d), MD_OK);
    assert_int_equal(md_h5_write_all(d, type, buf), MD_OK);
    md_h5_release(d);
}

static void put_chunked(hid_t g, const char *name, hsize_t rows, const void *buf)
{
    hid_t space = H5Screate_simple(1, &rows, NULL), p = H5Pcreate(H5P_DATASET_CREATE);
    hsize_t chunk = 64;
    H5Pset_chunk(p, 1, &chunk);
    hid_t d = H5Dcreate2(g, name, H5T_STD_U8LE, space, H5P_DEFAULT, p, H5P_DEFAULT);
    assert_true(H5Dwrite(d, H5T_STD_U8LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, buf) >= 0);
    md_h5_release(d), md_h5_release(p), md_h5_release(space);
}

static void store_write(const store *s)
{
    hid_t f, g;
    const char *classes[2] = {"cat", "elephant"};
    assert_int_equal(md_h5_create(path, NULL, &f), MD_OK);
    md_h5_attr_write_str(f, "format", s->format);
    md_h5_attr_write_i64(f, "version", s->version);
    md_h5_attr_write_i64(f, "num_classes", 2);
    md_h5_group_create(f, "classes", &g);
    assert_int_equal(md_h5_strings_write(g, "name", 2, classes), MD_OK);
    md_h5_release(g);
    md_h5_group_create(f, s->split, &g);
    put(g, "offset", H5T_STD_U64LE, 1, N + 1, s->offset);
    put(g, "label", H5T_STD_I32LE, 1, s->labels, s->label);
    put(g, "xxh3", s->xxh3_type, 1, N, s->xxh3);
    put(g, "wh", H5T_STD_U16LE, 2, N, s->wh);
    put(g, "kind", H5T_STD_U8LE, 1, N, s->kind);
    put(g, "name", H5T_STD_U8LE, 1, s->name_offset[N], s->name);
    put(g, "name_offset", H5T_STD_U64LE, 1, N + 1, s->name_offset);
    if (s->chunked)
        put_chunked(g, "data", s->offset[N], s->data);
    else
        put(g, "data", H5T_STD_U8LE, 1, s->offset[N], s->data);
    md_h5_release(g);
    assert_int_equal(md_h5_close(&f), MD_OK);
    if (s->cut) {
        FILE *t = fopen(path, "rb");
        fseek(t, 0, SEEK_END);
        long size = ftell(t);
        fclose(t);
        assert_int_equal(truncate(path, size - s->cut), 0);
    }
}

static md_dataset *open_good(store *s)
{
    md_dataset *d;
    store_fill(s);
    store_write(s);
    md_status st = md_dataset_open(path, "train", NULL, &d);
    if (st != MD_OK || md_dataset_use_hdf5(d, NULL) != MD_OK)
        fail_msg("%s", md_error_text());
    return d;
}

static void check_read(const md_dataset *d, const store *s, int i, bool hdf5)
{
    uint8_t buf[1024];
    size_t len = 0;
    md_status st = hdf5 ? md_dataset_read_hdf5(d, i, buf, sizeof buf, &len)
                        : md_dataset_read(d, i, buf, sizeof buf, &len);
    assert_int_equal(st, MD_OK);
    assert_int_equal(len, s->offset[i + 1] - s->offset[i]);
    assert_memory_equal(buf, s->data + s->offset[i], len);
}

static void test_fault_sites(void **state)
{
    (void)state;
    store s;
    md_dataset *d = open_good(&s);
    uint8_t buf[1024];
    size_t len;
    check_read(d, &s, 0, false); /* MD_FAULT: its first attempt fails, a later one succeeds */
    assert_int_equal(md_dataset_read(d, 1, buf, sizeof buf, &len), MD_ERR_IO);
    assert_non_null(strstr(md_error_text(), "image 1"));
    check_read(d, &s, 1, false);
    md_dataset_close(d);
}

static void test_reads_back(void **state)
{
    (void)state;
    store s;
    md_dataset *d = open_good(&s);
    char name[16], want[16], cut[4];
    assert_int_equal(md_dataset_count(d), N);
    assert_int_equal(md_dataset_classes(d), 2);
    assert_string_equal(md_dataset_class_name(d, 0), "cat");
    assert_string_equal(md_dataset_class_name(d, 1), "elephant");
    size_t most = 0;
    for (int i = 0; i < N; i++) {
        int w, h;
        check_read(d, &s, i, false);
        check_read(d, &s, i, true);
        md_dataset_size(d, i, &w, &h);
        assert_true(w == s.wh[i][0] && h == s.wh[i][1]);
        assert_int_equal(md_dataset_label(d, i), i % 3 - 1);
        assert_int_equal(md_dataset_kind(d, i), MD_IMAGE_GRAY8);
        most = MD_MAX(most, md_dataset_bytes(d, i));
        snprintf(want, sizeof want, "a/%d", i);
        assert_string_equal(md_dataset_name(d, i, name, sizeof name), want);
    }
    assert_int_equal(md_dataset_max_bytes(d), most);
    assert_int_equal(md_dataset_max_pixels(d), most);
    assert_string_equal(md_dataset_name(d, 3, cut, sizeof cut - 1), "a/");
    md_dataset_close(d);
}

static void test_hash_is_identity(void **state)
{
    (void)state;
    store s;
    md_dataset *d = open_good(&s), *e;
    uint64_t first = md_dataset_hash(d);
    md_dataset_close(d);
    s.label[2] = -1 - s.label[2] + 1; /* another valid label */
    store_write(&s);
    assert_int_equal(md_dataset_open(path, "train", NULL, &e), MD_OK);
    assert_true(md_dataset_hash(e) != first);
    md_dataset_close(e);
}

static void test_flipped_bit_is_found(void **state)
{
    (void)state;
    store s;
    md_dataset *d = open_good(&s);
    FILE *f = fopen(path, "r+b");
    static uint8_t all[1 << 22];
    size_t size = fread(all, 1, sizeof all, f), at = 0;
    while (at + 64 < size && memcmp(all + at, s.data, 64) != 0)
        at++;
    assert_true(at + 64 < size);
    fseek(f, (long)(at + s.offset[2] + 5), SEEK_SET);
    fputc(s.data[s.offset[2] + 5] ^ 16, f);
    fclose(f);
    uint8_t buf[1024];
    size_t len;
    assert_int_equal(md_dataset_read(d, 2, buf, sizeof buf, &len), MD_ERR_DATA);
    assert_non_null(strstr(md_error_text(), "a/2"));
    assert_int_equal(md_dataset_read_hdf5(d, 2, buf, sizeof buf, &len), MD_ERR_DATA);
    check_read(d, &s, 1, false);
    check_read(d, &s, 3, false);
    md_dataset_close(d);
}

static void *read_many(void *arg)
{
    uint8_t buf[1024];
    size_t len;
    long bad = 0;
    for (int k = 0; k < 2000; k++)
        bad += md_dataset_read(arg, k % N, buf, sizeof buf, &len) != MD_OK;
    return (void *)bad;
}

static void test_threads_read_together(void **state)
{
    (void)state;
    store s;
    md_dataset *d = open_good(&s);
    pthread_t t[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&t[i], NULL, read_many, d), 0);
    for (int i = 0; i < 4; i++) {
        void *bad;
        pthread_join(t[i], &bad);
        assert_null(bad);
    }
    md_dataset_close(d);
}

/* X(name, how to spoil, words of the message) */
#define SPOILS(X)                                                                  \
    X(format, s->format = "other", "not an image store")                           \
    X(version, s->version = 2, "version 2")                                        \
    X(split, s->split = "val", "it holds: val")                                    \
    X(first_offset, s->offset[0] = 1, "offsets do not cover")                      \
    X(last_offset, s->offset[N]--, "length is not width")                          \
    X(order, s->offset[3] = s->offset[2], "image 2 of split 'train': its offsets") \
    X(far, s->offset[3] = 1 << 30, "out of order")                                 \
    X(label_high, s->label[4] = 2, "image 4 of split 'train': its label")          \
    X(label_low, s->label[4] = -2, "no class")                                     \
    X(kind, s->kind[5] = 4, "kind is unknown")                                     \
    X(zero_width, s->wh[1][0] = 0, "width and height")                             \
    X(raw_length, s->wh[1][0]++, "length is not width x height")                   \
    X(few_labels, s->labels--, "label has 6 elements in dimension 0, expected 7")  \
    X(type, s->xxh3_type = H5T_STD_I64LE, "xxh3 has another element type")         \
    X(chunks, s->chunked = true, "data is not stored contiguously")                \
    X(cut_short, s->cut = 1, "cut")                                                \
    X(cut_long, s->cut = 5000, "cut")

#define SPOIL_FUNCTION(name, spoil, words) \
    static void spoil_##name(store *s)     \
    {                                      \
        spoil;                             \
    }
SPOILS(SPOIL_FUNCTION)

static void test_refuses_damage(void **state)
{
    (void)state;
    static const struct {
        const char *name, *words;
        void (*spoil)(store *);
    } rows[] = {
#define SPOIL_ROW(name, spoil, words) {#name, words, spoil_##name},
        SPOILS(SPOIL_ROW)
#undef SPOIL_ROW
    };
    for (size_t i = 0; i < MD_COUNT(rows); i++) {
        store s;
        md_dataset *d;
        store_fill(&s);
        rows[i].spoil(&s);
        store_write(&s);
        md_status st = md_dataset_open(path, "train", NULL, &d);
        if (st != MD_ERR_DATA || d || !strstr(md_error_text(), rows[i].words) ||
            !strstr(md_error_text(), path))
            fail_msg("%s: status %d, '%s'", rows[i].name, st, md_error_text());
    }
}

static void test_refuses_other_files(void **state)
{
    (void)state;
    md_dataset *d;
    char missing[160];
    snprintf(missing, sizeof missing, "%s/none.h5", dir);
    assert_int_equal(md_dataset_open(missing, "train", NULL, &d), MD_ERR_NOINPUT);
    assert_int_equal(md_dataset_open(dir, "train", NULL, &d), MD_ERR_NOINPUT);
    FILE *f = fopen(path, "w");
    fputs("not at all an HDF5 file\n", f);
    fclose(f);
    assert_int_equal(md_dataset_open(path, "train", NULL, &d), MD_ERR_DATA);
    assert_non_null(strstr(md_error_text(), "not an HDF5 file"));
}

static void test_memory_returns(void **state)
{
    (void)state;
    store s;
    size_t before = md_alloc_now();
    md_dataset_close(open_good(&s));
    s.label[0] = 99;
    store_write(&s);
    md_dataset *d;
    assert_int_equal(md_dataset_open(path, "train", NULL, &d), MD_ERR_DATA);
    assert_int_equal(md_alloc_now(), before);
}

static void check_bijection(uint64_t seed, uint32_t epoch, int64_t n)
{
    uint8_t *seen = calloc((size_t)n, 1);
    for (int64_t p = 0; p < n; p++) {
        int64_t x = md_permute(seed, epoch, n, p);
        assert_true(x >= 0 && x < n);
        assert_int_equal(seen[x]++, 0);
    }
    free(seen);
}

static void test_permutation_is_bijection(void **state)
{
    (void)state;
    for (int64_t n = 1; n <= 70; n++)
        check_bijection(3, (uint32_t)n, n);
    for (int b = 7; b <= 16; b += 3)
        for (int64_t n = (1 << b) - 1; n <= (1 << b) + 1; n++)
            check_bijection(0xfedcba9876543210u, 0xffffffffu, n);
    assert_true(md_permute(1, 0, (int64_t)1 << 47, 12345) < (int64_t)1 << 47);
}

/* Over many epochs every element of every small n lands everywhere equally often: Pearson's
 * statistic of n * n cells has about (n - 1)^2 degrees of freedom; the bound is its mean plus five
 * sigmas. */
static void test_permutation_is_uniform(void **state)
{
    (void)state;
    enum { EPOCHS = 6000 };
    for (int n = 2; n <= 17; n++) {
        int count[17][17] = {{0}};
        for (uint32_t e = 0; e < EPOCHS; e++)
            for (int p = 0; p < n; p++)
                count[p][md_permute(77, e, n, p)]++;
        double x2 = 0, want = (double)EPOCHS / n, dof = (n - 1.0) * (n - 1.0);
        for (int p = 0; p < n; p++)
            for (int x = 0; x < n; x++)
                x2 += (count[p][x] - want) * (count[p][x] - want) / want;
        double bound = dof + 5.0 * 1.4142135 * (n - 1.0) + 5.0;
        if (x2 > bound)
            fail_msg("n = %d: %.1f, bound %.1f", n, x2, bound);
    }
}

/* All six orders of three elements come equally often: 5 degrees of freedom. */
static void test_orders_are_uniform(void **state)
{
    (void)state;
    int count[27] = {0};
    for (uint32_t e = 0; e < 12000; e++)
        count[md_permute(5, e, 3, 0) * 9 + md_permute(5, e, 3, 1) * 3 + md_permute(5, e, 3, 2)]++;
    double x2 = 0;
    int kinds = 0;
    for (int i = 0; i < 27; i++)
        if (count[i]) {
            kinds++;
            x2 += (count[i] - 2000.0) * (count[i] - 2000.0) / 2000.0;
        }
    assert_int_equal(kinds, 6);
    assert_true(x2 < 25.0);
}

static int64_t fixed(uint64_t s0, uint32_t e0, uint64_t s1, uint32_t e1, int64_t n)
{
    int64_t same = 0;
    for (int64_t p = 0; p < n; p++)
        same += md_permute(s0, e0, n, p) == md_permute(s1, e1, n, p);
    return same;
}

static void test_permutation_differs(void **state)
{
    (void)state;
    /* Two random orders agree in one place on average. */
    assert_true(fixed(1, 0, 1, 1, 10000) < 10);
    assert_true(fixed(1, 0, 2, 0, 10000) < 10);
    int64_t still = 0, next = 0;
    for (int64_t p = 0; p < 10000; p++) {
        still += md_permute(1, 0, 10000, p) == p;
        next += md_permute(1, 0, 10000, p) == md_permute(1, 0, 10000, (p + 1) % 10000) - 1;
    }
    assert_true(still < 10);
    assert_true(next < 10);
}

/* Values from an independent implementation of the description in dataset.h. */
static void test_permutation_known_answers(void **state)
{
    (void)state;
    static const struct {
        uint64_t seed;
        uint32_t epoch;
        int64_t n, p, x;
    } rows[] = {{0x0u, 0u, 1, 0, 0},
                {0x0u, 0u, 2, 1, 0},
                {0x1u, 0u, 10, 3, 4},
                {0x1u, 1u, 10, 3, 4},
                {0x2au, 7u, 1281167, 0, 1047682},
                {0x2au, 7u, 1281167, 1281166, 216810},
                {0x123456789abcdef0u, 299u, 1281167, 640000, 785006},
                {0x7u, 4294967295u, 140737488355328, 12345678901234, 138429698046622}};
    for (size_t i = 0; i < MD_COUNT(rows); i++)
        assert_int_equal(md_permute(rows[i].seed, rows[i].epoch, rows[i].n, rows[i].p), rows[i].x);
}

static void test_positions(void **state)
{
    (void)state;
    md_order o = {.seed = 9, .n = 103, .batch = 10};
    assert_int_equal(md_epoch_steps(103, 10), 10);
    assert_int_equal(md_epoch_steps(9, 10), 0);
    md_position a = md_position_at(&o, 0, 0), b = md_position_at(&o, 10, 0);
    assert_true(a.epoch == 0 && a.place == 0 && a.sample == md_permute(9, 0, 103, 0));
    assert_true(b.epoch == 1 && b.place == 0 && b.sample == md_permute(9, 1, 103, 0));
    md_position c = md_position_at(&o, 27, 9);
    assert_true(c.epoch == 2 && c.place == 79 && c.sample == md_permute(9, 2, 103, 79));
}

static int make_dir(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/md_dataset_XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    snprintf(path, sizeof path, "%s/store.h5", dir);
    return 0;
}

static int remove_dir(void **state)
{
    (void)state;
    unlink(path);
    return rmdir(dir);
}

int main(void)
{
    setenv("MD_FAULT", "io.read.transient#1,io.read#2", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fault_sites), /* first: the sites count every read */
        cmocka_unit_test(test_reads_back),
        cmocka_unit_test(test_hash_is_identity),
        cmocka_unit_test(test_flipped_bit_is_found),
        cmocka_unit_test(test_threads_read_together),
        cmocka_unit_test(test_refuses_damage),
        cmocka_unit_test(test_refuses_other_files),
        cmocka_unit_test(test_memory_returns),
        cmocka_unit_test(test_permutation_is_bijection),
        cmocka_unit_test(test_permutation_is_uniform),
        cmocka_unit_test(test_orders_are_uniform),
        cmocka_unit_test(test_permutation_differs),
        cmocka_unit_test(test_permutation_known_answers),
        cmocka_unit_test(test_positions),
    };
    return cmocka_run_group_tests_name("dataset", tests, make_dir, remove_dir);
}
