#!/bin/bash
# Runs with a teacher of BEiT's architecture: timm's pretrained one, transformers' fine-tuned one and
# an earlier run of ours, on 1 and 2 ranks, with and without relative positions in the student.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
for kind in timm.safetensors hf; do
    "$MD_HPC" weights import --out "$scratch/${kind%%.*}.h5" "tests/golden/beit_$kind" >"$log" 2>&1 ||
        fail "no teacher $kind"
done

# beit RANKS RUN TEACHER [key=value...]: three steps; these teachers have 5 x 5 patches of 4 pixels.
beit() {
    local n=$1 run=$2 teacher=$3
    shift 3
    done_well "$n" "$run" method.teacher.kind=vit method.teacher.weights="$scratch/$teacher.h5" \
        method.target.norm=layernorm optim.warmup_epochs=0 train.max_steps=3 image.size=20 "$@"
    whole "$run" 3
}

# both NAME TEACHER [key=value...]: a target of variance 1 and a prediction near 0 have a smooth-L1 of
# 0.247 at beta = 2.
both() {
    local name=$1 teacher=$2 loss
    shift 2
    beit 1 "${name}_1" "$teacher" "$@"
    says "teacher vit, " " patches predicted, 32 values each"
    beit 2 "${name}_2" "$teacher" "$@"
    near "${name}_1" "${name}_2"
    loss=$(curve "${name}_1" | head -n 1 | cut -d' ' -f2)
    awk -v l="$loss" 'BEGIN { exit !(l > 0.2 && l < 0.35) }' || fail "$name: the first loss is $loss"
    echo "$name $loss" >>"$scratch/losses"
}
both timm_raw timm method.teacher.stage=raw
both timm_post timm method.teacher.stage=ln_post
both timm_no_rel timm model.rel_pos=none model.abs_pos=true
both hf_raw hf method.teacher.stage=raw
both hf_post hf method.teacher.stage=ln_post
[ "$(cut -d' ' -f2 "$scratch/losses" | sort -u | wc -l)" = 5 ] ||
    fail "a key changes nothing: $(cat "$scratch/losses")"
beit 2 tensor timm method.teacher.stage=ln_post parallel.tensor=2
near timm_post_1 tensor
beit 2 sequence timm method.teacher.stage=ln_post parallel.tensor=2 parallel.sequence=true
near timm_post_1 sequence

# What one run trained teaches the next.
"$MD_HPC" weights import --out "$scratch/own.h5" "$scratch/timm_post_1" >"$log" 2>&1 ||
    fail "no teacher from a run"
beit 1 second own

# Its tables are not resized.
tiny 1 wrong method.teacher.kind=vit method.teacher.weights="$scratch/timm.h5" image.size=16
[ "$rc" = 78 ] || fail "exit code $rc instead of 78"
says "relative positions are for 5 x 5 patches"
"$MD_HPC" plan "$scratch/tiny.cfg" method.teacher.kind=vit image.size=20 \
    method.teacher.weights="$scratch/timm.h5" >"$log" 2>&1 || fail "no plan"
echo ok
