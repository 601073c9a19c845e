#!/bin/bash
# md_hpc weights export: what a run trained comes back bit for bit under every naming; exit codes,
# damage, no partial files.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh

fails() { # STATUS WORD ARGUMENTS...: md_hpc weights ends with this status and says the word
    local status=$1 word=$2
    shift 2
    rc=0
    "$MD_HPC" weights "$@" >"$log" 2>&1 || rc=$?
    [ "$rc" = "$status" ] || fail "'weights $*' ended with $rc, expected $status"
    says "$word"
}

hash_of() {
    "$MD_HPC" weights inspect "$1" | sed -n 's/.*, hash \([0-9a-f]*\)$/\1/p'
}

same_hash() {
    if [ -z "$(hash_of "$1")" ] || [ "$(hash_of "$1")" != "$(hash_of "$2")" ]; then
        fail "$1 is not $2"
    fi
}

for kind in shared per_layer; do
    run=$scratch/$kind
    abs=false
    [ $kind = shared ] || abs=true
    done_well 1 "$kind" model.rel_pos="$kind" model.abs_pos="$abs" train.max_steps=6
    fails 0 "wrote $run.h5 from $run/checkpoints/step-00000006.h5" import --out "$run.h5" "$run"
    for names in beit2 hf timm; do
        out=$scratch/$kind.$names
        fails 0 "wrote $out/model.safetensors" export --names $names --out "$out" "$run"
        fails 0 "missing 0, ignored" import --out "$out.h5" "$out"
        # the same from the weights file, byte for byte
        fails 0 "wrote" export --names $names --out "$out.again.safetensors" "$run.h5"
        cmp "$out/model.safetensors" "$out.again.safetensors" || fail "$names: not the same bytes"
    done
    same_hash "$run.h5" "$scratch/$kind.beit2.h5"
    same_hash "$run.h5" "$scratch/$kind.hf.h5"
    # timm's class has neither mask token nor pretraining head: a second round changes nothing
    fails 0 "left out, since timm.models.beit.Beit has not: mask_token, lm_head.weight" \
        export --names timm --out "$scratch/t.safetensors" "$run"
    fails 0 wrote export --names hf --out "$scratch/t_hf" "$scratch/$kind.timm.h5"
    fails 0 "hf-beit names" import --out "$scratch/t_hf.h5" "$scratch/t_hf"
    same_hash "$scratch/t_hf.h5" "$scratch/$kind.timm.h5"
done

run=$scratch/shared out=$scratch/x.safetensors
fails 0 "in BF16" export --names hf --dtype bf16 --out "$scratch/bf16" "$run/checkpoints"
fails 0 "BF16 tensors in" import --out "$scratch/bf16.h5" "$scratch/bf16"
fails 64 "wants --out, --names" export --out "$out" "$run"
fails 64 "--names is beit2, timm or hf" export --names keras --out "$out" "$run"
fails 64 "--dtype is f32, bf16 or f16" export --names hf --dtype f64 --out "$out" "$run"
fails 64 "takes one checkpoint" export --names hf --out "$out" "$run" "$run"
fails 64 "only --out goes" import --heads 2 --out "$scratch/x.h5" "$run"
fails 65 "holds no moving averages" export --names hf --ema --out "$out" "$run"
fails 65 "is not of BEiT's architecture" export --names hf --out "$out" "$(
    "$MD_HPC" weights import --out "$scratch/clip.h5" tests/golden/clip_hf >/dev/null
    echo "$scratch/clip.h5"
)"
fails 65 "tiny.h5" export --names hf --out "$out" "$scratch/tiny.h5"
fails 66 "$scratch/none" export --names hf --out "$out" "$scratch/none"
fails 66 "$scratch" export --names hf --out "$out" "$scratch"
fails 73 "/nowhere" export --names hf --out /nowhere/x/y "$run"

MD_FAULT=weights.write fails 74 "write failed" export --names hf --out "$out" "$run"
MD_FAULT=publish.sync fails 74 "write failed" export --names hf --out "$out" "$run"
MD_FAULT=publish.sync#2 fails 74 "config.json" export --names hf --out "$out" "$run"
[ -z "$(find "$scratch" -name '*.partial')" ] || fail "partial files are left"

# The newest checkpoint is damaged: the one before it is taken, with a warning.
newest=$run/checkpoints/step-00000006.h5
printf 'x' | dd of="$newest" bs=1 seek=$(($(stat -c %s "$newest") - 100)) conv=notrunc 2>/dev/null
fails 0 "checkpoint skipped" export --names hf --out "$scratch/older" "$run"
says "step-00000005.h5"
# Asked for by name it is read: what is damaged is a moment, and parameters are checked by themselves.
fails 0 "step-00000006.h5" export --names hf --out "$scratch/newer" "$newest"
echo ok
