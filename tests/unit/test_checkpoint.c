/* The promises of the checkpoint file on one rank: round trip, parts of arrays, state hash,
 * retention. Damage and crashes are in test_checkpoint_damage, layouts over ranks in tests/par. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <sys/stat.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "io/checkpoint_parts.h"
#include "tests/unit/checkpoint_small.h"

static void test_round_trip(void **st)
{
    (void)st;
    md_checkpoint *ck;
    int n;
    assert_int_equal(md_checkpoint_find(self, dir, NULL, NULL, &ck), MD_ERR_NOINPUT);
    size_t before = md_alloc_now();
    assert_ok(write_step(12, 2, 0));
    assert_int_equal(newest(), 12);
    char path[512];
    md_checkpoint_name(path, sizeof path, dir, 12);
    assert_ok(md_checkpoint_find(self, path, NULL, NULL, &ck));
    assert_string_equal(md_checkpoint_path(ck), path);
    assert_string_equal(md_checkpoint_config(ck), "model = \"tiny\";\n");
    assert_string_equal(md_checkpoint_fact(ck, "dataset_hash"), "0011223344556677");
    const md_state_entry *e = md_checkpoint_entries(ck, &n);
    assert_int_equal(n, 5);
    assert_string_equal(e[0].name, "param/w");
    assert_int_equal(e[0].global[1], 3);
    struct stat info;
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(md_checkpoint_bytes(ck), info.st_size);
    md_checkpoint_close(ck);
    assert_int_equal(md_alloc_now(), before);
}

static void test_same_state_same_bytes(void **st)
{
    (void)st;
    static char a[1 << 20], b[1 << 20];
    char path[512];
    size_t n[2];
    md_checkpoint_name(path, sizeof path, dir, 5);
    for (int k = 0; k < 2; k++) {
        assert_ok(write_step(5, 1, 0));
        FILE *f = fopen(path, "rb");
        n[k] = fread(k ? b : a, 1, sizeof a, f);
        fclose(f);
    }
    assert_true(n[0] > 600000 && n[0] < sizeof a);
    assert_int_equal(n[0], n[1]);
    assert_memory_equal(a, b, n[0]);
}

static void test_wrong_item(void **st)
{
    (void)st;
    static float x[LONG];
    static const struct {
        const char *name;
        md_dtype dtype;
        int64_t n;
        const char *text;
    } bad[] = {{"param/none", MD_F32, 4, "has no param/none"},
               {"param/blocks.0.big", MD_F32, LONG - 1, "expected [76800] f32"},
               {"param/blocks.0.big", MD_I32, LONG, "expected [76801] i32"}};
    md_checkpoint *ck;
    assert_ok(write_step(1, 1, 0));
    assert_ok(md_checkpoint_find(self, dir, NULL, NULL, &ck));
    for (size_t i = 0; i < MD_COUNT(bad); i++) {
        md_tensor t = MD_TENSOR(x, bad[i].dtype, bad[i].n);
        md_state_item it = md_state_item_make(bad[i].name, &t);
        assert_int_equal(md_checkpoint_read(ck, &it, 1), MD_ERR_DATA);
        if (!strcasestr(md_error_text(), bad[i].text))
            fail_msg("\"%s\" lacks \"%s\"", md_error_text(), bad[i].text);
    }
    md_checkpoint_close(ck);
}

static void test_retention(void **st)
{
    (void)st;
    int64_t *steps;
    int n;
    for (int64_t s = 10; s <= 90; s += 10)
        assert_ok(write_step(s, 2, 40));
    assert_ok(md_checkpoint_list(dir, &steps, &n));
    static const int64_t want[] = {90, 80, 40};
    assert_int_equal(n, 3);
    assert_memory_equal(steps, want, sizeof want);
    md_free(steps);
    /* Going back sets the later steps aside, and never deletes what was just written. */
    assert_ok(write_step(50, 1, 0));
    assert_int_equal(newest(), 50);
    assert_int_equal(files(".h5"), 1);
    assert_int_equal(files("80.h5.abandoned"), 0); /* of 80 and 90 the newest `keep` stay */
    assert_int_equal(files("90.h5.abandoned"), 1);
    char path[512], text[64] = "";
    snprintf(path, sizeof path, "%s/LATEST", dir);
    FILE *f = fopen(path, "r");
    assert_non_null(fgets(text, sizeof text, f));
    fclose(f);
    assert_string_equal(text, "step-00000050.h5\n");
}

