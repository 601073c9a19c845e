/* probe_heads: see probe_heads.h. */
#include "src/probe_heads.h"
#include "kernels/plan/plan_backend.h"
#include "mpi/agree.h"
#include "src/probe_norm.h"
#include "src/rng.h"

#include <math.h>
#include <string.h>

#define LARS_MOMENTUM 0.9
#define LARS_TRUST    0.001
#define INIT_STD      0.01f

/* ---- memory ---- */

/* A head's block of values: weight [classes, width], bias [classes] from `bias` on; moments and
 * gradients alike. What belongs to the heads of this rank is indexed by their slots, 0 to own. */
struct md_probe_heads {
    md_probe_heads_args a;
    int64_t bias, size; /* floats */
    int own;            /* heads that are trained here */
    int64_t updates;
    /* Operands. */
    float *value, *m, *v; /* [heads, size], [own, size] twice; v with AdamW only */
    float *grad;          /* [size] */
    float *x, *target;    /* [rows, width], [batch, classes] */
    float *logits;        /* [rows, classes], and their gradients */
    double *sums;         /* loss, or two of sumsq; each with its count */
    void *scratch;
    size_t scratch_size;
    /* The host. */
    float *stage;       /* [rows, width] */
    float *one_hot;     /* [batch, classes] */
    float *answer;      /* [MD_PROBE_TILE, classes] */
    double *host_sums;  /* as sums */
    float *host_value;  /* [size] */
    float *host_state;  /* [own, blocks, size]: value and moments as a checkpoint has them */
    double *loss;       /* [heads] */
    md_probe_norm norm; /* where the recipe has one */
};

enum { SUMS = 4, BLOCKS = 3 };

/* Head k is trained here, in this slot. */
static bool is_own(const md_probe_heads *h, int k)
{
    return k % h->a.ranks == h->a.rank;
}

static int slot_of(const md_probe_heads *h, int k)
{
    return k / h->a.ranks;
}

/* Value and moments. */
static int blocks(const md_probe_heads *h)
{
    return h->a.rule.lars ? BLOCKS - 1 : BLOCKS;
}

static int64_t rounded(int64_t n)
{
    return (n + 15) / 16 * 16;
}

static md_status operand(md_backend *be, int64_t n, size_t size, const char *what, void *out)
{
    void *p;
    MD_TRY(md_backend_alloc(be, (size_t)n * size, what, &p));
    memcpy(out, &p, sizeof p);
    return MD_OK;
}

static md_status pinned(md_backend *be, int64_t n, size_t size, const char *what, void *out)
{
    void *p;
    MD_TRY(md_backend_pinned(be, (size_t)n * size, what, &p));
    memcpy(out, &p, sizeof p);
    return MD_OK;
}

static md_status allocate(md_probe_heads *h)
{
    const md_probe_heads_args *a = &h->a;
    md_backend *be = a->backend;
    const int64_t batch = a->rule.batch, rows = MD_MAX(batch, MD_PROBE_TILE);
    const int64_t heads = a->heads, own = MD_MAX(h->own, 1);
    MD_TRY(operand(be, heads * h->size, sizeof(float), "probe", &h->value));
    MD_TRY(operand(be, own * h->size, sizeof(float), "moments", &h->m));
    if (!a->rule.lars)
        MD_TRY(operand(be, own * h->size, sizeof(float), "moments", &h->v));
    MD_TRY(operand(be, h->size, sizeof(float), "gradients", &h->grad));
    MD_TRY(operand(be, rows * a->width, sizeof(float), "features", &h->x));
    MD_TRY(operand(be, batch * a->classes, sizeof(float), "targets", &h->target));
    MD_TRY(operand(be, rows * a->classes, sizeof(float), "logits", &h->logits));
    MD_TRY(operand(be, SUMS, sizeof(double), "sums", &h->sums));
    MD_TRY(pinned(be, rows * a->width, sizeof(float), "features", &h->stage));
    MD_TRY(pinned(be, batch * a->classes, sizeof(float), "targets", &h->one_hot));
    MD_TRY(pinned(be, MD_PROBE_TILE * (int64_t)a->classes, sizeof(float), "logits", &h->answer));
    MD_TRY(pinned(be, SUMS, sizeof(double), "sums", &h->host_sums));
    MD_TRY(pinned(be, h->size, sizeof(float), "probe", &h->host_value));
    MD_TRY(pinned(be, own * blocks(h) * h->size, sizeof(float), "probe", &h->host_state));
    MD_NEW(h->loss, heads, "losses");
    return a->rule.norm ? md_probe_norm_make(a->heads, a->width, &h->norm) : MD_OK;
}

