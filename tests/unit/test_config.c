/* Configuration: every key of the table is tried with a typo, a wrong type, values out of range and
 * good values, through files and overrides; then files, includes, numbers, cross checks, writing.
 */
#include "src/config_table.h"
#include "src/rng.h"

#include <dirent.h>
#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char dir[] = "/tmp/md_test_config_XXXXXX";

static const char *in_dir(const char *name)
{
    static char path[4][256];
    static int turn;
    char *p = path[turn++ % 4];
    snprintf(p, sizeof path[0], "%s/%s", dir, name);
    return p;
}

static const char *put(const char *name, const char *text)
{
    const char *path = in_dir(name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    return path;
}

/* Loads text (NULL: no file) and one override (NULL: none) into *c, which the caller frees. */
static md_status load(md_config *c, const char *text, const char *override)
{
    char *list[] = {(char *) override};
    assert_int_equal(md_config_init(c), MD_OK);
    return md_config_load(c, text ? put("t.cfg", text) : NULL, override != NULL, list);
}

/* Expects this load to fail with `part` somewhere in the errors. */
static void refused(const char *text, const char *override, const char *part)
{
    md_config c;
    md_status st = load(&c, text, override);
    md_config_free(&c);
    if (st != MD_ERR_CONFIG || !strstr(md_error_text(), part))
        fail_msg("[%s] [%s] -> %s \"%s\", expected \"%s\"", text ? text : "",
                 override ? override : "", md_status_name(st), md_error_text(), part);
}

static void accepted(md_config *c, const char *text, const char *override)
{
    if (load(c, text, override) != MD_OK)
        fail_msg("[%s] [%s] -> %s", text ? text : "", override ? override : "", md_error_text());
}

/* "a.b.c" = value as nested groups. */
static const char *nested(const char *key, const char *value)
{
    static char text[1024];
    size_t n = 0;
    int depth = 0;
    for (const char *p = key;;) {
        size_t part = strcspn(p, ".");
        n += (size_t)snprintf(text + n, sizeof text - n, "%.*s = ", (int)part, p);
        if (!p[part])
            break;
        n += (size_t)snprintf(text + n, sizeof text - n, "{\n");
        depth++;
        p += part + 1;
    }
    n += (size_t)snprintf(text + n, sizeof text - n, "%s;", value);
    while (depth--)
        n += (size_t)snprintf(text + n, sizeof text - n, "};");
    return text;
}

static void errors_name_the_key(const md_key *k, const char *value)
{
    char line[1100];
    refused(nested(k->name, value), NULL, k->name);
    snprintf(line, sizeof line, "%s=%s", k->name, value);
    refused(NULL, line, k->name);
}

static void each_key_refuses_a_wrong_type(void **state)
{
    (void)state;
    static const char *const wrong[][5] = {
        [MD_KEY_BOOL] = {"1", "0.5", "\"yes\"", "[1]"},
        [MD_KEY_INT] = {"1.0", "true", "\"x\"", "[1, 2]"},
        [MD_KEY_REAL] = {"true", "\"x\"", "[0.5]"},
        [MD_KEY_STR] = {NULL}, /* any text typed on the command line is a string: see below */
        [MD_KEY_CHOICE] = {"\"nothing like it\""},
        [MD_KEY_REAL3] = {"0.5", "[0.5, 0.5]", "[0.5, 0.5, 0.5, 0.5]", "\"0.5\"", "true"},
    };
    for (int i = 0; i < md_key_count; i++) {
        const md_key *k = &md_keys[i];
        for (int j = 0; j < 5 && wrong[k->type][j]; j++)
            errors_name_the_key(k, wrong[k->type][j]);
        refused(nested(k->name, "{ x = 1; }"), NULL, k->name);
        if (k->type == MD_KEY_STR || k->type == MD_KEY_CHOICE) {
            refused(nested(k->name, "1"), NULL, k->name);
            refused(nested(k->name, "true"), NULL, k->name);
        }
    }
}

static void each_key_keeps_its_range(void **state)
{
    (void)state;
    for (int i = 0; i < md_key_count; i++) {
        const md_key *k = &md_keys[i];
        const char *form = k->type == MD_KEY_REAL3 ? "[%.17g, 0.5, 0.5]" : "%.17g";
        char low[96], high[96];
        if (k->type == MD_KEY_INT) {
            snprintf(low, sizeof low, "%" PRId64, (int64_t)k->min - 1);
            snprintf(high, sizeof high, "%" PRId64, (int64_t)k->max + 1);
        } else if (k->type == MD_KEY_REAL || k->type == MD_KEY_REAL3) {
            snprintf(low, sizeof low, form, k->min > 0 ? k->min * 0.999 : k->min - 1e-3);
            snprintf(high, sizeof high, form, k->max * 1.001 + 1e-9);
        } else {
            continue;
        }
        assert_true(k->min <= k->max);
        errors_name_the_key(k, low);
        errors_name_the_key(k, high);
    }
}

static void each_key_is_suggested_for_a_typo(void **state)
{
    (void)state;
    for (int i = 0; i < md_key_count; i++) {
        char typo[128], want[256];
        size_t n = strlen(md_keys[i].name);
        /* A letter doubled at the end is near the right key and nothing else. */
        snprintf(typo, sizeof typo, "%s%c", md_keys[i].name, md_keys[i].name[n - 1]);
        snprintf(want, sizeof want, "unknown key \"%s\"; did you mean \"%s\"?", typo,
                 md_keys[i].name);
        refused(nested(typo, "1"), NULL, want);
        strcat(typo, "=1");
        refused(NULL, typo, want);
    }
    refused("optmi = { lr = 1.0; };", NULL, "unknown group \"optmi\"; did you mean \"optim\"?");
    refused("lr = 1.0;", NULL, "did you mean \"optim.lr\"?");
    refused("optim = 1;", NULL, "optim is a group of keys");
    refused(NULL, "zzzzzzzzzzz=1", "unknown key \"zzzzzzzzzzz\"");
    refused(NULL, "optim.lr", "is no key=value");
    refused(NULL, "method.mask.kind=blokc", "did you mean \"block\"?");
}

/* A value of k that is not its default and stands in its range. */
static void other_value(const md_key *k, char *buf, size_t size)
{
    double mid = k->min + (k->max - k->min) / 3;
    switch (k->type) {
    case MD_KEY_BOOL:
        snprintf(buf, size, "%s", strcmp(k->def, "true") == 0 ? "false" : "true");
        break;
    case MD_KEY_INT:
        snprintf(buf, size, "%" PRId64, (int64_t)mid);
        break;
    case MD_KEY_REAL:
        snprintf(buf, size, "%.17g", mid);
        break;
    case MD_KEY_REAL3:
        snprintf(buf, size, "[%.17g, %.17g, %.17g]", k->min, mid, k->max);
        break;
    case MD_KEY_STR:
        snprintf(buf, size, "\"q\\\"b\\\\s\\n\\t#'//%s\\x01 \xc3\xa9\"", k->name);
        break;
    case MD_KEY_CHOICE:
        snprintf(buf, size, "\"%s\"", strrchr(k->unit, ',') ? strrchr(k->unit, ',') + 1 : k->unit);
        break;
    }
}

/* Every key's value stored straight from other_value's text, as libconfig reads it. */
static void fill(md_config *c)
{
    md_config_errors e = {0};
    assert_int_equal(md_config_init(c), MD_OK);
    for (int i = 0; i < md_key_count; i++) {
        char text[256];
        const char *nasty = "q\"b\\s\n\t#'//\x01 \xc3\xa9";
        other_value(&md_keys[i], text, sizeof text);
        if (md_keys[i].type == MD_KEY_CHOICE) {
            text[strlen(text) - 1] = 0;
            memmove(text, text + 1, strlen(text));
        }
        md_value_store_text(c, &md_keys[i], md_keys[i].type == MD_KEY_STR ? nasty : text,
                            "a\nname.cfg:7", &e);
    }
    assert_int_equal(e.count, 0);
}

static bool same_values(const md_config *a, const md_config *b)
{
    for (int i = 0; i < md_key_count; i++) {
        const md_key *k = &md_keys[i];
        const char *x = (const char *)a + k->offset, *y = (const char *)b + k->offset;
        bool text = k->type == MD_KEY_STR || k->type == MD_KEY_CHOICE;
        if (text ? strcmp(x, y) != 0 : memcmp(x, y, k->size) != 0) {
            print_error("%s differs\n", k->name);
            return false;
        }
    }
    return true;
}

static void written_config_reads_back_equal(void **state)
{
    (void)state;
    for (int origins = 0; origins < 2; origins++) {
        md_config a, b;
        fill(&a);
        const char *path = in_dir("written.cfg");
        FILE *f = fopen(path, "w");
        assert_int_equal(md_config_write(&a, f, origins), MD_OK);
        fclose(f);
        assert_int_equal(md_config_init(&b), MD_OK);
        assert_false(same_values(&a, &b));
        /* Values a third up their ranges need not fit together: only the cross checks may object.
         */
        if (md_config_load(&b, path, 0, NULL) != MD_OK)
            assert_int_not_equal(md_config_check(&b), MD_OK);
        assert_true(same_values(&a, &b));
        md_config_free(&a);
        md_config_free(&b);
    }
}

static void values_arrive_with_their_origins(void **state)
{
    (void)state;
    md_config c;
    put("base.cfg", "model = { width = 96;\n heads = 6; };\noptim = { lr = 1; };");
    mkdir(in_dir("sub"), 0755);
    put("sub/method.cfg", "@include \"deep.cfg\"\noptim = { lr = 2.0; clip = 0; };");
    put("sub/deep.cfg", "method : { loss : { beta : 1, }, }");
    accepted(&c,
             "# a comment with @include \"nothing\"\n@include \"base.cfg\" // and more\n"
             "/* over\n lines */ @include \"sub/method.cfg\"\n"
             "model = { heads = 4; };\nimage = { mean = (0, 0.5, 1);\n std = [0.5, 0.5, 0.5]; };",
             "optim.beta2 = 0.98 ");
    assert_true(c.model_width == 96 && c.model_heads == 4 && c.model_layers == 12);
    assert_true(c.optim_lr == 2 && c.optim_clip == 0 && c.loss_beta == 1);
    assert_true(c.optim_beta2 == 0.98);
    assert_true(c.image_mean[0] == 0 && c.image_mean[1] == 0.5 && c.image_mean[2] == 1);
    assert_string_equal(c.source, in_dir("t.cfg"));
    const char *want[][2] = {{"model.width", "base.cfg:1"},
                             {"model.heads", "t.cfg:5"},
                             {"optim.lr", "sub/method.cfg:2"},
                             {"method.loss.beta", "sub/deep.cfg:1"},
                             {"image.std", "t.cfg:7"}};
    for (size_t i = 0; i < MD_COUNT(want); i++)
        assert_string_equal(md_config_origin(&c, want[i][0]), in_dir(want[i][1]));
    assert_string_equal(md_config_origin(&c, "optim.beta2"), "command line");
    assert_string_equal(md_config_origin(&c, "model.layers"), "default");
    assert_null(md_config_origin(&c, "no.key"));
    md_config_free(&c);
}

static void includes_that_cannot_work_are_refused(void **state)
{
    (void)state;
    put("loop.cfg", "@include \"loop.cfg\"\n");
    put("bad.cfg", "\n\nmodel = { width = 1; };");
    char want[300];
    refused("@include \"loop.cfg\"", NULL, "loop.cfg:1: includes nested deeper than");
    refused("\n@include \"none.cfg\"", NULL, "t.cfg:2: no config file none.cfg");
    refused("run = { };\n@include \"bad.cfg\"", NULL, "t.cfg:2: @include must stand before");
    refused("@include bad.cfg", NULL, "t.cfg:1: malformed line");
    refused("@includes \"bad.cfg\"", NULL, "t.cfg:1: malformed line");
    refused("@include \"bad.cfg", NULL, "t.cfg:1: malformed line");
    refused("@include \"/tmp\"", NULL, "t.cfg:1: no config file /tmp");
    snprintf(want, sizeof want, "%s:3: model.width", in_dir("bad.cfg"));
    refused("@include \"bad.cfg\"", NULL, want);
}

static void numbers_are_read_right_or_refused(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int64_t value; /* -1: refused */
    } ints[] = {
        {"5000000000", 5000000000},
        {"5000000000L", 5000000000},
        {"0x12A05F200", 5000000000},
        {"0xFF", 255},
        {"0xFFFFFFFF", 4294967295},
        {"2147483648", 2147483648},
        {"+7", 7},
        {"010", 10},
        {"9007199254740991", 9007199254740991},
        {"9007199254740992", -1},
        {"9223372036854775808", -1},
        {"99999999999999999999999", -1},
        {"99999999999999999999999L", -1},
        {"0xFFFFFFFFFFFFFFFFF", -1},
        {"18446744073709551617", -1},
        {"-1", -1},
        {"1e3", -1},
        {"5x", -1},
        {"0x", -1},
        {"1_000", -1},
        {"-0x1", -1},
    };
    static const struct {
        const char *text;
        double value; /* negative: refused */
    } reals[] = {{"1", 1},        {"0.25", 0.25}, {".25", 0.25}, {"1.", 1},        {"2.5e-1", 0.25},
                 {"25E-2", 0.25}, {"1e0", 1},     {"+1.5", 1.5}, {"1e400", -1},    {"1e-400", -1},
                 {"inf", -1},     {"nan", -1},    {"-inf", -1},  {"Infinity", -1}, {".", -1},
                 {"1e", -1},      {"0x1p3", -1},  {"1.5.2", -1}, {"1,5", -1},      {"1 5", -1}};
    md_config c;
    char line[128];
    for (size_t i = 0; i < MD_COUNT(ints) + MD_COUNT(reals); i++) {
        bool is_int = i < MD_COUNT(ints);
        size_t r = i - MD_COUNT(ints);
        const char *key = is_int ? "run.seed" : "optim.lr";
        const char *text = is_int ? ints[i].text : reals[r].text;
        snprintf(line, sizeof line, "%s=%s", key, text);
        if (is_int ? ints[i].value < 0 : reals[r].value < 0) {
            refused(nested(key, text), NULL, "t.cfg");
            refused(NULL, line, key);
            continue;
        }
        for (int from_file = 0; from_file < 2; from_file++) {
            accepted(&c, from_file ? nested(key, text) : NULL, from_file ? NULL : line);
            assert_true(is_int ? c.run_seed == ints[i].value : c.optim_lr == reals[r].value);
            md_config_free(&c);
        }
    }
    refused("threads = 1y = 2;", NULL, "malformed number 1y");
}

