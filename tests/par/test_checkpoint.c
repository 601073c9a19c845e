/* Checkpoints written by R ranks and read by R' ranks, each item cut in its own way, for all R and
 * R' up to the ranks there are; and all ranks' same exit when a phase fails on one of them. */
#include "tests/par/par_main.h"

#include "mpi/agree.h"
#include "tests/checkpoint_state.h"

static md_status write_all(md_comm *c, int64_t step, int round)
{
    md_state_item it[ITEMS];
    make_items(it, round, md_comm_rank(c), md_comm_size(c), false);
    put_values(it);
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

/* Returns the state hash. */
static uint64_t read_all(md_comm *c, int64_t step, int round)
{
    md_state_item it[ITEMS];
    md_checkpoint *ck;
    assert_ok(md_checkpoint_find(c, dir, NULL, NULL, &ck));
    assert_int_equal(md_checkpoint_step(ck), step);
    assert_string_equal(md_checkpoint_config(ck), "model = 1;\n");
    assert_string_equal(md_checkpoint_fact(ck, "next_batch"), "77");
    assert_null(md_checkpoint_fact(ck, "nothing"));
    make_items(it, round, md_comm_rank(c), md_comm_size(c), true);
    assert_ok(md_checkpoint_read(ck, it, ITEMS));
    check_values(it);
    free_items(it);
    uint64_t hash = md_checkpoint_state_hash(ck);
    md_checkpoint_close(ck);
    return hash;
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

/* The state hash is the same whoever wrote the state. */
static void test_any_layout(void **state)
{
    (void)state;
    int64_t step = 0; /* behind the steps that are there: the run went back */
    uint64_t hash = 0;
    for (int w = 1; w <= md_comm_size(par_world); w++)
        for (int r = 1; r <= md_comm_size(par_world); r++)
            for (int k = 0; k < 5; k++) {
                int round = (5 * (w + r) + k) % ROUNDS;
                md_comm *writers = first_ranks(w), *readers = first_ranks(r);
                step++;
                if (writers)
                    assert_ok(write_all(writers, step, round));
                md_comm_barrier(par_world);
                uint64_t got = readers ? read_all(readers, step, round * 7 + r) : hash;
                hash = step == 1 ? got : hash;
                if (readers && step > 1 && md_comm_rank(par_world) == 0)
                    assert_int_equal(got, hash);
                md_comm_free(writers);
                md_comm_free(readers);
                md_comm_barrier(par_world);
            }
    assert_int_equal(files(".abandoned"), 2);
}

/* A fault while blocks of short pieces are put together: set_faults has it in the first write. */
static void test_failing_gather(void **state)
{
    (void)state;
    if (md_comm_size(par_world) == 1)
        skip(); /* its pieces are whole rows: they make one run */
    assert_int_equal(write_all(par_world, 1, COLUMNS), MD_ERR_IO);
    assert_non_null(strstr(md_error_text(), "cannot write"));
    md_comm_barrier(par_world);
    assert_int_equal(files(".partial"), 0);
    assert_int_equal(files(".h5"), 0);
}

/* Every rank in turn has one byte of an item changed behind its back, after it has written it. It
 * is found, whoever else owns a part of the same 1 MiB, and nothing stays of the write. */
static void flip_on_every_rank(int round, const char *text)
{
    for (int r = 0; r < md_comm_size(par_world); r++) {
        assert_int_equal(write_all(par_world, 1 + r, round), MD_ERR_IO);
        assert_non_null(strstr(md_error_text(), text));
        md_comm_barrier(par_world);
        assert_int_equal(files(".partial"), 0);
        assert_int_equal(files(".h5"), 0);
        md_comm_barrier(par_world);
    }
}

static void test_flipped_byte_is_found(void **state)
{
    (void)state;
    flip_on_every_rank(ROWS, "of m/big is not what was written");
    flip_on_every_rank(COLUMNS, "of param/blocks.0.attn.proj.weight is not what was written");
}

/* Reading fails once at each of its sites, on one rank: the same status on all, and no older
 * checkpoint is taken instead. */
static void test_failing_reads(void **state)
{
    (void)state;
    static const char *const text[] = {"cannot read the folder", "cannot open",
                                       "cannot be read and hashed"};
    md_state_item it[ITEMS];
    md_checkpoint *ck;
    assert_ok(write_all(par_world, 998, 0));
    assert_ok(write_all(par_world, 999, 0));
    for (size_t k = 0; k < MD_COUNT(text); k++) {
        assert_int_equal(md_checkpoint_find(par_world, dir, NULL, NULL, &ck), MD_ERR_IO);
        if (!strstr(md_error_text(), text[k]))
            fail_msg("\"%s\" lacks \"%s\"", md_error_text(), text[k]);
    }
    assert_ok(md_checkpoint_find(par_world, dir, NULL, NULL, &ck));
    make_items(it, 2, md_comm_rank(par_world), md_comm_size(par_world), true);
    assert_int_equal(md_checkpoint_read(ck, it, ITEMS), MD_ERR_IO);
    assert_non_null(strstr(md_error_text(), "cannot read: "));
    free_items(it);
    md_checkpoint_close(ck);
    read_all(par_world, 999, 2);
}

/* Each phase fails once, on the rank that set_faults names: all ranks get the same status, the
 * checkpoint of the test before stays the newest one and no temporary file stays. */
static void test_failing_phases(void **state)
{
    (void)state;
    static const md_status want[] = {MD_ERR_CREATE, MD_ERR_IO, MD_ERR_IO,    MD_ERR_IO,
                                     MD_ERR_IO,     MD_ERR_IO, MD_ERR_CREATE};
    for (size_t k = 0; k < MD_COUNT(want); k++) {
        md_status st = write_all(par_world, 1000 + (int64_t)k, (int)k);
        assert_int_equal(st, want[k]);
        md_comm_barrier(par_world);
        assert_int_equal(files(".partial"), 0);
        read_all(par_world, 999, (int)k);
        md_comm_barrier(par_world);
    }
    /* What fails behind the rename is a warning: the checkpoint is there. */
    assert_ok(write_all(par_world, 2000, 1));
    read_all(par_world, 2000, 0);
    assert_ok(write_all(par_world, 2001, 2));
    read_all(par_world, 2001, 0);
    md_comm_barrier(par_world);
    assert_int_equal(files(".h5"), 2);
    /* The run goes back and later steps cannot be set aside: the new one is not what is deleted. */
    md_comm_barrier(par_world);
    assert_ok(write_all(par_world, 1500, 3));
    assert_int_equal(files(".h5"), 3);
    md_comm_barrier(par_world);
    assert_ok(write_all(par_world, 1501, 3));
    assert_int_equal(files(".h5"), 2);
    read_all(par_world, 1501, 4);
}

static void test_not_finite_is_refused(void **state)
{
    (void)state;
    int rank = md_comm_rank(par_world), size = md_comm_size(par_world);
    for (int round = ROWS; round <= COLUMNS; round++) { /* found by its owner, or where gathered */
        md_state_item it[ITEMS];
        make_items(it, round, rank, size, false);
        put_values(it);
        if (rank == size - 1)
            ((float *)it[PROJ].data)[37] = -1.0f / 0.0f;
        md_checkpoint_args a = {
            .comm = par_world, .dir = dir, .step = 9999, .item = it, .items = ITEMS, .keep = 1};
        assert_int_equal(md_checkpoint_write(&a), MD_ERR_NUMERICS);
        assert_non_null(strstr(md_error_text(), shape[PROJ].name));
        free_items(it);
    }
    read_all(par_world, 1501, 3);
}

/* A right layout but for the last rank's block of one item: that is found on all ranks, before
 * anything is written. */
static void test_gap_and_overlap_are_bugs(void **state)
{
    (void)state;
    static const struct {
        int round, item;
        int64_t first, run, count;        /* added */
    } bad[] = {{ROWS, BIG, 0, 0, -1},     /* one element has no owner */
               {ROWS, BIG, -1, 1, 1},     /* one has two */
               {COLUMNS, PROJ, -1, 0, 0}, /* one column has none, another two */
               {COLUMNS, PROJ, 0, 0, 1}}; /* the block is longer than its view */
    int rank = md_comm_rank(par_world), size = md_comm_size(par_world);
    for (size_t k = 0; k < MD_COUNT(bad); k++) {
        md_state_item it[ITEMS];
        make_items(it, bad[k].round, rank, size, false);
        put_values(it);
        md_state_item *x = &it[bad[k].item];
        if (rank == size - 1) {
            x->view.first += bad[k].first;
            x->view.run += bad[k].run;
            x->count += bad[k].count;
        }
        md_checkpoint_args a = {
            .comm = par_world, .dir = dir, .step = 9999, .item = it, .items = ITEMS, .keep = 1};
        char text[128];
        snprintf(text, sizeof text, "checkpoint item %s", x->name);
        assert_int_equal(md_checkpoint_write(&a), MD_ERR_BUG);
        assert_non_null(strstr(md_error_text(), text));
        free_items(it);
    }
    md_comm_barrier(par_world);
    assert_int_equal(files(".partial"), 0);
}

static int share_dir(void **state)
{
    (void)state;
    md_status st = md_comm_rank(par_world) > 0 || make_dir() ? MD_OK : MD_ERR_IO;
    md_comm_bcast(par_world, dir, sizeof dir, 0);
    return md_agree(par_world, st) == MD_OK ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    md_comm_barrier(par_world);
    if (md_comm_rank(par_world) > 0)
        return 0;
    empty_dir();
    return rmdir(dir);
}

static int job_number(const char *openmpi, const char *pmi, int alone)
{
    const char *env = getenv(openmpi);
    env = env ? env : getenv(pmi);
    return env ? atoi(env) : alone;
}

/* Which pass of each site fails on which rank, counted over the writes and reads of the tests in
 * their order: a write that fails while it gathers (with several ranks), 2 * size that fail at
 * their flipped byte, two good ones, then one that fails at the first site, one that passes that
 * and fails at the next, and so on. Set before anything asks for faults. */
__attribute__((constructor)) static void set_faults(void)
{
    int size = job_number("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", 1), last = size - 1;
    int rank = job_number("OMPI_COMM_WORLD_RANK", "PMI_RANK", 0);
    int synced = 2 * size + 3, created = synced + (size > 1);
    const struct {
        const char *site;
        int rank, pass;
    } fault[] = {{"gather", size > 1 ? 1 : -1, 1},
                 {"flip", rank, rank * ITEMS + BIG + 1},
                 {"flip", rank, (size + rank) * ITEMS + PROJ + 1},
                 {"list", 0, 7}, /* a good write passes it three times */
                 {"open", 0, 1},
                 {"hash", last, 1},
                 {"read", last, 1},
                 {"create", 0, created},
                 {"space", 0, created},
                 {"write", last, created},
                 {"fsync", last, synced},
                 {"verify", last, 3},
                 {"seal", 0, 3},
                 {"rename", 0, 3},
                 {"latest", 0, 3},
                 {"abandon", 0, 1}};
    char list[1024] = "";
    for (size_t i = 0; i < MD_COUNT(fault); i++)
        if (fault[i].rank == rank)
            snprintf(list + strlen(list), sizeof list - strlen(list), "ckpt.%s#%d,", fault[i].site,
                     fault[i].pass);
    setenv("MD_FAULT", list, 1);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup(test_failing_gather, share_dir),
    cmocka_unit_test(test_flipped_byte_is_found),
    cmocka_unit_test(test_failing_reads),
    cmocka_unit_test(test_failing_phases),
    cmocka_unit_test(test_not_finite_is_refused),
    cmocka_unit_test(test_gap_and_overlap_are_bugs),
    cmocka_unit_test_teardown(test_any_layout, remove_dir),
};

PAR_MAIN(tests)
