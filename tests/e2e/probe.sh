#!/bin/bash
# The linear probe of a pretrained student and of a classifier: both recipes, with the same steps and
# counts on any layout, every image judged once; stopped and killed ones go on to the same heads; what
# is replaced, and what is refused.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh

# grey FILE COUNT CLASSES: an image store whose classes are shades of grey, which can be learned.
grey() {
    local idx=$scratch/idx i
    rm -rf "$idx" && mkdir "$idx"
    {
        word 0x803 && word "$2" && word 16 && word 16
        for ((i = 0; i < $2; i++)); do
            printf '%256s' '' | tr ' ' "\\$(printf '%03o' $((12 + 24 * (i % $3) + i % 5)))"
        done
    } >"$idx/train-images-idx3-ubyte"
    {
        word 0x801 && word "$2"
        for ((i = 0; i < $2; i++)); do printf '%b' "\\x0$((i % $3))"; done
    } >"$idx/train-labels-idx1-ubyte"
    "$MD_HPC" convert --force --out "$1" "$idx" >"$log" 2>&1 || fail "no store $1"
}
grey "$scratch/learn.h5" 100 10
grey "$scratch/judge.h5" 53 10
grey "$scratch/few.h5" 53 9

# compose RANKS RUN OUTPUT RECIPE [key=value...]: $command is a probe.
compose() {
    command=(timeout -k 5 60 "$MPIRUN" -np "$1" "$MD_HPC" evaluate "$scratch/$2" evaluate.kind=probe
        evaluate.probe_recipe="$4" evaluate.probe_batch=16 evaluate.batch=4
        data.train="$scratch/learn.h5" evaluate.data="$scratch/judge.h5" evaluate.split=train
        evaluate.output="$scratch/$3" "${@:5}")
}
# probe RANKS RUN OUTPUT RECIPE [key=value...]
probe() {
    compose "$@"
    rc=0
    "${command[@]}" >"$log" 2>&1 </dev/null || rc=$?
}
probes_well() {
    probe "$@"
    [ "$rc" = 0 ] || fail "exit code $rc: probe $*"
}
# Whole numbers of a result, block by block, and its training losses.
hits() {
    sed -n 's/.*"\(images\|top._hits\|block\|best_block\)": \([0-9]*\).*/\2/p' "$scratch/$1.json" | tr '\n' ' '
}
losses() {
    sed -n 's/.*"train_loss": \([^,]*\).*/\1/p' "$scratch/$1.json"
}
# same_probe A B: the same bits; near_probe A B: the same counts and losses within 1e-6.
same_probe() {
    [ "$(hits "$1")" = "$(hits "$2")" ] || fail "$1: $(hits "$1"), $2: $(hits "$2")"
    [ -n "$(losses "$1")" ] || fail "$1 has no losses"
    diff <(losses "$1") <(losses "$2") || fail "training losses of $1 and $2"
    cmp "$scratch/$1.csv" "$scratch/$2.csv" || fail "classes of $1 and $2"
}
near_probe() {
    [ "$(hits "$1")" = "$(hits "$2")" ] || fail "$1: $(hits "$1"), $2: $(hits "$2")"
    paste <(losses "$1") <(losses "$2") | awk '
        { d = $1 > $2 ? $1 - $2 : $2 - $1 }
        d > 1e-6 * $1 { print; bad = 1 }
        END { exit bad || NR == 0 }' || fail "training losses of $1 and $2"
}

done_well 2 student
declare -A more=([beit]='evaluate.probe_epochs=12 evaluate.probe_lr=0.05'
    [mae]='evaluate.probe_epochs=12 evaluate.probe_lr=4')
for recipe in beit mae; do
    read -ra keys <<<"${more[$recipe]}"
    for n in 1 2 4; do
        probes_well "$n" student "$recipe-$n" "$recipe" "${keys[@]}"
        same_probe "$recipe-1" "$recipe-$n"
    done
    says "probe: epoch ${keys[0]#*=} of ${keys[0]#*=}"
    probes_well 4 student "$recipe-grid" "$recipe" "${keys[@]}" parallel.tensor=2
    near_probe "$recipe-1" "$recipe-grid"
    probes_well 1 student "$recipe-pass" "$recipe" "${keys[@]}" evaluate.batch=3
    near_probe "$recipe-1" "$recipe-pass"
    # Shades can be told apart: far more often than by the tenth that guessing gets.
    read -r images top1 _ <<<"$(hits "$recipe-1")"
    [ "$images" = 53 ] || fail "$recipe: $images images judged instead of 53"
    [ "$top1" -gt 15 ] || fail "$recipe: $top1 of 53 are right"
    sum=$(awk -F, 'NR > 1 { n += $(NF - 4); h += $(NF - 3) } END { print n, h }' "$scratch/$recipe-1.csv")
    [ "$sum" = "$images $top1" ] || fail "$recipe-1.csv: $sum instead of $images $top1"
