/* What is drawn for mixing and erasing: distributions against their closed forms and against 10^5
 * draws of timm 1.0.31, pairing within groups, targets, and what a draw depends on. */
#include "src/mix.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define DRAWS 100000
#define MEAN  0.004 /* tolerance of means of so many values in [0, 1] */

static md_mix_rule rule_of(double mixup, double cutmix)
{
    return (md_mix_rule){.seed = 11,
                         .mixup = mixup,
                         .cutmix = cutmix,
                         .probability = 1.0,
                         .choose = 0.5,
                         .smoothing = 0.1,
                         .group = 8,
                         .size = 224};
}

static void expect_near(const char *what, double got, double want, double limit)
{
    if (!(fabs(got - want) <= limit))
        fail_msg("%s: %.5f, should be %.5f", what, got, want);
}

/* ---- lambda of mixup ---- */

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double *lambdas(double alpha)
{
    static double v[DRAWS];
    const md_mix_rule r = rule_of(alpha, 0);
    for (int i = 0; i < DRAWS; i++) {
        md_mix_draw d = md_mix_choose(&r, i / 100, i % 100);
        assert_true(d.lambda >= 0 && d.lambda <= 1 && d.box[2] == 0 && d.box[3] == 0);
        v[i] = d.lambda;
    }
    return v;
}

/* Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)), excess kurtosis -6 / (2a + 3), no skew. */
static void check_moments(double alpha)
{
    const double *v = lambdas(alpha);
    double mean = 0, square = 0, cube = 0, fourth = 0;
    for (int i = 0; i < DRAWS; i++)
        mean += v[i] / DRAWS;
    for (int i = 0; i < DRAWS; i++) {
        const double d = v[i] - 0.5;
        square += d * d / DRAWS, cube += d * d * d / DRAWS, fourth += d * d * d * d / DRAWS;
    }
    const double variance = 1.0 / (4.0 * (2.0 * alpha + 1.0));
    expect_near("mean", mean, 0.5, MEAN);
    expect_near("variance", square / variance, 1.0, 0.01);
    expect_near("skew", cube / pow(variance, 1.5), 0.0, 0.04);
    expect_near("kurtosis", fourth / (variance * variance) - 3.0, -6.0 / (2.0 * alpha + 3.0), 0.05);
}

static void beta_has_its_moments(void **state)
{
    (void)state;
    const double alphas[] = {0.2, 0.8, 1.0, 5.0};
    for (size_t i = 0; i < MD_COUNT(alphas); i++)
        check_moments(alphas[i]);
}

/* Largest distance from the distribution function, where it has a simple form; one sample in 1000
 * is further than 1.95 / sqrt(n). */
static void beta_has_its_distribution(void **state)
{
    (void)state;
    const double alphas[] = {0.5, 1.0, 2.0};
    for (size_t k = 0; k < MD_COUNT(alphas); k++) {
        double worst = 0, *v = lambdas(alphas[k]);
        qsort(v, DRAWS, sizeof *v, ascending);
        for (int i = 0; i < DRAWS; i++) {
            const double x = v[i], forms[] = {asin(sqrt(x)) / asin(1.0), x, x * x * (3 - 2 * x)};
            worst = fmax(worst, fabs(forms[k] - (i + 0.5) / DRAWS));
        }
        expect_near("distance", worst, 0, 1.95 / sqrt(DRAWS));
    }
}

/* ---- boxes of CutMix ---- */

typedef struct box_stats {
    double lambda, square, width, height, left, right, top, bottom, x, y;
} box_stats;

static void count_box(box_stats *s, const md_mix_draw *d, int size)
{
    const int32_t *b = d->box;
    assert_true(b[0] >= 0 && b[1] >= 0 && b[0] + b[2] <= size && b[1] + b[3] <= size);
    assert_true(d->lambda == 1.0 - (double)(b[2] * b[3]) / ((double)size * size));
    assert_true((b[2] > 0) == (b[3] > 0) && (b[2] > 0) == (d->lambda < 1.0));
    s->lambda += d->lambda / DRAWS, s->square += d->lambda * d->lambda / DRAWS;
    s->width += (double)b[2] / size / DRAWS, s->height += (double)b[3] / size / DRAWS;
    if (b[2] == 0)
        return;
    s->left += (b[0] == 0) / (double)DRAWS, s->right += (b[0] + b[2] == size) / (double)DRAWS;
    s->top += (b[1] == 0) / (double)DRAWS, s->bottom += (b[1] + b[3] == size) / (double)DRAWS;
    s->x += (b[0] + 0.5 * b[2]) / size / DRAWS, s->y += (b[1] + 0.5 * b[3]) / size / DRAWS;
}

