/* method_config: configs and a teacher for tests of methods. */
#ifndef MD_METHOD_CONFIG_H
#define MD_METHOD_CONFIG_H

#include "src/method.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

/* A config of defaults plus overrides; the caller frees it. */
static inline void config_with(md_config *c, int n, const char *const *overrides)
{
    assert_int_equal(md_config_init(c), MD_OK);
    md_status st = md_config_load(c, NULL, n, (char *const *)overrides);
    if (st != MD_OK)
        fail_msg("%s", md_error_text());
}
#define CONFIG(c, ...) \
    config_with((c), (int)MD_COUNT(((const char *[]){__VA_ARGS__})), (const char *[]){__VA_ARGS__})

static inline md_teacher_info clip_l14(void)
{
    md_teacher_info t = {.grid = 16, .proj_width = 768};
    t.spec = (md_vit_spec){.patch = 14,
                           .width = 1024,
                           .layers = 24,
                           .heads = 16,
                           .mlp = 4096,
                           .rel_pos = MD_REL_NONE,
                           .abs_pos = true,
                           .pre_norm = true,
                           .act = MD_ACT_QUICK_GELU,
                           .ln_eps = 1e-5f};
    return t;
}

#endif
