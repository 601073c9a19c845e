/* The converter's archives: every way a tar writes names and sizes, tars in tars, gzip, IDX, and
 * their damages. One rank, no MPI. */
#include "tests/unit/convert_source.h"

#include <zlib.h>

/* --- tars ---------------------------------------------------------------------------------- */

typedef struct tar {
    uint8_t *bytes;
    size_t n;
} tar;

static void tar_block(tar *t, const void *bytes, size_t n)
{
    size_t padded = (n + 511) / 512 * 512;
    t->bytes = realloc(t->bytes, t->n + padded);
    memset(t->bytes + t->n, 0, padded);
    if (n)
        memcpy(t->bytes + t->n, bytes, n);
    t->n += padded;
}

static void tar_sum(uint8_t *h)
{
    unsigned sum = 0;
    memset(h + 148, ' ', 8);
    for (int i = 0; i < 512; i++)
        sum += h[i];
    char digits[8];
    snprintf(digits, sizeof digits, "%06o", sum & 0777777);
    memcpy(h + 148, digits, 7);
}

static void tar_header(tar *t, const char *name, char type, size_t bytes)
{
    uint8_t h[512] = {0};
    char digits[16];
    memcpy(h, name, MD_MIN(strlen(name), (size_t)100));
    snprintf(digits, sizeof digits, "%011zo", bytes);
    memcpy(h + 124, digits, 12);
    h[156] = (uint8_t)type;
    memcpy(h + 257,
           "ustar\0"
           "00",
           8);
    tar_sum(h);
    tar_block(t, h, sizeof h);
}

static void tar_file(tar *t, const char *name, const void *bytes, size_t n)
{
    tar_header(t, name, '0', n);
    tar_block(t, bytes, n);
}

static void tar_golden(tar *t, const char *name, int i)
{
    tar_file(t, name, golden_coded[i].bytes, golden_coded[i].n);
}

/* Ends the archive and writes it. */
static void tar_put(tar *t, const char *name)
{
    static const uint8_t zero[1024];
    tar_block(t, zero, sizeof zero);
    put_file(name, t->bytes, t->n);
    free(t->bytes);
    *t = (tar){0};
}

static void fill_pax(tar *t, const char *text)
{
    tar_header(t, "pax", 'x', strlen(text));
    tar_block(t, text, strlen(text));
}

/* Every way to write a name or a size. */
static void fill_tar(tar *t)
{
    char longname[200], text[300];
    tar_header(t, "data/", '5', 0);
    tar_golden(t, "./data/dog/1.jpg", 0);
    memset(longname, 'l', sizeof longname);
    memcpy(longname, "data/cat/", 9);
    longname[180] = 0;
    tar_header(t, "././@LongLink", 'L', 181);
    tar_block(t, longname, 181);
    tar_golden(t, "cut off", 1);
    snprintf(text, sizeof text, "27 path=data/dog/ümlaut.p\n");
    fill_pax(t, text);
    tar_golden(t, "replaced", 2);
    tar_header(t, "data/dog/hard", '1', 999); /* a link has no contents */
    tar_golden(t, "data/dog/._mac", 3);
    size_t head = t->n;
    tar_golden(t, "cat/base256.jpg", 4);
    uint8_t *h = t->bytes + head;
    memset(h + 124, 0, 12);
    h[124] = 0x80, h[134] = (uint8_t)(golden_coded[4].n >> 8), h[135] = (uint8_t)golden_coded[4].n;
    memcpy(h + 345, "some/prefix", 11);
    tar_sum(h);
    tar_golden(t, "val/dog/5.jpg", 5);
    tar_golden(t, "flat.jpg", 6);
}

static void check_tar(void)
{
    char longname[200];
    memset(longname, 'l', sizeof longname);
    memcpy(longname, "data/cat/", 9);
    longname[180] = 0;
    md_dataset *d = open_split("train");
    assert_int_equal(md_dataset_count(d), 5);
    check_image(d, 0, "data/dog/1.jpg", "dog", 0);
    check_image(d, 1, longname, "cat", 1);
    check_image(d, 2, "data/dog/ümlaut.p", "dog", 2);
    check_image(d, 3, "some/prefix/cat/base256.jpg", "cat", 4);
    check_image(d, 4, "flat.jpg", "", 6);
    md_dataset_close(d);
    d = open_split("val");
    assert_int_equal(md_dataset_count(d), 1);
    check_image(d, 0, "val/dog/5.jpg", "dog", 5);
    md_dataset_close(d);
}

static void gzip_put(const char *name, const uint8_t *bytes, size_t n)
{
    gzFile f = gzopen(at(name), "wb1");
    assert_non_null(f);
    assert_int_equal(gzwrite(f, bytes, (unsigned)n), n);
    assert_int_equal(gzclose(f), Z_OK);
}

static void test_tar(void **state)
{
    (void)state;
    tar t = {0};
    fill_tar(&t);
    gzip_put("packed.tgz", t.bytes, t.n); /* without end blocks, which are not missed */
    tar_put(&t, "plain.tar");
    assert_int_equal(convert_ok("plain.tar").classes, 2);
    check_tar();
    convert_ok("packed.tgz");
    check_tar();
}

