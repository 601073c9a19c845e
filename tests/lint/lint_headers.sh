#!/bin/bash
# Every C file begins with a comment that says what it is; every header has a guard named after it,
# or says in that comment that it has none.
. tests/lint/common.sh

while read -r file; do
    head -n 1 "$file" | grep -q '^/\*' || error "$file:1: begins with no comment"
    [[ $file == *.h ]] || continue
    guard=$(basename "$file" .h) guard=${guard^^} guard=${guard//[^A-Z0-9]/_}
    grep -qiE 'no include guard' "$file" && continue
    grep -qE "^#ifndef (MD_)?${guard}_H\$" "$file" || error "$file:1: no include guard MD_${guard}_H"
done < <(files '*.[ch]' '*.cu' '*.cuh' '*.cpp' | grep -v '^tests/golden/')
finish
