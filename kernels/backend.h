/* backend: THE op interface. One row of MD_OPS per operation; a backend is a table of functions
 * made from the rows, so a wrong signature is a compile error and a missing row is named at start.
 *
 * Letters (everywhere): B images, T tokens of an image with cls, N = B*T rows, C width, H heads,
 * D = C/H head width, F mlp width, P patch side, G = patches of an image, M masked patches of an
 * image (or of rows), K width of a target (or classes).
 *
 * Types: activations, the weights of matrix products and their gradients in flight are of the
 * compute type, f32 or bf16, all of one call alike. What a row says is f32 stays f32 under bf16:
 * statistics (mean, rstd, lse), every gradient of a parameter, and parameters that are vectors or
 * tables. Sums and everything inside an op are f32 (the cpu backend computes in f32 only).
 *
 * Contract of every op: inputs are not changed; every element of an output is written, or, when its
 * bit is set in `accumulate`, added to; an output may share memory with an input only where the row
 * says so; nothing is allocated; nothing communicates; sums run in an order that depends on the
 * shapes and the kind of device only; the only errors are wrong arguments (MD_ERR_BUG) and device
 * failures. An optional operand is NULL. Scratch comes from md_backend.scratch, sized at setup.
 *
 * Every args struct begins as md_operands does: `check`, `plan` and tracing need no per-op code. */
#ifndef MD_BACKEND_H
#define MD_BACKEND_H

#include "src/tensor.h"

MD_C_BEGIN

#define MD_OP_IN  12
#define MD_OP_OUT 6

/* The common beginning of every args struct. Unused entries are NULL; gaps are allowed. */
typedef struct md_operands {
    const md_tensor *in[MD_OP_IN];
    md_tensor *out[MD_OP_OUT];
    uint32_t accumulate; /* bit i: out[i] += instead of out[i] = */
} md_operands;

/* Names the operands of one op without copying the layout of md_operands. */
#define MD_IN(...)                       \
    union {                              \
        const md_tensor *in[MD_OP_IN];   \
        struct {                         \
            const md_tensor __VA_ARGS__; \
        };                               \
    }
#define MD_OUT(...)                \
    union {                        \
        md_tensor *out[MD_OP_OUT]; \
        struct {                   \
            md_tensor __VA_ARGS__; \
        };                         \
    };                             \
    uint32_t accumulate

typedef struct md_backend md_backend;

typedef enum md_act { MD_ACT_NONE, MD_ACT_GELU, MD_ACT_QUICK_GELU } md_act;

/* y = act(op_a(a) op_b(b) + bias), y of the compute type or f32. a [m,k] (or [k,m] with trans_a), b
 * [k,n] (or [n,k] with trans_b), y [m,n] in the matrix view; bias [n]. With act, pre (optional)
 * receives the value before act; y accumulates only without act, pre never. In bf16 the product may
 * be rounded before bias and the old y are added. A linear layer is trans_b. */
typedef struct md_gemm_args {
    MD_IN(*a, *b, *bias);
    MD_OUT(*y, *pre);
    bool trans_a, trans_b;
    md_act act;
} md_gemm_args;

/* Backward of a linear layer y = x w^T: dw = dy^T x, f32, may accumulate, and dx = dy w, optional,
 * which alone needs w. x, dx [N, I] and dy [N, O] in the matrix view, w, dw [O, I]. */
typedef struct md_linear_bwd_args {
    MD_IN(*x, *w, *dy);
    MD_OUT(*dw, *dx);
} md_linear_bwd_args;

/* y[c] = sum over rows of x[r, c]: gradient of a bias. y f32 [C]. */
typedef struct md_colsum_args {
    MD_IN(*x);
    MD_OUT(*y);
} md_colsum_args;

/* y = [q, 0, v]: the bias of qkv in BEiT's attention, which has none of keys. q, v [C], y [3C]. */
typedef struct md_qv_bias_args {
    MD_IN(*q, *v);
    MD_OUT(*y);
} md_qv_bias_args;

/* Their gradients from that of qkv, x [N, 3C]: dq f32 [C] = column sums of its first third, dv f32
 * [C] of the last. */