/* The first weights of this rank's heads. */
static md_status initialise(md_probe_heads *h)
{
    const md_probe_heads_args *a = &h->a;
    for (int k = a->rank; k < a->heads; k += a->ranks) {
        for (int64_t i = 0; i < (int64_t)a->classes * a->width; i++) {
            md_rng r = md_rng_at(a->seed, MD_RNG_PROBE, (uint32_t)k, (uint64_t)i);
            const uint32_t w0 = md_rng_u32(&r), w1 = md_rng_u32(&r);
            h->host_value[i] = INIT_STD * md_normal_of(w0, w1);
        }
        MD_TRY(md_backend_upload(a->backend, h->value + k * h->size, h->host_value,
                                 (size_t)h->size * sizeof(float)));
        MD_TRY(md_backend_sync(a->backend));
    }
    return MD_OK;
}

/* ---- ops ---- */

/* The parts of a block of values, moments or gradients. */
static md_tensor weight_of(const md_probe_heads *h, float *block)
{
    return MD_TENSOR(block, MD_F32, h->a.classes, h->a.width);
}

static md_tensor bias_of(const md_probe_heads *h, float *block)
{
    return MD_TENSOR(block ? block + h->bias : NULL, MD_F32, h->a.classes);
}

static md_status answer(md_probe_heads *h, md_backend *be, int k, int64_t rows)
{
    float *value = h->value + k * h->size;
    md_tensor w = weight_of(h, value), b = bias_of(h, value);
    md_tensor x = MD_TENSOR(h->x, MD_F32, rows, h->a.width);
    md_tensor y = MD_TENSOR(h->logits, MD_F32, rows, h->a.classes);
    return MD_OP(be, gemm, .a = &x, .b = &w, .bias = &b, .y = &y, .trans_b = true);
}

/* Loss and gradients of the mean cross entropy of the batch. */
static md_status differentiate(md_probe_heads *h, md_backend *be, int k)
{
    const int64_t batch = h->a.rule.batch;
    md_tensor x = MD_TENSOR(h->x, MD_F32, batch, h->a.width);
    md_tensor y = MD_TENSOR(h->logits, MD_F32, batch, h->a.classes);
    md_tensor target = MD_TENSOR(h->target, MD_F32, batch, h->a.classes);
    md_tensor loss = MD_TENSOR(h->sums, MD_F64, 1);
    md_tensor dw = weight_of(h, h->grad), db = bias_of(h, h->grad);
    MD_TRY(answer(h, be, k, batch));
    MD_TRY(MD_OP(be, cross_entropy, .logits = &y, .target = &target, .loss = &loss, .dlogits = &y,
                 .scale = (float)(1.0 / (double)batch)));
    MD_TRY(MD_OP(be, gemm, .a = &y, .b = &x, .y = &dw, .trans_a = true));
    return MD_OP(be, colsum, .x = &y, .y = &db);
}

static md_status adamw(md_probe_heads *h, md_backend *be, int k, double lr)
{
    const int64_t own = slot_of(h, k) * h->size;
    md_tensor grad = MD_TENSOR(h->grad, MD_F32, h->size);
    md_tensor value = MD_TENSOR(h->value + k * h->size, MD_F32, h->size);
    md_tensor m = MD_TENSOR(h->m + own, MD_F32, h->size);
    md_tensor v = MD_TENSOR(h->v + own, MD_F32, h->size);
    return MD_OP(be, adamw, .grad = &grad, .param = &value, .m = &m, .v = &v, .accumulate = 7,
                 .lr = lr, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8,
                 .weight_decay = h->a.rule.weight_decay, .grad_scale = 1.0, .step = h->updates);
}

/* Sums of squares of weight and gradient, for LARS. */
static md_status square(md_probe_heads *h, md_backend *be, int k)
{
    md_tensor of[2] = {weight_of(h, h->value + k * h->size), weight_of(h, h->grad)};
    for (int i = 0; i < 2; i++) {
        md_tensor sum = MD_TENSOR(h->sums + 2 * i, MD_F64, 1);
        md_tensor nonfinite = MD_TENSOR(h->sums + 2 * i + 1, MD_F64, 1);
        MD_TRY(MD_OP(be, sumsq, .x = &of[i], .sum = &sum, .nonfinite = &nonfinite));
    }
    return MD_OK;
}

