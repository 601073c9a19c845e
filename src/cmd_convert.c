/* cmd_convert: `md_hpc convert`, see its usage in main.c and io/convert.h. */
#include "src/cli.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/convert.h"
#include "mpi/comm_mpi.h"
#include "src/log.h"

typedef struct options {
    md_convert_args args;
    md_convert_source *sources;
    const char *split, *verify;
} options;

/* The value of option argv[*i], which moves on to it. */
static md_status value_of(int argc, char **argv, int *i, const char **value)
{
    if (*i + 1 >= argc)
        return md_usage_error("convert", "%s needs a value", argv[*i]);
    *value = argv[++*i];
    return MD_OK;
}

static md_status parse_seed(const char *text, uint64_t *seed)
{
    char *end;
    errno = 0;
    *seed = strtoull(text, &end, 10);
    if (errno != 0 || end == text || *end || *text == '-')
        return md_usage_error("convert", "--seed %s: not a whole number from 0 to 2^64 - 1", text);
    return MD_OK;
}

static md_status parse_order(const char *text, bool *keep_order)
{
    *keep_order = strcmp(text, "source") == 0;
    if (!*keep_order && strcmp(text, "shuffled") != 0)
        return md_usage_error("convert", "--order %s: not shuffled or source", text);
    return MD_OK;
}

/* argv[*i] begins with "--". */
static md_status parse_option(options *o, int argc, char **argv, int *i)
{
    const char *name = argv[*i], *value = NULL;
    if (strcmp(name, "--force") == 0) {
        o->args.replace = true;
        return MD_OK;
    }
    static const char *const known[] = {"--out",  "--split", "--val",
                                        "--seed", "--order", "--verify"};
    size_t k = 0;
    while (k < MD_COUNT(known) && strcmp(name, known[k]) != 0)
        k++;
    if (k == MD_COUNT(known))
        return md_usage_error("convert", "unknown option %s", name);
    MD_TRY(value_of(argc, argv, i, &value));
    switch (k) {
    case 0:
        o->args.out = value;
        return MD_OK;
    case 1:
        o->split = value;
        return MD_OK;
    case 2:
        o->sources[o->args.n_sources++] = (md_convert_source){value, "val"};
        return MD_OK;
    case 3:
        return parse_seed(value, &o->args.seed);
    case 4:
        return parse_order(value, &o->args.keep_order);
    default:
        o->verify = value;
        return MD_OK;
    }
}

static md_status parse(options *o, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "--", 2) == 0)
            MD_TRY(parse_option(o, argc, argv, &i));
        else
            o->sources[o->args.n_sources++] = (md_convert_source){argv[i], NULL};
    }
    for (int i = 0; i < o->args.n_sources; i++)
        if (!o->sources[i].split)
            o->sources[i].split = o->split;
    if (o->verify && (o->args.out || o->args.n_sources))
        return md_usage_error("convert", "--verify FILE stands alone");
    if (!o->verify && !o->args.out)
        return md_usage_error("convert", "--out FILE is missing");
    if (!o->verify && o->args.n_sources == 0)
        return md_usage_error("convert", "no SOURCE given");
    return MD_OK;
}

static void report(const options *o, const md_convert_summary *s)
{
    const char *file = o->verify ? o->verify : o->args.out;
    double seconds = s->seconds > 0 ? s->seconds : 1e-9;
    md_log_info("%s: %lld images, %d classes, %.1f MB %s in %.1f s (%.0f images/s, %.1f MB/s)",
                file, (long long)s->images, s->classes, (double)s->bytes * 1e-6,
                o->verify ? "verified" : "converted", s->seconds, (double)s->images / seconds,
                (double)s->bytes * 1e-6 / seconds);
    if (s->rejects > 0)
        md_log_warn("%lld candidates were left out; %s.rejects.txt says why", (long long)s->rejects,
                    file);
}

static md_status convert(options *o, md_comm *world)
{
    md_convert_summary sum;
    if (o->verify)
        MD_TRY(md_convert_verify(o->verify, world, &sum));
    else
        MD_TRY(md_convert(&o->args, world, &sum));
    report(o, &sum);
    return MD_OK;
}

static md_status cmd_convert(int argc, char **argv)
{
    options o = {.split = "train"};
    md_comm *world;
    MD_NEW(o.sources, argc, "convert");
    o.args.sources = o.sources;
    md_status st = parse(&o, argc, argv);
    if (st == MD_OK)
        st = md_mpi_start(&argc, &argv, &world);
    if (st == MD_OK) {
        st = convert(&o, world);
        md_cli_report(st);
        md_mpi_stop(world);
    }
    md_free(o.sources);
    return st;
}

const md_verb md_verb_convert = {
    "convert", cmd_convert, "pack images into an image store (HDF5)",
    "md_hpc convert --out FILE [options] SOURCE...\n"
    "       md_hpc convert --verify FILE\n"
    "\n"
    "SOURCE          class folders (train/, val/, test/ above them are splits), a tar of class\n"
    "                folders or of class tars, IDX images with their labels file (gzip or not),\n"
    "                or a folder of such files; what it is is read from its content\n"
    "--out FILE      the store; written as FILE.partial, named when every byte was read back;\n"
    "                images that cannot be decoded are listed in FILE.rejects.txt\n"
    "--split NAME    split of sources that do not name theirs (train)\n"
    "--val SOURCE    a source for the split val\n"
    "--seed N        seed of the stored order (0)\n"
    "--order ORDER   shuffled (default) or source\n"
    "--force         replace FILE when it exists\n"
    "--verify FILE   read, hash and decode every image of a store\n"
    "\n"
    "Under mpirun all ranks share the work; the file is the same for any number of them."};
