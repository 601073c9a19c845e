/* The HDF5 wrappers: what is written is read back, what is not plain is refused in one sentence, a
 * full disk is an error and nothing worse. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/h5.h"

#define ROWS 6
#define COLS 50000

static char dir[64], path[128];

static void check_fails(md_status st, md_status want, const char *words)
{
    if (st != want || !strstr(md_error_text(), words) || !strstr(md_error_text(), path))
        fail_msg("%s '%s', expected %s '%s'", md_status_name(st), md_error_text(),
                 md_status_name(want), words);
}

static void test_attributes(void **state)
{
    (void)state;
    hid_t f;
    char text[8];
    int64_t i;
    double x;
    assert_int_equal(md_h5_create(path, NULL, &f), MD_OK);
    assert_int_equal(md_h5_attr_write_str(f, "text", "seven b"), MD_OK);
    assert_int_equal(md_h5_attr_write_str(f, "empty", ""), MD_OK);
    assert_int_equal(md_h5_attr_write_i64(f, "int", INT64_MIN), MD_OK);
    assert_int_equal(md_h5_attr_write_f64(f, "real", 0.1), MD_OK);
    check_fails(md_h5_attr_write_i64(f, "int", 1), MD_ERR_IO, "attribute int (HDF5: ");
    assert_int_equal(md_h5_close(&f), MD_OK);
    assert_int_equal(f, -1);
    assert_int_equal(md_h5_open(path, NULL, &f), MD_OK);
    check_fails(md_h5_attr_read_str(f, "text", text, sizeof text), MD_ERR_DATA, "too long");
    assert_int_equal(md_h5_attr_read_str(f, "empty", text, sizeof text), MD_OK);
    assert_string_equal(text, "");
    char longer[9];
    assert_int_equal(md_h5_attr_read_str(f, "text", longer, sizeof longer), MD_OK);
    assert_string_equal(longer, "seven b");
    assert_int_equal(md_h5_attr_read_i64(f, "int", &i), MD_OK);
    assert_true(i == INT64_MIN);
    assert_int_equal(md_h5_attr_read_f64(f, "real", &x), MD_OK);
    assert_true(x == 0.1);
    check_fails(md_h5_attr_read_i64(f, "real", &i), MD_ERR_DATA, "real is not one plain number");
    check_fails(md_h5_attr_read_str(f, "int", text, 8), MD_ERR_DATA, "not one plain fixed-length");
    check_fails(md_h5_attr_read_i64(f, "none", &i), MD_ERR_DATA, "has no attribute none");
    assert_int_equal(md_h5_close(&f), MD_OK);
    assert_int_equal(md_h5_close(&f), MD_OK);
}

static void test_data_sets(void **state)
{
    (void)state;
    static float x[ROWS * COLS], y[ROWS * COLS];
    hid_t f, g, d;
    hsize_t dim[2] = {ROWS, COLS};
    int64_t at;
    for (int i = 0; i < ROWS * COLS; i++)
        x[i] = (float)i;
    assert_int_equal(md_h5_create(path, NULL, &f), MD_OK);
    assert_int_equal(md_h5_group_create(f, "a", &g), MD_OK);
    assert_int_equal(md_h5_dset_create(g, "w", H5T_IEEE_F32LE, 2, dim, &d), MD_OK);
    assert_int_equal(md_h5_write_all(d, H5T_NATIVE_FLOAT, x), MD_OK);
    assert_int_equal(md_h5_offset(d, &at), MD_OK);
    assert_int_equal(at % (1 << 20), 0);
    const char *names[] = {"", "abc", "d"};
    assert_int_equal(md_h5_strings_write(g, "names", 3, names), MD_OK);
    assert_int_equal(md_h5_strings_write(g, "none", 0, names), MD_OK);
    assert_int_equal(md_h5_close(&f), MD_OK); /* closes g and d */

    assert_int_equal(md_h5_open(path, NULL, &f), MD_OK);
    hsize_t any[2] = {MD_H5_ANY, COLS};
    assert_int_equal(md_h5_dset_open(f, "a/w", H5T_IEEE_F32LE, 2, any, &d), MD_OK);
    assert_int_equal(any[0], ROWS);
    assert_int_equal(md_h5_read_all(d, H5T_NATIVE_FLOAT, y), MD_OK);
    assert_memory_equal(x, y, sizeof x);
    md_h5_release(d);
    FILE *raw = fopen(path, "rb");
    fseek(raw, (long)at, SEEK_SET);
    memset(y, 0, sizeof y);
    assert_int_equal(fread(y, sizeof *y, ROWS * COLS, raw), ROWS * COLS);
    fclose(raw);
    assert_memory_equal(x, y, sizeof x);

    char *block, list[64];
    size_t width;
    assert_int_equal(md_h5_strings_read(f, "a/names", 3, &block, &width), MD_OK);
    for (int i = 0; i < 3; i++)
        assert_string_equal(block + (size_t)i * width, names[i]);
    md_free(block);
    assert_int_equal(md_h5_strings_read(f, "a/none", 0, &block, &width), MD_OK);
    md_free(block);
    check_fails(md_h5_strings_read(f, "a/names", 4, &block, &width), MD_ERR_DATA, "expected 4");
    check_fails(md_h5_strings_read(f, "a/w", 3, &block, &width), MD_ERR_DATA, "has no table");
    hid_t h;
    assert_int_equal(md_h5_group_open(f, "a", &h), MD_OK);
    md_h5_list(h, list, sizeof list);
    assert_string_equal(list, "names, none, w");
    assert_int_equal(md_h5_close(&f), MD_OK);
}

