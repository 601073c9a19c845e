/* Losses, target normalisations, pixel targets, gradient clipping and AdamW against PyTorch (and
 * transformers' MAE for pixels), on the cpu and check backends. */
#include "src/optim.h"
#include "tests/golden/golden.h"

#define SCRATCH ((size_t)4 << 20)

static const char *const backends[] = {"cpu", "check"};

static md_backend *backend_make(const char *name)
{
    md_backend *be;
    GOLDEN_OK(md_backend_create(name, 2, &be));
    be->scratch = md_alloc(SCRATCH, "test");
    be->scratch_size = SCRATCH;
    assert_non_null(be->scratch);
    return be;
}

static void backend_drop(md_backend *be)
{
    md_free(be->scratch);
    be->scratch = NULL;
    md_backend_destroy(be);
}

/* A tensor of the same shape with memory of its own. */
static md_tensor like(const md_tensor *t)
{
    md_tensor copy = *t;
    copy.data = md_alloc(md_tensor_bytes(t), "test");
    assert_non_null(copy.data);
    return copy;
}

static void check_losses(md_backend *be, const md_safetensors *f)
{
    static const struct {
        const char *name;
        md_loss_kind kind;
        float beta;
    } rows[] = {{"loss.smooth_l1_1", MD_LOSS_SMOOTH_L1, 1.0f},
                {"loss.smooth_l1_2", MD_LOSS_SMOOTH_L1, 2.0f},
                {"loss.l1", MD_LOSS_L1, 1.0f},
                {"loss.l2", MD_LOSS_L2, 1.0f}};
    md_tensor pred = golden_load(f, "loss.prediction", MD_F32), dpred = like(&pred);
    md_tensor target = golden_load(f, "loss.target", MD_F32);
    int64_t n = md_tensor_count(&pred);
    for (size_t i = 0; i < MD_COUNT(rows); i++) {
        char key[64];
        double value = NAN;
        md_tensor loss = MD_TENSOR(&value, MD_F64, 1);
        GOLDEN_OK(MD_OP(be, loss, .pred = &pred, .target = &target, .loss = &loss, .dpred = &dpred,
                        .kind = rows[i].kind, .beta = rows[i].beta, .scale = 1.0f / (float)n));
        golden_expect_number(rows[i].name, value, golden_f64(f, rows[i].name), GOLDEN_OUTPUT);
        snprintf(key, sizeof key, "%s.grad", rows[i].name);
        golden_expect(f, key, md_f32(&dpred), n, GOLDEN_GRADIENT);
    }
    md_free(pred.data);
    md_free(dpred.data);
    md_free(target.data);
}

static void losses(void **state)
{
    (void)state;
    md_safetensors *f = golden_open("numerics.safetensors");
    for (size_t i = 0; i < MD_COUNT(backends); i++) {
        md_backend *be = backend_make(backends[i]);
        check_losses(be, f);
        backend_drop(be);
    }
    md_safetensors_close(f);
}

static void check_targets(md_backend *be, const md_safetensors *f)
{
    md_tensor x = golden_load(f, "norm.features", MD_F32), y = like(&x);
    int64_t n = md_tensor_count(&x);
    GOLDEN_OK(MD_OP(be, layernorm, .x = &x, .y = &y, .eps = 1e-6f));
    golden_expect(f, "norm.layernorm", md_f32(&y), n, GOLDEN_OUTPUT);
    GOLDEN_OK(MD_OP(be, layernorm, .x = &x, .y = &y, .eps = 1e-6f, .unbiased = true));
    golden_expect(f, "norm.patch_norm", md_f32(&y), n, GOLDEN_OUTPUT);
    md_free(x.data);
    md_free(y.data);

    md_tensor image = golden_load(f, "pixel.image", MD_U8);
    md_tensor want = golden_load(f, "pixel.patches", MD_F32);
    md_tensor patch = MD_TENSOR(NULL, MD_F32, md_tensor_rows(&want), md_tensor_cols(&want));
    patch = like(&patch);
    y = like(&patch);
    n = md_tensor_count(&patch);
    GOLDEN_OK(MD_OP(be, patchify, .image = &image, .patch = &patch, .side = 8,
                    .order = MD_PATCH_HWC, .mean = {0.485f, 0.456f, 0.406f},
                    .std = {0.229f, 0.224f, 0.225f}));
    golden_expect(f, "pixel.patches", md_f32(&patch), n, GOLDEN_OUTPUT);
    GOLDEN_OK(MD_OP(be, layernorm, .x = &patch, .y = &y, .eps = 1e-6f, .unbiased = true));
    golden_expect(f, "pixel.patch_norm", md_f32(&y), n, GOLDEN_OUTPUT);
    md_free(image.data);
    md_free(want.data);
    md_free(patch.data);
    md_free(y.data);
}

