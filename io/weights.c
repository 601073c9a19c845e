/* weights: the HDF5 file, see weights.h. */
#include "io/weights.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "io/h5.h"
#include "io/publish.h"
#include "mpi/agree.h"

#define FAMILY  "weights"
#define FORMAT  "md_hpc.weights"
#define VERSION 2 /* the newest it reads and writes */

struct md_weights {
    md_comm *comm;
    hid_t file; /* on rank 0, else -1 */
    char *path;
    md_weights_info info;
};

/* The integers among the root attributes, and the range in which they make sense. */
static const struct {
    const char *name;
    size_t place;
    int64_t min, max;
} info_ints[] = {
#define INFO_INT(name, min, max)                         \
    {                                                    \
#name, offsetof(md_weights_info, name), min, max \
    }
    INFO_INT(width, 1, 65536),
    INFO_INT(layers, 1, 1024),
    INFO_INT(heads, 1, 1024),
    INFO_INT(patch, 1, 256),
    INFO_INT(mlp, 1, 1 << 20),
    INFO_INT(grid, 1, 1024),
    INFO_INT(pre_norm, 0, 1),
    INFO_INT(proj_width, 0, 65536),
    INFO_INT(patch_bias, 0, 1),
    /* since version 2 */
    INFO_INT(rel_pos, 0, 2),
    INFO_INT(abs_pos, 0, 1),
    INFO_INT(layer_scale, 0, 1),
    INFO_INT(qv_bias, 0, 1),
    INFO_INT(mask_token, 0, 1),
    INFO_INT(final_norm, 0, 1),
    INFO_INT(fc_norm, 0, 1),
    INFO_INT(classes, 0, 1 << 24),
    INFO_INT(lm_width, 0, 1 << 24),
#undef INFO_INT
};

/* How many of them the versions have; what the first one has not is said by `plain`. */
static const size_t info_count[] = {[1] = 9, [2] = MD_COUNT(info_ints)};
static const md_weights_info plain = {.abs_pos = 1, .final_norm = 1};

static int info_int(const md_weights_info *info, size_t i)
{
    int value;
    memcpy(&value, (const char *)info + info_ints[i].place, sizeof value);
    return value;
}

/* The first version that can hold the model. */
static int version_of(const md_weights_info *info)
{
    for (size_t i = info_count[1]; i < info_count[VERSION]; i++)
        if (info_int(info, i) != info_int(&plain, i))
            return VERSION;
    return 1;
}

/* How often a parameter occurs in the model. */
static int copies_of(const md_weights_info *info, md_weight_id id)
{
    if (!md_weights_has(info, id))
        return 0;
    return md_weight_per_layer(id) ? info->layers : 1;
}

/* Shape of a parameter and its elements. */
static int64_t shape_of(const md_weights_info *info, md_weight_id id, int *rank,
                        hsize_t dim[MD_MAX_RANK])
{
    md_weight_dims dims;
    int64_t shape[MD_MAX_RANK], n = 1;
    md_weights_dims(info, &dims);
    *rank = md_weight_shape(id, &dims, shape);
    for (int i = 0; i < *rank; i++) {
        dim[i] = (hsize_t)shape[i];
        n *= shape[i];
    }
    return n;
}

/* ---- attributes ---- */

static md_status triple_write(hid_t file, const char *name, const double v[3])
{
    hid_t space = H5Screate_simple(1, &(hsize_t){3}, NULL);
    hid_t attr = H5Acreate2(file, name, H5T_IEEE_F64LE, space, H5P_DEFAULT, H5P_DEFAULT);
    md_status st = MD_OK;
    if (attr < 0 || H5Awrite(attr, H5T_NATIVE_DOUBLE, v) < 0)
        st = md_h5_fail(MD_ERR_IO, file, "attribute %s cannot be written", name);
    md_h5_release(attr);
    md_h5_release(space);
    return st;
}

static md_status triple_read(hid_t file, const char *name, double v[3])
{
    hid_t attr = H5Aopen(file, name, H5P_DEFAULT);
    hid_t space = attr >= 0 ? H5Aget_space(attr) : -1;
    hid_t type = attr >= 0 ? H5Aget_type(attr) : -1;
    md_status st = MD_OK;
    if (space < 0 || H5Sget_simple_extent_npoints(space) != 3 || H5Tget_class(type) != H5T_FLOAT ||
        H5Aread(attr, H5T_NATIVE_DOUBLE, v) < 0)
        st = md_h5_fail(MD_ERR_DATA, file, "attribute %s is not three numbers", name);
    md_h5_release(type);
    md_h5_release(space);
    md_h5_release(attr);
    return st;
}

