#!/bin/bash
# Every fault site that training passes, on each rank that passes it: both ranks end with the
# documented code (nobody waits for a rank that has gone), and the same command without the fault
# gives the curve that nobody disturbed.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
limit=$((30 * ${MD_TEST_SCALE:-1}))
export OMPI_MCA_odls_base_sigkill_timeout=0 # tests/every_rank.sh waits
sed -i 's/max_steps = 20/max_steps = 8/; s/every = 5/every = 3/; s/"pixel"/"vit"/' "$scratch/tiny.cfg"
"$MD_HPC" weights import --out "$scratch/clip.h5" tests/golden/clip_hf >"$log"
keys=(method.teacher.weights="$scratch/clip.h5" optim.max_skipped=3)
done_well 2 base "${keys[@]}"

# fault CODE LIST "WORDS" [goes on from]: MD_FAULT=LIST. Words: an extended regular expression that
# the output holds.
fault() {
    local code=$1 faults=$2 words=$3 r
    rm -rf "$scratch/x" "$scratch"/code.*
    wrap=(tests/every_rank.sh "$scratch/code")
    MD_FAULT=$faults tiny 2 x "${keys[@]}"
    wrap=()
    for r in 0 1; do
        [ "$(cat "$scratch/code.$r")" = "$code" ] ||
            fail "$faults: rank $r ends with $(cat "$scratch/code.$r") instead of $code"
    done
    [ "$rc" = "$code" ] || fail "$faults: exit code $rc instead of $code"
    grep -qE -- "$words" "$log" || fail "$faults: the output lacks $words"
    [ "$(grep -c '^md_hpc: error: ' "$log")" = $((code != 0)) ] || fail "$faults: errors"
    if [ "$code" = 0 ] || [ ! -e "$scratch/x/metrics.jsonl" ]; then return 0; fi
    done_well 2 x "${keys[@]}"
    [ -z "${4:-}" ] || says "$4"
    same base x
}

for r in 0 1; do
    fault 71 base.alloc@rank$r#1 'memory'
    fault 71 base.alloc@rank$r#2 "rank $r: out of memory: [0-9]* bytes for config"
    for n in 6 20 45 60 100; do fault 71 "base.alloc@rank$r#$n" "rank $r: .*out of memory"; done
    fault 71 watchdog.thread@rank$r "rank $r: cannot start the watchdog's threads"
    fault 66 dataset.open@rank$r "rank $r: .*tiny.h5: cannot open"
    fault 71 loader.thread@rank$r "rank $r: cannot start a loader thread"
    fault 65 io.read@rank$r "rank $r: image [0-9]* and the 63 after it have no usable picture"
    fault 65 loader.decode@rank$r "rank $r: .*loader.decode"
    fault 0 io.read.transient@rank$r 'step      8/8'
    fault 79 step.nan@rank$r 'not finite 3 steps in a row, up to step 3'
    for site in write verify fsync; do
        fault 74 ckpt.$site@rank$r "warning: no checkpoint at step 6, .*rank $r: "
    done
    fault 74 "ckpt.write@rank$r#2,ckpt.write@rank$r#3" "error: .*step-00000008" 'step 3, resumed from'
done
fault 74 dataset.index 'cannot read the index'
fault 66 h5.open 'clip.h5: cannot open'
fault 73 run_dir.lock 'LOCK: cannot create'
fault 73 log.open 'cannot open .*metrics.jsonl'
fault 0 log.replace 'warning: cannot write .*run.json: .*; the run goes on without it'
fault 74 weights.load 'clip.h5'
fault 73 ckpt.create 'warning: no checkpoint at step 3'
fault 74 ckpt.space 'no room for a checkpoint'
fault 74 ckpt.seal 'END mark'
fault 73 ckpt.rename 'cannot get its name'
fault 0 ckpt.rename#2 'warning: no checkpoint at step 6'
fault 0 ckpt.latest 'checkpoint of step 3 is written, but: .*LATEST'
fault 0 ckpt.prune 'checkpoint of step 8 is written, but: .*cannot be deleted'
fault 0 log.write 'warning: cannot write .*metrics.jsonl: .*; the run goes on without it'

# A damaged checkpoint of a later step that cannot be set aside keeps nobody from going on.
done_well 2 aside "${keys[@]}"
printf '\377' | dd of="$scratch/aside/checkpoints/step-00000008.h5" bs=1 seek=9000 conv=notrunc 2>/dev/null
MD_FAULT=ckpt.abandon done_well 2 aside "${keys[@]}" checkpoint.every=1
says 'checkpoint skipped: ' 'is written, but: ' 'cannot be set aside'
same base aside

# Four ranks, two to a model, two passes a step: one model's ranks fail, the others go through the
# step; nobody waits.
for grid in "" "parallel.sequence=true parallel.zero=1 parallel.bucket_mib=0.01"; do
    read -ra more <<<"parallel.tensor=2 train.micro_batch=4 $grid"
    for row in "65 io.read@rank3 no.usable.picture" "65 loader.decode@rank1 loader.decode" \
        "79 step.nan@rank2 not.finite" "0 io.read.transient@rank3#6 step......8/8"; do
        read -r code faults words <<<"$row"
        rm -rf "$scratch/x"
        MD_FAULT=$faults tiny 4 x "${keys[@]}" "${more[@]}"
        [ "$rc" = "$code" ] || fail "$faults ${more[*]}: exit code $rc instead of $code"
        grep -qE -- "$words" "$log" || fail "$faults: the output lacks $words"
        [ "$code" = 0 ] || done_well 4 x "${keys[@]}" "${more[@]}"
        near base x
    done
done
echo ok
