#!/bin/bash
# Scripts: what shellcheck finds is an error.
. tests/lint/common.sh
command -v shellcheck >/dev/null || { echo 'shellcheck is not installed' && exit 77; }
while read -r file; do
    shellcheck -x -f gcc "$file" || errors=$((errors + 1))
done < <(files '*.sh' '*.sbatch' '*.pbs' '*.env' '.ci/*')
finish
