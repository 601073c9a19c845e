/* main: finds the verb, runs it, prints the error it ended with, returns its status as exit code.
 */
#include "src/cli.h"

#include "src/config.h"
#include "src/log.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const md_verb *const verbs[] = {
#define VERB_ROW(name) &md_verb_##name,
    MD_VERBS(VERB_ROW)
#undef VERB_ROW
};

const md_verb *const *md_verbs(int *n)
{
    *n = (int)MD_COUNT(verbs);
    return verbs;
}

const md_verb *md_verb_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(verbs); i++)
        if (strcmp(verbs[i]->name, name) == 0)
            return verbs[i];
    return NULL;
}

md_status md_usage_error(const char *verb, const char *fmt, ...)
{
    char sentence[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(sentence, sizeof sentence, fmt, ap);
    va_end(ap);
    const char *usage = md_verb_find(verb)->usage, *end = strstr(usage, "\n\n");
    MD_FAIL(MD_ERR_USAGE, "%s\nusage: %.*s", sentence,
            (int)(end ? (size_t)(end - usage) : strlen(usage)), usage);
}

static bool is_help_option(const char *arg)
{
    return strcmp(arg, "-h") == 0 || strcmp(arg, "--help") == 0;
}

static bool is_config_file(const char *arg)
{
    size_t n = strlen(arg);
    return n >= 4 && strcmp(arg + n - 4, ".cfg") == 0;
}

static md_status unknown_verb(const char *word)
{
    const char *names[MD_COUNT(verbs)];
    for (size_t i = 0; i < MD_COUNT(verbs); i++)
        names[i] = verbs[i]->name;
    const char *near = md_text_nearest(word, names, (int)MD_COUNT(verbs));
    MD_FAIL(MD_ERR_USAGE, "\"%s\" is neither a verb nor a .cfg file%s%s%s; see md_hpc help", word,
            near ? "; did you mean \"" : "", near ? near : "", near ? "\"?" : "");
}

static md_status run(int argc, char **argv)
{
    const char *first = argc > 1 ? argv[1] : "help";
    if (argc < 2 || is_help_option(first))
        return md_cmd_help(1, &(char *){"help"});
    if (strcmp(first, "--version") == 0)
        first = "version";
    const md_verb *v = md_verb_find(is_config_file(first) ? "train" : first);
    if (!v)
        return unknown_verb(first);
    for (int i = 2; i < argc; i++)
        if (is_help_option(argv[i]))
            return md_cmd_help(2, (char *[]){"help", (char *)v->name});
    /* `md_hpc x.cfg k=v` is `md_hpc train x.cfg k=v`: the name of the program stands for the verb.
     */
    return is_config_file(first) ? v->run(argc, argv) : v->run(argc - 1, argv + 1);
}

/* The usage behind a sentence goes without "error:". */
void md_cli_report(md_status st)
{
    static bool done;
    const char *text = md_error_text(), *usage = strstr(text, "\nusage: ");
    if (st == MD_OK || !*text || done)
        return;
    done = true;
    if (st == MD_STOPPED) /* asked for, and nothing is lost */
        md_log_warn("%s", text);
    else
        md_log_error("%.*s", (int)(usage ? (size_t)(usage - text) : strlen(text)), text);
    if (usage && md_base_rank() == 0)
        fprintf(stderr, "%s\n", usage + 1);
}

int main(int argc, char **argv)
{
    signal(SIGXFSZ, SIG_IGN); /* a file size limit is to be an error with a name, not a signal */
    md_status st = run(argc, argv);
    if (st == MD_OK && (fflush(stdout) != 0 || ferror(stdout)))
        st = md_error_set(MD_ERR_IO, "writing to standard output failed");
    md_cli_report(st);
    return st;
}
