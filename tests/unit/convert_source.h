/* Sources made on the spot for the converter's tests: a scratch folder, golden pictures in it, and
 * checks of what came out. */
#ifndef CONVERT_SOURCE_H
#define CONVERT_SOURCE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/convert.h"
#include "io/dataset.h"
#include "src/log.h"
#include "tests/golden/image_golden.h"

#define GOLDEN ((int)MD_COUNT(golden_coded))

static char root[64], out[128], listing[160];
static md_comm *self;

/* --- a clean folder for every test ---------------------------------------------------------- */

static inline int remove_one(const char *path, const struct stat *s, int type, struct FTW *f)
{
    (void)s, (void)type, (void)f;
    return remove(path);
}

static inline int begin(void **state)
{
    (void)state;
    snprintf(root, sizeof root, "/tmp/md_convert_XXXXXX");
    if (!mkdtemp(root))
        return -1;
    snprintf(out, sizeof out, "%s/out.h5", root);
    snprintf(listing, sizeof listing, "%s/out.h5.rejects.txt", root);
    return md_comm_self(&self);
}

static inline int end(void **state)
{
    (void)state;
    md_comm_free(self);
    return nftw(root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* root/name, its folders made. */
static inline const char *at(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", root, name);
    for (char *p = path + strlen(root) + 1; (p = strchr(p, '/')); *p++ = '/') {
        *p = 0;
        mkdir(path, 0777);
    }
    return path;
}

static inline void put_file(const char *name, const void *bytes, size_t n)
{
    FILE *f = fopen(at(name), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
}

static inline void put_golden(const char *name, int i)
{
    put_file(name, golden_coded[i].bytes, golden_coded[i].n);
}

static inline md_status convert_with(md_convert_args a, const char *source, md_convert_summary *sum)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", root, source);
    md_convert_source s = {path, "train"};
    a.out = out;
    a.sources = &s;
    a.n_sources = 1;
    return md_convert(&a, self, sum);
}

static inline md_convert_summary convert_ok(const char *source)
{
    md_convert_summary sum;
    if (convert_with((md_convert_args){.keep_order = true, .replace = true}, source, &sum) != MD_OK)
        fail_msg("%s: %s", source, md_error_text());
    return sum;
}

static inline md_dataset *open_split(const char *split)
{
    md_dataset *d;
    if (md_dataset_open(out, split, NULL, &d) != MD_OK)
        fail_msg("%s", md_error_text());
    return d;
}

static inline bool exists(const char *name)
{
    return access(at(name), F_OK) == 0;
}

/* Image i has this name, class ("" = none) and golden picture. */
static inline void check_image(const md_dataset *d, int64_t i, const char *name, const char *class,
                               int golden)
{
    char buf[512];
    uint8_t bytes[16384];
    size_t n;
    int w, h;
    const struct golden_coded *g = &golden_coded[golden];
    assert_string_equal(md_dataset_name(d, i, buf, sizeof buf), name);
    int32_t label = md_dataset_label(d, i);
    assert_string_equal(label < 0 ? "" : md_dataset_class_name(d, label), class);
    assert_int_equal(md_dataset_read(d, i, bytes, sizeof bytes, &n), MD_OK);
    assert_int_equal(n, g->n);
    assert_memory_equal(bytes, g->bytes, n);
    md_dataset_size(d, i, &w, &h);
    assert_true(w == g->w && h == g->h && (int)md_dataset_kind(d, i) == g->kind);
}

static inline void check_refused(const char *source, md_status want, const char *words)
{
    md_convert_summary sum;
    md_status st = convert_with((md_convert_args){0}, source, &sum);
    if (st != want || !strstr(md_error_text(), words))
        fail_msg("%s: %s '%s', expected %s '%s'", source, md_status_name(st), md_error_text(),
                 md_status_name(want), words);
    assert_false(exists("out.h5"));
    assert_false(exists("out.h5.partial"));
}

static inline size_t load(const char *path, uint8_t *buf, size_t cap)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t n = fread(buf, 1, cap, f);
    assert_true(n < cap);
    fclose(f);
    return n;
}

/* A test in a scratch folder of its own. */
#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, end)

#endif
