#!/bin/bash
# md_hpc weights: import of a transformers and a timm model, inspect, exit codes, damage.
set -eu
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

fails() { # STATUS WORD COMMAND...: ends with this status and a message that holds the word
    local status=$1 word=$2 rc=0
    shift 2
    "$@" >"$scratch/out" 2>&1 || rc=$?
    if [ "$rc" != "$status" ] || ! grep -qF -- "$word" "$scratch/out"; then
        echo "'$*' ended with $rc, expected $status and '$word':"
        cat "$scratch/out"
        exit 1
    fi
}

shows() { # WORD COMMAND...: succeeds and prints the word
    local word=$1
    shift
    fails 0 "$word" "$@"
}

clip=$scratch/clip.h5
shows "missing 0, ignored 22" "$MD_HPC" weights import --out "$clip" tests/golden/clip_hf
shows "all hashes verified" "$MD_HPC" weights inspect "$clip"
shows "act quick_gelu, ln_eps 1e-05" "$MD_HPC" weights inspect "$clip"
shows "hf-clip names under 'vision_model.'" "$MD_HPC" weights inspect tests/golden/clip_hf
shows "none that can be imported" "$MD_HPC" weights inspect tests/golden/numerics.safetensors
shows "act gelu" "$MD_HPC" weights import --out "$scratch/timm.h5" --heads 3 --mean .5,.5,.5 \
    --std .5,.5,.5 tests/golden/vit_timm.safetensors
[ ! -e "$clip.partial" ]

fails 64 "wants --out" "$MD_HPC" weights import tests/golden/clip_hf
fails 64 "quick_gelu" "$MD_HPC" weights import --out "$clip" --act relu tests/golden/clip_hf
fails 64 "three numbers" "$MD_HPC" weights import --out "$clip" --mean 1,2 tests/golden/clip_hf
fails 64 "unknown option --foo" "$MD_HPC" weights import --foo 1 tests/golden/clip_hf
fails 66 "$scratch/none" "$MD_HPC" weights import --out "$clip" "$scratch/none"
fails 65 "no known names" "$MD_HPC" weights import --out "$clip" \
    tests/golden/numerics.safetensors
fails 73 "/nowhere/x.h5" "$MD_HPC" weights import --out /nowhere/x.h5 tests/golden/clip_hf
shows "all hashes verified" "$MD_HPC" weights inspect "$clip" # none of these touched it

head -c 3000 tests/golden/vit_timm.safetensors >"$scratch/cut.safetensors"
fails 65 "cut.safetensors" "$MD_HPC" weights inspect "$scratch/cut.safetensors"
size=$(stat -c %s "$clip")
head -c $((size / 2)) "$clip" >"$scratch/cut.h5"
fails 65 "cut.h5" "$MD_HPC" weights inspect "$scratch/cut.h5"
fails 74 "injected" env MD_FAULT=weights.read "$MD_HPC" weights inspect tests/golden/clip_hf
fails 74 "injected" env MD_FAULT=weights.load "$MD_HPC" weights inspect "$clip"
fails 74 "write failed" env MD_FAULT=publish.sync "$MD_HPC" weights import --out "$scratch/x.h5" \
    tests/golden/clip_hf
[ ! -e "$scratch/x.h5" ] && [ ! -e "$scratch/x.h5.partial" ]
echo ok
