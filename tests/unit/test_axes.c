/* test_axes: the method axes: every choice has its row, and what does not fit is refused in words.
 */
#include "tests/unit/method_config.h"

#include <stdio.h>
#include <string.h>

static bool has_row(const char *key, const char *name)
{
    if (strcmp(key, "method.teacher.kind") == 0)
        return md_teacher_find(name);
    if (strcmp(key, "method.target.norm") == 0)
        return md_target_find(name);
    if (strcmp(key, "method.mask.kind") == 0)
        return md_mask_kind_find(name);
    if (strcmp(key, "method.student.mode") == 0)
        return md_student_find(name);
    if (strcmp(key, "method.head.kind") == 0)
        return md_head_find(name);
    return strcmp(key, "method.loss.kind") != 0 || md_loss_find(name);
}

/* Every choice a key offers has its row in the axis table. */
static void test_axis_tables(void **state)
{
    (void)state;
    static const struct {
        const char *key, *choices;
    } keys[] = {
#define X(field, key, type, def, min, max, unit, help) {key, unit},
#include "src/config_keys.h"
#undef X
    };
    for (size_t i = 0; i < MD_COUNT(keys); i++) {
        char list[256];
        snprintf(list, sizeof list, "%s", keys[i].choices);
        for (char *save, *name = strtok_r(list, ",", &save); name;
             name = strtok_r(NULL, ",", &save))
            if (!has_row(keys[i].key, name))
                fail_msg("%s = %s has no row", keys[i].key, name);
    }
    assert_null(md_loss_find("l3"));
}

static void expect_refused(const char *words, int n, const char *const *overrides,
                           const md_teacher_info *info)
{
    md_config c;
    md_method m;
    config_with(&c, n, overrides);
    assert_int_equal(md_method_resolve(&m, &c, info, NULL), MD_ERR_CONFIG);
    if (!strstr(md_error_text(), words))
        fail_msg("\"%s\" does not say \"%s\"", md_error_text(), words);
    md_method_free(&m);
    md_config_free(&c);
}
#define REFUSED(words, info, ...)                                           \
    expect_refused((words), (int)MD_COUNT(((const char *[]){__VA_ARGS__})), \
                   (const char *[]){__VA_ARGS__}, (info))

static void test_axes_that_do_not_fit(void **state)
{
    (void)state;
    md_teacher_info t = clip_l14(), plain = clip_l14(), bare = clip_l14(), beit = clip_l14();
    plain.proj_width = 0;
    bare.norm = MD_NORM_NONE;
    beit.spec.rel_pos = MD_REL_SHARED;
    REFUSED("method.teacher.image_size = 196", &t, "method.teacher.image_size=224");
    REFUSED("method.teacher.weights", NULL, "model.layers=2");
    REFUSED("no projection", &plain, "method.teacher.stage=ln_post_proj");
    REFUSED("holds no final norm", &bare, "method.teacher.stage=ln_post");
    REFUSED("are for 16 x 16 patches, the student (image.size 224, model.patch 16) has 14 x 14",
            &beit, "model.layers=2");
    REFUSED("24 blocks", &t, "method.teacher.layers=25");
    REFUSED("leave the key at 0", NULL, "method.teacher.kind=pixel",
            "method.teacher.image_size=196");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_axis_tables),
        cmocka_unit_test(test_axes_that_do_not_fit),
    };
    return cmocka_run_group_tests_name("axes", tests, NULL, NULL);
}
