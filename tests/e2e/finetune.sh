#!/bin/bash
# From labels: a classifier trained from scratch and from a pretrained student, evaluated while it
# trains and afterwards, on any layout; nearest neighbours of the student; what is refused.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh

classify=(task=finetune model.classes=10 model.rel_pos=per_layer evaluate.split=train evaluate.batch=8
    augment.jitter=0 augment.mixup=0.8 augment.cutmix=1 augment.erasing=0.5 augment.randaugment=2
    optim.layer_decay=0.7 optim.ema=0.9 optim.lr=8e-3)

# Counts of the evaluations of a run, and of an evaluation's file: whole numbers, the same everywhere.
counts() {
    sed -n 's/.*"step":\([0-9]*\),.*"images":\([0-9]*\),"top1_hits":\([0-9]*\),"top5_hits":\([0-9]*\).*/\1 \2 \3 \4/p' \
        "$scratch/$1/evaluations.jsonl"
}
hits() {
    sed -n 's/.*"\(images\|top._hits\)": \([0-9]*\).*/\2/p' "$scratch/$1" | tr '\n' ' '
}
same_counts() {
    diff <(counts "$1") <(counts "$2") || fail "evaluations of $1 and $2 differ"
}

# From scratch: the same losses and counts on every layout, every image once.
done_well 1 scratch "${classify[@]}" evaluate.every=1
says "evaluation after epoch 1" "classifier"
[ "$(counts scratch | cut -d' ' -f1,2 | tr '\n' ' ')" = "6 96 12 96 18 96 20 96 " ] ||
    fail "evaluations of scratch: $(counts scratch)"
done_well 2 two "${classify[@]}" evaluate.every=1 parallel.zero=1
done_well 4 four "${classify[@]}" evaluate.every=1 parallel.tensor=2 parallel.sequence=true
done_well 4 odd "${classify[@]}" evaluate.every=1 evaluate.batch=6 train.micro_batch=2
for run in two four odd; do
    near scratch "$run"
    same_counts scratch "$run"
done
done_well 1 checked "${classify[@]}" evaluate.every=1 backend=check
same scratch checked
done_well 2 cls "${classify[@]}" model.pool=cls evaluate.every=2

# Stopped and resumed: the same bits, moving average included, and no evaluation twice.
done_well 1 halves "${classify[@]}" evaluate.every=1 train.max_steps=12
done_well 1 halves "${classify[@]}" evaluate.every=1
same scratch halves
same_counts scratch halves
state() { "$MD_HPC" checkpoint info "$scratch/$1/checkpoints/step-00000020.h5" | grep 'state hash'; }
[ "$(state scratch)" = "$(state halves)" ] || fail "resumed to another state"

# Evaluated afterwards, on any number of ranks: the counts of the last evaluation.
evaluate() { # RANKS RUN [key=value...]
    local n=$1 run=$2
    shift 2
    rc=0
    timeout -k 5 60 "$MPIRUN" -np "$n" "$MD_HPC" evaluate "$scratch/$run" "$@" >"$log" 2>&1 || rc=$?
}
want=$(counts scratch | tail -n 1 | cut -d' ' -f2-)
for n in 1 2 4; do
    evaluate "$n" scratch
    [ "$rc" = 0 ] || fail "evaluate on $n ranks: $rc"
    [ "$(hits scratch/evaluation-accuracy-train.json)" = "$want " ] ||
        fail "evaluate on $n ranks: $(hits scratch/evaluation-accuracy-train.json) instead of $want"
done
evaluate 4 scratch parallel.tensor=2 evaluate.output="$scratch/out"
[ "$rc" = 0 ] || fail "evaluate on 2 x 2 ranks: $rc"
[ "$(hits out.json)" = "$want " ] || fail "evaluate on 2 x 2 ranks: $(hits out.json)"
sum=$(awk -F, 'NR > 1 { n += $(NF - 4); h += $(NF - 3) } END { print n, h }' "$scratch/out.csv")
[ "$sum" = "${want% *}" ] || fail "out.csv: $sum instead of $want"
evaluate 1 scratch evaluate.ema=true
[ "$rc" = 0 ] || fail "evaluate the moving average"
says "moving averages"

