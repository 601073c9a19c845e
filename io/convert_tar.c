/* convert_tar: walks the regular files of a tar: POSIX ustar and pax (path, size), GNU long names
 * and base-256 sizes. Every number is bounded before it is used; no name is ever created as a file.
 * Format: POSIX.1-2017, utility pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar
 * Format". */
#include "io/convert_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK    ((int64_t)512)
#define MAX_META ((int64_t)1 << 20) /* longest pax or GNU long name record that is read */

/* Offsets in a header. */
enum {
    NAME = 0,
    NAME_SIZE = 100,
    SIZE = 124,
    SIZE_SIZE = 12,
    SUM = 148,
    SUM_SIZE = 8,
    TYPE = 156,
    MAGIC = 257,
    PREFIX = 345,
    PREFIX_SIZE = 155
};

/* Octal with leading blanks, ended by a blank, NUL or the field's end; GNU's base-256 when the
 * first bit is set. -1 when it is neither, negative or beyond 2^62. */
static int64_t number(const uint8_t *p, int n)
{
    int64_t v = 0;
    int i = 0;
    if (p[0] & 0x80) {
        if (p[0] != 0x80)
            return -1;
        for (i = 1; i < n; i++) {
            if (v >> 54)
                return -1;
            v = v << 8 | p[i];
        }
        return v;
    }
    while (i < n && p[i] == ' ')
        i++;
    for (; i < n && p[i] >= '0' && p[i] <= '7'; i++)
        v = v << 3 | (p[i] - '0');
    return i == n || p[i] == ' ' || p[i] == 0 ? v : -1;
}

bool tar_is_header(const uint8_t *h, size_t n)
{
    if (n < (size_t)BLOCK || h[NAME] == 0)
        return false;
    int64_t sum = 0, want = number(h + SUM, SUM_SIZE);
    for (int i = 0; i < BLOCK; i++)
        sum += i >= SUM && i < SUM + SUM_SIZE ? ' ' : h[i];
    return sum == want && number(h + SIZE, SIZE_SIZE) >= 0;
}

static md_status damaged(const tar_walk *w, int64_t at, const char *what)
{
    MD_FAIL(MD_ERR_DATA, "%s: damaged tar: %s at byte %lld", w->path, what, (long long)at);
}

/* The contents of a pax or long name member, NUL-terminated, in a block of md_alloc. */
static md_status read_meta(const tar_walk *w, int64_t at, int64_t bytes, char **out)
{
    size_t got;
    *out = NULL;
    if (bytes > MAX_META)
        return damaged(w, at, "oversized name record");
    char *text = md_alloc((size_t)bytes + 1, "convert");
    if (!text)
        return MD_ERR_MEMORY;
    md_status st = convert_read(w->reader, w->path, at, text, (size_t)bytes, &got);
    if (st == MD_OK && (int64_t)got < bytes)
        st = damaged(w, at, "archive ends inside a name record");
    if (st == MD_OK)
        *out = text;
    else
        md_free(text);
    return st;
}

/* What earlier members say about the next one. */
typedef struct override {
    char name[sizeof((tar_walk *)0)->name]; /* "" = nothing */
    int64_t size;                           /* -1 = nothing */
} override;

static bool keep_name(override *o, const char *s, size_t n)
{
    if (n == 0 || n >= sizeof o->name || memchr(s, 0, n))
        return false;
    memcpy(o->name, s, n);
    o->name[n] = 0;
    return true;
}

/* Records "LENGTH KEY=VALUE\n"; LENGTH counts all of it. */
static bool parse_pax(char *text, size_t n, override *o)
{
    for (size_t at = 0; at < n;) {
        char *end;
        long length = strtol(text + at, &end, 10);
        size_t head = (size_t)(end - (text + at)) + 1;
        if (length <= 0 || (size_t)length > n - at || *end != ' ' || head >= (size_t)length ||
            text[at + (size_t)length - 1] != '\n')
            return false;
        char *key = end + 1, *stop = text + at + length - 1;
        *stop = 0;
        if (strncmp(key, "path=", 5) == 0 && !keep_name(o, key + 5, (size_t)(stop - key) - 5))
            return false;
        if (strncmp(key, "size=", 5) == 0) {
            o->size = strtoll(key + 5, &end, 10);
            if (end != stop || end == key + 5 || o->size < 0 || o->size >> 62)
                return false;
        }
        if (strncmp(key, "GNU.sparse.", 11) == 0)
            return false;
        at += (size_t)length;
    }
    return true;
}

