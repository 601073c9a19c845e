#!/bin/bash
# The cuda backend's whole host code, on the stand-in for CUDA (tests/emu): training as on the cpu
# backend, in fp32 and bf16, on a grid of ranks over MPI and over NCCL's stand-in, stopped and gone
# on; and what a user sees where there is no driver, no GPU, too few or too small ones.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
host=$MD_HPC
emu=$(dirname "$MD_HPC")/emu/md_hpc
[ -x "$emu" ] || { echo "no $emu" && exit 77; }
limit=$((120 * ${MD_TEST_SCALE:-1}))
short=(train.max_steps=5 checkpoint.every=3)
cuda=("${short[@]}" backend=cuda)
"$host" weights import --out "$scratch/clip.h5" tests/golden/clip_hf >"$log"
sed -i 's/"pixel"/"vit"/' "$scratch/tiny.cfg"
short+=(method.teacher.weights="$scratch/clip.h5")
cuda+=(method.teacher.weights="$scratch/clip.h5")

# close RUN RUN: every step's loss within 2 %, gradient norm within 10 %: what bf16 leaves.
close() {
    paste <(curve "$1") <(curve "$2") | awk '
        { d = $2 > $6 ? $2 - $6 : $6 - $2; e = $3 > $7 ? $3 - $7 : $7 - $3 }
        /null/ || d > 0.02 * $2 || e > 0.1 * $3 { print; bad = 1 }
        END { exit bad || NR == 0 }' || fail "$1 and $2 are not close"
}

# ---- training ----
done_well 1 cpu "${short[@]}"
MD_HPC=$emu
done_well 1 fp32 "${cuda[@]}" precision=fp32
near cpu fp32
MD_EMU_SMS=7 done_well 1 small_gpu "${cuda[@]}" precision=fp32 train.recompute=2
near cpu small_gpu
done_well 1 bf16 "${cuda[@]}"
close cpu bf16
grep -q "emulated" "$log" || fail "the table of ranks does not name the device"
for seed in 1 2; do
    MD_EMU_SEED=$seed done_well 1 "bf16_$seed" "${cuda[@]}" "train.recompute=$((seed - 1))"
    same bf16 "bf16_$seed"
done
# With nothing skipped all passes are alike, and are recorded.
done_well 1 mask "${cuda[@]}" precision=fp32 model.drop_path_mode=mask
near cpu mask
done_well 1 recomputed "${cuda[@]}" precision=fp32 model.drop_path_mode=mask train.recompute=2
same mask recomputed
grid=(parallel.tensor=2 parallel.comm=mpi)
done_well 4 grid "${cuda[@]}" precision=fp32 "${grid[@]}"
near cpu grid
done_well 4 grid_bf16 "${cuda[@]}" "${grid[@]}" parallel.sequence=true parallel.zero=1 \
    train.micro_batch=4
close cpu grid_bf16
MD_EMU_DEVICES=4 done_well 4 nccl "${cuda[@]}" precision=fp32 parallel.tensor=2 parallel.comm=nccl
near cpu nccl
MD_EMU_DEVICES=2 done_well 2 zero "${cuda[@]}" precision=fp32 parallel.zero=1
near cpu zero

# ---- demo.cfg, as its user types it ----
"$host" weights import --out "$scratch/classifier.h5" config/miniature/teacher >"$log"
# demo RUN RANKS PROGRAM [key=value...]
demo() {
    local run=$1 n=$2 program=$3
    shift 3
    "$MPIRUN" -np "$n" "$program" config/demo.cfg "run.dir=$scratch/$run" data.train="$scratch/tiny.h5" \
        method.teacher.weights="$scratch/classifier.h5" train.epochs=2 train.max_steps=1 \
        optim.warmup_epochs=0 "$@" >"$log" 2>&1 </dev/null || fail "demo.cfg $*: exit code $?"
}
demo demo 1 "$host"
demo demo_fp32 1 "$emu" backend=cuda precision=fp32
demo demo_grid 4 "$emu" backend=cuda precision=fp32 "${grid[@]}"
near demo demo_fp32
near demo demo_grid

# ---- gone on, here and on the cpu ----
done_well 1 stopped "${cuda[@]}" train.max_steps=3
done_well 1 stopped "${cuda[@]}" train.recompute=1
same bf16 stopped
done_well 1 moved "${cuda[@]}" precision=fp32 train.max_steps=3
MD_HPC=$host done_well 1 moved "${short[@]}"
near cpu moved

# ---- algorithms chosen by timing are chosen once ----
done_well 1 tuned "${cuda[@]}" cuda.tune=true train.max_steps=3
[ "$(wc -l <"$scratch/tuned/products.txt")" -gt 3 ] || fail "no choices were kept"
done_well 1 tuned "${cuda[@]}" cuda.tune=true
close cpu tuned

# refused CODE WORDS... -- KEYS...: one rank ends with this code and says so.
refused() {
    local code=$1 words=()
    shift
    while [ "$1" != -- ]; do words+=("$1") && shift; done
    shift
    rm -rf "$scratch/refused"
    tiny 1 refused "${cuda[@]}" "$@"
    [ "$rc" = "$code" ] || fail "exit code $rc, not $code: $*"
    says "${words[@]}"
}
MD_EMU_DEVICES=-1 refused 78 'no NVIDIA driver' 'backend = "cpu"' --
MD_EMU_DEVICES=0 refused 78 'no GPU can be used' 'backend = "cpu"' --
MD_EMU_MEMORY=200000 refused 71 'do not fit on' 'what a GPU has to hold' 'train.micro_batch = 8' \
    'train.recompute = 1' --
MD_FAULT=cuda.alloc#3 refused 71 'do not fit on' --
MD_FAULT=cuda.sync#4 refused 69 'waiting for the GPU' --
MD_EMU_FAIL=launch#40 refused 69 'invalid argument' --
MD_EMU_DEVICES=2 tiny 3 few "${cuda[@]}" train.batch=12
[ "$rc" = 78 ] || fail "three ranks on two GPUs: $rc"
says 'finds 2 GPUs'
MD_EMU_DEVICES=1 tiny 2 shared "${cuda[@]}" parallel.comm=nccl
[ "$rc" = 78 ] || fail "NCCL with two ranks on one GPU: $rc"
says 'parallel.comm = "mpi"'

# ---- without a device ----
for words in "help" "version" "plan $scratch/tiny.cfg method.teacher.weights=$scratch/clip.h5 backend=cuda"; do
    # shellcheck disable=SC2086 # words
    MD_EMU_DEVICES=-1 "$emu" $words >"$log" 2>&1 || fail "$words without a driver"
done
says "memory of a GPU"
"$emu" plan config/vit_h.cfg backend=cuda --ranks 8 --memory 80 >"$log" 2>&1 || fail "plan of vit_h"
says 'does NOT fit'
grep -qE 'train\.micro_batch = 128: .* GiB, fits' "$log" || fail "no smaller micro-batch"
grep -qE 'train\.recompute = 1[0-9]: .* GiB, fits' "$log" || fail "no blocks to recompute"
"$emu" plan config/vit_h.cfg backend=cuda --ranks 8 --memory 30 parallel.zero=1 train.recompute=20 >"$log" 2>&1
grep -qE 'train\.recompute = 2[1-9]: .* GiB, fits' "$log" || fail "no more blocks to recompute"
! grep -q 'parallel\.[a-z]* = ' "$log" || fail "ZeRO is on, and a model on two GPUs has twice the images"
