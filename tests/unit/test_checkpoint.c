/* The promises of the checkpoint file on one rank: round trip, every damage found, every crash
 * survived, full disk, retention. Layouts over ranks are in tests/par. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "io/checkpoint.h"

static char dir[256];
static md_comm *self;

#define assert_ok(expr)                                                          \
    do {                                                                         \
        md_status ok_ = (expr);                                                  \
        if (ok_ != MD_OK)                                                        \
            fail_msg("%s: %s: %s", #expr, md_status_name(ok_), md_error_text()); \
    } while (0)

/* ---- a small state: 2 x 300 kB and some small arrays ---- */

enum { BIG = 76801 };
typedef struct state {
    float w[257 * 3], big[BIG], m[BIG];
    int64_t counter;
    uint8_t mask[5];
} state;

static void fill(state *s, int64_t step)
{
    for (int i = 0; i < 257 * 3; i++)
        s->w[i] = (float)(i + step);
    for (int i = 0; i < BIG; i++) {
        s->big[i] = (float)((i * 7 + step) % 1000) * 0.25f;
        s->m[i] = (float)(step - i);
    }
    s->counter = step;
    memcpy(s->mask, "\1\2\3\4\5", 5);
}

static int items_of(state *s, md_state_item it[5])
{
    const md_tensor t[] = {MD_TENSOR(s->w, MD_F32, 257, 3), MD_TENSOR(s->big, MD_F32, BIG),
                           MD_TENSOR(s->m, MD_F32, BIG), MD_TENSOR(&s->counter, MD_I64, 1),
                           MD_TENSOR(s->mask, MD_U8, 5)};
    static const char *const name[] = {"param/w", "param/blocks.0.big", "m/blocks.0.big", "counter",
                                       "mask"};
    for (int i = 0; i < 5; i++)
        it[i] = md_state_item_make(name[i], &t[i]);
    return 5;
}

static md_status write_step(int64_t step, int keep, int64_t keep_every)
{
    static state s;
    md_state_item it[5];
    fill(&s, step);
    md_fact fact[] = {{"dataset_hash", "0011223344556677"}, {"version", MD_VERSION "+"}};
    return md_checkpoint_write(&(md_checkpoint_args){.comm = self,
                                                     .dir = dir,
                                                     .step = step,
                                                     .item = it,
                                                     .items = items_of(&s, it),
                                                     .config = "model = \"tiny\";\n",
                                                     .fact = fact,
                                                     .facts = 1,
                                                     .keep = keep,
                                                     .keep_every = keep_every});
}

/* Reads a checkpoint and compares it with what step `step` wrote. */
static void check_content(md_checkpoint *ck, int64_t step)
{
    static state got, want;
    md_state_item it[5];
    memset(&got, 0, sizeof got);
    fill(&want, step);
    assert_ok(md_checkpoint_read(ck, it, items_of(&got, it)));
    assert_memory_equal(got.w, want.w, sizeof want.w);
    assert_memory_equal(got.big, want.big, sizeof want.big);
    assert_memory_equal(got.m, want.m, sizeof want.m);
    assert_int_equal(got.counter, want.counter);
    assert_memory_equal(got.mask, want.mask, sizeof want.mask);
}

static char skipped[4][512];
static int skips;
static void on_skip(void *arg, const char *path, const char *reason)
{
    (void)arg, (void)path;
    snprintf(skipped[skips++ % 4], sizeof skipped[0], "%s", reason);
}

static int64_t newest(void)
{
    md_checkpoint *ck;
    skips = 0;
    if (md_checkpoint_find(self, dir, on_skip, NULL, &ck) != MD_OK)
        return -1;
    int64_t step = md_checkpoint_step(ck);
    check_content(ck, step);
    md_checkpoint_close(ck);
    return step;
}

static void empty_dir(void)
{
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        char path[600];
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        if (e->d_name[0] != '.')
            assert_int_equal(remove(path), 0);
    }
    closedir(d);
}

static int files(const char *ending)
{
    int n = 0;
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        size_t a = strlen(e->d_name), b = strlen(ending);
        n += a >= b && strcmp(e->d_name + a - b, ending) == 0;
    }
    closedir(d);
    return n;
}

static int setup(void **st)
{
    (void)st;
    empty_dir();
    return 0;
}

/* ---- tests ---- */

static void test_round_trip(void **st)
{
    (void)st;
    md_checkpoint *ck;
    int n;
    assert_int_equal(md_checkpoint_find(self, dir, NULL, NULL, &ck), MD_ERR_NOINPUT);
    size_t before = md_alloc_now();
    assert_ok(write_step(12, 2, 0));
    assert_int_equal(newest(), 12);
    char path[512];
    md_checkpoint_name(path, sizeof path, dir, 12);
    assert_ok(md_checkpoint_find(self, path, NULL, NULL, &ck));
    assert_string_equal(md_checkpoint_path(ck), path);
    assert_string_equal(md_checkpoint_config(ck), "model = \"tiny\";\n");
    assert_string_equal(md_checkpoint_fact(ck, "dataset_hash"), "0011223344556677");
    const md_state_entry *e = md_checkpoint_entries(ck, &n);
    assert_int_equal(n, 5);
    assert_string_equal(e[0].name, "param/w");
    assert_int_equal(e[0].global[1], 3);
    struct stat info;
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(md_checkpoint_bytes(ck), info.st_size);
    md_checkpoint_close(ck);
    assert_int_equal(md_alloc_now(), before);
}