static md_status apply_meta(const tar_walk *w, char type, int64_t at, int64_t bytes, override *o)
{
    char *text;
    bool ok = true;
    MD_TRY(read_meta(w, at, bytes, &text));
    if (type == 'x')
        ok = parse_pax(text, (size_t)bytes, o);
    else if (type == 'L')
        ok = keep_name(o, text, strlen(text));
    md_free(text);
    return ok ? MD_OK : damaged(w, at, "name record not understood");
}

static void plain_name(const uint8_t *h, char *out, size_t size)
{
    int n = (int)strnlen((const char *)h + NAME, NAME_SIZE);
    int p = memcmp(h + MAGIC, "ustar", 6) == 0 ? (int)strnlen((const char *)h + PREFIX, PREFIX_SIZE)
                                               : 0;
    snprintf(out, size, "%.*s%s%.*s", p, (const char *)h + PREFIX, p ? "/" : "", n,
             (const char *)h + NAME);
}

static bool is_zero(const uint8_t *h)
{
    for (int i = 0; i < BLOCK; i++)
        if (h[i])
            return false;
    return true;
}

/* Reads the header at w->next and what follows it; *end when there is none. */
static md_status read_header(tar_walk *w, uint8_t block[2 * BLOCK], bool *end)
{
    size_t room = 2 * (size_t)BLOCK, got;
    if (w->end >= 0)
        room = (size_t)MD_MIN((int64_t)room, w->end - w->next);
    MD_TRY(convert_read(w->reader, w->path, w->next, block, room, &got));
    *end = got == 0 || (got >= (size_t)BLOCK && is_zero(block));
    if (*end)
        return MD_OK;
    if (!tar_is_header(block, got))
        return damaged(w, w->next,
                       got < (size_t)BLOCK ? "archive ends inside a header" : "bad header");
    w->head_bytes = got - (size_t)BLOCK;
    memcpy(w->head, block + BLOCK, w->head_bytes);
    return MD_OK;
}

/* All blocks of a member are there; a walk over headers alone would not notice. */
static md_status check_contents(const tar_walk *w, bool meta)
{
    uint8_t last;
    size_t got = 1;
    if (w->end >= 0 && w->next > w->end)
        return damaged(w, w->at, "archive ends inside a member");
    /* Records are read in full anyway, and a compressed file is best read forwards. */
    if (w->end < 0 && !meta && w->bytes > (int64_t)w->head_bytes)
        MD_TRY(convert_read(w->reader, w->path, w->next - 1, &last, 1, &got));
    return got == 1 ? MD_OK : damaged(w, w->at, "archive ends inside a member");
}

md_status tar_next(tar_walk *w, bool *more)
{
    override o = {.size = -1};
    for (;;) {
        uint8_t block[2 * BLOCK];
        bool end;
        MD_TRY(read_header(w, block, &end));
        *more = !end;
        if (end)
            return MD_OK;
        char type = (char)block[TYPE];
        bool meta = type == 'x' || type == 'L' || type == 'g' || type == 'K';
        w->bytes = !meta && o.size >= 0 ? o.size : number(block + SIZE, SIZE_SIZE);
        w->at = w->next + BLOCK;
        if (type == 'S')
            return damaged(w, w->next, "sparse member");
        /* Links, folders and devices carry no contents, whatever their size says. */
        if (type >= '1' && type <= '6')
            w->bytes = 0;
        if (w->bytes > INT64_MAX / 2 - w->at)
            return damaged(w, w->next, "impossible size");
        w->next = w->at + (w->bytes + BLOCK - 1) / BLOCK * BLOCK;
        MD_TRY(check_contents(w, meta));
        if (meta) {
            if (type == 'x' || type == 'L')
                MD_TRY(apply_meta(w, type, w->at, w->bytes, &o));
            continue;
        }
        if (type == '0' || type == 0 || type == '7') {
            if (*o.name)
                memcpy(w->name, o.name, sizeof w->name);
            else
                plain_name(block, w->name, sizeof w->name);
            /* Before POSIX a folder was a file whose name ends in a slash. */
            if (w->name[0] && w->name[strlen(w->name) - 1] != '/')
                return MD_OK;
        }
        o = (override){.size = -1};
    }
}
