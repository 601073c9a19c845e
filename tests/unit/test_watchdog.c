/* Watchdog: how long is too long, who is to blame, what passes through the folder, and a rank that
 * stops. */
#include "src/hang_dir.h"
#include "src/watchdog.h"

#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char run_dir[64];

static int make_run(void **state)
{
    (void)state;
    snprintf(run_dir, sizeof run_dir, "/tmp/md_watchdog.XXXXXX");
    return mkdtemp(run_dir) ? 0 : -1;
}

static int drop_run(void **state)
{
    (void)state;
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -r %s", run_dir);
    return system(cmd);
}

/* ---- patience ---- */

static void patience_has_parts_and_learns(void **state)
{
    (void)state;
    md_hang_limits l = {.seconds = 30};
    assert_float_equal(md_hang_limit(&l, "forward", MD_PART_STEP), 30, 0);
    assert_float_equal(md_hang_limit(&l, "comm.wait", MD_PART_SETUP), 300, 0);
    assert_float_equal(md_hang_limit(&l, "comm.wait", MD_PART_CHECKPOINT), 300, 0);
    md_hang_learn(&l, "forward", MD_PART_STEP, 2);
    assert_float_equal(md_hang_limit(&l, "forward", MD_PART_STEP), 30, 0);
    md_hang_learn(&l, "forward", MD_PART_STEP, 7);
    md_hang_learn(&l, "forward", MD_PART_STEP, 5);
    assert_float_equal(md_hang_limit(&l, "forward", MD_PART_STEP), 70, 0);
    assert_float_equal(md_hang_limit(&l, "backward", MD_PART_STEP), 30, 0);
    assert_float_equal(md_hang_limit(&l, "forward", MD_PART_SETUP), 300, 0);
    md_hang_limits off = {0};
    md_hang_learn(&off, "forward", MD_PART_STEP, 7);
    assert_true(isinf(md_hang_limit(&off, "forward", MD_PART_STEP)));
}

static void patience_remembers_so_many_phases(void **state)
{
    (void)state;
    static char name[MD_HANG_PHASES + 1][16];
    md_hang_limits l = {.seconds = 1};
    for (int i = 0; i <= MD_HANG_PHASES; i++) {
        snprintf(name[i], sizeof name[i], "p%d", i);
        md_hang_learn(&l, name[i], MD_PART_STEP, 3);
    }
    assert_float_equal(md_hang_limit(&l, name[MD_HANG_PHASES - 1], MD_PART_STEP), 30, 0);
    assert_float_equal(md_hang_limit(&l, name[MD_HANG_PHASES], MD_PART_STEP), 1, 0);
}

static void grace_follows_the_limit(void **state)
{
    (void)state;
    assert_float_equal(md_hang_grace(300), 30, 0);
    assert_float_equal(md_hang_grace(20), 2, 0);
    assert_float_equal(md_hang_grace(5), 2, 0);
    assert_float_equal(md_hang_grace(1), 1, 0);
}

/* ---- records ---- */

static md_hang_record record(int rank, const char *phase, int64_t collectives)
{
    md_hang_record r = {.answers = true,
                        .rank = rank,
                        .pid = 4000 + rank,
                        .step = 1841,
                        .collectives = collectives,
                        .seconds = 312};
    snprintf(r.host, sizeof r.host, "nid%04d", rank);
    snprintf(r.phase, sizeof r.phase, "%s", phase);
    return r;
}

static void same_record(const md_hang_record *a, const md_hang_record *b)
{
    assert_int_equal(a->answers, b->answers);
    assert_int_equal(a->moves, b->moves);
    assert_int_equal(a->rank, b->rank);
    assert_int_equal(a->pid, b->pid);
    assert_string_equal(a->host, b->host);
    assert_string_equal(a->phase, b->phase);
    assert_int_equal(a->step, b->step);
    assert_int_equal(a->collectives, b->collectives);
    assert_float_equal(a->seconds, b->seconds, 0.05);
}

