/* par_main: a cmocka group run by every rank under mpirun (or by one rank without it). Rank 0 shows
 * cmocka's lines; other ranks only speak when something fails. All ranks vote and return the same
 * exit code. A rank whose check failed leaves its peers waiting in a collective: a timer ends them
 * all. */
#ifndef MD_PAR_MAIN_H
#define MD_PAR_MAIN_H

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "mpi/comm_mpi.h"

#define PAR_SECONDS 300

static md_comm *par_world;

static void par_mute(int fd)
{
    int null = open("/dev/null", O_WRONLY);
    if (null >= 0) {
        dup2(null, fd);
        close(null);
    }
}

static int par_setup(void **state)
{
    (void)state;
    if (md_comm_rank(par_world) > 0) {
        fflush(stdout);
        par_mute(STDOUT_FILENO);
    }
    return 0;
}

/* Failures have been told by now; what follows is cmocka's summary. */
static int par_teardown(void **state)
{
    (void)state;
    fflush(NULL);
    if (md_comm_rank(par_world) > 0)
        par_mute(STDERR_FILENO);
    return 0;
}

static int par_vote(int failed)
{
    int64_t sum = failed;
    md_comm_allreduce(par_world, &sum, 1, MD_I64, MD_SUM);
    md_mpi_stop(par_world);
    return sum > 0;
}

#define PAR_MAIN(tests)                                                          \
    int main(int argc, char **argv)                                              \
    {                                                                            \
        alarm(PAR_SECONDS);                                                      \
        if (md_mpi_start(&argc, &argv, &par_world) != MD_OK)                     \
            return 1;                                                            \
        return par_vote(cmocka_run_group_tests(tests, par_setup, par_teardown)); \
    }

/* A status that must be MD_OK, with its sentence when it is not. */
#define assert_ok(expr)                                                          \
    do {                                                                         \
        md_status ok_ = (expr);                                                  \
        if (ok_ != MD_OK)                                                        \
            fail_msg("%s: %s: %s", #expr, md_status_name(ok_), md_error_text()); \
    } while (0)

#endif
