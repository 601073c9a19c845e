/* Config files as wholes: origins, includes, numbers, broken files, keys that do not fit together,
 * overrides, where files are found. */
#include "tests/unit/config_load.h"

#include <stdio.h>
#include <sys/stat.h>

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
        {"augment = { randaugment = 2; };", "set augment.jitter = 0"},
        {"augment = { randaugment = 2; jitter = 0.0; };", NULL},
        {"optim = { warmup_epochs = 300; };", "optim.warmup_epochs = 300 must be less than"},
        {"optim = { warmup_epochs = 0; }; train = { epochs = 1; };", NULL},
        {"optim = { lr = 1e-6; };", "optim.min_lr = 1e-05 must not exceed optim.lr = 1e-06"},
        {"train = { batch = 10; micro_batch = 4; };", "train.micro_batch = 4 must divide"},
        {"train = { batch = 12; micro_batch = 4; };", NULL},
        {"train = { recompute = 13; };", "train.recompute = 13 must not exceed the model's 12"},
        {"train = { recompute = 12; };", NULL},
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_arrive_with_their_origins),
        cmocka_unit_test(includes_that_cannot_work_are_refused),
        cmocka_unit_test(numbers_are_read_right_or_refused),
        cmocka_unit_test(broken_files_are_refused_with_their_line),
        cmocka_unit_test(all_errors_come_at_once),
        cmocka_unit_test(keys_that_do_not_fit_are_refused),
        cmocka_unit_test(overrides_are_typed_like_files),
        cmocka_unit_test(configs_are_found_beside_the_program),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