/* m = momentum * m + factor * grad; value -= lr * m. */
static md_status move(md_backend *be, const md_tensor *grad, md_tensor *m, md_tensor *value,
                      double factor, double lr)
{
    MD_TRY(MD_OP(be, axpy, .x = m, .y = m, .alpha = (float)LARS_MOMENTUM));
    MD_TRY(MD_OP(be, axpy, .x = grad, .y = m, .accumulate = 1, .alpha = (float)factor));
    return MD_OP(be, axpy, .x = m, .y = value, .accumulate = 1, .alpha = (float)-lr);
}

static md_status lars(md_probe_heads *h, md_backend *be, int k, double trust, double lr)
{
    float *value = h->value + k * h->size, *moment = h->m + slot_of(h, k) * h->size;
    md_tensor w = weight_of(h, value), dw = weight_of(h, h->grad), mw = weight_of(h, moment);
    md_tensor b = bias_of(h, value), db = bias_of(h, h->grad), mb = bias_of(h, moment);
    MD_TRY(move(be, &dw, &mw, &w, trust, lr));
    return move(be, &db, &mb, &b, 1.0, lr);
}

/* Every op once, to learn how much scratch they need. */
static md_status plan_scratch(md_probe_heads *h)
{
    md_backend *plan;
    MD_TRY(md_plan_create(h->a.backend, &plan));
    md_status st = differentiate(h, plan, 0);
    if (st == MD_OK)
        st = answer(h, plan, 0, MD_PROBE_TILE);
    if (st == MD_OK && h->a.rule.lars) {
        st = square(h, plan, 0);
        if (st == MD_OK)
            st = lars(h, plan, 0, 1.0, 0.0);
    } else if (st == MD_OK) {
        st = adamw(h, plan, 0, 0.0);
    }
    h->scratch_size = md_plan_take(plan).scratch;
    plan->destroy(plan);
    MD_TRY(st);
    return md_backend_alloc(h->a.backend, h->scratch_size, "scratch", &h->scratch);
}

md_status md_probe_heads_create(const md_probe_heads_args *args, md_probe_heads **out)
{
    md_probe_heads *h;
    *out = NULL;
    MD_NEW(h, 1, "probe");
    h->a = *args;
    h->bias = rounded((int64_t)args->classes * args->width);
    h->size = h->bias + rounded(args->classes);
    for (int k = args->rank; k < args->heads; k += args->ranks)
        h->own++;
    h->updates = 1; /* while planning */
    md_status st = allocate(h);
    if (st == MD_OK)
        st = plan_scratch(h);
    if (st == MD_OK)
        st = initialise(h);
    if (st != MD_OK) {
        md_probe_heads_free(h);
        return st;
    }
    h->updates = 0;
    *out = h;
    return MD_OK;
}

void md_probe_heads_free(md_probe_heads *h)
{
    if (!h)
        return;
    void *const operands[] = {h->value,  h->m,      h->v,    h->grad,   h->x,
                              h->target, h->logits, h->sums, h->scratch};
    void *const host[] = {h->stage,     h->one_hot,    h->answer,
                          h->host_sums, h->host_value, h->host_state};
    for (size_t i = 0; i < MD_COUNT(operands); i++)
        md_backend_free(h->a.backend, operands[i]);
    for (size_t i = 0; i < MD_COUNT(host); i++)
        md_backend_pinned_free(h->a.backend, host[i]);
    md_free(h->loss);
    md_probe_norm_free(&h->norm);
    md_free(h);
}

/* ---- features on their way to a head ---- */

/* What a head sees of its rows: behind batch norm where the recipe has one; up to `rows` rows are
 * 0. */
