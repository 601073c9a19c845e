/* snapshot: see snapshot.h. Counters travel as facts (text attributes), so that a file tells what
 * it is without this program. */
#include "src/snapshot.h"
#include "mpi/agree.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* X(field of md_train_state): the counters kept. */
#define COUNTERS(X) X(updates) X(skipped) X(skipped_in_row) X(bad_images) X(bad_in_epoch)

/* The arrays of every parameter; the last where a moving average is kept. */
enum { PARAM, ADAM_M, ADAM_V, EMA, PARTS };
static const char *const part_names[PARTS] = {"param", "adam_m", "adam_v", "ema"};

/* Which elements of a row an item carries: those this rank answers for (writing), or all that it
 * holds (reading). Values are held whole, moments by what the rank updates. */
static void choose(const md_snapshot *s, const md_param *row, int part, bool writing,
                   md_state_item *item)
{
    const md_params *p = s->params;
    const md_shard *h = s->shard;
    float *const block[PARTS] = {p->host_value, p->host_m, p->host_v, p->host_ema};
    int64_t moment = 0;
    item->lo = 0;
    item->count = row->count;
    if (writing)
        item->count = md_shard_find(h->own, h->owns, row, &item->lo, &moment);
    else if (part > 0)
        item->count = md_shard_find(h->update, h->updates, row, &item->lo, &moment);
    item->data = block[part] + (part == 0 ? row->offset + item->lo : moment);
}

/* The first `parts` arrays of every parameter as items. */
static md_status items_make(const md_snapshot *s, bool writing, int parts, md_state_list *l)
{
    const md_params *p = s->params;
    MD_TRY(md_state_list_make(PARTS * p->count, l));
    for (int k = 0; k < parts; k++)
        for (int i = 0; i < p->count; i++) {
            const md_param *row = &p->row[i];
            char *name = l->name[l->count];
            snprintf(name, MD_STATE_NAME, "%s/%s", part_names[k], row->name);
            md_state_item *item = &l->item[l->count++];
            *item = (md_state_item){
                .name = name, .dtype = MD_F32, .rank = row->rank, .view = row->view};
            memcpy(item->global, row->global, sizeof item->global);
            choose(s, row, k, writing, item);
        }
    return MD_OK;
}

static md_status checkpoint_dir(const md_snapshot *s, char *dir, size_t size, bool make)
{
    if ((size_t)snprintf(dir, size, "%s/checkpoints", s->dir) >= size)
        MD_FAIL(MD_ERR_CREATE, "the path of the run directory is too long: %s", s->dir);
    if (make && md_comm_rank(s->comm) == 0 && mkdir(dir, 0777) != 0 && errno != EEXIST)
        MD_FAIL(MD_ERR_CREATE, "cannot make %s: %s", dir, strerror(errno));
    return MD_OK;
}

/* ---- facts ---- */

enum { FACTS = 24, FACT_SIZE = 32 };
typedef struct fact_list {
    md_fact fact[FACTS];
    char text[FACTS][FACT_SIZE];
    int count;
} fact_list;

static void add_fact(fact_list *l, const char *name, const char *fmt, long long value)
{
    MD_ASSERT(l->count < FACTS);
    char *text = l->text[l->count];
    snprintf(text, FACT_SIZE, fmt, value);
    l->fact[l->count++] = (md_fact){name, text};
}

static void facts_make(const md_snapshot *s, fact_list *l)
{
    const md_train_state *state = s->state;
    l->count = 0;
    add_fact(l, "model", "%016llx", (long long)md_params_hash(s->params));
    add_fact(l, "parameters", "%lld", (long long)md_params_total(s->params));
    add_fact(l, "data", "%016llx", (long long)s->data_hash);
    add_fact(l, "seed", "%lld", (long long)s->config->run_seed);
    add_fact(l, "batch", "%lld", (long long)s->config->train_batch);
#define COUNTER_FACT(field) add_fact(l, #field, "%lld", (long long)state->field);
    COUNTERS(COUNTER_FACT)
#undef COUNTER_FACT
    l->fact[l->count++] = (md_fact){"teacher", s->teacher_hash};
    l->fact[l->count++] = (md_fact){"program", "md_hpc " MD_VERSION};
}

/* ---- the same experiment? ---- */

/* A checkpoint and this run. */
typedef struct comparison {
    const md_checkpoint *ck;
    bool own; /* of this run directory; else a new run starts from it, and may differ */
    char text[3072];
    size_t used;
} comparison;

static md_status compare_facts(const md_snapshot *s, const comparison *d)
{
    static const struct {
        const char *name, *what;
        bool always; /* it could not be read */
    } must[] = {{"model", "another model (parameters of other names or shapes)", true},
                {"data", "another image store than data.train", false},
                {"teacher", "another teacher than method.teacher.weights", false}};
    const char *path = md_checkpoint_path(d->ck);
    fact_list now;
    facts_make(s, &now);
    for (size_t i = 0; i < MD_COUNT(must); i++)
        for (int k = 0; k < now.count; k++) {
            const char *then = md_checkpoint_fact(d->ck, must[i].name);
            if (strcmp(now.fact[k].name, must[i].name) != 0 ||
                (then && strcmp(then, now.fact[k].value) == 0))
                continue;
            if (d->own || must[i].always)
                MD_FAIL(MD_ERR_CONFIG, "%s was trained with %s%s", path, must[i].what,
                        d->own ? ": choose another run.dir" : "");
            md_log_warn("%s was trained with %s", path, must[i].what);
        }
    return MD_OK;
}

