/* cmd_checkpoint: `md_hpc checkpoint info | verify | prune`. One process, no MPI. */
#include "src/cli.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "io/checkpoint.h"

#define VERB      "checkpoint"
#define NAME_SIZE 4096

static bool is_folder(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

/* The folder of checkpoints that `path` means: a run directory has one below it. */
static const char *folder_of(const char *path, char *buf)
{
    snprintf(buf, NAME_SIZE, "%s/checkpoints", path);
    return is_folder(buf) ? buf : path;
}

/* The first of several failures, with its sentence. */
typedef struct first_error {
    md_status st;
    char text[1024];
} first_error;

static void keep_first(first_error *e, md_status st)
{
    if (e->st != MD_OK || st == MD_OK)
        return;
    e->st = st;
    snprintf(e->text, sizeof e->text, "%s", md_error_text());
}

static md_status give_first(const first_error *e)
{
    return e->st == MD_OK ? MD_OK : md_error_set(e->st, "%s", e->text);
}

/* Calls `visit` with the path of each checkpoint that `path` means, newest first; goes on after a
 * failure and returns the first one. */
static md_status for_each(const char *path, md_status (*visit)(void *arg, const char *file),
                          void *arg)
{
    char buf[NAME_SIZE], file[NAME_SIZE];
    if (!is_folder(path))
        return visit(arg, path);
    const char *dir = folder_of(path, buf);
    first_error error = {MD_OK, ""};
    int64_t *steps;
    int n;
    MD_TRY(md_checkpoint_list(dir, &steps, &n));
    for (int i = 0; i < n; i++) {
        md_checkpoint_name(file, sizeof file, dir, steps[i]);
        keep_first(&error, visit(arg, file));
    }
    md_free(steps);
    if (n == 0)
        MD_FAIL(MD_ERR_NOINPUT, "%s: there is no checkpoint", dir);
    return give_first(&error);
}

/* ---- info ---- */

typedef struct info_options {
    md_comm *self;
    bool arrays, config;
} info_options;

static void print_arrays(const md_checkpoint *ck)
{
    int n;
    const md_state_entry *e = md_checkpoint_entries(ck, &n);
    for (int i = 0; i < n; i++) {
        char text[128];
        md_tensor t = md_tensor_make(NULL, (md_dtype)e[i].dtype, e[i].rank, e[i].global);
        printf("  %-52s %-24s %016llx\n", e[i].name, md_tensor_describe(&t, text, sizeof text),
               (unsigned long long)e[i].xxh3);
    }
}

static md_status print_info(void *arg, const char *file)
{
    const info_options *o = arg;
    md_checkpoint *ck;
    int arrays, facts;
    md_status st = md_checkpoint_open(o->self, file, &ck);
    if (st != MD_OK) {
        printf("%s\n  unusable: %s\n", file, md_error_text());
        return st;
    }
    md_checkpoint_entries(ck, &arrays);
    const md_fact *fact = md_checkpoint_facts(ck, &facts);
    printf("%s\n  step %lld, %d arrays, %.1f MiB\n", file, (long long)md_checkpoint_step(ck),
           arrays, (double)md_checkpoint_bytes(ck) / (1 << 20));
    printf("  state hash %016llx\n", (unsigned long long)md_checkpoint_state_hash(ck));
    for (int i = 0; i < facts; i++)
        printf("  %s: %s\n", fact[i].name, fact[i].value);
    if (o->arrays)
        print_arrays(ck);
    if (o->config)
        printf("%s", md_checkpoint_config(ck));
    md_checkpoint_close(ck);
    return MD_OK;
}

static md_status cmd_info(md_comm *self, int argc, char **argv)
{
    info_options o = {.self = self};
    const char *path = NULL;
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "--arrays") == 0)
            o.arrays = true;
        else if (strcmp(argv[i], "--config") == 0)
            o.config = true;
        else if (argv[i][0] == '-' || path)
            return md_usage_error(VERB, "info does not take \"%s\"", argv[i]);
        else
            path = argv[i];
    }
    if (!path)
        return md_usage_error(VERB, "info needs a checkpoint or a folder");
    return for_each(path, print_info, &o);
}

/* ---- verify ---- */