static md_status info_write(hid_t file, const md_weights_info *info)
{
    MD_TRY(md_h5_attr_write_str(file, "format", FORMAT));
    MD_TRY(md_h5_attr_write_i64(file, "version", version_of(info)));
    MD_TRY(md_h5_attr_write_str(file, "kind", "vit"));
    for (size_t i = 0; i < info_count[version_of(info)]; i++)
        MD_TRY(md_h5_attr_write_i64(file, info_ints[i].name, info_int(info, i)));
    MD_TRY(md_h5_attr_write_str(file, "act", md_act_name(info->act)));
    MD_TRY(md_h5_attr_write_f64(file, "ln_eps", info->ln_eps));
    MD_TRY(triple_write(file, "mean", info->mean));
    MD_TRY(triple_write(file, "std", info->std));
    MD_TRY(md_h5_attr_write_str(file, "dialect", info->dialect));
    MD_TRY(md_h5_attr_write_str(file, "source", info->source));
    MD_TRY(md_h5_attr_write_i64(file, "params", info->params));
    return md_h5_attr_write_str(file, "hash", info->hash);
}

static md_status format_check(hid_t file, int64_t *version)
{
    char text[64];
    if (md_h5_attr_read_str(file, "format", text, sizeof text) != MD_OK ||
        strcmp(text, FORMAT) != 0)
        return md_h5_fail(MD_ERR_DATA, file,
                          "not a weights file of ours (make one with md_hpc weights import)");
    MD_TRY(md_h5_attr_read_i64(file, "version", version));
    if (*version < 1 || *version > VERSION)
        return md_h5_fail(MD_ERR_DATA, file, "weights of version %lld, this program reads 1 to %d",
                          (long long)*version, VERSION);
    MD_TRY(md_h5_attr_read_str(file, "kind", text, sizeof text));
    if (strcmp(text, "vit") != 0)
        return md_h5_fail(MD_ERR_DATA, file, "weights of the unknown kind '%s'", text);
    return MD_OK;
}

static md_status info_get(hid_t file, md_weights_info *info)
{
    char act[32];
    int64_t version, v;
    *info = plain;
    MD_TRY(format_check(file, &version));
    for (size_t i = 0; i < info_count[version]; i++) {
        MD_TRY(md_h5_attr_read_i64(file, info_ints[i].name, &v));
        if (v < info_ints[i].min || v > info_ints[i].max)
            return md_h5_fail(MD_ERR_DATA, file, "attribute %s = %lld is out of range",
                              info_ints[i].name, (long long)v);
        memcpy((char *)info + info_ints[i].place, &(int){(int)v}, sizeof(int));
    }
    if (info->width % info->heads)
        return md_h5_fail(MD_ERR_DATA, file, "%d heads do not divide width %d", info->heads,
                          info->width);
    MD_TRY(md_h5_attr_read_str(file, "act", act, sizeof act));
    info->act = md_act_parse(act);
    if (info->act == MD_ACT_NONE)
        return md_h5_fail(MD_ERR_DATA, file, "unknown activation '%s'", act);
    MD_TRY(md_h5_attr_read_f64(file, "ln_eps", &info->ln_eps));
    MD_TRY(triple_read(file, "mean", info->mean));
    MD_TRY(triple_read(file, "std", info->std));
    if (!(info->ln_eps > 0) || !(info->std[0] > 0 && info->std[1] > 0 && info->std[2] > 0))
        return md_h5_fail(MD_ERR_DATA, file, "ln_eps and std must be positive");
    MD_TRY(md_h5_attr_read_str(file, "dialect", info->dialect, sizeof info->dialect));
    MD_TRY(md_h5_attr_read_str(file, "source", info->source, sizeof info->source));
    MD_TRY(md_h5_attr_read_i64(file, "params", &info->params));
    return md_h5_attr_read_str(file, "hash", info->hash, sizeof info->hash);
}

/* ---- data sets and their hashes ---- */

static void hash_text(const void *data, size_t bytes, char text[24])
{
    snprintf(text, 17, "%016llx", (unsigned long long)XXH3_64bits(data, bytes));
}

/* The content's hash begins with what the attributes say. */
static void hash_begin(XXH3_state_t *state, const md_weights_info *info)
{
    char line[64];
    const double real[] = {info->ln_eps, info->mean[0], info->mean[1], info->mean[2],
                           info->std[0], info->std[1],  info->std[2]};
    XXH3_64bits_reset(state);
    for (size_t i = 0; i < info_count[version_of(info)]; i++)
        XXH3_64bits_update(state, &(int){info_int(info, i)}, sizeof(int));
    for (size_t i = 0; i < MD_COUNT(real); i++)
        XXH3_64bits_update(state, &real[i], sizeof real[i]);
    int n = snprintf(line, sizeof line, "%s\n", md_act_name(info->act));
    XXH3_64bits_update(state, line, (size_t)n);
}

