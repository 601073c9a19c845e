/* config_table: what the files of the config room share: the table of keys made from config_keys.h,
 * untyped values on their way into a md_config, and the list of errors. Not for other rooms. */
#ifndef MD_CONFIG_TABLE_H
#define MD_CONFIG_TABLE_H

#include "src/config.h"

/* X(type, what a value of it is called) */
#define MD_KEY_TYPES(X)      \
    X(BOOL, "true or false") \
    X(INT, "an integer")     \
    X(REAL, "a number")      \
    X(STR, "a string")       \
    X(CHOICE, "one of")      \
    X(REAL3, "three numbers")

typedef enum md_key_type {
#define MD_KEY_TYPE_ENUM(type, text) MD_KEY_##type,
    MD_KEY_TYPES(MD_KEY_TYPE_ENUM)
#undef MD_KEY_TYPE_ENUM
} md_key_type;

typedef struct md_key {
    const char *name; /* "optim.lr" */
    md_key_type type;
    size_t offset, size; /* of the field in md_config */
    const char *def;     /* as typed */
    double min, max;
    const char *unit, *help;
} md_key;

extern const md_key md_keys[];
extern const int md_key_count;

#define MD_ORIGIN_SIZE (MD_CONFIG_STR + 16)
typedef struct md_origin {
    char text[MD_ORIGIN_SIZE];
} md_origin;

/* All errors of one load, one per line; the first MD_MAX_ERRORS are kept, all are counted. */
#define MD_MAX_ERRORS 24
typedef struct md_config_errors {
    char text[3900];
    size_t used;
    int count;
} md_config_errors;

void md_errors_add(md_config_errors *e, const char *origin, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* MD_OK when there is none, else MD_ERR_CONFIG with the list as error sentence. */
md_status md_errors_finish(md_config_errors *e);

/* A value before it meets its key. */
typedef struct md_value {
    enum { MD_VALUE_BOOL, MD_VALUE_INT, MD_VALUE_REAL, MD_VALUE_STR, MD_VALUE_LIST } kind;
    bool b;
    int64_t i;
    double r;
    const char *s;
    int n; /* LIST: its length; `list` holds the first three */
    double list[3];
} md_value;

typedef enum md_number { MD_NUMBER_OK, MD_NUMBER_BAD, MD_NUMBER_TOO_BIG } md_number;

/* Reads the whole of text[0, n) as a number of libconfig's syntax: 12, -3, 5000000000[L],
 * 0xFF, 1.5, 1e-3. TOO_BIG: beyond 64 bits, or a real that becomes infinite or zero. */
md_number md_number_parse(const char *text, size_t n, md_value *v);

/* Key of this name, or NULL. */
const md_key *md_key_find(const char *name);
/* True when `name` is the front of keys: "optim", "method.mask". */
bool md_key_is_group(const char *name);

/* Checks v against its key and stores it with its origin; errors are added to e. */
void md_value_store(md_config *c, const md_key *k, const md_value *v, const char *origin,
                    md_config_errors *e);
/* The same for text as typed on a command line (strings need no quotes). */
void md_value_store_text(md_config *c, const md_key *k, const char *text, const char *origin,
                         md_config_errors *e);

/* "an integer from 8 to 2048 (pixels)" into buf; returns buf. */
const char *md_key_describe(const md_key *k, char *buf, size_t size);

/* A file's text made safe for libconfig 1.5, and what it includes. */
#define MD_MAX_INCLUDES 16
typedef struct md_config_scan {
    char *text; /* owner: the caller (md_free) */
    struct {
        const char *name; /* inside the caller's text, not terminated */
        int size, line;
    } include[MD_MAX_INCLUDES];
    int n_includes;
} md_config_scan;

/* Scans text (a C string read from `path`): integers beyond 32 bits get the L libconfig needs,
 * include lines are blanked and listed, what libconfig would misread is added to e. MD_ERR_MEMORY
 * only. */
md_status md_config_scan_text(const char *text, const char *path, md_config_scan *out,
                              md_config_errors *e);

#endif