static md_status verify_one(void *arg, const char *file)
{
    md_checkpoint *ck;
    double start = md_now();
    md_status st = md_checkpoint_open(arg, file, &ck);
    if (st == MD_OK) {
        st = md_checkpoint_verify(ck);
        if (st == MD_OK)
            printf("%s: whole, step %lld, %.1f MiB in %.2f s, state hash %016llx\n", file,
                   (long long)md_checkpoint_step(ck), (double)md_checkpoint_bytes(ck) / (1 << 20),
                   md_now() - start, (unsigned long long)md_checkpoint_state_hash(ck));
        md_checkpoint_close(ck);
    }
    if (st != MD_OK)
        printf("%s: not whole: %s\n", file, md_error_text());
    return st;
}

static md_status cmd_verify(md_comm *self, int argc, char **argv)
{
    if (argc == 0 || argv[0][0] == '-')
        return md_usage_error(VERB, "verify needs checkpoints or folders");
    first_error error = {MD_OK, ""};
    for (int i = 0; i < argc; i++)
        keep_first(&error, for_each(argv[i], verify_one, self));
    return give_first(&error);
}

/* ---- prune ---- */

static md_status parse_count(const char *option, const char *text, int64_t least, int64_t *out)
{
    char *end;
    errno = 0;
    long long v = text ? strtoll(text, &end, 10) : 0;
    if (!text || end == text || *end || errno || v < least || v > 1000000000)
        return md_usage_error(VERB, "%s needs a number from %lld", option, (long long)least);
    *out = v;
    return MD_OK;
}

/* How many of the newest must stay so that the newest whole one does. */
static md_status whole_among(md_comm *self, const char *dir, int *count)
{
    md_checkpoint *ck;
    int64_t *steps;
    int n;
    MD_TRY(md_checkpoint_find(self, dir, NULL, NULL, &ck));
    int64_t step = md_checkpoint_step(ck);
    md_checkpoint_close(ck);
    MD_TRY(md_checkpoint_list(dir, &steps, &n));
    *count = n;
    for (int i = 0; i < n; i++)
        if (steps[i] == step)
            *count = i + 1;
    md_free(steps);
    return MD_OK;
}

static md_status cmd_prune(md_comm *self, int argc, char **argv)
{
    const char *path = NULL;
    int64_t keep = 2, every = 0;
    for (int i = 0; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--keep") == 0) {
            MD_TRY(parse_count("--keep", value, 1, &keep));
            i++;
        } else if (strcmp(argv[i], "--keep-every") == 0) {
            MD_TRY(parse_count("--keep-every", value, 0, &every));
            i++;
        } else if (argv[i][0] == '-' || path) {
            return md_usage_error(VERB, "prune does not take \"%s\"", argv[i]);
        } else {
            path = argv[i];
        }
    }
    if (!path)
        return md_usage_error(VERB, "prune needs a run directory");
    char buf[NAME_SIZE];
    const char *dir = folder_of(path, buf);
    int least, removed;
    MD_TRY(whole_among(self, dir, &least));
    MD_TRY(md_checkpoint_prune(dir, MD_MAX((int)keep, least), every, &removed));
    printf("%s: %d deleted\n", dir, removed);
    return MD_OK;
}

static md_status cmd_checkpoint(int argc, char **argv)
{
    static const struct {
        const char *name;
        md_status (*run)(md_comm *self, int argc, char **argv);
    } commands[] = {{"info", cmd_info}, {"verify", cmd_verify}, {"prune", cmd_prune}};
    md_comm *self;
    if (argc < 2)
        return md_usage_error(VERB, "what should be done with checkpoints?");
    for (size_t i = 0; i < MD_COUNT(commands); i++) {
        if (strcmp(argv[1], commands[i].name) != 0)
            continue;
        MD_TRY(md_comm_self(&self));
        md_status st = commands[i].run(self, argc - 2, argv + 2);
        md_comm_free(self);
        return st;
    }
    return md_usage_error(VERB, "checkpoint has no command \"%s\"", argv[1]);
}

const md_verb md_verb_checkpoint = {
    "checkpoint", cmd_checkpoint, "look at, verify and delete checkpoints",
    "md_hpc checkpoint info PATH [--arrays] [--config]\n"
    "       md_hpc checkpoint verify PATH...\n"
    "       md_hpc checkpoint prune RUN [--keep N] [--keep-every STEPS]\n"
    "\n"
    "PATH is a checkpoint, a folder of them or a run directory.\n"
    "info     step, size, state hash and origin of each; --arrays: name, type, shape and hash of\n"
    "         each array, --config: the config it was made with\n"
    "verify   reads and hashes every byte, prints the state hash; exit code 65 when one is\n"
    "         damaged. Equal states have equal state hashes, whoever wrote them\n"
    "prune    deletes all but the newest N (2) and the multiples of STEPS; never the newest\n"
    "         whole one"};
