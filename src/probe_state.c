/* probe_state: see probe_state.h. */
#include "src/probe_state.h"
#include "io/checkpoint.h"
#include "mpi/agree.h"
#include "src/log.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the folder ---- */

md_status md_probe_state_take(md_probe_state *s)
{
    md_status st = MD_OK;
    if (md_comm_rank(s->topo->world) == 0) {
        st = md_run_dir_make(s->dir);
        if (st == MD_OK)
            st = md_run_lock_take(s->dir, "evaluate.output", &s->lock);
    }
    return md_agree(s->topo->world, st);
}

void md_probe_state_release(md_probe_state *s)
{
    md_run_lock_release(s->lock);
    s->lock = NULL;
}

/* ---- what a probe is ---- */

/* The newest one may turn out to be damaged. */
#define KEPT 2

enum { FACTS = 9, FACT_SIZE = 32 };

typedef struct fact_list {
    md_fact fact[FACTS];
    char number[FACTS][FACT_SIZE];
    int count;
} fact_list;

static void add_text(fact_list *l, const char *name, const char *value)
{
    MD_ASSERT(l->count < FACTS);
    l->fact[l->count++] = (md_fact){name, value};
}

static void add_integer(fact_list *l, const char *name, int64_t value)
{
    char *text = l->number[l->count];
    snprintf(text, FACT_SIZE, "%" PRId64, value);
    add_text(l, name, text);
}

static void facts_make(const md_probe_state *s, fact_list *l)
{
    const md_config *c = s->config;
    l->count = 0;
    add_text(l, "recipe", c->evaluate_probe_recipe);
    add_integer(l, "epochs", s->rule->epochs);
    add_integer(l, "batch", s->rule->batch);
    snprintf(l->number[l->count], FACT_SIZE, "%.17g", s->rule->lr);
    add_text(l, "rate", l->number[l->count]);
    add_text(l, "feature", s->rule->blocks ? "blocks" : c->evaluate_feature);
    add_text(l, "encoder", s->encoder);
    add_text(l, "precision", md_dtype_name(md_config_compute(c)));
    snprintf(l->number[l->count], FACT_SIZE, "%016" PRIx64, s->data);
    add_text(l, "images", l->number[l->count]);
    add_text(l, "program", "md_hpc " MD_VERSION);
}

/* The first difference, empty where there is none. */
typedef struct difference {
    char text[256];
} difference;

static void differs(difference *d, const char *name, const char *was, const char *now)
{
    if (!*d->text)
        snprintf(d->text, sizeof d->text, "%s was %s and is now %s", name, was, now);
}

/* Keys that a probe's features and first weights come from, beside its facts. */
static void note_key(void *arg, bool experiment, const char *key, const char *was, const char *now)
{
    static const char *const begin[] = {"model.", "image.", "run.seed", "data.split"};
    (void)experiment;
    for (size_t i = 0; i < MD_COUNT(begin); i++)
        if (strncmp(key, begin[i], strlen(begin[i])) == 0)
            differs(arg, key, was, now);
}

/* Local. */
static md_status compare(const md_probe_state *s, const md_checkpoint *ck, difference *d)
{
    fact_list now;
    d->text[0] = 0;
    facts_make(s, &now);
    for (int i = 0; i < now.count; i++) {
        const md_fact *f = &now.fact[i];
        const char *was = md_checkpoint_fact(ck, f->name);
        if (strcmp(f->name, "program") != 0 && (!was || strcmp(was, f->value) != 0))
            differs(d, f->name, was ? was : "none", f->value);
    }
    return md_config_compare(s->config, md_checkpoint_config(ck), note_key, d);
}

/* ---- its arrays ---- */

/* `has`: this rank has the values, or takes them. */
static void add_item(md_state_list *l, const char *name, const md_tensor *t, bool has)
{
    md_state_item *item = &l->item[l->count];
    snprintf(l->name[l->count], MD_STATE_NAME, "%s", name);
    *item = md_state_item_make(l->name[l->count], t);
    if (!has)
        item->count = 0;
    l->count++;
}