/* Then come lines "<name> <hash>", in the order of the table. */
static void hash_line(XXH3_state_t *state, const char *name, const char *hash)
{
    char line[MD_WEIGHT_NAME + 20];
    int n = snprintf(line, sizeof line, "%s %s\n", name, hash);
    XXH3_64bits_update(state, line, (size_t)n);
}

static md_status dset_write(hid_t file, const char *name, int rank, const hsize_t *dim,
                            const float *data, char hash[24])
{
    hid_t dset;
    size_t bytes = sizeof *data;
    for (int i = 0; i < rank; i++)
        bytes *= dim[i];
    MD_TRY(md_h5_dset_create(file, name, H5T_IEEE_F32LE, rank, dim, &dset));
    hash_text(data, bytes, hash);
    md_status st = md_h5_attr_write_str(dset, "xxh3", hash);
    if (st == MD_OK)
        st = md_h5_write_all(dset, H5T_NATIVE_FLOAT, data);
    md_h5_release(dset);
    return st;
}

static md_status dset_open(hid_t file, const md_weights_info *info, md_weight_id id, int layer,
                           hid_t *dset)
{
    char name[MD_WEIGHT_NAME];
    hsize_t dim[MD_MAX_RANK];
    int rank;
    shape_of(info, id, &rank, dim);
    return md_h5_dset_open(file, md_weight_name(id, layer, name), H5T_IEEE_F32LE, rank, dim, dset);
}

/* Every parameter is there with its shape, and the list of their hashes is the one recorded. */
static md_status dsets_check(hid_t file, const md_weights_info *info)
{
    XXH3_state_t state;
    char name[MD_WEIGHT_NAME], hash[24];
    int64_t params = 0;
    hash_begin(&state, info);
    for (int id = 0; id < MD_WEIGHT_COUNT; id++)
        for (int layer = 0; layer < copies_of(info, (md_weight_id)id); layer++) {
            hid_t dset;
            hsize_t dim[MD_MAX_RANK];
            int rank;
            MD_TRY(dset_open(file, info, (md_weight_id)id, layer, &dset));
            md_status st = md_h5_attr_read_str(dset, "xxh3", hash, sizeof hash);
            md_h5_release(dset);
            MD_TRY(st);
            hash_line(&state, md_weight_name((md_weight_id)id, layer, name), hash);
            params += shape_of(info, (md_weight_id)id, &rank, dim);
        }
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)XXH3_64bits_digest(&state));
    if (strcmp(hash, info->hash) != 0 || params != info->params)
        return md_h5_fail(MD_ERR_DATA, file, "its content is not what it was written with");
    return MD_OK;
}

/* ---- writing ---- */

static md_status content_write(hid_t file, md_weights_info *info, md_weights_fill fill, void *arg)
{
    XXH3_state_t state;
    hash_begin(&state, info);
    info->params = 0;
    for (int id = 0; id < MD_WEIGHT_COUNT; id++) {
        hsize_t dim[MD_MAX_RANK];
        int rank, copies = copies_of(info, (md_weight_id)id);
        int64_t n = shape_of(info, (md_weight_id)id, &rank, dim);
        float *data;
        MD_NEW(data, n, FAMILY);
        md_status st = MD_OK;
        for (int layer = 0; layer < copies && st == MD_OK; layer++) {
            char name[MD_WEIGHT_NAME], hash[24];
            md_weight_name((md_weight_id)id, layer, name);
            st = fill(arg, (md_weight_id)id, layer, data);
            if (st == MD_OK)
                st = dset_write(file, name, rank, dim, data, hash);
            if (st == MD_OK)
                hash_line(&state, name, hash);
        }
        md_free(data);
        MD_TRY(st);
        info->params += n * copies;
    }
    snprintf(info->hash, sizeof info->hash, "%016llx",
             (unsigned long long)XXH3_64bits_digest(&state));
    return info_write(file, info);
}

md_status md_weights_write(const char *path, md_weights_info *info, md_weights_fill fill, void *arg)
{
    char *part;
    hid_t file;
    MD_TRY(md_publish_part(path, &part));
    md_status st = md_h5_create(part, NULL, &file);
    if (st == MD_OK) {
        st = content_write(file, info, fill, arg);
        md_status closed = md_h5_close(&file);
        if (st == MD_OK)
            st = closed;
        if (st == MD_OK)
            st = md_publish(part, path);
        else
            unlink(part);
    }
    md_free(part);
    return st;
}

/* ---- reading ---- */

md_status md_weights_info_read(const char *path, md_weights_info *info)
{
    hid_t file;
    MD_TRY(md_h5_open(path, NULL, &file));
    md_status st = info_get(file, info);
    md_status closed = md_h5_close(&file);
    return st != MD_OK ? st : closed;
}

static bool is_reader(const md_comm *c)
{
    return !c || md_comm_rank(c) == 0;
}