typedef struct md_qv_bias_bwd_args {
    MD_IN(*x);
    MD_OUT(*dq, *dv);
} md_qv_bias_bwd_args;

/* dx = dy * act'(x) with x the value before the activation; dx may be dy. dbias f32 [C] (optional,
 * may accumulate) = column sums of dx. */
typedef struct md_act_bwd_args {
    MD_IN(*x, *dy);
    MD_OUT(*dx, *dbias);
    md_act act;
} md_act_bwd_args;

/* y = (x - mean) * rstd * weight + bias over the last axis, biased variance. weight, bias f32,
 * optional (both or none). mean, rstd f32 [rows] optional. y may be x when mean and rstd are NULL.
 * unbiased: divide by cols - 1 (MAE's patch normalisation). */
typedef struct md_layernorm_args {
    MD_IN(*x, *weight, *bias);
    MD_OUT(*y, *mean, *rstd);
    float eps;
    bool unbiased;
} md_layernorm_args;

/* One residual step and the LayerNorm after it, in one pass:
 *   r = x + keep[image] * gamma * branch          (branch absent: r = x, and r may be NULL)
 *   y = LN(r) * weight + bias, mean, rstd of r
 * x, branch, r, y [N, C] in the matrix view; gamma, weight, bias f32 [C], gamma optional; keep f32
 * [B] optional (0 or 1/(1-p), drop path; N is a multiple of B, rows of an image follow each other).
 * r may be x. y optional: then only the residual is done. No accumulation.
 *
 * Packed operands hold some of the B images only: from i32 [B] (optional) says which image of
 * branch each image's is, -1 for none (r = x there), and to i32 [B] (optional, with y) which image
 * of y it becomes. Both count 0, 1, ... where they are not -1, so that every row of y is written.
 * mean and rstd are of all N rows. */
typedef struct md_residual_ln_args {
    MD_IN(*x, *branch, *gamma, *keep, *weight, *bias, *from, *to);
    MD_OUT(*r, *y, *mean, *rstd);
    float eps;
} md_residual_ln_args;

/* Backward of residual_ln. dr [B,T,C] (optional) gradient arriving at r from the next residual
 * step, dy at y (optional). g = dr + LN'(dy);  dx = g;  dbranch = keep * gamma * g; dgamma[c] = sum
 * keep * branch * g;  dweight[c] = sum dy * (r - mean) * rstd;  dbias[c] = sum dy; dbranch_sum[c] =
 * sum dbranch, the gradient of a bias that was added to branch last. dx may be dr. dbranch, dgamma
 * absent when there was no branch or no gamma, dbranch_sum without dbranch. mean, rstd [N]; r,
 * weight (ones when NULL), mean and rstd are needed with dy only. Only the sums accumulate; they
 * are f32, as gamma, keep, weight, mean and rstd. Where dx is of a narrower type, dbranch and the
 * sums take what is not yet rounded. from and to as in the forward pass: branch and dbranch, and
 * dy, are packed; an image that is not in dy has none, and one that is not in branch adds nothing
 * to dgamma and dbranch_sum. */
typedef struct md_residual_ln_bwd_args {
    MD_IN(*r, *branch, *gamma, *keep, *weight, *mean, *rstd, *dr, *dy, *from, *to);
    MD_OUT(*dx, *dbranch, *dgamma, *dweight, *dbias, *dbranch_sum);
} md_residual_ln_bwd_args;

/* Softmax attention of every image and head with an additive bias:
 *   o = softmax(q k^T * scale + rel) v,  lse f32 [B, H, T] = log of the softmax denominators.
 * qkv [B, T, 3C], each row q, k, v in this order, each [H, D]; rel [H, T, T] optional; o [B, T, C],
 * each row [H, D]; lse optional. */
typedef struct md_attention_args {
    MD_IN(*qkv, *rel);
    MD_OUT(*o, *lse);
    int heads;
    float scale;
} md_attention_args;

/* dqkv [B, T, 3C] from d_o; drel f32 [H,T,T] = sum over images of dlogits (optional; may
 * accumulate). dqkv must not share memory with qkv. */
