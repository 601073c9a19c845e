/* Learning rate: the values of BEiT v2's scheduler for the paper's B/16 run, and the edges. */
#include "src/schedule.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

static md_config paper(void)
{
    return (md_config){
        .optim_lr = 1.5e-3, .optim_min_lr = 1e-5, .optim_warmup_epochs = 10, .train_epochs = 300};
}

static void check_close(double got, double want)
{
    assert_true(fabs(got - want) <= 5e-7 * fabs(want));
}

static void matches_the_published_values(void **state)
{
    (void)state;
    static const struct {
        int64_t step;
        double lr;
    } want[] = {{1, 2.400384e-7},      {3125, 7.501200e-4},   {6249, 1.5e-3},
                {6250, 1.5e-3},        {50000, 1.295867e-3},  {100000, 7.146665e-4},
                {150000, 1.619107e-4}, {187499, 1.0000000e-5}};
    md_config c = paper();
    md_schedule s = md_schedule_make(&c, 1281167 / 2048);
    assert_int_equal(s.warmup, 6250);
    assert_int_equal(s.total, 187500);
    assert_true(md_schedule_lr(&s, 0) == 0);
    for (size_t i = 0; i < MD_COUNT(want); i++)
        check_close(md_schedule_lr(&s, want[i].step), want[i].lr);
    assert_true(md_schedule_lr(&s, 187499) > 1e-5);
    assert_true(md_schedule_lr(&s, 187500) == 1e-5);
    assert_true(md_schedule_lr(&s, 1000000) == 1e-5);
}

static void warmup_may_be_fractional_or_absent(void **state)
{
    (void)state;
    md_config c = paper();
    c.optim_warmup_epochs = 0.5, c.train_epochs = 2.5;
    md_schedule s = md_schedule_make(&c, 10);
    assert_int_equal(s.warmup, 5);
    assert_int_equal(s.total, 25);
    check_close(md_schedule_lr(&s, 1), 1.5e-3 / 4);
    check_close(md_schedule_lr(&s, 15), (1.5e-3 + 1e-5) / 2);
    c.optim_warmup_epochs = 0;
    s = md_schedule_make(&c, 10);
    assert_true(md_schedule_lr(&s, 0) == 1.5e-3);
    c.optim_warmup_epochs = 0.1;
    s = md_schedule_make(&c, 10);
    assert_true(md_schedule_lr(&s, 0) == 0);
    assert_true(md_schedule_lr(&s, 1) == 1.5e-3);
}

/* A warm-up longer than the run is all warm-up, never a division by a negative length. */
static void warmup_may_outlast_the_run(void **state)
{
    (void)state;
    md_config c = paper();
    c.train_epochs = 5;
    md_schedule s = md_schedule_make(&c, 10);
    check_close(md_schedule_lr(&s, 49), 1.5e-3 * 49 / 99);
    assert_true(md_schedule_lr(&s, 100) == 1e-5);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_published_values),
        cmocka_unit_test(warmup_may_be_fractional_or_absent),
        cmocka_unit_test(warmup_may_outlast_the_run),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
