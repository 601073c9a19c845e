/* config: files and command line into a md_config. libconfig parses; what it would misread is dealt
 * with by config_scan, and every value is checked by config_value. Only this file knows libconfig,
 * and uses nothing newer than its 1.5. */
#include "src/config_table.h"

#include <ctype.h>
#include <errno.h>
#include <libconfig.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_DEPTH 8                 /* of includes */
#define MAX_BYTES ((size_t)1 << 18) /* of one file */
#define NAME_SIZE 256

/* One load: where values go, where errors go. */
typedef struct loader {
    md_config *c;
    md_config_errors e;
} loader;

const char *md_config_library(void)
{
#define TEXT_OF(x) #x
#define VERSION_TEXT(major, minor, revision) \
    "libconfig " TEXT_OF(major) "." TEXT_OF(minor) "." TEXT_OF(revision)
    return VERSION_TEXT(LIBCONFIG_VER_MAJOR, LIBCONFIG_VER_MINOR, LIBCONFIG_VER_REVISION);
#undef VERSION_TEXT
#undef TEXT_OF
}

/* ---- settings ---- */

/* A libconfig scalar, array or list as an untyped value; false for a group. */
static bool setting_value(config_setting_t *s, md_value *v)
{
    switch (config_setting_type(s)) {
    case CONFIG_TYPE_INT:
        *v = (md_value){.kind = MD_VALUE_INT, .i = config_setting_get_int(s)};
        return true;
    case CONFIG_TYPE_INT64:
        *v = (md_value){.kind = MD_VALUE_INT, .i = config_setting_get_int64(s)};
        return true;
    case CONFIG_TYPE_FLOAT:
        *v = (md_value){.kind = MD_VALUE_REAL, .r = config_setting_get_float(s)};
        return true;
    case CONFIG_TYPE_STRING:
        *v = (md_value){.kind = MD_VALUE_STR, .s = config_setting_get_string(s)};
        return true;
    case CONFIG_TYPE_BOOL:
        *v = (md_value){.kind = MD_VALUE_BOOL, .b = config_setting_get_bool(s)};
        return true;
    case CONFIG_TYPE_ARRAY:
    case CONFIG_TYPE_LIST:
        break;
    default:
        return false;
    }
    *v = (md_value){.kind = MD_VALUE_LIST, .n = config_setting_length(s)};
    for (int i = 0; i < v->n && i < 3; i++) {
        md_value one;
        bool number = setting_value(config_setting_get_elem(s, (unsigned)i), &one);
        if (number && one.kind == MD_VALUE_INT)
            v->list[i] = (double)one.i;
        else if (number && one.kind == MD_VALUE_REAL)
            v->list[i] = one.r;
        else
            v->n = i; /* not a list of numbers: too short for any key */
    }
    return true;
}

static void walk(loader *l, config_setting_t *group, const char *path, const char *front)
{
    for (int i = 0; i < config_setting_length(group); i++) {
        config_setting_t *s = config_setting_get_elem(group, (unsigned)i);
        char name[NAME_SIZE], origin[MD_ORIGIN_SIZE], text[NAME_SIZE];
        snprintf(name, sizeof name, "%s%s%s", front, *front ? "." : "", config_setting_name(s));
        snprintf(origin, sizeof origin, "%s:%u", path, (unsigned)config_setting_source_line(s));
        const md_key *k = md_key_find(name);
        md_value v;
        bool scalar = setting_value(s, &v);
        if (k && scalar)
            md_value_store(l->c, k, &v, origin, &l->e);
        else if (k)
            md_errors_add(&l->e, origin, "%s must be %s, not a group", name,
                          md_key_describe(k, text, sizeof text));
        else if (!md_key_is_group(name))
            md_errors_add(&l->e, origin, "unknown %s \"%s\"%s", scalar ? "key" : "group", name,
                          md_config_suggest(name, text, sizeof text));
        else if (scalar)
            md_errors_add(&l->e, origin, "%s is a group of keys: %s = { key = value; };", name,
                          config_setting_name(s));
        else
            walk(l, s, path, name);
    }
}

static void read_settings(loader *l, const char *text, const char *path)
{
    config_t lib;
    config_init(&lib);
    if (config_read_string(&lib, text)) {
        walk(l, config_root_setting(&lib), path, "");
    } else {
        char origin[MD_ORIGIN_SIZE];
        snprintf(origin, sizeof origin, "%s:%d", path, config_error_line(&lib));
        md_errors_add(&l->e, origin, "%s", config_error_text(&lib));
    }
    config_destroy(&lib);
}

md_status md_config_read_written(md_config *c, const char *text, const char *path)
{
    loader l = {.c = c};
    config_t lib;
    config_init(&lib);
    md_status st = MD_OK;
    if (config_read_string(&lib, text))
        walk(&l, config_root_setting(&lib), path, "");
    else
        st = md_error_set(MD_ERR_DATA, "%s:%d: %s", path, config_error_line(&lib),
                          config_error_text(&lib));
    config_destroy(&lib);
    return st;
}

/* ---- files ---- */

/* The file as a C string; errors are added to l->e and leave *text NULL. */
static md_status read_text(loader *l, const char *path, const char *origin, char **text)
{
    *text = NULL;
    FILE *f = fopen(path, "r");
    if (!f) {
        md_errors_add(&l->e, origin, "cannot open %s: %s", path, strerror(errno));
        return MD_OK;
    }
    char *buf = md_alloc(MAX_BYTES + 1, "config");
    if (!buf) {
        fclose(f);
        return MD_ERR_MEMORY;
    }
    errno = 0;
    size_t n = fread(buf, 1, MAX_BYTES, f);
    const char *bad = ferror(f)          ? strerror(errno)
                      : n == MAX_BYTES   ? "larger than 256 KiB: not a config file"
                      : strlen(buf) != n ? "holds a zero byte: not a config file"
                                         : NULL;
    fclose(f);
    if (bad) {
        md_errors_add(&l->e, path, "%s", bad);
        md_free(buf);
        return MD_OK;
    }
    *text = buf;
    return MD_OK;
}

