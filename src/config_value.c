/* config_value: the table of keys, and the one checker that every value passes through, whether it
 * comes from a file, the command line or the table's own default column. */
#include "src/config_table.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

const md_key md_keys[] = {
#define X(field, key, type, def, min, max, unit, help) \
    {key,                                              \
     MD_KEY_##type,                                    \
     offsetof(md_config, field),                       \
     sizeof(((md_config *)0)->field),                  \
     def,                                              \
     min,                                              \
     max,                                              \
     unit,                                             \
     help},
#include "src/config_keys.h"
#undef X
};
const int md_key_count = (int)MD_COUNT(md_keys);

/* ---- errors ---- */

void md_errors_add(md_config_errors *e, const char *origin, const char *fmt, ...)
{
    if (e->count++ >= MD_MAX_ERRORS)
        return;
    char line[MD_CONFIG_STR + 512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    int n = snprintf(e->text + e->used, sizeof e->text - e->used, "%s%s: %s", e->used ? "\n" : "",
                     origin, line);
    e->used = MD_MIN(e->used + (size_t)n, sizeof e->text - 1);
}

md_status md_errors_finish(md_config_errors *e)
{
    if (!e->count)
        return MD_OK;
    if (e->count > MD_MAX_ERRORS)
        MD_FAIL(MD_ERR_CONFIG, "%s\nand %d more errors", e->text, e->count - MD_MAX_ERRORS);
    MD_FAIL(MD_ERR_CONFIG, "%s", e->text);
}

/* ---- names ---- */

const md_key *md_key_find(const char *name)
{
    for (int i = 0; i < md_key_count; i++)
        if (strcmp(md_keys[i].name, name) == 0)
            return &md_keys[i];
    return NULL;
}

bool md_key_is_group(const char *name)
{
    size_t n = strlen(name);
    for (int i = 0; i < md_key_count; i++)
        if (strncmp(md_keys[i].name, name, n) == 0 && md_keys[i].name[n] == '.')
            return true;
    return false;
}

/* Insertions, deletions, replacements and swaps of neighbours that turn a into b (optimal string
 * alignment). Longer words than the table can hold are simply far. */
#define WORD 64
static int distance(const char *a, const char *b)
{
    int n = (int)strlen(a), m = (int)strlen(b), row[3][WORD + 1];
    if (n > WORD || m > WORD)
        return WORD;
    for (int j = 0; j <= m; j++)
        row[0][j] = j;
    for (int i = 1; i <= n; i++) {
        int *d = row[i % 3], *d1 = row[(i + 2) % 3], *d2 = row[(i + 1) % 3];
        d[0] = i;
        for (int j = 1; j <= m; j++) {
            d[j] = MD_MIN(d1[j - 1] + (a[i - 1] != b[j - 1]), MD_MIN(d1[j], d[j - 1]) + 1);
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                d[j] = MD_MIN(d[j], d2[j - 2] + 1);
        }
    }
    return row[n % 3][m];
}

/* Two words are near when at most a third of the shorter one has to change. */
static int near_limit(const char *word)
{
    return MD_MAX(1, (int)strlen(word) / 3);
}

const char *md_text_nearest(const char *word, const char *const *names, int n)
{
    const char *best = NULL;
    int least = near_limit(word) + 1;
    for (int i = 0; i < n; i++) {
        int d = distance(word, names[i]);
        if (d < least) {
            least = d;
            best = names[i];
        }
    }
    return best;
}

static const char *last_part(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot ? dot + 1 : name;
}

const char *md_config_suggest(const char *name, char *buf, size_t size)
{
    char best[WORD + 1] = "";
    int least = near_limit(name) + 1;
    for (int i = 0; i < md_key_count; i++) {
        /* The key itself and each of its groups; a key in the wrong group is one change away. */
        char part[WORD + 1];
        snprintf(part, sizeof part, "%s", md_keys[i].name);
        int d = strcmp(last_part(part), last_part(name)) == 0 ? 1 : distance(name, part);
        for (;;) {
            if (d < least) {
                least = d;
                memcpy(best, part, sizeof best);
            }
            char *dot = strrchr(part, '.');
            if (!dot)
                break;
            *dot = 0;
            d = distance(name, part);
        }
    }
    snprintf(buf, size, *best ? "; did you mean \"%s\"?" : "%s", best);
    return buf;
}

/* ---- descriptions ---- */

const char *md_key_describe(const md_key *k, char *buf, size_t size)
{
    static const char *const words[] = {
#define WORDS(type, text) text,
        MD_KEY_TYPES(WORDS)
#undef WORDS
    };
    bool bounded = k->type == MD_KEY_INT || k->type == MD_KEY_REAL || k->type == MD_KEY_REAL3;
    const char *unit = k->unit;
    if (k->type == MD_KEY_CHOICE)
        snprintf(buf, size, "%s: %s", words[k->type], unit);
    else if (bounded)
        snprintf(buf, size, "%s from %.16g to %.16g%s%s%s", words[k->type], k->min, k->max,
                 *unit ? " (" : "", unit, *unit ? ")" : "");
    else
        snprintf(buf, size, "%s%s%s%s", words[k->type], *unit ? " (" : "", unit, *unit ? ")" : "");
    return buf;
}

static const char *value_describe(const md_value *v, char *buf, size_t size)
{
    switch (v->kind) {
    case MD_VALUE_BOOL:
        snprintf(buf, size, "%s", v->b ? "true" : "false");
        break;
    case MD_VALUE_INT:
        snprintf(buf, size, "%" PRId64, v->i);
        break;
    case MD_VALUE_REAL:
        snprintf(buf, size, "%.16g%s", v->r, v->r == floor(v->r) && fabs(v->r) < 1e15 ? ".0" : "");
        break;
    case MD_VALUE_STR:
        snprintf(buf, size, "\"%.100s%s\"", v->s, strlen(v->s) > 100 ? "..." : "");
        break;
    case MD_VALUE_LIST:
        snprintf(buf, size, "a list of %d", v->n);
        break;
    }
    return buf;
}

/* ---- checking and storing ---- */

int md_choice_index(const char *list, const char *value)
{
    size_t n = strlen(value);
    for (int i = 0;; i++) {
        size_t item = strcspn(list, ",");
        if (item == n && memcmp(list, value, n) == 0)
            return i;
        if (!list[item])
            return -1;
        list += item + 1;
    }
}

static bool in_range(const md_key *k, double v)
{
    return v >= k->min && v <= k->max; /* false for NaN */
}

/* Each returns false when the value is of another kind than the key or out of its range. */
static bool store_int(const md_key *k, const md_value *v, void *field)
{
    if (v->kind != MD_VALUE_INT || !in_range(k, (double)v->i))
        return false;
    *(int64_t *)field = v->i;
    return true;
}

static bool store_real(const md_key *k, const md_value *v, void *field)
{
    double r = v->kind == MD_VALUE_INT ? (double)v->i : v->r;
    if ((v->kind != MD_VALUE_INT && v->kind != MD_VALUE_REAL) || !in_range(k, r))
        return false;
    *(double *)field = r;
    return true;
}

static bool store_real3(const md_key *k, const md_value *v, void *field)
{
    if (v->kind != MD_VALUE_LIST || v->n != 3)
        return false;
    for (int i = 0; i < 3; i++)
        if (!in_range(k, v->list[i]))
            return false;
    memcpy(field, v->list, sizeof v->list);
    return true;
}

static bool store_str(const md_key *k, const md_value *v, void *field)
{
    if (v->kind != MD_VALUE_STR || strlen(v->s) >= k->size)
        return false;
    if (k->type == MD_KEY_CHOICE && md_choice_index(k->unit, v->s) < 0)
        return false;
    snprintf(field, k->size, "%s", v->s);
    return true;
}

static bool store_bool(const md_key *k, const md_value *v, void *field)
{
    (void)k;
    if (v->kind != MD_VALUE_BOOL)
        return false;
    *(bool *)field = v->b;
    return true;
}

/* Names the nearest choice, and says why a string that looks fine is not. */
static void string_advice(const md_key *k, const md_value *v, char *buf, size_t size)
{
    *buf = 0;
    if (v->kind != MD_VALUE_STR)
        return;
    if (k->type == MD_KEY_STR)
        snprintf(buf, size, "; longer than %zu bytes", k->size - 1);
    if (k->type != MD_KEY_CHOICE)
        return;
    char list[256], *save = NULL;
    const char *names[32];
    int n = 0;
    snprintf(list, sizeof list, "%s", k->unit);
    for (char *t = strtok_r(list, ",", &save); t && n < 32; t = strtok_r(NULL, ",", &save))
        names[n++] = t;
    const char *near = md_text_nearest(v->s, names, n);
    if (near)
        snprintf(buf, size, "; did you mean \"%s\"?", near);
}

void md_value_store(md_config *c, const md_key *k, const md_value *v, const char *origin,
                    md_config_errors *e)
{
    static bool (*const store[])(const md_key *, const md_value *, void *) = {
        [MD_KEY_BOOL] = store_bool, [MD_KEY_INT] = store_int,    [MD_KEY_REAL] = store_real,
        [MD_KEY_STR] = store_str,   [MD_KEY_CHOICE] = store_str, [MD_KEY_REAL3] = store_real3,
    };
    if (store[k->type](k, v, (char *)c + k->offset)) {
        snprintf(((md_origin *)c->origins)[k - md_keys].text, MD_ORIGIN_SIZE, "%s", origin);
        return;
    }
    char wanted[256], got[128], advice[128];
    string_advice(k, v, advice, sizeof advice);
    md_errors_add(e, origin, "%s must be %s, not %s%s", k->name,
                  md_key_describe(k, wanted, sizeof wanted), value_describe(v, got, sizeof got),
                  advice);
}

/* ---- text ---- */

static size_t digits(const char *s)
{
    return strspn(s, "0123456789");
}

md_number md_number_parse(const char *text, size_t n, md_value *v)
{
    char buf[128];
    if (n >= sizeof buf)
        return MD_NUMBER_BAD;
    memcpy(buf, text, n);
    buf[n] = 0;
    const char *p = buf + (buf[0] == '+' || buf[0] == '-');
    bool hex = p == buf && strncasecmp(p, "0x", 2) == 0;
    size_t whole = hex ? strspn(p + 2, "0123456789abcdefABCDEF") : digits(p), part = 0;
    const char *end = p + (hex ? 2 : 0) + whole;
    errno = 0;
    if (whole && (strcmp(end, "") == 0 || strcmp(end, "L") == 0 || strcmp(end, "LL") == 0)) {
        v->kind = MD_VALUE_INT;
        v->i = strtoll(buf, NULL, hex ? 16 : 10); /* a leading 0 is decimal, as for libconfig */
        return errno ? MD_NUMBER_TOO_BIG : MD_NUMBER_OK;
    }
    if (*end == '.') {
        part = digits(end + 1);
        end += 1 + part;
    }
    if (hex || whole + part == 0)
        return MD_NUMBER_BAD;
    if (*end == 'e' || *end == 'E') {
        end += 1 + (end[1] == '+' || end[1] == '-');
        size_t exponent = digits(end);
        end = exponent ? end + exponent : "missing";
    }
    if (*end)
        return MD_NUMBER_BAD;
    v->kind = MD_VALUE_REAL;
    v->r = strtod(buf, NULL);
    return errno && (v->r == 0 || !isfinite(v->r)) ? MD_NUMBER_TOO_BIG : MD_NUMBER_OK;
}

/* "0.5, 0.5, 0.5" or "[0.5, 0.5, 0.5]" into a list. */
static md_number list_parse(const char *text, md_value *v)
{
    v->kind = MD_VALUE_LIST;
    v->n = 0;
    bool bracket = *text == '[';
    text += bracket;
    for (;;) {
        text += strspn(text, " \t");
        size_t item = strcspn(text, ","), n = item;
        if (bracket && !text[item] && n && text[n - 1] == ']')
            n--;
        while (n && isspace((unsigned char)text[n - 1]))
            n--;
        md_value one;
        md_number st = md_number_parse(text, n, &one);
        if (st != MD_NUMBER_OK)
            return st;
        if (v->n < 3)
            v->list[v->n] = one.kind == MD_VALUE_INT ? (double)one.i : one.r;
        v->n++;
        if (!text[item])
            return MD_NUMBER_OK;
        text += item + 1;
    }
}

void md_value_store_text(md_config *c, const md_key *k, const char *text, const char *origin,
                         md_config_errors *e)
{
    md_value v = {.kind = MD_VALUE_STR, .s = text};
    if (k->type != MD_KEY_STR && k->type != MD_KEY_CHOICE) {
        md_value parsed;
        md_number st = strchr(text, ',') ? list_parse(text, &parsed)
                                         : md_number_parse(text, strlen(text), &parsed);
        bool yes = strcasecmp(text, "true") == 0;
        if (yes || strcasecmp(text, "false") == 0) {
            v.kind = MD_VALUE_BOOL;
            v.b = yes;
        } else if (st == MD_NUMBER_TOO_BIG) {
            md_errors_add(e, origin, "%s: %s is too large or too small a number", k->name, text);
            return;
        } else if (st == MD_NUMBER_OK) {
            v = parsed;
        }
    }
    md_value_store(c, k, &v, origin, e);
}

/* ---- public ---- */

md_status md_config_init(md_config *c)
{
    memset(c, 0, sizeof *c);
    md_origin *origins;
    MD_NEW(origins, md_key_count, "config");
    c->origins = origins;
    md_config_errors e = {0};
    for (int i = 0; i < md_key_count; i++)
        md_value_store_text(c, &md_keys[i], md_keys[i].def, "default", &e);
    MD_ASSERT(e.count == 0, "%s", e.text);
    return MD_OK;
}

void md_config_free(md_config *c)
{
    md_free(c->origins);
    c->origins = NULL;
}

const char *md_config_origin(const md_config *c, const char *key)
{
    const md_key *k = md_key_find(key);
    return k ? ((const md_origin *)c->origins)[k - md_keys].text : NULL;
}