typedef struct md_attention_bwd_args {
    MD_IN(*qkv, *rel, *o, *lse, *d_o);
    MD_OUT(*dqkv, *drel);
    int heads;
    float scale;
} md_attention_bwd_args;

/* rel[h, i, j] = table[index[i, j], h]. index i32 [T, T], table f32 [R, H], rel [H, T, T]. */
typedef struct md_rel_gather_args {
    MD_IN(*table, *index);
    MD_OUT(*rel);
} md_rel_gather_args;

/* dtable[index[i,j], h] (+)= drel[h, i, j], both f32: zero first unless accumulate. */
typedef struct md_rel_scatter_args {
    MD_IN(*drel, *index);
    MD_OUT(*dtable);
} md_rel_scatter_args;

typedef enum md_patch_order { MD_PATCH_CHW, MD_PATCH_HWC } md_patch_order;

/* What becomes of one image of a batch in training with labels: random erasing with noise in every
 * pixel (Zhong et al. 2020), mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019), in this order,
 * as timm does them. Boxes are x, y, width, height in pixels; width 0: nothing. */
typedef struct md_mix {
    int32_t erase[4]; /* noise instead of the image */
    int32_t partner;  /* image of the batch that it is mixed with, erased where that one is */
    int32_t box[4];   /* taken from the partner whole */
    float lambda;     /* elsewhere lambda of this image and 1 - lambda of the partner */
    uint32_t key[2];  /* of the noise (md_rng_normal) */
} md_mix;
#define MD_MIX_WORDS 12

/* Cuts u8 images into normalised patch vectors: patch[b*G + gy*g + gx, i] =
 * (image[b, y, x, ch] / 255 - mean[ch]) / std[ch]. image u8 [B, S, S, 3]; patch [B*G, 3*P*P];
 * inner order (ch, y, x) as a convolution weight, or (y, x, ch) as MAE's targets.
 * mix i32 [B, MD_MIX_WORDS] optional: an md_mix of every image. With v the normalised image, or
 * md_rng_normal(key, (y * S + x) * 3 + ch) inside its erase box, what is cut is v of the partner
 * inside box, v alone where lambda is 1, else lambda * v + (1 - lambda) * v of the partner, each
 * product rounded, as torch does. */
typedef struct md_patchify_args {
    MD_IN(*image, *mix);
    MD_OUT(*patch);
    int side; /* P */
    md_patch_order order;
    float mean[3], std[3];
} md_patchify_args;

/* tokens[b, 0] = cls + pos[0];  tokens[b, 1+i] = (masked ? mask_token : patch[b, i]) + pos[1+i].
 * patch [B, G, C]; cls, mask_token f32 [C]; pos f32 [G+1, C] optional; mask u8 [B, G] optional
 * (with mask_token); tokens [B, G+1, C]. */
typedef struct md_tokens_args {
    MD_IN(*patch, *cls, *mask_token, *pos, *mask);
    MD_OUT(*tokens);
} md_tokens_args;

/* dpatch = 0 at masked tokens; dcls [C], dmask_token [C], dpos [G+1, C], all f32, sums over the
 * batch. */
typedef struct md_tokens_bwd_args {
    MD_IN(*dtokens, *mask);
    MD_OUT(*dpatch, *dcls, *dmask_token, *dpos);
} md_tokens_bwd_args;

/* y[r] = x[index[r]] on rows of width C: x [N, C], index i32 [R], y [R, C]. */
typedef struct md_gather_rows_args {
    MD_IN(*x, *index);
    MD_OUT(*y);
} md_gather_rows_args;

/* dx = 0 except dx[index[r]] = dy[r]; index has no duplicates and rises. */
typedef struct md_scatter_rows_args {
    MD_IN(*dy, *index);
    MD_OUT(*dx);
} md_scatter_rows_args;

/* y[b] = mean over m of x[b, m]: x [B, M, C], M >= 1, y [B, C]. No accumulation. */
typedef struct md_mean_rows_args {
    MD_IN(*x);
    MD_OUT(*y);
} md_mean_rows_args;

