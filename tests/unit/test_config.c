/* Config keys: every key of the table is tried with a typo, a wrong type, values out of range and
 * good values, through files and overrides; then writing, the reference, help, and 10,000 mutated
 * files. */
#include "tests/unit/config_load.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>

#include "src/config_table.h"
#include "src/rng.h"

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

/* Name of the first key whose values differ, or "". */
static const char *difference(const md_config *a, const md_config *b)
{
    for (int i = 0; i < md_key_count; i++) {
        const md_key *k = &md_keys[i];
        const char *x = (const char *)a + k->offset, *y = (const char *)b + k->offset;
        bool text = k->type == MD_KEY_STR || k->type == MD_KEY_CHOICE;
        if (text ? strcmp(x, y) != 0 : memcmp(x, y, k->size) != 0)
            return k->name;
    }
    return "";
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
        assert_string_not_equal(difference(&a, &b), "");
        /* Values a third up their ranges need not fit together: only the cross checks may object.
         */
        if (md_config_load(&b, path, 0, NULL) != MD_OK)
            assert_int_not_equal(md_config_check(&b), MD_OK);
        assert_string_equal(difference(&a, &b), "");
        md_config_free(&a);
        md_config_free(&b);
    }
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

typedef struct differences {
    int experiment, tuned;
    char text[4096];
} differences;

static void count(void *arg, bool experiment, const char *key, const char *was, const char *now)
{
    differences *d = arg;
    experiment ? d->experiment++ : d->tuned++;
    if (strlen(d->text) < sizeof d->text / 2)
        sprintf(strchr(d->text, 0), "%s: %.99s -> %.99s\n", key, was, now);
}

static differences compared(const md_config *c, const char *text)
{
    differences d = {0};
    assert_int_equal(md_config_compare(c, text, count, &d), MD_OK);
    return d;
}

static void a_run_is_compared_with_its_past(void **state)
{
    (void)state;
    md_config c, other;
    accepted(&c, NULL, "optim.lr=0.25");
    FILE *f = tmpfile();
    assert_int_equal(md_config_write(&c, f, false), MD_OK);
    const char *same = text_of(f);
    assert_string_equal(compared(&c, same).text, "");
    /* What a key had before it existed, and keys that are no more. */
    assert_string_equal(compared(&c, "optim = { lr = 0.25; old = 1; }; gone = { x = 2; };").text,
                        "");
    assert_string_equal(compared(&c, "method = { mask = { ratio = 0.75; }; };").text,
                        "method.mask.ratio: 0.75 -> 0.4\noptim.lr: 0.0015 -> 0.25\n");
    differences d = {0};
    assert_int_equal(md_config_compare(&c, "optim = {", count, &d), MD_ERR_DATA);
    md_config_free(&c);
    /* Every key at another value: each counts as its group says. A choice of one has no other. */
    fill(&other);
    d = compared(&other, same);
    int experiment = 0, tuned = 0;
    for (int i = 0; i < md_key_count; i++) {
        const md_key *k = &md_keys[i];
        static const char *const may[] = {"train.max_steps",        "train.micro_batch",
                                          "model.last_block",       "method.teacher.arch",
                                          "method.teacher.weights", "finetune.from",
                                          "model.drop_path_mode",   "train.recompute"};
        bool free = k->type == MD_KEY_CHOICE && !strchr(k->unit, ',');
        for (size_t j = 0; j < MD_COUNT(may); j++)
            free |= strcmp(k->name, may[j]) == 0;
        if (free)
            continue;
        static const char *const groups[] = {"model.",     "method.",  "augment.", "image.",
                                             "data.split", "run.seed", "task",     "finetune."};
        for (size_t j = 0; j < MD_COUNT(groups); j++)
            experiment += strncmp(k->name, groups[j], strlen(groups[j])) == 0;
        tuned += strncmp(k->name, "optim.", 6) == 0 || strncmp(k->name, "train.", 6) == 0;
    }
    assert_in_range(experiment, 30, 100);
    assert_int_equal(d.experiment, experiment);
    assert_int_equal(d.tuned, tuned);
    md_config_free(&other);
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
    assert_string_equal(difference(&c, &defaults), "");
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_key_refuses_a_wrong_type),
        cmocka_unit_test(each_key_keeps_its_range),
        cmocka_unit_test(each_key_is_suggested_for_a_typo),
        cmocka_unit_test(written_config_reads_back_equal),
        cmocka_unit_test(a_run_is_compared_with_its_past),
        cmocka_unit_test(reference_is_current_and_complete),
        cmocka_unit_test(shipped_configs_are_valid),
        cmocka_unit_test(help_and_diff_walk_the_table),
        cmocka_unit_test(words_are_matched),
        cmocka_unit_test(mutated_files_never_crash),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