# Evaluated while it trains, the moving average has the counts that it has afterwards, and the run goes
# on as if nobody had looked.
averaged() { # RANKS BASE [key=value...]
    local n=$1 base=$2 run=averaged-$2
    shift 2
    done_well "$n" "$run" "${classify[@]}" evaluate.every=1 evaluate.ema=true "$@"
    says "evaluation of the moving average after epoch"
    same "$base" "$run"
    [ "$(state "$base")" = "$(state "$run")" ] || fail "$run: another state than $base"
    evaluate 2 "$run" # its config says which
    says "moving averages"
    [ "$(counts "$run" | tail -n 1 | cut -d' ' -f2-) " = "$(hits "$run/evaluation-accuracy-train.json")" ] ||
        fail "$run: $(counts "$run" | tail -n 1), afterwards $(hits "$run/evaluation-accuracy-train.json")"
}
averaged 1 scratch
averaged 2 two parallel.zero=1
averaged 4 four parallel.tensor=2 parallel.sequence=true
! diff <(counts scratch) <(counts averaged-scratch) >"$log" || fail "averages are the values"

# From a student: tables shared in pretraining are copied, the rest goes by name.
done_well 2 student
done_well 2 tuned "${classify[@]}" "finetune.from=$scratch/student"
says "from checkpoint $scratch/student/checkpoints/step-00000020.h5 at step 20"
done_well 1 larger "${classify[@]}" "finetune.from=$scratch/student" image.size=24 train.max_steps=2
for n in 1 2 4; do
    evaluate "$n" student evaluate.kind=knn evaluate.knn_k=1 evaluate.split=train
    [ "$rc" = 0 ] || fail "neighbours on $n ranks: $rc"
    # The nearest of an image is itself.
    [ "$(hits student/evaluation-knn-train.json | cut -d' ' -f1,2)" = "96 96" ] ||
        fail "neighbours on $n ranks: $(hits student/evaluation-knn-train.json)"
done
evaluate 2 student evaluate.kind=knn evaluate.feature=cls evaluate.split=train
[ "$rc" = 0 ] || fail "neighbours by cls"

# What cannot be is refused with its reason and 78 (66: no such input), everywhere.
refused() { # CODE WORDS RANKS RUN [key=value...]
    local code=$1 words=$2
    shift 2
    tiny "$@"
    [ "$rc" = "$code" ] || fail "exit code $rc instead of $code: $*"
    says "$words"
}
refused 78 "have 10 classes: set model.classes=10" 2 bad "${classify[@]}" model.classes=9
refused 78 "model.width" 2 bad "${classify[@]}" "finetune.from=$scratch/student" model.width=48 model.heads=3
refused 66 "finetune.from" 2 bad "${classify[@]}" "finetune.from=$scratch/nothing"
refused 78 "set optim.ema" 2 bad "${classify[@]}" evaluate.every=1 evaluate.ema=true optim.ema=0
refused 78 "needs task" 1 bad augment.mixup=0.8
refused 78 "augment.mix_group" 2 bad "${classify[@]}" augment.mix_group=16
evaluate 2 student
[ "$rc" = 78 ] || fail "accuracy of a student: exit code $rc"
says "evaluate.kind=knn"
evaluate 2 scratch evaluate.split=none
[ "$rc" = 65 ] || fail "no such split: exit code $rc"
evaluate 2 scratch evaluate.classes=imagenet_r
[ "$rc" = 78 ] || fail "200 classes of a model with 10: exit code $rc"
says "up to number 988"
evaluate 2 scratch evaluate.resize=15
[ "$rc" = 78 ] || fail "a resize below the crop: exit code $rc"
says "must not be less than image.size"