static void note_difference(void *arg, bool experiment, const char *key, const char *was,
                            const char *now)
{
    comparison *d = arg;
    if (!experiment || !d->own) {
        md_log_warn("%s was %s and is now %s", key, was, now);
        return;
    }
    size_t room = sizeof d->text - d->used;
    int n = snprintf(d->text + d->used, room, "\n    %s was %s and is now %s", key, was, now);
    d->used += MD_MIN((size_t)n, room - 1);
}

/* Local, the same on all ranks. Within a run directory, what would silently make another experiment
 * is refused; what may be tuned is warned about. */
static md_status compare(const md_snapshot *s, comparison *d)
{
    const char *config = md_checkpoint_config(d->ck);
    MD_TRY(compare_facts(s, d));
    if (*config)
        MD_TRY(md_config_compare(s->config, config, note_difference, d));
    if (d->used)
        MD_FAIL(MD_ERR_CONFIG,
                "%s belongs to another experiment: choose another run.dir, or set the values it "
                "was trained with:%s",
                md_checkpoint_path(d->ck), d->text);
    return MD_OK;
}

static md_status read_counters(md_train_state *state, const md_checkpoint *ck)
{
    const char *text;
#define COUNTER_READ(field)                                                             \
    if (!(text = md_checkpoint_fact(ck, #field)))                                       \
        MD_FAIL(MD_ERR_DATA, "%s has no attribute %s", md_checkpoint_path(ck), #field); \
    state->field = atoll(text);
    COUNTERS(COUNTER_READ)
#undef COUNTER_READ
    state->step = md_checkpoint_step(ck);
    return MD_OK;
}

/* ---- public ---- */

md_status md_snapshot_write(const md_snapshot *s, char *path, size_t size)
{
    char dir[1024], *text = NULL;
    md_state_list items = {0};
    fact_list facts;
    md_status st = checkpoint_dir(s, dir, sizeof dir, true);
    if (st == MD_OK)
        st = md_params_fetch(s->params);
    if (st == MD_OK)
        st = items_make(s, true, s->params->ema ? PARTS : EMA, &items);
    if (st == MD_OK)
        st = md_config_text(s->config, &text);
    st = md_agree(s->comm, st);
    if (st == MD_OK) {
        facts_make(s, &facts);
        st = md_checkpoint_write(
            &(md_checkpoint_args){.comm = s->comm,
                                  .dir = dir,
                                  .step = s->state->step,
                                  .item = items.item,
                                  .items = items.count,
                                  .config = text,
                                  .fact = facts.fact,
                                  .facts = facts.count,
                                  .keep = (int)s->config->checkpoint_keep,
                                  .keep_every = s->config->checkpoint_keep_every});
    }
    if (st == MD_OK)
        md_checkpoint_name(path, size, dir, s->state->step);
    md_state_list_free(&items);
    free(text);
    return st;
}

static md_status read_state(const md_snapshot *s, md_checkpoint *ck, bool own)
{
    md_state_list items = {0};
    comparison d = {.ck = ck, .own = own};
    char name[MD_STATE_NAME];
    snprintf(name, sizeof name, "%s/%s", part_names[EMA], s->params->row[0].name);
    const bool averaged = s->params->ema && md_checkpoint_entry(ck, name);
    md_status st = compare(s, &d);
    if (st == MD_OK)
        st = items_make(s, false, averaged ? PARTS : EMA, &items);
    st = md_agree(s->comm, st);
    if (st == MD_OK)
        st = md_checkpoint_read(ck, items.item, items.count);
    if (st == MD_OK)
        st = md_agree(s->comm, md_params_store(s->params));
    md_state_list_free(&items);
    MD_TRY(st);
    *s->averaged = averaged;
    return read_counters(s->state, ck);
}

/* Collective(comm). A new run may not begin over the checkpoints of another one. */
static md_status expect_none(const md_snapshot *s, const char *dir)
{
    md_status st = MD_OK;
    int64_t *steps = NULL;
    int n = 0;
    if (md_comm_rank(s->comm) == 0 && md_checkpoint_list(dir, &steps, &n) == MD_OK && n > 0)
        st = md_error_set(MD_ERR_CONFIG,
                          "checkpoint.resume = none, but %s holds checkpoints up to step %lld: "
                          "choose another run.dir to start anew, or checkpoint.resume = auto to go "
                          "on",
                          dir, (long long)steps[0]);
    md_free(steps);
    return md_agree(s->comm, st);
}

md_status md_snapshot_resume(const md_snapshot *s, char *path, size_t size)
{
    const char *where = s->config->checkpoint_resume;
    const bool automatic = strcmp(where, "auto") == 0;
    char dir[1024];
    md_checkpoint *ck;
    path[0] = 0;
    MD_TRY(md_agree(s->comm, checkpoint_dir(s, dir, sizeof dir, false)));
    if (strcmp(where, "none") == 0)
        return expect_none(s, dir);
    md_status st = md_checkpoint_find(s->comm, dir, md_checkpoint_warn_skipped, NULL, &ck);
    const bool own = st != MD_ERR_NOINPUT;
    if (!own && automatic)
        return MD_OK;
    if (!own)
        st = md_checkpoint_find(s->comm, where, md_checkpoint_warn_skipped, NULL, &ck);
    MD_TRY(st);
    if (own && !automatic)
        md_log_info("checkpoint.resume = %s is not used: %s has checkpoints of its own", where,
                    s->dir);
    st = read_state(s, ck, own);
    if (st == MD_OK)
        snprintf(path, size, "%s", md_checkpoint_path(ck));
    md_checkpoint_close(ck);
    return st;
}
