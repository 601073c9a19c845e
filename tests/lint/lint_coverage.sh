#!/bin/bash
# Every row of MD_OPS has a case in tests/ops, and every node kind one in the tests.
. tests/lint/common.sh

rows() { # FILE MACRO: names in X(name) of a table
    awk -v macro="$2" '
        $0 ~ "^#define " macro "\\(X\\)" { inside = 1; next }
        inside && match($0, /X\([a-z_0-9]+/) { print substr($0, RSTART + 2, RLENGTH - 2) }
        inside && !/\\$/ { inside = 0 }' "$1"
}

ops=$(rows kernels/backend.h MD_OPS)
[ -n "$ops" ] || error "kernels/backend.h:1: no rows of MD_OPS found"
for op in $ops; do
    grep -qsE "\b$op\b" tests/ops/*.c || error "kernels/backend.h: op $op has no case in tests/ops"
done
finish
