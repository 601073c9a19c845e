/* Masks: exact counts, the published statistics of the block sampler, uniformity, keying. */
#include "src/mask.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define DRAWS 20000
#define MAX_G 4096

static md_mask_args args_of(const char *kind, int h, int w, int count)
{
    return (md_mask_args){.kind = md_mask_kind_find(kind),
                          .grid_h = h,
                          .grid_w = w,
                          .count = count,
                          .min_block = 16,
                          .aspect = 0.3,
                          .seed = 7};
}

/* Draws one mask and checks count, rising index and agreement of the two forms. */
static md_mask_stats draw(const md_mask_args *a, uint32_t epoch, int64_t sample, uint8_t *mask)
{
    int32_t index[MAX_G];
    md_mask_stats stats;
    md_mask_sample(a, epoch, sample, mask, index, &stats);
    int total = 0;
    for (int i = 0; i < a->grid_h * a->grid_w; i++) {
        assert_true(mask[i] <= 1);
        total += mask[i];
    }
    assert_int_equal(total, a->count);
    for (int i = 0; i < a->count; i++) {
        assert_int_equal(mask[index[i]], 1);
        assert_true(i == 0 || index[i] > index[i - 1]);
    }
    return stats;
}

/* Means over DRAWS samples against 10^5 draws of the public generator, before its fix-up; the
 * tolerances allow for both samplings. */
static void check_block_statistics(int side, int count, double mean_raw, double mean_blocks,
                                   double short_share)
{
    uint8_t mask[MAX_G];
    md_mask_args a = args_of("block", side, side, count);
    double raw = 0, blocks = 0, missed = 0;
    for (int i = 0; i < DRAWS; i++) {
        md_mask_stats s = draw(&a, 0, i, mask);
        assert_true(s.raw_count <= count);
        raw += s.raw_count;
        blocks += s.blocks;
        missed += s.raw_count < count;
    }
    assert_true(fabs(raw / DRAWS - mean_raw) < 0.05);
    assert_true(fabs(blocks / DRAWS - mean_blocks) < 0.05);
    if (short_share > 0)
        assert_true(fabs(missed / DRAWS - short_share) < 0.018);
}

static void block_matches_the_published_statistics(void **state)
{
    (void)state;
    check_block_statistics(14, 75, 74.49, 4.13, 0.325);
    check_block_statistics(16, 102, 101.46, 4.60, 0);
}

static void every_count_and_grid_is_exact(void **state)
{
    (void)state;
    static const int grid[][2] = {{1, 1}, {2, 3}, {8, 8}, {7, 14}, {64, 64}};
    uint8_t mask[MAX_G];
    for (size_t g = 0; g < MD_COUNT(grid); g++) {
        int cells = grid[g][0] * grid[g][1];
        for (int count = 0; count <= cells; count += MD_MAX(1, cells / 9)) {
            md_mask_args block = args_of("block", grid[g][0], grid[g][1], count);
            md_mask_args random = args_of("random", grid[g][0], grid[g][1], count);
            for (int i = 0; i < 20; i++) {
                draw(&block, 1, i, mask);
                draw(&random, 1, i, mask);
            }
        }
    }
}

/* Every cell of a random mask is masked with the same probability, and so is every pair of cells.
 */
static void random_is_uniform(void **state)
{
    (void)state;
    uint8_t mask[MAX_G];
    md_mask_args a = args_of("random", 4, 5, 7);
    int cell[20] = {0}, pair = 0;
    for (int i = 0; i < DRAWS; i++) {
        md_mask_stats s = draw(&a, 3, i, mask);
        assert_int_equal(s.blocks, 0);
        for (int j = 0; j < 20; j++)
            cell[j] += mask[j];
        pair += mask[0] && mask[19];
    }
    double p = 7.0 / 20, q = p * 6 / 19;
    for (int j = 0; j < 20; j++)
        assert_true(fabs(cell[j] - p * DRAWS) < 5 * sqrt(p * (1 - p) * DRAWS));
    assert_true(fabs(pair - q * DRAWS) < 5 * sqrt(q * (1 - q) * DRAWS));
}

