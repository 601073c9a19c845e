/* pretrained: see pretrained.h. Reading, hashing and handing out are what checkpoints and weights
 * files do for themselves; here it is decided which of them a path is, and names are looked up. */
#include "io/pretrained.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "io/checkpoint.h"
#include "mpi/agree.h"

#define FAMILY    "pretrained"
#define PATH_SIZE 4096

struct md_pretrained {
    md_checkpoint *ck; /* either this */
    md_weights *w;     /* or that */
    bool ema;
    char path[PATH_SIZE], text[PATH_SIZE + 64]; /* the file, and what it is */
    char identity[MD_PRETRAINED_IDENTITY];
};

/* ---- what a path is ---- */

typedef enum source_kind { FOLDER, CHECKPOINT, WEIGHTS } source_kind;

typedef struct source {
    source_kind kind;
    char path[PATH_SIZE];
} source;

static bool is_folder(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

/* HDF5 begins a file with its signature, but behind the END mark of a checkpoint. A checkpoint that
 * is cut or unfinished is taken for one too: that is then what its reader says. */
static md_status file_look(source *s)
{
    static const char hdf5[8] = {'\x89', 'H', 'D', 'F', '\r', '\n', '\x1a', '\n'};
    static const char mark[8] = {'M', 'D', 'P', 'H', 'C', 'K', 'P', 'T'};
    char start[sizeof hdf5] = {0}, behind[sizeof hdf5] = {0};
    FILE *f = fopen(s->path, "rb");
    if (!f)
        MD_FAIL(MD_ERR_NOINPUT, "%s: cannot be opened: %s", s->path, strerror(errno));
    bool ok = fread(start, 1, sizeof start, f) > 0 || !ferror(f); /* short: zeros behind */
    ok = ok && fseek(f, 4096, SEEK_SET) == 0;
    ok = ok && (fread(behind, 1, sizeof behind, f) > 0 || !ferror(f));
    fclose(f);
    if (!ok)
        MD_FAIL(MD_ERR_IO, "%s: cannot be read", s->path);
    if (memcmp(start, mark, sizeof mark) == 0 || memcmp(behind, hdf5, sizeof hdf5) == 0)
        s->kind = CHECKPOINT;
    else if (memcmp(start, hdf5, sizeof hdf5) == 0)
        s->kind = WEIGHTS;
    else
        MD_FAIL(MD_ERR_DATA,
                "%s: neither a checkpoint nor a weights file of this program (safetensors become "
                "one with md_hpc weights import)",
                s->path);
    return MD_OK;
}

/* Local. */
static md_status source_look(const char *path, source *s)
{
    struct stat info;
    if (snprintf(s->path, sizeof s->path, "%s/checkpoints", path) >= PATH_SIZE)
        MD_FAIL(MD_ERR_NOINPUT, "the path is too long: %s", path);
    s->kind = FOLDER;
    if (is_folder(s->path))
        return MD_OK;
    snprintf(s->path, sizeof s->path, "%s", path);
    if (stat(path, &info) != 0)
        MD_FAIL(errno == ENOENT || errno == ENOTDIR ? MD_ERR_NOINPUT : MD_ERR_IO,
                "%s: cannot be looked at: %s", path, strerror(errno));
    return S_ISDIR(info.st_mode) ? MD_OK : file_look(s);
}

bool md_pretrained_is_run(const char *path)
{
    source s;
    int64_t *steps = NULL;
    int n = 0;
    if (source_look(path, &s) != MD_OK || s.kind == WEIGHTS)
        return false;
    if (s.kind == FOLDER && md_checkpoint_list(s.path, &steps, &n) != MD_OK)
        return false;
    md_free(steps);
    return s.kind == CHECKPOINT || n > 0;
}

/* ---- opening ---- */

static bool has_averages(const md_checkpoint *ck)
{
    int n;
    const md_state_entry *e = md_checkpoint_entries(ck, &n);
    for (int i = 0; i < n; i++)
        if (strncmp(e[i].name, "ema/", 4) == 0)
            return true;
    return false;
}

static md_status source_open(md_comm *c, const source *s, md_pretrained *p)
{
    if (s->kind == WEIGHTS) {
        MD_TRY(md_weights_open(c, s->path, &p->w));
        snprintf(p->path, sizeof p->path, "%s", s->path);
        snprintf(p->text, sizeof p->text, "weights %s (%s)", p->path,
                 md_weights_get_info(p->w)->dialect);
        snprintf(p->identity, sizeof p->identity, "%s", md_weights_get_info(p->w)->hash);
    } else {
        MD_TRY(s->kind == FOLDER
                   ? md_checkpoint_find(c, s->path, md_checkpoint_warn_skipped, NULL, &p->ck)
                   : md_checkpoint_open(c, s->path, &p->ck));
        snprintf(p->path, sizeof p->path, "%s", md_checkpoint_path(p->ck));
        snprintf(p->text, sizeof p->text, "checkpoint %s at step %lld%s", p->path,
                 (long long)md_checkpoint_step(p->ck), p->ema ? ", moving averages" : "");
        snprintf(p->identity, sizeof p->identity, "%016llx%s",
                 (unsigned long long)md_checkpoint_state_hash(p->ck), p->ema ? " ema" : "");
    }
    /* All ranks know the names: this needs no agreement. */
    if (p->ema && !(p->ck && has_averages(p->ck)))
        MD_FAIL(MD_ERR_DATA, "%s: holds no moving averages of parameters", p->path);
    return MD_OK;
}

static md_status pretrained_new(md_comm *c, const char *path, bool ema, source *s,
                                md_pretrained **out)
{
    MD_NEW(*out, 1, FAMILY);
    (*out)->ema = ema;
    return md_comm_rank(c) == 0 ? source_look(path, s) : MD_OK;
}

md_status md_pretrained_open(md_comm *c, const char *path, bool ema, md_pretrained **out)
{
    md_pretrained *p = NULL;
    source s = {0};
    *out = NULL;
    md_status st = md_agree(c, pretrained_new(c, path, ema, &s, &p));
    if (st == MD_OK) {
        md_comm_bcast(c, &s, sizeof s, 0); /* rank 0 alone looked */
        st = source_open(c, &s, p);
    }
    if (st != MD_OK) {
        md_pretrained_close(p);
        return st;
    }
    *out = p;
    return MD_OK;
}

void md_pretrained_close(md_pretrained *p)
{
    if (!p)
        return;
    md_checkpoint_close(p->ck);
    md_weights_close(p->w);
    md_free(p);
}

/* ---- parameters ---- */

/* The name of the checkpoint's item; one too long for an item is the name of none. */
static const char *item_name(const md_pretrained *p, const char *name, char buf[MD_STATE_NAME])
{
    int n = snprintf(buf, MD_STATE_NAME, "%s/%s", p->ema ? "ema" : "param", name);
    return n < MD_STATE_NAME ? buf : "";
}

static int weight_shape(const md_weights_info *info, const char *name, int64_t dim[MD_MAX_RANK])
{
    md_weight_dims dims;
    char own[MD_WEIGHT_NAME];
    md_weights_dims(info, &dims);
    for (int k = 0; k < MD_WEIGHT_COUNT; k++) {
        const md_weight_id id = (md_weight_id)k;
        const int copies = md_weight_per_layer(id) ? info->layers : 1;
        for (int layer = 0; md_weights_has(info, id) && layer < copies; layer++)
            if (strcmp(md_weight_name(id, layer, own), name) == 0)
                return md_weight_shape(id, &dims, dim);
    }
    return 0;
}

int md_pretrained_shape(const md_pretrained *p, const char *name, int64_t dim[MD_MAX_RANK])
{
    char buf[MD_STATE_NAME];
    memset(dim, 0, MD_MAX_RANK * sizeof *dim);
    if (p->w)
        return weight_shape(md_weights_get_info(p->w), name, dim);
    const md_state_entry *e = md_checkpoint_entry(p->ck, item_name(p, name, buf));
    if (!e)
        return 0;
    memcpy(dim, e->global, sizeof e->global);
    return e->rank;
}

bool md_pretrained_has(const md_pretrained *p, const char *name)
{
    int64_t dim[MD_MAX_RANK];
    return md_pretrained_shape(p, name, dim) > 0;
}

md_status md_pretrained_load(md_pretrained *p, const char *name, float *whole)
{
    char buf[MD_STATE_NAME];
    int64_t dim[MD_MAX_RANK];
    const int rank = md_pretrained_shape(p, name, dim);
    if (rank == 0)
        MD_FAIL(MD_ERR_DATA, "%s: has no %s'%s'", p->path,
                p->ema ? "moving average of parameter " : "parameter ", name);
    md_tensor t = md_tensor_make(whole, MD_F32, rank, dim);
    if (p->w)
        return md_weights_load(p->w, name, &t);
    md_state_item item = md_state_item_make(item_name(p, name, buf), &t);
    return md_checkpoint_read(p->ck, &item, 1);
}

int md_pretrained_count(const md_pretrained *p)
{
    const char *group = p->ema ? "ema/" : "param/";
    int n = 0, found = 0;
    const md_state_entry *e = p->ck ? md_checkpoint_entries(p->ck, &n) : NULL;
    for (int i = 0; i < n; i++)
        found += strncmp(e[i].name, group, strlen(group)) == 0;
    return found;
}

const md_weights_info *md_pretrained_weights(const md_pretrained *p)
{
    return p->w ? md_weights_get_info(p->w) : NULL;
}

const char *md_pretrained_path(const md_pretrained *p)
{
    return p->path;
}

const char *md_pretrained_describe(const md_pretrained *p)
{
    return p->text;
}

const char *md_pretrained_identity(const md_pretrained *p)
{
    return p->identity;
}

const char *md_pretrained_config(const md_pretrained *p)
{
    return p->ck ? md_checkpoint_config(p->ck) : "";
}