static bool is_file(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && !S_ISDIR(st.st_mode);
}

/* The file an include names: beside the including file, else as md_config_find. */
static md_status include_path(const char *from, const char *name, char *path, size_t size)
{
    const char *slash = strrchr(from, '/');
    int dir = slash && *name != '/' ? (int)(slash - from) + 1 : 0;
    if ((size_t)snprintf(path, size, "%.*s%s", dir, from, name) < size && is_file(path))
        return MD_OK;
    return md_config_find(name, path, size);
}

static md_status read_file(loader *l, const char *path, const char *origin, int depth)
{
    char *text;
    md_config_scan scan;
    if (depth > MAX_DEPTH) {
        md_errors_add(&l->e, origin, "includes nested deeper than %d", MAX_DEPTH);
        return MD_OK;
    }
    MD_TRY(read_text(l, path, origin, &text));
    if (!text)
        return MD_OK;
    int errors = l->e.count;
    md_status st = md_config_scan_text(text, path, &scan, &l->e);
    bool readable = st == MD_OK && errors == l->e.count;
    for (int i = 0; st == MD_OK && i < scan.n_includes; i++) {
        char name[MD_CONFIG_STR], file[MD_CONFIG_STR], at[MD_ORIGIN_SIZE];
        snprintf(name, sizeof name, "%.*s", scan.include[i].size, scan.include[i].name);
        snprintf(at, sizeof at, "%s:%d", path, scan.include[i].line);
        if (include_path(path, name, file, sizeof file) == MD_OK)
            st = read_file(l, file, at, depth + 1);
        else
            md_errors_add(&l->e, at, "%s", md_error_text());
    }
    if (readable && st == MD_OK)
        read_settings(l, scan.text, path);
    md_free(scan.text);
    md_free(text);
    return st;
}

/* ---- command line ---- */

/* "key=value" or "key = value". */
static void read_override(loader *l, const char *text)
{
    static const char origin[] = "command line";
    char key[NAME_SIZE], value[MD_CONFIG_STR + 1], advice[NAME_SIZE];
    const char *equals = strchr(text, '=');
    if (!equals) {
        md_errors_add(&l->e, origin, "\"%s\" is no key=value", text);
        return;
    }
    const char *v = equals + 1;
    size_t n = (size_t)(equals - text);
    while (n && isspace((unsigned char)text[n - 1]))
        n--;
    v += strspn(v, " \t");
    snprintf(key, sizeof key, "%.*s", (int)n, text);
    snprintf(value, sizeof value, "%s", v);
    for (n = strlen(value); n && isspace((unsigned char)value[n - 1]); n--)
        value[n - 1] = 0;
    bool quoted = n >= 2 && value[0] == '"' && value[n - 1] == '"';
    if (quoted)
        value[n - 1] = 0;
    const md_key *k = md_key_find(key);
    if (k)
        md_value_store_text(l->c, k, value + quoted, origin, &l->e);
    else
        md_errors_add(&l->e, origin, "unknown key \"%s\"%s", key,
                      md_config_suggest(key, advice, sizeof advice));
}

/* ---- public ---- */

md_status md_config_load(md_config *c, const char *path, int n_overrides, char *const *overrides)
{
    loader l = {.c = c};
    if (path) {
        snprintf(c->source, sizeof c->source, "%s", path);
        MD_TRY(read_file(&l, path, path, 0));
    }
    for (int i = 0; i < n_overrides; i++)
        read_override(&l, overrides[i]);
    MD_TRY(md_errors_finish(&l.e));
    return md_config_check(c);
}

md_status md_config_find(const char *name, char *path, size_t size)
{
    static const struct {
        bool above; /* from the folder above the program's */
        const char *folder;
    } places[] = {{false, "config"}, {true, "config"}, {true, "share/md_hpc/config"}};
    char exe[MD_CONFIG_STR], tried[3 * MD_CONFIG_STR] = "";
    if ((size_t)snprintf(path, size, "%s", name) < size && is_file(path))
        return MD_OK;
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    exe[MD_MAX(n, 0)] = 0;
    for (size_t i = 0; *exe == '/' && *name != '/' && i < MD_COUNT(places); i++) {
        const char *end = strrchr(exe, '/');
        if (places[i].above)
            end = end > exe ? memrchr(exe, '/', (size_t)(end - exe)) : exe;
        int base = (int)(end - exe);
        if ((size_t)snprintf(path, size, "%.*s/%s/%s", base, exe, places[i].folder, name) < size &&
            is_file(path))
            return MD_OK;
        size_t used = strlen(tried);
        snprintf(tried + used, sizeof tried - used, ", %.*s/%s", base, exe, places[i].folder);
    }
    MD_FAIL(MD_ERR_NOINPUT, "no config file %s (looked in the working directory%s)", name, tried);
}

int md_config_choice(const char *key, const char *value)
{
    for (int i = 0; i < md_key_count; i++)
        if (strcmp(md_keys[i].name, key) == 0) {
            int k = md_choice_index(md_keys[i].unit, value);
            MD_ASSERT(k >= 0, "%s = %s", key, value);
            return k;
        }
    MD_ASSERT(false, "no key %s", key);
    return -1;
}