static void broken_files_are_refused_with_their_line(void **state)
{
    (void)state;
    refused("threads = 1;\nthreads = 2;", NULL, "t.cfg:2: duplicate setting name");
    refused("threads = ;", NULL, "t.cfg:1: syntax error");
    refused("\n\nrun = { dir = \"x", NULL, "t.cfg:3: string without closing quote");
    refused("threads = 1; /* x\n", NULL, "t.cfg:1: comment without end");
    refused("backend = cpu;", NULL, "t.cfg:1: cpu is neither");
    refused("{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{{", NULL, "nested brackets");
    md_config c;
    assert_int_equal(md_config_init(&c), MD_OK);
    assert_int_equal(md_config_load(&c, in_dir("absent.cfg"), 0, NULL), MD_ERR_CONFIG);
    assert_non_null(strstr(md_error_text(), "cannot open"));
    assert_int_equal(md_config_load(&c, dir, 0, NULL), MD_ERR_CONFIG);
    FILE *f = fopen(in_dir("zero.cfg"), "w");
    fwrite("threads = 1;\0\n", 1, 14, f);
    fclose(f);
    assert_int_equal(md_config_load(&c, in_dir("zero.cfg"), 0, NULL), MD_ERR_CONFIG);
    assert_non_null(strstr(md_error_text(), "zero byte"));
    md_config_free(&c);
    char line[700];
    snprintf(line, sizeof line, "run.dir=%0600d", 0);
    refused(NULL, line, "run.dir must be a string");
}

