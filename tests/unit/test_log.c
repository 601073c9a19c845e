/* Messages by rank and level; the files of a run directory through resume, full disk and bad text.
 */
#include "src/log.h"

#include "src/rng.h"

#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char dir[] = "/tmp/md_test_log_XXXXXX";

static const char *in_dir(const char *name)
{
    static char path[2][256];
    static int turn;
    char *p = path[turn++ % 2];
    snprintf(p, sizeof path[0], "%s/%s", dir, name);
    return p;
}

static const char *text_of(const char *name)
{
    static char text[1 << 16];
    FILE *f = fopen(in_dir(name), "r");
    if (!f)
        return "(no file)";
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    return text;
}

static void append_text(const char *name, const char *text)
{
    FILE *f = fopen(in_dir(name), "a");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* Sends stdout or stderr to a file of the test directory until it is put back. */
static int divert(int fd, const char *name)
{
    fflush(NULL);
    int saved = dup(fd), to = open(in_dir(name), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_true(saved >= 0 && to >= 0);
    dup2(to, fd);
    close(to);
    return saved;
}

static void put_back(int fd, int saved)
{
    fflush(NULL);
    dup2(saved, fd);
    close(saved);
}

static void say_everything(void)
{
    md_log_debug("d%d", 1);
    md_log_info("i%d", 2);
    md_log_warn("w%d", 3);
    md_log_error("e%d\nsecond", 4);
    md_log_rank(MD_LOG_WARN, "r%d", 5);
}

static void messages_go_by_level_and_rank(void **state)
{
    (void)state;
    static const struct {
        md_log_level level;
        int rank, size;
        const char *out, *err;
    } cases[] = {
        {MD_LOG_DEBUG, 0, 1, "i2\n",
         "md_hpc: debug: d1\nmd_hpc: warning: w3\nmd_hpc: error: e4\nmd_hpc: error: second\n"
         "md_hpc: warning: r5\n"},
        {MD_LOG_INFO, 0, 2, "i2\n",
         "md_hpc: warning: w3\nmd_hpc: error: e4\nmd_hpc: error: second\n"
         "md_hpc: warning: rank 0: r5\n"},
        {MD_LOG_DEBUG, 1, 2, "", "md_hpc: debug: rank 1: d1\nmd_hpc: warning: rank 1: r5\n"},
        {MD_LOG_ERROR, 0, 2, "", "md_hpc: error: e4\nmd_hpc: error: second\n"},
        {MD_LOG_ERROR, 1, 2, "", ""},
    };
    for (size_t i = 0; i < MD_COUNT(cases); i++) {
        int out = divert(1, "out"), err = divert(2, "err");
        md_log_set(cases[i].level);
        md_base_set_rank(cases[i].rank, cases[i].size);
        say_everything();
        put_back(1, out);
        put_back(2, err);
        assert_string_equal(text_of("out"), cases[i].out);
        assert_string_equal(text_of("err"), cases[i].err);
    }
    md_base_set_rank(0, 1);
    md_log_set(MD_LOG_INFO);
}

static md_runlog *open_log(int64_t resumed_step)
{
    md_runlog *log;
    assert_int_equal(md_runlog_open(dir, resumed_step, &log), MD_OK);
    return log;
}

static void write_steps(md_runlog *log, int64_t from, int64_t to)
{
    for (int64_t s = from; s <= to; s++)
        md_runlog_metrics(log, &(md_metrics){.step = s, .loss = 1.0 / (double)s, .mfu = NAN});
}

/* Expects metrics.jsonl to hold steps 1..last once each, in order. */
static void expect_steps(int64_t last)
{
    FILE *f = fopen(in_dir("metrics.jsonl"), "r");
    assert_non_null(f);
    int64_t step = 0;
    for (json_t *j; (j = json_loadf(f, JSON_DISABLE_EOF_CHECK, NULL));) {
        assert_int_equal(json_integer_value(json_object_get(j, "step")), ++step);
        json_decref(j);
    }
    fclose(f);
    assert_int_equal(step, last);
}

static void a_metrics_line_has_the_fixed_keys(void **state)
{
    (void)state;
    md_runlog *log = open_log(-1);
    md_metrics m = {.step = 5000000000,
                    .epoch = 0.5,
                    .loss = 2,
                    .grad_norm = INFINITY,
                    .mfu = NAN,
                    .memory_bytes = 7,
                    .bad_images = 8,
                    .skipped = 9};
    md_runlog_metrics(log, &m);
    md_runlog_close(log);
    assert_string_equal(
        text_of("metrics.jsonl"),
        "{\"step\":5000000000,\"epoch\":0.5,\"loss\":2.0,\"grad_norm\":null,\"learning_rate\":0.0,"
        "\"images_per_second\":0.0,\"step_seconds\":0.0,\"data_wait_seconds\":0.0,"
        "\"comm_wait_seconds\":0.0,\"mfu\":null,\"memory_bytes\":7,\"bad_images\":8,"
        "\"skipped\":9}\n");
}

static void reals_keep_all_their_bits(void **state)
{
    (void)state;
    md_rng r = md_rng_at(3, MD_RNG_TEST, 0, 0);
    for (int i = 0; i < 200; i++) {
        md_runlog *log = open_log(-1);
        double v = (md_rng_double(&r) - 0.5) * pow(10, (int)md_rng_below(&r, 40) - 20);
        md_runlog_metrics(log, &(md_metrics){.step = 1, .loss = v});
        md_runlog_close(log);
        json_t *j = json_loads(text_of("metrics.jsonl"), 0, NULL);
        double back = json_real_value(json_object_get(j, "loss"));
        json_decref(j);
        assert_memory_equal(&back, &v, sizeof v);
    }
}

static void resuming_cuts_what_will_be_repeated(void **state)
{
    (void)state;
    md_runlog *log = open_log(-1);
    write_steps(log, 1, 10);
    md_runlog_event(log, 9, "signal", "USR1");
    md_runlog_close(log);
    append_text("metrics.jsonl", "{\"step\":11,\"lo"); /* torn by a crash */
    append_text("events.jsonl", "{\"step\":11,\"event");
    log = open_log(6);
    expect_steps(6);
    write_steps(log, 7, 8);
    md_runlog_close(log);
    expect_steps(8);
    assert_non_null(strstr(text_of("events.jsonl"), "\"event\":\"signal\",\"text\":\"USR1\"}\n"));
    assert_null(strstr(text_of("events.jsonl"), "\"step\":11"));
    append_text("metrics.jsonl", "garbage\n{\"step\":8,\"step\":9}\n[1]\n\n");
    log = open_log(8);
    md_runlog_close(log);
    expect_steps(8);
    md_runlog_close(open_log(-1));
    expect_steps(0);
    assert_int_not_equal(access(in_dir("metrics.jsonl.new"), F_OK), 0);
}

static void a_full_disk_is_told_once_and_leaves_whole_lines(void **state)
{
    (void)state;
    struct rlimit old, tight;
    md_runlog *log = open_log(-1);
    write_steps(log, 1, 3);
    struct stat st;
    assert_int_equal(stat(in_dir("metrics.jsonl"), &st), 0);
    int err = divert(2, "err");
    getrlimit(RLIMIT_FSIZE, &old);
    tight = old;
    tight.rlim_cur = (rlim_t)st.st_size + 50; /* room for part of a line */
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &tight);
    write_steps(log, 4, 6);
    setrlimit(RLIMIT_FSIZE, &old);
    put_back(2, err);
    expect_steps(3);
    write_steps(log, 4, 5); /* there is room again */
    md_runlog_close(log);
    expect_steps(5);
    const char *told = strstr(text_of("err"), "md_hpc: warning: cannot write ");
    assert_non_null(told);
    told = strstr(told, "metrics.jsonl");
    assert_non_null(told);
    assert_null(strstr(told, "cannot write"));
}

static void short_writes_leave_whole_lines(void **state)
{
    (void)state;
    md_runlog *log = open_log(-1);
    int err = divert(2, "err");
    for (int i = 0; i < 3; i++)
        md_runlog_event(log, i, "e", "%d", i);
    put_back(2, err);
    md_base_set_rank(0, 1);
    md_runlog_close(log);
    const char *text = text_of("events.jsonl");
    assert_non_null(strstr(text, "\"text\":\"0\"}\n"));
    assert_null(strstr(text, "\"text\":\"1"));
    assert_non_null(strstr(text, "\"text\":\"2\"}\n"));
}

static void status_is_replaced_whole(void **state)
{
    (void)state;
    md_runlog *log = open_log(-1);
    md_runlog_status(log, "running", 12, 0, "");
    md_runlog_status(log, "requeue", 13, MD_STOPPED, "caught \xff USR1");
    md_runlog_close(log);
    json_t *j = json_loads(text_of("status.json"), 0, NULL);
    assert_non_null(j);
    assert_string_equal(json_string_value(json_object_get(j, "state")), "requeue");
    assert_int_equal(json_integer_value(json_object_get(j, "step")), 13);
    assert_int_equal(json_integer_value(json_object_get(j, "exit_code")), 75);
    assert_string_equal(json_string_value(json_object_get(j, "message")), "caught ? USR1");
    assert_int_equal(strlen(json_string_value(json_object_get(j, "time"))), 24);
    json_decref(j);
    assert_int_not_equal(access(in_dir("status.json.new"), F_OK), 0);
}

static void run_file_tells_build_hosts_and_no_secrets(void **state)
{
    (void)state;
    setenv("SLURM_JOB_ID", "123", 1);
    setenv("OMP_NUM_THREADS", "2", 1);
    setenv("MY_SECRET_TOKEN", "hunter2", 1);
    setenv("XSLURM_TOKEN", "hunter2", 1);
    md_runlog *log = open_log(-1);
    md_runlog_run(log, &(md_fact){"hdf5", "1.10.8"}, 1, (const char *const[]){"n1", "n2"}, 2);
    md_runlog_close(log);
    const char *text = text_of("run.json");
    assert_null(strstr(text, "hunter2"));
    json_t *j = json_loads(text, 0, NULL);
    json_t *env = json_object_get(j, "environment"), *build = json_object_get(j, "build");
    assert_string_equal(json_string_value(json_object_get(env, "SLURM_JOB_ID")), "123");
    assert_string_equal(json_string_value(json_object_get(env, "OMP_NUM_THREADS")), "2");
    assert_string_equal(json_string_value(json_object_get(build, "version")), MD_VERSION);
    assert_non_null(json_object_get(build, "source"));
    assert_string_equal(json_string_value(json_object_get(json_object_get(j, "run"), "hdf5")),
                        "1.10.8");
    assert_int_equal(json_array_size(json_object_get(j, "hosts")), 2);
    json_decref(j);
}

static void ranks_without_a_log_do_nothing(void **state)
{
    (void)state;
    md_runlog_metrics(NULL, &(md_metrics){.step = 1});
    md_runlog_event(NULL, 1, "e", "t");
    md_runlog_status(NULL, "running", 1, 0, "");
    md_runlog_run(NULL, NULL, 0, NULL, 0);
    md_runlog_close(NULL);
}

static void a_directory_that_is_missing_is_an_error(void **state)
{
    (void)state;
    md_runlog *log = (md_runlog *)state;
    size_t before = md_alloc_now();
    assert_int_equal(md_runlog_open(in_dir("none"), -1, &log), MD_ERR_CREATE);
    assert_null(log);
    assert_non_null(strstr(md_error_text(), "none/metrics.jsonl"));
    assert_int_equal(md_alloc_now(), before);
}

static int make_dir(void **state)
{
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    return system(command);
}

static int remove_logs(void **state)
{
    (void)state;
    unlink(in_dir("metrics.jsonl"));
    unlink(in_dir("events.jsonl"));
    return 0;
}

#define LOG_TEST(f) cmocka_unit_test_setup(f, remove_logs)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(messages_go_by_level_and_rank),
        LOG_TEST(
            short_writes_leave_whole_lines), /* first of all writers: the fault counts passes */
        LOG_TEST(a_metrics_line_has_the_fixed_keys),
        LOG_TEST(reals_keep_all_their_bits),
        LOG_TEST(resuming_cuts_what_will_be_repeated),
        LOG_TEST(a_full_disk_is_told_once_and_leaves_whole_lines),
        LOG_TEST(status_is_replaced_whole),
        LOG_TEST(run_file_tells_build_hosts_and_no_secrets),
        LOG_TEST(ranks_without_a_log_do_nothing),
        LOG_TEST(a_directory_that_is_missing_is_an_error),
    };
    setenv("MD_FAULT", "log.write#2", 1);
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