/* ---- parts of arrays ---- */

/* The views say what they should: element by element, by the dimensions themselves. */
static void test_cut_views(void **st)
{
    (void)st;
    for (int i = 0; i < ITEMS; i++)
        for (int d = 0; d < shape[i].rank; d++)
            for (int of = 1; of <= 5; of++)
                for (int parts = 1; parts <= 3; parts += 2)
                    for (int part = 0; part < of; part++) {
                        md_view v = cut_view(i, d, parts, part, of);
                        int64_t p = shape[i].dim[d] % parts == 0 ? parts : 1;
                        int64_t n = shape[i].dim[d] / p, e = 0;
                        int64_t inner = product(shape[i].dim + d + 1, shape[i].rank - d - 1);
                        int64_t all = product(shape[i].dim, shape[i].rank);
                        for (int64_t g = 0; g < all; g++) {
                            int64_t at = g / inner % n; /* in its interleaved part */
                            if (at < n * part / of || at >= n * (part + 1) / of)
                                continue;
                            if (md_view_global(&v, e++) != g)
                                fail_msg("item %d, cut %d, %d parts, %d of %d: element %lld", i, d,
                                         parts, part, of, (long long)g);
                        }
                        assert_int_equal(e, v.run * v.runs);
                    }
}

/* A state that one rank wrote, read as each rank of many layouts would read it, and as ranges that
 * start and end anywhere; what lies beside the block is left alone. */
static void test_any_part_is_read(void **st)
{
    (void)st;
    md_state_item it[ITEMS];
    md_checkpoint *ck;
    make_items(it, ROWS, 0, 1, false);
    put_values(it);
    md_checkpoint_args a = {
        .comm = self, .dir = dir, .step = 1, .item = it, .items = ITEMS, .keep = 1};
    assert_ok(md_checkpoint_write(&a));
    free_items(it);
    assert_ok(md_checkpoint_find(self, dir, NULL, NULL, &ck));
    for (int size = 1; size <= 6; size++)
        for (int rank = 0; rank < size; rank++) {
            make_items(it, size * 5 + rank, rank, size, true);
            assert_ok(md_checkpoint_read(ck, it, ITEMS));
            check_values(it);
            free_items(it);
        }
    for (int64_t lo = 0; lo < 20000; lo += 1777)
        for (int64_t count = 0; count < 9000; count = count * 3 + 1) {
            static float x[9000 + 2];
            cut_item(&it[PROJ], PROJ, COLUMNS, 1, 3);
            it[PROJ].lo = lo;
            it[PROJ].count = count;
            it[PROJ].data = x + 1;
            x[0] = x[count + 1] = -1;
            assert_ok(md_checkpoint_read(ck, &it[PROJ], 1));
            for (int64_t k = 0; k < count; k++) {
                unsigned char want[8];
                value_of(PROJ, md_view_global(&it[PROJ].view, lo + k), want);
                assert_memory_equal(x + 1 + k, want, sizeof *x);
            }
            assert_true(x[0] == -1 && x[count + 1] == -1);
        }
    md_checkpoint_close(ck);
}

/* Sum of what the ranks of a layout cover of item i; *bad is added to rank `mutant`'s block. */
static bool covers(int i, int round, int size, int mutant, const md_state_item *bad)
{
    md_ckpt_cover sum = {0, 0};
    for (int rank = 0; rank < size; rank++) {
        md_state_item it;
        cut_item(&it, i, round, rank, size);
        if (rank == mutant) {
            it.view.first += bad->view.first;
            it.view.stride += bad->view.stride;
            it.lo += bad->lo;
            it.count += bad->count;
        }
        if (md_ckpt_item_check(&it) != MD_OK)
            return false;
        md_ckpt_cover c = md_ckpt_cover_block(&it);
        sum.bytes += c.bytes;
        sum.ends += c.ends;
    }
    md_state_item all = whole_item(i);
    md_ckpt_cover want = md_ckpt_cover_whole(&all);
    return sum.bytes == want.bytes && (sum.ends & MD_CKPT_COVER_MASK) == want.ends;
}