static void all_errors_come_at_once(void **state)
{
    (void)state;
    refused("threads = 1.5;\nrun = { seed = true; };", "optim.lr=x", "t.cfg:1: threads");
    assert_non_null(strstr(md_error_text(), "t.cfg:2: run.seed"));
    assert_non_null(strstr(md_error_text(), "command line: optim.lr"));
    char text[4000] = "";
    for (int i = 0; i < 100; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "x%d = 1;\n", i);
    refused(text, NULL, "t.cfg:24: ");
    assert_null(strstr(md_error_text(), "t.cfg:25: "));
    assert_non_null(strstr(md_error_text(), "and 76 more errors"));
}

static void keys_that_do_not_fit_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *text, *part; /* part NULL: fits */
    } cases[] = {
        {"model = { heads = 7; };", "model.heads = 7 must divide model.width = 768"},
        {"model = { patch = 15; };", "model.patch = 15 must divide image.size = 224"},
        {"augment = { crop_min = 0.9; crop_max = 0.5; };",
         "augment.crop_min = 0.9 must not exceed"},
        {"optim = { warmup_epochs = 300; };", "optim.warmup_epochs = 300 must be less than"},
        {"optim = { warmup_epochs = 0; }; train = { epochs = 1; };", NULL},
        {"optim = { lr = 1e-6; };", "optim.min_lr = 1e-05 must not exceed optim.lr = 1e-06"},
        {"train = { batch = 10; micro_batch = 4; };", "train.micro_batch = 4 must divide"},
        {"train = { batch = 12; micro_batch = 4; };", NULL},
        {"method = { mask = { kind = \"none\"; }; };", "needs a mask"},
        {"method = { mask = { kind = \"none\"; }; loss = { on = \"all\"; }; };", NULL},
        {"method = { mask = { kind = \"none\"; count = 3; }; loss = { on = \"all\"; }; };",
         "method.mask.count = 3 has no meaning"},
        {"method = { mask = { count = 196; }; };", "masks 196 of 196 patches"},
        {"method = { mask = { count = 195; }; };", NULL},
        {"method = { mask = { ratio = 0.001; kind = \"random\"; }; };", "masks 0 of 196 patches"},
        {"image = { size = 32; };", "method.mask.min_block = 16 must not exceed the 2 masked"},
        {"image = { size = 32; }; method = { mask = { min_block = 2; }; };", NULL},
        {"checkpoint = { every = 10; keep_every = 15; };", "checkpoint.keep_every = 15 must be"},
        {"checkpoint = { every = 10; keep_every = 30; };", NULL},
    };
    md_config c;
    for (size_t i = 0; i < MD_COUNT(cases); i++) {
        if (cases[i].part) {
            refused(cases[i].text, NULL, cases[i].part);
            continue;
        }
        accepted(&c, cases[i].text, NULL);
        md_config_free(&c);
    }
    refused("model = { heads = 7; patch = 15; };", NULL, "t.cfg:1: model.heads = 7");
    assert_non_null(strstr(md_error_text(), "model.patch = 15 must divide"));
}

