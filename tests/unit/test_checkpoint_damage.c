/* What may happen to a checkpoint file and its writer: every damage found, every crash survived,
 * the next whole file taken, full disk. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "tests/unit/checkpoint_small.h"

static void flip(const char *path, int64_t at, int bit)
{
    int fd = open(path, O_RDWR);
    unsigned char c;
    assert_true(fd >= 0);
    assert_int_equal(pread(fd, &c, 1, at), 1);
    c ^= (unsigned char)(1 << bit);
    assert_int_equal(pwrite(fd, &c, 1, at), 1);
    close(fd);
}

/* One changed bit anywhere: each byte of the metadata and every 251st byte of the file. */
static void test_every_flip_is_found(void **st)
{
    (void)st;
    char path[512];
    md_checkpoint *ck;
    assert_ok(write_step(1, 9, 0));
    md_checkpoint_name(path, sizeof path, dir, 1);
    assert_ok(md_checkpoint_open(self, path, &ck));
    int64_t bytes = md_checkpoint_bytes(ck);
    md_checkpoint_close(ck);
    for (int64_t at = 0; at < bytes; at += at < 24 << 10 ? 7 : 251) {
        flip(path, at, (int)(at % 8));
        if (md_checkpoint_find(self, path, NULL, NULL, &ck) != MD_ERR_DATA)
            fail_msg("a changed bit in byte %lld of %lld was not found", (long long)at,
                     (long long)bytes);
        flip(path, at, (int)(at % 8));
    }
    assert_int_equal(newest(), 1);
}

static void put_file(const char *path, const char *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    fclose(f);
}

/* Cut at many lengths, and cut then grown with zeros to the old length, as some file systems do. */
static void test_every_cut_is_found(void **st)
{
    (void)st;
    static char whole[1 << 20], grown[1 << 20];
    char path[512];
    md_checkpoint *ck;
    md_checkpoint_name(path, sizeof path, dir, 1);
    assert_ok(write_step(1, 9, 0));
    FILE *f = fopen(path, "rb");
    size_t size = fread(whole, 1, sizeof whole, f);
    fclose(f);
    memcpy(grown, whole, size);
    for (size_t n = size; n-- > 0; n -= MD_MIN(n, n > 4097 ? 4091 : 96)) {
        put_file(path, whole, n);
        assert_int_equal(md_checkpoint_find(self, path, NULL, NULL, &ck), MD_ERR_DATA);
        memset(grown + n, 0, size - n);
        if (memcmp(grown, whole, size) == 0) /* the file ends with zeros of its own */
            continue;
        put_file(path, grown, size);
        assert_int_equal(md_checkpoint_find(self, path, NULL, NULL, &ck), MD_ERR_DATA);
    }
    memcpy(grown, whole, size);
    put_file(path, grown, size + 1);
    assert_int_equal(md_checkpoint_find(self, path, NULL, NULL, &ck), MD_ERR_DATA);
    put_file(path, whole, size);
    assert_int_equal(newest(), 1);
}

/* The newest k of 4 are damaged, each in another way: the next whole one is taken and the others
 * are named; when none is whole that is another error than when none is there. */
static void test_fallback(void **st)
{
    (void)st;
    char path[512];
    md_checkpoint *ck;
    for (int64_t s = 1; s <= 4; s++)
        assert_ok(write_step(s, 9, 0));
    md_checkpoint_name(path, sizeof path, dir, 4);
    flip(path, 500000, 3);
    assert_int_equal(newest(), 3);
    assert_int_equal(skips, 1);
    assert_non_null(strstr(skipped[0], "blocks.0.big is damaged"));
    md_checkpoint_name(path, sizeof path, dir, 3);
    assert_int_equal(truncate(path, 5000), 0);
    assert_int_equal(newest(), 2);
    assert_non_null(strstr(skipped[1], "cut or grown"));
    md_checkpoint_name(path, sizeof path, dir, 2);
    FILE *f = fopen(path, "w");
    for (int i = 0; i < 1000; i++)
        fputs("hello", f);
    fclose(f);
    assert_int_equal(newest(), 1);
    assert_non_null(strstr(skipped[2], "not a checkpoint"));
    md_checkpoint_name(path, sizeof path, dir, 1);
    assert_int_equal(truncate(path, 0), 0);
    assert_int_equal(md_checkpoint_find(self, dir, NULL, NULL, &ck), MD_ERR_DATA);
    assert_int_equal(md_checkpoint_find(self, "/nonexistent", NULL, NULL, &ck), MD_ERR_NOINPUT);
}

/* A newest checkpoint that cannot be read (here: a link to itself, or to nothing) may be whole: it
 * is not passed over for an older one. */
static void test_unreadable_is_not_skipped(void **st)
{
    (void)st;
    char path[512];
    md_checkpoint *ck;
    assert_ok(write_step(1, 9, 0));
    md_checkpoint_name(path, sizeof path, dir, 2);
    static const char *const target[] = {"step-00000002.h5", "nothing"};
    for (size_t i = 0; i < MD_COUNT(target); i++) {
        assert_int_equal(symlink(target[i], path), 0);
        skips = 0;
        assert_int_equal(md_checkpoint_find(self, dir, on_skip, NULL, &ck), MD_ERR_IO);
        assert_non_null(strstr(md_error_text(), path));
        assert_int_equal(skips, 0);
        assert_int_equal(unlink(path), 0);
    }
    assert_int_equal(newest(), 1);
}

