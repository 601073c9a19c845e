/* cmd_bench_ops: `bench ops`: where the time of a step goes, op by op and shape by shape. Every op
 * is waited for, so the sum is more than a step takes; the shares and rates are what it is for. */
#include "kernels/timing/timing_backend.h"
#include "src/cmd_bench.h"

#include <stdio.h>

static void print_row(const md_timing *r, int steps, double all)
{
    const double each = r->seconds / (double)r->calls;
    const double calls = (double)r->calls / steps;
    printf("%-16s %-40s %6.0f %9.1f %9.3f %6.1f", md_op_name(r->op), r->shape, calls, 1e6 * each,
           1e3 * r->seconds / steps, 100.0 * r->seconds / all);
    printf(" %9.1f", 1e-9 * r->bytes / r->seconds);
    if (r->flops > 0)
        printf(" %9.2f", 1e-12 * r->flops / r->seconds);
    putchar('\n');
}

md_status md_bench_ops(md_bench *b, const md_bench_options *o)
{
    md_step_result last;
    int n;
    MD_TRY(md_bench_steps(b, o->warmup, false, &last));
    md_timing_reset(b->be);
    MD_TRY(md_bench_steps(b, o->steps, true, &last));
    const md_timing *row = md_timing_rows(b->be, &n);
    const int issued = o->steps * o->repeat;
    double all = 0;
    for (int i = 0; i < n; i++)
        all += row[i].seconds;
    printf("%-16s %-40s %6s %9s %9s %6s %9s %9s\n", "op", "output", "calls", "us each", "ms/step",
           "%", "GB/s", "TFLOP/s");
    for (int i = 0; i < n; i++)
        print_row(&row[i], issued, all);
    printf("%-16s %-40s %6s %9s %9.3f  on %s\n", "all", "", "", "", 1e3 * all / issued,
           *b->be->device ? b->be->device : b->be->name);
    return MD_OK;
}