/* Blocks gather in the middle: shares of the public generator are 0.045 at a corner, 0.19 at the
 * middle of an edge and 0.717 at the centre (2 * 10^4 draws of it, so good to about 0.005). */
static void block_covers_the_grid(void **state)
{
    (void)state;
    static const struct {
        int cell;
        double share;
    } want[] = {{0, 0.045}, {13, 0.045},     {13 * 14, 0.045},    {195, 0.045},
                {7, 0.192}, {6 * 14, 0.192}, {6 * 14 + 6, 0.717}, {7 * 14 + 7, 0.717}};
    uint8_t mask[MAX_G];
    int hit[MD_COUNT(want)] = {0};
    md_mask_args a = args_of("block", 14, 14, 75);
    for (int i = 0; i < DRAWS; i++) {
        draw(&a, 0, i, mask);
        for (size_t j = 0; j < MD_COUNT(want); j++)
            hit[j] += mask[want[j].cell];
    }
    for (size_t j = 0; j < MD_COUNT(want); j++)
        assert_true(fabs((double)hit[j] / DRAWS - want[j].share) < 0.02);
}

static void keyed_by_seed_epoch_and_sample(void **state)
{
    (void)state;
    uint8_t first[MAX_G], other[MAX_G];
    static const char *const kind[] = {"block", "random"};
    for (size_t k = 0; k < MD_COUNT(kind); k++) {
        md_mask_args a = args_of(kind[k], 14, 14, 75);
        draw(&a, 5, 1000003, first);
        draw(&a, 5, 1000003, other);
        assert_memory_equal(first, other, 196);
        draw(&a, 6, 1000003, other);
        assert_memory_not_equal(first, other, 196);
        draw(&a, 5, 1000004, other);
        assert_memory_not_equal(first, other, 196);
        a.seed++;
        draw(&a, 5, 1000003, other);
        assert_memory_not_equal(first, other, 196);
    }
}

static void none_masks_nothing(void **state)
{
    (void)state;
    uint8_t mask[MAX_G];
    md_mask_args a = args_of("none", 14, 14, 0);
    draw(&a, 0, 0, mask);
    assert_null(md_mask_kind_find("no such kind"));
}

static void config_gives_the_count(void **state)
{
    (void)state;
    md_config c = {.image_size = 224,
                   .model_patch = 16,
                   .mask_ratio = 0.4,
                   .mask_min_block = 16,
                   .mask_aspect = 0.3,
                   .run_seed = 9,
                   .mask_kind = "block"};
    md_mask_args a;
    assert_int_equal(md_mask_count(&c), 78);
    c.model_patch = 14;
    assert_int_equal(md_mask_count(&c), 102);
    c.mask_count = 98;
    assert_int_equal(md_mask_args_make(&c, &a), MD_OK);
    assert_int_equal(a.count, 98);
    assert_int_equal(a.grid_h, 16);
    assert_int_equal(a.seed, 9);
    c.mask_count = 257;
    assert_int_equal(md_mask_args_make(&c, &a), MD_ERR_CONFIG);
    assert_non_null(strstr(md_error_text(), "257"));
    c.mask_count = 0, c.mask_ratio = 0.001;
    assert_int_equal(md_mask_args_make(&c, &a), MD_ERR_CONFIG);
    strcpy(c.mask_kind, "none");
    assert_int_equal(md_mask_args_make(&c, &a), MD_OK);
    assert_int_equal(a.count, 0);
    strcpy(c.mask_kind, "stripes");
    c.mask_count = 5;
    assert_int_equal(md_mask_args_make(&c, &a), MD_ERR_CONFIG);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(block_matches_the_published_statistics),
        cmocka_unit_test(every_count_and_grid_is_exact),
        cmocka_unit_test(random_is_uniform),
        cmocka_unit_test(block_covers_the_grid),
        cmocka_unit_test(keyed_by_seed_epoch_and_sample),
        cmocka_unit_test(none_masks_nothing),
        cmocka_unit_test(config_gives_the_count),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
