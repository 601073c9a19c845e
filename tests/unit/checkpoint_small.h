/* checkpoint_small: the small state with which the unit tests of checkpoints fill a folder, step by
 * step, and what they look for in it. */
#ifndef MD_CHECKPOINT_SMALL_H
#define MD_CHECKPOINT_SMALL_H

#include "tests/checkpoint_state.h"

static md_comm *self;

/* ---- one rank's small state: 2 x 300 kB and some small arrays ---- */

enum { LONG = 76801 };
typedef struct small_state {
    float w[257 * 3], big[LONG], m[LONG];
    int64_t counter;
    uint8_t mask[5];
} small_state;

static inline void fill(small_state *s, int64_t step)
{
    for (int i = 0; i < 257 * 3; i++)
        s->w[i] = (float)(i + step);
    for (int i = 0; i < LONG; i++) {
        s->big[i] = (float)((i * 7 + step) % 1000) * 0.25f;
        s->m[i] = (float)(step - i);
    }
    s->counter = step;
    memcpy(s->mask, "\1\2\3\4\5", 5);
}

static inline int items_of(small_state *s, md_state_item it[5])
{
    const md_tensor t[] = {MD_TENSOR(s->w, MD_F32, 257, 3), MD_TENSOR(s->big, MD_F32, LONG),
                           MD_TENSOR(s->m, MD_F32, LONG), MD_TENSOR(&s->counter, MD_I64, 1),
                           MD_TENSOR(s->mask, MD_U8, 5)};
    static const char *const name[] = {"param/w", "param/blocks.0.big", "m/blocks.0.big", "counter",
                                       "mask"};
    for (int i = 0; i < 5; i++)
        it[i] = md_state_item_make(name[i], &t[i]);
    return 5;
}

static inline md_status write_step(int64_t step, int keep, int64_t keep_every)
{
    static small_state s;
    md_state_item it[5];
    fill(&s, step);
    md_fact fact[] = {{"dataset_hash", "0011223344556677"}, {"version", MD_VERSION "+"}};
    return md_checkpoint_write(&(md_checkpoint_args){.comm = self,
                                                     .dir = dir,
                                                     .step = step,
                                                     .item = it,
                                                     .items = items_of(&s, it),
                                                     .config = "model = \"tiny\";\n",
                                                     .fact = fact,
                                                     .facts = 1,
                                                     .keep = keep,
                                                     .keep_every = keep_every});
}

/* Reads a checkpoint and compares it with what step `step` wrote. */
static inline void check_content(md_checkpoint *ck, int64_t step)
{
    static small_state got, want;
    md_state_item it[5];
    memset(&got, 0, sizeof got);
    fill(&want, step);
    assert_ok(md_checkpoint_read(ck, it, items_of(&got, it)));
    assert_memory_equal(got.w, want.w, sizeof want.w);
    assert_memory_equal(got.big, want.big, sizeof want.big);
    assert_memory_equal(got.m, want.m, sizeof want.m);
    assert_int_equal(got.counter, want.counter);
    assert_memory_equal(got.mask, want.mask, sizeof want.mask);
}

static char skipped[4][512];
static int skips;
static inline void on_skip(void *arg, const char *path, const char *reason)
{
    (void)arg, (void)path;
    snprintf(skipped[skips++ % 4], sizeof skipped[0], "%s", reason);
}

static inline int64_t newest(void)
{
    md_checkpoint *ck;
    skips = 0;
    if (md_checkpoint_find(self, dir, on_skip, NULL, &ck) != MD_OK)
        return -1;
    int64_t step = md_checkpoint_step(ck);
    check_content(ck, step);
    md_checkpoint_close(ck);
    return step;
}

static inline int setup(void **st)
{
    (void)st;
    empty_dir();
    return 0;
}

#endif