static void records_survive_as_text(void **state)
{
    (void)state;
    char text[512];
    for (int i = 0; i < 4; i++) {
        md_hang_record a = record(37, "data.wait", 5520), b = {0};
        a.moves = i & 1;
        a.seconds = 0.3 * i;
        if (i & 2)
            a.host[0] = 0;
        md_hang_print(&a, text, sizeof text);
        assert_true(md_hang_parse(text, &b));
        same_record(&a, &b);
        for (size_t n = 0; n + 2 < strlen(text); n++) { /* cut anywhere it is no record */
            char cut[512];
            md_hang_record c = {.rank = -1};
            memcpy(cut, text, n);
            cut[n] = 0;
            if (md_hang_parse(cut, &c))
                assert_true(strstr(cut, "state ") != NULL);
            else
                assert_int_equal(c.rank, -1);
        }
    }
}

/* ---- verdicts ---- */

static void expect(const md_hang_record *r, int n, bool stopped, const char *words)
{
    char text[2048];
    assert_int_equal(md_hang_verdict(r, n, text, sizeof text), stopped);
    assert_string_equal(text, words);
}

static void a_silent_rank_is_to_blame(void **state)
{
    (void)state;
    md_hang_record r[4];
    for (int i = 0; i < 4; i++)
        r[i] = record(i, i == 1 ? "forward" : "comm.allreduce", 10 - i);
    r[2] = (md_hang_record){.rank = 2, .host = "nid0002"};
    expect(r, 4, true,
           "rank 2 (nid0002) does not answer; 2 ranks wait in comm.allreduce at step 1841");
    r[2].host[0] = 0;
    r[3] = (md_hang_record){.rank = 3};
    expect(r, 4, true,
           "rank 2 does not answer, rank 3 does not answer; 1 rank waits in comm.allreduce at "
           "step 1841");
}

static void a_rank_that_waits_for_nobody_is_to_blame(void **state)
{
    (void)state;
    md_hang_record r[5];
    for (int i = 0; i < 5; i++)
        r[i] = record(i, i == 3 ? "data.wait" : i == 0 ? "comm.wait" : "comm.allreduce", 10 - i);
    expect(r, 5, true,
           "rank 3 (nid0003) stopped in data.wait at step 1841 for 312 s; 1 rank waits in "
           "comm.wait, 3 ranks wait in comm.allreduce");
}

static void among_waiting_ranks_the_last_is_to_blame(void **state)
{
    (void)state;
    md_hang_record r[3];
    for (int i = 0; i < 3; i++)
        r[i] = record(i, "comm.allreduce", 10);
    expect(r, 3, true,
           "all 3 ranks wait in comm.allreduce at step 1841 for 312 s, nobody is behind: the "
           "network or the MPI library has stopped");
    r[1].collectives = 9;
    r[1].seconds = 2.25;
    expect(r, 3, true,
           "rank 1 (nid0001) waits in comm.allreduce at step 1841 for 2.2 s as number 9; 2 ranks "
           "wait in comm.allreduce");
}

static void a_rank_that_moves_is_only_slow(void **state)
{
    (void)state;
    md_hang_record r[3];
    for (int i = 0; i < 3; i++)
        r[i] = record(i, "comm.allreduce", 10);
    r[2] = record(2, "forward", 9);
    r[2].moves = true;
    r[0] = (md_hang_record){.rank = 0}; /* it may still come */
    expect(r, 3, false,
           "rank 2 (nid0002) is slow: in forward at step 1841; 1 rank waits in comm.allreduce");
}

static void many_are_counted_not_named(void **state)
{
    (void)state;
    md_hang_record r[20];
    char text[2048], tiny[32];
    for (int i = 0; i < 20; i++)
        r[i] = record(i, i < 11 ? "io" : "comm.wait", 10);
    assert_true(md_hang_verdict(r, 20, text, sizeof text));
    assert_non_null(strstr(text, "rank 7 (nid0007) stopped in io"));
    assert_null(strstr(text, "rank 8"));
    assert_non_null(strstr(text, " for 312 s and 3 more; 9 ranks wait in comm.wait"));
    assert_true(md_hang_verdict(r, 20, tiny, sizeof tiny));
    assert_int_equal(strlen(tiny), sizeof tiny - 1);
    assert_memory_equal(tiny, text, sizeof tiny - 1);
}

