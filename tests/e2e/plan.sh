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
    '^batch +2048 = 64 data-parallel ranks x 1 passes x 32 images' '^checkpoint +7581662976 bytes' \
    '^ranks +64 = data 64 x tensor 1$' 'gradients 4\.975,' \
    '^  really run +1027\.[0-9] .*last_block = chosen, drop path skips\)' -- --ranks 64
plan vit_h.cfg '^  really run +1149\.[0-9] .*drop path skips nothing' \
    -- --ranks 64 model.drop_path_mode=mask
plan vit_h.cfg '^batch +2048 = 64 data-parallel ranks x 4 passes x 8 images' \
    '^steps +187500 ' '1166\.6 GFLOP' -- --ranks 64 train.micro_batch=8
plan vit_h.cfg 'drop path skips, 31 blocks run again\)$' '^compute +1166\.6 GFLOP' \
    -- --ranks 64 train.recompute=32
plan vit_b.cfg '^batch +2048 = 8 data-parallel ranks' '^steps +187500 ' -- --ranks 8

# 64 ranks as 8 x 8: an eighth of the cut parameters, 2 (t - 1) / t of 4 sums a block and image.
plan vit_h.cfg '^ranks +64 = data 8 x tensor 8, sequence, ZeRO-1$' '^parameters +631805248 ' \
    '^batch +2048 = 8 data-parallel ranks x 1 passes x 256 images' 'activations 74\.389,' \
    '^  Adam moments +0\.074 GiB' '^advice +parallel\.tensor = 1 ' '^compute +1166\.6 GFLOP' \
    -- --ranks 64 parallel.tensor=8 parallel.sequence=true parallel.zero=1
# A classifier that is evaluated while it trains, and keeps a moving average.
plan finetune_b.cfg '^checkpoint +1384495744 bytes' '^  moving average +0\.3' '^  evaluation +0\.[0-9]+ GiB' \
    '^  evaluation, on the host +0\.[0-9]+ GiB' -- --ranks 8 optim.ema=0.999 evaluate.every=1
rc=0
"$MD_HPC" plan vit_h.cfg --ranks 63 >"$scratch/out" 2>&1 || rc=$?
if [ $rc != 78 ] || ! grep -q 'does not divide over 63 data-parallel ranks' "$scratch/out"; then
    echo "plan on 63 ranks: $rc" && cat "$scratch/out" && exit 1
fi
echo ok