static void test_same_state_same_bytes(void **st)
{
    (void)st;
    static char a[1 << 20], b[1 << 20];
    char path[512];
    size_t n[2];
    md_checkpoint_name(path, sizeof path, dir, 5);
    for (int k = 0; k < 2; k++) {
        assert_ok(write_step(5, 1, 0));
        FILE *f = fopen(path, "rb");
        n[k] = fread(k ? b : a, 1, sizeof a, f);
        fclose(f);
    }
    assert_true(n[0] > 600000 && n[0] < sizeof a);
    assert_int_equal(n[0], n[1]);
    assert_memory_equal(a, b, n[0]);
}

static void test_wrong_item(void **st)
{
    (void)st;
    static float x[BIG];
    static const struct {
        const char *name;
        md_dtype dtype;
        int64_t n;
        const char *text;
    } bad[] = {{"param/none", MD_F32, 4, "has no param/none"},
               {"param/blocks.0.big", MD_F32, BIG - 1, "expected [76800] f32"},
               {"param/blocks.0.big", MD_I32, BIG, "expected [76801] i32"}};
    md_checkpoint *ck;
    assert_ok(write_step(1, 1, 0));
    assert_ok(md_checkpoint_find(self, dir, NULL, NULL, &ck));
    for (size_t i = 0; i < MD_COUNT(bad); i++) {
        md_tensor t = MD_TENSOR(x, bad[i].dtype, bad[i].n);
        md_state_item it = md_state_item_make(bad[i].name, &t);
        assert_int_equal(md_checkpoint_read(ck, &it, 1), MD_ERR_DATA);
        if (!strcasestr(md_error_text(), bad[i].text))
            fail_msg("\"%s\" lacks \"%s\"", md_error_text(), bad[i].text);
    }
    md_checkpoint_close(ck);
}

static void test_retention(void **st)
{
    (void)st;
    int64_t *steps;
    int n;
    for (int64_t s = 10; s <= 90; s += 10)
        assert_ok(write_step(s, 2, 40));
    assert_ok(md_checkpoint_list(dir, &steps, &n));
    static const int64_t want[] = {90, 80, 40};
    assert_int_equal(n, 3);
    assert_memory_equal(steps, want, sizeof want);
    md_free(steps);
    /* Going back sets the later steps aside, and never deletes what was just written. */
    assert_ok(write_step(50, 1, 0));
    assert_int_equal(newest(), 50);
    assert_int_equal(files(".h5"), 1);
    assert_int_equal(files("80.h5.abandoned"), 0); /* of 80 and 90 the newest `keep` stay */
    assert_int_equal(files("90.h5.abandoned"), 1);
    char path[512], text[64] = "";
    snprintf(path, sizeof path, "%s/LATEST", dir);
    FILE *f = fopen(path, "r");
    assert_non_null(fgets(text, sizeof text, f));
    fclose(f);
    assert_string_equal(text, "step-00000050.h5\n");
}

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

static void test_not_finite(void **st)
{
    (void)st;
    static float x[300000];
    static const float poison[] = {0.0f / 0.0f, 1.0f / 0.0f, -1.0f / 0.0f};
    static const int place[] = {0, 299999, 262144};
    double d[3] = {1, 2, 3};
    md_state_item it[2] = {{"param/x", MD_F32, 1, {300000}, {0}, {300000}, x},
                           {"d", MD_F64, 1, {3}, {0}, {3}, d}};
    md_checkpoint_args a = {.comm = self, .dir = dir, .step = 2, .item = it, .items = 2, .keep = 1};
    assert_ok(write_step(1, 1, 0));
    for (int i = 0; i < 3; i++) {
        x[place[i]] = poison[i];
        assert_int_equal(md_checkpoint_write(&a), MD_ERR_NUMERICS);
        x[place[i]] = 3e38f;
    }
    d[2] = -(double)poison[1];
    assert_int_equal(md_checkpoint_write(&a), MD_ERR_NUMERICS);
    assert_int_equal(newest(), 1);
    assert_int_equal(files(".partial"), 0);
    d[2] = 1e308;
    assert_ok(md_checkpoint_write(&a));
}

static void test_cannot_create(void **st)
{
    (void)st;
    static state s;
    md_state_item it[5];
    fill(&s, 1);
    md_checkpoint_args a = {.comm = self,
                            .dir = "/nonexistent/dir",
                            .step = 1,
                            .item = it,
                            .items = items_of(&s, it),
                            .keep = 1};
    assert_int_equal(md_checkpoint_write(&a), MD_ERR_CREATE);
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
        execl("/proc/self/exe", "test_checkpoint", "write", dir, (char *)NULL);
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
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/md-ckpt-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(dir) || md_comm_self(&self) != MD_OK)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_round_trip, setup),
        cmocka_unit_test_setup(test_same_state_same_bytes, setup),
        cmocka_unit_test_setup(test_wrong_item, setup),
        cmocka_unit_test_setup(test_retention, setup),
        cmocka_unit_test_setup(test_every_flip_is_found, setup),
        cmocka_unit_test_setup(test_every_cut_is_found, setup),
        cmocka_unit_test_setup(test_fallback, setup),
        cmocka_unit_test_setup(test_unreadable_is_not_skipped, setup),
        cmocka_unit_test_setup(test_untidy_is_a_warning, setup),
        cmocka_unit_test_setup(test_not_finite, setup),
        cmocka_unit_test_setup(test_cannot_create, setup),
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
