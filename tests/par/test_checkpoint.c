/* Checkpoints written by R ranks and read by R' ranks, each item cut in its own way, for all R and
 * R' up to the ranks there are; and all ranks' same exit when a phase fails on one of them. */
#include "tests/par/par_main.h"

#include <dirent.h>

#include "io/checkpoint.h"

enum { ITEMS = 7, FLIPPED = 3, ROWS = -1 };

static char dir[256];

static const struct {
    const char *name;
    md_dtype dtype;
    int rank;
    int64_t dim[MD_MAX_RANK];
} shape[ITEMS] = {
    {"param/patch.weight", MD_F32, 4, {12, 3, 4, 4}},
    {"param/blocks.0.attn.qkv.weight",
     MD_F32,
     2,
     {768, 513}}, /* 1.5 MiB: blocks split over ranks */
    {"param/blocks.0.attn.q_bias", MD_F32, 1, {37}},
    {"m/big", MD_F32, 1, {700001}},
    {"v/cube", MD_F64, 3, {5, 7, 11}},
    {"counter", MD_I64, 1, {1}},
    {"bytes", MD_U8, 2, {9, 13}},
};

static int64_t elements(const int64_t *dim, int rank)
{
    int64_t n = 1;
    for (int d = 0; d < rank; d++)
        n *= dim[d];
    return n;
}

/* The value of element e of item i, as bytes. */
static void value_of(int i, int64_t e, unsigned char *out)
{
    int64_t v = (e * 31 + i * 7) % 8191;
    float f = (float)v;
    double g = (double)v;
    uint8_t b = (uint8_t)v;
    const void *from = shape[i].dtype == MD_F32   ? (void *)&f
                       : shape[i].dtype == MD_F64 ? (void *)&g
                       : shape[i].dtype == MD_I64 ? (void *)&v
                                                  : (void *)&b;
    memcpy(out, from, md_dtype_bytes(shape[i].dtype));
}

/* Visits the block's elements in local order with their global index. */
static void each_element(md_state_item *it, int i, void (*visit)(int i, int64_t e, void *at))
{
    int64_t n = elements(it->count, it->rank);
    size_t width = md_dtype_bytes(it->dtype);
    for (int64_t k = 0; k < n; k++) {
        int64_t rest = k, e = 0, stride = 1;
        for (int d = it->rank - 1; d >= 0; d--) {
            e += (it->start[d] + rest % it->count[d]) * stride;
            rest /= it->count[d];
            stride *= it->global[d];
        }
        visit(i, e, (char *)it->data + (size_t)k * width);
    }
}

static void put(int i, int64_t e, void *at)
{
    value_of(i, e, at);
}

static void check(int i, int64_t e, void *at)
{
    unsigned char want[8];
    value_of(i, e, want);
    assert_memory_equal(at, want, md_dtype_bytes(shape[i].dtype));
}

/* The rank's part of item i when it is cut along dimension `cut` (-1: the last rank has it all, or,
 * for reading, every rank has it all). */
static void make_item(md_state_item *it, int i, md_comm *c, int cut, bool replicated)
{
    int rank = md_comm_rank(c), size = md_comm_size(c);
    *it = (md_state_item){.name = shape[i].name, .dtype = shape[i].dtype, .rank = shape[i].rank};
    for (int d = 0; d < it->rank; d++)
        it->global[d] = it->count[d] = shape[i].dim[d];
    if (cut >= 0) {
        it->start[cut] = it->global[cut] * rank / size;
        it->count[cut] = it->global[cut] * (rank + 1) / size - it->start[cut];
    } else if (!replicated && rank != size - 1) {
        it->count[0] = 0;
    }
    for (int d = 0; d < it->rank; d++) /* nothing at all is said by the first dimension */
        if (it->count[d] == 0)
            it->count[0] = 0;
    size_t bytes = it->count[0] ? (size_t)elements(it->count, it->rank) : 0;
    it->data = md_alloc(bytes * md_dtype_bytes(it->dtype), "test");
    assert_non_null(it->data);
}

/* A cut for item i in round `k`: every dimension in turn, then none; round ROWS cuts the first. */
static int cut_for(int i, int k)
{
    return k == ROWS ? 0 : (i + k) % (shape[i].rank + 1) - 1;
}

static void free_items(md_state_item *it)
{
    for (int i = 0; i < ITEMS; i++)
        md_free(it[i].data);
}

static md_status write_all(md_comm *c, int64_t step, int round)
{
    md_state_item it[ITEMS];
    for (int i = 0; i < ITEMS; i++) {
        make_item(&it[i], i, c, cut_for(i, round), false);
        if (it[i].count[0])
            each_element(&it[i], i, put);
    }
    md_fact fact[] = {{"registry", "0123abcd"}, {"next_batch", "77"}};
    md_status st = md_checkpoint_write(&(md_checkpoint_args){.comm = c,
                                                             .dir = dir,
                                                             .step = step,
                                                             .item = it,
                                                             .items = ITEMS,
                                                             .config = "model = 1;\n",
                                                             .fact = fact,
                                                             .facts = 2,
                                                             .keep = 2});
    free_items(it);
    return st;
}

