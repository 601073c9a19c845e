/* Parameters of an earlier run: from a checkpoint, a run directory and a weights file, and what is
 * said when they are not there or damaged. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <sys/stat.h>

#include "io/pretrained.h"
#include "io/weights.h"
#include "tests/checkpoint_state.h"

#define GOLDEN "tests/golden/vit_timm.safetensors"

static md_comm *self;
static char run[200]; /* the run directory; dir is its folder of checkpoints */
static char other[256];

enum { ROWS_W = 37, COLS_W = 11, COUNT_W = ROWS_W * COLS_W };

static float value(int64_t step, bool ema, int k)
{
    return (float)(step * 1000 + k) * (ema ? -0.5f : 0.25f);
}

static md_status write_step(int64_t step, bool averages)
{
    static float w[COUNT_W], ema[COUNT_W];
    int64_t counter = step;
    for (int k = 0; k < COUNT_W; k++) {
        w[k] = value(step, false, k);
        ema[k] = value(step, true, k);
    }
    const md_tensor t[] = {MD_TENSOR(w, MD_F32, ROWS_W, COLS_W), MD_TENSOR(&counter, MD_I64, 1),
                           MD_TENSOR(ema, MD_F32, ROWS_W, COLS_W)};
    const md_state_item item[] = {md_state_item_make("param/blocks.0.w", &t[0]),
                                  md_state_item_make("param/counter", &t[1]),
                                  md_state_item_make("ema/blocks.0.w", &t[2])};
    return md_checkpoint_write(&(md_checkpoint_args){.comm = self,
                                                     .dir = dir,
                                                     .step = step,
                                                     .item = item,
                                                     .items = averages ? 3 : 2,
                                                     .config = "model = \"tiny\";\n",
                                                     .keep = 9});
}

static void check_loads(md_pretrained *p, int64_t step, bool ema)
{
    static float got[COUNT_W];
    memset(got, 0, sizeof got);
    assert_ok(md_pretrained_load(p, "blocks.0.w", got));
    for (int k = 0; k < COUNT_W; k++)
        assert_true(got[k] == value(step, ema, k));
}

static void expect_error(md_status got, md_status want, const char *a, const char *b)
{
    assert_int_equal(got, want);
    if (!strstr(md_error_text(), a) || !strstr(md_error_text(), b))
        fail_msg("\"%s\" lacks \"%s\" or \"%s\"", md_error_text(), a, b);
}

static void expect_no_open(const char *path, bool ema, md_status want, const char *text)
{
    md_pretrained *p = (md_pretrained *)self;
    expect_error(md_pretrained_open(self, path, ema, &p), want, path, text);
    assert_null(p);
}

/* Changes one bit of an item's bytes. */
static void damage(const char *path, const char *name)
{
    md_checkpoint *ck;
    assert_ok(md_checkpoint_open(self, path, &ck));
    long at = (long)md_checkpoint_entry(ck, name)->offset + 5;
    md_checkpoint_close(ck);
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    fseek(f, at, SEEK_SET);
    int byte = fgetc(f);
    fseek(f, at, SEEK_SET);
    fputc(byte ^ 16, f);
    fclose(f);
}

static void test_checkpoint(void **state)
{
    (void)state;
    char path[512], text[600];
    int64_t dim[MD_MAX_RANK];
    md_pretrained *p;
    assert_ok(write_step(3, true));
    md_checkpoint_name(path, sizeof path, dir, 3);
    for (int ema = 0; ema < 2; ema++) {
        assert_ok(md_pretrained_open(self, path, ema, &p));
        snprintf(text, sizeof text, "checkpoint %s at step 3%s", path,
                 ema ? ", moving averages" : "");
        assert_string_equal(md_pretrained_describe(p), text);
        assert_string_equal(md_pretrained_config(p), "model = \"tiny\";\n");
        assert_true(md_pretrained_has(p, "blocks.0.w"));
        assert_false(md_pretrained_has(p, "param/blocks.0.w"));
        assert_int_equal(md_pretrained_shape(p, "blocks.0.w", dim), 2);
        assert_true(dim[0] == ROWS_W && dim[1] == COLS_W && dim[2] == 0 && dim[3] == 0);
        check_loads(p, 3, ema);
        md_pretrained_close(p);
    }
}

/* The newest whole checkpoint, by either name of the folder. */
static void test_run_directory(void **state)
{
    (void)state;
    char path[512];
    md_pretrained *p;
    for (int64_t step = 1; step <= 3; step++)
        assert_ok(write_step(step, true));
    md_checkpoint_name(path, sizeof path, dir, 3);
    damage(path, "ema/blocks.0.w");
    const char *const names[] = {run, dir};
    for (int i = 0; i < 2; i++) {
        assert_ok(md_pretrained_open(self, names[i], false, &p));
        check_loads(p, 2, false);
        assert_non_null(strstr(md_pretrained_describe(p), "step-00000002.h5 at step 2"));
        md_pretrained_close(p);
    }
    md_checkpoint_name(path, sizeof path, dir, 2);
    damage(path, "param/blocks.0.w");
    md_checkpoint_name(path, sizeof path, dir, 1);
    damage(path, "param/blocks.0.w");
    expect_no_open(run, false, MD_ERR_DATA, "none of 3 checkpoints is whole");
    empty_dir();
    expect_no_open(run, false, MD_ERR_NOINPUT, "there is no checkpoint");
}