/* Against timm's cutmix_bbox_and_lam with Beta(1, 1): lambda and its deviation, mean side, share at
 * the low and at the high border, mean centre. */
static void check_boxes(int size, const double timm[6])
{
    md_mix_rule r = rule_of(0, 1.0);
    box_stats s = {0};
    r.size = size;
    for (int i = 0; i < DRAWS; i++) {
        md_mix_draw d = md_mix_choose(&r, i, i % 3);
        count_box(&s, &d, size);
    }
    expect_near("lambda", s.lambda, timm[0], MEAN);
    expect_near("its deviation", sqrt(s.square - s.lambda * s.lambda), timm[1], MEAN);
    expect_near("width", s.width, timm[2], MEAN);
    expect_near("height", s.height, timm[2], MEAN);
    expect_near("left border", s.left, timm[3], 0.006);
    expect_near("top border", s.top, timm[3], 0.006);
    expect_near("right border", s.right, timm[4], 0.006);
    expect_near("bottom border", s.bottom, timm[4], 0.006);
    expect_near("centre x", s.x, timm[5], MEAN);
    expect_near("centre y", s.y, timm[5], MEAN);
}

static void cutmix_boxes_are_those_of_timm(void **state)
{
    (void)state;
    check_boxes(224, (double[]){0.6798, 0.1886, 0.5412, 0.3338, 0.3338, 0.4998});
    check_boxes(32, (double[]){0.6895, 0.1858, 0.5316, 0.3499, 0.3344, 0.4943});
}

/* Centres are uniform: a box of one pixel is not cut, and every position is met as often as the
 * others, but for the corner, where boxes of two pixels are cut to one. */
static void cutmix_centres_are_uniform(void **state)
{
    (void)state;
    enum { SIZE = 8 };
    md_mix_rule r = rule_of(0, 1.0);
    double count[SIZE][SIZE] = {{0}}, total = 0;
    r.size = SIZE;
    for (int i = 0; i < 8 * DRAWS; i++) {
        md_mix_draw d = md_mix_choose(&r, i, 0);
        if (d.box[2] != 1 || d.box[3] != 1 || (d.box[0] == 0 && d.box[1] == 0))
            continue;
        count[d.box[1]][d.box[0]]++;
        total++;
    }
    double chi = 0, each = total / (SIZE * SIZE - 1);
    assert_true(each > 100);
    for (int i = 1; i < SIZE * SIZE; i++)
        chi += pow(count[i / SIZE][i % SIZE] - each, 2) / each;
    expect_near("chi square of 62", chi, 62, 45); /* 4 deviations */
}

/* ---- which of them ---- */

static void shares_of(const md_mix_rule *r, double *mixed, double *cut)
{
    *mixed = *cut = 0;
    for (int i = 0; i < DRAWS; i++) {
        md_mix_draw d = md_mix_choose(r, i, 5);
        *mixed += (d.lambda < 1.0) / (double)DRAWS;
        *cut += (d.box[2] > 0) / (double)DRAWS;
    }
}

static void probabilities_hold(void **state)
{
    (void)state;
    double mixed, cut;
    md_mix_rule r = rule_of(0.8, 1.0);
    shares_of(&r, &mixed, &cut);
    expect_near("mixed", mixed, 1.0, 1e-3); /* but for empty boxes */
    expect_near("cut", cut, 0.5, 0.006);
    r.probability = 0.3, r.choose = 0.2;
    shares_of(&r, &mixed, &cut);
    expect_near("mixed", mixed, 0.3, 0.006);
    expect_near("cut", cut, 0.06, MEAN);
    r = rule_of(0.8, 0);
    r.choose = 1.0;
    shares_of(&r, &mixed, &cut);
    assert_true(mixed > 0.999 && cut == 0);
    r = rule_of(0, 1.0);
    r.choose = 0;
    shares_of(&r, &mixed, &cut);
    assert_true(cut > 0.999);
    r.cutmix = 0;
    shares_of(&r, &mixed, &cut);
    assert_true(mixed == 0 && cut == 0);
}

/* ---- groups and targets ---- */

/* Image `position` of a group and the position of its partner agree on everything but themselves.
 */
static void check_pair(const md_mix_rule *r, int64_t step, int64_t position)
{
    const int64_t first = position / r->group * r->group;
    const md_mix m = md_mix_record(r, step, position, 0, 1000 + position);
    const double own = md_mix_weight(r, step, position);
    const md_mix_draw d = md_mix_choose(r, step, position / r->group);
    assert_true(own == d.lambda);
    assert_memory_equal(m.box, d.box, sizeof m.box);
    assert_true(m.lambda == (d.box[2] > 0 ? 1.0f : (float)d.lambda));
    if (own == 1.0) {
        assert_int_equal(m.partner, 0);
        return;
    }
    const int64_t mirror = first + r->group - 1 - (position - first);
    assert_int_equal(position + m.partner, mirror);
    const md_mix back = md_mix_record(r, step, mirror, 0, 1000 + mirror);
    assert_int_equal(mirror + back.partner, position);
    assert_true(back.lambda == m.lambda && md_mix_weight(r, step, mirror) == own);
    assert_memory_equal(back.box, m.box, sizeof m.box);
}

