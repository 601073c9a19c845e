/* evaluate: see evaluate.h. */
#include "src/evaluate.h"
#include "mpi/agree.h"
#include "src/watchdog.h"

#include <math.h>
#include <string.h>

struct md_evaluator {
    md_evaluator_args args;
    md_dataset *data;
    md_viewer *viewer;
    md_run_lock *lock;
};

/* 224 of 256, as the published numbers were made; whole pictures from 384 pixels on
 * (microsoft/unilm, beit2/datasets.py). */
static int resize_of(const md_config *c)
{
    if (c->evaluate_resize)
        return (int)c->evaluate_resize;
    return c->image_size >= 384 ? (int)c->image_size : (int)((double)c->image_size / 0.875);
}

int64_t md_evaluator_images(const md_topo *topo, int64_t images)
{
    return (images + topo->tp_size - 1) / topo->tp_size * topo->tp_size;
}

md_evaluator_args md_evaluator_of_run(const md_config *c, const md_method *m, md_backend *be,
                                      const md_topo *topo, int64_t micro)
{
    return (md_evaluator_args){
        .config = c,
        .method = m,
        .backend = be,
        .topo = topo,
        .data = *c->evaluate_data ? c->evaluate_data : c->data_train,
        .split = c->evaluate_split,
        .sight = MD_SIGHT_LOGITS,
        .images = md_evaluator_images(topo, c->evaluate_batch ? c->evaluate_batch : micro)};
}

md_status md_labels_check(const md_dataset *d, const char *path, const char *split)
{
    const int classes = md_dataset_classes(d);
    const int64_t n = md_dataset_count(d);
    for (int64_t i = 0; i < n; i++)
        if (md_dataset_label(d, i) < 0 || md_dataset_label(d, i) >= classes)
            MD_FAIL(MD_ERR_DATA, "%s: image %lld of split \"%s\" has no label", path, (long long)i,
                    split);
    return MD_OK;
}

md_status md_evaluator_create(const md_evaluator_args *args, md_evaluator **out)
{
    md_evaluator *e = md_alloc(sizeof *e, "evaluator");
    md_comm *world = args->topo->world;
    *out = NULL;
    MD_TRY(md_agree(world, e ? MD_OK : MD_ERR_MEMORY));
    e->args = *args;
    md_status st = md_dataset_open(args->data, args->split, world, &e->data);
    if (st == MD_OK)
        st = md_agree(world, md_labels_check(e->data, args->data, args->split));
    if (st == MD_OK)
        st = md_agree(world, md_viewer_create(&(md_viewer_args){.method = args->method,
                                                                .backend = args->backend,
                                                                .topo = args->topo,
                                                                .sight = args->sight,
                                                                .images = args->images},
                                              &e->viewer));
    if (st != MD_OK) {
        md_evaluator_free(e);
        return st;
    }
    *out = e;
    return MD_OK;
}

void md_evaluator_free(md_evaluator *e)
{
    if (!e)
        return;
    md_viewer_free(e->viewer);
    md_dataset_close(e->data);
    md_free(e);
}

const md_dataset *md_evaluator_data(const md_evaluator *e)
{
    return e->data;
}

int64_t md_evaluator_count(const md_evaluator *e)
{
    const int64_t n = md_dataset_count(e->data);
    return e->args.limit ? MD_MIN(e->args.limit, n) : n;
}

int64_t md_evaluator_share(const md_evaluator *e)
{
    const int64_t batch = e->args.images * e->args.topo->dp_size;
    return (md_evaluator_count(e) + batch - 1) / batch * e->args.images;
}

int md_evaluator_width(const md_evaluator *e)
{
    return md_viewer_width(e->viewer);
}

void md_evaluator_hold(md_evaluator *e, md_run_lock *lock)
{
    e->lock = lock;
}

md_source md_evaluator_source(const md_evaluator *e)
{
    return md_dataset_source(e->data, false);
}

