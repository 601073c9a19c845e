/* param: the registry of parameters. One row each; initialisation, optimizer groups, gradient
 * buckets, checkpoints, export and the parameter count only walk it.
 *
 * Flat layout: all values lie in one block, first the rows with weight decay, then those without,
 * each group in the order of declaration and every row aligned to MD_PARAM_ALIGN elements.
 * Gradients and moments use the same offsets, so one optimizer launch covers a group, and the
 * backward pass, which meets the rows in reverse, completes gradients at falling offsets of each
 * group. Padding between rows is zero and stays zero. */
#ifndef MD_PARAM_H
#define MD_PARAM_H

#include "src/tensor.h"

#define MD_PARAM_ALIGN 16
#define MD_PARAM_NAME  80

typedef enum md_init { MD_INIT_CONST, MD_INIT_TRUNC_NORMAL } md_init;

typedef struct md_param {
    char name[MD_PARAM_NAME]; /* BEiT's names, e.g. "blocks.7.attn.qkv.weight" */
    int rank;
    int64_t global[MD_MAX_RANK];
    int cut_dim,
        cut_parts; /* tensor-parallel cut: dimension (-1 none), interleaved parts (3: qkv) */
    md_init init;
    float init_value; /* constant, or sigma of the normal cut at one sigma */
    float init_scale; /* factor on the drawn value */
    bool decay;       /* weight decay applies */
    int layer_id;   /* 0 embeddings, k + 1 block k, L + 1 the rest: for layer-wise learning rates */
    int64_t count;  /* elements */
    int64_t offset; /* first element in the flat blocks; set by md_params_seal */
} md_param;

typedef struct md_params {
    md_param *row;
    int count, capacity;
    bool sealed, incomplete;     /* incomplete: no memory for a row */
    int64_t elements;            /* of a flat block, padding included */
    int64_t decay_end;           /* elements of the group with weight decay: [0, decay_end) */
    float *value, *grad, *m, *v; /* flat blocks; NULL until md_params_allocate asks for them */
} md_params;

void md_params_init(md_params *p);
void md_params_free(md_params *p);

/* Adds one row; name, shape, init, decay and layer_id are taken from `row`. Returns its index, or
 * -1 when out of memory, which md_params_seal reports. A name twice is a bug. Local. */
int md_params_add(md_params *p, const md_param *row);
/* Index of a name, -1 when absent. Local. */
int md_params_find(const md_params *p, const char *name);
/* Fixes the layout. No rows can be added afterwards. MD_ERR_MEMORY: a row could not be added.
 * Local. */
md_status md_params_seal(md_params *p);

/* Elements of all rows, without padding. */
int64_t md_params_total(const md_params *p);
/* Bytes of one flat fp32 block. */
size_t md_params_block_bytes(const md_params *p);

/* Allocates the flat blocks: values always; gradients and both moments if asked. Local. */
md_status md_params_allocate(md_params *p, bool grads, bool moments);

/* Tensors over one row of the value or gradient block (data NULL when not allocated). */
md_tensor md_param_value(const md_params *p, int i);
md_tensor md_param_grad(const md_params *p, int i);

/* Draws initial values: element e of row i is a function of (seed, i, e) only, so every process
 * grid starts from the same weights. The normal is cut at one sigma by inverse CDF, as BEiT's
 * initialisation (microsoft/unilm, beit/modeling_pretrain.py). Local. */
void md_params_initialise(md_params *p, uint64_t seed);

/* Hash of names, shapes and order: two registries with the same hash hold the same parameters. */
uint64_t md_params_hash(const md_params *p);

#endif
