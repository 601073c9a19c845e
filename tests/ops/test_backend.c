/* test_backend: backends by name, the shape rules, scratch, and that the check backend sees what it
 * is there to see. */
#include "kernels/backend.h"
#include "kernels/check/check_backend.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <string.h>

static md_backend *make(const char *name)
{
    md_backend *be;
    if (md_backend_create(name, 1, &be) != MD_OK)
        fail_msg("%s", md_error_text());
    return be;
}

static void expect_error(md_status st, md_status want, const char *words)
{
    assert_int_equal(st, want);
    if (!strstr(md_error_text(), words))
        fail_msg("\"%s\" does not say \"%s\"", md_error_text(), words);
}

static void test_names(void **state)
{
    (void)state;
    md_backend *be = make("cpu");
    assert_string_equal(be->name, "cpu");
    assert_int_equal(be->threads, 1);
    md_backend_destroy(be);
    md_backend_destroy(NULL);
    if (strcmp(md_backend_list(), "cpu, check, cuda") != 0) /* where it is linked in */
        assert_string_equal(md_backend_list(), "cpu, check");
    expect_error(md_backend_create("gpu", 0, &be), MD_ERR_CONFIG, "cpu, check");
    assert_null(be);
    expect_error(md_backend_create("cpu", -1, &be), MD_ERR_CONFIG, "-1 threads");
    assert_string_equal(md_op_name(MD_OP_gemm), "gemm");
    assert_string_equal(md_op_name(MD_OP_axpy), "axpy");
    assert_string_equal(md_op_in_name(MD_OP_residual_ln_bwd, 7), "dr");
    assert_string_equal(md_op_out_name(MD_OP_tokens_bwd, 2), "dmask_token");
    assert_null(md_op_out_name(MD_OP_colsum, 1));
    assert_null(md_op_in_name(MD_OP_colsum, MD_OP_IN));
}

static float block[8][64];
static float scratch[1 << 16] __attribute__((aligned(64)));
#define F32(i, ...) MD_TENSOR(block[i], MD_F32, __VA_ARGS__)

static void test_shape_rules(void **state)
{
    (void)state;
    md_backend *be = make("cpu");
    md_tensor a = F32(0, 2, 3), b = F32(1, 3, 4), y = F32(2, 2, 4), bt = F32(1, 4, 3);
    be->scratch = scratch;
    be->scratch_size = sizeof scratch;
    md_tensor wide = F32(2, 2, 5), ints = MD_TENSOR(block[0], MD_I32, 2, 3), bias = F32(3, 5);
    assert_int_equal(MD_OP(be, gemm, .a = &a, .b = &b, .y = &y), MD_OK);
    assert_int_equal(MD_OP(be, gemm, .a = &a, .b = &bt, .y = &y, .trans_b = true), MD_OK);
    expect_error(MD_OP(be, gemm, .a = &a, .b = &bt, .y = &y), MD_ERR_BUG,
                 "operand b is [4, 3] F32");
    expect_error(MD_OP(be, gemm, .a = &a, .b = &b, .y = &wide), MD_ERR_BUG, "operand y");
    expect_error(MD_OP(be, gemm, .a = &ints, .b = &b, .y = &y), MD_ERR_BUG, "operand a is");
    expect_error(MD_OP(be, gemm, .a = &a, .y = &y), MD_ERR_BUG, "operand b is missing");
    expect_error(MD_OP(be, gemm, .a = &a, .b = &b, .y = &y, .bias = &bias), MD_ERR_BUG, "bias");
    expect_error(MD_OP(be, gemm, .a = &a, .b = &b, .y = &y, .accumulate = 8), MD_ERR_BUG,
                 "accumulate");
    expect_error(MD_OP(be, gemm, .a = &a, .b = &b, .y = &y, .act = MD_ACT_GELU, .accumulate = 1),
                 MD_ERR_BUG, "activation");
    md_operands extra = {.in = {&a, &b}, .out = {&y}};
    assert_int_equal(md_op_check(MD_OP_sumsq, &extra), MD_ERR_BUG);
    extra = (md_operands){.in = {&a, &b}, .out = {&y}};
    expect_error(md_op_check(MD_OP_colsum, &extra), MD_ERR_BUG, "beyond the last");
    md_backend_destroy(be);
}