done
# Every block, and the best one's counts as the result.
[ "$(grep -c '"block":' "$scratch/beit-1.json")" = 2 ] || fail "blocks of beit-1.json"
best=$(sed -n 's/.*"best_block": \([0-9]*\).*/\1/p' "$scratch/beit-1.json")
top1=$(awk -v b="\"block\": $best," 'index($0, b) { found = 1 }
    found && /top1_hits/ { gsub(/[^0-9 ]/, "", $2); print $2; exit }' "$scratch/beit-1.json")
[ "$(hits beit-1 | cut -d' ' -f2)" = "$top1" ] || fail "the best block has $top1 hits"
probes_well 1 student awkward beit evaluate.probe_epochs=1 evaluate.probe_batch=31 evaluate.batch=16
says "passes of more than 1 do not divide"
probes_well 2 student cls mae evaluate.probe_epochs=2 evaluate.feature=cls
probes_well 1 student checked beit evaluate.probe_epochs=2 backend=check
probes_well 1 student untrained beit evaluate.probe_epochs=2 evaluate.from=none

# A classifier's own encoder, which has no final norm.
done_well 2 tuned task=finetune model.classes=10 model.rel_pos=per_layer augment.jitter=0 \
    finetune.from="$scratch/student" train.max_steps=4
probes_well 2 tuned tuned-beit beit evaluate.probe_epochs=2
probes_well 1 tuned tuned-mae mae evaluate.probe_epochs=2

# A training picture that cannot be decoded is replaced and told; one that is to be judged ends it.
MD_FAULT=loader.decode@rank1#3 probes_well 2 student replaced beit evaluate.probe_epochs=1
says "injected fault loader.decode"
MD_FAULT=loader.decode@rank0 probe 2 student many beit evaluate.probe_epochs=1
[ "$rc" = 65 ] || fail "no pictures at all: exit code $rc"

# A head that cannot be fetched ends all ranks, those too that share no data-parallel group with it.
MD_FAULT=probe.fetch@rank3 probe 4 student unfetched beit evaluate.probe_epochs=1 parallel.tensor=2
[ "$rc" = 69 ] || fail "a head that cannot be fetched: exit code $rc"
says "injected fault probe.fetch"

# ---- going on ----

epochs_of() { # what the log says of every epoch
    sed -n 's/.*probe: epoch \([0-9]*\) of [0-9]*, loss \(.*\)/\1 \2/p' "$log"
}
# stopped STEP SIGNAL RANKS OUTPUT RECIPE [key=value...]: one rank gets a signal while all are in that
# step, in the middle of an epoch. $faults: others.
stopped() {
    local step=$1 signal=$2 out=$4
    compose "$3" student "${@:4}"
    MD_FAULT=${faults:+$faults,}comm.alltoallv@rank0#$step:stop "${command[@]}" >"$log" 2>&1 </dev/null &
    job=$!
    until_true 60 asleep
    ranks_of "$job" | tail -n 1 | send "$signal"
    wake
    ended 75
    says "the probe is stopped at step $step of" "the same command goes on from there"
    [ -e "$scratch/$out.probe/step-$(printf %08d "$step").h5" ] || fail "no state of step $step"
    [ ! -e "$scratch/$out.json" ] || fail "a stopped probe has a result"
}
heads() { # the last state of a probe of 12 epochs
    "$MD_HPC" checkpoint info "$scratch/$1.probe/step-00000072.h5" | grep 'state hash'
}
for recipe in beit mae; do
    keys=(evaluate.probe_epochs=12 "${more[$recipe]#* }")
    out=$recipe-stopped
    probes_well 1 student "$recipe-whole" "$recipe" "${keys[@]}"
    epochs_of >"$scratch/whole"
    stopped 20 USR1 2 "$out" "$recipe" "${keys[@]}"
    epochs_of >"$scratch/parts"
    # Killed in the middle of an epoch, and on to the end on other ranks.
    MD_FAULT=comm.alltoallv@rank1#9:kill probe 2 student "$out" "$recipe" "${keys[@]}"
    [ "$rc" = 137 ] || fail "a killed probe: exit code $rc"
    says "probe: goes on from $scratch/$out.probe/step-00000020.h5"
    epochs_of >>"$scratch/parts"
    probes_well 4 student "$out" "$recipe" "${keys[@]}"
    says "probe: goes on from $scratch/$out.probe/step-00000024.h5"
    epochs_of >>"$scratch/parts"
    diff "$scratch/whole" "$scratch/parts" || fail "$recipe: epochs of a probe that was stopped"
    same_probe "$recipe-whole" "$out"
    [ "$(heads "$recipe-whole")" = "$(heads "$out")" ] || fail "$recipe: other heads"
    # One that is finished is judged again, also on other images.
    probes_well 2 student "$out" "$recipe" "${keys[@]}"
    ! grep -q 'probe: epoch' "$log" || fail "$recipe: a finished probe learns again"
    same_probe "$recipe-whole" "$out"
    probes_well 2 student "$out" "$recipe" "${keys[@]}" evaluate.data="$scratch/learn.h5"
    ! grep -q 'probe: epoch' "$log" || fail "$recipe: other images make it learn again"
    [ "$(hits "$out" | cut -d' ' -f1)" = 100 ] || fail "$recipe: $(hits "$out") of 100 other images"
done
"$MD_HPC" checkpoint verify "$scratch/beit-whole.probe" >"$log" 2>&1 || fail "the kept heads"
# A damaged one gives way to the one before.
printf 'x' | dd of="$scratch/mae-stopped.probe/step-00000072.h5" bs=1 seek=6000 conv=notrunc 2>"$log"
probes_well 2 student mae-stopped mae evaluate.probe_epochs=12 "${more[mae]#* }"
says 'step-00000066.h5' 'probe: epoch 12 of 12'
same_probe mae-whole mae-stopped

# On a grid; and what was replaced before the stop still counts: 6 images here and 6 there are too many.
keys=(evaluate.probe_epochs=12 "${more[mae]#* }" parallel.tensor=2)
stopped 20 TERM 4 grid-stopped mae "${keys[@]}"
probes_well 2 student grid-stopped mae "${keys[@]}"
near_probe mae-whole grid-stopped
six='loader.decode@rank0#1,loader.decode@rank0#3,loader.decode@rank0#5,loader.decode@rank0#7,loader.decode@rank0#9,loader.decode@rank0#11'
faults=$six stopped 5 TERM 2 counted beit evaluate.probe_epochs=2
says 'injected fault loader.decode'
MD_FAULT=$six probe 2 student counted beit evaluate.probe_epochs=2
[ "$rc" = 65 ] || fail "12 replaced images over a stop: exit code $rc"
says '12 of the 96 images of epoch 0'

# Another probe takes the place of what is there, and says so.
probes_well 2 student "beit-1" beit evaluate.probe_epochs=2 evaluate.probe_lr=0.01
says 'is of another probe, which this one takes the place of: epochs was 12 and is now 2'
[ -e "$scratch/beit-1.probe/step-00000072.h5.abandoned" ] || fail "the other probe is gone"
says 'probe: epoch 2 of 2'
probes_well 2 student "beit-1" beit evaluate.probe_epochs=2 evaluate.probe_lr=0.01 evaluate.from=none
says 'encoder was'

# What cannot be kept is a warning; two probes in one place are refused.
MD_FAULT=ckpt.create#1 probes_well 2 student unkept beit evaluate.probe_epochs=2
says "is not kept"
exec 9>"$scratch/unkept.probe/LOCK"
flock 9
probe 2 student unkept beit evaluate.probe_epochs=2
exec 9>&-
[ "$rc" = 77 ] || fail "two at once: exit code $rc"
says "unkept.probe/LOCK: the directory is in use"

# What cannot be is refused with its reason and 78, everywhere.
refused() { # WORDS RANKS RUN RECIPE [key=value...]
    local words=$1 n=$2 run=$3
    shift 3
    probe "$n" "$run" refused "$@"
    [ "$rc" = 78 ] || fail "exit code $rc instead of 78: $*"
    says "$words"
}
refused "evaluate.probe_batch" 2 student beit evaluate.probe_batch=15
refused "evaluate.probe_batch" 4 student mae evaluate.probe_batch=6 parallel.tensor=2
refused "100 images, fewer than one batch of 128" 2 student beit evaluate.probe_batch=128
refused "evaluate.feature = logits" 2 tuned mae evaluate.feature=logits
refused "look at the mean" 2 tuned mae evaluate.feature=cls
refused "have 10 classes" 2 student beit evaluate.data="$scratch/few.h5"
refused "evaluate.probe_recipe" 1 student both
