/* cmd_config: `md_hpc config reference | check | show`. Needs no MPI, data or device. */
#include "src/cli.h"

#include "src/config.h"

#include <stdio.h>
#include <string.h>

/* Finds, reads and checks the file at argv[0] with the overrides behind it. */
static md_status load(md_config *c, int argc, char **argv)
{
    char path[MD_CONFIG_STR];
    MD_TRY(md_config_find(argv[0], path, sizeof path));
    return md_config_load(c, path, argc - 1, argv + 1);
}

static md_status check_or_show(bool show, bool diff, int argc, char **argv)
{
    md_config c;
    MD_TRY(md_config_init(&c));
    md_status st = load(&c, argc, argv);
    if (st == MD_OK && show)
        st = diff ? md_config_diff(&c, stdout) : md_config_write(&c, stdout, true);
    md_config_free(&c);
    return st;
}

static md_status cmd_config(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    bool show = strcmp(what, "show") == 0, diff = false;
    if (strcmp(what, "reference") == 0 && argc == 2)
        return md_config_reference(stdout);
    if (!show && strcmp(what, "check") != 0)
        return md_usage_error("config", "config wants reference, check FILE or show FILE");
    int n = 2; /* arguments kept: all but --diff */
    for (int i = 2; i < argc; i++) {
        bool is_diff = show && strcmp(argv[i], "--diff") == 0;
        if (argv[i][0] == '-' && !is_diff)
            return md_usage_error("config", "unknown option %s", argv[i]);
        diff |= is_diff;
        if (!is_diff)
            argv[n++] = argv[i];
    }
    if (n < 3)
        return md_usage_error("config", "config %s wants a file", what);
    return check_or_show(show, diff, n - 2, argv + 2);
}

const md_verb md_verb_config = {
    "config", cmd_config, "look at and check configurations",
    "md_hpc config reference\n"
    "       md_hpc config check FILE [key=value ...]\n"
    "       md_hpc config show FILE [key=value ...] [--diff]\n"
    "\n"
    "reference  writes every key with its default, range, unit and help as a config file\n"
    "check      reports every error of FILE and the overrides; silent when there is none\n"
    "show       writes the resolved config with the origin of each value;\n"
    "           --diff: only what differs from the defaults"};
