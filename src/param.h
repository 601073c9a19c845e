/* param: the registry of parameters. One row each; initialisation, optimizer groups, gradient
 * buckets, checkpoints, export and the parameter count only walk it.
 *
 * A row may be cut over the tensor-parallel group: along cut_dim, which holds cut_parts interleaved
 * parts (3 for a fused qkv), each cut evenly. This rank then holds `local` of `global`.
 *
 * Flat layout: all local values lie in one block, in four groups: rows with weight decay, then
 * those without, of each first the cut ones, then the whole ones; in a group the rows stand in the
 * order of declaration, every row aligned. Gradients and moments use the same offsets, so one
 * optimizer launch covers a group, and the backward pass, which meets the rows in reverse,
 * completes gradients at falling offsets of each group. Padding between rows is zero and stays
 * zero.
 *
 * The blocks are operands: they live where the backend works. What the host reads and writes
 * (initial values, checkpoints, checks) are the host_ blocks: the same memory on a backend that
 * works on host memory, else copies that fetch and store bring up to date. Under bf16 matrix
 * products read a rounded copy of the values; the f32 values are the master. */
#ifndef MD_PARAM_H
#define MD_PARAM_H

#include "kernels/backend.h"

#define MD_PARAM_ALIGN 16
#define MD_PARAM_NAME  80

typedef enum md_init { MD_INIT_CONST, MD_INIT_TRUNC_NORMAL } md_init;

typedef struct md_param {
    char name[MD_PARAM_NAME]; /* BEiT's names, e.g. "blocks.7.attn.qkv.weight" */
    int rank;
    int64_t global[MD_MAX_RANK];
    int cut_dim, cut_parts; /* where tensor parallelism cuts: dimension (-1 nowhere), parts in it */
    md_init init;
    float init_value; /* constant, or sigma of the normal cut at one sigma */
    float init_scale; /* factor on the drawn value */
    bool decay;       /* weight decay applies */
    int layer_id; /* 0 embeddings, k + 1 block k, L + 1 the rest: for layer-wise learning rates */
    /* Set by md_params_seal. */
    bool cut;                   /* this rank holds a part only */
    int64_t local[MD_MAX_RANK]; /* shape of the part */
    md_view view;               /* the part in the global array */
    int64_t count;              /* elements of the part */
    int64_t offset;             /* its first element in the flat blocks */
} md_param;

/* The groups of the flat layout, in its order. */
typedef enum md_param_group {
    MD_GROUP_DECAY_CUT,
    MD_GROUP_DECAY,
    MD_GROUP_PLAIN_CUT,
    MD_GROUP_PLAIN,
    MD_GROUPS
} md_param_group;

typedef struct md_params {
    md_param *row;
    int count, capacity;
    bool sealed, incomplete; /* incomplete: no memory for a row */
    int64_t elements;        /* of a flat block, padding included */
    int64_t end[MD_GROUPS];  /* group g is [end of group g - 1, end[g]) of the flat blocks */
    md_dtype dtype;          /* the compute type; set before the graphs are built */
    md_backend *be;          /* whose memory the blocks are; NULL: the host's */
    float *value, *grad;     /* flat blocks; NULL until md_params_allocate */
    uint16_t *rounded;       /* bf16 copy of value where that is the compute type, or NULL */
    float *m, *v;            /* moments [moments]; NULL until md_params_allocate_moments */
    float *ema;              /* [moments] moving average of the values, or NULL */
    float *reduced;          /* [moments] gradients of this rank's parts under ZeRO, or NULL */
    int64_t moments;
    float *host_value, *host_m, *host_v, *host_ema;
} md_params;

/* A stretch of the flat blocks that is updated, counted or written as one. */
typedef struct md_piece {
    int64_t offset, count; /* elements of value and grad */
    int64_t moment;        /* its first element in m, v and, if sharded, reduced */
    bool decay;            /* weight decay applies */
    bool cut;              /* each rank of tp has its own; else all have the same */
    bool sharded;          /* its gradient stands in `reduced`, not in `grad` */
} md_piece;

void md_params_init(md_params *p);
void md_params_free(md_params *p);

/* Adds one row; name, shape, cut, init, decay and layer_id are taken from `row`. Returns its index,
 * or -1 when out of memory, which md_params_seal reports. A name twice is a bug. Local. */
int md_params_add(md_params *p, const md_param *row);
/* Index of a name, -1 when absent. Local. */
int md_params_find(const md_params *p, const char *name);

/* This rank's place in the tensor-parallel group, and the elements each row is aligned to (a
 * multiple of MD_PARAM_ALIGN). */
typedef struct md_params_cut {
    int rank, size;
    int64_t align;
} md_params_cut;
/* Fixes the layout; cut NULL: one rank. No rows can be added afterwards. MD_ERR_MEMORY: a row could
 * not be added. MD_ERR_CONFIG: a row does not divide over the ranks. Local. */
md_status md_params_seal(md_params *p, const md_params_cut *cut);

/* Group of a sealed row. */
md_param_group md_param_group_of(const md_param *row);
/* The groups that are not empty as pieces, moments at the same offsets; returns how many. Local. */
int md_params_pieces(const md_params *p, md_piece out[MD_GROUPS]);

/* Elements of all rows at their global shapes, without padding. */
int64_t md_params_total(const md_params *p);
/* Bytes of one flat fp32 block. */
size_t md_params_block_bytes(const md_params *p);

/* Allocates the flat blocks for a backend (NULL: host memory), which must outlive them: values
 * always; gradients if asked. Local. MD_ERR_MEMORY. */
md_status md_params_allocate(md_params *p, md_backend *be, bool grads);
/* Allocates both moments with n elements and, if asked, the block of reduced gradients. Local. */
md_status md_params_allocate_moments(md_params *p, int64_t n, bool reduced);
/* Then, where it is wanted, the moving average. Local. MD_ERR_MEMORY. */
md_status md_params_allocate_ema(md_params *p);

/* Brings the host_ blocks up to date with the operands, and the operands, with the rounded copy,
 * up to date with the host_ blocks (values and, where there are any, moments and averages). They
 * wait until it is done. Local. MD_ERR_DEVICE. */
md_status md_params_fetch(md_params *p);
md_status md_params_store(md_params *p);
/* Rounds the values anew, after they changed other than by the optimizer. In the order of ops. */
md_status md_params_round(md_params *p);
/* Gives back host copies that are not needed any more. */
void md_params_drop_host(md_params *p);

/* Tensors over one row's part (data NULL when not allocated): the value in the compute type, as
 * matrix products read it; in f32; on the host, in f32; the gradient, f32. */
md_tensor md_param_value(const md_params *p, int i);
md_tensor md_param_f32(const md_params *p, int i);
md_tensor md_param_host(const md_params *p, int i);
md_tensor md_param_grad(const md_params *p, int i);

/* Draws initial values: element e of the global array of row i is a function of (seed, i, e) only,
 * so every process grid starts from the same weights. The normal is cut at one sigma by inverse
 * CDF, as BEiT's initialisation (microsoft/unilm, beit/modeling_pretrain.py). Writes the host_
 * values: store follows. Local. */
void md_params_initialise(md_params *p, uint64_t seed);

/* Hash of names, global shapes and order: two registries with the same hash hold the same
 * parameters, however they are cut. */
uint64_t md_params_hash(const md_params *p);

#endif
