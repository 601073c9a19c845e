#!/bin/bash
# What the same or a changed command does in a run directory that holds checkpoints: it goes on from
# them, or is refused; nothing is lost. A new run directory may start from any checkpoint.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
done_well 2 base

# refused CODE RUN key=value...: the run directory stays as it was.
refused() {
    local code=$1 run=$2 before
    shift
    before=$(cd "$scratch/$run" && md5sum checkpoints/* metrics.jsonl events.jsonl config.cfg)
    tiny 2 "$@"
    [ "$rc" = "$code" ] || fail "exit code $rc instead of $code: $*"
    [ "$before" = "$(cd "$scratch/$run" && md5sum checkpoints/* metrics.jsonl events.jsonl config.cfg)" ] ||
        fail "$run was changed by: $*"
}

# ---- checkpoint.resume ----
done_well 2 start checkpoint.resume=none train.max_steps=7
refused 78 start checkpoint.resume=none
says "checkpoint.resume = none" "$scratch/start/checkpoints holds checkpoints up to step 7" \
    "choose another run.dir" "checkpoint.resume = auto"

# A branch from step 5, cut off and run again by the same command until it is done.
from=$scratch/start/checkpoints/step-00000005.h5
branch() {
    MD_FAULT=${1:-} tiny 2 branch checkpoint.resume="$from"
}
branch log.write@rank0#9:kill
[ "$rc" != 0 ] || fail "nobody was killed"
[ -e "$scratch/branch/checkpoints/step-00000010.h5" ] || fail "killed before its first checkpoint"
branch log.write@rank0#5:kill
[ "$rc" != 0 ] || fail "nobody was killed the second time"
says "checkpoint.resume = $from is not used: $scratch/branch has checkpoints of its own" \
    "resumed from $scratch/branch/checkpoints/step-00000010.h5"
rm "$from" # it need not live as long
branch
[ "$rc" = 0 ] || fail "exit code $rc"
ls "$scratch"/*/checkpoints/*.abandoned 2>/dev/null && fail "something was abandoned"
diff <(curve branch) <(curve base | tail -n +6) || fail "the branch went another way"
rm -r "$scratch/branch"
branch
[ "$rc" = 66 ] || fail "exit code $rc with the start gone"

# ---- another experiment ----
refused 78 base run.seed=4 augment.flip=0.25 method.loss.beta=1.0 image.mean=0.5,0.5,0.5 \
    model.drop_path=0.2 optim.lr=1e-3
says "step-00000020.h5 belongs to another experiment: choose another run.dir" \
    "run.seed was 3 and is now 4" "augment.flip was 0.5 and is now 0.25" \
    "method.loss.beta was 2.0 and is now 1.0" "model.drop_path was 0.3 and is now 0.2" \
    "image.mean was [0.485, 0.456, 0.406] and is now [0.5, 0.5, 0.5]"
! grep 'error: .*optim.lr' "$log" || fail "a key that may be tuned is refused"
store "$scratch/other.h5" 97
refused 78 base data.train="$scratch/other.h5"
says "another image store than data.train"

# Tuning is told; layout, paths, logs and length need no word.
cp "$scratch/tiny.h5" "$scratch/moved.h5"
done_well 1 base optim.lr=1e-3 train.epochs=4 train.max_steps=22 data.train="$scratch/moved.h5" \
    train.micro_batch=4 data.workers=2 checkpoint.every=4 log.every=1 model.last_block=all
says "warning: optim.lr was 0.004 and is now 0.001" "warning: train.epochs was 10.0 and is now 4.0"
[ "$(grep -c warning "$log")" = 2 ] || fail "more than two warnings"
whole base 22

# A new run from an old checkpoint may be another experiment.
done_well 2 fork checkpoint.resume="$scratch/base/checkpoints/step-00000022.h5" run.seed=4 \
    data.train="$scratch/other.h5" train.max_steps=24
says "warning: run.seed was 3 and is now 4" "another image store" "resumed from $scratch/base/"
[ "$(curve fork | cut -d' ' -f1 | tr '\n' ' ')" = "23 24 " ] || fail "the fork's steps"

# ---- an end for want of data keeps what there is ----
# damage WORD COUNT: in as many pictures (their bytes are those of sources), one with this word.
damage() {
    cp "$scratch/tiny.h5" "$scratch/broken.h5"
    grep -abo "$1" "$scratch/tiny.h5" | cut -d: -f1 |
        awk '$1 - last >= 256 { print; last = $1 }' | head -n "$2" | while read -r at; do
        printf 'xx' | dd of="$scratch/broken.h5" bs=1 seek="$at" conv=notrunc status=none
    done
}
# The 11th bad picture to come up ends the run before its first checkpoint is due.
damage const 15
broken() {
    tiny "$1" "$2" data.train="$scratch/broken.h5" checkpoint.every=100 "${@:3}"
}
broken 2 unmoved data.max_bad=1
[ "$rc" = 0 ] || fail "exit code $rc"
broken 2 moved
[ "$rc" = 65 ] || fail "exit code $rc instead of 65"
says "more than data.max_bad"
step=$(curve moved | tail -n 1 | cut -d' ' -f1)
((step >= 1 && step < 6)) || fail "it ended after step $step"
[ "$(cat "$scratch/moved/checkpoints/LATEST")" = "step-0000000$step.h5" ] || fail "no checkpoint"
before=$(md5sum "$scratch"/moved/checkpoints/*)
broken 2 moved # no better
[ "$rc" = 65 ] || fail "exit code $rc instead of 65"
says "more than data.max_bad" "resumed from $scratch/moved/checkpoints/step-0000000$step.h5"
[ "$before" = "$(md5sum "$scratch"/moved/checkpoints/*)" ] || fail "the checkpoint was changed"
broken 2 moved data.max_bad=1
[ "$rc" = 0 ] || fail "exit code $rc"
same unmoved moved # the counts of bad images too

# Every picture is named, however many there are in a step: here some 40 in 6 steps.
damage ' = ' 40
for n in 1 2; do
    broken "$n" "many_$n" data.max_bad=1 train.max_steps=6 train.micro_batch=4
    [ "$rc" = 0 ] || fail "exit code $rc"
    counted=$(curve "many_$n" | tail -n 1 | cut -d' ' -f4)
    events=$(grep -c '"event":"bad_image"' "$scratch/many_$n/events.jsonl")
    [ "$counted" -gt 30 ] || fail "only $counted bad pictures"
    [ "$events" -ge "$counted" ] || fail "$events of $counted bad pictures are named"
done

# ---- config.cfg is whole at any moment ----
before=$(cat "$scratch/moved/config.cfg")
MD_FAULT=publish.sync@rank0#1 tiny 2 moved log.every=3
[ "$rc" = 74 ] || fail "exit code $rc instead of 74"
says "config.cfg"
[ "$before" = "$(cat "$scratch/moved/config.cfg")" ] || fail "config.cfg was changed"
[ ! -e "$scratch/moved/config.cfg.partial" ] || fail "config.cfg.partial is left"
"$MD_HPC" config check "$scratch/moved/config.cfg" >"$log" 2>&1 || fail "config.cfg is no config"
echo ok
