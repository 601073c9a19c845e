#!/bin/bash
# Includes go down only: every #include is checked against tests/lint/layers.txt.
. tests/lint/common.sh

layer_globs=() layer_of=() foreign_heads=() foreign_where=()
declare -A allowed
set -f
while read -r kind first rest; do
    case $kind in
    layer)
        for glob in $rest; do
            layer_globs+=("$glob")
            layer_of+=("$first")
        done
        ;;
    allow) allowed[$first]=" $rest " ;;
    foreign)
        foreign_heads+=("$first")
        foreign_where+=("$rest")
        ;;
    esac
done < <(grep -v '^#' tests/lint/layers.txt)

layer() { # FILE
    local i
    for i in "${!layer_globs[@]}"; do
        # shellcheck disable=SC2053 # a glob
        [[ $1 == ${layer_globs[i]} ]] && echo "${layer_of[i]}" && return
    done
}

check_own() { # FILE LINE HEADER LAYER
    local target
    target=$(layer "$3")
    if [ -z "$target" ]; then
        [ "$3" = build_stamp.h ] || error "$1:$2: $3 is in no layer (tests/lint/layers.txt)"
    elif [[ ${allowed[$4]} != *" $target "* && ${allowed[$4]} != *" $3 "* ]]; then
        error "$1:$2: layer $4 must not include $3 (layer $target)"
    fi
}

check_foreign() { # FILE LINE HEADER
    local i glob
    for i in "${!foreign_heads[@]}"; do
        # shellcheck disable=SC2053
        [[ $3 == ${foreign_heads[i]} ]] || continue
        for glob in ${foreign_where[i]}; do
            # shellcheck disable=SC2053
            [[ $1 == $glob ]] && return
        done
        error "$1:$2: <$3> belongs to ${foreign_where[i]} only"
    done
}

while read -r file; do
    own=$(layer "$file")
    [ -n "$own" ] || { error "$file:1: in no layer (tests/lint/layers.txt)" && continue; }
    while IFS=: read -r line text; do
        header=${text#*[\"<]} header=${header%%[\">]*}
        case $text in
        *\"*) check_own "$file" "$line" "$header" "$own" ;;
        *) check_foreign "$file" "$line" "$header" ;;
        esac
    done < <(grep -nE '^ *# *include' "$file")
done < <(files 'src/*.[ch]' 'kernels/*.[ch]' 'mpi/*.[ch]' 'io/*.[ch]' 'kernels/*.cu' 'kernels/*.cuh')
finish
