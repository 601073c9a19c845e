/* Parameters of an earlier run on every rank: all get the whole array and the same error. */
#include "tests/par/par_main.h"

#include <sys/stat.h>

#include "io/checkpoint.h"
#include "io/pretrained.h"
#include "io/weights.h"
#include "mpi/agree.h"

#define GOLDEN "tests/golden/vit_timm.safetensors"

/* More than one 1 MiB block, which is what a checkpoint is shared out by. */
enum { W_ROWS = 701, W_COLS = 513, W_COUNT = W_ROWS * W_COLS };

static char run[256], checkpoints[300], weights[300];
static float got[W_COUNT];

static float value(int64_t step, bool ema, int k)
{
    return (float)((step * 4099 + k) % 65521) * (ema ? -0.5f : 0.25f);
}

static void write_step(int64_t step)
{
    static float w[2][W_COUNT];
    for (int k = 0; k < W_COUNT; k++)
        for (int ema = 0; ema < 2; ema++)
            w[ema][k] = value(step, ema, k);
    const md_tensor t[] = {MD_TENSOR(w[0], MD_F32, W_ROWS, W_COLS),
                           MD_TENSOR(w[1], MD_F32, W_ROWS, W_COLS)};
    md_state_item item[] = {md_state_item_make("param/w", &t[0]),
                            md_state_item_make("ema/w", &t[1])};
    md_state_items_share(item, 2, md_comm_rank(par_world), md_comm_size(par_world));
    assert_ok(md_checkpoint_write(&(md_checkpoint_args){.comm = par_world,
                                                        .dir = checkpoints,
                                                        .step = step,
                                                        .item = item,
                                                        .items = 2,
                                                        .config = "model = 1;\n",
                                                        .keep = 9}));
}

static void check_loads(md_pretrained *p, int64_t step, bool ema)
{
    memset(got, 0, sizeof got);
    assert_ok(md_pretrained_load(p, "w", got));
    for (int k = 0; k < W_COUNT; k++)
        assert_true(got[k] == value(step, ema, k));
}

static void expect_error(md_status st, md_status want, const char *a, const char *b)
{
    assert_int_equal(st, want);
    if (!strstr(md_error_text(), a) || !strstr(md_error_text(), b))
        fail_msg("\"%s\" lacks \"%s\" or \"%s\"", md_error_text(), a, b);
}

/* Rank 0 changes a bit of the file. */
static void damage(const char *path, long at)
{
    md_comm_barrier(par_world);
    if (md_comm_rank(par_world) == 0) {
        FILE *f = fopen(path, "r+b");
        assert_non_null(f);
        fseek(f, at, SEEK_SET);
        int byte = fgetc(f);
        fseek(f, at, SEEK_SET);
        fputc(byte ^ 8, f);
        fclose(f);
    }
    md_comm_barrier(par_world);
}

static void damage_item(int64_t step, const char *name)
{
    char path[400];
    md_checkpoint *ck;
    md_checkpoint_name(path, sizeof path, checkpoints, step);
    assert_ok(md_checkpoint_open(par_world, path, &ck));
    long at = (long)md_checkpoint_entry(ck, name)->offset + (1 << 20) + 7;
    md_checkpoint_close(ck);
    damage(path, at);
}

/* The first load fails on rank 0, where set_fault has it: all fail, and may try again. */
static void test_checkpoint(void **state)
{
    (void)state;
    md_pretrained *p;
    int64_t dim[MD_MAX_RANK];
    write_step(1);
    write_step(2);
    assert_ok(md_pretrained_open(par_world, run, false, &p));
    assert_int_equal(md_pretrained_shape(p, "w", dim), 2);
    assert_true(dim[0] == W_ROWS && dim[1] == W_COLS);
    assert_string_equal(md_pretrained_config(p), "model = 1;\n");
    assert_non_null(strstr(md_pretrained_describe(p), "step-00000002.h5 at step 2"));
    expect_error(md_pretrained_load(p, "w", got), MD_ERR_IO, run, "injected fault");
    check_loads(p, 2, false);
    expect_error(md_pretrained_load(p, "v", got), MD_ERR_DATA, run, "has no parameter 'v'");
    md_pretrained_close(p);
    assert_ok(md_pretrained_open(par_world, run, true, &p));
    check_loads(p, 2, true);
    md_pretrained_close(p);
}