static void groups_are_mixed_with_their_mirror_image(void **state)
{
    (void)state;
    const int groups[] = {2, 4, 8, 32};
    md_mix_rule r = rule_of(0.8, 1.0);
    r.probability = 0.7;
    for (size_t g = 0; g < MD_COUNT(groups); g++) {
        r.group = groups[g];
        for (int64_t step = 0; step < 50; step++)
            for (int64_t position = 0; position < 96; position++)
                check_pair(&r, step, position);
    }
}

static void targets_are_distributions(void **state)
{
    (void)state;
    enum { CLASSES = 10 };
    md_mix_rule r = rule_of(0.8, 1.0);
    for (int i = 0; i < 1000; i++) {
        float target[CLASSES] = {0};
        double sum = 0, own = md_mix_weight(&r, i, 3);
        r.smoothing = i % 2 ? 0.1 : 0.0;
        md_mix_target(&r, own, 4, CLASSES, target);
        md_mix_target(&r, 1.0 - own, i % 3 ? 7 : 4, CLASSES, target);
        for (int k = 0; k < CLASSES; k++) {
            double want = r.smoothing / CLASSES;
            want += (k == 4) * (1.0 - r.smoothing) * own;
            want += (k == (i % 3 ? 7 : 4)) * (1.0 - r.smoothing) * (1.0 - own);
            expect_near("target", (double)target[k], want, 2e-7);
            sum += (double)target[k];
        }
        expect_near("sum", sum, 1.0, 5e-7);
    }
}

/* ---- erasing ---- */

typedef struct erase_stats {
    double hits, area, square, aspect, aspect_square, x, x_square, y;
} erase_stats;

/* Sides are rounded to whole pixels, so bounds hold for half a pixel more or less. */
static void count_erased(erase_stats *s, const int32_t b[4], int size)
{
    const double w = b[2], h = b[3], whole = (double)size * size;
    if (b[2] == 0)
        return;
    assert_true(b[0] >= 0 && b[1] >= 0 && b[0] + b[2] <= size && b[1] + b[3] <= size);
    assert_true((w + 0.5) * (h + 0.5) >= 0.02 * whole && (w - 0.5) * (h - 0.5) <= whole / 3.0);
    assert_true((h + 0.5) / (w - 0.5) >= 0.3 && (w + 0.5) / (h - 0.5) >= 0.3);
    const double area = w * h / whole, aspect = log(h / w), x = (b[0] + 0.5 * w) / size;
    s->hits++;
    s->area += area, s->square += area * area;
    s->aspect += aspect, s->aspect_square += aspect * aspect;
    s->x += x, s->x_square += x * x, s->y += (b[1] + 0.5 * h) / size;
}

/* Against timm's RandomErasing: mean area and its deviation, deviations of the logarithm of the
 * aspect ratio and of the centre. */
static void check_erasing(int size, double probability, const double timm[4])
{
    md_mix_rule r = {.seed = 3, .erasing = probability, .group = 2, .size = size};
    erase_stats s = {0};
    int32_t box[4];
    for (int i = 0; i < DRAWS; i++) {
        md_erase_choose(&r, (uint32_t)(i % 7), i, box);
        count_erased(&s, box, size);
    }
    const double n = s.hits, area = s.area / n, aspect = s.aspect / n, x = s.x / n;
    expect_near("share", n / DRAWS, probability, 0.006);
    expect_near("area", area, timm[0], 0.002);
    expect_near("its deviation", sqrt(s.square / n - area * area), timm[1], 0.002);
    expect_near("log aspect", aspect, 0, 0.015);
    expect_near("its deviation", sqrt(s.aspect_square / n - aspect * aspect), timm[2], 0.01);
    expect_near("centre", x, 0.5, 0.006);
    expect_near("its deviation", sqrt(s.x_square / n - x * x), timm[3], 0.004);
    expect_near("centre", s.y / n, 0.5, 0.006);
}

static void erasing_is_that_of_timm(void **state)
{
    (void)state;
    check_erasing(224, 0.25, (double[]){0.1759, 0.0902, 0.6911, 0.1763});
    check_erasing(224, 1.0, (double[]){0.1759, 0.0902, 0.6911, 0.1763});
    check_erasing(32, 1.0, (double[]){0.1752, 0.0899, 0.6916, 0.1835});
    md_mix_rule off = {.seed = 3, .group = 2, .size = 32};
    int32_t box[4] = {1, 2, 3, 4};
    md_erase_choose(&off, 0, 0, box);
    assert_true(box[2] == 0 && box[3] == 0);
}

