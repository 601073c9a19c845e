/* cmd_help: `md_hpc help` and `md_hpc version`. Everything shown is walked from a table. */
#include "src/cli.h"

#include <stdio.h>
#include <string.h>

#include "io/h5.h"
#include "kernels/backend.h"
#include "mpi/comm.h"
#include "src/config.h"
#include "src/log.h"

static void overview(void)
{
    int n;
    const md_verb *const *v = md_verbs(&n);
    puts("md_hpc pretrains Vision Transformers by masked image modeling.\n\n"
         "usage: [mpirun -np N] md_hpc FILE.cfg [key=value ...]\n"
         "       md_hpc VERB ...\n");
    for (int i = 0; i < n; i++)
        printf("  %-12s%s\n", v[i]->name, v[i]->help);
    puts("\nmd_hpc help VERB        how to use a verb\n"
         "md_hpc help KEY         a configuration key, or all keys of a group: optim\n"
         "md_hpc help keys        all configuration keys\n"
         "md_hpc help exit-codes  what the exit codes mean");
}

static void exit_codes(void)
{
#define PRINT_STATUS(name, code, text) printf("%3d  %s\n", code, text);
    MD_STATUSES(PRINT_STATUS)
#undef PRINT_STATUS
}

static md_status no_help(const char *topic)
{
    char advice[128];
    return md_usage_error("help", "no help on \"%s\"%s", topic,
                          md_config_suggest(topic, advice, sizeof advice));
}

md_status md_cmd_help(int argc, char **argv)
{
    const char *topic = argc > 1 ? argv[1] : "";
    if (argc > 2)
        return md_usage_error("help", "help takes one topic");
    const md_verb *v = md_verb_find(topic);
    if (!*topic)
        overview();
    else if (v)
        printf("usage: %s\n", v->usage);
    else if (strcmp(topic, "exit-codes") == 0)
        exit_codes();
    else if (strcmp(topic, "keys") == 0)
        md_config_help("", stdout);
    else if (!md_config_help(topic, stdout))
        return no_help(topic);
    return MD_OK;
}

static md_status cmd_version(int argc, char **argv)
{
    (void)argv;
    if (argc > 1)
        return md_usage_error("version", "version takes no arguments");
    int n;
    const md_fact *facts = md_build_facts(&n);
    for (int i = 0; i < n; i++)
        printf("%-10s%s\n", facts[i].name, facts[i].value);
    const char *const libraries[] = {md_config_library(), md_comm_library(), md_h5_library(),
                                     md_backend_library()};
    for (size_t i = 0; i < MD_COUNT(libraries); i++)
        printf("%-10s%s\n", i ? "" : "libraries", libraries[i]);
    printf("%-10s%s\n", "backends", md_backend_list());
    return MD_OK;
}

const md_verb md_verb_help = {"help", md_cmd_help, "explain a verb, a key or a topic",
                              "md_hpc help [VERB | KEY | exit-codes | keys]"};

const md_verb md_verb_version = {"version", cmd_version,
                                 "versions of the program and its libraries", "md_hpc version"};
