#!/bin/bash
# No unfinished work, no paths of one machine, no trailing blanks, no tabs in C.
. tests/lint/common.sh

look() { # WHAT PATTERN FILE...
    local what=$1 pattern=$2
    shift 2
    while IFS=: read -r file line text; do
        error "$file:$line: $what: ${text:0:80}"
    done < <(grep -nHIE "$pattern" "$@")
}

mapfile -t all < <(files '*' | grep -vE '^(LICENSE|tests/golden/|tests/lint/)')
mapfile -t sources < <(files '*.[ch]' '*.cu' '*.cuh' '*.cpp')
look 'unfinished' '\b(TODO|FIXME|XXX|HACK)\b' "${all[@]}"
look 'path of one machine' '(^|[^A-Za-z0-9._~/-])/(home|work|root|Users|mnt|scratch)/' "${all[@]}"
look 'trailing blank' '[ 	]+$' "${all[@]}"
look 'tab' '	' "${sources[@]}"
finish
