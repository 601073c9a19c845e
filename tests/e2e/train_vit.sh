#!/bin/bash
# Runs with a trained teacher, from a public model's files to the loss: every stage, on the teacher's
# own grid and on one that its positions are resized to (with a crop of its own size), on 1 and 2 ranks.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
clip=$scratch/clip.h5
"$MD_HPC" weights import --out "$clip" tests/golden/clip_hf >"$log" 2>&1 || fail "no teacher"

# vit RANKS RUN [key=value...]: three steps. The teacher has 16 x 16 patches of 4 pixels.
vit() {
    local n=$1 run=$2
    shift 2
    done_well "$n" "$run" method.teacher.kind=vit method.teacher.weights="$clip" \
        method.target.norm=layernorm optim.warmup_epochs=0 train.max_steps=3 "$@"
    whole "$run" 3
}
first_loss() { # RUN
    curve "$1" | head -n 1 | cut -d' ' -f2
}

# both NAME TARGET-WIDTH [key=value...]: on 1 and 2 ranks. A target of variance 1 and a prediction
# near 0 have a smooth-L1 of 0.247 at beta = 2: E[x^2] / 4, but for the tails beyond 2.
both() {
    local name=$1 width=$2
    shift 2
    vit 1 "${name}_1" "$@"
    says "teacher vit, " " patches predicted, $width values each"
    vit 2 "${name}_2" "$@"
    near "${name}_1" "${name}_2"
    first_loss "${name}_1" | awk '!($1 > 0.2 && $1 < 0.35) { exit 1 }' ||
        fail "$name: the first loss is $(first_loss "${name}_1")"
    echo "$name $(first_loss "${name}_1")" >>"$scratch/losses"
}
own=(image.size=64 model.patch=4)    # 16 x 16: both see the same picture
resized=(image.size=32 model.patch=8) # 4 x 4: the teacher sees 16 pixels
both own_raw 32 "${own[@]}" method.teacher.stage=raw
both own_post 32 "${own[@]}" method.teacher.stage=ln_post
both own_layers 32 "${own[@]}" method.teacher.stage=raw method.teacher.layers=2
both raw 32 "${resized[@]}" method.teacher.stage=raw
both post 32 "${resized[@]}" method.teacher.stage=ln_post
both proj 24 "${resized[@]}" method.teacher.stage=ln_post_proj
both layers 32 "${resized[@]}" method.teacher.stage=raw method.teacher.layers=2
both exact 32 "${resized[@]}" method.teacher.pos_interpolation=exact
[ "$(cut -d' ' -f2 "$scratch/losses" | sort -u | wc -l)" = 8 ] ||
    fail "a key changes nothing: $(cat "$scratch/losses")"

# The size derived is the one that may be given, and no other.
vit 1 given "${resized[@]}" method.teacher.image_size=16
same post_1 given
tiny 1 wrong method.teacher.kind=vit method.teacher.weights="$clip" "${resized[@]}" \
    method.teacher.image_size=64
[ "$rc" = 78 ] || fail "exit code $rc instead of 78"
says "set method.teacher.image_size = 16"

# Where the teacher's last block runs changes no number; many passes a step add up to one.
vit 2 every_token "${resized[@]}" model.last_block=all
near post_1 every_token
vit 2 passes "${resized[@]}" train.micro_batch=2
near post_1 passes

# The teacher is known by its content: another file of the same is none other, another one is.
same_clip=$scratch/moved.h5 clip=$scratch/openai.h5
mv "$scratch/clip.h5" "$same_clip"
"$MD_HPC" weights import --out "$clip" tests/golden/clip_openai.safetensors >"$log" 2>&1 ||
    fail "no second teacher"
tiny 1 post_1 method.teacher.kind=vit method.teacher.weights="$clip" method.target.norm=layernorm \
    "${resized[@]}"
[ "$rc" = 78 ] || fail "exit code $rc instead of 78"
says "another teacher than method.teacher.weights"
clip=$same_clip
vit 1 post_1 "${resized[@]}"
says "finished"
echo ok