static void test_weights(void **state)
{
    (void)state;
    static float got[144 * 48], want[144 * 48];
    char text[600];
    int64_t dim[MD_MAX_RANK];
    md_weights_import_report r;
    md_pretrained *p;
    md_safetensors *st;
    assert_ok(md_weights_import(&(md_weights_import_args){.input = GOLDEN, .output = other}, &r));
    assert_ok(md_pretrained_open(self, other, false, &p));
    snprintf(text, sizeof text, "weights %s (%s)", other, r.info.dialect);
    assert_string_equal(md_pretrained_describe(p), text);
    assert_string_equal(md_pretrained_config(p), "");
    assert_int_equal(md_pretrained_shape(p, "blocks.1.attn.qkv.weight", dim), 2);
    assert_true(dim[0] == 144 && dim[1] == 48 && dim[2] == 0);
    assert_int_equal(md_pretrained_shape(p, "patch_embed.proj.weight", dim), 4);
    assert_false(md_pretrained_has(p, "blocks.2.attn.qkv.weight")); /* it has two layers */
    assert_false(md_pretrained_has(p, "norm_pre.weight"));
    assert_ok(md_safetensors_open(GOLDEN, &st));
    assert_ok(
        md_safetensors_read_f32(st, md_safetensors_find(st, "blocks.1.attn.qkv.weight"), want));
    md_safetensors_close(st);
    assert_ok(md_pretrained_load(p, "blocks.1.attn.qkv.weight", got));
    assert_memory_equal(got, want, sizeof want);
    expect_error(md_pretrained_load(p, "blocks.2.attn.qkv.weight", got), MD_ERR_DATA, other,
                 "has no parameter 'blocks.2.attn.qkv.weight'");
    md_pretrained_close(p);
    expect_no_open(other, true, MD_ERR_DATA, "holds no moving averages");
    unlink(other);
}

static void test_bad_parameter(void **state)
{
    (void)state;
    static float got[COUNT_W];
    char path[512], name[200] = "";
    md_pretrained *p;
    assert_ok(write_step(1, true));
    md_checkpoint_name(path, sizeof path, dir, 1);
    damage(path, "ema/blocks.0.w");
    assert_ok(md_pretrained_open(self, path, false, &p));
    check_loads(p, 1, false); /* damage elsewhere does not matter */
    expect_error(md_pretrained_load(p, "blocks.1.w", got), MD_ERR_DATA, path,
                 "has no parameter 'blocks.1.w'");
    expect_error(md_pretrained_load(p, "counter", got), MD_ERR_DATA, path,
                 "param/counter is [1] I64, expected [1] F32");
    memset(name, 'n', sizeof name - 1);
    assert_false(md_pretrained_has(p, name));
    assert_false(md_pretrained_has(p, ""));
    md_pretrained_close(p);
    assert_ok(md_pretrained_open(self, path, true, &p));
    expect_error(md_pretrained_load(p, "blocks.0.w", got), MD_ERR_DATA, path,
                 "ema/blocks.0.w is damaged");
    expect_error(md_pretrained_load(p, "counter", got), MD_ERR_DATA, path,
                 "has no moving average of parameter 'counter'");
    md_pretrained_close(p);
}

static void put_file(const char *path, const char *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    fclose(f);
}

static void test_bad_file(void **state)
{
    (void)state;
    char path[512];
    md_checkpoint *ck;
    assert_ok(write_step(1, false));
    md_checkpoint_name(path, sizeof path, dir, 1);
    expect_no_open(path, true, MD_ERR_DATA, "holds no moving averages");
    assert_ok(md_checkpoint_open(self, path, &ck));
    int64_t bytes = md_checkpoint_bytes(ck);
    md_checkpoint_close(ck);
    assert_int_equal(truncate(path, bytes - 1), 0);
    expect_no_open(path, false, MD_ERR_DATA, "cut or grown");
    put_file(other, "", 0);
    expect_no_open(other, false, MD_ERR_DATA, "neither a checkpoint nor a weights file");
    static const char cut[] = "\x89HDF\r\n\x1a\n and no more of it";
    put_file(other, cut, sizeof cut);
    expect_no_open(other, false, MD_ERR_DATA, "");
    unlink(other);
    expect_no_open(other, false, MD_ERR_NOINPUT, "cannot be looked at");
    expect_no_open(GOLDEN, false, MD_ERR_DATA, "weights import");
    snprintf(path, sizeof path, "%s/within", GOLDEN);
    expect_no_open(path, false, MD_ERR_NOINPUT, "");
}

static int setup(void **state)
{
    (void)state;
    empty_dir();
    return 0;
}

static bool make_run(void)
{
    if (!make_dir())
        return false;
    snprintf(run, sizeof run, "%.190s", dir);
    snprintf(other, sizeof other, "%s/weights.h5", run);
    snprintf(dir, sizeof dir, "%s/checkpoints", run);
    return mkdir(dir, 0777) == 0;
}

int main(void)
{
    if (!make_run() || md_comm_self(&self) != MD_OK)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_checkpoint, setup),
        cmocka_unit_test_setup(test_run_directory, setup),
        cmocka_unit_test_setup(test_weights, setup),
        cmocka_unit_test_setup(test_bad_parameter, setup),
        cmocka_unit_test_setup(test_bad_file, setup),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    empty_dir();
    rmdir(dir);
    rmdir(run);
    md_comm_free(self);
    return failed;
}