/* ImageNet's train archive: a tar of one tar per class. */
static void test_tar_of_tars(void **state)
{
    (void)state;
    tar inner = {0}, outer = {0};
    static const uint8_t zero[1024];
    const char *names[] = {"n02.tar", "n01.tar"};
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < 3; i++) {
            char name[32];
            snprintf(name, sizeof name, "img_%d.JPEG", i);
            tar_golden(&inner, name, 3 * k + i);
        }
        tar_block(&inner, zero, sizeof zero);
        tar_file(&outer, names[k], inner.bytes, inner.n);
        free(inner.bytes);
        inner = (tar){0};
    }
    tar_golden(&outer, "beside.JPEG", 8);
    gzip_put("all.tar.gz", outer.bytes, outer.n);
    tar_put(&outer, "all.tar");
    for (int packed = 0; packed < 2; packed++) {
        md_convert_summary sum = convert_ok(packed ? "all.tar.gz" : "all.tar");
        assert_int_equal(sum.images, 7);
        assert_int_equal(sum.classes, 2);
        md_dataset *d = open_split("train");
        assert_string_equal(md_dataset_class_name(d, 0), "n01");
        check_image(d, 0, "beside.JPEG", "", 8);
        check_image(d, 1, "n02.tar/img_0.JPEG", "n02", 0);
        check_image(d, 4, "n01.tar/img_0.JPEG", "n01", 3);
        check_image(d, 6, "n01.tar/img_2.JPEG", "n01", 5);
        md_dataset_close(d);
    }
}

/* A folder of class tars. */
static void test_folder_of_tars(void **state)
{
    (void)state;
    tar t = {0};
    tar_golden(&t, "1.jpg", 0);
    tar_put(&t, "src/ape.tar");
    tar_golden(&t, "1.jpg", 1);
    tar_put(&t, "src/bee.TAR");
    put_file("src/README", "what this is", 12);
    assert_int_equal(convert_ok("src").rejects, 0);
    md_dataset *d = open_split("train");
    check_image(d, 0, "1.jpg", "ape", 0);
    check_image(d, 1, "1.jpg", "bee", 1);
    md_dataset_close(d);
}

static void test_damaged_tars(void **state)
{
    (void)state;
    tar t = {0};
    char name[32];
    fill_tar(&t);
    for (size_t cut = 600; cut < 4096; cut += 300) {
        snprintf(name, sizeof name, "cut%zu.tar", cut);
        put_file(name, t.bytes, cut);
        check_refused(name, MD_ERR_DATA, "damaged tar");
    }
    size_t second = 512;
    t.bytes[second + 3] ^= 1;
    put_file("sum.tar", t.bytes, t.n);
    check_refused("sum.tar", MD_ERR_DATA, "bad header at byte 512");
    free(t.bytes);

    static const struct {
        const char *pax, *words;
    } rows[] = {{"99 path=x\n", "not understood"},
                {"0 path=x\n", "not understood"},
                {"9 path=x", "not understood"},
                {"-5 path=x\n", "not understood"},
                {"15 size=-12345\n", "not understood"},
                {"8 path=\n", "not understood"},
                {"33 size=999999999999999999999999\n", "not understood"},
                {"25 size=2305843009213693\n", "ends inside"},
                {"28 GNU.sparse.name=whatever\n", "not understood"}};
    for (size_t i = 0; i < MD_COUNT(rows); i++) {
        t = (tar){0};
        tar_golden(&t, "a/1.jpg", 0);
        fill_pax(&t, rows[i].pax);
        tar_golden(&t, "a/2.jpg", 1);
        snprintf(name, sizeof name, "pax%zu.tar", i);
        tar_put(&t, name);
        check_refused(name, MD_ERR_DATA, rows[i].words);
    }
    t = (tar){0};
    tar_golden(&t, "a/1.jpg", 0);
    static const uint8_t zero[(1 << 20) + 1];
    tar_header(&t, "long", 'L', sizeof zero);
    tar_block(&t, zero, sizeof zero);
    tar_put(&t, "oversized.tar");
    check_refused("oversized.tar", MD_ERR_DATA, "oversized name record");
    tar_golden(&t, "a/1.jpg", 0);
    tar_header(&t, "a/s", 'S', 512);
    tar_put(&t, "sparse.tar");
    check_refused("sparse.tar", MD_ERR_DATA, "sparse member");
}

static void test_damaged_gzip(void **state)
{
    (void)state;
    static uint8_t bytes[1 << 20];
    tar t = {0};
    fill_tar(&t);
    gzip_put("whole.tgz", t.bytes, t.n);
    free(t.bytes);
    size_t n = load(at("whole.tgz"), bytes, sizeof bytes);
    put_file("cut.tgz", bytes, n * 3 / 4);
    check_refused("cut.tgz", MD_ERR_DATA, "cut.tgz: damaged or cut gzip");
    bytes[n / 2] ^= 0x55;
    put_file("flip.tgz", bytes, n);
    check_refused("flip.tgz", MD_ERR_DATA, "flip.tgz: damaged");
}