static md_status show(md_probe_heads *h, const md_probe_rows *in, int64_t rows)
{
    const int64_t n = in->count;
    const int width = h->a.width;
#pragma omp parallel for num_threads(h->a.backend->threads)
    for (int64_t i = 0; i < n; i++) {
        const float *from = in->first + i * in->stride;
        float *to = h->stage + i * width;
        if (h->a.rule.norm)
            md_probe_norm_apply(&h->norm, from, to);
        else
            memcpy(to, from, (size_t)width * sizeof *to);
    }
    memset(h->stage + n * width, 0, (size_t)((rows - n) * width) * sizeof *h->stage);
    return md_backend_upload(h->a.backend, h->x, h->stage,
                             (size_t)(rows * width) * sizeof *h->stage);
}

static md_status show_targets(md_probe_heads *h, const int32_t *label)
{
    const int64_t batch = h->a.rule.batch, classes = h->a.classes;
    const size_t bytes = (size_t)(batch * classes) * sizeof *h->one_hot;
    memset(h->one_hot, 0, bytes);
    for (int64_t i = 0; i < batch; i++)
        h->one_hot[i * classes + label[i]] = 1.0f;
    return md_backend_upload(h->a.backend, h->target, h->one_hot, bytes);
}

/* ---- learning ---- */

static md_status fetch_sums(md_probe_heads *h)
{
    MD_TRY(md_backend_download(h->a.backend, h->host_sums, h->sums, SUMS * sizeof(double)));
    return md_backend_sync(h->a.backend);
}

static md_status update(md_probe_heads *h, int k, double lr)
{
    md_backend *be = h->a.backend;
    if (!h->a.rule.lars)
        return adamw(h, be, k, lr);
    MD_TRY(square(h, be, k));
    MD_TRY(fetch_sums(h));
    const double weight = sqrt(h->host_sums[0]), grad = sqrt(h->host_sums[2]);
    return lars(h, be, k, weight > 0 && grad > 0 ? LARS_TRUST * weight / grad : 1.0, lr);
}

static md_status learn(md_probe_heads *h, const float *feature, int k, double lr)
{
    md_backend *be = h->a.backend;
    const int64_t batch = h->a.rule.batch;
    const md_probe_rows rows = {.first = feature + slot_of(h, k) * h->a.width,
                                .stride = (int64_t)h->own * h->a.width,
                                .count = batch};
    if (h->a.rule.norm)
        md_probe_norm_learn(&h->norm, k, &rows, be->threads);
    MD_TRY(show(h, &rows, batch));
    MD_TRY(differentiate(h, be, k));
    MD_TRY(fetch_sums(h));
    h->loss[k] = h->host_sums[0];
    return update(h, k, lr);
}

int md_probe_heads_own(const md_probe_heads *h)
{
    return h->own;
}

md_status md_probe_heads_step(md_probe_heads *h, const float *feature, const int32_t *label,
                              double lr)
{
    md_backend *be = h->a.backend;
    const md_scratch was = md_backend_scratch(be, (md_scratch){h->scratch, h->scratch_size});
    h->updates++;
    md_status st = h->own > 0 ? show_targets(h, label) : MD_OK;
    for (int k = h->a.rank; k < h->a.heads && st == MD_OK; k += h->a.ranks)
        st = learn(h, feature, k, lr);
    if (st == MD_OK)
        st = md_backend_sync(be);
    md_backend_scratch(be, was);
    return st;
}

const double *md_probe_heads_loss(const md_probe_heads *h)
{
    return h->loss;
}

/* ---- what was learned ---- */

static md_status fetch_value(md_probe_heads *h, int k)
{
    if (md_fault("probe.fetch"))
        MD_FAIL(MD_ERR_DEVICE, "injected fault probe.fetch");
    MD_TRY(md_backend_download(h->a.backend, h->host_value, h->value + k * h->size,
                               (size_t)h->size * sizeof(float)));
    return md_backend_sync(h->a.backend);
}

static md_status store_value(md_probe_heads *h, int k)
{
    MD_TRY(md_backend_upload(h->a.backend, h->value + k * h->size, h->host_value,
                             (size_t)h->size * sizeof(float)));
    return md_backend_sync(h->a.backend);
}

md_status md_probe_heads_share(md_probe_heads *h, md_comm *c)
{
    const int64_t width = h->a.width;
    for (int k = 0; k < h->a.heads; k++) {
        const int root = k % h->a.ranks;
        const bool mine = is_own(h, k);
        MD_TRY(md_agree(c, mine ? fetch_value(h, k) : MD_OK));
        md_comm_bcast(c, h->host_value, h->size * (int64_t)sizeof(float), root);
        if (h->a.rule.norm) {
            md_comm_bcast(c, h->norm.mean + k * width, width * (int64_t)sizeof(double), root);
            md_comm_bcast(c, h->norm.variance + k * width, width * (int64_t)sizeof(double), root);
        }
        MD_TRY(md_agree(c, mine ? MD_OK : store_value(h, k)));
    }
    return MD_OK;
}