/* Every layout covers every array once, and none of its mutants does: one element has no owner, or
 * two, or both for another element, or runs lie elsewhere. */
static void test_cover(void **st)
{
    (void)st;
    static const md_state_item bad[] = {{.count = -1},
                                        {.count = 1},
                                        {.lo = 1, .count = -1},
                                        {.lo = -1, .count = 1},
                                        {.lo = 1},
                                        {.lo = -1},
                                        {.view = {.first = 1}},
                                        {.view = {.first = -1}},
                                        {.count = -7},
                                        {.view = {.stride = 1}}};
    for (int i = 0; i < ITEMS; i++)
        for (int round = 0; round <= COLUMNS; round++)
            for (int size = 1; size <= 6; size++) {
                assert_true(covers(i, round, size, -1, NULL));
                for (int rank = 0; rank < size; rank++)
                    for (size_t k = 0; k < MD_COUNT(bad); k++) {
                        md_state_item it;
                        cut_item(&it, i, round, rank, size);
                        bool idle = it.count == 0 ||
                                    (bad[k].view.stride && /* the block ends in the first run */
                                     (it.lo + it.count - 1) / it.view.run == 0);
                        if (!idle && covers(i, round, size, rank, &bad[k]))
                            fail_msg("item %d round %d, mutant %d on %d of %d", i, round, (int)k,
                                     rank, size);
                    }
            }
}

/* The shares of any number of parts cover every array once, in order, are one stretch of the file,
 * cut between blocks, and differ by no more than a block. */
static void test_shares(void **st)
{
    (void)st;
    for (int parts = 1; parts <= 70; parts += 3) {
        int64_t next[ITEMS] = {0};
        for (int part = 0; part < parts; part++) {
            md_state_item it[ITEMS];
            int64_t bytes = 0, all = 0;
            int last = -1;
            for (int i = 0; i < ITEMS; i++) {
                it[i] = whole_item(i);
                it[i].data = dir;
                all += md_ckpt_item_bytes(&it[i]);
            }
            md_state_items_share(it, ITEMS, part, parts);
            for (int i = 0; i < ITEMS; i++) {
                int64_t width = (int64_t)md_dtype_bytes(it[i].dtype);
                if (it[i].count == 0)
                    continue;
                assert_int_equal(it[i].lo, next[i]);
                assert_int_equal(it[i].lo * width % MD_CKPT_BLOCK, 0);
                assert_ptr_equal(it[i].data, dir + next[i] * width);
                assert_true(last < 0 || next[i] == 0); /* one stretch */
                next[i] += it[i].count;
                bytes += it[i].count * width;
                last = i;
            }
            assert_true(llabs(bytes - all / parts) <= MD_CKPT_BLOCK);
        }
        for (int i = 0; i < ITEMS; i++)
            assert_int_equal(next[i], product(shape[i].dim, shape[i].rank));
    }
}

/* ---- the state hash ---- */

static uint64_t hash_of(const md_state_item *item, int items, int64_t step)
{
    md_checkpoint *ck;
    md_checkpoint_args a = {.comm = self,
                            .dir = dir,
                            .step = step,
                            .item = item,
                            .items = items,
                            .config = step > 1 ? "another = 1;\n" : "",
                            .keep = 1};
    assert_ok(md_checkpoint_write(&a));
    assert_ok(md_checkpoint_find(self, dir, NULL, NULL, &ck));
    uint64_t hash = md_checkpoint_state_hash(ck);
    md_checkpoint_close(ck);
    return hash;
}

/* It is what checkpoint.h says, and does not depend on the order of items, step or config; a change
 * of a name, a shape, a type or a value changes it. */