/* A directory has another checkpoint to offer, a file has not. */
static void test_damaged_checkpoint(void **state)
{
    (void)state;
    char path[400];
    md_pretrained *p;
    damage_item(2, "param/w");
    assert_ok(md_pretrained_open(par_world, run, false, &p));
    check_loads(p, 1, false);
    md_pretrained_close(p);
    md_checkpoint_name(path, sizeof path, checkpoints, 2);
    assert_ok(md_pretrained_open(par_world, path, false, &p));
    expect_error(md_pretrained_load(p, "w", got), MD_ERR_DATA, path, "param/w is damaged");
    md_pretrained_close(p);
    damage(path, 100); /* in the END mark */
    expect_error(md_pretrained_open(par_world, path, false, &p), MD_ERR_DATA, path, "damaged");
    assert_null(p);
}

static long find_in_file(const char *path, const void *data, size_t n)
{
    static char whole[1 << 21];
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t size = fread(whole, 1, sizeof whole, f);
    fclose(f);
    const char *at = memmem(whole, size, data, n);
    assert_non_null(at);
    return (long)(at - whole);
}

static void test_weights(void **state)
{
    (void)state;
    static const char name[] = "blocks.1.attn.qkv.weight";
    static float want[144 * 48];
    md_pretrained *p;
    md_safetensors *st;
    md_status made = MD_OK;
    if (md_comm_rank(par_world) == 0) {
        md_weights_import_report r;
        made = md_weights_import(&(md_weights_import_args){.input = GOLDEN, .output = weights}, &r);
    }
    assert_ok(md_agree(par_world, made));
    assert_ok(md_safetensors_open(GOLDEN, &st));
    assert_ok(md_safetensors_read_f32(st, md_safetensors_find(st, name), want));
    md_safetensors_close(st);
    assert_ok(md_pretrained_open(par_world, weights, false, &p));
    assert_ok(md_pretrained_load(p, name, got));
    assert_memory_equal(got, want, sizeof want);
    assert_false(md_pretrained_has(p, "w"));
    expect_error(md_pretrained_load(p, "w", got), MD_ERR_DATA, weights, "has no parameter 'w'");
    md_pretrained_close(p);
    expect_error(md_pretrained_open(par_world, weights, true, &p), MD_ERR_DATA, weights,
                 "holds no moving averages");
    assert_null(p);
    damage(weights, find_in_file(weights, want, sizeof want) + 10);
    assert_ok(md_pretrained_open(par_world, weights, false, &p));
    expect_error(md_pretrained_load(p, name, got), MD_ERR_DATA, weights, "is damaged");
    md_pretrained_close(p);
}

/* Only rank 0 looks at the path. */
static void test_nothing_there(void **state)
{
    (void)state;
    md_pretrained *p;
    expect_error(md_pretrained_open(par_world, "/nowhere/run", false, &p), MD_ERR_NOINPUT,
                 "/nowhere/run", "");
    assert_null(p);
    expect_error(md_pretrained_open(par_world, GOLDEN, false, &p), MD_ERR_DATA, GOLDEN,
                 "neither a checkpoint nor a weights file");
    assert_null(p);
}

static int make_run(void **state)
{
    (void)state;
    const char *tmp = getenv("TMPDIR");
    bool ok = true;
    snprintf(run, sizeof run, "%.200s/md-pre-XXXXXX", tmp ? tmp : "/tmp");
    if (md_comm_rank(par_world) == 0)
        ok = mkdtemp(run) != NULL;
    md_comm_bcast(par_world, run, sizeof run, 0);
    snprintf(checkpoints, sizeof checkpoints, "%s/checkpoints", run);
    snprintf(weights, sizeof weights, "%s/weights.h5", run);
    if (ok && md_comm_rank(par_world) == 0)
        ok = mkdir(checkpoints, 0777) == 0;
    return md_agree(par_world, ok ? MD_OK : MD_ERR_IO) == MD_OK ? 0 : -1;
}

static int remove_run(void **state)
{
    (void)state;
    char path[400];
    md_comm_barrier(par_world);
    if (md_comm_rank(par_world) > 0)
        return 0;
    for (int64_t step = 1; step <= 2; step++) {
        md_checkpoint_name(path, sizeof path, checkpoints, step);
        unlink(path);
    }
    snprintf(path, sizeof path, "%s/LATEST", checkpoints);
    unlink(path);
    unlink(weights);
    rmdir(checkpoints);
    return rmdir(run);
}

/* Set before anything asks for faults. The array is one chunk of the file: rank 0 reads it. */
__attribute__((constructor)) static void set_fault(void)
{
    const char *rank = getenv("OMPI_COMM_WORLD_RANK");
    rank = rank ? rank : getenv("PMI_RANK");
    if (!rank || strcmp(rank, "0") == 0)
        setenv("MD_FAULT", "ckpt.read#1", 1);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test_setup(test_checkpoint, make_run),
    cmocka_unit_test(test_damaged_checkpoint),
    cmocka_unit_test(test_weights),
    cmocka_unit_test_teardown(test_nothing_there, remove_run),
};

PAR_MAIN(tests)
