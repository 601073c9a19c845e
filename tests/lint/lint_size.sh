#!/bin/bash
# Files: warning above 500 lines, error above 800. Functions: warning above 60 lines, error above
# 100; error above 6 parameters (use an args struct). Counts rely on the braces of .clang-format: a
# function's body begins and ends with a brace in the first column.
. tests/lint/common.sh

while read -r file; do
    lines=$(wc -l <"$file")
    if [ "$lines" -gt 800 ]; then
        error "$file:1: $lines lines, more than 800"
    elif [ "$lines" -gt 500 ]; then
        warn "$file:1: $lines lines, more than 500"
    fi
done < <(files '*.[ch]' '*.sh' '*.cu' '*.cuh' '*.cpp' | grep -v '^tests/golden/')

while read -r what text; do
    "$what" "$text"
done < <(files '*.[ch]' '*.cu' '*.cuh' | grep -v '^tests/golden/' | xargs awk -f tests/lint/functions.awk)
finish