md_viewer *md_evaluator_viewer(const md_evaluator *e)
{
    return e->viewer;
}

md_status md_evaluator_same_classes(const md_evaluator *train, const md_evaluator *test)
{
    const int from = md_dataset_classes(train->data), to = md_dataset_classes(test->data);
    if (from != to)
        MD_FAIL(MD_ERR_CONFIG,
                "the images to learn from (data.train) have %d classes, those that are judged "
                "(evaluate.data) have %d",
                from, to);
    return MD_OK;
}

/* ---- looking at all images ---- */

static md_loader_args loader_of(const md_evaluator_args *a, const md_source *images)
{
    const md_topo *t = a->topo;
    md_loader_args loader = {.source = *images,
                             .dp_rank = t->dp_rank,
                             .dp_size = t->dp_size,
                             .tp_rank = t->tp_rank,
                             .tp_size = t->tp_size,
                             .micro_batch = a->images};
    md_loader_configure(&loader, a->config, 0);
    loader.batch = a->images * t->dp_size;
    loader.sequential = true;
    loader.rule.eval_resize = resize_of(a->config);
    return loader;
}

static md_status make_loader(const md_evaluator *e, md_loader **out)
{
    const md_source images = md_evaluator_source(e);
    const md_loader_args loader = loader_of(&e->args, &images);
    return md_loader_create(out, &loader);
}

md_status md_evaluator_plan(const md_evaluator_args *a, const md_source *images,
                            md_viewer_bytes *out)
{
    const md_loader_args loader = loader_of(a, images);
    MD_TRY(md_viewer_plan(&(md_viewer_args){.method = a->method,
                                            .backend = a->backend,
                                            .topo = a->topo,
                                            .sight = a->sight,
                                            .images = a->images},
                          out));
    out->host += md_loader_bytes(&loader);
    return MD_OK;
}

/* One pass. Labels of the other ranks of tp are read from the index. */
static md_status look(md_evaluator *e, md_loader *l, int64_t step, md_evaluator_see see,
                      void *context)
{
    const md_evaluator_args *a = &e->args;
    const md_topo *t = a->topo;
    const int64_t first = (step * t->dp_size + t->dp_rank) * a->images;
    const int width = md_viewer_width(e->viewer);
    const md_batch *batch;
    const float *values;
    md_status st = md_loader_take(l, step, 0, &batch, NULL);
    const bool taken = st == MD_OK;
    st = md_agree(t->world, st);
    if (st == MD_OK)
        st = md_viewer_run(e->viewer, batch->image.data, &values);
    if (taken)
        md_loader_release(l, batch);
    MD_TRY(md_agree(t->world, st));
    for (int64_t j = 0; j < a->images && t->tp_rank == 0; j++)
        if (first + j < md_evaluator_count(e))
            see(context, &(md_seen){.index = first + j,
                                    .label = md_dataset_label(e->data, first + j),
                                    .values = values + j * width,
                                    .image = md_viewer_image(e->viewer, j)});
    return MD_OK;
}

md_status md_evaluator_run(md_evaluator *e, md_evaluator_see see, void *context)
{
    md_comm *world = e->args.topo->world;
    const int64_t n = md_evaluator_count(e), batch = e->args.images * e->args.topo->dp_size;
    md_loader *l = NULL;
    md_status st = md_agree(world, make_loader(e, &l));
    for (int64_t step = 0; step * batch < n && st == MD_OK; step++) {
        md_phase("evaluate");
        md_run_lock_touch(e->lock);
        st = look(e, l, step, see, context);
    }
    md_loader_destroy(l);
    return st;
}

/* ---- accuracy ---- */

static int class_of(const md_class_subset *s, int i)
{
    return s && s->class ? s->class[i] : i;
}

/* Where the right class stands among the answers, from 0; behind all of them when a logit is no
 * number. */