static void test_letters_must_agree(void **state)
{
    (void)state;
    md_tensor patch = F32(0, 2, 3, 4), cls = F32(1, 4), tokens = F32(2, 2, 4, 4);
    md_tensor short_pos = F32(3, 3, 4), pos = F32(3, 4, 4), flat = F32(0, 6, 4);
    md_tokens_args t = {.patch = &patch, .cls = &cls, .pos = &pos, .tokens = &tokens};
    const md_operands *a = (const md_operands *)(const void *)&t;
    assert_int_equal(md_op_check(MD_OP_tokens, a), MD_OK);
    t.pos = &short_pos;
    expect_error(md_op_check(MD_OP_tokens, a), MD_ERR_BUG, "operand pos");
    t.pos = NULL;
    t.patch = &flat;
    expect_error(md_op_check(MD_OP_tokens, a), MD_ERR_BUG, "operand patch");
    md_tensor qkv = F32(0, 1, 2, 12), o = F32(1, 1, 2, 4), wrong = F32(1, 1, 2, 6);
    md_attention_args at = {.qkv = &qkv, .o = &o};
    a = (const md_operands *)(const void *)&at;
    assert_int_equal(md_op_check(MD_OP_attention, a), MD_OK);
    at.o = &wrong;
    expect_error(md_op_check(MD_OP_attention, a), MD_ERR_BUG, "operand o");
}

static void test_values_are_checked(void **state)
{
    (void)state;
    md_backend *be = make("cpu");
    static int32_t index[3] = {0, 2, 4};
    md_tensor x = F32(0, 4, 2), ix = MD_TENSOR(index, MD_I32, 3), y = F32(1, 3, 2);
    expect_error(MD_OP(be, gather_rows, .x = &x, .index = &ix, .y = &y), MD_ERR_BUG, "[0, 4)");
    index[2] = 2;
    assert_int_equal(MD_OP(be, gather_rows, .x = &x, .index = &ix, .y = &y), MD_OK);
    expect_error(MD_OP(be, scatter_rows, .dy = &y, .index = &ix, .dx = &x), MD_ERR_BUG, "rise");
    md_tensor qkv = F32(0, 1, 2, 12), o = F32(1, 1, 2, 4);
    expect_error(MD_OP(be, attention, .qkv = &qkv, .o = &o, .heads = 3, .scale = 1.0f), MD_ERR_BUG,
                 "3 heads");
    md_tensor c = F32(1, 2), wide = F32(0, 8, 2);
    expect_error(MD_OP(be, colsum, .x = &wide, .y = &c), MD_ERR_BUG, "scratch");
    md_tensor p = F32(0, 4), g = F32(1, 4), m = F32(2, 4), v = F32(3, 4);
    expect_error(MD_OP(be, adamw, .grad = &g, .param = &p, .m = &m, .v = &v, .accumulate = 7),
                 MD_ERR_BUG, "step 0");
    md_backend_destroy(be);
}

/* Mixed images are what torch makes of them, bit for bit: each product is rounded on its own, and
 * lambda 1 leaves the image alone. Only a partner of the batch will do. */
