#!/bin/bash
# md_hpc plan: the numbers of the paper's models, without MPI, data or weights.
set -eu
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# plan CONFIG WORDS... -- ARGUMENTS...: each stands in the output.
plan() {
    local config=$1 expected=() words
    shift
    while [ "$1" != -- ]; do
        expected+=("$1")
        shift
    done
    "$MD_HPC" plan "$config" "${@:2}" >"$scratch/out" 2>&1
    for words in "${expected[@]}"; do
        grep -qE -- "$words" "$scratch/out" && continue
        echo "plan $config ${*:2} lacks: $words"
        cat "$scratch/out"
        exit 1
    done
}

plan vit_h.cfg '^parameters +631805248 ' '^steps +187500 ' '^compute +1166\.6 GFLOP' \
    '^batch +2048 = 64 ranks x 1 passes x 32 images' '^checkpoint +7581662976 bytes' -- --ranks 64
plan vit_h.cfg '^batch +2048 = 64 ranks x 4 passes x 8 images' '^steps +187500 ' '1166\.6 GFLOP' \
    -- --ranks 64 train.micro_batch=8
plan vit_b.cfg '^batch +2048 = 8 ranks' '^steps +187500 ' -- --ranks 8
rc=0
"$MD_HPC" plan vit_h.cfg --ranks 63 >"$scratch/out" 2>&1 || rc=$?
if [ $rc != 78 ] || ! grep -q 'does not divide over 63 ranks' "$scratch/out"; then
    echo "plan on 63 ranks: $rc" && cat "$scratch/out" && exit 1
fi
echo ok