static int place_of(int classes, const md_class_subset *s, int32_t label, const float *logits,
                    double *loss)
{
    const float right = logits[class_of(s, label)];
    double top = (double)right, sum = 0;
    int place = isfinite(right) ? 0 : classes;
    for (int i = 0; i < classes; i++) {
        const float x = logits[class_of(s, i)];
        place += x > right || (x == right && i < label);
        top = MD_MAX(top, (double)x);
    }
    for (int i = 0; i < classes; i++)
        sum += exp((double)logits[class_of(s, i)] - top);
    *loss = log(sum) + top - (double)right;
    return place;
}

md_status md_accuracy_make(int classes, md_accuracy *out)
{
    *out = (md_accuracy){.classes = classes};
    MD_NEW(out->by_class, classes, "classes");
    return MD_OK;
}

void md_accuracy_count(md_accuracy *a, const md_class_subset *subset, int32_t label,
                       const float *logits)
{
    double loss;
    const int place = place_of(a->classes, subset, label, logits, &loss);
    md_hits *h = &a->by_class[label];
    h->images++;
    h->top1 += place < 1;
    h->top5 += place < 5;
    a->loss += loss;
}

typedef struct tally {
    const md_class_subset *subset;
    md_accuracy *out;
} tally;

static void count(void *context, const md_seen *seen)
{
    const tally *t = context;
    md_accuracy_count(t->out, t->subset, seen->label, seen->values);
}

static md_status check_classes(const md_evaluator *e, const md_class_subset *s)
{
    const int classes = md_dataset_classes(e->data), logits = md_viewer_width(e->viewer);
    if (s->class && s->class[s->classes - 1] >= logits)
        MD_FAIL(MD_ERR_CONFIG,
                "evaluate.classes = %s picks classes of ImageNet-1k up to number %d, the model has "
                "%d (model.classes)",
                e->args.config->evaluate_classes, s->class[s->classes - 1], logits);
    if (classes != s->classes)
        MD_FAIL(MD_ERR_CONFIG, "%s has %d classes, but %d are answered (%s)", e->args.data, classes,
                s->classes, s->class ? "evaluate.classes" : "model.classes");
    return MD_OK;
}

void md_accuracy_sum(md_comm *c, md_accuracy *a)
{
    _Static_assert(sizeof(md_hits) == 3 * sizeof(int64_t), "summed as plain numbers");
    md_comm_allreduce(c, a->by_class, 3 * (int64_t)a->classes, MD_I64, MD_SUM);
    md_comm_allreduce(c, &a->loss, 1, MD_F64, MD_SUM);
    a->all = (md_hits){0};
    for (int i = 0; i < a->classes; i++) {
        a->all.images += a->by_class[i].images;
        a->all.top1 += a->by_class[i].top1;
        a->all.top5 += a->by_class[i].top5;
    }
    a->loss /= (double)MD_MAX(a->all.images, 1);
}

md_status md_evaluate_accuracy(md_evaluator *e, const md_class_subset *subset, md_accuracy *out)
{
    md_comm *world = e->args.topo->world;
    const md_class_subset all = {.classes = md_viewer_width(e->viewer)};
    tally t = {.subset = subset ? subset : &all, .out = out};
    *out = (md_accuracy){0};
    MD_TRY(md_agree(world, check_classes(e, t.subset)));
    md_status st = md_agree(world, md_accuracy_make(t.subset->classes, out));
    if (st == MD_OK)
        st = md_evaluator_run(e, count, &t);
    if (st != MD_OK) {
        md_accuracy_free(out);
        return st;
    }
    md_accuracy_sum(world, out);
    return MD_OK;
}

void md_accuracy_free(md_accuracy *a)
{
    md_free(a->by_class);
    *a = (md_accuracy){0};
}

double md_percent(int64_t hits, int64_t images)
{
    return images ? 100.0 * (double)hits / (double)images : 0.0;
}