/* LATEST that cannot be replaced (it is a folder) does not fail the write. */
static void test_untidy_is_a_warning(void **st)
{
    (void)st;
    char path[512];
    snprintf(path, sizeof path, "%s/LATEST", dir);
    assert_int_equal(mkdir(path, 0777), 0);
    assert_ok(write_step(1, 1, 0));
    assert_ok(write_step(2, 1, 0));
    assert_int_equal(newest(), 2);
    assert_int_equal(files(".h5"), 1); /* what comes behind LATEST is done all the same */
    assert_int_equal(files(".partial"), 0);
}

/* A file size limit stands for a disk that fills up while it is written to. */
static void test_disk_full(void **st)
{
    (void)st;
    struct rlimit old, low;
    assert_ok(write_step(1, 2, 0));
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    signal(SIGXFSZ, SIG_IGN);
    for (rlim_t limit = 0; limit < 600000; limit += 50000) {
        low = (struct rlimit){limit, old.rlim_max};
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
        md_status got = write_step(2, 2, 0);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
        if (got != MD_ERR_IO && got != MD_ERR_CREATE)
            fail_msg("limit %ld: %s", (long)limit, md_status_name(got));
        assert_int_equal(files(".partial"), 0);
        assert_int_equal(newest(), 1);
    }
    assert_ok(write_step(2, 2, 0));
    assert_int_equal(newest(), 2);
}

/* A disk of 1 MiB, where the system lets us have one: it holds one checkpoint and not two. */
static void test_small_disk(void **st)
{
    (void)st;
    if (mount("tmpfs", dir, "tmpfs", 0, "size=1m") != 0)
        skip();
    md_status first = write_step(1, 2, 0), second = write_step(2, 2, 0);
    int64_t left = newest();
    int partials = files(".partial");
    assert_int_equal(umount(dir), 0);
    assert_int_equal(first, MD_OK);
    assert_int_equal(second, MD_ERR_IO);
    assert_non_null(strstr(md_error_text(), "no room for a checkpoint of 1 MiB"));
    assert_int_equal(left, 1);
    assert_int_equal(partials, 0);
}

/* This program again, as a child that writes steps 7 and 8 with a fault; returns its wait status.
 */
static int run_child(const char *fault)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        setenv("MD_FAULT", fault, 1);
        execl("/proc/self/exe", "test_checkpoint_damage", "write", dir, (char *)NULL);
        _exit(127);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return status;
}

/* Killed at each site of a write: the older checkpoint is there, nothing half looks whole, and the
 * next write takes away what was left. */
static void test_crash_points(void **st)
{
    (void)st;
    static const struct {
        const char *site;
        int64_t newest;
    } point[] = {{"ckpt.space", 7},  {"ckpt.create", 7}, {"ckpt.write", 7},  {"ckpt.verify", 7},
                 {"ckpt.fsync", 7},  {"ckpt.seal", 7},   {"ckpt.rename", 7}, {"publish.sync", 7},
                 {"ckpt.latest", 8}, {"ckpt.prune", 8}};
    for (size_t i = 0; i < MD_COUNT(point); i++) {
        char fault[64];
        empty_dir();
        int pass = strcmp(point[i].site, "ckpt.prune") == 0     ? 1
                   : strcmp(point[i].site, "publish.sync") == 0 ? 3 /* two a write: LATEST too */
                                                                : 2;
        snprintf(fault, sizeof fault, "%s#%d:kill", point[i].site, pass);
        int status = run_child(fault);
        if (!WIFSIGNALED(status))
            fail_msg("%s was not reached", fault);
        assert_int_equal(newest(), point[i].newest);
        assert_int_equal(skips, 0);
        assert_ok(write_step(9, 1, 0));
        assert_int_equal(newest(), 9);
        assert_int_equal(files(".h5"), 1);
    }
    empty_dir();
    assert_int_equal(run_child("no.such.site"), 0);
    assert_int_equal(newest(), 8);
}

/* What run_child starts. */
static int child(const char *where)
{
    snprintf(dir, sizeof dir, "%s", where);
    if (md_comm_self(&self) != MD_OK || write_step(7, 1, 0) != MD_OK)
        return 1;
    return write_step(8, 1, 0) != MD_OK;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "write") == 0)
        return child(argv[2]);
    if (!make_dir() || md_comm_self(&self) != MD_OK)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_every_flip_is_found, setup),
        cmocka_unit_test_setup(test_every_cut_is_found, setup),
        cmocka_unit_test_setup(test_fallback, setup),
        cmocka_unit_test_setup(test_unreadable_is_not_skipped, setup),
        cmocka_unit_test_setup(test_untidy_is_a_warning, setup),
        cmocka_unit_test_setup(test_disk_full, setup),
        cmocka_unit_test_setup(test_small_disk, setup),
        cmocka_unit_test_setup(test_crash_points, setup),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    empty_dir();
    rmdir(dir);
    md_comm_free(self);
    return failed;
}