static void read_all(md_comm *c, int64_t step, int round)
{
    md_state_item it[ITEMS];
    md_checkpoint *ck;
    assert_ok(md_checkpoint_find(c, dir, NULL, NULL, &ck));
    assert_int_equal(md_checkpoint_step(ck), step);
    assert_string_equal(md_checkpoint_config(ck), "model = 1;\n");
    assert_string_equal(md_checkpoint_fact(ck, "next_batch"), "77");
    assert_null(md_checkpoint_fact(ck, "nothing"));
    for (int i = 0; i < ITEMS; i++)
        make_item(&it[i], i, c, cut_for(i, round), true);
    assert_ok(md_checkpoint_read(ck, it, ITEMS));
    for (int i = 0; i < ITEMS; i++)
        if (it[i].count[0])
            each_element(&it[i], i, check);
    free_items(it);
    md_checkpoint_close(ck);
}

/* The first `size` ranks as a group; NULL on the others. */
static md_comm *first_ranks(int size)
{
    md_comm *c;
    bool in = md_comm_rank(par_world) < size;
    assert_ok(md_comm_split(par_world, in, 0, &c));
    if (in)
        return c;
    md_comm_free(c);
    return NULL;
}

static int files_matching(const char *ending)
{
    int n = 0;
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        size_t a = strlen(e->d_name), b = strlen(ending);
        n += a >= b && strcmp(e->d_name + a - b, ending) == 0;
    }
    closedir(d);
    return n;
}

static void test_any_layout(void **state)
{
    (void)state;
    int64_t step = 0; /* behind the steps that are there: the run went back */
    for (int w = 1; w <= md_comm_size(par_world); w++)
        for (int r = 1; r <= md_comm_size(par_world); r++)
            for (int round = 0; round < 5; round++) {
                md_comm *writers = first_ranks(w), *readers = first_ranks(r);
                step++;
                if (writers)
                    assert_ok(write_all(writers, step, round));
                md_comm_barrier(par_world);
                if (readers)
                    read_all(readers, step, round * 3 + 1);
                md_comm_free(writers);
                md_comm_free(readers);
                md_comm_barrier(par_world);
            }
    assert_int_equal(files_matching(".abandoned"), 2);
}

/* Every rank in turn has one byte of item FLIPPED changed behind its back, after it has written it.
 * It finds it, whoever else owns a part of the same 1 MiB, and nothing stays of the write. */
static void test_flipped_byte_is_found(void **state)
{
    (void)state;
    for (int r = 0; r < md_comm_size(par_world); r++) {
        assert_int_equal(write_all(par_world, 1 + r, ROWS), MD_ERR_IO);
        assert_non_null(strstr(md_error_text(), "of m/big is not what was written"));
        md_comm_barrier(par_world);
        assert_int_equal(files_matching(".partial"), 0);
        assert_int_equal(files_matching(".h5"), 0);
        md_comm_barrier(par_world);
    }
}

/* The shares of any number of parts cover every row once, in order, and differ by no more than the
 * largest rows. */
static void test_shares(void **state)
{
    (void)state;
    for (int parts = 1; parts <= 70; parts += 3) {
        int64_t next[ITEMS] = {0};
        for (int part = 0; part < parts; part++) {
            md_state_item it[ITEMS];
            int64_t bytes = 0, all = 0;
            int last = -1;
            for (int i = 0; i < ITEMS; i++) {
                md_tensor t = md_tensor_make(dir, shape[i].dtype, shape[i].rank, shape[i].dim);
                it[i] = md_state_item_make(shape[i].name, &t);
                all += (int64_t)md_tensor_bytes(&t);
            }
            md_state_items_share(it, ITEMS, part, parts);
            for (int i = 0; i < ITEMS; i++) {
                int64_t row = elements(shape[i].dim + 1, shape[i].rank - 1) *
                              (int64_t)md_dtype_bytes(shape[i].dtype);
                if (it[i].count[0] == 0)
                    continue;
                assert_int_equal(it[i].start[0], next[i]);
                assert_ptr_equal(it[i].data, dir + next[i] * row);
                assert_true(last < 0 || next[i] == 0); /* one stretch */
                next[i] += it[i].count[0];
                bytes += it[i].count[0] * row;
                last = i;
            }
            assert_true(llabs(bytes - all / parts) <= 513 * 4 + 1);
        }
        for (int i = 0; i < ITEMS; i++)
            assert_int_equal(next[i], shape[i].dim[0]);
    }
}

