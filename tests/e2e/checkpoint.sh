#!/bin/bash
# md_hpc checkpoint info | verify | prune on the checkpoints of a real run, whole and damaged.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
done_well 2 base checkpoint.keep=3
folder=$scratch/base/checkpoints
newest=$folder/step-00000020.h5

# verb CODE WORDS ARGS...: exit code of `md_hpc checkpoint ARGS`, and what its output must hold.
verb() {
    local code=$1 words=$2
    shift 2
    rc=0
    "$MD_HPC" checkpoint "$@" >"$log" 2>&1 </dev/null || rc=$?
    [ "$rc" = "$code" ] || fail "checkpoint $*: exit code $rc, not $code"
    grep -qE -- "$words" "$log" || fail "checkpoint $*: the output lacks: $words"
}
steps() {
    # shellcheck disable=SC2012 # the names are ours
    ls "$folder" | sed -n 's/^step-0*\([0-9]*\)\.h5$/\1/p' | tr '\n' ' '
}

verb 0 'step 20, [0-9]+ arrays, [0-9.]+ MiB' info "$newest"
verb 0 'step 15, ' info "$scratch/base"
verb 0 'attn.qkv.weight +\[96, 32\] F32 +[0-9a-f]{16}$' info "$newest" --arrays
verb 0 '^  state hash [0-9a-f]{16}$' info "$newest"
hash=$(sed -n 's/^  state hash //p' "$log")
verb 0 "step-00000020.h5: whole, step 20, .* state hash $hash\$" verify "$newest"
verb 0 'max_steps' info "$newest" --config
verb 0 'step-00000010.h5: whole, step 10' verify "$scratch/base"
[ "$(grep -c ": whole," "$log")" = 3 ] || fail "not three checkpoints verified"

# A checkpoint that cannot be read now is no reason to begin from an older one, or anew.
for fault in 'list:cannot read the folder' 'open:cannot open' 'hash:cannot be read and hashed' \
    'read@rank1:rank 1: .*cannot read: '; do
    MD_FAULT=ckpt.${fault%%:*} tiny 2 base checkpoint.keep=3
    [ "$rc" = 74 ] || fail "ckpt.${fault%%:*}: exit code $rc instead of 74"
    grep -qE "^md_hpc: error: .*${fault#*:}" "$log" || fail "${fault%%:*}: the output lacks ${fault#*:}"
done
[ "$(steps)" = "10 15 20 " ] || fail "left after failed reads: $(steps)"

verb 64 '^usage: ' frobnicate
verb 64 'needs a checkpoint' info
verb 64 'info does not take "--all"' info "$newest" --all
verb 64 'needs a number from 1' prune "$scratch/base" --keep 0
verb 64 'needs a number from 0' prune "$scratch/base" --keep-every 7x
verb 66 'No such file' info "$scratch/nothing"
verb 66 'there is no checkpoint' verify "$scratch"

# One byte in the middle of the newest: its array is named, the others are told to be whole, and it is
# not the one that pruning leaves.
at=$(($(stat -c %s "$newest") / 2))
printf '\xa5' | dd of="$newest" bs=1 seek=$at conv=notrunc status=none
verb 65 "^$newest: not whole: $newest: [a-z0-9_./]+ is damaged" verify "$scratch/base"
[ "$(grep -c ": whole," "$log")" = 2 ] || fail "not two checkpoints whole"
verb 0 '1 deleted' prune "$scratch/base" --keep 1
[ "$(steps)" = "15 20 " ] || fail "left after pruning: $(steps)"
truncate -s 100 "$folder/step-00000015.h5"
verb 65 'none of 2 checkpoints is whole' prune "$scratch/base" --keep 1
[ "$(steps)" = "15 20 " ] || fail "left after pruning: $(steps)"
echo ok
