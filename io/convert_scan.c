/* convert_scan: from source paths to groups (rank 0), from groups to items (the rank that scans
 * it). Everything is sorted by name or kept in archive order, so the table depends on the sources
 * only. */
#include "io/convert_parts.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#define MAX_DEPTH 16 /* of folders inside a class folder: ends loops of links */
#define PATH_SIZE 4096

static md_status join(char out[PATH_SIZE], const char *a, const char *b, const char *c)
{
    int n = snprintf(out, PATH_SIZE, "%s%s%s", a, b, c);
    if (n < 0 || n >= PATH_SIZE)
        MD_FAIL(MD_ERR_DATA, "%.200s...: path is longer than %d bytes", out, PATH_SIZE - 1);
    return MD_OK;
}

/* --- folders ------------------------------------------------------------------------------- */

/* The visible entries of a folder, sorted; texts lie in the list's own table. */
typedef struct entry {
    text_at name;
    int64_t bytes;
    bool folder;
} entry;
typedef struct listing {
    convert_table names; /* its text arena only */
    convert_list rows;
    int64_t folders;
} listing;

static void listing_free(listing *l)
{
    convert_table_free(&l->names);
    md_free(l->rows.at);
}

static int by_entry(const void *a, const void *b, void *names)
{
    return strcmp(convert_text_of(names, ((const entry *)a)->name),
                  convert_text_of(names, ((const entry *)b)->name));
}

static md_status list_entries(DIR *d, const char *path, listing *l)
{
    for (struct dirent *e; errno = 0, (e = readdir(d));) {
        char full[PATH_SIZE];
        struct stat s;
        entry row;
        if (e->d_name[0] == '.')
            continue;
        snprintf(full, sizeof full, "%s/%s", path, e->d_name);
        /* A link that leads nowhere stays an entry: it cannot be opened, which makes it a reject.
         */
        if (stat(full, &s) != 0)
            s = (struct stat){.st_mode = S_IFREG, .st_size = 1};
        if (!S_ISDIR(s.st_mode) && !S_ISREG(s.st_mode))
            continue;
        row = (entry){.bytes = s.st_size, .folder = S_ISDIR(s.st_mode)};
        MD_TRY(convert_text(&l->names, &row.name, "%s", e->d_name));
        MD_TRY(convert_list_push(&l->rows, &row, 1));
        l->folders += row.folder;
    }
    if (errno != 0)
        MD_FAIL(MD_ERR_IO, "%s: cannot list: %s", path, strerror(errno));
    return MD_OK;
}

/* Freed by the caller with listing_free, also on error. */
static md_status list_folder(const char *path, listing *l)
{
    *l = (listing){.rows.width = sizeof(entry)};
    MD_TRY(convert_table_init(&l->names));
    DIR *d = opendir(path);
    if (!d)
        MD_FAIL(MD_ERR_NOINPUT, "%s: cannot open: %s", path, strerror(errno));
    md_status st = list_entries(d, path, l);
    closedir(d);
    if (st == MD_OK && l->rows.n > 0)
        qsort_r(l->rows.at, (size_t)l->rows.n, sizeof(entry), by_entry, &l->names);
    return st;
}

static const entry *entry_at(const listing *l, int64_t i)
{
    return (const entry *)l->rows.at + i;
}

static const char *entry_name(const listing *l, int64_t i)
{
    return convert_text_of(&l->names, entry_at(l, i)->name);
}

/* --- items of a group ---------------------------------------------------------------------- */

typedef struct scan {
    const convert_table *t;
    const convert_group *group;
    int32_t g;
    convert_table *mine;
    convert_table *plan; /* gets tars found inside a tar; NULL: not looked for */
    convert_reader *reader;
    int most; /* IDX: largest label so far */
} scan;

static md_status add_item(scan *s, convert_item it, const char *class, const char *name)
{
    it.group = s->g;
    MD_TRY(convert_class(s->mine, class, &it.label));
    MD_TRY(convert_text(s->mine, &it.name, "%s", name));
    return convert_list_push(&s->mine->items, &it, 1);
}

static md_status add_file(scan *s, const char *name, int64_t bytes)
{
    char stored[PATH_SIZE];
    const char *prefix = convert_text_of(s->t, s->group->prefix);
    MD_TRY(join(stored, prefix, name, ""));
    return add_item(s,
                    (convert_item){.bytes = bytes,
                                   .split = s->group->split,
                                   .file_from = (int32_t)strlen(prefix)},
                    convert_text_of(s->t, s->group->class), stored);
}

