/* config_scan: reads a config file's raw text before libconfig sees it. libconfig 1.5 turns
 * 5000000000 into 705032704, 1e400 into infinity, "." into 0 and `1y = 2` into two settings without
 * a word, and resolves @include against the working directory; none of that reaches it from here.
 */
#include "src/config_table.h"

#include <ctype.h>
#include <string.h>

#define MAX_BRACKETS 32

typedef struct scanner {
    const char *p, *path;
    char *out; /* next byte of the text for libconfig */
    int line, brackets;
    bool settings;   /* a setting was seen: includes are over */
    bool want_value; /* the last token was = or : */
    md_config_scan *scan;
    md_config_errors *e;
} scanner;

#define SCAN_ERROR(s, at_line, ...)                                       \
    do {                                                                  \
        char origin_[MD_ORIGIN_SIZE];                                     \
        snprintf(origin_, sizeof origin_, "%s:%d", (s)->path, (at_line)); \
        md_errors_add((s)->e, origin_, __VA_ARGS__);                      \
    } while (0)

/* Copies n bytes and counts their lines. */
static void copy(scanner *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        s->line += *s->p == '\n';
        *s->out++ = *s->p++;
    }
}

/* Leaves n bytes out; line ends stay, so that libconfig counts the same lines. */
static void blank(scanner *s, size_t n)
{
    for (size_t i = 0; i < n; i++, s->p++) {
        s->line += *s->p == '\n';
        *s->out++ = *s->p == '\n' ? '\n' : ' ';
    }
}

static void scan_string(scanner *s)
{
    size_t n = 1;
    while (s->p[n] && s->p[n] != '"')
        n += s->p[n] == '\\' && s->p[n + 1] ? 2 : 1;
    if (!s->p[n])
        SCAN_ERROR(s, s->line, "string without closing quote");
    else
        n++;
    copy(s, n);
}

static void scan_block_comment(scanner *s)
{
    const char *end = strstr(s->p + 2, "*/");
    if (!end)
        SCAN_ERROR(s, s->line, "comment without end");
    blank(s, end ? (size_t)(end + 2 - s->p) : strlen(s->p));
}

/* Length of the number-like word at p: a sign belongs to it at the start and behind an exponent. */
static size_t number_length(const char *p)
{
    size_t n = *p == '+' || *p == '-';
    bool hex = strncasecmp(p, "0x", 2) == 0;
    while (isalnum((unsigned char)p[n]) || p[n] == '.' || p[n] == '_' ||
           (!hex && n && (p[n] == '+' || p[n] == '-') && tolower((unsigned char)p[n - 1]) == 'e'))
        n++;
    return n;
}

static void scan_number(scanner *s)
{
    size_t n = number_length(s->p);
    md_value v;
    md_number st = md_number_parse(s->p, n, &v);
    if (st == MD_NUMBER_BAD)
        SCAN_ERROR(s, s->line, "malformed number %.*s", (int)MD_MIN(n, 100), s->p);
    else if (st == MD_NUMBER_TOO_BIG)
        SCAN_ERROR(s, s->line, "%.*s is too large or too small a number", (int)MD_MIN(n, 100),
                   s->p);
    bool is_long = st == MD_NUMBER_OK && v.kind == MD_VALUE_INT && s->p[n - 1] != 'L';
    copy(s, n);
    if (is_long && (v.i > INT32_MAX || v.i < INT32_MIN))
        *s->out++ = 'L';
}

static void scan_word(scanner *s)
{
    size_t n = strspn(s->p, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-*");
    bool boolean = (n == 4 && strncasecmp(s->p, "true", n) == 0) ||
                   (n == 5 && strncasecmp(s->p, "false", n) == 0);
    if (s->want_value && !boolean)
        SCAN_ERROR(s, s->line,
                   "%.*s is neither a finite number nor true or false; a string needs quotes",
                   (int)MD_MIN(n, 100), s->p);
    s->settings = true;
    copy(s, n);
}

static void scan_include(scanner *s)
{
    static const char word[] = "@include";
    size_t n = strncmp(s->p, word, sizeof word - 1) == 0 ? sizeof word - 1 : 0;
    size_t quote = n + strspn(s->p + n, " \t");
    size_t name = s->p[quote] == '"' ? strcspn(s->p + quote + 1, "\"\n") : 0;
    md_config_scan *scan = s->scan;
    if (!n || !name || s->p[quote + 1 + name] != '"') {
        SCAN_ERROR(s, s->line, "malformed line; includes are written @include \"file.cfg\"");
        blank(s, strcspn(s->p, "\n"));
        return;
    }
    if (s->settings)
        SCAN_ERROR(s, s->line, "@include must stand before the first setting of the file");
    else if (scan->n_includes == MD_MAX_INCLUDES)
        SCAN_ERROR(s, s->line, "more than %d includes in one file", MD_MAX_INCLUDES);
    else {
        scan->include[scan->n_includes].name = s->p + quote + 1;
        scan->include[scan->n_includes].size = (int)name;
        scan->include[scan->n_includes++].line = s->line;
    }
    blank(s, quote + name + 2);
}

/* Handles one token; sets want_value for the next. */
static void scan_token(scanner *s)
{
    unsigned char ch = (unsigned char)*s->p;
    bool value_next = false;
    if (ch == '"')
        scan_string(s);
    else if (isdigit(ch) || ch == '.' || ch == '+' || ch == '-')
        scan_number(s);
    else if (isalpha(ch) || ch == '*' || ch == '_')
        scan_word(s);
    else if (ch == '@')
        scan_include(s);
    else {
        value_next = ch == '=' || ch == ':';
        s->brackets += strchr("({[", ch) ? 1 : strchr(")}]", ch) ? -1 : 0;
        if (s->brackets > MAX_BRACKETS) {
            SCAN_ERROR(s, s->line, "more than %d nested brackets", MAX_BRACKETS);
            blank(s, strlen(s->p));
            return;
        }
        copy(s, 1);
    }
    s->want_value = value_next;
}

md_status md_config_scan_text(const char *text, const char *path, md_config_scan *out,
                              md_config_errors *e)
{
    memset(out, 0, sizeof *out);
    /* Every token grows by at most one byte, and so does no blank. */
    MD_NEW(out->text, 2 * strlen(text) + 1, "config");
    scanner s = {.p = text, .path = path, .out = out->text, .line = 1, .scan = out, .e = e};
    while (*s.p) {
        if (isspace((unsigned char)*s.p))
            copy(&s, 1);
        else if (*s.p == '#' || strncmp(s.p, "//", 2) == 0)
            blank(&s, strcspn(s.p, "\n"));
        else if (strncmp(s.p, "/*", 2) == 0)
            scan_block_comment(&s);
        else
            scan_token(&s);
    }
    *s.out = 0;
    return MD_OK;
}
