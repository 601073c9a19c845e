/* config: libconfig file(s) and key=value overrides -> struct md_config, strictly, by walking
 * config_keys.h: an unknown key, a wrong type or a value out of range is an error with file:line,
 * all errors are reported together, and every value remembers where it came from. */
#ifndef MD_CONFIG_H
#define MD_CONFIG_H

#include "src/tensor.h"

#include <stdio.h>

#define MD_CONFIG_STR 512

typedef struct md_config {
#define MD_FIELD_BOOL(f)                               bool f;
#define MD_FIELD_INT(f)                                int64_t f;
#define MD_FIELD_REAL(f)                               double f;
#define MD_FIELD_STR(f)                                char f[MD_CONFIG_STR];
#define MD_FIELD_CHOICE(f)                             char f[32];
#define MD_FIELD_REAL3(f)                              double f[3];
#define X(field, key, type, def, min, max, unit, help) MD_FIELD_##type(field)
#include "src/config_keys.h"
#undef X
#undef MD_FIELD_BOOL
#undef MD_FIELD_INT
#undef MD_FIELD_REAL
#undef MD_FIELD_STR
#undef MD_FIELD_CHOICE
#undef MD_FIELD_REAL3
    char source[MD_CONFIG_STR]; /* path of the file read; "" for built-in defaults */
    void *origins;              /* owned: one text per key, see md_config_origin */
} md_config;

/* All defaults; undone by md_config_free. A md_config owns memory: pass pointers, do not copy.
 * Local. */
md_status md_config_init(md_config *c);
void md_config_free(md_config *c);

/* Finds `name` (working directory first, then config/ beside the program or above its directory,
 * then
 * ../share/md_hpc/config of an installed program) and writes its path. MD_ERR_NOINPUT names the
 * places looked at. Local. */
md_status md_config_find(const char *name, char *path, size_t size);

/* Reads a file over c (from md_config_init), then the overrides ("optim.lr=1e-3"; strings need no
 * quotes, three numbers are 0.5,0.5,0.5), then runs md_config_check. MD_ERR_CONFIG: md_error_text()
 * holds every error found, one per line. path NULL = no file. Local.
 *
 * A file is libconfig's syntax with keys in nested groups. Lines `@include "other.cfg"` stand
 * before its first setting; each included file is read first, in order, so a file overrides what it
 * builds on, and several files may set keys of the same group. The name is relative to the
 * including file, else looked up as md_config_find does. */
md_status md_config_load(md_config *c, const char *path, int n_overrides, char *const *overrides);

/* Checks that keys fit together as far as no data, weights or ranks are needed (heads divide width,
 * patch divides image, ...). All errors, one per line. Local. */
md_status md_config_check(const md_config *c);

/* Writes c as a file md_config_load reads back to the same values, a comment with each value's
 * origin behind it. origins false: values only. Local. */
md_status md_config_write(const md_config *c, FILE *f, bool origins);

/* The same values as text, freed with free(). Local. MD_ERR_MEMORY. */
md_status md_config_text(const md_config *c, char **text);

/* Reads text that md_config_write once wrote, by any version, over c: a key the text lacks keeps
 * its value, one that is no key any more is left out. `path` names the text. Local. MD_ERR_DATA: no
 * config text. */
md_status md_config_read_written(md_config *c, const char *text, const char *path);

/* What md_config_compare found: was and now as md_config_write writes them. `experiment`: the key
 * is part of what the run is (model, method, pictures, seed); else it may be tuned under way. */
typedef void (*md_config_differ)(void *arg, bool experiment, const char *key, const char *was,
                                 const char *now);
/* Compares c with the text md_config_write once wrote, by any version: a key the text lacks had its
 * default, one that is no key any more is left out. Keys that any job of a run may change (paths,
 * layout, logs, checkpoints, length) do not count. Local. MD_ERR_DATA: no config text. */
md_status md_config_compare(const md_config *c, const char *text, md_config_differ differ,
                            void *arg);

/* The reference of all keys (default, range, unit, help) as a commented config file. Local. */
md_status md_config_reference(FILE *f);
/* The help of one key or of all keys whose name starts with `prefix`; false when there is none. */
bool md_config_help(const char *prefix, FILE *f);

/* Where the value of a key came from ("default", "vit_h.cfg:12", "command line"); NULL for a name
 * that is no key. Valid until c changes. Local. */
const char *md_config_origin(const md_config *c, const char *key);

/* Writes the keys that differ from their defaults as overrides, one per line, with origin and
 * default as comment. Local. */
md_status md_config_diff(const md_config *c, FILE *f);

/* The nearest of n names to a mistyped word, or NULL when none is near. Local. */
const char *md_text_nearest(const char *word, const char *const *names, int n);

/* '; did you mean "optim.lr"?' for a mistyped key or group into buf, or "" when none is near;
 * returns buf. Local. */
const char *md_config_suggest(const char *name, char *buf, size_t size);

/* "libconfig 1.5.0": the parser this was compiled with. */
const char *md_config_library(void);

/* Index of `value` among the choices of a CHOICE key, which is the order of the enum it stands for.
 * Both must exist: values have passed the checks. Local. */
int md_config_choice(const char *key, const char *value);
/* The compute type that `precision` asks for on `backend`. Local. */
md_dtype md_config_compute(const md_config *c);

/* Index of `value` in a CHOICE's comma separated list "a,b,c"; -1 when absent. Local. */
int md_choice_index(const char *list, const char *value);

#endif