/* Files of the class folder below `inner` (relative, "" or ending in a slash). */
static md_status scan_folder(scan *s, const char *inner, int depth)
{
    char path[PATH_SIZE], name[PATH_SIZE];
    listing l;
    if (depth > MAX_DEPTH)
        MD_FAIL(MD_ERR_DATA, "%s/%.200s: folders are nested too deeply",
                convert_text_of(s->t, s->group->path), inner);
    MD_TRY(join(path, convert_text_of(s->t, s->group->path), "/", inner));
    md_status st = list_folder(path, &l);
    for (int64_t i = 0; st == MD_OK && i < l.rows.n; i++) {
        const entry *e = entry_at(&l, i);
        st = join(name, inner, entry_name(&l, i), e->folder ? "/" : "");
        if (st == MD_OK && e->folder)
            st = scan_folder(s, name, depth + 1);
        else if (st == MD_OK)
            st = add_file(s, name, e->bytes);
    }
    listing_free(&l);
    return st;
}

/* Cuts ".tar", ".tar.gz" or ".tgz" off a name, whatever its case. */
static void cut_tar_suffix(char *name)
{
    static const char *const ends[] = {".tar", ".tar.gz", ".tgz"};
    size_t n = strlen(name);
    for (size_t i = 0; i < MD_COUNT(ends); i++) {
        size_t k = strlen(ends[i]);
        if (n > k && strcasecmp(name + n - k, ends[i]) == 0) {
            name[n - k] = 0;
            return;
        }
    }
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* The folder above an image is its class; a folder train, val or test further up is its split. */
static void place_member(const char *name, char class[PATH_SIZE], int32_t *split)
{
    const char *from = name, *slash;
    class[0] = 0;
    for (; (slash = strchr(from, '/')); from = slash + 1) {
        size_t n = (size_t)(slash - from);
        int32_t word = *class ? convert_split_word(class, strlen(class)) : -1;
        if (word >= 0)
            *split = word;
        if (n == 0 || (n == 1 && *from == '.'))
            continue;
        memcpy(class, from, n);
        class[n] = 0;
    }
}

/* A tar inside a tar becomes a group of its own. */
static md_status add_inner_tar(scan *s, const tar_walk *w)
{
    char class[sizeof w->name];
    convert_group g = {.kind = CONVERT_TAR, .split = s->group->split, .at = w->at};
    g.bytes = w->bytes;
    snprintf(class, sizeof class, "%s", base_name(w->name));
    cut_tar_suffix(class);
    g.path = s->group->path;
    MD_TRY(convert_text(s->plan, &g.class, "%s", class));
    MD_TRY(convert_text(s->plan, &g.prefix, "%s/", w->name));
    return convert_list_push(&s->plan->groups, &g, 1);
}

static md_status scan_member(scan *s, const tar_walk *w)
{
    char class[PATH_SIZE], stored[2 * PATH_SIZE];
    convert_item it = {.split = s->group->split, .at = w->at, .bytes = w->bytes};
    const char *name = strncmp(w->name, "./", 2) == 0 ? w->name + 2 : w->name;
    if (base_name(name)[0] == '.')
        return MD_OK;
    if (s->plan && tar_is_header(w->head, w->head_bytes))
        return add_inner_tar(s, w);
    place_member(name, class, &it.split);
    snprintf(stored, sizeof stored, "%s%s", convert_text_of(s->t, s->group->prefix), name);
    return add_item(s, it, *class ? class : convert_text_of(s->t, s->group->class), stored);
}

static md_status scan_tar(scan *s)
{
    tar_walk w = {.reader = s->reader, .next = s->group->at};
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s", convert_text_of(s->t, s->group->path));
    w.path = path;
    if (s->group->bytes > 0)
        w.end = s->group->at + s->group->bytes;
    else
        MD_TRY(convert_file_bytes(s->reader, path, &w.end));
    for (;;) {
        bool more;
        MD_TRY(tar_next(&w, &more));
        if (!more)
            return MD_OK;
        MD_TRY(scan_member(s, &w));
    }
}

/* --- IDX ----------------------------------------------------------------------------------- */

static md_status add_image(scan *s, const idx_pair *pair, const char *prefix, int64_t i)
{
    char class[16], name[PATH_SIZE + 32];
    int label;
    MD_TRY(idx_label(s->reader, pair, i, &label));
    /* Every number up to the largest is a class, so that labels keep their values. */
    while (s->most < label) {
        int32_t number;
        snprintf(class, sizeof class, "%d", ++s->most);
        MD_TRY(convert_class(s->mine, class, &number));
    }
    snprintf(class, sizeof class, "%d", label);
    snprintf(name, sizeof name, "%s#%lld", prefix, (long long)i);
    return add_item(s,
                    (convert_item){.at = pair->first + i * pair->w * pair->h,
                                   .bytes = pair->w * pair->h,
                                   .split = s->group->split,
                                   .w = (int32_t)pair->w,
                                   .h = (int32_t)pair->h},
                    class, name);
}

static md_status scan_idx(scan *s)
{
    idx_pair pair = {.images = convert_text_of(s->t, s->group->path),
                     .labels = convert_text_of(s->t, s->group->labels)};
    MD_TRY(idx_open(s->reader, &pair));
    for (int64_t i = 0; i < pair.n; i++)
        MD_TRY(add_image(s, &pair, convert_text_of(s->t, s->group->prefix), i));
    return MD_OK;
}

static md_status scan_group(scan *s)
{
    switch ((convert_kind)s->group->kind) {
    case CONVERT_FOLDER:
        return scan_folder(s, "", 0);
    case CONVERT_TAR:
        return scan_tar(s);
    case CONVERT_IDX:
        return scan_idx(s);
    }
    MD_FAIL(MD_ERR_BUG, "group of kind %d", s->group->kind);
}

md_status convert_scan(const convert_table *t, int32_t g, convert_table *mine)
{
    scan s = {.t = t, .group = convert_group_of(t, g), .g = g, .mine = mine, .most = -1};
    MD_TRY(convert_reader_create(&s.reader));
    md_status st = scan_group(&s);
    convert_reader_free(s.reader);
    return st;
}

/* --- sources ------------------------------------------------------------------------------- */

static md_status add_group(convert_table *t, convert_group g, const char *path, const char *class)
{
    MD_TRY(convert_text(t, &g.path, "%s", path));
    MD_TRY(convert_text(t, &g.class, "%s", class));
    if (g.kind == CONVERT_IDX)
        MD_TRY(convert_text(t, &g.prefix, "%s", base_name(path)));
    else if (g.kind == CONVERT_FOLDER && *class)
        MD_TRY(convert_text(t, &g.prefix, "%s/", class));
    return convert_list_push(&t->groups, &g, 1);
}

/* A tar is walked here: only its headers tell whether it holds tars, which others may scan. */
static md_status add_tar(convert_table *t, int32_t split, const char *path, const char *class)
{
    int64_t g = t->groups.n;
    MD_TRY(add_group(t, (convert_group){.kind = CONVERT_TAR, .split = split, .scanned = 1}, path,
                     class));
    /* The walk adds groups to t, which moves them: it works on a copy. */
    convert_group group = *convert_group_of(t, g);
    scan s = {.t = t, .group = &group, .g = (int32_t)g, .mine = t, .plan = t};
    MD_TRY(convert_reader_create(&s.reader));
    md_status st = scan_tar(&s);
    convert_reader_free(s.reader);
    return st;
}

static md_status add_idx(convert_table *t, int32_t split, const char *images)
{
    char labels[PATH_SIZE];
    const char *base = base_name(images);
    convert_group g = {.kind = CONVERT_IDX, .split = split};
    if (!idx_find_labels(images, labels, sizeof labels))
        MD_FAIL(MD_ERR_NOINPUT, "%s: IDX images without a labels file beside them (%s)", images,
                strstr(base, "images") ? base_name(labels) : "no \"images\" in its name");
    size_t word = strcspn(base, "-_.");
    int32_t known = convert_split_word(base, word);
    if (known >= 0)
        g.split = known;
    else if (word == 4 && memcmp(base, "t10k", 4) == 0)
        g.split = convert_split_word("test", 4);
    MD_TRY(convert_text(t, &g.labels, "%s", labels));
    return add_group(t, g, images, "");
}

typedef enum file_kind { FILE_OTHER, FILE_TAR, FILE_IDX_IMAGES, FILE_IDX_LABELS } file_kind;

/* What a file is by its first bytes. */
static md_status sniff(const char *path, file_kind *kind)
{
    convert_reader *r;
    uint8_t head[512];
    size_t n;
    *kind = FILE_OTHER;
    MD_TRY(convert_reader_create(&r));
    md_status st = convert_read(r, path, 0, head, sizeof head, &n);
    if (st == MD_OK && tar_is_header(head, n))
        *kind = FILE_TAR;
    else if (st == MD_OK && idx_is_header(head, n, 3))
        *kind = FILE_IDX_IMAGES;
    else if (st == MD_OK && idx_is_header(head, n, 1))
        *kind = FILE_IDX_LABELS;
    convert_reader_free(r);
    return st;
}

/* True when `path` is X.gz and X lies beside it: one of the two is enough. */
static bool unpacked_beside(const char *path)
{
    char plain[PATH_SIZE];
    struct stat s;
    size_t n = strlen(path);
    if (n < 4 || n >= sizeof plain || strcmp(path + n - 3, ".gz") != 0)
        return false;
    memcpy(plain, path, n - 3);
    plain[n - 3] = 0;
    return stat(plain, &s) == 0;
}

/* A folder without folders: tars and IDX files in it count, else its files are unlabelled images.
 */
static md_status plan_files(convert_table *t, const char *path, const listing *l, int32_t split)
{
    int64_t before = t->groups.n, other = 0;
    for (int64_t i = 0; i < l->rows.n; i++) {
        char full[PATH_SIZE], class[512];
        file_kind kind;
        snprintf(full, sizeof full, "%s/%s", path, entry_name(l, i));
        snprintf(class, sizeof class, "%s", entry_name(l, i));
        cut_tar_suffix(class);
        /* What cannot be opened is met again as an image, and listed. */
        md_status st = sniff(full, &kind);
        if (st != MD_ERR_NOINPUT)
            MD_TRY(st);
        if (kind == FILE_TAR)
            MD_TRY(add_tar(t, split, full, class));
        else if (kind == FILE_IDX_IMAGES && !unpacked_beside(full))
            MD_TRY(add_idx(t, split, full));
        else if (kind == FILE_OTHER)
            other++;
    }
    if (t->groups.n > before) {
        t->skipped += other;
        return MD_OK;
    }
    return add_group(t, (convert_group){.kind = CONVERT_FOLDER, .split = split}, path, "");
}

static bool all_split_words(const listing *l)
{
    for (int64_t i = 0; i < l->rows.n; i++) {
        const char *name = entry_name(l, i);
        if (entry_at(l, i)->folder && convert_split_word(name, strlen(name)) < 0)
            return false;
    }
    return true;
}

static md_status plan_folder(convert_table *t, const char *path, int32_t split, bool top);

static md_status plan_subfolders(convert_table *t, const char *path, const listing *l,
                                 int32_t split, bool top)
{
    bool splits = top && all_split_words(l);
    for (int64_t i = 0; i < l->rows.n; i++) {
        char full[PATH_SIZE];
        const char *name = entry_name(l, i);
        if (!entry_at(l, i)->folder) {
            t->skipped++;
            continue;
        }
        snprintf(full, sizeof full, "%s/%s", path, name);
        if (splits)
            MD_TRY(plan_folder(t, full, convert_split_word(name, strlen(name)), false));
        else
            MD_TRY(
                add_group(t, (convert_group){.kind = CONVERT_FOLDER, .split = split}, full, name));
    }
    return MD_OK;
}

/* top: the folder may hold split folders. */
static md_status plan_folder(convert_table *t, const char *path, int32_t split, bool top)
{
    listing l;
    md_status st = list_folder(path, &l);
    if (st == MD_OK && l.rows.n == 0)
        st = md_error_set(MD_ERR_DATA, "%s: empty folder", path);
    if (st == MD_OK)
        st = l.folders ? plan_subfolders(t, path, &l, split, top) : plan_files(t, path, &l, split);
    listing_free(&l);
    return st;
}

static md_status plan_source(convert_table *t, const char *path, int32_t split)
{
    struct stat s;
    file_kind kind;
    if (stat(path, &s) != 0)
        MD_FAIL(MD_ERR_NOINPUT, "%s: cannot open: %s", path, strerror(errno));
    if (S_ISDIR(s.st_mode))
        return plan_folder(t, path, split, true);
    MD_TRY(sniff(path, &kind));
    switch (kind) {
    case FILE_TAR:
        return add_tar(t, split, path, "");
    case FILE_IDX_IMAGES:
        return add_idx(t, split, path);
    case FILE_IDX_LABELS:
        MD_FAIL(MD_ERR_DATA, "%s: IDX labels; name the images file, its labels are found", path);
    case FILE_OTHER:
        break;
    }
    MD_FAIL(MD_ERR_DATA, "%s: neither a folder nor a tar nor an IDX file", path);
}

md_status convert_plan(convert_table *t, const md_convert_source *sources, int n)
{
    for (int i = 0; i < n; i++) {
        int32_t split;
        char path[PATH_SIZE];
        size_t len = (size_t)snprintf(path, sizeof path, "%s", sources[i].path);
        if (len >= sizeof path / 2)
            MD_FAIL(MD_ERR_NOINPUT, "%.80s...: path is too long", path);
        while (len > 1 && path[len - 1] == '/')
            path[--len] = 0;
        MD_TRY(convert_split(t, sources[i].split, &split));
        MD_TRY(plan_source(t, path, split));
    }
    return MD_OK;
}
