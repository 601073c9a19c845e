/* Fault sites that no command of the program passes, and a place that is slow. MD_FAULT is read
 * once, so each test is a child of its own. */
#include "io/safetensors.h"
#include "mpi/comm.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static int in_child(const char *fault, void (*body)(void))
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        setenv("MD_FAULT", fault, 1);
        body();
        _exit(0);
    }
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void collectives(void)
{
    md_comm *c;
    float x[2] = {1, 2}, y[2];
    if (md_comm_self(&c) != MD_OK)
        _exit(1);
    md_comm_reduce_scatter(c, x, y, 2, MD_F32);
    md_comm_exscan(c, 3);
    md_comm_alltoallv(c, x, (int64_t[]){2}, y, (int64_t[]){2}, sizeof *x);
}

static void a_dead_collective_ends_the_job(void **state)
{
    (void)state;
    assert_int_equal(in_child("", collectives), 0);
    assert_int_equal(in_child("comm.reduce_scatter", collectives), MD_ERR_DEVICE);
    assert_int_equal(in_child("comm.exscan", collectives), MD_ERR_DEVICE);
    assert_int_equal(in_child("comm.alltoallv", collectives), MD_ERR_DEVICE);
    assert_int_equal(in_child("comm.exscan:kill", collectives), 128 + 9);
}

static void writes_weights(void)
{
    float x[2] = {1, 2};
    md_st_tensor t = {.name = "x", .t = MD_TENSOR(x, MD_F32, 2)};
    char path[64];
    snprintf(path, sizeof path, "/tmp/md_faults.%ld", (long)getpid());
    md_status st = md_safetensors_write(path, &t, 1, NULL, 0);
    bool left = access(path, F_OK) == 0;
    unlink(path);
    _exit(left != (st == MD_OK) ? 1 : (int)st);
}

static void weights_that_cannot_be_written_leave_no_file(void **state)
{
    (void)state;
    assert_int_equal(in_child("", writes_weights), 0);
    assert_int_equal(in_child("weights.write#3", writes_weights), MD_ERR_IO);
}

/* A sleep may be longer than asked for, never shorter. */
static void is_slow(void)
{
    double start = md_now();
    bool failed = md_fault("test.slow");
    _exit(failed ? 2 : md_now() - start < 0.05 ? 3 : 0);
}

static void a_slow_place_does_not_fail(void **state)
{
    (void)state;
    assert_int_equal(in_child("test.slow:slow=50", is_slow), 0);
    assert_int_equal(in_child("test.slow@rank0#2:slow=50", is_slow), 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_dead_collective_ends_the_job),
        cmocka_unit_test(weights_that_cannot_be_written_leave_no_file),
        cmocka_unit_test(a_slow_place_does_not_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
