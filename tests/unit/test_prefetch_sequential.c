/* The loader for evaluation: every layout sees each image of the store once and in stored order,
 * then blanks, and a bad image ends it; and what the config makes of a rule. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <string.h>

#include "src/log.h"
#include "tests/unit/fake_source.h"

static md_loader_args evaluation_args(fake *f)
{
    md_loader_args a = args_of(f);
    a.sequential = true;
    a.rule.size2 = 0;
    a.rule.eval_resize = SIDE + 1;
    return a;
}

/* The crop of image i as evaluation makes it. */
static void evaluated(const md_loader_args *a, int64_t i, uint8_t crop[SIDE * SIDE * 3])
{
    fake good = {0};
    uint8_t bytes[W * H * 3];
    size_t n;
    md_image im;
    md_decoder *d;
    md_augment_tools tools = {0};
    assert_int_equal(md_decoder_create(&d, W * H), MD_OK);
    assert_int_equal(md_resizer_create(&tools.resizer, W, SIDE), MD_OK);
    assert_int_equal(fake_read(&good, i, bytes, sizeof bytes, &n), MD_OK);
    assert_int_equal(md_decode_image(d, &(md_coded){MD_IMAGE_RGB8, bytes, n, W, H}, &im), MD_OK);
    md_augment_draw draw = md_augment_choose(&a->rule, 0, 0, W, H);
    assert_int_equal(md_augment_image(&a->rule, &draw, tools, &im, crop, NULL), MD_OK);
    md_decoder_free(d);
    md_resizer_free(tools.resizer);
}

/* Image `first` + j of the store, or a blank past its end; returns the images that were there. */
static int check_stored(const md_loader_args *a, const md_batch *b, int64_t first)
{
    int there = 0;
    assert_true(b->bad == 0 && b->epoch == 0 && b->image2.data == NULL);
    for (int64_t j = 0; j < b->image.dim[0]; j++) {
        int64_t i = first + j;
        uint8_t want[SIDE * SIDE * 3] = {0};
        bool blank = i >= a->source.count;
        if (!blank)
            evaluated(a, i, want);
        assert_int_equal(b->sample[j], blank ? -1 : i);
        assert_int_equal(b->label[j], blank ? -1 : i * 7 % 5);
        assert_memory_equal((uint8_t *)b->image.data + j * SIDE * SIDE * 3, want, sizeof want);
        there += !blank;
    }
    return there;
}

/* All ranks of a layout together see every image once, in stored order, and blanks after the end.
 */
static void check_sequential(md_loader_args a, int dp, int tp, int64_t micro_batch)
{
    int64_t steps = (a.source.count + BATCH - 1) / BATCH + 1, micros = BATCH / dp / micro_batch;
    int there = 0;
    a.dp_size = dp;
    a.tp_size = tp;
    a.micro_batch = micro_batch;
    for (int rank = 0; rank < dp * tp; rank++) {
        md_loader *l;
        a.dp_rank = rank / tp;
        a.tp_rank = rank % tp;
        assert_int_equal(md_loader_create(&l, &a), MD_OK);
        for (int64_t q = 0; q < steps * micros; q++) {
            const md_batch *b;
            assert_int_equal(md_loader_take(l, q / micros, q % micros, &b, NULL), MD_OK);
            assert_int_equal(b->image.dim[0], micro_batch / tp);
            there += check_stored(&a, b,
                                  q / micros * BATCH + a.dp_rank * (BATCH / dp) +
                                      q % micros * micro_batch + a.tp_rank * (micro_batch / tp));
            md_loader_release(l, b);
        }
        md_loader_destroy(l);
    }
    assert_int_equal(there, a.source.count);
}

static void sequential_shows_each_once(void **state)
{
    (void)state;
    fake f = {0};
    md_loader_args a = evaluation_args(&f);
    const int64_t counts[] = {N, 2 * BATCH, 5, 1, 0}; /* also fewer than a batch */
    for (size_t k = 0; k < MD_COUNT(counts); k++) {
        a.source.count = counts[k];
        check_sequential(a, 1, 1, 12);
        check_sequential(a, 2, 1, 3);
        check_sequential(a, 4, 1, 3);
        check_sequential(a, 1, 2, 4);
        check_sequential(a, 2, 2, 6);
    }
    a.source.count = N;
    a.source.main_thread = true;
    check_sequential(a, 2, 2, 2);
}

/* What cannot be read is not replaced: the batches before it come, its own names it. */
static void sequential_replaces_nothing(void **state)
{
    (void)state;
    fake f = {.bad_every = N};
    md_loader_args a = evaluation_args(&f);
    md_bad_image note;
    for (int k = 0; k < 2; k++) {
        a.source.main_thread = k == 1;
        a.start_step = 0;
        md_loader *l;
        const md_batch *b;
        assert_int_equal(md_loader_create(&l, &a), MD_OK);
        assert_int_equal(md_loader_take(l, 0, 0, &b, NULL), MD_ERR_DATA);
        assert_non_null(strstr(md_error_text(), "image 3"));
        assert_non_null(strstr(md_error_text(), "hash of image 3"));
        assert_false(md_loader_next_bad(l, &note));
        md_loader_destroy(l);
        a.start_step = 1;
        assert_int_equal(md_loader_create(&l, &a), MD_OK);
        assert_int_equal(md_loader_take(l, 1, 0, &b, NULL), MD_OK);
        check_stored(&a, b, BATCH);
        md_loader_destroy(l);
    }
}

static void rule_from_config(void **state)
{
    (void)state;
    md_config c;
    md_loader_args a = {0};
    char *given[] = {"augment.randaugment=2", "augment.jitter=0", "run.seed=7"};
    assert_int_equal(md_config_init(&c), MD_OK);
    assert_int_equal(md_config_load(&c, NULL, 3, given), MD_OK);
    md_loader_configure(&a, &c, 0);
    const md_randaugment_rule *r = &a.rule.randaugment;
    assert_true(r->ops == 2 && r->seed == 7 && a.rule.jitter == 0 && a.rule.eval_resize == 0);
    assert_true(r->magnitude == 9 && r->deviation == 0.5 && r->probability == 0.5);
    assert_memory_equal(r->fill, ((uint8_t[]){124, 116, 104}), 3);
    assert_false(a.sequential);
    md_config_free(&c);
}

int main(void)
{
    md_log_set(MD_LOG_ERROR);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sequential_shows_each_once),
        cmocka_unit_test(sequential_replaces_nothing),
        cmocka_unit_test(rule_from_config),
    };
    return cmocka_run_group_tests_name("prefetch_sequential", tests, NULL, NULL);
}
