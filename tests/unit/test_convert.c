/* The converter: folders, splits, order, rejects, and what a failure leaves. One rank, no MPI. */
#include "tests/unit/convert_source.h"

#include <signal.h>
#include <sys/resource.h>

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
    static const char *const lines[] = {
        "a/cut.jpg\tJPEG: ", "a/empty.jpg\tempty file\n",
        "b/flipped.png\tPNG: ", "link.jpg: cannot open: No such file",
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
    signal(SIGXFSZ, SIG_IGN); /* as main does */
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
    const struct CMUnitTest tests[] = {
        TEST(test_class_folders),   TEST(test_rejects_are_listed),
        TEST(test_splits),          TEST(test_unlabelled),
        TEST(test_order),           TEST(test_refused_sources),
        TEST(test_refused_outputs), TEST(test_full_disk),
        TEST(test_memory_returns),
    };
    return cmocka_run_group_tests_name("convert", tests, NULL, NULL);
}
