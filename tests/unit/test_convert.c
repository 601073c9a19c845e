/* The converter on sources made here: folders, tars, IDX; what is refused; what a failure leaves.
 * One rank, no MPI. Pictures are the decoder's golden ones. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <dirent.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "io/convert.h"
#include "io/dataset.h"
#include "src/log.h"
#include "tests/golden/image_golden.h"

#define GOLDEN ((int)MD_COUNT(golden_coded))

static char root[64], out[128], listing[160];
static md_comm *self;

/* --- a clean folder for every test ---------------------------------------------------------- */

static int remove_one(const char *path, const struct stat *s, int type, struct FTW *f)
{
    (void)s, (void)type, (void)f;
    return remove(path);
}

static int begin(void **state)
{
    (void)state;
    snprintf(root, sizeof root, "/tmp/md_convert_XXXXXX");
    if (!mkdtemp(root))
        return -1;
    snprintf(out, sizeof out, "%s/out.h5", root);
    snprintf(listing, sizeof listing, "%s/out.h5.rejects.txt", root);
    return md_comm_self(&self);
}

static int end(void **state)
{
    (void)state;
    md_comm_free(self);
    return nftw(root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* root/name, its folders made. */
static const char *at(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", root, name);
    for (char *p = path + strlen(root) + 1; (p = strchr(p, '/')); *p++ = '/') {
        *p = 0;
        mkdir(path, 0777);
    }
    return path;
}

static void put_file(const char *name, const void *bytes, size_t n)
{
    FILE *f = fopen(at(name), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
}

static void put_golden(const char *name, int i)
{
    put_file(name, golden_coded[i].bytes, golden_coded[i].n);
}

static md_status convert_with(md_convert_args a, const char *source, md_convert_summary *sum)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", root, source);
    md_convert_source s = {path, "train"};
    a.out = out;
    a.sources = &s;
    a.n_sources = 1;
    return md_convert(&a, self, sum);
}

static md_convert_summary convert_ok(const char *source)
{
    md_convert_summary sum;
    if (convert_with((md_convert_args){.keep_order = true, .replace = true}, source, &sum) != MD_OK)
        fail_msg("%s: %s", source, md_error_text());
    return sum;
}

static md_dataset *open_split(const char *split)
{
    md_dataset *d;
    if (md_dataset_open(out, split, NULL, &d) != MD_OK)
        fail_msg("%s", md_error_text());
    return d;
}

static bool exists(const char *name)
{
    return access(at(name), F_OK) == 0;
}

/* Image i has this name, class ("" = none) and golden picture. */
static void check_image(const md_dataset *d, int64_t i, const char *name, const char *class,
                        int golden)
{
    char buf[512];
    uint8_t bytes[16384];
    size_t n;
    int w, h;
    const struct golden_coded *g = &golden_coded[golden];
    assert_string_equal(md_dataset_name(d, i, buf, sizeof buf), name);
    int32_t label = md_dataset_label(d, i);
    assert_string_equal(label < 0 ? "" : md_dataset_class_name(d, label), class);
    assert_int_equal(md_dataset_read(d, i, bytes, sizeof bytes, &n), MD_OK);
    assert_int_equal(n, g->n);
    assert_memory_equal(bytes, g->bytes, n);
    md_dataset_size(d, i, &w, &h);
    assert_true(w == g->w && h == g->h && (int)md_dataset_kind(d, i) == g->kind);
}

static void check_refused(const char *source, md_status want, const char *words)
{
    md_convert_summary sum;
    md_status st = convert_with((md_convert_args){0}, source, &sum);
    if (st != want || !strstr(md_error_text(), words))
        fail_msg("%s: %s '%s', expected %s '%s'", source, md_status_name(st), md_error_text(),
                 md_status_name(want), words);
    assert_false(exists("out.h5"));
    assert_false(exists("out.h5.partial"));
}

/* --- folders ------------------------------------------------------------------------------- */

/* Every golden picture, under a name that lies about its kind, goes through unchanged. */
static void test_class_folders(void **state)
{
    (void)state;
    char name[64];
    for (int i = 0; i < GOLDEN; i++) {
        snprintf(name, sizeof name, "src/%s/%02d.%s", i % 2 ? "dog" : "Cat", i,
                 golden_coded[i].kind == 1 ? "JPEG" : "png");
        put_golden(name, i);
    }
    md_convert_summary sum = convert_ok("src");
    assert_int_equal(sum.images, GOLDEN);
    assert_int_equal(sum.classes, 2);
    assert_int_equal(sum.rejects, 0);
    md_dataset *d = open_split("train");
    assert_string_equal(md_dataset_class_name(d, 0), "Cat");
    for (int i = 0, k = 0; k < 2; k++)
        for (int g = k; g < GOLDEN; g += 2, i++) {
            snprintf(name, sizeof name, "%s/%02d.%s", k ? "dog" : "Cat", g,
                     golden_coded[g].kind == 1 ? "JPEG" : "png");
            check_image(d, i, name, k ? "dog" : "Cat", g);
        }
    md_dataset_close(d);
    assert_false(exists("out.h5.rejects.txt"));
    assert_int_equal(md_convert_verify(out, self, &sum), MD_OK);
    assert_int_equal(sum.images, GOLDEN);
}

static void test_rejects_are_listed(void **state)
{
    (void)state;
    uint8_t flipped[16384];
    const struct golden_coded *png = &golden_coded[9];
    put_golden("src/a/good.jpg", 0);
    put_file("src/a/cut.jpg", golden_coded[0].bytes, golden_coded[0].n * 2 / 3);
    put_file("src/a/empty.jpg", "", 0);
    put_file("src/b/text.jpg", "hello, I am a text file\n", 24);
    memcpy(flipped, png->bytes, png->n);
    flipped[png->n / 2] ^= 8;
    put_file("src/b/flipped.png", flipped, png->n);
    assert_int_equal(symlink("nowhere", at("src/b/link.jpg")), 0);
    put_golden("src/c/.hidden.jpg", 1);
    md_convert_summary sum = convert_ok("src");
    assert_int_equal(sum.images, 1);
    assert_int_equal(sum.rejects, 5);
    assert_int_equal(sum.classes, 2); /* c holds nothing to be seen */
    char text[4096] = "";
    FILE *f = fopen(listing, "r");
    assert_non_null(f);
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[n] = 0;
    static const char *const lines[] = {"a/cut.jpg\tJPEG: ", "a/empty.jpg\tempty file\n",
                                        "b/flipped.png\tPNG: ", "b/link.jpg\tempty file\n",
                                        "b/text.jpg\tneither JPEG nor PNG"};
    const char *from = text;
    for (size_t i = 0; i < MD_COUNT(lines); i++) {
        const char *found = strstr(from, lines[i]);
        if (!found)
            fail_msg("'%s' is not in order in:\n%s", lines[i], text);
        from = found + 1;
    }
    /* A later run without rejects takes the old list away. */
    put_golden("src2/a/good.jpg", 0);
    convert_ok("src2");
    assert_false(exists("out.h5.rejects.txt"));
}

static void test_splits(void **state)
{
    (void)state;
    put_golden("src/train/x/1.jpg", 0);
    put_golden("src/train/x/deep/er/2.jpg", 1);
    put_golden("src/validation/x/3.jpg", 2);
    put_golden("src/test/4.jpg", 3);
    put_golden("src/stray.jpg", 4);
    put_golden("more/y/5.jpg", 5);
    char first[512], second[512];
    snprintf(first, sizeof first, "%s/src", root);
    snprintf(second, sizeof second, "%s/more/", root);
    md_convert_source s[] = {{first, "train"}, {second, "extra"}};
    md_convert_args a = {.out = out, .sources = s, .n_sources = 2, .keep_order = true};
    md_convert_summary sum;
    assert_int_equal(md_convert(&a, self, &sum), MD_OK);
    char splits[64];
    assert_int_equal(md_dataset_splits(out, NULL, splits, sizeof splits), MD_OK);
    assert_string_equal(splits, "extra, test, train, val");
    md_dataset *d = open_split("train");
    assert_int_equal(md_dataset_count(d), 2);
    assert_int_equal(md_dataset_classes(d), 2);
    check_image(d, 0, "x/1.jpg", "x", 0);
    check_image(d, 1, "x/deep/er/2.jpg", "x", 1);
    md_dataset_close(d);
    check_image(d = open_split("val"), 0, "x/3.jpg", "x", 2);
    md_dataset_close(d);
    check_image(d = open_split("test"), 0, "4.jpg", "", 3);
    md_dataset_close(d);
    check_image(d = open_split("extra"), 0, "y/5.jpg", "y", 5);
    md_dataset_close(d);
}

/* A folder of photos without classes is enough for pretraining. */
static void test_unlabelled(void **state)
{
    (void)state;
    put_golden("src/b.jpg", 0);
    put_golden("src/a.jpg", 1);
    assert_int_equal(convert_ok("src").classes, 0);
    md_dataset *d = open_split("train");
    check_image(d, 0, "a.jpg", "", 1);
    check_image(d, 1, "b.jpg", "", 0);
    md_dataset_close(d);
}

static size_t load(const char *path, uint8_t *buf, size_t cap)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t n = fread(buf, 1, cap, f);
    assert_true(n < cap);
    fclose(f);
    return n;
}

static void test_order(void **state)
{
    (void)state;
    static uint8_t first[4 << 20], again[4 << 20];
    char name[64], want[64];
    for (int i = 0; i < GOLDEN; i++) {
        snprintf(name, sizeof name, "src/a/%02d.jpg", i);
        put_golden(name, i);
    }
    md_convert_args a = {.seed = 7, .replace = true};
    md_convert_summary sum;
    assert_int_equal(convert_with(a, "src", &sum), MD_OK);
    md_dataset *d = open_split("train");
    int same = 0;
    for (int q = 0; q < GOLDEN; q++) {
        int g = (int)md_store_order(7, GOLDEN, q);
        snprintf(want, sizeof want, "a/%02d.jpg", g);
        check_image(d, q, want, "a", g);
        same += g == q;
    }
    assert_true(same < GOLDEN / 2);
    md_dataset_close(d);
    size_t n = load(out, first, sizeof first);
    assert_int_equal(convert_with(a, "src", &sum), MD_OK);
    assert_int_equal(load(out, again, sizeof again), n);
    assert_memory_equal(first, again, n);
    a.seed = 8;
    assert_int_equal(convert_with(a, "src", &sum), MD_OK);
    assert_true(load(out, again, sizeof again) != n || memcmp(first, again, n) != 0);
}

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

/* --- what a failure leaves ----------------------------------------------------------------- */

static void test_refused_sources(void **state)
{
    (void)state;
    check_refused("none", MD_ERR_NOINPUT, "none: cannot open: No such file");
    at("empty/x");
    check_refused("empty", MD_ERR_DATA, "empty folder");
    at("hollow/a/x");
    check_refused("hollow", MD_ERR_DATA, "no images in");
    put_file("text", "no picture at all", 17);
    check_refused("text", MD_ERR_DATA, "neither a folder nor a tar nor an IDX file");
    put_file("bad/a/1.jpg", "no picture at all", 17);
    put_file("bad/a/2.jpg", "nor is this", 11);
    check_refused("bad", MD_ERR_DATA, "none of 2 candidates is an image; the first: a/1.jpg");
}

static void test_refused_outputs(void **state)
{
    (void)state;
    md_convert_summary sum;
    put_golden("src/a/1.jpg", 0);
    put_file("out.h5", "precious", 8);
    assert_int_equal(convert_with((md_convert_args){0}, "src", &sum), MD_ERR_CREATE);
    assert_non_null(strstr(md_error_text(), "out.h5: exists"));
    uint8_t kept[16];
    assert_int_equal(load(out, kept, sizeof kept), 8);
    assert_int_equal(convert_with((md_convert_args){.replace = true}, "src", &sum), MD_OK);
    snprintf(out, sizeof out, "%s/no/such/out.h5", root);
    assert_int_equal(convert_with((md_convert_args){0}, "src", &sum), MD_ERR_CREATE);
    assert_non_null(strstr(md_error_text(), "cannot create: No such file"));
}

/* A full disk: with a limit on the length of files every write beyond it fails. */
static void test_full_disk(void **state)
{
    (void)state;
    struct rlimit limit, small;
    for (int i = 0; i < GOLDEN; i++) {
        char name[32];
        snprintf(name, sizeof name, "src/a/%d.jpg", i);
        put_golden(name, i);
    }
    getrlimit(RLIMIT_FSIZE, &limit);
    for (rlim_t bytes = 64; bytes <= 8192; bytes *= 2) {
        small = (struct rlimit){bytes, limit.rlim_max};
        setrlimit(RLIMIT_FSIZE, &small);
        md_convert_summary sum;
        md_status st = convert_with((md_convert_args){0}, "src", &sum);
        setrlimit(RLIMIT_FSIZE, &limit);
        if (st == MD_OK)
            fail_msg("no error within %lld bytes", (long long)bytes);
        assert_int_equal(st, MD_ERR_IO);
        assert_non_null(strstr(md_error_text(), out));
        assert_false(exists("out.h5"));
        assert_false(exists("out.h5.partial"));
    }
    convert_ok("src");
}

static void test_memory_returns(void **state)
{
    (void)state;
    size_t before = md_alloc_now();
    put_golden("src/a/1.jpg", 0);
    put_file("src/a/2.jpg", "", 0);
    convert_ok("src");
    assert_int_equal(md_alloc_now(), before);
    unlink(out);
    check_refused("none", MD_ERR_NOINPUT, "none");
    assert_int_equal(md_alloc_now(), before);
}

int main(void)
{
    md_log_set(MD_LOG_ERROR);
#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, end)
    const struct CMUnitTest tests[] = {
        TEST(test_class_folders),
        TEST(test_rejects_are_listed),
        TEST(test_splits),
        TEST(test_unlabelled),
        TEST(test_order),
        TEST(test_tar),
        TEST(test_tar_of_tars),
        TEST(test_folder_of_tars),
        TEST(test_damaged_tars),
        TEST(test_damaged_gzip),
        TEST(test_idx),
        TEST(test_damaged_idx),
        TEST(test_refused_sources),
        TEST(test_refused_outputs),
        TEST(test_full_disk),
        TEST(test_memory_returns),
    };
    return cmocka_run_group_tests_name("convert", tests, NULL, NULL);
}