static md_status agree(md_comm *c, md_status st)
{
    return c ? md_agree(c, st) : st;
}

static md_status open_local(md_weights *w)
{
    MD_TRY(md_h5_open(w->path, NULL, &w->file));
    MD_TRY(info_get(w->file, &w->info));
    return dsets_check(w->file, &w->info);
}

static md_status weights_new(md_comm *c, const char *path, md_weights **out)
{
    MD_NEW(*out, 1, FAMILY);
    (*out)->comm = c;
    (*out)->file = -1;
    MD_NEW((*out)->path, strlen(path) + 1, FAMILY);
    memcpy((*out)->path, path, strlen(path));
    return MD_OK;
}

md_status md_weights_open(md_comm *c, const char *path, md_weights **out)
{
    md_weights *w = NULL;
    *out = NULL;
    md_status st = weights_new(c, path, &w);
    if (st == MD_OK && is_reader(c))
        st = open_local(w);
    st = agree(c, st);
    if (st != MD_OK) {
        md_weights_close(w);
        return st;
    }
    if (c)
        md_comm_bcast(c, &w->info, sizeof w->info, 0);
    *out = w;
    return MD_OK;
}

void md_weights_close(md_weights *w)
{
    if (!w)
        return;
    md_h5_close(&w->file);
    md_free(w->path);
    md_free(w);
}

const md_weights_info *md_weights_get_info(const md_weights *w)
{
    return &w->info;
}

static md_status find(const md_weights *w, const char *name, md_weight_id *id, int *layer)
{
    char own[MD_WEIGHT_NAME];
    for (int k = 0; k < MD_WEIGHT_COUNT; k++)
        for (int l = 0; l < copies_of(&w->info, (md_weight_id)k); l++)
            if (strcmp(md_weight_name((md_weight_id)k, l, own), name) == 0) {
                *id = (md_weight_id)k;
                *layer = l;
                return MD_OK;
            }
    MD_FAIL(MD_ERR_DATA, "%s: has no parameter '%s'", w->path, name);
}

static md_status shape_check(const md_weights *w, const char *name, md_weight_id id,
                             const md_tensor *dst)
{
    hsize_t dim[MD_MAX_RANK];
    int rank;
    shape_of(&w->info, id, &rank, dim);
    int skip = dst->rank - rank;
    bool same = skip >= 0;
    for (int i = 0; i < dst->rank && same; i++)
        same = dst->dim[i] == (i < skip ? 1 : (int64_t)dim[i - skip]);
    if (!same) {
        char want[96], have[96];
        md_tensor stored = {.rank = (uint8_t)rank, .dtype = MD_F32};
        for (int i = 0; i < rank; i++)
            stored.dim[i] = (int64_t)dim[i];
        MD_FAIL(MD_ERR_DATA, "%s: parameter '%s' is %s, expected %s", w->path, name,
                md_tensor_describe(&stored, have, sizeof have),
                md_tensor_describe(dst, want, sizeof want));
    }
    return MD_OK;
}

static md_status load_local(md_weights *w, md_weight_id id, int layer, md_tensor *dst)
{
    hid_t dset;
    char recorded[24], found[24], name[MD_WEIGHT_NAME];
    MD_TRY(dset_open(w->file, &w->info, id, layer, &dset));
    md_status st = md_h5_attr_read_str(dset, "xxh3", recorded, sizeof recorded);
    if (st == MD_OK && md_fault("weights.load"))
        st = md_error_set(MD_ERR_IO, "%s: read failed (injected)", w->path);
    if (st == MD_OK)
        st = md_h5_read_all(dset, H5T_NATIVE_FLOAT, dst->data);
    md_h5_release(dset);
    MD_TRY(st);
    hash_text(dst->data, md_tensor_bytes(dst), found);
    if (strcmp(found, recorded) != 0)
        MD_FAIL(MD_ERR_DATA, "%s: parameter '%s' is damaged (hash %s, recorded %s)", w->path,
                md_weight_name(id, layer, name), found, recorded);
    return MD_OK;
}

md_status md_weights_load(md_weights *w, const char *name, md_tensor *dst)
{
    md_weight_id id = MD_WEIGHT_CLS;
    int layer = 0;
    MD_ASSERT(dst->dtype == MD_F32 && dst->mem != MD_DEVICE, "parameter %s", name);
    /* Both checks see the same on every rank: they need no agreement. */
    MD_TRY(find(w, name, &id, &layer));
    MD_TRY(shape_check(w, name, id, dst));
    md_status st = MD_OK;
    if (is_reader(w->comm))
        st = load_local(w, id, layer, dst);
    MD_TRY(agree(w->comm, st));
    if (w->comm)
        md_comm_bcast(w->comm, dst->data, (int64_t)md_tensor_bytes(dst), 0);
    return MD_OK;
}