/* Creates data set `name` of 100 bytes with these creation properties, the library's own way. */
static void raw_set(hid_t f, const char *name, hid_t type, hid_t dcpl)
{
    hsize_t n = 100;
    hid_t space = H5Screate_simple(1, &n, NULL);
    hid_t d = H5Dcreate2(f, name, type, space, H5P_DEFAULT, dcpl, H5P_DEFAULT);
    assert_true(d >= 0);
    md_h5_release(d), md_h5_release(space), md_h5_release(dcpl);
}

static void make_foreign(hid_t f)
{
    hsize_t n = 100, chunk = 10;
    hid_t p = H5Pcreate(H5P_DATASET_CREATE), vlen = H5Tvlen_create(H5T_NATIVE_UINT8);
    raw_set(f, "plain", H5T_STD_U8LE, H5Pcreate(H5P_DATASET_CREATE));
    raw_set(f, "vlen", vlen, H5Pcreate(H5P_DATASET_CREATE));
    md_h5_release(vlen);
    H5Pset_chunk(p, 1, &chunk);
    raw_set(f, "chunked", H5T_STD_U8LE, H5Pcopy(p));
    H5Pset_shuffle(p);
    raw_set(f, "filtered", H5T_STD_U8LE, p);
    p = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_layout(p, H5D_COMPACT);
    raw_set(f, "compact", H5T_STD_U8LE, p);
    p = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_external(p, "/etc/passwd", 0, 100);
    raw_set(f, "external", H5T_STD_U8LE, p);
    hid_t space = H5Screate_simple(1, &n, NULL);
    p = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_virtual(p, space, "other.h5", "x", space);
    md_h5_release(space);
    raw_set(f, "virtual", H5T_STD_U8LE, p);
    assert_true(H5Lcreate_soft("/plain", f, "soft", H5P_DEFAULT, H5P_DEFAULT) >= 0);
    assert_true(H5Lcreate_external("other.h5", "/", f, "away", H5P_DEFAULT, H5P_DEFAULT) >= 0);
}

