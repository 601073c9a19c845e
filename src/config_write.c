/* config_write: a md_config back into text: the resolved config, the reference of all keys, the
 * difference from the defaults, the help of a key. All walk the table. */
#include "src/config_table.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define VALUE_SIZE (4 * MD_CONFIG_STR + 8)
#define COMMENT_AT 40 /* column of the origins */

/* Shortest text that reads back to the same double, and reads as a real. */
static void real_text(double v, char *buf, size_t size)
{
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(buf, size, "%.*g", digits, v);
        if (strtod(buf, NULL) == v)
            break;
    }
    if (!strpbrk(buf, ".e"))
        snprintf(buf + strlen(buf), size - strlen(buf), ".0");
}

/* In quotes, escaped as libconfig reads it. */
static void string_text(const char *s, char *buf, size_t size)
{
    size_t n = 0;
    buf[n++] = '"';
    for (; *s && n + 6 < size; s++) {
        unsigned char ch = (unsigned char)*s;
        const char *form = ch == '"' || ch == '\\'   ? "\\%c"
                           : ch < 0x20 || ch == 0x7f ? "\\x%02X"
                                                     : "%c";
        n += (size_t)snprintf(buf + n, size - n, form, ch);
    }
    snprintf(buf + n, size - n, "\"");
}

/* The value of a key in config file syntax; buf holds VALUE_SIZE. */
static void value_text(const md_config *c, const md_key *k, char *buf)
{
    const void *field = (const char *)c + k->offset;
    char part[3][32];
    switch (k->type) {
    case MD_KEY_BOOL:
        snprintf(buf, VALUE_SIZE, "%s", *(const bool *)field ? "true" : "false");
        break;
    case MD_KEY_INT: {
        int64_t v = *(const int64_t *)field;
        snprintf(buf, VALUE_SIZE, "%" PRId64 "%s", v, v == (int32_t)v ? "" : "L");
        break;
    }
    case MD_KEY_REAL:
        real_text(*(const double *)field, buf, VALUE_SIZE);
        break;
    case MD_KEY_STR:
    case MD_KEY_CHOICE:
        string_text(field, buf, VALUE_SIZE);
        break;
    case MD_KEY_REAL3:
        for (int i = 0; i < 3; i++)
            real_text(((const double *)field)[i], part[i], sizeof part[i]);
        snprintf(buf, VALUE_SIZE, "[%s, %s, %s]", part[0], part[1], part[2]);
        break;
    }
}

/* ---- nested groups ---- */

/* Length of the group part of a name, with its dots: 13 of "method.mask.kind" is "method.mask.". */
static size_t group_length(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot ? (size_t)(dot - name) + 1 : 0;
}

static int count_dots(const char *s, size_t n)
{
    int dots = 0;
    for (size_t i = 0; i < n; i++)
        dots += s[i] == '.';
    return dots;
}

static void indent(FILE *f, int depth)
{
    fprintf(f, "%*s", 4 * depth, "");
}

/* Closes the groups of `from` that `to` is not in and opens those that are new; "" is the top.
 * Returns the depth of `to`. */
static int change_group(FILE *f, const char *from, const char *to)
{
    size_t n_from = group_length(from), n_to = group_length(to), same = 0;
    for (size_t i = 0; i < n_from && i < n_to && from[i] == to[i]; i++)
        if (from[i] == '.')
            same = i + 1;
    for (int d = count_dots(from, n_from); d > count_dots(from, same); d--) {
        indent(f, d - 1);
        fputs("};\n", f);
    }
    int depth = count_dots(to, same);
    while (same < n_to) {
        size_t part = strcspn(to + same, ".");
        indent(f, depth++);
        fprintf(f, "%.*s = {\n", (int)part, to + same);
        same += part + 1;
    }
    return depth;
}

static md_status written(FILE *f)
{
    if (fflush(f) != 0 || ferror(f))
        MD_FAIL(MD_ERR_IO, "writing the config failed");
    return MD_OK;
}

/* Origins are file names: what could end a comment line is shown as '?'. */
static void origin_comment(FILE *f, int used, const char *origin)
{
    fprintf(f, "%*s# ", MD_MAX(1, COMMENT_AT - used), "");
    for (; *origin; origin++)
        fputc(iscntrl((unsigned char)*origin) ? '?' : *origin, f);
}

typedef enum write_mode { WRITE_VALUES, WRITE_ORIGINS, WRITE_HELP } write_mode;

static void write_keys(const md_config *c, FILE *f, write_mode mode)
{
    const char *last = "";
    for (int i = 0; i < md_key_count; i++) {
        const md_key *k = &md_keys[i];
        char value[VALUE_SIZE], text[256];
        int depth = change_group(f, last, k->name);
        if (mode == WRITE_HELP) {
            indent(f, depth);
            fprintf(f, "# %s\n", k->help);
            indent(f, depth);
            fprintf(f, "# %s\n", md_key_describe(k, text, sizeof text));
        }
        value_text(c, k, value);
        indent(f, depth);
        int used = fprintf(f, "%s = %s;", k->name + group_length(k->name), value) + 4 * depth;
        if (mode == WRITE_ORIGINS)
            origin_comment(f, used, ((const md_origin *)c->origins)[i].text);
        fputc('\n', f);
        last = k->name;
    }
    change_group(f, last, "");
}