static void targets(void **state)
{
    (void)state;
    md_safetensors *f = golden_open("numerics.safetensors");
    for (size_t i = 0; i < MD_COUNT(backends); i++) {
        md_backend *be = backend_make(backends[i]);
        check_targets(be, f);
        backend_drop(be);
    }
    md_safetensors_close(f);
}

/* A registry of two rows: a matrix, which is decayed, and a vector, which is not. */
static void two_rows(md_params *p, int64_t n)
{
    md_params_init(p);
    md_param matrix = {.name = "matrix",
                       .rank = 2,
                       .global = {1, n},
                       .cut_dim = -1,
                       .cut_parts = 1,
                       .decay = true};
    md_param vector = {.name = "vector", .rank = 1, .global = {n}, .cut_dim = -1, .cut_parts = 1};
    assert_int_equal(md_params_add(p, &matrix), 0);
    assert_int_equal(md_params_add(p, &vector), 1);
    GOLDEN_OK(md_params_seal(p, NULL));
    GOLDEN_OK(md_params_allocate(p, NULL, true));
    GOLDEN_OK(md_params_allocate_moments(p, p->elements, false));
}

/* Copies the two rows of a flat block into one [2, n] array, or back. */
static void move_rows(const md_params *p, float *block, float *rows, bool into_block)
{
    for (int i = 0; i < p->count; i++) {
        float *at = block + p->row[i].offset;
        int64_t n = p->row[i].count;
        memcpy(into_block ? at : rows + i * n, into_block ? rows + i * n : at,
               sizeof *at * (size_t)n);
    }
}

/* `limit` is 3 in the file: another one has to give other parameters. Returns the largest error of
 * the parameters over all steps. */
static double run_adamw(md_backend *be, const md_safetensors *f, const md_config *c, double limit)
{
    md_tensor start = golden_load(f, "adamw.start", MD_F32),
              lr = golden_load(f, "adamw.lr", MD_F32);
    md_tensor grad = golden_load(f, "adamw.grad", MD_F32),
              norm = golden_load(f, "adamw.norm", MD_F64);
    md_tensor want = golden_load(f, "adamw.param", MD_F32), got = like(&start);
    int64_t size = md_tensor_count(&start);
    double worst = 0;
    md_params p;
    md_piece piece[MD_GROUPS];
    two_rows(&p, md_tensor_cols(&start));
    const int n = md_params_pieces(&p, piece);
    move_rows(&p, p.value, md_f32(&start), true);
    for (int64_t step = 0; step < md_tensor_count(&lr); step++) {
        md_grad_stats stats;
        move_rows(&p, p.grad, md_f32(&grad) + step * size, true);
        GOLDEN_OK(md_optim_grad_stats(be, &p, piece, n, &stats));
        const double got_norm = sqrt(stats.squares);
        golden_expect_number("norm", got_norm, ((double *)norm.data)[step], GOLDEN_OUTPUT);
        assert_true(stats.nonfinite == 0);
        md_optim_args a = {c, md_f32(&lr)[step], md_optim_clip(got_norm, limit), step + 1};
        GOLDEN_OK(md_optim_update(be, &p, piece, n, &a));
        move_rows(&p, p.value, md_f32(&got), false);
        worst = fmax(worst, golden_error(md_f32(&got), md_f32(&want) + step * size, size, 1));
    }
    if (limit == 3) {
        move_rows(&p, p.m, md_f32(&got), false);
        golden_expect(f, "adamw.m", md_f32(&got), size, GOLDEN_OUTPUT);
        move_rows(&p, p.v, md_f32(&got), false);
        golden_expect(f, "adamw.v", md_f32(&got), size, GOLDEN_OUTPUT);
    }
    md_params_free(&p);
    md_tensor *all[] = {&start, &lr, &grad, &norm, &want, &got};
    for (size_t i = 0; i < MD_COUNT(all); i++)
        md_free(all[i]->data);
    return worst;
}

static void adamw(void **state)
{
    (void)state;
    md_safetensors *f = golden_open("numerics.safetensors");
    md_config c; /* the defaults are the golden run's: betas, eps 1e-8, weight decay 0.05 */
    GOLDEN_OK(md_config_init(&c));
    for (size_t i = 0; i < MD_COUNT(backends); i++) {
        md_backend *be = backend_make(backends[i]);
        double error = run_adamw(be, f, &c, 3);
        print_message("AdamW on %s: %.2g\n", backends[i], error);
        assert_true(error <= GOLDEN_OUTPUT);
        assert_true(run_adamw(be, f, &c, 1) > 10 * GOLDEN_OUTPUT);
        c.optim_weight_decay = 0.04;
        assert_true(run_adamw(be, f, &c, 3) > 10 * GOLDEN_OUTPUT);
        c.optim_weight_decay = 0.05;
        backend_drop(be);
    }
    md_config_free(&c);
    md_safetensors_close(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(losses),
        cmocka_unit_test(targets),
        cmocka_unit_test(adamw),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