/* dx[b, m] = dy[b] / M: dy [B, C], dx [B, M, C], M >= 1. No accumulation. */
typedef struct md_mean_rows_bwd_args {
    MD_IN(*dy);
    MD_OUT(*dx);
} md_mean_rows_bwd_args;

typedef enum md_loss_kind { MD_LOSS_SMOOTH_L1, MD_LOSS_L1, MD_LOSS_L2 } md_loss_kind;

/* loss[0] = scale * sum over all elements of l(pred - target);  dpred = scale * l'(pred - target).
 * With d = pred - target: smooth-L1 d^2/(2 beta) for |d| < beta, else |d| - beta/2; L1 |d|; L2 d^2.
 * loss f64 [1]; dpred optional, may be pred. */
typedef struct md_loss_args {
    MD_IN(*pred, *target);
    MD_OUT(*loss, *dpred);
    md_loss_kind kind;
    float beta, scale;
} md_loss_args;

/* loss[0] = scale * sum over b, k of -target[b, k] * log p[b, k] with p = softmax of every row of
 * logits; dlogits[b, k] = scale * (p[b, k] * sum of target[b] - target[b, k]). logits [B, K],
 * target f32 [B, K], of any row sums; loss f64 [1]; dlogits optional, may be logits, does not
 * accumulate.
 */
typedef struct md_cross_entropy_args {
    MD_IN(*logits, *target);
    MD_OUT(*loss, *dlogits);
    float scale;
} md_cross_entropy_args;

/* sum[0] = sum of x^2 (f64), nonfinite[0] (f64) = number of NaN or Inf elements; x f32. */
typedef struct md_sumsq_args {
    MD_IN(*x);
    MD_OUT(*sum, *nonfinite);
} md_sumsq_args;

/* Decoupled AdamW on one contiguous range (Loshchilov and Hutter 2019), g = grad * grad_scale:
 *   p *= 1 - lr*wd;  m += (1-b1)(g-m);  v = b2 v + (1-b2) g^2;
 *   p -= lr / (1-b1^t) * m / (sqrt(v) / sqrt(1-b2^t) + eps).
 * param, m, v are accumulated outputs (updated in place), all f32. copy (bf16, optional) receives
 * the new param, rounded. step = t >= 1. */
typedef struct md_adamw_args {
    MD_IN(*grad);
    MD_OUT(*param, *m, *v, *copy);
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
    int64_t step;
} md_adamw_args;

/* y = alpha * x (accumulate: y += alpha * x). Same shapes; y may be x when not accumulating. */
typedef struct md_axpy_args {
    MD_IN(*x);
    MD_OUT(*y);
    float alpha;
} md_axpy_args;

/* y = x in another type, f32 or bf16, rounded to nearest even; the same type copies. */
typedef struct md_cast_args {
    MD_IN(*x);
    MD_OUT(*y);
} md_cast_args;

#define MD_OPS(X)      \
    X(gemm)            \
    X(linear_bwd)      \
    X(colsum)          \
    X(qv_bias)         \
    X(qv_bias_bwd)     \
    X(act_bwd)         \
    X(layernorm)       \
    X(residual_ln)     \
    X(residual_ln_bwd) \
    X(attention)       \
    X(attention_bwd)   \
    X(rel_gather)      \
    X(rel_scatter)     \
    X(patchify)        \
    X(tokens)          \
    X(tokens_bwd)      \
    X(gather_rows)     \
    X(scatter_rows)    \
    X(mean_rows)       \
    X(mean_rows_bwd)   \
    X(loss)            \
    X(cross_entropy)   \
    X(sumsq)           \
    X(adamw)           \
    X(axpy)            \
    X(cast)

typedef enum md_op {
#define MD_OP_ENUM(op) MD_OP_##op,
    MD_OPS(MD_OP_ENUM)
#undef MD_OP_ENUM
        MD_OP_COUNT
} md_op;

/* The function table of a backend, one entry per row. */
typedef struct md_op_table {
#define MD_OP_FIELD(op) md_status (*op)(md_backend * be, const md_##op##_args *a);
    MD_OPS(MD_OP_FIELD)
#undef MD_OP_FIELD
} md_op_table;