/* Each phase fails once, on the rank that set_faults names: all ranks get the same status, the old
 * checkpoint stays the newest one and no temporary file stays. */
static void test_failing_phases(void **state)
{
    (void)state;
    static const md_status want[] = {MD_ERR_CREATE, MD_ERR_IO, MD_ERR_IO,    MD_ERR_IO,
                                     MD_ERR_IO,     MD_ERR_IO, MD_ERR_CREATE};
    assert_ok(write_all(par_world, 1000, 0));
    for (size_t k = 0; k < MD_COUNT(want); k++) {
        md_status st = write_all(par_world, 1001 + (int64_t)k, (int)k);
        assert_int_equal(st, want[k]);
        md_comm_barrier(par_world);
        assert_int_equal(files_matching(".partial"), 0);
        read_all(par_world, 1000, (int)k);
        md_comm_barrier(par_world);
    }
    /* What fails behind the rename is a warning: the checkpoint is there. */
    assert_ok(write_all(par_world, 2000, 1));
    read_all(par_world, 2000, 0);
    assert_ok(write_all(par_world, 2001, 2));
    read_all(par_world, 2001, 0);
    md_comm_barrier(par_world);
    assert_int_equal(files_matching(".h5"), 2);
}

static void test_not_finite_is_refused(void **state)
{
    (void)state;
    int last = md_comm_size(par_world) - 1, rank = md_comm_rank(par_world);
    float x[100] = {0};
    x[37] = rank == last ? -1.0f / 0.0f : 5.0f;
    md_state_item it = {"param/x", MD_F32, 1, {100}, {0}, {rank == last ? 100 : 0}, x};
    md_checkpoint_args a = {
        .comm = par_world, .dir = dir, .step = 9999, .item = &it, .items = 1, .keep = 1};
    assert_int_equal(md_checkpoint_write(&a), MD_ERR_NUMERICS);
    assert_non_null(strstr(md_error_text(), "param/x"));
    read_all(par_world, 2001, 3);
}

static void test_gap_is_a_bug(void **state)
{
    (void)state;
    float x[10] = {0};
    md_state_item it = {"param/x", MD_F32, 1, {100}, {0}, {0}, x};
    it.count[0] = md_comm_rank(par_world) == 0 ? 10 : 0;
    md_checkpoint_args a = {
        .comm = par_world, .dir = dir, .step = 9999, .item = &it, .items = 1, .keep = 1};
    assert_int_equal(md_checkpoint_write(&a), MD_ERR_BUG);
    assert_non_null(strstr(md_error_text(), "40 of 400 bytes"));
}

static int make_dir(void **state)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/md-ckpt-XXXXXX", tmp ? tmp : "/tmp");
    if (md_comm_rank(par_world) == 0 && !mkdtemp(dir))
        return -1;
    md_comm_bcast(par_world, dir, sizeof dir, 0);
    (void)state;
    return 0;
}

static int remove_dir(void **state)
{
    (void)state;
    md_comm_barrier(par_world);
    if (md_comm_rank(par_world) > 0)
        return 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        char path[600];
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        if (e->d_name[0] != '.')
            remove(path);
    }
    if (d)
        closedir(d);
    return rmdir(dir);
}

/* Behind the writes with a flipped byte, one a rank, comes a good one; the next one fails at the
 * first site, the one behind it passes that and fails at the next site, and so on. Set before
 * anything asks for faults. */
__attribute__((constructor)) static void set_faults(void)
{
    const char *env = getenv("OMPI_COMM_WORLD_SIZE");
    if (!env)
        env = getenv("PMI_SIZE");
    int size = env ? atoi(env) : 1, last = size - 1, pass = size + 2;
    char list[1024];
    int n = snprintf(list, sizeof list,
                     "ckpt.create@rank0#%d,ckpt.space@rank0#%d,ckpt.write@rank%d#%d,"
                     "ckpt.fsync@rank%d#%d,ckpt.verify@rank%d#2,"
                     "ckpt.seal@rank0#2,ckpt.rename@rank0#2,ckpt.latest@rank0#2",
                     pass, pass, last, pass, last, pass, last);
    for (int r = 0; r < size; r++)
        n += snprintf(list + n, sizeof list - (size_t)n, ",ckpt.flip@rank%d#%d", r,
                      r * ITEMS + FLIPPED + 1);
    setenv("MD_FAULT", list, 1);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup(test_flipped_byte_is_found, make_dir),
    cmocka_unit_test(test_shares),
    cmocka_unit_test(test_failing_phases),
    cmocka_unit_test(test_not_finite_is_refused),
    cmocka_unit_test(test_gap_is_a_bug),
    cmocka_unit_test_teardown(test_any_layout, remove_dir),
};

PAR_MAIN(tests)
