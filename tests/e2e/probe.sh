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

# probe RANKS RUN OUTPUT RECIPE [key=value...]
probe() {
    local n=$1 run=$2 out=$3 recipe=$4
    shift 4
    rc=0
    timeout -k 5 60 "$MPIRUN" -np "$n" "$MD_HPC" evaluate "$scratch/$run" evaluate.kind=probe \
        evaluate.probe_recipe="$recipe" evaluate.probe_batch=16 evaluate.batch=4 \
        data.train="$scratch/learn.h5" evaluate.data="$scratch/judge.h5" evaluate.split=train \
        evaluate.output="$scratch/$out" "$@" >"$log" 2>&1 </dev/null || rc=$?
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
declare -A more=([beit]='evaluate.probe_epochs=20 evaluate.probe_lr=0.05'
    [mae]='evaluate.probe_epochs=18 evaluate.probe_lr=4')
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

# stopped RECIPE OUTPUT [key=value...]: as mpirun passes a scheduler's signal on.
stopped() {
    local recipe=$1 out=$2 pid end=$((SECONDS + 60))
    shift 2
    rm -f "$log"
    probe 2 student "$out" "$recipe" "$@" &
    pid=$!
    until grep -q 'probe: epoch 3 of' "$log" 2>/dev/null; do
        [ $SECONDS -lt $end ] || fail "no third epoch"
        sleep 0.02
    done
    pkill -USR1 -f "^$MD_HPC evaluate .*evaluate.output=$scratch/$out " || fail "nobody to stop"
    wait "$pid"
    says 'the same command goes on from there'
}
epochs=40
for recipe in beit mae; do
    keys=("evaluate.probe_epochs=$epochs" "${more[$recipe]#* }")
    probes_well 1 student "$recipe-whole" "$recipe" "${keys[@]}"
    stopped "$recipe" "$recipe-stopped" "${keys[@]}"
    [ ! -e "$scratch/$recipe-stopped.json" ] || fail "$recipe: it was not stopped"
    MD_FAULT=loader.decode@rank1#100:kill probe 2 student "$recipe-stopped" "$recipe" "${keys[@]}"
    [ "$rc" = 137 ] || fail "a killed probe: exit code $rc"
    says 'probe: goes on from'
    probes_well 4 student "$recipe-stopped" "$recipe" "${keys[@]}"
    says 'probe: goes on from'
    same_probe "$recipe-whole" "$recipe-stopped"
    # One that is finished is judged again, also on another split.
    probes_well 2 student "$recipe-stopped" "$recipe" "${keys[@]}"
    ! grep -q 'probe: epoch' "$log" || fail "$recipe: a finished probe learns again"
    same_probe "$recipe-whole" "$recipe-stopped"
done
"$MD_HPC" checkpoint verify "$scratch/beit-whole.probe" >"$log" 2>&1 || fail "the kept heads"

# Another probe takes the place of what is there, and says so.
probes_well 2 student "beit-1" beit evaluate.probe_epochs=2 evaluate.probe_lr=0.01
says 'is of another probe, which it takes the place of: epochs was 20 and is now 2'
says 'probe: epoch 2 of 2'
probes_well 2 student "beit-1" beit evaluate.probe_epochs=2 evaluate.probe_lr=0.01 evaluate.from=none
says 'encoder was'

# What cannot be kept is a warning; two probes in one place are refused.
MD_FAULT=ckpt.create#1 probes_well 2 student unkept beit evaluate.probe_epochs=2
says "the older one stays"
exec 9>"$scratch/unkept.probe/LOCK"
flock 9
probe 2 student unkept beit evaluate.probe_epochs=2
exec 9>&-
[ "$rc" = 77 ] || fail "two at once: exit code $rc"

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