/* A stretch of recorded work, for replaying. */
typedef struct md_recording md_recording;

/* Where a backend's operands live. All Local; a backend without this table works on host memory.
 * What is issued runs in the order of issue, and after sync the host sees all of it. The functions
 * md_backend_alloc ... md_backend_sync below say what each does. */
typedef struct md_memory_ops {
    md_status (*alloc)(md_backend *be, size_t bytes, void **out);
    void (*free)(md_backend *be, void *p);
    md_status (*pinned)(md_backend *be, size_t bytes, void **out);
    void (*pinned_free)(md_backend *be, void *p);
    md_status (*upload)(md_backend *be, void *dst, const void *src, size_t bytes);
    md_status (*download)(md_backend *be, void *dst, const void *src, size_t bytes);
    md_status (*feed)(md_backend *be, int slot, void *dst, const void *src, size_t bytes);
    md_status (*feed_wait)(md_backend *be, int slot);
    md_status (*feed_used)(md_backend *be, int slot);
    md_status (*sync)(md_backend *be);
    md_status (*record_begin)(md_backend *be);
    md_status (*record_end)(md_backend *be, md_recording **out);
    md_status (*replay)(md_backend *be, md_recording *r);
    void (*record_free)(md_backend *be, md_recording *r);
} md_memory_ops;

/* Choices that a backend can make by timing, once, before training. All Local. */
typedef struct md_tuning_ops {
    void (*on)(md_backend *be);
    md_status (*write)(md_backend *be, char **out);
    md_status (*read)(md_backend *be, const char *text);
} md_tuning_ops;

struct md_backend {
    const char *name;
    const md_op_table *ops;
    const md_memory_ops *memory; /* NULL: host memory */
    char device[64];             /* the GPU, for people; "" on the host */
    size_t device_bytes;         /* free there when it was opened; 0: may be shared, or the host */
    /* Scratch bytes this op needs with these arguments (a is the whole args struct; data pointers
     * may be NULL). Also the place where a backend prepares what depends on shapes only, so that
     * the op itself allocates nothing; an op whose scratch was never asked for prepares itself at
     * its first run. MD_NO_SCRATCH with the error sentence set: out of memory. May be NULL: no op
     * needs scratch. */
#define MD_NO_SCRATCH SIZE_MAX
    size_t (*scratch_bytes)(md_backend *be, md_op op, const md_operands *a);
    const md_tuning_ops *tuning; /* NULL: nothing to choose */
    void (*destroy)(md_backend *be);
    /* Set by whoever plans memory, at least the largest scratch_bytes; 64-byte aligned. */
    void *scratch;
    size_t scratch_size;
    int threads;
    void *impl;
};

/* MD_OP(be, gemm, .a = &x, .b = &w, .y = &y) */
#define MD_OP(be, op, ...) ((be)->ops->op((be), &(md_##op##_args){__VA_ARGS__}))

/* "gemm" for MD_OP_gemm. */
const char *md_op_name(md_op op);

/* Checks the operands of an op against its row in the shape table (presence, dtype, shape) and that
 * accumulate names outputs of the op; a bit of an absent output means nothing. Every backend calls
 * it first. MD_ERR_BUG naming op and operand. Local. */
md_status md_op_check(md_op op, const md_operands *a);
/* Whether output `out` of an op may be the very memory of input `in` (its row says "may be"). */
bool md_op_may_share(md_op op, int in, int out);
/* Name of operand i of an op ("weight", "dx"); NULL beyond the last one. */
const char *md_op_in_name(md_op op, int i);
const char *md_op_out_name(md_op op, int i);

typedef struct md_backend_args {
    const char *name; /* "cpu"; "check": cpu with every call watched; "cuda" */
    int threads;      /* OpenMP threads to use, 0 = all this process may use */
    md_dtype compute; /* type of activations and matrix weights */
    /* cuda: this rank and the number of ranks on its node; the GPU is the one of this number among
     * those that are visible, or the only visible one. */
    int node_rank, node_size;
    bool planning; /* no device is touched: shapes and scratch sizes only */
} md_backend_args;

