/* main: finds the verb, runs it, prints the error it ended with, returns its status as exit code.
 */
#include "src/cli.h"

#include "src/config.h"
#include "src/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const md_verb verbs[] = {
    {"bench", md_cmd_bench, "measure training steps on made-up pictures",
     "md_hpc bench step [--case vit_b16|small] [--threads N] [--steps N] [--warmup N]\n"
     "\n"
     "Prints one JSON line with the milliseconds of each step and images per second."},
    {"config", md_cmd_config, "look at and check configurations",
     "md_hpc config reference\n"
     "       md_hpc config check FILE [key=value ...]\n"
     "       md_hpc config show FILE [key=value ...] [--diff]\n"
     "\n"
     "reference  writes every key with its default, range, unit and help as a config file\n"
     "check      reports every error of FILE and the overrides; silent when there is none\n"
     "show       writes the resolved config with the origin of each value;\n"
     "           --diff: only what differs from the defaults"},
    {"convert", md_cmd_convert, "pack images into an image store (HDF5)",
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
     "Under mpirun all ranks share the work; the file is the same for any number of them."},
    {"help", md_cmd_help, "explain a verb, a key or a topic",
     "md_hpc help [VERB | KEY | exit-codes | keys]"},
    {"plan", md_cmd_plan, "what a run will need: memory, FLOPs, steps, bytes",
     "md_hpc plan FILE.cfg [--ranks N] [--images N] [--tflops X] [--memory GIB] [key=value ...]\n"
     "\n"
     "Needs no MPI, no GPU, no data and no weights (method.teacher.arch names the teacher).\n"
     "--ranks   data-parallel ranks (default 1)\n"
     "--images  images of an epoch where data.train is not there (default ImageNet-1k's)\n"
     "--tflops  sustained TFLOP/s of a rank, as `md_hpc bench step` reports: adds the time\n"
     "--memory  GiB a rank may use: adds whether it fits"},
    {"version", md_cmd_version, "versions of the program and its libraries", "md_hpc version"},
    {"weights", md_cmd_weights, "look at pretrained weights and import them",
     "md_hpc weights import --out OUT.h5 [options] FILE.safetensors|FOLDER\n"
     "       md_hpc weights inspect FILE\n"
     "\n"
     "import   makes the file that method.teacher.weights wants from a model in safetensors form\n"
     "         with the names of CLIP (OpenAI, OpenCLIP, Hugging Face), timm or Hugging Face ViT\n"
     "  --act gelu|quick_gelu  activation of the MLP, where no config.json beside it says so\n"
     "  --heads N              attention heads, likewise\n"
     "  --mean R,G,B --std R,G,B  channel statistics of its input, likewise\n"
     "  --prefix P             what stands before the names, when there is more than one model\n"
     "inspect  lists the tensors of a safetensors file or of a file import made, checks its\n"
     "         hashes, and says which model it is"},
};

const md_verb *md_verbs(int *n)
{
    *n = (int)MD_COUNT(verbs);
    return verbs;
}

const md_verb *md_verb_find(const char *name)
{
    for (size_t i = 0; i < MD_COUNT(verbs); i++)
        if (strcmp(verbs[i].name, name) == 0)
            return &verbs[i];
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
        names[i] = verbs[i].name;
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

/* The error a verb ended with; the usage behind it goes without "error:". */
static void print_error(void)
{
    const char *text = md_error_text(), *usage = strstr(text, "\nusage: ");
    md_log_error("%.*s", (int)(usage ? (size_t)(usage - text) : strlen(text)), text);
    if (usage && md_base_rank() == 0)
        fprintf(stderr, "%s\n", usage + 1);
}

int main(int argc, char **argv)
{
    md_status st = run(argc, argv);
    if (st != MD_OK && *md_error_text())
        print_error();
    return st;
}