/* Every array is written by one rank, and read by those that train its head. */
static md_status items_make(const md_probe_state *s, bool writing, double *loss, md_state_list *l)
{
    const md_topo *t = s->topo;
    const int arrays = md_probe_heads_arrays(s->heads), all = s->n * arrays + 2;
    const bool first = t->dp_rank == 0 && t->tp_rank == 0;
    const md_tensor sums = MD_TENSOR(loss, MD_F64, s->n + 1);
    const md_tensor epoch = MD_TENSOR(s->train_loss, MD_F64, s->n);
    MD_TRY(md_state_list_make(all, l));
    for (int k = 0; k < s->n; k++)
        for (int i = 0; i < arrays; i++) {
            const md_probe_array a = md_probe_heads_array(s->heads, k, i);
            char name[MD_STATE_NAME];
            snprintf(name, sizeof name, "%s/head.%d.%s", a.group, k, a.name);
            add_item(l, name, &a.value, a.value.data && !(writing && t->tp_rank > 0));
        }
    add_item(l, "loss/running", &sums, first || !writing);
    add_item(l, "loss/epoch", &epoch, first || !writing);
    return MD_OK;
}

/* Keeps what this rank adds to a sum over all of them. */
static void keep_own(const md_probe_state *s, const double *sum)
{
    const md_topo *t = s->topo;
    for (int k = 0; k < s->n; k++)
        s->loss[k] = k % t->dp_size == t->dp_rank ? sum[k] : 0;
    s->loss[s->n] = t->dp_rank == 0 && t->tp_rank == 0 ? sum[s->n] : 0;
}

static md_status read_state(md_probe_state *s, md_checkpoint *ck)
{
    md_comm *world = s->topo->world;
    md_state_list items = {0};
    double *sum = md_alloc((size_t)(s->n + 1) * sizeof *sum, "losses");
    md_status st = sum ? items_make(s, false, sum, &items) : MD_ERR_MEMORY;
    st = md_agree(world, st);
    if (st == MD_OK)
        st = md_checkpoint_read(ck, items.item, items.count);
    if (st == MD_OK) {
        keep_own(s, sum);
        st = md_agree(world, md_probe_heads_store(s->heads, md_checkpoint_step(ck)));
    }
    md_state_list_free(&items);
    md_free(sum);
    return st;
}

/* Whatever step it was at, it may not be taken for this one's later. */
static md_status leave_aside(const md_probe_state *s, const char *path, const char *how)
{
    md_comm *world = s->topo->world;
    md_log_warn("%s is of another probe, which this one takes the place of: %s", path, how);
    return md_agree(world, md_comm_rank(world) == 0 ? md_checkpoint_abandon(s->dir, -1) : MD_OK);
}

md_status md_probe_state_resume(md_probe_state *s, int64_t *step)
{
    md_comm *world = s->topo->world;
    md_checkpoint *ck;
    difference d;
    *step = 0;
    md_status st = md_checkpoint_find(world, s->dir, md_checkpoint_warn_skipped, NULL, &ck);
    if (st == MD_ERR_NOINPUT)
        return MD_OK;
    MD_TRY(st);
    st = md_agree(world, compare(s, ck, &d));
    if (st == MD_OK && *d.text) {
        st = leave_aside(s, md_checkpoint_path(ck), d.text);
    } else if (st == MD_OK && (st = read_state(s, ck)) == MD_OK) {
        *step = md_checkpoint_step(ck);
        md_log_info("probe: goes on from %s", md_checkpoint_path(ck));
    }
    md_checkpoint_close(ck);
    return st;
}

md_status md_probe_state_save(md_probe_state *s, int64_t step)
{
    const md_topo *t = s->topo;
    char *text = NULL;
    md_state_list items = {0};
    fact_list facts;
    double *sum = md_alloc((size_t)(s->n + 1) * sizeof *sum, "losses");
    md_status st = sum ? md_probe_heads_fetch(s->heads) : MD_ERR_MEMORY;
    if (st == MD_OK)
        st = items_make(s, true, sum, &items);
    if (st == MD_OK)
        st = md_config_text(s->config, &text);
    st = md_agree(t->world, st);
    if (st == MD_OK) {
        /* Ranks that share a model have the same losses, and each its own images. */
        memcpy(sum, s->loss, (size_t)(s->n + 1) * sizeof *sum);
        md_comm_allreduce(t->tp, sum + s->n, 1, MD_F64, MD_SUM);
        md_comm_allreduce(t->dp, sum, s->n + 1, MD_F64, MD_SUM);
        facts_make(s, &facts);
        st = md_checkpoint_write(&(md_checkpoint_args){.comm = t->world,
                                                       .dir = s->dir,
                                                       .step = step,
                                                       .item = items.item,
                                                       .items = items.count,
                                                       .config = text,
                                                       .fact = facts.fact,
                                                       .facts = facts.count,
                                                       .keep = KEPT});
    }
    md_state_list_free(&items);
    md_free(sum);
    free(text);
    return st;
}