/* ---- the folder ---- */

static void records_pass_through_the_folder(void **state)
{
    (void)state;
    md_hang_record a = record(2, "comm.wait", 7), b = {.host = "kept"};
    assert_true(md_hang_lowest(run_dir, 3));
    int fd = md_hang_record_put(run_dir, &a);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, "stack\n", 6), 6);
    close(fd);
    md_hang_record_get(run_dir, 1, &b);
    assert_false(b.answers);
    assert_int_equal(b.rank, 1);
    assert_string_equal(b.host, "kept");
    md_hang_record_get(run_dir, 2, &b);
    same_record(&a, &b);
    assert_true(md_hang_lowest(run_dir, 2));
    assert_false(md_hang_lowest(run_dir, 3));
    md_hang_record_remove(run_dir, 2);
    assert_true(md_hang_lowest(run_dir, 3));
}

static void one_rank_judges(void **state)
{
    (void)state;
    assert_true(md_hang_put(run_dir, MD_HANG_CALL, ""));
    assert_true(md_hang_has(run_dir, MD_HANG_CALL));
    assert_true(md_hang_claim(run_dir, MD_HANG_JUDGE));
    assert_false(md_hang_claim(run_dir, MD_HANG_JUDGE));
    md_hang_remove(run_dir, MD_HANG_CALL);
    assert_false(md_hang_has(run_dir, MD_HANG_CALL));
    md_hang_clear(run_dir);
    assert_false(md_hang_has(run_dir, ""));
    assert_true(access(run_dir, F_OK) == 0);
    md_hang_clear(run_dir); /* nothing is there: fine */
    assert_false(md_hang_put("/nowhere", MD_HANG_CALL, ""));
}

static void clearing_does_not_follow_links(void **state)
{
    (void)state;
    char elsewhere[128], link[128], file[160];
    snprintf(elsewhere, sizeof elsewhere, "%s/elsewhere", run_dir);
    snprintf(link, sizeof link, "%s/hang", run_dir);
    snprintf(file, sizeof file, "%s/precious", elsewhere);
    assert_int_equal(mkdir(elsewhere, 0777), 0);
    close(open(file, O_WRONLY | O_CREAT, 0666));
    assert_int_equal(symlink(elsewhere, link), 0);
    md_hang_clear(run_dir);
    assert_int_equal(access(file, F_OK), 0);
    unlink(link);
}

/* ---- marks and the watch ---- */

static void marks_nest(void **state)
{
    (void)state;
    md_phase("outer");
    const char *was = md_phase("comm.inner");
    assert_string_equal(was, "outer");
    assert_string_equal(md_phase(was), "comm.inner");
    assert_int_equal(md_phase_part(MD_PART_STEP), MD_PART_SETUP);
    assert_int_equal(md_phase_part(MD_PART_SETUP), MD_PART_STEP);
}

static void no_limit_starts_no_watch(void **state)
{
    (void)state;
    assert_int_equal(md_watch_start(0), MD_OK);
    md_watch_stop();
    assert_int_equal(md_watch_start(1), MD_OK);
    md_watch_hosts("a\0b", 2);
    md_watch_stop();
    md_watch_stop();
    assert_int_equal(md_alloc_now(), 0);
}

/* Runs `body` in a child; returns its exit code and what it wrote to stderr. */
static int in_child(void (*body)(void), char *text, size_t size)
{
    int fd[2], status;
    assert_int_equal(pipe(fd), 0);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fd[1], 2);
        close(fd[0]);
        body();
        _exit(0);
    }
    close(fd[1]);
    ssize_t n, used = 0;
    while ((n = read(fd[0], text + used, size - 1 - (size_t)used)) > 0)
        used += n;
    text[used] = 0;
    close(fd[0]);
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void hang_at(int rank, int size)
{
    md_base_set_rank(rank, size);
    if (md_watch_start(1) != MD_OK)
        _exit(1);
    md_watch_dir(run_dir);
    md_watch_hosts("here\0\0there\0", 6);
    md_phase_step(7);
    md_phase_part(MD_PART_STEP);
    md_phase("data.wait");
}