static void test_mixed_images(void **state)
{
    (void)state;
    enum { S = 16, N = S * S * 3 };
    static uint8_t bytes[2 * N];
    static float plain[2 * N], mixed[2 * N];
    md_mix mix[2] = {{.partner = 1, .lambda = 0.3f}, {.partner = 0, .lambda = 1.0f}};
    md_backend *be = make("cpu");
    md_tensor image = MD_TENSOR(bytes, MD_U8, 2, S, S, 3), to = MD_TENSOR(plain, MD_F32, 2, N);
    md_tensor records = MD_TENSOR(mix, MD_I32, 2, MD_MIX_WORDS);
    md_patchify_args a = {.image = &image, .patch = &to, .side = S, .order = MD_PATCH_HWC};
    for (int i = 0; i < 3; i++)
        a.mean[i] = 0.45f, a.std[i] = 0.22f;
    for (int i = 0; i < 2 * N; i++)
        bytes[i] = (uint8_t)(i * 37 + i / 256);
    assert_int_equal(be->ops->patchify(be, &a), MD_OK);
    to.data = mixed;
    a.mix = &records;
    assert_int_equal(be->ops->patchify(be, &a), MD_OK);
    for (int i = 0; i < N; i++) {
        volatile float own = 0.3f * plain[i], other = (1.0f - 0.3f) * plain[N + i];
        assert_true(mixed[i] == own + other && mixed[N + i] == plain[N + i]);
    }
    mix[1].partner = 2;
    expect_error(be->ops->patchify(be, &a), MD_ERR_BUG, "mixed with image 2");
    md_backend_destroy(be);
}

/* Empty rows and an empty sum: no masked token, no image. */
static void test_empty_operands(void **state)
{
    (void)state;
    md_backend *be = make("check");
    be->scratch = scratch;
    be->scratch_size = sizeof scratch;
    md_tensor none = F32(0, 0, 3), b = F32(1, 3, 4), y0 = F32(2, 0, 4), y = F32(3, 3, 4);
    md_tensor bias = F32(4, 4), index = MD_TENSOR(block[5], MD_I32, 0), x = F32(6, 5, 3);
    for (int i = 0; i < 12; i++)
        block[3][i] = 2.0f;
    assert_int_equal(MD_OP(be, gemm, .a = &none, .b = &b, .y = &y0, .bias = &bias), MD_OK);
    assert_int_equal(
        MD_OP(be, gemm, .a = &none, .b = &y0, .y = &y, .trans_a = true, .accumulate = 1), MD_OK);
    assert_true(block[3][0] == 2.0f && block[3][11] == 2.0f);
    assert_int_equal(MD_OP(be, gemm, .a = &none, .b = &y0, .y = &y, .trans_a = true), MD_OK);
    assert_true(block[3][0] == 0.0f && block[3][11] == 0.0f);
    assert_int_equal(MD_OP(be, colsum, .x = &y0, .y = &bias), MD_OK);
    assert_true(block[4][0] == 0.0f && block[4][3] == 0.0f);
    assert_int_equal(MD_OP(be, gather_rows, .x = &x, .index = &index, .y = &none), MD_OK);
    assert_int_equal(MD_OP(be, scatter_rows, .dy = &none, .index = &index, .dx = &x), MD_OK);
    assert_true(block[6][0] == 0.0f && block[6][14] == 0.0f);
    md_backend_destroy(be);
}

/* A backend that breaks one rule in axpy, otherwise the cpu's table. */
typedef enum breach { KEEPS_RULES, CHANGES_INPUT, LEAVES_ELEMENT, WRITES_NAN } breach;
static breach axpy_breach;

static md_status bad_axpy(md_backend *be, const md_axpy_args *a)
{
    (void)be;
    int64_t n = md_tensor_count(a->x);
    for (int64_t i = 0; i < n - (axpy_breach == LEAVES_ELEMENT); i++)
        md_f32(a->y)[i] = a->alpha * md_f32(a->x)[i];
    if (axpy_breach == CHANGES_INPUT)
        md_f32(a->x)[n - 1] += 1.0f;
    if (axpy_breach == WRITES_NAN)
        md_f32(a->y)[0] = NAN;
    return MD_OK;
}

static void no_destroy(md_backend *be)
{
    (void)be;
}