md_status md_probe_heads_read(md_probe_heads *h, int head, float *weight, float *bias)
{
    MD_TRY(fetch_value(h, head));
    memcpy(weight, h->host_value, (size_t)h->a.classes * (size_t)h->a.width * sizeof *weight);
    memcpy(bias, h->host_value + h->bias, (size_t)h->a.classes * sizeof *bias);
    return MD_OK;
}

md_status md_probe_heads_logits(md_probe_heads *h, int head, const float *feature, int n,
                                const float **out)
{
    md_backend *be = h->a.backend;
    const int64_t width = h->a.width;
    const md_scratch was = md_backend_scratch(be, (md_scratch){h->scratch, h->scratch_size});
    if (h->a.rule.norm)
        md_probe_norm_use(&h->norm, head);
    md_status st = show(
        h,
        &(md_probe_rows){.first = feature + head * width, .stride = h->a.heads * width, .count = n},
        MD_PROBE_TILE);
    if (st == MD_OK)
        st = answer(h, be, head, MD_PROBE_TILE);
    if (st == MD_OK)
        st = md_backend_download(be, h->answer, h->logits,
                                 (size_t)n * (size_t)h->a.classes * sizeof *h->answer);
    if (st == MD_OK)
        st = md_backend_sync(be);
    md_backend_scratch(be, was);
    *out = h->answer;
    return st;
}

/* ---- the state of training ---- */

/* Device memory of a block of a head in a slot. */
static float *block_of(const md_probe_heads *h, int k, int block)
{
    float *const moment[] = {h->m, h->v};
    return block == 0 ? h->value + k * h->size : moment[block - 1] + slot_of(h, k) * h->size;
}

static float *host_block_of(const md_probe_heads *h, int k, int block)
{
    return h->host_state + ((int64_t)slot_of(h, k) * blocks(h) + block) * h->size;
}

md_status md_probe_heads_fetch(md_probe_heads *h)
{
    const size_t bytes = (size_t)h->size * sizeof(float);
    for (int k = h->a.rank; k < h->a.heads; k += h->a.ranks)
        for (int i = 0; i < blocks(h); i++)
            MD_TRY(md_backend_download(h->a.backend, host_block_of(h, k, i), block_of(h, k, i),
                                       bytes));
    return md_backend_sync(h->a.backend);
}

md_status md_probe_heads_store(md_probe_heads *h, int64_t updates)
{
    const size_t bytes = (size_t)h->size * sizeof(float);
    h->updates = updates;
    for (int k = h->a.rank; k < h->a.heads; k += h->a.ranks)
        for (int i = 0; i < blocks(h); i++)
            MD_TRY(
                md_backend_upload(h->a.backend, block_of(h, k, i), host_block_of(h, k, i), bytes));
    return md_backend_sync(h->a.backend);
}

int md_probe_heads_arrays(const md_probe_heads *h)
{
    return 2 * blocks(h) + (h->a.rule.norm ? 2 : 0);
}

md_probe_array md_probe_heads_array(const md_probe_heads *h, int head, int i)
{
    static const char *const adamw_groups[] = {"param", "adam_m", "adam_v"};
    static const char *const lars_groups[] = {"param", "momentum"};
    const int64_t width = h->a.width;
    const bool mine = is_own(h, head);
    const int block = i / 2;
    if (block < blocks(h)) {
        float *data = mine ? host_block_of(h, head, block) : NULL;
        return (md_probe_array){
            .group = (h->a.rule.lars ? lars_groups : adamw_groups)[block],
            .name = i % 2 ? "bias" : "weight",
            .value = i % 2 ? bias_of(h, data) : weight_of(h, data),
        };
    }
    double *const statistic = i % 2 ? h->norm.variance : h->norm.mean;
    return (md_probe_array){.group = "batch_norm",
                            .name = i % 2 ? "variance" : "mean",
                            .value =
                                MD_TENSOR(mine ? statistic + head * width : NULL, MD_F64, width)};
}