/* --- IDX ----------------------------------------------------------------------------------- */

enum { IDX_N = 12, IDX_W = 5, IDX_H = 4 };

static size_t idx_images(uint8_t *b, int n)
{
    memcpy(b, (uint8_t[]){0, 0, 8, 3, 0, 0, 0, (uint8_t)n, 0, 0, 0, IDX_H, 0, 0, 0, IDX_W}, 16);
    for (int i = 0; i < n * IDX_W * IDX_H; i++)
        b[16 + i] = (uint8_t)(i * 7);
    return 16 + (size_t)n * IDX_W * IDX_H;
}

static size_t idx_labels(uint8_t *b, int n)
{
    memcpy(b, (uint8_t[]){0, 0, 8, 1, 0, 0, 0, (uint8_t)n}, 8);
    for (int i = 0; i < n; i++)
        b[8 + i] = (uint8_t)(i == 3 ? 11 : i % 3);
    return 8 + (size_t)n;
}

static void check_idx(const md_dataset *d)
{
    uint8_t want[16 + IDX_N * IDX_W * IDX_H], got[64];
    size_t n;
    int w, h;
    idx_images(want, IDX_N);
    assert_int_equal(md_dataset_count(d), IDX_N);
    assert_int_equal(md_dataset_classes(d), 12); /* 3 .. 10 have no image and stay classes */
    assert_string_equal(md_dataset_class_name(d, 10), "10");
    for (int i = 0; i < IDX_N; i++) {
        assert_int_equal(md_dataset_label(d, i), i == 3 ? 11 : i % 3);
        assert_int_equal(md_dataset_kind(d, i), MD_IMAGE_GRAY8);
        md_dataset_size(d, i, &w, &h);
        assert_true(w == IDX_W && h == IDX_H);
        assert_int_equal(md_dataset_read(d, i, got, sizeof got, &n), MD_OK);
        assert_int_equal(n, IDX_W * IDX_H);
        assert_memory_equal(got, want + 16 + i * IDX_W * IDX_H, n);
    }
    assert_string_equal(md_dataset_name(d, 4, (char *)got, sizeof got) + strlen((char *)got) - 2,
                        "#4");
}

static void test_idx(void **state)
{
    (void)state;
    uint8_t b[512];
    put_file("src/train-images-idx3-ubyte", b, idx_images(b, IDX_N));
    gzip_put("src/train-labels-idx1-ubyte.gz", b, idx_labels(b, IDX_N));
    gzip_put("src/t10k-images-idx3-ubyte.gz", b, idx_images(b, IDX_N));
    put_file("src/t10k-labels-idx1-ubyte", b, idx_labels(b, IDX_N));
    gzip_put("src/train-images-idx3-ubyte.gz", b, idx_images(b, IDX_N)); /* the same, packed */
    md_convert_summary sum = convert_ok("src");
    assert_int_equal(sum.images, 2 * IDX_N);
    md_dataset *d = open_split("train");
    check_idx(d);
    md_dataset_close(d);
    check_idx(d = open_split("test"));
    md_dataset_close(d);
    convert_ok("src/t10k-images-idx3-ubyte.gz");
    check_idx(d = open_split("test"));
    md_dataset_close(d);
}

static void test_damaged_idx(void **state)
{
    (void)state;
    uint8_t b[512];
    size_t n = idx_images(b, IDX_N);
    put_file("a-images-idx3-ubyte", b, n);
    check_refused("a-images-idx3-ubyte", MD_ERR_NOINPUT, "without a labels file");
    put_file("a-labels-idx1-ubyte", b, idx_labels(b, IDX_N - 1));
    check_refused("a-images-idx3-ubyte", MD_ERR_DATA, "11 labels for the 12 images");
    check_refused("a-labels-idx1-ubyte", MD_ERR_DATA, "name the images file");
    put_file("a-labels-idx1-ubyte", b, idx_labels(b, IDX_N));
    n = idx_images(b, IDX_N);
    put_file("a-images-idx3-ubyte", b, n - 1);
    check_refused("a-images-idx3-ubyte", MD_ERR_DATA, "shorter than the 256 bytes");
    put_file("a-images-idx3-ubyte", b, n + 1);
    check_refused("a-images-idx3-ubyte", MD_ERR_DATA, "longer than the 256 bytes");
    memset(b + 4, 0xff, 12);
    put_file("a-images-idx3-ubyte", b, n);
    check_refused("a-images-idx3-ubyte", MD_ERR_DATA, "IDX dimension 1 is 4294967295");
}

int main(void)
{
    md_log_set(MD_LOG_ERROR);
    const struct CMUnitTest tests[] = {
        TEST(test_tar),          TEST(test_tar_of_tars),  TEST(test_folder_of_tars),
        TEST(test_damaged_tars), TEST(test_damaged_gzip), TEST(test_idx),
        TEST(test_damaged_idx),
    };
    return cmocka_run_group_tests_name("convert_archives", tests, NULL, NULL);
}