static void stops(void)
{
    hang_at(0, 2);
    sleep(60); /* the signal for the stack ends a sleep */
    sleep(60);
}

static void a_rank_that_stops_is_ended(void **state)
{
    (void)state;
    char text[8192];
    assert_int_equal(in_child(stops, text, sizeof text), MD_ERR_HANG);
    assert_string_equal(text, "md_hpc: error: rank 1 (there) does not answer at step 7\n");
    assert_true(md_hang_has(run_dir, MD_HANG_VERDICT));
    assert_true(md_hang_has(run_dir, "../status.json"));
    md_hang_record r = {0};
    md_hang_record_get(run_dir, 0, &r);
    assert_true(r.answers && !r.moves);
    assert_string_equal(r.phase, "data.wait");
    assert_int_equal(r.step, 7);
    md_hang_clear(run_dir);
}

/* Ends when its call has been made and taken back. */
static void is_let_go(void)
{
    md_hang_record other = record(1, "forward", 3);
    other.moves = true;
    close(md_hang_record_put(run_dir, &other));
    hang_at(0, 2);
    while (!md_hang_has(run_dir, MD_HANG_CALL))
        usleep(1000);
    while (md_hang_has(run_dir, MD_HANG_CALL))
        usleep(1000);
    md_watch_stop();
}

static void nobody_is_ended_while_a_rank_moves(void **state)
{
    (void)state;
    char text[8192];
    assert_int_equal(in_child(is_let_go, text, sizeof text), 0);
    assert_string_equal(text,
                        "md_hpc: warning: rank 1 (nid0001) is slow: in forward at step 1841\n");
    assert_false(md_hang_has(run_dir, MD_HANG_VERDICT));
    assert_false(md_hang_has(run_dir, MD_HANG_JUDGE));
    md_hang_clear(run_dir);
}

static void stops_without_folder(void)
{
    md_base_set_rank(0, 2);
    snprintf(run_dir, sizeof run_dir, "/nowhere");
    stops();
}

static void without_a_folder_a_rank_speaks_for_itself(void **state)
{
    (void)state;
    char text[8192];
    assert_int_equal(in_child(stops_without_folder, text, sizeof text), MD_ERR_HANG);
    assert_non_null(strstr(text, "md_hpc: error: rank 0 ("));
    assert_non_null(strstr(text, ") stopped in data.wait at step 7 for "));
    assert_non_null(strstr(text, "[0x")); /* a stack */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(patience_has_parts_and_learns),
        cmocka_unit_test(patience_remembers_so_many_phases),
        cmocka_unit_test(grace_follows_the_limit),
        cmocka_unit_test(records_survive_as_text),
        cmocka_unit_test(a_silent_rank_is_to_blame),
        cmocka_unit_test(a_rank_that_waits_for_nobody_is_to_blame),
        cmocka_unit_test(among_waiting_ranks_the_last_is_to_blame),
        cmocka_unit_test(a_rank_that_moves_is_only_slow),
        cmocka_unit_test(many_are_counted_not_named),
        cmocka_unit_test(records_pass_through_the_folder),
        cmocka_unit_test(one_rank_judges),
        cmocka_unit_test(clearing_does_not_follow_links),
        cmocka_unit_test(marks_nest),
        cmocka_unit_test(no_limit_starts_no_watch),
        cmocka_unit_test(a_rank_that_stops_is_ended),
        cmocka_unit_test(nobody_is_ended_while_a_rank_moves),
        cmocka_unit_test(without_a_folder_a_rank_speaks_for_itself),
    };
    return cmocka_run_group_tests(tests, make_run, drop_run);
}