/* Files from elsewhere may hold anything HDF5 can express: all but the plain form is refused. */
static void test_refuses_other_layouts(void **state)
{
    (void)state;
    static const struct {
        const char *name, *words;
    } rows[] = {{"vlen", "another element type"}, {"chunked", "not stored contiguously"},
                {"filtered", "filtered"},         {"compact", "not stored contiguously"},
                {"external", "external files"},   {"virtual", "virtual"},
                {"soft", "has no data set soft"}, {"away", "has no data set away"},
                {"away/x", "has no data set"},    {"none", "has no data set none"},
                {"plain/x", "has no data set"}};
    hid_t f, d;
    hsize_t n = 100;
    f = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    make_foreign(f);
    H5Fclose(f);
    assert_int_equal(md_h5_open(path, NULL, &f), MD_OK);
    assert_int_equal(md_h5_dset_open(f, "plain", H5T_STD_U8LE, 1, &n, &d), MD_OK);
    md_h5_release(d);
    for (size_t i = 0; i < MD_COUNT(rows); i++) {
        n = 100;
        check_fails(md_h5_dset_open(f, rows[i].name, H5T_STD_U8LE, 1, &n, &d), MD_ERR_DATA,
                    rows[i].words);
        assert_int_equal(d, -1);
    }
    assert_int_equal(md_h5_close(&f), MD_OK);
}

static void test_refuses_other_files(void **state)
{
    (void)state;
    hid_t f;
    unlink(path);
    check_fails(md_h5_open(path, NULL, &f), MD_ERR_NOINPUT, "No such file");
    FILE *t = fopen(path, "wb");
    fclose(t);
    check_fails(md_h5_open(path, NULL, &f), MD_ERR_DATA, "not an HDF5 file");
    t = fopen(path, "wb");
    fputs("\211HDF\r\n\032\n and nothing else", t);
    fclose(t);
    check_fails(md_h5_open(path, NULL, &f), MD_ERR_DATA, "damaged or cut");
    assert_int_equal(f, -1);
}

/* Nothing of an older, longer file shows through, and the same calls give the same bytes. */
static void test_same_bytes(void **state)
{
    (void)state;
    static uint8_t first[1 << 16], again[1 << 16];
    size_t n[2];
    for (int k = 0; k < 2; k++) {
        hid_t f, d;
        hsize_t dim = 100;
        assert_int_equal(md_h5_create(path, &(md_h5_layout){4096, 4096}, &f), MD_OK);
        assert_int_equal(md_h5_attr_write_str(f, "x", "y"), MD_OK);
        assert_int_equal(md_h5_dset_create(f, "d", H5T_STD_U8LE, 1, &dim, &d), MD_OK);
        md_h5_release(d);
        assert_int_equal(md_h5_close(&f), MD_OK);
        FILE *t = fopen(path, "rb");
        n[k] = fread(k ? again : first, 1, sizeof first, t);
        fclose(t);
        t = fopen(path, "wb");
        for (int i = 0; i < 50000; i++)
            fputc(i, t);
        fclose(t);
    }
    assert_true(n[0] == n[1] && n[0] > 4096 && n[0] < 50000);
    assert_memory_equal(first, again, n[0]);
}

/* HDF5 is told that all went well; md_h5_close is not. Later files are not affected. */
static void test_full_disk(void **state)
{
    (void)state;
    struct rlimit limit;
    static uint8_t x[100000];
    hsize_t dim = sizeof x;
    hid_t f, d;
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &limit);
    for (rlim_t bytes = 1; bytes < sizeof x; bytes *= 8) {
        struct rlimit small = {bytes, limit.rlim_max};
        setrlimit(RLIMIT_FSIZE, &small);
        assert_int_equal(md_h5_create(path, NULL, &f), MD_OK);
        md_h5_dset_create(f, "d", H5T_STD_U8LE, 1, &dim, &d);
        md_h5_write_all(d, H5T_NATIVE_UINT8, x);
        md_status st = md_h5_close(&f);
        setrlimit(RLIMIT_FSIZE, &limit);
        check_fails(st, MD_ERR_IO, "cannot write: File too large");
    }
    assert_int_equal(md_h5_create(path, NULL, &f), MD_OK);
    assert_int_equal(md_h5_close(&f), MD_OK);
}

static int make_dir(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/md_h5_XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    snprintf(path, sizeof path, "%s/file.h5", dir);
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
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attributes),
        cmocka_unit_test(test_data_sets),
        cmocka_unit_test(test_refuses_other_layouts),
        cmocka_unit_test(test_refuses_other_files),
        cmocka_unit_test(test_same_bytes),
        cmocka_unit_test(test_full_disk),
    };
    return cmocka_run_group_tests_name("h5", tests, make_dir, remove_dir);
}