static void overrides_are_typed_like_files(void **state)
{
    (void)state;
    md_config c;
    char *list[] = {"image.mean=0.5,0.25,1", "image.std=[0.5, 0.5, 2]",
                    "run.dir=some dir/x=1",  "data.sync=TRUE",
                    "optim.lr = 3",          "data.split=\"val\"",
                    "data.train=",           "optim.lr=4"};
    assert_int_equal(md_config_init(&c), MD_OK);
    assert_int_equal(md_config_load(&c, NULL, (int)MD_COUNT(list), list), MD_OK);
    assert_true(c.image_mean[0] == 0.5 && c.image_mean[1] == 0.25 && c.image_mean[2] == 1);
    assert_true(c.image_std[2] == 2 && c.data_sync && c.optim_lr == 4);
    assert_string_equal(c.run_dir, "some dir/x=1");
    assert_string_equal(c.data_split, "val");
    assert_string_equal(c.data_train, "");
    md_config_free(&c);
}

static char *text_of(FILE *f)
{
    static char text[3][65536];
    static int turn;
    char *buf = text[turn++ % 3];
    rewind(f);
    buf[fread(buf, 1, sizeof text[0] - 1, f)] = 0;
    fclose(f);
    return buf;
}

static void reference_is_current_and_complete(void **state)
{
    (void)state;
    FILE *f = tmpfile();
    assert_int_equal(md_config_reference(f), MD_OK);
    char *now = text_of(f);
    FILE *committed = fopen("config/reference.cfg", "r");
    if (!committed)
        fail_msg("run from the repository: config/reference.cfg is not here");
    /* md_hpc config reference > config/reference.cfg */
    assert_string_equal(now, text_of(committed));
    md_config c, defaults;
    accepted(&c, now, NULL);
    assert_int_equal(md_config_init(&defaults), MD_OK);
    assert_true(same_values(&c, &defaults));
    for (int i = 0; i < md_key_count; i++)
        assert_non_null(strstr(md_config_origin(&c, md_keys[i].name), "t.cfg:"));
    md_config_free(&c);
    md_config_free(&defaults);
}

