/* cli: the verbs of the program. One table in main.c; each verb is a function in its own
 * cmd_<verb>.c.
 *
 * A verb gets argv[0] = its own name, returns the exit code of the program as a status, and leaves
 * the error sentence to main, which prints it once (rank 0 alone when there are several). A verb
 * that needs MPI starts and ends it itself; help, version, config and plan never do. */
#ifndef MD_CLI_H
#define MD_CLI_H

#include "src/base.h"

/* X(name), in the order of the overview */
#define MD_VERBS(X) \
    X(train)        \
    X(plan)         \
    X(evaluate)     \
    X(convert)      \
    X(weights)      \
    X(checkpoint)   \
    X(config)       \
    X(bench)        \
    X(help)         \
    X(version)

typedef struct md_verb {
    const char *name;
    md_status (*run)(int argc, char **argv);
    const char *help;  /* one line of the overview */
    const char *usage; /* lines behind "usage: "; after an empty line, what they mean */
} md_verb;

#define MD_VERB_DECLARE(name) extern const md_verb md_verb_##name;
MD_VERBS(MD_VERB_DECLARE)
#undef MD_VERB_DECLARE

/* All verbs of this program. Local. */
const md_verb *const *md_verbs(int *n);
/* Verb of this name, or NULL. Local. */
const md_verb *md_verb_find(const char *name);

/* Fails with MD_ERR_USAGE: the sentence, then the first paragraph of the verb's usage. `verb` is a
 * name in the table. Local. */
md_status md_usage_error(const char *verb, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* Prints the error sentence of a verb that ends with st, on rank 0, unless that was done. A verb
 * that used MPI calls it before MPI ends: some launchers kill every rank as soon as the first has
 * gone. Local. */
void md_cli_report(md_status st);

md_status md_cmd_help(int argc, char **argv);

#endif