md_status md_config_write(const md_config *c, FILE *f, bool origins)
{
    write_keys(c, f, origins ? WRITE_ORIGINS : WRITE_VALUES);
    return written(f);
}

md_status md_config_reference(FILE *f)
{
    md_config c;
    MD_TRY(md_config_init(&c));
    fputs("# Every key of md_hpc with its default. Written by `md_hpc config reference`.\n\n", f);
    write_keys(&c, f, WRITE_HELP);
    md_config_free(&c);
    return written(f);
}

md_status md_config_diff(const md_config *c, FILE *f)
{
    md_config defaults;
    MD_TRY(md_config_init(&defaults));
    for (int i = 0; i < md_key_count; i++) {
        const md_key *k = &md_keys[i];
        char now[VALUE_SIZE], def[VALUE_SIZE];
        value_text(c, k, now);
        value_text(&defaults, k, def);
        if (strcmp(now, def) == 0)
            continue;
        int used = fprintf(f, "%s=%s", k->name, now);
        origin_comment(f, used, ((const md_origin *)c->origins)[i].text);
        fprintf(f, ", default %s\n", def);
    }
    md_config_free(&defaults);
    return written(f);
}

/* How a key may change in the course of a run: by the first row that its name starts with. */
md_status md_config_text(const md_config *c, char **text)
{
    size_t size;
    FILE *f = open_memstream(text, &size);
    if (!f)
        MD_FAIL(MD_ERR_MEMORY, "out of memory for the config's text");
    md_status st = md_config_write(c, f, false);
    if (fclose(f) != 0 && st == MD_OK)
        st = md_error_set(MD_ERR_MEMORY, "out of memory for the config's text");
    return st;
}

typedef enum key_change { CHANGE_FREE, CHANGE_TUNED, CHANGE_EXPERIMENT } key_change;

static key_change change_of(const char *key)
{
    static const struct {
        const char *front;
        key_change change;
    } rules[] = {
        {"task", CHANGE_EXPERIMENT},
        {"finetune.from", CHANGE_FREE}, /* read once, before the first step */
        {"finetune.", CHANGE_EXPERIMENT},
        {"model.last_block", CHANGE_FREE},       /* the same numbers by another way */
        {"model.drop_path_mode", CHANGE_FREE},   /* likewise */
        {"method.teacher.arch", CHANGE_FREE},    /* planning only */
        {"method.teacher.weights", CHANGE_FREE}, /* a path: contents are compared by hash */
        {"model.", CHANGE_EXPERIMENT},
        {"method.", CHANGE_EXPERIMENT},
        {"augment.", CHANGE_EXPERIMENT},
        {"image.", CHANGE_EXPERIMENT},
        {"data.split", CHANGE_EXPERIMENT},
        {"run.seed", CHANGE_EXPERIMENT},
        {"train.max_steps", CHANGE_FREE},
        {"train.micro_batch", CHANGE_FREE}, /* layout */
        {"train.recompute", CHANGE_FREE},   /* the same bits from less memory */
        {"train.", CHANGE_TUNED},
        {"optim.", CHANGE_TUNED},
    };
    for (size_t i = 0; i < MD_COUNT(rules); i++)
        if (strncmp(key, rules[i].front, strlen(rules[i].front)) == 0)
            return rules[i].change;
    return CHANGE_FREE;
}

md_status md_config_compare(const md_config *c, const char *text, md_config_differ differ,
                            void *arg)
{
    md_config old;
    MD_TRY(md_config_init(&old));
    md_status st = md_config_read_written(&old, text, "the config in the checkpoint");
    for (int i = 0; i < md_key_count && st == MD_OK; i++) {
        const md_key *k = &md_keys[i];
        const key_change change = change_of(k->name);
        char was[VALUE_SIZE], now[VALUE_SIZE];
        value_text(&old, k, was);
        value_text(c, k, now);
        if (change != CHANGE_FREE && strcmp(was, now) != 0)
            differ(arg, change == CHANGE_EXPERIMENT, k->name, was, now);
    }
    md_config_free(&old);
    return st;
}

bool md_config_help(const char *prefix, FILE *f)
{
    bool found = false;
    for (int i = 0; i < md_key_count; i++) {
        const md_key *k = &md_keys[i];
        char text[256];
        if (strncmp(k->name, prefix, strlen(prefix)) != 0)
            continue;
        found = true;
        fprintf(f, "%s\n    %s\n    %s; default %s\n", k->name, k->help,
                md_key_describe(k, text, sizeof text), *k->def ? k->def : "not set");
    }
    return found;
}