static void shipped_configs_are_valid(void **state)
{
    (void)state;
    DIR *d = opendir("config");
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        size_t n = strlen(e->d_name);
        if (n < 4 || strcmp(e->d_name + n - 4, ".cfg") != 0)
            continue;
        char path[300];
        md_config c;
        snprintf(path, sizeof path, "config/%s", e->d_name);
        assert_int_equal(md_config_init(&c), MD_OK);
        if (md_config_load(&c, path, 0, NULL) != MD_OK)
            fail_msg("%s", md_error_text());
        md_config_free(&c);
    }
    closedir(d);
}

static void help_and_diff_walk_the_table(void **state)
{
    (void)state;
    FILE *f = tmpfile();
    assert_true(md_config_help("optim.lr", f));
    assert_false(md_config_help("optix", f));
    const char *text = text_of(f);
    assert_non_null(strstr(text, "optim.lr\n"));
    assert_non_null(strstr(text, "a number from 0 to 100; default 1.5e-3"));
    md_config c;
    accepted(&c, NULL, "optim.lr=0.25");
    f = tmpfile();
    assert_int_equal(md_config_diff(&c, f), MD_OK);
    assert_string_equal(text_of(f),
                        "optim.lr=0.25                           # command line, default 0.0015\n");
    md_config_free(&c);
}

