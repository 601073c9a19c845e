/* The image store over several ranks: one index for all, the same answer everywhere, the same file
 * from any number of ranks. */
#include "tests/par/par_main.h"

#include "io/convert.h"
#include "io/dataset.h"
#include "mpi/agree.h"
#include "src/log.h"

enum { W = 6, H = 5, N = 40 };

static char root[64], images[128], out[128];

/* Rank 0 writes IDX files of small random-looking pictures into a folder of its own. */
static void make_source(void)
{
    if (md_comm_rank(par_world) == 0) {
        snprintf(root, sizeof root, "/tmp/md_par_dataset_XXXXXX");
        assert_non_null(mkdtemp(root));
    }
    md_comm_bcast(par_world, root, sizeof root, 0);
    snprintf(images, sizeof images, "%s/a-images-idx3-ubyte", root);
    snprintf(out, sizeof out, "%s/out.h5", root);
    if (md_comm_rank(par_world) == 0) {
        char labels[128];
        snprintf(labels, sizeof labels, "%s/a-labels-idx1-ubyte", root);
        FILE *f = fopen(images, "wb"), *l = fopen(labels, "wb");
        fwrite((uint8_t[]){0, 0, 8, 3, 0, 0, 0, N, 0, 0, 0, H, 0, 0, 0, W}, 1, 16, f);
        fwrite((uint8_t[]){0, 0, 8, 1, 0, 0, 0, N}, 1, 8, l);
        for (int i = 0; i < N * W * H; i++)
            fputc(i * i % 251, f);
        for (int i = 0; i < N; i++)
            fputc(i % 4, l);
        fclose(f);
        fclose(l);
    }
    md_comm_barrier(par_world);
}

static void remove_source(void)
{
    md_comm_barrier(par_world);
    if (md_comm_rank(par_world) > 0)
        return;
    char command[128];
    snprintf(command, sizeof command, "rm -r '%s'", root);
    assert_int_equal(system(command), 0);
}

/* By the group `c`, into `path`. */
static void convert(md_comm *c, const char *path)
{
    md_convert_source s = {images, "train"};
    md_convert_args a = {.out = path, .sources = &s, .n_sources = 1, .seed = 3};
    md_convert_summary sum;
    assert_ok(md_convert(&a, c, &sum));
    assert_int_equal(sum.images, N);
    assert_int_equal(sum.classes, 4);
    assert_int_equal(sum.bytes, N * W * H);
}

static void check_images(const md_dataset *d)
{
    uint8_t got[W * H], again[W * H];
    char name[64];
    size_t len;
    assert_int_equal(md_dataset_count(d), N);
    for (int64_t q = 0; q < N; q++) {
        int i = (int)md_store_order(3, N, q);
        assert_ok(md_dataset_read(d, q, got, sizeof got, &len));
        assert_ok(md_dataset_read_hdf5(d, q, again, sizeof again, &len));
        assert_int_equal(len, W * H);
        for (int k = i * W * H, p = 0; p < W * H; k++, p++)
            assert_true(got[p] == k * k % 251 && again[p] == got[p]);
        assert_int_equal(md_dataset_label(d, q), i % 4);
        snprintf(name, sizeof name, "a-images-idx3-ubyte#%d", i);
        char stored[64];
        assert_string_equal(md_dataset_name(d, q, stored, sizeof stored), name);
    }
}

static void test_all_ranks_read(void **state)
{
    (void)state;
    make_source();
    convert(par_world, out);
    md_dataset *d;
    assert_ok(md_dataset_open(out, "train", par_world, &d));
    assert_ok(md_dataset_use_hdf5(d, par_world));
    check_images(d);
    uint64_t mine = md_dataset_hash(d), first = mine;
    md_comm_bcast(par_world, &first, sizeof first, 0);
    assert_true(mine == first);
    md_dataset_close(d);
    remove_source();
}

static size_t load(const char *path, uint8_t *buf, size_t cap)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t n = fread(buf, 1, cap, f);
    fclose(f);
    return n;
}

static void test_file_depends_on_no_layout(void **state)
{
    (void)state;
    static uint8_t together[1 << 20], alone[1 << 20];
    make_source();
    convert(par_world, out);
    if (md_comm_rank(par_world) == 0) {
        char other[160];
        md_comm *self;
        snprintf(other, sizeof other, "%s.alone", out);
        assert_ok(md_comm_self(&self));
        convert(self, other);
        md_comm_free(self);
        size_t n = load(out, together, sizeof together);
        assert_int_equal(load(other, alone, sizeof alone), n);
        assert_memory_equal(together, alone, n);
    }
    remove_source();
}

/* Every failure is everybody's, with the same sentence. */
static void check_same(md_status st, md_status want, const char *words)
{
    char mine[512], first[512];
    snprintf(mine, sizeof mine, "%s", md_error_text());
    memcpy(first, mine, sizeof first);
    md_comm_bcast(par_world, first, sizeof first, 0);
    if (st != want || strcmp(mine, first) != 0 || !strstr(mine, words))
        fail_msg("%s '%s', expected %s '%s'", md_status_name(st), mine, md_status_name(want),
                 words);
}

static void test_failures_are_shared(void **state)
{
    (void)state;
    md_dataset *d;
    md_convert_summary sum;
    make_source();
    convert(par_world, out);
    check_same(md_dataset_open(out, "test", par_world, &d), MD_ERR_DATA, "it holds: train");
    check_same(md_dataset_open("/no/such.h5", "train", par_world, &d), MD_ERR_NOINPUT,
               "cannot open");
    check_same(md_dataset_open(images, "train", par_world, &d), MD_ERR_DATA, "not an HDF5 file");
    /* One changed byte: only the rank that reads it sees it, all are told. */
    if (md_comm_rank(par_world) == 0) {
        static uint8_t file[1 << 20];
        size_t n = load(out, file, sizeof file), at = n - W * H * N / 2;
        FILE *f = fopen(out, "r+b");
        fseek(f, (long)at, SEEK_SET);
        fputc(file[at] ^ 1, f);
        fclose(f);
    }
    md_comm_barrier(par_world);
    check_same(md_convert_verify(out, par_world, &sum), MD_ERR_DATA,
               "bytes differ from what was stored");
    if (md_comm_rank(par_world) == 0)
        assert_int_equal(truncate(out, 3000), 0);
    md_comm_barrier(par_world);
    check_same(md_dataset_open(out, "train", par_world, &d), MD_ERR_DATA, "cut");
    remove_source();
}

/* A read that keeps failing on the last rank is its own; the group agrees on it when it wants to.
 */
static void test_local_fault(void **state)
{
    (void)state;
    md_dataset *d;
    uint8_t buf[W * H];
    size_t len;
    make_source();
    convert(par_world, out);
    assert_ok(md_dataset_open(out, "train", par_world, &d));
    bool last = md_comm_rank(par_world) == md_comm_size(par_world) - 1;
    if (last)
        assert_int_equal(truncate(out, 4096), 0);
    md_comm_barrier(par_world);
    md_status st = last ? md_dataset_read(d, N - 1, buf, sizeof buf, &len) : MD_OK;
    check_same(md_agree(par_world, st), MD_ERR_IO, "cannot read");
    md_dataset_close(d);
    remove_source();
}

static int quiet(void **state)
{
    md_log_set(MD_LOG_ERROR);
    (void)state;
    return 0;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup(test_all_ranks_read, quiet),
    cmocka_unit_test(test_file_depends_on_no_layout),
    cmocka_unit_test(test_failures_are_shared),
    cmocka_unit_test(test_local_fault),
};

PAR_MAIN(tests)
