/* dialects_table: the dialects as data, for dialects.c alone. */
#ifndef MD_DIALECTS_TABLE_H
#define MD_DIALECTS_TABLE_H

#include "io/dialects.h"

/* One parameter in a dialect. Names are relative to the dialect's root, or, after a '/', to the
 * wrapper around it; %d is the layer. Of several rules for one parameter the first whose tensors
 * are there counts. */
typedef struct md_dialect_rule {
    md_weight_id id;
    const char *from[MD_DIALECT_PARTS];
    bool transposed, optional;
    const char *zero; /* the rule holds only if this tensor is absent or all zeros */
} md_dialect_rule;

#define MD_DIALECT_ROOTS   4
#define MD_DIALECT_IGNORED 12

typedef struct md_dialect {
    const char *name;
    const char *probe;     /* it is this dialect if this tensor is there */
    const char *absent[2]; /* and these are not */
    const char *root[MD_DIALECT_ROOTS];
    /* Beginnings of names below the root, or ends behind a '*', that are no business of the
     * encoder; what lies outside the root never is. */
    const char *ignored[MD_DIALECT_IGNORED];
    md_dialect_defaults defaults;
    const md_dialect_rule *rules;
    int count;
} md_dialect;

extern const md_dialect md_dialects[];
extern const int md_dialect_count;

#endif