static void configs_are_found_beside_the_program(void **state)
{
    (void)state;
    char exe[512], folder[600], file[700], path[MD_CONFIG_STR];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    assert_true(n > 0);
    exe[n] = 0;
    *strrchr(exe, '/') = 0;
    snprintf(folder, sizeof folder, "%s/config", exe);
    snprintf(file, sizeof file, "%s/md_test_find.cfg", folder);
    mkdir(folder, 0755);
    FILE *f = fopen(file, "w");
    assert_non_null(f);
    fclose(f);
    md_status st = md_config_find("md_test_find.cfg", path, sizeof path);
    unlink(file);
    rmdir(folder);
    assert_int_equal(st, MD_OK);
    assert_string_equal(path, file);
    assert_int_equal(md_config_find("md_test_find.cfg", path, sizeof path), MD_ERR_NOINPUT);
    assert_non_null(strstr(md_error_text(), folder));
    assert_int_equal(md_config_find(put("here.cfg", ""), path, sizeof path), MD_OK);
    assert_string_equal(path, in_dir("here.cfg"));
    assert_int_equal(md_config_find(dir, path, sizeof path), MD_ERR_NOINPUT);
    assert_int_equal(md_config_find(in_dir("here.cfg"), path, 5), MD_ERR_NOINPUT);
}

