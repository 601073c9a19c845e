/* bad_images: see bad_images.h. */
#include "src/bad_images.h"

#include <stdio.h>

/* One replaced image on its way to rank 0. */
typedef struct note {
    int64_t sample; /* -1: none */
    char name[160];
    char reason[192];
} note;

enum { NOTES = 4 };

struct md_bad_images {
    md_comm *comm;
    const md_dataset *data;
    md_loader *loader;
    note mine[NOTES], *all; /* all: [ranks][NOTES] */
};

md_status md_bad_images_create(md_comm *c, const md_dataset *data, md_loader *loader,
                               md_bad_images **out)
{
    md_bad_images *b;
    MD_NEW(b, 1, "notes on bad images");
    *out = b;
    b->comm = c;
    b->data = data;
    b->loader = loader;
    MD_NEW(b->all, md_comm_size(c) * NOTES, "notes on bad images");
    return MD_OK;
}

void md_bad_images_free(md_bad_images *b)
{
    if (!b)
        return;
    md_free(b->all);
    md_free(b);
}

static void gather(md_bad_images *b)
{
    md_bad_image bad;
    for (int i = 0; i < NOTES; i++) {
        note *n = &b->mine[i];
        n->sample = md_loader_next_bad(b->loader, &bad) ? bad.sample : -1;
        if (n->sample < 0)
            continue;
        md_dataset_name(b->data, n->sample, n->name, sizeof n->name);
        snprintf(n->reason, sizeof n->reason, "%s", bad.reason);
    }
    md_comm_allgather(b->comm, b->mine, b->all, sizeof b->mine);
}

/* Tells what was gathered. True when some rank may have more: the same on every rank. */
static bool tell(const md_bad_images *b, int64_t step, md_runlog *log)
{
    bool more = false;
    for (int i = 0; i < md_comm_size(b->comm) * NOTES; i++) {
        const note *n = &b->all[i];
        if (n->sample < 0)
            continue;
        md_log_warn("image %lld (%s) replaced: %s", (long long)n->sample, n->name, n->reason);
        md_runlog_event(log, step, "bad_image", "image %lld (%s): %s", (long long)n->sample,
                        n->name, n->reason);
        more |= i % NOTES == NOTES - 1;
    }
    return more;
}

void md_bad_images_tell(md_bad_images *b, int64_t step, md_runlog *log)
{
    do
        gather(b);
    while (tell(b, step, log));
}
