/* One run directory belongs to one job, and a dead job stands in nobody's way. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "io/run_dir.h"

static char dir[256], path[300];

#define assert_ok(expr)                                                          \
    do {                                                                         \
        md_status ok_ = (expr);                                                  \
        if (ok_ != MD_OK)                                                        \
            fail_msg("%s: %s: %s", #expr, md_status_name(ok_), md_error_text()); \
    } while (0)

static void test_take_and_give_back(void **st)
{
    (void)st;
    md_run_lock *lock, *other;
    assert_ok(md_run_lock_take(dir, "run.dir", &lock));
    assert_int_equal(md_run_lock_take(dir, "run.dir", &other), MD_ERR_PERM);
    char pid[32];
    snprintf(pid, sizeof pid, "process %ld", (long)getpid());
    assert_non_null(strstr(md_error_text(), pid));
    md_run_lock_touch(lock);
    md_run_lock_release(lock);
    assert_ok(md_run_lock_take(dir, "run.dir", &lock));
    md_run_lock_release(lock);
    md_run_lock_release(NULL);
    assert_int_equal(md_run_lock_take("/nonexistent", "run.dir", &lock), MD_ERR_CREATE);
}

/* A process of this host that was killed leaves no lock. */
static void test_dead_process(void **st)
{
    (void)st;
    md_run_lock *lock;
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0)
        _exit(md_run_lock_take(dir, "run.dir", &lock));
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    assert_ok(md_run_lock_take(dir, "run.dir", &lock));
    md_run_lock_release(lock);
}

static void hold(const char *text)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* A holder on another host, whose lock may not be seen: alive until it has been silent for long, or
 * when it was our own batch job. */
static void test_other_host(void **st)
{
    (void)st;
    md_run_lock *lock;
    hold("elsewhere 1234 77\n");
    assert_int_equal(md_run_lock_take(dir, "run.dir", &lock), MD_ERR_PERM);
    assert_non_null(strstr(md_error_text(), "process 1234 on elsewhere"));
    setenv("SLURM_JOB_ID", "77", 1);
    assert_ok(md_run_lock_take(dir, "run.dir", &lock));
    md_run_lock_release(lock);
    unsetenv("SLURM_JOB_ID");
    hold("elsewhere 1234 -\n");
    struct timespec long_ago[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
    assert_int_equal(utimensat(AT_FDCWD, path, long_ago, 0), 0);
    assert_ok(md_run_lock_take(dir, "run.dir", &lock));
    md_run_lock_release(lock);
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/md-run-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(dir))
        return 1;
    snprintf(path, sizeof path, "%s/LOCK", dir);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_take_and_give_back),
        cmocka_unit_test(test_dead_process),
        cmocka_unit_test(test_other_host),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    rmdir(dir);
    return failed;
}