/* Ops use another scratch from now on; gives the one they had, to be set again afterwards. Local.
 */
typedef struct md_scratch {
    void *memory;
    size_t size;
} md_scratch;
static inline md_scratch md_backend_scratch(md_backend *be, md_scratch next)
{
    const md_scratch was = {be->scratch, be->scratch_size};
    be->scratch = next.memory;
    be->scratch_size = next.size;
    return was;
}

/* Makes a backend. MD_ERR_CONFIG for a name that this program has not, with those it has, for a
 * compute type that it cannot, and where no GPU can be used; MD_ERR_MEMORY. The backend is used by
 * one thread at a time (it starts its own OpenMP threads). Local. */
md_status md_backend_make(const md_backend_args *args, md_backend **out);
/* The same for name and threads alone, in f32, for the only rank of a node. */
md_status md_backend_create(const char *name, int threads, md_backend **out);
void md_backend_destroy(md_backend *be);

/* ---- memory. On host memory these are allocation, memcpy and nothing. ---- */

/* Zeroed memory for operands, 64-byte aligned. MD_ERR_MEMORY names `what` and the bytes. Local. */
md_status md_backend_alloc(md_backend *be, size_t bytes, const char *what, void **out);
void md_backend_free(md_backend *be, void *p);
/* Zeroed host memory that copies fast; where the backend works on host memory, plain memory. */
md_status md_backend_pinned(md_backend *be, size_t bytes, const char *what, void **out);
void md_backend_pinned_free(md_backend *be, void *p);
/* Operands live in memory that the host cannot read. */
static inline bool md_backend_is_device(const md_backend *be)
{
    return be->memory != NULL;
}
/* Host to operands and back, in the order of ops issued. src of an upload must stay as it is, dst
 * of a download is filled, not before md_backend_sync returns. Local. MD_ERR_DEVICE. */
md_status md_backend_upload(md_backend *be, void *dst, const void *src, size_t bytes);
md_status md_backend_download(md_backend *be, void *dst, const void *src, size_t bytes);
/* Waits for all that was issued. MD_ERR_DEVICE: something of it failed. */
md_status md_backend_sync(md_backend *be);

/* Input that is copied while earlier work still runs. There are MD_FEED_SLOTS slots, each with a
 * pinned source and a destination of its own. A pass: feed_wait (the source may be filled again),
 * fill it, feed (ops issued later see dst), the ops, feed_used (the next feed of this slot waits
 * for them). Local. MD_ERR_DEVICE. */
#define MD_FEED_SLOTS 2
md_status md_backend_feed_wait(md_backend *be, int slot);
md_status md_backend_feed(md_backend *be, int slot, void *dst, const void *src, size_t bytes);
md_status md_backend_feed_used(md_backend *be, int slot);

/* Records the ops issued between begin and end, without running them, so that replay issues them
 * again at once with the same operands (a CUDA graph). Only ops may be issued meanwhile, each once
 * run before (it may have to prepare itself). False: this backend does not record. Local. */
static inline bool md_backend_can_record(const md_backend *be)
{
    return be->memory && be->memory->record_begin;
}
md_status md_backend_record_begin(md_backend *be);
md_status md_backend_record_end(md_backend *be, md_recording **out);
md_status md_backend_replay(md_backend *be, md_recording *r);
void md_backend_record_free(md_backend *be, md_recording *r); /* NULL is fine */

/* From now on scratch_bytes times the ways to run an op where there are several, and takes the
 * fastest. Another run may then choose otherwise, and its sums round otherwise: write gives the
 * choices as text (freed by md_free), with which read makes the same ones, so that they are not
 * timed again. read: MD_ERR_DATA, with nothing chosen, when the text is of another device or
 * library. A backend without choices gives an empty text. */
void md_backend_tune(md_backend *be);
md_status md_backend_choices_write(md_backend *be, char **out);
md_status md_backend_choices_read(md_backend *be, const char *text);

/* "oneDNN 2.6.3": what the cpu backend multiplies matrices with. */
const char *md_backend_library(void);

/* Comma separated names of the backends in this binary. */
const char *md_backend_list(void);

MD_C_END

#endif