/* ---- what a draw depends on ---- */

static bool same_draw(md_mix_draw a, md_mix_draw b)
{
    return a.lambda == b.lambda && memcmp(a.box, b.box, sizeof a.box) == 0;
}

/* Mixing: seed, step and group, whatever came before; not how many images a group has. */
static void mixing_depends_on_seed_step_and_group(void **state)
{
    (void)state;
    md_mix_rule r = rule_of(0.8, 1.0), other = r, larger = r;
    md_mix_draw first[64];
    other.seed++;
    larger.group = 64;
    int equal[3] = {0};
    for (int i = 0; i < 64; i++)
        first[i] = md_mix_choose(&r, i / 8, i % 8);
    for (int i = 63; i >= 0; i--) {
        assert_true(same_draw(first[i], md_mix_choose(&r, i / 8, i % 8)));
        assert_true(same_draw(first[i], md_mix_choose(&larger, i / 8, i % 8)));
        equal[0] += same_draw(first[i], md_mix_choose(&other, i / 8, i % 8));
        equal[1] += same_draw(first[i], md_mix_choose(&r, i / 8 + 8, i % 8));
        equal[2] += same_draw(first[i], md_mix_choose(&r, i / 8, i % 8 + 8));
    }
    assert_true(equal[0] + equal[1] + equal[2] == 0);
}

/* Erasing: seed, epoch and sample, not step or position; the noise likewise, and it is another one
 * for every picture. */
static void erasing_depends_on_seed_epoch_and_sample(void **state)
{
    (void)state;
    md_mix_rule r = rule_of(0.8, 1.0);
    r.erasing = 1.0;
    md_mix_rule other = r;
    other.seed++;
    int equal = 0;
    for (int64_t i = 0; i < 64; i++) {
        const md_mix a = md_mix_record(&r, 0, i, 2, i), b = md_mix_record(&r, 9, 63 - i, 2, i);
        const md_mix more[] = {md_mix_record(&other, 0, i, 2, i), md_mix_record(&r, 0, i, 3, i),
                               md_mix_record(&r, 0, i, 2, i + 64)};
        assert_memory_equal(a.erase, b.erase, sizeof a.erase);
        assert_memory_equal(a.key, b.key, sizeof a.key);
        for (size_t k = 0; k < MD_COUNT(more); k++) {
            equal += memcmp(a.erase, more[k].erase, sizeof a.erase) == 0;
            assert_memory_not_equal(a.key, more[k].key, sizeof a.key);
        }
    }
    assert_true(equal <= 2);
}

static void only_training_with_labels_mixes(void **state)
{
    (void)state;
    char *list[] = {"task=finetune",        "augment.mixup=0.8",           "augment.cutmix=1",
                    "augment.erasing=0.25", "augment.mix_probability=0.9", "augment.mix_switch=0.4",
                    "augment.mix_group=16", "finetune.smoothing=0.2",      "run.seed=5"};
    md_config c;
    assert_int_equal(md_config_init(&c), MD_OK);
    assert_int_equal(md_config_load(&c, NULL, (int)MD_COUNT(list), list), MD_OK);
    md_mix_rule r = md_mix_rule_make(&c);
    assert_true(r.mixup == 0.8 && r.cutmix == 1.0 && r.erasing == 0.25 && r.smoothing == 0.2);
    assert_true(r.probability == 0.9 && r.choose == 0.4 && r.group == 16 && r.seed == 5);
    assert_int_equal(r.size, c.image_size);
    md_config_free(&c);
    assert_int_equal(md_config_init(&c), MD_OK);
    r = md_mix_rule_make(&c);
    assert_true(r.mixup == 0 && r.cutmix == 0 && r.erasing == 0 && r.smoothing == 0);
    md_config_free(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(beta_has_its_moments),
        cmocka_unit_test(beta_has_its_distribution),
        cmocka_unit_test(cutmix_boxes_are_those_of_timm),
        cmocka_unit_test(cutmix_centres_are_uniform),
        cmocka_unit_test(probabilities_hold),
        cmocka_unit_test(groups_are_mixed_with_their_mirror_image),
        cmocka_unit_test(targets_are_distributions),
        cmocka_unit_test(erasing_is_that_of_timm),
        cmocka_unit_test(mixing_depends_on_seed_step_and_group),
        cmocka_unit_test(erasing_depends_on_seed_epoch_and_sample),
        cmocka_unit_test(only_training_with_labels_mixes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