static void words_are_matched(void **state)
{
    (void)state;
    const char *names[] = {"train", "plan", "convert"};
    assert_string_equal(md_text_nearest("trian", names, 3), "train");
    assert_string_equal(md_text_nearest("plans", names, 3), "plan");
    assert_null(md_text_nearest("evaluate", names, 3));
    assert_int_equal(md_choice_index("ab,a,abc", "a"), 1);
    assert_int_equal(md_choice_index("ab,a,abc", "abc"), 2);
    assert_int_equal(md_choice_index("ab,a,abc", "b"), -1);
    assert_int_equal(md_choice_index("ab", ""), -1);
}

/* Random edits of a good config: any answer is fine, a crash or a leak is not. */
static void mutated_files_never_crash(void **state)
{
    (void)state;
    static const char alphabet[] = "{}[]();:=,.\"\\#/*@ \n\t09afEeLx+-_\x80\xff";
    static char good[65536], text[65536 + 64];
    FILE *f = tmpfile();
    assert_int_equal(md_config_reference(f), MD_OK);
    strcpy(good, "@include \"base.cfg\"\n");
    strcat(good, text_of(f));
    size_t size = strlen(good);
    int fine = 0;
    md_config c;
    for (uint64_t i = 0; i < 10000; i++) {
        md_rng r = md_rng_at(1, MD_RNG_TEST, 0, i);
        /* A window of the text, so that an edit is not lost behind an early syntax error. */
        size_t from = md_rng_below(&r, (uint32_t)size), n = 1 + md_rng_below(&r, 600);
        n = MD_MIN(n, size - from);
        from = md_rng_below(&r, 4) ? from : 0;
        memcpy(text, good + from, n);
        for (uint32_t edits = md_rng_below(&r, 8); edits > 0; edits--) {
            size_t at = md_rng_below(&r, (uint32_t)n);
            char ch = alphabet[md_rng_below(&r, sizeof alphabet - 1)];
            if (md_rng_below(&r, 2)) {
                memmove(text + at + 1, text + at, n - at);
                n++;
            }
            text[at] = ch;
        }
        text[n] = 0;
        md_status st = load(&c, text, NULL);
        assert_true(st == MD_OK || (st == MD_ERR_CONFIG && *md_error_text()));
        fine += st == MD_OK;
        text[MD_MIN(n, 60)] = 0;
        md_status over = md_config_load(&c, NULL, 1, (char *[]){text});
        assert_true(over == MD_OK || over == MD_ERR_CONFIG);
        md_config_free(&c);
    }
    assert_in_range(fine, 1, 9999);
}

static int make_dir(void **state)
{
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_key_refuses_a_wrong_type),
        cmocka_unit_test(each_key_keeps_its_range),
        cmocka_unit_test(each_key_is_suggested_for_a_typo),
        cmocka_unit_test(written_config_reads_back_equal),
        cmocka_unit_test(values_arrive_with_their_origins),
        cmocka_unit_test(includes_that_cannot_work_are_refused),
        cmocka_unit_test(numbers_are_read_right_or_refused),
        cmocka_unit_test(broken_files_are_refused_with_their_line),
        cmocka_unit_test(all_errors_come_at_once),
        cmocka_unit_test(keys_that_do_not_fit_are_refused),
        cmocka_unit_test(overrides_are_typed_like_files),
        cmocka_unit_test(reference_is_current_and_complete),
        cmocka_unit_test(shipped_configs_are_valid),
        cmocka_unit_test(help_and_diff_walk_the_table),
        cmocka_unit_test(configs_are_found_beside_the_program),
        cmocka_unit_test(words_are_matched),
        cmocka_unit_test(mutated_files_never_crash),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
