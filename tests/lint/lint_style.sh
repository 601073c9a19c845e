#!/bin/bash
# clang-format 14 leaves every C file as it is.
. tests/lint/common.sh
format=$(command -v clang-format-14 || command -v clang-format) ||
    { echo 'clang-format-14 is not installed' && exit 77; }
"$format" --version | grep -q 'version 14\.' ||
    { echo "clang-format 14 is needed, found: $("$format" --version)" && exit 77; }
while read -r file; do
    "$format" --dry-run -Werror "$file" >/dev/null 2>&1 && continue
    line=$("$format" --dry-run "$file" 2>&1 | sed -n 's/^[^:]*:\([0-9]*\):.*/\1/p' | head -n 1)
    error "$file:$line: not as clang-format would write it (clang-format-14 -i $file)"
done < <(files '*.[ch]' '*.cu' '*.cuh' '*.cpp' | grep -v '^tests/golden/')
finish