static void test_state_hash(void **st)
{
    (void)st;
    int32_t a[6] = {1, 2, 3, 4, 5, 6}, b[2] = {7, 8};
    const md_tensor ta = MD_TENSOR(a, MD_I32, 2, 3), tb = MD_TENSOR(b, MD_I32, 2);
    const md_tensor turned = MD_TENSOR(a, MD_I32, 3, 2), real = MD_TENSOR(b, MD_F32, 2);
    md_state_item it[2] = {md_state_item_make("b", &tb), md_state_item_make("a", &ta)};
    uint64_t want = hash_of(it, 2, 1);

    unsigned char text[2][2 + 4 + 48] = {"a\0I32", "b\0I32"};
    const void *data[2] = {a, b};
    const size_t bytes[2] = {sizeof a, sizeof b};
    const int64_t dims[2][5] = {{2, 2, 3, 0, 0}, {1, 2, 0, 0, 0}};
    for (int i = 0; i < 2; i++) {
        uint64_t block = XXH3_64bits(data[i], bytes[i]), item = XXH3_64bits(&block, sizeof block);
        memcpy(text[i] + 6, dims[i], sizeof dims[i]);
        memcpy(text[i] + 6 + sizeof dims[i], &item, sizeof item);
    }
    assert_true(want == XXH3_64bits(text, sizeof text));

    md_state_item other[2] = {it[1], it[0]};
    assert_true(hash_of(other, 2, 2) == want);
    other[0].name = "c";
    assert_true(hash_of(other, 2, 3) != want);
    other[0] = md_state_item_make("a", &turned);
    assert_true(hash_of(other, 2, 4) != want);
    other[0] = it[1];
    other[1] = md_state_item_make("b", &real);
    assert_true(hash_of(other, 2, 5) != want);
    b[1]++;
    assert_true(hash_of(it, 2, 6) != want);
    assert_true(hash_of(it, 1, 7) != want);
}

static void test_not_finite(void **st)
{
    (void)st;
    static float x[300000];
    static const float poison[] = {0.0f / 0.0f, 1.0f / 0.0f, -1.0f / 0.0f};
    static const int place[] = {0, 299999, 262144};
    double d[3] = {1, 2, 3};
    const md_tensor tx = MD_TENSOR(x, MD_F32, 300000), td = MD_TENSOR(d, MD_F64, 3);
    md_state_item it[2] = {md_state_item_make("param/x", &tx), md_state_item_make("d", &td)};
    md_checkpoint_args a = {.comm = self, .dir = dir, .step = 2, .item = it, .items = 2, .keep = 1};
    assert_ok(write_step(1, 1, 0));
    for (int i = 0; i < 3; i++) {
        x[place[i]] = poison[i];
        assert_int_equal(md_checkpoint_write(&a), MD_ERR_NUMERICS);
        x[place[i]] = 3e38f;
    }
    d[2] = -(double)poison[1];
    assert_int_equal(md_checkpoint_write(&a), MD_ERR_NUMERICS);
    assert_int_equal(newest(), 1);
    assert_int_equal(files(".partial"), 0);
    d[2] = 1e308;
    assert_ok(md_checkpoint_write(&a));
}

static void test_cannot_create(void **st)
{
    (void)st;
    static small_state s;
    md_state_item it[5];
    fill(&s, 1);
    md_checkpoint_args a = {.comm = self,
                            .dir = "/nonexistent/dir",
                            .step = 1,
                            .item = it,
                            .items = items_of(&s, it),
                            .keep = 1};
    assert_int_equal(md_checkpoint_write(&a), MD_ERR_CREATE);
}

int main(void)
{
    if (!make_dir() || md_comm_self(&self) != MD_OK)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_round_trip, setup),
        cmocka_unit_test_setup(test_same_state_same_bytes, setup),
        cmocka_unit_test_setup(test_wrong_item, setup),
        cmocka_unit_test_setup(test_retention, setup),
        cmocka_unit_test_setup(test_cut_views, setup),
        cmocka_unit_test_setup(test_any_part_is_read, setup),
        cmocka_unit_test_setup(test_cover, setup),
        cmocka_unit_test_setup(test_shares, setup),
        cmocka_unit_test_setup(test_state_hash, setup),
        cmocka_unit_test_setup(test_not_finite, setup),
        cmocka_unit_test_setup(test_cannot_create, setup),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    empty_dir();
    rmdir(dir);
    md_comm_free(self);
    return failed;
}