static void test_check_sees_breaches(void **state)
{
    (void)state;
    md_backend *cpu = make("cpu"), *check;
    md_op_table table = *cpu->ops;
    table.axpy = bad_axpy;
    md_backend bad = {.name = "bad", .ops = &table, .destroy = no_destroy, .threads = 1};
    assert_int_equal(md_check_create(&bad, &check), MD_OK);
    md_tensor x = F32(0, 9), y = F32(1, 9);
    axpy_breach = KEEPS_RULES;
    assert_int_equal(MD_OP(check, axpy, .x = &x, .y = &y, .alpha = 2.0f), MD_OK);
    axpy_breach = CHANGES_INPUT;
    expect_error(MD_OP(check, axpy, .x = &x, .y = &y, .alpha = 2.0f), MD_ERR_BUG,
                 "input 0 (x) was changed");
    axpy_breach = LEAVES_ELEMENT;
    expect_error(MD_OP(check, axpy, .x = &x, .y = &y, .alpha = 2.0f), MD_ERR_BUG,
                 "output 0 (y) has 1 elements that were never written");
    axpy_breach = WRITES_NAN;
    expect_error(MD_OP(check, axpy, .x = &x, .y = &y, .alpha = 2.0f), MD_ERR_BUG, "non-finite");
    md_backend_destroy(check);
    md_backend_destroy(cpu);
}

static void test_check_sees_memory(void **state)
{
    (void)state;
    md_backend *be = make("check");
    md_tensor x = F32(0, 9), y = F32(1, 9), none = MD_TENSOR(NULL, MD_F32, 9);
    md_tensor device = x, odd = MD_TENSOR((char *)block[0] + 2, MD_F32, 9);
    device.mem = MD_DEVICE;
    expect_error(MD_OP(be, axpy, .x = &none, .y = &y, .alpha = 1.0f), MD_ERR_BUG, "host memory");
    expect_error(MD_OP(be, axpy, .x = &device, .y = &y, .alpha = 1.0f), MD_ERR_BUG, "host memory");
    expect_error(MD_OP(be, axpy, .x = &odd, .y = &y, .alpha = 1.0f), MD_ERR_BUG, "aligned");
    md_tensor p = F32(2, 9), m = F32(2, 9), v = F32(3, 9);
    expect_error(
        MD_OP(be, adamw, .grad = &x, .param = &p, .m = &m, .v = &v, .accumulate = 7, .step = 1),
        MD_ERR_BUG, "share memory");
    assert_int_equal(MD_OP(be, axpy, .x = &x, .y = &x, .alpha = 1.0f), MD_OK);
    md_tensor shifted = MD_TENSOR(block[0] + 1, MD_F32, 9), rows = F32(0, 3, 3), c = F32(4, 3);
    expect_error(MD_OP(be, axpy, .x = &x, .y = &shifted, .alpha = 1.0f), MD_ERR_BUG,
                 "output 0 (y) shares memory with input 0 (x)");
    md_tensor r = F32(5, 3, 3);
    expect_error(MD_OP(be, residual_ln, .x = &r, .branch = &rows, .gamma = &c, .r = &rows),
                 MD_ERR_BUG, "output 0 (r) shares memory with input 1 (branch)");
    assert_true(md_op_may_share(MD_OP_loss, 0, 1) && !md_op_may_share(MD_OP_loss, 1, 1));
    assert_false(md_op_may_share(MD_OP_gemm, 0, 0) || md_op_may_share(MD_OP_axpy, 1, 0));
    md_backend_destroy(be);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_shape_rules),
        cmocka_unit_test(test_letters_must_agree),
        cmocka_unit_test(test_values_are_checked),
        cmocka_unit_test(test_mixed_images),
        cmocka_unit_test(test_empty_operands),
        cmocka_unit_test(test_check_sees_breaches),
        cmocka_unit_test(test_check_sees_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
