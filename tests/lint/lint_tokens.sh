#!/bin/bash
# Words that belong to one room stay there (tests/lint/tokens.txt), and no condition under src/ asks
# which published method is being run: methods are data.
. tests/lint/common.sh
set -f

patterns=() rooms=() reasons=()
while IFS='|' read -r -a column; do
    n=${#column[@]}
    # The pattern itself may hold bars: the last two columns are the room and the reason.
    pattern=$(IFS='|' && echo "${column[*]:0:n-2}")
    patterns+=("${pattern%"${pattern##*[! ]}"}")
    rooms+=("${column[n - 2]}")
    reasons+=("${column[n - 1]# }")
done < <(grep -v '^#' tests/lint/tokens.txt)

methods='\b(maskdistill|beit|mae|simmim|maskfeat|milan|mvp|peco|ibot|data2vec|bootmae|sdae|conmim|msn|cae|eva)\b'

in_room() { # FILE GLOBS
    local glob
    for glob in $2; do
        # shellcheck disable=SC2053 # a glob
        [[ $1 == $glob ]] && return 0
    done
    return 1
}

stripped=$(mktemp)
trap 'rm -f "$stripped"' EXIT
while read -r file; do
    code "$file" >"$stripped"
    if [[ $file == src/*.c ]]; then
        while IFS=: read -r line text; do
            [[ $text =~ (strcmp|strcasecmp|strstr|md_choice_index|if \(|\?|==) ]] || continue
            error "$file:$line: a method's name in a condition (methods are rows of data): $text"
        done < <(grep -iE "$methods" "$stripped")
    fi
    sed -i -E 's/"([^"\\]|\\.)*"/""/g' "$stripped"
    for i in "${!patterns[@]}"; do
        in_room "$file" "${rooms[i]}" && continue
        while IFS=: read -r line text; do
            error "$file:$line: ${reasons[i]}: ${text#"${text%%[! ]*}"}"
        done < <(grep -E "${patterns[i]}" "$stripped")
    done
done < <(files 'src/*.[ch]' 'kernels/*.[ch]' 'kernels/*.cu' 'kernels/*.cuh' 'mpi/*.[ch]' 'io/*.[ch]')
finish
