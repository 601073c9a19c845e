/* Weights on every rank: rank 0 reads, all get the same bytes or the same error. */
#include "tests/par/par_main.h"

#include "io/weights.h"

#define GOLDEN "tests/golden/vit_timm.safetensors"

static char path[64];

/* Rank 0 makes the file; all ranks wait for it. */
static void import_on_rank_0(void)
{
    md_status st = MD_OK;
    snprintf(path, sizeof path, "/tmp/md_weights_par.%d.h5", (int)getpid());
    md_comm_bcast(par_world, path, sizeof path, 0);
    if (md_comm_rank(par_world) == 0) {
        md_weights_import_report r;
        st = md_weights_import(&(md_weights_import_args){.input = GOLDEN, .output = path}, &r);
    }
    assert_ok(st);
    md_comm_barrier(par_world);
}

static void remove_on_rank_0(void)
{
    md_comm_barrier(par_world);
    if (md_comm_rank(par_world) == 0)
        unlink(path);
}

static void all_ranks_load_the_same(void **state)
{
    (void)state;
    static float got[144 * 48], want[144 * 48];
    md_tensor t = MD_TENSOR(got, MD_F32, 144, 48);
    md_weights *w;
    md_safetensors *st;
    import_on_rank_0();
    assert_ok(md_weights_open(par_world, path, &w));
    assert_int_equal(md_weights_get_info(w)->width, 48);
    assert_int_equal(md_weights_get_info(w)->layers, 2);
    assert_ok(md_safetensors_open(GOLDEN, &st));
    assert_ok(
        md_safetensors_read_f32(st, md_safetensors_find(st, "blocks.1.attn.qkv.weight"), want));
    assert_ok(md_weights_load(w, "blocks.1.attn.qkv.weight", &t));
    assert_memory_equal(got, want, sizeof want);
    /* What every rank can see needs no communication and is the same error everywhere. */
    assert_int_equal(md_weights_load(w, "blocks.2.attn.qkv.weight", &t), MD_ERR_DATA);
    t.dim[0] = 143;
    assert_int_equal(md_weights_load(w, "blocks.1.attn.qkv.weight", &t), MD_ERR_DATA);
    md_safetensors_close(st);
    md_weights_close(w);
    remove_on_rank_0();
}

static void all_ranks_fail_alike(void **state)
{
    (void)state;
    md_weights *w;
    assert_int_equal(md_weights_open(par_world, "/nowhere/x.h5", &w), MD_ERR_NOINPUT);
    assert_non_null(strstr(md_error_text(), "/nowhere/x.h5"));
    assert_null(w);
    assert_int_equal(md_weights_open(par_world, GOLDEN, &w), MD_ERR_DATA);

    /* Damage in one parameter: only rank 0 can see it. */
    static float data[144 * 48];
    md_tensor t = MD_TENSOR(data, MD_F32, 144, 48);
    import_on_rank_0();
    if (md_comm_rank(par_world) == 0) {
        md_safetensors *st;
        assert_ok(md_safetensors_open(GOLDEN, &st));
        assert_ok(
            md_safetensors_read_f32(st, md_safetensors_find(st, "blocks.0.attn.qkv.weight"), data));
        md_safetensors_close(st);
        static char whole[1 << 21];
        FILE *f = fopen(path, "r+b");
        assert_non_null(f);
        size_t n = fread(whole, 1, sizeof whole, f);
        char *at = memmem(whole, n, data, sizeof data);
        assert_non_null(at);
        fseek(f, at - whole + 10, SEEK_SET);
        fputc(at[10] ^ 4, f);
        fclose(f);
    }
    md_comm_barrier(par_world);
    assert_ok(md_weights_open(par_world, path, &w));
    assert_int_equal(md_weights_load(w, "blocks.0.attn.qkv.weight", &t), MD_ERR_DATA);
    assert_non_null(strstr(md_error_text(), "is damaged"));
    assert_ok(md_weights_load(w, "blocks.1.attn.qkv.weight", &t));
    md_weights_close(w);
    remove_on_rank_0();
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(all_ranks_load_the_same),
    cmocka_unit_test(all_ranks_fail_alike),
};

PAR_MAIN(tests)
