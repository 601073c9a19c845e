/* What the tests of the configuration share: a scratch directory, one-line loads and verdicts. */
#ifndef MD_CONFIG_LOAD_H
#define MD_CONFIG_LOAD_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "src/config.h"

static char dir[] = "/tmp/md_test_config_XXXXXX";

static const char *in_dir(const char *name)
{
    static char path[4][256];
    static int turn;
    char *p = path[turn++ % 4];
    snprintf(p, sizeof path[0], "%s/%s", dir, name);
    return p;
}

static const char *put(const char *name, const char *text)
{
    const char *path = in_dir(name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    return path;
}

/* Loads text (NULL: no file) and one override (NULL: none) into *c, which the caller frees. */
static md_status load(md_config *c, const char *text, const char *typed)
{
    char *list[] = {(char *)typed};
    assert_int_equal(md_config_init(c), MD_OK);
    return md_config_load(c, text ? put("t.cfg", text) : NULL, typed != NULL, list);
}

/* Expects this load to fail with `part` somewhere in the errors. */
static void refused(const char *text, const char *typed, const char *part)
{
    md_config c;
    md_status st = load(&c, text, typed);
    md_config_free(&c);
    if (st != MD_ERR_CONFIG || !strstr(md_error_text(), part))
        fail_msg("[%s] [%s] -> %s \"%s\", expected \"%s\"", text ? text : "", typed ? typed : "",
                 md_status_name(st), md_error_text(), part);
}

static void accepted(md_config *c, const char *text, const char *typed)
{
    if (load(c, text, typed) != MD_OK)
        fail_msg("[%s] [%s] -> %s", text ? text : "", typed ? typed : "", md_error_text());
}

/* "a.b.c" = value as nested groups. */
static const char *nested(const char *key, const char *value)
{
    static char text[1024];
    size_t n = 0;
    int depth = 0;
    for (const char *p = key;;) {
        size_t part = strcspn(p, ".");
        n += (size_t)snprintf(text + n, sizeof text - n, "%.*s = ", (int)part, p);
        if (!p[part])
            break;
        n += (size_t)snprintf(text + n, sizeof text - n, "{\n");
        depth++;
        p += part + 1;
    }
    n += (size_t)snprintf(text + n, sizeof text - n, "%s;", value);
    while (depth--)
        n += (size_t)snprintf(text + n, sizeof text - n, "};");
    return text;
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

#endif
