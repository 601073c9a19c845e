#!/bin/bash
# Stopped by a signal, killed at any moment, moved to other ranks, a damaged checkpoint: the same
# command goes on, and the curve is that of the run nobody disturbed.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
steps=40
sed -i "s/max_steps = 20/max_steps = $steps/" "$scratch/tiny.cfg"
done_well 2 base
whole base $steps

# goes_on RUN RANKS: the same command once more, to the end.
goes_on() {
    done_well "$2" "$1"
    whole "$1" $steps
}

status() { # RUN STATE CODE
    local line
    for line in "\"state\": \"$2\"" "\"exit_code\": $3"; do
        grep -q "$line" "$scratch/$1/status.json" || fail "$1: $(cat "$scratch/$1/status.json")"
    done
}

# One signal to mpirun, which gives it to all, or to any one rank: all stop at the same step.
stop_run() { # RUN SIGNAL mpirun|rank
    MD_FAULT=log.write@rank0#9:stop start 2 "$1"
    until_true 60 asleep
    if [ "$3" = mpirun ]; then below "$job" | head -n 1; else ranks_of "$job" | tail -n 1; fi |
        send "$2"
    wake
    ended 75
    says "stopped at step" "the same command goes on"
    status "$1" requeue 75
    local step
    step=$(curve "$1" | tail -n 1 | cut -d' ' -f1)
    [ -e "$scratch/$1/checkpoints/step-$(printf %08d "$step").h5" ] || fail "$1: no checkpoint at $step"
    [ "$step" -lt $steps ] || fail "$1 was not stopped"
}
stop_run usr1 USR1 mpirun
cp -r "$scratch/usr1" "$scratch/wider"
cp -r "$scratch/usr1" "$scratch/narrower"
goes_on usr1 2
says "resumed from $scratch/usr1/checkpoints/step-"
same base usr1
status usr1 finished 0
stop_run term TERM rank
goes_on term 2
same base term

# Checkpoints know no layout.
goes_on wider 4
near base wider
goes_on narrower 1
near base narrower

# A finished run is told so and left as it is.
before=$(cat "$scratch/usr1/metrics.jsonl" && ls "$scratch/usr1/checkpoints")
goes_on usr1 2
says "finished" "train.max_steps"
goes_on usr1 1 # nor does a smaller goal change it
done_well 2 usr1 train.max_steps=3
[ "$before" = "$(cat "$scratch/usr1/metrics.jsonl" && ls "$scratch/usr1/checkpoints")" ] ||
    fail "a finished run was changed"

# From a checkpoint of another run, which stays as it is. Starting anew is refused where something
# would be lost.
from=$scratch/usr1/checkpoints/step-$(printf %08d $((steps - 5))).h5
done_well 2 fork checkpoint.resume="$from"
says "resumed from $from"
diff <(curve base | tail -n 5) <(curve fork) || fail "the fork is another run"
tiny 2 fork checkpoint.resume=none
[ "$rc" = 78 ] || fail "exit code $rc: the fork starts anew"
says "holds checkpoints up to step $steps"
[ "$before" = "$(cat "$scratch/usr1/metrics.jsonl" && ls "$scratch/usr1/checkpoints")" ] ||
    fail "the other run was changed"

# kill -9 of one rank or of all at any moment.
for victim in 1 2 '1,2'; do
    run=kill_$victim
    start 2 "$run"
    until_true 60 at_step "$run" $((1 + RANDOM % (steps - 10)))
    ranks_of "$job" | sed -n "${victim}p" | send KILL 2>/dev/null || true
    wait $job || true
    goes_on "$run" 2
    same base "$run"
done
# At chosen moments: in the middle of a checkpoint, of a log line, of reading.
for moment in ckpt.create@rank0#2 ckpt.write@rank1#3 ckpt.seal#2 ckpt.rename#3 ckpt.latest#2 \
    ckpt.prune log.write#13 io.read@rank1#100; do
    run=kill_${moment//[@#]/_}
    MD_FAULT=$moment:kill tiny 2 "$run"
    [ "$rc" != 0 ] || fail "$moment: nobody was killed"
    goes_on "$run" 2
    same base "$run"
done

# The newest checkpoint is damaged: named, skipped, the one before it is taken.
damage() { # RUN WORD COMMAND...
    local run=$1 words=$2 newest
    cp -r "$scratch/cut_off" "$scratch/$run"
    newest=$(find "$scratch/$run/checkpoints" -name 'step-*.h5' | sort | tail -n 1)
    shift 2
    "$@" "$newest"
    goes_on "$run" 2
    says "warning: checkpoint skipped: " "$newest: " "$words" "resumed from"
    same base "$run"
}
flip() { # FILE: one byte in the middle
    local at=$(($(stat -c %s "$1") / 2))
    printf '\xa5' | dd of="$1" bs=1 seek=$at conv=notrunc status=none
}
done_well 2 cut_off train.max_steps=13
damage cut "cut or grown" truncate -s -1000
damage empty "not a checkpoint, or cut" truncate -s 0
damage flipped "damaged" flip
echo ok
